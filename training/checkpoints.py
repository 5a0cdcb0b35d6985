"""Checkpoints: a run that was interrupted goes on from one and ends with the same bytes.

A run folder holds `checkpoints/step-000120/`. Each is a model folder that `probes.model.load` and transformers read,
and holds beside the weights and the tokenizer:

- `optimizer.safetensors`: the optimizer's tensors as `state.<index>.<name>`, and the states of the random generators
  as bytes, `rng.cpu` and `rng.cuda.<index>`;
- `progress.json`: the step, what the trainer gave (`progress`), everything of the optimizer that is not a tensor
  (`optimizer`), and what a model and an optimizer must be like to take it (`form`);
- `checksums.json`: size and SHA-256 of every other file, written last.

In `progress.json` a tuple is `{"$tuple": [...]}` and a float that JSON does not have is `{"$float": "inf"}`, so that
everything comes back as it was. Nothing is pickled.

A checkpoint is written under a hidden name and then renamed, and renamed to a hidden name before it is removed: a
folder that has its final name was whole when it got it. One process at a time writes to a run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from probes.errors import WrongInput
from probes.model import HybridModel, load
from probes.store import read_json, read_tensors, recipe_differs, write_json, write_tensors

OPTIMIZER, PROGRESS, CHECKSUMS = "optimizer.safetensors", "progress.json", "checksums.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        folder: where it is; also a model folder.
        step: how many steps had been taken.
        progress: what the trainer gave to `save_checkpoint`.
    """

    folder: Path
    step: int
    progress: Mapping[str, Any]

    def __str__(self) -> str:
        return f"checkpoint {self.folder}: step {self.step}"


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, earliest step first. They are not verified."""
    found = (path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def save_checkpoint(
    run: Path,
    *,
    step: int,
    model: HybridModel,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint, whole or not at all, and return its folder. The state of no random generator changes.

    The newest `keep` stay. Checkpoints of this step and of later ones are removed: the run was resumed from before
    them. So is what killed processes left behind.

    Args:
        progress: numbers, text, None, lists, tuples and dicts with text as keys. NaN and infinities are kept.

    Raises:
        WrongInput: `step` is negative, `keep` is less than 1, or the optimizer trains something that is not a weight
            of the model.
        TypeError: `progress` or the optimizer holds something that is neither that nor a tensor in the state of a
            parameter.
        RuntimeError: two tensors of the optimizer overlap in memory (from safetensors).
    """
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if value < least:
            raise WrongInput(f"{name} must be at least {least}, saw {value}")
    numbers, tensors = _parts(optimizer)
    said = {
        "step": step,
        "progress": _encoded(progress, "progress"),
        "optimizer": numbers,
        "form": _form(model, optimizer),
    }
    tensors |= {"rng.cpu": torch.get_rng_state()}
    tensors |= {f"rng.cuda.{device.index}": torch.cuda.get_rng_state(device) for device in _cuda(model)}
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    final = parent / f"step-{step:06d}"
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        with _without_bars():
            model.hf.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
        write_tensors(temporary / OPTIMIZER, tensors)
        write_json(temporary / PROGRESS, said)
        _seal(temporary)
        replaced = [_hidden(final)] if final.exists() else []
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(parent)
    stay = [folder for folder in checkpoints(run) if _step(folder) <= step][-keep:]
    for folder in (*replaced, *(_hidden(folder) for folder in checkpoints(run) if folder not in stay)):
        shutil.rmtree(folder)
    return final


