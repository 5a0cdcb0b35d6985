"""Results, drawn. The only file that imports plotly.

Every function takes a `Verdict` and returns one figure; nothing is computed here that decides anything. The rules:

- One colour, one meaning: blue is the direction under test and the wanted side, vermilion the unwanted side and what
  goes wrong, grey whatever means nothing (random directions, no steering), green and purple are GDN and attention
  layers. Shape, position or words repeat each of them, and the colours are from palettes for colour-blind readers.
- An estimate has its interval, an effect its zero line, an axis its unit. Propensity and effects are in nats of the
  log-odds wanted/unwanted, doses in units of the layer's residual norm.
- What was not measured is said in the figure, with the reason. What does not fit a scale is clipped with a mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from analysis.words import Numbers, ends, estimate, finite, lines, number, ratio, real, safe, searched
from probes.criteria import Verdict
from probes.evidence import control_threshold

INK, MUTED, GRID, PALE = "#1f2430", "#566070", "#e6e8ec", "#d3d7dd"
TARGET, WRONG, NOISE = "#0072b2", "#d55e00", "#8b929c"
KINDS = {"gdn": ("GDN layer", "#009e73", "circle"), "attention": ("attention layer", "#aa4499", "diamond")}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
NATS = "nats of log-odds wanted/unwanted"
CLIP = 100.0  # perplexity ratios above this are drawn at the edge of the dose curve's lower panel, with a mark
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


def draw(verdict: Verdict) -> dict[str, go.Figure]:
    """Every figure of a verdict, by name, in the order in which a report shows them."""
    drawn = (layer_sweep, dose_response, controls, baseline, prompt_effects, necessity, phases, decodability, damage)
    return {function.__name__.replace("_", "-"): function(verdict) for function in drawn}


# -- one figure for each piece of evidence -----------------------------------------------------------------------------


def layer_sweep(verdict: Verdict) -> go.Figure:
    """Effect with its interval at each searched layer, beside the size of what meaningless directions do there."""
    title, rows = "Effect at each layer", verdict.evidence.get("layers") or []
    if not rows:
        return not_measured(title, "no layer was searched")
    figure = _heading(_blank(title, height=420), f"effect on propensity ({NATS})")
    layers, noise = [row["layer"] for row in rows], [_noise(row) for row in rows]
    marks = {row["layer"]: _eligibility(row, _threshold(verdict, "decodability")) for row in rows}
    words = [f"layer {i}: meaningless directions do {number(r)} nats" for i, r in zip(layers, noise, strict=True)]
    bars = dict(x=layers, y=[2 * r for r in noise], base=[-r for r in noise], width=0.55, marker_color=PALE)
    figure.add_bar(**bars, name="meaningless directions, ± mean size", hovertext=words)
    for kind, (label, color, symbol) in KINDS.items():
        some = [row for row in rows if row["kind"] == kind]
        symbols = [symbol + marks[row["layer"]] for row in some]
        figure.add_scatter(
            x=[row["layer"] for row in some], y=[real(row["effect"]["value"]) for row in some], name=label,
            marker=dict(size=11, color=color, symbol=symbols, line=dict(width=2, color=color)), mode="markers",
            error_y=_bars([row["effect"] for row in some], color), showlegend=False,
            hovertext=[f"<b>{label}</b> {searched(row)}" for row in some],
        )  # fmt: skip
        if some:
            _legend(figure, label, color, symbol)
    for mark, meaning in (("-x-open", "crossed: sides not told apart"), ("-open", "hollow: breaks ordinary text")):
        if mark in marks.values():
            _legend(figure, meaning, MUTED, f"circle{mark}")
    for row in rows:
        if row["chosen"]:
            top, text = max([*ends(row["effect"]), 0.0]), f"<b>chosen: layer {row['layer']}</b>"
            figure.add_annotation(x=row["layer"], y=top, text=text, arrowhead=2, arrowwidth=1.5, ax=0, ay=-26, yshift=6)
    low, high = _span([*(end for row in rows for end in ends(row["effect"])), *noise, *(-r for r in noise)])
    figure.update_yaxes(range=[low, high + 0.12 * (high - low)])
    figure.update_xaxes(title="layer (the residual stream after it is edited)", tickvals=layers, zeroline=False)
    return _unmeasured(figure, [f"layer {row['layer']}" for row in rows if not finite([row["effect"]["value"]])])


def dose_response(verdict: Verdict) -> go.Figure:
    """The dose curve of the held-out prompts."""
    limit = _threshold(verdict, "damage: perplexity")
    return dose_curve(verdict.evidence.get("doses") or [], working=verdict.dose, limit=limit)


def dose_curve(rows: Sequence[Numbers], *, working: float | None = None, limit: float | None = None) -> go.Figure:
    """Mean propensity with its interval against dose; below it what each dose does to ordinary text.

    Args:
        rows: one mapping for each dose: `dose`, `propensity` (an `Estimate` as a dict) and, where measured,
            `perplexity_ratio` and `coherent`.
        working: the dose to mark.
        limit: the largest coherent perplexity ratio.
    """
    title, rows = "Dose and response", sorted(rows, key=lambda row: row["dose"])
    if not rows:
        return not_measured(title, "no doses were tried")
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.7, 0.3], vertical_spacing=0.12)
    figure.update_layout(template=TEMPLATE, title=title, height=490, showlegend=False, margin_t=TITLE + 46)
    doses, estimates = [row["dose"] for row in rows], [row["propensity"] for row in rows]
    coherent = [row.get("coherent", True) for row in rows]
    symbols = ["circle" if ok else "circle-open" for ok in coherent]
    marker = dict(size=9, color=TARGET, symbol=symbols, line=dict(width=2, color=TARGET))
    words = [
        lines(f"<b>dose {dose:g}</b>", f"propensity {estimate(e)} nats", "" if ok else "outside the coherent window")
        for dose, e, ok in zip(doses, estimates, coherent, strict=True)
    ]
    figure.add_scatter(
        x=doses, y=[real(e["value"]) for e in estimates], mode="lines+markers", name="propensity", marker=marker,
        line=dict(color=TARGET, width=2), error_y=_bars(estimates, TARGET), hovertext=words, row=1, col=1,
    )  # fmt: skip
    _ratio_panel(figure, rows, marker, limit)
    key, inside = [], [dose for dose, ok in zip(doses, coherent, strict=True) if ok]
    if inside and any("coherent" in row for row in rows):
        figure.add_vrect(x0=min(inside), x1=max(inside), fillcolor=TARGET, opacity=0.08, line_width=0, layer="below")
        key.append(f"<span style='color:{TARGET}'>shaded: coherent window</span>")
    if working is not None:
        figure.add_vline(x=working, line=dict(color=INK, width=1.2, dash="dash"))
        key.append(f"dashed: working dose {working:g}")
    _heading(figure, lines(f"propensity ({NATS})", "; ".join(key)))
    figure.update_yaxes(range=_span(end for e in estimates for end in ends(e)), row=1, col=1)
    low, high, ticks = min(doses), max(doses), []
    for dose in sorted(doses, key=abs):  # labels from the middle outwards, as many as a phone has room for
        if all(abs(dose - tick) > 0.15 * (high - low) for tick in ticks):
            ticks.append(dose)
    words, edge = [number(tick) for tick in ticks], 0.06 * (high - low or 1)
    figure.update_xaxes(range=[low - edge, high + edge], tickvals=ticks, ticktext=words, tickangle=0, zeroline=True)
    figure.update_xaxes(title="dose (residual norms, + is towards wanted)", row=2, col=1)
    return _unmeasured(figure, [f"dose {row['dose']:g}" for row in rows if not finite([row["propensity"]["value"]])])


def controls(verdict: Verdict) -> go.Figure:
    """The target beside norm-matched directions that mean nothing, or something else."""
    title, found = "Against directions that mean nothing", verdict.evidence.get("controls") or {}
    kinds: dict[str, list[Numbers]] = {
        kind: [row for row in rows if finite([row["effect"]])] for kind, rows in (found.get("kinds") or {}).items()
    }
    if not any(kinds.values()):
        return not_measured(title, "no control directions were run")
    labels = ["this direction", *(f"{safe(kind)}<br>n = {len(rows)}" for kind, rows in kinds.items())]
    figure = _rows(title, labels, f"effect on propensity<br>({NATS})")
    effect, bar = verdict.evidence["effect"], control_threshold({**found, "kinds": kinds})[0]
    _point(figure, 0, effect, TARGET, f"<b>this direction</b> at dose {verdict.dose:g}")
    for y, (kind, rows) in enumerate(kinds.items(), 1):
        words = [
            lines(f"<b>{safe(kind)}</b> {safe(row.get('name', ''))}", f"{number(row['effect'])} nats") for row in rows
        ]
        _dots(figure, y, [row["effect"] for row in rows], words, kind)
    span = _span([*(row["effect"] for rows in kinds.values() for row in rows), *ends(effect), bar, -bar])
    _line(figure, "x", -bar, color=NOISE, dash="dot")
    return _limit(figure, bar, f"to clear: {number(bar)}", span)


def baseline(verdict: Verdict) -> go.Figure:
    """Steering beside simply asking: propensity without help, steered, and under each persona."""
    title, found = "Steering beside just asking", verdict.evidence.get("baseline") or {}
    if "propensity" not in found:
        return not_measured(title, "the unsteered model was not scored")
    persona, doses = found.get("persona") or {}, verdict.evidence.get("doses") or []
    steered = next((row["propensity"] for row in doses if row["dose"] == verdict.dose), None)
    rows = (
        ("told to show<br>unwanted", persona.get("unwanted"), WRONG, "diamond", "no personas"),
        ("left alone", found["propensity"], NOISE, "circle", ""),
        (f"steered,<br>dose {verdict.dose:g}", steered, TARGET, "circle", "not on the dose curve"),
        ("told to show<br>wanted", persona.get("wanted"), TARGET, "diamond", "no personas"),
    )
    figure = _rows(title, [label for label, *_ in rows], f"propensity<br>({NATS})")
    for y, (label, seen, color, symbol, why) in enumerate(rows):
        if seen:
            _point(figure, y, seen, color, f"<b>{label.replace('<br>', ' ')}</b>", symbol=symbol)
        else:
            _absent(figure, y, why)
    return figure.update_xaxes(range=_span(end for _, seen, *_ in rows if seen for end in ends(seen)))


def prompt_effects(verdict: Verdict) -> go.Figure:
    """The effect on every held-out prompt, sorted, so that a mean cannot hide the ones that move the wrong way."""
    title, rows = "Prompt by prompt", verdict.evidence.get("prompts") or []
    known = sorted((row for row in rows if finite([row["effect"]])), key=lambda row: row["effect"])
    if not known:
        return not_measured(title, "no held-out prompt was scored")
    figure = _blank(title, height=400).update_layout(showlegend=False, margin_t=TITLE + 62)
    effects = [row["effect"] for row in known]
    colors = [WRONG if e < 0 else TARGET if e > 0 else NOISE for e in effects]
    words = [
        f"<b>{safe(row['id'])}</b>, topic {safe(row['group'])}<br>effect {number(row['effect'])} nats, "
        f"unsteered propensity {number(row['baseline'])} nats"
        for row in known
    ]
    figure.add_bar(
        x=[*range(1, len(known) + 1)], y=effects, marker_color=colors, width=0.8, hovertext=words, name="prompts"
    )
    mean, allowed = verdict.evidence["effect"], _threshold(verdict, "wrong way")
    if finite([mean["lower"], mean["upper"]]):
        figure.add_hrect(y0=mean["lower"], y1=mean["upper"], fillcolor=INK, opacity=0.1, line_width=0, layer="below")
    if finite([mean["value"]]):
        _line(figure, "y", mean["value"])
        _label(figure, 0.5, max([*ends(mean), 0.0]), f"mean {estimate(mean)}", anchor=("left", "bottom"))
    wrong, right, n = colors.count(WRONG), colors.count(TARGET), len(known)
    limit = f" (allowed: {allowed:.0%})" if allowed is not None else ""
    counts = (
        f"<span style='color:#b34700'><b>wrong way: {wrong} of {n}</b></span>{limit}",
        f"<span style='color:{TARGET}'><b>towards wanted: {right} of {n}</b></span>",
    )
    _heading(figure, lines(f"effect on propensity ({NATS})", *counts))
    figure.update_yaxes(range=_span([*effects, *ends(mean)]))
    figure.update_xaxes(
        title="held-out prompts, sorted by effect", range=[0.3, n + 0.7], showgrid=False, zeroline=False
    )
    return _unmeasured(figure, [safe(row["id"]) for row in rows if not finite([row["effect"]])])


def necessity(verdict: Verdict) -> go.Figure:
    """What is lost when the direction is taken out, beside taking out random ones."""
    title, found = "Taking the direction out", verdict.evidence.get("necessity")
    if not found:
        return not_measured(title, "no held-out prompt shows the behaviour,<br>so there is nothing to take out")
    drops, bar = finite(found["random_drops"]), _threshold(verdict, "necessity")
    labels = ["shown before", "lost without<br>this direction", f"lost without<br>random ones ({len(drops)})"]
    figure = _rows(title, labels, f"propensity<br>({NATS})")
    _point(figure, 0, found["before"], NOISE, f"<b>shown before</b>, {safe(found['where'])}", symbol="diamond")
    _point(figure, 1, found["drop"], TARGET, "<b>lost</b> when this direction is taken out")
    _dots(figure, 2, drops, [f"{number(drop)} nats lost without a random direction" for drop in drops], "random")
    span = _span([*drops, *ends(found["drop"]), *ends(found["before"]), bar])
    return _limit(figure, bar, f"to clear: {number(bar)}", span)


def phases(verdict: Verdict) -> go.Figure:
    """Effect when only the prompt's tokens, only the answer's tokens, or both are edited."""
    title, rows = "Which tokens to edit", verdict.evidence.get("phases") or []
    if not rows:
        return not_measured(title, "the phases were not run apart")
    words = {"prefill": "prompt tokens", "decode": "answer tokens", "both": "all tokens"}
    labels = [f"{safe(row['phase'])}<br>{words.get(row['phase'], '')}" for row in rows]
    figure = _rows(title, labels, f"effect on propensity<br>({NATS})")
    for y, row in enumerate(rows):
        color, mark = (TARGET, " (working)") if row["working"] else (NOISE, "")
        _point(figure, y, row["effect"], color, f"<b>{safe(row['phase'])}</b>{mark}", mark=mark)
    return figure.update_xaxes(range=_span(end for row in rows for end in ends(row["effect"])))


def decodability(verdict: Verdict) -> go.Figure:
    """How well the projection on the direction tells the held-out sides apart, beside shuffled labels."""
    title, found = "Telling the two sides apart", verdict.evidence.get("decodability")
    if not found:
        return not_measured(title, "the held-out sides were not projected")
    shuffled, bar = finite(found["shuffled"]), _threshold(verdict, "decodability")
    labels = ["this direction", f"shuffled labels<br>n = {len(shuffled)}"]
    figure = _rows(title, labels, "held-out AUROC (0.5: chance, 1: perfect)").update_xaxes(zeroline=False)
    _point(figure, 0, found["auroc"], TARGET, "<b>this direction</b>", unit="AUROC")
    _dots(figure, 1, shuffled, [f"shuffled labels: AUROC {number(value)}" for value in shuffled], "shuffled labels")
    _line(figure, "x", 0.5, color=MUTED, dash="solid")
    return _limit(figure, bar, f"lower end ≥ {number(bar)}", [-0.03, 1.03])


def damage(verdict: Verdict) -> go.Figure:
    """What the working dose breaks: three measures, each on its own fixed scale, two of them with a threshold."""
    title, found, made = "What it breaks", verdict.evidence.get("damage"), verdict.evidence.get("generation") or {}
    if not found:
        return not_measured(title, "no general text was modelled")
    repeated = [real((made.get(label) or {}).get("repetition")) for label in ("steered", "unsteered")]
    panels = (
        ("perplexity ratio on ordinary text (1: intact)", "damage: perplexity", found["perplexity_ratio"], 1.0, 2.0),
        ("KL on ordinary text (nats a token, no threshold)", "damage: KL", found["kl"], 0.0, 0.5),
        ("rise of repeated trigrams (share)", "damage: repetition", repeated[0] - repeated[1], 0.0, 0.25),
    )
    figure = make_subplots(rows=3, vertical_spacing=0.22, subplot_titles=[f"<b>{label}</b>" for label, *_ in panels])
    figure.update_layout(template=TEMPLATE, title=title, height=376, showlegend=False, margin_l=24, margin_b=30)
    figure.update_annotations(x=0, xanchor="left", font_size=12.5)
    figure.update_yaxes(visible=False, range=[-0.5, 1.2])
    for panel, (label, name, seen, intact, scale) in enumerate(panels, 1):
        value, limit = real(seen), _threshold(verdict, name)
        low, high = min([intact, *finite([value])]), max(scale, 1.3 * (limit or 0.0))
        figure.update_xaxes(range=[low - 0.03 * (high - low), high + 0.05 * (high - low)], nticks=6, row=panel, col=1)
        if panel == 3 and math.isnan(value):
            _absent(figure, 0, "nothing was generated", panel=panel)
            continue
        beyond = not value <= high  # off the scale, infinite, or null in a verdict that was read back
        x, said = (high, ratio(seen)) if beyond else (value, number(value))
        side = "left" if x > (low + high) / 2 else "right"
        color = TARGET if value <= (math.inf if limit is None else limit) and math.isfinite(value) else WRONG
        figure.add_scatter(
            x=[intact, x], y=[0, 0], mode="lines", line=dict(color=color, width=3), hoverinfo="skip", row=panel, col=1
        )
        figure.add_scatter(
            x=[x], y=[0], mode="markers+text", text=[f"<b>{said}</b>"], textposition=f"top {side}", name=name,
            marker=dict(size=12, color=color, symbol="triangle-right" if beyond else "circle"),
            hovertext=[lines(label, said)], row=panel, col=1,
        )  # fmt: skip
        _line(figure, "x", intact, color=MUTED, dash="solid", panel=panel)
        if limit is not None:
            _line(figure, "x", limit, panel=panel)
            _label(figure, limit, 1.0, f" limit {number(limit)}", anchor=("left", "top"), panel=panel, domain=True)
    return figure


def not_measured(title: str, why: str) -> go.Figure:
    """A figure that says that there is nothing to draw, and why."""
    figure = _blank(title, height=170).update_xaxes(visible=False).update_yaxes(visible=False)
    words, font = f"<b>not measured</b><br>{why}", dict(size=14, color=MUTED)
    return figure.add_annotation(text=words, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font=font)


# -- into a page -------------------------------------------------------------------------------------------------------


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


# -- shared ------------------------------------------------------------------------------------------------------------


def _blank(title: str, *, height: int) -> go.Figure:
    return go.Figure(layout=dict(template=TEMPLATE, title=title, height=height))


def _rows(title: str, labels: Sequence[str], unit: str) -> go.Figure:
    """A figure with one row for each label, from top to bottom, and a common horizontal axis."""
    figure = _blank(title, height=150 + 58 * len(labels)).update_layout(showlegend=False)
    ticks, around = list(range(len(labels))), [len(labels) - 0.5, -0.5]
    figure.update_yaxes(tickvals=ticks, ticktext=list(labels), range=around, showgrid=False, zeroline=False, ticks="")
    return figure.update_xaxes(title=unit, zeroline=True)


def _point(
    figure: go.Figure, y: int, seen: Numbers, color: str, what: str, *,
    symbol: str = "circle", unit: str = "nats", mark: str = "",
) -> None:  # fmt: skip
    """One estimate in a row: a large mark with its interval and its value written above it."""
    if not finite([seen["value"]]):
        _absent(figure, y, "no value")
        return
    words = lines(what, f"{estimate(seen)} {unit}", f"{seen['n']} prompts in {seen['groups']} topics")
    figure.add_scatter(
        x=[seen["value"]], y=[y], mode="markers+text", marker=dict(size=12, color=color, symbol=symbol), name=what,
        error_x=_bars([seen], color), text=[f"<b>{number(seen['value'])}{mark}</b>"], textposition="top center",
        hovertext=[words],
    )  # fmt: skip


def _dots(figure: go.Figure, y: int, values: Sequence[float], words: Sequence[str], name: str) -> None:
    """Many values in a row, spread a little so that each can be seen."""
    if not values:
        _absent(figure, y, "none were run")
        return
    spread = [y + 0.5 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]
    marker = dict(size=8, color=NOISE, opacity=0.75, line=dict(width=0.5, color="white"))
    figure.add_scatter(x=list(values), y=spread, mode="markers", marker=marker, name=name, hovertext=list(words))


def _ratio_panel(figure: go.Figure, rows: Sequence[Numbers], marker: Numbers, limit: float | None) -> None:
    """The lower panel of the dose curve: perplexity ratios on a logarithmic scale, clipped with a mark."""
    dashed = f"; dashed: limit {number(limit)}" if limit is not None else ""
    _heading(figure, f"perplexity ratio (log scale){dashed}", panel=2)
    if not any("perplexity_ratio" in row for row in rows):
        figure.update_yaxes(showticklabels=False, range=[-1, 1], zeroline=False, row=2, col=1)
        _absent(figure, 0, "no ordinary text was modelled", panel=2)
        return
    doses, ratios = [row["dose"] for row in rows], [real(row.get("perplexity_ratio")) for row in rows]
    clipped = [not r <= CLIP for r in ratios]
    shown = [CLIP if over else r for over, r in zip(clipped, ratios, strict=True)]
    symbols = ["triangle-up" if over else symbol for over, symbol in zip(clipped, marker["symbol"], strict=True)]
    figure.add_scatter(
        x=doses, y=shown, mode="lines+markers+text", name="perplexity ratio", line=dict(color=TARGET, width=1.5),
        marker={**marker, "symbol": symbols}, textposition="bottom center", textfont_size=14, row=2, col=1,
        text=[ratio(r) if over else "" for over, r in zip(clipped, ratios, strict=True)],
        hovertext=[f"<b>dose {d:g}</b><br>perplexity ratio {ratio(r)}" for d, r in zip(doses, ratios, strict=True)],
    )  # fmt: skip
    low, high = math.log10(min(shown)), math.log10(max([*shown, limit or 1.0]))
    room, ticks = 0.12 * (high - low) + 0.03, [1, 10, 100] if high - low > 1 else [0.5, 1, 1.5, 2, 3, 5, 10]
    words = [f"{tick:g}" for tick in ticks]
    figure.update_yaxes(
        type="log", range=[low - room, high + room], tickvals=ticks, ticktext=words, zeroline=False, row=2, col=1
    )
    if limit is not None:
        _line(figure, "y", limit, panel=2)


def _place(panel: int, *, x: str = "", y: str = "") -> dict[str, Any]:
    """Where coordinates count from: a panel's axes, or with " domain" its width or height from 0 to 1."""
    n = "" if panel == 1 else panel
    return dict(xref=f"x{n}{x}", yref=f"y{n}{y}")


