"""APOLLO against a dense float64 reference, torch's AdamW, and the faults that others have."""

from __future__ import annotations

import copy
import io
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from probes.errors import WrongInput
from training.apollo import Apollo
from training.draws import key_of, normal, signs

SHAPES = {
    "wide.weight": (24, 40), "tall.weight": (40, 24), "square.weight": (24, 24), "other.wide.weight": (24, 40),
    "narrow.weight": (4, 40), "norm.weight": (24,), "conv1d.weight": (40, 1, 4), "mixer.in_proj_a.weight": (16, 40),
}  # fmt: skip
RANK = 8


def parameters(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}
    return {name: nn.Parameter(value.to(dtype)) for name, value in drawn.items()}


def gradients(step: int, *, scale: float = 1e-3) -> dict[str, Tensor]:
    """With a common part, so that moments matter, and channels of very different sizes."""
    generator = torch.Generator().manual_seed(1000 + step)
    common = torch.Generator().manual_seed(999)
    found = {}
    for name, shape in SHAPES.items():
        mean = torch.randn(shape, generator=common)
        channels = torch.logspace(-2, 1, shape[-1]) if len(shape) > 1 else 1.0
        found[name] = scale * channels * (mean + torch.randn(shape, generator=generator))
    return found


def steps(optimizer: Any, named: dict[str, nn.Parameter], numbers: range) -> None:
    for step in numbers:
        for name, gradient in gradients(step).items():
            named[name].grad = gradient.to(named[name].dtype)
        optimizer.step()


