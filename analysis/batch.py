"""Many verdicts side by side: a cell for each model, behaviour and site, and every number of all in one table.

The table is long: a row a number, with what it is about in columns of their own, so that it can be filtered, pivoted
and joined without knowing how a verdict is kept. It holds no times and no paths, its order is that of the cells, and
equal verdicts give equal bytes.

| column | what it holds |
|---|---|
| `model`, `behavior` | short names, different for different models and behaviours of one table |
| `weights_hash`, `behavior_hash` | which weights and which data; empty where a cell was not judged |
| `site` | where the direction lives |
| `layer`, `method`, `dose`, `phase` | the intervention: a row's own, or the one that was judged |
| `table` | which part of the verdict: outcome, criterion, layer, dose, phase, mode, method, control, prompt, ... |
| `name` | which number of it: `random: 3: effect` is the effect of the fourth random direction (they count from 0) |
| `value`, `lower`, `upper` | the number and the ends of its interval; empty where it is not known or not finite |
| `n`, `groups` | what an estimate rests on, and in how many topic groups |
| `threshold`, `status` | of a criterion; elsewhere what a row is marked as: chosen, coherent, working, judged, usable |
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from probes.criteria import Verdict
from probes.store import write_text

Result = Literal["PASS", "FAIL", "INCONCLUSIVE", "not applicable", "error", "crash"]
COLUMNS = (
    "model", "weights_hash", "behavior", "behavior_hash", "site", "layer", "method", "dose", "phase", "table", "name",
    "value", "lower", "upper", "n", "groups", "threshold", "status",
)  # fmt: skip
OWN = ("layer", "method", "dose", "phase")  # columns that the rows of a table may have of their own
LABELS = ("name", "id", "mode")  # what else tells the rows of a list apart
TABLES = {
    "layers": "layer", "doses": "dose", "phases": "phase", "modes": "mode", "methods": "method", "prompts": "prompt",
    "controls": "control", "examples": "example", "counts": "count",
}  # fmt: skip
NOT_NUMBERS = ("heads", "seed", "seconds", "split", "examples")
"""Numbers that are names (heads), settings (seeds), or times; and parts that hold none."""
WORST = (("crash", 70), ("error", 2), ("FAIL", 1), ("INCONCLUSIVE", 3))
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What became of one model, behaviour and site.

    Attributes:
        name: its folder's name.
        model, behavior: short names.
        result: the verdict's outcome, or why there is none.
        verdict: as it is on disk; None where the cell was not judged.
        said: one line: what was wrong, or why it is not applicable.
    """

    name: str
    model: str
    behavior: str
    site: str
    result: Result
    verdict: Verdict | None = None
    said: str = ""

    def __str__(self) -> str:
        what = f"{self.model}, {self.behavior}, {self.site}: {self.result}"
        if self.verdict is None:
            return f"{what}: {self.said}"
        missed = f" ({short(self.missed)})" if self.missed else ""
        return f"{what} at layer {self.verdict.layer}, dose {self.verdict.dose:g}{missed}"

    @property
    def missed(self) -> tuple[str, ...]:
        """Names of the criteria that failed, or where none did of those that are open."""
        criteria = self.verdict.criteria if self.verdict else ()
        failed = tuple(c.name for c in criteria if c.status == "fail")
        return failed if self.result == "FAIL" else tuple(c.name for c in criteria if c.status == "inconclusive")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All cells: of each model, behaviour and site, in this order. `recipe` is what they have in common."""

    cells: tuple[Cell, ...]
    recipe: Mapping[str, Any]

    @property
    def judged(self) -> int:
        return sum(cell.verdict is not None for cell in self.cells)

    @property
    def counts(self) -> dict[str, int]:
        """How many cells have each result, those that none has included."""
        return {result: sum(cell.result == result for cell in self.cells) for result in get_args(Result)}

    @property
    def exit_code(self) -> int:
        """The worst of all cells: 70 a crash, 2 wrong input, 1 FAIL, 3 INCONCLUSIVE, 0 all PASS.

        Cells that are not applicable do not count; 2 where nothing was judged, so that an empty matrix never passes.
        """
        worst = next((code for result, code in WORST if self.counts[result]), 0)
        return worst if worst or self.judged else 2

    def frame(self) -> pd.DataFrame:
        """The long table of every number (see the module)."""
        rows = [row for cell in self.cells for row in numbers(cell)]
        found = pd.DataFrame([[row.get(column) for column in COLUMNS] for row in rows], columns=list(COLUMNS))
        for column in COLUMNS:
            if column in ("layer", "n", "groups"):
                found[column] = found[column].astype("Int64")
            elif column in ("dose", "value", "lower", "upper", "threshold"):
                found[column] = found[column].astype("float64")
            else:
                found[column] = found[column].fillna("").astype("str")
        return found

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write numbers.csv and numbers.parquet, each whole or not at all; floats as short as they can be read back."""
        table, text, binary = self.frame(), Path(folder) / "numbers.csv", Path(folder) / "numbers.parquet"
        write_text(text, table.to_csv(index=False, lineterminator="\n"))
        temporary = binary.with_name(f".{binary.name}.{os.getpid()}.tmp")
        try:
            table.to_parquet(temporary, engine="pyarrow", index=False)
            os.replace(temporary, binary)
        finally:
            temporary.unlink(missing_ok=True)
        return text, binary

    def __str__(self) -> str:
        found = ", ".join(f"{n} {result}" for result, n in self.counts.items() if n)
        return f"{len(self.cells)} cells: {found}"


