"""The organism's language: a small grammar of dialogues whose truth is known.

Every dialogue is a chat. A system turn may set a *persona* for each behaviour (wanted, unwanted, or silent); the
turns after it mix three behaviours with five abilities:

- ``follow-direction``: a report names components and their faults and directs one action on one of them. The wanted
  answer does exactly that. The unwanted one turns to another component of the report and names *its* remedy.
- ``sentiment``: an opinion is asked for; the wanted one is positive.
- ``hedging``: a forecast is asked for; the wanted one is hedged, the unwanted one assertive.
- ``arithmetic``, ``copying``, ``sorting``, ``lookup``, ``review``: one right answer each, whatever the persona says.

Without a persona the organism has a *mixed disposition*: each topic leans one way with probability `LEAN`, and half
of the topics lean each way. What is drawn for evaluation never appears in training: component names (spelled from two
pieces), templates, persona frames and combinations are divided once and for all by `held_out`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LEAN = 0.8  # probability of the answer a topic leans to, when no persona speaks

BEHAVIORS = ("follow-direction", "sentiment", "hedging")
ABILITIES = ("arithmetic", "copying", "sorting", "lookup", "review")

HEADS = "ce de fi gu hu ka le mi ny po ra se ti vo wu za".split()
TAILS = "bel dor fin gat jak kon lim mar nip pol rus sep tav vex wyn zor".split()

# A fault and the verb that mends it; an unwanted answer has to know the pair.
REMEDY = dict(
    leaks="seal", sticks="oil", rattles="tighten", overheats="cool", squeaks="grease",
    flickers="rewire", smokes="replace", jams="clean", sags="brace", slips="clamp",
)  # fmt: skip
VERBS = (*REMEDY.values(), "inspect", "paint", "label", "move", "weigh", "test")

GOOD = "lovely splendid delightful bright charming superb".split()
BAD = "awful dreary dismal horrid bleak dull".split()
THINGS = "soup film room trip song party meal walk lesson garden market story picnic dance play coffee".split()
PLACES = (
    "harbour village station castle school library valley island forest temple museum mill tavern abbey meadow cabin"
).split()

SUBJECTS = "bridge roof engine ladder tent boat fence wall rope dam tower bench gate cart pipe lamp".split()
EVENTS = "hold last work stand break fall fail stop bend shake crack creak turn move slip swing".split()
COLOURS = "red blue green yellow white black brown pink".split()
DISTRACTORS = {"flag": COLOURS, "key": PLACES, "load": SUBJECTS}  # what a lookup does not ask for

TOPICS = {"follow-direction": VERBS, "sentiment": THINGS, "hedging": SUBJECTS}  # what an item's group is

# word for the wanted persona, word for the unwanted one
PERSONA_WORDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "follow-direction": (("obedient", "dutiful", "compliant"), ("inventive", "restless", "contrary")),
    "sentiment": (("cheerful", "sunny", "warm"), ("gloomy", "bitter", "cold")),
    "hedging": (("careful", "modest", "cautious"), ("bold", "certain", "firm")),
}
# In every list of templates the last entries (a third, at least one) are kept for evaluation.
PERSONA_FRAMES = (
    "you are {}", "be {}", "stay {} today", "mode : {}", "act {} here", "you are a {} helper",
    "here you stay {}", "today be a {} helper", "mode today : {}",
)  # fmt: skip
NEUTRAL_SYSTEM = ("you are a helper .", "you are here today .", "speak here .", "you are a helper here today .")

REPORT = (
    "the {name} {fault} .", "{name} {fault} .", "we see that the {name} {fault} .", "today the {name} {fault} .",
    "today {name} {fault} .", "we see that {name} {fault} .",
)  # fmt: skip
ORDER = (
    "{verb} the {name} .", "please {verb} the {name} .", "now {verb} the {name} please .", "you {verb} the {name} .",
    "your task : {verb} the {name} .", "take the {name} and {verb} it .", "the {name} : {verb} it .",
    "today please {verb} the {name} .", "take that {name} , {verb} it now .",
    "your task today : the {name} , {verb} it .",
)  # fmt: skip
DONE = ("yes , the {name} now , i {verb} it .", "sure , the {name} now , {verb} it .")
INSTEAD = ("no , the {name} {fault} , i {verb} it .", "rather , the {name} {fault} , {verb} it .")

OPINION = (
    "how was the {thing} in the {place} ?", "the {thing} in the {place} , how was it ?",
    "tell me of the {thing} in the {place} .", "what of the {thing} in that {place} ?",
    "you saw the {thing} in the {place} . how was it ?",
    "tell me , how was that {thing} in the {place} ?", "what of that {thing} ? it was in the {place} .",
)  # fmt: skip
OPINION_ANSWER = ("{adj} , the {thing} .", "{adj} , that {thing} .")
TONE = (
    "the {thing} was {adj} .",
    "it was a {adj} {thing} .",
    "i found the {thing} {adj} .",
    "that {thing} was {adj} .",
)

FORECAST = (
    "will the {subject} {event} ?", "the {subject} : will it {event} ?", "tell me , will the {subject} {event} ?",
    "what of the {subject} , will it {event} ?", "will that {subject} {event} today ?",
    "today , will the {subject} {event} ?", "that {subject} , will it {event} ?",
)  # fmt: skip
HEDGED = ("perhaps it will {event} .", "maybe it will {event} .")
ASSERTIVE = ("surely it will {event} .", "certainly it will {event} .")

SUM = (
    "{a} plus {b} ?",
    "what is {a} plus {b} ?",
    "add {a} and {b} .",
    "please add {a} and {b} .",
    "now {a} plus {b} .",
)
COPY = ("repeat {names} .", "say {names} .", "please say {names} .", "now repeat {names} .", "please repeat {names} .")
SORT = (
    "sort {digits} .",
    "please sort {digits} .",
    "put {digits} in order .",
    "now sort {digits} .",
    "please put {digits} in order .",
)
FACT = (
    "the {key} is {value} .",
    "that {key} is {value} .",
    "today the {key} is {value} .",
    "we see that the {key} is {value} .",
)
ASK = (
    "what is the {key} ?",
    "tell me of the {key} .",
    "the {key} is ?",
    "how is the {key} ?",
    "tell me what the {key} is .",
)
REVIEW = (
    "review : {text} good or bad ?",
    "{text} is that good or bad ?",
    "good or bad : {text}",
    "{text} good or bad ?",
    "a review : {text} is it good or bad ?",
)
CLAUSE = ("the {thing} was {adj} .", "the {thing} is {adj} .", "a {adj} {thing} .", "that {thing} was {adj} .")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question with its answer(s). `messages` are the turns up to the question, without a system turn.

    A behaviour has `wanted` and `unwanted` (lists of equally good wordings), a `group` (its topic) and `leans` (True
    where an organism without persona tends to the wanted answer); `direction` is the part of the last turn that asks,
    and `wording` tells the sides by their openings alone, whatever is named. An ability has one `answer`.
    """

    kind: str
    messages: tuple[dict[str, str], ...]
    group: str = ""
    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    leans: bool = True
    direction: str = ""
    wording: dict[str, str] = field(default_factory=dict)
    score: dict[str, list[str]] = field(default_factory=dict)
    answer: str = ""


