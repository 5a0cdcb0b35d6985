"""What a localization is: rows of causal effects, and the conclusion that they allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from probes.directions import heads_in_words
from probes.errors import WrongInput
from probes.prefixes import Channel
from probes.stats import Estimate
from probes.store import read_result, write_json

SITES: dict[str, str] = {"resid": "residual stream", "gdn.state": "GDN state", "attn.heads": "attention heads"}
CHANNEL_NAMES: dict[str, str] = {"state": "GDN state", "convolution": "GDN convolution", "attention": "keys and values"}
Carrier = Literal["state", "convolution", "attention", "several", "not shown"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One intervention: what was exchanged or given where, and what it did.

    Attributes:
        kind: "exchange" or "give".
        carrier: a channel (exchange: state, convolution, attention) or a site (give: resid, gdn.state, attn.heads).
        layer: None for all layers that have it. head: None for all heads; in the attention channel a key/value head.
        effect: nats of log-odds wanted/unwanted, with an interval over topic groups.
        share: effect over the personas' own effect; NaN where there are no personas.
        controls: effects of controls of equal size, none where the two sides do not differ and nothing was given.
        bar: the percentile of their sizes, by rank; the largest where they are too few for it.
        least: the smallest effect that counts, in nats.
    """

    kind: Literal["exchange", "give"]
    carrier: str
    layer: int | None
    head: int | None
    effect: Estimate
    share: float
    controls: tuple[float, ...]
    bar: float
    least: float = 0.0

    @property
    def shown(self) -> bool:
        """Whether the effect is clear of zero, of meaningless changes of equal size, and of what is negligible.

        What is not a number is never shown.
        """
        return self.effect.lower > max(self.bar, 0.0) and self.effect.value >= self.least

    @property
    def where(self) -> str:
        layer = "all layers" if self.layer is None else f"layer {self.layer}"
        return layer + heads_in_words(None if self.head is None else (self.head,))

    def __str__(self) -> str:
        name = (CHANNEL_NAMES if self.kind == "exchange" else SITES)[self.carrier]
        share = f"{_rounded(100 * self.share, 1):>7} %" if math.isfinite(self.share) else " " * 9
        interval = f"[{_rounded(self.effect.lower)}, {_rounded(self.effect.upper)}]"
        return (
            f"{self.kind:<9}{name:<16}{self.where:<17}{_rounded(self.effect.value):>7} {interval:<17}{share}   "
            f"±{self.bar:<6.2f} {'shown' if self.shown else '-'}"
        )


HEADER = (
    f"{'what':<9}{'carrier':<16}{'where':<17}{'effect':>7} {'95% interval':<17}{'of persona':>9}   {'controls':<7} "
)


@dataclass(frozen=True, kw_only=True)
class Localization:
    """Where a behaviour travels in a model.

    Attributes:
        carrier: what the exchange of whole channels names.
        persona: what the personas themselves do, in nats; None for a behaviour without personas.
        rows: whole channels first, then layers, then heads; exchanges before gifts.
    """

    behavior: str
    model: str
    carrier: Carrier
    sentence: str
    persona: Estimate | None
    rows: tuple[Row, ...]
    recipe: Mapping[str, Any] = field(repr=False)
    seconds: float = 0.0

    def frame(self) -> pd.DataFrame:
        """One row for each intervention; the interval in columns of its own."""
        return pd.DataFrame([_flat(row) for row in self.rows])

    def layers(self, kind: str, carrier: str) -> list[Row]:
        """The rows of one carrier that are single layers, in order."""
        found = [row for row in self.rows if (row.kind, row.carrier) == (kind, carrier)]
        return [row for row in found if row.layer is not None and row.head is None]

    def table(self) -> str:
        """The rows as text."""
        return "\n".join([HEADER.rstrip(), *map(str, self.rows)])

    def save(self, path: str | Path) -> Path:
        write_json(path, self)
        return Path(path)

    def __str__(self) -> str:
        return f"{self.behavior} on {self.model}: {self.sentence}"


def _flat(row: Row) -> dict[str, Any]:
    place = {"kind": row.kind, "carrier": row.carrier, "layer": row.layer, "head": row.head}
    effect = {"effect": row.effect.value, "lower": row.effect.lower, "upper": row.effect.upper}
    counts = {"n": row.effect.n, "groups": row.effect.groups}
    return {**place, **effect, **counts, "share": row.share, "bar": row.bar, "shown": row.shown}


