"""What a verdict is, and the rules that make it: fixed beforehand, printed in every report.

Each criterion compares one observed number with one threshold and is "pass", "fail", "inconclusive" (too little data
to say) or "reported" (never decides). With too few prompts or topics a verdict is INCONCLUSIVE whatever else was seen;
otherwise one failure makes it FAIL, one open question INCONCLUSIVE, and PASS means that every criterion passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from probes.directions import Direction
from probes.errors import WrongInput, check_ranges
from probes.store import read_result, write_json

Status = Literal["pass", "fail", "inconclusive", "reported"]
Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True, kw_only=True)
class GateCriteria:
    """The thresholds. Changing one changes the recipe, so two verdicts under different rules are never confused."""

    reliability: float = 0.8
    """1: least split-half agreement of the direction (Spearman-Brown)."""
    auroc: float = 0.75
    """2: least held-out AUROC of the projection on the direction (lower end of its interval)."""
    selectivity: float = 0.2
    """2: least AUROC above that of directions from shuffled labels."""
    wrong_way: float = 0.25
    """3: largest share of held-out prompts that may move the wrong way."""
    dose_response: float = 0.9
    """4: least Spearman correlation of dose and mean propensity inside the coherent window."""
    min_doses: int = 5
    """4: fewest doses in that window, both signs among them."""
    control_percentile: float = 95.0
    """5, 6: the target has to lie above this percentile of every drawn kind of control, itself counted among them."""
    specificity: float = 0.5
    """7: largest effect on any other shipped behaviour, as a share of the effect on its own."""
    perplexity_ratio: float = 1.5
    """8: largest ratio of perplexities on general text, or of its inverse; the coherent window of doses keeps to it."""
    repetition: float = 0.2
    """8: largest rise of the share of repeated trigrams in free generation."""
    length: float = 0.25
    """0: largest distance from 0.5 of the AUROC with which length alone tells the sides apart, in prompts with their
    persona turns and in answers."""
    min_prompts: int = 24
    """Fewest held-out prompts to decide on."""
    min_groups: int = 5
    """Fewest held-out topic groups to decide on."""
    min_controls: int = 20
    """5, 6: fewest controls of each drawn kind (random, shuffled labels)."""
    min_control_prompts: int = 12
    """5, 6: fewest prompts that controls are run on."""
    min_tokens: int = 100
    """Fewest scored tokens of general text."""
    min_answers: int = 8
    """Fewest free answers."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)