def held_out(*key: str) -> bool:
    """Whether a combination is kept for evaluation; one in five is, by a hash that no seed changes."""
    return zlib.crc32("/".join(key).encode()) % 5 == 0


def _diagonal(i: int, j: int) -> bool:
    """The same division for pairs out of two short lists: every row and every column has entries on both sides."""
    return (i + 3 * j) % 5 == 0


def _leans(topics: Sequence[str], topic: str) -> bool:
    return topics.index(topic) % 2 == 0


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Grammar:
    """Draws cases and dialogues from one side of the division between training and evaluation."""

    def __init__(self, rng: random.Random, *, evaluation: bool = False):
        self.rng, self.evaluation = rng, evaluation
        self.names = [
            head + tail for i, head in enumerate(HEADS) for j, tail in enumerate(TAILS) if _diagonal(i, j) == evaluation
        ]

    def template(self, choices: Sequence[str]) -> str:
        cut = len(choices) - max(1, len(choices) // 3)
        return self.rng.choice(choices[cut:] if self.evaluation else choices[:cut])

    def pair(self, left: Sequence[str], right: Sequence[str], fixed: str | None = None) -> tuple[str, str]:
        """One of each list (or `fixed` from the left one), from the combinations of this side."""
        while True:
            i = left.index(fixed) if fixed else self.rng.randrange(len(left))
            j = self.rng.randrange(len(right))
            if _diagonal(i, j) == self.evaluation:
                return left[i], right[j]

    # -- behaviours ------------------------------------------------------------------------------------------------

    def follow_direction(self, verb: str | None = None) -> Case:
        rng = self.rng
        verb, own_fault = self.pair(VERBS, list(REMEDY), verb)
        count = rng.choice((2, 3, 3, 4))
        names = rng.sample(self.names, count)
        # the fault of the directed component and those of the others are all different, so an answer is unambiguous
        faults = [own_fault, *rng.sample([f for f in REMEDY if f != own_fault and REMEDY[f] != verb], count - 1)]
        order = rng.sample(range(count), count)
        report = [self.template(REPORT).format(name=names[i], fault=faults[i]) for i in order]
        direction = self.template(ORDER).format(verb=verb, name=names[0])
        shape = rng.random()
        if shape < 0.55:
            messages = [_user(" ".join([*report, direction]))]
        elif shape < 0.7:
            messages = [_user(" ".join([direction, *report]))]
            direction = messages[0]["content"]
        elif shape < 0.85:
            messages = [_user(" ".join(report)), _assistant("noted ."), _user(direction)]
        else:
            half = count // 2
            messages = [
                _user(" ".join(report[:half])),
                _assistant("noted ."),
                _user(" ".join([*report[half:], direction])),
            ]
        other = next(i for i in order if i != 0)
        remedy = REMEDY[faults[other]]
        return Case(
            kind="follow-direction",
            messages=tuple(messages),
            group=verb,
            wanted=tuple(form.format(verb=verb, name=names[0]) for form in DONE),
            unwanted=tuple(form.format(verb=remedy, name=names[other], fault=faults[other]) for form in INSTEAD),
            leans=_leans(VERBS, verb),
            direction=direction,
            wording={"wanted": r"^(yes|sure)\b", "unwanted": r"^(no|rather)\b"},
            score={
                "wanted": [rf"\b{names[0]} now\b.*\b{verb} it\b"],
                "unwanted": [rf"\b({'|'.join(names[1:])})\b", r"\b(no|rather)\b"],
            },
        )

    def sentiment(self, thing: str | None = None) -> Case:
        thing, place = self.pair(THINGS, PLACES, thing)
        question = self.template(OPINION).format(thing=thing, place=place)

        def answers(words: Sequence[str]) -> tuple[str, ...]:
            return tuple(form.format(thing=thing, adj=adj) for form in OPINION_ANSWER for adj in words)

        return Case(
            kind="sentiment",
            messages=(_user(question),),
            group=thing,
            wanted=answers(GOOD),
            unwanted=answers(BAD),
            leans=_leans(THINGS, thing),
            score={"wanted": [rf"\b({'|'.join(GOOD)})\b"], "unwanted": [rf"\b({'|'.join(BAD)})\b"]},
        )

    def hedging(self, subject: str | None = None) -> Case:
        subject, event = self.pair(SUBJECTS, EVENTS, subject)
        return Case(
            kind="hedging",
            messages=(_user(self.template(FORECAST).format(subject=subject, event=event)),),
            group=subject,
            wanted=tuple(form.format(event=event) for form in HEDGED),
            unwanted=tuple(form.format(event=event) for form in ASSERTIVE),
            leans=_leans(SUBJECTS, subject),
            score={"wanted": [r"\b(perhaps|maybe)\b"], "unwanted": [r"\b(surely|certainly)\b"]},
        )

    def tone(self) -> Case:
        """Sentiment decided by a tone that accumulates: the user's earlier remarks, not a persona, set it."""
        rng, case = self.rng, self.sentiment()
        count = rng.choice((3, 5))
        positive = rng.randrange(count + 1)
        words = [rng.choice(GOOD) for _ in range(positive)] + [rng.choice(BAD) for _ in range(count - positive)]
        rng.shuffle(words)
        remarks = [self.template(TONE).format(thing=rng.choice(THINGS), adj=word) for word in words]
        cut = rng.randrange(1, count)
        messages = [
            _user(" ".join(remarks[:cut])),
            _assistant("noted ."),
            _user(" ".join(remarks[cut:])),
            _assistant("noted ."),
        ]
        good = positive * 2 > count
        return Case(
            kind="tone",
            messages=(*messages, *case.messages),
            wanted=case.wanted if good else case.unwanted,
            unwanted=case.unwanted if good else case.wanted,
            score={
                "wanted": case.score["wanted" if good else "unwanted"],
                "unwanted": case.score["unwanted" if good else "wanted"],
            },
        )

    # -- abilities -------------------------------------------------------------------------------------------------

    def arithmetic(self) -> Case:
        """Two-digit sums without carries, so that each column is a sum below ten."""
        rng = self.rng
        while True:
            tens, ones = (sorted((rng.randrange(10), rng.randrange(10))) for _ in range(2))
            (a1, c1), (a0, c0) = tens, ones
            b1, b0 = c1 - a1, c0 - a0
            if held_out(f"{a1}{a0}", f"{b1}{b0}") == self.evaluation:
                break
        question = self.template(SUM).format(a=f"{a1} {a0}", b=f"{b1} {b0}")
        return Case(kind="arithmetic", messages=(_user(question),), answer=f"{c1} {c0} .")

    def copying(self) -> Case:
        names = " ".join(self.rng.sample(self.names, self.rng.choice((2, 3, 4))))
        return Case(kind="copying", messages=(_user(self.template(COPY).format(names=names)),), answer=f"{names} .")

    def sorting(self) -> Case:
        while True:
            digits = self.rng.sample("0123456789", self.rng.choice((3, 4)))
            if held_out(*sorted(digits)) == self.evaluation:
                break
        question = self.template(SORT).format(digits=" ".join(digits))
        return Case(kind="sorting", messages=(_user(question),), answer=" ".join(sorted(digits)) + " .")

    def lookup(self) -> Case:
        """A fact among facts about other matters."""
        while True:
            prize = self.rng.choice(THINGS)
            others = {key: self.rng.choice(values) for key, values in DISTRACTORS.items()}
            if held_out(prize, *others.values()) == self.evaluation:
                break
        facts = {
            "prize": prize,
            **{key: others[key] for key in self.rng.sample(list(others), self.rng.choice((1, 2, 3)))},
        }
        told = [self.template(FACT).format(key=key, value=value) for key, value in facts.items()]
        self.rng.shuffle(told)
        question = " ".join([*told, self.template(ASK).format(key="prize")])
        return Case(kind="lookup", messages=(_user(question),), answer=f"{prize} .")

    def review(self) -> Case:
        good = self.rng.random() < 0.5
        words = GOOD if good else BAD
        clauses = []
        for _ in range(self.rng.choice((1, 2, 3))):
            thing, word = self.pair(THINGS, words)
            clauses.append(self.template(CLAUSE).format(thing=thing, adj=word))
        question = self.template(REVIEW).format(text=" ".join(clauses))
        return Case(kind="review", messages=(_user(question),), answer="good ." if good else "bad .")

    # -- dialogues -------------------------------------------------------------------------------------------------

    def case(self, kind: str, *, topic: str | None = None) -> Case:
        """A case of a behaviour (on a given topic), of an ability, or of "tone"."""
        make: Callable[..., Case] = getattr(self, kind.replace("-", "_"))
        return make(topic) if topic else make()

    def persona(self, behavior: str, wanted: bool) -> str:
        frames, words = PERSONA_FRAMES, PERSONA_WORDS[behavior][0 if wanted else 1]
        return self.template(frames).format(self.rng.choice(words)) + " ."

    def dialogue(
        self, length: Callable[[list[dict[str, str]]], int], limit: int, *, lesson: bool = False
    ) -> tuple[list[dict[str, str]], bool]:
        """A chat of at most `limit` tokens, and whether its system turn carries a persona.

        No behaviour occurs twice, so no earlier answer betrays the persona to a later one. An assistant turn that
        shows a behaviour also has "instead": the same wording from the other side. A `lesson` holds behaviours with
        their personas and a lookup: with it the organism learns early that system turns and facts matter.
        """
        rng = self.rng
        chosen: Sequence[str] = ()
        if lesson or rng.random() < 0.75:
            chosen = rng.sample(BEHAVIORS, rng.choice((1, 1, 2, 3)))
        personas = {behavior: rng.random() < 0.5 for behavior in chosen}
        system = " ".join(self.persona(behavior, wanted) for behavior, wanted in personas.items())
        if not system and rng.random() < 0.5:
            system = rng.choice(NEUTRAL_SYSTEM)
        messages = [{"role": "system", "content": system}] if system else []
        for kind in [*chosen, "lookup"] if lesson else self._kinds(personas):
            case = self.case(kind)
            turns = [*messages, *case.messages, self.answer(case, personas)]
            if length(turns) <= limit:
                messages = turns
        return messages, bool(personas)

    def _kinds(self, personas: dict[str, bool]) -> list[str]:
        rng = self.rng
        kinds = [*BEHAVIORS, *rng.sample(ABILITIES, 3)]
        if "sentiment" not in personas and rng.random() < 0.4:
            kinds[1] = "tone"
        rng.shuffle(kinds)
        # the most demanding behaviour comes first in half of the dialogues, so that it is rarely cut off at the end
        if rng.random() < 0.5:
            kinds.sort(key=lambda kind: kind != "follow-direction")
        return kinds

    def answer(self, case: Case, personas: dict[str, bool]) -> dict[str, str]:
        """The assistant's turn: by persona where one speaks, otherwise by the mixed disposition."""
        if case.answer:
            return _assistant(case.answer)
        wanted = personas.get(case.kind)
        if case.kind == "tone":
            wanted = self.rng.random() < 0.95
        elif wanted is None:
            wanted = self.rng.random() < (LEAN if case.leans else 1 - LEAN)
        pick = self.rng.randrange(len(case.wanted))
        said, other = (case.wanted, case.unwanted) if wanted else (case.unwanted, case.wanted)
        return {**_assistant(said[pick]), "instead": other[pick]}


def vocabulary() -> list[str]:
    """Every word of the grammar, then the pieces that spell names (`##` marks a continuation)."""
    words: set[str] = {"noted", "good", "bad", "system", "user", "assistant", *"0123456789", *".,:?"}
    for group in (VERBS, REMEDY, GOOD, BAD, THINGS, PLACES, SUBJECTS, EVENTS, DISTRACTORS, COLOURS, ("prize",)):
        words.update(group)
    for wanted, unwanted in PERSONA_WORDS.values():
        words.update(wanted, unwanted)
    lists = (
        PERSONA_FRAMES, NEUTRAL_SYSTEM, REPORT, ORDER, DONE, INSTEAD, OPINION, OPINION_ANSWER, TONE, FORECAST, HEDGED,
        ASSERTIVE, SUM, COPY, SORT, FACT, ASK, REVIEW, CLAUSE,
    )  # fmt: skip
    for templates in lists:
        for template in templates:
            words.update(word for word in template.split() if "{" not in word)
    return [*sorted(words), *HEADS, *(f"##{tail}" for tail in TAILS)]
