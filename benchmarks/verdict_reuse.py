"""What a verdict saves: the gate on the organism as it ships, against the same work done one by one (`reuse=False`).

Without reuse every intervention, control and answer has a run of the whole prompt through all layers of its own, as a
loop around `generate` or a forward with a hook would have. Both ways are timed by turns, each in the same process with
the same threads, and every number of the two verdicts is compared:

    ratio            seconds with reuse over seconds without, medians
    layer_tokens_ratio
                     tokens times layers computed with reuse, over those of the same work without
    largest_by_prompt, largest_mean
                     largest difference, in nats, between the two verdicts' effects: prompt by prompt, and of means
    largest_perplexity_ratio
                     the same for the factors by which general text becomes less likely, relative

Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro

from probes.behaviors import read_behavior
from probes.criteria import Verdict
from probes.gate import GateConfig
from probes.model import load
from probes.store import library_versions
from probes.verify import verify


@dataclass(frozen=True, kw_only=True)
class Options:
    behavior: str = "follow-direction"
    runs: int = 1
    """Verdicts each way; those without reuse take some minutes each."""
    controls: int = 20
    threads: int = 0
    """0 leaves torch's own choice."""


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested record under its path."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from numbers(part, f"{path}/{name}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from numbers(part, f"{path}/{i}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def differences(one: Verdict, other: Verdict) -> dict[str, float]:
    """Largest differences; both verdicts must have the same numbers in the same places."""
    a, b = (dict(numbers(verdict.evidence)) for verdict in (one, other))
    if a.keys() != b.keys():
        raise SystemExit(f"the two verdicts hold different numbers: {sorted(a.keys() ^ b.keys())[:5]}")
    found = {"by_prompt": 0.0, "mean": 0.0, "perplexity_ratio": 0.0}
    for path in a:
        if path.endswith("perplexity_ratio"):
            found["perplexity_ratio"] = max(found["perplexity_ratio"], abs(a[path] - b[path]) / abs(b[path]))
        elif path.startswith("/prompts"):
            found["by_prompt"] = max(found["by_prompt"], abs(a[path] - b[path]))
        elif path.endswith(("effect/value", "/effect", "propensity/value", "drop/value")):
            found["mean"] = max(found["mean"], abs(a[path] - b[path]))
    return {f"largest_{name}": float(f"{value:.2e}") for name, value in found.items()}


def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    model, behavior = load("organism"), read_behavior(options.behavior)
    config = GateConfig(controls=options.controls)
    ways = {"reuse": config, "one_by_one": replace(config, reuse=False)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    verdicts: dict[str, Verdict] = {}
    for run in range(options.runs):
        for name in list(ways) if run % 2 == 0 else list(ways)[::-1]:
            verdicts[name] = verify(model, behavior, ways[name])
            seconds[name].append(verdicts[name].cost["seconds"])
    reuse, alone = verdicts["reuse"], verdicts["one_by_one"]
    medians = {name: round(statistics.median(times), 2) for name, times in seconds.items()}
    return {
        "benchmark": "verdict_reuse",
        "ratio": round(medians["reuse"] / medians["one_by_one"], 4),
        "seconds": medians,
        "cost": {"reuse": reuse.cost, "one_by_one": alone.cost},
        "layer_tokens_ratio": round(reuse.cost["layer_tokens"] / reuse.cost["naive_layer_tokens"], 4),
        **differences(reuse, alone),
        "same_choice": (reuse.layer, reuse.dose, reuse.verdict) == (alone.layer, alone.dose, alone.verdict),
        "verdict": reuse.verdict,
        "controls_of_each_kind": options.controls,
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "versions": library_versions(),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
