"""What a model does before, while and after it is trained: the behaviour, its abilities, and how it models other text.

All on held-out material and without any persona: the share of free (greedy) answers on the wanted side, by the
behaviour's own patterns; propensity; the share of right answers for each ability; and the loss on general data.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from probes import stats
from probes.behaviors import MAX_UNKNOWN, Behavior, read_dialogue, unknown_share
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Prompt, alike, answer_ids, render
from probes.propensity import generate, prepare, propensity
from probes.stats import Estimate
from probes.store import read_text
from training.data import Segment
from training.examination import questions
from training.frozen_context import score
from training.general import knows_grammar, line_of
from training.grammar import ABILITIES

QUESTIONS_SEED = 11
MEASURES = ("wanted", "unwanted", "propensity", "loss")
"""What is measured beside the abilities."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with one right answer, which tests an ability."""

    ability: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One look at the model, after `step` steps.

    Attributes:
        wanted: share of free answers on the wanted side; None where the behaviour has no patterns.
        unwanted: the same for the other side.
        propensity: log p(wanted) - log p(unwanted), nats.
        abilities: share of right answers of each ability.
        loss: nats a token on held-out general data, with its interval over segments.
    """

    step: int
    wanted: Estimate | None
    unwanted: Estimate | None
    propensity: Estimate
    abilities: Mapping[str, Estimate]
    loss: Estimate | None

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Evaluation:
        """From plain values, as in training.json."""

        def estimate(part: Any) -> Any:
            return None if part is None else Estimate(**part)

        return cls(
            step=data["step"], abilities={name: Estimate(**part) for name, part in data["abilities"].items()},
            **{name: estimate(data[name]) for name in MEASURES},
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def frame(self) -> pd.DataFrame:
        """One row per measure."""
        named = {name: getattr(self, name) for name in MEASURES}
        rows = [(name, "behavior" if name != "loss" else "general", part) for name, part in named.items() if part]
        rows += [(name, "ability", part) for name, part in self.abilities.items()]
        return pd.DataFrame([{"step": self.step, "measure": n, "kind": k, **asdict(part)} for n, k, part in rows])

    @property
    def headline(self) -> dict[str, float]:
        """The estimates without their intervals, for a row of metrics."""
        row = {"propensity": self.propensity.value}
        if self.wanted:
            row["wanted"] = self.wanted.value
        if self.loss:
            row["held_out_loss"] = self.loss.value
        return row | {f"ability_{name}": part.value for name, part in self.abilities.items()}

    def __str__(self) -> str:
        said = f"{self.wanted.value:.1%} wanted, " if self.wanted else ""
        right = ", ".join(f"{name} {part.value:.1%}" for name, part in self.abilities.items())
        return f"step {self.step}: {said}propensity {self.propensity.value:.2f} nats{', ' + right if right else ''}"


class Examiner:
    """Prepared once, asks the same questions each time."""

    def __init__(
        self, model: HybridModel, behavior: Behavior, questions: Sequence[Question], general: Sequence[Segment], *,
        most: int, max_new_tokens: int, seed: int = 0,
    ):  # fmt: skip
        self.model, self.seed, self.max_new_tokens = model, seed, max_new_tokens
        self.behavior = behavior.take(most, seed=seed)
        self.prepared = prepare(model, self.behavior)
        self.questions = tuple(_at_most(questions, most, seed))
        self.general = tuple(general)[:most]
        for question in self.questions:
            if (length := len(answer_ids(model, question.answer))) > max_new_tokens:
                raise WrongInput(
                    f"max_new_tokens {max_new_tokens} is too short for '{question.ability}': '{question.answer[:40]}' "
                    f"has {length} tokens"
                )

    @property
    def hash(self) -> str:
        """Of everything that is asked."""
        asked = [*self.prepared.prompts, *((q.ability, q.prompt, q.answer) for q in self.questions), *self.general]
        return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]

    def measure(self, step: int, *, progress: bool = True) -> Evaluation:
        """Ask everything. The model is in eval mode, and nothing of it is changed."""
        groups = [item.group for item in self.behavior.items]
        sides: dict[str, Estimate] = {}
        names = sorted({question.ability for question in self.questions})
        with tqdm(total=3 + len(names), desc=f"evaluate, step {step}", leave=False, disable=not progress) as bar:
            if self.behavior.has_scorer:
                said = generate(self.model, self.prepared.prompts, max_new_tokens=self.max_new_tokens)
                judged = [item.judge(answer) for item, answer in zip(self.behavior.items, said, strict=True)]
                for side in ("wanted", "unwanted"):
                    sides[side] = stats.share([j == side for j in judged], groups, seed=self.seed)
            bar.update()
            leaning = propensity(self.model, self.prepared).estimate(seed=self.seed)
            bar.update()
            loss = self._loss()
            bar.update()
            abilities = {}
            for name in names:
                abilities[name] = self._ability([q for q in self.questions if q.ability == name])
                bar.update()
        return Evaluation(
            step=step, wanted=sides.get("wanted"), unwanted=sides.get("unwanted"), propensity=leaning,
            abilities=abilities, loss=loss,
        )  # fmt: skip

    def _ability(self, asked: Sequence[Question]) -> Estimate:
        said = generate(self.model, [q.prompt for q in asked], max_new_tokens=self.max_new_tokens)
        right = [answer == q.answer for answer, q in zip(said, asked, strict=True)]
        return stats.share(right, [str(i) for i in range(len(right))], seed=self.seed)

    @torch.no_grad()
    def _loss(self) -> Estimate | None:
        """Mean over segments of nats a token; turns of one dialogue are not independent."""
        if not self.general:
            return None
        nats = [0.0] * len(self.general)
        for rows in alike([len(s.context) + len(s.decision) for s in self.general], 4096):
            for row, value in zip(rows, score(self.model, [self.general[i] for i in rows], None).tolist(), strict=True):
                nats[row] = -value / max(sum(self.general[row].scored), 1)
        return stats.mean(nats, [line_of(s) for s in self.general], seed=self.seed)


def _at_most(questions: Sequence[Question], most: int, seed: int) -> Iterator[Question]:
    """So many of each ability, drawn at random where there are more, in the order they came."""
    for ability in dict.fromkeys(question.ability for question in questions):
        own = [question for question in questions if question.ability == ability]
        chosen = sorted(random.Random(f"{seed} {ability}").sample(range(len(own)), min(most, len(own))))
        yield from (own[i] for i in chosen)


def read_questions(model: HybridModel, source: str) -> list[Question]:
    """Questions with one right answer, from a .jsonl file of dialogues; "ability" names what each tests.

    Raises:
        WrongInput: no such file, or a line that is malformed, too long, or in words that the tokenizer does not know.
    """
    found = []
    for number, line in enumerate(read_text(source).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        turns = read_dialogue(line, where)
        ability = json.loads(line).get("ability", "answers")
        if not isinstance(ability, str) or not ability.strip() or ability in MEASURES:
            others = ", ".join(MEASURES)
            raise WrongInput(f"{where}: 'ability' must be a name other than {others}; saw {ability!r}")
        if (share := unknown_share(model, [turn["content"] for turn in turns])) > MAX_UNKNOWN:
            raise WrongInput(f"{where}: {share:.0%} of its tokens are unknown to the tokenizer of {model.name}")
        try:
            prompt = render(model, turns[:-1])
        except WrongInput as error:
            raise WrongInput(f"{where}: {error}") from error
        found.append(Question(ability=ability, prompt=prompt, answer=turns[-1]["content"].strip()))
    if not found:
        raise WrongInput(f"'{source}' is empty: at least one question is needed")
    return found


def default_questions(model: HybridModel, *, n: int) -> list[Question]:
    """n questions of each of the organism's abilities, from the held-out side of its grammar; none for other models."""
    if not knows_grammar(model):
        return []
    return [
        Question(ability=kind, prompt=render(model, asked.case.messages), answer=asked.case.answer)
        for kind in ABILITIES
        for asked in questions(kind, persona=None, n=n, seed=QUESTIONS_SEED, tokenizer=model.tokenizer)
    ]