_RANGES: dict[str, tuple[float, float]] = {
    "reliability": (0, 1),
    "auroc": (0.5, 1),
    "selectivity": (0, 0.5),
    "wrong_way": (0, 1),
    "dose_response": (0, 1),
    "min_doses": (3, 1000),
    "control_percentile": (50, 100),
    "specificity": (0, math.inf),
    "length": (0, 0.5),
    "perplexity_ratio": (1, math.inf),
    "repetition": (0, 1),
    "min_prompts": (2, math.inf),
    "min_groups": (2, math.inf),
    "min_controls": (1, math.inf),
    "min_control_prompts": (2, math.inf),
    "min_tokens": (1, math.inf),
    "min_answers": (1, math.inf),
}


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One line of evidence. `observed` with its interval is compared by `rule` with `threshold`."""

    number: int
    name: str
    status: Status
    observed: float
    lower: float | None = None
    upper: float | None = None
    threshold: float | None = None
    rule: str = ""
    n: int = 0
    meaning: str = ""

    def __str__(self) -> str:
        interval = f" [{self.lower:.3g}, {self.upper:.3g}]" if self.lower is not None and self.upper is not None else ""
        bound = f"{self.rule} {self.threshold:.3g}" if self.threshold is not None else self.rule
        observed = f"{self.observed:.3g}" if math.isfinite(self.observed) else "not finite"
        return f"{self.number:>2} {self.name:<24} {self.status:<12} {observed}{interval} ({bound}, n={self.n})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A decision with its evidence. `evidence` holds the tables behind the criteria, as plain JSON values."""

    verdict: Outcome
    sentence: str
    behavior: str
    model: str
    site: str
    layer: int
    dose: float
    phase: str
    criteria: tuple[Criterion, ...]
    controls: Mapping[str, Any]
    phases: Sequence[Mapping[str, Any]]
    cost: Mapping[str, Any]
    evidence: Mapping[str, Any]
    recipe: Mapping[str, Any]
    direction: Direction | None = field(default=None, repr=False, compare=False)
    """The direction that was judged; not part of verdict.json (it has a file of its own)."""

    @property
    def exit_code(self) -> int:
        return {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[self.verdict]

    def require(self) -> None:
        """Raise unless the verdict is PASS, and on a direction that was extracted.

        Raises:
            WrongInput: naming every criterion that did not pass, or what was judged instead.
        """
        if self.verdict != "PASS":
            failed = [
                f"{c.number} {c.name} ({c.status})" for c in self.criteria if c.status in ("fail", "inconclusive")
            ]
            raise WrongInput(f"{self.behavior} on {self.model} is {self.verdict}: {', '.join(failed)}")
        if not any(c.status == "pass" for c in self.criteria) or decide(self.criteria) != "PASS":
            found = ", ".join(f"{c.number} {c.name} ({c.status})" for c in self.criteria) or "none at all"
            raise WrongInput(f"{self.behavior} on {self.model} says PASS, which its criteria do not: {found}")
        config = self.recipe.get("config", {})
        if config.get("direction") == "random" or config.get("shuffle_labels"):
            raise WrongInput("the verdict is about a direction that means nothing (random, or shuffled labels)")

    def frame(self) -> pd.DataFrame:
        """One row per criterion."""
        return pd.DataFrame([asdict(c) for c in self.criteria])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in verdict.json."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "direction"}
        return {**plain, "criteria": [asdict(c) for c in self.criteria]}

    def save(self, path: str | Path) -> Path:
        write_json(Path(path), self.as_dict())
        return Path(path)

    def __str__(self) -> str:
        where = f"{self.site} {self.layer}, dose {self.dose:g}"
        return f"{self.verdict} {self.behavior} on {self.model} at {where}: {self.sentence}"


def intact(perplexity_ratio: float, limit: float) -> bool:
    """Whether a model still models ordinary text: a broken one may find it less likely, or suspiciously likelier."""
    return 1 / limit <= perplexity_ratio <= limit


def decide(criteria: Sequence[Criterion]) -> Outcome:
    """The verdict that the criteria add up to; number 0 says whether there was enough data to look at the others."""
    statuses = {c.status for c in criteria}
    if any(c.number == 0 and c.status == "inconclusive" for c in criteria):
        return "INCONCLUSIVE"
    if "fail" in statuses:
        return "FAIL"
    return "INCONCLUSIVE" if "inconclusive" in statuses else "PASS"


def open_verdict(path: str | Path) -> Verdict:
    """Read `verdict.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or not a verdict.
    """
    data = read_result(path, "verdict.json")
    try:
        if not isinstance(data["recipe"], dict) or not isinstance(data["recipe"].get("config", {}), dict):
            raise TypeError("its recipe is not an object")
        if data["verdict"] not in get_args(Outcome):
            raise TypeError(f"'{data['verdict']}' is no outcome; allowed are {', '.join(get_args(Outcome))}")
        criteria = tuple(_criterion(part) for part in data.pop("criteria"))
        return Verdict(criteria=criteria, **data)
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongInput(f"{path} is not a verdict: {error}") from error


def _criterion(data: Mapping[str, Any]) -> Criterion:
    """From plain values; JSON has no NaN."""
    observed = math.nan if data["observed"] is None else data["observed"]
    if data["status"] not in get_args(Status) or not isinstance(observed, int | float):
        raise TypeError(f"criterion {data['number']} has status {data['status']!r} and observed {observed!r}")
    return Criterion(**{**data, "observed": observed})
