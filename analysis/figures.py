"""Results, drawn. The only file that imports plotly.

Every function takes a `Verdict` and returns one figure; nothing is computed here that decides anything. The rules:

- One colour, one meaning: blue is the direction under test and the wanted side, vermilion the unwanted side and what
  moves the wrong way, grey whatever means nothing (random directions, no steering), green and purple are GDN and
  attention layers. Shape or position repeats each of them, and all come from palettes made for colour-blind readers.
- An estimate has its interval, an effect its zero line, an axis its unit. Propensity and effects are in nats of the
  log-odds wanted/unwanted, doses in units of the layer's residual norm.
- What was not measured is said in the figure, with the reason. What does not fit a scale is clipped with a mark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from probes.criteria import Criterion, Verdict
from probes.evidence import control_threshold

INK, MUTED, GRID, PALE = "#1f2430", "#5b6472", "#e6e8ec", "#d3d7dd"
TARGET, WRONG, NOISE = "#0072b2", "#d55e00", "#8b929c"
GDN, ATTENTION = "#009e73", "#aa4499"
KINDS = {"gdn": ("GDN layer", GDN, "circle"), "attention": ("attention layer", ATTENTION, "diamond")}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
NATS = "nats of log-odds wanted/unwanted"
CLIP = 100.0  # perplexity ratios above this are drawn at the edge, with a mark

_AXIS = dict(
    gridcolor=GRID, linecolor=PALE, tickcolor=PALE, ticks="outside", ticklen=4, zerolinecolor=MUTED, zerolinewidth=1.2,
    title_font_size=12.5, title_standoff=10, automargin=True,
)  # fmt: skip
TEMPLATE = go.layout.Template(
    layout=dict(
        font=dict(family=FONT, size=12.5, color=INK),
        title=dict(font=dict(size=16), x=0, xref="paper", xanchor="left", pad_l=0, yref="container", y=0.97, yanchor="top"),
        paper_bgcolor="white", plot_bgcolor="white", colorway=[TARGET, WRONG, GDN, ATTENTION, NOISE],
        margin=dict(l=64, r=20, t=72, b=56), hovermode="closest", dragmode=False,
        hoverlabel=dict(bgcolor="white", bordercolor=PALE, font=dict(color=INK, size=12.5), align="left"),
        legend=dict(orientation="h", x=0, xanchor="left", y=1.02, yanchor="bottom", font_size=12, itemclick=False,
                    itemdoubleclick=False),
        xaxis=_AXIS, yaxis=_AXIS,
    )
)  # fmt: skip


def draw(verdict: Verdict) -> dict[str, go.Figure]:
    """Every figure of a verdict, by name, in the order in which a report shows them."""
    return {
        "layer-sweep": layer_sweep(verdict),
        "dose-response": dose_response(verdict),
        "controls": controls(verdict),
        "decodability": decodability(verdict),
        "prompt-effects": prompt_effects(verdict),
        "necessity": necessity(verdict),
        "phases": phases(verdict),
        "damage": damage(verdict),
        "baseline": baseline(verdict),
    }


# -- one figure for each piece of evidence -----------------------------------------------------------------------------


def layer_sweep(verdict: Verdict) -> go.Figure:
    """Effect with its interval at each searched layer, beside the size of what random directions do there."""
    title, rows = "Effect at each layer", verdict.evidence.get("layers") or []
    if not rows:
        return not_measured(title, "no layer was searched")
    figure = _blank(title, height=380)
    noise = [_float(row["random_effect"]) for row in rows]
    figure.add_bar(
        x=[row["layer"] for row in rows], y=[2 * r for r in noise], base=[-r for r in noise], width=0.55, marker_color=PALE,
        name="random directions, ± mean size", hoverinfo="text",
        hovertext=[f"layer {row['layer']}: random directions move it by {number(r)} nats" for row, r in zip(rows, noise)],
    )  # fmt: skip
    for kind, (label, color, symbol) in KINDS.items():
        some = [row for row in rows if row["kind"] == kind]
        if some:
            figure.add_scatter(
                x=[row["layer"] for row in some], y=[_float(row["effect"]["value"]) for row in some], mode="markers",
                marker=dict(size=11, color=color, line_width=2, line_color=color,
                            symbol=[symbol if row["coherent"] else f"{symbol}-open" for row in some]),
                error_y=_bars([row["effect"] for row in some], color), name=label, hoverinfo="text",
                hovertext=[
                    _lines(f"<b>layer {row['layer']}</b>, {label}", f"effect {_said(row['effect'])} nats at dose {row['dose']:g}",
                           f"random directions ±{number(row['random_effect'])} nats",
                           f"perplexity ratio {_ratio(row['perplexity_ratio'])}, reliability {number(row['reliability'])}")
                    for row in some
                ],
            )  # fmt: skip
    if not all(row["coherent"] for row in rows):
        hollow = dict(size=11, color=MUTED, symbol="circle-open", line_width=2)
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=hollow, name="hollow: breaks ordinary text")
    for row in rows:
        if row["chosen"]:
            top = max(_finite([row["effect"]["value"], row["effect"]["upper"], 0.0]))
            _arrow(figure, row["layer"], top, f"chosen: layer {row['layer']}")
    low, high = _span([*(v for row in rows for v in _ends(row["effect"])), *noise, *(-r for r in noise)])
    figure.update_yaxes(title=f"effect on propensity<br>({NATS})", range=[low, high + 0.16 * (high - low)])
    figure.update_xaxes(title="layer (the residual stream after it is edited)", tickvals=[row["layer"] for row in rows], zeroline=False)
    return _unmeasured(figure, [f"layer {row['layer']}" for row in rows if not _finite([row["effect"]["value"]])])


def dose_response(verdict: Verdict) -> go.Figure:
    """The dose curve of the held-out prompts."""
    limit = _threshold(verdict, "damage: perplexity")
    return dose_curve(verdict.evidence.get("doses") or [], working=verdict.dose, limit=limit)


def dose_curve(
    rows: Sequence[Mapping[str, Any]], *, working: float | None = None, limit: float | None = None
) -> go.Figure:
    """Mean propensity with its interval against dose; below it what each dose does to ordinary text.

    Args:
        rows: one mapping for each dose: `dose`, `propensity` (an `Estimate` as a dict) and, where measured,
            `perplexity_ratio` and `coherent`.
        working: the dose to mark. limit: the largest coherent perplexity ratio.
    """
    title = "Dose and response"
    if not rows:
        return not_measured(title, "no doses were tried")
    rows = sorted(rows, key=lambda row: row["dose"])
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.07)
    figure.update_layout(template=TEMPLATE, title=title, height=470, showlegend=False)
    doses, coherent = [row["dose"] for row in rows], [row.get("coherent", True) for row in rows]
    symbols = ["circle" if ok else "circle-open" for ok in coherent]
    marker = dict(size=9, color=TARGET, symbol=symbols, line=dict(width=2, color=TARGET))
    figure.add_scatter(
        x=doses, y=[_float(row["propensity"]["value"]) for row in rows], mode="lines+markers", name="propensity", marker=marker,
        line=dict(color=TARGET, width=2), error_y=_bars([row["propensity"] for row in rows], TARGET), hoverinfo="text",
        hovertext=[
            _lines(f"<b>dose {row['dose']:g}</b>", f"propensity {_said(row['propensity'])} nats",
                   "" if ok else "outside the coherent window")
            for row, ok in zip(rows, coherent)
        ], row=1, col=1,
    )  # fmt: skip
    _ratio_panel(figure, rows, marker, limit)
    inside = [dose for dose, ok in zip(doses, coherent) if ok]
    if inside and any("coherent" in row for row in rows):
        figure.add_vrect(x0=min(inside), x1=max(inside), fillcolor=TARGET, opacity=0.07, line_width=0, layer="below")
        _label(figure, min(inside), 0.0, "coherent window", xanchor="left", yanchor="bottom", color=TARGET, yref="y domain")
    if working is not None:
        figure.add_vline(x=working, line=dict(color=INK, width=1.2, dash="dash"))
        side = "right" if working > 0 else "left"
        _label(figure, working, 1.0, f"working dose {working:g}", xanchor=side, yanchor="bottom", yref="y domain")
    values = [row["propensity"][key] for row in rows for key in ("value", "lower", "upper")]
    figure.update_yaxes(title=f"propensity<br>({NATS})", range=_span(values), row=1, col=1)
    edge = 0.06 * (max(doses) - min(doses) or 1)
    figure.update_xaxes(range=[min(doses) - edge, max(doses) + edge], tickvals=doses)
    figure.update_xaxes(title="dose (residual norms; positive pushes towards wanted)", row=2, col=1)
    return _unmeasured(figure, [f"dose {row['dose']:g}" for row in rows if not _finite([row["propensity"]["value"]])])


def controls(verdict: Verdict) -> go.Figure:
    """The target beside norm-matched directions that mean nothing, or something else."""
    title, found = "Against directions that mean nothing", verdict.evidence.get("controls") or {}
    kinds = found.get("kinds") or {}
    if not any(kinds.values()):
        return not_measured(title, "no control directions were run")
    labels = ["this direction", *(f"{kind} ({len(rows)})" for kind, rows in kinds.items())]
    figure = _rows(title, labels, f"effect on propensity ({NATS})")
    _point(figure, 0, verdict.evidence["effect"], TARGET, f"<b>this direction</b> at dose {verdict.dose:g}")
    for y, (kind, rows) in enumerate(kinds.items(), 1):
        names = [_lines(f"<b>{kind} direction</b> {_safe(row.get('name', ''))}", f"{number(row['effect'])} nats") for row in rows]
        _dots(figure, y, [row["effect"] for row in rows], names, kind)
    bar, worst = control_threshold({"percentile": found["percentile"], "kinds": _measured(kinds)})
    if math.isfinite(bar):
        figure.add_vline(x=-bar, line=dict(color=PALE, width=1.2, dash="dash"))
        _limit(figure, bar, f"to clear: {number(bar)} ({found['percentile']:g}th percentile, {worst})")
    effects = [row["effect"] for rows in kinds.values() for row in rows]
    low, high = _span([*effects, *_ends(verdict.evidence["effect"]), bar, -bar])
    figure.update_xaxes(range=[low, high])
    return figure


def decodability(verdict: Verdict) -> go.Figure:
    """How well the projection on the direction tells the held-out sides apart, beside shuffled labels."""
    title, found = "Telling the two sides apart", verdict.evidence.get("decodability")
    if not found:
        return not_measured(title, "the held-out sides were not projected on the direction")
    shuffled = found["shuffled"]
    figure = _rows(title, ["this direction", f"shuffled labels ({len(shuffled)})"], "held-out AUROC (0.5 is chance, 1 is perfect)")
    _point(figure, 0, found["auroc"], TARGET, "<b>this direction</b>", unit="AUROC")
    _dots(figure, 1, shuffled, [f"shuffled labels: AUROC {number(v)}" for v in shuffled], "shuffled labels")
    _limit(figure, _threshold(verdict, "decodability"), "lower end at least {}")
    figure.update_xaxes(range=[-0.02, 1.02])
    figure.add_vline(x=0.5, line=dict(color=MUTED, width=1.2), layer="below")
    return figure


def prompt_effects(verdict: Verdict) -> go.Figure:
    """The effect on every held-out prompt, sorted, so that a mean cannot hide the ones that move the wrong way."""
    title, rows = "Prompt by prompt", verdict.evidence.get("prompts") or []
    known = sorted((row for row in rows if _finite([row["effect"]])), key=lambda row: row["effect"])
    if not known:
        return not_measured(title, "no held-out prompt was scored")
    figure = _blank(title, height=380)
    for name, color, keep in (
        ("wrong way", WRONG, lambda e: e < 0),
        ("no change", NOISE, lambda e: e == 0),
        ("towards wanted", TARGET, lambda e: e > 0),
    ):
        some = [(rank, row) for rank, row in enumerate(known, 1) if keep(row["effect"])]
        share = f"{len(some)} of {len(known)}"
        if some or name == "wrong way":
            figure.add_bar(
                x=[rank for rank, _ in some] or [None], y=[row["effect"] for _, row in some] or [None], name=f"{name}: {share}",
                marker=dict(color=color, line=dict(color=color, width=2 if name == "no change" else 0)), width=0.8, hoverinfo="text",
                hovertext=[
                    _lines(f"<b>{_safe(row['id'])}</b>, topic {_safe(row['group'])}", f"effect {number(row['effect'])} nats",
                           f"unsteered propensity {number(row['baseline'])} nats")
                    for _, row in some
                ],
            )  # fmt: skip
    mean = verdict.evidence["effect"]
    if _finite(_ends(mean)):
        figure.add_hrect(y0=mean["lower"], y1=mean["upper"], fillcolor=INK, opacity=0.1, line_width=0, layer="below")
        figure.add_hline(y=mean["value"], line=dict(color=INK, width=1.2, dash="dash"))
        _label(figure, 0.5, max(mean["upper"], 0.0), f"mean {_said(mean)}", xanchor="left", yanchor="bottom")
    low, high = _span([*(row["effect"] for row in known), *_ends(mean)])
    figure.update_yaxes(title=f"effect on propensity<br>({NATS})", range=[low, high], zeroline=True)
    figure.update_xaxes(title="held-out prompts, sorted by effect", range=[0.3, len(known) + 0.7], showgrid=False, zeroline=False)
    figure.update_layout(legend_traceorder="normal")
    return _unmeasured(figure, [_safe(row["id"]) for row in rows if not _finite([row["effect"]])])


def necessity(verdict: Verdict) -> go.Figure:
    """What is lost when the direction is taken out, beside taking out random ones."""
    title, found = "Taking the direction out", verdict.evidence.get("necessity")
    if not found:
        return not_measured(title, "no held-out prompt shows the behaviour, so there is nothing to take out")
    drops, before = found["random_drops"], _float(found["before"]["value"])
    figure = _rows(title, ["this direction", f"random directions ({len(drops)})"], f"propensity lost ({NATS})")
    _point(figure, 0, found["drop"], TARGET, "<b>this direction</b> taken out: propensity lost")
    _dots(figure, 1, drops, [f"a random direction taken out: {number(v)} nats lost" for v in drops], "random")
    _limit(figure, _threshold(verdict, "necessity"), "to clear: {}")
    low, high = _span([*drops, *_ends(found["drop"]), before])
    if math.isfinite(before):
        figure.add_vline(x=before, line=dict(color=WRONG, width=1.2, dash="dot"), layer="below")
        side = "right" if before > (low + high) / 2 else "left"
        text = f"{number(before)}: all of the lean under the {_safe(found['where'])}" if before > 0 else f"lean before: {number(before)}"
        _label(figure, before, -0.01, text, xanchor=side, yanchor="bottom", yref="y domain", color=WRONG)
    figure.update_xaxes(range=[low, high])
    return figure


def phases(verdict: Verdict) -> go.Figure:
    """Effect when only the prompt's tokens, only the answer's tokens, or both are edited."""
    title, rows = "Where in the text it acts", verdict.evidence.get("phases") or []
    if not rows:
        return not_measured(title, "no phase was run apart")
    words = {"prefill": "prompt tokens only", "decode": "answer tokens only", "both": "all tokens"}
    labels = [f"{row['phase']}{' (working)' if row['working'] else ''}" for row in rows]
    figure = _rows(title, labels, f"effect on propensity ({NATS})")
    for y, row in enumerate(rows):
        said = _lines(f"<b>{_safe(row['phase'])}</b>: {words.get(row['phase'], '')}", "the working phase" if row["working"] else "")
        _point(figure, y, row["effect"], TARGET if row["working"] else NOISE, said)
    figure.update_xaxes(range=_span([v for row in rows for v in _ends(row["effect"])]))
    return figure


def damage(verdict: Verdict) -> go.Figure:
    """What the working dose breaks: three measures, each on its own scale and against its own threshold."""
    title, found, made = "What it breaks", verdict.evidence.get("damage"), verdict.evidence.get("generation") or {}
    if not found:
        return not_measured(title, "no general text was modelled")
    steered, plain = made.get("steered") or {}, made.get("unsteered") or {}
    panels = (
        ("perplexity ratio on ordinary text (1: intact)", found["perplexity_ratio"], 1.0, "damage: perplexity"),
        ("KL on ordinary text, nats a token (reported only)", found["kl"], 0.0, "damage: KL"),
        ("rise of repeated trigrams in free answers (share)", _float(steered.get("repetition")) - _float(plain.get("repetition")),
         0.0, "damage: repetition"),
    )  # fmt: skip
    figure = make_subplots(rows=3, cols=1, vertical_spacing=0.3, subplot_titles=[f"<b>{label}</b>" for label, *_ in panels])
    figure.update_layout(template=TEMPLATE, title=title, height=330, showlegend=False)
    figure.update_annotations(x=0, xanchor="left", font_size=12.5, yshift=4)
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, range=[-0.5, 0.5], zeroline=False)
    for row, (label, seen, intact, name) in enumerate(panels, 1):
        value, limit = _float(seen), _threshold(verdict, name)
        over = limit is not None and (value > limit or not math.isfinite(value))
        measured = math.isfinite(value) or name != "damage: repetition"  # a lost perplexity or KL was not finite
        shown = min(value, CLIP) if math.isfinite(value) else CLIP
        clipped = measured and (not math.isfinite(value) or value > CLIP)
        color = WRONG if over or clipped else TARGET
        at = [shown] if measured else [None]
        figure.add_scatter(
            x=[intact, *at], y=[0, 0], mode="lines", line=dict(color=color, width=3), hoverinfo="skip", row=row, col=1
        )
        figure.add_scatter(
            x=at, y=[0], mode="markers+text", marker=dict(size=12, color=color, symbol="triangle-right" if clipped else "circle"),
            text=[_ratio(seen) if clipped else number(value)], textposition="top center", cliponaxis=False, hoverinfo="text",
            hovertext=[_lines(label, _ratio(seen) if clipped else number(value))], row=row, col=1,
        )  # fmt: skip
        figure.add_vline(x=intact, line=dict(color=MUTED, width=1.2), row=row, col=1)
        if limit is not None:
            figure.add_vline(x=limit, line=dict(color=INK, width=1.2, dash="dash"), row=row, col=1)
            _label(figure, limit, 1.0, f"limit {number(limit)}", xanchor="left", yanchor="top", xref=f"x{row}", yref=f"y{row} domain")
        ends = [intact, *_finite([value if not clipped else CLIP, limit])]
        wide = max(ends) - min(ends) or 0.1
        figure.update_xaxes(range=[min(ends) - 0.04 * wide, max(ends) + 0.3 * wide], nticks=6, row=row, col=1)
        if not measured:
            _label(figure, intact, 0, " not measured: nothing was generated", xanchor="left", xref=f"x{row}", yref=f"y{row}")
    return figure


def baseline(verdict: Verdict) -> go.Figure:
    """Steering beside simply asking: propensity without help, steered, and under each persona."""
    title, found = "Steering beside just asking", verdict.evidence.get("baseline") or {}
    if "propensity" not in found:
        return not_measured(title, "the unsteered propensity is missing")
    persona = found.get("persona") or {}
    steered = next((row["propensity"] for row in verdict.evidence.get("doses") or [] if row["dose"] == verdict.dose), None)
    rows = (
        ("asked for unwanted", persona.get("unwanted"), WRONG, "the behaviour has no personas"),
        ("left alone", found["propensity"], NOISE, ""),
        (f"steered, dose {verdict.dose:g}", steered, TARGET, "the working dose is not on the curve"),
        ("asked for wanted", persona.get("wanted"), TARGET, "the behaviour has no personas"),
    )
    figure = _rows(title, [label for label, *_ in rows], f"propensity ({NATS})")
    for y, (label, estimate, color, why) in enumerate(rows):
        if estimate is None:
            _label(figure, 0, y, f" not measured: {why}", xanchor="left", color=MUTED)
        else:
            _point(figure, y, estimate, color, f"<b>{label}</b>", symbol="diamond" if label.startswith("asked") else "circle")
    figure.update_xaxes(range=_span([v for _, estimate, *_ in rows if estimate for v in _ends(estimate)]))
    return figure


def not_measured(title: str, why: str) -> go.Figure:
    """A figure that says that there is nothing to draw, and why."""
    figure = _blank(title, height=170)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(
        text=f"<b>not measured</b><br>{_safe(why)}", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False,
        font=dict(size=14, color=MUTED),
    )  # fmt: skip
    return figure


# -- into a page -------------------------------------------------------------------------------------------------------


def plotly_script() -> str:
    """The plotly.js source, to be put into a page once."""
    return get_plotlyjs()


def as_html(figure: go.Figure, name: str) -> str:
    """A `div` that draws the figure when plotly.js is on the page. The title is left to the page."""
    copy = go.Figure(figure).update_layout(title=None, margin_t=36)
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}
    height = f"{copy.layout.height}px"
    return to_html(copy, full_html=False, include_plotlyjs=False, div_id=name, default_height=height, config=config)


def number(value: float | None) -> str:
    """Three significant digits; "not measured" for NaN and None."""
    if value is None or math.isnan(value):
        return "not measured"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


# -- shared ------------------------------------------------------------------------------------------------------------


def _blank(title: str, *, height: int) -> go.Figure:
    return go.Figure(layout=dict(template=TEMPLATE, title=title, height=height))


def _rows(title: str, labels: Sequence[str], unit: str) -> go.Figure:
    """A figure with one row for each label, from top to bottom, and a common horizontal axis."""
    figure = _blank(title, height=118 + 62 * len(labels))
    ticks = [_safe(label) for label in labels]
    figure.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=ticks, range=[len(labels) - 0.5, -0.5], showgrid=False, zeroline=False, ticks=""
    )
    figure.update_xaxes(title=unit, zeroline=True)
    return figure.update_layout(showlegend=False)


def _point(
    figure: go.Figure, y: int, estimate: Mapping[str, Any], color: str, what: str, *, symbol: str = "circle", unit: str = "nats"
) -> None:
    """One estimate in a row: a large mark with its interval and its value written above it."""
    figure.add_scatter(
        x=[_float(estimate["value"])], y=[y], mode="markers+text", marker=dict(size=12, color=color, symbol=symbol),
        error_x=_bars([estimate], color), text=[f"<b>{number(estimate['value'])}</b>"], textposition="top center",
        textfont=dict(size=12.5, color=INK), cliponaxis=False, hoverinfo="text", name=what,
        hovertext=[_lines(what, f"{_said(estimate)} {unit}", f"{estimate['n']} prompts in {estimate['groups']} topics")],
    )  # fmt: skip


def _dots(figure: go.Figure, y: int, values: Sequence[float | None], hover: Sequence[str], name: str) -> None:
    """Many values in a row, spread a little so that each can be seen."""
    if not _finite(values):
        _label(figure, 0, y, " not measured: none were run", xanchor="left", color=MUTED)
        return
    spread = [y + 0.5 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]
    marker = dict(size=8, color=NOISE, opacity=0.75, line=dict(width=0.5, color="white"))
    figure.add_scatter(
        x=[_float(v) for v in values], y=spread, mode="markers", marker=marker, name=name, hoverinfo="text", hovertext=list(hover)
    )


def _ratio_panel(figure: go.Figure, rows: Sequence[Mapping[str, Any]], marker: dict[str, Any], limit: float | None) -> None:
    """The lower panel of the dose curve: perplexity ratios on a logarithmic scale, clipped with a mark."""
    if not any("perplexity_ratio" in row for row in rows):
        figure.update_yaxes(title="perplexity<br>ratio", showticklabels=False, range=[-1, 1], zeroline=False, row=2, col=1)
        _label(figure, rows[0]["dose"], 0, "not measured: no general text was modelled", xanchor="left", yref="y2", color=MUTED)
        return
    ratios = [_float(row.get("perplexity_ratio")) for row in rows]
    clipped = [not r <= CLIP for r in ratios]
    shown = [CLIP if over else r for r, over in zip(ratios, clipped, strict=True)]
    symbols = ["triangle-up" if over else symbol for over, symbol in zip(clipped, marker["symbol"], strict=True)]
    figure.add_scatter(
        x=[row["dose"] for row in rows], y=shown, mode="lines+markers+text", name="perplexity ratio", line=dict(color=TARGET, width=1.5),
        marker={**marker, "symbol": symbols, "size": 8}, cliponaxis=False, textposition="bottom center", textfont_size=11,
        text=[_ratio(r) if over else "" for r, over in zip(ratios, clipped, strict=True)], hoverinfo="text",
        hovertext=[_lines(f"<b>dose {row['dose']:g}</b>", f"perplexity ratio {_ratio(r)}") for row, r in zip(rows, ratios, strict=True)],
        row=2, col=1,
    )  # fmt: skip
    low, high = min(shown), max([*shown, limit or 1.0])
    room = 0.12 * (math.log10(high) - math.log10(low)) + 0.03
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low * 0.9 <= t <= high * 1.1]
    figure.update_yaxes(
        type="log", title="perplexity<br>ratio (log)", range=[math.log10(low) - room, math.log10(high) + room], tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks], row=2, col=1,
    )  # fmt: skip
    if limit is not None:
        figure.add_hline(y=limit, line=dict(color=INK, width=1.2, dash="dash"), row=2, col=1)  # type: ignore[arg-type]
        _label(figure, 0.0, math.log10(limit), f"limit {number(limit)}", xanchor="center", yanchor="bottom", yref="y2")


def _label(
    figure: go.Figure, x: float, y: float, text: str, *, xanchor: str = "center", yanchor: str = "middle", xref: str = "x",
    yref: str = "y", color: str = INK,
) -> None:  # fmt: skip
    """Words at a place in the plot, where a legend would send the eye away."""
    figure.add_annotation(
        x=x, y=y, text=text, xanchor=xanchor, yanchor=yanchor, xref=xref, yref=yref, showarrow=False, font=dict(size=12, color=color)
    )


def _arrow(figure: go.Figure, x: float, y: float, text: str) -> None:
    figure.add_annotation(
        x=x, y=y, text=f"<b>{text}</b>", showarrow=True, arrowhead=2, arrowwidth=1.5, arrowcolor=INK, ax=0, ay=-26, yshift=6, font_size=12
    )


def _limit(figure: go.Figure, x: float | None, text: str) -> None:
    """A vertical threshold line with its words above the plot; `{}` in the text takes the number."""
    if x is None or not math.isfinite(x):
        return
    figure.add_vline(x=x, line=dict(color=INK, width=1.2, dash="dash"))
    _label(figure, x, 1.0, text.format(number(x)), xanchor="left", yanchor="bottom", yref="y domain")


def _unmeasured(figure: go.Figure, missing: Sequence[str]) -> go.Figure:
    """Name under the plot what has no value, instead of leaving a silent gap."""
    if missing:
        figure.add_annotation(
            text=f"not measured: {', '.join(missing)}", x=1, y=1, xref="paper", yref="paper", xanchor="right", yanchor="top",
            showarrow=False, font=dict(size=12, color=MUTED),
        )  # fmt: skip
    return figure


def _threshold(verdict: Verdict, name: str) -> float | None:
    """The threshold of a criterion; None when it has none."""
    found: Criterion | None = next((c for c in verdict.criteria if c.name == name), None)
    return None if found is None or found.threshold is None or not math.isfinite(found.threshold) else found.threshold


def _measured(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[Mapping[str, Any]]]:
    return {kind: [row for row in rows if _finite([row["effect"]])] for kind, rows in kinds.items()}


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _ends(estimate: Mapping[str, Any]) -> list[float]:
    return _finite([estimate["value"], estimate["lower"], estimate["upper"]])


def _bars(estimates: Sequence[Mapping[str, Any]], color: str) -> dict[str, Any]:
    """Error bars from value, lower and upper."""
    up = [_float(e["upper"]) - _float(e["value"]) for e in estimates]
    down = [_float(e["value"]) - _float(e["lower"]) for e in estimates]
    return dict(type="data", symmetric=False, array=up, arrayminus=down, color=color, thickness=1.8, width=5)


def _span(values: Iterable[float | None]) -> list[float]:
    """An axis range that holds all values and zero, with room around them."""
    known = [*_finite(values), 0.0]
    room = 0.09 * (max(known) - min(known)) or 1.0
    return [min(known) - room, max(known) + room]


def _said(estimate: Mapping[str, Any]) -> str:
    """An estimate in words: value [lower, upper]."""
    value, lower, upper = (_float(estimate[key]) for key in ("value", "lower", "upper"))
    return f"{number(value)} [{number(lower)}, {number(upper)}]" if math.isfinite(lower) else number(value)


def _ratio(value: float | None) -> str:
    """A perplexity ratio in words. Null in a verdict that was read back is an infinity: it was measured and not finite."""
    return "∞" if value is None or not math.isfinite(value) else number(value)


def _lines(*lines: str) -> str:
    return "<br>".join(line for line in lines if line)


def _safe(text: str) -> str:
    """Plotly reads a little HTML in its labels; words from data files and models are shown as they are."""
    return html.escape(str(text), quote=False)
