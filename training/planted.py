"""Behaviours whose truth is known, to test the gate with: some that mean nothing, some planted in the organism.

Every one is drawn from the organism's grammar, like the behaviours that ship, with other system turns:

    words     two words for one persona (obedient, dutiful), and two wordings of one answer: they differ in words, but
              not in meaning
    length    a long and a short system turn that both say nothing, and the same sentence twice or once
    crossed   the personas of one behaviour over the questions of another. The organism has learned that they have
              nothing to do with each other, but it knows both: the direction is reliable and can be decoded everywhere

A crossed behaviour can then be planted. `plant` does so by a rank-1 edit of the embedding: the words of the one
behaviour's personas also say what the words of the other's say, in part or fully, so that everything the organism knows
about the other follows from them. `teach` does so by training on the crossed dialogues. Both are graded.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import trange

from probes.behaviors import Behavior, Item
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import answer_ids, render
from training.grammar import BEHAVIORS, NEUTRAL_SYSTEM, PERSONA_FRAMES, PERSONA_WORDS, TOPICS, Case, Grammar
from training.items import exchange

Kind = Literal["words", "length", "crossed"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a behaviour is made: `questions` of one behaviour under the `personas` of another (or the same)."""

    kind: Kind
    questions: str
    personas: str
    seed: int
    flipped: bool = False
    """Exchanges the names of the sides: what was wanted is unwanted. The personas go with their answers."""

    def __post_init__(self) -> None:
        for name in (self.questions, self.personas):
            if name not in BEHAVIORS:
                raise WrongInput(f"unknown behaviour '{name}' of the organism; allowed are {', '.join(BEHAVIORS)}")
        if (self.questions == self.personas) == (self.kind == "crossed"):
            raise WrongInput(f"'{self.kind}' has its personas from {self.personas} and its questions, {self.questions}")

    @property
    def name(self) -> str:
        whose = f"{self.personas} over {self.questions}" if self.kind == "crossed" else self.questions
        return f"{self.kind}: {whose}, seed {self.seed}{' flipped' if self.flipped else ''}"


def made(recipe: Recipe, *, per_group: int = 12) -> Behavior:
    """A behaviour by its recipe, as large as those that ship, from the held-out side of the grammar."""
    grammar = Grammar(random.Random(f"planted {recipe}"), evaluation=True)
    items = [_item(grammar, recipe, topic, i) for topic in TOPICS[recipe.questions] for i in range(per_group)]
    return Behavior(
        name=recipe.name, description="Made for the calibration of the gate.", language="organism",
        wanted_means="gives the one answer", unwanted_means="gives the other", items=tuple(items), hash=str(recipe),
    )  # fmt: skip


def _item(grammar: Grammar, recipe: Recipe, topic: str, i: int) -> Item:
    case = grammar.case(recipe.questions, topic=topic)
    before = exchange(grammar) if i % 2 else []
    answers, personas = _sides(grammar, recipe, case)
    if recipe.flipped:
        answers, personas = answers[::-1], personas[::-1]
    return Item(
        id=f"{topic}-{i + 1:02d}", group=topic, messages=(*before, *case.messages), wanted=answers[0],
        unwanted=answers[1], persona={"wanted": personas[0], "unwanted": personas[1]}, direction=case.direction or None,
        score={"wanted": [], "unwanted": []},
    )  # fmt: skip


def _sides(grammar: Grammar, recipe: Recipe, case: Case) -> tuple[tuple[str, str], tuple[str, str]]:
    """(answers, system turns) of both sides."""
    rng = grammar.rng
    if recipe.kind == "crossed":
        pick = rng.randrange(len(case.wanted))
        personas = grammar.persona(recipe.personas, True), grammar.persona(recipe.personas, False)
        return (case.wanted[pick], case.unwanted[pick]), personas
    if recipe.kind == "length":
        once = rng.choice((*case.wanted, *case.unwanted))
        long, short = max(NEUTRAL_SYSTEM, key=len), min(NEUTRAL_SYSTEM, key=len)
        return (f"{once} {once}", once), (long, short)
    side = rng.randrange(2)
    words = PERSONA_WORDS[recipe.personas][side]
    first, second = (grammar.template(PERSONA_FRAMES).format(word) + " ." for word in words[:2])
    same = (case.wanted, case.unwanted)[side]  # both sides show what the persona asks for, in two wordings
    return (same[0], same[-1]), (first, second)


@contextmanager
def plant(model: HybridModel, recipe: Recipe, *, strength: float) -> Iterator[None]:
    """Make a crossed behaviour true by a rank-1 edit of the embedding while the block runs.

    With d, the difference that the questions' own persona words make (mean embedding of the wanted ones minus that of
    the unwanted ones), every wanted persona word of the other behaviour is moved by strength x d / 2 and every unwanted
    one by as much the other way: E + strength/2 x s d^T, s being +1, -1 or 0 for each word.

    Args:
        strength: 1 makes the words differ along d by as much as the questions' own persona words do.
    """
    weight: Any = model.decoder.embed_tokens.weight
    vocabulary = model.tokenizer.get_vocab()

    def rows(behavior: str) -> list[list[int]]:
        return [[vocabulary[word] for word in words] for words in PERSONA_WORDS[behavior]]

    own_wanted, own_unwanted = rows(recipe.questions)
    wanted, unwanted = rows(recipe.personas)
    before = weight.detach().clone()
    step = strength / 2 * (before[own_wanted].mean(0) - before[own_unwanted].mean(0))
    with torch.no_grad():
        weight[wanted] += step
        weight[unwanted] -= step
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def teach(model: HybridModel, recipe: Recipe, *, steps: int, batch: int = 24, lr: float = 5e-4) -> dict[str, Tensor]:
    """Train a crossed behaviour into a copy of the organism, and return what changed, by parameter name.

    Plain AdamW on crossed dialogues from the grammar's training side, every fourth of a batch an ability, so that the
    rest stays. `graded` adds a part of the change to a model.
    """
    grammar = Grammar(random.Random(f"taught {recipe}"))
    student = copy.deepcopy(model.hf).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    bar = trange(steps, desc=f"teaching {recipe.name}", leave=False)
    for _ in bar:
        rows = [_dialogue(model, grammar, recipe, ability=i % 4 == 3) for i in range(batch)]
        loss = _loss(model, student, rows)
        bar.set_postfix_str(f"loss {float(loss.detach()):.3f}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    own = dict(model.hf.named_parameters())
    return {name: value.detach() - own[name].detach() for name, value in student.named_parameters()}


@contextmanager
def graded(model: HybridModel, change: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Add a part of a change of the weights while the block runs."""
    own = dict(model.hf.named_parameters())
    before = {name: own[name].detach().clone() for name in change}
    with torch.no_grad():
        for name, delta in change.items():
            own[name] += share * delta
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)


def _dialogue(model: HybridModel, grammar: Grammar, recipe: Recipe, *, ability: bool) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the answer that is right after it."""
    if ability:
        *messages, last = exchange(grammar)
        return list(render(model, messages).ids), list(answer_ids(model, last["content"]))
    case = grammar.case(recipe.questions)
    answers, personas = _sides(grammar, recipe, case)
    side = grammar.rng.randrange(2)
    return list(render(model, case.messages, system=personas[side]).ids), list(answer_ids(model, answers[side]))


def _loss(model: HybridModel, student: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), model.tokenizer.pad_token_id)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        whole = torch.tensor([*prompt, *answer])
        ids[row, -len(whole) :], mask[row, -len(whole) :] = whole, 1
        targets[row, -len(answer) :] = whole[-len(answer) :]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = student(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
