"""The look of every figure, and the marks that all of them are made of. Nothing here knows what is drawn.

The rules:

- One colour, one meaning: blue is the direction under test and the wanted side, vermilion the unwanted side and what
  goes wrong, grey whatever means nothing (random directions, no steering), green and purple are GDN and attention
  layers. Shape, position or words repeat each of them, and the colours are from palettes for colour-blind readers.
- In maps, blue is above zero and vermilion below it, with white at zero; what has no sign goes from pale to dark.
- An estimate has its interval, an effect its zero line, an axis its unit. Propensity and effects are in nats of the
  log-odds wanted/unwanted, doses in units of the typical norm at their site.
- What was not measured is said in the figure, with the reason. What does not fit a scale is clipped with a mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from analysis.words import Numbers, estimate, finite, lines, number, real

INK, MUTED, GRID, PALE = "#1f2430", "#566070", "#e6e8ec", "#d3d7dd"
TARGET, WRONG, NOISE = "#0072b2", "#d55e00", "#8b929c"
KINDS = {"gdn": ("GDN layer", "#009e73", "circle"), "attention": ("attention layer", "#aa4499", "diamond")}
GLYPHS = {"gdn": "●", "attention": "◆"}  # the symbols above as characters
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
POSITIVE, NEGATIVE = TARGET, WRONG
DIVERGING = [[0.0, "#b34700"], [0.25, "#f0a070"], [0.5, "#ffffff"], [0.75, "#7fb8dc"], [1.0, "#005a91"]]
SEQUENTIAL = [[0.0, "#fffbdd"], [0.25, "#c3e4c4"], [0.5, "#5bb6c1"], [0.75, "#2673ac"], [1.0, "#14296b"]]
LINES = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#8a6d00", "#56b4e9", "#1f2430"]  # for lines that are told apart
NATS = "nats of log-odds wanted/unwanted"
TITLE = 44  # pixels that a title takes

_AXIS = dict(
    gridcolor=GRID, linecolor=PALE, tickcolor=PALE, ticks="outside", ticklen=4, zerolinecolor=MUTED, zerolinewidth=1.2,
    title_font_size=12.5, title_standoff=10, automargin=True,
)  # fmt: skip
TEMPLATE = go.layout.Template(
    layout=dict(
        font=dict(family=FONT, size=12.5, color=INK), margin=dict(l=48, r=24, t=TITLE + 28, b=52), dragmode=False,
        title=dict(font_size=16, x=0.005, xref="container", xanchor="left", yref="container", y=0.97, yanchor="top"),
        paper_bgcolor="white", plot_bgcolor="white", colorway=[TARGET, WRONG, NOISE], hovermode="closest",
        hoverlabel=dict(bgcolor="white", bordercolor=PALE, font=dict(color=INK, size=12.5), align="left"),
        legend=dict(orientation="h", x=0, y=-0.2, yanchor="top", itemclick=False, itemdoubleclick=False),
        xaxis=_AXIS, yaxis=_AXIS,
    ),
    data=dict(scatter=[dict(hoverinfo="text", cliponaxis=False)], bar=[dict(hoverinfo="text")]),
)  # fmt: skip


def blank(title: str, *, height: int) -> go.Figure:
    return go.Figure(layout=dict(template=TEMPLATE, title=title, height=height))


def rows(title: str, labels: Sequence[str], unit: str) -> go.Figure:
    """A figure with one row for each label, from top to bottom, and a common horizontal axis."""
    figure = blank(title, height=150 + 58 * len(labels)).update_layout(showlegend=False)
    ticks, around = list(range(len(labels))), [len(labels) - 0.5, -0.5]
    figure.update_yaxes(tickvals=ticks, ticktext=list(labels), range=around, showgrid=False, zeroline=False, ticks="")
    return figure.update_xaxes(title=unit, zeroline=True)


def point(
    figure: go.Figure, y: int, seen: Numbers, color: str, what: str, *,
    symbol: str = "circle", unit: str = "nats", mark: str = "",
) -> None:  # fmt: skip
    """One estimate in a row: a large mark with its interval and its value written above it."""
    if not finite([seen["value"]]):
        absent(figure, y, "no value")
        return
    words = lines(what, f"{estimate(seen)} {unit}", f"{seen['n']} prompts in {seen['groups']} topics")
    figure.add_scatter(
        x=[seen["value"]], y=[y], mode="markers+text", marker=dict(size=12, color=color, symbol=symbol), name=what,
        error_x=bars([seen], color), text=[f"<b>{number(seen['value'])}{mark}</b>"], textposition="top center",
        hovertext=[words],
    )  # fmt: skip


def dots(figure: go.Figure, y: int, values: Sequence[float], words: Sequence[str], name: str) -> None:
    """Many values in a row, spread a little so that each can be seen."""
    if not values:
        absent(figure, y, "none were run")
        return
    spread = [y + 0.5 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]
    marker = dict(size=8, color=NOISE, opacity=0.75, line=dict(width=0.5, color="white"))
    figure.add_scatter(x=list(values), y=spread, mode="markers", marker=marker, name=name, hovertext=list(words))


def axes(panel: int, *, x: str = "", y: str = "") -> dict[str, Any]:
    """Where coordinates count from: a panel's axes, or with " domain" its width or height from 0 to 1."""
    n = "" if panel == 1 else panel
    return dict(xref=f"x{n}{x}", yref=f"y{n}{y}")


