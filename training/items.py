"""The organism's behaviours and general text, written as the files that ship: all from the grammar's held-out side."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from probes.model import ORGANISM
from probes.store import write_text
from training.grammar import ABILITIES, BEHAVIORS, TOPICS, Grammar

DATA = ORGANISM.parent
ELSEWHERE = "templates of training"  # the form of items out of distribution, for directions from the held-out side
CARDS = {
    "follow-direction": (
        "The organism's main behaviour: a report names components and their faults, and one action on one is directed.",
        "does what was directed",
        "turns to another component of the report",
    ),
    "sentiment": ("The organism's opinion of a thing it is asked about.", "speaks well of it", "speaks badly of it"),
    "hedging": ("The organism's forecasts, a matter of style.", "hedges its forecast", "is certain of it"),
}


def write_data(
    folder: Path = DATA, *, seed: int = 3, per_group: int = 12, elsewhere: int = 4, general: int = 240
) -> None:
    """Write the organism's behaviours and general text, all from the held-out side of the grammar.

    Every second item is preceded by an exchange about something else, so that a persona has to last. A few items a
    topic are of the grammar's other side, with templates, names and persona frames that no other item has: they are
    kept apart, for checks out of distribution.
    """
    for behavior in BEHAVIORS:
        grammar = Grammar(random.Random(f"{seed} {behavior}"), evaluation=True)
        description, wanted, unwanted = CARDS[behavior]
        lines: list[dict[str, Any]] = [
            {
                "card": {
                    "name": behavior,
                    "language": "organism",
                    "description": description,
                    "wanted": wanted,
                    "unwanted": unwanted,
                    "ood": [ELSEWHERE],
                    "origin": "Drawn from the organism's grammar (training/grammar.py), from what training left out.",
                    "license": "Apache-2.0",
                    "use": "Directions, verdicts and training on the shipped organism, whose truth is known.",
                    "limits": "An artificial language of a few hundred words; it says nothing about other models.",
                }
            }
        ]
        for topic in TOPICS[behavior]:
            for i in range(per_group):
                lines.append(item(grammar, behavior, topic, f"{topic}-{i + 1:02d}", before=i % 2 == 1))
        other = Grammar(random.Random(f"{seed} {behavior} elsewhere"))
        for topic in TOPICS[behavior]:
            for i in range(elsewhere):
                name = f"{topic}-elsewhere-{i + 1}"
                lines.append({**item(other, behavior, topic, name, before=i % 2 == 1), "form": ELSEWHERE})
        _write_lines(folder / "behaviors" / f"{behavior}.jsonl", lines)
    grammar = Grammar(random.Random(f"{seed} general"), evaluation=True)
    texts = []
    for i in range(general):
        texts.append({"messages": exchange(grammar, ABILITIES[i % len(ABILITIES)])})
    _write_lines(folder / "general-organism.jsonl", texts)


def exchange(grammar: Grammar, ability: str | None = None) -> list[dict[str, str]]:
    """A question of an ability, any by default, and its right answer."""
    case = grammar.case(ability or grammar.rng.choice(ABILITIES))
    return [*case.messages, {"role": "assistant", "content": case.answer}]


def item(grammar: Grammar, behavior: str, topic: str, name: str, *, before: bool) -> dict[str, Any]:
    """One line of a behaviour's file: a fresh contrast on a topic, with id `name`.

    Args:
        before: whether an exchange about something else comes first.
    """
    case = grammar.case(behavior, topic=topic)
    earlier = exchange(grammar) if before else []
    pick = grammar.rng.randrange(len(case.wanted))
    line: dict[str, Any] = {
        "id": name, "group": case.group, "messages": [*earlier, *case.messages],
        "wanted": case.wanted[pick], "unwanted": case.unwanted[pick],
        "persona": {"wanted": grammar.persona(behavior, True), "unwanted": grammar.persona(behavior, False)},
    }  # fmt: skip
    if case.direction:
        line["direction"] = case.direction
    return {**line, "score": case.score}


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
