"""Figures along the tokens of one prompt: what a direction reads at each, and what one of them looks back at.

Tokens are written as they are, with spaces and line ends made visible; their text is escaped. Shares of one number as
coloured text are in `analysis.figures.text`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures import parts
from analysis.figures.parts import (
    DIVERGING,
    GLYPHS,
    INK,
    KINDS,
    LINES,
    MUTED,
    PALE,
    SEQUENTIAL,
    TEMPLATE,
    TITLE,
    not_measured,
)
from analysis.words import finite, lines, number, reals, safe
from probes.errors import WrongInput

Spans = Mapping[str, tuple[int, int]]
"""Named stretches of a prompt: (start, stop) in tokens, stop exclusive."""
TICKS = 48  # tokens up to which each is written below the axis


def visible(token: str) -> str:
    """A token with its spaces and line ends made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")


def readout_trajectories(
    values: Mapping[str, Iterable[Any]], tokens: Sequence[str], *, title: str, unit: str, spans: Spans | None = None
) -> go.Figure:
    """What a direction reads along the tokens of one prompt: one line for each head or layer.

    Args:
        values: by name of the line, one number for each token; NaN or None where it was not measured.
        tokens: the prompt's tokens as text.
        unit: what the numbers are.
        spans: stretches to shade and name.
    """
    drawn = {name: fitting(name, row, tokens) for name, row in values.items()}
    if not any(finite(row) for row in drawn.values()):
        return not_measured(safe(title), "no token has a value")
    spans = spans or {}
    figure = parts.heading(parts.blank(safe(title), height=460), safe(unit))
    for i, (name, row) in enumerate(drawn.items()):
        color, (dash, symbol) = LINES[i % len(LINES)], _STROKES[i // len(LINES) % len(_STROKES)]
        figure.add_scatter(
            x=list(range(len(tokens))), y=row, mode="lines+markers", name=safe(name), connectgaps=False,
            line=dict(color=color, width=2, dash=dash), marker=dict(size=6, color=color, symbol=symbol),
            hovertext=_words(name, row, tokens, unit),
        )  # fmt: skip
    for i, (name, (start, stop)) in enumerate(spans.items()):
        shade = dict(x0=start - 0.5, x1=stop - 0.5, y0=0, y1=1, **parts.axes(1, y=" domain"))
        figure.add_shape(
            type="rect", fillcolor=PALE, opacity=0.55 if i % 2 == 0 else 0.25, line_width=0, layer="below", **shade
        )
        parts.label(figure, (start + stop - 1) / 2, 1.0, f"<b>{safe(name)}</b>", anchor=("center", "top"), domain=True)
    low, high = parts.span(value for row in drawn.values() for value in row)
    figure.update_yaxes(range=[low, high + (0.12 * (high - low) if spans else 0)], zeroline=True)
    figure.update_layout(showlegend=True, legend=dict(orientation="v", x=1.01, y=1, yanchor="top", font_size=12))
    _tokens(figure, tokens)
    missing = [name for name, row in drawn.items() if len(finite(row)) < len(tokens)]
    return parts.unmeasured(figure, [f"{safe(name)} at some tokens" for name in missing])


def implicit_attention_beside(
    gdn: Mapping[str, Iterable[Any]], attention: Mapping[str, Iterable[Any]], tokens: Sequence[str], *, query: int,
    title: str = "What one token looks back at", unit: str = "weight",
) -> go.Figure:  # fmt: skip
    """Implicit attention of GDN layers above full attention of attention layers, for one query token of one prompt.

    Implicit weights have either sign and no fixed sum, so they have a scale with white at zero; attention weights lie
    between 0 and 1 and sum to 1. Tokens after the query cannot be seen by it and stay grey.

    Args:
        gdn: by name of the row ("layer 0 head 1"), the weight of each token's value in the query's output; see
            `probes.attribution.ImplicitAttention.weights`.
        attention: likewise, softmax weights.
        tokens: the prompt's tokens as text; query: the index of the token that looks back.
        unit: what the implicit weights are.
    """
    if not 0 <= query < len(tokens):
        raise WrongInput(f"query {query} is not one of {len(tokens)} tokens")
    found = [{name: fitting(name, row, tokens) for name, row in rows.items()} for rows in (gdn, attention)]
    if not any(finite(row[: query + 1]) for rows in found for row in rows.values()):
        return not_measured(safe(title), "no weight is known")
    sizes = [max(30 * len(rows) if len(rows) <= 12 else 15 * len(rows), 60) for rows in found]
    gap, top, bottom = 74, TITLE + 62, 120
    inside = sum(sizes) + gap
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=gap / inside, row_heights=[size / inside for size in sizes]
    )
    height = inside + top + bottom
    figure.update_layout(template=TEMPLATE, title=safe(title), height=height, margin=dict(t=top, b=bottom, r=72))
    asked = f"the query: token {query}, {safe(visible(tokens[query]))}"
    mark = {kind: f"<span style='color:{KINDS[kind][1]}'>{glyph}</span>" for kind, glyph in GLYPHS.items()}
    names = (
        f"boxed: {asked}<br>{mark['gdn']} <b>GDN layers</b>: implicit attention ({safe(unit)}), signed",
        f"{mark['attention']} <b>attention layers</b>: full attention, the weights of a row sum to 1",
    )
    for panel, (rows, name) in enumerate(zip(found, names, strict=True), 1):
        parts.heading(figure, name, panel=panel)
        signed, known = panel == 1, [value for row in rows.values() for value in finite(row[: query + 1])]
        if not known:
            figure.add_heatmap(z=[[None] * len(tokens)], showscale=False, hoverinfo="skip", row=panel, col=1)
            figure.update_yaxes(showticklabels=False, row=panel, col=1)
            parts.absent(figure, 0, "no such layer was looked at", panel=panel)
            continue
        reach = max(map(abs, known)) or 1.0
        _look(
            figure,
            rows,
            tokens,
            query,
            panel,
            reach if signed else max(reach, 1e-9),
            signed,
            unit if signed else "weight",
        )
    _tokens(figure, tokens, panel=2)
    return figure


