"""What a training step costs over a frozen context: `training.frozen_context` against gradient through everything.

A random Qwen3.5 (8 layers: 6 GDN, 2 attention; float32; states that remember) and one segment: a context of 1,024
tokens and a decision of 32, of which all but the first are scored. Three things are timed by turns, forward and
backward:

    full       the whole sequence, with gradient everywhere
    frozen     the decision over a prefix that was computed once before, as in every step but the first
    uncached   the prefix computed anew, without gradient, and then the decision

Memory is what autograd saves between forward and backward: the bytes of all storages that pass through
`torch.autograd.graph.saved_tensors_hooks`, each counted once, parameters apart. The copies of the prefix that a step
makes, to stack it and to put the decision behind it, are counted too; `prefix_mib` is the prefix itself, which stays.

Gradients are checked on a smaller model in float64. `error_to_finite_differences` is relative, the largest over random
directions of each parameter, with the prefix held. `ranks` are those of the gradients of the first attention layer. A
token adds one outer product: a decision of 13 tokens, of which the last predicts nothing, gives at most 12 when the
context is frozen. With gradient everywhere the tokens of the context add theirs, up to the size of the matrix.
`cosines` are between the two gradients: q learns through frozen keys, k and v from the decision's tokens alone.

Prints one JSON line; `ratio` is the median of full over the median of frozen, `memory_ratio` the same of the memory.
Exits with 1 when a ratio is below its limit, an error above its own, or a rank is not as expected.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from state_snapshots import medians
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from probes.model import HybridModel
from probes.store import library_versions
from training.data import Segment
from training.frozen_context import prefill, score
from training.organism import build_tokenizer, init_gates

LIMITS = {"ratio": 10.0, "memory_ratio": 10.0, "error_to_finite_differences": 1e-5}
STEP = 1e-5  # of the finite differences, along directions of norm 1
ATTENTION, GDN = 3, 4  # layers whose gradients are looked at


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: int = 9
    """Timed runs of each, after the warm-up."""
    warmup: int = 2
    context: int = 1024
    decision: int = 32
    hidden: int = 512
    threads: int = 0
    """0 leaves torch's own choice."""
    seed: int = 0


def build(hidden: int, seed: int) -> HybridModel:
    """Eight layers in the pattern of Qwen3.5, shaped like its small models, whose states remember."""
    torch.manual_seed(seed)
    heads = hidden // 64
    config = Qwen3_5TextConfig(
        vocab_size=8192, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=8,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), head_dim=64, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_num_key_heads=heads, linear_num_value_heads=heads, tie_word_embeddings=True,
        max_position_embeddings=8192,
    )  # fmt: skip
    hf: Any = Qwen3_5ForCausalLM(config)
    for module in hf.modules():
        if hasattr(module, "A_log"):
            init_gates(module)
    return HybridModel(hf, build_tokenizer(), name="random Qwen3.5")


def segment(context: int, decision: int, seed: int) -> Segment:
    ids = tuple(torch.randint(0, 8192, (context + decision,), generator=torch.Generator().manual_seed(seed)).tolist())
    return Segment(
        id="random", kind="general", group="random", context=ids[:context], decision=ids[context:],
        scored=(False, *[True] * (decision - 1)),
    )  # fmt: skip


