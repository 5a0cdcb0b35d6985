"""Curvature against quadratics whose Hessian is known, exact against finite differences on a Qwen3.5; and whole
measurements on the organism, whose conclusions are checked on planted numbers."""

import json
import math
from typing import Any

import pytest
import torch
from conftest import qwen_config, wake
from transformers import Qwen3_5ForCausalLM

from analysis.curvature import STEPS, Curvature, along, along_each, by_differences, eagerly
from analysis.sharpness import (
    NAMES,
    PUBLISHED,
    Sharpness,
    SharpnessConfig,
    SharpnessRow,
    open_sharpness,
    sharpness,
)
from probes.behaviors import read_behavior
from probes.errors import WrongInput
from probes.model import HybridModel

SHAPES = ((3, 4), (5,))


class Once(torch.autograd.Function):
    """Half of a square, whose derivative cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.saved_tensors[0]


def quadratic(dtype=torch.float64, seed=0):
    """(loss, its parameters, a direction, and v^T A v): the loss is w^T A w / 2 + b w for a symmetric A."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(math.prod(shape) for shape in SHAPES)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    slope = torch.randn(size, generator=generator, dtype=torch.float64)
    parameters = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES]
    direction = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]

    def loss():
        flat = torch.cat([parameter.flatten() for parameter in parameters])
        return flat @ (matrix.to(dtype) @ flat) / 2 + slope.to(dtype) @ flat

    flat = torch.cat([part.flatten() for part in direction])
    return loss, parameters, direction, float(flat @ matrix @ flat / (flat @ flat))


# -- curvature -----------------------------------------------------------------------------------------------------


def test_the_exact_curvature_of_a_quadratic():
    loss, parameters, direction, truth = quadratic()
    found = along(loss, parameters, direction)
    assert found.method == "exact"
    assert found.sweep == ()
    assert found.value == pytest.approx(truth, rel=1e-12)  # float64
    longer = along(loss, parameters, [7 * part for part in direction])
    assert longer.value == pytest.approx(truth, rel=1e-12)
    assert all(parameter.grad is None for parameter in parameters)


def test_differences_of_a_quadratic_agree_at_every_step_in_float64():
    loss, parameters, direction, truth = quadratic()
    found = by_differences(loss, parameters, direction)
    # the gradient is linear: only rounding is left, 1e-16 of the gradient over the step
    assert [value for _, value in found.sweep] == pytest.approx([truth] * len(STEPS), rel=1e-8)
    assert found.value == pytest.approx(truth, rel=1e-11)