def _heading(figure: go.Figure, text: str, *, panel: int = 1) -> go.Figure:
    """What the vertical axis measures, written above it: it is read without turning the head and never cut off."""
    place = dict(x=0, y=1, xanchor="left", yanchor="bottom", xshift=-44, yshift=8)
    place |= _place(panel, x=" domain", y=" domain")
    return figure.add_annotation(text=text, align="left", showarrow=False, font_size=12.5, **place)


def _line(figure: go.Figure, axis: str, at: float, *, color: str = INK, dash: str = "dash", panel: int = 1) -> None:
    """A straight line across one panel at a place on the "x" or "y" axis."""
    place = dict(x0=at, x1=at, y0=0, y1=1, **_place(panel, y=" domain"))
    if axis == "y":
        place = dict(x0=0, x1=1, y0=at, y1=at, **_place(panel, x=" domain"))
    figure.add_shape(type="line", line=dict(color=color, width=1.2, dash=dash), **place)


def _label(
    figure: go.Figure, x: float, y: float, text: str, *, anchor: tuple[str, str], panel: int = 1, domain: bool = False
) -> None:
    """Words at a place in the plot, where a legend would send the eye away; with `domain`, y runs from 0 to 1."""
    place = dict(x=x, y=y, xanchor=anchor[0], yanchor=anchor[1], **_place(panel, y=" domain" if domain else ""))
    figure.add_annotation(text=text, showarrow=False, font_size=12, **place)


