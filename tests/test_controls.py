"""Controls: they share with their target what they should, and lean nowhere."""

from __future__ import annotations

import pytest
import torch

from probes.controls import centred, orthonormal, random_direction, shuffle_labels, shuffled_direction
from probes.directions import mean_difference
from probes.errors import WrongInput
from probes.pairs import Pairs


def pairs_of(*shape: int, site: str, n: int = 40, seed: int = 0) -> Pairs:
    """Sides that differ mostly in the first entries, of the first head where there are heads."""
    generator = torch.Generator().manual_seed(seed)
    wanted, unwanted = torch.randn(2, n, *shape, generator=generator)
    first = wanted[:, 0] if len(shape) > 1 else wanted
    first += torch.linspace(2, 0, first.shape[-1])
    return Pairs(
        layer=0, wanted=wanted.flatten(1), unwanted=unwanted.flatten(1), groups=tuple(f"g{i % 8}" for i in range(n)),
        behavior="made", contrast="persona", site=site, shape=shape,
    )  # fmt: skip


@pytest.mark.parametrize(("size", "columns"), [(8, 8), (8, 5)])
def test_orthonormal_matrices_are_drawn_without_a_preferred_direction(size, columns):
    """Haar: entries have mean 0 and variance 1 / size. 4,000 draws, so means are good to 0.0056 (one sigma)."""
    drawn = orthonormal(4000, size, columns, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.mT @ drawn, torch.eye(columns).expand(4000, -1, -1), atol=1e-5)
    assert drawn.mean(0).abs().max() < 5 * (size * 4000) ** -0.5
    assert (drawn.square().mean(0) - 1 / size).abs().max() < 0.02


@pytest.mark.parametrize(("site", "shape"), [("attn.heads", (3, 16)), ("gdn.state", (3, 6, 8))])
def test_random_directions_have_each_heads_size_and_lean_nowhere(site, shape):
    like = mean_difference(pairs_of(*shape, site=site))
    drawn = torch.stack([random_direction(like, seed=seed).tensor for seed in range(1000)])
    sizes = like.tensor.flatten(1).norm(dim=1)
    assert torch.allclose(drawn.flatten(2).norm(dim=2), sizes.expand(1000, -1), atol=1e-5)
    per_entry = sizes / (drawn[0, 0].numel() * 1000) ** 0.5  # one sigma of an entry's mean
    assert (drawn.mean(0).flatten(1).abs() < 5 * per_entry[:, None]).all()
    if site == "gdn.state":
        assert torch.allclose(torch.linalg.svdvals(drawn[7]), torch.linalg.svdvals(like.tensor), atol=1e-5)


def test_exactly_half_of_the_labels_are_swapped():
    pairs = pairs_of(16, site="resid")
    shuffled = shuffle_labels(pairs, seed=3)
    swapped = (shuffled.wanted == pairs.unwanted).all(1)
    assert swapped.sum() == 20
    assert torch.equal(shuffled.unwanted[swapped], pairs.wanted[swapped])
    assert torch.equal(shuffled.wanted[~swapped], pairs.wanted[~swapped])
    assert not torch.equal(shuffle_labels(pairs, seed=4).wanted, shuffled.wanted)


def test_a_shuffled_direction_has_nothing_of_its_target_and_the_datas_midpoint():
    pairs = pairs_of(3, 16, site="attn.heads")
    target = mean_difference(pairs)
    control = shuffled_direction(pairs, target, seed=0)
    assert abs(float(control.vector @ target.vector)) < 1e-5
    assert float(control.vector.norm()) == pytest.approx(1, abs=1e-6)
    assert (control.norm, control.reliability) == (target.norm, None)
    middle = (pairs.wanted.mean(0) + pairs.unwanted.mean(0)) / 2
    assert control.midpoint == pytest.approx(float(middle @ control.vector), abs=1e-5)
    drawn = random_direction(target, seed=0)
    assert drawn.midpoint == 0
    assert centred(drawn, pairs).midpoint == pytest.approx(float(middle @ drawn.vector), abs=1e-5)


def test_pairs_along_one_line_cannot_be_shuffled():
    pairs = pairs_of(16, site="resid")
    line = torch.eye(16)[0] * torch.arange(1, 41.0)[:, None]
    flat = Pairs(**{**vars(pairs), "wanted": line, "unwanted": torch.zeros(40, 16)})
    with pytest.raises(WrongInput, match="differ along one direction only"):
        shuffled_direction(flat, mean_difference(flat), seed=0)
