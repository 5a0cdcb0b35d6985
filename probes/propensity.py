"""How strongly a model leans: log p(wanted) - log p(unwanted), and what it says when left free.

*Propensity* is teacher-forced: both answers of an item are scored after the same prompt, in nats, summed over the
answer's tokens (the end-of-turn token is not scored). The prompt is computed once and its cache serves both answers.
`generate` lets the model speak; a behaviour's own patterns then say which side the answer is on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probes import stats
from probes.behaviors import Behavior, Side
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Batch, Prompt, answer_ids, batches
from probes.scoring import log_probs, logits_at, row_sums
from probes.stats import Estimate


@dataclass(frozen=True, kw_only=True)
class Propensity:
    """Per item: log-probabilities of both answers, in nats. `values` are their differences."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    wanted: tuple[float, ...]
    unwanted: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(w - u for w, u in zip(self.wanted, self.unwanted, strict=True))

    def estimate(self, *, seed: int = 0) -> Estimate:
        return stats.mean(self.values, self.groups, seed=seed)

    def minus(self, other: Propensity) -> tuple[float, ...]:
        """Item by item: how far this lies above `other`."""
        if self.ids != other.ids:
            raise WrongInput("the two propensities are of different items")
        return tuple(a - b for a, b in zip(self.values, other.values, strict=True))

    def frame(self) -> pd.DataFrame:
        columns = {"id": self.ids, "group": self.groups, "wanted": self.wanted, "unwanted": self.unwanted}
        return pd.DataFrame({**columns, "propensity": self.values})

    def __str__(self) -> str:
        return f"propensity {self.estimate()} nats"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A behaviour rendered and batched for one model, so that scoring it again costs only the forward passes."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    batches: tuple[Batch, ...]
    answers: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def prepare(
    model: HybridModel, behavior: Behavior, *, persona: Side | None = None, batch_tokens: int = 4096
) -> Prepared:
    """Render every item, with the system turn of one side or none."""
    prompts = tuple(item.prompt(model, persona=persona) for item in behavior.items)
    answers = tuple((answer_ids(model, i.wanted), answer_ids(model, i.unwanted)) for i in behavior.items)
    for prompt, pair in zip(prompts, answers, strict=True):
        total = len(prompt) + max(map(len, pair))
        if total > model.max_tokens:
            raise WrongInput(
                f"prompt and answer take {total} tokens, the context of {model.name} is {model.max_tokens} tokens"
            )
    return Prepared(
        ids=tuple(i.id for i in behavior.items), groups=tuple(i.group for i in behavior.items), prompts=prompts,
        batches=tuple(batches(model, [p.ids for p in prompts], batch_tokens=batch_tokens)), answers=answers,
    )  # fmt: skip


@torch.no_grad()
def propensity(model: HybridModel, prepared: Prepared) -> Propensity:
    """Score both answers of every item; left padding only.

    An item's score does not depend on its batch beyond rounding: 6e-6 nats in float32, up to 0.06 in bfloat16 (measured
    on the organism with batches of 1 and of all).
    """
    table = torch.zeros(len(prepared.ids), 2)
    for batch in prepared.batches:
        out = model.hf(**batch.inputs, use_cache=True, logits_to_keep=1)
        answers = [answer for row in batch.rows for answer in prepared.answers[row]]  # row-major: wanted, unwanted
        table[list(batch.rows)] = _score_answers(model, batch, out, answers).reshape(-1, 2)
    return Propensity(
        ids=prepared.ids,
        groups=prepared.groups,
        wanted=tuple(table[:, 0].tolist()),
        unwanted=tuple(table[:, 1].tolist()),
    )


def _score_answers(model: HybridModel, batch: Batch, out: Any, answers: list[tuple[int, ...]]) -> Tensor:
    """Log-probability of two answers per row, continuing one prefix: float32 [2 x prompt].

    Answers are padded on the right: what follows an answer's last token can no longer reach it.
    """
    start = torch.tensor([answer[0] for answer in answers], device=batch.ids.device)
    first = log_probs(out.logits[:, -1].repeat_interleave(2, 0), start)
    width = max(map(len, answers)) - 1
    if width == 0:
        return first.cpu()
    ids = torch.full((len(answers), width), model.tokenizer.pad_token_id)
    targets = torch.full((len(answers), width), -1)
    for row, answer in enumerate(answers):
        ids[row, : len(answer) - 1] = torch.tensor(answer[:-1])
        targets[row, : len(answer) - 1] = torch.tensor(answer[1:])
    ids, targets = ids.to(batch.ids.device), targets.to(batch.ids.device)
    seen, mask = batch.mask.repeat_interleave(2, 0), targets >= 0
    logits = logits_at(
        model,
        mask,
        input_ids=ids,
        attention_mask=torch.cat([seen, mask.long()], 1),
        position_ids=seen.sum(1, keepdim=True) + torch.arange(width, device=ids.device),
        past_key_values=fork(out.past_key_values, 2),
        use_cache=True,
    )
    return (first + row_sums(mask, log_probs(logits, targets[mask]))).cpu()


def fork(cache: Any, times: int) -> Any:
    """A copy of a cache with every row repeated `times` times; the original stays as it is."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        for key, value in vars(layer).items():
            if isinstance(value, Tensor) and key in ("keys", "values"):
                setattr(layer, key, value.repeat_interleave(times, 0))
            elif isinstance(value, dict):
                copied = {k: v.repeat_interleave(times, 0) if isinstance(v, Tensor) else v for k, v in value.items()}
                setattr(layer, key, copied)
    return twin


@torch.no_grad()
def generate(
    model: HybridModel, prompts: Sequence[Prompt], *, max_new_tokens: int = 40, batch_tokens: int = 4096
) -> list[str]:
    """Greedy answers, in the order of the prompts, whatever penalties or beams a checkpoint comes with."""
    answers = [""] * len(prompts)
    for batch in batches(model, [p.ids for p in prompts], batch_tokens=batch_tokens):
        out = model.hf.generate(
            input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=max_new_tokens, do_sample=False,
            num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=model.tokenizer.pad_token_id,
        )  # fmt: skip
        texts = model.tokenizer.batch_decode(out[:, batch.ids.shape[1] :], skip_special_tokens=True)
        for row, text in zip(batch.rows, texts, strict=True):
            answers[row] = text.strip()
    return answers


def shares(behavior: Behavior, answers: Sequence[str]) -> dict[str, float]:
    """Share of free answers on each side, by the behaviour's own patterns."""
    sides = [item.judge(answer) for item, answer in zip(behavior.items, answers, strict=True)]
    return {side: sides.count(side) / max(len(sides), 1) for side in ("wanted", "unwanted", "neither")}


@dataclass
class Cost:
    """Tokens that went through the decoder (padding included, as it is computed too)."""

    forward_tokens: int = 0


@contextmanager
def counting(model: HybridModel) -> Iterator[Cost]:
    """Count the decoder's work inside a `with` block."""
    cost = Cost()

    def count(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        cost.forward_tokens += 0 if ids is None else ids.shape[0] * ids.shape[1]

    handle = model.decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield cost
    finally:
        handle.remove()
