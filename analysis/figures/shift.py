"""The figures of a shift: what moved between two checkpoints, and whether toward a behaviour.

Every function takes a `Shift` and returns one figure. Green circles are GDN layers and their states, purple diamonds
attention layers and their heads; of a pair of marks the small one is before, the large one after. What is grey means
nothing: control spans, and what nulls reach. Each figure says what a hollow mark is; it never counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.alignment import AlignedRow
from analysis.attention import ShareRow
from analysis.figures import parts
from analysis.figures.parts import GLYPHS, INK, KINDS, MUTED, NOISE, PALE, TARGET, TEMPLATE, TITLE, not_measured
from analysis.figures.states import before_after_map, state_heatmap
from analysis.shift import POINTS, SHARE_NAMES, SITE_NAMES, WAY, Claim, ProbeRow, Shift
from analysis.states import Change, MovedRow
from analysis.words import ends, estimate, finite, lines, nats, number, percent, real, safe
from probes.stats import Estimate

NO_STATES = "no GDN layer was compared,<br>so there are no states"
FARTHEST = 3.0  # ways beyond this come from layers where the personas hardly differ; they are clipped
UNITS = {
    "nats": ("<b>Do the answers lean more toward wanted?</b>", "change of propensity (nats)"),
    "AUROC": ("<b>Can wanted be told from unwanted better?</b>", "change of AUROC"),
    POINTS: ("<b>Does the request weigh more in memory?</b>", "change beyond control spans (percentage points)"),
    WAY: ("<b>Does the change lie along the direction?</b>", "part of the way to the wanted persona (1)"),
}
LABELS = {f"the request's share of {name}": f"in {name}" for name in SHARE_NAMES.values()}
LABELS["behaviour"] = "the answers"
SHARES = {
    "state": ("gdn.state", "of the final <b>GDN states</b>"),
    "readout": ("gdn.state", "of what the last token <b>reads</b> from the states"),
    "attention": ("attn.heads", "of the <b>attention</b> of the last token"),
}
_SITE_KINDS = {"gdn.state": "gdn", "attn.heads": "attention"}


def draw_shift(shift: Shift) -> dict[str, go.Figure]:
    """Every figure of a shift, by name, in the order in which a page shows them."""
    drawn = (claims, what_moved, effective_rank, half_life, along_direction, decodable, token_shares)
    return {function.__name__.replace("_", "-"): function(shift) for function in drawn}


def claims(shift: Shift) -> go.Figure:
    """The headline numbers, those of one unit on one axis, each with its interval and the band of its nulls."""
    title, groups = "What the comparison claims", {}
    for claim in shift.claims:
        groups.setdefault(claim.unit, []).append(claim)
    if not groups:
        return not_measured(title, "there are no claims")
    heights, gap = [52 * len(some) for some in groups.values()], 104
    figure = _stacked(title, heights, gap=gap, bottom=104)
    for panel, (unit, some) in enumerate(groups.items(), 1):
        question, words = UNITS.get(unit, ("", safe(unit)))
        parts.heading(figure, question, panel=panel)
        reach = _span_of(((claim.value, claim.bar) for claim in some), unit)
        for row, claim in enumerate(some):
            _claim(figure, claim, row, reach, panel)
        ticks: dict[str, Any] = dict(
            tickvals=list(range(len(some))), ticktext=[safe(LABELS.get(one.name) or one.name) for one in some]
        )
        figure.update_yaxes(
            **ticks, range=[len(some) - 0.5, -0.5], showgrid=False, zeroline=False, ticks="", row=panel, col=1
        )
        figure.update_xaxes(title=words, range=reach, zeroline=True, row=panel, col=1)
    parts.legend(figure, "shown: clear of zero and of the grey band", TARGET, "circle")
    parts.legend(figure, "not shown", TARGET, "circle-open")
    parts.legend(figure, "grey band: what means nothing", PALE, "square")
    return figure


def what_moved(shift: Shift) -> go.Figure:
    """How far the states moved, by layer and head."""
    title, unit = "How far the states moved", "relative change |S′ − S| / |S|"
    if not shift.moved.rows:
        return not_measured(title, NO_STATES)
    layers, kinds = _columns(shift)
    table = _table(shift, lambda row: row.relative.value)
    figure = state_heatmap(table, kinds=kinds, title=title, unit=unit)
    most = max([0.0, *(value for heads in table.values() for value in finite(heads))])
    figure.update_traces(zmin=0, zmax=most or 1, selector=dict(type="heatmap"))  # no change is pale, however small
    return _named(figure, layers, kinds)


def effective_rank(shift: Shift) -> go.Figure:
    """In how many directions states spread, before and after."""
    return _maps(shift, "Effective rank of the states", lambda row: row.rank, "effective rank")


def half_life(shift: Shift) -> go.Figure:
    """After how many tokens states have halved, before and after, in doublings."""
    title = "Half-life of what is in the states"
    if shift.moved.rows and all(row.half_life is None for row in shift.moved.rows):
        return not_measured(title, "keys and decays were not captured")
    return _maps(shift, title, lambda row: row.half_life, "log₂ of the half-life in tokens", scaled=_doublings)


def along_direction(shift: Shift) -> go.Figure:
    """How far each layer's change lies along the direction, beside its nulls; one panel for each site."""
    title, kinds = "Toward the behaviour, layer by layer", layer_kinds(shift)
    sites = [name for name in SITE_NAMES if any(row.site == name for row in shift.aligned)]
    if not sites:
        return not_measured(title, "no layer was compared")
    figure = _stacked(title, [190] * len(sites), gap=92, bottom=132)
    reach = _span_of(((row.way, row.bar) for row in shift.aligned if row.decides), WAY)
    for panel, name in enumerate(sites, 1):
        rows = [row for row in shift.aligned if row.site == name]
        parts.heading(figure, f"<b>{SITE_NAMES[name]}</b>: part of the way (1: the wanted persona)", panel=panel)
        _nulls(figure, rows, reach, panel)
        for kind in dict.fromkeys(kinds[row.layer] for row in rows):
            _ways(figure, [row for row in rows if kinds[row.layer] == kind], kind, reach, panel)
        missing = [f"layer {row.layer}" for row in rows if not finite([row.way.value])]
        parts.unmeasured(figure, missing, panel=panel)
        if reach[0] < 1 < reach[1]:
            parts.line(figure, "y", 1.0, color=MUTED, panel=panel)
    _layer_axis(figure, kinds, len(sites))
    _kinds_legend(figure, kinds.values())
    if not all(row.decides for row in shift.aligned):
        parts.legend(figure, "hollow: the personas differ too little there to decide", MUTED, "circle-open")
    if any(row.beyond for row in shift.aligned):
        parts.legend(figure, "<b>*</b> beyond every null", "rgba(0,0,0,0)", "circle")
    if any(_outside(row.way, reach) for row in shift.aligned):
        parts.legend(figure, "triangle: outside the scale", MUTED, "triangle-up-open")
    parts.legend(figure, "grey bar: what nulls reach", PALE, "square")
    return figure.update_yaxes(range=reach)


