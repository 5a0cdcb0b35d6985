"""Many verdicts at once: every model, behaviour and site of a list, one page and one table for all of them."""

from __future__ import annotations

import gc
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tqdm.auto import tqdm

from analysis.batch import Cell, Matrix
from analysis.batch_report import write_batch_report
from analysis.calibration import Calibration, open_calibration, shipped_calibration
from analysis.report import write_report
from dispositions.asked import Device, Dtype
from dispositions.cells import PAGE, RESULT, Problem, Record, Seen, attempt, forget_error, judge, known_recipe
from dispositions.runs import checked, model_slug, slug
from probes.behaviors import Behavior, check_vocabulary, read_behavior
from probes.criteria import Verdict, open_verdict
from probes.errors import WrongInput
from probes.gate import GateConfig
from probes.model import ORGANISMS, HybridModel, load
from probes.pairs import STEERABLE
from probes.sites import having, site
from probes.store import RECIPE, library_versions, read_json, recipe_differs, write_json

INDEX = "index.html"
_LONGEST = 60  # of one part of a folder's name


@dataclass(frozen=True, kw_only=True)
class Task:
    """A cell that is asked for: the model by its source, the behaviour or why it cannot be read, and the folder."""

    source: str
    behavior: Behavior | Problem
    config: GateConfig
    folder: Path
    names: tuple[str, str]

    def cell(self, found: Verdict | Problem | str) -> Cell:
        """What became of it: a verdict, a problem, or why it is not applicable."""
        blank = Cell(
            name=self.folder.name, model=self.names[0], behavior=self.names[1], site=self.config.site,
            result="not applicable",
        )  # fmt: skip
        if isinstance(found, Verdict):
            return replace(blank, result=found.verdict, verdict=found)
        if isinstance(found, Problem):
            return replace(blank, result=found.kind, said=found.line)
        return replace(blank, said=found)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What is asked about many models, behaviours and sites, and the run of it."""

    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL,MODEL")] = ()
    """Many at once: models, with commas between them (see `dispositions verify --help`)."""
    behaviors: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME,FILE")] = ()
    """Many at once: shipped behaviours and JSONL files, with commas between them."""
    sites: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SITE,SITE")] = ()
    """Many at once: resid, gdn.state, attn.heads, with commas between them; --site where this is not given."""
    out: Path | None = None
    """Many at once: the folder for all of it. What is finished there is not repeated."""
    calibration: Path | None = None
    """Many at once: a calibration.json (see `dispositions calibrate`), to say how many false PASSes are to be expected;
    the one that ships when not given."""
    device: Device = "cpu"
    dtype: Dtype = "auto"
    gate: GateConfig = field(default_factory=GateConfig)

    def judge_all(self) -> int:
        """Judge every cell that is missing, and write the page and the tables of all.

        Raises:
            WrongInput: something is wrong with all of it: no such site, a folder of another recipe.
        """
        if self.out is None:
            raise WrongInput("many at once need --out, a folder for all of them; saw none")
        out = checked(self.out, self.out)
        models, behaviors = _sources(self.models, "models"), _sources(self.behaviors, "behaviors")
        gates = self._gates()
        calibration = self._calibration()
        asked = {
            "kind": "report", "device": self.device, "dtype": self.dtype, "config": _shared(self.gate),
            "versions": library_versions(),
        }  # fmt: skip
        _take(out, asked)
        tasks = _tasks(out, models, behaviors, gates)
        cells = []
        with tqdm(total=len(tasks), desc="cells", unit="cell") as bar:
            for cell in self._cells(tasks, Record(out / "checked.json")):
                tqdm.write(str(cell))
                bar.update()
                cells.append(cell)
        matrix = Matrix(cells=tuple(cells), recipe=asked)
        tables = matrix.save(out)
        page = write_batch_report(matrix, out / INDEX, calibration)
        print(matrix, *tables, page, sep="\n")
        return matrix.exit_code

    def _gates(self) -> list[GateConfig]:
        """The gate at each site; whatever does not fit one of them is refused before anything is run."""
        if self.sites and self.gate.site != GateConfig().site:
            raise WrongInput(f"sites are named by --sites or by --site, saw both: --site {self.gate.site}")
        found = _sources(self.sites or (self.gate.site,), "sites")
        for name in found:
            if name not in STEERABLE:
                raise WrongInput(f"'{name}' cannot be steered; allowed are {', '.join(STEERABLE)}")
        return [replace(self.gate, site=name) for name in found]

    def _calibration(self) -> Calibration | None:
        return shipped_calibration() if self.calibration is None else open_calibration(self.calibration)

    def _cells(self, tasks: Sequence[Task], record: Record) -> Iterator[Cell]:
        """Every cell in order. A model is loaded when the first of its cells needs it, and dropped after its last."""
        for source in dict.fromkeys(task.source for task in tasks):
            seen = attempt(partial(Seen.now, source, self.gate.general, self.gate.scorer.judge_prompt))
            model = cache(partial(attempt, partial(load, source, device=self.device, dtype=self.dtype)))
            for task in (task for task in tasks if task.source == source):
                found = seen if isinstance(seen, Problem) else _answer(task, seen, record, model)
                if isinstance(found, Problem):
                    found.save(task.folder)
                else:
                    forget_error(task.folder)
                yield task.cell(found)
            del model
            gc.collect()  # a model is made of cycles, and the next one wants its memory


def _answer(
    task: Task, seen: Seen, record: Record, model: Callable[[], HybridModel | Problem]
) -> Verdict | Problem | str:
    """What becomes of a cell: a verdict, a problem, or why it is not applicable."""
    known = attempt(partial(_known, task, seen, record))
    if known is not None:
        return known
    loaded = model()
    if isinstance(loaded, Problem):
        return loaded
    forget_error(task.folder)  # or a run that fails again would not leave its folder as it was
    return attempt(partial(_judged, loaded, task, seen, record))


def _known(task: Task, seen: Seen, record: Record) -> Verdict | Problem | str | None:
    """What can be said of a cell without loading its model; None where that is nothing."""
    if isinstance(task.behavior, Problem):
        return task.behavior
    if record.finished(task.folder, seen, known_recipe(task.source, task.behavior, task.config)):
        verdict = open_verdict(task.folder)
        if not (task.folder / PAGE).is_file():
            write_report(verdict, task.folder / PAGE)
        return verdict
    return record.lacking(task.folder, seen)


def _judged(model: HybridModel, task: Task, seen: Seen, record: Record) -> Verdict | str:
    name = task.config.site
    if not having(model, name):
        why = f"{task.names[0]} has no {site(name).kind} layers"
        record.keep_lacking(task.folder, seen, why)
        return why
    behavior = task.behavior
    if isinstance(behavior, Problem):
        raise WrongInput(behavior.line)
    check_vocabulary(model, behavior)
    with redirect_stdout(io.StringIO()):  # what a run says about itself would tear the bar
        judge(model, behavior, task.config, task.folder)
    record.keep_finished(task.folder, seen)
    return open_verdict(task.folder)  # as it is on disk, so that a page is the same whenever it is written


def _tasks(out: Path, models: Sequence[str], behaviors: Sequence[str], gates: Sequence[GateConfig]) -> list[Task]:
    named = {source: _model_name(source) for source in models}, {source: _behavior_name(source) for source in behaviors}
    shown = [_readable(names) for names in named]
    read = {source: attempt(partial(read_behavior, source)) for source in behaviors}
    return [
        Task(
            source=model,
            behavior=read[behavior],
            config=gate,
            folder=out / "cells" / f"{named[0][model].unique}-{named[1][behavior].unique}-{gate.site}",
            names=(shown[0][model], shown[1][behavior]),
        )
        for model in models
        for behavior in behaviors
        for gate in gates
    ]


def _sources(words: Sequence[str], what: str) -> list[str]:
    """Names from words with commas between them, once each."""
    found = list(dict.fromkeys(part.strip() for word in words for part in word.split(",") if part.strip()))
    if not found:
        raise WrongInput(f"many at once need --{what}, names with commas between them; saw none")
    return found


class Name(NamedTuple):
    """Of a model or a behaviour: for readers, and one for folders that no other has."""

    short: str
    unique: str


def _model_name(source: str) -> Name:
    return Name(source, source) if source in ORGANISMS else _of_path(model_slug(source), source)


def _behavior_name(source: str) -> Name:
    short = slug(Path(source).stem)
    return _of_path(short, source) if source != short else Name(source, source)


def _of_path(short: str, source: str) -> Name:
    """Files of one name lie in many folders, so the whole path marks the unique one."""
    mark = hashlib.sha256(os.path.normpath(source).encode()).hexdigest()[:6]
    return Name(short[:_LONGEST], f"{short[:_LONGEST]}-{mark}")


def _readable(names: Mapping[str, Name]) -> dict[str, str]:
    """The short names, unless two would be the same."""
    short = [name.short for name in names.values()]
    return {source: name.short if short.count(name.short) == 1 else name.unique for source, name in names.items()}


def _shared(gate: GateConfig) -> dict[str, Any]:
    """The gate without the site, which differs from cell to cell."""
    return {key: value for key, value in asdict(gate).items() if key != "site"}


def _take(out: Path, asked: dict[str, Any]) -> None:
    """Take a folder for a batch. Models, behaviours and sites may come and go, but all cells share their options.

    Raises:
        WrongInput: it is a file, somebody else's, or has verdicts with other options.
    """
    if out.exists() and not out.is_dir():
        raise WrongInput(f"'{out}' is a file; --out must be a folder")
    if (out / RECIPE).is_file():
        old = read_json(out / RECIPE)
        if not isinstance(old, dict) or old.get("kind") != "report":
            raise WrongInput(f"'{out}' holds a run of another kind; choose another --out")
        difference = recipe_differs(old, asked)
        if difference and any(out.glob(f"cells/*/{RESULT}")):
            raise WrongInput(f"'{out}' holds cells of another recipe ({difference}); choose another --out or remove it")
    elif found := [name for name in (INDEX, "cells", "numbers.csv", RESULT) if (out / name).exists()]:
        raise WrongInput(f"'{out}' holds {found[0]} but no {RECIPE}, so it is not this command's; choose another --out")
    write_json(out / RECIPE, asked)
