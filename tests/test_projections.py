"""APOLLO's projections: lengths they keep, and scales against those of AdamW's own steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_apollo import gradients
from torch import Tensor, nn

from training import blocks
from training.apollo import Apollo
from training.blocks import Block, Rule


@pytest.mark.parametrize("entries", ["signs", "normal"])
def test_projections_keep_lengths_with_the_variance_that_is_claimed(entries: Any) -> None:
    """Channels of a gradient: spread over the rows, or all within one block's part of them."""
    n, rank, draws = 64, 16, 2000
    gradient = torch.zeros(n, 65)
    gradient[:, 0] = 1.0
    gradient[16:32, 1:] = 1.0
    weight = nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient
    found = {}
    for block in (4, 16):
        optimizer = Apollo([("w", weight)], rank=rank, block=block, entries=entries)
        (own,) = optimizer.blocks
        assert own.rule.blocks == rank // block
        seen = torch.stack([own._projected([0], period)[0].square().sum(0) for period in range(draws)])
        found[block] = seen / gradient.square().sum(0)
    for block, lengths in found.items():
        one = entries == "signs"  # signs lack the part of each square with itself
        spread = 2 * (1 - one / n) / rank if block == rank else 2 * (1 - one * 4 / n) / rank
        within = 2 * (1 - one * 4 / n) / block
        for column, variance in ((0, spread), (1, within)):
            values = lengths[:, column]
            assert float(values.mean()) == pytest.approx(1, abs=4 * math.sqrt(variance / draws))
            assert float(values.var()) == pytest.approx(variance, rel=0.2)  # its deviation is about 0.04


def test_a_projection_has_blocks_of_64_rows_where_they_fit() -> None:
    named = [("w", nn.Parameter(torch.zeros(1024, 3072))), ("v", nn.Parameter(torch.zeros(1026, 2048)))]
    for rank, blocks_ in ((200, (2, 2)), (256, (4, 2)), (512, (8, 2)), (64, (1, 1)), (127, (1, 1)), (1, (1, 1))):
        assert tuple(Apollo(named, rank=rank).plan()["blocks"]) == blocks_
    assert tuple(Apollo(named, rank=256, block=256).plan()["blocks"]) == (1, 1)


def as_channels(rotation: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Channel scales of an unlimited APOLLO whose projection is square, and those of AdamW's own steps."""
    n, m, name = 24, 40, "w"
    weight, other = (nn.Parameter(torch.zeros(n, m)) for _ in range(2))
    group = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "gamma": None, "refresh": 200,
             "at_refresh": "keep", "entries": "signs", "seed": 0}  # fmt: skip
    rule = Rule(kind="channel", shape=(n, m), rank=n, alpha=1.0)
    monkeypatch.setattr(blocks, "signs", lambda *_, **__: rotation(n)[None])
    block = Block(rule=rule, group=group, state={weight: {}}, names=[name], parameters=[weight])
    block.bind()
    adamw = torch.optim.AdamW([other], lr=1.0, weight_decay=0.0)
    for step in range(30):
        before = other.detach().clone()
        weight.grad = other.grad = gradients(step)["wide.weight"]
        block.advance([0], block.lengths())
        adamw.step()
        applied = (other - before).norm(dim=0) / other.grad.norm(dim=0)
    return block.last["scale"][0], applied.detach()


def test_with_the_identity_for_projection_scales_are_those_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    scale, applied = as_channels(torch.eye, monkeypatch)
    torch.testing.assert_close(scale, applied, rtol=1e-4, atol=0)


def test_with_an_orthogonal_projection_scales_approach_those_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotation(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(5)))[0]

    scale, applied = as_channels(rotation, monkeypatch)
    ratio = scale / applied
    assert float((ratio.log().mean()).abs()) < 0.05  # on average the same; channels span a factor of 1,000
    assert float(ratio.log().std()) < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_of_channels_are_exact_in_matrices_of_any_size(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for high, wide in ((700, 600), (5, 300_000), (300_000, 5), (64, 300), (1, 1)):
        matrix = (1.37 + torch.randn(high, wide, generator=generator) * 0.1).to(dtype)
        for dim in (0, 1):
            expected = matrix.double().square().sum(dim).sqrt()
            torch.testing.assert_close(blocks._lengths(matrix, dim).double(), expected, rtol=1e-4, atol=0)
    for at in (0, 419_999):  # anywhere, or a NaN would pass
        matrix = torch.zeros(700, 600)
        matrix.view(-1)[at] = math.nan
        assert blocks._lengths(matrix, 0).isnan().sum() == blocks._lengths(matrix, 1).isnan().sum() == 1


def channel_scale(block: int, rows: slice) -> float:
    """Mean ratio of APOLLO's channel scales to AdamW's, for gradients that are zero outside some rows."""
    n, m, rank = 256, 512, 64
    weight, other = (nn.Parameter(torch.zeros(n, m)) for _ in range(2))
    optimizer = Apollo([("w", weight)], rank=rank, block=block, lr=1.0, gamma=None)
    adamw = torch.optim.AdamW([other], lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradient = torch.zeros(n, m)
        gradient[rows] = torch.randn(gradient[rows].shape, generator=generator)
        before = other.detach().clone()
        weight.grad = other.grad = gradient
        optimizer.step()
        adamw.step()
    applied = (other - before).norm(dim=0) / gradient.norm(dim=0)
    return float((optimizer.blocks[0].last["scale"][0] / applied).mean().detach())


def test_block_diagonal_projections_scale_as_adamw_does_where_dense_ones_do_and_elsewhere() -> None:
    whole, quarter = slice(None), slice(64, 128)
    assert channel_scale(64, whole) == pytest.approx(1, abs=0.1)
    assert channel_scale(16, whole) == pytest.approx(1, abs=0.1)
    assert channel_scale(16, quarter) == pytest.approx(1, abs=0.15)
    assert channel_scale(64, quarter) == pytest.approx(2, abs=0.2)  # sqrt(n / r) counts rows that are not there
