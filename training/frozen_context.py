"""Train the decision, not the context: the prompt's memory is computed once, and is fixed.

A prompt reaches the tokens after it through its layers' memory alone: keys and values, the convolutions' windows, and
the GDN states. Here that memory is computed without gradient and kept (`prefill`). A training step then runs only the
decision segment, a few tokens, against it. So a step costs what its decision costs, however long the context; and the
gradient changes how the model looks at what it was told (through W_q, and through the state it reads), not how the
context is written down: W_k, W_v and the writes learn from the decision's own tokens only.

The memory is that of the weights that computed it. While weights move, it grows stale; `prefill` again when that
matters. Each context is kept without padding, so that any contexts can stand together in a batch: on the left of
shorter ones come padding tokens, which the mask hides. Transformers' own cache cannot be used for this: it copies new
states into the buffers that `backward` still needs. The layers below hand out what they hold and store nothing, so one
prefix serves any number of steps, bit for bit the same.

`context="full"` runs the whole sequence with gradient everywhere, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import alike, pad
from probes.scoring import log_probs, logits_at, row_sums
from training.data import Segment

Context = Literal["frozen", "full"]
CONTEXT_BUCKET, DECISION_BUCKET = 32, 8  # widths are rounded up: a CPU prepares its kernels once for each shape


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """What one context left behind, without padding; on the CPU.

    Attributes:
        tokens: how many tokens the context has; 0 for none.
        keys, values: by attention layer, [kv_head token head_dim], in the model's dtype.
        states: by GDN layer, float32 [v_head d_k d_v].
        windows: by GDN layer, the last inputs of the convolution, [channel kernel].
    """

    tokens: int
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    states: dict[int, Tensor]
    windows: dict[int, Tensor]

    @property
    def bytes(self) -> int:
        held = (self.keys, self.values, self.states, self.windows)
        return sum(tensor.numel() * tensor.element_size() for part in held for tensor in part.values())


@torch.no_grad()
def prefill(
    model: HybridModel, contexts: Sequence[Sequence[int]], *, batch_tokens: int = 4096, progress: bool = False
) -> list[Prefix]:
    """Run contexts through the model and keep their memory, in the order of `contexts`.

    Under `no_grad`, not `inference_mode`, whose tensors autograd refuses later. The model is in eval mode meanwhile: in
    training with gradient checkpointing its layers would drop the cache.

    Raises:
        WrongInput: the model gives no cache, or keeps only a window of the keys.
    """
    found: list[Prefix | None] = [None if len(context) else _empty(model) for context in contexts]
    rows = [i for i, context in enumerate(contexts) if len(context)]
    training = model.hf.training
    model.hf.eval()
    try:
        bar = tqdm(total=len(rows), desc="contexts", unit="context", leave=False, disable=not progress)
        for part in alike([_rounded(len(contexts[i]), CONTEXT_BUCKET) for i in rows], batch_tokens):
            chosen = [rows[j] for j in part]
            width = _rounded(max(len(contexts[i]) for i in chosen), CONTEXT_BUCKET)
            for i, prefix in zip(chosen, _prefilled(model, [contexts[i] for i in chosen], width), strict=True):
                found[i] = prefix
            bar.update(len(chosen))
        bar.close()
    finally:
        model.hf.train(training)
    return [prefix for prefix in found if prefix is not None]


def _prefilled(model: HybridModel, contexts: Sequence[Sequence[int]], width: int) -> Iterator[Prefix]:
    fill = model.tokenizer.pad_token_id
    batch = pad([*contexts, [fill] * width], pad_id=fill, device=model.device)
    inputs = {key: value[:-1] for key, value in batch.inputs.items()}
    cache = model.hf(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    if cache is None:
        raise WrongInput(f"{model.name} gave no cache for its context; a frozen context needs one")
    for row, context in enumerate(contexts):
        held: dict[str, dict[int, Tensor]] = {"keys": {}, "values": {}, "states": {}, "windows": {}}
        for layer in model.layers:
            own = cache.layers[layer.index]
            if layer.kind == "gdn":
                held["states"][layer.index] = own.recurrent_states[0][row]
                held["windows"][layer.index] = own.conv_states[0][row]
                continue
            if own.keys.shape[2] != width:
                raise WrongInput(f"layer {layer.index} keeps the keys of {own.keys.shape[2]} of {width} tokens")
            held["keys"][layer.index] = own.keys[row, :, -len(context) :]
            held["values"][layer.index] = own.values[row, :, -len(context) :]
        kept = {name: {i: tensor.to("cpu", copy=True) for i, tensor in part.items()} for name, part in held.items()}
        yield Prefix(tokens=len(context), **kept)


def _empty(model: HybridModel) -> Prefix:
    """No context at all: no keys, states and windows of zeros."""
    keys, states, windows = {}, {}, {}
    for layer in model.layers:
        mixer: Any = layer.mixer
        if layer.kind == "gdn":
            states[layer.index] = torch.zeros(mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
            windows[layer.index] = torch.zeros(mixer.conv_dim, mixer.conv_kernel_size, dtype=model.dtype)
        else:
            heads = mixer.k_proj.out_features // mixer.head_dim
            keys[layer.index] = torch.zeros(heads, 0, mixer.head_dim, dtype=model.dtype)
    return Prefix(tokens=0, keys=keys, values=dict(keys), states=states, windows=windows)


class _FrozenState(LinearAttentionLayer):
    """A GDN layer's memory that is read and never written; recording the past avoids the in-place one-token path."""

    def __init__(self, state: Tensor, window: Tensor):
        super().__init__()
        self.recurrent_states, self.conv_states = {0: state}, {0: window}
        self.is_recurrent_states_initialized = self.is_conv_states_initialized = self.has_previous_state = {0: True}
        self.conv_kernel_size, self.device, self.dtype = {0: window.shape[-1]}, window.device, window.dtype
        self.record_past = True

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        return recurrent_states

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        window: Any = self.conv_states[state_idx]
        return torch.cat([window, conv_states], -1)


