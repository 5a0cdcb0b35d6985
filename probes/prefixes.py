"""Prompts computed once, up to their last tokens, and continued many times: after edits of what the cache holds.

Everything that a prompt's tokens tell later ones lies in the cache, in three channels: the recurrent states of the GDN
layers, their convolutions' windows (the last few tokens), and the keys and values of the attention layers. The residual
stream itself never crosses from token to token. So a cache can be taken apart: put the states that one prompt left into
the cache of another, and see what follows from them alone.

Prompts that are to be exchanged are padded to one width and count positions from its left edge, so that the same words
at the end of two prompts have the same positions, however long the system turns before them are. Attention knows only
relative positions: within one prompt nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from probes.controls import orthonormal
from probes.errors import WrongInput
from probes.model import HybridModel, Kind
from probes.prompts import alike, pad
from probes.propensity import Prepared, Propensity, fork
from probes.scoring import log_probs, logits_at, row_sums
from probes.taps import AttentionCall, Run, tapped

Channel = Literal["state", "convolution", "attention"]
CHANNELS: dict[Channel, Kind] = {"state": "gdn", "convolution": "gdn", "attention": "attention"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """A batch of prompts without their last tokens, run through the model.

    Attributes:
        rows: index of each prompt in what was prepared.
        tail: the prompts' last tokens, int64 [prompt n]; computed anew each time.
        mask: int64 [prompt token], over all of the prompt.
        cache: transformers' cache after the tokens before the tail. Never changed: edits are made on copies.
        masks: by attention layer whose keys and values come from another prompt, which of them each key/value head
            may look at: int64 [prompt kv_head token].
    """

    rows: tuple[int, ...]
    tail: Tensor
    mask: Tensor
    cache: Any
    masks: dict[int, Tensor] = field(default_factory=dict)

    def copy(self) -> Prefix:
        return replace(self, cache=fork(self.cache, 1), masks=dict(self.masks))


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefixes:
    """All batches of one set of prompts, ready to be continued by both answers of each."""

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    answers: tuple[tuple[tuple[int, ...], ...], ...]
    parts: tuple[Prefix, ...]

    def each(self, change: Callable[..., Prefix], *others: Prefixes) -> Prefixes:
        """The same prompts, each batch changed; batches of `others` are handed on beside it."""
        parts = zip(self.parts, *(other.parts for other in others), strict=True)
        return replace(self, parts=tuple(change(*part) for part in parts))


@torch.no_grad()
def prefixes(model: HybridModel, *prepared: Prepared, last: int = 1, batch_tokens: int = 4096) -> list[Prefixes]:
    """Run the prompts of one or more sets up to their last tokens, in equal batches of equal width.

    Args:
        prepared: sets of prompts for the same items, such as one behaviour under two personas.
        last: how many prompt tokens are left for later.

    Raises:
        WrongInput: the sets are of different items, or a prompt has no more than `last` tokens.
    """
    if any(one.ids != prepared[0].ids for one in prepared):
        raise WrongInput("the sets of prompts are of different items")
    if short := [len(p) for one in prepared for p in one.prompts if len(p) <= last]:
        raise WrongInput(f"a prompt of {short[0]} tokens cannot be cut before its last {last}")
    found: list[list[Prefix]] = [[] for _ in prepared]
    for rows, width in _batches(prepared, batch_tokens):
        for parts, one in zip(found, prepared, strict=True):
            parts.append(_run(model, one, rows, width, last))
    return [
        Prefixes(ids=one.ids, groups=one.groups, answers=one.answers, parts=tuple(parts))
        for one, parts in zip(prepared, found, strict=True)
    ]


def _batches(prepared: Sequence[Prepared], batch_tokens: int) -> Iterator[tuple[list[int], int]]:
    """Rows of similar length, and the width that holds the longest of them in any set."""
    longest = [max(len(one.prompts[i]) for one in prepared) for i in range(len(prepared[0].prompts))]
    for rows in alike(longest, batch_tokens):
        yield rows, longest[rows[-1]]


def _run(model: HybridModel, prepared: Prepared, rows: list[int], width: int, last: int) -> Prefix:
    filler = [model.tokenizer.pad_token_id] * width
    batch = pad([*(prepared.prompts[i].ids for i in rows), filler], pad_id=filler[0], device=model.device)
    ids, mask = batch.ids[:-1], batch.mask[:-1]
    cut = width - last
    places = torch.arange(cut, device=ids.device).expand(len(ids), -1)
    out = model.hf(
        input_ids=ids[:, :cut], attention_mask=mask[:, :cut], position_ids=places, use_cache=True, logits_to_keep=1
    )
    return Prefix(rows=tuple(rows), tail=ids[:, cut:], mask=mask, cache=out.past_key_values)


@torch.no_grad()
def continued(model: HybridModel, begun: Prefixes) -> Propensity:
    """Propensity of each prompt: the tail and then each answer are run from what the caches hold."""
    table = torch.zeros(len(begun.ids), 2)
    for part in begun.parts:
        answers = [answer for row in part.rows for answer in begun.answers[row]]  # row-major: wanted, unwanted
        table[list(part.rows)] = _score(model, part, answers).reshape(-1, 2)
    wanted, unwanted = (tuple(column.tolist()) for column in table.T)
    return Propensity(ids=begun.ids, groups=begun.groups, wanted=wanted, unwanted=unwanted)


def _score(model: HybridModel, part: Prefix, answers: list[tuple[int, ...]]) -> Tensor:
    """Log-probability of two answers a row: float32 [2 x prompt]. Padding on the right reaches no scored token."""
    device, last = part.tail.device, part.tail.shape[1]
    width = max(map(len, answers)) - 1
    ids = torch.full((len(answers), last + width), model.tokenizer.pad_token_id)
    targets = torch.full((len(answers), last + width), -1)
    ids[:, :last] = part.tail.repeat_interleave(2, 0)
    for row, answer in enumerate(answers):
        ids[row, last : last + len(answer) - 1] = torch.tensor(answer[:-1], dtype=torch.long)
        targets[row, last - 1 : last - 1 + len(answer)] = torch.tensor(answer)
    ids, targets = ids.to(device), targets.to(device)
    scored, seen = targets >= 0, part.mask.repeat_interleave(2, 0)
    new = torch.ones(len(ids), width, dtype=seen.dtype, device=device)
    places = torch.arange(seen.shape[1] - last, seen.shape[1] + width, device=device)
    with tapped(model, {layer: _masked(shown.repeat_interleave(2, 0)) for layer, shown in part.masks.items()}):
        logits = logits_at(
            model, scored, input_ids=ids, attention_mask=torch.cat([seen, new], 1), use_cache=True,
            position_ids=places.expand(len(ids), -1), past_key_values=fork(part.cache, 2),
        )  # fmt: skip
    return row_sums(scored, log_probs(logits, targets[scored])).cpu()


def _masked(seen: Tensor) -> Callable[[AttentionCall, Run], Any]:
    """A tap that shows each key/value head its `seen` [prompt kv_head token] and, causally, the tokens after them."""

    def tap(call: AttentionCall, run: Run) -> Any:
        queries, keys = call.q.shape[2], call.k.shape[2]
        shown = torch.ones(*seen.shape[:2], keys, dtype=torch.bool, device=seen.device)
        shown[..., : seen.shape[2]] = seen.bool()
        shown = shown.repeat_interleave(call.q.shape[1] // seen.shape[1], 1)
        causal = torch.ones(queries, keys, dtype=torch.bool, device=seen.device).tril(keys - queries)
        mask = shown[:, :, None] & causal
        if call.mask is not None and call.mask.dtype != torch.bool:  # an additive mask, as eager attention wants it
            mask = torch.zeros_like(mask, dtype=call.q.dtype).masked_fill(~mask, torch.finfo(call.q.dtype).min)
        return run(replace(call, mask=mask))

    return tap


def exchanged(
    model: HybridModel, part: Prefix, other: Prefix, *, channel: Channel, layers: Sequence[int], head: int | None = None
) -> Prefix:
    """A copy of a prefix in which one channel of some layers holds what another prompt left there.

    Args:
        head: a value head (state) or key/value head (attention) alone; None for all.
    """

    def change(own: Tensor, foreign: Tensor) -> Tensor:
        return _headed(own, foreign, head)

    result = _changed(part, other, channel, layers, change)
    for index in layers if channel == "attention" else ():
        own = result.masks.get(index, part.mask[:, None].repeat(1, result.cache.layers[index].keys.shape[1], 1))
        result.masks[index] = _headed(own, other.mask[:, None].expand_as(own), head)
    return result


def disturbed(
    model: HybridModel, part: Prefix, other: Prefix, *, channel: Channel, layers: Sequence[int], seed: int,
    head: int | None = None,
) -> Prefix:  # fmt: skip
    """The control: as far from the prefix as `other` is, in a direction that means nothing.

    The difference between the two prompts is turned by random rotations (a state: of its rows and of its columns; keys
    and values: of each head), or its channels permuted with random signs (a convolution's window). So norm and, for a
    state, singular values are those of the exchange, prompt by prompt and head by head. Keys and values of tokens that
    only one of the prompts has cannot be turned: their share of the norm is added to that of the others.
    """
    generator = torch.Generator().manual_seed(seed)
    cut = part.mask.shape[1] - part.tail.shape[1]
    own_real, their_real = (one.mask[:, None, :cut, None].float() for one in (part, other))

    def change(own: Tensor, foreign: Tensor) -> Tensor:
        difference = (foreign - own).float()
        if channel == "attention":
            whole = (foreign * their_real - own * own_real).float().norm(dim=(2, 3), keepdim=True)
            difference = difference * own_real * their_real
            difference = difference * (whole / difference.norm(dim=(2, 3), keepdim=True).clamp(min=1e-12))
        turned = own + _turned(difference, channel, generator).to(own.dtype)
        return _headed(own, turned, head)

    return _changed(part, other, channel, layers, change)


def _headed(own: Tensor, foreign: Tensor, head: int | None) -> Tensor:
    if head is None:
        return foreign.clone()
    mixed = own.clone()
    mixed[:, head] = foreign[:, head]
    return mixed


def _turned(difference: Tensor, channel: Channel, generator: torch.Generator) -> Tensor:
    if channel == "convolution":
        size = difference.shape[1]
        order = torch.randperm(size, generator=generator)
        signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
        return difference[:, order] * signs[:, None].to(difference)

    def rotation(size: int) -> Tensor:
        return orthonormal(difference.shape[1], size, size, generator).to(difference)

    turned = difference @ rotation(difference.shape[-1])
    return rotation(difference.shape[-2]) @ turned if channel == "state" else turned


def _changed(
    part: Prefix, other: Prefix, channel: Channel, layers: Sequence[int], change: Callable[[Tensor, Tensor], Tensor]
) -> Prefix:
    """A copy of a prefix with one channel of some layers changed; `change` gets its own tensor and the other's."""
    result = part.copy()
    cut = part.mask.shape[1] - part.tail.shape[1]
    for index in layers:
        own, foreign = result.cache.layers[index], other.cache.layers[index]
        if channel == "attention":
            if own.keys.shape[2] != cut:
                raise WrongInput(
                    f"layer {index} keeps the keys of {own.keys.shape[2]} of {cut} tokens (a sliding window): "
                    "they cannot be exchanged"
                )
            own.keys, own.values = change(own.keys, foreign.keys), change(own.values, foreign.values)
        else:
            name = "recurrent_states" if channel == "state" else "conv_states"
            mine, theirs = getattr(own, name), getattr(foreign, name)
            setattr(own, name, {**mine, 0: change(mine[0], theirs[0])})
    return result
