"""What the last prompt token has before it: how much of it the tokens of the direction make up.

For each layer, a share of the tokens in a span:

    state      of the squared norm of the final GDN state (`probes.attribution.attribute_state`)
    readout    of the squared norm of what the last prompt token reads from it (`attribute_output`)
    attention  of the softmax weights of the last prompt token

The first two are exact and add up to 1 over all tokens, but single shares have either sign. A share depends on how long
a span is and, since states fade, on how far back it lies; so the direction is held against spans of equal length in the
context before it, and what counts is how the difference (*excess*) changes from one checkpoint to the other. There are
two nulls: each control span takes the direction's place and is held against the other controls; and the change of the
weights has its signs redrawn (`analysis.alignment.redrawn`), since any change of the weights moves shares a little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analysis.alignment import corrected
from analysis.states import Change, Topics
from probes.attribution import Attribution, attribute_output, attribute_state, over_spans
from probes.capture import RECURRENCE, recurrences
from probes.prompts import Prompt, Span
from probes.recurrence import left_padded
from probes.stats import derived_seed
from probes.store import Capture

ShareKind = Literal["state", "readout", "attention"]


@dataclass(frozen=True, kw_only=True)
class ShareRow:
    """The share of the direction's tokens, before and after.

    Attributes:
        layer: None for the mean over layers. head: None for all heads of a layer together.
        direction, control: shares of the direction and, on average, of spans of equal length before it.
        excess: direction minus control.
        controls: changes of the excess of control spans, one for each that takes the direction's place.
        updates: changes of the direction's excess under redrawn changes of the weights.
        bar: what both nulls stay below: the largest of the controls, and the updates' at `confidence`, corrected: of
            all layers over the three kinds, of one layer or head over all layers and heads of its kind.
    """

    kind: ShareKind
    layer: int | None
    head: int | None
    direction: Change
    control: Change
    excess: Change
    controls: tuple[float, ...]
    updates: tuple[float, ...]
    bar: float

    @property
    def shown(self) -> bool:
        """Whether the excess changed: clear of zero, and by more than the nulls."""
        found = self.excess.change
        return (found.lower > 0 or found.upper < 0) and abs(found.value) > self.bar

    def __str__(self) -> str:
        where = "all layers" if self.layer is None else f"layer {self.layer}"
        where += "" if self.head is None else f" head {self.head}"
        return f"{self.kind} {where}: direction {self.direction}; excess {self.excess}, nulls within ±{self.bar:.2g}"


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The direction of each prompt that has room for controls, and the controls.

    Attributes:
        kept: the prompts whose context is as long as their direction at least; the others are left out.
        spans: for each of these the direction, then its controls.
    """

    kept: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]


def control_spans(prompts: Sequence[Prompt], *, count: int, seed: int = 0) -> Spans:
    """Draw spans as long as the direction from the context before it, with repetition where it is short."""
    rng = np.random.default_rng(derived_seed(seed, "control spans"))
    kept, spans = [], []
    for i, prompt in enumerate(prompts):
        start, stop = prompt.spans["direction"]
        length, room = stop - start, prompt.spans["context"][1] - prompt.spans["context"][0]
        if not 0 < length <= room:
            continue
        begins = rng.integers(0, room - length + 1, count).tolist()
        kept.append(i)
        spans.append(((start, stop), *((begin, begin + length) for begin in begins)))
    return Spans(kept=tuple(kept), spans=tuple(spans))


Table = dict[tuple[ShareKind, int], Float[Tensor, "prompt head span"]]