def dense(
    weights: dict[str, Tensor], numbers: range, *, rank: int, scaling: str, lr: float, decay: float, refresh: int,
    gamma: float, entries: str = "signs", reset: bool = False, seed: int = 0, block: int = RANK,
) -> dict[str, Tensor]:  # fmt: skip
    """The paper's algorithm 1 for each matrix, in float64, with the projection as a matrix of its own."""
    result, block = {}, min(block, rank)
    for name, start in weights.items():
        weight, shape = start.detach().double(), start.shape
        first = second = before = 0.0
        projected = len(shape) == 2 and min(shape) > rank and "in_proj_a" not in name
        for t, step in enumerate(numbers):
            gradient = gradients(step)[name].double()
            since = t % refresh if reset and projected else t
            if projected and since == 0:
                first = second = 0.0
            rows, columns = shape[0], shape[-1]
            wide = rows <= columns
            if projected:
                key = key_of(seed, f"projection {name}", t // refresh)
                columns = min(shape) // (rank // block)
                drawn = (
                    signs([key], rank, columns, block**-0.5)[0]
                    if entries == "signs"
                    else normal([key], rank, columns)[0] * block**-0.5
                ).double()
                matrix = torch.block_diag(*drawn.split(block))
                small = matrix @ gradient if wide else gradient @ matrix.T
            else:
                small = gradient
            first = 0.9 * first + 0.1 * small
            second = 0.999 * second + 0.001 * small**2
            adam = (first / (1 - 0.9 ** (since + 1))) / ((second / (1 - 0.999 ** (since + 1))).sqrt() + 1e-8)
            update = adam
            if projected:
                alpha = math.sqrt(min(shape) / rank)
                if scaling == "tensor":
                    factor = adam.norm() / small.norm()
                else:
                    factor = adam.norm(dim=0 if wide else 1, keepdim=True)
                    factor = factor / small.norm(dim=0 if wide else 1, keepdim=True)
                update = alpha * factor * gradient
                if before and update.norm() > gamma * before:
                    update = update * gamma * before / update.norm()
                before = update.norm()
            weight = weight * (1 - lr * decay) - lr * update
        result[name] = weight
    return result


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("entries", ["signs", "normal"])
@pytest.mark.parametrize("at_refresh", ["keep", "reset"])
@pytest.mark.parametrize("block", [RANK, RANK // 4])
def test_updates_are_those_of_a_dense_reference(scaling: Any, entries: Any, at_refresh: Any, block: int) -> None:
    named = parameters()
    options: dict[str, Any] = {"rank": RANK, "lr": 1e-2, "refresh": 3, "gamma": 1.01, "entries": entries}
    options["block"] = block
    expected = dense(dict(named), range(8), scaling=scaling, decay=0.1, reset=at_refresh == "reset", **options)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = Apollo(named.items(), weight_decay=0.1, scaling=scaling, at_refresh=at_refresh, **options)
    steps(optimizer, named, range(8))
    for name, parameter in named.items():
        moved = (expected[name] - before[name]).norm()
        assert (parameter - expected[name]).norm() <= 2e-5 * moved, name  # float32 against float64


def test_rank_one_scales_by_tensor_and_keeps_almost_nothing() -> None:
    named = parameters()
    expected = dense(dict(named), range(5), rank=1, scaling="tensor", lr=1e-2, decay=0.0, refresh=200, gamma=1.01)
    optimizer = Apollo.mini(named.items(), lr=1e-2)
    steps(optimizer, named, range(5))
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-4, atol=1e-7)
    plan = optimizer.plan().set_index("name")
    assert plan.loc["wide.weight", "rule"] == "tensor"
    assert plan.loc["wide.weight", "state_bytes"] == 4 * (2 * 40 + 1)
    assert plan.loc["mixer.in_proj_a.weight", "rule"] == plan.loc["conv1d.weight", "rule"] == "adam"


def test_plain_tensors_are_stepped_as_torch_does() -> None:
    named, others = parameters(), parameters()
    steps(Apollo(named.items(), rank=64, lr=1e-2, weight_decay=0.1), named, range(6))  # a rank above every width
    steps(torch.optim.AdamW(others.values(), lr=1e-2, weight_decay=0.1), others, range(6))
    for name in SHAPES:
        torch.testing.assert_close(named[name], others[name], rtol=1e-5, atol=1e-8)


def test_steps_in_backward_are_the_same_and_leave_no_gradients() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(16, 24) for _ in range(4)]

    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.LayerNorm(24))

    one, two = network(), network()
    first, second = (Apollo(model.named_parameters(), rank=RANK, lr=1e-2, refresh=2) for model in (one, two))
    for x in inputs:
        one(x).square().sum().backward()
        first.step()
        first.zero_grad()
    with second.stepping_in_backward():
        for x in inputs:
            two(x).square().sum().backward()
            assert all(parameter.grad is None for parameter in two.parameters())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    two(inputs[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in two.parameters())  # the hooks are gone


def test_tensors_step_together_as_they_do_alone() -> None:
    together, alone = parameters(), parameters()
    steps(Apollo(together.items(), rank=RANK, refresh=2), together, range(4))
    for name in alone:
        optimizer = Apollo([(name, alone[name])], rank=RANK, refresh=2)
        for step in range(4):
            alone[name].grad = gradients(step)[name]
            optimizer.step()
        assert torch.equal(alone[name], together[name]), name


def test_a_tensor_without_gradient_waits() -> None:
    named, others = parameters(), parameters()
    optimizer, reference = (Apollo(p.items(), rank=RANK, refresh=2) for p in (named, others))
    for step in range(6):
        for name, gradient in gradients(step).items():
            named[name].grad = gradient if name != "wide.weight" or step % 2 else None
            others[name].grad = gradient if step % 2 or name != "wide.weight" else None
        optimizer.step()
        if step == 2:
            reference.load_state_dict(optimizer.state_dict())
    assert optimizer.state[named["wide.weight"]]["step"] == 3
    assert optimizer.state[named["other.wide.weight"]]["step"] == 6


def test_state_is_what_its_formula_says_and_holds_no_projection() -> None:
    named = parameters()
    optimizer = Apollo(named.items(), rank=RANK)
    steps(optimizer, named, range(2))
    held = {
        name: sum(v.numel() * v.element_size() for v in optimizer.state[p].values() if torch.is_tensor(v))
        for name, p in named.items()
    }
    plan = optimizer.plan().set_index("name")["state_bytes"]
    assert held == plan.to_dict()
    assert held["wide.weight"] == held["tall.weight"] == 4 * (2 * 40 * RANK + 1)
    assert held["conv1d.weight"] == 8 * 160
    assert {key for state in optimizer.state.values() for key in state} == {"step", "first", "second", "norm"}


def test_state_loads_with_weights_only_and_goes_on_to_the_same_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        named = parameters(dtype)
        optimizer = Apollo(named.items(), rank=RANK, refresh=2, lr=1e-2)
        steps(optimizer, named, range(3))
        file = io.BytesIO()
        torch.save([optimizer.state_dict(), {k: v.data for k, v in named.items()}], file)  # noqa: TID251
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)  # noqa: TID251
        others = {name: nn.Parameter(value) for name, value in weights.items()}
        resumed = Apollo(others.items(), rank=RANK, refresh=2, lr=1e-2)
        resumed.load_state_dict(state)
        assert all(
            value.dtype == torch.float32
            for s in resumed.state.values()
            for value in s.values()
            if torch.is_tensor(value)
        )
        steps(optimizer, named, range(3, 7))
        steps(resumed, others, range(3, 7))
        assert all(torch.equal(named[name], others[name]) for name in SHAPES)


