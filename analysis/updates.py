"""How large, how many-sided and how sparse an update of the weights is, by kind of weight.

Training in place without locks supposes that updates are small, of low rank, or touch few elements. This measures how
far that holds. For W before and W' after, dW = W' - W in float64:

    relative        |dW| / |W|, Frobenius norms
    effective rank  exp of the entropy of the squared singular values divided by their sum: r for r equal ones
    stable rank     |dW|_F^2 / |dW|_2^2, the sum of the squared singular values over the largest
    saved           share of elements with bf16(W + dW) != bf16(W): what a model saved in bfloat16 shows of the update
    in place        share of elements with bf16(bf16(W) + dW) != bf16(W): what is left of the update if the weights
                    themselves are bfloat16, and are rounded to the nearest
    concentrated    the smallest share of elements that holds 90 % of |dW|_F^2
    unchanged       share of elements with dW exactly 0

All are exact descriptions of one update, not estimates: nothing was drawn, so they have no intervals. Ranks come from
the eigenvalues of dW dW^T in float64, which give the squared singular values to 1e-16 of the largest.

The kinds of weights (`pieces`) are read off names and shapes alone, so a state dict is enough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probes.errors import WrongInput
from probes.model import HybridModel
from probes.store import read_result

RESULT = "updates.json"
HELD = 0.9
NEGLIGIBLE = 1e-5  # singular values up to this share of the largest count as none
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_MIXERS = {"linear_attn": "gdn", "self_attn": "attention"}
_NAMES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "in_proj_qkv": "qkv", "in_proj_z": "z",
    "in_proj_b": "b", "in_proj_a": "a", "conv1d": "conv", "out_proj": "out", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "embed_tokens": "embedding", "lm_head": "output",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor, or some of its rows, and what it is for.

    Attributes:
        name: of the tensor. layer: None outside the layers.
        kind: of the layer: gdn or attention; model outside the layers; unknown where no tensor of its mixer is there.
        group: q, k, v, o, q_norm, k_norm; qkv, z, b, a, conv, A_log, dt_bias, out, norm (of the GDN mixer); mlp gate,
            mlp up, mlp down; block norms; embedding, output, final norm; "other" for what is no part of the decoder.
        part: of the rows of qkv: qkv.q, qkv.k or qkv.v. Of those of a q_proj that also makes the output gate, as in
            Qwen3.5: q.query or q.gate. None where the piece is the whole tensor.
        rows: first and last + 1 of each block of rows; empty for the whole tensor.
        elements: how many numbers it has.
    """

    name: str
    layer: int | None
    kind: str
    group: str
    part: str | None
    rows: tuple[tuple[int, int], ...]
    elements: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor of this name."""
        return torch.cat([tensor[start:stop] for start, stop in self.rows]) if self.rows else tensor

    @property
    def mixer(self) -> bool:
        return self.kind in _MIXERS.values() and not self.group.startswith(("mlp", "block"))


def pieces(shapes: Mapping[str, Sequence[int]]) -> tuple[Piece, ...]:
    """What the tensors of a decoder are for; together they hold each element once.

    Qwen3.5's q_proj makes a query and an output gate of each head, its rows alternate between both; in_proj_qkv makes
    q, k and v of all heads, one after the other.
    """
    kinds: dict[str, str] = {}
    for name in shapes:
        for mixer, kind in _MIXERS.items():
            before, found, _ = name.partition(f".{mixer}.")
            if found:
                kinds[before] = kind
    return tuple(piece for name in shapes for piece in _divided(name, shapes, kinds))


def _divided(name: str, shapes: Mapping[str, Sequence[int]], kinds: Mapping[str, str]) -> Iterator[Piece]:
    shape, found = shapes[name], _LAYER.search(name)
    if not found:
        module = next((part for part in reversed(name.split(".")) if part not in ("weight", "bias")), name)
        group = "final norm" if module == "norm" else _NAMES.get(module, "other")
        yield _piece(name, shape, layer=None, kind="model", group=group)
        return
    where = {"layer": int(found[1]), "kind": kinds.get(name[: found.start(2) - 1], "unknown")}
    parent, _, rest = found[2].partition(".")
    module = rest.removesuffix(".weight").removesuffix(".bias")
    if parent not in (*_MIXERS, "mlp"):
        yield _piece(name, shape, **where, group="block norms")
        return
    group = ("mlp " if parent == "mlp" else "") + _NAMES.get(module, module)
    prefix, ending = name.rpartition(f"{module}.")[0], name.rpartition(".")[2]
    if group == "qkv" and (out := shapes.get(f"{prefix}out_proj.weight")):
        keys = (shape[0] - out[1]) // 2
        for part, start, stop in (("q", 0, keys), ("k", keys, 2 * keys), ("v", 2 * keys, shape[0])):
            yield _piece(name, shape, **where, group=group, part=f"qkv.{part}", rows=((start, stop),))
        return
    out, head = shapes.get(f"{prefix}o_proj.{ending}"), shapes.get(f"{prefix}q_norm.weight")
    if group == "q" and len(shape) == 2 and out and head and shape[0] == 2 * out[1]:
        for i, part in enumerate(("query", "gate")):
            rows = tuple((start, start + head[0]) for start in range(i * head[0], shape[0], 2 * head[0]))
            yield _piece(name, shape, **where, group=group, part=f"q.{part}", rows=rows)
        return
    yield _piece(name, shape, **where, group=group)


def _piece(
    name: str, shape: Sequence[int], *, layer: int | None, kind: str, group: str, part: str | None = None,
    rows: tuple[tuple[int, int], ...] = (),
) -> Piece:  # fmt: skip
    height = sum(stop - start for start, stop in rows) if rows else (shape[0] if shape else 1)
    return Piece(
        name=name, layer=layer, kind=kind, group=group, part=part, rows=rows,
        elements=height * math.prod(shape[1:]),
    )  # fmt: skip


def parts_of(all_pieces: Sequence[Piece]) -> dict[tuple[str, str], list[int]]:
    """By (group, kind) its pieces' numbers, and by (part, kind) those of its parts, each after its whole."""
    kinds = list(dict.fromkeys((piece.group, piece.kind) for piece in all_pieces))
    found: dict[tuple[str, str], list[int]] = {}
    for group, kind in kinds:
        own = [i for i, piece in enumerate(all_pieces) if (piece.group, piece.kind) == (group, kind)]
        found[group, kind] = own
        for part in dict.fromkeys(all_pieces[i].part for i in own):
            if part:
                found[part, kind] = [i for i in own if all_pieces[i].part == part]
    return found


