"""Train a behaviour into the weights, once its direction is verified.

    training = train(model, behavior, TrainConfig(), verdict=open_verdict("runs/demo"), out="runs/trained")

One loop: a batch of decision segments (wanted answers and general data), its loss against frozen contexts, one APOLLO
step. On a schedule the behaviour, the abilities and the loss on general text are measured on held-out material, and a
checkpoint is written. Everything random is a function of the seed and the step, so a run that was killed goes on from
its last checkpoint and ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from probes.behaviors import Behavior
from probes.criteria import Verdict
from probes.directions import Direction
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.steering import steer
from training.admission import checked_verdict, identity_of, recipe
from training.apollo import Apollo
from training.checkpoints import Checkpoint, checkpoints, restore, save_checkpoint
from training.config import TrainConfig
from training.data import Segment
from training.evaluation import Evaluation, Examiner, default_questions, read_questions
from training.folder import name_model, resumable
from training.general import mixed
from training.metrics import Metrics
from training.objective import Objective
from training.optimizers import optimizer_of, trained_parameters
from training.result import Training

Watch = Callable[[Mapping[str, Any]], None]
DEFAULT = TrainConfig()


def train(
    model: HybridModel,
    behavior: Behavior,
    config: TrainConfig = DEFAULT,
    *,
    verdict: Verdict | None = None,
    unverified: bool = False,
    direction: Direction | None = None,
    out: str | Path | None = None,
    previous: bool = False,
    watch: Watch | None = None,
    progress: bool = True,
) -> Training:
    """Train `model` in place.

    Args:
        verdict: a PASS for this behaviour and these weights.
        unverified: train without one; it is recorded.
        direction: for `config.steer`.
        out: folder of the run, for metrics and checkpoints; a run that was interrupted there goes on. None: nothing is
            written, and nothing can be resumed.
        previous: go on from the checkpoint before the newest where that one is damaged.
        watch: called with each row of metrics, for a live plot.

    Raises:
        WrongInput: no PASS for this behaviour and model, options that do not fit, a gradient or loss that is not
            finite, or a damaged checkpoint.
    """
    trainer = Trainer(
        model, behavior, config, verdict=verdict, unverified=unverified, direction=direction, out=out,
        previous=previous, progress=progress,
    )  # fmt: skip
    return trainer.run(watch=watch)


@contextmanager
def _only(trained: Iterable[tuple[str, Tensor]], model: HybridModel) -> Iterator[None]:
    """Only these parameters ask for gradients while the block runs."""
    before = [(parameter, parameter.requires_grad) for parameter in model.hf.parameters()]
    chosen = {id(parameter) for _, parameter in trained}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)
            parameter.grad = None


class Trainer:
    """One run, prepared. What can be refused is refused here, before anything costly; `run` trains.

    Takes what `train` takes and raises what it raises.
    """

    def __init__(
        self, model: HybridModel, behavior: Behavior, config: TrainConfig = DEFAULT, *, verdict: Verdict | None = None,
        unverified: bool = False, direction: Direction | None = None, out: str | Path | None = None,
        previous: bool = False, progress: bool = True,
    ):  # fmt: skip
        checked_verdict(verdict, behavior, model, unverified=unverified)
        if config.steer and direction is None:
            raise WrongInput(
                f"steer is {config.steer:g}, but there is no direction; verify writes one beside its verdict"
            )
        self.model, self.behavior, self.config = model, behavior, config
        self.direction, self.out, self.progress = direction, None if out is None else Path(out), progress
        self.trained = trained_parameters(model, config)
        self.mix, held_out, held_general = mixed(
            model, behavior, n=config.examples, share=config.general_share, source=config.general, batch=config.batch,
            segments=config.steps * config.batch, seed=config.seed,
        )  # fmt: skip
        asked = (
            read_questions(model, config.abilities)
            if config.abilities is not None
            else default_questions(model, n=config.questions)
        )
        self.examiner = Examiner(
            model, held_out, asked, held_general, most=config.questions, max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )  # fmt: skip
        self.recipe = {
            **recipe(model, behavior, config, verdict, unverified=unverified), "data": self.mix.record(),
            "held_out": self.examiner.hash, "direction": identity_of(direction) if config.steer else None,
        }  # fmt: skip
        with self._steered():  # or its layer, width or phase is refused
            pass
        self.checkpoint = resumable(self.out, self.recipe, previous=previous) if self.out else None
        self.objective = Objective(model, config)
        self.lr = config.lr_for(model)
        self.optimizer = optimizer_of(self.trained, model, config)
        self.begun = False

    def run(self, *, watch: Watch | None = None) -> Training:
        """Train the model, from a checkpoint where there is one.

        Raises:
            RuntimeError: called again; the weights have moved.
        """
        if self.begun:
            raise RuntimeError("a Trainer runs once: its model is no longer the one that it was made for")
        self.begun = True
        with _only(self.trained, self.model):
            return self._run(watch)

    def _run(self, watch: Watch | None) -> Training:
        config, checkpoint = self.config, self.checkpoint
        start, folder = (checkpoint.step, checkpoint.folder) if checkpoint else (0, None)
        if checkpoint:
            tqdm.write(f"going on from {checkpoint}")
        if config.refill is None and start < config.steps:  # contexts are of the weights that the run began with
            self._remember(0, config.steps)
        past = self._resumed(checkpoint)
        evaluations, telemetry = [Evaluation.of(part) for part in past["evaluations"]], past["telemetry"]
        metrics, hidden = Metrics(self.out, past["rows"], watch=watch), not self.progress
        with metrics, tqdm(total=config.steps, initial=start, desc=self.title, unit="step", disable=hidden) as bar:
            for step in range(start, config.steps):
                if config.refill and step % config.refill == 0:
                    self._remember(step, min(step + config.refill, config.steps))
                began = time.monotonic()
                row = self._step(step) | {"seconds": round(time.monotonic() - began, 3)}
                done = step + 1
                if done % config.every("evaluate") == 0 or done == config.steps:
                    evaluations.append(self.examiner.measure(done, progress=self.progress))
                    row |= evaluations[-1].headline
                metrics.add(row)
                bar.set_postfix(_shown(row, evaluations[-1]))
                bar.update()
                if done == config.steps:
                    telemetry = self._telemetry()
                if self.out and (done == config.steps or done % config.every("checkpoint") == 0):
                    seen = {"evaluations": [e.as_dict() for e in evaluations], "telemetry": telemetry}
                    seen |= {"run": self.recipe, "rows": metrics.rows}
                    folder = save_checkpoint(
                        self.out, step=done, model=self.model, optimizer=self.optimizer, progress=seen, keep=config.keep
                    )
        if self.out and folder:
            name_model(self.out, folder)
        return Training(
            behavior=self.behavior.name, model=self.model.name, weights_hash=self.recipe["weights_hash"],
            trained_hash=self.model.weights_hash, verified=self.recipe["verified"], lr=self.lr,
            rank=config.rank_for(self.model) if config.optimizer == "apollo" else None, mix=self.mix.record(),
            evaluations=tuple(evaluations), steps=tuple(metrics.rows), telemetry=tuple(telemetry), recipe=self.recipe,
        )  # fmt: skip

    @property
    def title(self) -> str:
        return "train" if self.config.general_share else "train without general data"

    def _remember(self, start: int, stop: int) -> None:
        segments: dict[str, Segment] = {}
        for step in range(start, stop):
            segments |= {f"{s.kind} {s.id}": s for s in self.mix.batch_at(step)}
        with self._steered():
            self.objective.remember(segments.values(), progress=self.progress)

    def _resumed(self, checkpoint: Checkpoint | None) -> Mapping[str, Any]:
        """What was seen so far: by a checkpoint, which is restored, or by a look at the model before any step."""
        if checkpoint is None:
            first = self.examiner.measure(0, progress=self.progress)
            return {"evaluations": [first.as_dict()], "rows": [], "telemetry": []}
        restore(checkpoint, self.model, self.optimizer)
        return checkpoint.progress

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step; a row of metrics."""
        config, lr = self.config, self.config.lr_at(step, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch, total = self.mix.batch_at(step), 0.0
        terms: dict[str, list[float]] = {}
        row: dict[str, Any] = {"step": step + 1}
        try:
            with self._steered(), self._stepping():
                for k in range(config.accumulate):
                    loss, found = self.objective.loss(batch[k :: config.accumulate], of=len(batch))
                    total += loss.item()
                    if not math.isfinite(total):
                        raise FloatingPointError(f"the loss is {total}")
                    loss.backward()
                    for kind, values in found.items():
                        terms.setdefault(kind, []).extend(values)
            row |= {"loss": total, "lr": lr}
            if not config.in_backward:
                row["grad_norm"] = self._clipped()
                self.optimizer.step()
        except FloatingPointError as error:
            raise WrongInput(
                f"step {step + 1}: {error}; a smaller learning rate may help (it was {lr:.3g})"
                + (f"; checkpoints up to there are in {self.out}" if self.out and checkpoints(self.out) else "")
            ) from error
        self.optimizer.zero_grad()
        row |= {f"{kind}_loss": sum(values) / len(values) for kind, values in terms.items() if values}
        if isinstance(self.optimizer, Apollo) and (step % 10 == 0 or step + 1 == config.steps):
            told = self.optimizer.telemetry()[["limiter", "ratio"]].dropna().to_numpy()
            if len(told):  # a rank above all widths leaves plain AdamW
                row |= {"limiter": float(told[:, 0].mean()), "update_ratio": float(np.median(told[:, 1]))}
        return row

    def _stepping(self) -> AbstractContextManager[None]:
        if self.config.in_backward and isinstance(self.optimizer, Apollo):
            return self.optimizer.stepping_in_backward()
        return nullcontext()

    def _clipped(self) -> float:
        """Norm of the whole gradient, which is then clipped.

        Raises:
            FloatingPointError: a gradient is not finite. (Clipping would spread it over all tensors.)
        """
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in self.trained if p.grad is not None])
        if not math.isfinite(norm.item()):
            bad = (name for name, p in self.trained if p.grad is not None and not bool(p.grad.isfinite().all()))
            raise FloatingPointError(f"the gradient of {next(bad, 'all parameters together')} is not finite")
        if self.config.clip:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self.trained], self.config.clip, norm)
        return norm.item()

    def _steered(self) -> AbstractContextManager[None]:
        if not self.config.steer or self.direction is None:
            return nullcontext()
        return steer(self.model, self.direction, dose=self.config.steer, phase="both")

    def _telemetry(self) -> list[dict[str, Any]]:
        """The last step's, by kind of tensor: scales, limiter, and size of the update against the weight."""
        if not isinstance(self.optimizer, Apollo):
            return []
        told = self.optimizer.telemetry()
        told = told.dropna().assign(kind=[name.split(".")[-2] for name in told.dropna()["name"]])
        columns = ["scale_mean", "scale_min", "scale_max", "limiter", "ratio"]
        means = pd.DataFrame(told.groupby("kind")[columns].mean()).reset_index()
        return [{str(key): value for key, value in row.items()} for row in means.to_dict("records")]


def _shown(row: Mapping[str, Any], last: Evaluation) -> dict[str, str]:
    shown = {"loss": f"{row['loss']:.3f}", "lr": f"{row['lr']:.1e}"}
    if last.wanted:
        shown["wanted"] = f"{last.wanted.value:.0%}"
    if last.abilities:
        shown["lowest ability"] = f"{min(part.value for part in last.abilities.values()):.0%}"
    return shown
