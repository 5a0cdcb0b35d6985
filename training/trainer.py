"""Train a behaviour into the weights, once its direction is verified.

    training = train(model, behavior, TrainConfig(), verdict=open_verdict("runs/demo"), out="runs/trained")

One loop: a batch of decision segments (wanted answers and general data), its loss against frozen contexts, one APOLLO
step. On a schedule the behaviour, the abilities and the loss on general text are measured on held-out material, and a
checkpoint is written. Everything random is a function of the seed and the step, so a run that was killed goes on from
its last checkpoint and ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
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
from probes.store import library_versions, recipe_differs
from training.apollo import Apollo
from training.checkpoints import Checkpoint, open_checkpoint, restore, save_checkpoint
from training.config import TrainConfig
from training.data import Mix, Segment, behavior_segments, examples
from training.evaluation import Evaluation, Examiner, default_questions, read_questions
from training.general import general_data
from training.metrics import Metrics
from training.objective import Objective
from training.result import Training

Watch = Callable[[Mapping[str, Any]], None]
DEFAULT = TrainConfig()
WRITERS = ("linear_attn", "k_proj", "v_proj", "k_norm", "embed_tokens")
"""What is left alone when contexts are frozen: embeddings, keys, values and the GDN mixers, which make up a context's
memory. With them trained, later contexts are remembered in another way than those that were trained against, and no
gradient mends it: on the organism the worst ability fell by 9 to 16 points, without them by 3 at most (README)."""


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
    checked_verdict(verdict, behavior, model, unverified=unverified)
    if config.steer and direction is None:
        raise WrongInput(f"steer is {config.steer:g}, but there is no direction; verify writes one beside its verdict")
    run = _Run(model, behavior, config, direction=direction, out=None if out is None else Path(out), progress=progress)
    asked = recipe(model, behavior, config, verdict, unverified=unverified)
    with _only(run.trained, model):
        return run.train(asked, previous=previous, watch=watch)


def recipe(
    model: HybridModel, behavior: Behavior, config: TrainConfig, verdict: Verdict | None, *, unverified: bool = False
) -> dict[str, Any]:
    """Everything that determines a run's numbers, and on whose word it started."""
    told = None
    if verdict is not None:
        told = {"verdict": verdict.verdict, "sentence": verdict.sentence, "recipe": verdict.recipe}
    return {
        "behavior": behavior.name, "behavior_hash": behavior.hash, **model.identity, "config": asdict(config),
        "verified": not unverified, "verdict": told, "versions": library_versions(),
    }  # fmt: skip


def checked_verdict(
    verdict: Verdict | None, behavior: Behavior, model: HybridModel, *, unverified: bool = False
) -> None:
    """Refuse to start without a PASS for this behaviour and these weights.

    Raises:
        WrongInput: naming what is missing or differs.
    """
    if unverified:
        return
    if verdict is None:
        raise WrongInput(
            f"no verdict for '{behavior.name}': verify its direction first (dispositions verify) and give the verdict, "
            "or say --unverified"
        )
    verdict.require()
    told = verdict.recipe
    for what, seen, allowed in (
        ("behaviour", f"{told.get('behavior')} {told.get('behavior_hash')}", f"{behavior.name} {behavior.hash}"),
        ("weights", told.get("weights_hash"), model.weights_hash),
    ):
        if seen != allowed:
            raise WrongInput(f"the verdict is about other {what}: {seen}, here {allowed}; verify again")
    config = told.get("config", {})
    if config.get("direction") == "random" or config.get("shuffle_labels"):
        raise WrongInput("the verdict is about a direction that means nothing (random, or shuffled labels)")


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