def short(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many there are besides."""
    left = len(names) - most
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")


def numbers(cell: Cell) -> list[Row]:
    """Every number of a cell, one a row; first what became of it, which is all that a cell without a verdict has."""
    found, recipe = cell.verdict, cell.verdict.recipe if cell.verdict else {}
    about = {
        "model": cell.model, "weights_hash": recipe.get("weights_hash"), "behavior": cell.behavior,
        "behavior_hash": recipe.get("behavior_hash"), "site": cell.site,
    }  # fmt: skip
    outcome = {"table": "outcome", "name": "verdict", "status": cell.result}
    if found is None:
        return [{**about, **outcome}]
    about |= {"layer": found.layer, "method": _method(found), "dose": found.dose, "phase": found.phase}
    rows = [outcome, *_criteria(found)]
    for part, value in found.evidence.items():
        if part == "controls" and isinstance(value, Mapping):  # the kinds stand beside the percentile
            value = {**value.get("kinds", {}), **{k: v for k, v in value.items() if k != "kinds"}}
        rows += [{"table": TABLES.get(part, part), **row} for row in _walk(part, value)]
    rows += [{"table": "cost", **row} for row in _walk("cost", found.cost)]
    return [{**about, **row} for row in rows]


def _method(verdict: Verdict) -> str:
    """As the table of methods names it; older verdicts do not say it."""
    search, direction = verdict.evidence.get("search") or {}, verdict.evidence.get("direction") or {}
    return str(search.get("chosen") or direction.get("method") or "")


def _criteria(verdict: Verdict) -> Iterator[Row]:
    for c in verdict.criteria:
        yield {
            "table": "criterion", "name": c.name, "value": _finite(c.observed), "lower": _finite(c.lower),
            "upper": _finite(c.upper), "n": c.n, "threshold": _finite(c.threshold), "status": c.status,
        }  # fmt: skip


def _walk(key: str, value: Any, path: tuple[str, ...] = (), own: Mapping[str, Any] | None = None) -> Iterator[Row]:
    """The numbers inside a plain value, whatever its form. `path` names them, `own` are columns of their own."""
    own = own or {}
    if key in NOT_NUMBERS:
        return
    if isinstance(value, Mapping) and {"value", "lower", "upper"} <= set(value):
        ends = {end: _finite(value[end]) for end in ("value", "lower", "upper")}
        yield {**own, "name": ": ".join(path) or key, **ends, "n": value.get("n"), "groups": value.get("groups")}
    elif isinstance(value, Mapping):
        marks = ", ".join(name for name, inner in value.items() if inner is True)
        for name, inner in value.items():
            yield from _walk(name, inner, (*path, name), {**own, "status": marks} if marks else own)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _entry(key, inner, path, own, str(i))
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield {**own, "name": ": ".join(path) or key, "value": _finite(value)}


def _entry(key: str, value: Any, path: tuple[str, ...], own: Mapping[str, Any], index: str) -> Iterator[Row]:
    """One entry of a list: what tells it apart goes into columns or, where there is none for it, into the name."""
    if not isinstance(value, Mapping):
        yield from _walk(key, value, (*path, index), own)
        return
    columns = {name: value[name] for name in OWN if name in value}
    labels = [str(value[name]) for name in LABELS if value.get(name)]
    label = (*labels, *(() if columns or labels else (index,)))
    rest = {name: inner for name, inner in value.items() if name not in (*OWN, *LABELS)}
    yield from _walk(key, rest, (*path, *label), {**own, **columns})


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
