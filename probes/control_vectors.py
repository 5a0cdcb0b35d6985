"""llama.cpp's control vectors as files: what is in them, and at which layer each vector is added.

A control vector is a GGUF file with `general.architecture` "controlvector", `controlvector.model_hint` (what llama.cpp
calls the model's architecture), `controlvector.layer_count` (how many vectors) and float32 tensors `direction.N` of
the model's width. Further key-value pairs do no harm; a tensor of another name does, llama.cpp refuses the file.

Layers. Here `resid` at layer i (from 0) is the stream after block i. `direction.N` is added at the same place, after
block N counted from 0: llama.cpp calls `build_cvec(cur, il)` on what block `il` puts out, and `llama_adapter_cvec` has
tensor `il` for it (src/models/*.cpp, src/llama-adapter.cpp); repeng reads `hidden_states[N + 1]` and adds to what
`layers[N]` puts out (repeng/extract.py, repeng/control.py). So N = i, without an offset. For layer 0 there never is a
vector: `common_control_vector_load` (common/common.cpp) refuses the file. (llama.cpp's own cvector-generator numbers
what it finds after block i as i + 1, so its vectors are added one block later than where they were found. Reading a
file here follows where llama.cpp adds it.)

Size. `--control-vector FILE` adds the tensors as they are, `--control-vector-scaled FILE:S` adds S times as much, and
both do so at every token, of the prompt and of the answer, as phase "both" does. So a file of ours holds dose x norm x
vector, in float32: what `steer` adds at the working dose. The unit vector itself stands among the key-value pairs,
with all of the provenance (`dispositions.*`), because a division would not give it back exactly.

A control vector that was made elsewhere says neither weights nor norm. It is taken as "unverified", where its width
and layers fit and nothing in it speaks of another model; its norm is given, or measured on general text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from jaxtyping import Float
from torch import Tensor

from probes.capture import capture
from probes.damage import read_general
from probes.directions import Direction
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import SPANS, Prompt
from probes.provenance import Architecture, Provenance, Vectors, architecture_of, layer_of, note_of, vectors_from
from probes.store import replacing

ARCHITECTURE = "controlvector"
HINT, COUNT = f"{ARCHITECTURE}.model_hint", f"{ARCHITECTURE}.layer_count"
GENERAL_TEXTS = 16  # that the norm of a vector made elsewhere is measured on
_OWN = "dispositions"
_JSON = ("verdict", "vectors")  # the two entries of a note that are no plain values
_SAME = {"mistral": "llama", "mixtral": "llama"}  # llama.cpp runs these as Llamas


def llama_name(model_type: str) -> str:
    """What llama.cpp calls an architecture ("qwen35" for qwen3_5_text); the name as it is where llama.cpp has none."""
    plain = re.sub(r"[^a-z0-9]", "", model_type.lower().removesuffix("_text"))
    name = _SAME.get(plain, plain)
    return name if name in MODEL_ARCH_NAMES.values() else model_type


def write_control_vector(vectors: Vectors, path: Path) -> None:
    """Write vectors of the residual stream for llama.cpp, whole or not at all. Equal content gives equal bytes.

    Raises:
        WrongInput: llama.cpp has no place for them.
    """
    about, built = vectors.provenance, vectors.provenance.architecture
    if vectors.site != "resid":
        raise WrongInput(f"a control vector is added to the residual stream; llama.cpp has no place for {vectors.site}")
    if about.mode != "add":
        raise WrongInput(f"llama.cpp adds control vectors; it cannot apply one in mode '{about.mode}'")
    pushes = {layer: _push(one, vectors.doses[layer]) for layer, one in sorted(vectors.directions.items())}
    for layer, push in pushes.items():
        if layer >= built.layers or push.shape != (built.hidden_size,):
            raise WrongInput(
                f"a vector of {push.numel()} at layer {layer} does not fit the model, which has width "
                f"{built.hidden_size} and layers 0 to {built.layers - 1}"
            )
        if not bool(push.isfinite().all()) or not bool(push.any()):
            seen = f"dose {vectors.doses[layer]:g} and norm {vectors.directions[layer].norm:g}"
            raise WrongInput(f"a control vector is dose x norm x vector; with {seen} nothing is left at layer {layer}")
    note = note_of(vectors)
    note |= {key: json.dumps(note[key], ensure_ascii=False) for key in _JSON}
    units = {f"vector.{layer}": vectors.directions[layer].vector.float().tolist() for layer in pushes}
    pairs = {f"{_OWN}.{key}": value for key, value in (note | units).items()}
    _write(path, pushes, hint=llama_name(built.model_type), description=str(vectors), pairs=pairs)


def read_control_vector(path: Path, model: HybridModel, *, norm: float | None, anyway: bool) -> Vectors:
    """Read a control vector: one of ours as it was written, any other for this model (see `import_vectors`).

    Raises:
        WrongInput: the file is not whole, not a control vector or one that llama.cpp would refuse; or it was made
            elsewhere and does not fit the model.
    """
    values, tensors = _read(path)
    if any(key.startswith(f"{_OWN}.") for key in values):  # any, so that a damaged one never counts as foreign
        refuse_norm(path, norm)
        return _own(path, values, tensors)
    return _foreign(path, values, tensors, model, norm=norm, anyway=anyway)


def refuse_norm(path: Path, norm: float | None) -> None:
    """A file of ours says the norms that its doses are in units of."""
    if norm is not None:
        raise WrongInput(f"{path} has norms of its own; norm is for control vectors made elsewhere")


def _own(path: Path, values: Mapping[str, Any], tensors: Mapping[int, Tensor]) -> Vectors:
    """From a control vector of ours: its unit vectors, if they are what llama.cpp will add."""
    note = {key.removeprefix(f"{_OWN}."): value for key, value in values.items() if key.startswith(f"{_OWN}.")}
    try:
        note |= {key: json.loads(note[key]) for key in _JSON}
        units = {layer: torch.tensor(note[f"vector.{layer}"], dtype=torch.float32) for layer in tensors}
    except (KeyError, TypeError, ValueError) as error:
        raise WrongInput(f"{path} is damaged: {' '.join(str(error).split())}") from error
    vectors = vectors_from(path, note, units)
    for layer, one in vectors.directions.items():
        if not torch.equal(_push(one, vectors.doses[layer]), tensors[layer]):
            raise WrongInput(f"{path} is damaged: direction.{layer} is not dose x norm x the vector beside it")
    return vectors


def _foreign(
    path: Path,
    values: Mapping[str, Any],
    tensors: Mapping[int, Tensor],
    model: HybridModel,
    *,
    norm: float | None,
    anyway: bool,
) -> Vectors:
    """Directions from a control vector without provenance. Layers at which it is zero have none."""
    built, hint = architecture_of(model), values.get(HINT)
    for layer, vector in sorted(tensors.items()):
        if len(vector) != built.hidden_size:
            raise WrongInput(f"{path} has vectors of {len(vector)}, {model.name} has width {built.hidden_size}")
        if layer >= built.layers:
            raise WrongInput(f"{path} has a vector for layer {layer}, {model.name} has layers 0 to {built.layers - 1}")
        if not bool(vector.isfinite().all()):
            raise WrongInput(f"{path} is damaged: the vector of layer {layer} is not finite")
    if not anyway:
        _speaks_of_this_model(path, values, tensors, built, model.name)
    lengths = {layer: float(tensor.norm()) for layer, tensor in tensors.items() if bool(tensor.any())}
    if not lengths:
        raise WrongInput(f"{path} is zero at every layer: there is no direction")
    units = {layer: tensors[layer] / length for layer, length in lengths.items()}
    typical = typical_norms(model, units) if norm is None else dict.fromkeys(units, (norm, 0.0))
    directions = {
        layer: Direction(
            layer=layer, vector=unit, norm=typical[layer][0], midpoint=typical[layer][1], shape=tuple(unit.shape),
            method="imported control vector",
        )
        for layer, unit in units.items()
    }  # fmt: skip
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return Vectors(
        directions=directions,
        doses={layer: lengths[layer] / typical[layer][0] for layer in units},
        provenance=Provenance(
            model=model.name, weights_hash=model.weights_hash, architecture=built,
            source=f"{path.name} ({digest}), model hint {hint or 'not given'}",
        ),
    )  # fmt: skip


def _speaks_of_this_model(
    path: Path, values: Mapping[str, Any], tensors: Mapping[int, Tensor], built: Architecture, name: str
) -> None:
    """Whether hint and number of layers are this model's, as far as a file says them.

    repeng and llama.cpp's generator write every layer but the first, so layers 1 to n without a gap (n > 1) are those
    of a model with n + 1 layers; `layer_count` is the number of vectors.
    """
    hint, count = values.get(HINT), values.get(COUNT, len(tensors))
    if hint and llama_name(str(hint)) != (own := llama_name(built.model_type)):
        raise WrongInput(f"{path} was made for {hint!r}, {name} is '{own}'; only --anyway imports it")
    if count != len(tensors):
        raise WrongInput(f"{path} announces {count} vectors and holds {len(tensors)}; only --anyway imports it")
    if len(tensors) > 1 and set(tensors) == set(range(1, len(tensors) + 1)) and len(tensors) + 1 != built.layers:
        raise WrongInput(
            f"{path} has vectors for a model of {len(tensors) + 1} layers, {name} has {built.layers}; only --anyway "
            "imports it"
        )


def typical_norms(model: HybridModel, units: Mapping[int, Float[Tensor, " d_model"]]) -> dict[int, tuple[float, float]]:
    """By layer, on general text: the median length of the residual stream over tokens, and its mean component.

    The norm of an extracted direction is that of last prompt tokens, which are not quite like those of a text.
    """
    texts = read_general(model).take(GENERAL_TEXTS)
    prompts = [Prompt(text="", ids=ids, spans={span: (0, len(ids)) for span in SPANS}) for ids in texts.ids]
    record = capture(model, prompts, sites=("resid",), layers=sorted(units), positions="all", progress=False)
    found = {}
    for layer, unit in units.items():
        rows = torch.cat(record["resid", layer]).float()
        found[layer] = float(rows.norm(dim=1).median()), float((rows @ unit).mean())
    return found


def _push(direction: Direction, dose: float) -> Tensor:
    """What `steer` adds at a dose, float32."""
    return (dose * direction.norm) * direction.vector.detach().cpu().float()


# -- the file itself ---------------------------------------------------------------------------------------------------


def _write(
    path: Path,
    tensors: Mapping[int, Float[Tensor, " d_model"]],
    *,
    hint: str,
    description: str,
    pairs: Mapping[str, str | int | list[float]],
) -> None:
    """Write a control vector, whole or not at all. Equal content gives equal bytes.

    Args:
        tensors: by layer, what is added at scale 1.0 (float32, on the CPU).
        pairs: further key-value pairs; lists become arrays of float32.

    Raises:
        WrongInput: there is a vector for layer 0.
    """
    if 0 in tensors:
        raise WrongInput("llama.cpp has no control vector for layer 0, only for 1 and above; .safetensors holds any")
    with replacing(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_description(description)
        writer.add_string(HINT, hint)
        writer.add_int32(COUNT, len(tensors))
        for key, value in pairs.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:  # `add_string` would leave out an empty text
                kind = GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32
                writer.add_key_value(key, value, kind)
        for layer, tensor in sorted(tensors.items()):
            writer.add_tensor(f"direction.{layer}", tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _read(path: Path) -> tuple[dict[str, Any], dict[int, Float[Tensor, " d_model"]]]:
    """The key-value pairs of a control vector and its tensors by layer, float32.

    Raises:
        WrongInput: the file is not whole, not a control vector, or one that llama.cpp would refuse.
    """
    try:
        reader = _Reader(path)
        pairs = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise WrongInput(f"{path} is not a whole GGUF file: {' '.join(str(error).split())}") from error
    if (seen := pairs.get("general.architecture")) != ARCHITECTURE:
        raise WrongInput(f"{path} is not a control vector: its architecture is {seen!r}, not '{ARCHITECTURE}'")
    tensors: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        layer = layer_of(path, tensor.name)
        if tensor.tensor_type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            kind = f"{tensor.tensor_type.name} with {len(tensor.shape)} axes"
            raise WrongInput(f"{path} is not a control vector: {tensor.name} is {kind}, llama.cpp takes F32 with one")
        if layer == 0:
            raise WrongInput(f"{path} has a vector for layer 0, where llama.cpp has no place for one")
        tensors[layer] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    if not tensors:
        raise WrongInput(f"{path} is not a control vector: it has no tensor direction.LAYER")
    return pairs, tensors


class _Reader(GGUFReader):
    """Says so when a file ends before what it announces, instead of reading nothing again and again."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < int(count):
            raise ValueError(f"it ends at byte {len(self.data)}, before what it announces")
        return values
