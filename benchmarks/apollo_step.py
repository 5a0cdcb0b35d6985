"""What a step of APOLLO costs, beside AdamW and beside the least that it can cost.

About 45M parameters shaped like Qwen3.5-0.8B (hidden 1,024): GDN mixers with their gates and convolution, attention,
MLPs. Timed by turns, two at a time, with the same gradients:

    floor         the bare projections R = P G of all matrices at rank 256, P given: no step can be without them
    apollo        training.apollo.Apollo at rank 256: projections drawn anew, everything else included
    dense         the same with dense projections, as in the paper: with the very matmuls of the floor
    mini          the same at rank 1, one scale a tensor
    adamw_*       torch.optim.AdamW, as a loop, foreach, and fused
    reference     apollo_torch.APOLLOAdamW at rank 256, where that package was installed by hand

The floor's projections are dense; Apollo's own are block diagonal and cheaper, so it may lie below. `ratio` is apollo
over floor and `ratio_dense` dense over floor (limit 1.5), `ratio_mini` is mini over fused AdamW (limit 1.5). Bytes of
state are counted in the optimizer and compared with the formula of `training.blocks.Rule.state_bytes`; `largest_stored`
names the largest tensor there, which is a moment and no projection. Prints one JSON line.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from state_snapshots import medians
from torch import Tensor, nn

from probes.store import library_versions
from training.apollo import Apollo


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: int = 15
    """Timed steps of each, after the warm-up."""
    warmup: int = 3
    rank: int = 256
    threads: int = 0
    """0 leaves torch's own choice."""
    seed: int = 0


def shapes() -> dict[str, tuple[int, ...]]:
    """Two GDN mixers and an attention mixer as in Qwen3.5-0.8B, and two MLPs, three quarters as wide as there."""
    hidden, inner, heads, keys, values = 1024, 2688, 16, 2048, 2048
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        gdn = f"layers.{layer}.linear_attn"
        found |= {
            f"{gdn}.in_proj_qkv.weight": (2 * keys + values, hidden), f"{gdn}.in_proj_z.weight": (values, hidden),
            f"{gdn}.in_proj_a.weight": (heads, hidden), f"{gdn}.in_proj_b.weight": (heads, hidden),
            f"{gdn}.conv1d.weight": (2 * keys + values, 1, 4), f"{gdn}.A_log": (heads,), f"{gdn}.dt_bias": (heads,),
            f"{gdn}.norm.weight": (128,), f"{gdn}.out_proj.weight": (hidden, values),
        }  # fmt: skip
    attention = "layers.2.self_attn"
    found |= {
        f"{attention}.q_proj.weight": (4096, hidden), f"{attention}.k_proj.weight": (512, hidden),
        f"{attention}.v_proj.weight": (512, hidden), f"{attention}.o_proj.weight": (hidden, 2048),
    }  # fmt: skip
    for layer in range(2):
        mlp = f"layers.{layer}.mlp"
        found |= {f"{mlp}.gate_proj.weight": (inner, hidden), f"{mlp}.up_proj.weight": (inner, hidden)}
        found |= {f"{mlp}.down_proj.weight": (hidden, inner), f"layers.{layer}.norm.weight": (hidden,)}
    return found


def parameters(seed: int) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    found = {name: nn.Parameter(torch.randn(shape, generator=random) * 0.02) for name, shape in shapes().items()}
    for parameter in found.values():
        parameter.grad = torch.randn(parameter.shape, generator=random) * 1e-3
    return found


def floor(options: Options) -> Callable[[], None]:
    matrices = [
        parameter.grad
        for name, parameter in parameters(options.seed).items()
        if parameter.ndim == 2 and min(parameter.shape) > options.rank and parameter.grad is not None
    ]
    projections = [torch.randn(options.rank, min(matrix.shape)) for matrix in matrices]

    def project() -> None:
        for matrix, projection in zip(matrices, projections, strict=True):
            tall = matrix.shape[0] > matrix.shape[1]
            _ = torch.mm(matrix, projection.T) if tall else torch.mm(projection, matrix)

    return project


