"""The gate, measured: how often does it pass what means nothing, and how often does it find what was planted?

Some hundred cases on the organism, whose truth is known by construction (`training.planted`), go through the gate as it
ships, each with draws and data of its own. Nulls are drawn directions, shuffled labels, synonyms, length alone, and
personas that have nothing to do with the questions; plants are the same personas after a rank-1 edit of the embedding,
or after training, graded in strength. `analysis.calibration` makes error rates and operating curves of the rows.

A case is a line of `cases.jsonl`: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from analysis.calibration import Calibration
from probes.behaviors import Behavior, read_behavior
from probes.criteria import Criterion, Verdict
from probes.errors import WrongInput, check_ranges
from probes.gate import GateConfig
from probes.model import load
from probes.sites import resolve
from probes.stats import derived_seed
from probes.store import (
    RECIPE,
    library_versions,
    read_json,
    read_tensors,
    read_text,
    recipe_differs,
    write_json,
    write_tensors,
    write_text,
)
from probes.verify import verify
from training.grammar import BEHAVIORS
from training.planted import Recipe, graded, made, plant, teach

Truth = Literal["null", "planted"]
SITES = ("resid", "gdn.state", "attn.heads")
STRENGTHS = (1.0, 1.5, 2.0, 3.0)  # of rank-1 plants; at the last the personas do what a behaviour's own ones do
SHARES = (0.25, 0.5, 1.0)  # of what training changed
BY_CASE = ("site", "seed", "direction", "shuffle_labels", "heads", "rank")  # of the gate's settings
CASES = "cases.jsonl"


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the gate is measured."""

    seeds: int = 12
    """Drawn directions, and as many shuffled labels, for each behaviour in the residual stream; a third as many for
    states and for attention heads. The other nulls and the plants are as many in proportion."""
    steps: int = 150
    """Training steps behind each behaviour that is planted by training."""
    jobs: int = 2
    """Cases that run side by side, each in a process with a thread of its own."""
    gate: GateConfig = field(default_factory=GateConfig)
    """The gate that is measured. Site, seed and kind of direction are each case's own."""

    def __post_init__(self) -> None:
        check_ranges(self, {"seeds": (1, 1000), "steps": (1, 100000), "jobs": (1, 256)})
        plain = GateConfig()
        if own := [name for name in BY_CASE if getattr(self.gate, name) != getattr(plain, name)]:
            raise WrongInput(f"{', '.join(own)} cannot be chosen for a calibration: each case has its own")
        if self.gate.form != plain.form:
            raise WrongInput(f"form '{self.gate.form}' is for states alone, and a calibration judges all sites")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing of known truth that goes through the gate."""

    kind: str
    truth: Truth
    behavior: str = ""
    recipe: Recipe | None = None
    site: str = "resid"
    seed: int = 0
    strength: float = 0.0
    taught: bool = False

    @property
    def name(self) -> str:
        what = self.recipe.name if self.recipe else f"{self.kind}: {self.behavior}, seed {self.seed}"
        how = f", {'taught' if self.taught else 'planted'} {self.strength:g}" if self.truth == "planted" else ""
        return f"{what}{how}, {self.site}"

    @property
    def working(self) -> bool:
        """Whether a plant is as strong as the organism's own behaviours are."""
        return self.truth == "planted" and self.strength >= (SHARES if self.taught else STRENGTHS)[-1]


