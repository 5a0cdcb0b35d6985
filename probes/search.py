"""Choosing layer and dose, on the fit split alone.

At every candidate layer the direction is tried at positive doses, up to the first that breaks the model; the one that
does most is taken. What counts between layers is the effect beyond what the gate will ask for there: the bar that
meaningless directions of equal length set (criterion 5), foreseen from a few of them. It counts only where the gate
could agree: the two sides can be told apart there (cross-fitted over topic groups), and ordinary text keeps at most
half of the damage budget, since the held-out text will not be this one. When no layer is eligible the best of all is
taken, and the gate says what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import halfnorm

from probes import stats
from probes.controls import random_direction, shuffled_direction
from probes.criteria import GateCriteria, intact
from probes.directions import Direction, Pairs, Raw, mean_of
from probes.stats import Estimate

Effects = Callable[[Direction, float], Sequence[float]]
Perplexity = Callable[[Direction, float], float]
CONTROLS = 4  # of each drawn kind, at each layer


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layer at its best dose.

    `random_effect` and `shuffled_effect` are mean |effect| of controls, in nats; `bar` is what the percentile of the
    larger kind would be if its effects were normal around zero.
    """

    direction: Direction
    dose: float
    effect: Estimate
    random_effect: float
    shuffled_effect: float
    bar: float
    perplexity_ratio: float
    auroc: float
    coherent: bool
    decodable: bool

    @property
    def score(self) -> float:
        return self.effect.value - self.bar

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Eligible layers before others, then by effect beyond the bar."""
        return self.coherent, self.decodable, self.score

    def row(self, kind: str) -> dict[str, Any]:
        reliability = self.direction.reliability
        return {
            "layer": self.direction.layer,
            "kind": kind,
            "dose": self.dose,
            "effect": self.effect.as_dict(),
            "random_effect": self.random_effect,
            "shuffled_effect": self.shuffled_effect,
            "bar": self.bar,
            "perplexity_ratio": self.perplexity_ratio,
            "coherent": self.coherent,
            "auroc": self.auroc,
            "reliability": reliability.value if reliability else None,
        }


def candidates(
    pairs: Mapping[int, Pairs],
    extract: Callable[[Pairs], Direction],
    effects: Effects,
    perplexity: Perplexity,
    *,
    raw: Raw = mean_of,
    groups: Sequence[str],
    doses: Sequence[float],
    rules: GateCriteria,
    seed: int,
) -> Iterator[Candidate]:
    """Try each layer in turn. `effects` and `perplexity` run the model under a direction at a dose.

    `raw` is what `extract` does with pairs before it normalises; shuffled labels go through the same.
    """
    limit = math.sqrt(rules.perplexity_ratio)
    for both in pairs.values():
        direction = extract(both)
        tried = []
        for dose in sorted(d for d in doses if d > 0):
            kept = intact(ratio := perplexity(direction, dose), limit)
            if tried and not kept:
                break  # past the first dose that breaks the model there is nothing to choose
            tried.append((kept, float(np.mean(values := effects(direction, dose))), dose, ratio, values))
        coherent, _, dose, ratio, values = max(tried, key=lambda one: one[:2])
        seeds = [stats.derived_seed(seed, f"search layer {direction.layer}", i) for i in range(CONTROLS)]
        drawn = [random_direction(direction, seed=s) for s in seeds]
        shuffled = [shuffled_direction(both, direction, seed=s, raw=raw) for s in seeds]
        noise = {"random_effect": _size(drawn, effects, dose), "shuffled_effect": _size(shuffled, effects, dose)}
        auroc = cross_fitted_auroc(both, extract, seed=seed)
        yield Candidate(
            direction=direction,
            dose=dose,
            effect=stats.mean(values, groups, seed=seed),
            **noise,
            bar=max(noise.values()) * _normal_bar(rules.control_percentile),
            perplexity_ratio=ratio,
            auroc=auroc,
            coherent=coherent,
            decodable=auroc >= rules.auroc,
        )


def _size(controls: Sequence[Direction], effects: Effects, dose: float) -> float:
    return float(np.mean([abs(np.mean(effects(control, dose))) for control in controls]))


def _normal_bar(percentile: float) -> float:
    """A percentile of |x| over the mean of |x|, for x normal around zero: 2.46 at 95."""
    return float(halfnorm.ppf(min(percentile, 99.9) / 100) / halfnorm.mean())


def cross_fitted_auroc(pairs: Pairs, extract: Callable[[Pairs], Direction], *, seed: int, times: int = 6) -> float:
    """AUROC of the projection on directions from one half of the groups, scored on the other."""
    found = []
    for i in range(times):
        half = stats.split_groups(pairs.groups, np.random.default_rng(stats.derived_seed(seed, "cross-fit", i)))
        fit, rest = pairs.where(half), pairs.where(~half)
        found.append(stats.auroc(*rest.scores(extract(fit).vector), rest.groups, draws=1).value)
    return float(np.mean(found))