def test_the_plateau_lies_between_rounding_and_higher_terms():
    """A quartic in float32: the truth is 3 sum w^2 v^2; large steps add h^2 sum v^4, small ones drown."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, generator=generator).requires_grad_()
    direction = torch.randn(40, generator=generator)
    unit = direction.double() / direction.double().norm()
    truth = float((3 * weight.detach().double().square() * unit.square()).sum())
    size = float(weight.detach().norm())
    found = by_differences(lambda: weight.pow(4).sum() / 4, [weight], [direction], steps=[1e1, 3e0, *STEPS])
    off = {step: abs(value - truth) for step, value in found.sweep}
    assert off[1e1] == pytest.approx((10 * size) ** 2 * float(unit.pow(4).sum()), rel=1e-3)
    assert off[1e-6] > 10 * off[1e-3]
    assert abs(found.value - truth) <= max(2 * found.error, 1e-3 * truth)
    assert found.error < 0.01 * truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_bitwise_what_they_were(dtype):
    loss, parameters, direction, _ = quadratic(dtype)
    before = [parameter.detach().clone() for parameter in parameters]
    by_differences(loss, parameters, direction)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))

    calls = []

    def failing():
        calls.append(loss())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        by_differences(failing, parameters, direction)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_a_loss_that_is_not_twice_differentiable_falls_back():
    weight = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kinds: Any = Once
    found = along_each(lambda: kinds.apply(weight).sum(), [weight], [[torch.ones(6)], [torch.arange(6.0)]])
    assert [part.method for part in found] == ["finite differences"] * 2
    assert [part.value for part in found] == pytest.approx([1.0, 1.0], rel=1e-9)
    assert "±" in str(found[0])
    # the second derivative of w^4 / 4 is 3 w^2
    inner = along(lambda: kinds.apply(weight).square().sum(), [weight], [torch.ones(6)])
    assert inner.method == "finite differences"
    assert inner.value == pytest.approx(float((3 * weight.detach().square()).mean()), rel=1e-4)


def test_a_second_derivative_that_torch_drops_in_silence_is_noticed():
    """Beside a plain path, one whose backward is not recorded: torch gives half of the curvature, and no error."""
    weight = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kinds: Any = Once
    found = along(lambda: (kinds.apply(weight) + weight.square() / 2).sum(), [weight], [torch.ones(6)])
    assert found.method == "finite differences"
    assert found.value == pytest.approx(2.0, rel=1e-9)


def test_a_linear_loss_does_not_bend():
    weight = torch.ones(3, requires_grad=True)
    assert along(lambda: weight.sum(), [weight], [torch.ones(3)]).value == 0.0
    assert by_differences(lambda: weight.sum(), [weight], [torch.ones(3)]).value == 0.0


def test_another_error_of_the_loss_is_not_swallowed():
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="size"):
        along(lambda: (weight @ torch.ones(4)).sum(), [weight], [torch.ones(3)])


def test_wrong_directions_and_losses():
    weight, fixed = torch.ones(3, requires_grad=True), torch.ones(3)
    square = lambda: weight.square().sum()  # noqa: E731
    with pytest.raises(WrongInput, match=r"shapes of the parameters, \[\(3,\)\], saw \[\(2,\)\]"):
        along(square, [weight], [torch.ones(2)])
    with pytest.raises(WrongInput, match="above 0 and finite, saw 0"):
        along(square, [weight], [torch.zeros(3)])
    with pytest.raises(WrongInput, match="above 0 and finite, saw nan"):
        along(square, [weight], [torch.full((3,), math.nan)])
    with pytest.raises(WrongInput, match="require a gradient"):
        along(square, [fixed], [torch.ones(3)])
    with pytest.raises(WrongInput, match="does not depend on them"):
        along(lambda: fixed.sum(), [weight], [torch.ones(3)])
    with pytest.raises(WrongInput, match=r"scalar .* saw one of shape \[3\]"):
        along(lambda: weight.square(), [weight], [torch.ones(3)])
    with pytest.raises(WrongInput, match="not finite around the weights"):
        by_differences(lambda: (weight * math.nan).square().sum(), [weight], [torch.ones(3)])
    with pytest.raises(WrongInput, match="at least 3 steps, saw 2"):
        by_differences(square, [weight], [torch.ones(3)], steps=[1e-1, 1e-2])


# -- a Qwen3.5 -----------------------------------------------------------------------------------------------------


@pytest.fixture
def qwen(tokenizer):
    """A random Qwen3.5 of the test's own, in float64, with its loss, parameters and a direction."""
    torch.manual_seed(2)
    model = HybridModel(wake(Qwen3_5ForCausalLM(qwen_config(tokenizer))).double(), tokenizer, name="own")
    ids = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    parameters = list(model.hf.parameters())
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parameters)]
    return model, lambda: model.hf(input_ids=ids, labels=ids, use_cache=False).loss, parameters, direction


def test_exact_agrees_with_differences_on_a_qwen(qwen):
    """The torch kernels of the GDN layers are twice differentiable. They compute in float32 whatever the weights are;
    differences were 7e-5 off, and at steps of 1e-5 and less visibly rougher."""
    model, loss, parameters, direction = qwen
    with eagerly(model.hf):
        exact = along(loss, parameters, direction)
        swept = by_differences(loss, parameters, direction)
    assert exact.method == "exact"
    assert swept.value == pytest.approx(exact.value, rel=1e-3)
    assert abs(swept.value - exact.value) <= 3 * swept.error
    whole = model.weights_hash
    assert along(loss, parameters[:2], direction[:2]).method == "finite differences"
    assert model.weights_hash == whole


def test_attention_that_cannot_be_differentiated_twice_falls_back(qwen):
    model, loss, parameters, direction = qwen
    before = [parameter.detach().clone() for parameter in parameters]
    with eagerly(model.hf):
        exact = along(loss, parameters, direction)
    found = along(loss, parameters, direction)
    assert found.method == "finite differences"
    assert len(found.sweep) == len(STEPS)
    assert found.value == pytest.approx(exact.value, rel=1e-3)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_the_attention_implementation_comes_back(qwen):
    model, *_ = qwen
    assert model.config._attn_implementation == "sdpa"

    def interrupted():
        with eagerly(model.hf):
            assert model.config._attn_implementation == "eager"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == "sdpa"


