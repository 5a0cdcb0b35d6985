"""One verdict in one run folder: what `dispositions verify` does, and what a batch does many times.

A batch also has to know, without loading a model, which of its cells are finished. A cell's recipe names the weights by
their hash, which only a loaded model tells. So the batch keeps a record (`checked.json`): for each cell, what the
files of the model and the shipped data looked like when its recipe was last compared with the model itself. Where they
still look like that, it still holds; where they do not, or the record is lost, the model is loaded and asked.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from analysis.report import write_report
from dispositions.runs import claimed
from probes.behaviors import SHIPPED, Behavior
from probes.criteria import Verdict, open_verdict
from probes.damage import DATA, GENERAL
from probes.directions import save_direction
from probes.errors import WrongInput
from probes.model import ORGANISMS, HybridModel
from probes.store import RECIPE, library_versions, read_json, recipe_differs, write_json, write_text
from probes.verify import GateConfig, recipe, unrelated_behaviors, verify

RESULT = "verdict.json"
PAGE = "report.html"
ERROR = "error.txt"
Found = TypeVar("Found")


def judge(model: HybridModel, behavior: Behavior, config: GateConfig, out: Path) -> Verdict:
    """The verdict of a run folder: read where it is there, otherwise reached and written. Its page is written anew.

    Raises:
        WrongInput: the folder holds another recipe, or the gate refuses the behaviour or a setting.
    """
    others = unrelated_behaviors(model, behavior)  # read once: all the shipped files have to be
    asked = {"kind": "verify", **recipe(model, behavior, config, others=others)}
    with claimed(out, asked, RESULT, model, behavior) as finished:
        if finished:
            verdict = open_verdict(out)
        else:
            verdict = verify(model, behavior, config, others=others)
            if verdict.direction is not None:
                save_direction(verdict.direction, out / "direction.safetensors", weights_hash=model.weights_hash)
            verdict.save(out / RESULT)
    write_report(verdict, out / PAGE)
    return verdict


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What kept a cell from being judged: wrong input (error) or a fault of the program (crash), in one line."""

    kind: Literal["error", "crash"]
    line: str
    trace: str = ""

    def save(self, folder: Path) -> None:
        """Leave error.txt: the line, and where the program failed."""
        write_text(folder / ERROR, f"{self.kind}: {self.line}\n" + (f"\n{self.trace}" if self.trace else ""))


def attempt(action: Callable[[], Found]) -> Found | Problem:
    """What an action gives, or what went wrong. An interruption is not caught."""
    try:
        return action()
    except WrongInput as error:
        return Problem(kind="error", line=_one_line(str(error)))
    except OSError as error:  # a file that cannot be read, a folder that cannot be made
        said = f"{error.strerror}: '{error.filename}'" if error.filename else str(error) or type(error).__name__
        return Problem(kind="error", line=_one_line(said))
    except Exception as error:  # noqa: BLE001 - a cell that crashes must not take the other cells with it
        line = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Problem(kind="crash", line=_one_line(line), trace=traceback.format_exc())


def _one_line(text: str) -> str:
    """The first line with words in it, of bearable length."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 300 else f"{line[:297]}..."


def forget_error(folder: Path) -> None:
    """Take the note of an earlier failure away, with the folder where nothing else is in it."""
    (folder / ERROR).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model's files and the shipped data look like at the moment; `model` is None where there are no files."""

    model: str | None
    data: str

    @classmethod
    def now(cls, source: str, *given: str | None) -> Seen:
        """
        Args:
            source: the model, as it is asked for.
            given: files that decide a verdict's numbers beside the shipped ones: general text, a judge's question.
        """
        files, own = _model_files(source), [Path(path) for path in given if path]
        texts = [*SHIPPED.glob("*.jsonl"), *(DATA / name for name in GENERAL), *own]
        found = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(texts) if path.is_file()]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return cls(model=_digest(stats) if files else None, data=_digest(found))


def _digest(parts: Iterable[Any]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:16]


def _model_files(source: str) -> list[Path]:
    """The files that a model would be loaded from, as far as they are on this machine."""
    path = ORGANISMS.get(source, Path(source))
    if not path.exists() and source.count("/") == 1:
        try:
            cached = try_to_load_from_cache(source, "config.json")
        except HFValidationError:  # no name of a hub either; loading will say so
            return []
        if not isinstance(cached, str):
            return []
        path = Path(cached).parent
    return sorted(file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())


class Record:
    """Which cells were found to be finished, or not applicable, for which files: `checked.json` of a batch.

    Losing it costs time, never a result.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            held = read_json(path)
        except WrongInput:
            held = {}
        self._held: dict[str, Any] = held if isinstance(held, dict) else {}

    def finished(self, folder: Path, seen: Seen, asked: Mapping[str, Any]) -> bool:
        """Whether a folder holds the verdict on what is asked, as far as can be told without the model.

        `asked` is the part of its recipe that is known (`known_recipe`).
        """
        entry, recipe_file = self._entry(folder.name, seen), folder / RECIPE
        if entry is None or not (folder / RESULT).is_file() or not recipe_file.is_file():
            return False
        if entry.get("recipe") != _digest([recipe_file.read_bytes()]) or entry.get("data") != seen.data:
            return False
        held = read_json(recipe_file)
        return recipe_differs({key: held[key] for key in asked if key in held}, asked) is None

    def lacking(self, folder: Path, seen: Seen) -> str | None:
        """Why a cell is not applicable, where that is known."""
        entry = self._entry(folder.name, seen)
        return None if entry is None else entry.get("lacks")

    def _entry(self, name: str, seen: Seen) -> dict[str, Any] | None:
        """A model whose files are gone cannot have changed."""
        entry = self._held.get(name)
        if not isinstance(entry, dict) or (seen.model is not None and entry.get("model") != seen.model):
            return None
        return entry

    def keep_finished(self, folder: Path, seen: Seen) -> None:
        self._keep(folder.name, {**asdict(seen), "recipe": _digest([(folder / RECIPE).read_bytes()])})

    def keep_lacking(self, folder: Path, seen: Seen, why: str) -> None:
        self._keep(folder.name, {**asdict(seen), "lacks": why})

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        if self._held.get(name) != entry:
            self._held[name] = entry
            write_json(self.path, dict(sorted(self._held.items())))


def known_recipe(source: str, behavior: Behavior, config: GateConfig) -> dict[str, Any]:
    """The part of a cell's recipe that needs no model."""
    return {
        "kind": "verify", "behavior": behavior.name, "behavior_hash": behavior.hash, "model": source,
        "config": asdict(config), "versions": library_versions(),
    }  # fmt: skip
