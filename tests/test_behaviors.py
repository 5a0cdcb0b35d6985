"""Behaviour files: what is accepted, and that every refusal names the line and the cause."""

import json

import pytest

from probes.behaviors import SHIPPED, check_vocabulary, read_behavior, shipped_behaviors
from probes.errors import WrongInput

GOOD = {
    "id": "a", "group": "g", "messages": [{"role": "user", "content": "hello"}], "wanted": "yes", "unwanted": "no",
    "score": {"wanted": ["yes"], "unwanted": ["no"]},
}  # fmt: skip


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_shipped_behaviors_are_large_and_varied():
    assert {"follow-direction", "sentiment", "hedging", "follow-direction-en", "sentiment-en"} <= set(
        shipped_behaviors()
    )
    for name in shipped_behaviors():
        behavior = read_behavior(name)
        assert len(behavior.items) >= 160, name
        assert len(behavior.groups) >= 16, name
        assert behavior.has_persona, name
        assert behavior.has_scorer, name


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.jsonl")])
def test_shipped_scorers_know_their_own_answers(name):
    behavior = read_behavior(name)
    right = sum((i.judge(i.wanted) == "wanted") + (i.judge(i.unwanted) == "unwanted") for i in behavior.items)
    assert right / (2 * len(behavior.items)) >= 0.95


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.jsonl")])
def test_answers_of_both_sides_are_of_one_length(name):
    """A side that is longer would be less likely for that reason alone."""
    items = read_behavior(name).items
    ratio = sum(len(i.wanted.split()) for i in items) / sum(len(i.unwanted.split()) for i in items)
    assert 0.94 < ratio < 1.06


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty"),
        (["{not json"], "line 1: not valid JSON"),
        ([GOOD, "[1]"], "line 2: expected an object, saw list"),
        ([GOOD, {**GOOD, "id": "b", "wanted": ""}], "line 2: 'wanted' must be a non-empty text"),
        ([{**GOOD, "unwanted": "yes"}], "line 1: 'wanted' and 'unwanted' are the same"),
        ([GOOD, GOOD], "line 2: id 'a' was already used at line 1"),
        ([{**GOOD, "colour": 1}], "line 1: unknown field 'colour'; allowed are"),
        ([{**GOOD, "messages": []}], "line 1: 'messages' must be a list of turns"),
        ([{**GOOD, "messages": [{"role": "robot", "content": "x"}]}], "line 1: a turn needs a role"),
        ([{**GOOD, "messages": [{"role": "assistant", "content": "x"}]}], "the last turn must be the user's"),
        ([{**GOOD, "persona": {"wanted": "x"}}], "line 1: 'persona' must map wanted and unwanted"),
        ([{**GOOD, "direction": "not there"}], "line 1: 'direction' must be words of the last turn"),
        ([{**GOOD, "score": {"wanted": ["("]}}], "is not a regular expression"),
        ([{**GOOD, "group": None}], "line 1: 'group' must be a non-empty text"),
        ([{**GOOD, "form": " "}], "line 1: 'form' must be a non-empty text where it is given, saw ' '"),
        ([{**GOOD, "form": 3}], "line 1: 'form' must be a non-empty text where it is given, saw 3"),
        (
            [{"card": {"licence": "x"}}, GOOD],
            "line 1: unknown card field 'licence'; allowed are description, language, li",
        ),
        ([{"card": {"limits": ["x"]}}, GOOD], "line 1: card field 'limits' must be a text, saw ['x']"),
        ([{"card": {"ood": "e-mail"}}, GOOD], "line 1: card field 'ood' must be a list of form names, saw 'e-mail'"),
        (
            [{"card": {"ood": ["e-mail"]}}, GOOD],
            "b.jsonl: no item has the form 'e-mail' that the card lists under 'ood'",
        ),
        ([{"card": {"ood": ["log"]}}, {**GOOD, "form": "log"}], "b.jsonl: all 1 items have forms that the card lists"),
    ],
)
def test_malformed_files_are_refused_by_line(tmp_path, records, message):
    with pytest.raises(WrongInput, match=r"^[^\n]+$") as error:
        read_behavior(write(tmp_path / "b.jsonl", *records))
    assert message in str(error.value)