# -- optimizers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(organism):
    config = SharpnessConfig(seeds=1, optimizers=("apollo-mini", "adamw"), target=0.9, probe=16, steps=6, examples=40)
    before = {name: p.detach().clone() for name, p in organism.hf.named_parameters()}
    asked = [p.requires_grad for p in organism.hf.parameters()]
    found = sharpness(organism, read_behavior("follow-direction"), config, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in organism.hf.named_parameters())
    assert [p.requires_grad for p in organism.hf.parameters()] == asked
    assert all(p.grad is None for p in organism.hf.parameters())
    assert organism.config._attn_implementation == "sdpa"
    return found


def test_optimizers_are_measured_where_the_loss_meets_the_target(measured):
    assert [row.optimizer for row in measured.rows] == ["apollo-mini", "adamw"]
    for row in measured.rows:
        assert row.reached
        assert row.initial == measured.rows[0].initial  # one probe for all
        assert 0.5 * row.initial < row.loss <= 0.9 * row.initial
        assert 1 <= row.steps <= 6
        assert row.size > 0
        curvatures = row.update, row.gradient, row.random
        assert {c.method for c in curvatures} == {"exact"}
        assert row.gradient.value > abs(row.random.value)  # the gradient lies in what bends, chance does not


def test_one_seed_decides_nothing(measured):
    (comparison,) = measured.comparisons
    assert comparison.optimizer == "apollo-mini"
    own, base = (measured.values(name).popitem()[1] for name in ("apollo-mini", "adamw"))
    assert comparison.difference.value == pytest.approx(own - base)
    assert comparison.ratio.value == pytest.approx(own / base)
    assert math.isnan(comparison.ratio.lower)
    assert comparison.relation == "not distinguishable from"
    assert "APOLLO-Mini is not distinguishable from AdamW" in measured.sentence
    assert "n = 1 seed)" in measured.sentence


def test_a_measurement_is_read_back_as_it_was(measured, tmp_path):
    file = measured.save(tmp_path)
    assert file.name == "sharpness.json"
    assert open_sharpness(tmp_path) == measured
    assert open_sharpness(measured.save(tmp_path / "other.json")) == measured
    told = json.loads(file.read_text())
    assert told["sentence"] == measured.sentence
    assert told["comparisons"][0]["relation"] == "not distinguishable from"
    file.write_text("{}")
    with pytest.raises(WrongInput, match="is not a measurement of sharpness: 'config'"):
        open_sharpness(tmp_path)
    with pytest.raises(WrongInput, match="no sharpness at"):
        open_sharpness(tmp_path / "nowhere")


def test_what_cannot_reach_the_target_is_reported(organism):
    config = SharpnessConfig(seeds=1, optimizers=("adamw",), target=0.01, probe=4, steps=1, batch=4, examples=8)
    whole = organism.weights_hash
    found = sharpness(organism, read_behavior("follow-direction"), config, progress=False)
    assert organism.weights_hash == whole
    (row,) = found.rows
    assert not row.reached
    assert row.update is None
    assert row.lr == pytest.approx(2e-4 * 100)  # raised four times
    assert row.loss > 0.01 * row.initial
    assert found.estimate("adamw") is None
    assert "AdamW did not reach the target from 1 of 1 seeds" in found.sentence
    assert math.isnan(found.frame()["update"].iloc[0])
    assert "0 of 1" in found.table()


def planted(values, optimizers=("apollo", "apollo-mini", "adamw"), seeds=3):
    """A result with these curvatures along updates, None where the target was not reached."""
    curvatures: Any = {
        value: {key: Curvature(value=value, method="exact") for key in ("update", "gradient", "random")}
        for name in optimizers for value in values[name] if value is not None
    }  # fmt: skip
    rows = [
        SharpnessRow(
            optimizer=name, seed=seed, reached=value is not None, lr=1e-4, steps=5, initial=1.0, loss=0.5,
            **curvatures.get(value, {}),
        )
        for name in optimizers for seed, value in enumerate(values[name])
    ]  # fmt: skip
    config = SharpnessConfig(seeds=seeds, optimizers=optimizers)
    return Sharpness(behavior="b", model="m", config=config, rows=tuple(rows), recipe={})