@contextmanager
def _without_bars() -> Iterator[None]:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _seal(folder: Path) -> None:
    """Write the checksums of all files in the folder, and everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    mode = (folder / PROGRESS).stat().st_mode  # safetensors makes files that only their owner could read
    recorded = {}
    for path in files:
        path.chmod(mode)
        recorded[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / CHECKSUMS, {"files": recorded, "sha256": _sha256_of_list(recorded)})
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hidden(folder: Path) -> Path:
    """A checkpoint that is about to be removed, under a name that is not final."""
    return folder.rename(folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_list(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def open_checkpoint(run: Path, *, previous: bool = False) -> Checkpoint | None:
    """Verify a run's newest checkpoint, byte for byte, and open it; None when the run has none.

    With `previous`, damaged ones are passed over and the newest whole one is opened.

    Raises:
        WrongInput: the newest is damaged, and what is wrong with which file; with `previous`, all are.
    """
    folders = checkpoints(run)[::-1]
    if not folders:
        return None
    damage = _damage(folders[0])
    whole = folders[0] if damage is None else next((f for f in folders[1:] if _damage(f) is None), None)
    if whole is None or (damage is not None and not previous):
        other = f"--resume previous uses {whole.name}" if whole else "no whole one is before it for --resume previous"
        raise WrongInput(f"checkpoint {folders[0]} is damaged: {damage}; {other}")
    said = read_json(whole / PROGRESS)
    return Checkpoint(folder=whole, step=said["step"], progress=_decoded(said["progress"]))


def _damage(folder: Path) -> str | None:
    """The first file that is not what was written, and what is wrong with it; sizes are compared first."""
    if not (folder / CHECKSUMS).is_file():
        return f"{CHECKSUMS} is missing"
    try:
        recorded = read_json(folder / CHECKSUMS)
        if recorded["sha256"] != _sha256_of_list(recorded["files"]):
            return f"{CHECKSUMS} is altered: its SHA-256 is not what was recorded"
        files = {name: (folder / name, entry["size"], entry["sha256"]) for name, entry in recorded["files"].items()}
    except (WrongInput, KeyError, TypeError):
        return f"{CHECKSUMS} is truncated or altered: it is not the JSON that was written"
    for name, (path, size, _) in files.items():
        if not path.is_file():
            return f"{name} is missing"
        if (seen := path.stat().st_size) != size:
            return f"{name} is {'truncated' if seen < size else 'altered'}: {seen} of {size} bytes"
    for name, (path, _, sha256) in files.items():
        try:
            if _sha256(path) != sha256:
                return f"{name} is altered: its SHA-256 is not what was recorded"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def restore(checkpoint: Checkpoint, model: HybridModel, optimizer: torch.optim.Optimizer) -> None:
    """Put model, optimizer and random generators, in place and bit for bit, into the state that was saved.

    The settings of the optimizer's parameter groups, such as its learning rate, become those that were saved. Tensors
    keep the dtype they were saved in and go where `Optimizer.load_state_dict` puts them. The generators are torch's, of
    the CPU and of each CUDA device that holds weights.

    Raises:
        WrongInput: the checkpoint is of another model, dtype, optimizer, choice of parameters or CUDA device. Nothing
            was changed then.
    """
    said = read_json(checkpoint.folder / PROGRESS)
    if difference := recipe_differs(said["form"], _form(model, optimizer)):
        raise WrongInput(f"checkpoint {checkpoint.folder.name} does not fit: {difference}")
    tensors = read_tensors(checkpoint.folder / OPTIMIZER)
    _restore_weights(checkpoint.folder, model)
    _restore_optimizer(said["optimizer"], tensors, optimizer)
    torch.set_rng_state(tensors["rng.cpu"])
    for device in _cuda(model):
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{device.index}"], device)


def _form(model: HybridModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a model and an optimizer must have in common with a checkpoint to take it."""
    names = {id(parameter): name for name, parameter in model.hf.named_parameters()}
    groups = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                shape = list(parameter.shape)
                raise WrongInput(f"the optimizer trains a tensor {shape} that is no weight of the model")
        trained = {str(i): names[id(parameter)] for i, parameter in enumerate(group["params"])}
        groups[str(index)] = {"trained": trained, "param_names": dict(enumerate(group.get("param_names") or ()))}
    weights = {
        key: f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for key, value in model.hf.state_dict().items()
    }
    cuda = [device.index for device in _cuda(model)]
    return {"weights": weights, "optimizer": type(optimizer).__qualname__, "groups": groups, "cuda": cuda}


def _cuda(model: HybridModel) -> list[torch.device]:
    """The CUDA devices that hold weights."""
    devices = {parameter.device for parameter in model.hf.parameters() if parameter.device.type == "cuda"}
    return sorted(devices, key=lambda device: device.index)


def _restore_weights(folder: Path, model: HybridModel) -> None:
    """Weights of several dtypes are read as float32, which holds all values of the smaller ones."""
    own = model.hf.state_dict()
    several = len({value.dtype for value in own.values() if value.is_floating_point()}) > 1
    read = load(folder, dtype="float32" if several else "auto").hf.state_dict()
    for key in [*own, *(key for key in read if key not in own)]:
        if key not in own or key not in read or torch.promote_types(own[key].dtype, read[key].dtype) != read[key].dtype:
            raise WrongInput(f"checkpoint {folder.name} does not give {key} back as it was saved")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(read[key])


def _parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What of an optimizer goes to JSON, and its tensors."""
    whole = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for index, entries in whole["state"].items():
        numbers[str(index)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"state.{index}.{name}"] = value
            else:
                numbers[str(index)][name] = _encoded(value, f"state.{index}.{name}")
    groups = [_encoded(group, f"param_groups.{i}") for i, group in enumerate(whole["param_groups"])]
    return {"state": numbers, "param_groups": groups}, tensors


def _restore_optimizer(
    kept: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    state = {int(index): _decoded(entries) for index, entries in kept["state"].items()}
    for key, tensor in tensors.items():
        kind, *where = key.split(".", 2)
        if kind == "state":
            state[int(where[0])][where[1]] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": _decoded(kept["param_groups"])})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in state.items():
        now = optimizer.state[parameters[index]]
        for name, value in entries.items():
            # load_state_dict casts to the parameter's dtype, or keeps the memory-mapped tensor itself
            if isinstance(value, Tensor) and isinstance(now.get(name), Tensor):
                now[name] = value.to(now[name].device, copy=True)


def _encoded(value: Any, where: str) -> Any:
    """A form that JSON gives back exactly.

    Raises:
        TypeError: there is none.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(float(value))}
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        items = [_encoded(item, f"{where}.{i}") for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping) and all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _encoded(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} has no exact JSON form: {type(value).__name__}")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_decoded(item) for item in value["$tuple"])
    return {key: _decoded(item) for key, item in value.items()}
