"""What moved: the recurrent states of two checkpoints on the same prompts, layer by layer and head by head.

Two captures of one recipe are compared, one of each checkpoint (`compare_captures`). For every state S of the first and
S' of the second, after the last token of the same prompt:

    relative change   |S' - S| / |S|, Frobenius norms
    cosine            <S, S'> / (|S| |S'|): a state that was only scaled has cosine 1
    angles            between the subspaces of the strongest singular vectors, left ones for keys, right ones for
                      values (principal angles, averaged, in degrees): does the state hold other keys, or other values?
    CKA               whether the prompts still differ from each other in the same way (linear, arXiv:1905.00414, with
                      the unbiased estimate of its parts, arXiv:2010.15327: unrelated states give about 0 however
                      many features there are for each prompt)
    effective rank    as in `probes.attribution`
    retention, half-life, write   what the tokens of the prompt do to the state, where keys and values were captured

What is equal is told first, by bits: a checkpoint compared with itself has changed by exactly 0, without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from probes.attribution import effective_rank, statistics
from probes.capture import RECURRENCE, recurrences
from probes.errors import WrongInput
from probes.recurrence import left_padded
from probes.stats import DRAWS, Estimate, interval, jackknife
from probes.store import Capture, recipe_differs

_FREE = {"model", "weights_hash"}  # in which two captures may differ


@dataclass(frozen=True, kw_only=True)
class Change:
    """A quantity before and after, and after minus before, prompt by prompt."""

    before: Estimate
    after: Estimate
    change: Estimate

    @property
    def none(self) -> bool:
        """Whether it is exactly zero, interval and all."""
        return self.change.value == self.change.lower == self.change.upper == 0

    def __str__(self) -> str:
        return f"{self.before.value:.3g} -> {self.after.value:.3g}, {signed(self.change)}"


def signed(estimate: Estimate) -> str:
    """+0.12 [0.05, 0.2]"""
    return f"{estimate.value:+.3g} [{estimate.lower:.3g}, {estimate.upper:.3g}]"


class Topics:
    """The topic groups of some prompts. Draws them anew, always the same way, for the intervals of means over prompts.

    At a confidence of 0.95 the same numbers as `probes.stats.mean`.
    """

    def __init__(self, groups: Sequence[str], *, seed: int = 0, confidence: float = 0.95, draws: int = DRAWS):
        self.groups, self.seed, self.confidence = tuple(groups), seed, confidence
        _, self.index = np.unique(np.asarray(groups), return_inverse=True)
        count = int(self.index.max()) + 1
        self.count = count
        self.drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)

    def mean(self, values: Any) -> Estimate:
        """Mean over prompts with an interval over topics."""
        data = np.asarray(values, dtype=np.float64)
        sums, sizes = np.bincount(self.index, data), np.bincount(self.index)
        return self.estimate(float(data.mean()), (self.drawn @ sums) / (self.drawn @ sizes))

    def change(self, before: Any, after: Any) -> Change:
        first, second = (np.asarray(values, dtype=np.float64) for values in (before, after))
        return Change(before=self.mean(first), after=self.mean(second), change=self.mean(second - first))

    def cka(self, x: Tensor, y: Tensor) -> Estimate:
        """`linear_cka` with a jackknife interval over topics."""
        if torch.equal(x, y):
            return self.estimate(1.0, np.ones(1))
        one, other = _gram(x), _gram(y)
        without = []
        for topic in range(self.count):
            kept = np.flatnonzero(self.index != topic)
            without.append(_cka(one[np.ix_(kept, kept)], other[np.ix_(kept, kept)]))
        return jackknife(
            _cka(one, other), np.array(without), n=len(self.index), seed=self.seed, confidence=self.confidence,
            within=(-1.0, 1.0),
        )  # fmt: skip

    def estimate(self, value: float, draws: NDArray[Any]) -> Estimate:
        """A value with the interval that its draws have."""
        lower, upper = interval(draws, groups=self.count, confidence=self.confidence)
        return Estimate(
            value=value, lower=lower, upper=upper, n=len(self.index), groups=self.count, seed=self.seed,
            confidence=self.confidence,
        )  # fmt: skip

    def where(self, kept: Sequence[int]) -> Topics:
        """The topics of some of the prompts."""
        return Topics([self.groups[i] for i in kept], seed=self.seed, confidence=self.confidence)


def relative_change(
    before: Float[Tensor, "*axes d_k d_v"], after: Float[Tensor, "*axes d_k d_v"]
) -> Float[Tensor, "*axes"]:
    """|S' - S| / |S|. A state of zeros that stays one has changed by 0."""
    moved, size = (torch.linalg.vector_norm(m.double(), dim=(-2, -1)) for m in (after - before, before))
    return torch.where(moved > 0, moved / size, 0.0)