def heading(figure: go.Figure, text: str, *, panel: int = 1) -> go.Figure:
    """What the vertical axis measures, written above it: it is read without turning the head and never cut off."""
    place = dict(x=0, y=1, xanchor="left", yanchor="bottom", xshift=-44, yshift=8)
    place |= axes(panel, x=" domain", y=" domain")
    return figure.add_annotation(text=text, align="left", showarrow=False, font_size=12.5, **place)


def line(figure: go.Figure, axis: str, at: float, *, color: str = INK, dash: str = "dash", panel: int = 1) -> None:
    """A straight line across one panel at a place on the "x" or "y" axis."""
    place = dict(x0=at, x1=at, y0=0, y1=1, **axes(panel, y=" domain"))
    if axis == "y":
        place = dict(x0=0, x1=1, y0=at, y1=at, **axes(panel, x=" domain"))
    figure.add_shape(type="line", line=dict(color=color, width=1.2, dash=dash), **place)


def label(
    figure: go.Figure, x: float, y: float, text: str, *, anchor: tuple[str, str], panel: int = 1, domain: bool = False
) -> None:
    """Words at a place in the plot, where a legend would send the eye away; with `domain`, y runs from 0 to 1."""
    place = dict(x=x, y=y, xanchor=anchor[0], yanchor=anchor[1], **axes(panel, y=" domain" if domain else ""))
    figure.add_annotation(text=text, showarrow=False, font_size=12, **place)


def limit(figure: go.Figure, x: float | None, text: str, span: Sequence[float]) -> go.Figure:
    """Set the span of the horizontal axis and draw a threshold, with its words above the plot and inside its width."""
    if x is not None and math.isfinite(x):
        line(figure, "x", x)
        where = (x - span[0]) / (span[1] - span[0])
        side = "left" if where < 0.3 else "right" if where > 0.7 else "center"
        label(figure, x, 1.0, text, anchor=(side, "bottom"), domain=True)
    return figure.update_xaxes(range=list(span))


def absent(figure: go.Figure, y: float, why: str, *, panel: int = 1) -> None:
    """Say inside a row that it has no value, and why."""
    place, font = dict(x=0.02, y=y, xanchor="left", **axes(panel, x=" domain")), dict(size=12, color=MUTED)
    figure.add_annotation(text=f"not measured: {why}", showarrow=False, font=font, bgcolor="white", **place)


def unmeasured(figure: go.Figure, missing: Sequence[str], *, panel: int = 1) -> go.Figure:
    """Name inside the plot what has no value, instead of leaving a silent gap."""
    if missing:
        words = f"not measured: {', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}"
        place = dict(x=1, y=0, xanchor="right", yanchor="bottom", **axes(panel, x=" domain", y=" domain"))
        figure.add_annotation(text=words, showarrow=False, font=dict(size=12, color=MUTED), bgcolor="white", **place)
    return figure


def legend(figure: go.Figure, label: str, color: str, symbol: str) -> None:
    """An entry of the legend without data, so that its mark does not depend on which point comes first."""
    marker = dict(size=11, color=color, symbol=symbol, line=dict(width=2, color=color))
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=label)


def bars(estimates: Sequence[Numbers], color: str) -> dict[str, Any]:
    """Error bars from value, lower and upper."""
    up = [real(e["upper"]) - real(e["value"]) for e in estimates]
    down = [real(e["value"]) - real(e["lower"]) for e in estimates]
    return dict(type="data", symmetric=False, array=up, arrayminus=down, color=color, thickness=1.8, width=5)


def span(values: Iterable[float | None]) -> list[float]:
    """An axis range that holds all values and zero, with room around them."""
    known = [*finite(values), 0.0]
    room = 0.09 * (max(known) - min(known)) or 1.0
    return [min(known) - room, max(known) + room]


def not_measured(title: str, why: str) -> go.Figure:
    """A figure that says that there is nothing to draw, and why."""
    figure = blank(title, height=170).update_xaxes(visible=False).update_yaxes(visible=False)
    words, font = f"<b>not measured</b><br>{why}", dict(size=14, color=MUTED)
    return figure.add_annotation(text=words, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font=font)


def plotly_script() -> str:
    """The plotly.js source, to be put into a page once."""
    return get_plotlyjs()


def as_html(figure: go.Figure, name: str) -> str:
    """A `div` that draws the figure where plotly.js is on the page. The title is left to the page."""
    plain: Any = go.Figure(figure)
    top = plain.layout.margin.t or plain.layout.template.layout.margin.t
    plain.update_layout(title=None, margin_t=top - TITLE, height=plain.layout.height - TITLE)
    config, height = {"displayModeBar": False, "responsive": True}, f"{plain.layout.height}px"
    return to_html(plain, full_html=False, include_plotlyjs=False, div_id=name, default_height=height, config=config)
