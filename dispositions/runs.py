"""Run folders: what they are called, who owns them, and that a finished run is not repeated."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from probes.errors import WrongInput
from probes.store import RECIPE, read_json, recipe_differs, write_json

_SUBJECTS = {"behavior", "model", "before", "after", "out", "verdict", "resume", "gradients", "sharpness", "ablation"}
_WRITTEN = ("report.html", "metrics.jsonl", "checkpoints", "model")
_LONGEST = 60  # of what names the options in a folder's name


@contextmanager
def claimed(out: Path, asked: dict, result: str, *subjects: object) -> Iterator[bool]:
    """A run folder for a recipe; True where it holds the result already. Says what is asked about.

    Wrong input or a fault inside the block leaves nothing behind, unless there is something to go on from, such as
    checkpoints; an interrupted run keeps its place.
    """
    there = {folder for folder in (out, *out.parents) if folder.exists()}
    finished = _claim(out, asked, result) and (out / result).is_file()
    print(*subjects, sep="\n")
    if finished:
        print(f"{out} holds this result already")
    try:
        yield finished
    except Exception:
        if not finished and all(path.name == RECIPE for path in out.iterdir()):
            (out / RECIPE).unlink(missing_ok=True)
            for folder in (out, *out.parents):
                if folder in there or any(folder.iterdir()):
                    break
                folder.rmdir()
        raise


def _claim(out: Path, asked: dict, result: str) -> bool:
    """Take a run folder for a recipe whose result is written last; True when it already holds this recipe.

    Raises:
        WrongInput: it is a file, or it holds another recipe.
    """
    if out.exists() and not out.is_dir():
        raise WrongInput(f"'{out}' is a file; --out must be a folder")
    if (out / RECIPE).is_file():
        old = read_json(out / RECIPE)
        if not isinstance(old, dict):
            raise WrongInput(f"'{out / RECIPE}' is not a recipe; choose another --out or remove it")
        difference = recipe_differs(old, asked)
        # a run that stopped before its result has nothing to lose; another kind of run does
        if difference and (old.get("kind") != asked["kind"] or (out / result).is_file()):
            raise WrongInput(f"'{out}' holds another recipe ({difference}); choose another --out or remove it")
        if not difference:
            return True
    elif found := [name for name in (result, *_WRITTEN) if (out / name).exists()]:
        raise WrongInput(f"'{out}' holds {found[0]} but no {RECIPE}, so it is not this command's; choose another --out")
    write_json(out / RECIPE, asked)
    return False


def checked(out: Path | None, default: Path) -> Path:
    """The folder that was asked for, or the default.

    Raises:
        WrongInput: it is empty, or the current folder, which would mix a run's files with the user's own.
    """
    if out is not None and out == Path():
        raise WrongInput("--out must name a folder of its own, saw the current folder or nothing")
    return out or default


def variant(command: Any) -> str:
    """The options of a command that are not the default, for the name of its folder: -gdn.state-seed-3."""
    words = _words(command)
    if len("-".join(words)) > _LONGEST:
        return "-" + hashlib.sha256("-".join(words).encode()).hexdigest()[:8]
    return "".join(f"-{word}" for word in words)


def _words(options: Any) -> list[str]:
    found = []
    for option in fields(options):
        value = getattr(options, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if option.name in _SUBJECTS or value == default:
            continue
        if is_dataclass(value):
            found += _words(value)
        elif isinstance(value, str):
            found.append(slug(value))
        elif value is True:
            found.append(option.name)
        else:
            several = value if isinstance(value, tuple) else (value,)
            found.append(slug("-".join([option.name, *map(str, several)])))
    return found


def model_slug(source: str) -> str:
    return slug(Path(source).name.removesuffix(".gguf"))


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
