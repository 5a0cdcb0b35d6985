"""Linear probes: can wanted be told from unwanted by a weighted sum of the features at a site?

A probe is an L2-regularised logistic regression, scored on topics that it was not fitted on. With thousands of features
something can always be fitted, so the same pipeline is repeated with sides swapped at random. That gives selectivity
(AUROC minus the mean of this control task, Hewitt & Liang, arXiv:1909.03368), a permutation p-value, and its correction
for all the layers and heads searched. What a probe finds is decodable; only steering shows that the model uses it.

Folds: scores of different folds come from different probes and are not comparable, so the AUROC is taken within each
fold and averaged by its items (Forman & Scholz 2010, "Apples-to-apples in cross-validation studies").

Swaps: a coin for each topic decides whether the sides of all its pairs are exchanged; coins for single pairs would take
what is shared within a topic for evidence. Every item keeps one row of either label. The coins are independent, not
heads for exactly half: a balanced control holds out more of the labels of which it saw fewer, so it is anti-predictive
(AUROC below 0.5) and its p-values are too small (Southworth, Kim & Owen 2009, "Properties of balanced permutations").
With coins a single control may lie far from 0.5 on either side, but their mean is 0.5 unless the pipeline leaks.

Family: the default is the step-down maximum of Westfall & Young (1993). All cells share the same swaps, and each is
compared with the largest shuffled AUROC among itself and the cells that are not better. This controls the family-wise
error however the cells depend on each other, and 19 shuffles can reject at 5%. Holm needs at least 20 m - 1 shuffles
for m cells. Benjamini-Hochberg ("bh") controls the share of false findings instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from sklearn import config_context
from sklearn.model_selection import GroupKFold
from torch import Tensor
from tqdm.auto import tqdm

from probes.errors import SEEDS, WrongInput, check_ranges
from probes.pairs import Pairs
from probes.span import TIE, logistic_direction, span, weights
from probes.stats import Estimate, Floats, derived_seed, jackknife
from probes.store import library_versions

Features = Float[Tensor, "item feature"] | Float[np.ndarray, "item feature"]
Cells = Mapping[Any, tuple[Features, Features]]  # by (layer, head); `Any`, since a narrower key would refuse some dicts
MIN_ITEMS, MIN_GROUPS = 8, 6  # swaps of 5 topics give no p-value below 1/16
_RANGES = {
    "folds": (2, 1e6),
    "shuffles": (1, 1e6),
    "C": (1e-4, 1e6),
    "components": (1, 1e9),
    "confidence": (0.5, 0.999),
    "seed": SEEDS,
}


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How probes are fitted and tested.

    Attributes:
        folds: folds of whole topics; at most one for each topic.
        shuffles: refits with swapped sides; the smallest p-value is 1 / (1 + shuffles).
        C: inverse penalty for standardised rows of mean squared length 1, whatever the number of features. It is
            fixed: nested choices for each shuffle would multiply the time, and the scores' order hardly depends on it.
        components: principal components of the training rows to keep; None keeps their whole span (exact).
        correction: over all cells: Westfall-Young step-down maximum, Holm, or Benjamini-Hochberg.
        confidence: of the intervals; p-values are significant at 1 - confidence.
    """

    folds: int = 5
    shuffles: int = 199
    C: float = 1.0
    components: int | None = None
    correction: Literal["max", "holm", "bh"] = "max"
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        if self.correction not in ("max", "holm", "bh"):
            raise WrongInput(f"correction must be max, holm or bh, saw '{self.correction}'")


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One probe. `head` is None when the features of all heads were taken together.

    Attributes:
        auroc: held-out AUROC within folds, with a jackknife interval: the probes are fitted and scored again without
            each topic. It is rather too wide than too narrow.
        without: these AUROCs, by topic in sorted order.
        shuffled, shuffled_upper: mean, and the percentile at `confidence`, of the same AUROC with swapped sides.
        selectivity: auroc - shuffled; its interval adds what few shuffles leave open of their mean.
        p_value: share of shuffled AUROCs that are at least as large, the real one counted among them.
        p_adjusted: corrected over all cells of one `probe_all`; significant: whether it is at most 1 - confidence.
        direction: float32 [feature], the weights of a probe fitted on all data, for raw features: length 1, pointing
            from unwanted to wanted; zeros where the two sides are equal.
    """

    site: str
    layer: int | None
    head: int | None
    auroc: Estimate
    without: Floats = field(repr=False, compare=False)
    shuffled: float
    shuffled_upper: float
    selectivity: Estimate
    p_value: float
    p_adjusted: float
    significant: bool
    n: int
    groups: int
    direction: Float[Tensor, " feature"] = field(repr=False, compare=False)

    def __str__(self) -> str:
        mark = "significant" if self.significant else "not significant"
        more = f"selectivity {self.selectivity.value:.2f}, p {self.p_value:.2g}, adjusted {self.p_adjusted:.2g}, {mark}"
        return f"{_place(self.site, self.layer, self.head)}: AUROC {self.auroc}, shuffled {self.shuffled:.2f}, {more}"


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Probes of one site at many layers and heads, corrected together. `recipe` is enough to repeat them."""

    results: tuple[ProbeResult, ...]
    config: ProbeConfig
    recipe: Mapping[str, Any]

    def best(self) -> ProbeResult:
        """The probe with the highest AUROC. Chosen as the best of many, its own interval is optimistic."""
        return max(self.results, key=lambda result: result.auroc.value)

    def frame(self) -> pd.DataFrame:
        """One row for each probe: an estimate takes three columns, `auroc`, `auroc_lower`, `auroc_upper`."""
        rows = [
            {name: value for name, value in vars(r).items() if name not in ("direction", "without")}
            for r in self.results
        ]
        for row in rows:
            for name in ("auroc", "selectivity"):
                found = row[name]
                row |= {name: found.value, f"{name}_lower": found.lower, f"{name}_upper": found.upper}
        return pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})

    def __str__(self) -> str:
        found = f"{sum(result.significant for result in self.results)} of {len(self.results)} probes significant"
        return f"{found} ({self.config.correction}, {self.config.shuffles} shuffles); best {self.best()}"


