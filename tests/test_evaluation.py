"""What an evaluation says, against answers and losses computed one row at a time with transformers alone."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from probes.behaviors import read_behavior
from probes.damage import DATA, GENERAL
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import render
from probes.propensity import prepare, propensity
from training.evaluation import Examiner, Question, default_questions, read_questions
from training.general import general_data, line_of
from training.grammar import Grammar
from training.items import exchange

MOST = 32


@torch.no_grad()
def answer(model: HybridModel, ids: Any, length: int) -> str:
    """Greedy, token by token, without padding or cache."""
    said = list(ids)
    for _ in range(length):
        said.append(int(model.hf(input_ids=torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
        if said[-1] == model.tokenizer.eos_token_id:
            break
    return model.tokenizer.decode(said[len(ids) :], skip_special_tokens=True).strip()


def test_every_measure_is_what_plain_transformers_gives(organism: HybridModel) -> None:
    behavior, asked = read_behavior("follow-direction"), default_questions(organism, n=MOST)
    _, general = general_data(organism, n=1)
    examiner = Examiner(organism, behavior, asked, general, most=MOST, max_new_tokens=24)
    found = examiner.measure(3, progress=False)
    own = behavior.take(MOST, seed=0)
    judged = [item.judge(answer(organism, item.prompt(organism).ids, 24)) for item in own.items]
    assert found.step == 3
    assert found.wanted is not None
    assert found.unwanted is not None
    assert found.wanted.value == judged.count("wanted") / MOST
    assert found.unwanted.value == judged.count("unwanted") / MOST
    assert 0 < found.wanted.value < 1  # or the share would show nothing
    leaning = propensity(organism, prepare(organism, own)).values
    assert found.propensity.value == pytest.approx(statistics.mean(leaning), abs=1e-5)
    topics = {item.group for item in own.items}
    assert len(topics) < MOST
    assert found.wanted.groups == found.unwanted.groups == len(topics)
    for name in ("arithmetic", "review"):
        part = [q for q in asked if q.ability == name]
        right = [answer(organism, q.prompt.ids, 24) == q.answer for q in part]
        assert found.abilities[name].value == sum(right) / MOST
        assert found.abilities[name].n == MOST
    nats = []
    for segment in general[:MOST]:
        ids = [*segment.context, *segment.decision]
        with torch.no_grad():
            table = organism.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        at = [len(segment.context) + i for i, counts in enumerate(segment.scored) if counts]
        nats.append(-statistics.mean(float(table[i - 1, ids[i]]) for i in at))
    assert found.loss is not None
    assert found.loss.value == pytest.approx(statistics.mean(nats), abs=1e-5)
    assert found.loss.groups == len({line_of(segment) for segment in general[:MOST]})


def test_an_answer_that_only_begins_right_is_wrong(organism: HybridModel) -> None:
    asked = [q for q in default_questions(organism, n=8) if q.ability == "copying"]
    first = [Question(ability="first words", prompt=q.prompt, answer=q.answer.split()[0]) for q in asked]
    assert all(part.answer != q.answer for part, q in zip(first, asked, strict=True))
    examiner = Examiner(organism, read_behavior("hedging"), [*asked, *first], [], most=8, max_new_tokens=24)
    found = examiner.measure(0, progress=False).abilities
    assert found["copying"].value > 0.8
    assert found["first words"].value == 0


def test_questions_that_could_not_be_answered_are_refused(organism: HybridModel, tmp_path: Path) -> None:
    asked, behavior = default_questions(organism, n=4), read_behavior("hedging")
    with pytest.raises(WrongInput, match=r"max_new_tokens 3 is too short for 'copying': '.*' has \d+ tokens"):
        Examiner(organism, behavior, asked, [], most=4, max_new_tokens=3)
    path = tmp_path / "asked.jsonl"
    cases = {"quantum xylophone": "unknown to the tokenizer", "blue " * 5000: "a prompt of 5005 tokens is longer"}
    for said, message in cases.items():
        turns = [{"role": "user", "content": said}, {"role": "assistant", "content": "blue"}]
        path.write_text(json.dumps({"messages": turns}), encoding="utf-8")
        with pytest.raises(WrongInput, match=f"line 1: .*{message}"):
            read_questions(organism, str(path))


def test_turns_of_one_dialogue_are_one_group(organism: HybridModel, tmp_path: Path) -> None:
    grammar = Grammar(random.Random(0))
    turns = [turn for ability in ("arithmetic", "copying", "sorting") for turn in exchange(grammar, ability)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(10)), encoding="utf-8")
    _, held = general_data(organism, str(path), n=3)
    examiner = Examiner(organism, read_behavior("follow-direction"), [], held, most=4, max_new_tokens=2)
    loss = examiner.measure(0, progress=False).loss
    assert loss is not None
    assert (loss.n, loss.groups) == (4, 2)  # three turns of one dialogue, and one of the other


def test_questions_of_a_file_are_limited_ability_by_ability(organism: HybridModel, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    lines = [json.loads(line) for line in (DATA / GENERAL[1]).read_text(encoding="utf-8").splitlines()[:11]]
    lines = [{**line, "ability": "counting" if i < 9 else "naming"} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines), encoding="utf-8")
    asked = read_questions(organism, str(path))
    assert [q.answer for q in asked] == [line["messages"][-1]["content"] for line in lines]
    assert asked[0].prompt.ids == render(organism, lines[0]["messages"][:-1]).ids
    drawn = [
        Examiner(organism, read_behavior("hedging"), asked, [], most=4, max_new_tokens=24, seed=seed).questions
        for seed in (0, 0, 1)
    ]
    assert Counter(q.ability for q in drawn[0]) == {"counting": 4, "naming": 2}
    assert drawn[0] == drawn[1] != drawn[2]
    assert [q for q in asked if q in drawn[0]] == list(drawn[0])


@pytest.mark.parametrize(
    ("ability", "seen"),
    [("wanted", "'wanted'"), ("loss", "'loss'"), ("", "''"), (" ", "' '"), (3, "3"), (None, "None")],
)
def test_abilities_need_a_name_of_their_own(organism: HybridModel, tmp_path: Path, ability: Any, seen: str) -> None:
    path = tmp_path / "asked.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns, "ability": ability}), encoding="utf-8")
    with pytest.raises(WrongInput, match=rf"line 1: 'ability' must be a name other than wanted, .*; saw {seen}"):
        read_questions(organism, str(path))


def test_questions_and_their_number_do_not_depend_on_the_run(organism: HybridModel) -> None:
    one, other = (default_questions(organism, n=n) for n in (4, 8))
    for ability in {q.ability for q in one}:
        several = [[q for q in part if q.ability == ability] for part in (one, other)]
        assert several[0] == several[1][:4]


def test_what_is_asked_has_a_hash(organism: HybridModel) -> None:
    behavior, asked = read_behavior("hedging"), default_questions(organism, n=2)
    _, general = general_data(organism, n=1)
    changed = [Question(ability=asked[0].ability, prompt=asked[0].prompt, answer="red"), *asked[1:]]
    renamed = [Question(ability="another", prompt=asked[0].prompt, answer=asked[0].answer), *asked[1:]]
    cases = [
        (behavior, asked, general), (behavior, changed, general), (behavior, renamed, general),
        (behavior, asked, general[1:]), (read_behavior("sentiment"), asked, general),
    ]  # fmt: skip
    hashes = [Examiner(organism, *case, most=8, max_new_tokens=9).hash for case in (*cases, *cases)]
    assert hashes[:5] == hashes[5:]
    assert len(set(hashes)) == 5
