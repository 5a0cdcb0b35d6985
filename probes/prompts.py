"""Messages in, token ids and spans out; always left-padded.

A *prompt* is a rendered chat that ends where the model is to answer. It knows three spans, in tokens of the unpadded
prompt: `context` (everything before the direction), `direction` (what the user asks for, by default the whole last
user turn) and `decision` (what follows: the generation prompt). Right padding is never used on a prompt: a GDN layer
would run its state through the padding (relative error of the final state 1.0 to 1.3; left padding 1e-6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.errors import WrongInput
from probes.model import HybridModel

Message = Mapping[str, str]
Span = tuple[int, int]
SPANS = ("context", "direction", "decision")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A rendered chat: its text, token ids (no padding) and spans as (start, stop) token positions."""

    text: str
    ids: tuple[int, ...]
    spans: Mapping[str, Span]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Left-padded prompts. `rows[i]` is the index of row i in the sequence that was batched.

    ids, mask and positions are int64 [prompt token]; positions count from 0 at the first real token.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    rows: tuple[int, ...]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model's forward."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}

    def offset(self, row: int) -> int:
        """How many padding tokens stand before row's prompt."""
        return int((self.mask[row] == 0).sum())


def render(
    model: HybridModel, messages: Sequence[Message], *, system: str | None = None, direction: str | None = None
) -> Prompt:
    """Apply the model's chat template up to the point where the assistant answers.

    Args:
        messages: turns ending with the user's; a system turn may come first.
        system: a system turn to put in front (a persona).
        direction: the words of the last user turn that are the direction; the whole turn by default.

    Raises:
        WrongInput: the prompt is longer than the model's context, or `direction` is not in the last turn.
    """
    turns = [dict(m) for m in messages]
    if system:
        turns = [{"role": "system", "content": system}, *turns]
    text = _apply_template(model.tokenizer, turns)
    encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = tuple(encoded["input_ids"]), encoded["offset_mapping"]
    if len(ids) > model.max_tokens:
        raise WrongInput(
            f"a prompt of {len(ids)} tokens is longer than the context of {model.name}, {model.max_tokens} tokens"
        )
    last = turns[-1]["content"]
    wanted = direction or last
    inside = last.rfind(wanted)
    if inside < 0:
        raise WrongInput(f"the direction {wanted!r} is not part of the last user turn {last!r}")
    # the generation prompt follows the last turn and may contain its words ("a" is in "assistant")
    head = _apply_template(model.tokenizer, turns, answer=False)
    shown = last if last in head else last.strip()
    begin = head.rfind(shown) + inside - (len(last) - len(last.lstrip()) if shown != last else 0)
    start = _token_at(offsets, begin)
    stop = _token_at(offsets, begin + len(wanted))
    return Prompt(
        text=text, ids=ids, spans={"context": (0, start), "direction": (start, stop), "decision": (stop, len(ids))}
    )


def _apply_template(tokenizer: Any, turns: list[dict[str, str]], *, answer: bool = True) -> str:
    if tokenizer.chat_template is None:  # a base model: plain turns that any text model can follow
        body = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in turns)
        return _begin(tokenizer) + body + "Assistant:" * answer
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer, enable_thinking=False)
    except Exception as error:  # jinja raises its own types for roles or orders that a template does not know
        raise WrongInput(f"the chat template refuses these turns ({[t['role'] for t in turns]}): {error}") from error


def _begin(tokenizer: Any) -> str:
    """The begin-of-text token, for a tokenizer that puts one in front by itself; a chat template has its own."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def _token_at(offsets: Sequence[tuple[int, int]], char: int) -> int:
    """The first token that begins at or after a character, or that spans it."""
    return next((i for i, (_, stop) in enumerate(offsets) if stop > char), len(offsets))


def answer_ids(model: HybridModel, answer: str) -> tuple[int, ...]:
    """Token ids of an answer, tokenised apart from its prompt so that both answers share one prefix exactly."""
    ids = tuple(model.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise WrongInput(f"the answer {answer!r} has no tokens")
    return ids


def pad(
    sequences: Sequence[Sequence[int]], *, pad_id: int, device: torch.device, rows: Sequence[int] | None = None
) -> Batch:
    """Left-pad to the longest."""
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return Batch(
        ids=ids.to(device), mask=mask.to(device), positions=positions.to(device),
        rows=tuple(rows) if rows is not None else tuple(range(len(sequences))),
    )  # fmt: skip


def batches(model: HybridModel, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 4096) -> Iterator[Batch]:
    """Batches of similar length, each at most `batch_tokens` tokens wide x high (a longer prompt goes alone).

    Sorted by length, so padding is small; `Batch.rows` says where each row came from.
    """
    pad_id = model.tokenizer.pad_token_id
    for rows in alike([len(sequence) for sequence in sequences], batch_tokens):
        yield pad([sequences[i] for i in rows], pad_id=pad_id, device=model.device, rows=rows)


def alike(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of similar lengths, ascending, as many together as `batch_tokens` hold at the width of the longest."""
    order, at = sorted(range(len(lengths)), key=lambda i: lengths[i]), 0
    while at < len(order):
        stop = at + 1
        while stop < len(order) and (stop + 1 - at) * lengths[order[stop]] <= batch_tokens:
            stop += 1
        yield order[at:stop]
        at = stop
