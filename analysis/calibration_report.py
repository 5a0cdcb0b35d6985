"""One calibration of the gate, one page (see `analysis.pages`): what passes, what is found, and why.

The page is made from a `Calibration` alone. What it says in its own words is in `templates/calibration.html.j2`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.calibration import LEAST_FOUND, MOST_WRONG, MOST_WRONG_UPPER, Calibration
from analysis.figures import draw_calibration
from analysis.pages import as_sentence, render_page
from analysis.words import number, percent
from probes.store import write_text

NAMES = {
    "truth": "truth", "kind": "kind", "site": "site", "strength": "strength", "cases": "cases", "passed": "passed",
    "bound": "share passed, 95% bound", "shown_nats": "personas do, nats", "stopped_by": "stopped by",
    "criterion": "criterion", "nulls_failed": "nulls that fail it", "nulls_by_it_alone": "nulls by it alone",
    "plants_failed": "plants that fail it", "plants_by_it_alone": "plants by it alone",
}  # fmt: skip


def write_calibration_report(found: Calibration, path: str | Path) -> Path:
    """Write the page of a calibration, whole or not at all. Nothing but the calibration is needed."""
    write_text(path, render_calibration(found))
    return Path(path)


def render_calibration(found: Calibration) -> str:
    """The page as a string; equal calibrations give equal pages."""
    wrong, detected = found.false_positives, found.detection
    facts = {
        "nulls that pass": f"{wrong} ({percent(wrong.value)})",
        "at most, with 95% confidence": percent(wrong.upper),
        "plants found": f"{detected} ({percent(detected.value)})",
        "at least, with 95% confidence": percent(detected.lower),
        "time": f"{number(found.seconds / 60)} minutes, if one core did it all",
    }
    asked = f"{MOST_WRONG:.0%} of nulls (upper bound {MOST_WRONG_UPPER:.0%}), at least {LEAST_FOUND:.0%} of plants"
    page = {
        "badge": "The gate keeps to its limits" if found.trusted else "The gate misses its limits",
        "tone": "pass" if found.trusted else "fail",
        "sentence": as_sentence(f"{found}."),
        "consequence": f"Asked of the gate: at most {asked} at the working strength.",
        "model": found.recipe["model"],
        "facts": facts,
        "kinds": _table(found.by_kind()),
        "criteria": _table(found.criteria()),
        "command": "dispositions calibrate",
    }
    return render_page("calibration.html.j2", draw_calibration(found), found.recipe, page)


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    """Column names and cells in words."""
    frame = frame.drop(columns="truth", errors="ignore")
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return {"names": [NAMES[str(name)] for name in frame.columns], "rows": rows}


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value or "nothing"
    return "not measured" if value is None or pd.isna(value) else number(float(value))
