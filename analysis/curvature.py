"""How a loss bends along a direction: v^T H v for the unit vector v, H being the Hessian of the loss.

Exact where the loss can be differentiated twice: the gradient's slope along v is differentiated once more. Attention
kernels of torch cannot (on a CPU "derivative for ... is not implemented"); the plain attention of transformers can, and
`eagerly` switches a model to it meanwhile. The torch kernels of the GDN layers can as well. A function with a backward
of its own may drop terms of the second derivative and not say so, so the exact value of the first direction is checked
against a difference.

Else by central differences of the gradient, (g(w + h v) - g(w - h v)) . v / 2h. There no one step h is right: large
ones leave the region where the loss is quadratic, small ones drown in rounding. So h is swept from 0.1 to 1e-6 of |w|
by half decades, and the value is the middle one of the three neighbours that agree best; how far these lie apart is its
error. On a random Qwen3.5 in float64 it was 7e-5 off, relative to the exact value; steps of 0.01 |w| and more were off
by half or had the wrong sign (tests/test_sharpness.py holds it to 1e-3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from probes.errors import WrongInput

STEPS = tuple(10 ** -(1 + i / 2) for i in range(11))
"""Steps of the sweep, relative to the norm of the weights."""
_NEAR = 0.1  # how far an exact value and one difference may lie apart without a sweep to decide
_NOT_TWICE = ("is not implemented", "differentiate twice")


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """v^T H v along one direction, in nats per squared unit of weight.

    Attributes:
        error: how far the three steps that agree best lie apart; 0 when exact, up to rounding.
        sweep: of finite differences, pairs of the step h over |w| and the value that it gives, the largest step first.
    """

    value: float
    method: Literal["exact", "finite differences"]
    error: float = 0.0
    sweep: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.method}" + (f", ±{self.error:.2g})" if self.sweep else ")")


def along(loss: Callable[[], Tensor], parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> Curvature:
    """Curvature of `loss` along `direction`, which has a tensor for each parameter and need not be of unit length.

    `loss` takes no arguments and computes a scalar from the parameters as they are; it has to give the same each time.
    Weights are bitwise what they were afterwards, and no `.grad` is written. Dot products are taken in float64.

    Raises:
        WrongInput: shapes that differ, a direction without length or not finite, a parameter without gradient, or a
            loss that does not depend on the parameters or is not finite.
    """
    return along_each(loss, parameters, [direction])[0]


def along_each(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> list[Curvature]:
    """As `along`, for several directions at the cost of three gradients and one product for each."""
    units = [_unit(parameters, direction) for direction in directions]
    try:
        found = _exact(loss, parameters, units)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NOT_TWICE):
            raise
        found = None
    if found is None or (units and not _confirmed(loss, parameters, units[0], found[0])):
        return [by_differences(loss, parameters, unit) for unit in units]
    return [Curvature(value=value, method="exact") for value in found]


def _confirmed(loss: Callable[[], Tensor], parameters: Sequence[Tensor], unit: list[Tensor], value: float) -> bool:
    """Whether differences bear out an exact value: no plateau that is clear in itself lies elsewhere.

    Functions with a backward of their own may leave what it depends on out of the graph. No error tells of it.
    """
    with _kept(parameters) as weights:
        once = _difference(loss, parameters, weights, unit, 1e-3)
    if abs(once - value) <= _NEAR * abs(value):
        return True
    swept = by_differences(loss, parameters, unit)
    off = abs(swept.value - value)
    return swept.error > _NEAR * abs(swept.value) or off <= max(3 * swept.error, _NEAR * abs(swept.value))


def by_differences(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    steps: Sequence[float] = STEPS,
) -> Curvature:
    """As `along`, by central differences of the gradient with steps relative to the norm of the weights.

    Raises:
        WrongInput: as `along`, fewer than three steps, or no three neighbours with a finite value.
    """
    if len(steps) < 3:
        raise WrongInput(f"a sweep needs at least 3 steps, saw {len(steps)}")
    unit = _unit(parameters, direction)
    with _kept(parameters) as weights:
        values = [_difference(loss, parameters, weights, unit, step) for step in steps]
    value, error = _plateau(values)
    sweep = tuple(zip(map(float, steps), values, strict=True))
    return Curvature(value=value, method="finite differences", error=error, sweep=sweep)


@contextmanager
def eagerly(hf: Any) -> Iterator[None]:
    """While the block runs, the attention of a transformers model is the plain one, which can be differentiated twice.

    Parts with a configuration of their own (a text model inside a multimodal one) go back each to what they had.
    """
    configs = {id(module.config): module.config for module in hf.modules() if hasattr(module, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


@contextmanager
def _kept(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of the weights, which are written back when the block ends."""
    weights = [parameter.detach().clone() for parameter in parameters]
    try:
        yield weights
    finally:
        write(parameters, weights)


