"""What a training run did: the model before, during and after, with what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from probes.errors import WrongInput
from probes.stats import Estimate
from probes.store import read_result, write_json
from training.evaluation import Evaluation

RESULT = "training.json"


@dataclass(frozen=True, kw_only=True)
class Training:
    """A finished run.

    Attributes:
        weights_hash, trained_hash: of the model before and after.
        verified: whether a verdict allowed it.
        lr, rank: peak learning rate, and rank of APOLLO's projections (None for other optimizers).
        mix: what it was trained on, as `Mix.record`.
        evaluations: the first is of the model before, the last of the model after.
        steps: a row of metrics for each step.
        telemetry: the last step by kind of tensor: scales, limiter, and size of the update against the weight.
    """

    behavior: str
    model: str
    weights_hash: str
    trained_hash: str
    verified: bool
    lr: float
    rank: int | None
    mix: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    steps: tuple[Mapping[str, Any], ...]
    telemetry: tuple[Mapping[str, Any], ...]
    recipe: Mapping[str, Any]

    @property
    def before(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def after(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def changes(self) -> dict[str, float]:
        """By ability, how much the share of right answers rose (below 0: fell), in points."""
        return {
            name: 100 * (part.value - self.before.abilities[name].value) for name, part in self.after.abilities.items()
        }

    @property
    def sentence(self) -> str:
        """What happened, for people."""
        one, two = self.before, self.after
        said = f"{self.behavior} on {self.model}, {two.step} steps: "
        if one.wanted and two.wanted:
            said += f"wanted answers went from {one.wanted.value:.1%} to {two.wanted.value:.1%} of held-out prompts, "
        said += f"propensity from {one.propensity.value:.2f} to {two.propensity.value:.2f} nats"
        if self.changes:
            worst = min(self.changes, key=lambda name: self.changes[name])
            fall = self.changes[worst]
            said += f"; {worst} fell most, by {-fall:.1f} points" if fall < 0 else "; no ability fell"
        elif one.loss and two.loss:
            said += f"; the loss on general text went from {one.loss.value:.3f} to {two.loss.value:.3f} nats a token"
        return said + ("" if self.verified else "; its direction was not verified")

    def frame(self) -> pd.DataFrame:
        """One row for each measure of each evaluation."""
        return pd.concat([found.frame() for found in self.evaluations], ignore_index=True)

    def table(self) -> str:
        """Before and after, as text."""
        frame = self.frame()
        first, last = (frame[frame["step"] == e.step].set_index("measure") for e in (self.before, self.after))
        lines = [f"{'':<16}{'before':>22}{'after':>22}"]
        for name in first.index:
            cells = [_cell(name, part.loc[name]) for part in (first, last)]
            lines.append(f"{name:<16}" + "".join(f"{cell:>22}" for cell in cells))
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "evaluations": [found.as_dict() for found in self.evaluations]}

    def save(self, path: str | Path) -> Path:
        write_json(path, self.as_dict())
        return Path(path)

    def __str__(self) -> str:
        return self.sentence


def _cell(name: str, row: Any) -> str:
    if name in ("propensity", "loss"):
        return f"{row['value']:.3f} [{row['lower']:.3f}, {row['upper']:.3f}]"
    return f"{row['value']:.1%} [{row['lower']:.0%}, {row['upper']:.0%}]"


def open_training(path: str | Path) -> Training:
    """Read `training.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or not a training run.
    """
    data = read_result(path, RESULT)
    try:
        evaluations = tuple(Evaluation.of(part) for part in data.pop("evaluations"))
        lists = {name: tuple(map(dict, data.pop(name))) for name in ("steps", "telemetry")}
        found = Training(evaluations=evaluations, **lists, **data)
        _check(found)
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WrongInput(f"{path} is not a training run: {error}") from error


def _check(found: Training) -> None:
    """What pages and tables rely on.

    Raises:
        ValueError: saying what is wrong.
    """
    if not found.evaluations:
        raise ValueError("it has no evaluation")
    measured = {tuple(sorted(e.frame()["measure"])) for e in found.evaluations}
    if len(measured) > 1:
        raise ValueError(f"its evaluations are of different measures: {' and '.join(map(str, sorted(measured)))}")
    told = found.recipe.get("verdict") if isinstance(found.recipe, Mapping) else None
    kinds: dict[str, tuple[Any, Any]] = {
        "behavior": (found.behavior, str), "model": (found.model, str), "verified": (found.verified, bool),
        "learning rate": (found.lr, float | int), "recipe": (found.recipe, Mapping), "mix": (found.mix, Mapping),
        "verdict": (told, Mapping | None),
    }  # fmt: skip
    kinds |= {f"step of evaluation {i}": (e.step, int) for i, e in enumerate(found.evaluations)}
    kinds |= {f"propensity of evaluation {i}": (e.propensity, Estimate) for i, e in enumerate(found.evaluations)}
    if isinstance(found.mix, Mapping) and isinstance(found.recipe, Mapping):
        kinds |= {f"mix of {kind} data": (found.mix.get(kind), Mapping | None) for kind in ("behavior", "general")}
        kinds |= {"config": (found.recipe.get("config"), Mapping | None)}
    if isinstance(told, Mapping):
        kinds |= {"recipe of the verdict": (told.get("recipe"), Mapping | None)}
    numbers = [(row, name, value) for row in (*found.steps, *found.telemetry) for name, value in row.items()]
    kinds |= {f"{name} of {row}": (value, float | int | None) for row, name, value in numbers if name != "kind"}
    for name, (seen, allowed) in kinds.items():
        if not isinstance(seen, allowed):
            raise ValueError(f"its {name} is {seen!r}")
