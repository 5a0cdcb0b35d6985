"""Free answers: steered as `generate` says them, and asked as a reader would ask."""

from dataclasses import replace

import pytest
import torch

from probes.behaviors import Side, read_behavior
from probes.directions import Direction
from probes.free import Asked, free_answers
from probes.prompts import render
from probes.propensity import generate, prepare, propensity
from probes.steering import steer
from probes.trials import How


@pytest.fixture(scope="module")
def behavior():
    return read_behavior("follow-direction").take(5, seed=1)


@pytest.fixture(scope="module")
def direction():
    vector = torch.randn(64, generator=torch.Generator().manual_seed(5))
    return Direction(layer=4, vector=vector / vector.norm(), norm=5.0, midpoint=0.7)


@pytest.mark.parametrize("how", [How(), How(phase="both", mode="clamp")], ids=str)
def test_answers_are_those_of_generate_in_each_of_four_ways(tiny, behavior, direction, how):
    """Unsteered is without any edit: a clamp at dose 0 would take the direction out."""
    found = free_answers(tiny, behavior, direction, 1.5, how, max_new_tokens=8)
    assert list(found) == ["unsteered", "steered", "against", "asked"]
    prompts = [item.prompt(tiny) for item in behavior.items]
    assert found["unsteered"] == generate(tiny, prompts, max_new_tokens=8)
    for label, dose in (("steered", 1.5), ("against", -1.5)):
        with steer(tiny, direction, dose=dose, phase=how.phase, mode=how.mode):
            assert found[label] == generate(tiny, prompts, max_new_tokens=8)
        assert found[label] != found["unsteered"]
    told = [render(tiny, i.messages, system=i.persona["wanted"], direction=i.direction) for i in behavior.items]
    assert found["asked"] == generate(tiny, told, max_new_tokens=8)
    assert found["asked"] != found["unsteered"]
    assert free_answers(tiny, behavior, direction, 1.5, how, max_new_tokens=8, reuse=False) == found


def test_a_behaviour_that_cannot_be_asked_for_is_not(tiny, behavior, direction):
    bare = replace(behavior, items=tuple(replace(item, persona=None) for item in behavior.items[:2]))
    assert Asked.of(bare) is None  # it is not in English
    found = free_answers(tiny, bare, direction, 1.5, How(), max_new_tokens=2)
    assert list(found) == ["unsteered", "steered", "against"]
    led = tuple(replace(i, messages=({"role": "system", "content": "be careful"}, *i.messages)) for i in bare.items)
    assert Asked.of(replace(bare, items=led, language="en")) is None  # a system turn of its own stands there


def test_personas_are_asked_for_by_their_own_turns(tiny, behavior):
    asked = Asked.of(behavior)
    assert asked is not None
    assert asked.how == "persona turns"
    assert asked.behavior == behavior
    for side in ("wanted", "unwanted"):
        expected = propensity(tiny, prepare(tiny, behavior, persona=side))
        assert asked.propensity(tiny, side) == expected


def test_english_without_personas_is_asked_for_by_its_card(tiny, behavior):
    bare = replace(
        behavior, language="en", wanted_means="seals the wall", unwanted_means="moves the tower",
        items=tuple(replace(item, persona=None) for item in behavior.items),
    )  # fmt: skip
    asked = Asked.of(bare)
    assert asked is not None
    assert "card" in asked.how
    said: dict[Side, str] = {"wanted": "seals the wall", "unwanted": "moves the tower"}
    for side, means in said.items():
        for item, own in zip(asked.behavior.items, bare.items, strict=True):
            first, *rest = item.prompt(tiny, persona=side).text.split("<|im_end|>")
            assert means in first
            assert rest == render(tiny, own.messages, system="x").text.split("<|im_end|>")[1:]
    assert asked.propensity(tiny, "wanted").values != asked.propensity(tiny, "unwanted").values
