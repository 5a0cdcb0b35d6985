"""Steering vectors with what has to be known about them, and how both kinds of file say it.

A vector means nothing without the weights it was made for, its layer and the size of one dose. `Vectors` holds these
beside the directions, and whether a verdict stands behind them ("verified") or not ("unverified"). `note_of` turns all
of it but the tensors into plain values, and `vectors_from` turns these back. `probes.vectors` reads and writes files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from torch import Tensor
from transformers import AutoConfig

from probes.directions import Direction, vector_hash
from probes.errors import WrongInput
from probes.model import ORGANISMS, HybridModel
from probes.stats import Estimate
from probes.store import read_metadata, read_tensors

FORMAT, VERSION = "dispositions-vectors", 1
CONVENTIONS = {
    "layer_convention": "from 0; resid at layer i is the stream after block i",
    "dose_unit": "dose 1.0 adds a vector as long as the site's values typically are, which is norm",
    "sign_convention": "positive doses push from unwanted to wanted",
}
Status = Literal["verified", "unverified"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What of a model's build a vector depends on."""

    model_type: str
    hidden_size: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where vectors come from, as their file says it.

    Attributes:
        model, weights_hash, architecture: the model they were made for (a foreign file: that they were imported to).
        phase, mode, form: how they were applied when they were judged.
        verdict: outcome, sentence, criteria and recipe hash; None where nothing was judged.
        status: "verified" means that the verdict is PASS.
        source: of a foreign file, its name, hash and model hint.
    """

    model: str
    weights_hash: str
    architecture: Architecture
    behavior: str = ""
    behavior_hash: str = ""
    phase: str = "both"
    mode: str = "add"
    form: str = "end"
    verdict: Mapping[str, Any] | None = None
    status: Status = "unverified"
    source: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Vectors:
    """Directions by layer, at one site of one model, with the working dose of each."""

    directions: Mapping[int, Direction]
    doses: Mapping[int, float]
    provenance: Provenance

    def __post_init__(self) -> None:
        if not self.directions or len({one.site for one in self.directions.values()}) > 1:
            raise WrongInput("vectors of one file are of one site, and at least one")
        if set(self.directions) != set(self.doses) or any(i != one.layer for i, one in self.directions.items()):
            raise WrongInput("each vector needs its own layer and a dose")
        for layer, one in self.directions.items():
            numbers = (one.norm, one.midpoint, one.gap, self.doses[layer])
            if not all(map(math.isfinite, numbers)) or not bool(one.vector.isfinite().all()):
                raise WrongInput(f"the vector at {one.site} {layer} is not finite")

    @property
    def site(self) -> str:
        return next(iter(self.directions.values())).site

    @property
    def only(self) -> Direction:
        """The direction, where there is one.

        Raises:
            WrongInput: there are several.
        """
        if len(self.directions) > 1:
            raise WrongInput(f"there are {len(self.directions)} vectors, at layers {self._layers}; choose one")
        return next(iter(self.directions.values()))

    def at(self, layer: int) -> Vectors:
        """The vector of one layer alone.

        Raises:
            WrongInput: there is none.
        """
        if layer not in self.directions:
            raise WrongInput(f"there is no vector at layer {layer}; there are some at {self._layers}")
        return Vectors(
            directions={layer: self.directions[layer]}, doses={layer: self.doses[layer]}, provenance=self.provenance
        )

    @property
    def _layers(self) -> str:
        return ", ".join(map(str, sorted(self.directions)))

    def frame(self) -> pd.DataFrame:
        """One row for each vector: layer, site, norm, dose, method, behavior, n."""
        rows = [
            {"layer": i, "site": one.site, "norm": one.norm, "dose": self.doses[i], "method": one.method,
             "behavior": one.behavior, "n": one.n}
            for i, one in sorted(self.directions.items())
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        about = self.provenance
        layers = f"layer{'s' if len(self.directions) > 1 else ''} {self._layers}"
        what = about.behavior or about.source or "a behaviour without a name"
        return f"{about.status}: {what} on {about.model} ({about.weights_hash}) at {self.site}, {layers}"


def architecture_of(model: HybridModel) -> Architecture:
    """The architecture of a loaded model."""
    return _architecture(model.config)


def read_architecture(source: str) -> Architecture:
    """The architecture of a model from its configuration alone; no weights are read.

    Raises:
        WrongInput: there is no configuration at that name.
    """
    path = ORGANISMS.get(source, Path(source))
    hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and path.suffix != ".gguf"
    if not path.exists() and not hub_id:
        raise WrongInput(f"no model at '{source}'")
    folder, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()[0]
        raise WrongInput(f"cannot read the configuration of model '{source}': {said}") from error
    return _architecture(getattr(config, "text_config", None) or config)


def _architecture(config: Any) -> Architecture:
    return Architecture(model_type=config.model_type, hidden_size=config.hidden_size, layers=config.num_hidden_layers)


def note_of(vectors: Vectors) -> dict[str, Any]:
    """What a file says beside its tensors, as plain values."""
    about = asdict(vectors.provenance)
    entries = []
    for layer, one in sorted(vectors.directions.items()):
        known = {f.name: getattr(one, f.name) for f in fields(one) if f.name not in ("vector", "reliability")}
        reliability = one.reliability.as_dict() if one.reliability else None
        entries.append(
            {**known, "reliability": reliability, "dose": vectors.doses[layer], "vector_hash": vector_hash(one.vector)}
        )
    built = about.pop("architecture")
    note = {
        "format": FORMAT, "version": VERSION, **about, "model_type": built["model_type"],
        "hidden_size": built["hidden_size"], "n_layers": built["layers"], "site": vectors.site, **CONVENTIONS,
        "vectors": entries,
    }  # fmt: skip
    return {**note, "note_hash": hash_of(note)}


def hash_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values as JSON with sorted keys and no spaces (first 16 hex digits)."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def vectors_from(path: Path, note: Mapping[str, Any], tensors: Mapping[int, Tensor]) -> Vectors:
    """From what a file of ours says and holds."""
    if not isinstance(note, Mapping) or note.get("format") != FORMAT:
        raise WrongInput(f"{path} is not a file of steering vectors: it does not name the format {FORMAT}")
    if note.get("version") != VERSION:
        raise WrongInput(f"{path} has version {note.get('version')!r} of {FORMAT}; this suite reads version {VERSION}")
    try:
        said = {key: value for key, value in note.items() if key != "note_hash" and not key.startswith("vector.")}
        if hash_of(said) != note["note_hash"]:
            raise ValueError("what it says is not what was written")
        entries = {int(entry["layer"]): entry for entry in note["vectors"]}
        if set(entries) != set(tensors):
            raise ValueError(f"it describes layers {sorted(entries)} and holds {sorted(tensors)}")
        directions = {}
        for layer, entry in entries.items():
            if vector_hash(tensors[layer]) != entry["vector_hash"]:
                raise ValueError(f"the vector of layer {layer} is not the one that was written")
            directions[layer] = _direction(entry, tensors[layer])
        if note["status"] not in get_args(Status):
            raise ValueError(f"its status is {note['status']!r}")
        given = {f.name: note[f.name] for f in fields(Provenance) if f.name != "architecture"}
        built = Architecture(
            model_type=note["model_type"], hidden_size=note["hidden_size"], layers=note["n_layers"]
        )  # fmt: skip
        doses = {layer: float(entry["dose"]) for layer, entry in entries.items()}
        return Vectors(directions=directions, doses=doses, provenance=Provenance(architecture=built, **given))
    except (KeyError, TypeError, ValueError) as error:
        raise WrongInput(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _direction(entry: Mapping[str, Any], vector: Tensor) -> Direction:
    """A direction from its fields as JSON gives them."""
    given = {f.name: entry[f.name] for f in fields(Direction) if f.name in entry and f.name != "reliability"}
    found, heads = entry.get("reliability"), entry["heads"]
    given |= {"shape": tuple(entry["shape"]), "heads": None if heads is None else tuple(heads)}
    if given["shape"] and math.prod(given["shape"]) != vector.numel():
        raise ValueError(f"a vector of shape {given['shape']} has {vector.numel()} elements")
    return Direction(**{**given, "vector": vector, "reliability": Estimate(**found) if found else None})


def read_direction(path: Path) -> tuple[Direction, str]:
    """A direction as `save_direction` wrote it and the hash of its weights, without a model to hold them against."""
    try:
        metadata = read_metadata(path)
        return _direction(metadata, read_tensors(path)["vector"]), str(metadata["weights_hash"])
    except (KeyError, TypeError, ValueError) as error:
        raise WrongInput(f"{path} is not a direction") from error


def layer_of(path: Path, name: str) -> int:
    """The layer that a tensor's name says.

    Raises:
        WrongInput: it is not `direction.LAYER`.
    """
    found = re.fullmatch(r"direction\.(\d{1,9})", name)
    if found is None and name == "vector":
        raise WrongInput(
            f"{path} is a run's own direction: export the run (dispositions export RUN FILE) and import that"
        )
    if found is None:
        raise WrongInput(f"{path} is not a file of steering vectors: a tensor is called {name!r}, not direction.LAYER")
    return int(found[1])
