"""The figures of a localization: where a behaviour travels in a model.

Every function takes a `Localization` and returns one figure. Green circles are GDN layers and their states, purple
diamonds attention layers and their heads, keys and values; a square is the convolutions of GDN layers. A filled mark is
an effect that counts, a hollow one is not clear of zero or of its controls, or is negligible; grey is what controls do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures import parts
from analysis.figures.parts import GLYPHS, INK, KINDS, MUTED, NATS, PALE, TEMPLATE, TITLE, not_measured
from analysis.words import ends, estimate, finite, lines, number, percent, real
from probes.localization import CHANNEL_NAMES, SITES, Localization, Row

NO_PERSONAS = "the behaviour has no personas,<br>so there is nothing to exchange"
CHANNELS = {
    "state": ("GDN states", "gdn", "circle"),
    "convolution": ("GDN convolutions<br>(last few tokens)", "gdn", "square"),
    "attention": ("keys and values<br>(attention)", "attention", "diamond"),
}
_DOT, _DIAMOND = (f"<span style='color:{KINDS[kind][1]}'>{GLYPHS[kind]}</span>" for kind in ("gdn", "attention"))
PANELS = (
    ("exchange", ("state", "attention"), f"<b>exchange</b> one layer's GDN state {_DOT} or keys and values {_DIAMOND}"),
    ("give", ("resid",), f"<b>give</b> to the residual stream after one layer ({_DOT} GDN, {_DIAMOND} attention)"),
    ("give", ("gdn.state", "attn.heads"), f"<b>give</b> to one layer's GDN state {_DOT} or attention heads {_DIAMOND}"),
)
_GDN = {"state", "convolution", "gdn.state"}


def draw_localization(localization: Localization) -> dict[str, go.Figure]:
    """Every figure of a localization, by name, in the order in which a page shows them."""
    drawn = (channels, layer_by_layer, head_by_head)
    return {function.__name__.replace("_", "-"): function(localization) for function in drawn}


def channels(localization: Localization) -> go.Figure:
    """What exchanging each channel in all layers moves, beside its controls."""
    title = "What each channel carries"
    rows = [row for row in localization.rows if row.kind == "exchange" and row.layer is None]
    if not rows:
        return not_measured(title, NO_PERSONAS if localization.persona is None else "no channel was exchanged")
    whole = real(localization.persona.value) if localization.persona else 0.0
    clear = localization.persona is not None and real(localization.persona.lower) > 0
    scale, unit = (100 / whole, "% of the personas' effect") if clear else (1.0, NATS)
    labels = [text for row in rows for text in (CHANNELS[row.carrier][0], f"controls<br>(n = {len(row.controls)})")]
    figure, reach = parts.rows(title, labels, unit), [0.0]
    for i, row in enumerate(rows):
        _, kind, symbol = CHANNELS[row.carrier]
        bar = scale * real(row.bar)
        if finite([bar]):
            box = dict(fillcolor=PALE, opacity=0.6, line_width=0, layer="below")
            figure.add_shape(type="rect", x0=-bar, x1=bar, y0=2 * i - 0.4, y1=2 * i + 1.4, **box)
        seen = row.effect.as_dict()
        if finite([seen["value"]]):
            scaled = {key: scale * real(seen[key]) for key in ("value", "lower", "upper")}
            figure.add_scatter(
                x=[scaled["value"]], y=[2 * i], mode="markers+text", name=row.carrier, hovertext=[words_of(row)],
                marker=_marker(kind, symbol, [row], 13), error_x=parts.bars([scaled], KINDS[kind][1]),
                text=[f"<b>{percent(row.share) if clear else number(seen['value'])}</b>"], textposition="top center",
            )  # fmt: skip
            reach += ends(scaled)
        else:
            parts.absent(figure, 2 * i, "no value")
        drawn = [scale * value for value in finite(row.controls)]
        words = [f"a control of {CHANNEL_NAMES[row.carrier]}: {number(value)} nats" for value in finite(row.controls)]
        parts.dots(figure, 2 * i + 1, drawn, words, f"controls: {row.carrier}")
        reach += [*drawn, *finite([bar, -bar])]
    return parts.limit(
        figure, 100.0 if clear else None, "all that the personas do", parts.span([*reach, 100.0 * clear])
    )


def layer_by_layer(localization: Localization) -> go.Figure:
    """Each layer by itself: exchanged, and given a direction; with intervals and what controls reach."""
    title, kinds = "Layer by layer", layer_kinds(localization)
    found = [[row for name in names for row in localization.layers(kind, name)] for kind, names, _ in PANELS]
    if not any(found):
        return not_measured(title, "no layer was looked at by itself")
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.13)
    figure.update_layout(template=TEMPLATE, title=title, height=900, margin_t=TITLE + 46, legend_y=-0.09)
    figure.update_layout(showlegend=True, bargap=0.2)
    for panel, ((kind, _, text), rows) in enumerate(zip(PANELS, found, strict=True), 1):
        parts.heading(figure, f"{text}<br>effect ({NATS})", panel=panel)
        if not rows:
            figure.add_scatter(x=[], y=[], row=panel, col=1, showlegend=False)
            why = NO_PERSONAS if kind == "exchange" and localization.persona is None else "this was not looked at"
            parts.absent(figure, 0, why.replace("<br>", " "), panel=panel)
            continue
        _marks(figure, rows, [row.layer for row in rows], [kinds.get(row.layer or 0, "") for row in rows], panel)
        _point_out(figure, rows, panel)
        missing = [f"layer {row.layer}" for row in rows if not finite([row.effect.value])]
        parts.unmeasured(figure, missing, panel=panel)
    _legend(figure, [row for rows in found for row in rows], kinds.values(), _percentile(localization))
    layers = sorted(kinds)
    every = 1 if len(layers) <= 32 else 4
    figure.update_xaxes(tickvals=layers[::every], zeroline=False, range=[min(layers) - 0.6, max(layers) + 0.6])
    figure.update_xaxes(showticklabels=True).update_xaxes(title="layer", row=3, col=1)
    low, high = _reach(row for rows in found for row in rows)
    return figure.update_yaxes(range=[low, high + 0.14 * (high - low)])


def head_by_head(localization: Localization) -> go.Figure:
    """The heads of the layers that stand out, each by itself."""
    title, groups = "Head by head", {}
    for row in localization.rows:
        if row.head is not None:
            groups.setdefault((row.kind, row.carrier, row.layer), []).append(row)
    if not groups:
        return not_measured(title, "no layer stood out,<br>so none was told apart into heads")
    n = len(groups)
    top, bottom, panel_height, gap = TITLE + 46, 110, 190, 108
    figure = make_subplots(rows=n, cols=1, vertical_spacing=gap / (n * panel_height + (n - 1) * gap) if n > 1 else 0)
    height = n * panel_height + (n - 1) * gap + top + bottom
    figure.update_layout(template=TEMPLATE, title=title, height=height, margin_t=top, margin_b=bottom, showlegend=True)
    for panel, ((kind, carrier, layer), rows) in enumerate(groups.items(), 1):
        name = (CHANNEL_NAMES if kind == "exchange" else SITES)[carrier]
        parts.heading(figure, f"<b>{kind}</b>: {name}, layer {layer}<br>effect ({NATS})", panel=panel)
        heads = [row.head for row in rows]
        _marks(figure, rows, heads, [_kind(row) for row in rows], panel)
        parts.unmeasured(figure, [f"head {row.head}" for row in rows if not finite([row.effect.value])], panel=panel)
        ticks = heads[:: 1 if len(heads) <= 32 else 4]
        words = "key/value head" if carrier == "attention" else "head"
        around = [min(heads) - 0.6, max(heads) + 0.6]
        figure.update_xaxes(title=words, tickvals=ticks, zeroline=False, range=around, row=panel, col=1)
    every = [row for rows in groups.values() for row in rows]
    _legend(figure, every, map(_kind, every), _percentile(localization))
    figure.update_layout(legend_y=-62 / (height - top - bottom))
    return figure.update_yaxes(range=_reach(every))


def layer_kinds(localization: Localization) -> dict[int, str]:
    """The kind of each layer that was looked at, known from the sites that it has; "" where it is not."""
    found: dict[int, str] = {}
    for row in localization.rows:
        if row.layer is not None and (row.carrier != "resid" or row.layer not in found):
            found[row.layer] = _kind(row)
    return dict(sorted(found.items()))


def words_of(row: Row) -> str:
    """A row in a label: what was done where, and what it did."""
    name = (CHANNEL_NAMES if row.kind == "exchange" else SITES)[row.carrier]
    return lines(
        f"<b>{row.kind}</b>: {name}, {row.where}",
        f"effect {estimate(row.effect.as_dict())} nats",
        f"{percent(row.share)} of the personas' effect" if finite([row.share]) else "",
        f"controls reach ±{number(row.bar)} nats (n = {len(row.controls)})",
        f"{row.effect.n} prompts in {row.effect.groups} topics",
        "counts" if row.shown else "does not count: not clear of zero and controls, or negligible",
    )


def _kind(row: Row) -> str:
    return "" if row.carrier == "resid" else "gdn" if row.carrier in _GDN else "attention"


def _marker(kind: str, symbol: str, rows: Sequence[Row], size: int = 10) -> dict[str, Any]:
    color = KINDS[kind][1] if kind else INK
    symbols = [symbol + ("" if row.shown else "-open") for row in rows]
    return dict(size=size, color=color, symbol=symbols, line=dict(width=2, color=color))


def _marks(figure: go.Figure, rows: Sequence[Row], xs: Sequence[Any], kinds: Sequence[str], panel: int) -> None:
    """What controls reach as grey bars, and the effects with their intervals on top."""
    bars = [real(row.bar) for row in rows]
    words = [f"{row.where}: controls reach ±{number(bar)} nats" for row, bar in zip(rows, bars, strict=True)]
    figure.add_bar(
        x=list(xs), y=[2 * bar for bar in bars], base=[-bar for bar in bars], width=0.6, marker_color=PALE,
        name=f"controls {panel}", hovertext=words, showlegend=False, row=panel, col=1,
    )  # fmt: skip
    for kind in dict.fromkeys(kinds):
        some = [(row, x) for row, x, its in zip(rows, xs, kinds, strict=True) if its == kind]
        color, symbol = KINDS[kind][1:] if kind else (INK, "circle")
        seen = [row for row, _ in some]
        figure.add_scatter(
            x=[x for _, x in some], y=[real(row.effect.value) for row in seen], mode="markers", row=panel, col=1,
            marker=_marker(kind, symbol, seen), error_y=parts.bars([row.effect.as_dict() for row in seen], color),
            name=f"{kind or 'layer'} {panel}", hovertext=[words_of(row) for row in seen], showlegend=False,
        )  # fmt: skip


def _point_out(figure: go.Figure, rows: Sequence[Row], panel: int) -> None:
    """Name the layer that does most, where one counts."""
    best = max((row for row in rows if row.shown), key=lambda row: row.effect.value, default=None)
    if best is not None:
        share = f" ({percent(best.share)} of the personas')" if finite([best.share]) else ""
        text, place = f"<b>most: layer {best.layer}</b>{share}", parts.axes(panel)
        figure.add_annotation(
            x=best.layer, y=max(ends(best.effect.as_dict())), text=text, showarrow=False, yanchor="bottom", yshift=3,
            **place,
        )  # fmt: skip


def _legend(figure: go.Figure, rows: Sequence[Row], kinds: Any, percentile: str) -> None:
    present = set(kinds)
    for kind, (label, color, symbol) in KINDS.items():
        if kind in present:
            parts.legend(figure, label, color, symbol)
    if not all(row.shown for row in rows):
        parts.legend(figure, "hollow: not clear of zero and controls, or negligible", MUTED, "circle-open")
    parts.legend(figure, f"grey bar: what controls of equal size reach ({percentile} percentile)", PALE, "square")


def _percentile(localization: Localization) -> str:
    config: Mapping[str, Any] = localization.recipe.get("config") or {}
    return f"{config.get('percentile', 95):g}th"


def _reach(rows: Any) -> list[float]:
    known = [end for row in rows for end in (*ends(row.effect.as_dict()), *finite([row.bar, -real(row.bar)]))]
    return parts.span(known)
