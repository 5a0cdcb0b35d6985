"""Where the gradient of a decision goes: which weights learn with frozen contexts, which with gradient through them.

The trainer computes the memory of a context once and trains the decision alone. That is said to let a gradient meet
the context through W_q only, with three quarters of it in GDN layers. Here both are measured, at the weights as they
are: for batches as the trainer takes them, the gradient of the same loss with `context="frozen"` and "full"; and for
single segments the rank of a matrix's gradient, which is a sum of one outer product a token.

    share       of the squared norm, |G_group|^2 / |G|^2, by batch; the groups' shares add up to 1
    cosine      <G_frozen, G_full> / (|G_frozen| |G_full|) over a group's elements, by batch
    ratio       |G_frozen| / |G_full|, by batch
    rank        singular values above 1e-5 of the largest, from the spectrum in float64. The gradient itself is in the
                model's dtype: what float32 rounds lies near 1e-7 of the largest, but rounding to bfloat16 alone would
                fill every rank, so for such models ranks are not measured.

All parameters of the decoder and its output layer are measured, whichever of them a training would take.

All values are means over batches (ranks: over segments), with intervals that draw batches (ranks: topics). An interval
speaks of batches of this size: smaller batches have larger and noisier gradients. Sums are taken in float64.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from analysis.states import flat
from analysis.updates import Piece, numerical_rank, parts_of, pieces
from analysis.words import estimate, number
from probes.behaviors import Behavior
from probes.errors import SEEDS, WrongInput, check_ranges
from probes.model import HybridModel
from probes.stats import Estimate, mean
from probes.store import library_versions, read_result, write_json
from training.config import TrainConfig
from training.data import Mix, Segment
from training.frozen_context import Context
from training.general import mixed
from training.objective import Objective
from training.optimizers import text_parameters

RESULT = "gradients.json"
FRAMES = ("groups", "tensors", "ranks", "answers")
CONTEXTS: tuple[Context, ...] = ("frozen", "full")
RANKED = ("q", "k", "v", "o", "qkv", "z", "b", "a")
_RANGES: dict[str, tuple[float, float]] = {
    "batches": (2, math.inf), "batch": (1, math.inf), "examples": (1, math.inf), "general_share": (0, 1), "seed": SEEDS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """On what the gradients are measured. The same object configures the function and the command."""

    batches: int = 8
    """Batches, and at most as many single segments for the ranks; at least 2, or there are no intervals."""
    batch: int = 16
    """Segments (answers with their contexts) a batch."""
    examples: int = 200
    """Examples of the behaviour from which batches are taken, spread over its topics."""
    general_share: float = 0.25
    """Share of general data in each batch, 0 to 1."""
    general: str | None = None
    """General data: a .jsonl file of chats or agent logs, or a .txt file with a paragraph a line. When not given, the
    abilities of the organism, or the shipped English text."""
    seed: int = 0
    """Decides the data and their order, and the draws of the intervals."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)


DEFAULT = GradientConfig()


