"""Where a change points: does it lie along the direction of a behaviour, beyond what means nothing?

A change is what one checkpoint has at a site minus what the other had, for the same prompts without a persona. It is
read along the direction D of the behaviour (from unwanted to wanted, in the checkpoint before) in units of half the gap
between the two sides: 0 is no change, 1 has gone all the way from neutral to the wanted persona, -1 to the unwanted.

Almost any change has some part along D, and more than a random matrix would have: states vary along few dimensions, D
is one of them, and so is much of what a meaningless update does. So the mean change's cosine with D is held against
three kinds of nulls, and has to stand out from all of them:

    random     directions drawn at random with D's norm and spectrum in every head: is D special among all directions?
    shuffled   mean differences of the same pairs with the sides of half of them swapped, D taken out: is it special
               among directions in which the prompts differ anyhow?
    updates    the very change of the weights, with the sign of each output channel drawn anew (`redrawn`): an update of
               equal size, spectrum and place that reads the same inputs and writes in meaningless directions. Is this
               change of the weights special among updates? Under noise whose signs are random this test is exact

Corrected over layers by the step of the largest: each layer's cosine is divided by its own scale under a null (the root
mean square, the real one counted among the draws, so that ranks stay exact), and is compared with the largest of all
layers in each draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analysis.states import Topics, signed
from probes.controls import random_direction
from probes.directions import Direction
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.pairs import Pairs
from probes.stats import Estimate, derived_seed, null_bar

Null = Literal["random", "shuffled", "updates"]
NULLS: tuple[Null, ...] = ("random", "shuffled", "updates")
Draws = Mapping[int, NDArray[np.float64]]  # by layer: what each draw's cosine is


@dataclass(frozen=True, kw_only=True)
class AlignedRow:
    """How far the change at one layer of a site lies along the behaviour's direction.

    Attributes:
        way: the change along D in halves of the gap, as a mean over prompts.
        cosine: of the mean change with D; 0 where nothing changed. size: norm of the mean change over D's norm unit.
        gap: distance between the sides over the site's norm. reliability: of D, between halves of the topics.
        decides: whether D is large and reliable enough at this layer to be asked about.
        p: by null, the corrected share of draws that lie as far along D, this change counted among them.
        bars: by null, the size of the cosine that 1 - confidence of the draws exceed somewhere.
        bar: the largest of the bars, in units of `way`.
        beyond: whether it decides, every p is small enough, and `way` is clear of zero and not negligible.
    """

    site: str
    layer: int
    way: Estimate
    cosine: float
    size: float
    gap: float
    reliability: float
    decides: bool
    p: Mapping[str, float]
    bars: Mapping[str, float] = field(repr=False)
    bar: float
    beyond: bool

    def __str__(self) -> str:
        if not self.decides:
            return f"{self.site} {self.layer}: does not decide, gap {self.gap:.2g}, reliability {self.reliability:.2f}"
        found = ", ".join(f"{name} {value:.2g}" for name, value in self.p.items())
        mark = "beyond the nulls" if self.beyond else "not beyond the nulls"
        way = f"{signed(self.way)} of the way (nulls within ±{self.bar:.2g})"
        return f"{self.site} {self.layer}: {way}, cosine {self.cosine:+.2f}, p {found}: {mark}"


def cosine_with(changes: Float[Tensor, "prompt feature"], direction: Direction) -> float:
    """Cosine of the mean change with a direction; exactly 0 where nothing changed on average."""
    mean = changes.double().mean(0)
    length = float(mean.norm())
    return float(mean @ direction.vector.double()) / length if length else 0.0


def random_cosines(mean: Float[Tensor, " feature"], like: Direction, *, draws: int, seed: int) -> NDArray[np.float64]:
    """Cosines of a mean change with random directions that have the norm and spectrum of `like`."""
    drawn = (random_direction(like, seed=derived_seed(seed, "shift random", i)).vector for i in range(draws))
    return np.array([float(vector @ mean) for vector in drawn]) / (float(mean.norm()) or 1.0)


def shuffled_cosines(
    mean: Float[Tensor, " feature"], pairs: Pairs, target: Direction, *, draws: int, seed: int
) -> NDArray[np.float64]:
    """Cosines with mean differences of pairs half of whose sides were swapped, at right angles to the target.

    As `probes.controls.shuffled_direction`, for many draws at once; every layer gets the same swaps.
    """
    n = len(pairs.groups)
    rng = np.random.default_rng(derived_seed(seed, "shift shuffled"))
    signs = np.array([rng.permutation(np.where(np.arange(n) < n // 2, -1.0, 1.0)) for _ in range(draws)])
    raw = torch.from_numpy(signs).float() @ pairs.differences
    raw = raw - (raw @ target.vector)[:, None] * target.vector
    lengths = raw.norm(dim=1).clamp(min=1e-30) * (mean.norm() or 1.0)
    return ((raw @ mean) / lengths).double().numpy()


def corrected(
    real: Mapping[Any, float], draws: Mapping[Any, NDArray[np.float64]], *, confidence: float
) -> tuple[dict[Any, float], dict[Any, float]]:
    """By layer (or whatever the keys are): the p-value corrected over all that are given, and the bar of its size.

    A size is beyond its bar exactly when its p-value is at most 1 - confidence.
    """
    layers = list(real)
    table = np.array([[real[layer], *draws[layer]] for layer in layers])  # [layer, real and draws]
    scale = np.sqrt((table**2).mean(1, keepdims=True))
    scaled = np.abs(table) / np.where(scale > 0, scale, 1.0)
    largest = scaled[:, 1:].max(0)
    p = (1 + (largest >= scaled[:, :1] - 1e-12).sum(1)) / table.shape[1]
    bar = null_bar(largest, confidence=confidence)
    return dict(zip(layers, p.tolist(), strict=True)), dict(zip(layers, (bar * scale[:, 0]).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What decides that a change lies along a direction."""

    least_way: float
    least_gap: float
    least_reliability: float
    confidence: float


