"""What moved: measures on matrices whose truth is known, and captures that are compared."""

import copy

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from analysis.states import (
    Topics,
    compare_captures,
    linear_cka,
    principal_angles,
    relative_change,
    state_cosine,
)
from probes import stats
from probes.attribution import statistics
from probes.capture import RECURRENCE, capture, recurrences
from probes.errors import WrongInput
from probes.model import HybridModel

SITES = ("gdn.state", *RECURRENCE)
POSITIONS = dict.fromkeys(RECURRENCE, "all")


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(
        torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q


def test_relative_change_and_cosine_of_known_matrices():
    S = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    flat = S.double().numpy().reshape(3, 2, -1)
    other = S + 0.5 * torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    moved = (other - S).double().numpy().reshape(3, 2, -1)
    expected = np.linalg.norm(moved, axis=-1) / np.linalg.norm(flat, axis=-1)
    assert relative_change(S, other).numpy() == pytest.approx(expected, rel=1e-12)
    assert relative_change(S, 3 * S).numpy() == pytest.approx(np.full((3, 2), 2.0), rel=1e-6)
    assert state_cosine(S, 3 * S).numpy() == pytest.approx(np.ones((3, 2)), rel=1e-12)
    assert state_cosine(S, -S).numpy() == pytest.approx(-np.ones((3, 2)), rel=1e-12)
    zeros = torch.zeros(1, 1, 5, 4)
    assert relative_change(zeros, zeros).item() == 0
    assert relative_change(zeros, zeros + 1).item() == float("inf")


@pytest.mark.parametrize("degrees", [1e-7, 0.01, 10, 44, 46, 80, 90])
def test_a_subspace_turned_by_an_angle_is_found_turned_by_it(degrees):
    """The strongest key direction turns in a plane of its own; the values stay where they are."""
    U, V, angle = orthogonal(6, 0), orthogonal(5, 1), np.deg2rad(degrees)
    values = torch.tensor([5.0, 3.0, 0.1], dtype=torch.float64)
    before = U[:, :3] * values @ V[:, :3].T
    turned = U[:, :3].clone()
    turned[:, 0] = np.cos(angle) * U[:, 0] + np.sin(angle) * U[:, 4]
    keys, found = principal_angles(before, turned * values @ V[:, :3].T, rank=2)
    assert keys.numpy() == pytest.approx([angle, 0], abs=1e-14, rel=1e-7)
    assert found.numpy() == pytest.approx([0, 0], abs=1e-14)


def test_angles_agree_with_scipy_and_are_exactly_zero_for_equal_states():
    a, b = (torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(i)) for i in (2, 3))
    b[1] = a[1]
    keys, values = principal_angles(a, b, rank=3)
    sides = [np.linalg.svd(m[0].double().numpy(), full_matrices=False) for m in (a, b)]
    assert keys[0].numpy() == pytest.approx(subspace_angles(sides[0][0][:, :3], sides[1][0][:, :3]), abs=1e-12)
    assert values[0].numpy() == pytest.approx(subspace_angles(sides[0][2][:3].T, sides[1][2][:3].T), abs=1e-12)
    assert keys[1].tolist() == values[1].tolist() == [0, 0, 0]
    with pytest.raises(WrongInput, match="between 1 and 6 dimensions, saw 7"):
        principal_angles(a, b, rank=7)


def hsic(k, other):
    """The unbiased estimate of HSIC, as Song et al. 2012 write it (JMLR 13, equation 5)."""
    n, one = len(k), np.ones(len(k))
    k, other = (gram - np.diag(np.diag(gram)) for gram in (k, other))
    whole = np.trace(k @ other) + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
    return (whole - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))


def test_cka_is_its_definition_and_is_left_alone_by_rotations_and_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6))
    y = x @ rng.normal(size=(6, 4)) + 0.3 * rng.normal(size=(20, 4))
    a, b = x @ x.T, y @ y.T
    expected = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    one, other = torch.from_numpy(x), torch.from_numpy(y)
    assert linear_cka(one, other) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(one, 3 * one @ orthogonal(6, 4) + 2) == pytest.approx(1, abs=1e-10)
    assert linear_cka(one @ orthogonal(6, 5), other) == pytest.approx(expected, rel=1e-10)
    assert np.isnan(linear_cka(torch.ones(4, 2), torch.ones(4, 2)))
    assert np.isnan(linear_cka(one[:3], other[:3]))


