"""From a contrast to a direction: what the difference between wanted and unwanted looks like inside.

Extraction has two steps. `contrast` records both sides of a behaviour at some layers. `mean_difference` turns one
layer's pairs into a unit vector that points from unwanted to wanted (arXiv:2312.06681), with its reliability: how well
directions from two disjoint halves of the topic groups agree. A direction whose halves disagree is noise.

Two kinds of contrast exist. With persona turns the same question is asked under both personas and read at the last
prompt token, before a word of the answer is there. Without them the two answers are read instead, as a mean over
their tokens; such a direction may describe the text rather than the disposition, and says so in `Direction.contrast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from probes.behaviors import Behavior, Item, Side
from probes.capture import capture
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Prompt, answer_ids
from probes.stats import Estimate, repeated, spearman_brown, split_groups
from probes.store import read_metadata, read_tensors, write_tensors

Contrast = Literal["persona", "answer"]
SPLITS = 50
_FIELDS = ("layer", "norm", "midpoint", "gap", "site", "method", "contrast", "behavior", "n")


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A unit vector in the residual stream after `layer`, pointing from unwanted to wanted.

    Attributes:
        vector: float32 [d_model], length 1.
        norm: the layer's typical residual norm (median over the prompts that gave the direction); the unit of dose.
        midpoint: the mean of both sides projected on the vector, in raw units; "ablate" sets the stream to it.
        gap: distance between the two sides' means along the vector, in raw units.
        method, contrast, behavior, n: where it came from. reliability: split-half agreement, None for a drawn vector.
    """

    layer: int
    vector: Float[Tensor, " d_model"]
    norm: float
    midpoint: float
    gap: float = 0.0
    site: str = "resid"
    method: str = "mean difference"
    contrast: Contrast = "persona"
    behavior: str = ""
    n: int = 0
    reliability: Estimate | None = None

    def __str__(self) -> str:
        agreement = f", reliability {self.reliability.value:.2f}" if self.reliability else ""
        return f"{self.method} of {self.behavior or 'nothing'} at {self.site} {self.layer} (n={self.n}{agreement})"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Both sides of a behaviour at one layer: float32 [prompt d_model] each, row i of both from item i."""

    layer: int
    wanted: Float[Tensor, "prompt d_model"]
    unwanted: Float[Tensor, "prompt d_model"]
    groups: tuple[str, ...]
    behavior: str
    contrast: Contrast

    @property
    def differences(self) -> Float[Tensor, "prompt d_model"]:
        return self.wanted - self.unwanted

    def where(self, mask: NDArray[np.bool_]) -> Pairs:
        """The pairs at which a mask is true."""
        index = torch.from_numpy(np.flatnonzero(mask))
        groups = tuple(group for group, kept in zip(self.groups, mask, strict=True) if kept)
        return replace(self, wanted=self.wanted[index], unwanted=self.unwanted[index], groups=groups)

    def scores(self, vector: Float[Tensor, " d_model"]) -> tuple[list[float], list[float]]:
        """Projections of both sides on a vector."""
        return (self.wanted @ vector).tolist(), (self.unwanted @ vector).tolist()


def contrast(
    model: HybridModel, behavior: Behavior, *, layers: Sequence[int], positions: str = "auto", progress: bool = True
) -> dict[int, Pairs]:
    """Record both sides of a behaviour in the residual stream, one pass for all layers.

    `positions` is "last", "mean:context", "mean:direction", "mean:decision", or "auto": the last prompt token for a
    persona contrast, the mean over the answer for an answer contrast.
    """
    kind: Contrast = "persona" if behavior.has_persona else "answer"
    if positions == "auto":
        positions = "last" if kind == "persona" else "mean:decision"
    sides: tuple[Side, ...] = get_args(Side)
    prompts = [_sided(model, item, side, kind) for side in sides for item in behavior.items]
    record = capture(model, prompts, sites=("resid",), layers=list(layers), positions=positions, progress=progress)
    n, groups = len(behavior.items), tuple(item.group for item in behavior.items)
    result = {}
    for layer in layers:
        both = torch.as_tensor(record["resid", layer]).float()
        result[layer] = Pairs(
            layer=layer, wanted=both[:n], unwanted=both[n:], groups=groups, behavior=behavior.name, contrast=kind
        )
    return result


def _sided(model: HybridModel, item: Item, side: Side, kind: Contrast) -> Prompt:
    if kind == "persona":
        return item.prompt(model, persona=side)
    prompt = item.prompt(model)
    answer = answer_ids(model, item.wanted if side == "wanted" else item.unwanted)
    spans = {**prompt.spans, "decision": (len(prompt), len(prompt) + len(answer))}
    return Prompt(text=prompt.text, ids=(*prompt.ids, *answer), spans=spans)


def mean_difference(pairs: Pairs, *, seed: int = 0) -> Direction:
    """Mean of wanted minus mean of unwanted, as a unit vector with split-half reliability.

    Raises:
        WrongInput: the two sides are the same, so that there is no direction.
    """
    raw = pairs.differences.mean(0)
    gap = float(raw.norm())
    if gap == 0.0:
        raise WrongInput(f"both sides of '{pairs.behavior}' are equal at layer {pairs.layer}: there is no direction")
    vector = raw / gap
    middle = (pairs.wanted.mean(0) + pairs.unwanted.mean(0)) / 2
    norms = torch.cat([pairs.wanted, pairs.unwanted]).norm(dim=1)
    return Direction(
        layer=pairs.layer, vector=vector, norm=float(norms.median()), midpoint=float(middle @ vector), gap=gap,
        contrast=pairs.contrast, behavior=pairs.behavior, n=len(pairs.groups), reliability=split_half(pairs, seed=seed),
    )  # fmt: skip


def split_half(pairs: Pairs, *, times: int = SPLITS, seed: int = 0) -> Estimate:
    """Cosine of the directions from two random halves of the groups, stepped up by Spearman-Brown.

    The interval covers the choice of halves, over `times` splits.
    """
    differences = pairs.differences.numpy().astype(np.float64)

    def agreement(rng: np.random.Generator) -> float:
        half = split_groups(pairs.groups, rng)
        a, b = differences[half].mean(0), differences[~half].mean(0)
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        return spearman_brown(float(a @ b) / scale) if scale else 0.0

    value, lower, upper = repeated(agreement, times=times, seed=seed)
    return Estimate(value=value, lower=lower, upper=upper, n=len(differences), groups=len(set(pairs.groups)), seed=seed)


def shuffle_labels(pairs: Pairs, *, seed: int) -> Pairs:
    """Swap the sides of exactly half of the pairs.

    Swapping each pair by a coin would leave a part of the true direction in the mean, which normalising would then
    blow up to full length: exactly half is what makes this a null.
    """
    n = len(pairs.groups)
    order = np.random.default_rng(seed).permutation(n)
    swap = torch.zeros(n, dtype=torch.bool)
    swap[torch.from_numpy(order[: n // 2].copy())] = True
    swapped = swap[:, None]
    return replace(
        pairs,
        wanted=torch.where(swapped, pairs.unwanted, pairs.wanted),
        unwanted=torch.where(swapped, pairs.wanted, pairs.unwanted),
    )


def shuffled_direction(pairs: Pairs, target: Direction, *, seed: int) -> Direction:
    """A control with the target's norm: the mean difference of shuffled labels, at right angles to the target.

    Where the pairs differ along one direction and little else, any weighted mean of their differences is plus or minus
    that direction, however the labels are shuffled; at full length it would be the target itself and control nothing.
    What is left after the target is taken out is another direction that the same data can produce.
    """
    raw = shuffle_labels(pairs, seed=seed).differences.mean(0)
    raw = raw - (raw @ target.vector) * target.vector
    length = float(raw.norm())
    if length <= 1e-5 * float(pairs.differences.norm(dim=1).mean()):  # what is left is rounding
        raise WrongInput(f"the pairs of '{pairs.behavior}' differ along one direction only: no control can be shuffled")
    vector, middle = raw / length, (pairs.wanted.mean(0) + pairs.unwanted.mean(0)) / 2
    return replace(
        target, vector=vector, midpoint=float(middle @ vector), gap=0.0, method="shuffled labels", reliability=None
    )


def random_direction(like: Direction, *, seed: int) -> Direction:
    """A vector drawn uniformly from the sphere, with the norm (so the dose) of another direction."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(like.vector.numel(), generator=generator)
    return replace(like, vector=vector / vector.norm(), midpoint=0.0, gap=0.0, method="random", reliability=None)


def save_direction(direction: Direction, path: str | Path, *, weights_hash: str) -> Path:
    """Write a safetensors file whose metadata says what the vector is and for which weights."""
    metadata = {field: getattr(direction, field) for field in _FIELDS}
    write_tensors(path, {"vector": direction.vector}, {**metadata, "weights_hash": weights_hash})
    return Path(path)


def open_direction(path: str | Path, *, model: HybridModel) -> Direction:
    """Read a direction back; refused on a model with other weights.

    Raises:
        WrongInput: no such file, not a direction, or made for other weights.
    """
    metadata = read_metadata(path)
    if not {*_FIELDS, "weights_hash"} <= set(metadata):
        raise WrongInput(f"{path} is not a direction")
    if metadata["weights_hash"] != model.weights_hash:
        made_for = metadata["weights_hash"]
        raise WrongInput(f"{path} was made for weights {made_for}, {model.name} has {model.weights_hash}")
    return Direction(vector=read_tensors(path)["vector"], **{field: metadata[field] for field in _FIELDS})
