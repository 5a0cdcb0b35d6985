"""Choosing layer, method and dose, on the fit split alone and by cross-validation.

The fit split's topics are divided into folds. At a layer a method gives one direction for each fold, made from the
topics of the others, and every prompt is pushed along the direction that has not seen its topic. So the effects that
are compared between layers, methods and doses are those of directions on new topics, and nothing is won by fitting
closer. Doses are tried up to the first that breaks ordinary text.

What counts is the effect beyond what the gate will ask for there: the bar that meaningless directions of equal length
set (criterion 5), foreseen from a few of them. It counts only where the gate could agree: the two sides can be told
apart there (methods that cannot are not tried, save the default), and ordinary text keeps at most half of the damage
budget, since the held-out text will not be this one. When nothing is eligible the best of all is taken, and the gate
says what is wrong with it. The default method is tried at every layer; controls, and the other methods, at the better
half of them.

The first method is the default (the mean difference). Another is taken only where it does more on the same prompts with
an interval clear of zero: the best of many looks better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import halfnorm

from probes import stats
from probes.controls import centred, random_direction, shuffled_direction
from probes.criteria import GateCriteria, intact
from probes.directions import Direction
from probes.extraction import Raw
from probes.pairs import Pairs
from probes.stats import Estimate
from probes.steering import Push
from probes.trials import Trial

Effects = Callable[[Sequence[Trial]], Sequence[Sequence[float]]]
Ratios = Callable[[Sequence[Push]], Sequence[float]]
CONTROLS = 4  # of each drawn kind, at each of the layers that are looked at closely
LEAST_LAYERS = 4  # that are looked at closely, or half of them where they are more
FOLDS = 4
WORTH = 0.05  # of the default's effect: a gain that is worth another method


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method as the search needs it.

    `extract` makes a direction, `raw` the same before it is normalised, `null` what shuffled labels go through.
    """

    name: str
    extract: Callable[[Pairs], Direction]
    raw: Raw
    null: Raw


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One method at one layer, at its best dose there.

    Attributes:
        direction: from the whole fit split. values: per prompt of the search, the effect of the direction that had not
            seen its topic, in nats; `effect` is their mean.
        random_effect, shuffled_effect: mean |effect| of controls at this layer; bar: what the percentile of the larger
            kind would be if its effects were normal around zero.
        auroc: cross-fitted. tried: doses that were tried.
    """

    method: str
    direction: Direction
    dose: float
    effect: Estimate
    values: tuple[float, ...]
    random_effect: float
    shuffled_effect: float
    bar: float
    perplexity_ratio: float
    auroc: float
    coherent: bool
    decodable: bool
    tried: int

    @property
    def score(self) -> float:
        """Effect beyond the bar; a layer without a bar was not among the best."""
        return self.effect.value - self.bar if math.isfinite(self.bar) else -math.inf

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Eligible candidates before others, then by effect beyond the bar."""
        return self.coherent, self.decodable, self.score

    def row(self, kind: str) -> dict[str, Any]:
        reliability = self.direction.reliability
        return {
            "layer": self.direction.layer,
            "kind": kind,
            "method": self.method,
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


def folds_of(groups: Sequence[str], *, seed: int, folds: int = FOLDS) -> dict[str, int]:
    """A fold for each topic group, as equal in number as can be."""
    names = sorted(set(groups))
    order = np.random.default_rng(stats.derived_seed(seed, "folds")).permutation(len(names))
    return {names[index]: place % folds for place, index in enumerate(order)}


def search(
    pairs: Mapping[int, Pairs],
    ways: Sequence[Way],
    effects: Effects,
    ratios: Ratios,
    *,
    groups: Sequence[str],
    doses: Sequence[float],
    rules: GateCriteria,
    seed: int,
    tick: Callable[[str], None] = lambda what: None,
) -> list[Candidate]:
    """Try the default at every layer, then the controls and the other methods at the layers where it does most.

    Args:
        pairs: both sides on the fit split, by layer. ways: the default first.
        effects, ratios: run the model under trials, and general text under pushes.
        groups: those of the prompts that are pushed.
        tick: told what has been done.
    """
    tried, found = sorted(dose for dose in doses if dose > 0), list[Candidate]()
    layers: dict[int, list[_Made]] = {}
    for layer, both in pairs.items():
        layers[layer] = _tried(both, ways[:1], effects, ratios, tried, groups, rules, seed, least=0.0)
        tick(f"layer {layer}: {ways[0].name}")
    ranked = sorted(layers, key=lambda layer: layers[layer][0].rank(rules), reverse=True)
    narrowed = ranked[: max(LEAST_LAYERS, -(-len(ranked) // 2))]
    for layer, both in pairs.items():
        noise = None
        if layer in narrowed:
            layers[layer] += _tried(both, ways[1:], effects, ratios, tried, groups, rules, seed, least=rules.auroc)
            best = max(layers[layer], key=lambda one: one.rank(rules))
            noise = _noise(both, best.way, best.direction, tried[best.at], effects, seed)
        found += [_candidate(one, noise, tried, groups, rules, seed) for one in layers[layer]]
        tick(f"layer {layer}: controls and other methods")
    return found


def _tried(
    both: Pairs,
    ways: Sequence[Way],
    effects: Effects,
    ratios: Ratios,
    doses: Sequence[float],
    groups: Sequence[str],
    rules: GateCriteria,
    seed: int,
    *,
    least: float,
) -> list[_Made]:
    """Some methods at one layer; those with an AUROC below `least` are not run."""
    fold = folds_of([*both.groups, *groups], seed=seed)
    turns = tuple(fold[group] for group in groups)
    own = np.array([fold[group] for group in both.groups])
    made = [one for way in ways if (one := _Made.of(both, way, own)).auroc >= least]
    limit = math.sqrt(rules.perplexity_ratio)
    found = iter(ratios([(one.direction, dose) for one in made for dose in doses]))
    for one in made:
        one.hold([next(found) for _ in doses], limit)
    values = iter(effects([trial for one in made for trial in one.trials(doses, turns)]))
    for one in made:
        one.take([next(values) for _ in range(one.kept)])
    return made


def _candidate(
    one: _Made,
    noise: Mapping[str, float] | None,
    doses: Sequence[float],
    groups: Sequence[str],
    rules: GateCriteria,
    seed: int,
) -> Candidate:
    sizes = noise or {"random_effect": math.nan, "shuffled_effect": math.nan}
    return Candidate(
        method=one.way.name, direction=one.direction, dose=doses[one.at],
        effect=stats.mean(one.values, groups, seed=seed), values=one.values,
        random_effect=sizes["random_effect"], shuffled_effect=sizes["shuffled_effect"],
        bar=max(sizes.values()) * _normal_bar(rules.control_percentile), perplexity_ratio=one.ratios[one.at],
        auroc=one.auroc, coherent=one.coherent, decodable=one.auroc >= rules.auroc, tried=one.kept,
    )  # fmt: skip


class _Made:
    """One method at one layer, on its way to a candidate: what it gives, then what it does."""

    def __init__(self, way: Way, direction: Direction, parts: Sequence[Direction], auroc: float):
        self.way, self.direction, self.parts, self.auroc = way, direction, parts, auroc
        self.coherent, self.kept, self.at, self.mean = False, 1, 0, 0.0
        self.ratios: list[float] = []
        self.values: tuple[float, ...] = ()

    @classmethod
    def of(cls, both: Pairs, way: Way, own: NDArray[np.int64]) -> _Made:
        whole = way.extract(both)
        parts = [replace(way.extract(both.where(own != fold)), norm=whole.norm) for fold in range(FOLDS)]
        return cls(way, whole, parts, _auroc(both, parts, own))

    def rank(self, rules: GateCriteria) -> tuple[bool, bool, float]:
        return self.coherent, self.auroc >= rules.auroc, self.mean

    def hold(self, ratios: Sequence[float], limit: float) -> None:
        """Keep the doses before the first that breaks ordinary text; the smallest where that one breaks it."""
        self.ratios = [float(ratio) for ratio in ratios]
        broken = [i for i, ratio in enumerate(self.ratios) if not intact(ratio, limit)]
        self.kept = max(broken[0] if broken else len(self.ratios), 1)
        self.coherent = intact(self.ratios[0], limit)

    def trials(self, doses: Sequence[float], turns: tuple[int, ...]) -> list[Trial]:
        return [Trial(pushes=tuple((part, dose) for part in self.parts), turns=turns) for dose in doses[: self.kept]]

    def take(self, values: Sequence[Sequence[float]]) -> None:
        """Take the dose that does most."""
        self.at = int(np.argmax([np.mean(one) for one in values]))
        self.values = tuple(values[self.at])
        self.mean = float(np.mean(self.values))


def choose(found: Sequence[Candidate], *, default: str, groups: Sequence[str], seed: int) -> Candidate:
    """The best candidate, or that of the default method where the best is not better by `WORTH`, with certainty."""
    best = max(found, key=lambda candidate: candidate.rank)
    plain = best_of(found, default)
    if plain is None or plain.rank[:2] != best.rank[:2]:
        return best
    gain = stats.mean([a - b for a, b in zip(best.values, plain.values, strict=True)], groups, seed=seed)
    return best if gain.lower > best.bar - plain.bar + WORTH * abs(plain.effect.value) else plain


def best_of(found: Sequence[Candidate], method: str) -> Candidate | None:
    """The best layer of one method."""
    return max((one for one in found if one.method == method), key=lambda one: one.rank, default=None)


def _auroc(both: Pairs, parts: Sequence[Direction], own: NDArray[np.int64]) -> float:
    """AUROC of the projection on directions from other topics, averaged over folds by pairs."""
    total = 0.0
    for fold, direction in enumerate(parts):
        if (held := own == fold).any():
            some = both.where(held)
            total += stats.auroc(*some.scores(direction.vector), some.groups, draws=1).value * int(held.sum())
    return total / len(own)


def _noise(both: Pairs, way: Way, direction: Direction, dose: float, effects: Effects, seed: int) -> dict[str, float]:
    """Mean |effect| of a few controls of each kind at one layer."""
    seeds = [stats.derived_seed(seed, f"search layer {direction.layer}", i) for i in range(CONTROLS)]
    drawn = [centred(random_direction(direction, seed=one), both) for one in seeds]
    shuffled = [shuffled_direction(both, direction, seed=one, raw=way.null) for one in seeds]
    values = np.abs([np.mean(one) for one in effects([Trial.of(control, dose) for control in [*drawn, *shuffled]])])
    return {
        "random_effect": float(values[:CONTROLS].mean()),
        "shuffled_effect": float(values[CONTROLS:].mean()),
    }


def _normal_bar(percentile: float) -> float:
    """A percentile of |x| over the mean of |x|, for x normal around zero: 2.46 at 95."""
    return float(halfnorm.ppf(min(percentile, 99.9) / 100) / halfnorm.mean())