def test_comparisons_are_paired_by_seed():
    """AdamW differs tenfold between seeds; APOLLO is half of it at each, APOLLO-Mini now below and now above."""
    found = planted({"adamw": [0.1, 1.0, 10.0], "apollo": [0.05, 0.51, 4.9], "apollo-mini": [0.3, 0.9, 8.0]})
    apollo, mini = found.comparisons
    assert apollo.relation == "below"
    assert apollo.ratio is not None
    assert apollo.ratio.value == pytest.approx((0.5 * 0.51 * 0.49) ** (1 / 3))
    # t interval of the logarithms with two degrees of freedom, 4.3027
    logs = torch.tensor([0.5, 0.51, 0.49], dtype=torch.float64).log()
    assert math.log(apollo.ratio.upper / apollo.ratio.value) == pytest.approx(4.3027 * float(logs.std()) / 3**0.5, 1e-4)
    assert mini.relation == "not distinguishable from"
    assert "APOLLO is below AdamW (0.5 times, 0.476 to 0.525, n = 3 seeds)" in found.sentence
    assert "APOLLO-Mini is not distinguishable from AdamW" in str(found)
    mean = found.estimate("adamw")
    assert mean is not None
    assert mean.value == pytest.approx(3.7)
    assert mean.lower < 0 < mean.value < mean.upper
    above = planted({"adamw": [0.1, 1.0, 10.0], "apollo": [0.2, 2.1, 19.0], "apollo-mini": [0.1, 1.0, 10.0]})
    assert [part.relation for part in above.comparisons] == ["above", "not distinguishable from"]


def test_a_seed_without_a_partner_is_left_out_and_named():
    found = planted({"adamw": [0.1, 1.0, None], "apollo": [0.05, 0.51, 4.9], "apollo-mini": [None, None, 3.0]})
    apollo, mini = found.comparisons
    assert apollo.seeds == 2
    assert mini.seeds == 0
    assert mini.ratio is None
    assert "APOLLO-Mini and AdamW have no seed from which both reached the target" in found.sentence
    assert "APOLLO-Mini did not reach the target from 2 of 3 seeds; AdamW did not" in found.sentence


def test_where_a_curvature_is_negative_differences_decide():
    found = planted({"adamw": [0.10, 0.11, 0.10], "apollo": [-0.1, -0.1, -0.11], "apollo-mini": [0.3, 0.3, 0.31]})
    apollo, mini = found.comparisons
    assert apollo.ratio is None
    assert apollo.relation == "below"
    assert "APOLLO is below AdamW (difference -0.207" in found.sentence
    assert mini.relation == "above"


def test_the_table_has_what_was_published_beside():
    found = planted({"adamw": [0.1, 1.0, 10.0], "apollo": [0.05, 0.51, 4.9], "apollo-mini": [0.3, 0.9, 8.0]})
    head, *lines = found.table().splitlines()
    assert head.endswith("epoch 2   epoch 5  epoch 10  epoch 20")
    for line, name in zip(lines, ("apollo", "apollo-mini", "adamw"), strict=True):
        assert line.startswith(NAMES[name])
        assert [float(cell) for cell in line.split()[-4:]] == list(PUBLISHED[name].values())
    frame = found.frame()
    assert len(frame) == 9
    assert frame[frame["optimizer"] == "adamw"]["update"].tolist() == [0.1, 1.0, 10.0]


def test_without_adamw_nothing_is_compared():
    found = planted({"apollo": [1.0]}, optimizers=("apollo",), seeds=1)
    assert found.comparisons == ()
    assert "AdamW was not measured" in found.sentence


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, saw 0"),
        ({"target": 1.0}, "target must lie between 0 and 1, saw 1"),
        ({"general_share": 1.5}, "general_share must lie between 0 and 1"),
        ({"optimizers": ("adam",)}, "unknown optimizer 'adam'; allowed are apollo, apollo-mini, adamw, sgd"),
        ({"optimizers": ()}, "one or more, each once, saw none"),
        ({"optimizers": ("sgd", "sgd")}, "each once, saw sgd, sgd"),
        ({"seed": -1}, "seed must lie between"),
    ],
)
def test_wrong_settings(unchecked, wrong, message):
    with pytest.raises(WrongInput, match=message):
        SharpnessConfig(**wrong)


def test_only_float32_weights(qwen):
    model, *_ = qwen
    with pytest.raises(WrongInput, match=r"needs float32 weights, saw torch\.float64"):
        sharpness(model, read_behavior("follow-direction"), progress=False)
