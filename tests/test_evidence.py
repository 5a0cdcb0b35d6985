"""From what was observed to criteria, a verdict and words: each rule alone, on evidence made up for it."""

import math

import pytest

from probes.behaviors import read_behavior
from probes.criteria import Criterion, GateCriteria, decide
from probes.evidence import NARROW, SHORTCOMINGS, control_threshold, judge, sentence
from probes.measure import coherent_window


def test_the_control_threshold_is_the_strictest_kind():
    kinds = {"random": [{"effect": e} for e in (-0.1, 0.2)], "unrelated": [{"effect": -3.0}], "shuffled labels": []}
    bar, worst = control_threshold({"kinds": kinds, "percentile": 95.0})
    assert (bar, worst) == (3.0, "unrelated")


def test_the_coherent_window_ends_at_the_first_break():
    rows = [
        {"dose": d, "perplexity_ratio": r}
        for d, r in ((-1, 1.2), (-0.5, 9.0), (0, 1.0), (0.5, 1.4), (1, 2.0), (2, 1.0))
    ]
    assert coherent_window(rows, 1.5) == {0.0, 0.5}
    rows[3]["perplexity_ratio"] = 0.2
    assert coherent_window(rows, 1.5) == {0.0}


def test_decide_never_passes_a_failure_or_an_open_question():
    def made(*statuses):
        return [Criterion(number=1, name="x", status=s, observed=0.0) for s in statuses]

    assert decide(made("pass", "reported")) == "PASS"
    assert decide(made("pass", "fail")) == "FAIL"
    assert decide(made("pass", "inconclusive")) == "INCONCLUSIVE"
    assert decide(made("fail", "inconclusive")) == "FAIL"
    few = Criterion(number=0, name="enough data", status="inconclusive", observed=3.0)
    assert decide([few, *made("fail", "pass")]) == "INCONCLUSIVE"


def numbers(value, lower=None, upper=None, n=60):
    lower, upper = value - 0.1 if lower is None else lower, value + 0.1 if upper is None else upper
    return {"value": value, "lower": lower, "upper": upper, "n": n, "groups": 6, "seed": 0, "confidence": 0.95}


def passing_evidence():
    return {
        "counts": {"prompts": 60, "groups": 6, "controls": 20},
        "length": {"prompts": numbers(0.6), "answers": numbers(0.45)},
        "direction": {"reliability": numbers(0.95)},
        "decodability": {"auroc": numbers(0.95, 0.9, 1.0), "selectivity": 0.4, "crossed": True},
        "effect": numbers(1.0),
        "wrong_way": numbers(0.1, 0.02, 0.2),
        "wanted": numbers(0.4),
        "prompts": [{"effect": 1.0}] * 60,
        "dose_response": {"doses": [-1, -0.5, 0, 0.5, 1], "spearman": numbers(1.0)},
        "controls": {
            "kinds": {k: [{"effect": 0.1}] * 20 for k in ("random", "shuffled labels")} | {"unrelated": []},
            "percentile": 95.0,
            "target": numbers(1.1, n=16),
        },
        "necessity": {"drop": numbers(1.0), "beside": numbers(1.1, n=16), "random_drops": [0.1] * 20},
        "specificity": [
            {"name": "hedging", "effect": numbers(-0.3), "share": numbers(-0.3, -0.45, -0.15)},
            {"name": "sentiment", "effect": numbers(0.1), "share": numbers(0.1, -0.05, 0.2)},
        ],
        "damage": {"perplexity_ratio": 1.1, "kl": 0.1, "tokens": 900},
        "generation": {k: {"repetition": 0.0, "n": 16} for k in ("steered", "unsteered")},
        "phases": [{"phase": "prefill", "effect": numbers(1.0), "working": True}],
        "baseline": {"persona": {"gain": numbers(2.0)}},
        "ood": {"what": "tickets", "effect": numbers(-0.7), "wrong_way": numbers(0.6, 0.5, 0.7)},
    }