class _FrozenKeys(DynamicLayer):
    """An attention layer's memory that is read and never written."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        held: Any = self
        return torch.cat([held.keys, key_states], -2), torch.cat([held.values, value_states], -2)


def stacked(model: HybridModel, prefixes: Sequence[Prefix]) -> tuple[Cache, Tensor]:
    """One cache for contexts of any lengths, padded on the left, and its mask: int64 [prompt token]."""
    width = _rounded(max(prefix.tokens for prefix in prefixes), CONTEXT_BUCKET)
    mask = torch.zeros(len(prefixes), width, dtype=torch.long)
    for row, prefix in enumerate(prefixes):
        mask[row, width - prefix.tokens :] = 1

    def padded(parts: list[Tensor]) -> Tensor:
        out = parts[0].new_zeros(len(parts), parts[0].shape[0], width, parts[0].shape[2])
        for row, part in enumerate(parts):
            out[row, :, width - part.shape[1] :] = part
        return out.to(model.device)

    layers: list[Any] = []
    for layer in model.layers:
        i = layer.index
        if layer.kind == "gdn":
            states, windows = (torch.stack([getattr(p, name)[i] for p in prefixes]) for name in ("states", "windows"))
            layers.append(_FrozenState(states.to(model.device), windows.to(model.device)))
        else:
            layers.append(_FrozenKeys(padded([p.keys[i] for p in prefixes]), padded([p.values[i] for p in prefixes])))
    return Cache(layers=layers), mask.to(model.device)


def score(
    model: HybridModel, parts: Sequence[Segment], prefixes: Sequence[Prefix] | None, *, checkpointing: bool = False
) -> Float[Tensor, " segment"]:
    """Log-probability of the scored tokens of each segment's decision, in nats, float32, with gradient.

    Args:
        prefixes: what the contexts left behind, one for each segment (frozen context); None: run the contexts too.
        checkpointing: keep only what enters each layer, and compute the rest again in `backward`.

    Raises:
        WrongInput: a frozen context while transformers' own checkpointing is at work, which would drop it.
    """
    if prefixes is not None and any(getattr(b, "gradient_checkpointing", False) and b.training for b in _blocks(model)):
        raise WrongInput(
            f"the layers of {model.name} are in training with transformers' own gradient checkpointing, which drops a "
            "frozen context; use score(..., checkpointing=True), or call eval() or gradient_checkpointing_disable()"
        )
    with _checkpointing(model) if checkpointing else _as_it_is():
        if prefixes is None:
            return _score_full(model, parts)
        return _score_frozen(model, parts, prefixes)


def _score_frozen(model: HybridModel, parts: Sequence[Segment], prefixes: Sequence[Prefix]) -> Tensor:
    """Decisions are padded on the right, where nothing that is scored can see it."""
    cache, seen = stacked(model, prefixes)
    width = _rounded(max(len(part.decision) for part in parts), DECISION_BUCKET)
    ids = torch.full((len(parts), width), model.tokenizer.pad_token_id)
    scored = torch.zeros(len(parts), width, dtype=torch.bool)
    for row, part in enumerate(parts):
        ids[row, : len(part.decision)] = torch.tensor(part.decision)
        scored[row, : len(part.scored)] = torch.tensor(part.scored)
    places = seen.sum(1, keepdim=True) + torch.arange(width, device=seen.device)
    mask = torch.cat([seen, torch.ones_like(places)], 1)
    return _scored(
        model, ids.to(model.device), scored.to(model.device), attention_mask=mask, position_ids=places,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip


def _score_full(model: HybridModel, parts: Sequence[Segment]) -> Tensor:
    fill = model.tokenizer.pad_token_id
    width = _rounded(max(len(part.context) + len(part.decision) for part in parts), CONTEXT_BUCKET)
    sequences = [[*part.context, *part.decision] for part in parts]
    batch = pad([*sequences, [fill] * width], pad_id=fill, device=model.device)
    scored = torch.zeros(len(parts), width, dtype=torch.bool)
    for row, part in enumerate(parts):
        scored[row, width - len(part.scored) :] = torch.tensor(part.scored)
    inputs = {key: value[:-1] for key, value in batch.inputs.items()}
    return _scored(model, inputs.pop("input_ids"), scored.to(model.device), **inputs, use_cache=False)


def _scored(model: HybridModel, ids: Tensor, scored: Tensor, **inputs: Any) -> Tensor:
    """Sum of the log-probabilities of the tokens that are scored; each is predicted from the one before it."""
    logits = logits_at(model, scored.roll(-1, 1), input_ids=ids, **inputs)
    return row_sums(scored, log_probs(logits, ids[scored]))


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _checkpointing(model: HybridModel) -> Iterator[None]:
    """Compute each layer again in `backward`. Transformers' own switch would drop the cache, and so the context."""
    before = [(block, block.__dict__.get("forward")) for block in _blocks(model)]
    for block, _ in before:
        forward = block.forward

        def again(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        block.forward = again
    try:
        yield
    finally:
        for block, own in before:
            del block.__dict__["forward"]
            if own is not None:  # some libraries wrap a layer in the same way
                block.forward = own


def _blocks(model: HybridModel) -> list[Any]:
    return [layer.block for layer in model.layers]


def _rounded(n: int, bucket: int) -> int:
    return -(-n // bucket) * bucket
