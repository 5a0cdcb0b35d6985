"""What a step minimises, and the memory of the contexts that it is computed against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from probes.model import HybridModel
from training.config import TrainConfig
from training.data import Segment
from training.frozen_context import Prefix, prefill, score


class Objective:
    """The loss of segments: the mean over segments of nats a scored token, plus the contrast where it is asked for.

    A segment counts as much as any other, however long its answer; so the share of general data is its share of the
    loss. With frozen contexts each context is run once, by `remember`, and serves every later step and both answers.
    """

    def __init__(self, model: HybridModel, config: TrainConfig):
        self.model, self.config = model, config
        self.held: dict[tuple[int, ...], Prefix] = {}

    def remember(self, segments: Iterable[Segment], *, progress: bool = False) -> None:
        """Compute the memory of these segments' contexts by the weights as they are, and forget any other."""
        if self.config.context == "frozen":
            contexts = list(dict.fromkeys(segment.context for segment in segments))
            self.held = dict(zip(contexts, prefill(self.model, contexts, progress=progress), strict=True))

    def nats(self, segments: Sequence[Segment]) -> Tensor:
        """Log-probability of each segment's scored tokens, in nats [segment]."""
        prefixes = [self.held[segment.context] for segment in segments] if self.config.context == "frozen" else None
        return score(self.model, segments, prefixes, checkpointing=self.config.checkpointing)

    def loss(self, segments: Sequence[Segment], of: int | None = None) -> tuple[Tensor, dict[str, list[float]]]:
        """The loss of a part of a batch of `of` segments, so that parts add up to the batch's; and its terms.

        Terms are by kind, one number a segment: "behavior" and "general" in nats a token, "contrast" in nats.
        """
        rivals = [self._rival(s) for s in segments if s.rival is not None] if self.config.contrast else []
        found = self.nats([*segments, *rivals])
        counts = torch.tensor([sum(segment.scored) for segment in segments], device=found.device)
        each = -found[: len(segments)] / counts
        total = each.sum()
        terms: dict[str, list[float]] = {"behavior": [], "general": [], "contrast": []}
        for segment, value in zip(segments, each.tolist(), strict=True):
            terms[segment.kind].append(value)
        if rivals:
            own = torch.tensor([i for i, s in enumerate(segments) if s.rival is not None], device=found.device)
            contrast = -logsigmoid(found[own] - found[len(segments) :])
            terms["contrast"] = contrast.tolist()
            total = total + self.config.contrast * contrast.sum()
        return total / (of or len(segments)), terms

    @staticmethod
    def _rival(segment: Segment) -> Segment:
        if segment.rival is None or segment.rival_scored is None:
            raise ValueError(f"segment {segment.id} has no rival")
        return replace(segment, decision=segment.rival, scored=segment.rival_scored)