def test_a_copy_goes_on_to_the_same_bits() -> None:
    named = parameters()
    one = Apollo(named.items(), lr=1e-3, rank=RANK)
    steps(one, named, range(3))
    twins, other = copy.deepcopy((named, one))
    assert other.param_groups[0]["params"][0] is twins["wide.weight"]
    steps(one, named, range(3, 6))
    steps(other, twins, range(3, 6))
    assert all(torch.equal(named[name], twins[name]) for name in named)


def test_groups_that_come_later_are_checked_and_trained() -> None:
    named = parameters()
    optimizer = Apollo([item for item in named.items() if "wide" in item[0]], lr=1e-3, rank=RANK)
    steps(optimizer, named, range(1))
    with pytest.raises(WrongInput, match="rank must be at least 1"):
        optimizer.add_param_group({"params": [("tall.weight", named["tall.weight"])], "rank": 0})
    with pytest.raises(WrongInput, match=r"names decide projections, and 'wide\.weight' is there twice"):
        optimizer.add_param_group({"params": [("wide.weight", named["tall.weight"])]})
    assert len(optimizer.param_groups) == 1
    before = named["tall.weight"].detach().clone()
    optimizer.add_param_group({"params": [("tall.weight", named["tall.weight"])], "rank": 4})
    steps(optimizer, named, range(1, 2))
    assert not torch.equal(named["tall.weight"], before)
    assert dict(zip(optimizer.plan()["name"], optimizer.plan()["rank"], strict=True))["tall.weight"] == 4


def test_state_of_other_parameters_is_refused() -> None:
    optimizer = Apollo(parameters().items(), rank=RANK)
    other = Apollo([(f"other.{name}", p) for name, p in parameters().items()], rank=RANK)
    with pytest.raises(WrongInput, match="names differ"):
        other.load_state_dict(optimizer.state_dict())


