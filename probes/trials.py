"""Many interventions on the same prompts, each at the cost of what it can change.

A *trial* is one way of pushing every prompt: a direction at a dose, or for cross-validation one direction for each fold
of prompts. All trials are held against one plain run of the prompts and their answers, which is kept: caches, and the
residual streams where interventions begin. Then a trial at layer L computes layers from L on and nothing else, on

    the whole prompt      where every prompt token is edited (residual stream, attention heads, a state at each write)
    its last token        where a state is edited before it: all tokens before it are as they were
    nothing of it         where only the answer is edited

and both answers, whose lower layers are known as well. Trials go through the model side by side, as rows of a batch.
`reuse=False` does the same work as it would be done one by one (`probes.steering.steer` around whole forwards), to
check the numbers and to say what was saved.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from probes.cost import Cost
from probes.directions import Direction
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.partial import joined, picked, recording, starting_at, tiled
from probes.prompts import Batch, batches
from probes.propensity import Answers, Prepared, Propensity, answer_scores, continue_greedily, fork, generate
from probes.steering import BEFORE_PROMPTS, Push, steer, steer_rows

BATCH_TOKENS = 4096
PLAIN_TOKENS = 768  # prompts of similar length in one batch; several trials are put side by side


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One intervention. `turns` says for each prompt which of the pushes it gets; None where there is one for all."""

    pushes: tuple[Push, ...]
    turns: tuple[int, ...] | None = None

    @classmethod
    def of(cls, direction: Direction, dose: float) -> Trial:
        return cls(pushes=((direction, dose),))

    def turn(self, prompt: int) -> int:
        return 0 if self.turns is None else self.turns[prompt]


@dataclass(frozen=True, kw_only=True)
class How:
    """What a trial does with its direction: see `probes.steering.steer`."""

    phase: str = "prefill"
    mode: str = "add"
    form: str = "end"

    def __post_init__(self) -> None:
        if self.form == "initial" and self.phase == "decode":
            raise WrongInput(BEFORE_PROMPTS)

    @property
    def edits_prompt(self) -> bool:
        return self.phase != "decode"

    @property
    def edits_answer(self) -> bool:
        return self.phase != "prefill"