@dataclass(frozen=True, kw_only=True)
class GradientRow:
    """One kind of weight, with one kind of context.

    Attributes:
        group, kind: as in `analysis.updates.Piece`. A part, such as qkv.k, follows its whole; `whole` is false for it.
        share: of the squared norm of the whole gradient; NaN where it is zero. parameters: share of all parameters.
        cosine, ratio: frozen against full, the same for both contexts; NaN where a gradient is zero.
    """

    group: str
    kind: str
    whole: bool
    context: Context
    share: Estimate
    parameters: float
    cosine: Estimate
    ratio: Estimate


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor: the squared norm of its gradient with frozen and with full contexts, and the cosine of both."""

    name: str
    frozen: Estimate
    full: Estimate
    cosine: Estimate


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """Numerical rank of the gradient of one matrix for single segments.

    Attributes:
        tokens: that can bring gradient: up to the last one that predicts a scored token (what comes after it, such as
            the segment's last token, changes no loss); with frozen contexts only those of the decision. In the last
            layer keys, values and writes still learn from all of these, but queries and outputs only from the tokens
            that predict.
        limit: the smaller of `tokens` and the matrix's sides.
        beyond: segments whose rank exceeds their limit.
    """

    group: str
    kind: str
    layer: int
    context: Context
    rank: Estimate
    tokens: Estimate
    limit: Estimate
    beyond: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question about the gradient, the number that answers it, what it is held against, and both in words."""

    question: str
    value: Estimate
    expected: float | str | None
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Where the gradient goes.

    Attributes:
        tied: whether the output layer is the embedding, whose gradient then holds both.
        rows: by kind of weight. tensors: by tensor. ranks: empty for a model that is not float32 or float64.
        answers: what came out, in words.
    """

    behavior: str
    model: str
    tied: bool
    rows: tuple[GradientRow, ...]
    tensors: tuple[TensorRow, ...]
    ranks: tuple[RankRow, ...]
    answers: tuple[Answer, ...]
    recipe: Mapping[str, Any] = field(repr=False)

    def frame(self, what: str = "groups") -> pd.DataFrame:
        """One of `FRAMES` as a table; estimates take columns of their own.

        Raises:
            WrongInput: there is no such table.
        """
        if what not in FRAMES:
            raise WrongInput(f"unknown table '{what}'; allowed are {', '.join(FRAMES)}")
        return pd.DataFrame([flat(row) for row in (self.rows if what == "groups" else getattr(self, what))])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        write_json(path, self.as_dict())
        return Path(path)

    def __str__(self) -> str:
        return f"{self.behavior} on {self.model}: " + "; ".join(answer.sentence for answer in self.answers)


def open_gradients(path: str | Path) -> Gradients:
    """Read `gradients.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or something else.
    """
    data = read_result(path, RESULT)
    kinds: dict[str, Any] = {"rows": GradientRow, "tensors": TensorRow, "ranks": RankRow, "answers": Answer}
    try:
        rows: dict[str, Any] = {name: tuple(_read(kind, part) for part in data[name]) for name, kind in kinds.items()}
        return Gradients(**{**data, **rows})
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongInput(f"{path} is not a measurement of gradients: {error}") from error


def _read(kind: Any, data: Mapping[str, Any]) -> Any:
    found = dict(data)
    for part in fields(kind):
        if part.type == "Estimate":  # JSON has no NaN
            own: dict[str, Any] = found[part.name]
            gone: dict[str, Any] = {name: math.nan for name, value in own.items() if value is None}
            found[part.name] = Estimate(**{**own, **gone})
    return kind(**found)


def gradients(
    model: HybridModel, behavior: Behavior, config: GradientConfig = DEFAULT, *, progress: bool = True
) -> Gradients:
    """Measure where the gradient of a behaviour's training goes. The model is left as it was.

    Raises:
        WrongInput: no data as asked for (see `training.data.examples`, `training.general.general_data`), or a loss that
            is not finite.
    """
    mix, named = mix_of(model, behavior, config), text_parameters(model)
    batches = [mix.batch_at(i) for i in range(config.batches)]
    order = list(mix.behavior)
    random.Random(f"{config.seed} ranks").shuffle(order)
    single = order[: config.batches] if model.dtype in (torch.float32, torch.float64) else []
    sides = objectives(model, config, [segment for batch in [*batches, single] for segment in batch], progress=progress)
    found = pieces({name: tuple(p.shape) for name, p in named})
    with tqdm(total=len(batches) + len(single), desc="gradients", unit="batch", disable=not progress) as bar:
        sums = []
        for batch in batches:
            sums.append(_sums(found, *(gradient(side, batch, named) for side in sides)))
            bar.update()
        ranked = []
        for segment in single:
            ranked += [r for side in sides for r in _ranked(found, gradient(side, [segment], named), side, segment)]
            bar.update()
    tied = model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
    table = _Table(found, np.stack(sums), config.seed)
    return Gradients(
        behavior=behavior.name, model=model.name, tied=tied, rows=tuple(table.rows()),
        tensors=tuple(table.tensors()), ranks=tuple(_rank_rows(ranked, config.seed)),
        answers=(*_learning(table), *_kinds(table, model), *_rank_answers(ranked, config.seed)),
        recipe={
            "behavior": behavior.name, "behavior_hash": behavior.hash, **model.identity, "config": asdict(config),
            "data": mix.record(), "versions": library_versions(),
        },
    )  # fmt: skip


def mix_of(model: HybridModel, behavior: Behavior, config: GradientConfig) -> Mix:
    """The batches that a training of `config.batches` steps would take."""
    mix, _, _ = mixed(
        model, behavior, n=config.examples, share=config.general_share, source=config.general, batch=config.batch,
        segments=config.batches * config.batch, seed=config.seed,
    )  # fmt: skip
    return mix


def objectives(
    model: HybridModel, config: GradientConfig, segments: Sequence[Segment], *, progress: bool = False
) -> tuple[Objective, ...]:
    """The loss with frozen contexts, which remembers those of `segments`, and with full ones."""
    found = tuple(Objective(model, TrainConfig(context=context, batch=config.batch)) for context in CONTEXTS)
    found[0].remember(segments, progress=progress)
    return found


def gradient(objective: Objective, batch: Sequence[Segment], named: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Gradient of the loss of a batch for named parameters; neither their `.grad` nor `requires_grad` changes.

    Raises:
        WrongInput: the loss is not finite.
    """
    with _asking([parameter for _, parameter in named]) as parameters, torch.enable_grad():
        loss, _ = objective.loss(batch)
        if not math.isfinite(loss.item()):
            raise WrongInput(f"the loss of a batch is {loss.item()}; a gradient needs a finite one")
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return {name: part for (name, _), part in zip(named, found, strict=True)}


@contextmanager
def _asking(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """These ask for gradients while the block runs."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, asked in zip(parameters, before, strict=True):
            parameter.requires_grad_(asked)


def bringing_tokens(segment: Segment, context: Context) -> int:
    """Tokens that can bring gradient: see `RankRow`."""
    last = max(i for i, scored in enumerate(segment.scored) if scored)
    return last + (len(segment.context) if context == "full" else 0)


def _sums(found: Sequence[Piece], frozen: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> NDArray[Any]:
    """By piece: squared norms with frozen and full contexts, and the inner product [piece 3], float64."""
    rows = []
    for piece in found:
        one, other = (piece.of(side[piece.name]).double().flatten() for side in (frozen, full))
        rows.append([float(one @ one), float(other @ other), float(one @ other)])
    return np.array(rows)


class _Table:
    """Sums of all batches [batch piece 3], and what is read from them."""

    def __init__(self, found: Sequence[Piece], sums: NDArray[Any], seed: int):
        self.found, self.sums, self.seed = found, sums, seed
        self.groups = parts_of(found)
        self.total = sum(piece.elements for piece in found)

    def mean(self, values: NDArray[Any]) -> Estimate:
        """Mean over batches."""
        return mean(values.tolist(), [str(i) for i in range(len(values))], seed=self.seed)

    def of(self, own: Sequence[int]) -> NDArray[Any]:
        return self.sums[:, list(own)].sum(1)

    def cosines(self, own: Sequence[int]) -> NDArray[Any]:
        frozen, full, inner = self.of(own).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(frozen * full > 0, np.clip(inner / np.sqrt(frozen * full), -1, 1), np.nan)

    def ratio(self, own: Sequence[int]) -> Estimate:
        frozen, full, _ = self.of(own).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.mean(np.where(full > 0, np.sqrt(frozen / full), np.nan))

    def share(self, own: Sequence[int], among: Sequence[int], context: Context) -> Estimate:
        part, whole = (self.of(side)[:, CONTEXTS.index(context)] for side in (own, among))
        with np.errstate(invalid="ignore"):
            return self.mean(part / whole)

    def parameters(self, own: Sequence[int], among: Sequence[int]) -> float:
        return sum(self.found[i].elements for i in own) / sum(self.found[i].elements for i in among)

    def where(self, test: Any) -> list[int]:
        return [i for i, piece in enumerate(self.found) if test(piece)]

    def rows(self) -> Iterator[GradientRow]:
        every = range(len(self.found))
        for (group, kind), own in self.groups.items():
            cosine, ratio = self.mean(self.cosines(own)), self.ratio(own)
            for context in CONTEXTS:
                yield GradientRow(
                    group=group, kind=kind, whole="." not in group, context=context, cosine=cosine, ratio=ratio,
                    share=self.share(own, every, context), parameters=self.parameters(own, every),
                )  # fmt: skip

    def tensors(self) -> Iterator[TensorRow]:
        for name in dict.fromkeys(piece.name for piece in self.found):
            own = self.where(lambda piece, name=name: piece.name == name)
            frozen, full, _ = self.of(own).T
            yield TensorRow(
                name=name, frozen=self.mean(frozen), full=self.mean(full), cosine=self.mean(self.cosines(own))
            )


def _learning(table: _Table) -> Iterator[Answer]:
    """Does W_q learn through frozen memory as it does through a context with gradient, and more so than W_k and W_v?"""
    names = {
        "attention": ("q.query" if ("q.query", "attention") in table.groups else "q", "k", "v"),
        "gdn": ("qkv.q", "qkv.k", "qkv.v"),
    }
    for kind, (query, *others) in names.items():
        if any((name, kind) not in table.groups for name in (query, *others)):
            continue
        where, own = {"attention": "attention", "gdn": "GDN"}[kind], table.groups[query, kind]
        cosines = table.cosines(own)
        value = table.mean(cosines)
        yield Answer(
            question=f"does W_q of {where} layers learn through frozen contexts?", value=value, expected=None,
            sentence=f"with frozen contexts W_q of {where} layers ({query}) has a gradient with "
            f"{_said(table.ratio(own))} of the norm of the full one, at a cosine of {_said(value)}",
        )  # fmt: skip
        for other, letter in zip(others, "kv", strict=True):
            own = table.groups[other, kind]
            theirs = table.cosines(own)
            ahead, at = table.mean(cosines - theirs), table.mean(theirs)
            yield Answer(
                question=f"does W_q of {where} layers keep more of its gradient than W_{letter}?", value=ahead,
                expected="above 0",
                sentence=f"W_{letter} of {where} layers ({other}) has {_said(table.ratio(own))} of the norm, at a "
                f"cosine of {_said(at)}; that of W_q is {_compared(ahead)}",
            )  # fmt: skip


def _kinds(table: _Table, model: HybridModel) -> Iterator[Answer]:
    """Is the gradient divided between GDN and attention as the layers are?"""
    if not model.of_kind("gdn") or not model.of_kind("attention"):
        return
    expected = len(model.of_kind("gdn")) / len(model.layers)
    for what, test in (("layers", lambda p: p.kind != "model"), ("mixers", lambda p: p.mixer)):
        among = table.where(test)
        own = [i for i in among if table.found[i].kind == "gdn"]
        held = table.parameters(own, among)
        for context in CONTEXTS:
            value = table.share(own, among, context)
            yield Answer(
                question=f"which share of the squared gradient of all {what} do GDN {what} hold with {context} "
                "contexts?",
                value=value, expected=expected,
                sentence=f"with {context} contexts GDN {what} hold {_said(value)} of the squared gradient of all "
                f"{what}; {number(expected)}, their share by count, lies {_placed(expected, value)} the interval, and "
                f"{number(held)}, their share of the parameters, {_placed(held, value)} it",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """The rank of one matrix's gradient for one segment."""

    piece: Piece
    context: Context
    topic: str
    segment: str
    rank: int
    tokens: int
    limit: int


def _ranked(
    found: Sequence[Piece], measured: Mapping[str, Tensor], objective: Objective, segment: Segment
) -> Iterator[_Ranked]:
    context = objective.config.context
    tokens = bringing_tokens(segment, context)
    for piece in {piece.name: piece for piece in found}.values():  # whole tensors, not their parts
        matrix = measured[piece.name]
        if piece.group in RANKED and piece.mixer and matrix.ndim == 2:
            yield _Ranked(
                piece=piece, context=context, topic=segment.group, segment=segment.id, rank=numerical_rank(matrix),
                tokens=tokens, limit=min(tokens, *matrix.shape),
            )  # fmt: skip


def _rank_rows(ranked: Sequence[_Ranked], seed: int) -> Iterator[RankRow]:
    by: dict[tuple[str, str], list[_Ranked]] = {}
    for found in ranked:
        by.setdefault((found.piece.name, found.context), []).append(found)
    for own in by.values():
        first, topics = own[0], [found.topic for found in own]
        yield RankRow(
            group=first.piece.group, kind=first.piece.kind, layer=first.piece.layer or 0, context=first.context,
            beyond=sum(found.rank > found.limit for found in own),
            **{name: mean([getattr(f, name) for f in own], topics, seed=seed) for name in ("rank", "tokens", "limit")},
        )  # fmt: skip


def _rank_answers(ranked: Sequence[_Ranked], seed: int) -> Iterator[Answer]:
    """Has a gradient at most as many ranks as its decision has tokens?"""
    for group, kind in dict.fromkeys((found.piece.group, found.piece.kind) for found in ranked):
        own = [found for found in ranked if (found.piece.group, found.piece.kind) == (group, kind)]
        sides = {context: [found for found in own if found.context == context] for context in CONTEXTS}
        means = {side: mean([f.rank for f in part], [f.topic for f in part], seed=seed) for side, part in sides.items()}
        limit = float(np.mean([found.limit for found in sides["frozen"]]))
        beyond = len({found.segment for found in sides["frozen"] if found.rank > found.limit})
        yield Answer(
            question=f"has the gradient of {kind} {group} at most as many ranks as there are decision tokens?",
            value=means["frozen"], expected=limit,
            sentence=f"for a single segment the gradient of {kind} {group} has rank {_said(means['frozen'])} with "
            f"frozen contexts, where tokens and sides allow {number(limit)} (exceeded in {beyond} of "
            f"{len({found.segment for found in own})} segments), and {_said(means['full'])} with full ones",
        )  # fmt: skip


def _said(found: Estimate) -> str:
    return estimate(asdict(found))


def _placed(value: float, found: Estimate) -> str:
    if not math.isfinite(found.lower):
        return "neither inside nor outside"
    return "inside" if found.lower <= value <= found.upper else "outside"


def _compared(ahead: Estimate) -> str:
    if not math.isfinite(ahead.lower):
        return "not comparable"
    where = "larger" if ahead.lower > 0 else "smaller" if ahead.upper < 0 else "not clearly different"
    return f"{where}, by {_said(ahead)}"
