"""APOLLO: AdamW's step sizes, learned in a small random projection (Zhu et al., arXiv:2412.05270).

AdamW keeps two moments of every weight. APOLLO keeps them of a projection of the gradient, only to learn how large a
step each *channel* takes; the direction of the step is the gradient's own. For a matrix whose gradient G is n x m, n
being its smaller dimension:

    R = P G                           P is r x n and random, |P g| = |g| on average; drawn anew every `refresh` steps
    A = Adam's step for R             moments of r x m numbers instead of n x m
    s_j = |A_j| / |R_j|               for each channel j, a column of G; APOLLO-Mini (r = 1): one for the whole tensor
    U = alpha G diag(s)               alpha = sqrt(n / r): Adam's steps for r rows are sqrt(r / n) as long as for n
    U <- U min(1, gamma |U before| / |U|)     the norm-growth limiter, gamma = 1.01
    W <- (1 - lr weight_decay) W - lr U

P is block diagonal (B blocks of `block` rows; the paper's is dense): a row of block k sees the k-th part of G's rows
alone, which takes a B-th of the multiplications. The mean of |P g|^2 is |g|^2 all the same; its variance is that of a
dense P where g is spread evenly over the parts, and B times that where g lies in one of them. There |A| counts only the
rows that see anything, so the step is sqrt(B) times shorter than a dense P's, and near AdamW's own (tests/test_apollo).
So a rank below 2 blocks stays dense.

P is never stored: `training.draws` computes it from the seed, the tensor's name and the number of refreshes, the same
on every device and after every resume. Its entries are random signs over sqrt(r / B). The paper's are normal
(`entries`); signs keep lengths more exactly (for one block the variance of |P g|^2 is 2 (|g|^4 - sum g_i^4) / r, for
normal entries 2 |g|^4 / r; Achlioptas 2003) and take one random bit each. Adam's step for R is torch's own fused
kernel. Tensors of one shape step together, and the host waits once a step: to know that no gradient is infinite or NaN
before anything changes.

Plain AdamW does the tensors for which a projection is no saving or makes no sense (`rule_of`): vectors, convolutions
(three dimensions; a GDN layer's has 4 numbers a channel), the projections of the GDN gates, and matrices whose smaller
dimension is not above the rank.

Weights in bfloat16 are rounded up or down at random, with the probabilities that make the mean right: a step of lr 1e-5
is far below the spacing of most weights, and rounding to the nearest loses three quarters of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from probes.errors import WrongInput
from training.blocks import Block, Scaling, rule_of


class Apollo(torch.optim.Optimizer):
    """The optimizer. Takes named parameters, since projections are drawn by name: `Apollo(model.named_parameters())`.

    Args:
        named: pairs of name and parameter, float32 or bfloat16; or groups `{"params": pairs, "lr": ...}`.
        lr: learning rate; 1e-5 to 1e-4 for a pretrained model.
        betas, eps: of Adam.
        weight_decay: decoupled; 0 where general data is the regulariser.
        rank: rows of the projection; 1 is APOLLO-Mini.
        alpha: factor of the scale; None: sqrt(n / r) by tensor.
        scaling: "channel" or "tensor"; None: by tensor for rank 1, by channel above.
        gamma: largest growth of an update's norm from one step to the next; None: no limit.
        refresh: steps after which a new projection is drawn.
        at_refresh: "keep" the moments when the projection changes (as in the paper), or "reset" them.
        entries: of the projection: "signs" or "normal", see above.
        block: least rows of a block of the projection; above half the rank: dense.
        seed: of the projections and of stochastic rounding.

    State of a tensor: `step` (a number), `first` and `second` (float32 moments [m, r] or [r, m], or as the tensor),
    and, where there is a projection, `norm` (float32, of the last update before lr). It loads with `weights_only=True`.

    Raises:
        WrongInput: parameters without names or of another dtype, or an option out of its range.
    """

    def __init__(
        self,
        named: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 256,
        alpha: float | None = None,
        scaling: Scaling | None = None,
        gamma: float | None = 1.01,
        refresh: int = 200,
        at_refresh: Literal["keep", "reset"] = "keep",
        entries: Literal["signs", "normal"] = "signs",
        block: int = 64,
        seed: int = 0,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "alpha": alpha,
            "scaling": scaling, "gamma": gamma, "refresh": refresh, "at_refresh": at_refresh,
            "entries": entries, "block": block, "seed": seed,
        }  # fmt: skip
        self._blocks: list[Block] | None = None
        super().__init__(named, defaults)

    @classmethod
    def mini(cls, named: Iterable[Any], **options: Any) -> Apollo:
        """APOLLO-Mini: rank 1, one scale a tensor."""
        return cls(named, rank=1, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
            names = [name for group in self.param_groups for name in group["param_names"]]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise WrongInput(f"names decide projections, and '{twice}' is there twice")
        except WrongInput:
            self.param_groups.pop()
            raise
        self._blocks = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy or a pickle, which has no blocks
        self._blocks = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step for every parameter that has a gradient.

        Raises:
            FloatingPointError: a gradient is not finite; its parameter is named, and no weight or state has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lengths = {id(block): block.lengths() for block in self.blocks}
        self._require_finite(lengths)
        for block in self.blocks:
            block.bind()
            for part in block.parts():
                block.advance(part, lengths[id(block)])
        return loss

    @contextmanager
    def stepping_in_backward(self) -> Iterator[None]:
        """Inside the block each parameter steps as soon as `backward` has its gradient, which is then dropped.

        So no more than one layer's gradients exist at a time. What needs all of them first does not go with it:
        clipping by the global norm, accumulation over several backwards, and leaving every weight untouched when a
        later gradient is not finite (the parameter itself stays as it was).
        """
        places = {parameter: (block, i) for block in self.blocks for i, parameter in enumerate(block.parameters)}

        def hook(parameter: Tensor) -> None:
            block, i = places[parameter]
            with torch.no_grad():
                lengths = block.lengths(only=i)
                self._require_finite({id(block): lengths}, "its weight is as it was")
                block.bind()
                block.advance([i], lengths)
            parameter.grad = None

        handles = [parameter.register_post_accumulate_grad_hook(hook) for parameter in places]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _require_finite(
        self, lengths: dict[int, dict[int, Tensor]], kept: str = "no weight was changed by this step"
    ) -> None:
        named = {id(block): block.names for block in self.blocks}
        found = [(named[key][i], length) for key, each in lengths.items() for i, length in each.items()]
        by_device: dict[torch.device, list[Tensor]] = {}
        for _, length in found:
            by_device.setdefault(length.device, []).append(length)
        if all(bool(torch.cat(each).isfinite().all()) for each in by_device.values()):  # the host waits here
            return
        bad = [name for name, length in found if not bool(length.isfinite().all())]
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise FloatingPointError(f"the gradient of {bad[0]}{more} is not finite; {kept}")

    @property
    def blocks(self) -> list[Block]:
        """Tensors that step together: of one group, rule, dtype and device."""
        if self._blocks is None:
            self._blocks = []
            for group in self.param_groups:
                kinds: dict[Any, Block] = {}
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    options = {key: group[key] for key in ("rank", "alpha", "scaling", "block")}
                    rule = rule_of(name, tuple(parameter.shape), **options)
                    block = kinds.setdefault(
                        (rule, parameter.dtype, parameter.device),
                        Block(rule=rule, group=group, state=self.state, names=[], parameters=[]),
                    )
                    block.names.append(name)
                    block.parameters.append(parameter)
                self._blocks += kinds.values()
        return self._blocks

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, except that moments of bfloat16 weights stay float32.

        Raises:
            WrongInput: the state is of parameters with other names.
        """
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if mine["param_names"] != theirs.get("param_names"):
                raise WrongInput("the optimizer state is of other parameters: their names differ")
        super().load_state_dict(state_dict)
        places = (i for group in state_dict["param_groups"] for i in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for parameter, i in zip(parameters, places, strict=True):
            for key, value in state_dict["state"].get(i, {}).items():
                self.state[parameter][key] = value.to(parameter.device) if isinstance(value, Tensor) else value
        self._blocks = None

    def plan(self) -> pd.DataFrame:
        """One row per tensor: name, shape, rule, rank, blocks of P, alpha, and bytes of state as its formula says."""
        return pd.DataFrame(
            [
                {
                    "name": name, "shape": "x".join(map(str, block.rule.shape)), "rule": block.rule.kind,
                    "rank": block.rule.rank, "blocks": block.rule.blocks, "alpha": block.rule.alpha,
                    "state_bytes": block.rule.state_bytes,
                }
                for block in self.blocks for name in block.names
            ]
        )  # fmt: skip

    def telemetry(self) -> pd.DataFrame:
        """What the last step did, one row per tensor; without figures before the first one.

        `scale_*` are of alpha s over channels (NaN for plain AdamW), `limiter` is the factor of the norm-growth limiter
        (1: not limited), `update` is lr |U| and `ratio` the same over |W|. With gradients whose norms are noisy the
        limiter lets an update grow by 1 % but fall freely, so it wears down the mean step: a limiter that stays below 1
        is to be looked at.
        """
        return pd.DataFrame([row for block in self.blocks for row in block.telemetry()])


def _check(group: dict[str, Any]) -> None:
    if "param_names" not in group:
        raise WrongInput("Apollo draws by name: give it model.named_parameters(), not model.parameters()")
    if any(isinstance(p, DTensor) for p in group["params"]):
        raise WrongInput("Apollo steps whole tensors on each process, saw sharded ones (DTensor)")
    wrong = {p.dtype for p in group["params"]} - {torch.float32, torch.bfloat16}
    if wrong:
        raise WrongInput(f"Apollo trains float32 and bfloat16 weights, saw {', '.join(sorted(map(str, wrong)))}")
    for name in ("lr", "eps", "weight_decay", "rank", "refresh", "block", "seed"):
        if not isinstance(group[name], float | int) or isinstance(group[name], bool):
            raise WrongInput(f"{name} must be a number, saw {group[name]!r}")
    for name, least in (("lr", 0), ("eps", 0), ("weight_decay", 0), ("rank", 1), ("refresh", 1), ("block", 1)):
        if not least <= group[name] < math.inf:
            raise WrongInput(f"{name} must be at least {least} and finite, saw {group[name]}")
    for name in ("rank", "refresh", "block", "seed"):
        if not isinstance(group[name], int):
            raise WrongInput(f"{name} must be a whole number, saw {group[name]}")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise WrongInput(f"betas must be two numbers in [0, 1), saw {betas}")
    if group["gamma"] is not None and not group["gamma"] >= 1:
        raise WrongInput(f"gamma must be at least 1, or None for no limit, saw {group['gamma']}")
    if group["alpha"] is not None and not 0 < group["alpha"] < math.inf:
        raise WrongInput(f"alpha must be above 0 and finite, or None for sqrt(n / r), saw {group['alpha']}")
    for name, allowed in (
        ("scaling", ("channel", "tensor", None)),
        ("at_refresh", ("keep", "reset")),
        ("entries", ("signs", "normal")),
    ):
        if group[name] not in allowed:
            raise WrongInput(f"unknown {name} '{group[name]}'; allowed are {', '.join(map(str, allowed))}")
