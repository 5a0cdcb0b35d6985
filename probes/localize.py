"""Which carries a behaviour: the residual stream, the recurrent state, or the attention? A causal answer for each.

Two interventions, both just before the last prompt token, so that prompts are computed once and only that token and the
answers are run again (`probes.prefixes`):

*exchange* takes a prompt under the wanted persona and gives it what the same prompt under the unwanted persona left in
one channel: the states of the GDN layers, the windows of their convolutions, or the keys and values of the attention
layers. What the personas do to the answer has crossed from one token to the others in these channels and nowhere else,
so exchanging all three moves exactly all of it, and exchanging one moves the share that travels there. It is done in
both directions and averaged. The residual stream has no such row: it does not cross tokens.

*give* takes prompts without a persona and adds plus and minus half of the mean difference between the personas at one
site, at the last prompt token (a state: before it). It needs no persona turns, and asks whether a direction at the site
is enough.

Every effect is in nats of log-odds wanted/unwanted, with an interval over topic groups, and is held against controls of
equal size that mean nothing: the same differences turned by random rotations, or random directions with the norm (of a
state, the spectrum) of the target in every head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from probes import stats
from probes.behaviors import Behavior, check_vocabulary
from probes.controls import random_direction
from probes.directions import Direction, mean_difference
from probes.errors import SEEDS, WrongInput, check_ranges
from probes.localization import SITES, Localization, Row, conclude
from probes.model import HybridModel
from probes.pairs import Pairs, contrasts
from probes.prefixes import CHANNELS, Channel, Prefix, Prefixes, continued, disturbed, exchanged, prefixes
from probes.propensity import Propensity, prepare
from probes.sites import having
from probes.stats import Estimate
from probes.steering import steer_first
from probes.store import library_versions

_RANGES: dict[str, tuple[float, float]] = {
    "prompts": (8, math.inf), "controls": (1, math.inf), "layer_controls": (1, math.inf), "head_layers": (0, math.inf),
    "held_out": (0, 1), "percentile": (50, 99), "least_share": (0, 1), "least_groups": (2, math.inf), "seed": SEEDS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig:
    """How a behaviour is localised. The same object configures the function and the command."""

    layers: tuple[int, ...] | None = None
    """Layers to look at one by one; auto (None) takes all."""
    prompts: int = 48
    """At most this many held-out prompts."""
    controls: int = 20
    """Controls for each row that is one carrier as a whole; fewer than 19 name no carrier, and it takes 99 at
    percentile 99."""
    layer_controls: int = 8
    """Controls for each row that is one layer or head."""
    head_layers: int = 1
    """How many layers of each carrier, the strongest ones, are told apart into heads."""
    held_out: float = 0.4
    """Share of topic groups that are held out; directions come from the others."""
    least_groups: int = 5
    """Fewer held-out topic groups than these name no carrier."""
    percentile: float = 95.0
    """The percentile of |control| that an effect has to exceed, by rank: the largest where there are too few controls
    for it. Rows are judged one by one, without a correction for their number."""
    least_share: float = 0.02
    """Effects below this share of the personas' own are negligible, however clear they are."""
    seed: int = 0
    """Decides the split of the topics and every draw."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES, inside=("held_out",))
        if self.layers is not None and not self.layers:
            raise WrongInput("layers must name at least one layer, or be None for all")


def localize(
    model: HybridModel, behavior: Behavior, config: LocalizeConfig = LocalizeConfig(), *, progress: bool = True
) -> Localization:
    """Measure, layer by layer, what a behaviour's carriers do.

    Raises:
        WrongInput: the behaviour does not fit the tokenizer, too few topic groups, or a layer is out of range.
    """
    check_vocabulary(model, behavior)
    started = time.monotonic()
    work = _Work(model, behavior, config, progress)
    with work.bar:
        rows = work.run()
    carrier, sentence = conclude(
        work.whole, work.persona, work.leads(), work.halves(), least_groups=config.least_groups,
        least_controls=max(19, stats.least_draws(config.percentile / 100)),
    )  # fmt: skip
    return Localization(
        behavior=behavior.name, model=model.name, carrier=carrier, sentence=sentence, persona=work.persona,
        rows=tuple(rows), recipe=recipe(model, behavior, config), seconds=round(time.monotonic() - started, 1),
    )  # fmt: skip


def recipe(model: HybridModel, behavior: Behavior, config: LocalizeConfig) -> dict[str, Any]:
    """Everything that determines a localization's numbers."""
    return {
        "behavior": behavior.name,
        "behavior_hash": behavior.hash,
        **model.identity,
        "config": asdict(config),
        "versions": library_versions(),
    }


