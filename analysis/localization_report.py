"""One localization, one page (see `analysis.pages`): which carrier, what was exchanged and given, and every number.

The page is made from a `Localization` alone, so it can be written again from `localization.json` at any time. What it
says in its own words is in `templates/localization.html.j2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.figures import draw_localization
from analysis.pages import as_sentence, render_page, settings
from analysis.words import estimate, limits, nats, number, percent
from probes.localization import CHANNEL_NAMES, SITES, Localization, Row
from probes.store import write_text

CARRIERS = {
    "state": (
        "GDN state",
        "What the personas change in the answers travels in the recurrent states of the GDN layers.",
    ),
    "attention": (
        "Attention",
        "What the personas change in the answers travels in the keys and values of the attention layers.",
    ),
    "convolution": (
        "GDN convolution",
        "What the personas change in the answers travels in the windows of the convolutions, over a few tokens.",
    ),
    "several": (
        "No single carrier",
        "What the personas change in the answers travels in two channels, each of which is enough for half of it, "
        "or only in several together.",
    ),
    "not shown": ("Not shown", "No carrier is named. This does not say that there is none."),
}
CONFIG = {
    "layers": "layers that were looked at one by one; auto: all",
    "prompts": "most held-out prompts that were used",
    "controls": "controls for a carrier as a whole",
    "layer_controls": "controls for one layer or head",
    "head_layers": "how many layers of each carrier, the strongest, are told apart into heads",
    "held_out": "share of topic groups held out; directions come from the others",
    "percentile": "percentile of the controls' sizes that an effect has to exceed; the largest where they are too few",
    "least_groups": "fewer held-out topic groups name no carrier",
    "least_share": "effects below this share of the personas' own are negligible",
    "seed": "decides the split of the topics and every draw",
}
OPEN = 24  # tables with more rows are folded


def write_localization_report(localization: Localization, path: str | Path) -> Path:
    """Write the page of a localization, whole or not at all. Nothing but the localization is needed."""
    write_text(path, render_localization(localization))
    return Path(path)


def render_localization(localization: Localization) -> str:
    """The page as a string; equal localizations give equal pages."""
    rows, config = localization.rows, localization.recipe.get("config") or {}
    badge, consequence = CARRIERS[localization.carrier]
    tables = {
        "Whole channels": [row for row in rows if row.layer is None],
        "Layers": [row for row in rows if row.layer is not None and row.head is None],
        "Heads": [row for row in rows if row.head is not None],
    }
    facts = {
        "localization": localization,
        "tone": localization.carrier.replace(" ", "-"),
        "badge": badge,
        "sentence": as_sentence(localization.sentence),
        "consequence": consequence,
        "facts": _facts(localization),
        "exchanged": any(row.kind == "exchange" for row in rows),
        "percentile": f"{config.get('percentile', 95):g}",
        "tables": {name: [_row(row) for row in some] for name, some in tables.items()},
        "open": OPEN,
        "run": _run(localization),
        "config": settings(config, CONFIG),
    }
    return render_page("localization.html.j2", draw_localization(localization), localization.recipe, facts)


def _facts(localization: Localization) -> dict[str, str]:
    """The numbers beside the headline."""
    persona = localization.persona
    found = {"the personas' own effect": f"{estimate(persona.as_dict())} nats" if persona else "none: no personas"}
    for row in localization.rows:
        if row.kind == "exchange" and row.layer is None:
            name = {"state": "GDN states", "convolution": "convolutions", "attention": "keys and values"}[row.carrier]
            found[f"carried by {name}"] = percent(row.share)
    sizes = {(row.effect.n, row.effect.groups) for row in localization.rows}
    return found | {"held-out prompts": "; ".join(f"{n} in {groups} topics" for n, groups in sorted(sizes)) or "none"}


def _row(row: Row) -> dict[str, Any]:
    """One row of the tables, in words."""
    seen = row.effect.as_dict()
    return {
        "kind": row.kind,
        "carrier": (CHANNEL_NAMES if row.kind == "exchange" else SITES)[row.carrier],
        "where": row.where,
        "effect": nats(row.effect.value),
        "interval": limits(seen),
        "share": percent(row.share),
        "bar": f"±{nats(row.bar)}",
        "n": len(row.controls),
        "counts": row.shown,
    }


def _run(localization: Localization) -> dict[str, str]:
    recipe = localization.recipe
    names = {"behavior_hash": "data", "weights_hash": "weights", "dtype": "dtype", "device": "device"}
    found = {"behaviour": localization.behavior, "model": localization.model}
    found |= {words: str(recipe[key]) for key, words in names.items() if key in recipe}
    return found | {"rows": _counted(localization.rows), "seconds": number(localization.seconds)}


def _counted(rows: Sequence[Row]) -> str:
    kinds = [row.kind for row in rows]
    return f"{kinds.count('exchange')} exchanges and {kinds.count('give')} gifts"
