"""Capture: run prompts through a model and record its sites.

One forward pass per batch, one nnsight trace around it, and inside the trace only what was asked for is copied out:
the positions wanted, at the layers wanted. Where nothing is wanted after some layer, the pass stops there.

    states = capture(model, prompts, sites=("resid", "gdn.state"))
    states["resid", 5]         # [prompt, d_model]
    states["gdn.state", 4]     # [prompt, v_head, d_k, d_v]

Prompts are batched by length and padded on the left. Every value is taken from a prompt's own tokens by position, so
padding never enters a result, and a prompt gives the same numbers alone as in company (to 1e-5 in float32).

`resid` is read where the next layer reads it, so an edit made by a PyTorch hook on the layer is seen. `mixer` and
`mlp` are what the block itself computed: nnsight reads them before such a hook runs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from probes.errors import WrongInput
from probes.model import HybridModel, Layer
from probes.prompts import SPANS, Batch, Prompt, Span, batches
from probes.sites import SITES, resolve, site
from probes.store import (
    RECIPE,
    Capture,
    Part,
    library_versions,
    open_capture,
    read_json,
    read_part,
    recipe_differs,
    write_json,
    write_tensors,
)

__all__ = ["POSITIONS", "Capture", "capture", "prompts_hash"]

POSITIONS = ("last", "all", *(f"mean:{span}" for span in SPANS))
Layers = Sequence[int] | Mapping[str, Sequence[int]] | None


def capture(
    model: HybridModel,
    prompts: Sequence[Prompt],
    *,
    sites: Sequence[str] = ("resid",),
    layers: Layers = None,
    positions: str = "last",
    out: str | Path | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Capture:
    """Record sites over prompts, without gradients.

    Args:
        model: in eval mode.
        prompts: at least one; results keep their order.
        sites: names from `probes.sites.SITES`.
        layers: 0-based indices that must exist for every site; or such indices by site (a site that is left out gets
            all of its layers); or None, for every layer that has the site.
        positions: "last" (the last prompt token), "all" (every token; one tensor for each prompt), or "mean:context",
            "mean:direction", "mean:decision" (mean over the tokens of that span, summed in float32 and given in the
            model's dtype). `gdn.state` is the state after the last token, whatever is said here.
        out: a folder to stream finished batches to. An interrupted capture resumes there: whole batches are not
            computed again, and the bytes are those of an uninterrupted run. Without it everything stays in memory.
        batch_tokens: at most this many tokens, with padding, in one forward pass. With `gdn.state` a batch holds one
            state for each prompt and GDN layer (27B: 151 MiB a prompt), so lower it for short prompts.
        progress: show a progress bar over batches.

    Raises:
        WrongInput: unknown site, layer or positions; no prompts; a prompt without tokens in the span; the model is in
            training mode; `out` holds something else or another capture (the message names the first difference).
    """
    names = _sites(sites)
    plan = {name: resolve(model, name, layers.get(name) if isinstance(layers, Mapping) else layers) for name in names}
    if isinstance(layers, Mapping) and (extra := sorted(set(layers) - set(names))):
        raise WrongInput(f"layers were given for '{extra[0]}', which is not captured; captured are {', '.join(names)}")
    windows = [_window(prompt, positions, number) for number, prompt in enumerate(prompts)]
    if not windows:
        raise WrongInput("no prompts were given")
    if batch_tokens < 1:
        raise WrongInput(f"batch_tokens must be at least 1, saw {batch_tokens}")
    if model.hf.training:
        raise WrongInput(f"{model.name} is in training mode; call model.hf.eval() before a capture")
    recipe = {
        "kind": "capture",
        "model": model.name,
        "weights_hash": model.weights_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "prompts": len(prompts),
        "prompts_hash": prompts_hash(prompts),
        "layers": {name: list(chosen) for name, chosen in plan.items()},
        "positions": positions,
        "batch_tokens": batch_tokens,
        "versions": library_versions(),
    }
    taps = _taps(model, plan)
    folder = None if out is None else _prepare(Path(out), recipe)
    work = list(batches(model, [prompt.ids for prompt in prompts], batch_tokens=batch_tokens))
    parts = []
    for number, batch in enumerate(tqdm(work, desc="capture", unit="batch", disable=not progress)):
        path = folder / f"batch-{number:05d}.safetensors" if folder else None
        if path and _is_whole(path, batch):
            continue
        spots = [_shifted(windows[row], batch.offset(i)) for i, row in enumerate(batch.rows)]
        lengths = tuple(len(prompts[row]) for row in batch.rows)
        tensors = _record(model, batch, taps, spots, positions)
        if path:
            write_tensors(path, tensors, {"rows": batch.rows, "lengths": lengths})
        else:
            parts.append(Part(rows=batch.rows, lengths=lengths, tensors=tensors))
    return open_capture(folder) if folder else Capture(recipe=recipe, parts=tuple(parts))


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over token ids and spans, in order (first 16 hex digits)."""
    content = [[list(prompt.ids), [list(prompt.spans[span]) for span in SPANS]] for prompt in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _sites(names: Sequence[str]) -> tuple[str, ...]:
    wanted = {site(name).name for name in ((names,) if isinstance(names, str) else names)}
    if not wanted:
        raise WrongInput(f"no sites were given; allowed are {', '.join(SITES)}")
    return tuple(name for name in SITES if name in wanted)


def _window(prompt: Prompt, positions: str, number: int) -> Span:
    """The tokens to read, as (start, stop) in the unpadded prompt."""
    if positions not in POSITIONS:
        raise WrongInput(f"unknown positions '{positions}'; allowed are {', '.join(POSITIONS)}")
    if not len(prompt):
        raise WrongInput(f"prompt {number} has no tokens")
    if positions == "last":
        return len(prompt) - 1, len(prompt)
    if positions == "all":
        return 0, len(prompt)
    span = positions.removeprefix("mean:")
    start, stop = prompt.spans[span]
    if not 0 <= start < stop <= len(prompt):
        raise WrongInput(f"prompt {number} has no tokens in its {span}; its spans are {dict(prompt.spans)}")
    return start, stop


def _shifted(window: Span, offset: int) -> Span:
    return window[0] + offset, window[1] + offset


def _prepare(folder: Path, recipe: dict[str, Any]) -> Path:
    """Make the folder ready for batches of this recipe, or refuse it."""
    if folder.exists() and not folder.is_dir():
        raise WrongInput(f"{folder} is a file; a capture needs a folder")
    if not (folder / RECIPE).exists():
        if any(folder.glob("batch-*.safetensors")):
            raise WrongInput(f"{folder} holds batches of a capture but no {RECIPE}; give another folder")
        write_json(folder / RECIPE, recipe)
        return folder
    if difference := recipe_differs(read_json(folder / RECIPE), recipe):
        raise WrongInput(f"{folder} holds another capture: {difference}")
    for stale in folder.glob(".batch-*.tmp"):  # what a killed run left behind
        stale.unlink(missing_ok=True)
    return folder


def _is_whole(path: Path, batch: Batch) -> bool:
    if not path.exists():
        return False
    try:
        return read_part(path).rows == batch.rows
    except WrongInput:  # cut short by something that does not rename, such as a copy to a full disk
        return False


@dataclass(frozen=True, kw_only=True)
class _Tap:
    """One tensor to read: under which name, where in the model, and how."""

    name: str
    envoy: Any
    end: Literal["input", "output", "heads", "state"]
    layer: int


def _taps(model: HybridModel, plan: Mapping[str, Sequence[int]]) -> list[_Tap]:
    """What to read, in the order in which the forward pass meets it (nnsight refuses any other order)."""
    modules: dict[str, Callable[[Layer], tuple[Any, Any]]] = {
        "attn.heads": lambda layer: (_output_projection(layer), "heads"),
        "mixer": lambda layer: (layer.mixer, "output"),
        "mlp": lambda layer: (layer.mlp, "output"),
        "resid": lambda layer: (_next_reader(model, layer), "input"),
    }
    taps = []
    for layer in model.layers:
        for name, place in modules.items():
            if layer.index in plan.get(name, ()):
                module, end = place(layer)
                envoy = model.envoy_of(module)
                taps.append(_Tap(name=f"{name}.{layer.index}", envoy=envoy, end=end, layer=layer.index))
    for index in plan.get("gdn.state", ()):  # from the cache that comes back with the model's own output
        taps.append(_Tap(name=f"gdn.state.{index}", envoy=model.envoy, end="state", layer=index))
    return taps


def _output_projection(layer: Layer) -> Any:
    if not hasattr(layer.mixer, "o_proj"):
        raise WrongInput(f"site 'attn.heads' needs o_proj, which {type(layer.mixer).__name__} of {layer} has not")
    return layer.mixer.o_proj


def _next_reader(model: HybridModel, layer: Layer) -> Any:
    """The module that takes a layer's residual stream: the next layer, or the final norm."""
    last = layer.index == len(model.layers) - 1
    return model.decoder.norm if last else model.layers[layer.index + 1].block


def _record(
    model: HybridModel, batch: Batch, taps: Sequence[_Tap], spots: Sequence[Span], positions: str
) -> dict[str, Tensor]:
    """One forward pass, one trace. The tensors are on the CPU, without padding, batch rows along their first axis."""
    wants_state = taps[-1].end == "state"
    options: dict[str, Any] = {"use_cache": wants_state}
    if "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        options["logits_to_keep"] = 1
    heads = model.config.num_attention_heads
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        with model.envoy.trace(**batch.inputs, **options) as tracer:
            for tap in taps:
                if tap.end == "state":
                    kept[tap.name] = _state(tap.envoy.output.past_key_values, tap.layer)
                elif tap.end == "output":
                    kept[tap.name] = _chosen(_first(tap.envoy.output), spots, positions)
                elif tap.end == "input":
                    kept[tap.name] = _chosen(tap.envoy.input, spots, positions)
                else:
                    kept[tap.name] = _chosen(tap.envoy.input, spots, positions).unflatten(-1, (heads, -1))
            if not wants_state:
                tracer.stop()  # nothing after the last tap is computed
    return {name: tensor.cpu() for name, tensor in kept.items()}


def _first(output: Any) -> Tensor:
    """The tensor of a module's output; attention blocks return (output, weights)."""
    return output[0] if isinstance(output, tuple) else output


def _state(cache: Any, layer: int) -> Tensor:
    """The recurrent state [prompt v_head d_k d_v] of one GDN layer, float32, from transformers' cache."""
    states = getattr(cache.layers[layer], "recurrent_states", None) if cache is not None else None
    state = states[0] if isinstance(states, dict) else states
    if state is None:
        versions = library_versions()
        raise RuntimeError(f"transformers {versions['transformers']} returned no recurrent state for layer {layer}")
    return state.to(torch.float32)


def _chosen(
    values: Float[Tensor, "prompt token feature"], spots: Sequence[Span], positions: str
) -> Float[Tensor, "row feature"]:
    """What is wanted of one batch: a copy, so that the full tensor can be freed.

    One row for each prompt, or for "all" the prompts' tokens one after the other. Tokens are sliced out rather than
    weighted: zero times a padding token's value would still be NaN if that value were.
    """
    if positions == "last":
        return values[:, -1].clone()
    rows = [values[i, start:stop] for i, (start, stop) in enumerate(spots)]
    if positions == "all":
        return torch.cat(rows)
    wide = torch.promote_types(values.dtype, torch.float32)
    return torch.stack([row.to(wide).mean(0) for row in rows]).to(values.dtype)
