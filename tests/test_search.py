"""Layer and dose are chosen by effect beyond controls, and only where the gate could agree."""

import numpy as np
import pytest
import torch

from probes.criteria import GateCriteria
from probes.directions import mean_difference
from probes.pairs import Pairs
from probes.search import candidates, cross_fitted_auroc


def pairs(layer, signal, noise=1.0, n=64):
    generator = torch.Generator().manual_seed(layer)
    truth = torch.zeros(24)
    truth[0] = signal
    base = noise * torch.randn(n, 24, generator=generator)
    other = noise * torch.randn(n, 24, generator=generator)
    groups = tuple(f"g{i % 8}" for i in range(n))
    return Pairs(layer=layer, wanted=base + truth, unwanted=other, groups=groups, behavior="made", contrast="persona")


GROUPS = tuple(f"g{i % 4}" for i in range(16))


def run(layers, *, gain, harm, leak=0.0, spread=None):
    """A world where a push along the first axis has an effect: `gain` and `harm` by layer, `leak` for any push.

    `spread` by layer is the standard deviation of what a push in any direction does, through the second axis.
    """

    def effects(direction, dose):
        along, across = direction.vector[:2].tolist()
        anything = (spread or {}).get(direction.layer, 0.0) * across * 24**0.5
        return [dose * gain[direction.layer] * along + leak + anything] * 16

    def perplexity(direction, dose):
        return 1 + dose * harm[direction.layer]

    return {
        c.direction.layer: c
        for c in candidates(
            layers, mean_difference, effects, perplexity,
            groups=GROUPS, doses=(-1.0, -0.5, 0.0, 0.5, 1.0), rules=GateCriteria(), seed=0,
        )
    }  # fmt: skip


def test_the_strongest_coherent_dose_wins_at_a_layer():
    found = run({0: pairs(0, 6.0)}, gain={0: 2.0}, harm={0: 0.3})[0]
    assert found.dose == 0.5  # at 1.0 perplexity is 1.3 times as high, over half of the budget (in logarithms)
    assert found.effect.value == pytest.approx(1.0, rel=0.1)
    assert found.coherent
    worse = run({0: pairs(0, 6.0)}, gain={0: 2.0}, harm={0: -0.9})[0]  # text far likelier than before is no better sign
    assert not worse.coherent
    assert found.random_effect < 0.6
    assert found.shuffled_effect < 0.2


def test_a_layer_that_breaks_the_model_or_does_not_know_the_sides_comes_last():
    layers = {0: pairs(0, 6.0), 1: pairs(1, 6.0), 2: pairs(2, 0.4)}
    found = run(layers, gain={0: 1.0, 1: 9.0, 2: 9.0}, harm={0: 0.1, 1: 5.0, 2: 0.1})
    assert [found[i].coherent for i in range(3)] == [True, False, True]
    assert [found[i].decodable for i in range(3)] == [True, True, False]
    assert max(found.values(), key=lambda c: c.rank).direction.layer == 0


def test_an_effect_that_any_push_has_does_not_count():
    found = run({0: pairs(0, 6.0), 1: pairs(1, 6.0)}, gain={0: 1.0, 1: 1.0}, harm={0: 0.0, 1: 0.0}, leak=5.0)
    assert all(c.score < 1.2 < c.effect.value for c in found.values())


def test_a_strong_layer_where_any_push_does_much_loses_to_a_quieter_one():
    calm, wild = pairs(0, 9.0, noise=0.1), pairs(1, 9.0, noise=0.1)
    found = run({0: calm, 1: wild}, gain={0: 2.0, 1: 4.0}, harm={0: 0.0, 1: 0.0}, spread={0: 0.1, 1: 1.0})
    assert found[1].effect.value > found[0].effect.value > found[0].bar
    # a rule that only subtracted the mean size of such pushes would choose the other one
    mean_size = {i: max(c.random_effect, c.shuffled_effect) for i, c in found.items()}
    assert found[1].effect.value - mean_size[1] > found[0].effect.value - mean_size[0]
    assert max(found.values(), key=lambda c: c.rank).direction.layer == 0


def test_cross_fitted_auroc_is_high_for_signal_and_even_for_noise():
    assert cross_fitted_auroc(pairs(0, 4.0), mean_difference, seed=0) > 0.95
    noise = [cross_fitted_auroc(pairs(i, 0.0), mean_difference, seed=0) for i in range(8)]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.1)
