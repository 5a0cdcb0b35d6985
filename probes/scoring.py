"""Log-probabilities of given tokens, at the cost of the positions that count.

The output layer is a fifth of a small model and its logits are by far the largest tensors, so it is run only where a
token is scored: never on the prompt, on padding, or on the questions of a dialogue.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from probes.model import HybridModel

CHUNK = 64  # positions at once: float32 copies of all logits would not fit any cache


def logits_at(model: HybridModel, mask: Bool[Tensor, "prompt token"], **inputs: Any) -> Float[Tensor, "position vocab"]:
    """Run the model and return logits, in its dtype, at the positions where `mask` is true, row by row."""
    head = model.hf.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][mask][None],))
    try:
        return model.hf(**inputs).logits[0]
    finally:
        handle.remove()


def log_probs(logits: Float[Tensor, "position vocab"], targets: Int[Tensor, " position"]) -> Float[Tensor, " position"]:
    """Log-probability of one token at each position, in nats; computed in float32."""
    parts = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([-cross_entropy(part.float(), target, reduction="none") for part, target in parts])


def row_sums(mask: Bool[Tensor, "prompt token"], values: Float[Tensor, " position"]) -> Float[Tensor, " prompt"]:
    """Sum of the values of each row, 0 for a row without any."""
    rows = mask.nonzero()[:, 0]
    return torch.zeros(len(mask), device=values.device, dtype=values.dtype).index_add(0, rows, values)
