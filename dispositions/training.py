"""The command that trains: on the word of a verdict, with what it did to the model beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from analysis.gradients import GradientConfig, gradients, open_gradients
from analysis.sharpness import SharpnessConfig, open_sharpness, require_float32, sharpness
from analysis.training_report import ABLATION, GRADIENTS, SHARPNESS, UPDATES, write_training_report
from analysis.updates import snapshot, updates
from dispositions.asked import Asked
from dispositions.runs import claimed
from probes.behaviors import Behavior
from probes.criteria import open_verdict
from probes.directions import open_direction
from probes.errors import WrongInput
from probes.model import HybridModel, load
from probes.store import recipe_differs, write_json
from training.config import SMALL, TrainConfig
from training.result import RESULT, open_training
from training.trainer import Trainer, train

When = Literal["auto", "yes", "no"]


@dataclass(frozen=True, kw_only=True)
class Train(Asked):
    """Train a behaviour into the weights, once its direction is verified.

    Starts only on a verdict that is PASS for this behaviour and these weights. Only the answers are trained, against
    contexts computed once, with APOLLO and a quarter of general data. Writes metrics.jsonl, checkpoints, the trained
    model (RUN/model, a folder that every command takes), training.json and report.html. A run that was interrupted goes
    on from its last checkpoint when the same command is given again.

    dispositions verify follow-direction && dispositions train follow-direction --verdict runs/follow-direction-organism

    dispositions train my.jsonl --model ./my-qwen3.5 --verdict runs/mine --general chats.jsonl --lr 2e-5

    dispositions compare organism runs/train-follow-direction-organism/model --behavior follow-direction
    """

    verdict: Path | None = None
    """verdict.json, or its folder, of `dispositions verify` on the same behaviour and model."""
    unverified: bool = False
    """Train without a verdict; the result and its report say so."""
    resume: Literal["latest", "previous"] = "latest"
    """Go on from the newest checkpoint, or, where that one is damaged, from the one before."""
    gradients: When = "auto"
    """Also measure where the gradient goes; auto: in models below 20M parameters."""
    sharpness: When = "auto"
    """Also measure the directional sharpness of APOLLO, APOLLO-Mini, AdamW and SGD; auto: in models below 20M
    parameters, in float32."""
    ablation: When = "auto"
    """Also train without general data from the same start, to show what it kept; auto: in models below 20M
    parameters."""
    out: Path | None = None
    """Folder of the run; when not given runs/train-BEHAVIOR-MODEL, with the options that are not the default."""
    config: TrainConfig = field(default_factory=TrainConfig)

    def run(self) -> int:
        model, behavior = self.load()
        config, out = self.config, self.folder(self.out, "train-", behavior)
        verdict = None if self.verdict is None else open_verdict(self.verdict)
        direction = self._direction(model)
        trainer = Trainer(
            model, behavior, config, verdict=verdict, unverified=self.unverified, direction=direction, out=out,
            previous=self.resume == "previous",
        )  # fmt: skip
        if self.sharpness == "yes":
            require_float32(model)
        small = sum(p.numel() for p in model.hf.parameters()) < SMALL
        with claimed(out, {"kind": "train", **trainer.recipe}, RESULT, model, behavior) as finished:
            if not finished:
                (out / ABLATION).unlink(missing_ok=True)  # of a run that stopped before its result
                self._measure(model, behavior, small, out)
                before = _trained(trainer)
                done = trainer.run()
                write_json(out / UPDATES, updates(before, _trained(trainer)).as_dict())
                if config.general_share and self._wanted(self.ablation, small):
                    alone = train(
                        load(self.model, device=self.device, dtype=self.dtype), behavior,
                        replace(config, general_share=0.0), unverified=True, direction=direction,
                    )  # fmt: skip
                    alone.save(out / ABLATION)
                done.save(out / RESULT)  # last: a folder that has it is finished
        done = open_training(out)
        print(done.table())
        print(done.sentence)
        print(out / "model")
        print(write_training_report(out))
        return 0

    def _direction(self, model: HybridModel) -> Any:
        """The verdict's own, for --steer."""
        if not self.config.steer:
            return None
        if self.verdict is None:
            raise WrongInput(f"steer is {self.config.steer:g}; it needs --verdict, beside which the direction lies")
        folder = self.verdict if self.verdict.is_dir() else self.verdict.parent
        return open_direction(folder / "direction.safetensors", model=model)

    def _measure(self, model: HybridModel, behavior: Behavior, small: bool, out: Path) -> None:
        """What is asked of the model before it is trained. A result of the same that lies there already is kept, unless
        it depends on a file, which may have changed; any other goes."""
        shared: dict[str, Any] = {"general": self.config.general, "seed": self.config.seed}
        jobs: list[tuple[When, str, Any, Any, Any]] = [
            (self.gradients, GRADIENTS, gradients, open_gradients, GradientConfig(**shared)),
            (self.sharpness, SHARPNESS, sharpness, open_sharpness, SharpnessConfig(**shared)),
        ]
        for when, name, measure, opened, config in jobs:
            asked = {"behavior_hash": behavior.hash, **model.identity, "config": asdict(config)}
            able = name != SHARPNESS or model.dtype == torch.float32
            if self.config.general is None and _there(out / name, opened, asked):
                continue
            (out / name).unlink(missing_ok=True)
            if self._wanted(when, small and able):
                measure(model, behavior, config).save(out / name)

    @staticmethod
    def _wanted(when: When, small: bool) -> bool:
        return when == "yes" or (when == "auto" and small)


def _trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the weights that are trained; what is left alone says nothing of how sparse an update is."""
    names = {name for name, _ in trainer.trained}
    return {name: weight for name, weight in snapshot(trainer.model).items() if name in names}


def _there(path: Path, opened: Callable[[Path], Any], asked: Mapping[str, Any]) -> bool:
    """Whether a whole result of what is asked lies there."""
    try:
        found = opened(path).recipe
        return recipe_differs({name: found[name] for name in asked}, asked) is None
    except (WrongInput, KeyError, TypeError):  # not there, damaged, or something else
        return False
