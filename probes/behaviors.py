"""Behaviours: contrasts between what is wanted and what is not, with the data that show them.

A behaviour is a JSONL file of contrast pairs. Each line is one item:

    {"id": "...", "group": "topic", "form": "shape of the prompt", "messages": [{"role": "user", "content": "..."}],
     "wanted": "...", "unwanted": "...", "persona": {"wanted": "system turn", "unwanted": "system turn"},
     "direction": "words of the last turn", "score": {"wanted": ["regex"], "unwanted": ["regex"]}}

`id`, `form`, `persona`, `direction` and `score` are optional. A first line `{"card": {...}}` may describe the behaviour
(`name`, `language`, `description`, `wanted`, `unwanted`; as a data card `origin`, `license`, `use`, `limits`), hold
scoring patterns for all items, and list forms under `ood`. `group` is the topic: items of one group never stand on both
sides of a split. Items of a form under `ood` are kept apart from all others, for checks out of distribution.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from probes.behavior_files import CARD_TEXTS, checked_card, checked_item, parse
from probes.behavior_files import read_dialogue as read_dialogue
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Message, Prompt, render
from probes.store import read_text

SHIPPED = Path(__file__).parent / "data" / "behaviors"
Side = Literal["wanted", "unwanted"]
MAX_UNKNOWN = 0.02


@dataclass(frozen=True, kw_only=True)
class Item:
    """One contrast pair. `persona` maps a side to the system turn that brings it out; `form` is the prompt's shape."""

    id: str
    group: str
    messages: tuple[Message, ...]
    wanted: str
    unwanted: str
    persona: Mapping[str, str] | None = None
    direction: str | None = None
    score: Mapping[str, Sequence[str]]
    form: str = ""

    def prompt(self, model: HybridModel, *, persona: Side | None = None) -> Prompt:
        """Render for a model, with the system turn of one side or none."""
        if persona and not self.persona:
            raise WrongInput(f"item {self.id} has no persona turns")
        system = self.persona[persona] if persona and self.persona else None
        return render(model, self.messages, system=system, direction=self.direction)

    @property
    def wording(self) -> str:
        """Both persona turns as one text; empty without personas. Items with equal ones share their persona turns."""
        return "\n".join(self.persona[side] for side in get_args(Side)) if self.persona else ""

    def judge(self, answer: str) -> Literal["wanted", "unwanted", "neither"]:
        """Classify a free answer by the patterns that matched on each side.

        More distinct matches decide, so a lexicon and a single marker both work; a tie is "neither".
        """
        return judge(answer, self.score)


def judge(answer: str, score: Mapping[str, Sequence[str]]) -> Literal["wanted", "unwanted", "neither"]:
    """Which side's patterns have more distinct matches in an answer."""
    hits = {side: sum(len(set(_finds(p, answer))) for p in score[side]) for side in ("wanted", "unwanted")}
    if hits["wanted"] == hits["unwanted"]:
        return "neither"
    return "wanted" if hits["wanted"] > hits["unwanted"] else "unwanted"


def _finds(pattern: str, text: str) -> list[str]:
    return [m.group(0).lower() for m in re.finditer(pattern, text, re.IGNORECASE)]


@dataclass(frozen=True, kw_only=True)
class Behavior:
    """A named set of items. Equal content gives an equal `hash`, wherever the file lies.

    `language` is "en" unless the card says otherwise; the organism's behaviours are in "organism".

    Attributes:
        ood: items of the forms that the card keeps out of everything but checks out of distribution; not in `items`,
            and whole in every split.
        card: `origin`, `license`, `use` and `limits`, as far as given.
    """

    name: str
    description: str
    language: str
    wanted_means: str
    unwanted_means: str
    items: tuple[Item, ...]
    hash: str
    ood: tuple[Item, ...] = ()
    card: Mapping[str, str] = field(default_factory=dict)

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(sorted({item.form for item in self.items if item.form}))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(sorted({item.group for item in self.items}))

    @property
    def has_persona(self) -> bool:
        return all(item.persona for item in self.items)

    @property
    def has_scorer(self) -> bool:
        return all(any(item.score.values()) for item in self.items)

    def split(self, *, held_out: float = 0.4, seed: int = 0) -> tuple[Behavior, Behavior]:
        """(fit, held-out), by whole topic groups: a share `held_out` of them, at least one on either side."""
        if not 0 < held_out < 1:
            raise WrongInput(f"held_out must lie between 0 and 1, saw {held_out}")
        groups = list(self.groups)
        if len(groups) < 2:
            raise WrongInput(f"behaviour '{self.name}' has {len(groups)} topic group; a split needs at least 2")
        random.Random(f"{seed} {self.name}").shuffle(groups)
        kept = set(groups[: min(max(round(len(groups) * held_out), 1), len(groups) - 1)])
        fit = tuple(item for item in self.items if item.group not in kept)
        rest = tuple(item for item in self.items if item.group in kept)
        return replace(self, items=fit), replace(self, items=rest)

    def take(self, n: int, *, seed: int = 0) -> Behavior:
        """At most n items, spread evenly over the groups."""
        if n < 1:
            raise WrongInput(f"at least 1 item must be taken, saw {n}")
        order = list(self.items)
        random.Random(f"{seed} {self.name}").shuffle(order)
        seen: dict[str, int] = {}
        rank = {}
        for item in order:
            rank[item.id] = seen[item.group] = seen.get(item.group, 0) + 1
        chosen = {item.id for item in sorted(order, key=lambda item: rank[item.id])[:n]}
        return replace(self, items=tuple(item for item in self.items if item.id in chosen))

    def __str__(self) -> str:
        apart = f" and {len(self.ood)} out of distribution" if self.ood else ""
        return f"{self.name}: {len(self.items)} items in {len(self.groups)} groups{apart}, {self.hash}"


