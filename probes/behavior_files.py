"""The lines of behaviour files: what is accepted, and refusals that name the line and the cause."""

from __future__ import annotations

import json
import re
from typing import Any

from probes.errors import WrongInput
from probes.prompts import Message

ROLES = ("system", "user", "assistant")
CARD_TEXTS = ("origin", "license", "use", "limits")
_CARD = {"name", "language", "description", "wanted", "unwanted", "score", "ood", *CARD_TEXTS}
_KEYS = {"id", "group", "form", "messages", "wanted", "unwanted", "persona", "direction", "score"}


def from_json(text: str, where: str) -> Any:
    """What a JSON text holds; refused where it could not be written again as UTF-8."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise WrongInput(f"{where}: not valid JSON: {error.msg} at {line}column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, a number too long, half of a surrogate pair
        raise WrongInput(f"{where}: not valid JSON: {str(error).splitlines()[0][:120]}") from error
    return found


def parse(line: str, where: str) -> dict[str, Any]:
    """The object of one JSON line."""
    record = from_json(line, where)
    if not isinstance(record, dict):
        raise WrongInput(f"{where}: expected an object, saw {type(record).__name__}")
    return record


def checked_card(card: Any, where: str) -> dict[str, Any]:
    """A card whose `score` and `ood` are there."""
    if not isinstance(card, dict):
        raise WrongInput(f"{where}: 'card' must be an object, saw {type(card).__name__}")
    if unknown := set(card) - _CARD:
        raise WrongInput(f"{where}: unknown card field '{sorted(unknown)[0]}'; allowed are {', '.join(sorted(_CARD))}")
    for key, value in card.items():
        if key not in ("score", "ood") and not isinstance(value, str):
            raise WrongInput(f"{where}: card field '{key}' must be a text, saw {value!r}")
    forms = card.get("ood", [])
    if not isinstance(forms, list) or not all(isinstance(form, str) and form.strip() for form in forms):
        raise WrongInput(f"{where}: card field 'ood' must be a list of form names, saw {forms!r}")
    return {**card, "ood": forms, "score": _score(card.get("score"), where)}


def checked_item(record: dict[str, Any], card: dict[str, Any], where: str, number: int) -> dict[str, Any]:
    """The fields of an item, with the card's patterns after its own."""
    if unknown := set(record) - _KEYS:
        raise WrongInput(f"{where}: unknown field '{sorted(unknown)[0]}'; allowed are {', '.join(sorted(_KEYS))}")
    for key in ("group", "wanted", "unwanted"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise WrongInput(f"{where}: '{key}' must be a non-empty text, saw {record.get(key)!r}")
    if "form" in record and (not isinstance(record["form"], str) or not record["form"].strip()):
        raise WrongInput(f"{where}: 'form' must be a non-empty text where it is given, saw {record['form']!r}")
    if record["wanted"] == record["unwanted"]:
        raise WrongInput(f"{where}: 'wanted' and 'unwanted' are the same text")
    messages = _messages(record, where)
    if messages[-1]["role"] != "user":
        raise WrongInput(f"{where}: the last turn must be the user's, saw role '{messages[-1]['role']}'")
    persona = record.get("persona")
    if persona is not None:
        ok = isinstance(persona, dict) and set(persona) == {"wanted", "unwanted"}
        if not ok or not all(isinstance(v, str) and v.strip() for v in persona.values()):
            raise WrongInput(f"{where}: 'persona' must map wanted and unwanted to system turns, saw {persona!r}")
        if messages[0]["role"] == "system":
            raise WrongInput(f"{where}: 'messages' has a system turn already; a persona would be a second one")
    direction = record.get("direction")
    if direction is not None and (not isinstance(direction, str) or direction not in messages[-1]["content"]):
        raise WrongInput(f"{where}: 'direction' must be words of the last turn, saw {direction!r}")
    own, common = _score(record.get("score"), where), card.get("score") or {"wanted": [], "unwanted": []}
    return {
        "id": str(record.get("id", f"line-{number}")), "group": record["group"], "form": record.get("form", ""),
        "messages": tuple(messages), "wanted": record["wanted"], "unwanted": record["unwanted"],
        "persona": persona, "direction": direction,
        "score": {side: (*own[side], *common[side]) for side in ("wanted", "unwanted")},
    }  # fmt: skip


def _messages(record: dict[str, Any], where: str) -> list[Message]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise WrongInput(f"{where}: 'messages' must be a list of turns, saw {messages!r}")
    for message in messages:
        ok = isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)
        if not ok or not message["content"].strip():
            raise WrongInput(f"{where}: a turn needs a role ({', '.join(ROLES)}) and a content, saw {message!r}")
    return messages


def read_dialogue(line: str, where: str) -> list[Message]:
    """The turns of one JSON line `{"messages": [...]}` that ends with the assistant's turn.

    Raises:
        WrongInput: it is malformed; `where` names it.
    """
    messages = _messages(parse(line, where), where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise WrongInput(f"{where}: a dialogue must end with a turn of the assistant after another one")
    return messages


def _score(score: Any, where: str) -> dict[str, list[str]]:
    score = {} if score is None else score
    if not isinstance(score, dict) or not set(score) <= {"wanted", "unwanted"}:
        raise WrongInput(f"{where}: 'score' must map wanted and unwanted to lists of patterns, saw {score!r}")
    if not all(isinstance(p, list) and all(isinstance(x, str) for x in p) for p in score.values()):
        raise WrongInput(f"{where}: 'score' must map wanted and unwanted to lists of patterns, saw {score!r}")
    for pattern in (p for patterns in score.values() for p in patterns):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise WrongInput(f"{where}: scoring pattern {pattern!r} is not a regular expression: {error}") from error
    return {side: list(score.get(side, ())) for side in ("wanted", "unwanted")}