def _limit(figure: go.Figure, x: float | None, text: str, span: Sequence[float]) -> go.Figure:
    """Set the span of the horizontal axis and draw a threshold, with its words above the plot and inside its width."""
    if x is not None and math.isfinite(x):
        _line(figure, "x", x)
        where = (x - span[0]) / (span[1] - span[0])
        side = "left" if where < 0.3 else "right" if where > 0.7 else "center"
        _label(figure, x, 1.0, text, anchor=(side, "bottom"), domain=True)
    return figure.update_xaxes(range=list(span))


def _absent(figure: go.Figure, y: float, why: str, *, panel: int = 1) -> None:
    """Say inside a row that it has no value, and why."""
    place, font = dict(x=0.02, y=y, xanchor="left", **_place(panel, x=" domain")), dict(size=12, color=MUTED)
    figure.add_annotation(text=f"not measured: {why}", showarrow=False, font=font, bgcolor="white", **place)


def _unmeasured(figure: go.Figure, missing: Sequence[str]) -> go.Figure:
    """Name inside the plot what has no value, instead of leaving a silent gap."""
    if missing:
        words = f"not measured: {', '.join(missing[:4])}{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}"
        place = dict(x=1, y=0, xanchor="right", yanchor="bottom", **_place(1, x=" domain", y=" domain"))
        figure.add_annotation(text=words, showarrow=False, font=dict(size=12, color=MUTED), bgcolor="white", **place)
    return figure


