"""Do the steps of APOLLO go where the loss is flatter than along AdamW's? Measured, at matched loss, over seeds.

Directional sharpness is v^T H v, v being the unit vector along the update that an optimizer takes and H the Hessian of
the loss (Pan & Li, arXiv:2306.00204). The APOLLO paper (arXiv:2412.05270) publishes a table in which APOLLO's is below
Adam's (`PUBLISHED`) and explains its generalisation by that. Here every optimizer starts from the same weights and
trains on the same batches until the loss on a fixed set of segments, the probe, first falls to a share `target` of what
it was. There the optimizer's next update is taken, on its next batch, and v^T H v of the probe loss is measured along
it; beside it stand those along the probe's gradient and along a random direction.

Sharpness changes in the course of training, by orders of magnitude in the published table. An optimizer that is
further on is compared at another place, and any order can come out of that alone. Hence matched loss, and the loss that
was really met is in every row: a learning rate at which one step jumps far below the target spoils the match. So the
rate starts low (`lr_for` of the training configuration, times `STARTS`) and rises by sqrt(10) only when the target is
not met in time. It is constant, without warm-up. Gradients are clipped and parameters chosen as in training against
frozen contexts, so those that write a context's memory stand still. Equal loss is not equal place, and the learning
rate decides how one gets there: what is said is of this behaviour, this model, this share of its loss and these rates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from analysis.curvature import Curvature, along_each, eagerly, norm, write
from probes.behaviors import Behavior
from probes.errors import SEEDS, WrongInput, check_ranges
from probes.model import HybridModel
from probes.stats import Estimate, derived_seed, jackknife
from probes.store import library_versions, read_result, write_json
from training.config import Optimizer, TrainConfig
from training.general import mixed
from training.objective import Objective
from training.optimizers import optimizer_of, trained_parameters

RESULT = "sharpness.json"
PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "sgd": {2: 1.959722, 5: 1.512521, 10: 2.471792, 20: 3.207535},
    "adamw": {2: 0.009242, 5: 0.000509, 10: 0.000242, 20: 0.000399},
    "apollo": {2: 0.006024, 5: 0.000249, 10: 0.000163, 20: 0.000261},
    "apollo-mini": {2: 0.004017, 5: 0.000107, 10: 0.000056, 20: 0.000101},
}
"""Directional sharpness by epoch as published: arXiv:2412.05270, table 10; its "Adam" stands under adamw."""
NAMES = {"apollo": "APOLLO", "apollo-mini": "APOLLO-Mini", "adamw": "AdamW", "sgd": "SGD"}
RAISES = 4
"""How often a learning rate is raised by sqrt(10) before an optimizer is said not to reach the target."""
STARTS = {"sgd": 30.0, "apollo-mini": 0.3}
"""Factor of the first learning rate. SGD's steps are as long as its gradients; APOLLO-Mini's first ones are longer than
AdamW's and jumped down to 42 % of the organism's loss where half was asked for."""


@dataclass(frozen=True, kw_only=True)
class SharpnessConfig:
    """How directional sharpness is measured."""

    seeds: int = 3
    """Runs of each optimizer; each seed has its own examples, batches and projections."""
    optimizers: tuple[Optimizer, ...] = ("apollo", "apollo-mini", "adamw", "sgd")
    """What is measured; comparisons are with adamw."""
    batch: int = 16
    """Segments a step."""
    steps: int = 40
    """Optimizer steps at most, at each learning rate."""
    target: float = 0.5
    """Where it is measured: once the loss of the probe has fallen to this share of what it was."""
    probe: int = 64
    """Segments of the mix on which loss and curvature are measured, the same for all optimizers of a seed."""
    examples: int = 200
    """Examples of the behaviour, spread over its topics."""
    general_share: float = 0.25
    """Share of general data in each batch and in the probe, 0 to 1."""
    general: str | None = None
    """General data, as for training; when not given, the abilities of the organism or the shipped English text."""
    seed: int = 0
    """Decides the seeds of the runs."""

    def __post_init__(self) -> None:
        least_one = dict.fromkeys(("seeds", "batch", "steps", "probe", "examples"), (1, math.inf))
        check_ranges(self, {**least_one, "general_share": (0, 1), "seed": SEEDS})
        check_ranges(self, {"target": (0, 1)}, inside=("target",))
        allowed = get_args(Optimizer)
        for name in self.optimizers:
            if name not in allowed:
                raise WrongInput(f"unknown optimizer '{name}'; allowed are {', '.join(allowed)}")
        if not self.optimizers or len(set(self.optimizers)) < len(self.optimizers):
            raise WrongInput(f"optimizers must be one or more, each once, saw {', '.join(self.optimizers) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class SharpnessRow:
    """One optimizer from one seed.

    Attributes:
        reached: whether the loss fell to the target; if not, there is no sharpness.
        lr: the learning rate that reached it, or the largest that was tried.
        steps: taken up to there, or by the last attempt.
        initial, loss: of the probe, nats a token; where it was measured, or the lowest that was met.
        size: norm of the next update.
        update, gradient, random: curvature along that update, along the probe's gradient, along a random direction.
    """

    optimizer: str
    seed: int
    reached: bool
    lr: float
    steps: int
    initial: float
    loss: float
    size: float | None = None
    update: Curvature | None = None
    gradient: Curvature | None = None
    random: Curvature | None = None


@dataclass(frozen=True, kw_only=True)
class SharpnessComparison:
    """An optimizer against AdamW, over the seeds from which both reached the target.

    Attributes:
        ratio: geometric mean of the ratios by seed, its interval a t interval of their logarithms; None where a
            curvature is not above zero.
        difference: mean of the differences by seed; decides where there is no ratio. None without a seed.
    """

    optimizer: str
    seeds: int
    ratio: Estimate | None
    difference: Estimate | None

    @property
    def relation(self) -> Literal["below", "above", "not distinguishable from"]:
        """How it lies to AdamW, by whether an interval is clear of equality."""
        decides, equal = (self.ratio, 1.0) if self.ratio else (self.difference, 0.0)
        if decides and decides.upper < equal:
            return "below"
        return "above" if decides and decides.lower > equal else "not distinguishable from"

    def __str__(self) -> str:
        count = f"n = {self.seeds} seed{'' if self.seeds == 1 else 's'}"
        said = f"{NAMES[self.optimizer]} is {self.relation} AdamW"
        if self.ratio:
            return f"{said} ({self.ratio.value:.3g} times, {self.ratio.lower:.3g} to {self.ratio.upper:.3g}, {count})"
        if self.difference:
            part = self.difference
            return f"{said} (difference {part.value:.3g}, {part.lower:.3g} to {part.upper:.3g}, {count})"
        return f"{NAMES[self.optimizer]} and AdamW have no seed from which both reached the target"


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """Directional sharpness of optimizers at matched loss: a row for each optimizer and seed."""

    behavior: str
    model: str
    config: SharpnessConfig
    rows: tuple[SharpnessRow, ...]
    recipe: Mapping[str, Any] = field(repr=False)
    seconds: float = 0.0

    def values(self, optimizer: str, what: Literal["update", "gradient", "random"] = "update") -> dict[int, float]:
        """Curvature by seed, of the seeds from which the optimizer reached the target."""
        found = [(row.seed, getattr(row, what)) for row in self.rows if row.optimizer == optimizer and row.reached]
        return {seed: curvature.value for seed, curvature in found}

    def estimate(self, optimizer: str, what: Literal["update", "gradient", "random"] = "update") -> Estimate | None:
        """Mean over seeds with a t interval; None where the optimizer never reached the target."""
        return _mean(list(self.values(optimizer, what).values()), self.config.seed)

    @property
    def comparisons(self) -> tuple[SharpnessComparison, ...]:
        """Each other optimizer against AdamW, paired by seed; none where AdamW was not measured."""
        if "adamw" not in self.config.optimizers:
            return ()
        base, found = self.values("adamw"), []
        for name in self.config.optimizers:
            own = self.values(name)
            pairs = [(own[seed], base[seed]) for seed in own if seed in base]
            logs = [math.log(a / b) for a, b in pairs if a > 0 and b > 0]
            log = _mean(logs, self.config.seed) if len(logs) == len(pairs) else None
            ends = {key: math.exp(getattr(log, key)) for key in ("value", "lower", "upper")} if log else {}
            comparison = SharpnessComparison(
                optimizer=name, seeds=len(pairs), ratio=replace(log, **ends) if log else None,
                difference=_mean([a - b for a, b in pairs], self.config.seed),
            )  # fmt: skip
            found += [comparison] if name != "adamw" else []
        return tuple(found)

    @property
    def sentence(self) -> str:
        """What came out, for people."""
        told = [str(part) for part in self.comparisons if part.optimizer.startswith("apollo")]
        if "adamw" not in self.config.optimizers:
            told = ["nothing is compared, since AdamW was not measured"]
        elif not told:
            told = ["no APOLLO was measured"]
        for name in self.config.optimizers:
            missed = self.config.seeds - len(self.values(name))
            if missed:
                told.append(f"{NAMES[name]} did not reach the target from {missed} of {self.config.seeds} seeds")
        return f"sharpness along the update at {self.config.target:.0%} of the initial loss: " + "; ".join(told)

    def frame(self) -> pd.DataFrame:
        """One row for each optimizer and seed; NaN where the target was not reached."""
        plain = ("optimizer", "seed", "reached", "lr", "steps", "initial", "loss", "size")
        records = []
        for row in self.rows:
            record: dict[str, Any] = {name: getattr(row, name) for name in plain}
            record |= {name: c.value if (c := getattr(row, name)) else math.nan for name in _MEASURED}
            record |= {
                "method": row.update.method if row.update else None,
                "error": row.update.error if row.update else math.nan,
            }
            records.append(record)
        return pd.DataFrame(records).astype({"size": float})

    def table(self) -> str:
        """Each optimizer's mean over seeds, and what was published beside it by epoch, as text."""
        epochs = PUBLISHED["adamw"]
        heads = ["v^T H v along the update", "times AdamW", "gradient", "random", "loss", "steps", "lr", "reached"]
        lines = [_line("", heads) + " | published " + "".join(f"{f'epoch {epoch}':>10}" for epoch in epochs)]
        ratios = {part.optimizer: part.ratio for part in self.comparisons}
        for name in self.config.optimizers:
            rows = [row for row in self.rows if row.optimizer == name]
            reached = [row for row in rows if row.reached] or rows
            means = [f"{e.value:.3g}" if (e := self.estimate(name, what)) else "-" for what in ("gradient", "random")]
            cells = [
                _cell(self.estimate(name)), _cell(ratios.get(name)), *means,
                f"{np.mean([row.loss / row.initial for row in reached]):.1%}",
                f"{np.mean([row.steps for row in reached]):.0f}", f"{max(row.lr for row in rows):.1e}",
                f"{sum(row.reached for row in rows)} of {len(rows)}",
            ]  # fmt: skip
            lines.append(_line(NAMES[name], cells) + " |           " + "".join(
                f"{PUBLISHED[name][epoch]:>10.6f}" for epoch in epochs
            ))  # fmt: skip
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        estimates = {name: e.as_dict() if (e := self.estimate(name)) else None for name in self.config.optimizers}
        told = {"sentence": self.sentence, "estimates": estimates, "published": PUBLISHED}
        told["comparisons"] = [{**asdict(part), "relation": part.relation} for part in self.comparisons]
        return {**told, **asdict(self)}

    def save(self, path: str | Path) -> Path:
        """Write `sharpness.json` into a folder, or a file of another name."""
        file = Path(path) if Path(path).suffix == ".json" else Path(path) / RESULT
        write_json(file, self.as_dict())
        return file

    def __str__(self) -> str:
        return f"{self.behavior} on {self.model}: {self.sentence}"