_STROKES = (("solid", "circle"), ("dash", "diamond"), ("dot", "square"), ("dashdot", "triangle-up"))


def fitting(name: str, row: Iterable[Any], tokens: Sequence[str]) -> list[float]:
    """A row as numbers, NaN where there is none.

    Raises:
        WrongInput: there is not one for each token.
    """
    values = reals(row)
    if len(values) != len(tokens):
        raise WrongInput(f"{name} has {len(values)} values for {len(tokens)} tokens")
    return values


def _words(name: str, row: Sequence[float], tokens: Sequence[str], unit: str) -> list[str]:
    """What each token's mark says when it is pointed at."""
    return [
        lines(f"<b>{safe(name)}</b>", f"token {t}: {safe(visible(token))}", f"{number(value)} ({safe(unit)})")
        for t, (token, value) in enumerate(zip(tokens, row, strict=True))
    ]


def _tokens(figure: go.Figure, tokens: Sequence[str], *, panel: int | None = None) -> None:
    """Tokens as tick labels; with many of them some are left out, and said to be."""
    every = math.ceil(len(tokens) / TICKS) if tokens else 1
    at = list(range(0, len(tokens), every))
    shown = [visible(tokens[t]) for t in at]
    words = [safe(text if len(text) <= 14 else f"{text[:13]}…") for text in shown]
    figure.update_xaxes(range=[-0.5, len(tokens) - 0.5], zeroline=False, showgrid=False)
    said = "tokens of the prompt" + (f" (every {every}th is written)" if every > 1 else "")
    last: dict[str, Any] = dict(row=panel, col=1) if panel else {}
    figure.update_xaxes(tickvals=at, ticktext=words, tickangle=-60, tickfont_size=11, title=said, **last)


def _look(
    figure: go.Figure, rows: Mapping[str, list[float]], tokens: Sequence[str], query: int, panel: int, reach: float,
    signed: bool, unit: str,
) -> None:  # fmt: skip
    names, low = list(rows), -reach if signed else 0.0
    cells = [
        [value if t <= query and math.isfinite(value) else None for t, value in enumerate(row)] for row in rows.values()
    ]
    words = [_words(name, row, tokens, unit) for name, row in rows.items()]
    start, stop = figure.layout[f"yaxis{panel if panel > 1 else ''}"].domain
    bar = dict(len=max(stop - start, 0.3), y=(start + stop) / 2, thickness=12, x=1.01, outlinewidth=0, nticks=5)
    figure.add_heatmap(
        z=cells, zmin=low, zmax=reach, zmid=0 if signed else None, colorscale=DIVERGING if signed else SEQUENTIAL,
        xgap=1, ygap=1, hoverongaps=False, hovertext=words, hoverinfo="text", name="implicit" if signed else "full",
        colorbar=bar, row=panel, col=1,
    )  # fmt: skip
    labels = [safe(name) for name in names]
    ticks: dict[str, Any] = dict(tickvals=list(range(len(names))), ticktext=labels, tickcolor="white")
    figure.update_yaxes(**ticks, range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False, row=panel, col=1)
    place = parts.axes(panel, y=" domain")
    box = dict(x0=query - 0.5, x1=query + 0.5, y0=0, y1=1, **place)
    figure.add_shape(type="rect", line=dict(color=INK, width=2), fillcolor="rgba(0,0,0,0)", **box)
    if query + 1 < len(tokens):
        later = dict(x0=query + 0.55, x1=len(tokens) - 0.5, y0=0, y1=1, **place)
        figure.add_shape(type="rect", fillcolor=PALE, opacity=0.6, line_width=0, layer="below", **later)
        middle = (query + len(tokens)) / 2
        parts.label(figure, middle, 0.5, "later tokens", anchor=("center", "middle"), panel=panel, domain=True)
    holes = [
        (t, y) for y, row in enumerate(rows.values()) for t, v in enumerate(row[: query + 1]) if not math.isfinite(v)
    ]
    if holes:
        figure.add_scatter(
            x=[t for t, _ in holes], y=[y for _, y in holes], mode="markers", showlegend=False, name=f"holes {panel}",
            marker=dict(symbol="x-thin", size=8, color=MUTED, line=dict(width=1.5, color=MUTED)), row=panel, col=1,
            hovertext=["not measured"] * len(holes),
        )  # fmt: skip
        parts.heading(figure, "× not measured", panel=panel).layout.annotations[-1].update(
            x=1, xanchor="right", xshift=0
        )
