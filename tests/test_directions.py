"""Mean differences against numpy, reliability against its meaning, and directions on disk."""

import numpy as np
import pytest
import torch

from probes.behaviors import read_behavior
from probes.capture import capture
from probes.controls import random_direction
from probes.directions import Pairs, contrast, mean_difference, open_direction, save_direction
from probes.errors import WrongInput


def made(signal: float, *, n: int = 64, noise: float = 1.0, seed: int = 0) -> Pairs:
    """Pairs whose difference is `signal` along the first axis, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    base = 5 * torch.randn(n, 32, generator=generator)
    truth = torch.zeros(32)
    truth[0] = signal
    unwanted = base + noise * torch.randn(n, 32, generator=generator)
    groups = tuple(f"g{i % 8}" for i in range(n))
    return Pairs(layer=0, wanted=base + truth, unwanted=unwanted, groups=groups, behavior="made", contrast="persona")


def test_the_direction_is_the_normalised_mean_difference():
    pairs = made(3.0)
    direction = mean_difference(pairs)
    raw = pairs.wanted.numpy().mean(0) - pairs.unwanted.numpy().mean(0)
    assert np.allclose(direction.vector.numpy(), raw / np.linalg.norm(raw), atol=1e-6)
    assert direction.gap == pytest.approx(np.linalg.norm(raw), rel=1e-5)
    both = np.concatenate([pairs.wanted.numpy(), pairs.unwanted.numpy()])
    assert direction.midpoint == pytest.approx(both.mean(0) @ direction.vector.numpy(), rel=1e-4)
    # torch's median is the lower of the two middle values
    assert direction.norm == pytest.approx(np.sort(np.linalg.norm(both, axis=1))[len(both) // 2 - 1], rel=1e-5)
    assert direction.vector[0] > 0.9  # it points from unwanted to wanted


def test_reliability_is_high_for_signal_and_low_for_noise():
    signal, noise = (
        mean_difference(made(3.0)).reliability,
        [mean_difference(made(0.0, seed=s)).reliability for s in range(8)],
    )
    assert signal is not None
    assert signal.value > 0.9
    assert np.mean([n.value for n in noise if n]) < 0.3


def test_reliability_predicts_how_well_fresh_data_agree():
    """Spearman-Brown of the halves estimates the cosine of two directions from full, independent samples."""
    found, agreement = [], []
    for seed in range(30):
        one, two = mean_difference(made(1.0, seed=seed)), mean_difference(made(1.0, seed=1000 + seed))
        assert one.reliability is not None
        found.append(one.reliability.value)
        agreement.append(float(one.vector @ two.vector))
    assert np.mean(found) == pytest.approx(np.mean(agreement), abs=0.05)


def test_equal_sides_have_no_direction():
    pairs = made(1.0)
    with pytest.raises(WrongInput, match="both sides of 'made' are equal at layer 0"):
        mean_difference(
            Pairs(
                layer=0,
                wanted=pairs.wanted,
                unwanted=pairs.wanted,
                groups=pairs.groups,
                behavior="made",
                contrast="persona",
            )
        )


def test_a_persona_contrast_reads_the_last_prompt_token_under_both_personas(tiny):
    behavior = read_behavior("follow-direction").take(6)
    pairs = contrast(tiny, behavior, layers=[2, 5], progress=False)
    assert pairs[5].contrast == "persona"
    for i, item in enumerate(behavior.items):
        for side in ("wanted", "unwanted"):
            ids = torch.tensor([item.prompt(tiny, persona=side).ids])
            with torch.no_grad():
                stream = tiny.hf(input_ids=ids, output_hidden_states=True).hidden_states[6][0, -1]
            assert torch.allclose(getattr(pairs[5], side)[i], stream, atol=1e-4)


def test_without_personas_the_answers_are_contrasted(tiny):
    from dataclasses import replace

    behavior = read_behavior("sentiment").take(4)
    behavior = replace(behavior, items=tuple(replace(item, persona=None) for item in behavior.items))
    pairs = contrast(tiny, behavior, layers=[2], progress=False)[2]
    assert pairs.contrast == "answer"
    item = behavior.items[1]
    prompt, answer = item.prompt(tiny), tiny.tokenizer(item.unwanted, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ids = torch.tensor([[*prompt.ids, *answer]])
        stream = tiny.hf(input_ids=ids, output_hidden_states=True).hidden_states[3][0, len(prompt) :].mean(0)
    assert torch.allclose(pairs.unwanted[1], stream, atol=1e-4)


def test_one_capture_serves_all_layers(tiny, prompts):
    record = capture(tiny, prompts, layers=[1, 2], progress=False)
    assert record.layers("resid") == (1, 2)


def test_random_directions_are_unit_norm_matched_and_seeded():
    like = mean_difference(made(3.0))
    one, again, other = (random_direction(like, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.vector, again.vector)
    assert not torch.equal(one.vector, other.vector)
    assert float(one.vector.norm()) == pytest.approx(1.0, abs=1e-6)
    assert one.norm == like.norm
    assert one.reliability is None


def test_directions_survive_the_disk_and_are_refused_by_other_weights(tiny, llama, tmp_path):
    direction = mean_difference(made(3.0))
    path = save_direction(direction, tmp_path / "d.safetensors", weights_hash=tiny.weights_hash)
    back = open_direction(path, model=tiny)
    assert torch.equal(back.vector, direction.vector)
    assert (back.norm, back.midpoint, back.layer, back.behavior) == (direction.norm, direction.midpoint, 0, "made")
    with pytest.raises(WrongInput, match="was made for weights"):
        open_direction(path, model=llama)
    with pytest.raises(WrongInput, match="no such file"):
        open_direction(tmp_path / "absent", model=tiny)