_MEASURED = ("update", "gradient", "random")


def _mean(values: Sequence[float], seed: int) -> Estimate | None:
    """Mean with a t interval, which of one value is unknown."""
    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    without = (data.sum() - data) / max(len(data) - 1, 1)
    return jackknife(float(data.mean()), without, n=len(data), seed=seed)


def _cell(estimate: Estimate | None) -> str:
    return f"{estimate.value:.3g} [{estimate.lower:.3g}, {estimate.upper:.3g}]" if estimate else "-"


def _line(name: str, cells: Sequence[str]) -> str:
    widths = (26, 26, 10, 10, 8, 7, 10, 9)
    return f"{name:<12}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def open_sharpness(path: str | Path) -> Sharpness:
    """Read `sharpness.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or not a measurement of sharpness.
    """
    data = read_result(path, RESULT)
    try:
        config = {**data["config"], "optimizers": tuple(data["config"]["optimizers"])}
        rows = [SharpnessRow(**{**row, **{name: _curvature(row[name]) for name in _MEASURED}}) for row in data["rows"]]
        kept = {name: data[name] for name in ("behavior", "model", "recipe", "seconds")}
        return Sharpness(config=SharpnessConfig(**config), rows=tuple(rows), **kept)
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongInput(f"{path} is not a measurement of sharpness: {error}") from error


