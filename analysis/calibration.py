"""What a calibration of the gate shows: error rates with exact intervals, what each criterion is good for, curves.

A case counts as passed when its verdict is PASS; INCONCLUSIVE is not a pass. Rates have exact bounds (Clopper and
Pearson), one-sided at 95 %: what matters of a false-positive rate is how large it may be, of a detection rate how
small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

from probes.damage import DATA
from probes.errors import WrongInput
from probes.store import read_result, write_json

RESULT = "calibration.json"
MOST_WRONG, MOST_WRONG_UPPER, LEAST_FOUND = 0.01, 0.03, 0.95  # what a gate has to keep to
SWEPT: dict[str, tuple[str, bool]] = {  # criterion: what of it is compared, and whether more is better
    "reliability": ("observed", True),
    "decodability": ("lower", True),
    "selectivity": ("observed", True),
    "wrong way": ("observed", False),
    "dose-response": ("observed", True),
    "controls": ("percentile", True),
    "specificity": ("observed", False),
    "damage: perplexity": ("observed", False),
}
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """`hits` of `n`, with one-sided exact bounds at 95 %."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else math.nan

    @property
    def lower(self) -> float:
        return float(beta.ppf(0.05, self.hits, self.n - self.hits + 1)) if self.hits else 0.0

    @property
    def upper(self) -> float:
        return float(beta.ppf(0.95, self.hits + 1, self.n - self.hits)) if self.hits < self.n else 1.0

    def __str__(self) -> str:
        return f"{self.hits} of {self.n}"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """All cases with their truth and their verdicts."""

    rows: tuple[Row, ...]
    recipe: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Seconds that all cases took, each on a core of its own, whether or not the run was interrupted."""
        return sum(row["seconds"] for row in self.rows)

    def at(self, site: str) -> Calibration:
        """The cases at one site."""
        return replace(self, rows=tuple(row for row in self.rows if row["site"] == site))

    @property
    def nulls(self) -> list[Row]:
        return [row for row in self.rows if row["truth"] == "null"]

    @property
    def plants(self) -> list[Row]:
        """Those at the working strength."""
        return [row for row in self.rows if row["working"]]

    @property
    def false_positives(self) -> Rate:
        return _rate(self.nulls)

    @property
    def detection(self) -> Rate:
        return _rate(self.plants)

    @property
    def trusted(self) -> bool:
        """Whether the gate keeps to what is asked of it."""
        wrong, found = self.false_positives, self.detection
        return wrong.value <= MOST_WRONG and wrong.upper <= MOST_WRONG_UPPER and found.value >= LEAST_FOUND

    def by_kind(self) -> pd.DataFrame:
        """A row for each kind of case, site and strength: cases, passes, and what fails the others most.

        `bound` is what the share of passes lies beyond with 95% confidence: of nulls its upper bound, of plants its
        lower one. It takes the cases as independent, which draws from one model and three behaviours are not quite.
        """
        keys = sorted({(r["truth"], r["kind"], r["site"], r["strength"]) for r in self.rows}, key=str)
        found = []
        for truth, kind, site, strength in keys:
            own = (truth, kind, site, strength)
            some = [r for r in self.rows if (r["truth"], r["kind"], r["site"], r["strength"]) == own]
            shown, rate = [row["shown"] for row in some if row["shown"] is not None], _rate(some)
            found.append(
                {
                    "truth": truth, "kind": kind, "site": site, "strength": strength, "cases": rate.n,
                    "passed": rate.hits, "bound": rate.upper if truth == "null" else rate.lower,
                    "shown_nats": float(np.mean(shown)) if shown else None,
                    "stopped_by": ", ".join(_stoppers(some)[:3]),
                }
            )  # fmt: skip
        return pd.DataFrame(found)

    def criteria(self) -> pd.DataFrame:
        """For each deciding criterion: how many nulls and plants it fails, and how many it alone keeps from passing."""
        names = list(
            dict.fromkeys(c["name"] for row in self.rows for c in row["criteria"] if c["status"] != "reported")
        )
        found = []
        for name in names:
            entry: dict[str, Any] = {"criterion": name}
            for truth, some in (("nulls", self.nulls), ("plants", self.plants)):
                entry[f"{truth}_failed"] = sum(name in _missed(row) for row in some)
                entry[f"{truth}_by_it_alone"] = sum(_missed(row) == [name] for row in some)
            found.append(entry)
        return pd.DataFrame(found)

    def curve(self, name: str) -> pd.DataFrame:
        """Share of nulls and of plants that would pass if the threshold of one criterion lay elsewhere.

        The other criteria stay as they are. Columns: threshold, false_positives, detection, chosen.

        Raises:
            WrongInput: the criterion has no single threshold.
        """
        if name not in SWEPT:
            raise WrongInput(f"'{name}' has no threshold to move; allowed are {', '.join(SWEPT)}")
        what, more = SWEPT[name]
        seen = [value for row in self.rows if (value := _value(row, name, what)) is not None]
        chosen = self._threshold(name)
        steps = sorted({*np.quantile(seen, np.linspace(0, 1, 41)).tolist(), chosen}) if seen else [chosen]
        rows = [
            {
                "threshold": at,
                "false_positives": _share(self.nulls, name, what, more, at),
                "detection": _share(self.plants, name, what, more, at),
                "chosen": at == chosen,
            }
            for at in steps
        ]
        return pd.DataFrame(rows)

    def _threshold(self, name: str) -> float:
        rules = self.recipe["config"]["gate"]["criteria"]
        known = {
            "reliability": "reliability", "decodability": "auroc", "selectivity": "selectivity",
            "wrong way": "wrong_way", "dose-response": "dose_response", "controls": "control_percentile",
            "specificity": "specificity", "damage: perplexity": "perplexity_ratio",
        }  # fmt: skip
        return float(rules[known[name]])

    def power(self) -> pd.DataFrame:
        """Detection by how a behaviour was planted and how strongly; `shown` is what personas do to it, in nats."""
        keys = sorted({(row["kind"], row["strength"]) for row in self.rows if row["truth"] == "planted"})
        found = []
        for kind, strength in keys:
            some = [row for row in self.rows if (row["kind"], row["strength"]) == (kind, strength)]
            rate, shown = _rate(some), [row["shown"] for row in some if row["shown"] is not None]
            found.append(
                {
                    "kind": kind, "strength": strength, "shown": float(np.mean(shown)), "detected": rate.hits,
                    "cases": rate.n, "rate": rate.value, "lower": rate.lower, "upper": rate.upper,
                }
            )  # fmt: skip
        return pd.DataFrame(found)

    def frame(self) -> pd.DataFrame:
        """One row a case."""
        return pd.DataFrame([{k: v for k, v in row.items() if k != "criteria"} for row in self.rows])

    def save(self, path: str | Path) -> Path:
        write_json(Path(path), asdict(self))
        return Path(path)

    def __str__(self) -> str:
        wrong, found = self.false_positives, self.detection
        return (
            f"false positives {wrong} nulls ({wrong.value:.1%}, at most {wrong.upper:.1%} at 95%); detected {found} "
            f"plants at the working strength ({found.value:.0%}, at least {found.lower:.0%} at 95%)"
        )


def open_calibration(path: str | Path) -> Calibration:
    """Read `calibration.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or not a calibration.
    """
    data = read_result(path, RESULT)
    try:
        found = Calibration(**{**data, "rows": tuple(data["rows"])})
        if set(data) != {field.name for field in fields(Calibration)} or not found.rows:
            raise TypeError("it holds no cases")
        str(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongInput(f"{path} is not a calibration: {error}") from error
    return found


@lru_cache(maxsize=1)
def shipped_calibration() -> Calibration | None:
    """The calibration that comes with the suite, of the gate as it ships."""
    return open_calibration(DATA / RESULT) if (DATA / RESULT).is_file() else None


def _rate(rows: Sequence[Row]) -> Rate:
    return Rate(hits=sum(row["verdict"] == "PASS" for row in rows), n=len(rows))


def _missed(row: Row) -> list[str]:
    """The criteria that a case does not meet, once each."""
    return list(dict.fromkeys(c["name"] for c in row["criteria"] if c["status"] in ("fail", "inconclusive")))


def _untouched(row: Row) -> list[str]:
    return [c["name"] for c in row["criteria"] if c["status"] == "reported"]


def _stoppers(rows: Iterable[Row]) -> list[str]:
    counts: dict[str, int] = {}
    for row in rows:
        for name in _missed(row):
            counts[name] = counts.get(name, 0) + 1
    return [f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda one: -one[1])]


def _value(row: Row, name: str, what: str) -> float | None:
    if what == "percentile":
        return float(row["percentile"])
    found = next((c[what] for c in row["criteria"] if c["name"] == name), None)
    return None if found is None else float(found)


def _share(rows: Sequence[Row], name: str, what: str, more: bool, at: float) -> float:
    """Share of rows that pass with one threshold moved."""
    better: Callable[[float], bool] = (lambda value: value >= at) if more else (lambda value: value <= at)
    passed = 0
    for row in rows:
        others = [missed for missed in _missed(row) if missed != name]
        if name in _untouched(row):  # it decides nothing here, wherever its threshold lies
            passed += not others
            continue
        value = _value(row, name, what)
        passed += value is not None and not others and better(value) and not _otherwise(row, name, value, more)
    return passed / len(rows) if rows else math.nan


def _otherwise(row: Row, name: str, value: float, more: bool) -> bool:
    """Whether a criterion fails for another reason than its threshold, such as too narrow a window of doses."""
    found = next(c for c in row["criteria"] if c["name"] == name)
    if name == "controls" or found["status"] == "pass" or found["threshold"] is None:
        return False
    return value >= found["threshold"] if more else value <= found["threshold"]