def decodable(shift: Shift) -> go.Figure:
    """How well a linear probe tells wanted from unwanted, at each layer before and after."""
    title, kinds = "Telling wanted from unwanted, before and after", layer_kinds(shift)
    rows = [row for row in shift.probes if row.head is None]
    if not rows:
        return not_measured(title, "no probe was fitted")
    figure = _stacked(title, [230], gap=0, bottom=116)
    names = " and ".join(SITE_NAMES.get(name, safe(name)) for name in dict.fromkeys(row.site for row in rows))
    parts.heading(figure, f"AUROC of a linear probe on the {names} (0.5 is chance)")
    for site in dict.fromkeys(row.site for row in rows):
        some = [row for row in rows if row.site == site]
        marks, words = [row.significant for row in some], [probe_words(row) for row in some]
        changes = [row.auroc for row in some]
        _pairs(figure, [row.layer for row in some], changes, marks, _look(site), words, site)
    parts.line(figure, "y", 0.5, color=MUTED)
    known = [end for row in rows for side in _sides(row.auroc) for end in ends(numbers(side))]
    low = min([0.5, *known])
    figure.update_yaxes(range=[low - 0.06, 1.06], zeroline=False)
    _layer_axis(figure, {row.layer: kinds.get(row.layer, "") for row in rows}, 1)
    _kinds_legend(figure, [_SITE_KINDS.get(row.site, "") for row in rows])
    _pairs_legend(figure)
    if not all(mark for row in rows for mark in row.significant):
        parts.legend(figure, "hollow: not beyond shuffled labels", MUTED, "circle-open")
    return figure