def reference(options: Options) -> Any:
    """The authors' own optimizer, an oracle under CC-BY-NC: never a dependency."""
    if importlib.util.find_spec("apollo_torch") is None:
        return None
    package: Any = importlib.import_module("apollo_torch")
    named = parameters(options.seed)
    chosen = [p for p in named.values() if p.ndim == 2 and min(p.shape) > options.rank]
    rest = [p for p in named.values() if not (p.ndim == 2 and min(p.shape) > options.rank)]
    low_rank = {
        "rank": options.rank, "proj": "random", "scale_type": "channel", "scale": 1, "update_proj_gap": 200,
        "proj_type": "std",
    }  # fmt: skip
    return package.APOLLOAdamW([{"params": rest}, {"params": chosen, **low_rank}], lr=1e-5)


def held(optimizer: torch.optim.Optimizer, keep: set[int] | None = None) -> int:
    """Bytes of tensors in an optimizer's state, of all parameters or of some."""
    return sum(
        value.numel() * value.element_size()
        for parameter, state in optimizer.state.items()
        if keep is None or id(parameter) in keep
        for value in state.values()
        if isinstance(value, Tensor)
    )


def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    named = {
        name: parameters(options.seed)
        for name in ("apollo", "dense", "mini", "adamw_loop", "adamw_foreach", "adamw_fused")
    }
    apollo = Apollo(named["apollo"].items(), rank=options.rank, lr=1e-5)
    dense = Apollo(named["dense"].items(), rank=options.rank, block=options.rank, lr=1e-5)
    mini = Apollo.mini(named["mini"].items(), lr=1e-5)
    kinds: dict[str, dict[str, Any]] = {
        "loop": {"foreach": False},
        "foreach": {"foreach": True},
        "fused": {"fused": True},
    }
    adamw = {kind: torch.optim.AdamW(named[f"adamw_{kind}"].values(), lr=1e-5, **how) for kind, how in kinds.items()}
    rounds: list[dict[str, Callable[[], Any]]] = [
        {"floor": floor(options), "apollo": apollo.step, "dense": dense.step},
        {"mini": mini.step, "adamw_fused": adamw["fused"].step},
        {"adamw_loop": adamw["loop"].step, "adamw_foreach": adamw["foreach"].step},
    ]
    if (peer := reference(options)) is not None:
        rounds.append({"reference": peer.step, "apollo_beside_reference": apollo.step})
    times: dict[str, dict[str, float]] = {}
    for work in rounds:
        for kind, values in medians(work, runs=options.runs, warmup=options.warmup).items():
            times.setdefault(kind, {}).update(values)
    seconds = times["seconds"]
    matrices = {id(p) for name, p in named["mini"].items() if p.ndim == 2}
    twins = {id(p) for name, p in named["adamw_fused"].items() if p.ndim == 2}
    largest = max(
        (value.numel(), f"{key} {list(value.shape)}")
        for state in apollo.state.values() for key, value in state.items() if isinstance(value, Tensor)
    )  # fmt: skip
    bytes_of = {"apollo": held(apollo), "mini": held(mini), "adamw": held(adamw["fused"])}
    formula = {name: sum(one.plan()["state_bytes"].tolist()) for name, one in (("apollo", apollo), ("mini", mini))}
    return {
        "benchmark": "apollo_step",
        "ratio": round(seconds["apollo"] / seconds["floor"], 3),
        "ratio_dense": round(seconds["dense"] / seconds["floor"], 3),
        "ratio_limit": 1.5,
        "ratio_mini": round(seconds["mini"] / seconds["adamw_fused"], 3),
        "ratio_mini_limit": 1.5,
        "ratio_reference": (
            round(seconds["apollo_beside_reference"] / seconds["reference"], 3) if peer else "not installed"
        ),
        **times,
        "state_bytes": bytes_of,
        "state_bytes_by_formula": formula,
        "formula": "matrices: 4 (2 m r + 1) bytes, m the larger dimension; everything else: 8 a number",
        "state_over_adamw": round(bytes_of["apollo"] / bytes_of["adamw"], 4),
        "state_over_adamw_limit": 0.65,
        "mini_over_adamw_on_matrices": round(held(mini, matrices) / held(adamw["fused"], twins), 5),
        "mini_over_adamw_on_matrices_limit": 0.02,
        "largest_stored": largest[1],
        "parameters": sum(p.numel() for p in named["apollo"].values()),
        "rank": options.rank,
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "versions": library_versions(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