def probe(
    wanted: Features, unwanted: Features, groups: Sequence[str], config: ProbeConfig | None = None, *, site: str = ""
) -> ProbeResult:
    """`probe_all` for a single cell, whose layer and head are not named."""
    return probe_all({(None, None): (wanted, unwanted)}, groups, site=site, config=config, progress=False).results[0]


def probe_all(
    cells: Cells, groups: Sequence[str], *, site: str, config: ProbeConfig | None = None, progress: bool = True
) -> Probes:
    """Fit and test a probe for each (layer, head), with p-values corrected over all of them.

    `cells[layer, head]` is (wanted, unwanted), float [item feature] each: row i of both sides comes from item i, whose
    topic is `groups[i]`, in every cell. Cells are asked for one by one, so a mapping may load them as it goes.

    Raises:
        WrongInput: shapes that do not fit together, values that are not finite, fewer than 8 items or 6 topics, no
            cells, or too few shuffles for Holm to reject anything.
    """
    config = config or ProbeConfig()
    alpha = 1 - config.confidence
    if not cells:
        raise WrongInput("no cells to probe")
    if config.correction == "holm" and len(cells) > alpha * (1 + config.shuffles) + TIE:
        least = f"{len(cells) / alpha - 1:.0f} shuffles for {len(cells)} cells"
        raise WrongInput(f"Holm needs at least {least}, saw {config.shuffles} ('max' needs fewer)")
    fold, topic, swaps = _design(groups, config)
    kept = topic != np.arange(int(topic.max()) + 1)[:, None]
    areas, without, directions = [], [], []
    for layer, head in tqdm(cells, desc=f"probes {site}".strip(), disable=not progress):
        rows = _rows(cells[layer, head], len(fold), _place(site, layer, head))
        with config_context(assume_finite=True, skip_parameter_validation=True):  # checked above; small fits are faster
            scores, fewer = _held_out(rows, fold, swaps, kept, config)
            directions.append(logistic_direction(rows, C=config.C, components=config.components))
        areas.append([_auroc(pair, fold) for pair in scores])
        without.append(np.array([_auroc(pair[:, on], fold[on]) for pair, on in zip(fewer, kept, strict=True)]))
    table = np.array(areas)  # [cell, real and shuffled]
    p, adjusted = _p_values(table, config.correction)
    shared, results = {"n": len(fold), "groups": len(set(groups))}, []
    for i, (layer, head) in enumerate(cells):
        real, mean = float(table[i, 0]), float(table[i, 1:].mean())
        auroc = jackknife(
            real, without[i], n=len(fold), seed=config.seed, confidence=config.confidence, within=(0.0, 1.0)
        )
        beyond = real - mean
        # AUROC's interval and what few shuffles leave open of their mean, as independent (Zou & Donner 2008)
        unsure = scipy_stats.norm.ppf(1 - alpha / 2) * np.sqrt(np.mean((table[i, 1:] - 0.5) ** 2) / config.shuffles)
        selectivity = replace(
            auroc, value=beyond, lower=beyond - float(np.hypot(real - auroc.lower, unsure)),
            upper=beyond + float(np.hypot(auroc.upper - real, unsure)),
        )  # fmt: skip
        results.append(
            ProbeResult(
                site=site, layer=layer, head=head, auroc=auroc, without=without[i], shuffled=mean, **shared,
                shuffled_upper=float(np.percentile(table[i, 1:], 100 * config.confidence)),
                selectivity=selectivity,
                p_value=float(p[i]), p_adjusted=float(adjusted[i]), significant=bool(adjusted[i] <= alpha + TIE),
                direction=directions[i],
            )
        )  # fmt: skip
    versions = {**library_versions(), "scikit-learn": version("scikit-learn")}
    recipe = {"kind": "probes", "site": site, "groups": list(groups), "config": asdict(config), "versions": versions}
    return Probes(results=tuple(results), config=config, recipe=recipe)


