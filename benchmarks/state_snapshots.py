"""What states at arbitrary positions cost: `probes.recurrence.scan` against transformers' own kernel without them.

One GDN layer of real size (16 heads with 128x128 states, 2,048 tokens, float32), from the raw q, k, v that a layer
computes. Three things are timed by turns:

    library   transformers' torch_chunk_gated_delta_rule, outputs and final state only
    scan      scan(Recurrence.of_kernel(...)), the same results
    states    the same with the states after 16 random tokens

Memory is the peak of what torch's CPU allocator holds beyond the inputs, temporaries within operators included: the
running sum of the allocations and releases in a trace of torch.profiler. Two ratios say what snapshots need:

    memory_beyond_scan     (peak of states - peak of scan) / bytes of the states returned
    memory_over_returned   peak of scan(x, at=at), given x, / bytes of all that it returns

Where TransformerLens is installed, its `compute_ssm_state` is timed beside it, on a cached forward pass of a random
model whose first layer has the same shape. It returns the states after all tokens, by a Python loop over them.

Prints one JSON line; `ratio` is the median of states over the median of library.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from probes.recurrence import Recurrence, scan
from probes.store import library_versions


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: int = 15
    """Timed runs of each, after the warm-up."""
    warmup: int = 3
    tokens: int = 2048
    heads: int = 16
    size: int = 128
    """d_k and d_v of the states."""
    positions: int = 16
    threads: int = 0
    """0 leaves torch's own choice."""
    seed: int = 0


def kernel_input(options: Options) -> dict[str, Tensor]:
    """As a layer whose states remember would give it: half-lives from 7 to thousands of tokens."""
    random = torch.Generator().manual_seed(options.seed)
    vectors = (1, options.tokens, options.heads, options.size)
    given = {name: torch.randn(*vectors, generator=random) for name in ("q", "k", "v")}
    rates = 10 ** (-1 - 3 * torch.rand(options.heads, generator=random))
    decay = -rates * torch.rand(vectors[:3], generator=random)
    return {**given, "beta": torch.rand(vectors[:3], generator=random), "decay": decay}


def library(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch_chunk_gated_delta_rule(
        given["q"], given["k"], given["v"], g=given["decay"], beta=given["beta"],
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


def single_steps(x: Recurrence, at: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of all tokens, and the states after tokens `at` of one prompt, by the definition in float64."""
    q, k, v, beta, decay = (value.double()[0] for value in (x.q, x.k, x.v, x.beta, x.decay))
    S = x.start.double()[0]
    kept, outputs = {}, []
    for t in range(x.tokens):
        S = S * decay[t, :, None, None].exp()
        u = beta[t, :, None] * (v[t] - (k[t, :, None] @ S)[:, 0])
        S = S + k[t, :, :, None] * u[:, None]
        outputs.append((q[t, :, None] @ S)[:, 0])
        if t in at:
            kept[t] = S
    return torch.stack(outputs)[None], torch.stack([kept[t] for t in at[0].tolist()])[None]


def error(seen: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest true value."""
    return float(f"{((seen - truth).abs().max() / truth.abs().max()).item():.2e}")


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator held at once beyond what it held before, while the work was done."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = work()
    del kept  # only now, so that the releases of results are not part of the trace
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["args"]["Ev Idx"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def medians(work: dict[str, Callable[[], Any]], *, runs: int, warmup: int) -> dict[str, dict[str, float]]:
    """Seconds of each: median, fastest and slowest of runs by turns, each coming first equally often."""
    times: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for run in range(warmup + runs):
        first = run % len(names)
        for name in (*names[first:], *names[:first]):
            start = time.perf_counter()
            work[name]()
            if run >= warmup:
                times[name].append(time.perf_counter() - start)
    kinds = {"seconds": statistics.median, "fastest": min, "slowest": max}
    return {kind: {name: round(of(values), 5) for name, values in times.items()} for kind, of in kinds.items()}


def transformer_lens_seconds(options: Options) -> float | str:
    """Seconds of its state trajectory of the first layer, from a cache made beforehand."""
    if importlib.util.find_spec("transformer_lens") is None:
        return "not installed"
    lens: Any = importlib.import_module("transformer_lens.model_bridge.bridge")
    configs: Any = importlib.import_module("transformer_lens.config.transformer_bridge_config")
    adapters: Any = importlib.import_module("transformer_lens.model_bridge.supported_architectures.qwen3_5")
    config = Qwen3_5TextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, linear_key_head_dim=options.size, linear_value_head_dim=options.size,
        linear_num_key_heads=options.heads, linear_num_value_heads=options.heads,
    )  # fmt: skip
    described = configs.TransformerBridgeConfig(
        d_model=256, d_head=64, n_heads=4, n_layers=4, n_ctx=options.tokens, d_vocab=512, n_key_value_heads=2,
        architecture="Qwen3_5ForCausalLM",
    )  # fmt: skip
    hf = Qwen3_5ForCausalLM(config).eval()
    bridge = lens.TransformerBridge(hf, adapters.Qwen3_5ArchitectureAdapter(described), tokenizer=object())
    tokens = torch.randint(0, 512, (1, options.tokens), generator=torch.Generator().manual_seed(options.seed))
    _, cache = bridge.run_with_cache(tokens, use_cache=False)
    work = {"states": lambda: cache.compute_ssm_state(layer=0)}
    return medians(work, runs=3, warmup=1)["seconds"]["states"]


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    given = kernel_input(options)
    random = torch.Generator().manual_seed(options.seed)
    at = torch.randint(0, options.tokens, (1, options.positions), generator=random)
    work: dict[str, Callable[[], Any]] = {
        "library": lambda: library(given),
        "scan": lambda: scan(Recurrence.of_kernel(**given)),
        "states": lambda: scan(Recurrence.of_kernel(**given), at=at),
    }
    times = medians(work, runs=options.runs, warmup=options.warmup)
    x = Recurrence.of_kernel(**given)
    found = scan(x, at=at)
    states = found.states
    assert states is not None
    outputs, truth = single_steps(x, at)
    peaks = {name: peak_bytes(one) for name, one in work.items()}
    returned = sum(value.nbytes for value in (found.outputs, found.final, states))
    return {
        "benchmark": "state_snapshots",
        "ratio": round(times["seconds"]["states"] / times["seconds"]["library"], 4),
        "ratio_without_states": round(times["seconds"]["scan"] / times["seconds"]["library"], 4),
        **times,
        "memory_beyond_scan": round((peaks["states"] - peaks["scan"]) / states.nbytes, 3),
        "memory_over_returned": round(peak_bytes(lambda: scan(x, at=at)) / returned, 3),
        "peak_bytes": peaks,
        "states_bytes": states.nbytes,
        "returned_bytes": returned,
        "error_to_float64_steps": {
            "outputs": error(found.outputs, outputs),
            "states": error(states, truth),
            "library_outputs": error(library(given)[0], outputs),
        },
        "transformer_lens_compute_ssm_state_seconds": transformer_lens_seconds(options),
        "shape": f"{options.heads} heads of {options.size}x{options.size}, {options.tokens} tokens, "
        f"{options.positions} positions",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "versions": library_versions(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
