"""How a verdict is reached: everything that can be chosen about the gate, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from probes.answers import ScorerConfig
from probes.criteria import GateCriteria
from probes.errors import SEEDS, WrongInput, check_ranges
from probes.extraction import Method
from probes.pairs import STEERABLE
from probes.steering import Form, Phase

_RANGES: dict[str, tuple[float, float]] = {
    "pairs": (8, math.inf), "prompts": (2, math.inf), "control_prompts": (2, math.inf),
    "search_prompts": (2, math.inf), "controls": (1, math.inf), "held_out": (0, 1),
    "generations": (1, math.inf), "max_new_tokens": (8, math.inf), "general_texts": (3, math.inf), "seed": SEEDS,
    "budget": (1, math.inf),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How a verdict is reached. The same object configures the function and the command."""

    layers: tuple[int, ...] | None = None
    """Layers to choose from; auto (None) takes all of a small model, or eight spread over the middle of a large one."""
    doses: tuple[float, ...] = (-1.0, -0.75, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    """Doses of the dose-response curve, in units of the typical norm at the site; the working dose is one of them. The
    small ones keep a curve to look at where a model breaks early."""
    phase: Phase = "prefill"
    """Which tokens the working intervention edits; the other phases are reported beside it. Editing the prompt is what
    moves a Qwen3.5 (arXiv:2603.16335), and it leaves the answer free."""
    mode: Literal["add", "clamp", "rotate"] = "add"
    """What the working intervention does: add the direction, set the component along it, or turn toward it at equal
    norm; the others, and taking the direction out, are reported beside it."""
    site: Literal["resid", "gdn.state", "attn.heads"] = "resid"
    """Where the direction lives: the residual stream, the recurrent state of a GDN layer, or an attention layer's
    heads. One layer of it is chosen."""
    direction: Method | Literal["auto", "random"] = "auto"
    """How the direction is extracted: "mean" (mean difference), "whitened" (divided by the covariance within the sides,
    as in LDA), "pca" (first principal axis of the differences), "logistic" (weights of a logistic probe), "low-rank"
    (mean difference of states, cut to --rank). "auto" tries them all on the fit split, and takes another than the mean
    difference only where it is clearly better; "random" sends a drawn direction through the same gate."""
    rank: int = 1
    """Rank of each head's matrix, for low-rank directions of states."""
    heads: tuple[int, ...] | None = None
    """Heads that the direction is confined to, for gdn.state and attn.heads; auto (None) takes all."""
    form: Form = "end"
    """When a state is edited: "end" (before the last prompt token; in decoding before the answer's first token),
    "initial" (before the first token) or "write" (at every token, through its value)."""
    shuffle_labels: bool = False
    """Extract from shuffled labels: a gate that passes this is broken."""
    controls: int = 20
    """Random directions, and as many from shuffled labels."""
    held_out: float = 0.4
    """Share of topic groups that are held out."""
    pairs: int = 128
    """At most this many contrast pairs of the fit split that directions are extracted from."""
    prompts: int = 32
    """At most this many held-out prompts."""
    control_prompts: int = 16
    """Of these, the ones on which controls are run beside the direction: there are many controls, and what they do
    to some prompts is held against what the direction does to the same ones."""
    search_prompts: int = 16
    """Prompts of the fit split on which layer and dose are chosen."""
    generations: int = 16
    """Held-out prompts that are also answered freely."""
    max_new_tokens: int = 32
    """Length of a free answer, at most."""
    general_texts: int = 40
    """Paragraphs of general text for the damage criterion; a third as many others serve to choose the dose."""
    general: str | None = None
    """A .txt file (a paragraph a line) or .jsonl file (dialogues) of general text; the shipped text that the model's
    tokenizer knows when not given."""
    budget: float | None = None
    """Seconds that the verdict may take: as many controls are run as there is time for, and the report says what that
    does to the confidence. The other measurements are not cut. auto (None) runs --controls of each kind."""
    reuse: bool = True
    """--no-reuse computes every intervention and every answer with a prefix and all layers of its own, to check what is
    saved; the numbers are the same to rounding."""
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    seed: int = 0
    """Decides the split of the topics and every draw."""
    criteria: GateCriteria = field(default_factory=GateCriteria)

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES, inside=("held_out",))
        if not all(map(math.isfinite, self.doses)):
            raise WrongInput(f"doses must be finite, saw {', '.join(f'{d:g}' for d in self.doses)}")
        if 0.0 not in self.doses or not min(self.doses) < 0 < max(self.doses):
            raise WrongInput(f"doses must include 0 and both signs, saw {', '.join(f'{d:g}' for d in self.doses)}")
        if len(set(self.doses)) < len(self.doses) or len(self.doses) < self.criteria.min_doses:
            raise WrongInput(
                f"doses must be at least {self.criteria.min_doses} different ones, saw {len(set(self.doses))}"
            )
        if self.layers is not None and not self.layers:
            raise WrongInput("layers must name at least one layer, or be None for a choice of them")
        for name, allowed in (("phase", Phase), ("form", Form), ("mode", Literal["add", "clamp", "rotate"])):
            if (seen := getattr(self, name)) not in get_args(allowed):
                raise WrongInput(f"unknown {name} '{seen}'; allowed are {', '.join(get_args(allowed))}")
        if self.site not in STEERABLE:
            raise WrongInput(f"'{self.site}' cannot be steered; allowed are {', '.join(STEERABLE)}")
        if self.direction not in (allowed := ("auto", *get_args(Method), "random")):
            raise WrongInput(f"unknown direction '{self.direction}'; allowed are {', '.join(allowed)}")
        if self.heads is not None and not self.heads:
            raise WrongInput("heads must name at least one head, or be None for all")
        if self.rank < 1 or (
            self.rank > 1 and (self.direction not in ("auto", "low-rank") or self.site != "gdn.state")
        ):
            raise WrongInput(
                f"rank is for low-rank directions of states, and at least 1; saw {self.rank} with '{self.direction}'"
            )
        if self.shuffle_labels and self.direction == "random":
            raise WrongInput("shuffle_labels has no effect on a random direction: choose one of the two")
        if self.site != "gdn.state":
            for name, default in (("direction", "low-rank"), ("form", "initial"), ("form", "write")):
                if getattr(self, name) == default:
                    raise WrongInput(f"{name} '{default}' is for states; the site is '{self.site}', not 'gdn.state'")
        if self.heads is not None and self.site == "resid":
            raise WrongInput("heads were chosen, but the residual stream has none; gdn.state and attn.heads have")
        if self.form == "initial" and self.phase != "prefill":
            raise WrongInput(f"form 'initial' edits before the prompt: phase must be prefill, saw '{self.phase}'")
        if self.form == "initial" and self.mode == "rotate":
            raise WrongInput("form 'initial' edits an empty state, which cannot be turned: mode must be add or clamp")
