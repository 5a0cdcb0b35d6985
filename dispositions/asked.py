"""What most commands are asked about: a behaviour, and a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from dispositions.runs import checked, model_slug, slug, variant
from probes.behaviors import Behavior, check_vocabulary, read_behavior
from probes.model import HybridModel, load

BehaviorName = Annotated[Positional[str], tyro.conf.arg(metavar="BEHAVIOR")]
Device = Annotated[str, tyro.conf.arg(help="Where to run: cpu, cuda, cuda:0, ...")]
Dtype = Annotated[str, tyro.conf.arg(help="auto (what the checkpoint says), float32, bfloat16 or float16.")]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A behaviour and the model that is asked about it."""

    behavior: BehaviorName
    """A shipped behaviour (see `dispositions behaviors`) or a JSONL file of contrast pairs."""
    model: str = "organism"
    """organism, organism-state, organism-attention, a local folder, a .gguf file or a hub id."""
    device: Device = "cpu"
    dtype: Dtype = "auto"

    def load(self) -> tuple[HybridModel, Behavior]:
        behavior = read_behavior(self.behavior)
        model = load(self.model, device=self.device, dtype=self.dtype)
        check_vocabulary(model, behavior)
        return model, behavior

    def folder(self, out: Path | None, kind: str, behavior: Behavior) -> Path:
        return checked(out, Path("runs") / f"{kind}{slug(behavior.name)}-{model_slug(self.model)}{variant(self)}")
