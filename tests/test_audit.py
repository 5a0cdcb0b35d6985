"""The audit: finds give-aways that were planted, and passes data that have none."""

import random
from dataclasses import replace
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from dispositions.__main__ import main
from probes.audit import SWAPS, audit, length_auroc
from probes.behaviors import Behavior, Item, read_behavior, shipped_behaviors
from probes.errors import WrongInput
from probes.importers import write_behavior

NO_SCORE = {"wanted": (), "unwanted": ()}
SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]


def words(rng, n):
    return " ".join(rng.choice(SYLLABLES) + rng.choice(SYLLABLES) + rng.choice(SYLLABLES) for _ in range(n))


def reordered(rng):
    """Two turns of the same words in another order."""
    first = words(rng, 6).split()
    return " ".join(first), " ".join(first[3:] + first[:3])


def unlike(rng):
    """Two turns without a word in common, which no other pair has either (but for rare chance)."""
    return words(rng, 6), words(rng, 6)


def made(turns, *, pairs=12, groups=8, n=96, seed=0, longer=0):
    """A behaviour of random words: `pairs` persona pairs from `turns`, rotated over the groups."""
    rng = random.Random(seed)
    both = [turns(rng) for _ in range(pairs)]
    items = []
    for i in range(n):
        wanted, unwanted = both[(i // groups + i) % pairs]
        answers = words(rng, rng.randint(4, 12)), words(rng, rng.randint(4, 12) + longer)
        items.append(
            Item(
                id=str(i),
                group=f"g{i % groups}",
                messages=({"role": "user", "content": words(rng, 8)},),
                wanted=answers[0],
                unwanted=answers[1],
                persona={"wanted": wanted, "unwanted": unwanted},
                score=NO_SCORE,
            )
        )
    return Behavior(
        name="made", description="", language="en", wanted_means="a", unwanted_means="b", items=tuple(items), hash="0"
    )


def row(found, name) -> Any:
    return found[name]


def changed(behavior, change):
    return replace(behavior, items=tuple(change(i, item) for i, item in enumerate(behavior.items)))


@pytest.mark.parametrize("name", [name for name in shipped_behaviors() if read_behavior(name).language == "en"])
def test_shipped_english_behaviors_pass(name):
    found = audit(read_behavior(name))
    assert found.passed, f"{found}\n{found.table()}"


def test_the_same_words_in_another_order_pass():
    found = audit(made(reordered))
    assert found.passed, found.table()
    assert found["words of prompts"].value == found["length of prompts"].value == 0.5
    assert found["persona pairs"].value == 12
    assert str(found) == "audit of made passed: 6 checks with a limit"


def test_a_word_that_gives_the_side_away_fails():
    def turns(rng):
        first, second = reordered(rng)
        return f"{first} gladly", f"{second} sadly"

    found = audit(made(turns))
    words_row = row(found, "words of prompts")
    assert (words_row.status, words_row.value) == ("fail", pytest.approx(1))
    assert words_row.upper < 1
    assert found.failures == (words_row,)
    assert str(found).startswith("audit of made FAILED: words of prompts: fail, 1 (allowed: <= 0.")


@pytest.mark.parametrize("seed", range(3))
def test_wording_of_single_pairs_is_no_give_away(seed):
    """Each pair can be told apart by heart, but what is learned from some tells nothing about the others."""
    found = audit(made(unlike, seed=seed), seed=seed)
    assert found["words of prompts"].status == "pass", found.table()
    assert row(found, "words of prompts").value < 0.75


def test_a_single_pair_of_different_words_fails():
    found = audit(made(unlike, pairs=1))
    assert (found["words of prompts"].status, found["words of prompts"].value) == ("fail", pytest.approx(1))
    assert found["words of prompts"].note.endswith(f"{SWAPS} swaps of items")


def test_words_are_judged_on_topics_that_were_not_fitted():
    """Every topic has a word of its own for either side, which tells nothing about other topics."""

    def marked(i, item):
        return replace(item, persona={side: f"{turn} {side}{i % 8}" for side, turn in item.persona.items()})

    assert audit(changed(made(reordered), marked))["words of prompts"].status == "pass"


def test_word_pairs_are_reported_only():
    def turns(rng):
        same = words(rng, 4)
        return f"{same} never good always bad", f"{same} never bad always good"

    found = audit(made(turns))
    assert found["words of prompts"].value == 0.5
    assert (found["word pairs of prompts"].value, found["word pairs of prompts"].status) == (
        pytest.approx(1),
        "reported",
    )
    assert found.passed


def test_words_of_answers_are_reported_only():
    found = audit(changed(made(reordered), lambda i, item: replace(item, wanted=f"yes {item.wanted}")))
    assert row(found, "words of answers").value > 0.9 > row(found, "words of answers").upper
    assert found.passed
    assert row(audit(made(reordered)), "words of answers").value < 0.65


def test_length_is_what_scikit_learn_says_and_has_a_limit():
    behavior = made(reordered, longer=4)
    prompts, answers = length_auroc(behavior)
    lengths = [len(item.wanted.split()) for item in behavior.items] + [len(i.unwanted.split()) for i in behavior.items]
    truth = roc_auc_score([1] * 96 + [0] * 96, lengths)
    assert answers.value == pytest.approx(truth)
    assert truth < 0.3
    assert (prompts.value, prompts.lower, prompts.upper, prompts.groups) == (0.5, 0.5, 0.5, 8)
    found = audit(behavior)
    assert [check.name for check in found.failures] == ["length of answers"]
    assert found["length of answers"].value == answers.value


def test_longer_personas_fail():
    def longer(i, item):
        return replace(item, persona={**item.persona, "wanted": f"{item.persona['wanted']} {item.persona['unwanted']}"})

    behavior = changed(made(reordered), longer)
    assert length_auroc(behavior)[0].value == 1
    assert "length of prompts" in {check.name for check in audit(behavior).failures}


def test_duplicates_are_counted():
    behavior = made(reordered)
    assert audit(behavior)["exact duplicates"].value == audit(behavior)["near duplicates"].value == 0
    copied = replace(behavior, items=(*behavior.items, *(replace(i, id=f"c{i.id}") for i in behavior.items[:4])))
    found = audit(copied)
    assert (found["exact duplicates"].value, found["exact duplicates"].status) == (pytest.approx(0.04), "fail")
    twin = replace(behavior.items[0], id="twin", wanted="something else", group="far", form="log")
    found = audit(replace(behavior, ood=(twin,)))
    assert found["exact duplicates"].value == 0
    assert found["repeated prompts"].value == pytest.approx(1 / 97)
    assert found.passed


def test_near_duplicates_fail():
    def alike(i, item):
        if i % 8 or not i:
            return item
        text = behavior.items[0].messages[0]["content"]
        return replace(item, messages=({"role": "user", "content": f"{text} {text} {text.upper()} x{i}"},))

    behavior = made(reordered)
    found = audit(changed(behavior, alike))
    assert found["repeated prompts"].value == 0
    assert found["near duplicates"].value == pytest.approx(11 / 96)
    assert [check.name for check in found.failures] == ["near duplicates"]


def test_without_personas_the_audit_says_that_prompts_are_the_same():
    found = audit(changed(made(reordered), lambda i, item: replace(item, persona=None)))
    assert found.passed
    assert found["items without personas"].value == 1
    assert found["length of prompts"].status == found["words of prompts"].status == "reported"
    assert found["words of prompts"].value is None
    assert found["words of prompts"].note == "no personas, the prompts are the same"
    some = changed(made(reordered), lambda i, item: replace(item, persona=None) if i == 5 else item)
    assert "items without personas" in {check.name for check in audit(some).failures}


def test_the_scorer_is_compared_with_the_items_own_answers():
    score = {"wanted": ("yes",), "unwanted": ("no way",)}

    def scored(i, item):
        return replace(item, wanted="yes", unwanted="no way" if i >= 24 else "yes and no way", score=score)

    behavior = changed(made(reordered), scored)
    found = row(audit(behavior), "scorer agrees")
    assert (found.value, found.status) == (0.75, "reported")
    assert found.lower < 0.75 < found.upper
    assert audit(made(reordered))["scorer agrees"].value is None


def test_one_topic_leaves_nothing_to_score_on():
    found = audit(made(reordered, groups=1))
    assert found["words of prompts"].value is None
    assert found["words of prompts"].note.startswith("needs 2 topic groups")


def test_counts_and_forms():
    behavior = changed(made(reordered, groups=9), lambda i, item: replace(item, form=["aside", "single"][i % 2]))
    far = tuple(
        replace(i, id=f"f{i.id}", form="log", group=g) for i, g in zip(behavior.items, ("far", "g1"), strict=False)
    )
    found = audit(replace(behavior, ood=far))
    values = {check.name: check.value for check in found.checks}
    assert (values["items"], values["groups"], values["forms"], values["items out of distribution"]) == (96, 9, 2, 2)
    assert values["items per group"] == pytest.approx(96 / 9)
    assert (found["items per group"].lower, found["items per group"].upper) == (10, 11)
    assert values["held-out prompts"] == len(behavior.split()[1].items)
    assert found["held-out prompts"].note == "in 4 groups; a verdict needs 24 in 5 groups: INCONCLUSIVE"
    assert audit(read_behavior("sentiment"))["held-out prompts"].note == "in 6 groups; a verdict needs 24 in 5 groups"
    assert audit(made(reordered, groups=1))["held-out prompts"].value == 0
    assert (values["topics shared with them"], found["topics shared with them"].note) == (1, "g1")


def test_an_audit_is_a_frame_a_table_and_repeatable():
    behavior = made(unlike)
    found = audit(behavior, seed=3)
    assert found == audit(behavior, seed=3)
    frame = found.frame()
    assert list(frame.columns) == ["name", "value", "lower", "upper", "limit", "status", "note"]
    assert list(frame["name"]) == [line.split("  ")[0] for line in found.table().splitlines()[1:]]
    with pytest.raises(WrongInput, match=r"^no check 'colour'; there are items, groups"):
        found["colour"]
    with pytest.raises(WrongInput, match=r"^seed must lie between 0 and"):
        audit(behavior, seed=-1)


def test_the_command_audits_with_an_exit_code(tmp_path, capsys):
    write_behavior(made(reordered), tmp_path / "good.jsonl")
    write_behavior(made(reordered, longer=4), tmp_path / "bad.jsonl")
    for name, code, last in (
        ("good", 0, "audit of made passed"),
        ("bad", 1, "audit of made FAILED: length of answers"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["behaviors", "audit", str(tmp_path / f"{name}.jsonl")])
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == code
        assert lines[0].split() == ["check", "value", "interval", "allowed", "status"]
        assert lines[-1].startswith(last)
