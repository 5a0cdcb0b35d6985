"""What recording costs: `probes.capture.capture` against the bare forward pass, on a Qwen3.5 of real shape.

The model is random, with the layer shapes of Qwen3.5-0.8B and half its depth (12 layers: 9 GDN, 3 attention; 257M
parameters in bfloat16), and is built in memory. Three things are timed by turns over one prompt:

    bare            model(**inputs, use_cache=True, logits_to_keep=1), the work that any recording needs
    capture         capture(): every layer's residual stream and GDN state at the last token
    hidden_states   the bare pass with output_hidden_states=True, which keeps every token of every layer

Prints one JSON line; `ratio` is the median of capture over the median of bare.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from probes.capture import capture
from probes.model import HybridModel
from probes.prompts import Prompt, pad
from probes.store import library_versions
from training.organism import build_tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: int = 9
    """Timed runs of each, after the warm-up."""
    warmup: int = 2
    tokens: int = 512
    threads: int = 0
    """0 leaves torch's own choice."""
    seed: int = 0


def build(seed: int) -> HybridModel:
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=3584, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=2, head_dim=256, linear_key_head_dim=128, linear_value_head_dim=128,
        linear_num_key_heads=16, linear_num_value_heads=16, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    hf: Any = Qwen3_5ForCausalLM(config)
    return HybridModel(hf.to(torch.bfloat16), build_tokenizer(), name="random Qwen3.5")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    model = build(options.seed)
    ids = tuple(torch.randint(0, 8192, (options.tokens,)).tolist())
    end = options.tokens
    prompt = Prompt(
        text="", ids=ids, spans={"context": (0, end - 2), "direction": (end - 2, end - 1), "decision": (end - 1, end)}
    )
    inputs = pad([ids], pad_id=model.tokenizer.pad_token_id, device=model.device).inputs

    @torch.no_grad()
    def bare(**more: bool) -> Any:
        return model.hf(**inputs, use_cache=True, logits_to_keep=1, **more)

    work: dict[str, Callable[[], Any]] = {
        "bare": bare,
        "capture": lambda: capture(model, [prompt], sites=("resid", "gdn.state"), progress=False),
        "hidden_states": lambda: bare(output_hidden_states=True),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for run in range(options.warmup + options.runs):
        names = list(work)
        for name in (*names[run % 3 :], *names[: run % 3]):  # each of them comes first in a third of the runs
            took = seconds(work[name])
            if run >= options.warmup:
                times[name].append(took)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "benchmark": "capture_overhead",
        "ratio": round(median["capture"] / median["bare"], 4),
        "ratio_hidden_states": round(median["hidden_states"] / median["bare"], 4),
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "fastest": {name: round(min(values), 4) for name, values in times.items()},
        "slowest": {name: round(max(values), 4) for name, values in times.items()},
        "captured": str(work["capture"]()),
        "captured_bytes": work["capture"]().nbytes,
        "bare": "model(**inputs, use_cache=True, logits_to_keep=1) under no_grad",
        "note": "capture hashes the weights once per model; the warm-up has done that",
        "tokens": options.tokens,
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "versions": library_versions(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
