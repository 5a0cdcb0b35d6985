"""A run's folder: what it goes on from, and the name of the trained model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes.errors import WrongInput
from probes.store import recipe_differs
from training.checkpoints import Checkpoint, open_checkpoint
from training.metrics import METRICS

MODEL = "model"


def resumable(out: Path, recipe: Mapping[str, Any], *, previous: bool) -> Checkpoint | None:
    """What a run in this folder goes on from.

    Raises:
        WrongInput: it is damaged or of another run, or something that is not a run's lies where one will write.
    """
    for name, fits in (("checkpoints", Path.is_dir), (METRICS, Path.is_file), (MODEL, Path.is_symlink)):
        place = out / name
        if (place.exists() or place.is_symlink()) and not fits(place):
            raise WrongInput(f"'{place}' is not what a run writes there; choose another folder or remove it")
    checkpoint = open_checkpoint(out, previous=previous)
    if checkpoint and (difference := recipe_differs(checkpoint.progress.get("run", {}), recipe)):
        raise WrongInput(f"{checkpoint.folder} is of another run ({difference}); choose another folder or remove it")
    return checkpoint


def name_model(out: Path, checkpoint: Path) -> None:
    """Make the last checkpoint the trained model, `model`: another name of it, given in one step."""
    temporary = out / f".{MODEL}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.relative_to(out), target_is_directory=True)
    temporary.replace(out / MODEL)
