"""What a shift is: what moved between two checkpoints, whether toward a behaviour, and the conclusion that it allows.

The conclusion is about the recurrent states (in a model without GDN layers: the attention heads), on held-out prompts
without a persona. All thresholds are in `CompareConfig` and are written into every shift. In this order:

1. "not shown" - there are fewer than `least_groups` topics; the personas' own effect on the checkpoint before is not
   clear of zero, or their direction is nowhere large (`least_gap`) and reliable (`least_reliability`); or the mean
   relative change of what is judged is below `least_change`.
2. A layer lies *along the direction* if its change, in halves of the gap between the sides, has an interval clear of
   zero and is at least `least_way`, and its cosine is beyond all three nulls at `confidence`, corrected over layers
   (`analysis.alignment`). The answers *moved* if the change of propensity has an interval clear of zero, is at least
   `least_way` of half the personas' own effect, and beyond what redrawn changes of the weights do to it (`drift`).
3. "direction-shaped" - some layer lies along the direction, all such layers do in the wanted sense, and the answers
   moved toward wanted.
4. "no" - the same in the unwanted sense: moved, but away from the behaviour. Or no layer lies along the direction and
   the answers did not move toward wanted. For this it is not enough that nothing was shown: each layer that decides,
   and the answers unless they moved away, went no further than the nulls do, or have their whole interval within what
   is negligible. Then it moved, but not toward the behaviour.
5. "not shown" - everything else is unclear, and the sentence says what speaks against what: answers that moved without
   the states, states without the answers, senses that differ, or numbers too uncertain to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import pandas as pd

from analysis.alignment import AlignedRow
from analysis.attention import ShareRow
from analysis.states import Change, Moved, MovedRow, flat, signed
from probes.errors import WrongInput
from probes.stats import Estimate
from probes.store import read_result, write_json

Conclusion = Literal["direction-shaped", "no", "not shown"]
Sense = Literal["toward", "away", "neither"]
SITE_NAMES: Mapping[str, str] = MappingProxyType(
    {"gdn.state": "GDN states", "attn.heads": "attention heads", "resid": "residual stream"}
)
SHARE_NAMES: Mapping[str, str] = MappingProxyType(
    {"state": "the states", "readout": "what is read from them", "attention": "the attention"}
)
POINTS = "points beyond control spans"
WAY = "of the way along the direction"
FRAMES = ("moved", "probes", "shares", "aligned", "claims")


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """How well wanted can be told from unwanted at one layer (head None: all heads together), before and after.

    The interval of a change of AUROC is a jackknife over topics, of both sides at once. That of selectivity takes both
    sides as independent (Zou & Donner 2008). `significant`: before, after; corrected over all rows.
    """

    site: str
    layer: int
    head: int | None
    auroc: Change
    selectivity: Change
    significant: tuple[bool, bool]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One headline number with its interval and what it is held against.

    Attributes:
        name: behaviour, decodability, the request's share of states, readouts or attention, or a site's layer whose
            change is told along the direction.
        value: the number, a change from before to after. unit: what it counts.
        bar: sizes up to this one mean nothing; NaN for a number without a null, which is reported and never shown.
        shown: whether it is clear of zero and of the bar.
        against: what the bar is.
    """

    name: str
    value: Estimate
    unit: str
    bar: float
    against: str
    shown: bool

    def __str__(self) -> str:
        mark = "shown" if self.shown else "not shown"
        if not math.isfinite(self.bar):
            return f"{self.name:<32} {signed(self.value)} {self.unit}; {self.against}"
        return f"{self.name:<32} {signed(self.value)} {self.unit}; {self.against} ±{self.bar:.3g}: {mark}"


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A comparison of two checkpoints.

    Attributes:
        before, after: names of the models.
        conclusion, sense, sentence: see the module's docstring.
        behavior_change: propensity without a persona, nats. drift: the size that it has to exceed to be more than what
            redrawn changes of the weights do. persona: what the personas themselves do, before.
        moved: the states. probes, shares, aligned: rows of evidence, whole before parts.
        claims: one headline for each.
        prompts, topics: how many were judged. left_out: prompts without room for a control span.
    """

    behavior: str
    before: str
    after: str
    conclusion: Conclusion
    sense: Sense
    sentence: str
    behavior_change: Change
    drift: float
    persona: Estimate
    moved: Moved
    probes: tuple[ProbeRow, ...]
    shares: tuple[ShareRow, ...]
    aligned: tuple[AlignedRow, ...]
    claims: tuple[Claim, ...]
    prompts: int
    topics: int
    left_out: int
    recipe: Mapping[str, Any] = field(repr=False)
    seconds: float = 0.0

    def frame(self, what: str = "moved") -> pd.DataFrame:
        """One of `FRAMES` as a table, a row for each layer and head; estimates take columns of their own.

        Raises:
            WrongInput: there is no such table.
        """
        if what not in FRAMES:
            raise WrongInput(f"unknown table '{what}'; allowed are {', '.join(FRAMES)}")
        if what == "moved":
            return self.moved.frame()
        rows = [flat(row) for row in getattr(self, what)]
        for row in rows:
            for name in ("p", "bars"):
                row |= {f"{name}_{key}": value for key, value in row.pop(name, {}).items()}
            if "significant" in row:
                row["significant_before"], row["significant_after"] = row.pop("significant")
        kinds = {name: "Int64" for name in ("layer", "head") if rows and name in rows[0]}
        return pd.DataFrame(rows).astype(kinds)

    def table(self) -> str:
        """The headlines as text."""
        left = f"; {self.left_out} prompts have no room for a control span" if self.left_out else ""
        numbers = f"{self.prompts} prompts of {self.topics} topics{left}"
        persona = f"{'the personas themselves':<32} {signed(self.persona)} nats"
        return "\n".join([numbers, str(self.moved), persona, *map(str, self.claims)])

    def save(self, path: str | Path) -> Path:
        write_json(path, self)
        return Path(path)

    def __str__(self) -> str:
        return f"{self.behavior}, {self.before} -> {self.after}: {self.conclusion}. {self.sentence}"


def open_shift(path: str | Path) -> Shift:
    """Read `shift.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or something else.
    """
    data = read_result(path, "shift.json")
    try:
        moved = data["moved"]
        rows = {
            "moved": Moved(**{**moved, **_read(moved, ("overall",)), "rows": _rows(MovedRow, moved["rows"])}),
            "probes": _rows(ProbeRow, data["probes"]),
            "shares": _rows(ShareRow, data["shares"]),
            "aligned": _rows(AlignedRow, data["aligned"]),
            "claims": _rows(Claim, data["claims"]),
        }
        found = Shift(**{**data, **_read(data, ("behavior_change", "persona")), **rows})
        _check(found)
        return found
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongInput(f"{path} is not a shift: {error}") from error


def _check(found: Shift) -> None:
    """What the page takes for granted; TypeError where a file holds something else."""
    kinds = ((found.recipe, dict), (found.behavior_change, Change), (found.persona, Estimate), (found.sentence, str))
    for value, kind in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"expected {kind.__name__}, saw {value!r}")
    if found.conclusion not in get_args(Conclusion) or found.sense not in get_args(Sense):
        raise TypeError(f"unknown conclusion '{found.conclusion}' or sense '{found.sense}'")
    for row in (*found.aligned, *found.probes):
        if row.site not in SITE_NAMES:
            raise TypeError(f"unknown site '{row.site}'")
    for row in (*found.aligned, *found.claims, *found.shares):
        for name in _NUMBERS & set(vars(row)):
            if not isinstance(getattr(row, name), Real):
                raise TypeError(f"{name} must be a number, saw {getattr(row, name)!r}")


_NUMBERS = {"cosine", "size", "gap", "reliability", "bar"}


def _rows(kind: Any, found: Sequence[dict[str, Any]]) -> Any:
    return tuple(kind(**_read(row, row)) for row in found)


def _read(found: Mapping[str, Any], names: Any) -> dict[str, Any]:
    """Some fields with estimates and changes as what they were."""
    result = {}
    for name in names:
        value = found[name]
        if isinstance(value, dict) and set(value) == {"before", "after", "change"}:
            value = Change(**_read(value, value))
        elif isinstance(value, dict) and {"value", "lower", "upper"} <= set(value):
            gone: dict[str, Any] = {key: math.nan for key, part in value.items() if part is None}
            value = Estimate(**{**value, **gone})
        elif isinstance(value, list):
            value = tuple(value)
        elif value is None and name in _NUMBERS:
            value = math.nan  # JSON has no NaN
        result[name] = value
    return result


def conclude(
    *,
    site: str,
    change: Estimate,
    equal: bool,
    answers: Change,
    drift: float,
    persona: Estimate,
    rows: Sequence[AlignedRow],
    least_change: float,
    least_way: float,
    least_groups: int,
) -> tuple[Conclusion, Sense, str]:
    """The conclusion by the rule in this module's docstring, its sense, and why, in words that a newcomer understands.

    Args:
        site: what is judged. change: its mean relative change; equal: whether every bit of it is what it was.
        drift: the change of the answers that redrawn changes of the weights stay within.
        rows: the layers of the site.
    """
    name = SITE_NAMES[site]
    size = f"the {name} moved by {100 * change.value:.3g} % of their norm"
    if change.groups < least_groups:
        return "not shown", "neither", f"{change.groups} held-out topics are too few to decide on ({least_groups} are)"
    moved, least = answers.change, least_way * persona.value / 2
    nulls = f", meaningless changes of the weights up to ±{drift:.2g}" if drift else ""
    said = f"the answers moved by {signed(moved)} nats, where the personas do {persona.value:.3g}{nulls}"
    spoken = (moved.lower > 0 or moved.upper < 0) and abs(moved.value) > max(drift, least)
    quiet = _still(moved, drift, least)
    if equal or change.value < least_change:
        still = f"the {name} did not move: they are equal, bit for bit" if equal else (
            f"{size}, and less than {100 * least_change:g} % counts as nothing"
        )  # fmt: skip
        if equal and answers.none:
            return "not shown", "neither", f"nothing moved: the {name} and the answers are equal, bit for bit"
        return "not shown", "neither", f"{still}; {said}" if quiet else f"unclear: {still}, and yet {said}"
    if not persona.lower > 0:
        seen = f"{signed(persona)} nats, not clear of zero"
        return (
            "not shown",
            "neither",
            f"{size}, but what toward the behaviour means is not known: the personas do {seen}",
        )
    deciding = [row for row in rows if row.decides]
    if not deciding:
        return "not shown", "neither", f"{size}, but the personas leave no large and reliable direction in the {name}"
    along = [row for row in deciding if row.beyond]
    if not along:
        nearest = max(
            deciding,
            key=lambda row: (not _still(row.way, row.bar, least_way), abs(row.way.value) / (row.bar or math.inf)),
        )
        part = (
            f"{size}, along the direction by {signed(nearest.way)} of the way at layer {nearest.layer}, the nearest to "
            f"counting (nulls within ±{nearest.bar:.2g}, less than {least_way:g} is negligible)"
        )
        if not all(_still(row.way, row.bar, least_way) for row in deciding):
            return "not shown", "neither", f"unclear: {part}, too uncertain to tell; {said}"
        if (spoken and moved.value < 0) or quiet:
            return "no", "neither", f"moved, but not toward the behaviour: {part}; {said}"
        return "not shown", "neither", f"unclear: {part}, {'and yet ' if spoken else 'but perhaps '}{said}"
    best = max(along, key=lambda row: row.gap)
    part = (
        f"{size}, at layer {best.layer} by {signed(best.way)} of the way from neutral to the wanted persona "
        f"(nulls within ±{best.bar:.2g}; {len(along)} of {len(deciding)} layers beyond them)"
    )
    signs = {row.way.value > 0 for row in along}
    if len(signs) > 1:
        return "not shown", "neither", f"unclear: {part}, but layers moved in different senses; {said}"
    toward = signs.pop()
    if not spoken or (moved.value > 0) != toward:
        return "not shown", "neither", f"unclear: {part}, but the answers did not follow: {said}"
    if toward:
        return "direction-shaped", "toward", f"moved toward the behaviour along its direction: {part}; {said}"
    return "no", "away", f"moved, but away from the behaviour along its direction: {part}; {said}"


def _still(change: Estimate, bar: float, least: float) -> bool:
    """Whether a change is that of meaningless changes, or negligible for certain."""
    return abs(change.value) <= bar or -least < change.lower <= change.upper < least