def changed(path, value):
    """Passing evidence but for one entry."""
    evidence = passing_evidence()
    at = evidence
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return evidence


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("length", "prompts", "value"), 0.8, "length: prompts"),
        (("length", "prompts", "value"), 0.2, "length: prompts"),
        (("length", "answers", "value"), 0.76, "length: answers"),
        (("direction", "reliability", "value"), 0.7, "reliability"),
        (("decodability", "auroc", "lower"), 0.6, "decodability"),
        (("decodability", "selectivity"), 0.1, "selectivity"),
        (("effect", "lower"), -0.1, "effect"),
        (("wrong_way", "value"), 0.26, "wrong way"),
        (("dose_response", "spearman", "value"), 0.8, "dose-response"),
        (("dose_response", "doses"), [0, 0.25, 0.5, 0.75, 1], "dose-response"),
        (("dose_response", "doses"), [-1, 0, 0.5, 1], "dose-response"),
        (("controls", "kinds", "random"), [{"effect": -1.5}] * 20, "controls"),
        (("controls", "kinds", "random"), [{"effect": 1.01}, *[{"effect": 0.1}] * 19], "controls"),  # one of twenty
        (("controls", "kinds", "random"), [{"effect": 9.0}] * 2 + [{"effect": 0.1}] * 37, "controls"),
        (("controls", "kinds", "unrelated"), [{"effect": 1.01}], "controls"),
        (("controls", "kinds", "unrelated"), [{"effect": 1.01}, *[{"effect": 0.0}] * 99], "controls"),  # a named one
        (("controls", "target", "value"), 0.05, "controls"),
        (("necessity", "drop", "lower"), -0.2, "necessity"),
        (("necessity", "beside", "value"), 0.05, "necessity"),
        (("necessity", "random_drops"), [-1.2, *[0.1] * 19], "necessity"),
        (("specificity", 1, "share", "value"), 0.51, "specificity"),
        (("specificity", 0, "share", "value"), -0.51, "specificity"),  # the other way counts as much
        (("damage", "perplexity_ratio"), math.inf, "damage: perplexity"),
        (("damage", "perplexity_ratio"), 0.1, "damage: perplexity"),  # text that a broken model finds likelier
        (("generation", "steered", "repetition"), 0.5, "damage: repetition"),
    ],
)
def test_each_criterion_alone_can_fail_a_verdict(path, value, name):
    assert decide(judge(passing_evidence(), GateCriteria())) == "PASS"
    evidence = changed(path, value)
    criteria = judge(evidence, GateCriteria())
    assert [c.name for c in criteria if c.status == "fail"] == [name]
    assert decide(criteria) == "FAIL"
    said = sentence("FAIL", criteria, evidence, read_behavior("follow-direction"), GateCriteria())
    why = NARROW if path == ("dose_response", "doses") else SHORTCOMINGS[name]
    assert said.endswith(f"causes the behaviour: {why}.")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("length", "prompts", "value"), 0.75),
        (("length", "answers", "value"), 0.25),
        (("wrong_way", "value"), 0.25),
        (("specificity", 0, "share", "value"), -0.5),
        (("damage", "perplexity_ratio"), 1 / 1.5),
        (("controls", "kinds", "random"), [{"effect": 9.0}, *[{"effect": 0.1}] * 38]),  # p = 2/40
        (("necessity", "random_drops"), [9.0, *[0.1] * 38]),
    ],
)
def test_what_lies_on_a_threshold_passes(path, value):
    assert decide(judge(changed(path, value), GateCriteria())) == "PASS"


def named(evidence):
    return {c.name: c for c in judge(evidence, GateCriteria())}


def test_specificity_names_the_behaviour_that_moves_most_and_its_interval():
    worst = named(passing_evidence())["specificity"]
    assert (worst.observed, worst.lower, worst.upper, worst.n) == (0.3, 0.15, 0.45, 60)
    assert "hedging" in worst.rule
    share = numbers(0.4, -0.1, 0.9)  # around zero, the least of |share| is none at all
    other = named(changed(("specificity", 1, "share"), share))["specificity"]
    assert (other.observed, other.lower, other.upper) == (0.4, 0.0, 0.9)
    assert "sentiment" in other.rule
    alone = named(changed(("specificity",), []))["specificity"]
    assert alone.status == "inconclusive"


def test_what_is_only_reported_never_decides():
    """Out of distribution it moves the wrong way; other phases and asking may do anything or nothing."""
    found = named(passing_evidence())
    reported = ["wanted answer itself", "effect elsewhere", "wrong way elsewhere", "phase: prefill", "prompt baseline",
                "damage: KL"]  # fmt: skip
    assert {found[name].status for name in reported} == {"reported"}
    assert found["effect elsewhere"].observed == -0.7
    assert found["wrong way elsewhere"].observed == 0.6
    nowhere = changed(("ood",), None)
    assert named(nowhere)["effect elsewhere"].status == "reported"
    assert math.isnan(named(nowhere)["effect elsewhere"].observed)
    assert decide(judge(changed(("baseline", "persona"), {}), GateCriteria())) == "PASS"
    assert decide(judge(changed(("direction", "reliability"), None), GateCriteria())) == "PASS"


def test_a_pass_is_said_in_numbers():
    evidence = passing_evidence()
    said = sentence("PASS", judge(evidence, GateCriteria()), evidence, read_behavior("sentiment"), GateCriteria())
    for part in ("100% of 60 unseen prompts", "by 1.00 nats", "do no more than 0.10", "a factor of 1.10 (limit 1.5)"):
        assert part in said


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("counts", "prompts"), 9, "9 held-out prompts in 6 topic groups, where 24 in 5 are needed"),
        (("counts", "groups"), 4, "60 held-out prompts in 4 topic groups, where 24 in 5 are needed"),
        (("controls", "kinds", "shuffled labels"), [{"effect": 0.1}] * 19, "19 controls of each drawn kind"),
        (("controls", "kinds", "random"), [{"effect": 0.1}] * 3, "3 controls of each drawn kind, where 20 are needed"),
        (("controls", "target", "n"), 11, "controls on 11 prompts, where 12 are needed"),
        (("necessity", "random_drops"), [0.1] * 19, "19 random directions taken out, where 20 are needed"),
        (("specificity",), [], "no other behaviour in words that the model knows"),
        (("damage", "tokens"), 11, "11 tokens of ordinary text, where 100 are needed"),
        (("generation", "steered", "n"), 1, "1 free answers, where 8 are needed"),
        (("necessity", "drop", "n"), 7, "too few held-out prompts on which the model shows the behaviour"),
        (("necessity",), None, "too few held-out prompts on which the model shows the behaviour"),
    ],
)
def test_an_open_question_is_named_in_words(path, value, words):
    evidence = changed(path, value)
    criteria = judge(evidence, GateCriteria())
    assert decide(criteria) == "INCONCLUSIVE"
    assert words in sentence("INCONCLUSIVE", criteria, evidence, read_behavior("follow-direction"), GateCriteria())
