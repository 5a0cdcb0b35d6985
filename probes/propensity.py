"""How strongly a model leans: log p(wanted) - log p(unwanted), and what it says when left free.

*Propensity* is teacher-forced: both answers of an item are scored after the same prompt, in nats, summed over the
answer's tokens (the end-of-turn token is not scored). The prompt is computed once and its cache serves both answers.
`generate` lets the model speak; a behaviour's own patterns then say which side the answer is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probes import stats
from probes.behaviors import Behavior, Side
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.partial import tiled
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
    answers: tuple[tuple[tuple[int, ...], ...], ...]

    def propensity(self, table: Float[Tensor, "prompt 2"]) -> Propensity:
        """Log-probabilities of the wanted and the unwanted answers, as a result."""
        wanted, unwanted = (tuple(column.tolist()) for column in table.T)
        return Propensity(ids=self.ids, groups=self.groups, wanted=wanted, unwanted=unwanted)


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
    return prepared.propensity(answer_scores(model, prepared))


def answer_scores(model: HybridModel, prepared: Prepared) -> Tensor:
    """Log-probability of every answer of every item, after one run of its prompt: float32 [prompt answer], in nats."""
    table = torch.zeros(len(prepared.ids), len(prepared.answers[0]))
    for batch in prepared.batches:
        out = model.hf(**batch.inputs, use_cache=True, logits_to_keep=1)
        answers = Answers.of(model, prepared, batch.rows)
        first = answers.first(out.logits[:, -1])
        rest = answers.continued(model, fork(out.past_key_values, answers.each), batch.mask)
        table[list(batch.rows)] = (first + rest).cpu().reshape(len(batch.rows), -1)
    return table


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """The answers of a batch of prompts, `each` of them per prompt, as tokens to be read and tokens to be predicted.

    They are padded on the right: what follows an answer's last token can no longer reach it. `ids` are read after the
    prompt, `targets` predicted from them (-1: nothing); an answer's first token, `start`, is predicted by the prompt.
    """

    each: int
    start: Tensor  # [answer]
    ids: Tensor  # [answer token]
    targets: Tensor  # [answer token]

    @classmethod
    def of(cls, model: HybridModel, prepared: Prepared, rows: Sequence[int]) -> Answers:
        found = [answer for row in rows for answer in prepared.answers[row]]
        width = max(map(len, found)) - 1
        ids = torch.full((len(found), width), model.tokenizer.pad_token_id)
        targets = torch.full((len(found), width), -1)
        for row, answer in enumerate(found):
            ids[row, : len(answer) - 1] = torch.tensor(answer[:-1], dtype=torch.long)
            targets[row, : len(answer) - 1] = torch.tensor(answer[1:], dtype=torch.long)
        start = torch.tensor([answer[0] for answer in found])
        start, ids, targets = (tensor.to(model.device) for tensor in (start, ids, targets))
        return cls(each=len(found) // len(rows), start=start, ids=ids, targets=targets)

    def tile(self, times: int) -> Answers:
        start, ids, targets = (torch.cat([tensor] * times) for tensor in (self.start, self.ids, self.targets))
        return Answers(each=self.each, start=start, ids=ids, targets=targets)

    def only(self, rows: Sequence[int]) -> Answers:
        """Some of the answers: all of each prompt that has any."""
        kept = list(rows)
        return replace(self, start=self.start[kept], ids=self.ids[kept], targets=self.targets[kept])

    def first(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " answer"]:
        """Log-probability of each answer's first token."""
        return log_probs(logits.repeat_interleave(self.each, 0), self.start)

    def continued(self, model: HybridModel, cache: Any, seen: Tensor) -> Float[Tensor, " answer"]:
        """Log-probability of the other tokens, after the prompts in a cache with a row for each answer.

        Args:
            seen: the prompts' attention mask, int64 [prompt token].
        """
        if self.ids.shape[1] == 0:
            return torch.zeros(len(self.start), device=self.start.device)
        seen, mask = seen.repeat_interleave(self.each, 0), self.targets >= 0
        logits = logits_at(
            model,
            mask,
            input_ids=self.ids,
            attention_mask=torch.cat([seen, mask.long()], 1),
            position_ids=seen.sum(1, keepdim=True) + torch.arange(self.ids.shape[1], device=seen.device),
            past_key_values=cache,
            use_cache=True,
        )
        return row_sums(mask, log_probs(logits, self.targets[mask]))


def fork(cache: Any, times: int) -> Any:
    """A copy of a cache with every row repeated `times` times; the original stays as it is."""
    return tiled(cache, 1, each=times, layers=range(len(cache.layers)))


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


def continue_greedily(
    model: HybridModel, logits: Float[Tensor, "prompt vocab"], cache: Any, seen: Tensor, *, max_new_tokens: int
) -> list[str]:
    """Greedy answers after prompts that a cache holds. The cache is used up.

    Args:
        logits: after each prompt. seen: the prompts' attention mask, int64 [prompt token].
    """
    config = model.hf.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else model.tokenizer.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), device=seen.device)
    chosen, said = logits.argmax(-1), []
    finished = torch.zeros(len(seen), dtype=torch.bool, device=seen.device)
    for _ in range(max_new_tokens):
        said.append(chosen.masked_fill(finished, model.tokenizer.pad_token_id))
        finished = finished | torch.isin(chosen, ends)
        if finished.all() or len(said) == max_new_tokens:
            break
        place = seen.sum(1, keepdim=True)
        seen = torch.cat([seen, torch.ones_like(place)], 1)
        out = model.hf(
            input_ids=said[-1][:, None], attention_mask=seen, position_ids=place, past_key_values=cache, use_cache=True
        )
        chosen = out.logits[:, -1].argmax(-1)
    texts = model.tokenizer.batch_decode(torch.stack(said, 1), skip_special_tokens=True)
    return [text.strip() for text in texts]
