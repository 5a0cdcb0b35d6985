"""Files that are whole or absent, and captures that live in them.

Everything is written under a temporary name in the same folder and then renamed, so a reader never meets half a file
and an interrupted job leaves only whole ones. Tensors go to safetensors in the dtype they have and are memory-mapped
when read; everything else is JSON or text. Nothing is ever pickled. Equal content gives equal bytes.

A capture on disk is a folder: `recipe.json` says what was asked of which weights, and each `batch-*.safetensors` holds
one batch of prompts, with a tensor `<site>.<layer>` for each site and layer. `open_capture` reads no tensor until it
is asked for one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.errors import WrongInput
from probes.sites import keeps_tokens
from probes.sites import site as site_named

RECIPE = "recipe.json"
RAGGED = -1  # in a shape: an axis whose length differs between prompts
_META = "json"  # one metadata entry, because safetensors writes several in an order that changes from run to run
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PACKAGES = ("torch", "transformers", "nnsight", "safetensors", "numpy")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all; missing parent folders are made."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, obj: Any) -> None:
    """Write an object as UTF-8 JSON, whole or not at all.

    Keys keep their order. NaN and infinities become null, since JSON has neither; paths become text; dataclasses,
    arrays, tensors and numpy scalars become what they hold.

    Raises:
        TypeError: something in the object has no JSON form.
    """
    write_text(path, json.dumps(_plain(obj), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors of any shapes and dtypes to a safetensors file, whole or not at all.

    `metadata` is anything that `write_json` takes; `read_metadata` gives it back.

    Raises:
        RuntimeError: two tensors share memory (from safetensors).
    """
    note = {_META: json.dumps(_plain(metadata or {}), ensure_ascii=False, allow_nan=False)}
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, note)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to beside the file, which takes its place when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes a file of its own that only its owner could read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(obj: Any) -> Any:
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, str | int | bool | None):
        return obj
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if callable(values := getattr(obj, "tolist", None)):
        return _plain(values())
    raise TypeError(f"{type(obj).__name__} has no JSON form: {obj!r}")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file.

    Raises:
        WrongInput: there is no such file, or it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise WrongInput(f"no such file: {path}") from error
    except UnicodeDecodeError as error:
        raise WrongInput(f"{Path(path).name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        WrongInput: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise WrongInput(f"{path} is not JSON: {error}") from error


def read_result(path: str | Path, name: str) -> Any:
    """Read the JSON of a run's result, such as `verdict.json`, from the file or its folder.

    Raises:
        WrongInput: there is no such file, or it is not JSON.
    """
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise WrongInput(f"no {Path(name).stem} at '{path}': expected a run folder with {name}")
    return read_json(file)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped.

    Raises:
        WrongInput: there is no such file, or it is not whole.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata given to `write_tensors`; no tensor is read.

    Raises:
        WrongInput: there is no such file, or it is not whole.
    """
    with _opened(path) as file:
        return json.loads((file.metadata() or {}).get(_META, "{}"))


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise WrongInput(f"no such file: {path}") from error
    except SafetensorError as error:
        raise WrongInput(f"{path} is not a whole safetensors file: {error}") from error


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a computation gives, and of this suite."""
    return dict(_versions())


@cache  # reading the metadata of six packages takes longer than tracing a small model
def _versions() -> tuple[tuple[str, str], ...]:
    try:
        own = version("dispositions")
    except PackageNotFoundError:
        own = "not installed"
    return ("dispositions", own), *((name, version(name)) for name in _PACKAGES)


def recipe_differs(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first field in which two recipes differ, with both values; None when they agree.

    Fields are compared in the order of `new`, as JSON (a tuple equals a list); a nested one is named `versions.torch`.
    """
    before, after = _plain(old), _plain(new)
    for key in [*after, *(key for key in before if key not in after)]:
        was, now = before.get(key), after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            if inner := recipe_differs(was, now):
                return f"{key}.{inner}"
        elif was != now or (key in before) != (key in after):
            return f"{key} was {_short(was)} and is now {_short(now)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One batch of a capture, in memory or in a file that is read when a tensor is asked for.

    Attributes:
        rows: the indices of its prompts in the capture; a tensor holds them one after the other along its first axis.
        lengths: tokens of each prompt, generated ones included: as many as it has sources.
        counts: by site with a token axis, how many tokens of each prompt were kept.
        generated: ids of the tokens that each prompt was continued with.
        tensors: by `<site>.<layer>`, or the file that holds them.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    counts: Mapping[str, tuple[int, ...]]
    generated: tuple[tuple[int, ...], ...]
    tensors: Mapping[str, Tensor] | Path

    @property
    def note(self) -> dict[str, Any]:
        """What a file of this batch says beside its tensors."""
        return {"rows": self.rows, "lengths": self.lengths, "counts": self.counts, "generated": self.generated}

    def tensor(self, name: str) -> Tensor:
        """A tensor of this batch that may be changed without changing the capture."""
        if isinstance(self.tensors, Mapping):
            return self.tensors[name].clone()
        with _opened(self.tensors) as file:
            return file.get_tensor(name)

    def form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it."""
        if isinstance(self.tensors, Mapping):
            return tuple(self.tensors[name].shape), self.tensors[name].dtype
        with _opened(self.tensors) as file:
            header = file.get_slice(name)
            return tuple(header.get_shape()), _DTYPES[header.get_dtype()]

    def entries(self, site: str) -> list[tuple[int, int]]:
        """For each prompt, the tokens kept and the entries of each along the first axis: one, or one a source."""
        counts = self.counts.get(site, (1,) * len(self.rows))
        across = self.lengths if "source" in site_named(site).axes else (1,) * len(self.rows)
        return list(zip(counts, across, strict=True))

    def by_prompt(self, site: str, layer: int) -> dict[int, Tensor]:
        """Each prompt's tensor by its index in the capture, the kept tokens along the first axis."""
        entries, name = self.entries(site), f"{site}.{layer}"
        values = self.tensor(name).split([count * across for count, across in entries])
        if "source" in site_named(site).axes:
            values = [v.unflatten(0, shape).transpose(1, 2) for v, shape in zip(values, entries, strict=True)]
        return dict(zip(self.rows, values, strict=True))


def read_part(path: Path) -> Part:
    """Open one batch file.

    Raises:
        WrongInput: the file is not whole, or not a batch of a capture.
    """
    note = read_metadata(path)
    if not {"rows", "lengths", "counts", "generated"} <= set(note):
        raise WrongInput(f"{path} is not a batch of a capture")
    return Part(
        rows=tuple(note["rows"]),
        lengths=tuple(note["lengths"]),
        counts={site: tuple(counts) for site, counts in note["counts"].items()},
        generated=tuple(tuple(ids) for ids in note["generated"]),
        tensors=path,
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Capture:
    """A recording of sites over prompts. Made by `probes.capture.capture`, or opened by `open_capture`.

    `capture[site, layer]` is a CPU tensor whose first axis is the prompts, in the order in which they were given and
    in the site's dtype (see `probes.sites`). It is a list with one tensor for each prompt where these can differ in
    shape: where several tokens of a prompt were kept (positions "all", "generated", "tokens:..." or indices; a token
    axis then comes first), and where a site has an axis of sources. Each access puts the batches together anew: hold
    on to what you use twice.

    Attributes:
        recipe: what was recorded, from which weights, by which versions.
        parts: the batches.
    """

    recipe: Mapping[str, Any]
    parts: tuple[Part, ...]

    def __getitem__(self, key: tuple[str, int]) -> Any:  # a Tensor, or a list of them
        site, layer = key
        if layer not in self.layers(site):
            has = _listed(self.layers(site))
            raise WrongInput(f"this capture has no layer {layer} of '{site}'; it has layers {has}")
        name = f"{site}.{layer}"
        if self._ragged(site):
            pieces: dict[int, Tensor] = {}
            for part in self.parts:
                pieces |= part.by_prompt(site, layer)
            single = not self._has_tokens(site)
            return [pieces[row][0] if single else pieces[row] for row in range(len(self))]
        shape, dtype = self.parts[0].form(name)
        result = torch.empty(len(self), *shape[1:], dtype=dtype)
        for part in self.parts:
            result[list(part.rows)] = part.tensor(name)
        return result

    def __len__(self) -> int:
        return int(self.recipe["prompts"])

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.recipe["layers"])

    @property
    def generated(self) -> tuple[tuple[int, ...], ...]:
        """Ids of the tokens that each prompt was continued with, the end-of-turn token included."""
        ids = {row: ids for part in self.parts for row, ids in zip(part.rows, part.generated, strict=True)}
        return tuple(ids[row] for row in range(len(self)))

    def layers(self, site: str) -> tuple[int, ...]:
        """The layers at which a site was recorded.

        Raises:
            WrongInput: the site was not recorded.
        """
        if site not in self.recipe["layers"]:
            raise WrongInput(f"this capture has no site '{site}'; it has {', '.join(self.sites)}")
        return tuple(self.recipe["layers"][site])

    def axes(self, site: str) -> tuple[str, ...]:
        """Names of the axes of `capture[site, layer]`; in a list each prompt's tensor lacks the first."""
        self.layers(site)
        return tuple(axis for axis in site_named(site).axes if axis != "token" or self._has_tokens(site))

    def _has_tokens(self, site: str) -> bool:
        return keeps_tokens(site, self.recipe["positions"])

    def _ragged(self, site: str) -> bool:
        return self._has_tokens(site) or "source" in site_named(site).axes

    @property
    def nbytes(self) -> int:
        return sum(self.frame()["bytes"].tolist())

    def frame(self) -> pd.DataFrame:
        """One row for each site and layer: site, layer, axes, shape (-1: a ragged axis), dtype, bytes."""
        rows = []
        for site in self.sites:
            entries = sum(math.prod(entry) for part in self.parts for entry in part.entries(site))
            axes = self.axes(site)
            for layer in self.layers(site):
                shape, dtype = self.parts[0].form(f"{site}.{layer}")
                lengths = iter(shape[1:])
                fixed = {"prompt": len(self), "token": RAGGED, "source": RAGGED}
                rows.append(
                    {
                        "site": site,
                        "layer": layer,
                        "axes": " ".join(axes),
                        "shape": tuple(fixed[axis] if axis in fixed else next(lengths) for axis in axes),
                        "dtype": str(dtype).removeprefix("torch."),
                        "bytes": entries * math.prod(shape[1:]) * dtype.itemsize,
                    }
                )
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        recorded = ", ".join(f"{site} at layers {_listed(self.layers(site))}" for site in self.sites)
        positions = self.recipe["positions"]
        if isinstance(positions, Mapping):
            where = "positions " + ", ".join(f"{_word(positions[site])} ({site})" for site in positions)
        else:
            where = f"positions {_word(positions)}"
        what = f"{len(self)} prompts, {recorded}, {where}, {self.nbytes / 2**20:.1f} MiB"
        return f"capture of {self.recipe['model']}: {what}"

    __repr__ = __str__


def _word(positions: Any) -> str:
    return positions if isinstance(positions, str) else "given by index"


def _listed(layers: Sequence[int]) -> str:
    """0-2, 4, 6-7"""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(layers), 1) if b != a + 1), len(layers)]
    runs = [layers[a:b] for a, b in pairwise(cuts)]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def open_capture(folder: str | Path) -> Capture:
    """Open a capture on disk. Tensors are memory-mapped and read when asked for.

    Raises:
        WrongInput: the folder holds no capture, or an unfinished one.
    """
    folder = Path(folder)
    recipe = read_json(folder / RECIPE)
    if not isinstance(recipe, dict) or recipe.get("kind") != "capture":
        raise WrongInput(f"{folder} holds no capture: its {RECIPE} has no kind 'capture'")
    parts = tuple(read_part(path) for path in sorted(folder.glob("batch-*.safetensors")))
    present, total = sum(len(part.rows) for part in parts), recipe["prompts"]
    if present != total:
        raise WrongInput(
            f"the capture in {folder} is unfinished ({present} of {total} prompts); run it again to resume"
        )
    return Capture(recipe=recipe, parts=parts)
