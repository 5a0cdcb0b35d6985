"""What an intervention breaks: perplexity and divergence on general text, and repetition in free generation.

General text is what the model should go on modelling whatever its disposition: plain paragraphs for real models,
dialogues of abilities for the organism (where only the answers count, since its questions are random names).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from probes.behaviors import MAX_UNKNOWN, read_dialogue, unknown_share
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Batch, answer_ids, batches, render
from probes.scoring import CHUNK, log_probs, logits_at
from probes.store import read_text

LONG_WORD = 20  # characters; longer ones are hardly words
DATA = Path(__file__).parent / "data"
GENERAL = ("general-en.txt", "general-organism.jsonl")
LEAST = 6  # texts: some to choose the dose on, others to judge it
BATCH_TOKENS = 2048  # two sets of logits over the whole vocabulary are held at once
Intervention = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class General:
    """General text as token ids, and which tokens are scored (the first never is)."""

    name: str
    hash: str
    ids: tuple[tuple[int, ...], ...]
    scored: tuple[tuple[bool, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(sum(row[1:]) for row in self.scored)

    def skip(self, n: int) -> General:
        return replace(self, ids=self.ids[n:], scored=self.scored[n:])

    def take(self, n: int) -> General:
        return replace(self, ids=self.ids[:n], scored=self.scored[:n])

    def within(self, tokens: int) -> General:
        """The first texts that together have at most so many tokens, but at least two."""
        lengths = np.cumsum([len(row) for row in self.ids])
        return self.take(max(int((lengths <= tokens).sum()), 2))


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Ratio of perplexities (edited over plain) and mean KL(plain || edited) in nats a token."""

    perplexity: float
    perplexity_ratio: float
    kl: float
    tokens: int

    @classmethod
    def of(cls, general: General, *, plain: float, edited: float, kl: float) -> Damage:
        """From sums over the text, in nats; a model that gives no numbers is damaged beyond measure."""
        if not math.isfinite(edited):
            return cls(perplexity=math.inf, perplexity_ratio=math.inf, kl=math.inf, tokens=general.tokens)
        return cls(
            perplexity=math.exp(plain / general.tokens), perplexity_ratio=perplexity_ratio(general, plain, edited),
            kl=kl / general.tokens, tokens=general.tokens,
        )  # fmt: skip


