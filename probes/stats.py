"""Estimates with intervals: a number never travels alone.

Prompts of one topic group are not independent, so intervals come from a bootstrap that draws whole groups. Its plain
percentiles are too narrow for few groups (of 6 normal groups, 95 % intervals hold the truth 87 times in 100), so more
extreme ones are taken (`tail`; then 94 times, tests/test_stats.py). `Estimate` carries n and the number of groups so
that a reader, and the gate, which refuses to decide on fewer than a stated number, can tell.

What a bootstrap cannot do - a group that is drawn twice would be its own neighbour, or stand on both sides of a split -
a jackknife does: everything is computed again without each group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

Floats = NDArray[np.float64]
DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with a two-sided interval (`confidence` = 0.95 unless said), sample size, groups and seed."""

    value: float
    lower: float
    upper: float
    n: int
    groups: int
    seed: int = 0
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not all(isinstance(part, Real) for part in (self.value, self.lower, self.upper)):
            raise TypeError(f"an estimate has numbers, saw {self.value!r} [{self.lower!r}, {self.upper!r}]")

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.lower:.3g}, {self.upper:.3g}] (n={self.n}, {self.groups} groups)"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def derived_seed(seed: int, purpose: str, i: int = 0) -> int:
    """A seed for draw `i` of one purpose (below 2^63), so that no two uses of a user's seed share their draws."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {i}".encode()).digest()[:8], "big") >> 1


def _weights(groups: Sequence[str], seed: int, draws: int) -> tuple[NDArray[np.int64], Floats]:
    """Index of each item's group, and how often each draw takes each group [draws, groups]."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    count = int(index.max()) + 1
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return index, weights.astype(np.float64)


def tail(confidence: float, groups: int) -> float:
    """Percent of bootstrap draws to leave out on either side, for an interval that holds the truth so often.

    The expanded percentile interval (Hesterberg 2015, arXiv:1411.5279): as a t interval is wider than a normal one of
    the uncorrected standard deviation, sqrt(G / (G - 1)) t_{G-1} instead of z.
    """
    if groups < 2:
        return 0.0
    reach = math.sqrt(groups / (groups - 1)) * scipy_stats.t.ppf((1 + confidence) / 2, groups - 1)
    return 100 * float(scipy_stats.norm.sf(reach))


def interval(draws: Floats, *, groups: int, confidence: float = 0.95) -> tuple[float, float]:
    """Limits from bootstrap draws of `groups` groups; NaN where no draw is finite."""
    finite = draws[np.isfinite(draws)]
    if finite.size == 0:
        return math.nan, math.nan
    beyond = tail(confidence, groups)
    lower, upper = np.percentile(finite, [beyond, 100 - beyond])
    return float(lower), float(upper)


def least_draws(confidence: float) -> int:
    """How many draws of a null it takes for the largest of all to have a p-value of 1 - confidence: 19 for 0.95."""
    return math.ceil(1 / (1 - confidence) - 1e-9) - 1


def null_bar(sizes: Sequence[float] | Floats, *, confidence: float) -> float:
    """What a size has to exceed so that, ranked among those of the null with itself counted, p <= 1 - confidence.

    With too few draws for that, their largest; 0 without any.
    """
    ranked = np.sort(np.asarray(sizes, dtype=np.float64))[::-1]
    allowed = math.floor((1 - confidence) * (len(ranked) + 1) + 1e-9) - 1  # draws that may be larger
    return float(ranked[max(allowed, 0)]) if len(ranked) else 0.0