def spectrum(matrix: Float[Tensor, "row column"]) -> Float[Tensor, " side"]:
    """Squared singular values, float64, largest first; exact to about 1e-16 of the largest, never below 0."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp(min=0)


def numerical_rank(matrix: Float[Tensor, "row column"]) -> int:
    """Singular values above `NEGLIGIBLE` of the largest; 0 for a matrix of zeros."""
    squares = spectrum(matrix)
    return int((squares > NEGLIGIBLE**2 * squares[0]).sum())


@dataclass(frozen=True, kw_only=True)
class UpdateRow:
    """The update of one kind of weight; see the module's docstring.

    Attributes:
        group, kind: as in `Piece`; a part such as qkv.k follows its whole.
        tensors, elements: how many. norm: |dW|_F.
        effective_rank, stable_rank, full_rank: mean over the group's matrices that changed, where one with parts (qkv,
            q) counts as a matrix for each part; None where no matrix changed (norms, convolutions and vectors are
            none).
    """

    group: str
    kind: str
    tensors: int
    elements: int
    norm: float
    relative: float
    saved: float
    in_place: float
    concentrated: float
    unchanged: float
    effective_rank: float | None
    stable_rank: float | None
    full_rank: float | None


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What changed between two sets of weights: one row a kind of weight, and the same numbers for all of them."""

    rows: tuple[UpdateRow, ...]
    overall: UpdateRow

    def frame(self) -> pd.DataFrame:
        """One row for each kind of weight, and one for all."""
        return pd.DataFrame([asdict(row) for row in (*self.rows, self.overall)])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Updates:
        """From plain values, as `as_dict` gives them, also after JSON.

        Raises:
            WrongInput: they are something else.
        """
        try:
            rows = tuple(_row(part) for part in data["rows"])
            return cls(rows=rows, overall=_row(data["overall"]))
        except (KeyError, TypeError) as error:
            raise WrongInput(f"these are not updates: {error}") from error

    def __str__(self) -> str:
        found = self.overall
        if found.norm == 0:
            return f"no weight changed, of {found.elements:,}"
        ranks = ""
        if found.effective_rank is not None and found.full_rank is not None:
            ranks = (
                f"; effective rank {found.effective_rank:.3g} of {found.full_rank:.3g}, a mean over those that changed"
            )
        return (
            f"weights moved by {found.relative:.2%} of their norm{ranks}; {found.concentrated:.0%} of the elements "
            f"hold {HELD:.0%} of it, {found.unchanged:.0%} are unchanged, and {found.in_place:.0%} would move in "
            "bfloat16"
        )