def token_shares(shift: Shift) -> go.Figure:
    """The share of the direction's tokens and of control spans, before and after, for all layers and each of them."""
    title = "How much the request weighs in memory"
    found = {kind: [row for row in shift.shares if row.kind == kind and row.head is None] for kind in SHARES}
    found = {kind: rows for kind, rows in found.items() if rows}
    if not found:
        return not_measured(title, "no prompt has room for a control span before the request")
    figure = _stacked(title, [190] * len(found), gap=100, bottom=132)
    for panel, (kind, rows) in enumerate(found.items(), 1):
        site, words = SHARES[kind]
        parts.heading(figure, f"% {words}", panel=panel)
        places, hover = range(len(rows)), [share_words(row) for row in rows]
        for name, aside, look in (("direction", -0.19, _look(site)), ("control", 0.19, (NOISE, "circle"))):
            changes = [getattr(row, name) for row in rows]
            marks = [(True, row.shown or name == "control") for row in rows]
            _pairs(
                figure, [x + aside for x in places], changes, marks, look, hover, f"{name} {kind}", panel=panel,
                apart=0.09, scale=100.0,
            )  # fmt: skip
        texts = ["all" if row.layer is None else str(row.layer) for row in rows]
        every = 1 if len(rows) <= 33 else 4
        shown = [text if i % every == 0 or text == "all" else "" for i, text in enumerate(texts)]
        ticks: dict[str, Any] = dict(
            tickvals=list(places), ticktext=[f"<b>{text}</b>" if text == "all" else text for text in shown]
        )
        figure.update_xaxes(**ticks, range=[-0.6, len(rows) - 0.4], zeroline=False, row=panel, col=1)
        parts.line(figure, "x", 0.5, color=PALE, dash="solid", panel=panel)
    figure.update_xaxes(title="layer (all: the mean over layers)", row=len(found), col=1)
    figure.update_yaxes(rangemode="tozero")
    _kinds_legend(figure, [_SITE_KINDS[SHARES[kind][0]] for kind in found], "the request: {}")
    parts.legend(figure, "control spans of equal length", NOISE, "circle")
    _pairs_legend(figure)
    if not all(row.shown for rows in found.values() for row in rows):
        words = "hollow: its excess over control spans changed no more than nulls do"
        parts.legend(figure, words, MUTED, "circle-open")
    return figure


def layer_kinds(shift: Shift) -> dict[int, str]:
    """The kind of each layer that was compared, known from the sites that it has; "" where it is not."""
    found: dict[int, str] = {row.layer: "gdn" for row in shift.moved.rows}
    for row in shift.aligned:
        found[row.layer] = _SITE_KINDS.get(row.site) or found.get(row.layer, "")
    return dict(sorted(found.items()))


def known(value: float | None) -> float:
    """A number as a file would hold it: NaN where it is not finite."""
    return real(value) if finite([value]) else math.nan


def numbers(found: Estimate, scale: float = 1.0) -> dict[str, Any]:
    """An estimate as a dict, multiplied, NaN where it is not finite."""
    scaled = {key: scale * known(getattr(found, key)) for key in ("value", "lower", "upper")}
    return found.as_dict() | scaled


# -- maps of states ----------------------------------------------------------------------------------------------------


def _columns(shift: Shift) -> tuple[list[int], list[str]]:
    """The layers that maps show, and their kinds."""
    known = {layer: kind for layer, kind in layer_kinds(shift).items() if kind}
    return list(known), list(known.values())


def _table(shift: Shift, value: Callable[[MovedRow], float]) -> dict[int, list[float]]:
    """By place of a layer among the columns, one number for each head."""
    layers, table = _columns(shift)[0], {}
    for row in sorted(shift.moved.rows, key=lambda row: (row.layer, row.head)):
        table.setdefault(layers.index(row.layer), []).append(known(value(row)))
    return table