def span_shares(record: Capture, found: Spans) -> Table:
    """Shares by kind and layer; the last entry along the heads' axis is all heads together."""
    table: Table = {}
    if not found.kept:
        return table
    kept = list(found.kept)
    if set(RECURRENCE) <= set(record.sites):
        for layer in record.layers("gdn.k"):
            x, mask = left_padded(recurrences(record, layer=layer))
            last = torch.full((len(mask), 1), x.tokens - 1)
            padding = (x.tokens - mask.sum(1)).long().tolist()
            spans = [
                [(start + padding[i], stop + padding[i]) for start, stop in row]
                for i, row in zip(kept, found.spans, strict=True)
            ]
            both: tuple[tuple[ShareKind, Attribution], ...] = (
                ("state", attribute_state(x, at=last)),
                ("readout", attribute_output(x, rows=last)),
            )
            for kind, parts in both:
                tokens, whole = parts.tokens[kept, 0], parts.whole[kept, 0]
                tokens = torch.cat([tokens, tokens.sum(1, keepdim=True)], 1)
                whole = torch.cat([whole, whole.sum(1, keepdim=True)], 1)
                table[kind, layer] = (over_spans(tokens, spans) / whole[..., None]).double()
    if "attn.pattern" in record.sites:
        for layer in record.layers("attn.pattern"):
            patterns = record["attn.pattern", layer]
            rows = []
            for i, row in zip(kept, found.spans, strict=True):
                mass = over_spans(patterns[i][None], [row])[0]
                rows.append(torch.cat([mass, mass.mean(0, keepdim=True)]))
            table["attention", layer] = torch.stack(rows).double()
    return table


Means = dict[tuple[ShareKind, int], Float[Tensor, " head"]]


def mean_excess(table: Table) -> Means:
    """The direction's share minus its controls', as a mean over prompts."""
    return {key: (shares[..., 0] - shares[..., 1:].mean(-1)).mean(0) for key, shares in table.items()}


def share_rows(
    topics: Topics, found: Spans, before: Table, after: Table, redrawn: Sequence[Means]
) -> tuple[ShareRow, ...]:
    """How shares changed: for each kind all layers together first, then layers, then heads.

    `redrawn` has the excess of redrawn changes of the weights, for the null.
    """
    if not found.kept:
        return ()
    chosen, start = topics.where(found.kept), mean_excess(before)
    kinds: tuple[ShareKind, ...] = ("state", "readout", "attention")
    whole: dict[Place, _Part] = {}
    rows: list[ShareRow] = []
    for kind in kinds:
        layers = [layer for name, layer in before if name == kind]
        if not layers:
            continue
        count = before[kind, layers[0]].shape[1]  # the last is all heads together
        parts: dict[Place, _Part] = {}
        for head in (None, *range(count - 1)):
            at = count - 1 if head is None else head
            for layer in layers:
                drawn = [float(each[kind, layer][at] - start[kind, layer][at]) for each in redrawn]
                sides = before[kind, layer][:, at], after[kind, layer][:, at]
                parts[kind, layer, head] = _Part(*sides, np.array(drawn))
        every = [parts[kind, layer, None] for layer in layers]
        whole[kind, None, None] = _Part(
            torch.stack([part.before for part in every]).mean(0),
            torch.stack([part.after for part in every]).mean(0),
            np.mean([part.drawn for part in every], 0),
        )
        rows += _rows(chosen, parts)
    headlines = _rows(chosen, whole)
    return tuple(row for top in headlines for row in (top, *(row for row in rows if row.kind == top.kind)))


Place = tuple[ShareKind, int | None, int | None]  # kind, layer, head


@dataclass(frozen=True)
class _Part:
    """Shares [prompt span] on both sides, the direction's first; and the changes of its excess in the null."""

    before: Tensor
    after: Tensor
    drawn: NDArray[np.float64]


def _rows(topics: Topics, parts: Mapping[Place, _Part]) -> list[ShareRow]:
    """Rows of one family, whose null is corrected over all of them."""
    found, excess = [], {}
    for place, part in parts.items():
        (own, control), (later, later_control) = ((one[:, 0], one[:, 1:].mean(1)) for one in (part.before, part.after))
        excess[place] = topics.change(own - control, later - later_control)
        found.append((place, topics.change(own, later), topics.change(control, later_control)))
    real = {place: change.change.value for place, change in excess.items()}
    _, bars = corrected(real, {place: part.drawn for place, part in parts.items()}, confidence=topics.confidence)
    rows = []
    for place, direction, control in found:
        moved = (parts[place].after - parts[place].before)[:, 1:]
        count = moved.shape[1]  # each control against the mean of the others
        controls = ((moved - moved.mean(1, keepdim=True)) * count / (count - 1)).mean(0)
        kind, layer, head = place
        rows.append(
            ShareRow(
                kind=kind, layer=layer, head=head, direction=direction, control=control, excess=excess[place],
                controls=tuple(controls.tolist()), updates=tuple(parts[place].drawn.tolist()),
                bar=max(float(controls.abs().max()), bars[place]),
            )
        )  # fmt: skip
    return rows