def align(
    topics: Topics,
    changes: Mapping[int, Float[Tensor, "prompt feature"]],
    pairs: Mapping[int, Pairs],
    directions: Mapping[int, Direction],
    updates: Draws,
    *,
    draws: int,
    seed: int,
    thresholds: Thresholds,
) -> tuple[AlignedRow, ...]:
    """Where the changes at the layers of one site point.

    Layers that decide are corrected over themselves; the others are told against the same layers and themselves.
    """
    real = {layer: cosine_with(change, directions[layer]) for layer, change in changes.items()}
    gaps = {layer: d.gap / d.norm if d.norm else 0.0 for layer, d in directions.items()}
    reliable = {layer: d.reliability.value if d.reliability else 0.0 for layer, d in directions.items()}
    family = [
        layer
        for layer in changes
        if gaps[layer] >= thresholds.least_gap and reliable[layer] >= thresholds.least_reliability
    ]
    means = {layer: change.mean(0) for layer, change in changes.items()}
    nulls: dict[Null, Draws] = {
        "random": {
            i: random_cosines(means[i], directions[i], draws=draws, seed=derived_seed(seed, f"layer {i}"))
            for i in changes
        },
        "shuffled": {
            i: shuffled_cosines(means[i], pairs[i], directions[i], draws=draws, seed=seed) for i in changes
        },
        "updates": updates,
    }  # fmt: skip
    p: dict[int, dict[str, float]] = {layer: {} for layer in changes}
    bars: dict[int, dict[str, float]] = {layer: {} for layer in changes}
    for name, found in nulls.items():
        for layer in changes:
            together = {i: real[i] for i in (family if layer in family else [*family, layer])}
            values, limits = corrected(together, found, confidence=thresholds.confidence)
            p[layer][name], bars[layer][name] = values[layer], limits[layer]
    rows = []
    for layer, change in changes.items():
        d, half = directions[layer], directions[layer].gap / 2
        way = topics.mean((change.double() @ d.vector.double() / half).numpy() if half else np.zeros(len(change)))
        length = float(means[layer].norm())
        apart = all(value <= 1 - thresholds.confidence + 1e-9 for value in p[layer].values())
        clear = (way.lower > 0 or way.upper < 0) and abs(way.value) >= thresholds.least_way
        rows.append(
            AlignedRow(
                site=d.site, layer=layer, way=way, cosine=real[layer], size=length / d.norm if d.norm else 0.0,
                gap=gaps[layer], reliability=reliable[layer], decides=layer in family, p=p[layer], bars=bars[layer],
                bar=max(bars[layer].values()) * length / half if half else 0.0,
                beyond=layer in family and apart and clear,
            )
        )  # fmt: skip
    return tuple(rows)


