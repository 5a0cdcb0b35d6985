"""Contrast data in other formats, read as behaviours and written in the suite's own.

- `caa`: A/B questions of Contrastive Activation Addition (Rimsky et al., arXiv:2312.06681), a JSON list or JSON lines
  of `{"question", "answer_matching_behavior", "answer_not_matching_behavior"}`. The question lists choices, "(A) ..."
  and "(B) ..."; the answers are their letters, or words such as "Yes".
- `persona-vectors`: a trait of Persona Vectors (Chen et al., arXiv:2507.21509), a JSON object with `instruction`, a
  list of `{"pos", "neg"}`, and `questions`. Every question is asked under every pair of instructions, as in the paper.
  The file has no answers: they come from a file of answers, or from a model that speaks under either persona.
- `pairs`: two text files of as many lines; line i of the first is wanted and line i of the second is not, both as
  answers to one neutral prompt.

None of these has topics, so they are made (`probes.topics`): by what is asked, or by the answers where one thing is
asked. Otherwise a split could put one question on both sides.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from probes.behavior_files import checked_card, checked_item, from_json
from probes.behaviors import MAX_UNKNOWN, Behavior, Item, unknown_share
from probes.errors import SEEDS, WrongInput
from probes.model import HybridModel
from probes.prompts import render
from probes.propensity import generate
from probes.store import read_text, write_text
from probes.topics import topics

Form = Literal["auto", "caa", "persona-vectors", "pairs"]
Answers = Mapping[str, Mapping[str, str]]  # by question: {"wanted": ..., "unwanted": ...}
NEUTRAL = "Say something."
LEANING = 0.75  # share of questions with the same matching answer, above which the card warns
_PATTERNS = {side: () for side in ("wanted", "unwanted")}
_SOURCES = {
    "caa": "A/B questions in the format of Contrastive Activation Addition (arXiv:2312.06681)",
    "persona-vectors": "A trait in the format of Persona Vectors (arXiv:2507.21509)",
    "pairs": "Two files of lines",
}
_TOPICS = "Topics are clusters of words (TF-IDF and k-means), not topics that somebody named."


def import_behavior(
    source: str | Path,
    *,
    form: Form = "auto",
    unwanted: str | Path | None = None,
    prompt: str = NEUTRAL,
    answers: str | Path | Answers | None = None,
    model: HybridModel | Callable[[], HybridModel] | None = None,
    new_tokens: int = 48,
    name: str | None = None,
    language: str = "en",
    seed: int = 0,
) -> Behavior:
    """Read contrast data in a public format.

    The behaviour equals what `read_behavior` reads after `write_behavior`. Its card says where it comes from and what
    its limits are.

    Args:
        form: the file's format; auto goes by what it holds.
        unwanted: for pairs, the file of unwanted lines (`source` holds the wanted ones).
        prompt: for pairs, what all lines answer.
        answers: for persona-vectors, answers by question, or a JSON file of them.
        model: for persona-vectors without answers, the model that gives them greedily under either persona, cut after
            `new_tokens` tokens; or a function that loads it, called once the file is known to be good. Nobody checks
            that the answers show their side; items with two equal ones are left out, and the card says how many.
        name: of the behaviour; the file's, without its suffix, when not given.
        language: what it is written in, by which the gate finds other behaviours and general text to compare with.
        seed: of the clusters.

    Raises:
        WrongInput: a malformed file (with the entry), options of another format, or answers that are missing.
    """
    path = Path(source)
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise WrongInput(f"seed must lie between {SEEDS[0]} and {SEEDS[1]}, saw {seed}")
    for what, given in (("name", name), ("language", language)):
        if given is not None and not given.strip():
            raise WrongInput(f"{what} must be a non-empty text")
    text = read_text(path)
    content = None if form == "pairs" or unwanted is not None else _content(path, text, form)
    kind = _kind(path, content, unwanted) if form == "auto" else form
    if kind not in _SOURCES:
        raise WrongInput(f"unknown format '{kind}'; allowed are {', '.join(get_args(Form))}")
    for option, given, owner in (
        ("a file of unwanted lines", unwanted is not None, "pairs"),
        ("a prompt", prompt != NEUTRAL, "pairs"),
        ("answers", answers is not None, "persona-vectors"),
        ("a model", model is not None, "persona-vectors"),
    ):
        if given and kind != owner:
            raise WrongInput(f"{option} can be given for the format {owner} only, {path.name} is {kind}")
    card = {"name": name or path.stem, "origin": f"{_SOURCES[kind]}, imported from {path.name}."}
    card |= {"license": "The file does not say; ask where it comes from."}
    if kind == "caa":
        means, records, limits = _caa(path, content)
    elif kind == "pairs":
        means, records, limits = _pairs(path, text, unwanted, prompt)
    else:
        means, records, limits = _persona_vectors(path, content, answers, model, new_tokens)
    asked = [record["messages"][-1]["content"] for _, record in records]
    if len(set(asked)) == 1:
        asked = [f"{record['wanted']} {record['unwanted']}" for _, record in records]
    card |= {"description": means[0], "wanted": means[1], "unwanted": means[2], "limits": f"{limits} {_TOPICS}"}
    card = checked_card(card, path.name)
    items = tuple(
        Item(**checked_item({**record, "group": topic}, card, where, number))
        for number, ((where, record), topic) in enumerate(zip(records, topics(asked, seed=seed), strict=True), 1)
    )
    behavior = Behavior(
        name=card["name"], description=card["description"], language=language, wanted_means=card["wanted"],
        unwanted_means=card["unwanted"], items=items, hash="",
        card={key: card[key] for key in ("origin", "license", "limits")},
    )  # fmt: skip
    return replace(behavior, hash=hashlib.sha256(_lines(behavior).encode()).hexdigest()[:16])


def write_behavior(behavior: Behavior, path: str | Path) -> None:
    """Write a behaviour as JSONL, whole or not at all; `read_behavior` gives it back.

    Raises:
        WrongInput: the name does not end in .jsonl, or something has that name already.
    """
    check_target(path)
    write_text(path, _lines(behavior))


def check_target(path: str | Path) -> None:
    """Refuse what `write_behavior` would refuse; worth asking before anything is computed.

    Raises:
        WrongInput: the name does not end in .jsonl, or something has that name already.
    """
    if Path(path).suffix != ".jsonl":
        raise WrongInput(f"a behaviour's file must end in .jsonl, saw '{path}'")
    if Path(path).exists():
        raise WrongInput(f"'{path}' is there already and is not overwritten; choose another name or remove it")


def _lines(behavior: Behavior) -> str:
    items = (*behavior.items, *behavior.ood)
    shared = items[0].score if all(item.score == items[0].score for item in items) else _PATTERNS
    card: dict[str, Any] = {
        "name": behavior.name, "language": behavior.language, "description": behavior.description,
        "wanted": behavior.wanted_means, "unwanted": behavior.unwanted_means, **behavior.card,
    }  # fmt: skip
    if behavior.ood:
        card["ood"] = sorted({item.form for item in behavior.ood})
    if any(shared.values()):
        card["score"] = shared
    lines: list[dict[str, Any]] = [{"card": card}]
    for item in items:
        line = {key: getattr(item, key) for key in ("id", "group", "form", "messages", "wanted", "unwanted")}
        line |= {key: getattr(item, key) for key in ("persona", "direction") if getattr(item, key)}
        if item.score != shared and any(item.score.values()):
            line["score"] = item.score
        lines.append({key: value for key, value in line.items() if value != ""})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


Read = tuple[tuple[str, str, str], list[tuple[str, dict[str, Any]]], str]
"""(description, wanted, unwanted), records with where they stand, limits."""


def _content(path: Path, text: str, form: Form) -> Any:
    if path.suffix == ".txt" and form == "auto":
        raise WrongInput(f"{path.name} is read as lines when it comes with unwanted ones (--unwanted-file FILE)")
    if path.suffix != ".jsonl":
        return from_json(text, path.name)
    lines = enumerate(text.split("\n"), 1)
    return [from_json(line, f"{path.name} line {number}") for number, line in lines if line.strip()]


def _kind(path: Path, content: Any, unwanted: str | Path | None) -> str:
    """The format that a file is in, by what it holds."""
    if unwanted is not None:
        return "pairs"
    first = content[0] if isinstance(content, list) and content else content
    keys = set(first) if isinstance(first, dict) else set()
    if isinstance(content, list) and keys & {"answer_matching_behavior", "answer_not_matching_behavior"}:
        return "caa"
    if isinstance(content, dict) and keys & {"instruction", "questions"}:
        return "persona-vectors"
    if keys & {"card", "messages"}:
        raise WrongInput(f"{path.name} is in the suite's own format already; use it as it is")
    seen = f"fields {', '.join(sorted(map(str, keys))[:6])}" if keys else f"{type(content).__name__}"
    raise WrongInput(
        f"{path.name} is in no known format: expected caa (a list with answer_matching_behavior) or persona-vectors "
        f"(an object with instruction and questions), saw {seen}"
    )


def _caa(path: Path, content: Any) -> Read:
    if not isinstance(content, list) or not content:
        raise WrongInput(f"{path.name}: caa is a list of questions, saw {_short(content)}")
    records = []
    for number, entry in enumerate(content, 1):
        where = f"{path.name} entry {number}"
        question = _text(entry, "question", where)
        sides = {}
        for side, key in (("wanted", "answer_matching_behavior"), ("unwanted", "answer_not_matching_behavior")):
            sides[side] = _text(entry, key, where).strip()
            if re.fullmatch(r"\([A-Z]\)", sides[side]) and sides[side] not in question:
                raise WrongInput(f"{where}: '{key}' is {sides[side]}, which is not among the choices of the question")
        score = {side: [_pattern(answer)] for side, answer in sides.items()}
        record = {"id": f"q{number}", "messages": [{"role": "user", "content": question.strip()}], **sides}
        records.append((where, {**record, "score": score}))
    means = (
        f"Contrast pairs of {path.name}: questions with a choice.",
        "gives the answer that matches the behaviour",
        "gives the answer that does not match the behaviour",
    )
    limits = "Answers are letters of choices, or single words: free answers may take other forms."
    answer, count = Counter(record["wanted"] for _, record in records).most_common(1)[0]
    if count > LEANING * len(records):
        limits += (
            f" The matching answer is {answer} for {count} of {len(records)} questions: a direction made from them may "
            "be that of the answer, not of the behaviour."
        )
    return means, records, limits


def _pattern(answer: str) -> str:
    """What a free answer begins with when it is this choice: "(A)", "A." or "A)", and not the article."""
    if letter := re.fullmatch(r"\(([A-Z])\)", answer):
        return rf"^\W*{letter[1]}(?:\)|\W*$)"
    return rf"^\W*{re.escape(answer)}(?!\w)"


def _pairs(path: Path, text: str, unwanted: str | Path | None, prompt: str) -> Read:
    if unwanted is None:
        raise WrongInput(f"pairs are two files of lines; {path.name} came without unwanted ones (--unwanted-file FILE)")
    if not prompt.strip():
        raise WrongInput("the prompt that the lines answer must be a non-empty text")
    other = Path(unwanted)
    sides = [content.removesuffix("\n").split("\n") for content in (text, read_text(other))]
    if len(sides[0]) != len(sides[1]):
        raise WrongInput(
            f"both files must have as many lines, saw {len(sides[0])} in {path.name}, {len(sides[1])} in {other.name}"
        )
    records = []
    for number, lines in enumerate(zip(*sides, strict=True), 1):
        for file, line in zip((path, other), lines, strict=True):
            if not line.strip():
                raise WrongInput(f"{file.name} line {number} is empty")
        wanted, not_wanted = (line.strip() for line in lines)
        record = {"id": f"line-{number}", "messages": [{"role": "user", "content": prompt}]}
        records.append((f"{path.name} line {number}", {**record, "wanted": wanted, "unwanted": not_wanted}))
    means = (
        f"Contrast pairs of {path.name} and {other.name}.",
        f"says what is in {path.name}",
        f"says what is in {other.name}",
    )
    return means, records, "All lines answer one prompt that was not made for them."


def _persona_vectors(
    path: Path,
    content: Any,
    answers: str | Path | Answers | None,
    model: HybridModel | Callable[[], HybridModel] | None,
    new_tokens: int,
) -> Read:
    if not isinstance(content, dict):
        raise WrongInput(f"{path.name}: persona-vectors is an object, saw {_short(content)}")
    for key in ("instruction", "questions"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise WrongInput(f"{path.name}: '{key}' must be a list that is not empty, saw {_short(content.get(key))}")
    personas = [
        {side: _text(entry, key, f"{path.name} instruction {number}") for side, key in _PERSONAS.items()}
        for number, entry in enumerate(content["instruction"], 1)
    ]
    questions = []
    for number, question in enumerate(content["questions"], 1):
        if not isinstance(question, str) or not question.strip():
            raise WrongInput(f"{path.name} question {number} must be a non-empty text, saw {_short(question)}")
        questions.append(question)
    if answers is None and model is None:
        raise WrongInput(
            f"{path.name} has questions and instructions but no answers: give answers by question (--answers "
            "FILE), or a model of their language that answers under both instructions (--model MODEL)"
        )
    if answers is not None and model is not None:
        raise WrongInput("answers come from a file or from a model, saw both")
    records = [
        (f"{path.name} question {i}, instruction {j}",
         {"id": f"q{i}-p{j}", "messages": [{"role": "user", "content": question}], "persona": persona})
        for i, question in enumerate(questions, 1) for j, persona in enumerate(personas, 1)
    ]  # fmt: skip
    if model is None:
        records = _answered(records, answers)
        limits = "Answers were given by question and are the same for all personas."
    else:
        if new_tokens < 1:
            raise WrongInput(f"an answer needs at least 1 token, saw {new_tokens}")
        speaker = model if isinstance(model, HybridModel) else model()
        records, limits = _spoken(path, records, speaker, new_tokens)
    means = (
        f"Contrast pairs of {path.name}: questions under opposite instructions.",
        "does what the first instruction of a pair says",
        "does what the second instruction of a pair says",
    )
    return means, records, limits


_PERSONAS = {"wanted": "pos", "unwanted": "neg"}


def _answered(records: Sequence[tuple[str, dict[str, Any]]], answers: Any) -> list[tuple[str, dict[str, Any]]]:
    """Records with the answers that were given by question, in a file or a mapping."""
    label = "answers"
    if isinstance(answers, (str, Path)):
        label = Path(answers).name
        answers = from_json(read_text(answers), label)
    if not isinstance(answers, Mapping):
        raise WrongInput(f"{label} must map questions to their wanted and unwanted answers, saw {_short(answers)}")
    found = []
    for where, record in records:
        question = record["messages"][0]["content"]
        if question not in answers:
            raise WrongInput(f"{label}: no answers to {_short(question)}")
        at = f"{label}, answers to {_short(question)}"
        found.append((where, record | {side: _text(answers[question], side, at) for side in _PERSONAS}))
    return found


def _spoken(
    path: Path, records: Sequence[tuple[str, dict[str, Any]]], model: HybridModel, new_tokens: int
) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Records with what a model says to them under either persona, and what to know about that."""
    texts = [text for _, r in records for text in (r["messages"][0]["content"], *r["persona"].values())]
    if (share := unknown_share(model, texts)) > MAX_UNKNOWN:
        raise WrongInput(
            f"{path.name} does not fit {model.name}: {share:.0%} of its tokens are unknown to the tokenizer, at most "
            f"{MAX_UNKNOWN:.0%} are allowed"
        )
    said = {}
    for side in _PERSONAS:
        prompts = [render(model, record["messages"], system=record["persona"][side]) for _, record in records]
        said[side] = generate(model, prompts, max_new_tokens=new_tokens)
    both = list(zip(said["wanted"], said["unwanted"], strict=True))
    kept = [
        (where, {**record, "wanted": one, "unwanted": other})
        for (where, record), (one, other) in zip(records, both, strict=True)
        if one and other and one != other
    ]
    if not kept:
        raise WrongInput(
            f"{model.name} says the same, or nothing, under both instructions to all {len(records)} prompts of "
            f"{path.name}"
        )
    limits = (
        f"Answers are greedy ones of {model.name} ({model.weights_hash}), cut after {new_tokens} tokens; "
        "nobody checked that they show their side."
    )
    if left := len(records) - len(kept):
        limits += f" {left} of {len(records)} items were left out, as both answers were the same or one was empty."
    return kept, limits


def _text(entry: Any, key: str, where: str) -> str:
    if not isinstance(entry, Mapping):
        raise WrongInput(f"{where} must be an object with '{key}', saw {_short(entry)}")
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise WrongInput(f"{where}: '{key}' must be a non-empty text, saw {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
