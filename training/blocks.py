"""Tensors that one rule steps together: the arithmetic of APOLLO's step (`training.apollo` has the formulas)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from training.draws import key_of, normal, signs, stochastically_rounded

Scaling = Literal["channel", "tensor"]
GATES = ("in_proj_a", "in_proj_b", "in_proj_ba")
"""Modules whose weights get plain AdamW whatever their size: the projections of the GDN gates."""
_WORKSPACE, _LARGE = {"cpu": 1 << 21}, 1 << 26  # numbers of R handled at once: a CPU has caches, a GPU fills 256 MB
_SCRATCH: dict[tuple[str, torch.device], Tensor] = {}
_FUSED = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a tensor is stepped: by "channel", by "tensor", or by plain "adam"; n x m is its matrix, n the smaller."""

    kind: Literal["channel", "tensor", "adam"]
    shape: tuple[int, ...]
    rank: int
    alpha: float
    blocks: int = 1
    """Of the projection, along its diagonal; 1: it is dense."""

    @property
    def n(self) -> int:
        return min(self.shape)

    @property
    def wide(self) -> bool:
        """Whether channels are columns: the larger dimension is the second."""
        return len(self.shape) == 2 and self.shape[0] <= self.shape[1]

    @property
    def moments(self) -> tuple[int, ...]:
        """Shape of each of the two moments, as the matrix lies: [r, m] of a wide one, [m, r] of a tall one."""
        if self.kind == "adam":
            return self.shape
        return (self.rank, self.shape[1]) if self.wide else (self.shape[0], self.rank)

    @property
    def state_bytes(self) -> int:
        """float32 moments, and where there is a limiter the norm of the last update: 4 (2 m r + 1), or 8 a weight."""
        return 8 * math.prod(self.moments) + 4 * (self.kind != "adam")