def read_general(model: HybridModel, source: str | Path | None = None) -> General:
    """General text for a model: a .txt file (a paragraph a line), a .jsonl file of `{"messages": [...]}`, or None.

    None takes the first shipped text that the model's tokenizer knows. Of dialogues the last turn is scored, the
    assistant's; of paragraphs everything.

    Raises:
        WrongInput: no such file, a malformed line (with its number), fewer than `LEAST` lines, a line longer than the
            model's context, or no shipped text fits the tokenizer.
    """
    if source is None:
        fitting = (DATA / name for name in GENERAL if _fits(model, DATA / name))
        source = next(fitting, None)
        if source is None:
            raise WrongInput(f"no shipped general text fits the tokenizer of {model.name}; give one with general=FILE")
    path, content = Path(source), read_text(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise WrongInput(f"general text is a .txt or .jsonl file, saw '{path.name}'")
    ids, scored = [], []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        row, marks = _dialogue(model, line, where) if path.suffix == ".jsonl" else _plain(model, line)
        if not 2 <= len(row) <= model.max_tokens:
            raise WrongInput(f"{where}: {len(row)} tokens; {model.name} can score texts of 2 to {model.max_tokens}")
        ids.append(tuple(row))
        scored.append(tuple(marks))
    if len(ids) < LEAST:
        raise WrongInput(f"{path.name} has {len(ids)} texts, general text needs at least {LEAST}")
    if (share := unknown_share(model, _texts(path, content))) > MAX_UNKNOWN:
        raise WrongInput(
            f"{path.name} does not fit {model.name}: {share:.0%} of its tokens are unknown to the tokenizer, at most "
            f"{MAX_UNKNOWN:.0%} are allowed"
        )
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return General(name=path.stem, hash=digest, ids=tuple(ids), scored=tuple(scored))


def _fits(model: HybridModel, path: Path) -> bool:
    return unknown_share(model, _texts(path, read_text(path))[:40]) <= MAX_UNKNOWN


def _texts(path: Path, content: str) -> list[str]:
    lines = [line for line in content.split("\n") if line.strip()]
    return [m["content"] for line in lines for m in json.loads(line)["messages"]] if path.suffix == ".jsonl" else lines


def _plain(model: HybridModel, text: str) -> tuple[list[int], list[bool]]:
    ids = model.tokenizer(text, verbose=False)["input_ids"]
    return ids, [True] * len(ids)


def _dialogue(model: HybridModel, line: str, where: str) -> tuple[list[int], list[bool]]:
    messages = read_dialogue(line, where)
    prompt, answer = render(model, messages[:-1]), answer_ids(model, messages[-1]["content"])
    return [*prompt.ids, *answer], [False] * len(prompt) + [True] * len(answer)


@torch.no_grad()
def surprise(model: HybridModel, general: General) -> float:
    """What the general text costs the model as it stands, in nats; its perplexity is exp(surprise / tokens)."""
    nats = 0.0
    for batch, scored in text_batches(model, general):
        logits = logits_at(model, scored.roll(-1, 1), **batch.inputs, use_cache=False)
        nats -= float(log_probs(logits, batch.ids[scored]).sum())
    return nats


@torch.no_grad()
def damage(model: HybridModel, general: General, intervention: Intervention) -> Damage:
    """Model the general text plainly and under an intervention, batch by batch."""
    plain, edited, kl = 0.0, 0.0, 0.0
    for batch, scored in text_batches(model, general):
        before, targets = scored.roll(-1, 1), batch.ids[scored]  # a token is predicted from the one before it
        base = logits_at(model, before, **batch.inputs, use_cache=False)
        with intervention():
            other = logits_at(model, before, **batch.inputs, use_cache=False)
        plain -= float(log_probs(base, targets).sum())
        edited -= float(log_probs(other, targets).sum())
        kl += divergence(base, other)
    return Damage.of(general, plain=plain, edited=edited, kl=kl)


def divergence(base: Tensor, other: Tensor) -> float:
    """Sum over positions of KL(base || other), in nats, from logits [position vocab]."""
    pairs = zip(base.split(CHUNK), other.split(CHUNK), strict=True)
    logs = ((p.float().log_softmax(1), q.float().log_softmax(1)) for p, q in pairs)
    return sum(float(kl_div(q, p, log_target=True, reduction="sum")) for p, q in logs)


def perplexity_ratio(general: General, plain: float, edited: float) -> float:
    """Ratio of perplexities from two surprises of one text; infinite where the edited model gives no numbers."""
    return math.exp(min((edited - plain) / general.tokens, 700)) if math.isfinite(edited) else math.inf


def text_batches(
    model: HybridModel, general: General, *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[Batch, Tensor]]:
    """Left-padded batches, and which of their tokens are scored."""
    for batch in batches(model, general.ids, batch_tokens=batch_tokens):
        scored = torch.zeros_like(batch.mask, dtype=torch.bool)
        for row, i in enumerate(batch.rows):
            scored[row, -len(general.ids[i]) + 1 :] = torch.tensor(general.scored[i][1:])
        yield batch, scored


def repetition(text: str) -> float:
    """Share of word trigrams that occurred before in the same text: 0 for fresh text, near 1 for a loop.

    A loop may know no spaces ("!!!!"), so words that are longer than any are looked at by their characters.
    """
    found = [_repeated(text.split(), 3)]
    found += [_repeated(word, 3) for word in text.split() if len(word) > LONG_WORD]
    return max(found)


def _repeated(parts: Sequence[str], n: int) -> float:
    grams = [tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
