"""General text under many interventions: modelled plainly once, then from the layer on where an intervention begins.

On general text every token is edited, or for a state follows the edit, whatever the working phase: the whole text is
what a model should go on modelling.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.cost import Cost
from probes.damage import (
    BATCH_TOKENS,
    Damage,
    General,
    damage,
    divergence,
    perplexity_ratio,
    surprise,
    text_batches,
)
from probes.directions import Direction
from probes.model import HybridModel
from probes.partial import recording, starting_at
from probes.prompts import Batch
from probes.scoring import log_probs, logits_at
from probes.steering import Push, steer, steer_rows
from probes.trials import How, start_of

PLAIN_TOKENS = 1024  # texts of similar length in one batch; several interventions are put side by side


@dataclass(frozen=True, kw_only=True, eq=False)
class _Text:
    """A batch of texts: where its tokens are predicted, which they are, and the streams that enter some layers."""

    batch: Batch
    before: Tensor  # bool [text token]: a token is predicted from the one before it
    targets: Tensor
    streams: dict[int, Tensor]


class Texts:
    """A general text and what interventions do to its perplexity.

    Args:
        starts: layers at which interventions will begin. reuse, cost: as in `probes.trials.Trials`.

    Attributes:
        plain: nats that the text costs the model as it stands.
    """

    def __init__(
        self, model: HybridModel, general: General, *, starts: Collection[int], reuse: bool = True,
        cost: Cost | None = None,
    ):  # fmt: skip
        self.model, self.general, self.reuse, self.cost = model, general, reuse, cost or Cost()
        self.parts: list[_Text] = []
        if not reuse:
            self.plain = surprise(model, general)
            return
        with self.cost.instead_of(self.naive_tokens()):
            self.plain = sum(self._run(batch, scored, starts) for batch, scored in self._batches())

    def _batches(self) -> Iterator[tuple[Batch, Tensor]]:
        return text_batches(self.model, self.general, batch_tokens=PLAIN_TOKENS)

    def naive_tokens(self) -> int:
        return len(self.model.layers) * sum(map(len, self.general.ids))

    @torch.no_grad()
    def _run(self, batch: Batch, scored: Tensor, starts: Collection[int]) -> float:
        before, targets = scored.roll(-1, 1), batch.ids[scored]
        with recording(self.model, starts) as streams:
            logits = logits_at(self.model, before, **batch.inputs, use_cache=False)
        kept = {start: found[0] for start, found in streams.items()}
        self.parts.append(_Text(batch=batch, before=before, targets=targets, streams=kept))
        return -float(log_probs(logits, targets).sum())

    def ratios(self, pushes: Sequence[Push], how: How) -> list[float]:
        """Ratio of perplexities, edited over plain, under each push."""
        if not self.reuse:
            return [perplexity_ratio(self.general, self.plain, self._alone(push, how)) for push in pushes]
        nats = torch.zeros(len(pushes), dtype=torch.float64)
        with self.cost.instead_of(len(pushes) * self.naive_tokens()):
            for part in self.parts:
                several = max(BATCH_TOKENS // part.batch.ids.numel(), 1)
                for at in range(0, len(pushes), several):
                    some = pushes[at : at + several]
                    logits = self._logits(part, some, how)
                    found = log_probs(logits, part.targets.repeat(len(some))).reshape(len(some), -1)
                    nats[at : at + several] -= found.sum(1).double().cpu()
        return [perplexity_ratio(self.general, self.plain, float(each)) for each in nats]

    def _alone(self, push: Push, how: How) -> float:
        with self._steered(push, how):
            return surprise(self.model, self.general)

    def _steered(self, push: Push, how: How) -> AbstractContextManager[None]:
        mode, form = _on_text(push[0], how)
        return steer(self.model, push[0], dose=push[1], phase="both", mode=mode, form=form)

    def damage(self, push: Push, how: How) -> Damage:
        """Perplexity and divergence under one push."""
        if not self.reuse:
            return damage(self.model, self.general, lambda: self._steered(push, how))
        edited, kl = 0.0, 0.0
        with self.cost.instead_of(2 * self.naive_tokens()):
            for part in self.parts:
                base, other = self._logits(part, [None], how, push), self._logits(part, [push], how)
                edited -= float(log_probs(other, part.targets).sum())
                kl += divergence(base, other)
        return Damage.of(self.general, plain=self.plain, edited=edited, kl=kl)

    @torch.no_grad()
    def _logits(self, part: _Text, pushes: Sequence[Any], how: How, like: Push | None = None) -> Tensor:
        """Logits where tokens are predicted, push by push; None is no push, run from where `like` begins."""
        times, rows = len(pushes), len(part.batch.rows)
        start = start_of((like or pushes[0])[0])
        inputs = {name: tensor.repeat(times, 1) for name, tensor in part.batch.inputs.items()}
        turns = [i for i in range(times) for _ in range(rows)]
        edited = nullcontext()
        if like is None:
            mode, form = _on_text(pushes[0][0], how)
            edited = steer_rows(self.model, pushes, turns, mode=mode, form=form)
        begun = starting_at(self.model, start, part.streams[start].repeat(times, 1, 1)) if start else nullcontext()
        with edited, begun:
            return logits_at(self.model, part.before.repeat(times, 1), **inputs, use_cache=False)


def _on_text(direction: Direction, how: How) -> tuple[str, str]:
    """Mode and form on a text. A state that is edited at the end of a prompt is edited before it: what follows counts.

    The state before a text is empty and cannot be turned: it gets the push that would have turned it.
    """
    form = "initial" if how.form == "end" else how.form
    empty = direction.site == "gdn.state" and form == "initial"
    return "add" if empty and how.mode == "rotate" else how.mode, form