def cases(config: CalibrationConfig) -> list[Case]:
    """Every case, in the order in which they run: kinds alternate, so that an interrupted run has some of each."""
    n = config.seeds
    fewer = max(n // 3, 1)
    pairs = list(permutations(BEHAVIORS, 2))
    kinds: list[list[Case]] = [
        [
            Case(kind=kind, truth="null", behavior=behavior, site=site, seed=seed)
            for site in SITES
            for behavior in BEHAVIORS
            for seed in range(n if site == "resid" else fewer)
        ]
        for kind in ("random", "shuffled labels")
    ]
    for kind, count in (("words", 2 * fewer), ("length", fewer)):
        kinds.append(
            [
                Case(kind=kind, truth="null", seed=seed, recipe=_recipe(kind, (behavior, behavior), seed, flipped))
                for behavior in BEHAVIORS
                for seed in range(count)
                for flipped in (False, True)
            ]
        )
    kinds.append(
        [
            Case(kind="crossed", truth="null", seed=seed, site=site, recipe=_recipe("crossed", pair, seed, flipped))
            for pair in pairs
            for site, count in (("resid", fewer), ("gdn.state", 1))
            for seed in range(max(count // 2, 1))
            for flipped in (False, True)
        ]
    )
    kinds.append(  # in attention heads nothing can be planted: the organism's dispositions lie in its states
        [
            Case(
                kind="planted by a rank-1 edit", truth="planted", strength=STRENGTHS[-1], site="gdn.state", seed=0,
                recipe=_recipe("crossed", pair, 300, flipped),
            )
            for pair in pairs
            for flipped in (False, True)
        ]
    )  # fmt: skip
    for strength in STRENGTHS:
        last = strength == STRENGTHS[-1]
        kinds.append(
            [
                Case(
                    kind="planted by a rank-1 edit",
                    truth="planted",
                    strength=strength,
                    seed=seed,
                    recipe=_recipe("crossed", pair, 100 + seed, flipped),
                )
                for pair in pairs
                for seed in range(max(fewer // 2, 1) if last else 1)
                for flipped in ((False, True) if last else (bool(pairs.index(pair) % 2),))
            ]
        )
    for share in SHARES:
        kinds.append(
            [
                Case(
                    kind="planted by training",
                    truth="planted",
                    strength=share,
                    taught=True,
                    recipe=_recipe("crossed", pair, 200, bool(i % 2)),
                )
                for i, pair in enumerate(pairs)
            ]
        )
    return list(_alternating(kinds))


def _recipe(kind: Any, pair: tuple[str, str], seed: int, flipped: bool) -> Recipe:
    return Recipe(kind=kind, questions=pair[0], personas=pair[1], seed=seed, flipped=flipped)


def _alternating(kinds: Sequence[Sequence[Case]]) -> Iterator[Case]:
    """From every kind in proportion to how many it has."""
    order = [((i + 0.5) / len(kind), k, i) for k, kind in enumerate(kinds) for i in range(len(kind))]
    return (kinds[k][i] for _, k, i in sorted(order))


def calibrate(
    config: CalibrationConfig = CalibrationConfig(), *, out: str | Path, progress: bool = True
) -> Calibration:
    """Run all cases that `out` does not hold yet, and put together what they show.

    Raises:
        WrongInput: `out` holds cases of another recipe, or a damaged line.
    """
    folder, asked = Path(out), recipe(config)
    wanted = {case.name: case for case in cases(config)}
    for site in {case.site for case in wanted.values()}:
        resolve(load("organism"), site, config.gate.layers)  # refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    rows = {row["name"]: row for row in _finished(folder, asked)}
    write_json(folder / RECIPE, asked)
    missing = [case for name, case in wanted.items() if name not in rows]
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(missing), desc="calibrate", disable=not progress)
    with bar, (folder / CASES).open("a", encoding="utf-8") as file:
        for row in _run(missing, config, folder):
            rows[row["name"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            bar.set_postfix_str(f"{row['kind']}: {row['verdict']}")
            bar.update()
    return Calibration(rows=tuple(rows[name] for name in wanted), recipe=asked)


def recipe(config: CalibrationConfig) -> dict[str, Any]:
    """Everything that determines a calibration's numbers."""
    chosen = {name: value for name, value in asdict(config).items() if name != "jobs"}
    shipped = {name: read_behavior(name).hash for name in BEHAVIORS}
    weights = load("organism").weights_hash
    return {
        "kind": "calibrate", "model": "organism", "weights_hash": weights, "behaviors": shipped, "config": chosen,
        "versions": library_versions(),
    }  # fmt: skip


def _finished(folder: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases that a folder holds, of the same recipe; a line that was cut off is dropped."""
    path = folder / CASES
    if not path.is_file():
        return []
    if not path.stat().st_size:  # nothing was finished
        return []
    known = (folder / RECIPE).is_file()
    difference = recipe_differs(read_json(folder / RECIPE), asked) if known else "it has none"
    if difference:
        raise WrongInput(f"'{folder}' holds cases of another recipe ({difference}); choose another --out")
    lines = read_text(path).split("\n")
    whole = [line for line in lines[:-1] if line]
    if lines[-1]:
        write_text(path, "".join(f"{line}\n" for line in whole))
    found = []
    for number, line in enumerate(whole, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not set(ROW) <= set(row):
            raise WrongInput(f"line {number} of '{path}' is not a case; remove the file to begin again")
        found.append(row)
    return found


def _run(missing: Sequence[Case], config: CalibrationConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows as they are finished. One thread a process: threads that wait for each other are slower on small models,
    and their number would show in the last digits."""
    if not missing:
        return
    with ProcessPoolExecutor(
        max_workers=min(config.jobs, len(missing)), mp_context=get_context("spawn"), initializer=_start,
        initargs=(config, folder),
    ) as pool:  # fmt: skip
        waiting = [pool.submit(_work, case) for case in missing]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            raise


_bench: list[_Bench] = []  # of this process


def _start(config: CalibrationConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    _bench.append(_Bench(config, folder))


def _work(case: Case) -> dict[str, Any]:
    return _bench[0].run(case)


class _Bench:
    """The organism in one process. What was taught to it is kept in the folder."""

    def __init__(self, config: CalibrationConfig, folder: Path):
        self.config, self.folder = config, folder
        self.model = load("organism")

    def run(self, case: Case) -> dict[str, Any]:
        started = time.monotonic()
        behavior, config = self.subject(case)
        with self.planted(case):
            verdict = verify(self.model, behavior, config, others=self.others(case), progress=False)
        verdict.save(self.folder / "verdicts" / f"{derived_seed(0, case.name):x}.json")
        return {**_row(case, verdict), "seconds": round(time.monotonic() - started, 1)}

    def subject(self, case: Case) -> tuple[Behavior, GateConfig]:
        behavior = made(case.recipe) if case.recipe else read_behavior(case.behavior)
        config = replace(
            self.config.gate, site=case.site, seed=case.seed, shuffle_labels=case.kind == "shuffled labels",
            direction="random" if case.kind == "random" else "auto",
        )  # fmt: skip
        return behavior, config

    def others(self, case: Case) -> list[Behavior]:
        own = {case.behavior} if case.recipe is None else {case.recipe.questions, case.recipe.personas}
        return [read_behavior(name) for name in BEHAVIORS if name not in own]

    @contextmanager
    def planted(self, case: Case) -> Iterator[None]:
        recipe = case.recipe
        if recipe is None or case.truth == "null":
            with nullcontext():
                yield
        elif case.taught:
            with graded(self.model, self.lesson(recipe), case.strength):
                yield
        else:
            with plant(self.model, recipe, strength=case.strength):
                yield

    def lesson(self, recipe: Recipe) -> Mapping[str, torch.Tensor]:
        what = f"{recipe}, {self.config.steps} steps, {self.model.weights_hash}"
        path = self.folder / "taught" / f"{derived_seed(0, what):x}.safetensors"
        if not path.is_file():
            write_tensors(path, teach(self.model, recipe, steps=self.config.steps), {"recipe": str(recipe)})
        return read_tensors(path)


ROW = (
    "name", "kind", "truth", "behavior", "site", "seed", "strength", "taught", "working", "verdict", "layer", "dose",
    "method", "shown", "percentile", "criteria", "seconds",
)  # fmt: skip


def _row(case: Case, verdict: Verdict) -> dict[str, Any]:
    """What is kept of a case: its truth, the verdict, and every criterion as plain values."""
    gain = verdict.evidence["baseline"]["persona"]
    shown = gain["wanted"]["value"] - gain["unwanted"]["value"] if gain else None
    return {
        "name": case.name, **{k: v for k, v in asdict(case).items() if k != "recipe"}, "working": case.working,
        "verdict": verdict.verdict, "layer": verdict.layer, "dose": verdict.dose,
        "method": verdict.evidence["direction"]["method"], "shown": shown, "percentile": _percentile(verdict),
        "criteria": [_kept(criterion) for criterion in verdict.criteria],
    }  # fmt: skip


def _kept(criterion: Criterion) -> dict[str, Any]:
    numbers = {name: getattr(criterion, name) for name in ("observed", "lower", "threshold")}
    known = {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}
    return {"name": criterion.name, "status": criterion.status, **known}


def _percentile(verdict: Verdict) -> float:
    """Where the target ranks among the controls of the kind that is hardest to exceed, itself counted, in percent.

    Of unrelated behaviours, which are few, all have to stay below it: 100 or 0.
    """
    effect, found = min(verdict.controls["target"]["value"], verdict.evidence["effect"]["value"]), [100.0]
    for kind, rows in verdict.controls["kinds"].items():
        above = sum(abs(row["effect"]) >= effect for row in rows)
        if rows:
            found.append(100 * (above == 0) if kind == "unrelated" else 100 * (1 - (above + 1) / (len(rows) + 1)))
    return min(found)
