"""Maps of the GDN states of a model: one number for each layer and head, alone or before and after.

Layers lie along the horizontal axis, as in every figure of layers, with their kind below the number: a green circle for
GDN, a purple diamond for attention. An attention layer has no state, so its column is grey and says so; a cell that was
not measured is crossed. Signed numbers are blue above zero, white at zero and vermilion below it, on a scale that
reaches equally far both ways; others go from pale yellow to dark blue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures import parts
from analysis.figures.parts import DIVERGING, GLYPHS, KINDS, MUTED, PALE, SEQUENTIAL, TEMPLATE, TITLE, not_measured
from analysis.words import finite, number, reals, safe
from probes.errors import WrongInput

Values = Mapping[int, Iterable[Any]]
"""For each layer that was measured, one number for each head; NaN or None where it is missing."""
SHOWN = 160  # cells up to which every cell holds its number


def state_heatmap(
    values: Values, *, kinds: Sequence[str], title: str, unit: str, diverging: bool = False, head: str = "head"
) -> go.Figure:
    """One number for each layer and head.

    Args:
        values: by layer; layers may have different numbers of heads.
        kinds: "gdn" or "attention" for every layer of the model, from layer 0 on.
        unit: what the numbers are, written above the map.
        diverging: for signed numbers, with white at zero; else the scale runs from the smallest to the largest.
        head: what a row is called, "v_head" for instance.
    """
    table = _table(values, kinds)
    if not _known(table):
        return not_measured(safe(title), "no layer has a value")
    figure = _panels([f"{safe(unit)}, one row for each {safe(head)}"], table, kinds, title=title)
    _map(figure, table, kinds, unit, _limits([table], diverging), diverging, panel=1)
    return _finish(figure, [table], kinds)


def before_after_map(
    before: Values, after: Values, *, kinds: Sequence[str], title: str, unit: str, diverging: bool = False,
    head: str = "head",
) -> go.Figure:  # fmt: skip
    """The same numbers before and after, on one scale, and their difference (after - before) with zero in white.

    Arguments are those of `state_heatmap`. A cell that either lacks has no difference.
    """
    tables = [_table(before, kinds), _table(after, kinds)]
    if not any(map(_known, tables)):
        return not_measured(safe(title), "no layer has a value, before or after")
    rows = max(len(column) for table in tables for column in table)
    tables = [[column + [math.nan] * (rows - len(column)) for column in table] for table in tables]
    change = [[b - a for a, b in zip(*columns, strict=True)] for columns in zip(*tables, strict=True)]
    names = [
        f"<b>before</b>: {safe(unit)}, one row for each {safe(head)}",
        "<b>after</b>, on the same scale",
        "<b>change</b>: after − before, on a scale of its own",
    ]
    figure = _panels(names, change, kinds, title=title)
    scale = _limits(tables, diverging)
    for panel, table in enumerate(tables, 1):
        _map(figure, table, kinds, unit, scale, diverging, panel=panel)
    if _known(change):
        _map(figure, change, kinds, f"change of {unit}", _limits([change], True), True, panel=3)
    else:
        figure.add_heatmap(z=[[None] * len(kinds)] * rows, showscale=False, row=3, col=1)
        parts.absent(figure, (rows - 1) / 2, "no cell has a value both before and after", panel=3)
    return _finish(figure, [*tables, change], kinds)


def _table(values: Values, kinds: Sequence[str]) -> list[list[float]]:
    """One list of heads for each layer, all of one length; NaN where there is nothing."""
    beyond = [layer for layer in values if not 0 <= layer < len(kinds)]
    if beyond:
        raise WrongInput(f"layer {beyond[0]} has values, but kinds names layers 0 to {len(kinds) - 1}")
    columns = [reals(values.get(layer, ())) for layer in range(len(kinds))]
    rows = max(map(len, columns), default=0)
    return [column + [math.nan] * (rows - len(column)) for column in columns]


def _known(table: Sequence[Sequence[float]]) -> list[float]:
    return [value for column in table for value in finite(column)]


def _limits(tables: Sequence[Sequence[Sequence[float]]], diverging: bool) -> tuple[float, float]:
    known = [value for table in tables for value in _known(table)]
    if diverging:
        reach = max(map(abs, known)) or 1.0
        return -reach, reach
    low, high = min(known), max(known)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _panels(names: Sequence[str], table: Sequence[Sequence[float]], kinds: Sequence[str], *, title: str) -> go.Figure:
    """Empty panels, one below the other, with layers along the bottom."""
    n, rows = len(names), max(map(len, table))
    each = max(30 * rows if rows <= 8 else 16 * rows if rows <= 16 else 9 * rows, 90)
    gap, top, bottom = 66, TITLE + 34, 112
    inside = n * each + (n - 1) * gap
    figure = make_subplots(rows=n, cols=1, shared_xaxes=True, vertical_spacing=gap / inside if n > 1 else 0)
    figure.update_layout(template=TEMPLATE, title=safe(title), height=inside + top + bottom, showlegend=True)
    figure.update_layout(margin=dict(t=top, b=bottom, r=72), legend_y=-66 / inside)
    for panel, name in enumerate(names, 1):
        parts.heading(figure, name, panel=panel)
    every = 1 if len(kinds) <= 32 else 4
    words = [
        f"{i if i % every == 0 else ''}<br><span style='color:{KINDS[kind][1]}'>{GLYPHS[kind]}</span>"
        for i, kind in enumerate(kinds)
    ]
    ticks: dict[str, Any] = dict(
        tickvals=list(range(len(kinds))), ticktext=words, tickangle=0, tickfont_size=11, ticks=""
    )
    figure.update_xaxes(**ticks, range=[-0.5, len(kinds) - 0.5], showgrid=False, zeroline=False, showticklabels=True)
    heads = list(range(0, rows, 1 if rows <= 16 else 4))
    figure.update_yaxes(tickvals=heads, range=[rows - 0.5, -0.5], showgrid=False, zeroline=False, tickcolor="white")
    return figure.update_xaxes(title=dict(text="layer", standoff=4), row=n, col=1)


def _map(
    figure: go.Figure, table: Sequence[Sequence[float]], kinds: Sequence[str], unit: str, scale: tuple[float, float],
    diverging: bool, *, panel: int,
) -> None:  # fmt: skip
    """One panel: the cells, grey columns for layers without a state, crosses for what is missing."""
    rows = range(max(map(len, table)))
    low, high = figure.layout[f"yaxis{panel if panel > 1 else ''}"].domain
    cells = [[table[i][row] if math.isfinite(table[i][row]) else None for i in range(len(kinds))] for row in rows]
    few = len(rows) * len(kinds) <= SHOWN
    words = [
        [f"<b>layer {i}, head {row}</b><br>{number(table[i][row])} ({safe(unit)})" for i in range(len(kinds))]
        for row in rows
    ]
    figure.add_heatmap(
        z=cells, zmin=scale[0], zmax=scale[1], zmid=0 if diverging else None, xgap=1, ygap=1, hoverongaps=False,
        colorscale=DIVERGING if diverging else SEQUENTIAL, name=f"panel {panel}", hovertext=words, hoverinfo="text",
        colorbar=dict(len=high - low, y=(low + high) / 2, thickness=12, outlinewidth=0, nticks=5, x=1.01),
        text=[[number(value) if value is not None else "" for value in row] for row in cells] if few else None,
        texttemplate="%{text}" if few else None, textfont_size=11, row=panel, col=1,
    )  # fmt: skip
    for i, kind in enumerate(kinds):
        if kind == "attention" and not finite(table[i]):
            place = dict(x0=i - 0.5, x1=i + 0.5, y0=0, y1=1, **parts.axes(panel, y=" domain"))
            figure.add_shape(type="rect", fillcolor=PALE, line=dict(width=1, color="white"), layer="below", **place)
    holes = [(i, row) for i, row in _holes(table, kinds)]
    figure.add_scatter(
        x=[i for i, _ in holes], y=[row for _, row in holes], mode="markers", showlegend=False, name=f"holes {panel}",
        marker=dict(symbol="x-thin", size=8, color=MUTED, line=dict(width=1.5, color=MUTED)), row=panel, col=1,
        hovertext=[f"<b>layer {i}, head {row}</b><br>not measured" for i, row in holes],
    )  # fmt: skip


def _holes(table: Sequence[Sequence[float]], kinds: Sequence[str]) -> list[tuple[int, int]]:
    """Cells without a value, except in attention layers that have none at all."""
    return [
        (i, row)
        for i, kind in enumerate(kinds)
        if kind == "gdn" or finite(table[i])
        for row, value in enumerate(table[i])
        if not math.isfinite(value)
    ]


def _finish(figure: go.Figure, tables: Sequence[Sequence[Sequence[float]]], kinds: Sequence[str]) -> go.Figure:
    """The legend: what the marks below the layers, the grey columns and the crosses are."""
    for kind, (label, color, symbol) in KINDS.items():
        if kind in kinds:
            empty = kind == "attention" and all(
                not finite(table[i]) for table in tables for i, its in enumerate(kinds) if its == kind
            )
            parts.legend(figure, label + (": has no state (grey column)" if empty else ""), color, symbol)
    if any(_holes(table, kinds) for table in tables):
        parts.legend(figure, "not measured", MUTED, "x-thin")
    return figure
