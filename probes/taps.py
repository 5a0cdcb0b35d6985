"""Taps: stand beside the one call in a layer where tokens meet, and read or change what goes in and what comes out.

Everything in a decoder works on single tokens except one function call in each mixer: the gated delta rule in a GDN
layer, scaled dot-product attention in an attention layer. transformers calls both by a name of its modeling module. A
tap takes that name's place while its own layer runs, and only then: no weight, no other layer and no other model
notices, and when the block ends nothing is left. PyTorch hooks cannot do this, since the call is not a module.

    def double_the_values(call, run):
        return run(replace(call, v=2 * call.v))

    with tapped(model, {4: double_the_values}):
        model.hf(...)

A tap is handed the call and `run`, which performs it; it may call `run` once, several times on pieces (a GDN call can
be split between tokens, the state handed on), or not at all. Taps nest: the one that was set last is nearest to the
kernel, so a recording that starts inside an intervention sees what the intervention makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.errors import WrongInput
from probes.model import HybridModel, Layer

GDN_KERNELS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
ATTENTION_TABLE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, kw_only=True, eq=False)
class GDNCall:
    """One call of the gated delta rule, as the model makes it.

    Attributes:
        q, k: after the convolution, not yet normalised, in the model's dtype.
        v: after the convolution.
        decay: log decay, <= 0, float32. beta: write strength in (0, 1).
        state: the state before the first of these tokens, float32; None for zeros.
        continued: whether the forward continues a cache (decoding), rather than starting a sequence (prefill).
        first: where in the forward these tokens begin; 0 unless the call was split. forward: tokens of the forward.
        memory: the layer's place in the cache that the forward continues or fills, the same object from token to token
            whatever becomes of the tensors in it; None without a cache.
        mask: 1 for real tokens, 0 for padding; None when every token is real.
        options: what else the kernel is told.
    """

    q: Float[Tensor, "prompt token head d_k"]
    k: Float[Tensor, "prompt token head d_k"]
    v: Float[Tensor, "prompt token v_head d_v"]
    decay: Float[Tensor, "prompt token v_head"]
    beta: Float[Tensor, "prompt token v_head"]
    state: Float[Tensor, "prompt v_head d_k d_v"] | None
    continued: bool
    first: int
    forward: int
    memory: Any
    mask: Int[Tensor, "prompt token"] | None
    options: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        return self.v.shape[1]

    def between(self, start: int, stop: int, *, state: Tensor | None) -> GDNCall:
        """The call for some of the tokens, from a given state."""
        part = slice(start, stop)
        return replace(
            self, q=self.q[:, part], k=self.k[:, part], v=self.v[:, part], decay=self.decay[:, part],
            beta=self.beta[:, part], state=state, mask=None if self.mask is None else self.mask[:, part],
            first=self.first + start,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One call of attention. q are the new tokens' queries; k and v include what a cache held (after rotation).

    `mask` is what the implementation in use understands: boolean or additive, [prompt 1 query key], or None for plain
    causal attention.
    """

    q: Float[Tensor, "prompt head query d_head"]
    k: Float[Tensor, "prompt kv_head key d_head"]
    v: Float[Tensor, "prompt kv_head key d_head"]
    mask: Tensor | None
    scaling: float


Run = Callable[[Any], tuple[Tensor, Any]]
Tap = Callable[[Any, Run], tuple[Tensor, Any]]
"""(call, run) -> (outputs [prompt token head d], what comes with them: the final state, or attention weights)."""