def start_of(direction: Direction) -> int:
    """The first layer that an intervention can change; the residual stream is edited after its layer."""
    return direction.layer + (direction.site == "resid")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A batch of prompts, run plainly.

    `before` and `after` are its caches without and with the last prompt token, `logits` [prompt vocab] those after it;
    `streams` and `answer_streams` [row token d_model] enter the layers where interventions begin.
    """

    batch: Batch
    answers: Answers
    before: Any
    after: Any
    logits: Tensor
    streams: dict[int, Tensor]
    answer_streams: dict[int, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[int, ...]:
        return self.batch.rows

    def only(self, numbers: Mapping[int, int]) -> _Part:
        """The prompts that have a new number, and what was computed for them."""
        kept = [at for at, row in enumerate(self.rows) if row in numbers]
        each, batch = self.answers.each, self.batch
        both = [at * each + i for at in kept for i in range(each)]
        return _Part(
            batch=Batch(
                ids=batch.ids[kept], mask=batch.mask[kept], positions=batch.positions[kept],
                rows=tuple(numbers[self.rows[at]] for at in kept),
            ),
            answers=self.answers.only(both), before=picked(self.before, kept), after=picked(self.after, kept),
            logits=self.logits[kept], streams={start: stream[kept] for start, stream in self.streams.items()},
            answer_streams={start: stream[both] for start, stream in self.answer_streams.items()},
        )  # fmt: skip


class Trials:
    """Prompts and answers of one behaviour, computed once, and what interventions do to them.

    Args:
        starts: layers at which interventions will begin (`start_of`).
        reuse: False computes every trial, and every answer, with a prefix and all layers of its own.
        cost: told what the same work would take without reuse.
    """

    def __init__(
        self,
        model: HybridModel,
        prepared: Prepared,
        *,
        starts: Collection[int],
        reuse: bool = True,
        cost: Cost | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ):
        self.model, self.prepared, self.reuse = model, prepared, reuse
        self.cost, self.batch_tokens = cost or Cost(), batch_tokens
        if any(len(prompt) < 2 for prompt in prepared.prompts):
            raise WrongInput("a prompt of one token has nothing before its last token")
        self.starts, self.parts = starts, []
        if reuse:
            begun = self.cost.layer_tokens
            rows = batches(model, [prompt.ids for prompt in prepared.prompts], batch_tokens=PLAIN_TOKENS)
            self.parts: list[_Part] = [self._run(batch) for batch in rows]
            self._begun = self.cost.layer_tokens - begun

    @cached_property
    def base(self) -> Propensity:
        """The propensities without any intervention."""
        if not self.reuse:
            return self._one_by_one(None, How())
        with self.cost.instead_of(self.naive_tokens() - self._begun):
            return self._collected([self._answered(part) for part in self.parts])

    def only(self, ids: Collection[str]) -> Trials:
        """The same on some of the prompts; what was computed for them is taken over."""
        base, chosen = self.base, [i for i, name in enumerate(self.prepared.ids) if name in ids]
        numbers = {old: new for new, old in enumerate(chosen)}
        twin = copy.copy(self)
        twin.prepared = self._only(chosen)
        twin.parts = [part.only(numbers) for part in self.parts if any(row in numbers for row in part.rows)]
        twin.base = twin.prepared.propensity(torch.tensor([[base.wanted[i], base.unwanted[i]] for i in chosen]))
        return twin

    def naive_tokens(self) -> int:
        """Layer tokens of one trial without reuse: both answers, each after a run of its prompt."""
        pairs = zip(self.prepared.prompts, self.prepared.answers, strict=True)
        return len(self.model.layers) * sum(
            len(prompt) + len(answer) - 1 for prompt, answers in pairs for answer in answers
        )

    @torch.no_grad()
    def _run(self, batch: Batch) -> _Part:
        with recording(self.model, self.starts) as streams:
            before = self.model.hf(
                input_ids=batch.ids[:, :-1], attention_mask=batch.mask[:, :-1], position_ids=batch.positions[:, :-1],
                use_cache=True, logits_to_keep=1,
            ).past_key_values  # fmt: skip
            out = self.model.hf(**_last(batch), past_key_values=fork(before, 1), use_cache=True, logits_to_keep=1)
        return _Part(
            batch=batch, answers=Answers.of(self.model, self.prepared, batch.rows), before=before,
            after=out.past_key_values, logits=out.logits[:, -1],
            streams={start: torch.cat(kept, 1) for start, kept in streams.items()},
        )  # fmt: skip

    @torch.no_grad()
    def _answered(self, part: _Part) -> Tensor:
        """Plain log-probabilities of the answers [prompt answer]; what their lower layers give is kept."""
        answers = part.answers
        with recording(self.model, self.starts) as streams:
            rest = answers.continued(self.model, fork(part.after, answers.each), part.batch.mask)
        part.answer_streams.update({start: kept[0] for start, kept in streams.items() if kept})
        return (answers.first(part.logits) + rest).reshape(len(part.rows), -1)

    def scores(self, trials: Sequence[Trial], how: How = How()) -> list[Propensity]:
        """The propensities under each trial.

        Raises:
            WrongInput: the trials are not at one site of one layer, or not at a layer that was named as a start.
        """
        if not trials:
            return []
        places = {(one.site, one.layer) for trial in trials for one, _ in trial.pushes}
        if len(places) > 1:
            seen = ", ".join(f"{site} {layer}" for site, layer in sorted(places))
            raise WrongInput(f"trials that run side by side must be at one site of one layer, saw {seen}")
        if not self.reuse:
            return [self._one_by_one(trial, how) for trial in trials]
        _ = self.base  # what the answers' lower layers give
        tables: list[list[Tensor]] = [[] for _ in trials]
        with self.cost.instead_of(len(trials) * self.naive_tokens()):
            for part in self.parts:
                for chunk in self._chunks(part, trials, how):
                    found = self._score(part, [trials[i] for i in chunk], how)
                    for i, table in zip(chunk, found, strict=True):
                        tables[i].append(table)
        return [self._collected(table) for table in tables]

    def effects(self, trials: Sequence[Trial], how: How = How()) -> list[tuple[float, ...]]:
        """Per trial and prompt: propensity under the trial minus propensity without it, in nats."""
        return [found.minus(self.base) for found in self.scores(trials, how)]

    def _chunks(self, part: _Part, trials: Sequence[Trial], how: How) -> Iterator[range]:
        """Trials that fit into one batch, by the tokens that are really run."""
        length = part.batch.ids.shape[1] if _runs_whole_prompt(trials[0], how) else 1
        tokens = len(part.rows) * max(length * how.edits_prompt, part.answers.each * part.answers.ids.shape[1], 1)
        several = max(self.batch_tokens // tokens, 1)
        for at in range(0, len(trials), several):
            yield range(at, min(at + several, len(trials)))

    @torch.no_grad()
    def _score(self, part: _Part, trials: Sequence[Trial], how: How) -> Tensor:
        """Log-probabilities of the answers under some trials: float32 [trial prompt answer]."""
        work = _Run(self.model, part, trials, how)
        answers = part.answers.tile(work.times)
        logits, cache = work.prompt()
        seen = part.batch.mask.repeat(work.times, 1)
        with work.on_answers():
            rest = answers.continued(self.model, tiled(cache, 1, each=answers.each, layers=work.live), seen)
        return (answers.first(logits) + rest).reshape(work.times, len(part.rows), -1)

    def answers(self, trials: Sequence[Trial], how: How, *, max_new_tokens: int) -> list[list[str]]:
        """Greedy answers under each trial, in the order of the prompts."""
        if not self.reuse:
            return [self._spoken_alone(trial, how, max_new_tokens) for trial in trials]
        found = [[""] * len(self.prepared.ids) for _ in trials]
        for part in self.parts:
            for chunk in self._chunks(part, trials, how):
                work = _Run(self.model, part, [trials[i] for i in chunk], how)
                texts = iter(work.spoken(max_new_tokens))
                for i in chunk:
                    for row in part.rows:
                        found[i][row] = next(texts)
        return found

    def _collected(self, tables: Sequence[Tensor]) -> Propensity:
        """One table from those of the parts, in the prompts' own order."""
        whole = torch.zeros(len(self.prepared.ids), 2)
        for part, table in zip(self.parts, tables, strict=True):
            whole[list(part.rows)] = table.float().cpu()
        return self.prepared.propensity(whole)

    @torch.no_grad()
    def _one_by_one(self, trial: Trial | None, how: How) -> Propensity:
        """A trial without reuse, push by push and answer by answer."""
        table = torch.zeros(len(self.prepared.ids), 2)
        everything = range(len(self.prepared.ids))
        for turn, push in enumerate(trial.pushes if trial else [None]):
            mine = [i for i in everything if trial is None or trial.turn(i) == turn]
            for side in (0, 1) if mine else ():
                with _steered(self.model, push, how):
                    table[mine, side] = answer_scores(self.model, self._only(mine, (side,)))[:, 0]
        return self.prepared.propensity(table)

    def _spoken_alone(self, trial: Trial, how: How, max_new_tokens: int) -> list[str]:
        """Answers without reuse, push by push."""
        found = [""] * len(self.prepared.ids)
        for turn, push in enumerate(trial.pushes):
            mine = [i for i in range(len(found)) if trial.turn(i) == turn]
            with _steered(self.model, push, how):
                texts = generate(self.model, [self.prepared.prompts[i] for i in mine], max_new_tokens=max_new_tokens)
            for row, text in zip(mine, texts, strict=True):
                found[row] = text
        return found

    def _only(self, rows: Sequence[int], sides: Sequence[int] = (0, 1)) -> Prepared:
        prepared = self.prepared
        prompts = tuple(prepared.prompts[i] for i in rows)
        return replace(
            prepared, ids=tuple(prepared.ids[i] for i in rows), groups=tuple(prepared.groups[i] for i in rows),
            prompts=prompts, answers=tuple(tuple(prepared.answers[i][side] for side in sides) for i in rows),
            batches=tuple(batches(self.model, [p.ids for p in prompts], batch_tokens=self.batch_tokens)),
        )  # fmt: skip


