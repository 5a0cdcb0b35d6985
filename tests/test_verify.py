"""The gate on truths that are known: a planted behaviour passes, everything that means nothing does not."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probes.behaviors import read_behavior
from probes.controls import random_direction, shuffle_labels, shuffled_direction
from probes.criteria import Criterion, GateCriteria, decide, open_verdict
from probes.damage import read_general
from probes.directions import mean_difference
from probes.errors import WrongInput
from probes.evidence import NARROW, SHORTCOMINGS, control_threshold, judge, sentence
from probes.model import HybridModel
from probes.pairs import contrast
from probes.stats import derived_seed
from probes.verify import GateConfig, candidate_layers, coherent_window, recipe, unrelated_behaviors, verify

QUICK = GateConfig(layers=(1,), prompts=48, search_prompts=16, generations=8, max_new_tokens=8, general_texts=40)
WANTED, UNWANTED = ("obedient", "dutiful", "compliant"), ("inventive", "restless", "contrary")


@pytest.fixture(scope="module")
def planted(tokenizer):
    """A Llama in which one vector v is the behaviour, by construction.

    Persona words are embedded along +v or -v; layer 0 attends to all tokens alike and copies the v component of their
    mean into every token, amplified; the output rows of the words that only one side's answers use lie along +v or -v.
    """
    torch.manual_seed(7)
    size = 64 * math.ceil(len(tokenizer) / 64)
    hf: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    v = torch.nn.functional.normalize(torch.randn(64), dim=0)
    words = tokenizer.get_vocab()
    with torch.no_grad():
        hf.model.embed_tokens.weight -= torch.outer(hf.model.embed_tokens.weight @ v, v)
        for sign, persona, answer in ((1, WANTED, ("yes", "sure")), (-1, UNWANTED, ("no", "rather"))):
            for word in persona:
                hf.model.embed_tokens.weight[words[word]] += sign * 3 * v
            for word in answer:
                hf.lm_head.weight[words[word]] += sign * 0.5 * v
        attention = hf.model.layers[0].self_attn
        attention.q_proj.weight.zero_()  # equal scores: every token takes the mean of what came before
        attention.v_proj.weight[0] = v
        attention.o_proj.weight[:, 0] = 20 * v
    return HybridModel(hf, tokenizer, name="planted"), v


def test_a_planted_direction_is_found_and_passes(planted):
    model, v = planted
    verdict = verify(model, read_behavior("follow-direction"), QUICK, progress=False)
    print(*verdict.criteria, sep="\n")
    assert verdict.verdict == "PASS"
    assert verdict.direction is not None
    assert float(verdict.direction.vector @ v) > 0.9
    verdict.require()


@pytest.mark.parametrize(
    "config", [replace(QUICK, shuffle_labels=True), replace(QUICK, direction="random")], ids=["shuffled", "random"]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_meaningless_directions_do_not_pass_where_the_behavior_is_real(planted, config, seed):
    verdict = verify(planted[0], read_behavior("follow-direction"), replace(config, seed=seed), progress=False)
    assert verdict.verdict == "FAIL"
    with pytest.raises(WrongInput, match="follow-direction on planted is FAIL: "):
        verdict.require()


def test_a_model_without_the_behavior_does_not_pass(llama):
    """Untrained weights tell the personas apart (the words differ), but nothing follows from it."""
    verdict = verify(llama, read_behavior("follow-direction"), QUICK, progress=False)
    assert verdict.verdict == "FAIL"


def test_too_little_data_is_inconclusive_even_where_the_truth_is_planted(planted):
    verdict = verify(planted[0], read_behavior("follow-direction"), replace(QUICK, prompts=10), progress=False)
    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.exit_code == 3
    few = verify(planted[0], read_behavior("follow-direction"), replace(QUICK, controls=5), progress=False)
    assert few.verdict == "INCONCLUSIVE"


def test_a_verdict_is_repeated_number_for_number_and_survives_the_disk(planted, tmp_path):
    behavior = read_behavior("follow-direction")
    one, two = (verify(planted[0], behavior, QUICK, progress=False) for _ in range(2))
    assert json.dumps(one.evidence) == json.dumps(two.evidence)
    back = open_verdict(one.save(tmp_path / "verdict.json").parent)
    assert back.verdict == one.verdict
    assert [str(c) for c in back.criteria] == [str(c) for c in one.criteria]
    assert back.recipe["config"]["criteria"]["reliability"] == GateCriteria().reliability
    assert {"verdict", "behavior", "model", "site", "layer", "dose", "criteria", "controls", "phases", "cost"} <= set(
        one.as_dict()
    )
    assert one.cost["forward_tokens"] > 1000


def test_the_work_is_done_on_the_right_split(planted):
    verdict = verify(planted[0], read_behavior("follow-direction"), QUICK, progress=False)
    split = verdict.evidence["split"]
    assert not set(split["fit"]) & set(split["held_out"])
    assert {row["group"] for row in verdict.evidence["prompts"]} <= set(split["held_out"])


def test_shuffled_labels_leave_nothing_of_the_direction(planted):
    """Half of the pairs are swapped exactly, so the mean keeps no share of the truth that normalising could blow up."""
    model, _ = planted
    pairs = contrast(model, read_behavior("follow-direction"), layers=[1], progress=False)[1]
    true = mean_difference(pairs)
    for seed in range(5):
        shuffled = shuffle_labels(pairs, seed=seed)
        same = (shuffled.wanted == pairs.wanted).all(1)
        assert int(same.sum()) == math.ceil(len(pairs.groups) / 2)
        assert float(shuffled.differences.mean(0).norm()) < 0.2 * true.gap
    assert true.reliability is not None
    assert true.reliability.value > 0.95
    reliability = mean_difference(shuffle_labels(pairs, seed=0)).reliability
    assert reliability is not None
    assert reliability.value < 0.8
    assert abs(float(random_direction(true, seed=3).vector @ true.vector)) < 0.5
    control = shuffled_direction(pairs, true, seed=0)
    assert float(control.vector @ true.vector) == pytest.approx(0.0, abs=1e-5)
    assert float(control.vector.norm()) == pytest.approx(1.0, abs=1e-5)


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


def passing_evidence():
    interval = {"lower": 0.9, "upper": 1.1, "n": 60, "groups": 6, "seed": 0, "confidence": 0.95}
    return {
        "counts": {"prompts": 60, "groups": 6, "controls": 20},
        "direction": {"reliability": {"value": 0.95, **interval}},
        "decodability": {"auroc": {"value": 0.95, **interval}, "selectivity": 0.4},
        "effect": {"value": 1.0, **interval},
        "prompts": [{"effect": 1.0}] * 60,
        "dose_response": {"doses": [-1, -0.5, 0, 0.5, 1], "spearman": {"value": 1.0, **interval}},
        "controls": {
            "kinds": {k: [{"effect": 0.1}] * 20 for k in ("random", "shuffled labels")} | {"unrelated": []},
            "percentile": 95.0,
        },
        "necessity": {"drop": {"value": 1.0, **interval}, "random_drops": [0.1] * 10},
        "damage": {"perplexity_ratio": 1.1, "kl": 0.1, "tokens": 900},
        "generation": {k: {"repetition": 0.0, "n": 16} for k in ("steered", "unsteered")},
        "phases": [],
        "baseline": {"persona": {}},
    }


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("direction", "reliability", "value"), 0.7, "reliability"),
        (("decodability", "auroc", "lower"), 0.6, "decodability"),
        (("decodability", "selectivity"), 0.1, "selectivity"),
        (("effect", "lower"), -0.1, "effect"),
        (("prompts",), [{"effect": 1.0}] * 40 + [{"effect": -1.0}] * 20, "wrong way"),
        (("dose_response", "spearman", "value"), 0.8, "dose-response"),
        (("dose_response", "doses"), [0, 0.25, 0.5, 0.75, 1], "dose-response"),
        (("controls", "kinds", "random"), [{"effect": -1.5}] * 20, "controls"),
        (("necessity", "drop", "lower"), -0.2, "necessity"),
        (("necessity", "random_drops"), [-1.2] * 10, "necessity"),
        (("damage", "perplexity_ratio"), math.inf, "damage: perplexity"),
        (("damage", "perplexity_ratio"), 0.1, "damage: perplexity"),  # text that a broken model finds likelier
        (("generation", "steered", "repetition"), 0.5, "damage: repetition"),
    ],
)
def test_each_criterion_alone_can_fail_a_verdict(path, value, name):
    evidence = passing_evidence()
    assert decide(judge(evidence, GateCriteria())) == "PASS"
    at = evidence
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    criteria = judge(evidence, GateCriteria())
    assert [c.name for c in criteria if c.status == "fail"] == [name]
    assert decide(criteria) == "FAIL"
    said = sentence("FAIL", criteria, evidence, read_behavior("follow-direction"), GateCriteria())
    why = NARROW if path == ("dose_response", "doses") else SHORTCOMINGS[name]
    assert said.endswith(f"causes the behaviour: {why}.")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("counts", "prompts"), 9, "9 held-out prompts in 6 topic groups, where 24 in 5 are needed"),
        (("controls", "kinds", "random"), [{"effect": 0.1}] * 3, "3 controls of each drawn kind, where 20 are needed"),
        (("damage", "tokens"), 11, "11 tokens of ordinary text, where 100 are needed"),
        (("generation", "steered", "n"), 1, "1 free answers, where 8 are needed"),
        (("necessity",), None, "too few held-out prompts on which the model shows the behaviour"),
    ],
)
def test_an_open_question_is_named_in_words(path, value, words):
    evidence = passing_evidence()
    at = evidence
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    criteria = judge(evidence, GateCriteria())
    assert decide(criteria) == "INCONCLUSIVE"
    assert words in sentence("INCONCLUSIVE", criteria, evidence, read_behavior("follow-direction"), GateCriteria())


def test_layers_to_search(tiny, llama):
    assert candidate_layers(tiny) == tuple(range(8))
    assert candidate_layers(llama) == (0, 1, 2)


def test_wrong_configurations_are_refused(tiny):
    behavior = read_behavior("sentiment")
    with pytest.raises(WrongInput, match="layer 12 is out of range: tiny has layers 0 to 7"):
        verify(tiny, behavior, GateConfig(layers=(12,)))
    with pytest.raises(WrongInput, match="doses must include 0 and both signs"):
        GateConfig(doses=(0.0, 0.5))
    with pytest.raises(WrongInput, match="doses must be finite"):
        GateConfig(doses=(-1.0, 0.0, 0.5, 1.0, math.nan))
    with pytest.raises(WrongInput, match="shuffle_labels has no effect on a random direction"):
        GateConfig(shuffle_labels=True, direction="random")
    with pytest.raises(WrongInput, match="general_texts must be at least 3, saw 1"):
        GateConfig(general_texts=1)
    with pytest.raises(WrongInput, match="held_out must lie between 0 and 1"):
        GateConfig(held_out=1.0)
    with pytest.raises(WrongInput, match="layers must name at least one layer"):
        GateConfig(layers=())
    with pytest.raises(WrongInput, match="control_percentile must lie between 50 and 100, saw 150"):
        GateCriteria(control_percentile=150)
    with pytest.raises(WrongInput, match="perplexity_ratio must be at least 1, saw nan"):
        GateCriteria(perplexity_ratio=math.nan)


def test_what_does_not_fit_is_never_an_unrelated_control(planted):
    model, _ = planted
    behavior = read_behavior("follow-direction")
    assert [other.name for other in unrelated_behaviors(model, behavior)] == ["hedging", "sentiment"]
    renamed = replace(behavior, name="mine")  # the same content under another name is not a control for itself
    assert [other.name for other in unrelated_behaviors(model, renamed)] == ["hedging", "sentiment"]
    assert unrelated_behaviors(model, read_behavior("sentiment-en")) == []  # the organism does not know English


def test_the_recipe_names_all_that_decides_the_numbers(planted):
    found = recipe(planted[0], read_behavior("follow-direction"), QUICK)
    assert found["device"] == "cpu"
    assert found["general_hash"] == read_general(planted[0]).hash
    assert found["unrelated"]["hedging"] == read_behavior("hedging").hash


def test_no_two_uses_of_a_seed_share_their_draws():
    seeds = {derived_seed(seed, use, i) for seed in range(50) for use in ("control", "necessity") for i in range(50)}
    assert len(seeds) == 50 * 2 * 50