def shipped_behaviors() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.jsonl")))


def read_behavior(source: str | Path) -> Behavior:
    """Read a shipped behaviour by name, or a JSONL file by path.

    Raises:
        WrongInput: unknown name, empty file, or a malformed line (the message has its number).
    """
    path = Path(source)
    if path.suffix != ".jsonl":
        path = SHIPPED / f"{source}.jsonl"
        if not path.is_file():
            raise WrongInput(
                f"unknown behaviour '{source}'; shipped are {', '.join(shipped_behaviors())}, or give a .jsonl file"
            )
    content = read_text(path)
    card: dict[str, Any] = {}
    items: list[Item] = []
    ids: dict[str, int] = {}
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        record = parse(line, where)
        if "card" in record and not items and not card:
            card = checked_card(record["card"], where)
            continue
        item = Item(**checked_item(record, card, where, number))
        if item.id in ids:
            raise WrongInput(f"{where}: id '{item.id}' was already used at line {ids[item.id]}")
        ids[item.id] = number
        items.append(item)
    if not items:
        raise WrongInput(f"{path.name} is empty: a behaviour needs at least one item")
    bare = [item.id for item in items if not item.persona]
    if bare and len(bare) < len(items):
        raise WrongInput(f"{path.name}: all items or none need a persona; {len(bare)} have none, '{bare[0]}' first")
    kept_out = card.get("ood", [])
    if missing := sorted(set(kept_out) - {item.form for item in items}):
        raise WrongInput(f"{path.name}: no item has the form '{missing[0]}' that the card lists under 'ood'")
    shown = tuple(item for item in items if item.form not in kept_out)
    if not shown:
        raise WrongInput(f"{path.name}: all {len(items)} items have forms that the card lists under 'ood'")
    return Behavior(
        name=card.get("name", path.stem),
        description=card.get("description", ""),
        language=card.get("language", "en"),
        wanted_means=card.get("wanted", "shows the wanted behaviour"),
        unwanted_means=card.get("unwanted", "shows the unwanted behaviour"),
        items=shown,
        hash=hashlib.sha256(content.encode()).hexdigest()[:16],
        ood=tuple(item for item in items if item.form in kept_out),
        card={key: card[key] for key in CARD_TEXTS if key in card},
    )


def unknown_share(model: HybridModel, texts: Sequence[str]) -> float:
    """Share of tokens that the tokenizer does not know (0 for a tokenizer without an unknown token)."""
    unknown = model.tokenizer.unk_token_id
    if unknown is None:
        return 0.0
    ids = [i for text in texts for i in model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return sum(i == unknown for i in ids) / max(len(ids), 1)


def _unknown(model: HybridModel, behavior: Behavior) -> float:
    texts = [
        text
        for item in (*behavior.items, *behavior.ood)
        for text in (item.wanted, item.unwanted, *(m["content"] for m in item.messages), *(item.persona or {}).values())
    ]
    return unknown_share(model, texts)


def knows_words(model: HybridModel, behavior: Behavior) -> bool:
    """Whether at most `MAX_UNKNOWN` of a behaviour's tokens are unknown to the tokenizer."""
    return _unknown(model, behavior) <= MAX_UNKNOWN


def check_vocabulary(model: HybridModel, behavior: Behavior) -> None:
    """Refuse a behaviour whose words the model's tokenizer does not know.

    Raises:
        WrongInput: with the share of unknown tokens.
    """
    share = _unknown(model, behavior)
    if share > MAX_UNKNOWN:
        raise WrongInput(
            f"behaviour '{behavior.name}' does not fit {model.name}: {share:.0%} of its tokens are unknown to the "
            f"tokenizer, at most {MAX_UNKNOWN:.0%} are allowed"
        )
