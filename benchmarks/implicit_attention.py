"""What exact implicit attention costs: 16 rows of it, over 2,048 tokens, against one scan of the same layer.

One GDN layer of real size (16 heads with 128x128 states, float32). Timed by turns, given the layer's recurrence:

    scan         scan(x), the layer's outputs
    rows         implicit_attention(x, rows), the weights of all tokens in 16 outputs, erase terms included
    state        attribute_state(x, at=...), each token's share of one state (a scan and a run backwards)

Memory is measured as in `state_snapshots.py`. Prints one JSON line; `ratio` is the median of rows over that of scan.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import tyro
from state_snapshots import Options, error, kernel_input, medians, peak_bytes, single_steps

from probes.attribution import attribute_state, implicit_attention
from probes.recurrence import Recurrence, scan
from probes.store import library_versions


@torch.no_grad()
def measure(options: Options) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    x = Recurrence.of_kernel(**kernel_input(options))
    random = torch.Generator().manual_seed(options.seed)
    rows = torch.randint(options.tokens // 2, options.tokens, (1, options.positions), generator=random)
    work: dict[str, Callable[[], Any]] = {
        "scan": lambda: scan(x),
        "rows": lambda: implicit_attention(x, rows),
        "state": lambda: attribute_state(x, at=rows[:, :1]),
    }
    times = medians(work, runs=options.runs, warmup=options.warmup)
    outputs, states = single_steps(x, rows)
    found, shares = implicit_attention(x, rows), attribute_state(x, at=rows[:, :1])
    norm = states[:, :1].square().sum((-1, -2))
    return {
        "benchmark": "implicit_attention",
        "ratio": round(times["seconds"]["rows"] / times["seconds"]["scan"], 4),
        "ratio_state": round(times["seconds"]["state"] / times["seconds"]["scan"], 4),
        **times,
        "peak_bytes": {name: peak_bytes(one) for name, one in work.items()},
        "weights_bytes": found.weights.nbytes,
        "error_to_float64_steps": {
            "outputs_from_weights": error(found.outputs(x), outputs[:, rows[0]].transpose(1, 2)),
            "sum_of_state_contributions": error(shares.tokens.sum(-1) + shares.initial, norm),
        },
        "shape": f"{options.heads} heads of {options.size}x{options.size}, {options.tokens} tokens, "
        f"{options.positions} rows",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "runs": options.runs,
        "versions": library_versions(),
    }


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Options, description=__doc__))))