@contextmanager
def redrawn(before: HybridModel, after: HybridModel, *, seed: int) -> Iterator[None]:
    """While the block runs, `before` has the change to `after` with the sign of each output channel drawn anew.

    Output channels are the rows of a weight matrix or kernel, the columns of an embedding, the entries of a vector.
    What inputs an update reads, how strongly, and its singular values stay; where it writes loses its meaning. The
    weights themselves are set aside untouched, so this needs room for those that change once more.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in before.hf.modules() if isinstance(m, torch.nn.Embedding)}
    others = dict(after.hf.named_parameters())
    kept: list[tuple[Any, Tensor]] = []
    try:
        for name, parameter in before.hf.named_parameters():
            old, new = parameter.data, others[name].data.to(parameter.device)
            if torch.equal(old, new):
                continue
            axis = old.ndim - 1 if id(parameter) in embeddings else 0
            shape = [old.shape[i] if i == axis else 1 for i in range(old.ndim)]
            signs = torch.randint(0, 2, shape, generator=generator).mul(2).sub(1).to(old.device)
            kept.append((parameter, old))
            parameter.data = (old.float() + signs * (new.float() - old.float())).to(old.dtype)
        yield
    finally:
        for parameter, old in kept:
            parameter.data = old


def check_pair(before: HybridModel, after: HybridModel) -> None:
    """Refuse two models that cannot be compared.

    Raises:
        WrongInput: layers, shapes of states, dtypes, other shapes or tokenizers differ; one line with the first.
    """
    names = before.name, after.name
    kinds = [tuple(layer.kind for layer in model.layers) for model in (before, after)]
    if len(kinds[0]) != len(kinds[1]):
        raise WrongInput(f"{names[0]} has {len(kinds[0])} layers, {names[1]} has {len(kinds[1])}: no comparison")
    for i, (one, other) in enumerate(zip(*kinds, strict=True)):
        if one != other:
            raise WrongInput(f"layer {i} is {one} in {names[0]} and {other} in {names[1]}: no comparison")
    shapes = [_state_shape(model) for model in (before, after)]
    if shapes[0] != shapes[1]:
        one, other = ("x".join(map(str, shape)) for shape in shapes)
        raise WrongInput(f"states [v_head d_k d_v] are {one} in {names[0]} and {other} in {names[1]}: no comparison")
    if before.dtype != after.dtype:
        raise WrongInput(f"{names[0]} is {before.dtype} and {names[1]} is {after.dtype}: load both in one dtype")
    own, theirs = ({n: tuple(p.shape) for n, p in model.hf.named_parameters()} for model in (before, after))
    for name in [*own, *(n for n in theirs if n not in own)]:
        if own.get(name) != theirs.get(name):
            seen = f"{own.get(name, 'missing')} in {names[0]} and {theirs.get(name, 'missing')} in {names[1]}"
            raise WrongInput(f"{name} is {seen}: no comparison")
    vocabularies = [model.tokenizer.get_vocab() for model in (before, after)]
    if vocabularies[0] != vocabularies[1]:
        differ = sorted(set(vocabularies[0].items()) ^ set(vocabularies[1].items()), key=lambda item: item[1])
        raise WrongInput(f"the tokenizers of {names[0]} and {names[1]} differ, first in the token {differ[0][0]!r}")
    if before.tokenizer.chat_template != after.tokenizer.chat_template:
        raise WrongInput(f"the chat templates of {names[0]} and {names[1]} differ: no comparison")


def _state_shape(model: HybridModel) -> Sequence[int]:
    if not model.of_kind("gdn"):
        return ()
    config = model.config
    return config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