def _legend(figure: go.Figure, label: str, color: str, symbol: str) -> None:
    """An entry of the legend without data, so that its mark does not depend on which point comes first."""
    marker = dict(size=11, color=color, symbol=symbol, line=dict(width=2, color=color))
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=label)


def _threshold(verdict: Verdict, name: str) -> float | None:
    """The threshold of a criterion; None when it has none."""
    found = next((c.threshold for c in verdict.criteria if c.name == name), None)
    return found if found is not None and math.isfinite(found) else None


def _bars(estimates: Sequence[Numbers], color: str) -> dict[str, Any]:
    """Error bars from value, lower and upper."""
    up = [real(e["upper"]) - real(e["value"]) for e in estimates]
    down = [real(e["value"]) - real(e["lower"]) for e in estimates]
    return dict(type="data", symmetric=False, array=up, arrayminus=down, color=color, thickness=1.8, width=5)


def _span(values: Iterable[float | None]) -> list[float]:
    """An axis range that holds all values and zero, with room around them."""
    known = [*finite(values), 0.0]
    room = 0.09 * (max(known) - min(known)) or 1.0
    return [min(known) - room, max(known) + room]


def _eligibility(row: Numbers, auroc: float | None) -> str:
    """How a layer's mark says that it could not be chosen: hollow for damage, crossed for sides that look alike."""
    apart = None in (auroc, row.get("auroc")) or row["auroc"] >= auroc
    return "-open" if not row["coherent"] else "" if apart else "-x-open"


def _noise(row: Numbers) -> float:
    """Mean size of the stronger kind of meaningless direction at a layer."""
    return max([*finite([row["random_effect"], row.get("shuffled_effect")]), 0.0])