def jackknife(
    value: float,
    without: Floats,
    *,
    n: int,
    seed: int = 0,
    confidence: float = 0.95,
    within: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """A value with a t interval from the same measure without each group [group], cut to what is possible."""
    count = len(without)
    spread = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    reach = float(scipy_stats.t.ppf((1 + confidence) / 2, count - 1)) * spread if count > 1 else math.nan
    lower, upper = np.clip([value - reach, value + reach], *within).tolist()
    return Estimate(value=value, lower=lower, upper=upper, n=n, groups=count, seed=seed, confidence=confidence)


def mean(
    values: Sequence[float], groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS, confidence: float = 0.95
) -> Estimate:
    """Mean with a cluster-bootstrap percentile interval: groups are drawn, not items."""
    data = np.asarray(values, dtype=np.float64)
    index, weights = _weights(groups, seed, draws)
    sums, sizes = np.bincount(index, data), np.bincount(index).astype(np.float64)
    lower, upper = interval((weights @ sums) / (weights @ sizes), groups=sizes.size, confidence=confidence)
    return Estimate(
        value=float(data.mean()), lower=lower, upper=upper, n=data.size, groups=sizes.size, seed=seed,
        confidence=confidence,
    )  # fmt: skip


def share(hits: Sequence[bool], groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Share of hits. The interval is the wider of the one over groups and Wilson's for as many independent trials.

    The second because a bootstrap of nothing but hits has no width, and 24 of 24 do not show that all would be.
    """
    found = mean([float(hit) for hit in hits], groups, seed=seed, draws=draws)
    exact: Any = scipy_stats.binomtest(sum(map(bool, hits)), len(hits)).proportion_ci(method="wilson")
    lower, upper = min(found.lower, float(exact.low)), max(found.upper, float(exact.high))
    return replace(found, lower=lower, upper=upper)


def auroc(
    positive: Sequence[float], negative: Sequence[float], groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """Area under the ROC curve of paired scores: item i gives `positive[i]` and `negative[i]`, both in `groups[i]`."""
    one, other = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    index, weights = _weights(groups, seed, draws)
    sizes = np.bincount(index).astype(np.float64)
    member = (index[:, None] == np.arange(sizes.size)).astype(np.float64)  # [item, group]
    above = np.sign(one[:, None] - other[None, :]) / 2 + 0.5  # a tie is half a win
    wins = member.T @ above @ member  # of each group's positives over each group's negatives
    lower, upper = interval(((weights @ wins) * weights).sum(1) / (weights @ sizes) ** 2, groups=sizes.size)
    value = float(above.mean())
    return Estimate(value=value, lower=lower, upper=upper, n=one.size, groups=sizes.size, seed=seed)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; NaN when either side is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    found: Any = scipy_stats.spearmanr(x, y)
    return float(found.statistic)


def spearman_over_groups(
    x: Sequence[float], rows: Sequence[Sequence[float]], groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """Spearman of x against the mean curve, with an interval over groups. `rows[j]` are all items' values at x[j]."""
    table = np.asarray(rows, dtype=np.float64)
    index, weights = _weights(groups, seed, draws)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.stack([np.bincount(index, row) for row in table])  # [x, group]
    curves = (weights @ sums.T) / (weights @ sizes)[:, None]
    lower, upper = interval(_rank_correlations(x, curves), groups=sizes.size)
    value = spearman(x, table.mean(1).tolist())
    return Estimate(value=value, lower=lower, upper=upper, n=table.shape[1], groups=sizes.size, seed=seed)


def _rank_correlations(x: Sequence[float], rows: Floats) -> Floats:
    """Spearman of x against each row; NaN for a constant one."""
    ranks = [scipy_stats.rankdata(one, axis=-1) for one in (np.asarray(x, dtype=np.float64)[None], rows)]
    centred = [one - one.mean(-1, keepdims=True) for one in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred[0] * centred[1]).sum(-1) / scale


def spearman_brown(correlation: float) -> float:
    """Reliability of the whole from the agreement of its halves; -1 at the least, since the step is meant for more."""
    return max(2 * correlation / (1 + correlation), -1.0) if correlation > -1 else -1.0


def split_groups(groups: Sequence[str], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A random half of the groups, as a mask over items."""
    names = np.array(sorted(set(groups)))
    half = set(rng.permutation(names)[: len(names) // 2])
    return np.array([group in half for group in groups])


def repeated(measure: Callable[[np.random.Generator], float], *, times: int, seed: int) -> tuple[float, float, float]:
    """Mean and 2.5/97.5 percentiles of a randomised measure."""
    values = np.array([measure(np.random.default_rng((seed, i))) for i in range(times)])
    lower, upper = np.percentile(values, [2.5, 97.5])
    return float(values.mean()), float(lower), float(upper)
