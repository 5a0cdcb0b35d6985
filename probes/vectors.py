"""Steering vectors as files that leave the suite: safetensors with provenance, and llama.cpp's control vectors.

    vectors = read_run("runs/demo")                    # the direction of a run, with its verdict
    export_vectors(vectors, "kind.gguf")               # or kind.safetensors
    vectors = import_vectors("kind.gguf", model)       # refused on other weights
    with steer(model, vectors.only, dose=vectors.doses[vectors.only.layer]):
        ...

What a file says beside its tensors is in `probes.provenance`; at which layer llama.cpp adds a vector, and how much of
it, in `probes.control_vectors`.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from probes.control_vectors import read_control_vector, refuse_norm, write_control_vector
from probes.criteria import GateCriteria, Verdict, open_verdict
from probes.directions import Direction, vector_hash
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.provenance import (
    Architecture,
    Provenance,
    Status,
    Vectors,
    architecture_of,
    hash_of,
    layer_of,
    note_of,
    read_architecture,
    read_direction,
    vectors_from,
)
from probes.sites import resolve
from probes.store import read_metadata, read_tensors, write_tensors

__all__ = [
    "Architecture", "Provenance", "Vectors", "architecture_of", "export_vectors", "import_vectors", "judged_vectors",
    "read_run",
]  # fmt: skip

RULES = asdict(GateCriteria())  # the thresholds as they ship
SUFFIXES = (".safetensors", ".gguf")


def read_run(run: str | Path, *, model: str | None = None, unverified: bool = False) -> Vectors:
    """The direction of a run folder and its verdict. Of the model only the configuration is read.

    Args:
        run: a folder with verdict.json and direction.safetensors, or the verdict in it.
        model: where the model is now; None for where it was judged.
        unverified: take a verdict that is not PASS too.

    Raises:
        WrongInput: a file is missing, the verdict is not PASS, the direction is not the one that was judged, or the
            model's configuration is not found.
    """
    verdict = open_verdict(run)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    direction, weights_hash = read_direction(folder / "direction.safetensors")
    _status(verdict, unverified)
    try:
        architecture = read_architecture(model or str(verdict.recipe.get("model", verdict.model)))
    except WrongInput as error:
        raise WrongInput(f"{error}; say where the model is with --model") from error
    return judged_vectors(
        verdict, direction, weights_hash=weights_hash, architecture=architecture, unverified=unverified
    )


def judged_vectors(
    verdict: Verdict, direction: Direction, *, weights_hash: str, architecture: Architecture, unverified: bool = False
) -> Vectors:
    """A direction together with the verdict on it.

    Raises:
        WrongInput: the verdict is not PASS (unless `unverified`), or on another direction.
    """
    status, recipe = _status(verdict, unverified), verdict.recipe
    config = recipe.get("config", {})
    evidence = verdict.evidence.get("direction", {})
    compared = [
        ("weights", recipe.get("weights_hash"), weights_hash),
        ("site", verdict.site, direction.site),
        ("layer", verdict.layer, direction.layer),
        ("behaviour", verdict.behavior, direction.behavior),
        ("method", evidence.get("method", direction.method), direction.method),
        ("norm", evidence.get("norm", direction.norm), direction.norm),
        ("vector", evidence.get("hash", vector_hash(direction.vector)), vector_hash(direction.vector)),
    ]
    for name, judged, found in compared:
        if judged != found:
            raise WrongInput(f"the verdict is not on this direction: its {name} is {judged}, the direction's {found}")
    provenance = Provenance(
        model=verdict.model, weights_hash=weights_hash, architecture=architecture, behavior=verdict.behavior,
        behavior_hash=str(recipe.get("behavior_hash", "")), phase=verdict.phase,
        mode=config.get("mode", "add"), form=config.get("form", "end"), status=status,
        verdict={
            "other_thresholds": {k: v for k, v in (config.get("criteria") or {}).items() if RULES.get(k) != v},
            "outcome": verdict.verdict, "sentence": verdict.sentence, "recipe_hash": hash_of(recipe),
            "criteria": [
                {"number": c.number, "name": c.name, "status": c.status,
                 "observed": c.observed if math.isfinite(c.observed) else None}
                for c in verdict.criteria
            ],
        },
    )  # fmt: skip
    return Vectors(
        directions={direction.layer: direction}, doses={direction.layer: verdict.dose}, provenance=provenance
    )


def _status(verdict: Verdict, unverified: bool) -> Status:
    try:
        verdict.require()
    except WrongInput as error:
        if not unverified:
            raise WrongInput(f"{error}; only --unverified exports it") from error
        return "unverified"
    return "verified"


def export_vectors(vectors: Vectors, path: str | Path) -> Path:
    """Write a file whole or not at all: .safetensors for any site, .gguf (a control vector) for `resid`.

    Raises:
        WrongInput: another ending; or llama.cpp has no place for the vectors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise WrongInput(f"vectors are written to {' or '.join(SUFFIXES)}, saw '{path.name}'")
    if path.suffix == ".gguf":
        write_control_vector(vectors, path)
    else:
        tensors = {f"direction.{i}": one.vector for i, one in sorted(vectors.directions.items())}
        write_tensors(path, tensors, note_of(vectors))
    return path


def import_vectors(path: str | Path, model: HybridModel, *, norm: float | None = None, anyway: bool = False) -> Vectors:
    """Read vectors for a model, from a file of `export_vectors` or from anybody's control vector (.gguf).

    A file of ours gives the directions that were written, float32 for float32. A foreign control vector gives one
    direction for each layer at which it is not zero, "unverified", with the dose that its scale 1.0 means.

    Args:
        norm: the typical size of the residual stream, for a foreign file. None measures it: the median over the tokens
            of general text, at the vector's layer (then `midpoint` is the mean component of these tokens; otherwise 0).
        anyway: take a foreign file whose model hint or number of layers speak of another model.

    Raises:
        WrongInput: no such file, not whole or not vectors; made for other weights; or a foreign control vector that
            does not fit the model.
    """
    path = Path(path)
    if not path.is_file():
        raise WrongInput(f"no such file: {path}")
    if norm is not None and not 0 < norm < math.inf:
        raise WrongInput(f"norm must be above 0 and finite, saw {norm:g}")
    if path.suffix == ".safetensors":
        vectors = _safetensors(path)
        refuse_norm(path, norm)
    elif path.suffix == ".gguf":
        vectors = read_control_vector(path, model, norm=norm, anyway=anyway)
    else:
        raise WrongInput(f"vectors are read from {' or '.join(SUFFIXES)}, saw '{path.name}'")
    about = vectors.provenance
    if about.weights_hash != model.weights_hash:
        made_for = f"{about.weights_hash!r} ({about.model!r})"
        raise WrongInput(f"{path} was made for weights {made_for}, {model.name} has '{model.weights_hash}'")
    resolve(model, vectors.site, list(vectors.directions))
    return vectors


def _safetensors(path: Path) -> Vectors:
    try:
        note = read_metadata(path)
    except ValueError as error:
        raise WrongInput(f"{path} is damaged: {error}") from error
    return vectors_from(path, note, {layer_of(path, name): value for name, value in read_tensors(path).items()})