def _maps(
    shift: Shift, title: str, value: Callable[[MovedRow], Change | None], unit: str, *,
    scaled: Callable[[float], float] = known,
) -> go.Figure:  # fmt: skip
    if not shift.moved.rows:
        return not_measured(title, NO_STATES)

    def side(name: str) -> dict[int, list[float]]:
        def one(row: MovedRow) -> float:
            found = value(row)
            return math.nan if found is None else scaled(getattr(found, name).value)

        return _table(shift, one)

    layers, kinds = _columns(shift)
    figure = before_after_map(side("before"), side("after"), kinds=kinds, title=title, unit=unit)
    every: Any = figure.data
    for drawn in every:  # two decimals fit into the cells of half a page
        if drawn.type == "heatmap" and drawn.text is not None:
            drawn.text = [["" if value is None else nats(value) for value in row] for row in drawn.z]
    return _named(figure, layers, kinds)


def _named(figure: go.Figure, layers: Sequence[int], kinds: Sequence[str]) -> go.Figure:
    """Where only some layers were compared, the columns of a map are these, and are called what they are."""
    if list(layers) == list(range(len(layers))):
        return figure

    def renamed(text: str, place: int) -> str:
        return text.replace(f"layer {place},", f"layer {layers[place]},", 1)

    every: Any = figure.data
    for drawn in every:
        if drawn.type == "heatmap":
            drawn.hovertext = [[renamed(text, i) for i, text in enumerate(row)] for row in drawn.hovertext or ()]
        elif (drawn.name or "").startswith("holes"):
            drawn.hovertext = [renamed(text, i) for i, text in zip(drawn.x, drawn.hovertext or (), strict=True)]
    marks = [f"<span style='color:{KINDS[kind][1]}'>{GLYPHS[kind]}</span>" for kind in kinds]
    return figure.update_xaxes(ticktext=[f"{layer}<br>{mark}" for layer, mark in zip(layers, marks, strict=True)])


def _doublings(tokens: float) -> float:
    return math.log2(tokens) if finite([tokens]) and tokens > 0 else math.nan


# -- marks -------------------------------------------------------------------------------------------------------------


def _stacked(title: str, heights: Sequence[int], *, gap: int, bottom: int) -> go.Figure:
    """Panels below each other, as high as said, with a legend at the foot."""
    inside, top = sum(heights) + gap * (len(heights) - 1), TITLE + 40
    figure = make_subplots(
        rows=len(heights), cols=1, row_heights=list(heights), vertical_spacing=gap / inside if len(heights) > 1 else 0
    )
    figure.update_layout(template=TEMPLATE, title=title, height=inside + top + bottom, showlegend=True)
    return figure.update_layout(margin=dict(t=top, b=bottom), legend_y=-66 / inside)


def _span_of(known_pairs: Iterable[tuple[Estimate, float]], unit: str) -> list[float]:
    """The range of an axis: values, intervals and bars; ways only as far as they mean something."""
    reach: list[float] = []
    for found, bar in known_pairs:
        reach += [*ends(numbers(found)), *finite([known(bar), -known(bar)])]
    if unit == WAY:
        reach = [min(max(value, -FARTHEST), FARTHEST) for value in reach]
    return parts.span(reach)


def _outside(found: Estimate, reach: Sequence[float]) -> int:
    """On which side of an axis a value falls: -1 below, 1 above, 0 inside."""
    value = known(found.value)
    return -1 if value < reach[0] else 1 if value > reach[1] else 0


def _clipped(found: Estimate, reach: Sequence[float]) -> dict[str, float]:
    """Value and interval as far as an axis goes."""
    seen = numbers(found)
    inside = {key: min(max(seen[key], reach[0]), reach[1]) for key in ("value", "lower", "upper")}
    return inside if not _outside(found, reach) else {key: inside["value"] for key in inside}


