"""Apply a direction while the model runs, and leave no trace afterwards.

    with steer(model, direction, dose=0.5, phase="both"):
        model.hf.generate(...)

`dose` is in units of the layer's typical residual norm, so 0.5 means a push half as long as the stream itself;
positive doses push towards "wanted". Phases: "prefill" edits the prompt's tokens, "decode" the answer's, "both" both.
A forward that continues a cache is decoding; a forward without a past is prefill, all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probes.directions import Direction
from probes.errors import WrongInput
from probes.model import HybridModel

Phase = Literal["prefill", "decode", "both"]
Mode = Literal["add", "ablate"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@contextmanager
def steer(
    model: HybridModel, direction: Direction, *, dose: float = 0.5, phase: str = "both", mode: str = "add"
) -> Iterator[None]:
    """Edit the residual stream after `direction.layer` while the block runs.

    Args:
        dose: strength in units of `direction.norm`; ignored by "ablate".
        phase: which tokens are edited: "prefill", "decode" or "both".
        mode: "add" adds dose x norm x vector. "ablate" replaces the stream's component along the vector by the
            midpoint between the two sides (`direction.midpoint`), so that no side is shown.

    Raises:
        WrongInput: unknown phase or mode, or a direction that does not fit the model.
    """
    if phase not in PHASES:
        raise WrongInput(f"unknown phase '{phase}'; allowed are {', '.join(PHASES)}")
    if mode not in get_args(Mode):
        raise WrongInput(f"unknown mode '{mode}'; allowed are {', '.join(get_args(Mode))}")
    if not 0 <= direction.layer < len(model.layers):
        raise WrongInput(
            f"layer {direction.layer} is out of range: {model.name} has layers 0 to {len(model.layers) - 1}"
        )
    block = model.layers[direction.layer].block
    vector = direction.vector.to(device=model.device, dtype=torch.float32)
    if vector.numel() != model.config.hidden_size:
        raise WrongInput(
            f"the direction has {vector.numel()} elements, the stream of {model.name} {model.config.hidden_size}"
        )
    push = dose * direction.norm * vector
    decoding = False

    def note_phase(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal decoding
        past = kwargs.get("past_key_values")
        decoding = past is not None and past.get_seq_length() > 0

    def edit(stream: Tensor) -> Tensor:
        if mode == "add":
            return stream + push.to(stream.dtype)
        along = stream.float() @ vector
        return stream + ((direction.midpoint - along)[..., None] * vector).to(stream.dtype)

    def hook(_: Any, args: tuple, output: Any) -> Any:
        if phase != "both" and (phase == "decode") != decoding:
            return None
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    handles = [
        model.decoder.register_forward_pre_hook(note_phase, with_kwargs=True),
        block.register_forward_hook(hook),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