def _curvature(data: Mapping[str, Any] | None) -> Curvature | None:
    return None if data is None else Curvature(**{**data, "sweep": tuple(map(tuple, data["sweep"]))})


DEFAULT = SharpnessConfig()


def sharpness(
    model: HybridModel, behavior: Behavior, config: SharpnessConfig = DEFAULT, *, progress: bool = True
) -> Sharpness:
    """Measure directional sharpness while training `behavior`; the model is bitwise what it was afterwards.

    Contexts are frozen, computed once by the weights as they are given; plain attention is used throughout.

    Raises:
        WrongInput: weights that are not float32, or data that do not fit, as in training.
    """
    require_float32(model)
    started, recipe = time.monotonic(), _recipe(model, behavior, config)
    first = {name: TrainConfig().lr_for(model) * STARTS.get(name, 1.0) for name in config.optimizers}
    rows, data = [], []
    total = config.seeds * len(config.optimizers)
    with tqdm(total=total, desc="sharpness", unit="run", disable=not progress) as bar, eagerly(model.hf):
        for i in range(config.seeds):
            seed = derived_seed(config.seed, "sharpness", i) % (SEEDS[1] + 1)
            run = _Run(model, behavior, config, seed)
            data.append({**run.mix.record(), "trained": len(run.named)})
            for name in config.optimizers:
                with _borrowed(model, run.parameters):
                    row = run.measure(name, first[name])
                if row.reached:  # seeds after this one start where it was enough
                    first[name] = row.lr
                rows.append(row)
                bar.update()
    return Sharpness(
        behavior=behavior.name, model=model.name, config=config, rows=tuple(rows), recipe={**recipe, "data": data},
        seconds=round(time.monotonic() - started, 2),
    )  # fmt: skip


