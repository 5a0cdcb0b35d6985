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
    ],
)
def test_malformed_files_are_refused_by_line(tmp_path, records, message):
    with pytest.raises(WrongInput, match=r"^[^\n]+$") as error:
        read_behavior(write(tmp_path / "b.jsonl", *records))
    assert message in str(error.value)


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
