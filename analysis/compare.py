"""Before and after: what changed inside a model, and whether toward a behaviour.

    shift = compare(load("base"), load("tuned"), read_behavior("follow-direction"))
    print(shift.conclusion, shift.sentence)

Both checkpoints read the same held-out prompts without a persona. Four questions are asked of them, each with headline
numbers and intervals over topics (`Shift.claims`): do the answers lean more toward wanted; can wanted be told from
unwanted better; do the tokens of the request (the prompt's span "direction") make up more of the states, of what is
read from them and of the attention; and does the change of the states lie along the behaviour's direction. All but the
second are held against nulls. `analysis.shift` has the rule of the conclusion, `analysis.states` compares captures
without a behaviour.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from analysis.alignment import AlignedRow, Thresholds, align, check_pair, cosine_with, redrawn
from analysis.attention import Means, ShareRow, Spans, control_spans, mean_excess, share_rows, span_shares
from analysis.shift import POINTS, SHARE_NAMES, SITE_NAMES, WAY, Claim, ProbeRow, Shift, conclude
from analysis.states import Change, Topics, compare_captures
from probes.behaviors import Behavior, check_vocabulary
from probes.capture import RECURRENCE, Capture, capture, prompts_hash
from probes.directions import Direction, mean_difference
from probes.errors import SEEDS, WrongInput, check_ranges
from probes.linear import ProbeConfig, ProbeResult, cells, probe_all
from probes.model import HybridModel
from probes.pairs import Pairs, contrast, contrasts
from probes.propensity import Propensity, prepare, propensity
from probes.sites import having
from probes.stats import Estimate, derived_seed, jackknife, least_draws, null_bar
from probes.store import library_versions

_SHARES = ("held_out", "least_change", "least_way", "least_gap", "least_reliability")
_RANGES: dict[str, tuple[float, float]] = {
    "prompts": (8, math.inf), "pairs": (8, math.inf), "nulls": (20, math.inf), "updates": (1, math.inf),
    "shuffles": (1, math.inf), "spans": (2, math.inf), "subspace": (1, math.inf), "least_groups": (2, math.inf),
    "seed": SEEDS, "confidence": (0.5, 0.99), **dict.fromkeys(_SHARES, (0, 1)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """How two checkpoints are compared. The same object configures the function and the command."""

    prompts: int = 48
    """At most this many held-out prompts, and as many pairs for the probes."""
    pairs: int = 80
    """At most this many pairs of the other topics, from which the directions come."""
    nulls: int = 200
    """Random and shuffled directions, each, that the change is held against."""
    updates: int = 39
    """Changes of the weights with redrawn signs that the change is held against; each costs a pass over the prompts."""
    shuffles: int = 19
    """Refits of each probe with swapped sides."""
    spans: int = 8
    """Control spans of each prompt."""
    subspace: int = 4
    """Dimensions of the dominant subspaces whose angles are taken; less where states are smaller."""
    heads: bool = True
    """Probe each head of a state too, not only each layer."""
    layers: tuple[int, ...] | None = None
    """Layers to look at; auto (None) takes all."""
    held_out: float = 0.4
    """Share of topic groups that are held out; directions come from the others."""
    least_change: float = 0.01
    """A mean relative change of the states below this counts as nothing."""
    least_way: float = 0.05
    """Parts of the way from neutral to the wanted persona below this are negligible, in states and in answers."""
    least_gap: float = 0.1
    """Layers where the personas differ by less than this, relative to the norm, do not decide."""
    least_reliability: float = 0.8
    """Layers where the direction's halves agree less than this do not decide."""
    least_groups: int = 5
    """Fewest held-out topic groups to decide on."""
    confidence: float = 0.95
    """Of the intervals and of the nulls."""
    seed: int = 0
    """Decides the split of the topics and every draw."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES, inside=_SHARES)
        needed = least_draws(self.confidence)
        if min(self.updates, self.nulls) < needed:
            raise WrongInput(
                f"at a confidence of {self.confidence:g} at least {needed} nulls and updates are needed, "
                f"saw {self.nulls} and {self.updates}"
            )
        if self.layers is not None and not self.layers:
            raise WrongInput("layers must name at least one layer, or be None for all")

    @property
    def thresholds(self) -> Thresholds:
        """Those that decide that a change lies along a direction."""
        return Thresholds(
            least_way=self.least_way, least_gap=self.least_gap, least_reliability=self.least_reliability,
            confidence=self.confidence,
        )  # fmt: skip


def compare(
    before: HybridModel,
    after: HybridModel,
    behavior: Behavior,
    config: CompareConfig = CompareConfig(),
    *,
    progress: bool = True,
) -> Shift:
    """Compare two checkpoints of one architecture and tokenizer.

    The weights of `before` are exchanged for a while (`analysis.alignment.redrawn`), and are what they were afterwards.

    Raises:
        WrongInput: the models do not fit together, the behaviour does not fit the tokenizer or has no personas, there
            are too few topic groups, or a layer is out of range.
    """
    check_pair(before, after)
    check_vocabulary(before, behavior)
    if not behavior.has_persona:
        raise WrongInput(
            f"'{behavior.name}' has no personas, so no direction to compare with; compare_captures says what moved"
        )
    started = time.monotonic()
    work = _Work(before, after, behavior, config, progress)
    with work.bar:
        found = work.run()
    return replace(found, seconds=round(time.monotonic() - started, 1))


class _Work:
    """The measurements, in the order in which they run."""

    def __init__(
        self, before: HybridModel, after: HybridModel, behavior: Behavior, config: CompareConfig, progress: bool
    ):
        self.before, self.after, self.behavior, self.config = before, after, behavior, config
        fit, held = behavior.split(held_out=config.held_out, seed=config.seed)
        self.fit = fit.take(config.pairs, seed=config.seed)
        self.judged = held.take(config.prompts, seed=config.seed)
        self.prompts = [item.prompt(before) for item in self.judged.items]
        self.topics = self.topics_of(self.judged)
        self.layers = {name: layers for name in SITE_NAMES if (layers := having(before, name, config.layers))}
        self.judged_site = next(iter(self.layers))
        if before.of_kind("gdn") and "gdn.state" not in self.layers:
            chosen = ", ".join(map(str, config.layers or ()))
            raise WrongInput(
                f"the conclusion is about GDN states, and layers {chosen} hold none; choose a GDN layer too"
            )
        self.same = before.weights_hash == after.weights_hash
        self.bar = tqdm(total=6 + (0 if self.same else config.updates), desc="compare", disable=not progress)

    def topics_of(self, behavior: Behavior) -> Topics:
        groups = [item.group for item in behavior.items]
        return Topics(groups, seed=self.config.seed, confidence=self.config.confidence)

    def run(self) -> Shift:
        answers, persona, plain = self.answers()
        self.step("captures")
        records = self.record(self.before), self.record(self.after)
        config = self.config
        moved = compare_captures(
            *records, groups=self.topics.groups, subspace=self.subspace(records[0]), confidence=config.confidence,
            seed=config.seed,
        )  # fmt: skip
        self.step("directions")
        pairs = contrasts(self.before, self.fit, self.layers, progress=False)
        found = control_spans(self.prompts, count=config.spans, seed=config.seed)
        directions = {
            name: {layer: mean_difference(pair, seed=config.seed) for layer, pair in by_layer.items()}
            for name, by_layer in pairs.items()
        }
        null = self.null(records[0], plain, directions, found)
        aligned = self.alignment(records, pairs, directions, null)
        drift = null_bar(np.abs(null.answers), confidence=config.confidence)
        judged = [row for row in aligned if row.site == self.judged_site]
        self.step("token shares")
        one, other = (span_shares(record, found) for record in records)
        shares = share_rows(self.topics, found, one, other, null.shares)
        probes = self.decodability()
        change, equal = (moved.overall, moved.equal) if moved.overall else self.size(records)
        conclusion, sense, sentence = conclude(
            site=self.judged_site, change=change, equal=equal, answers=answers, drift=drift, persona=persona,
            rows=judged, least_change=config.least_change, least_way=config.least_way, least_groups=config.least_groups,
        )  # fmt: skip
        return Shift(
            behavior=self.behavior.name, before=self.before.name, after=self.after.name, conclusion=conclusion,
            sense=sense, sentence=sentence, behavior_change=answers, drift=drift, persona=persona, moved=moved,
            probes=probes, shares=shares, aligned=aligned,
            claims=self.claims(answers, drift, persona, probes, shares, aligned),
            prompts=len(self.prompts), topics=self.topics.count, left_out=len(self.prompts) - len(found.kept),
            recipe=recipe(self.before, self.after, self.behavior, config, prompts_hash(self.prompts)),
        )  # fmt: skip

    def step(self, what: str) -> None:
        self.bar.set_postfix_str(what)
        self.bar.update()

    # -- what is measured ----------------------------------------------------------------------------------------------

    def answers(self) -> tuple[Change, Estimate, Propensity]:
        """How the answers changed without a persona, what the personas do before, and the answers before."""
        self.step("answers")
        plain, later = (propensity(model, prepare(model, self.judged)) for model in (self.before, self.after))
        wanted = propensity(self.before, prepare(self.before, self.judged, persona="wanted"))
        unwanted = propensity(self.before, prepare(self.before, self.judged, persona="unwanted"))
        return self.topics.change(plain.values, later.values), self.topics.mean(wanted.minus(unwanted)), plain

    def record(self, model: HybridModel) -> Capture:
        """What the last prompt token has, and what the recurrences and the attention are made of."""
        layers: dict[str, Sequence[int]] = {**self.layers}
        positions: dict[str, str] = {}
        if gdn := self.layers.get("gdn.state"):
            layers |= dict.fromkeys(RECURRENCE, gdn)
            positions |= dict.fromkeys(RECURRENCE, "all")
        if attention := self.layers.get("attn.heads"):
            layers["attn.pattern"] = attention
        sites = tuple(layers)
        return capture(model, self.prompts, sites=sites, layers=layers, positions=positions, progress=False)

    def subspace(self, record: Capture) -> int:
        if "gdn.state" not in self.layers:
            return self.config.subspace
        layer = self.layers["gdn.state"][0]
        return min(self.config.subspace, *record["gdn.state", layer].shape[-2:])

    def size(self, records: Sequence[Capture]) -> tuple[Estimate, bool]:
        """Mean relative change of the site that is judged in a model without states, and whether it is exactly none."""
        parts, name = [], self.judged_site
        for layer in self.layers[name]:
            one, other = (record[name, layer].flatten(1).double() for record in records)
            parts.append((other - one).norm(dim=1) / one.norm(dim=1).clamp(min=1e-30))
        change = self.topics.mean(sum(parts) / len(parts))
        return change, change.value == 0

    def null(
        self, before: Capture, plain: Propensity, directions: Mapping[str, Mapping[int, Direction]], found: Spans
    ) -> _Null:
        """What the change of the weights does with redrawn signs, again and again."""
        null, prepared = _Null(), prepare(self.before, self.judged)
        null.cosines.update({name: {layer: [] for layer in layers} for name, layers in self.layers.items()})
        for i in range(0 if self.same else self.config.updates):
            self.step("redrawn updates")
            with redrawn(self.before, self.after, seed=derived_seed(self.config.seed, "redrawn update", i)):
                record = self.record(self.before)
                null.answers.append(float(np.mean(propensity(self.before, prepared).minus(plain))))
            null.shares.append(mean_excess(span_shares(record, found)))
            for name, layers in self.layers.items():
                for layer in layers:
                    cosine = cosine_with(_changes(before, record, name, layer), directions[name][layer])
                    null.cosines[name][layer].append(cosine)
        return null

    def alignment(
        self,
        records: tuple[Capture, Capture],
        pairs: Mapping[str, Mapping[int, Pairs]],
        directions: Mapping[str, Mapping[int, Direction]],
        null: _Null,
    ) -> tuple[AlignedRow, ...]:
        """Where the change points at each site."""
        rows: list[AlignedRow] = []
        for name, layers in self.layers.items():
            nothing = np.zeros(self.config.updates)
            updates = {layer: nothing if self.same else np.array(null.cosines[name][layer]) for layer in layers}
            rows += align(
                self.topics, {layer: _changes(*records, name, layer) for layer in layers}, pairs[name],
                directions[name], updates, draws=self.config.nulls,
                seed=derived_seed(self.config.seed, f"align {name}"), thresholds=self.config.thresholds,
            )  # fmt: skip
        return tuple(rows)

    def decodability(self) -> tuple[ProbeRow, ...]:
        """Probes on personas of all topics, since each is scored on topics that it was not fitted on."""
        config, name = self.config, self.judged_site
        sample = self.behavior.take(config.prompts, seed=config.seed)
        found = []
        for model in (self.before,) if self.same else (self.before, self.after):
            self.step("probes")
            pairs = contrast(model, sample, site=name, layers=self.layers[name], progress=False)
            groups = [item.group for item in sample.items]
            options = ProbeConfig(shuffles=config.shuffles, confidence=config.confidence, seed=config.seed)
            asked = cells(pairs, heads=config.heads)
            found.append(probe_all(asked, groups, site=name, config=options, progress=False).results)
        return tuple(_probe_row(a, b, same=self.same) for a, b in zip(found[0], found[-1], strict=True))

    # -- headlines -----------------------------------------------------------------------------------------------------

    def claims(
        self,
        answers: Change,
        drift: float,
        persona: Estimate,
        probes: Sequence[ProbeRow],
        shares: Sequence[ShareRow],
        aligned: Sequence[AlignedRow],
    ) -> tuple[Claim, ...]:
        """One for each question. What is about one layer is about the one where the personas differ most before; of a
        change along the direction, among the layers beyond the nulls if there are some.
        """
        widest = {
            name: max((row for row in aligned if row.site == name), key=lambda row: (row.decides, row.gap))
            for name in self.layers
        }
        least = self.config.least_way * persona.value / 2
        found = [_claim("behaviour", answers.change, "nats", max(least, drift), "nulls or negligible within")]
        layer = widest[self.judged_site].layer
        probe = next(row for row in probes if (row.layer, row.head) == (layer, None))
        against = f"{probe.auroc.before.value:.2f} before; reported, it has no null of its own"
        claim = _claim(f"decodability at layer {layer}", probe.auroc.change, "AUROC", math.nan, against)
        found.append(replace(claim, shown=False))
        for row in shares:
            if row.layer is None:
                moved = row.excess.change
                points = replace(moved, value=100 * moved.value, lower=100 * moved.lower, upper=100 * moved.upper)
                name = f"the request's share of {SHARE_NAMES[row.kind]}"
                found.append(_claim(name, points, POINTS, 100 * row.bar, "nulls within"))
        for name in self.layers:
            row = max((row for row in aligned if row.site == name), key=lambda row: (row.beyond, row.decides, row.gap))
            if not row.decides:  # no gap between the personas to measure the way in
                continue
            where = f"{SITE_NAMES[name]}, layer {row.layer}"
            claim = _claim(where, row.way, WAY, row.bar, "nulls within")
            found.append(replace(claim, shown=row.beyond))
        return tuple(found)


@dataclass(frozen=True)
class _Null:
    """By draw: the mean change of the answers, of the excess of shares, and the change's cosines with directions."""

    answers: list[float] = field(default_factory=list)
    shares: list[Means] = field(default_factory=list)
    cosines: dict[str, dict[int, list[float]]] = field(default_factory=dict)


