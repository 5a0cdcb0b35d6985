"""Estimates with intervals: a number never travels alone.

Prompts of one topic group are not independent, so intervals come from a bootstrap that draws whole groups. With few
groups such intervals are somewhat too narrow; `Estimate` carries n and the number of groups so that a reader (and the
gate, which refuses to decide on fewer than a stated number) can tell.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

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


def _interval(draws: Floats, confidence: float) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    if finite.size == 0:
        return math.nan, math.nan
    tail = 50 * (1 - confidence)
    lower, upper = np.percentile(finite, [tail, 100 - tail])
    return float(lower), float(upper)


def mean(values: Sequence[float], groups: Sequence[str], *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """Mean with a cluster-bootstrap percentile interval: groups are drawn, not items."""
    data = np.asarray(values, dtype=np.float64)
    index, weights = _weights(groups, seed, draws)
    sums, sizes = np.bincount(index, data), np.bincount(index).astype(np.float64)
    lower, upper = _interval((weights @ sums) / (weights @ sizes), 0.95)
    return Estimate(value=float(data.mean()), lower=lower, upper=upper, n=data.size, groups=sizes.size, seed=seed)


def auroc(
    positive: Sequence[float], negative: Sequence[float], groups: Sequence[str], *, seed: int = 0, draws: int = 500
) -> Estimate:
    """Area under the ROC curve of paired scores: item i gives `positive[i]` and `negative[i]`, both in `groups[i]`."""
    scores = np.concatenate([positive, negative]).astype(np.float64)
    truth = np.repeat([1, 0], len(positive))
    index, weights = _weights(groups, seed, draws)
    both = np.concatenate([index, index])
    sampled = np.array([roc_auc_score(truth, scores, sample_weight=row[both]) for row in weights])
    lower, upper = _interval(sampled, 0.95)
    value = float(roc_auc_score(truth, scores))
    return Estimate(value=value, lower=lower, upper=upper, n=len(positive), groups=weights.shape[1], seed=seed)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation; NaN when either side is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    found: Any = scipy_stats.spearmanr(x, y)
    return float(found.statistic)


def spearman_over_groups(
    x: Sequence[float], rows: Sequence[Sequence[float]], groups: Sequence[str], *, seed: int = 0, draws: int = 500
) -> Estimate:
    """Spearman of x against the mean curve, with an interval over groups. `rows[j]` are all items' values at x[j]."""
    table = np.asarray(rows, dtype=np.float64)
    index, weights = _weights(groups, seed, draws)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.stack([np.bincount(index, row) for row in table])  # [x, group]
    curves = (weights @ sums.T) / (weights @ sizes)[:, None]
    sampled = np.array([spearman(x, curve.tolist()) for curve in curves])
    lower, upper = _interval(sampled, 0.95)
    value = spearman(x, table.mean(1).tolist())
    return Estimate(value=value, lower=lower, upper=upper, n=table.shape[1], groups=sizes.size, seed=seed)


def spearman_brown(correlation: float) -> float:
    """Reliability of the whole from the agreement of its halves."""
    return 2 * correlation / (1 + correlation) if correlation > -1 else -math.inf


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