def open_localization(path: str | Path) -> Localization:
    """Read `localization.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or something else.
    """
    data = read_result(path, "localization.json")
    try:
        rows, persona = [_row(row) for row in data.pop("rows")], data.pop("persona")
        return Localization(rows=tuple(rows), persona=Estimate(**persona) if persona else None, **data)
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongInput(f"{path} is not a localization: {error}") from error


def _row(found: dict[str, Any]) -> Row:
    effect = Estimate(
        **{**found["effect"], **{name: _real(found["effect"][name]) for name in ("value", "lower", "upper")}}
    )
    controls = tuple(_real(value) for value in found["controls"])
    plain = {name: _real(found[name]) for name in ("share", "bar", "least")}
    return Row(**{**found, **plain, "effect": effect, "controls": controls})


def _real(value: float | None) -> float:
    if value is not None and not isinstance(value, Real):
        raise TypeError(f"expected a number, saw {value!r}")
    return math.nan if value is None else value  # JSON has no NaN


def _rounded(value: float, digits: int = 2) -> str:
    """Without a sign on zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _percent(share: float) -> str:
    return f"{_rounded(100 * share, 0 if abs(share) >= 0.0995 else 1)} %"


def conclude(
    whole: Mapping[Channel, Row],
    persona: Estimate | None,
    leads: Mapping[Channel, Estimate],
    halves: Mapping[Channel, Estimate],
    *,
    least_groups: int = 5,
    least_controls: int = 19,
) -> tuple[Carrier, str]:
    """The carrier, and why, in words that a newcomer understands.

    A channel is named when its exchange moves more than its controls, for certain more than half of what the personas
    do, and for certain more than the exchange of every other channel, none of which moves half itself; all of this
    prompt by prompt, with intervals over topics. "several" is a finding of its own: two channels move half each, or
    none of them can move half alone. What is too uncertain for either is "not shown".

    Args:
        whole: the rows in which a channel was exchanged in all layers; empty without personas.
        persona: what the personas themselves do.
        leads: by how much the largest exchange moves more than each other channel's. halves: by how much each moves
            more than half of what the personas do.
        least_groups: topic groups, and least_controls: controls of each row, below which nothing is named.
    """
    if persona is None:
        return "not shown", (
            "the behaviour has no personas, so nothing can be exchanged and no carrier is named; "
            "the rows say what a direction does at each site"
        )
    if persona.groups < least_groups:
        return (
            "not shown",
            f"{persona.groups} held-out topic groups are too few to decide on, {least_groups} are needed",
        )
    if (fewest := min(len(row.controls) for row in whole.values())) < least_controls:
        return "not shown", f"{fewest} controls are too few to decide on, {least_controls} are needed"
    if not persona.lower > 0:
        seen = f"{persona.value:.2f} nats [{persona.lower:.2f}, {persona.upper:.2f}]"
        return "not shown", f"the personas move the answers by {seen}, not clear of zero: there is nothing to localise"
    told = f"of the {persona.value:.2f} nats that the personas move the answers by, " + "; ".join(
        f"exchanging {NAMES[channel]} moves {_percent(row.share)} (controls ±{_percent(row.bar / persona.value)})"
        for channel, row in whole.items()
    )
    first = max(whole.items(), key=lambda item: item[1].effect.value)[0]
    if not whole[first].shown:
        return "not shown", f"no exchange moves the answers more than its controls, or more than nothing: {told}"
    enough = [NAMES[channel] for channel, half in halves.items() if whole[channel].shown and half.value >= 0]
    if len(enough) > 1:
        names = " and ".join(enough)
        return "several", f"no single carrier is named, {names} move half of it each: {told}"
    if all(half.upper < 0 for half in halves.values()):
        return "several", f"no single carrier is named, none moves half of it alone: {told}"
    if not halves[first].lower > 0:
        return "not shown", f"{NAMES[first]} may move more than half of it or less, the prompts do not tell: {told}"
    if rivals := [NAMES[channel] for channel, lead in leads.items() if not lead.lower > 0]:
        names = " and ".join([NAMES[first], *rivals])
        return "not shown", f"{names} are not told apart: {told}"
    return first, f"{VERBS[first]} it: {told}"


NAMES: dict[Channel, str] = {
    "state": "all GDN states", "convolution": "all windows of convolutions", "attention": "all keys and values",
}  # fmt: skip
VERBS: dict[Channel, str] = {
    "state": "the GDN states carry", "convolution": "the windows of the convolutions carry",
    "attention": "the attention carries",
}  # fmt: skip