@contextmanager
def tapped(model: HybridModel, taps: Mapping[int, Tap]) -> Iterator[None]:
    """Put a tap into each of some layers while the block runs.

    Args:
        taps: by layer index; a GDN layer's tap gets a `GDNCall`, an attention layer's an `AttentionCall`.

    Raises:
        WrongInput: a layer is out of range.
        RuntimeError: a tapped layer ran without making the call, because something else has rewritten its forward
            (an nnsight trace that used `.source`, a compiled model) or transformers has renamed it.
    """
    for index in taps:
        if not 0 <= index < len(model.layers):
            raise WrongInput(f"layer {index} is out of range: {model.name} has layers 0 to {len(model.layers) - 1}")
    handles = []
    try:
        for index, tap in taps.items():
            handles += _Switch(model.layers[index], tap).install()
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Switch:
    """Replaces names in a mixer's modeling module when the mixer starts, and puts them back when it ends."""

    def __init__(self, layer: Layer, tap: Tap):
        self.layer, self.tap, self.met = layer, tap, False
        self.names = vars(sys.modules[type(layer.mixer).__module__])
        self.wanted = GDN_KERNELS if layer.kind == "gdn" else (ATTENTION_TABLE,)
        self.replaced: dict[str, Any] = {}
        if absent := [name for name in self.wanted if name not in self.names]:
            raise RuntimeError(f"{type(layer.mixer).__module__} has no {absent[0]}: its transformers is not supported")

    def install(self) -> list[Any]:
        mixer = self.layer.mixer
        # Later taps start earlier and end later, so that names are put back in the order opposite to their replacement.
        return [
            mixer.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True),
            mixer.register_forward_hook(self.end, always_call=True),
        ]

    def start(self, mixer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.met, stand_in = False, _Recurrence if self.layer.kind == "gdn" else _Table
        for name in self.wanted:
            self.replaced[name] = self.names[name]
            self.names[name] = stand_in(self.replaced[name], self, kwargs)

    def end(self, mixer: Any, args: tuple, output: Any) -> None:
        self.names.update(self.replaced)
        self.replaced.clear()
        # `output` is None when the forward raised: its own error is the one to see
        if output is not None and not self.met:
            raise RuntimeError(f"{self.layer} ran without the call that is tapped: was its forward rewritten?")

    def handle(self, call: Any, run: Run) -> Any:
        self.met = True
        return self.tap(call, run)


class _Recurrence:
    """In the place of a gated delta rule, for one layer and as long as it runs."""

    def __init__(self, original: Any, switch: _Switch, given: Mapping[str, Any]):
        self.original, self.switch, self.mask = original, switch, given.get("attention_mask")
        layers = getattr(given.get("cache_params"), "layers", None)
        self.memory = layers[switch.layer.index] if layers is not None else None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **options: Any) -> Any:
        wants_state, state = options.pop("output_final_state", False), options.pop("initial_state", None)
        call = GDNCall(
            q=query, k=key, v=value, decay=g, beta=beta, state=state, continued=state is not None, first=0,
            forward=value.shape[1], memory=self.memory, mask=_whole(self.mask, query), options=options,
        )  # fmt: skip
        outputs, final = self.handle(call)
        return outputs, final if wants_state else None

    def handle(self, call: GDNCall) -> Any:
        return self.switch.handle(call, self.run)

    def run(self, call: GDNCall) -> Any:
        if isinstance(self.original, _Recurrence):  # an earlier tap
            return self.original.handle(call)
        return self.original(
            call.q, call.k, call.v, g=call.decay, beta=call.beta, initial_state=call.state, output_final_state=True,
            **call.options,
        )  # fmt: skip


def _whole(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask of these tokens, as integers; None where it hides nothing."""
    if mask is None or mask.shape != query.shape[:2] or bool(mask.all()):
        return None
    return mask.long()


class _Table:
    """In the place of transformers' table of attention functions, for one layer and as long as it runs."""

    def __init__(self, original: Any, switch: _Switch, given: Mapping[str, Any]):
        self.original, self.switch = original, switch

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = self.original.get_interface(name, default)

        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            def run(part: AttentionCall) -> tuple[Tensor, Tensor | None]:
                return function(module, part.q, part.k, part.v, part.mask, **{**options, "scaling": part.scaling})

            call = AttentionCall(q=query, k=key, v=value, mask=mask, scaling=options["scaling"])
            return self.switch.handle(call, run)

        return attention


def without_padding(call: GDNCall) -> GDNCall:
    """The same call, with padding that leaves the state alone: plain padding writes nothing, but it decays."""
    if call.mask is None:
        return call
    real = call.mask[..., None].to(call.decay.dtype)
    return replace(call, decay=call.decay * real, beta=call.beta * real.to(call.beta.dtype))


def causal_pattern(call: AttentionCall, rows: Int[Tensor, "prompt n"]) -> Float[Tensor, "prompt head n key"]:
    """Attention weights of some queries, float32: softmax(q k^T x scaling) under the call's own mask.

    Args:
        rows: indices of queries among the new tokens.
    """
    index = rows[:, None, :, None].expand(-1, call.q.shape[1], -1, call.q.shape[-1])
    q = call.q.gather(2, index).float()
    groups = call.q.shape[1] // call.k.shape[1]
    k = call.k.repeat_interleave(groups, 1).float()
    scores = q @ k.transpose(-1, -2) * call.scaling
    past, keys = call.k.shape[2] - call.q.shape[2], torch.arange(call.k.shape[2], device=q.device)
    hidden = keys > (rows + past)[:, None, :, None]
    if call.mask is not None:
        chosen = call.mask.expand(len(rows), -1, -1, -1)[..., : len(keys)]
        chosen = chosen.gather(2, rows[:, None, :, None].expand(-1, chosen.shape[1], -1, chosen.shape[-1]))
        hidden = ~chosen if chosen.dtype == torch.bool else chosen < torch.finfo(chosen.dtype).min / 2
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)