PERSONA = {"wanted": "Say yes.", "unwanted": "Say no."}


def formed(path):
    """Eight chats in four groups, two log files in a fifth that are out of distribution, and a data card."""
    chats = [{**GOOD, "id": f"c{i}", "group": f"g{i % 4}", "form": ["single", "aside"][i % 2]} for i in range(8)]
    logs = [{**GOOD, "id": f"l{i}", "group": "far", "form": "log"} for i in range(2)]
    card = {"ood": ["log"], "origin": "By hand.", "license": "Apache-2.0", "use": "Tests.", "limits": "Tiny."}
    return write(path, {"card": card}, logs[0], *chats, logs[1])


def test_forms_out_of_distribution_are_kept_apart(tmp_path):
    behavior = read_behavior(formed(tmp_path / "b.jsonl"))
    assert [item.id for item in behavior.items] == [f"c{i}" for i in range(8)]
    assert [item.id for item in behavior.ood] == ["l0", "l1"]
    assert behavior.forms == ("aside", "single")
    assert behavior.groups == ("g0", "g1", "g2", "g3")
    assert str(behavior).startswith("b: 8 items in 4 groups and 2 out of distribution, ")
    fit, held = behavior.split(held_out=0.5, seed=0)
    for part in (fit, held, behavior.take(3)):
        assert part.ood == behavior.ood
        assert not {item.form for item in part.items} & {"log"}


def test_the_data_card_is_kept(tmp_path):
    behavior = read_behavior(formed(tmp_path / "b.jsonl"))
    assert behavior.card == {"origin": "By hand.", "license": "Apache-2.0", "use": "Tests.", "limits": "Tiny."}
    plain = read_behavior(write(tmp_path / "plain.jsonl", GOOD))
    assert (plain.card, plain.ood, plain.forms, plain.items[0].form) == ({}, (), (), "")


def test_items_out_of_distribution_need_personas_as_the_others_do(tmp_path):
    records = [{**GOOD, "persona": PERSONA}, {**GOOD, "id": "far", "form": "log"}]
    with pytest.raises(WrongInput, match=r"all items or none need a persona; 1 have none, 'far' first"):
        read_behavior(write(tmp_path / "b.jsonl", {"card": {"ood": ["log"]}}, *records))


def test_unknown_names_list_what_is_shipped():
    with pytest.raises(WrongInput, match=r"unknown behaviour 'kindness'; shipped are .*follow-direction"):
        read_behavior("kindness")


def test_a_split_keeps_groups_whole_and_depends_on_the_seed_alone():
    behavior = read_behavior("sentiment")
    fit, held = behavior.split(held_out=0.4, seed=1)
    assert not set(fit.groups) & set(held.groups)
    assert len(fit.items) + len(held.items) == len(behavior.items)
    assert held.groups == behavior.split(held_out=0.4, seed=1)[1].groups
    assert held.groups != behavior.split(held_out=0.4, seed=2)[1].groups


def test_take_spreads_over_groups():
    few = read_behavior("sentiment").take(16, seed=3)
    assert len(few.items) == len(few.groups) == 16


def test_one_group_cannot_be_split(tmp_path):
    with pytest.raises(WrongInput, match="1 topic group"):
        read_behavior(write(tmp_path / "b.jsonl", GOOD)).split()


def test_judge_counts_distinct_matches(tmp_path):
    item = read_behavior(
        write(tmp_path / "b.jsonl", {**GOOD, "score": {"wanted": [r"\bfine\b", r"\bgood\b"], "unwanted": [r"\bbad\b"]}})
    ).items[0]
    assert item.judge("Fine, good, not bad") == "wanted"
    assert item.judge("bad") == "unwanted"
    assert item.judge("good but bad") == "neither"
    assert item.judge("good good but bad") == "neither"


def test_a_behavior_in_words_the_tokenizer_does_not_know_is_refused(tiny):
    check_vocabulary(tiny, read_behavior("sentiment"))
    with pytest.raises(WrongInput, match=r"sentiment-en' does not fit .*: \d+% of its tokens are unknown"):
        check_vocabulary(tiny, read_behavior("sentiment-en"))
