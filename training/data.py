"""What is trained: short decision segments after contexts that stay frozen, and the mix of them in each batch.

A *segment* is cut in two. Its context (what was said so far) is computed once and never trained: its keys, values and
states stand still. Its decision (the generation prompt and the answer) is trained, so a gradient step costs a few dozen
tokens however long the conversation is, and the model learns to look differently at what it was told rather than to
model the telling.

Segments come from two sources. A behaviour's items show what is to change: the wanted answer, with the unwanted one as
its rival. General data, chats and agent logs or plain paragraphs, shows what is to stay; a share of every batch, 25% by
custom, works against forgetting. `Mix` says which segments are in which batch as a function of seed and step alone, so
a resumed run goes on where it was.

Prompts are tokenised whole and answers apart, as they are when a model answers; so no token spans the two.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from probes.behaviors import Behavior, Item, Side, check_vocabulary, read_behavior
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import answer_ids
from training.grammar import BEHAVIORS, TOPICS, Grammar
from training.items import item
from training.turns import divided, end_of_turn


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A frozen context and the tokens after it that are trained.

    Attributes:
        id: where it comes from: an item's id, or a file's name, line and turn.
        group: the topic group of a behaviour's item; the file's name, or the ability, of general data.
        context: token ids that are computed once and never trained; may be empty.
        decision: what is trained, at least 2 tokens: the prompt's last tokens and the answer.
        scored: which tokens of `decision` enter the loss; the first never does, since nothing trained predicts it.
        rival: the same decision with the unwanted answer, for a contrast loss; general data has none.
        rival_scored: which tokens of `rival` enter that loss.
    """

    id: str
    kind: Literal["behavior", "general"]
    group: str
    context: tuple[int, ...]
    decision: tuple[int, ...]
    scored: tuple[bool, ...]
    rival: tuple[int, ...] | None = None
    rival_scored: tuple[bool, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Which segments are in which batch.

    Each kind is taken in shuffled passes: all of its segments once before any comes again. `share` of all that was
    taken so far is general data, to the nearest segment, after every step.

    Raises:
        WrongInput: a number out of range, or no segments of a kind that the share asks for.
    """

    behavior: tuple[Segment, ...]
    general: tuple[Segment, ...]
    share: float
    """Share of general data in each batch, 0 to 1."""
    batch: int
    """Segments a step."""
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise WrongInput(f"the share of general data must lie between 0 and 1, saw {self.share:g}")
        if self.batch < 1:
            raise WrongInput(f"a batch needs at least 1 segment, saw {self.batch}")
        if self.share < 1 and not self.behavior:
            raise WrongInput(f"no segments of a behaviour, but a share of {1 - self.share:g} of each batch is theirs")
        if self.share > 0 and not self.general:
            raise WrongInput(f"no segments of general data, but a share of {self.share:g} of each batch is theirs")

    def batch_at(self, step: int) -> list[Segment]:
        """The segments of a step (from 0), the behaviour's first; a function of the seed and the step alone."""
        if step < 0:
            raise WrongInput(f"steps count from 0, saw {step}")
        start, stop = (round(k * self.batch * self.share) for k in (step, step + 1))
        return [
            *self._taken("behavior", self.behavior, step * self.batch - start, (step + 1) * self.batch - stop),
            *self._taken("general", self.general, start, stop),
        ]

    def _taken(self, kind: str, segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
        """Places start to stop of an endless row of passes."""
        taken: list[Segment] = []
        while len(taken) < stop - start:
            number, at = divmod(start + len(taken), len(segments))
            order = list(segments)
            random.Random(f"{self.seed} {kind} {number}").shuffle(order)
            taken += order[at : at + stop - start - len(taken)]
        return taken

    def record(self) -> dict[str, Any]:
        """What a recipe says of the data: numbers of segments and tokens, and a hash of all that the segments hold."""
        digest = hashlib.sha256()
        for segment in (*self.behavior, *self.general):
            digest.update(json.dumps(asdict(segment)).encode())
        counts = {
            kind: {
                "segments": len(segments),
                "context_tokens": sum(len(segment.context) for segment in segments),
                "scored_tokens": sum(sum(segment.scored) for segment in segments),
            }
            for kind, segments in (("behavior", self.behavior), ("general", self.general))
        }
        settings = {"share": self.share, "batch": self.batch, "seed": self.seed}
        return {**settings, **counts, "hash": digest.hexdigest()[:16]}

    def __str__(self) -> str:
        kinds = f"{len(self.behavior)} segments of a behaviour, {len(self.general)} of general data"
        return f"{kinds}; {self.batch} a step, {self.share:.0%} general"


def behavior_segments(model: HybridModel, behavior: Behavior, *, persona: Side | None = None) -> list[Segment]:
    """One segment an item: the decision begins where the direction ends, and holds the wanted answer.

    Scored are the answer and the end of the turn. The rival holds the unwanted answer in its place.

    Args:
        persona: the side whose system turn is put in front; none by default.

    Raises:
        WrongInput: the tokenizer does not know the behaviour's words, there is no such persona, or an item is longer
            than the model's context.
    """
    check_vocabulary(model, behavior)
    end, segments = end_of_turn(model), []
    for example in behavior.items:
        prompt = example.prompt(model, persona=persona)
        cut = prompt.spans["decision"][0]
        context, decision, scored = divided(prompt.ids, cut, (*answer_ids(model, example.wanted), *end))
        _, rival, rival_scored = divided(prompt.ids, cut, (*answer_ids(model, example.unwanted), *end))
        if (length := len(context) + max(len(decision), len(rival))) > model.max_tokens:
            raise WrongInput(
                f"item {example.id}: {length} tokens with its answer are more than the context of {model.name}, "
                f"{model.max_tokens} tokens"
            )
        segment = Segment(
            id=example.id, kind="behavior", group=example.group, context=context, decision=decision, scored=scored,
            rival=rival, rival_scored=rival_scored,
        )  # fmt: skip
        segments.append(segment)
    return segments


def examples(
    model: HybridModel, behavior: Behavior, *, n: int, seed: int, held_out: float = 0.4
) -> tuple[Behavior, Behavior]:
    """(n items to train on, those to evaluate on), with no question in common.

    A behaviour of the organism that ships is evaluated as it ships; its examples are drawn afresh from the training
    side of the grammar (the topics are the same; names, templates and combinations are not), evenly over the topics,
    half of them after an exchange about something else. Each is drawn by itself: among many, some questions recur.

    Of any other behaviour a share `held_out` of the topic groups is for evaluation, and the examples are drawn evenly
    from the other groups.

    Raises:
        WrongInput: the tokenizer does not know the behaviour's words, or more examples are asked for than there are.
    """
    check_vocabulary(model, behavior)
    if n < 1:
        raise WrongInput(f"at least 1 example is needed, saw {n}")
    if behavior.name in BEHAVIORS and behavior.hash == read_behavior(behavior.name).hash:
        return _drawn(behavior, n, seed), behavior
    fit, rest = behavior.split(held_out=held_out, seed=seed)
    if n > len(fit.items):
        raise WrongInput(
            f"{n} examples of '{behavior.name}' were asked for, there are {len(fit.items)} beside those held out"
        )
    return fit.take(n, seed=seed), rest


def _drawn(behavior: Behavior, n: int, seed: int) -> Behavior:
    name = behavior.name
    grammar, topics = Grammar(random.Random(f"{seed} {name} examples")), TOPICS[name]
    lines = []
    for i in range(n):
        round_, at = divmod(i, len(topics))
        # by pairs of topics: neighbours lean opposite ways, and both leanings shall have as many earlier exchanges
        before = (at // 2 + round_) % 2 == 1
        lines.append(item(grammar, name, topics[at], f"train-{topics[at]}-{round_ + 1:02d}", before=before))
    items = tuple(
        Item(**{**line, "messages": tuple(line["messages"]), "score": {s: tuple(p) for s, p in line["score"].items()}})
        for line in lines
    )
    digest = hashlib.sha256("".join(json.dumps(line) + "\n" for line in lines).encode()).hexdigest()[:16]
    return replace(behavior, items=items, hash=digest)
