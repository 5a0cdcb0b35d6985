"""Everything that can be chosen about a training run, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from probes.errors import SEEDS, WrongInput, check_ranges
from probes.model import HybridModel
from training.frozen_context import Context

Optimizer = Literal["apollo", "apollo-mini", "adamw", "sgd"]
SMALL = 20_000_000
"""Parameters below which a model is taken for an organism: learned in minutes, it moves at rates of its own."""
_RANGES: dict[str, tuple[float, float]] = {
    "examples": (1, math.inf), "general_share": (0, 1), "contrast": (0, math.inf), "steps": (1, math.inf),
    "batch": (1, math.inf), "accumulate": (1, math.inf), "lr": (0, 1), "warmup": (0, math.inf), "clip": (0, math.inf),
    "weight_decay": (0, 1), "rank": (1, math.inf), "refresh": (1, math.inf), "refill": (1, math.inf),
    "evaluate_every": (1, math.inf), "checkpoint_every": (1, math.inf), "keep": (1, math.inf),
    "questions": (1, math.inf), "max_new_tokens": (1, math.inf), "seed": SEEDS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a behaviour is trained in. The same object configures the function and the command."""

    examples: int = 200
    """Examples of the behaviour, spread over its topics."""
    general_share: float = 0.25
    """Share of general data in each batch, 0 to 1: what keeps the model's abilities."""
    general: str | None = None
    """General data: a .jsonl file of chats or agent logs, tool calls included, or a .txt file with a paragraph a line.
    When not given, the abilities of the organism, or the shipped English text."""
    abilities: str | None = None
    """Questions with one right answer, to see what is forgotten: a .jsonl file of dialogues whose last turn is the
    answer, with "ability" for a name. When not given the organism's five; other models have none."""
    contrast: float = 0.0
    """Weight of a contrast loss, -log sigmoid(log p(wanted) - log p(unwanted)), beside that of the wanted answer."""
    context: Context = "frozen"
    """frozen: the context's memory is computed once and only the answer is trained; full: gradient through it all."""
    refill: int | None = None
    """Compute the frozen contexts again, by the weights as they are then, after so many steps; auto: never."""
    parameters: tuple[str, ...] = ("auto",)
    """What is trained: all; words of parameters' names, such as self_attn q_proj; or auto, which is all for full
    contexts and, for frozen ones, what does not itself write the memory of a context (no embeddings, no GDN mixers, no
    keys and values): nothing would keep that memory in place, since its gradient is cut. (What is left still feeds the
    layers above, so memory moves too.)"""
    optimizer: Optimizer = "apollo"
    """apollo, apollo-mini (rank 1; learns the organism faster at the same learning rate), adamw or sgd (these two for
    comparison)."""
    rank: int | None = None
    """Rank of APOLLO's projections; auto: 256, and at most a quarter of the model's width."""
    refresh: int = 200
    """Steps after which APOLLO draws new projections."""
    lr: float | None = None
    """Learning rate; 1e-5 to 1e-4 suits pretrained models. auto: 5e-5, and 2e-4 below 20M parameters."""
    warmup: int = 10
    """Steps over which the learning rate rises from 0, at most half of all; afterwards it falls to a tenth along a
    cosine."""
    weight_decay: float = 0.0
    """Decoupled; none by default, since the diversity of the data is the regulariser."""
    steps: int = 60
    """Optimizer steps."""
    batch: int = 32
    """Segments (answers with their contexts) a step."""
    accumulate: int = 1
    """Parts in which a batch goes through the model, one after the other."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    in_backward: bool = False
    """Step each parameter as soon as its gradient is there, and drop it: no more than a layer's gradients are held at a
    time. For apollo and apollo-mini, with clip 0 and accumulate 1, which need all gradients at once."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    steer: float = 0.0
    """Dose of the verdict's direction while training, in units of the site's norm: positive adds it (the weights need
    not learn what is given, arXiv:2507.21509), negative takes it away; 0 leaves the model alone."""
    evaluate_every: int | None = None
    """Steps between evaluations of propensity, abilities and loss; auto: a quarter of the run."""
    questions: int = 192
    """At most this many held-out prompts, and questions of each ability."""
    max_new_tokens: int = 24
    """Length of a free answer, at most."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; auto: a quarter of the run. The last step always has one."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    seed: int = 0
    """Decides the data and its order, projections, and rounding."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES, inside=("lr",))
        for name, allowed in (("context", Context), ("optimizer", Optimizer)):
            if (seen := getattr(self, name)) not in get_args(allowed):
                raise WrongInput(f"unknown {name} '{seen}'; allowed are {', '.join(get_args(allowed))}")
        if not self.parameters or not all(word.strip() for word in self.parameters):
            raise WrongInput(f"parameters must be all, auto or words of parameters' names, saw {self.parameters!r}")
        if not math.isfinite(self.steer):
            raise WrongInput(f"steer must be finite, saw {self.steer}")
        if self.accumulate > self.batch:
            raise WrongInput(f"a batch of {self.batch} cannot be cut into {self.accumulate} parts")
        if self.refill is not None and self.context != "frozen":
            raise WrongInput("refill is for frozen contexts; the context is 'full'")
        if self.refill is not None and self.every("checkpoint") % self.refill:
            raise WrongInput(
                f"checkpoints (every {self.every('checkpoint')} steps) must fall on refills (every {self.refill}), or "
                "a resumed run would see other contexts"
            )
        if self.optimizer in ("adamw", "sgd", "apollo-mini") and self.rank is not None:
            raise WrongInput(f"rank is for the optimizer apollo, saw {self.rank} with '{self.optimizer}'")
        if self.in_backward and (self.clip or self.accumulate > 1 or self.optimizer not in ("apollo", "apollo-mini")):
            raise WrongInput(
                "steps in backward need apollo or apollo-mini, clip 0 and accumulate 1, saw "
                f"{self.optimizer}, clip {self.clip:g} and accumulate {self.accumulate}"
            )
        if self.contrast and self.general_share == 1:
            raise WrongInput("a contrast needs examples of the behaviour, and the share of general data is 1")

    def every(self, what: Literal["evaluate", "checkpoint"]) -> int:
        """Steps between evaluations or checkpoints."""
        return getattr(self, f"{what}_every") or max(self.steps // 4, 1)

    def lr_for(self, model: HybridModel) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        return 2e-4 if sum(p.numel() for p in model.hf.parameters()) < SMALL else 5e-5

    def rank_for(self, model: HybridModel) -> int:
        """Rank of the projections: 256, and at most a quarter of the width, the paper's ratio for small models."""
        return self.rank or max(1, min(256, int(model.config.hidden_size) // 4))

    def lr_at(self, step: int, peak: float) -> float:
        """Learning rate of a step (from 0): linear warm-up, then a cosine to a tenth of the peak."""
        warmup = min(self.warmup, self.steps // 2)
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(self.steps - warmup, 1)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
