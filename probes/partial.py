"""Run a decoder from a layer on, when what comes before it is known.

An intervention at layer L leaves every layer below L as it was. So the residual stream that enters L is recorded once
(`recording`), and a run under an intervention begins there (`starting_at`): the blocks below return at once, and the
last of them hands on the recorded stream. Everything else - masks, rotary angles, caches, the norm and the output
layer - is transformers' own code, run by its own forward. A cache that such a run fills or continues is only right
from L on; `joined` puts the layers below it in from elsewhere.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.model import HybridModel
from probes.taps import GDN_KERNELS

CHUNK = 32  # tokens: the fastest of 8 to 64 for prompts of 60 on a CPU


@contextmanager
def starting_at(model: HybridModel, layer: int, stream: Float[Tensor, "prompt token d_model"]) -> Iterator[None]:
    """While the block runs, the decoder's blocks below `layer` do nothing, and `layer` is entered with `stream`.

    With `layer` 0 everything runs; with as many as there are layers only the final norm and the output layer do.
    PyTorch hooks on skipped blocks are called as ever, so an edit of the stream *after* block L - 1 works on `stream`.
    """
    with ExitStack() as stack:
        for below in model.layers[:layer]:
            last = below.index == layer - 1

            def skip(hidden_states: Tensor, *args: Any, _last: bool = last, **kwargs: Any) -> Tensor:
                return stream if _last else hidden_states

            stack.enter_context(_replaced(below.block, skip))
        yield


@contextmanager
def fitting_chunks(model: HybridModel) -> Iterator[None]:
    """While the block runs, the gated delta rule is computed in chunks that fit short sequences.

    transformers pads every sequence to chunks of 64 tokens, so an answer of 8 costs as much as a prompt of 64. The
    padding adds nothing, so smaller chunks give the same numbers to rounding (1e-6 of a state, tests/test_partial.py).
    """
    mixers = {type(layer.mixer).__module__ for layer in model.of_kind("gdn")}
    with ExitStack() as stack:
        for names in (vars(sys.modules[module]) for module in mixers):
            stack.enter_context(_renamed(names, GDN_KERNELS[0], partial(_in_chunks, names[GDN_KERNELS[0]])))
        yield


def _in_chunks(kernel: Any, query: Tensor, *args: Any, **options: Any) -> Any:
    tokens = max(query.shape[1], 1)
    size = min(max(1 << (tokens - 1).bit_length(), 8), CHUNK)
    return kernel(query, *args, **{"chunk_size": size, **options})


@contextmanager
def _renamed(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = before


@contextmanager
def _replaced(block: Any, forward: Any) -> Iterator[None]:
    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


@contextmanager
def recording(model: HybridModel, starts: Collection[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Keep the stream that enters each of some layers (the number of layers: that leaves the last), forward by forward.

    Layer 0 is not recorded, since nothing lies below it.
    """
    found: dict[int, list[Tensor]] = {start: [] for start in starts if start > 0}
    with ExitStack() as stack:
        for start, kept in found.items():

            def keep(_: Any, args: tuple, output: Any, kept: list[Tensor] = kept) -> None:
                kept.append((output[0] if isinstance(output, tuple) else output).detach())

            stack.callback(model.layers[start - 1].block.register_forward_hook(keep).remove)
        yield found


def tiled(cache: Any, times: int, *, each: int = 1, layers: Sequence[int]) -> Any:
    """A copy of a cache in which some layers' rows are repeated: all of them `times` times, then each `each` times.

    The other layers are the cache's own, whatever their rows: for runs that do not reach them.
    """
    return _with_rows(cache, layers, lambda n: torch.arange(n).repeat(times).repeat_interleave(each))


def picked(cache: Any, rows: Sequence[int]) -> Any:
    """A copy of a cache with some of its rows."""
    return _with_rows(cache, range(len(cache.layers)), lambda n: torch.tensor(rows))


def _with_rows(cache: Any, layers: Sequence[int], chosen: Callable[[int], Tensor]) -> Any:
    def grown(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.index_select(0, chosen(value.shape[0]).to(value.device))

    twin = copy.copy(cache)
    twin.layers = list(cache.layers)
    for index in layers:
        layer = twin.layers[index] = copy.copy(cache.layers[index])
        for key, value in vars(layer).items():
            if key in ("keys", "values"):
                setattr(layer, key, grown(value))
            elif isinstance(value, dict):
                setattr(layer, key, {k: grown(v) for k, v in value.items()})
    return twin


def joined(below: Any, above: Any, layer: int) -> Any:
    """A cache with the layers under `layer` from one cache and the others from another; nothing is copied."""
    twin = copy.copy(above)
    twin.layers = [*below.layers[:layer], *above.layers[layer:]]
    return twin