class _Run:
    """Data, objective and optimizer of one run, and the loop."""

    def __init__(
        self, model: HybridModel, behavior: Behavior, config: TrainConfig, *, direction: Direction | None,
        out: Path | None, progress: bool,
    ):  # fmt: skip
        self.model, self.behavior, self.config = model, behavior, config
        self.direction, self.out, self.progress = direction, out, progress
        self.trained = trained_parameters(model, config)
        chosen, held_out = examples(model, behavior, n=config.examples, seed=config.seed)
        needed = math.ceil(config.steps * config.batch * config.general_share)
        general, held_general = general_data(model, config.general, n=max(needed, 1), seed=config.seed)
        self.mix = Mix(
            behavior=tuple(behavior_segments(model, chosen)), general=tuple(general if config.general_share else ()),
            share=config.general_share, batch=config.batch, seed=config.seed,
        )  # fmt: skip
        asked = (
            read_questions(model, config.abilities)
            if config.abilities
            else default_questions(model, n=config.questions)
        )
        self.examiner = Examiner(
            model, held_out, asked, held_general, most=config.questions, max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )  # fmt: skip
        self.objective = Objective(model, config)
        self.lr = config.lr_for(model)
        self.optimizer = optimizer_of(self.trained, model, config)

    def train(self, asked: dict[str, Any], *, previous: bool, watch: Watch | None) -> Training:
        config = self.config
        checkpoint = open_checkpoint(self.out, previous=previous) if self.out else None
        start = checkpoint.step if checkpoint else 0
        if checkpoint:
            tqdm.write(f"going on from {checkpoint}")
        if config.refill is None:  # contexts are of the weights that the run began with
            self._remember(0, config.steps)
        evaluations = self._resumed(checkpoint, asked)
        metrics = Metrics(self.out, start=start, watch=watch)
        with metrics, tqdm(total=config.steps, initial=start, desc="train", unit="step", disable=self.quiet) as bar:
            for step in range(start, config.steps):
                if config.refill and step % config.refill == 0:
                    self._remember(step, min(step + config.refill, config.steps))
                began = time.monotonic()
                row = self._step(step) | {"seconds": round(time.monotonic() - began, 3)}
                done = step + 1
                if done % config.every("evaluate") == 0 or done == config.steps:
                    evaluations.append(self.examiner.measure(done, progress=self.progress))
                    row |= _headline(evaluations[-1])
                metrics.add(row)
                bar.set_postfix(_shown(row, evaluations[-1]))
                bar.update()
                if self.out and (done % config.every("checkpoint") == 0 or done == config.steps):
                    kept = {
                        "run": asked | {"data": self.mix.record()},
                        "evaluations": [e.as_dict() for e in evaluations],
                    }
                    folder = save_checkpoint(
                        self.out, step=done, model=self.model, optimizer=self.optimizer, progress=kept, keep=config.keep
                    )
                    if done == config.steps:
                        _link(self.out / "model", folder)
        return Training(
            behavior=self.behavior.name, model=self.model.name, weights_hash=asked["weights_hash"],
            trained_hash=self.model.weights_hash, verified=asked["verified"], lr=self.lr,
            rank=config.rank_for(self.model) if config.optimizer == "apollo" else None, mix=self.mix.record(),
            evaluations=tuple(evaluations), steps=tuple(metrics.rows), telemetry=self._telemetry(), recipe=asked,
        )  # fmt: skip

    @property
    def quiet(self) -> bool:
        return not self.progress

    def _remember(self, start: int, stop: int) -> None:
        segments: dict[str, Segment] = {}
        for step in range(start, stop):
            segments |= {f"{s.kind} {s.id}": s for s in self.mix.batch_at(step)}
        with self._steered():
            self.objective.remember(segments.values(), progress=self.progress)

    def _resumed(self, checkpoint: Checkpoint | None, asked: dict[str, Any]) -> list[Evaluation]:
        """Evaluations so far: of a checkpoint, which is restored, or of the model before any step."""
        if checkpoint is None:
            return [self.examiner.measure(0, progress=self.progress)]
        if difference := recipe_differs(checkpoint.progress.get("run", {}), asked | {"data": self.mix.record()}):
            raise WrongInput(
                f"{checkpoint.folder} is of another run ({difference}); choose another folder or remove it"
            )
        restore(checkpoint, self.model, self.optimizer)
        return [Evaluation.of(part) for part in checkpoint.progress["evaluations"]]

    def _step(self, step: int) -> dict[str, Any]:
        """One optimizer step; a row of metrics."""
        config, lr = self.config, self.config.lr_at(step, self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch, total = self.mix.batch_at(step), 0.0
        terms: dict[str, list[float]] = {}
        with self._steered():
            for k in range(config.accumulate):
                loss, found = self.objective.loss(batch[k :: config.accumulate], of=len(batch))
                loss.backward()
                total += loss.item()
                for kind, values in found.items():
                    terms.setdefault(kind, []).extend(values)
        parameters = [parameter for _, parameter in self.trained]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
        try:
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss is {total}")
            self.optimizer.step()
        except FloatingPointError as error:
            raise WrongInput(
                f"step {step + 1}: {error}; a smaller learning rate may help (it was {lr:.3g})"
                + (f"; checkpoints up to there are in {self.out}" if self.out else "")
            ) from error
        self.optimizer.zero_grad()
        row = {"step": step + 1, "loss": total, "lr": lr, "grad_norm": float(norm)}
        row |= {f"{kind}_loss": sum(values) / len(values) for kind, values in terms.items() if values}
        if isinstance(self.optimizer, Apollo) and (step % 10 == 0 or step + 1 == config.steps):
            told = self.optimizer.telemetry()[["limiter", "ratio"]].dropna().to_numpy()
            if len(told):  # a rank above all widths leaves plain AdamW
                row |= {"limiter": float(told[:, 0].mean()), "update_ratio": float(np.median(told[:, 1]))}
        return row

    def _steered(self) -> AbstractContextManager[None]:
        if not self.config.steer or self.direction is None:
            return nullcontext()
        return steer(self.model, self.direction, dose=self.config.steer, phase="both")

    def _telemetry(self) -> tuple[dict[str, Any], ...]:
        """The last step's, by kind of tensor: scales, limiter, and size of the update against the weight."""
        if not isinstance(self.optimizer, Apollo):
            return ()
        told = self.optimizer.telemetry()
        told = told.dropna().assign(kind=[name.split(".")[-2] for name in told.dropna()["name"]])
        columns = ["scale_mean", "scale_min", "scale_max", "limiter", "ratio"]
        means = pd.DataFrame(told.groupby("kind")[columns].mean()).reset_index()
        return tuple({str(key): value for key, value in row.items()} for row in means.to_dict("records"))


def _link(name: Path, folder: Path) -> None:
    """Make `name` another name of a checkpoint, in one step."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.relative_to(name.parent), target_is_directory=True)
    temporary.replace(name)


def trained_parameters(model: HybridModel, config: TrainConfig) -> list[tuple[str, Tensor]]:
    """Named parameters of the text model that are trained.

    Raises:
        WrongInput: none has such a name.
    """
    text = {id(p) for module in (model.decoder, model.hf.get_output_embeddings()) for p in module.parameters()}
    named = [(name, p) for name, p in model.hf.named_parameters() if id(p) in text]
    words = config.parameters
    if words == ("all",) or (words == ("auto",) and config.context == "full"):
        return named
    if words == ("auto",):
        return [(name, p) for name, p in named if not any(word in name for word in WRITERS)]
    for word in words:
        if not any(word in name for name, _ in named):
            kinds = sorted({name.split(".")[-2] for name, _ in named})
            raise WrongInput(f"no parameter of {model.name} has '{word}' in its name; there are {', '.join(kinds)}")
    return [(name, p) for name, p in named if any(word in name for word in words)]


def optimizer_of(named: list[tuple[str, Tensor]], model: HybridModel, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for."""
    lr = config.lr_for(model)
    if config.optimizer == "sgd":
        return torch.optim.SGD(named, lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(named, lr=lr, weight_decay=config.weight_decay, foreach=False)
    rank = 1 if config.optimizer == "apollo-mini" else config.rank_for(model)
    return Apollo(named, lr=lr, weight_decay=config.weight_decay, rank=rank, refresh=config.refresh, seed=config.seed)


def _headline(found: Evaluation) -> dict[str, float]:
    row = {"propensity": found.propensity.value}
    if found.wanted:
        row["wanted"] = found.wanted.value
    if found.loss:
        row["held_out_loss"] = found.loss.value
    return row | {f"ability_{name}": part.value for name, part in found.abilities.items()}


def _shown(row: Mapping[str, Any], last: Evaluation) -> dict[str, str]:
    shown = {"loss": f"{row['loss']:.3f}", "lr": f"{row['lr']:.1e}"}
    if last.wanted:
        shown["wanted"] = f"{last.wanted.value:.0%}"
    if last.abilities:
        shown["worst ability"] = f"{min(part.value for part in last.abilities.values()):.0%}"
    return shown
