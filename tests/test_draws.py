"""Random numbers without a generator: their statistics, that keys and places give different ones, and their bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from training.draws import bits, key_of, normal, signs, stochastically_rounded

N = 1 << 20


def test_bytes_are_uniform() -> None:
    words = bits([key_of(0, "a")], N).numpy().view(np.uint8).reshape(-1, 4)
    for place in range(4):
        counts = np.bincount(words[:, place], minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_words_do_not_repeat_and_neighbours_are_unrelated() -> None:
    words = bits([key_of(3, "w", 7)], N)[0]
    assert words.unique().numel() > 0.9998 * N  # 128 collisions are expected among 2^20 of 2^32
    flips = (words[1:] ^ words[:-1]).numpy().view(np.uint32)
    shares = np.unpackbits(flips.view(np.uint8)).reshape(-1, 32).mean(0)
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / np.sqrt(N)


@pytest.mark.parametrize("other", [key_of(1, "a"), key_of(0, "b"), key_of(0, "a", 1)])
def test_keys_give_unrelated_numbers(other: tuple[int, int]) -> None:
    one, two = normal([key_of(0, "a"), other], 1000, 1000).view(2, -1)
    assert abs(float((one * two).mean())) < 5e-3  # 5 standard errors
    for lag in (1, 2, 64, 1024):
        assert abs(float((one[lag:] * two[:-lag]).mean())) < 5e-3
        assert abs(float((one[lag:] * one[:-lag]).mean())) < 5e-3


def test_normal_numbers_are_normal() -> None:
    drawn = normal([key_of(0, "a")], 1000, 1001).double().flatten()
    assert abs(float(drawn.mean())) < 5e-3
    assert abs(float(drawn.var()) - 1) < 7e-3
    assert stats.kstest(drawn[:100_000].numpy(), "norm").pvalue > 1e-4


def test_signs_are_fair_and_keep_lengths_better_than_normal_numbers() -> None:
    rank, n = 16, 256
    keys = [key_of(0, "p", i) for i in range(2000)]
    vector = torch.randn(n, generator=torch.Generator().manual_seed(0))
    drawn = signs(keys, rank, n, rank**-0.5)
    assert set(drawn.unique().tolist()) == {-0.25, 0.25}
    assert abs(float(drawn.mean())) < 5 * 0.25 / np.sqrt(drawn.numel())
    lengths = (drawn @ vector).square().sum(1) / vector.square().sum()
    others = (normal(keys, rank, n) * rank**-0.5 @ vector).square().sum(1) / vector.square().sum()
    for found in (lengths, others):
        assert abs(float(found.mean()) - 1) < 0.04
    # variances 2 (1 - sum g^4 / |g|^4) / r and 2 / r; their standard error over 2,000 draws is 3 %
    expected = 2 * (1 - float(vector.pow(4).sum() / vector.square().sum() ** 2)) / rank
    assert float(lengths.var()) == pytest.approx(expected, rel=0.15)
    assert float(others.var()) == pytest.approx(2 / rank, rel=0.15)


def test_the_bits_are_those_of_every_machine() -> None:
    """What a checkpoint's projections rest on: these numbers may never change. Against a mixer in plain Python."""

    def mixed(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x

    start, stride = key_of(7, "model.layers.0.mlp.up_proj.weight", 2)
    expected = [mixed((start + i * stride) % 2**32) for i in range(100)]
    found = bits([(start, stride)], 100)[0].numpy().view(np.uint32).tolist()
    assert found == expected
    assert (start, stride) == (key_of(7, "model.layers.0.mlp.up_proj.weight", 2))
    assert found[:2] == FIRST


FIRST = [2932871234, 441964942]


def test_rounding_is_right_on_average_and_never_further_than_a_neighbour() -> None:
    exact = torch.tensor([1.001, -1.001, 3e-5, 256.7, 0.0, 1.0])
    rounds = torch.stack([stochastically_rounded(exact, key_of(0, "r", i)) for i in range(4000)]).float()
    spacing = exact.abs().log2().floor().exp2() * 2**-7
    assert torch.all((rounds - exact).abs() <= spacing)
    assert torch.all((rounds.mean(0) - exact).abs() <= 5 * spacing / 2 / 4000**0.5 + 1e-12)
    assert torch.equal(rounds[:, 4:], exact[4:].expand(4000, 2))  # what bfloat16 has is not changed