def test_cka_does_not_grow_with_the_number_of_features_and_its_interval_holds_it():
    groups = [str(i // 4) for i in range(48)]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.normal(size=(48, 4096)))
        apart = Topics(groups).cka(x, torch.from_numpy(rng.normal(size=(48, 4096))))
        assert apart.lower < 0 < apart.upper  # the biased estimate is 0.99
        assert abs(apart.value) < 0.15
        near = Topics(groups).cka(x, x + 0.3 * torch.from_numpy(rng.normal(size=(48, 4096))))
        assert 0.8 < near.lower < near.value < near.upper <= 1
        expected = 1 / 1.09**0.5  # the part of the differences that is shared, in sizes
        assert near.lower - 0.05 < expected < near.upper + 0.05


def test_intervals_are_those_of_the_suite():
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=12), [*"aaaaabbbccdd"]  # topics of unequal size
    found, expected = Topics(groups, seed=3).mean(values), stats.mean(values.tolist(), groups, seed=3)
    assert (found.value, found.lower, found.upper) == pytest.approx((expected.value, expected.lower, expected.upper))
    narrow = Topics(groups, seed=3, confidence=0.5).mean(values)
    assert expected.lower < narrow.lower < narrow.upper < expected.upper
    x = torch.from_numpy(rng.normal(size=(12, 3)))
    y = x + torch.from_numpy(rng.normal(size=(12, 3)))
    cka = Topics(groups).cka(x, y)
    assert cka.value == pytest.approx(linear_cka(x, y))
    assert cka.lower < cka.value < cka.upper


@pytest.fixture(scope="module")
def record(tiny, prompts):
    return capture(tiny, prompts, sites=SITES, positions=POSITIONS, progress=False)


def test_a_capture_compared_with_itself_has_not_moved_at_all(tiny, prompts, record):
    again = capture(tiny, prompts, sites=SITES, positions=POSITIONS, progress=False)
    moved = compare_captures(record, again)
    assert moved.equal
    assert len(moved.rows) == 6 * 4
    frame = moved.frame()
    zero = [name for name in frame if name.startswith(("relative", "keys", "values")) or "_change" in name]
    assert len(zero) > 12
    assert (frame[zero] == 0).to_numpy().all()
    assert (frame[["cosine", "cosine_lower", "cka", "cka_lower", "cka_upper"]] == 1).to_numpy().all()
    assert str(moved) == "all states of 24 heads are equal, bit for bit"


def test_what_moved_is_what_the_states_and_the_recurrence_say(tiny, prompts, record):
    hf = copy.deepcopy(tiny.hf)
    with torch.no_grad():
        hf.model.layers[4].linear_attn.A_log.add_(1.0)  # forgets faster from here on
    other = HybridModel(hf, tiny.tokenizer, name="other")
    after = capture(other, prompts, sites=SITES, positions=POSITIONS, progress=False)
    moved = compare_captures(record, after, groups=[str(i) for i in range(7)])
    rows = {(row.layer, row.head): row for row in moved.rows}
    assert all(row.equal == (layer < 4) for (layer, _), row in rows.items())
    row, one = rows[4, 2], record["gdn.state", 4][:, 2].numpy()
    relative = np.linalg.norm(after["gdn.state", 4][:, 2].numpy() - one, axis=(1, 2)) / np.linalg.norm(one, axis=(1, 2))
    assert row.relative.value == pytest.approx(relative.mean(), rel=1e-5)
    alone = [  # prompt by prompt, without padding
        statistics(recurrences(capture(tiny, [p], sites=SITES, positions=POSITIONS, progress=False), layer=4)[0],
                   at=torch.tensor([[len(p) - 1]])) for p in prompts
    ]  # fmt: skip
    assert row.retention
    assert row.half_life
    assert row.write
    for name, found in (("retention", row.retention), ("write", row.write)):
        expected = np.mean([getattr(x, name)[0, :, 2].mean().item() for x in alone])
        assert found.before.value == pytest.approx(expected, rel=1e-4)
    assert row.rank.before.value == pytest.approx(np.mean([x.effective_rank[0, 0, 2].item() for x in alone]), rel=1e-4)
    assert row.half_life.after.value == pytest.approx(row.half_life.before.value / np.e, rel=1e-4)
    assert row.retention.change.upper < 0
    only_states = compare_captures(*(capture(m, prompts, sites=("gdn.state",), progress=False) for m in (tiny, other)))
    assert only_states.rows[14].relative == row.relative
    assert only_states.rows[14].write is None


def test_captures_of_different_recipes_are_refused(tiny, prompts, record):
    def taken(some, **options):
        return capture(tiny, some, **{"sites": SITES, "positions": POSITIONS, "progress": False, **options})

    with pytest.raises(WrongInput, match=r"not of one recipe: prompts was 7 and is now 6"):
        compare_captures(record, taken(prompts[:6]))
    with pytest.raises(WrongInput, match=r"not of one recipe: prompts_hash was"):
        compare_captures(record, taken([*prompts[1:], prompts[0]]))
    with pytest.raises(WrongInput, match=r"not of one recipe: layers.gdn.q was"):
        compare_captures(record, taken(prompts, layers=(0, 1)))
    both = taken(prompts, sites=("gdn.state",), positions="tokens:decision")
    with pytest.raises(WrongInput, match="after one token of each prompt"):
        compare_captures(both, both)
    with pytest.raises(WrongInput, match="7 prompts need as many groups, saw 2"):
        compare_captures(record, record, groups=["a", "b"])