def _claim(figure: go.Figure, claim: Claim, row: int, reach: Sequence[float], panel: int) -> None:
    """One claim in its row."""
    if not finite([claim.value.value]):
        parts.absent(figure, row, "no value", panel=panel)
        figure.add_scatter(x=[], y=[], showlegend=False, row=panel, col=1)
        return
    bar = min(known(claim.bar), max(map(abs, reach)))
    if bar > 0:
        box = dict(fillcolor=PALE, opacity=0.6, line_width=0, layer="below", **parts.axes(panel))
        x0, x1 = max(-bar, reach[0]), min(bar, reach[1])
        figure.add_shape(type="rect", x0=x0, x1=x1, y0=row - 0.42, y1=row + 0.42, **box)
    seen, side = _clipped(claim.value, reach), _outside(claim.value, reach)
    symbol = {0: "circle", 1: "triangle-right", -1: "triangle-left"}[side] + ("" if claim.shown else "-open")
    value = claim.value.value
    figure.add_scatter(
        x=[seen["value"]], y=[row], mode="markers+text", error_x=parts.bars([seen], TARGET), name=claim.name,
        marker=dict(size=12, color=TARGET, symbol=symbol, line=dict(width=2, color=TARGET)), showlegend=False,
        text=[f"<b>{'+' if value > 0 else ''}{number(value)}</b>"],
        textposition="top center" if value else "top right", hovertext=[claim_words(claim)], row=panel, col=1,
    )  # fmt: skip


def claim_words(claim: Claim) -> str:
    return lines(
        f"<b>{safe(claim.name)}</b>",
        f"{estimate(numbers(claim.value))} {safe(claim.unit)}",
        safe(held_against(claim)),
        f"{claim.value.n} prompts in {claim.value.groups} topics",
        "shown" if claim.shown else "not shown",
    )


def held_against(claim: Claim) -> str:
    """What a claim is held against, and how far that reaches."""
    return claim.against + (f" ±{number(claim.bar)}" if finite([claim.bar]) else "")


def way_words(row: AlignedRow) -> str:
    """A layer's row in a label."""
    found = ", ".join(f"{safe(name)} {number(known(value))}" for name, value in row.p.items())
    return lines(
        f"<b>{SITE_NAMES.get(row.site, safe(row.site))}, layer {row.layer}</b>",
        f"{estimate(numbers(row.way))} of the way",
        f"nulls reach ±{number(known(row.bar))}",
        f"cosine {number(known(row.cosine))}; p against nulls: {found}",
        f"the personas differ by {number(known(row.gap))} of the norm, reliability {number(known(row.reliability))}",
        "beyond every null" if row.beyond else "not beyond every null" if row.decides else "does not decide",
    )


def _nulls(figure: go.Figure, rows: Sequence[AlignedRow], reach: Sequence[float], panel: int) -> None:
    bars = [known(row.bar) for row in rows]
    low, high = ([min(max(side * bar, reach[0]), reach[1]) for bar in bars] for side in (-1, 1))
    words = [f"layer {row.layer}: nulls reach ±{number(bar)}" for row, bar in zip(rows, bars, strict=True)]
    marker = dict(color=PALE, opacity=[1.0 if row.decides else 0.4 for row in rows])
    figure.add_bar(
        x=[row.layer for row in rows], y=[b - a for a, b in zip(low, high, strict=True)], base=low, width=0.6,
        marker=marker, name=f"nulls {panel}", hovertext=words, showlegend=False, row=panel, col=1,
    )  # fmt: skip


def _ways(figure: go.Figure, rows: Sequence[AlignedRow], kind: str, reach: Sequence[float], panel: int) -> None:
    color, symbol = KINDS[kind][1:] if kind else (INK, "circle")
    shapes = {0: symbol, 1: "triangle-up", -1: "triangle-down"}
    symbols = [shapes[_outside(row.way, reach)] + ("" if row.decides else "-open") for row in rows]
    seen = [_clipped(row.way, reach) for row in rows]
    figure.add_scatter(
        x=[row.layer for row in rows], y=[one["value"] for one in seen], mode="markers+text", row=panel, col=1,
        marker=dict(size=10, color=color, symbol=symbols, line=dict(width=2, color=color)), showlegend=False,
        error_y=parts.bars(seen, color), text=["<b>*</b>" if row.beyond else "" for row in rows],
        textposition="middle right", textfont=dict(size=19, color=INK), name=f"{kind or 'layer'} {panel}",
        hovertext=[way_words(row) for row in rows],
    )  # fmt: skip


