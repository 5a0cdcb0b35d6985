"""Steering against hand-made forwards: the right tokens, the right amount, and no trace afterwards."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from probes.directions import Direction
from probes.errors import WrongInput
from probes.prompts import pad
from probes.propensity import generate
from probes.steering import PHASES, steer


@pytest.fixture(scope="module")
def direction(tiny):
    vector = torch.randn(64, generator=torch.Generator().manual_seed(5))
    return Direction(layer=4, vector=vector / vector.norm(), norm=3.0, midpoint=0.7)


def batch_of(model, prompts):
    return pad([p.ids for p in prompts], pad_id=model.tokenizer.pad_token_id, device=model.device)


@torch.no_grad()
def streams(model, batch):
    """What enters each block: entry i + 1 is the stream after layer i. (transformers records before our edit.)"""
    seen = []
    handles = [
        layer.block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for layer in model.layers
    ]
    model.hf(**batch.inputs)
    for handle in handles:
        handle.remove()
    return seen


def test_the_stream_moves_by_dose_times_norm_along_the_vector(tiny, prompts, direction):
    batch = batch_of(tiny, prompts)
    plain = streams(tiny, batch)
    with steer(tiny, direction, dose=-0.5):
        steered = streams(tiny, batch)
    moved = steered[5] - plain[5]
    assert torch.allclose(moved, (-0.5 * 3.0 * direction.vector).expand_as(moved), atol=1e-5)
    assert torch.equal(steered[4], plain[4])
    assert not torch.allclose(steered[6], plain[6])


def test_ablation_sets_the_component_to_the_midpoint_and_nothing_else(tiny, prompts, direction):
    batch = batch_of(tiny, prompts)
    plain = streams(tiny, batch)[5]
    with steer(tiny, direction, mode="ablate"):
        ablated = streams(tiny, batch)[5]
    assert torch.allclose(ablated @ direction.vector, torch.tensor(0.7).expand(batch.ids.shape), atol=1e-5)
    across = torch.eye(64) - torch.outer(direction.vector, direction.vector)
    assert torch.allclose(ablated @ across, plain @ across, atol=1e-5)


@pytest.mark.parametrize("mode", ["add", "ablate"])
@pytest.mark.parametrize("phase", PHASES)
def test_afterwards_the_logits_are_bitwise_what_they_were(tiny, prompts, direction, phase, mode):
    batch = batch_of(tiny, prompts)
    with torch.no_grad():
        before = tiny.hf(**batch.inputs).logits
        with steer(tiny, direction, dose=2.0, phase=phase, mode=mode):
            during = tiny.hf(**batch.inputs).logits
        after = tiny.hf(**batch.inputs).logits
    assert torch.equal(before, after)
    assert torch.equal(before, during) == (phase == "decode")


def test_it_undoes_itself_after_an_error(tiny, prompts, direction):
    batch = batch_of(tiny, prompts)
    before = streams(tiny, batch)[-1]
    with pytest.raises(ZeroDivisionError):
        with steer(tiny, direction, dose=2.0):
            _ = 1 / 0
    assert torch.equal(streams(tiny, batch)[-1], before)


@torch.no_grad()
def by_hand(model, prompt, direction, dose, phase, steps):
    """Greedy decoding token by token, the vector added by a hook that is told the phase."""
    cache, ids, said = DynamicCache(config=model.hf.config), torch.tensor([prompt.ids]), []
    for step in range(steps):
        active = phase == "both" or phase == ("prefill" if step == 0 else "decode")
        push = dose * direction.norm * direction.vector if active else torch.zeros(64)
        handle = model.layers[direction.layer].block.register_forward_hook(lambda m, a, out, push=push: out + push)
        logits = model.hf(input_ids=ids, past_key_values=cache, use_cache=True).logits
        handle.remove()
        ids = logits[:, -1:].argmax(-1)
        if ids.item() == model.tokenizer.eos_token_id:
            break
        said.append(ids.item())
    return model.tokenizer.decode(said, skip_special_tokens=True).strip()


@pytest.mark.parametrize("phase", PHASES)
def test_a_steered_generate_equals_a_step_by_step_steered_forward(tiny, prompts, direction, phase):
    strong = replace(direction, norm=8.0)
    with steer(tiny, strong, dose=1.0, phase=phase):
        found = generate(tiny, prompts, max_new_tokens=6)
    assert found == [by_hand(tiny, prompt, strong, 1.0, phase, 6) for prompt in prompts]
    assert found != generate(tiny, prompts, max_new_tokens=6)


def test_wrong_steering_is_refused(tiny, llama, direction):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"phase": "always"}, "unknown phase 'always'; allowed are prefill, decode, both"),
        ({"mode": "spin"}, "unknown mode 'spin'; allowed are add, ablate, clamp, rotate"),
    ]
    for arguments, message in wrong:
        with pytest.raises(WrongInput, match=message), steer(tiny, direction, **arguments):
            pass
    with (
        pytest.raises(WrongInput, match="layer 9 is out of range: tiny has layers 0 to 7"),
        steer(tiny, replace(direction, layer=9)),
    ):
        pass
    with (
        pytest.raises(WrongInput, match="the direction has 32 elements"),
        steer(tiny, replace(direction, vector=torch.ones(32))),
    ):
        pass