def state_cosine(
    before: Float[Tensor, "*axes d_k d_v"], after: Float[Tensor, "*axes d_k d_v"]
) -> Float[Tensor, "*axes"]:
    """Cosine of two states; exactly 1 where they are equal."""
    a, b = before.double().flatten(-2), after.double().flatten(-2)
    cosine = torch.cosine_similarity(a, b, dim=-1, eps=1e-300)
    return torch.where((a == b).all(-1), 1.0, cosine)


def principal_angles(
    before: Float[Tensor, "*axes d_k d_v"], after: Float[Tensor, "*axes d_k d_v"], *, rank: int
) -> tuple[Float[Tensor, "*axes rank"], Float[Tensor, "*axes rank"]]:
    """Angles between the subspaces of the `rank` strongest singular vectors: of keys (left), of values (right).

    Radians in [0, pi/2], largest first; exactly 0 where the states are equal. Small angles come from their sine and
    large ones from their cosine, so both are exact to about 1e-15 (Björck & Golub 1973).

    Raises:
        WrongInput: the rank is not between 1 and the smaller side of a state.
    """
    most = min(before.shape[-2:])
    if not 1 <= rank <= most:
        raise WrongInput(f"the subspace must have between 1 and {most} dimensions, saw {rank}")
    u, _, v = torch.linalg.svd(before.double(), full_matrices=False)
    other_u, _, other_v = torch.linalg.svd(after.double(), full_matrices=False)
    same = (before == after).all(-1).all(-1)[..., None]
    sides = ((u, other_u), (v.mT, other_v.mT))
    keys, values = (torch.where(same, 0.0, _angles(a[..., :rank], b[..., :rank])) for a, b in sides)
    return keys, values


def _angles(a: Tensor, b: Tensor) -> Tensor:
    """Between the spans of orthonormal columns."""
    across = a.mT @ b
    cosines = torch.linalg.svdvals(across).flip(-1).clamp(max=1)  # both largest angle first
    sines = torch.linalg.svdvals(b - a @ across).clamp(max=1)
    return torch.where(cosines**2 < 0.5, cosines.arccos(), sines.arcsin())


def linear_cka(x: Float[Tensor, "prompt feature"], y: Float[Tensor, "prompt other"]) -> float:
    """Linear centred kernel alignment, unbiased (arXiv:2010.15327): 1 where prompts differ alike in both, about 0 where
    what they differ in is unrelated, and it may fall a little below.

    Rotations and one common scale of the features leave it alone. NaN where no prompt differs from another, and for
    fewer than 4 prompts.
    """
    return _cka(_gram(x), _gram(y))


def _gram(x: Tensor) -> NDArray[Any]:
    return (x.double() @ x.double().T).numpy()


def _cka(k: NDArray[Any], other: NDArray[Any]) -> float:
    """From Gram matrices of prompts; the inner products are the estimator of Song et al. 2012, JMLR 13, eq. 5."""
    n = len(k)
    if n < 4:
        return math.nan
    centred = []
    for gram in (k, other):
        apart = gram - np.diag(np.diag(gram))  # what a prompt has in common with itself says nothing
        rows = apart.sum(1) / (n - 2)
        centred.append((apart - rows[:, None] - rows[None, :] + rows.sum() / (n - 1)) * (1 - np.eye(n)))
    a, b = centred  # U-centred: Székely & Rizzo 2014, the same estimator
    scale = float((a * a).sum() * (b * b).sum())
    return float((a * b).sum()) / math.sqrt(scale) if scale > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class MovedRow:
    """How the states of one head moved between two checkpoints.

    Attributes:
        equal: whether all its states are equal, bit for bit.
        relative, cosine, cka: as above. keys, values: mean principal angle in degrees.
        rank: effective rank. retention: mean of exp(decay) over the tokens. half_life: tokens in which a state halves
            at the prompt's mean decay. write: mean Frobenius norm of a token's write. None where not captured.
    """

    layer: int
    head: int
    equal: bool
    relative: Estimate
    cosine: Estimate
    keys: Estimate
    values: Estimate
    cka: Estimate
    rank: Change
    retention: Change | None = None
    half_life: Change | None = None
    write: Change | None = None


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What moved between two checkpoints. `overall` is the relative change as a mean over layers and heads."""

    rows: tuple[MovedRow, ...]
    overall: Estimate | None
    subspace: int
    recipe: Mapping[str, Any] = field(repr=False)

    @property
    def equal(self) -> bool:
        """Whether every state is what it was, bit for bit."""
        return all(row.equal for row in self.rows)

    def frame(self) -> pd.DataFrame:
        """One row for each layer and v_head."""
        return pd.DataFrame([flat(row) for row in self.rows])

    def __str__(self) -> str:
        if self.overall is None:
            return "no states to compare"
        if self.equal:
            return f"all states of {len(self.rows)} heads are equal, bit for bit"
        most = max(self.rows, key=lambda row: row.relative.value)
        where = f"most at layer {most.layer} head {most.head} by {most.relative.value:.3g}"
        return f"states moved by {self.overall} of their norm, {where}"


def flat(row: Any) -> dict[str, Any]:
    """A row's estimates as columns: `x`, `x_lower`, `x_upper`, and `x_before`, `x_after` where it changed."""
    found: dict[str, Any] = {}
    for name, value in vars(row).items():
        if isinstance(value, Change):
            found |= {f"{name}_before": value.before.value, f"{name}_after": value.after.value}
            found |= _columns(f"{name}_change", value.change)
        elif isinstance(value, Estimate):
            found |= _columns(name, value)
        else:
            found[name] = value
    return found


