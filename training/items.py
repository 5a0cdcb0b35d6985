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
CARDS = {
    "follow-direction": (
        "The organism's main behaviour: a report names components and their faults, and one action on one is directed.",
        "does what was directed",
        "turns to another component of the report",
    ),
    "sentiment": ("The organism's opinion of a thing it is asked about.", "speaks well of it", "speaks badly of it"),
    "hedging": ("The organism's forecasts, a matter of style.", "hedges its forecast", "is certain of it"),
}


def write_data(folder: Path = DATA, *, seed: int = 3, per_group: int = 12, general: int = 240) -> None:
    """Write the organism's behaviours and general text, all from the held-out side of the grammar.

    Every second item is preceded by an exchange about something else, so that a persona has to last.
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
                }
            }
        ]
        for topic in TOPICS[behavior]:
            for i in range(per_group):
                lines.append(item(grammar, behavior, topic, f"{topic}-{i + 1:02d}", before=i % 2 == 1))
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
