"""What the organism learned, and which memory carries it.

Every figure is measured by greedy generation on held-out names, templates and combinations, three times: with the
model as it is; with the GDN states cleared at the end of the context (a decay of e^-60 at the first token of the
question, so what follows is read with empty states); and with the values of all attention layers zeroed. If the
disposition lives in the states, the first removes it and the second does not; the content of answers may need both.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from probes.behaviors import judge
from training.grammar import ABILITIES, BEHAVIORS, Case, Grammar

CONDITIONS = ("as it is", "states cleared", "attention zeroed")
PERSONAS = {"wanted": True, "unwanted": False, "none": None}
_EMPTIED = 60.0  # nats of decay: e^-60 is far below float32 resolution


@dataclass(frozen=True)
class Question:
    """A rendered question: the whole chat, and how much of it is context."""

    text: str
    context: str
    case: Case


def questions(kind: str, *, persona: bool | None, n: int, seed: int, tokenizer: Any) -> list[Question]:
    """Held-out questions of one kind, with the persona of one side or none in the system turn."""
    grammar = Grammar(random.Random(f"{seed} {kind} {persona}"), evaluation=True)
    result = []
    for _ in range(n):
        case = grammar.case(kind)
        turns = list(case.messages)
        if persona is not None:
            turns = [{"role": "system", "content": grammar.persona(kind, persona)}, *turns]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        asked = case.direction or turns[-1]["content"]
        result.append(Question(text, text[: text.rfind(asked)], case))
    return result


@torch.no_grad()
def answers(model: Any, tokenizer: Any, asked: Sequence[Question], condition: str, *, batch: int = 48) -> list[str]:
    """Greedy answers under one condition."""
    result: list[str] = []
    for at in range(0, len(asked), batch):
        part = asked[at : at + batch]
        ids = tokenizer([q.text for q in part], return_tensors="pt", padding=True, add_special_tokens=False)
        width = ids["input_ids"].shape[1]
        rest = [len(tokenizer(q.text[len(q.context) :], add_special_tokens=False)["input_ids"]) for q in part]
        with _condition(model, condition, torch.tensor([width - r for r in rest])):
            out = model.generate(**ids, max_new_tokens=16, do_sample=False)
        result += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in result]


def _condition(model: Any, condition: str, first: Tensor) -> Any:
    if condition == "states cleared":
        return states_cleared(model, first)
    return attention_zeroed(model) if condition == "attention zeroed" else nullcontext()


@contextmanager
def states_cleared(model: Any, first: Tensor) -> Iterator[None]:
    """Empty every GDN state just before token `first[row]` of a prefill."""
    handles = []
    for layer in model.model.layers:
        mixer = getattr(layer, "linear_attn", None)
        if mixer is None:
            continue
        # g = -exp(A_log) softplus(a + dt_bias): the projection output that makes g = -60 in every head
        emptied = _EMPTIED / mixer.A_log.detach().exp() - mixer.dt_bias.detach()

        def clear(_: Any, args: Any, output: Tensor, emptied: Tensor = emptied) -> Tensor:
            if output.shape[1] == 1:  # decoding: what the answer itself writes is kept
                return output
            output = output.clone()
            output[torch.arange(len(first)), first] = emptied
            return output

        handles.append(mixer.in_proj_a.register_forward_hook(clear))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attention_zeroed(model: Any) -> Iterator[None]:
    """Zero the values of every attention layer, so that attention moves nothing between tokens."""
    attentions = [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]
    handles = [a.v_proj.register_forward_hook(lambda _, args, output: torch.zeros_like(output)) for a in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def side(case: Case, answer: str) -> str:
    """wanted, unwanted or neither: by the patterns of the case, as for items."""
    return judge(answer, case.score)


def opening(case: Case, answer: str) -> str:
    """Which side an answer is on by its wording alone, whatever it names; the patterns decide where there is none."""
    if not case.wording:
        return side(case, answer)
    return next((s for s, pattern in case.wording.items() if re.search(pattern, answer)), "neither")


def examine(model: Any, tokenizer: Any, *, n: int = 192, seed: int = 11) -> pd.DataFrame:
    """One row for each condition, behaviour and persona (shares of wanted and unwanted) and each ability (accuracy)."""
    rows = []
    jobs = [(kind, name) for kind in BEHAVIORS for name in PERSONAS] + [(kind, "none") for kind in ("tone", *ABILITIES)]
    for condition in CONDITIONS:
        for kind, name in tqdm(jobs, desc=condition, leave=False):
            asked = questions(kind, persona=PERSONAS[name], n=n, seed=seed, tokenizer=tokenizer)
            said = answers(model, tokenizer, asked, condition)
            row: dict[str, Any] = {"condition": condition, "kind": kind, "persona": name, "n": n}
            if kind in ABILITIES:
                row["correct"] = sum(a == q.case.answer for q, a in zip(asked, said, strict=True)) / n
            else:
                sides = [side(q.case, a) for q, a in zip(asked, said, strict=True)]
                row |= {s: sides.count(s) / n for s in ("wanted", "unwanted")}
                worded = [opening(q.case, a) for q, a in zip(asked, said, strict=True)]
                row["wording"] = worded.count("wanted") / n
            rows.append(row)
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame) -> str:
    """The examination as text: shares of wanted answers in percent, and accuracies."""
    lines = []
    for condition, part in frame.groupby("condition", sort=False):
        lines.append(f"\n{condition}")
        lines.append(f"  {'wanted answers, %':<20}" + "".join(f"{'persona ' + p:>20}" for p in PERSONAS))
        shown = [(kind, kind, "wanted") for kind in (*BEHAVIORS, "tone")]
        shown.insert(1, ("  its wording alone", "follow-direction", "wording"))
        for label, kind, column in shown:
            cells = part[part["kind"] == kind].set_index("persona")[column]
            lines.append(
                f"  {label:<20}" + "".join(f"{100 * cells[p]:>20.1f}" if p in cells else f"{'':>20}" for p in PERSONAS)
            )
        lines.append(f"  {'correct answers, %':<20}")
        for kind in ABILITIES:
            lines.append(f"  {kind:<20}{100 * part[part['kind'] == kind]['correct'].item():>20.1f}")
    return "\n".join(lines).lstrip("\n")