def _columns(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_lower": found.lower, f"{name}_upper": found.upper}


def compare_captures(
    before: Capture,
    after: Capture,
    *,
    groups: Sequence[str] | None = None,
    subspace: int = 4,
    confidence: float = 0.95,
    seed: int = 0,
) -> Moved:
    """What moved between two captures of one recipe, each with `gdn.state` after one token of each prompt.

    Args:
        groups: the topic of each prompt; None takes every prompt for a topic of its own.
        subspace: dimensions of the subspaces whose angles are taken.

    Raises:
        WrongInput: the captures differ in anything but the model's name and weights (the message names the first
            difference), states were kept after several tokens, or states differ in shape.
    """
    one, other = ({key: value for key, value in side.recipe.items() if key not in _FREE} for side in (before, after))
    if difference := recipe_differs(one, other):
        raise WrongInput(f"the captures are not of one recipe: {difference}")
    if "gdn.state" not in before.sites:
        return Moved(rows=(), overall=None, subspace=subspace, recipe=_recipe(before, after))
    if "token" in before.axes("gdn.state"):
        raise WrongInput("states must be captured after one token of each prompt, such as the last; saw several")
    if groups is not None and len(groups) != len(before):
        raise WrongInput(f"{len(before)} prompts need as many groups, saw {len(groups)}")
    if not 0 < confidence < 1:
        raise WrongInput(f"confidence must lie between 0 and 1, saw {confidence}")
    topics = Topics(groups or [str(i) for i in range(len(before))], seed=seed, confidence=confidence)
    rows: list[MovedRow] = []
    changes = []
    for layer in before.layers("gdn.state"):
        one, other = before["gdn.state", layer], after["gdn.state", layer]
        if one.shape != other.shape:
            raise WrongInput(f"states at layer {layer} are {list(one.shape[1:])} and {list(other.shape[1:])}")
        changes.append(relative_change(one, other))
        rows += _heads(topics, layer, one, other, subspace, _habits(before, layer), _habits(after, layer))
    overall = topics.mean(torch.cat(changes, 1).mean(1))
    return Moved(rows=tuple(rows), overall=overall, subspace=subspace, recipe=_recipe(before, after))


def _recipe(before: Capture, after: Capture) -> dict[str, Any]:
    sides = {name: {key: side.recipe[key] for key in _FREE} for name, side in (("before", before), ("after", after))}
    return {**sides, **{key: value for key, value in before.recipe.items() if key not in _FREE}}


Habits = Mapping[Literal["retention", "half_life", "write"], Tensor]


def _heads(
    topics: Topics, layer: int, before: Tensor, after: Tensor, subspace: int, habits: Habits, later: Habits
) -> list[MovedRow]:
    relative, cosine = relative_change(before, after), state_cosine(before, after)
    angles = [torch.rad2deg(side).mean(-1) for side in principal_angles(before, after, rank=subspace)]
    ranks = effective_rank(before.double()), effective_rank(after.double())
    rows = []
    for head in range(before.shape[1]):
        changes = {name: topics.change(values[:, head], later[name][:, head]) for name, values in habits.items()}
        rows.append(
            MovedRow(
                layer=layer, head=head, equal=torch.equal(before[:, head], after[:, head]),
                relative=topics.mean(relative[:, head]), cosine=topics.mean(cosine[:, head]),
                keys=topics.mean(angles[0][:, head]), values=topics.mean(angles[1][:, head]),
                cka=topics.cka(before[:, head].flatten(1), after[:, head].flatten(1)),
                rank=topics.change(ranks[0][:, head], ranks[1][:, head]), **changes,
            )
        )  # fmt: skip
    return rows


def _habits(record: Capture, layer: int) -> Habits:
    """What tokens do to the states, as means over each prompt's tokens [prompt v_head]; empty where not captured."""
    if not all(site in record.sites and "token" in record.axes(site) for site in RECURRENCE):
        return {}
    x, mask = left_padded(recurrences(record, layer=layer))
    found = statistics(x, at=torch.full((len(mask), 1), x.tokens - 1))

    def over_tokens(values: Tensor) -> Tensor:
        return (values.double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    half = math.log(2) / over_tokens(-x.decay)
    return {"retention": over_tokens(found.retention), "half_life": half, "write": over_tokens(found.write)}