def test_tensors_with_a_gap_between_them_step_as_they_do_alone() -> None:
    def four() -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(torch.full((16, 24), 0.1)) for name in "abcd"}

    together, alone, drawn = four(), four(), torch.randn(3, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    optimizer = Apollo(together.items(), rank=4, lr=1e-2)
    others = {name: Apollo([(name, p)], rank=4, lr=1e-2) for name, p in alone.items()}
    for step in range(3):
        for at, name in enumerate("abcd"):
            skipped = step == 1 and name in "bd"
            together[name].grad = alone[name].grad = None if skipped else drawn[step, at].clone()
            others[name].step()
        optimizer.step()
    for name in "abcd":
        assert torch.equal(together[name], alone[name]), name


def test_rounding_is_drawn_for_each_tensor() -> None:
    named = {name: nn.Parameter(torch.full((40, 24), 0.5, dtype=torch.bfloat16)) for name in "ab"}
    optimizer = Apollo(named.items(), rank=24, lr=1e-3)  # plain AdamW: equal steps
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = [named[name] != 0.5 for name in "ab"]
    assert 0.2 < float(moved[0].float().mean()) < 0.8
    assert 0.2 < float((moved[0] ^ moved[1]).float().mean()) < 0.8


def test_telemetry_tells_what_a_step_did() -> None:
    named = parameters()
    optimizer = Apollo(named.items(), lr=3e-3, rank=RANK)
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    steps(optimizer, named, range(1))
    told = optimizer.telemetry().set_index("name")
    for name in ("wide.weight", "tall.weight"):
        moved = (named[name] - before[name]).detach()
        assert told.loc[name, "update"] == pytest.approx(moved.norm().item(), rel=1e-5)
        assert told.loc[name, "ratio"] == pytest.approx(moved.norm().item() / named[name].norm().item(), rel=1e-5)
        channels = (moved / 3e-3).norm(dim=0 if name[0] == "w" else 1)
        lengths = gradients(0)[name].norm(dim=0 if name[0] == "w" else 1)
        assert told.loc[name, "scale_max"] == pytest.approx(float((channels / lengths).max()), rel=1e-3)


def test_a_zero_gradient_does_not_lift_the_limit() -> None:
    weight = nn.Parameter(torch.zeros(16, 24))
    optimizer = Apollo([("w", weight)], rank=4, lr=1.0, gamma=1.01)
    sizes = []
    for factor in (1.0, -1.0, 1.0, -1.0, 0.0, 100.0):  # to and fro: small steps; then one that would be large
        before = weight.detach().clone()
        weight.grad = factor * torch.randn(16, 24, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        sizes.append((weight - before).norm().item())
    assert sizes[4] == 0
    assert sizes[5] == pytest.approx(1.01 * sizes[3], rel=1e-3)


def test_empty_tensors_are_passed_over() -> None:
    named = {"empty": nn.Parameter(torch.zeros(0, 4)), "w": nn.Parameter(torch.zeros(16, 24))}
    optimizer = Apollo(named.items(), rank=4)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool((named["w"] != 0).all())


def test_a_zero_gradient_freezes_nothing() -> None:
    named = parameters()
    optimizer = Apollo(named.items(), rank=RANK, lr=1e-2)
    steps(optimizer, named, range(5))
    before = named["wide.weight"].detach().clone()
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(named["wide.weight"], before)
    steps(optimizer, named, range(6, 7))
    told = optimizer.telemetry().set_index("name")
    assert told.loc["wide.weight", "limiter"] > 0.5
    assert not torch.equal(named["wide.weight"], before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["tall.weight", "norm.weight", "wide.weight"])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, name: str) -> None:
    named, others = parameters(), parameters()
    optimizer, reference = (Apollo(p.items(), rank=RANK, lr=1e-2) for p in (named, others))
    steps(optimizer, named, range(2))
    steps(reference, others, range(2))
    for key, gradient in gradients(2).items():
        named[key].grad = gradient.clone()
    named[name].grad.view(-1)[3] = bad  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(FloatingPointError, match=f"gradient of {name} is not finite"):
        optimizer.step()
    steps(optimizer, named, range(2, 4))
    steps(reference, others, range(2, 4))
    assert all(torch.equal(named[key], others[key]) for key in SHAPES)


def test_the_limiter_lets_norms_grow_by_one_percent() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    optimizer = Apollo([("w", weight)], rank=RANK, lr=1.0)
    sizes = []
    for step in range(6):
        before = weight.detach().clone()
        weight.grad = gradients(step)["wide.weight"]
        optimizer.step()
        sizes.append((weight - before).norm().item())
        assert optimizer.telemetry()["update"].tolist()[0] == pytest.approx(sizes[-1], rel=1e-4)
    growth = [b / a for a, b in pairwise(sizes)]
    assert max(growth) <= 1.0101
    assert max(growth) > 1.009  # it was at work
    free = Apollo([("w", nn.Parameter(torch.zeros(24, 40)))], rank=RANK, lr=1.0, gamma=None)
    free.param_groups[0]["params"][0].grad = gradients(0)["wide.weight"]
    free.step()
    assert free.telemetry()["limiter"].tolist()[0] == 1.0


def displacement(dtype: torch.dtype, nearest: bool = False) -> float:
    """How far 200 steps of lr 1e-5 along a steady gradient move weights of the usual size, along the intended way."""
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    way = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).sign() * 1e-3
    weight = nn.Parameter(weights.to(dtype))
    start = weight.detach().float().clone()
    optimizer = Apollo([("w", weight)], rank=32, lr=1e-5)
    for _ in range(200):
        weight.grad = way.to(dtype)
        if nearest:
            exact = nn.Parameter(weight.detach().float())
            exact.grad = way
            twin = Apollo([("w", exact)], rank=32, lr=1e-5)
            twin.load_state_dict(optimizer.state_dict()) if optimizer.state else None
            twin.step()
            optimizer.load_state_dict(twin.state_dict())
            weight.data = exact.detach().to(dtype)
        else:
            optimizer.step()
    moved = weight.detach().float() - start
    return -float((moved * way.sign()).mean())