def _row(data: Mapping[str, Any]) -> UpdateRow:
    gone = {name: math.nan for name in ("norm", "relative") if data[name] is None}  # JSON has neither NaN nor infinity
    return UpdateRow(**{**data, **gone})


def open_updates(path: str | Path) -> Updates:
    """Read `updates.json`, from the file or its folder.

    Raises:
        WrongInput: it is missing or something else.
    """
    data = read_result(path, RESULT)
    try:
        return Updates.of(data)
    except WrongInput as error:
        raise WrongInput(f"{path}: {error}") from error


def snapshot(model: HybridModel) -> dict[str, Tensor]:
    """A copy of all parameters on the CPU, in their dtype; a tied output layer is there once, as the embedding."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.hf.named_parameters()}


def updates(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Updates:
    """Measure the update from one set of weights to another: `snapshot`s or state dicts, of any float dtype.

    Tensors that are not of a float dtype are left out. W is compared in float64; `relative` is infinite where weights
    of zeros changed.

    Raises:
        WrongInput: they differ in names or shapes, or a weight is not finite.
    """
    _check(before, after)
    names = [name for name, tensor in before.items() if tensor.is_floating_point()]
    if not names:
        raise WrongInput("there are no weights of a float dtype to compare")
    found = pieces({name: tuple(before[name].shape) for name in names})
    measured = [_measured(piece, before[piece.name], after[piece.name]) for piece in found]
    rows = [_summed(group, kind, [measured[i] for i in own]) for (group, kind), own in parts_of(found).items()]
    return Updates(rows=tuple(rows), overall=_summed("all", "all", measured))


def _check(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    if differing := sorted(before.keys() ^ after.keys()):
        side = "before" if differing[0] in before else "after"
        raise WrongInput(f"the weights differ in names: {differing[0]} is only in those {side}")
    for name, tensor in before.items():
        if tensor.shape != after[name].shape:
            raise WrongInput(f"{name} is {list(tensor.shape)} before and {list(after[name].shape)} after")
        for side, values in (("before", tensor), ("after", after[name])):
            if not bool(values.isfinite().all()):
                raise WrongInput(f"{int((~values.isfinite()).sum())} values of {name} {side} are not finite")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """Of one piece: its name and counts, squared norms, squared elements of the update, and ranks of a matrix."""

    name: str
    counts: dict[str, int]
    size: float
    squares: Tensor
    ranks: tuple[float, float, int] | None


def _measured(piece: Piece, before: Tensor, after: Tensor) -> _Measured:
    before, after = piece.of(before.detach().cpu()), piece.of(after.detach().cpu())
    change = after.double() - before.double()
    low = before.bfloat16()
    counts = {
        "saved": int((after.bfloat16() != low).sum()),
        "in_place": int(((low.double() + change).bfloat16() != low).sum()),
        "unchanged": int((change == 0).sum()),
    }
    ranks = None
    if change.ndim == 2 and bool(change.any()):
        values = spectrum(change)
        effective = float(torch.special.entr(values / values.sum()).sum().exp())
        ranks = effective, float(values.sum() / values[0]), len(values)
    return _Measured(
        name=piece.name, counts=counts, size=float(before.double().square().sum()),
        squares=change.square().flatten(), ranks=ranks,
    )  # fmt: skip


def _summed(group: str, kind: str, parts: Sequence[_Measured]) -> UpdateRow:
    squares = torch.cat([part.squares for part in parts])
    total, size, elements = float(squares.sum()), sum(part.size for part in parts), squares.numel()
    matrices = [part.ranks for part in parts if part.ranks]
    means = np.array(matrices, dtype=np.float64).mean(0).tolist() if matrices else (None, None, None)
    held = squares.sort(descending=True).values.cumsum(0)
    needed = int((held < HELD * float(held[-1])).sum()) + 1 if total > 0 else 0
    return UpdateRow(
        group=group, kind=kind, tensors=len({part.name for part in parts}), elements=elements, norm=math.sqrt(total),
        relative=math.sqrt(total / size) if size > 0 else (math.inf if total > 0 else 0.0),
        **{name: sum(part.counts[name] for part in parts) / elements for name in ("saved", "in_place", "unchanged")},
        concentrated=needed / elements, effective_rank=means[0], stable_rank=means[1], full_rank=means[2],
    )  # fmt: skip