def _changes(before: Capture, after: Capture, name: str, layer: int) -> Tensor:
    return (after[name, layer].float() - before[name, layer].float()).flatten(1)


def _claim(name: str, value: Estimate, unit: str, bar: float, against: str) -> Claim:
    shown = (value.lower > 0 or value.upper < 0) and abs(value.value) > bar
    return Claim(name=name, value=value, unit=unit, bar=bar, against=against, shown=shown)


def _probe_row(before: ProbeResult, after: ProbeResult, *, same: bool) -> ProbeRow:
    if before.layer is None:
        raise RuntimeError("a probe was fitted at no layer")
    one, other = before.auroc, after.auroc
    change = jackknife(
        other.value - one.value, after.without - before.without, n=one.n, seed=one.seed, confidence=one.confidence
    )
    return ProbeRow(
        site=before.site, layer=before.layer, head=before.head, auroc=Change(before=one, after=other, change=change),
        selectivity=_difference(before.selectivity, after.selectivity, same),
        significant=(before.significant, after.significant),
    )  # fmt: skip


def _difference(a: Estimate, b: Estimate, same: bool) -> Change:
    """Of two estimates, from their intervals alone (MOVER, Zou & Donner 2008)."""
    value = b.value - a.value
    below = 0.0 if same else math.hypot(b.value - b.lower, a.upper - a.value)
    above = 0.0 if same else math.hypot(b.upper - b.value, a.value - a.lower)
    return Change(before=a, after=b, change=replace(b, value=value, lower=value - below, upper=value + above))


def recipe(
    before: HybridModel, after: HybridModel, behavior: Behavior, config: CompareConfig, prompts: str | None = None
) -> dict[str, Any]:
    """Everything that determines a shift's numbers; `prompts` is the hash of those that were judged."""
    return {
        "kind": "shift",
        "before": before.identity,
        "after": after.identity,
        "behavior": behavior.name,
        "behavior_hash": behavior.hash,
        "prompts_hash": prompts,
        "config": asdict(config),
        "versions": library_versions(),
    }