class _Work:
    """The interventions, in the order in which they run."""

    def __init__(self, model: HybridModel, behavior: Behavior, config: LocalizeConfig, progress: bool):
        self.model, self.config = model, config
        self.fit, held = behavior.split(held_out=config.held_out, seed=config.seed)
        self.judged = held.take(config.prompts, seed=config.seed)
        self.sites = {name: having(model, name, config.layers) for name in SITES}
        self.channels: dict[Channel, tuple[int, ...]] = {  # the layers told apart; as a whole a channel takes them all
            channel: having(model, "gdn.state" if kind == "gdn" else "attn.heads", config.layers)
            for channel, kind in CHANNELS.items()
            if model.of_kind(kind)
        }
        self.persona: Estimate | None = None
        self.whole: dict[Channel, Row] = {}
        self.moved: dict[Channel, list[float]] = {}
        self.bar = tqdm(total=self.steps(behavior), desc=f"localize {behavior.name}", disable=not progress, leave=False)

    def steps(self, behavior: Behavior) -> int:
        """Runs over all held-out prompts, for the progress bar; heads are counted when they are known."""
        config, layers = self.config, sum(map(len, self.sites.values()))
        steps = 1 + layers * (2 + 2 * config.layer_controls)
        if behavior.has_persona:
            whole = len(self.channels)
            single = sum(len(found) for channel, found in self.channels.items() if channel != "convolution")
            steps += 2 + whole * (2 + config.controls) + single * (2 + config.layer_controls)
        return steps

    def run(self) -> list[Row]:
        rows: list[Row] = []
        if self.judged.has_persona:
            both = (
                prepare(self.model, self.judged, persona="wanted"),
                prepare(self.model, self.judged, persona="unwanted"),
            )
            self.wanted, self.unwanted = prefixes(self.model, *both)
            self.plain_wanted, self.plain_unwanted = self.score(self.wanted), self.score(self.unwanted)
            self.told = self.plain_wanted.minus(self.plain_unwanted)
            self.persona = self.estimate(self.told)
            rows += self.exchanges()
        return rows + self.gifts()

    # -- exchange ------------------------------------------------------------------------------------------------------

    def exchanges(self) -> list[Row]:
        single: list[Row] = []
        heads: list[Row] = []
        for channel, layers in self.channels.items():
            all_layers = tuple(layer.index for layer in self.model.of_kind(CHANNELS[channel]))
            self.bar.set_postfix_str(f"exchange: {channel}")
            self.whole[channel] = self.exchange(channel, all_layers, layer=None, controls=self.config.controls)
            if channel == "convolution" or not layers:  # a window is a few tokens wide: told as a whole
                continue
            count = self.config.layer_controls
            found = {i: self.exchange(channel, (i,), layer=i, controls=count) for i in layers}
            single += found.values()

            def one(layer: int, head: int, channel: Channel = channel) -> Row:
                return self.exchange(channel, (layer,), layer=layer, head=head, controls=self.config.layer_controls)

            heads += self.heads_of(found, one, self.head_count(channel))
        return [*self.whole.values(), *single, *heads]

    def leads(self) -> dict[Channel, Estimate]:
        """By how much the largest exchange moves more than each other channel's, prompt by prompt."""
        if not self.whole:
            return {}
        first = max(self.whole, key=lambda channel: self.whole[channel].effect.value)
        return {
            channel: self.estimate([a - b for a, b in zip(self.moved[first], values, strict=True)])
            for channel, values in self.moved.items()
            if channel != first
        }

    def halves(self) -> dict[Channel, Estimate]:
        """By how much each exchange moves more than half of what the personas do, prompt by prompt."""
        return {
            channel: self.estimate([a - b / 2 for a, b in zip(values, self.told, strict=True)])
            for channel, values in self.moved.items()
        }

    def exchange(
        self, channel: Channel, layers: tuple[int, ...], *, layer: int | None, controls: int, head: int | None = None
    ) -> Row:
        """Mean of both ways: what the wanted side loses by the other's content, and what the unwanted side gains."""

        def swapped(part: Prefix, other: Prefix) -> Prefix:
            return exchanged(self.model, part, other, channel=channel, layers=layers, head=head)

        lost = self.plain_wanted.minus(self.score(self.wanted.each(swapped, self.unwanted)))
        gained = self.score(self.unwanted.each(swapped, self.wanted)).minus(self.plain_unwanted)
        noise = []
        for i in range(controls):  # by turns on either side, since one of them may be saturated
            seed = stats.derived_seed(self.config.seed, f"exchange {channel} {layer} {head}", i)

            def turned(part: Prefix, other: Prefix, seed: int = seed) -> Prefix:
                return disturbed(self.model, part, other, channel=channel, layers=layers, seed=seed, head=head)

            if i % 2:
                change = self.score(self.unwanted.each(turned, self.wanted)).minus(self.plain_unwanted)
            else:
                change = self.plain_wanted.minus(self.score(self.wanted.each(turned, self.unwanted)))
            noise.append(float(np.mean(change)))
        moved = [(a + b) / 2 for a, b in zip(lost, gained, strict=True)]
        if layer is None:
            self.moved[channel] = moved
        return self.row("exchange", channel, layer, head, moved, noise)

    # -- give ----------------------------------------------------------------------------------------------------------

    def gifts(self) -> list[Row]:
        self.bar.set_postfix_str("give: extracting")
        (self.neutral,) = prefixes(self.model, prepare(self.model, self.judged))
        self.bar.update()
        single: list[Row] = []
        heads: list[Row] = []
        sites = {site: layers for site, layers in self.sites.items() if layers}
        for site, pairs in contrasts(self.model, self.fit, sites, progress=False).items():
            self.bar.set_postfix_str(f"give: {SITES[site]}")
            found = {layer: self.give(pair, None) for layer, pair in pairs.items()}
            single += found.values()

            def one(layer: int, head: int, pairs: dict[int, Pairs] = pairs) -> Row:
                return self.give(pairs[layer].only([head]), head)

            if site != "resid":
                heads += self.heads_of(found, one, self.head_count(site))
        return [*single, *heads]

    def give(self, pairs: Pairs, head: int | None) -> Row:
        """Half of the difference between the sides, added and subtracted. Where there is none, nothing is given."""
        if pairs.equal:
            self.bar.update(2 + 2 * self.config.layer_controls)
            return self.row("give", pairs.site, pairs.layer, head, [0.0] * len(self.judged.items), [])
        direction = mean_difference(pairs, seed=self.config.seed)
        half = direction.gap / 2 / direction.norm
        noise = []
        for i in range(self.config.layer_controls):
            place = f"give {direction.site} {direction.layer} {head}"
            control = random_direction(direction, seed=stats.derived_seed(self.config.seed, place, i))
            noise.append(float(np.mean(self.pushed(control, half))))
        return self.row("give", direction.site, direction.layer, head, self.pushed(direction, half), noise)

    def pushed(self, direction: Direction, dose: float) -> tuple[float, ...]:
        found = []
        for sign in (1, -1):
            with steer_first(self.model, direction, dose=sign * dose):
                found.append(self.score(self.neutral))
        return found[0].minus(found[1])

    # -- shared --------------------------------------------------------------------------------------------------------

    def heads_of(self, found: Mapping[int, Row], measure: Callable[[int, int], Row], count: int) -> list[Row]:
        """The strongest layers that show something, head by head."""
        strongest = sorted(found, key=lambda layer: -found[layer].effect.value)[: self.config.head_layers]
        chosen = sorted(layer for layer in strongest if found[layer].shown)
        if chosen and self.bar.total:
            both_signs = found[chosen[0]].kind == "give"
            self.bar.total += len(chosen) * count * (2 + self.config.layer_controls * (1 + both_signs))
        return [measure(layer, head) for layer in chosen for head in range(count)]

    def head_count(self, carrier: str) -> int:
        if carrier in ("state", "gdn.state"):
            return int(self.model.config.linear_num_value_heads)
        config = self.model.config  # keys and values are shared by groups of heads
        return int(config.num_attention_heads if carrier == "attn.heads" else config.num_key_value_heads)

    def score(self, begun: Prefixes) -> Propensity:
        found = continued(self.model, begun)
        self.bar.update()
        return found

    def estimate(self, values: Sequence[float]) -> Estimate:
        return stats.mean(values, [item.group for item in self.judged.items], seed=self.config.seed)

    def row(
        self, kind: Any, carrier: str, layer: int | None, head: int | None, values: Sequence[float], noise: list[float]
    ) -> Row:
        effect = self.estimate(values)
        whole = self.persona.value if self.persona and self.persona.value else float("nan")
        return Row(
            kind=kind, carrier=carrier, layer=layer, head=head, effect=effect, share=effect.value / whole,
            controls=tuple(noise), bar=stats.null_bar(np.abs(noise), confidence=self.config.percentile / 100),
            least=self.config.least_share * abs(whole) if np.isfinite(whole) else 0.0,
        )  # fmt: skip
