"""What a piece of work costs: tokens through the decoder, and tokens times the layers that were really run for them.

with counting(model) as cost:
    ...
cost.layer_tokens / cost.naive_layer_tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from probes.model import HybridModel


@dataclass
class Cost:
    """Work done so far, padding included, as it is computed too.

    Attributes:
        forward_tokens: tokens that went through the decoder, through all of its layers or some.
        layer_tokens: tokens times layers that were computed for them.
        saved: layer tokens of the same work without any reuse, less those that were computed; the former counts real
            tokens only, so that a gain is never one of padding.
    """

    forward_tokens: int = 0
    layer_tokens: int = 0
    saved: int = 0

    @property
    def naive_layer_tokens(self) -> int:
        """Layer tokens of the same work with nothing shared: every answer with a prefix and all layers of its own."""
        return self.layer_tokens + self.saved

    @contextmanager
    def instead_of(self, naive: int) -> Iterator[None]:
        """The block does what would take `naive` layer tokens without reuse."""
        before = self.layer_tokens
        yield
        self.saved += naive - (self.layer_tokens - before)

    def as_dict(self) -> dict[str, int]:
        return {
            "forward_tokens": self.forward_tokens, "layer_tokens": self.layer_tokens,
            "naive_layer_tokens": self.naive_layer_tokens,
        }  # fmt: skip


@contextmanager
def counting(model: HybridModel) -> Iterator[Cost]:
    """Count the decoder's work inside a `with` block."""
    cost = Cost()

    def passed(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        cost.forward_tokens += 0 if ids is None else ids.shape[0] * ids.shape[1]

    def computed(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        cost.layer_tokens += stream.shape[0] * stream.shape[1]

    with ExitStack() as stack:
        stack.callback(model.decoder.register_forward_pre_hook(passed, with_kwargs=True).remove)
        for layer in model.layers:  # a block that is skipped does not call its mixer
            stack.callback(layer.mixer.register_forward_pre_hook(computed, with_kwargs=True).remove)
        yield cost
