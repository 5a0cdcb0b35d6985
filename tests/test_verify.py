"""The gate on truths that are known: a planted behaviour passes, everything that means nothing does not."""

import json
import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probes import measure as measuring
from probes import stats
from probes import verify as verifying
from probes.behaviors import read_behavior
from probes.controls import random_direction, shuffle_labels, shuffled_direction
from probes.criteria import GateCriteria, open_verdict
from probes.damage import read_general
from probes.directions import mean_difference
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.pairs import contrast
from probes.verify import GateConfig, recipe, unrelated_behaviors, verify

QUICK = GateConfig(
    layers=(1,), direction="mean", doses=(-1.0, -0.5, 0.0, 0.5, 1.0), prompts=30, search_prompts=12, generations=8,
    max_new_tokens=8, general_texts=40,
)  # fmt: skip
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


@pytest.fixture(scope="module")
def behavior():
    return read_behavior("follow-direction")


@pytest.fixture(scope="module", autouse=True)
def fewer_draws():
    """The interval of the dose response decides nothing and takes a third of a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "spearman_over_groups", partial(stats.spearman_over_groups, draws=50))
        yield


def gate(model, behavior, config, *, others=("hedging", "sentiment")):
    """A verdict, with the same other behaviours as ever but read once."""
    return verify(model, behavior, config, others=[known(name) for name in others], progress=False)


known = cache(read_behavior)


@pytest.fixture(scope="module")
def passed(planted, behavior):
    """All methods."""
    return verify(planted[0], behavior, replace(QUICK, direction="auto"), progress=False)  # finds the others itself


def named(verdict):
    return {c.name: c for c in verdict.criteria}


def test_a_planted_direction_is_found_and_passes(planted, passed):
    print(*passed.criteria, sep="\n")
    assert passed.verdict == "PASS"
    assert passed.direction is not None
    assert float(passed.direction.vector @ planted[1]) > 0.9
    assert passed.direction.reliability is not None
    passed.require()


def test_the_work_is_done_on_the_right_split(passed, behavior):
    split = passed.evidence["split"]
    assert not set(split["fit"]) & set(split["held_out"])
    assert {row["group"] for row in passed.evidence["prompts"]} <= set(split["held_out"])
    apart = {item.id for item in behavior.ood if item.group in split["held_out"]}
    assert passed.evidence["ood"]["effect"]["n"] == len(apart)
    assert "forms kept apart" in passed.evidence["ood"]["what"]


def test_nothing_held_out_is_seen_before_layer_method_and_dose_are_chosen(planted, behavior, monkeypatch):
    """Whatever the search prepares or records, and what the direction is made of, is of the fit split."""
    seen: list[set[str]] = []

    def noting(real):
        def noted(model, some, *rest, **options):
            seen.append({item.id for item in some.items})
            return real(model, some, *rest, **options)

        return noted

    for name in ("prepare", "record"):
        monkeypatch.setattr(verifying, name, noting(getattr(verifying, name)))
    chosen = []
    monkeypatch.setattr(verifying, "measure", lambda model, asked, *rest, **options: chosen.append(asked) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(planted[0], behavior, QUICK, progress=False)
    fit, held = behavior.split(held_out=QUICK.held_out, seed=QUICK.seed)
    assert len(seen) >= 2
    assert set().union(*seen) <= {item.id for item in fit.items}
    assert set(chosen[0].pairs.groups) <= set(fit.groups)
    assert {item.id for item in chosen[0].judged.items} <= {item.id for item in held.items}


def test_decodability_is_read_on_persona_turns_that_made_no_direction(planted, behavior, monkeypatch):
    made: list[set[str]] = []
    real = measuring._Held.unseen

    def noting(self, held):
        way = self.asked.way
        self.asked = replace(self.asked, way=replace(way, extract=lambda pairs: noted(way.extract, pairs)))
        return real(self, held)

    def noted(extract, pairs):
        made.append(set(pairs.wordings))
        return extract(pairs)

    monkeypatch.setattr(measuring._Held, "unseen", noting)
    found = verify(planted[0], behavior, QUICK, progress=False).evidence["decodability"]
    fit, held = behavior.split(held_out=QUICK.held_out, seed=QUICK.seed)
    wordings = {item.wording for item in fit.items}
    assert found["crossed"]
    assert len(made) > 1
    assert all(some < wordings for some in made)
    for item in held.items:  # for each there is a direction that did not know its persona turns
        assert any(item.wording not in some for some in made)
    assert not set.intersection(*made)  # and every wording was left out once


def test_a_verdict_says_what_else_was_tried(passed):
    evidence = passed.evidence
    modes = {row["mode"]: row for row in evidence["modes"]}
    assert list(modes) == ["add", "ablate", "clamp", "rotate"]
    assert [row["mode"] for row in evidence["modes"] if row["working"]] == ["add"]
    same(modes["add"]["effect"], evidence["effect"])
    assert modes["ablate"]["effect"]["value"] < 0.5 * evidence["effect"]["value"]  # nothing is pushed
    phases = {row["phase"]: row["effect"]["value"] for row in evidence["phases"]}
    assert phases["prefill"] == pytest.approx(evidence["effect"]["value"])
    methods = {row["method"]: row for row in evidence["methods"]}
    assert {"mean"} < set(methods) <= {"mean", "whitened", "pca", "logistic"}
    assert [row["method"] for row in evidence["methods"] if row["judged"]] == [evidence["search"]["chosen"]]
    (judged,) = (row for row in evidence["methods"] if row["judged"])
    assert judged["cosine"] == pytest.approx(1, abs=1e-6)
    assert judged["effect"]["value"] == evidence["effect"]["value"]
    assert judged["effect"]["confidence"] == pytest.approx(1 - 0.05 / len(methods))  # one of several looks
    assert judged["effect"]["lower"] < evidence["effect"]["lower"]
    assert {row["name"] for row in evidence["specificity"]} == {"hedging", "sentiment"}
    moved = max(abs(row["share"]["value"]) for row in evidence["specificity"])
    assert named(passed)["specificity"].observed == moved < 0.5
    sizes = {row["name"]: row["effect"]["value"] / row["share"]["value"] for row in evidence["specificity"]}
    assert list(sizes.values()) == pytest.approx([evidence["effect"]["value"]] * 2)
    wrong = [row["effect"] < 0 for row in evidence["prompts"]]
    assert named(passed)["wrong way"].observed == sum(wrong) / len(wrong)
    assert [row["chosen"] for row in evidence["layers"]] == [True]
    assert "budget" not in evidence


def test_a_verdict_survives_the_disk(passed, tmp_path):
    back = open_verdict(passed.save(tmp_path / "verdict.json").parent)
    assert back.verdict == passed.verdict
    assert [str(c) for c in back.criteria] == [str(c) for c in passed.criteria]
    assert back.recipe["config"]["criteria"]["reliability"] == GateCriteria().reliability
    assert {"verdict", "behavior", "model", "site", "layer", "dose", "criteria", "controls", "phases", "cost"} <= set(
        passed.as_dict()
    )


def same(one, other, where="evidence"):
    """Equal plain values, numbers to 1e-5."""
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}.{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5, nan_ok=True), where
    else:
        assert one == other, where


def test_reuse_changes_the_cost_and_nothing_else(planted, behavior):
    """On few prompts, so that it is INCONCLUSIVE; answers are edited too."""
    config = replace(QUICK, phase="both", mode="rotate", prompts=8, search_prompts=8, controls=3, general_texts=12)
    fast, again = (gate(planted[0], behavior, config) for _ in range(2))
    slow = gate(planted[0], behavior, replace(config, reuse=False))
    assert json.dumps(fast.evidence) == json.dumps(again.evidence)  # number for number
    assert fast.verdict == slow.verdict == "INCONCLUSIVE"
    assert fast.exit_code == 3
    assert (fast.layer, fast.dose) == (slow.layer, slow.dose)
    for one, other in zip(fast.criteria, slow.criteria, strict=True):
        same(vars(one), vars(other), one.name)
    same(fast.evidence["doses"], slow.evidence["doses"])
    same(fast.evidence["methods"], slow.evidence["methods"])
    same(fast.evidence["modes"], slow.evidence["modes"])
    same(fast.evidence["examples"], slow.evidence["examples"])
    assert fast.cost["layer_tokens"] < fast.cost["naive_layer_tokens"] <= slow.cost["layer_tokens"]
    assert slow.cost["naive_layer_tokens"] == slow.cost["layer_tokens"]


@pytest.mark.parametrize(
    "config",
    [replace(QUICK, shuffle_labels=True), replace(QUICK, direction="random", seed=1)],
    ids=["shuffled", "random"],
)
def test_meaningless_directions_do_not_pass_where_the_behavior_is_real(planted, behavior, config):
    verdict = gate(planted[0], behavior, config)
    assert verdict.verdict == "FAIL"
    with pytest.raises(WrongInput, match="follow-direction on planted is FAIL: "):
        verdict.require()


def test_a_model_without_the_behavior_does_not_pass(llama, behavior):
    """Untrained weights tell the personas apart (the words differ), but nothing follows from it."""
    verdict = gate(llama, behavior, QUICK)
    assert verdict.verdict == "FAIL"


def test_what_moves_another_behaviour_or_is_told_by_length_fails(planted, behavior):
    """The same planted behaviour, once more under another name; and wanted answers and prompts made longer."""
    longer = tuple(
        replace(
            i, wanted=i.wanted + " now now", persona={**(i.persona or {}), "wanted": i.persona["wanted"] + " now ."}
        )
        for i in behavior.items
    )
    twin = replace(behavior, name="twin", hash="another")
    verdict = verify(planted[0], replace(behavior, items=longer), QUICK, others=[twin], progress=False)
    found = named(verdict)
    print(*verdict.criteria, sep="\n")
    assert verdict.verdict == "FAIL"
    assert [found[name].status for name in ("length: prompts", "length: answers", "specificity")] == ["fail"] * 3
    assert found["length: answers"].observed > 0.4
    assert "twin" in found["specificity"].rule
    assert found["specificity"].observed > 0.8
    assert found["effect"].status == "pass"  # which is why it has to be looked at
    assert list(verdict.recipe["unrelated"]) == ["twin"]
    for words in ("the answers of one side are longer", "it moves another behaviour as well"):
        assert words in verdict.sentence


def test_a_budget_says_what_it_did_and_too_few_controls_decide_nothing(planted, behavior):
    verdict = gate(planted[0], behavior, replace(QUICK, budget=1.0))
    done = verdict.evidence["budget"]
    assert done == {"seconds": 1.0, "asked": 20, "controls": 5}  # the time is over before, but never fewer
    kinds = verdict.controls["kinds"]
    assert [len(kinds[kind]) for kind in ("random", "shuffled labels")] == [5, 5]
    assert named(verdict)["controls"].status == "inconclusive"
    assert verdict.verdict == "INCONCLUSIVE"
    assert "5 controls of each drawn kind, where 20 are needed" in verdict.sentence


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


def test_what_does_not_fit_is_never_an_unrelated_control(planted):
    model, _ = planted
    behavior = read_behavior("follow-direction")
    assert [other.name for other in unrelated_behaviors(model, behavior)] == ["hedging", "sentiment"]
    renamed = replace(behavior, name="mine")  # the same content under another name is not a control for itself
    assert [other.name for other in unrelated_behaviors(model, renamed)] == ["hedging", "sentiment"]
    foreign = replace(behavior, name="mine", language="another", hash="another")  # better those of another language
    assert [other.name for other in unrelated_behaviors(model, foreign)] == ["follow-direction", "hedging", "sentiment"]


def test_the_recipe_names_all_that_decides_the_numbers(planted):
    found = recipe(planted[0], read_behavior("follow-direction"), QUICK)
    assert found["device"] == "cpu"
    assert found["general_hash"] == read_general(planted[0]).hash
    assert found["unrelated"]["hedging"] == read_behavior("hedging").hash