def test_bfloat16_weights_keep_small_updates() -> None:
    """At lr 1e-5, of what float32 weights move; rounding to the nearest loses most of it."""
    whole = displacement(torch.float32)
    assert displacement(torch.bfloat16) >= 0.95 * whole
    assert displacement(torch.bfloat16, nearest=True) < 0.5 * whole


def test_wrong_options_are_refused(unchecked: None, tmp_path: Path) -> None:
    named = list(parameters().items())
    with pytest.raises(WrongInput, match="named_parameters"):
        Apollo([p for _, p in named])
    with pytest.raises(WrongInput, match=r"float32 and bfloat16 weights, saw torch\.float64"):
        Apollo([("w", nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)))])
    distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        sharded = distribute_tensor(torch.zeros(2, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(WrongInput, match="whole tensors on each process, saw sharded ones"):
            Apollo([("w", nn.Parameter(sharded))])
    finally:
        distributed.destroy_process_group()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1.0}, "lr must be at least 0"), ({"lr": math.nan}, "lr must be at least 0"),
        ({"rank": 0}, "rank must be at least 1"), ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"rank": "8"}, "rank must be a number, saw '8'"), ({"rank": True}, "rank must be a number, saw True"),
        ({"seed": None}, "seed must be a number, saw None"), ({"betas": None}, "betas must be two numbers"),
        ({"betas": (0.9,)}, "betas must be two numbers"), ({"rank": 2.5}, "rank must be a whole number, saw 2.5"),
        ({"gamma": 0.5}, "gamma must be at least 1"), ({"alpha": 0.0}, "alpha must be above 0"),
        ({"scaling": "row"}, "unknown scaling 'row'; allowed are channel, tensor"),
        ({"at_refresh": "drop"}, "unknown at_refresh 'drop'"), ({"refresh": 0}, "refresh must be at least 1"),
        ({"block": 0}, "block must be at least 1"),
        ({"entries": "sparse"}, "unknown entries 'sparse'"),
    ]  # fmt: skip
    for options, message in cases:
        with pytest.raises(WrongInput, match=message):
            Apollo(named, **options)


def test_writes_are_counted_so_that_hashes_of_weights_notice_them() -> None:
    named = parameters()
    versions = {name: p._version for name, p in named.items()}
    steps(Apollo(named.items(), rank=RANK), named, range(1))
    assert all(p._version > versions[name] for name, p in named.items())