def require_float32(model: HybridModel) -> None:
    """Differences of gradients drown in the rounding of smaller dtypes.

    Raises:
        WrongInput: weights of another dtype.
    """
    if model.dtype != torch.float32:
        raise WrongInput(f"sharpness needs float32 weights, saw {model.dtype}; load the model with dtype='float32'")


def _recipe(model: HybridModel, behavior: Behavior, config: SharpnessConfig) -> dict[str, Any]:
    told = {"behavior": behavior.name, "behavior_hash": behavior.hash, **model.identity}
    return {**told, "config": {**asdict(config), "optimizers": list(config.optimizers)}, "versions": library_versions()}


@contextmanager
def _borrowed(model: HybridModel, trained: Sequence[Tensor]) -> Iterator[None]:
    """Only these parameters ask for gradients while the block runs; afterwards all are as before, gradients too."""
    weights, chosen = [parameter.detach().clone() for parameter in trained], {id(parameter) for parameter in trained}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.hf.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
        parameter.grad = None
    try:
        yield
    finally:
        write(trained, weights)
        for parameter, asked, gradient in before:
            parameter.requires_grad_(asked)
            parameter.grad = gradient


class _Run:
    """Data of one seed, and every optimizer's way on it."""

    def __init__(self, model: HybridModel, behavior: Behavior, config: SharpnessConfig, seed: int):
        self.model, self.config, self.seed = model, config, seed
        self.settings = TrainConfig(
            examples=config.examples, general_share=config.general_share, general=config.general, steps=config.steps,
            batch=config.batch, seed=seed,
        )  # fmt: skip
        self.named = trained_parameters(model, self.settings)
        self.parameters = [parameter for _, parameter in self.named]
        self.mix, _, _ = mixed(
            model, behavior, n=config.examples, share=config.general_share, source=config.general, batch=config.batch,
            segments=max((config.steps + 1) * config.batch, config.probe), seed=seed,
        )  # fmt: skip
        order = derived_seed(seed, "probe")
        self.probe = replace(self.mix, batch=config.probe, seed=order).batch_at(0)
        self.objective = Objective(model, self.settings)
        self.objective.remember([*self.probe, *(s for k in range(config.steps + 1) for s in self.mix.batch_at(k))])
        self.initial = self._probed()

    def measure(self, name: Optimizer, lr: float) -> SharpnessRow:
        """Train to the target, at a learning rate that reaches it, and measure there."""
        start = [parameter.detach().clone() for parameter in self.parameters]
        lowest = self.initial
        lrs = [min(lr * 10 ** (i / 2), 0.99) for i in range(RAISES + 1)]
        row = SharpnessRow(
            optimizer=name, seed=self.seed, reached=False, lr=lrs[-1], steps=0, initial=self.initial, loss=lowest
        )
        for rate in lrs:
            write(self.parameters, start)
            optimizer = optimizer_of(self.named, self.model, replace(self.settings, optimizer=name, lr=rate))
            steps, loss, reached = self._train(optimizer)
            lowest = min(lowest, loss)
            row = replace(row, steps=steps, loss=lowest, lr=rate)
            update = self._next(optimizer, steps) if reached else None
            if update is not None:
                return replace(row, reached=True, loss=loss, size=norm(update), **self._curvatures(update))
        return row

    def _train(self, optimizer: torch.optim.Optimizer) -> tuple[int, float, bool]:
        """(steps, loss of the probe, whether it is down to the target); the lowest loss if it is not."""
        lowest, step = self.initial, 0
        while step < self.config.steps and self._step(optimizer, step):
            step, loss = step + 1, self._probed()
            if loss <= self.config.target * self.initial:
                return step, loss, True
            if not math.isfinite(loss):
                break
            lowest = min(lowest, loss)
        return step, lowest, False

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> bool:
        """One step as in training; False, and nothing done, where the gradient is not finite."""
        optimizer.zero_grad()
        self.objective.loss(self.mix.batch_at(step))[0].backward()
        size = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        if bool(size.isfinite()):
            optimizer.step()
        optimizer.zero_grad()
        return bool(size.isfinite())

    def _next(self, optimizer: torch.optim.Optimizer, step: int) -> list[Tensor] | None:
        """The update of a step, in float64, which is taken back again; None where it is not finite."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        taken = self._step(optimizer, step)
        update = [p.detach().double() - old.double() for p, old in zip(self.parameters, before, strict=True)]
        write(self.parameters, before)
        return update if taken and 0 < norm(update) < math.inf else None

    def _curvatures(self, update: list[Tensor]) -> dict[str, Curvature]:
        gradient = list(torch.autograd.grad(self._loss(), self.parameters, materialize_grads=True))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "random direction"))
        random = [torch.randn(p.shape, generator=generator).to(p.device) for p in self.parameters]
        found = along_each(self._loss, self.parameters, [update, gradient, random])
        return dict(zip(_MEASURED, found, strict=True))

    def _loss(self) -> Tensor:
        return self.objective.loss(self.probe)[0]

    @torch.no_grad()
    def _probed(self) -> float:
        return self._loss().item()
