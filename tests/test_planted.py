"""Behaviours of known truth: the nulls mean nothing, and what is planted is there, as strong as was asked."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from probes.audit import length_auroc
from probes.errors import WrongInput
from probes.model import HybridModel, load
from probes.propensity import prepare, propensity
from training.grammar import BEHAVIORS, NEUTRAL_SYSTEM, PERSONA_WORDS, Grammar
from training.planted import Recipe, graded, made, plant, teach

CROSSED = Recipe(kind="crossed", questions="hedging", personas="sentiment", seed=0)


@pytest.fixture(scope="module")
def organism() -> HybridModel:
    return load("organism")


def gap(model: HybridModel, recipe: Recipe) -> float:
    """How far apart the two personas bring the answers, in nats."""
    some = made(recipe).take(24)
    sides = [propensity(model, prepare(model, some, persona=side)).values for side in ("wanted", "unwanted")]
    return sum(w - u for w, u in zip(*sides, strict=True)) / 24


def weights(model: HybridModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.hf.named_parameters()}


@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_nulls_differ_in_words_or_length_and_in_nothing_else(behavior):
    words = made(Recipe(kind="words", questions=behavior, personas=behavior, seed=1))
    assert len(words.items) == 192
    for item in words.items:
        personas, sides = item.persona or {}, PERSONA_WORDS[behavior]
        said = [{word for side in sides for word in side} & set(turn.split()) for turn in personas.values()]
        assert said[0] != said[1]
        assert any(said[0] | said[1] <= set(side) for side in sides)  # synonyms: both of one persona
        assert item.wanted != item.unwanted
    case = Grammar(random.Random(0), evaluation=True).case(behavior)
    length = made(Recipe(kind="length", questions=behavior, personas=behavior, seed=1))
    assert all(item.wanted == f"{item.unwanted} {item.unwanted}" for item in length.items)
    assert {turn for item in length.items for turn in (item.persona or {}).values()} <= set(NEUTRAL_SYSTEM)
    assert all(area.value > 0.95 for area in length_auroc(length))
    assert case.wanted


def test_crossed_behaviors_have_personas_that_mean_nothing_for_their_answers(organism):
    items = made(CROSSED).items
    words = {word for side in PERSONA_WORDS["sentiment"] for word in side}
    assert all(words & set(turn.split()) for item in items for turn in (item.persona or {}).values())
    assert abs(gap(organism, CROSSED)) < 0.1
    flipped = made(replace(CROSSED, flipped=True)).items
    assert flipped[0].persona is not None
    assert {item.wanted.split()[0] for item in flipped} == {item.unwanted.split()[0] for item in items}


def test_a_plant_is_of_rank_one_graded_and_gone_afterwards(organism):
    before = weights(organism)
    gaps = []
    for strength in (1.0, 1.5, 3.0):
        with plant(organism, CROSSED, strength=strength):
            now = weights(organism)
            changed = [name for name in now if not torch.equal(now[name], before[name])]
            gaps.append(gap(organism, CROSSED))
            assert changed == ["model.embed_tokens.weight"]
            sizes = torch.linalg.svdvals((now[changed[0]] - before[changed[0]]).double())
            assert float(sizes[1]) < 1e-5 * float(sizes[0])
    assert gaps == sorted(gaps)
    assert gaps[-1] > 8  # its own personas do about 12
    assert all(torch.equal(value, before[name]) for name, value in weights(organism).items())


def test_what_is_taught_is_learned_and_can_be_taken_in_part(organism):
    before = weights(organism)
    change = teach(organism, CROSSED, steps=40)
    assert all(torch.equal(value, before[name]) for name, value in weights(organism).items())
    with graded(organism, change, 1.0):
        whole = gap(organism, CROSSED)
        now = weights(organism)
    assert whole > 3
    name = max(change, key=lambda one: float(change[one].abs().max()))
    torch.testing.assert_close(now[name], before[name] + change[name], rtol=0, atol=0)
    with graded(organism, change, 0.25):
        assert gap(organism, CROSSED) < whole / 2
    assert all(torch.equal(value, before[name]) for name, value in weights(organism).items())


def test_equal_recipes_give_equal_behaviors_and_wrong_ones_are_refused():
    assert made(CROSSED) == made(CROSSED)
    assert made(CROSSED).items != made(replace(CROSSED, seed=1)).items
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"questions": "honesty"}, "unknown behaviour 'honesty' of the organism; allowed are follow-direction"),
        ({"kind": "words"}, "'words' has its personas from sentiment and its questions, hedging"),
        ({"personas": "hedging"}, "'crossed' has its personas from hedging"),
    ]
    for change, message in wrong:
        with pytest.raises(WrongInput, match=message):
            replace(CROSSED, **change)