def cells(pairs: Mapping[int, Pairs], *, heads: bool = True) -> dict[tuple[int, int | None], tuple[Tensor, Tensor]]:
    """What `probe_all` takes, from `probes.directions.contrast`: each layer as a whole and, with `heads`, each head."""
    found: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}
    for layer, both in pairs.items():
        found[layer, None] = both.wanted, both.unwanted
        if heads and both.headed:
            sides = [side.unflatten(1, (both.shape[0], -1)).unbind(1) for side in found[layer, None]]
            found |= {(layer, head): pair for head, pair in enumerate(zip(*sides, strict=True))}
    return found


def _design(
    groups: Sequence[str], config: ProbeConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Fold and topic of each item; swaps [real and shuffled, item]."""
    check_groups(groups)
    index = np.unique(np.asarray(groups), return_inverse=True)[1]
    n, count = len(groups), len(set(groups))
    fold = np.empty(n, dtype=np.int64)
    for i, (_, held) in enumerate(GroupKFold(min(config.folds, count)).split(np.zeros(n), groups=index)):
        fold[held] = i
    coins = np.random.default_rng(derived_seed(config.seed, "probe swaps"))
    swaps = coins.integers(0, 2, (1 + config.shuffles, count)).astype(bool)
    swaps[0] = False  # the real labels
    return fold, index, swaps[:, index]


def check_groups(groups: Sequence[str]) -> None:
    """Refuse too few items or topics for a probe; worth asking before anything is computed.

    Raises:
        WrongInput: fewer than 8 items or 6 topics.
    """
    n, count = len(groups), len(set(groups))
    if n < MIN_ITEMS or count < MIN_GROUPS:
        raise WrongInput(f"a probe needs {MIN_ITEMS} items in {MIN_GROUPS} topic groups, saw {n} in {count}")


def _place(site: str, layer: int | None, head: int | None) -> str:
    return f"{site or 'probe'}{'' if layer is None else f' {layer}'}{'' if head is None else f' head {head}'}"


def _rows(cell: tuple[Any, Any], n: int, place: str) -> NDArray[Any]:
    """Both sides below each other [2 item, feature], checked."""
    sides = []
    for name, side in zip(("wanted", "unwanted"), cell, strict=True):
        if isinstance(side, Tensor):  # numpy has no bfloat16
            side = side.detach().cpu().to(torch.float64 if side.dtype == torch.float64 else torch.float32).numpy()
        if side.ndim != 2 or 0 in side.shape or side.shape != (sides[0].shape if sides else (n, side.shape[1])):
            raise WrongInput(
                f"{name} at {place} has shape {side.shape}, allowed is ({n}, features), equal on both sides"
            )
        if bad := int((~np.isfinite(side)).sum()):
            raise WrongInput(f"{name} at {place} must be finite, {bad} of its {side.size} values are not")
        sides.append(side)
    return np.concatenate(sides)


def _held_out(
    rows: NDArray[Any], fold: NDArray[np.int64], swaps: NDArray[np.bool_], kept: NDArray[np.bool_], config: ProbeConfig
) -> tuple[Floats, Floats]:
    """Log-odds without offset from probes that did not see the item's topic: [swap, side, item], and with real labels
    from probes that did not see the items that are not kept either [topic, side, item].
    """
    n = len(fold)
    scores, fewer = np.empty((len(swaps), 2 * n)), np.empty((len(kept), 2 * n))
    for i in range(int(fold.max()) + 1):
        train = np.tile(fold != i, 2)
        coordinates, _ = span(rows, train, config.components)
        held, given = coordinates[~train], coordinates[train]
        for j, swap in enumerate(swaps):
            labels = np.concatenate([~swap, swap])[train]
            scores[j, ~train] = held @ weights(given, labels, config.C)
        truth = (np.arange(2 * n) < n)[train]
        for j, on in enumerate(kept):
            left = np.tile(on, 2)[train]
            whole = left.all()  # the topic is held out here
            fewer[j, ~train] = scores[0, ~train] if whole else held @ weights(given[left], truth[left], config.C)
    sides = scores.reshape(len(swaps), 2, n)
    return np.where(swaps[:, None], sides[:, ::-1], sides), fewer.reshape(len(kept), 2, n)


def _auroc(scores: Floats, fold: NDArray[np.int64]) -> float:
    """AUROC within folds of scores [side, item], averaged by items."""
    total = 0.0
    for i in np.unique(fold):
        positive, negative = scores[:, fold == i]
        difference = positive[:, None] - negative[None, :]
        total += float(np.where(np.abs(difference) <= TIE, 0.5, difference > 0).mean()) * len(positive)
    return total / len(fold)


def _p_values(table: Floats, correction: str) -> tuple[Floats, Floats]:
    """Permutation p-values of each cell, raw and corrected; `table` is AUROC [cell, real and shuffled]."""
    real, null, m = table[:, :1] - TIE, table[:, 1:], len(table)
    p = (1 + (null >= real).sum(1)) / table.shape[1]
    if correction == "bh":
        return p, np.asarray(scipy_stats.false_discovery_control(p))
    if correction == "holm":
        order = np.argsort(p, kind="stable")
        stepped = p[order] * np.arange(m, 0, -1)
    else:
        order = np.argsort(-real[:, 0], kind="stable")
        largest = np.maximum.accumulate(null[order][::-1])[::-1]  # over this cell and all that are not better
        stepped = (1 + (largest >= real[order]).sum(1)) / table.shape[1]
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return p, adjusted