def rule_of(
    name: str, shape: tuple[int, ...], *, rank: int, alpha: float | None, scaling: Scaling | None, block: int
) -> Rule:
    """The rule for a tensor. `scaling` None: by tensor for rank 1, by channel above; `alpha` None: sqrt(n / r).

    The projection has as many equal blocks of `block` rows or more as r and n can be cut into.
    """
    if len(shape) != 2 or min(shape) <= rank or any(part in GATES for part in name.split(".")):
        return Rule(kind="adam", shape=shape, rank=0, alpha=1.0)
    kind = scaling or ("tensor" if rank == 1 else "channel")
    return Rule(
        kind=kind, shape=shape, rank=rank, alpha=math.sqrt(min(shape) / rank) if alpha is None else alpha,
        blocks=next(k for k in range(max(rank // block, 1), 0, -1) if rank % k == min(shape) % k == 0),
    )  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Block:
    """Tensors of one rule. Their moments lie in one buffer each, [tensor, ...]; `state` has the views."""

    rule: Rule
    group: dict[str, Any]
    state: dict[Any, dict[str, Any]]
    names: list[str]
    parameters: list[Tensor]

    def __post_init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.views: list[dict[str, Tensor]] = []
        self.last: dict[str, Tensor] = {}

    def gradient(self, i: int) -> Tensor:
        gradient: Any = self.parameters[i].grad
        return gradient

    def lengths(self, only: int | None = None) -> dict[int, Tensor]:
        """Norm of each gradient: of its channels [m], or the whole [1]."""
        found: dict[int, Tensor] = {}
        for i in range(len(self.parameters)) if only is None else (only,):
            if self.parameters[i].grad is None:
                continue
            gradient = self.gradient(i)
            if self.rule.kind == "adam":
                found[i] = torch.linalg.vector_norm(gradient, dtype=torch.float32)[None]
                continue
            lengths = _lengths(gradient, 0 if self.rule.wide else 1)
            found[i] = lengths if self.rule.kind == "channel" else torch.linalg.vector_norm(lengths)[None]
        return found

    def parts(self) -> Iterator[list[int]]:
        """Neighbours that have a gradient and have taken equally many steps, as many as the workspace allows."""
        ready = [i for i, p in enumerate(self.parameters) if p.grad is not None and p.numel()]
        size = max(math.prod(self.rule.moments), 1)
        most = max(1, _WORKSPACE.get(self.parameters[0].device.type, _LARGE) // size)
        for _, run in groupby(enumerate(ready), lambda at: (at[1] - at[0], self.steps(at[1]))):
            together = [i for _, i in run]
            for start in range(0, len(together), most):
                yield together[start : start + most]

    def steps(self, i: int) -> int:
        return self.state[self.parameters[i]].get("step", 0)

    def bind(self) -> None:
        """Make the buffers, and the state's tensors views of them; also after others were loaded into the state."""
        bound = bool(self.views) and all(
            self.state[parameter].get(key) is view
            for parameter, views in zip(self.parameters, self.views, strict=True)
            for key, view in views.items()
        )
        if bound:
            return
        device, count = self.parameters[0].device, len(self.parameters)
        shapes: dict[str, tuple[int, ...]] = {"first": self.rule.moments, "second": self.rule.moments}
        if self.rule.kind != "adam":
            shapes["norm"] = ()
            self.last = {key: torch.full((count,), math.nan, device=device) for key in ("limiter", "norm")}
            self.last["scale"] = torch.full(
                (count, 1 if self.rule.kind == "tensor" else max(self.rule.shape)), math.nan
            )
            self.last["scale"] = self.last["scale"].to(device)
        self.buffers = {key: torch.zeros(count, *shape, device=device) for key, shape in shapes.items()}
        self.views = [{key: buffer[i] for key, buffer in self.buffers.items()} for i in range(count)]
        for parameter, views in zip(self.parameters, self.views, strict=True):
            state = self.state[parameter]
            state.setdefault("step", 0)
            for key, view in views.items():
                if key in state:
                    view.copy_(state[key])
                state[key] = view

    def advance(self, part: list[int], lengths: dict[int, Tensor]) -> None:
        """Step the tensors of a part: neighbours, after equally many steps. `bind` comes first."""
        group, rule, step = self.group, self.rule, self.steps(part[0])
        period, since = divmod(step, group["refresh"])
        first, second = (self.buffers[key][part[0] : part[-1] + 1] for key in ("first", "second"))
        restarted = group["at_refresh"] == "reset" and rule.kind != "adam"
        if restarted and since == 0:
            first.zero_()
            second.zero_()
        projected = self._projected(part, period)
        size = None if rule.kind == "adam" else self._norms(projected)
        _adam_(projected, first, second, steps=since if restarted else step, group=group)
        if size is None:
            for i, update in zip(part, projected, strict=True):
                self._move(i, update, -1.0)
        else:
            length = torch.stack([lengths[i] for i in part])
            scale = torch.where(size > 0, rule.alpha * self._norms(projected) / size, 0.0)
            limiter = self._limited(part, torch.linalg.vector_norm(scale * length, dim=1))
            self.last["scale"][part[0] : part[-1] + 1] = scale
            for i, factor in zip(part, scale * limiter[:, None], strict=True):
                self._move(i, self.gradient(i), factor if rule.wide else factor[:, None])
        for i in part:
            self.state[self.parameters[i]]["step"] = step + 1

    def _projected(self, part: list[int], period: int) -> Tensor:
        """R of each tensor, as its moments lie; for plain AdamW the gradients themselves."""
        if self.rule.kind == "adam":
            return torch.stack([self.gradient(i).float() for i in part])
        rank, blocks, device = self.rule.rank, self.rule.blocks, self.parameters[0].device
        columns, size = self.rule.n // blocks, (rank // blocks) ** -0.5
        keys = [key_of(self.group["seed"], f"projection {self.names[i]}", period) for i in part]
        if self.group["entries"] == "signs":
            room = scratch("signs", (len(part), -(-rank * columns // 32), 32), device)
            drawn = signs(keys, rank, columns, size, device=device, out=room)
        else:
            drawn = normal(keys, rank, columns, device=device).mul_(size)
        found = scratch("projected", (len(part), *self.rule.moments), device)
        for i, projection, out in zip(part, drawn.unflatten(1, (blocks, -1)), found, strict=True):
            gradient = self.gradient(i).float()
            if self.rule.wide:
                torch.bmm(projection, gradient.unflatten(0, (blocks, -1)), out=out.unflatten(0, (blocks, -1)))
            else:
                whole, parts = (x.unflatten(1, (blocks, -1)).transpose(0, 1) for x in (gradient, out))
                torch.bmm(whole, projection.transpose(1, 2), out=parts)
        return found

    def _norms(self, projected: Tensor) -> Tensor:
        """Of each channel [tensor, m], or of each tensor [tensor, 1]."""
        if self.rule.kind == "tensor":
            return torch.linalg.vector_norm(projected, dim=(1, 2))[:, None]
        if not self.rule.wide:
            return torch.linalg.vector_norm(projected, dim=2)
        return torch.stack([_lengths(one, 0) for one in projected])

    def _limited(self, part: list[int], norm: Tensor) -> Tensor:
        """The limiter's factors [tensor]. A zero update does not change the norm that limits the next one."""
        before = self.buffers["norm"][part[0] : part[-1] + 1]
        limiter = torch.ones_like(norm)
        if self.group["gamma"] is not None:
            allowed = (self.group["gamma"] * before / norm).clamp(max=1.0)
            limiter = torch.where((before > 0) & (norm > 0), allowed, limiter)
        before.copy_(torch.where(norm > 0, norm * limiter, before))
        self.last["limiter"][part[0] : part[-1] + 1] = limiter
        self.last["norm"][part[0] : part[-1] + 1] = norm * limiter
        return limiter

    def _move(self, i: int, update: Tensor, factor: Tensor | float) -> None:
        """W <- (1 - lr decay) W - lr update factor, in float32; bfloat16 weights are then rounded stochastically."""
        lr, decay = self.group["lr"], 1 - self.group["lr"] * self.group["weight_decay"]
        weight = self.parameters[i].detach()  # unlike .data, writes through it are counted
        exact = weight if weight.dtype == torch.float32 else weight.float()
        if decay != 1:
            exact.mul_(decay)
        if isinstance(factor, Tensor):
            exact.addcmul_(update if update.dtype == torch.float32 else update.float(), factor, value=-lr)
        else:
            exact.add_(update, alpha=-lr * factor)
        if exact is not weight:
            key = key_of(self.group["seed"], f"rounding {self.names[i]}", self.steps(i))
            weight.copy_(stochastically_rounded(exact, key))

    def telemetry(self) -> Iterator[dict[str, Any]]:
        for i, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
            row: dict[str, Any] = {"name": name, "rule": self.rule.kind, "step": self.steps(i)}
            row |= dict.fromkeys(("scale_mean", "scale_min", "scale_max", "limiter", "update", "ratio"), math.nan)
            if self.last:
                scale = self.last["scale"][i]
                update = self.group["lr"] * float(self.last["norm"][i])
                row |= {f"scale_{word}": float(getattr(scale, word)()) for word in ("mean", "min", "max")}
                row |= {"limiter": float(self.last["limiter"][i]), "update": update}
                row["ratio"] = update / max(float(parameter.detach().float().norm()), 1e-30)
            yield row


def _lengths(matrix: Tensor, dim: int) -> Tensor:
    """Norms along one dimension of a matrix, float32: [other dimension]."""
    if dim == 1:
        return torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)
    high, wide = matrix.shape  # torch sums down columns several times slower than this
    first, *rest = matrix.split(min(high, max(1, (1 << 18) // wide)))
    first = first.float()  # or squares of bfloat16 would be rounded before they are added
    total = torch.mul(first, first, out=scratch("squares", tuple(first.shape), matrix.device))
    for part in rest:
        part = part.float()
        total[: len(part)].addcmul_(part, part)
    return total.sum(0).sqrt()


def scratch(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Memory with numbers of no meaning, used again by every part: fresh pages cost more than what is done in them."""
    size = math.prod(shape)
    held = _SCRATCH.get((name, device))
    if held is None or held.numel() < size:
        held = _SCRATCH[name, device] = torch.zeros(size, device=device)
    return held[:size].view(shape)


def _adam_(gradient: Tensor, first: Tensor, second: Tensor, *, steps: int, group: dict[str, Any]) -> None:
    """Adam's step of length 1 by torch's own kernel: `gradient` becomes minus A, the moments are changed in place.

    The gradient is also handed over as the weight, which a decoupled weight decay of 1 takes to zero: the fused kernels
    read an element of both before they write it. That saves a buffer and its trips through memory. Where there is no
    fused kernel, the weight is a tensor of its own.
    """
    fused = gradient.device.type in _FUSED
    weight = gradient if fused else torch.zeros_like(gradient)
    taken = torch.full((), float(steps), device=gradient.device)
    adam(
        [weight], [gradient], [first], [second], [], [taken], fused=fused, beta1=group["betas"][0],
        beta2=group["betas"][1], eps=group["eps"], lr=1.0, weight_decay=1.0, decoupled_weight_decay=True,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    if not fused:
        gradient.copy_(weight)