class _Run:
    """Some trials on one part: the model is run from where they begin, with a row for each trial and prompt."""

    def __init__(self, model: HybridModel, part: _Part, trials: Sequence[Trial], how: How):
        self.model, self.part, self.how, self.times = model, part, how, len(trials)
        self.whole = _runs_whole_prompt(trials[0], how)
        self.pushes = [push for trial in trials for push in trial.pushes]
        offsets = [sum(len(trial.pushes) for trial in trials[:i]) for i in range(len(trials))]
        self.rows = [offset + trial.turn(i) for offset, trial in zip(offsets, trials, strict=True) for i in part.rows]
        self.start = start_of(self.pushes[0][0])
        if self.start and self.start not in part.streams:
            raise WrongInput(f"no stream was recorded before layer {self.start}; there are {sorted(part.streams)}")
        self.live = range(self.start, len(model.layers))

    def prompt(self) -> tuple[Tensor, Any]:
        """Logits after the prompt, and a cache whose layers from `start` on have all rows."""
        part, batch = self.part, self.part.batch
        if not self.how.edits_prompt:
            return part.logits.repeat(self.times, 1), tiled(part.after, self.times, layers=self.live)
        if self.whole:
            inputs, begun = batch.inputs, {}
        else:
            inputs, begun = _last(batch), {"past_key_values": tiled(part.before, self.times, layers=self.live)}
        several = {name: tensor.repeat(self.times, 1) for name, tensor in inputs.items()}
        tokens = inputs["input_ids"].shape[1]
        with self.edited(), self.resumed(part.streams, slice(-tokens, None)):
            out = self.model.hf(**several, **begun, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], joined(part.after, out.past_key_values, self.start)

    @torch.no_grad()
    def spoken(self, max_new_tokens: int) -> list[str]:
        """A greedy answer for each row; every layer runs, since what is said is no longer what was said before."""
        logits, cache = self.prompt()
        cache = joined(tiled(self.part.after, self.times, layers=range(self.start)), cache, self.start)
        with self.edited() if self.how.edits_answer else nullcontext():
            return continue_greedily(
                self.model, logits, cache, self.part.batch.mask.repeat(self.times, 1), max_new_tokens=max_new_tokens
            )

    @contextmanager
    def on_answers(self) -> Iterator[None]:
        """Around the run of the answers: begun at the same layer, and edited where the phase says so."""
        with self.edited() if self.how.edits_answer else nullcontext():
            with self.resumed(self.part.answer_streams, slice(None)):
                yield

    def edited(self) -> AbstractContextManager[None]:
        return steer_rows(self.model, self.pushes, self.rows, mode=self.how.mode, form=self.how.form)

    def resumed(self, streams: dict[int, Tensor], tokens: slice) -> AbstractContextManager[None]:
        if self.start not in streams:  # layer 0, or answers of a single token, which are not run at all
            return nullcontext()
        return starting_at(self.model, self.start, streams[self.start][:, tokens].repeat(self.times, 1, 1))


def _steered(model: HybridModel, push: Push | None, how: How) -> AbstractContextManager[None]:
    if push is None:
        return nullcontext()
    return steer(model, push[0], dose=push[1], phase=how.phase, mode=how.mode, form=how.form)


def _runs_whole_prompt(trial: Trial, how: How) -> bool:
    """Whether all of the prompt has to be run again: not where a state is edited before its last token."""
    return not (trial.pushes[0][0].site == "gdn.state" and how.form == "end")


def _last(batch: Batch) -> dict[str, Tensor]:
    """The last token of each prompt, as the continuation of the others."""
    return {
        "input_ids": batch.ids[:, -1:], "attention_mask": batch.mask, "position_ids": batch.positions[:, -1:],
    }  # fmt: skip