def _look(site: str) -> tuple[str, str]:
    """Colour and symbol of what a site shows."""
    kind = _SITE_KINDS.get(site, "")
    return (KINDS[kind][1], KINDS[kind][2]) if kind else (INK, "circle")


def _sides(change: Change) -> tuple[Estimate, Estimate]:
    return change.before, change.after


def _pairs(
    figure: go.Figure, xs: Sequence[float], changes: Sequence[Change], filled: Sequence[tuple[bool, bool]],
    look: tuple[str, str], words: Sequence[str], name: str, *, panel: int = 1, apart: float = 0.14, scale: float = 1.0,
) -> None:  # fmt: skip
    """A small mark before and a large one after, joined by a line, each with its interval."""
    color, symbol = look
    joined = [(x - apart, x + apart, None) for x in xs]
    heights = [(*(scale * known(side.value) for side in _sides(change)), None) for change in changes]
    figure.add_scatter(
        x=[x for three in joined for x in three], y=[y for three in heights for y in three], mode="lines",
        line=dict(color=color, width=1.5), hoverinfo="skip", showlegend=False, name=f"{name} line", row=panel, col=1,
    )  # fmt: skip
    for side, (when, size) in enumerate((("before", 6), ("after", 11))):
        seen = [numbers(_sides(change)[side], scale) for change in changes]
        symbols = [symbol + ("" if marks[side] else "-open") for marks in filled]
        marker = dict(size=size, color=color, symbol=symbols, line=dict(width=2 if side else 1.5, color=color))
        figure.add_scatter(
            x=[three[side] for three in joined], y=[one["value"] for one in seen], mode="markers", marker=marker,
            error_y={**parts.bars(seen, color), "thickness": 1.2, "width": 3}, hovertext=list(words),
            showlegend=False, name=f"{name} {when}", row=panel, col=1,
        )  # fmt: skip


def _pairs_legend(figure: go.Figure) -> None:
    figure.add_scatter(
        x=[None], y=[None], mode="lines+markers", line=dict(color=MUTED, width=1.5), name="small: before, large: after",
        marker=dict(color=MUTED, size=7),
    )  # fmt: skip


def _kinds_legend(figure: go.Figure, kinds: Iterable[str], words: str = "{}") -> None:
    present = set(kinds)
    for kind, (text, color, symbol) in KINDS.items():
        if kind in present:
            parts.legend(figure, words.format(text), color, symbol)


def _layer_axis(figure: go.Figure, layers: Iterable[int], panels: int) -> None:
    layers = sorted(layers)
    every = 1 if len(layers) <= 32 else 4
    figure.update_xaxes(tickvals=layers[::every], range=[min(layers) - 0.6, max(layers) + 0.6], zeroline=False)
    figure.update_xaxes(title="layer", row=panels, col=1)


def probe_words(row: ProbeRow) -> str:
    marks = " and ".join(w for w, mark in zip(("before", "after"), row.significant, strict=True) if mark) or "never"
    return lines(
        f"<b>{SITE_NAMES.get(row.site, safe(row.site))}, layer {row.layer}</b>",
        f"AUROC before {estimate(numbers(row.auroc.before))}",
        f"AUROC after {estimate(numbers(row.auroc.after))}",
        f"change {estimate(numbers(row.auroc.change))}",
        f"beyond shuffled labels: {marks}",
    )


def share_words(row: ShareRow) -> str:
    where = "mean over layers" if row.layer is None else f"layer {row.layer}"
    found = {"the request": row.direction, "control spans": row.control, "difference": row.excess}
    return lines(
        f"<b>{safe(row.kind)}, {where}</b>",
        *(
            f"{name}: {percent(known(change.before.value))} → {percent(known(change.after.value))}"
            for name, change in found.items()
        ),
        f"the difference changed by {estimate(numbers(row.excess.change, 100))} percentage points",
        f"nulls reach ±{number(100 * known(row.bar))}: {'changed' if row.shown else 'no change shown'}",
    )
