"""Many verdicts, one page (see `analysis.pages`): a matrix of models, behaviours and sites, with links to their pages.

The page is made from a `Matrix` alone. It has no figures and so no scripts, and its policy allows none. What it links
to lies beside it: `cells/<name>/report.html`, and the tables of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.batch import Cell, Matrix, short
from analysis.calibration import Calibration
from analysis.pages import render_page, settings
from analysis.report import THRESHOLDS
from analysis.words import limits, nats, number, percent
from probes.store import write_text

TONES = {0: "pass", 1: "fail", 3: "inconclusive", 2: "error", 70: "error"}
CONSEQUENCES = {
    0: "Every cell was judged and passed.",
    1: "At least one direction does not do what it should. Nothing should be trained from a FAIL.",
    3: "Nothing failed, but something could not be decided, for want of data or controls. This is not a pass.",
    2: "Something could not be judged, because what was given is wrong or does not fit. The matrix says what; the same "
    "command tries it again.",
    70: "A cell crashed: that is a fault of this program. The matrix says which; the same command tries it again.",
}
UNJUDGED = {"not applicable": "reported", "error": "error", "crash": "error"}


def write_batch_report(matrix: Matrix, path: str | Path, calibration: Calibration | None = None) -> Path:
    """Write the page of many verdicts, whole or not at all."""
    write_text(path, render_batch(matrix, calibration))
    return Path(path)


def render_batch(matrix: Matrix, calibration: Calibration | None = None) -> str:
    """The page as a string; equal verdicts give equal pages."""
    cells, code = matrix.cells, matrix.exit_code
    models, behaviors, sites = (
        list(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in ("model", "behavior", "site")
    )
    by_place = {(cell.model, cell.behavior, cell.site): cell for cell in cells}
    config = dict(matrix.recipe.get("config") or {})
    criteria = config.pop("criteria", {})
    flat = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    facts = {
        "tone": TONES[code],
        "badge": f"{matrix.counts['PASS']} of {len(cells) - matrix.counts['not applicable']} PASS",
        "title": ", ".join(
            _count(len(found), what) for found, what in ((models, "model"), (behaviors, "behaviour"), (sites, "site"))
        ),
        "consequence": CONSEQUENCES[code],
        "code": code,
        "facts": matrix.counts,
        "behaviors": behaviors,
        "sites": sites,
        "rows": [
            {
                "model": model,
                "cells": [_cell(by_place[model, behavior, site]) for behavior in behaviors for site in sites],
            }
            for model in models
        ],
        "missed": _missed(matrix),
        "chance": chance(matrix, calibration),
        "config": settings(flat, {}),
        "thresholds": settings(criteria, THRESHOLDS),
    }
    return render_page("batch.html.j2", {}, matrix.recipe, facts)


def chance(matrix: Matrix, calibration: Calibration | None) -> str:
    """How many cells were judged, and how many of them at most are expected to PASS although nothing is there."""
    judged = _count(matrix.judged, "cell")
    said = f"{judged} {'was' if matrix.judged == 1 else 'were'} judged, each by itself: nothing was corrected."
    if calibration is None:
        return (
            f"{said} How many directions that mean nothing pass such a gate is not known here: no calibration was "
            "given (--calibration)."
        )
    rate = calibration.false_positives
    return (
        f"{said} In the calibration {rate.hits} of {rate.n} directions that mean nothing passed, so that with 95% "
        f"confidence at most {percent(rate.upper)} do. If there were nothing to find in any cell, at most "
        f"{number(matrix.judged * rate.upper)} false PASSes would be expected among {judged}. This holds as far as "
        "these models, data and options are like those of the calibration."
    )


def _cell(cell: Cell) -> dict[str, Any]:
    """One cell in words."""
    found: dict[str, Any] = {
        "label": f"{cell.behavior}, {cell.site}", "result": cell.result, "effect": "", "interval": "", "where": "",
        "why": cell.said, "status": UNJUDGED.get(cell.result, cell.result.lower()),
        "link": f"cells/{cell.name}/report.html",
    }  # fmt: skip
    if cell.verdict is None:
        found["link"] = "" if cell.result == "not applicable" else f"cells/{cell.name}/error.txt"
        return found
    effect = next((c for c in cell.verdict.criteria if c.name == "effect"), None)
    if effect is not None:
        found["effect"] = f"{nats(effect.observed)} nats"
        found["interval"] = limits({"lower": effect.lower, "upper": effect.upper})
    found["where"] = f"layer {cell.verdict.layer}, dose {number(cell.verdict.dose)}"
    if cell.missed:
        found["why"] = f"{'failed' if cell.result == 'FAIL' else 'open'}: {short(cell.missed)}"
    return found


def _missed(matrix: Matrix) -> list[dict[str, Any]]:
    """How many cells each criterion fails and leaves open; those that all cells meet are left out."""
    counts: dict[str, dict[str, int]] = {}
    for cell in matrix.cells:
        for c in cell.verdict.criteria if cell.verdict else ():
            if c.status in ("fail", "inconclusive"):
                found = counts.setdefault(f"{c.number} {c.name}", {"fail": 0, "inconclusive": 0})
                found[c.status] += 1
    return [{"name": name, **found} for name, found in sorted(counts.items(), key=lambda one: int(one[0].split()[0]))]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"
