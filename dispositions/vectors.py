"""The commands for steering vectors as files: `export` and `import`."""

from __future__ import annotations

import filecmp
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from dispositions.asked import Device, Dtype
from dispositions.runs import checked, claimed, model_slug, slug
from probes.directions import save_direction
from probes.errors import WrongInput
from probes.model import load
from probes.provenance import Vectors, note_of
from probes.store import library_versions, write_json
from probes.vectors import SUFFIXES, export_vectors, import_vectors, read_run

PROVENANCE = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the direction of a run to a file that says what it is: for other programs, or for llama.cpp.

    A .safetensors file holds the unit vector with its provenance: model and weights, layer, what one dose is, the
    working dose, the verdict. A .gguf file is a control vector of llama.cpp with the same beside it, scaled so that its
    option `--control-vector FILE` adds the working dose; it takes directions of the residual stream, from layer 1 on.
    Loads no model. Exit code 2 where the verdict is not PASS.

    dispositions export runs/demo follow.safetensors

    dispositions export runs/sentiment-en-SmolLM2-135M-Instruct.Q4_1 kind.gguf

    dispositions export runs/mine draft.gguf --unverified
    """

    run_folder: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder of `dispositions verify`, such as runs/demo."""
    out: Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
    """The file to write, ending in .safetensors or .gguf."""
    unverified: bool = False
    """Export whatever the verdict is; the file then says "unverified"."""
    model: str | None = None
    """Where the model is now, if it is not where it was judged. Only its configuration is read."""

    def run(self) -> int:
        if self.out.suffix not in SUFFIXES:
            raise WrongInput(f"OUT must end in {' or '.join(SUFFIXES)}, saw '{self.out}'")
        vectors = read_run(self.run_folder, model=self.model, unverified=self.unverified)
        with tempfile.TemporaryDirectory() as folder:
            fresh = export_vectors(vectors, Path(folder) / f"vectors{self.out.suffix}")
            if self.out.exists():
                if not self.out.is_file() or not filecmp.cmp(fresh, self.out, shallow=False):
                    raise WrongInput(f"'{self.out}' exists and is something else; choose another OUT or remove it")
                print(f"{self.out} holds this already")
            else:
                export_vectors(vectors, self.out)
        _show(vectors)
        if self.out.suffix == ".gguf":
            layer, phase = vectors.only.layer, vectors.provenance.phase
            judged = "as it was judged" if phase == "both" else f"where it was judged in phase {phase}"
            print(f"llama.cpp adds it after block {layer} at every token (phase both), {judged}:")
            print(f"llama-cli --model MODEL.gguf --control-vector {self.out}")
        print(self.out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Import:
    """Read steering vectors from a file into a run folder, for a model.

    Takes what `dispositions export` writes, on the same weights only, and .gguf control vectors of llama.cpp or repeng
    that fit the model; these are "unverified", and the norm of their doses is measured on general text. Writes
    direction.safetensors, or direction-LAYER.safetensors where there are several, and provenance.json. Exit code 2 for
    a file that is damaged or made for another model.

    dispositions import follow.gguf --model organism --out runs/imported

    dispositions import happy.gguf --model ./my-qwen3.5 --out runs/happy

    dispositions import happy.gguf --model ./my-qwen3.5 --layer 12 --norm 31.5 --out runs/happy-12
    """

    file: Annotated[Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A .safetensors or .gguf file."""
    model: str
    """organism, organism-state, organism-attention, a local folder, a .gguf file or a hub id."""
    out: Path | None = None
    """Folder of the run; when not given runs/import-FILE-MODEL. A finished import is not repeated."""
    layer: int | None = None
    """Take the vector of this layer alone; auto takes all."""
    norm: float | None = None
    """Typical size of the residual stream, for a control vector made elsewhere; auto measures it."""
    anyway: bool = False
    """Take a control vector made elsewhere although its model hint or number of layers are another model's."""
    device: Device = "cpu"
    dtype: Dtype = "auto"

    def run(self) -> int:
        if not self.file.is_file():
            raise WrongInput(f"no such file: {self.file}")
        model = load(self.model, device=self.device, dtype=self.dtype)
        vectors = import_vectors(self.file, model, norm=self.norm, anyway=self.anyway)
        if self.layer is not None:
            vectors = vectors.at(self.layer)
        out = checked(self.out, Path("runs") / f"import-{slug(self.file.name)}-{model_slug(self.model)}")
        asked = {
            "kind": "import", "file": self.file.name,
            "file_hash": hashlib.sha256(self.file.read_bytes()).hexdigest()[:16], **model.identity,
            "layer": self.layer, "norm": self.norm, "versions": library_versions(),
        }  # fmt: skip
        with claimed(out, asked, PROVENANCE, model) as finished:
            if not finished:
                for layer, direction in vectors.directions.items():
                    name = "direction" if len(vectors.directions) == 1 else f"direction-{layer}"
                    save_direction(direction, out / f"{name}.safetensors", weights_hash=model.weights_hash)
                write_json(out / PROVENANCE, note_of(vectors))
        _show(vectors)
        print(out)
        return 0


def _show(vectors: Vectors) -> None:
    print(vectors)
    print(vectors.frame().round(4).to_string(index=False))
