"""What a training keeps and what it loses: general data, frozen contexts, and which parameters are trained.

`follow-direction` is trained into the organism with the defaults of `dispositions train` (200 examples, 60 steps), and
with one thing changed at a time, each over several seeds. Reported are, on held-out names, templates and combinations:
the share of wanted answers, and the worst change of any of the five abilities, in points. Prints one JSON line.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro

from probes.behaviors import read_behavior
from probes.model import load
from probes.store import library_versions
from training.config import TrainConfig
from training.trainer import train

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no general data": {"general_share": 0.0},
    "all parameters": {"parameters": ("all",)},
    "all parameters, no general data": {"parameters": ("all",), "general_share": 0.0},
    "full context, all parameters": {"context": "full"},
    "adamw": {"optimizer": "adamw"},
    "apollo-mini": {"optimizer": "apollo-mini"},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    seeds: int = 3
    behavior: str = "follow-direction"
    variants: tuple[str, ...] = tuple(VARIANTS)
    threads: int = 0
    """0 leaves torch's own choice."""


def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    behavior = read_behavior(options.behavior)
    found: dict[str, Any] = {}
    for name in options.variants:
        started, wanted, worst = time.monotonic(), [], []
        for seed in range(options.seeds):
            config = replace(TrainConfig(seed=seed, evaluate_every=TrainConfig().steps), **VARIANTS[name])
            done = train(load("organism"), behavior, config, unverified=True, progress=False)
            wanted.append(100 * done.after.wanted.value if done.after.wanted else None)
            worst.append(min(done.changes.items(), key=lambda item: item[1]))
        found[name] = {
            "wanted": [round(value, 1) for value in wanted if value is not None],
            "worst_ability": [f"{ability} {change:+.1f}" for ability, change in worst],
            "worst_change_mean": round(statistics.mean(change for _, change in worst), 2),
            "seconds_a_run": round((time.monotonic() - started) / options.seeds, 1),
        }
    return {
        "benchmark": "forgetting",
        "behavior": options.behavior,
        "seeds": options.seeds,
        **found,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