def saved_bytes(model: HybridModel, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for `backward`, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.hf.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(storage.nbytes() for storage in kept.values())


class Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64: transformers' kernel and norms cast on their own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


def gradients(value: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def correctness(seed: int) -> dict[str, Any]:
    """Gradients of a small model in float64: against finite differences, their ranks, and against the full ones."""
    model = build(128, seed)
    model.hf.double()
    part, random = segment(96, 13, seed), torch.Generator().manual_seed(seed)
    attention = {kind: f"model.layers.{ATTENTION}.self_attn.{kind}_proj.weight" for kind in "qkv"}
    gdn = {name.split(".")[0]: f"model.layers.{GDN}.linear_attn.{name}" for name in ("in_proj_qkv.weight", "A_log")}
    parameters = {short: model.hf.get_parameter(name) for short, name in (attention | gdn).items()}
    with Float64():
        prefixes = prefill(model, [part.context])
        narrow, wide = (gradients(score(model, [part], held).sum(), parameters) for held in (prefixes, None))
        errors = {}
        for short, parameter in parameters.items():
            off = []
            for _ in range(3):
                direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
                direction /= direction.norm()
                slope = float((narrow[short] * direction).sum())
                off.append(abs(finite_difference(model, part, prefixes, parameter, direction) / slope - 1))
            errors[short] = float(f"{max(off):.1e}")
        ranks = {
            kind: {short: int(torch.linalg.matrix_rank(found[short], rtol=1e-9)) for short in "qkv"}
            for kind, found in (("frozen", narrow), ("full", wide))
        }
    cosines = {
        short: round(torch.cosine_similarity(narrow[short].flatten(), wide[short].flatten(), dim=0).item(), 3)
        for short in "qkv"
    }
    return {"error_to_finite_differences": errors, "ranks": ranks, "cosines": cosines}


@torch.no_grad()
def finite_difference(
    model: HybridModel, part: Segment, prefixes: list[Any], parameter: Tensor, direction: Tensor
) -> float:
    """Slope of the score along a direction of one parameter, the prefix held; central differences."""
    kept, found = parameter.clone(), []
    for sign in (1, -1):
        parameter.copy_(kept + sign * STEP * direction)
        found.append(float(score(model, [part], prefixes).sum()))
        parameter.copy_(kept)
    return (found[0] - found[1]) / (2 * STEP)


def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build(options.hidden, options.seed)
    part = segment(options.context, options.decision, options.seed)
    prefixes = prefill(model, [part.context])

    def step(held: Any) -> None:
        (-score(model, [part], held).sum()).backward()
        model.hf.zero_grad()

    work: dict[str, Callable[[], Any]] = {
        "full": lambda: step(None),
        "frozen": lambda: step(prefixes),
        "uncached": lambda: step(prefill(model, [part.context])),
    }
    times = medians(work, runs=options.runs, warmup=options.warmup)
    saved = {
        name: saved_bytes(model, lambda held=held: score(model, [part], held))
        for name, held in (("full", None), ("frozen", prefixes))
    }
    with torch.no_grad():
        one, other = (float(score(model, [part], held)) for held in (prefixes, None))
    found = correctness(options.seed)
    expected = {"frozen": dict.fromkeys("qkv", 12), "full": "more"}
    ratios = {
        "ratio": round(times["seconds"]["full"] / times["seconds"]["frozen"], 2),
        "memory_ratio": round(saved["full"] / saved["frozen"], 2),
    }
    met = {
        **{name: value >= LIMITS[name] for name, value in ratios.items()},
        "error_to_finite_differences": max(found["error_to_finite_differences"].values())
        <= LIMITS["error_to_finite_differences"],
        "ranks": found["ranks"]["frozen"] == expected["frozen"] and min(found["ranks"]["full"].values()) > 12,
    }
    return {
        "benchmark": "frozen_context",
        **ratios,
        "limits": LIMITS,
        "met": met,
        "ms": {name: round(1000 * value, 1) for name, value in times["seconds"].items()},
        "fastest_ms": {name: round(1000 * value, 1) for name, value in times["fastest"].items()},
        "slowest_ms": {name: round(1000 * value, 1) for name, value in times["slowest"].items()},
        "saved_mib": {name: round(value / 2**20, 2) for name, value in saved.items()},
        "prefix_mib": round(prefixes[0].bytes / 2**20, 2),
        "difference_of_scores": {"nats": float(f"{abs(one - other):.1e}"), "of": round(other, 2)},
        **found,
        "ranks_expected": expected,
        "shape": f"{options.context} tokens of context, {options.decision} of decision, batch 1, 8 layers of width "
        f"{options.hidden}",
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "versions": library_versions(),
    }


if __name__ == "__main__":
    result = measure(tyro.cli(Options, description=__doc__))
    print(json.dumps(result))
    sys.exit(0 if all(result["met"].values()) else 1)