def _difference(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], weights: list[Tensor], unit: list[Tensor], step: float
) -> float:
    """The central difference for a step relative to the norm of the weights, which are left moved."""
    h, slopes = step * (norm(weights) or 1.0), []
    for sign in (1.0, -1.0):
        write(parameters, [w.double() + sign * h * v for w, v in zip(weights, unit, strict=True)])
        slopes.append(dot(torch.autograd.grad(_value(loss), list(parameters), materialize_grads=True), unit))
    return (slopes[0] - slopes[1]) / (2 * h)


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Dot product over all tensors, in float64."""
    return sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in zip(one, other, strict=True))


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors, in float64."""
    return math.sqrt(dot(tensors, tensors))


def _exact(loss: Callable[[], Tensor], parameters: Sequence[Tensor], units: list[list[Tensor]]) -> list[float]:
    gradient = torch.autograd.grad(_value(loss), list(parameters), create_graph=True, materialize_grads=True)
    found = []
    for unit in units:
        slope = torch.stack([(g.double() * v).sum() for g, v in zip(gradient, unit, strict=True)]).sum()
        if not slope.requires_grad:  # a linear loss, or one whose backward is not recorded
            found.append(0.0)
            continue
        product = torch.autograd.grad(slope, list(parameters), retain_graph=True, materialize_grads=True)
        found.append(dot(product, unit))
    return found


def _value(loss: Callable[[], Tensor]) -> Tensor:
    value = loss()
    if value.numel() != 1 or not value.requires_grad:
        seen = f"one of shape {list(value.shape)}" if value.numel() != 1 else "one that does not depend on them"
        raise WrongInput(f"the loss must be a scalar that depends on the parameters, saw {seen}")
    return value


def _unit(parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
    """The direction in float64 and of unit length."""
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (parameters, direction)]
    if shapes[0] != shapes[1]:
        raise WrongInput(f"the direction must have the shapes of the parameters, {shapes[0]}, saw {shapes[1]}")
    if any(not parameter.requires_grad for parameter in parameters):
        raise WrongInput("curvature needs parameters that require a gradient, saw one that does not")
    length = norm(direction)
    if not 0 < length < math.inf:
        raise WrongInput(f"a direction needs a length above 0 and finite, saw {length:g}")
    return [tensor.detach().double() / length for tensor in direction]


def _plateau(values: Sequence[float]) -> tuple[float, float]:
    """(the middle one of the three neighbours that agree best relative to their size, how far they lie apart)."""
    threes = [values[i : i + 3] for i in range(len(values) - 2)]
    threes = [three for three in threes if all(map(math.isfinite, three))]
    if not threes:
        raise WrongInput("the gradient is not finite around the weights: no three neighbouring steps have a value")
    best = min(threes, key=lambda three: (max(three) - min(three)) / (max(map(abs, three)) or 1.0))
    return best[1], max(best) - min(best)


@torch.no_grad()
def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into parameters, in place and in their dtype."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
