"""One shift, one page (see `analysis.pages`): what changed between two checkpoints, whether toward a behaviour, and how
that is known.

The page is made from a `Shift` alone, so it can be written again from `shift.json` at any time. What it says in its own
words is in `templates/shift.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.alignment import NULLS, AlignedRow
from analysis.attention import ShareRow
from analysis.figures import draw_shift
from analysis.figures.shift import held_against, known, numbers
from analysis.pages import as_sentence, render_page, settings
from analysis.shift import SITE_NAMES, Claim, ProbeRow, Shift
from analysis.states import Change, MovedRow
from analysis.words import estimate, finite, number, percent, real
from probes.stats import Estimate
from probes.store import write_text

CONSEQUENCES = {
    "toward": (
        "The change points along the behaviour's own direction, toward the wanted side, more than meaningless changes "
        "do, and the answers followed. It need not be all that changed."
    ),
    "away": (
        "The change points along the behaviour's own direction, but toward the unwanted side, and the answers followed."
    ),
    "elsewhere": (
        "Something changed, but along the behaviour's direction no further than meaningless changes of its size go, "
        "or than what is negligible; and the answers did not move toward the behaviour."
    ),
    "equal": "Where nothing was moved, there is no change whose direction could be asked about.",
    "not-shown": (
        "Neither that the change points toward the behaviour nor that it does not. The sentence above says what is "
        "missing, or what speaks against what."
    ),
}
CONFIG = {
    "prompts": "most held-out prompts that were judged, and most pairs for the probes",
    "pairs": "most pairs of the other topics, from which the directions come",
    "nulls": "random and shuffled directions, each, that the change is held against",
    "updates": "changes of the weights with redrawn signs that the change is held against",
    "shuffles": "refits of each probe with swapped sides",
    "spans": "control spans of each prompt",
    "subspace": "dimensions of the strongest subspaces whose angles are taken",
    "heads": "whether each head of a state was probed too, not only each layer",
    "layers": "layers that were looked at; auto: all",
    "held_out": "share of topic groups held out; directions come from the others",
    "seed": "decides the split of the topics and every draw",
}
THRESHOLDS = {
    "least_change": "a mean relative change of the states below this counts as nothing",
    "least_way": "parts of the way from neutral to the wanted persona below this are negligible, in states and answers",
    "least_gap": "layers where the personas differ by less than this part of the norm do not decide",
    "least_reliability": "layers where two halves of the topics give directions less alike than this do not decide",
    "least_groups": "fewest held-out topics to decide on",
    "confidence": "of the intervals and of the nulls",
}
OPEN = 24  # tables with more rows are folded
Cell = tuple[str, str]
"""What a cell says, and what stands below it in small type."""


def write_shift_report(shift: Shift, path: str | Path) -> Path:
    """Write the page of a shift, whole or not at all. Nothing but the shift is needed."""
    write_text(path, render_shift(shift))
    return Path(path)


def render_shift(shift: Shift) -> str:
    """The page as a string; equal shifts give equal pages."""
    config = shift.recipe.get("config") or {}
    key, badge, consequence = _conclusion(shift)
    measured = {row.site for row in shift.aligned}
    facts = {
        "shift": shift,
        "tone": "not-shown" if key == "equal" else key,
        "badge": badge,
        "sentence": as_sentence(shift.sentence).rstrip("."),
        "consequence": consequence,
        "facts": _facts(shift),
        "judged": SITE_NAMES["gdn.state" if "gdn.state" in measured or not measured else "attn.heads"],
        "states": bool(shift.moved.rows),
        "level": f"{100 * real(config.get('confidence', 0.95)):g}",
        "tables": _tables(shift),
        "open": OPEN,
        "few_shuffles": _few_shuffles(config),
        "run": _run(shift),
        "config": settings({name: value for name, value in config.items() if name not in THRESHOLDS}, CONFIG),
        "thresholds": settings({name: value for name, value in config.items() if name in THRESHOLDS}, THRESHOLDS),
    }
    return render_page("shift.html.j2", draw_shift(shift), shift.recipe, facts)


def _conclusion(shift: Shift) -> tuple[str, str, str]:
    """What the headline looks like, what it says, and what follows from it."""
    if shift.conclusion == "direction-shaped":
        key, badge = "toward", "Direction-shaped"
    elif shift.conclusion == "no" and shift.sense == "away":
        key, badge = "away", "Moved away from the behaviour"
    elif shift.conclusion == "no":
        key, badge = "elsewhere", "Moved, but not toward the behaviour"
    else:
        still = shift.moved.rows and shift.moved.equal and shift.behavior_change.none
        key, badge = "equal" if still else "not-shown", "Not shown"
    return key, badge, CONSEQUENCES[key]


def _few_shuffles(config: Mapping[str, Any]) -> int | None:
    """How many times labels were shuffled, if that is too few for any probe to be significant."""
    shuffles, confidence = config.get("shuffles"), config.get("confidence", 0.95)
    return shuffles if shuffles is not None and 1 / (1 + shuffles) > 1 - confidence + 1e-9 else None


def _facts(shift: Shift) -> dict[str, str]:
    """The numbers beside the headline."""
    moved = shift.moved.overall
    left = f" ({shift.left_out} without control spans)" if shift.left_out else ""
    return {
        "before": shift.before,
        "after": shift.after,
        "states moved by (mean over heads)": _percents(moved) + " of their norm" if moved else "no GDN layers compared",
        "answers moved by": f"{estimate(numbers(shift.behavior_change.change))} nats",
        "meaningless changes move them by": f"up to ±{number(known(shift.drift))} nats",
        "the personas' own effect": f"{estimate(numbers(shift.persona))} nats",
        "held-out prompts": f"{shift.prompts} in {shift.topics} topics{left}",
    }


def _run(shift: Shift) -> dict[str, str]:
    recipe, found = shift.recipe, {"behaviour": shift.behavior, "before": shift.before, "after": shift.after}
    for side in ("before", "after"):
        names = {"weights_hash": "weights", "dtype": "dtype", "device": "device"}
        identity = recipe.get(side) or {}
        found |= {f"{words} {side}": str(identity[key]) for key, words in names.items() if key in identity}
    names = {"behavior_hash": "data", "prompts_hash": "prompts"}
    found |= {words: str(recipe[key]) for key, words in names.items() if recipe.get(key) is not None}
    return found | {"seconds": number(shift.seconds)}


# -- tables: what each is called, its columns, its rows ----------------------------------------------------------------


def _tables(shift: Shift) -> list[dict[str, Any]]:
    moved = shift.moved.rows
    aligned = ["way", "nulls within", "cosine", *(f"p {name}" for name in NULLS), "gap", "reliability"]
    return [
        _table("claims", "Claims", ["claim", "change", "unit", "held against"], "shown", map(_claim, shift.claims)),
        _table(
            "aligned", "Along the direction", ["where", *aligned, "decides"], "beyond", map(_aligned, shift.aligned)
        ),
        _table(
            "moved", "How far states moved",
            ["where", "relative change", "cosine", "keys turned", "values turned", "CKA"], "moved", map(_moved, moved),
        ),
        _table(
            "habits", "What tokens do to states",
            ["where", "effective rank", "retention", "half-life (tokens)", "write"], "",
            map(_habits, moved),
        ),
        _table(
            "probes", "Telling wanted from unwanted",
            ["where", "AUROC", "change", "selectivity", "change", "significant before"], "significant after",
            map(_probe, shift.probes),
        ),
        _table(
            "shares", "Shares of the request",
            ["where", "the request", "control spans", "difference", "change (points)", "nulls within"], "shown",
            map(_share, shift.shares),
        ),
    ]  # fmt: skip


def _table(key: str, name: str, columns: list[str], mark: str, rows: Any) -> dict[str, Any]:
    """Rows are a name, cells and (where `mark` names a last column) a yes or no."""
    return {"key": key, "name": name, "columns": [*columns, mark] if mark else columns, "rows": list(rows)}


def _claim(row: Claim) -> dict[str, Any]:
    return {"name": row.name, "cells": [_seen(row.value), (row.unit, ""), (held_against(row), "")], "mark": row.shown}


def _aligned(row: AlignedRow) -> dict[str, Any]:
    p = [number(known(row.p.get(name))) for name in NULLS]
    found = [f"±{number(known(row.bar))}", number(known(row.cosine)), *p, number(known(row.gap))]
    decides = ("yes" if row.decides else "no", "")
    cells = [_seen(row.way), *((text, "") for text in (*found, number(known(row.reliability)))), decides]
    return {"name": f"{SITE_NAMES.get(row.site, row.site)}, {_where(row.layer)}", "cells": cells, "mark": row.beyond}


def _moved(row: MovedRow) -> dict[str, Any]:
    cells = [_seen(row.relative), _seen(row.cosine), _seen(row.keys, "°"), _seen(row.values, "°"), _seen(row.cka)]
    return {"name": _where(row.layer, row.head), "cells": cells, "mark": not row.equal}


def _habits(row: MovedRow) -> dict[str, Any]:
    cells = [_became(change) for change in (row.rank, row.retention, row.half_life, row.write)]
    return {"name": _where(row.layer, row.head), "cells": cells}


def _probe(row: ProbeRow) -> dict[str, Any]:
    cells = [
        (_arrow(row.auroc), ""), _seen(row.auroc.change), (_arrow(row.selectivity), ""), _seen(row.selectivity.change),
        ("yes" if row.significant[0] else "no", ""),
    ]  # fmt: skip
    return {"name": _where(row.layer, row.head), "cells": cells, "mark": row.significant[1]}


def _share(row: ShareRow) -> dict[str, Any]:
    sides = (row.direction, row.control, row.excess)
    shares = [f"{percent(known(one.before.value))} → {percent(known(one.after.value))}" for one in sides]
    cells = [*((text, "") for text in shares), _seen(row.excess.change, scale=100.0)]
    name = f"{row.kind}, {_where(row.layer, row.head)}"
    return {"name": name, "cells": [*cells, (f"±{number(100 * known(row.bar))}", "")], "mark": row.shown}


def _where(layer: int | None, head: int | None = None) -> str:
    return "all layers" if layer is None else f"layer {layer}" + ("" if head is None else f" head {head}")


def _seen(found: Estimate, unit: str = "", *, scale: float = 1.0) -> Cell:
    """A value, and its interval below it."""
    seen = numbers(found, scale)
    interval = finite([seen["lower"], seen["upper"]])
    value = number(seen["value"]) + (unit if finite([seen["value"]]) else "")
    return value, f"{number(interval[0])} to {number(interval[1])}" if len(interval) == 2 else ""


def _became(change: Change | None) -> Cell:
    """Before and after, and below them the interval of the change."""
    return ("not measured", "") if change is None else (_arrow(change), _seen(change.change)[1])


def _arrow(change: Change) -> str:
    return f"{number(known(change.before.value))} → {number(known(change.after.value))}"


def _percents(found: Estimate) -> str:
    seen = numbers(found)
    interval = finite([seen["lower"], seen["upper"]])
    ends = f" [{percent(interval[0])}, {percent(interval[1])}]" if len(interval) == 2 else ""
    return percent(seen["value"]) + ends
