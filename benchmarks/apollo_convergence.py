"""Whether APOLLO learns what AdamW learns: the organism's own loss, from scratch, at equal steps, over seeds.

The organism (training/organism.py) is trained for a number of steps with its recipe's loss, data and AdamW, and as
often with APOLLO in its place, at the same learning rate and schedule; each seed draws its own weights and data. The
loss is then taken on held-out batches, the same for all. For APOLLO rank 32 is a quarter of the organism's width, as in
the paper's small models, and its projections are dense, as are all below rank 128. Variants: block-diagonal projections
of 4 blocks, as rank 256 has by default; the paper's normal ones; moments reset at every refresh; and APOLLO-Mini.

Prints one JSON line; `ratio` is the mean over seeds of APOLLO's held-out loss over AdamW's (limit 1.02).
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro

from probes.store import library_versions
from training.apollo import Apollo
from training.organism import Dialogues, Recipe, build_model, build_tokenizer, loss_of, schedule

VARIANTS: dict[str, dict[str, Any]] = {
    "apollo": {},
    "blocks": {"block": 8},
    "normal": {"entries": "normal"},
    "reset": {"at_refresh": "reset"},
    "mini": {"rank": 1},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    steps: int = 500
    seeds: int = 3
    rank: int = 32
    refresh: int = 100
    """Several projections in a run, so that refreshes are part of what is compared."""
    lr: float = 2e-3
    batch: int = 16
    tokens: int = 96
    variants: tuple[str, ...] = ("apollo", "blocks")
    """Beside AdamW, out of apollo, blocks, normal, reset and mini; the first is what `ratio` is about."""
    threads: int = 0
    """0 leaves torch's own choice."""


def trained(name: str, seed: int, options: Options) -> float:
    """Held-out loss, in nats a weighted token, after all steps."""
    recipe = Recipe(
        seed=seed, lessons=0, steps=options.steps, batch=options.batch, tokens=options.tokens, lr=options.lr, warmup=30
    )
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed).train()
    stream = Dialogues(tokenizer, recipe)
    named = list(model.named_parameters())
    if name == "adamw":
        optimizer: Any = torch.optim.AdamW(named, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    else:
        given = {"rank": options.rank, "refresh": options.refresh, **VARIANTS[name]}
        optimizer = Apollo(named, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01, seed=seed, **given)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, recipe)
        loss, _ = loss_of(model, stream.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = Dialogues(tokenizer, replace(recipe, seed=10_000))
    with torch.no_grad():
        return statistics.mean(loss_of(model, held_out.batch())[0].item() for _ in range(8))


def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    names = ("adamw", *options.variants)
    losses = {name: [trained(name, seed, options) for seed in range(options.seeds)] for name in names}
    ratios = {
        name: [one / other for one, other in zip(losses[name], losses["adamw"], strict=True)]
        for name in options.variants
    }
    return {
        "benchmark": "apollo_convergence",
        "ratio": round(statistics.mean(ratios[options.variants[0]]), 4),
        "limit": 1.02,
        "ratios": {name: [round(value, 4) for value in values] for name, values in ratios.items()},
        "losses": {name: [round(value, 4) for value in values] for name, values in losses.items()},
        "steps": options.steps,
        "rank": options.rank,
        "refresh": options.refresh,
        "lr": options.lr,
        "tokens_a_step": options.batch * options.tokens,
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
