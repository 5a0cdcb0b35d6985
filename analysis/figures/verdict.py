"""The figures of a verdict: one function for each piece of evidence.

Every function takes a `Verdict` and returns one figure; nothing is computed here that decides anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures import parts
from analysis.figures.parts import INK, KINDS, MUTED, NATS, NOISE, PALE, TARGET, TEMPLATE, TITLE, WRONG, not_measured
from analysis.words import (
    EDITED,
    UNITS,
    Numbers,
    ends,
    estimate,
    finite,
    lines,
    number,
    percent,
    ratio,
    real,
    reason,
    safe,
    searched,
    wrapped,
)
from probes.criteria import Verdict
from probes.evidence import control_threshold

CLIP = 100.0  # perplexity ratios above this are drawn at the edge of the dose curve's lower panel, with a mark


def draw(verdict: Verdict) -> dict[str, go.Figure]:
    """Every figure of a verdict, by name, in the order in which a report shows them."""
    drawn = (
        layer_sweep, methods, dose_response, controls, baseline, prompt_effects, elsewhere, specificity, necessity,
        decodability, phases, modes, damage,
    )  # fmt: skip
    return {function.__name__.replace("_", "-"): function(verdict) for function in drawn}


def layer_sweep(verdict: Verdict) -> go.Figure:
    """Effect with its interval at each searched layer, beside what meaningless directions should reach."""
    title, rows = "Effect at each layer", verdict.evidence.get("layers") or []
    if not rows:
        return not_measured(title, "no layer was searched")
    figure = parts.heading(parts.blank(title, height=420), f"effect on propensity ({NATS})")
    layers, held = [row["layer"] for row in rows], [row for row in rows if finite([row["bar"]])]
    noise = [_noise(row) for row in held]  # controls are run at the better layers alone
    marks = {row["layer"]: _eligibility(row, _threshold(verdict, "decodability")) for row in rows}
    reach = "meaningless directions are expected to reach"
    words = [f"layer {row['layer']}: {reach} {number(r)} nats" for row, r in zip(held, noise, strict=True)]
    bars = dict(
        x=[row["layer"] for row in held],
        y=[2 * r for r in noise],
        base=[-r for r in noise],
        width=0.55,
        marker_color=PALE,
    )
    figure.add_bar(**bars, name=f"± what {reach}", hovertext=words)
    for kind, (label, color, symbol) in KINDS.items():
        some = [row for row in rows if row["kind"] == kind]
        symbols = [symbol + marks[row["layer"]] for row in some]
        figure.add_scatter(
            x=[row["layer"] for row in some], y=[real(row["effect"]["value"]) for row in some], name=label,
            marker=dict(size=11, color=color, symbol=symbols, line=dict(width=2, color=color)), mode="markers",
            error_y=parts.bars([row["effect"] for row in some], color), showlegend=False,
            hovertext=[f"<b>{label}</b> {searched(row)}" for row in some],
        )  # fmt: skip
        if some:
            parts.legend(figure, label, color, symbol)
    for mark, meaning in (("-x-open", "crossed: sides not told apart"), ("-open", "hollow: breaks ordinary text")):
        if mark in marks.values():
            parts.legend(figure, meaning, MUTED, f"circle{mark}")
    for row in rows:
        if row["chosen"]:
            top, text = max([*ends(row["effect"]), 0.0]), f"<b>chosen: layer {row['layer']}</b>"
            figure.add_annotation(x=row["layer"], y=top, text=text, arrowhead=2, arrowwidth=1.5, ax=0, ay=-26, yshift=6)
    low, high = parts.span([*(end for row in rows for end in ends(row["effect"])), *noise, *(-r for r in noise)])
    figure.update_yaxes(range=[low, high + 0.12 * (high - low)])
    figure.update_xaxes(title=f"layer ({EDITED[verdict.site]})", tickvals=layers, zeroline=False)
    return parts.unmeasured(figure, [f"layer {row['layer']}" for row in rows if not finite([row["effect"]["value"]])])


def methods(verdict: Verdict) -> go.Figure:
    """Each method where it did best: what cross-validation saw on the fit split, and what held-out topics say."""
    title, rows = "Methods side by side", verdict.evidence.get("methods") or []
    if not rows:
        return not_measured(title, "the methods were not run beside each other")
    labels = [_bold(wrapped(f"{row['method']}{' (judged)' * row['judged']}", 24), row["judged"]) for row in rows]
    where = [f"layer {row['layer']}, dose {row['dose']:g}" for row in rows]
    figure = parts.rows(title, list(map(lines, labels, where)), f"effect on propensity ({NATS})")
    figure.update_layout(height=186 + 84 * len(rows), margin_t=TITLE + 64)  # two marks a row
    for y, row in enumerate(rows):
        color, sure = TARGET if row["judged"] else NOISE, row["effect"]
        words = lines(
            f"<b>{safe(row['method'])}</b>, {where[y]}",
            f"cross-validated on the fit split {estimate(row['searched'])} nats",
            f"held-out {estimate(sure)} nats, an interval of {number(100 * sure['confidence'])}%",
            f"meaningless directions are expected to reach {number(row['bar'])} nats there",
            f"AUROC {number(row['auroc'])}, perplexity ratio {ratio(row['perplexity_ratio'])}",
            f"cosine with the judged direction {number(row['cosine'])}" if row["cosine"] is not None else "",
        )
        for seen, at, symbol, hue in ((row["searched"], -0.19, "circle-open", NOISE), (sure, 0.19, "circle", color)):
            if finite([seen["value"]]):
                figure.add_scatter(
                    x=[seen["value"]], y=[y + at], mode="markers+text", error_x=parts.bars([seen], hue),
                    marker=dict(size=12, color=hue, symbol=symbol, line=dict(width=2, color=hue)), hovertext=[words],
                    text=[_bold(number(seen["value"]), symbol == "circle")], textposition="top center",
                    name="fit split" if symbol == "circle-open" else "held-out",
                )  # fmt: skip
            else:
                parts.absent(figure, y + at, "no value")
    sure = f"{number(100 * rows[0]['effect']['confidence'])}% intervals"
    sure += f" (all {len(rows)} together)" if len(rows) > 1 else ""
    key = lines("hollow: cross-validated on the fit split, 95% intervals", f"filled: held-out topics, {sure}")
    parts.heading(figure, key)
    return figure.update_xaxes(
        range=parts.span(end for row in rows for k in ("searched", "effect") for end in ends(row[k]))
    )


def dose_response(verdict: Verdict) -> go.Figure:
    """The dose curve of the held-out prompts."""
    limit = _threshold(verdict, "damage: perplexity")
    rows = verdict.evidence.get("doses") or []
    return dose_curve(rows, working=verdict.dose, limit=limit, unit=UNITS[verdict.site])


def dose_curve(
    rows: Sequence[Numbers], *, working: float | None = None, limit: float | None = None, unit: str = "residual norms"
) -> go.Figure:
    """Mean propensity with its interval against dose; below it what each dose does to ordinary text.

    Args:
        rows: one mapping for each dose: `dose`, `propensity` (an `Estimate` as a dict) and, where measured,
            `perplexity_ratio` and `coherent`.
        working: the dose to mark.
        limit: the largest coherent perplexity ratio; its inverse is the smallest.
        unit: what a dose counts.
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
        line=dict(color=TARGET, width=2), error_y=parts.bars(estimates, TARGET), hovertext=words, row=1, col=1,
    )  # fmt: skip
    _ratio_panel(figure, rows, marker, limit)
    key, inside = [], [dose for dose, ok in zip(doses, coherent, strict=True) if ok]
    if inside and any("coherent" in row for row in rows):
        figure.add_vrect(x0=min(inside), x1=max(inside), fillcolor=TARGET, opacity=0.08, line_width=0, layer="below")
        key.append(f"<span style='color:{TARGET}'>shaded: coherent window</span>")
    if working is not None:
        figure.add_vline(x=working, line=dict(color=INK, width=1.2, dash="dash"))
        key.append(f"dashed: working dose {working:g}")
    parts.heading(figure, lines(f"propensity ({NATS})", "; ".join(key)))
    figure.update_yaxes(range=parts.span(end for e in estimates for end in ends(e)), row=1, col=1)
    low, high, ticks = min(doses), max(doses), []
    for dose in sorted(doses, key=abs):  # labels from the middle outwards, as many as a phone has room for
        if all(abs(dose - tick) > 0.15 * (high - low) for tick in ticks):
            ticks.append(dose)
    words, edge = [number(tick) for tick in ticks], 0.06 * (high - low or 1)
    figure.update_xaxes(range=[low - edge, high + edge], tickvals=ticks, ticktext=words, tickangle=0, zeroline=True)
    figure.update_xaxes(title=f"dose ({unit}, + is towards wanted)", row=2, col=1)
    return parts.unmeasured(
        figure, [f"dose {row['dose']:g}" for row in rows if not finite([row["propensity"]["value"]])]
    )


def controls(verdict: Verdict) -> go.Figure:
    """The target beside norm-matched directions that mean nothing, or something else."""
    title, found = "Against directions that mean nothing", verdict.evidence.get("controls") or {}
    kinds: dict[str, list[Numbers]] = {
        kind: [row for row in rows if finite([row["effect"]])] for kind, rows in (found.get("kinds") or {}).items()
    }
    if not any(kinds.values()):
        return not_measured(title, "no control directions were run")
    labels = ["this direction", *(f"{safe(kind)}<br>n = {len(rows)}" for kind, rows in kinds.items())]
    figure = parts.rows(title, labels, f"effect on propensity<br>({NATS})")
    effect = found.get("target") or verdict.evidence["effect"]  # older verdicts ran controls on all prompts
    bar = control_threshold({**found, "kinds": kinds})[0]
    parts.point(figure, 0, effect, TARGET, f"<b>this direction</b> at dose {verdict.dose:g}")
    for y, (kind, rows) in enumerate(kinds.items(), 1):
        words = [
            lines(
                f"<b>{safe(kind)}</b> {safe(row['name'])}",
                f"{number(row['effect'])} nats",
                f"cosine with this direction {number(row['cosine'])}",
            )
            for row in rows
        ]
        parts.dots(figure, y, [row["effect"] for row in rows], words, kind)
    span = parts.span([*(row["effect"] for rows in kinds.values() for row in rows), *ends(effect), bar, -bar])
    parts.line(figure, "x", -bar, color=NOISE, dash="dot")
    return parts.limit(figure, bar, f"to clear: {number(bar)}", span)


def baseline(verdict: Verdict) -> go.Figure:
    """Steering beside simply asking: propensity without help, steered, and under each persona."""
    title, found = "Steering beside just asking", verdict.evidence.get("baseline") or {}
    if "propensity" not in found:
        return not_measured(title, "the unsteered model was not scored")
    persona, doses = found.get("persona") or {}, verdict.evidence.get("doses") or []
    steered = next((row["propensity"] for row in doses if row["dose"] == verdict.dose), None)
    unasked, by = "no personas, and no other way to ask", f" by {persona['how']}" if persona.get("how") else ""
    rows = (
        ("told to show<br>unwanted", persona.get("unwanted"), WRONG, "diamond", unasked),
        ("left alone", found["propensity"], NOISE, "circle", ""),
        (f"steered,<br>dose {verdict.dose:g}", steered, TARGET, "circle", "not on the dose curve"),
        ("told to show<br>wanted", persona.get("wanted"), TARGET, "diamond", unasked),
    )
    figure = parts.rows(title, [label for label, *_ in rows], f"propensity<br>({NATS})")
    for y, (label, seen, color, symbol, why) in enumerate(rows):
        if seen:
            told = by if symbol == "diamond" else ""
            parts.point(figure, y, seen, color, f"<b>{label.replace('<br>', ' ')}</b>{safe(told)}", symbol=symbol)
        else:
            parts.absent(figure, y, why)
    return figure.update_xaxes(range=parts.span(end for _, seen, *_ in rows if seen for end in ends(seen)))


def prompt_effects(verdict: Verdict) -> go.Figure:
    """The effect on every held-out prompt, sorted, so that a mean cannot hide the ones that move the wrong way."""
    title, rows = "Prompt by prompt", verdict.evidence.get("prompts") or []
    known = sorted((row for row in rows if finite([row["effect"]])), key=lambda row: row["effect"])
    if not known:
        return not_measured(title, "no held-out prompt was scored")
    figure = parts.blank(title, height=400).update_layout(showlegend=False, margin_t=TITLE + 62)
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
        parts.line(figure, "y", mean["value"])
        parts.label(figure, 0.5, max([*ends(mean), 0.0]), f"mean {estimate(mean)}", anchor=("left", "bottom"))
    wrong, right, n = colors.count(WRONG), colors.count(TARGET), len(known)
    limit = f" (allowed: {allowed:.0%})" if allowed is not None else ""
    counts = (
        f"<span style='color:#b34700'><b>wrong way: {wrong} of {n}</b></span>{limit}",
        f"<span style='color:{TARGET}'><b>towards wanted: {right} of {n}</b></span>",
    )
    parts.heading(figure, lines(f"effect on propensity ({NATS})", *counts))
    figure.update_yaxes(range=parts.span([*effects, *ends(mean)]))
    figure.update_xaxes(
        title="held-out prompts, sorted by effect", range=[0.3, n + 0.7], showgrid=False, zeroline=False
    )
    return parts.unmeasured(figure, [safe(row["id"]) for row in rows if not finite([row["effect"]])])


def elsewhere(verdict: Verdict) -> go.Figure:
    """The working intervention on held-out prompts, and on prompts unlike any that it was made from."""
    title, found = "On prompts unlike the data", verdict.evidence.get("ood")
    if not found:
        return not_measured(title, wrapped(reason(verdict.criteria, "effect elsewhere"), 48))
    seen = [(verdict.evidence["effect"], verdict.evidence.get("wrong_way")), (found["effect"], found["wrong_way"])]
    labels = [
        lines(name, f"anti-steered: {percent(wrong['value'])}" if isinstance(wrong, Mapping) else "")
        for name, (_, wrong) in zip(("held-out", "out of distribution"), seen, strict=True)
    ]
    figure = parts.rows(title, labels, f"effect on propensity<br>({NATS})")
    for y, (name, symbol) in enumerate((("held-out prompts", "circle"), ("out of distribution", "diamond"))):
        parts.point(figure, y, seen[y][0], TARGET, f"<b>{name}</b>", symbol=symbol)
    what = wrapped(f"out of distribution: {found['what']}", 64)
    more = 17 * what.count("<br>")
    figure.update_layout(margin_t=TITLE + 28 + more, height=266 + more)
    parts.heading(figure, what)
    return figure.update_xaxes(range=parts.span(end for effect, _ in seen for end in ends(effect)))


def specificity(verdict: Verdict) -> go.Figure:
    """What the working intervention does to other behaviours, beside what it does to its own."""
    title, rows = "On other behaviours", verdict.evidence.get("specificity") or []
    if not rows:
        return not_measured(title, wrapped(reason(verdict.criteria, "specificity"), 48))
    own, share = verdict.evidence["effect"], _threshold(verdict, "specificity")
    labels = [f"<b>{wrapped(verdict.behavior, 20)}</b><br>its own"]
    labels += [f"{wrapped(row['name'], 20)}<br>{percent(row['share']['value'])} of its own" for row in rows]
    figure = parts.rows(title, labels, f"effect on propensity<br>({NATS})")
    parts.point(figure, 0, own, TARGET, f"<b>{safe(verdict.behavior)}</b>, at which it aims")
    for y, row in enumerate(rows, 1):
        much = share is not None and abs(real(row["share"]["value"])) > share
        parts.point(figure, y, row["effect"], WRONG if much else NOISE, f"<b>{safe(row['name'])}</b>")
    bar = None if share is None or own["value"] is None else abs(own["value"]) * share
    span = parts.span([*(end for row in rows for end in ends(row["effect"])), *ends(own), bar, bar and -bar])
    if bar is not None:
        parts.line(figure, "x", -bar)
    return parts.limit(figure, bar, f"limit: ±{number(bar)} ({percent(share)} of its own)", span)


def necessity(verdict: Verdict) -> go.Figure:
    """What is lost when the direction is taken out, beside taking out random ones."""
    title, found = "Taking the direction out", verdict.evidence.get("necessity")
    if not found:
        return not_measured(title, "no held-out prompt shows the behaviour,<br>so there is nothing to take out")
    drops, bar = finite(found["random_drops"]), _threshold(verdict, "necessity")
    labels = ["shown before", "lost without<br>this direction", f"lost without<br>random ones ({len(drops)})"]
    figure = parts.rows(title, labels, f"propensity<br>({NATS})")
    parts.point(figure, 0, found["before"], NOISE, f"<b>shown before</b>, {safe(found['where'])}", symbol="diamond")
    parts.point(figure, 1, found["drop"], TARGET, "<b>lost</b> when this direction is taken out")
    parts.dots(figure, 2, drops, [f"{number(drop)} nats lost without a random direction" for drop in drops], "random")
    span = parts.span([*drops, *ends(found["drop"]), *ends(found["before"]), bar])
    return parts.limit(figure, bar, f"to clear: {number(bar)}", span)


def phases(verdict: Verdict) -> go.Figure:
    """Effect when only the prompt's tokens, only the answer's tokens, or both are edited."""
    words = {"prefill": "prompt tokens", "decode": "answer tokens", "both": "all tokens"}
    rows = verdict.evidence.get("phases") or []
    return _variants("Which tokens to edit", rows, "phase", words, "the phases were not run apart")


def modes(verdict: Verdict) -> go.Figure:
    """Effect when the direction is added, taken out, set, or turned to."""
    words = {
        "add": "add the direction", "ablate": "take it out", "clamp": "set the component", "rotate": "turn towards it",
    }  # fmt: skip
    rows = verdict.evidence.get("modes") or []
    return _variants("What to do with it", rows, "mode", words, "the modes were not run apart")


def _variants(title: str, rows: Sequence[Numbers], key: str, words: Mapping[str, str], why: str) -> go.Figure:
    """The working intervention beside others that differ in one choice."""
    if not rows:
        return not_measured(title, why)
    labels = [lines(wrapped(row[key], 20), words.get(row[key], "")) for row in rows]
    figure = parts.rows(title, labels, f"effect on propensity<br>({NATS})")
    for y, row in enumerate(rows):
        color, mark = (TARGET, " (working)") if row["working"] else (NOISE, "")
        parts.point(figure, y, row["effect"], color, f"<b>{safe(row[key])}</b>{mark}", mark=mark)
    return figure.update_xaxes(range=parts.span(end for row in rows for end in ends(row["effect"])))


def decodability(verdict: Verdict) -> go.Figure:
    """How well the projection on the direction tells the held-out sides apart, beside shuffled labels."""
    title, found = "Telling the two sides apart", verdict.evidence.get("decodability")
    if not found:
        return not_measured(title, "the held-out sides were not projected")
    shuffled, bar = finite(found["shuffled"]), _threshold(verdict, "decodability")
    labels = ["this direction", f"shuffled labels<br>n = {len(shuffled)}"]
    figure = parts.rows(title, labels, "held-out AUROC (0.5: chance, 1: perfect)").update_xaxes(zeroline=False)
    parts.point(figure, 0, found["auroc"], TARGET, "<b>this direction</b>", unit="AUROC")
    parts.dots(
        figure, 1, shuffled, [f"shuffled labels: AUROC {number(value)}" for value in shuffled], "shuffled labels"
    )
    parts.line(figure, "x", 0.5, color=MUTED, dash="solid")
    return parts.limit(figure, bar, f"lower end ≥ {number(bar)}", [-0.03, 1.03])


def damage(verdict: Verdict) -> go.Figure:
    """What the working dose breaks: three measures, each on its own fixed scale, two of them with a threshold."""
    title, found, made = "What it breaks", verdict.evidence.get("damage"), verdict.evidence.get("generation") or {}
    if not found:
        return not_measured(title, "no general text was modelled")
    repeated = [real((made.get(label) or {}).get("repetition")) for label in ("steered", "unsteered")]
    panels = (
        ("perplexity ratio on ordinary text (1: intact)", "damage: perplexity", found["perplexity_ratio"], 1.0, 2.0),
        ("KL on ordinary text (nats a token, reported)", "damage: KL", found["kl"], 0.0, 0.5),
        ("rise of repeated trigrams (share)", "damage: repetition", repeated[0] - repeated[1], 0.0, 0.25),
    )
    figure = make_subplots(rows=3, vertical_spacing=0.22, subplot_titles=[f"<b>{label}</b>" for label, *_ in panels])
    figure.update_layout(template=TEMPLATE, title=title, height=376, showlegend=False, margin_l=24, margin_b=30)
    figure.update_annotations(x=0, xanchor="left", font_size=12.5)
    figure.update_yaxes(visible=False, range=[-0.5, 1.2])
    for panel, (label, name, seen, intact, scale) in enumerate(panels, 1):
        value, limit = real(seen), _threshold(verdict, name)
        limits = [] if limit is None else [1 / limit, limit] if intact else [limit]  # a ratio is judged both ways
        low, high = min([intact, *limits, *finite([value])]), max([scale, *(1.3 * end for end in limits)])
        figure.update_xaxes(range=[low - 0.03 * (high - low), high + 0.05 * (high - low)], nticks=6, row=panel, col=1)
        if panel == 3 and math.isnan(value):
            parts.absent(figure, 0, "nothing was generated", panel=panel)
            continue
        beyond = not value <= high  # off the scale, infinite, or null in a verdict that was read back
        x, said = (high, ratio(seen)) if beyond else (value, number(value))
        side = "left" if x > (low + high) / 2 else "right"
        color = WRONG if _failed(verdict, name) else TARGET
        figure.add_scatter(
            x=[intact, x], y=[0, 0], mode="lines", line=dict(color=color, width=3), hoverinfo="skip", row=panel, col=1
        )
        figure.add_scatter(
            x=[x], y=[0], mode="markers+text", text=[f"<b>{said}</b>"], textposition=f"top {side}", name=name,
            marker=dict(size=12, color=color, symbol="triangle-right" if beyond else "circle"),
            hovertext=[lines(label, said)], row=panel, col=1,
        )  # fmt: skip
        parts.line(figure, "x", intact, color=MUTED, dash="solid", panel=panel)
        for end in limits:
            parts.line(figure, "x", end, panel=panel)
            parts.label(figure, end, 1.0, f" limit {number(end)}", anchor=("left", "top"), panel=panel, domain=True)
    return figure


def _ratio_panel(figure: go.Figure, rows: Sequence[Numbers], marker: Numbers, limit: float | None) -> None:
    """The lower panel of the dose curve: perplexity ratios on a logarithmic scale, clipped with a mark."""
    limits = [] if limit is None else [1 / limit, limit]
    dashed = f"; dashed: limits {' and '.join(map(number, limits))}" if limits else ""
    parts.heading(figure, f"perplexity ratio (log scale){dashed}", panel=2)
    if not any("perplexity_ratio" in row for row in rows):
        figure.update_yaxes(showticklabels=False, range=[-1, 1], zeroline=False, row=2, col=1)
        parts.absent(figure, 0, "no ordinary text was modelled", panel=2)
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
    low, high = math.log10(min([*shown, *limits])), math.log10(max([*shown, *limits]))
    room, ticks = 0.12 * (high - low) + 0.03, [1, 10, 100] if high - low > 1 else [0.5, 1, 1.5, 2, 3, 5, 10]
    words = [f"{tick:g}" for tick in ticks]
    figure.update_yaxes(
        type="log", range=[low - room, high + room], tickvals=ticks, ticktext=words, zeroline=False, row=2, col=1
    )
    for end in limits:
        parts.line(figure, "y", end, panel=2)


def _bold(text: str, bold: bool = True) -> str:
    return f"<b>{text}</b>" if bold else text


def _failed(verdict: Verdict, name: str) -> bool:
    return any(c.name == name and c.status == "fail" for c in verdict.criteria)


def _threshold(verdict: Verdict, name: str) -> float | None:
    """The threshold of a criterion; None when it has none."""
    found = next((c.threshold for c in verdict.criteria if c.name == name), None)
    return found if found is not None and math.isfinite(found) else None


def _eligibility(row: Numbers, auroc: float | None) -> str:
    """How a layer's mark says that it could not be chosen: hollow for damage, crossed for sides that look alike."""
    apart = None in (auroc, row["auroc"]) or row["auroc"] >= auroc
    return "-open" if not row["coherent"] else "" if apart else "-x-open"


def _noise(row: Numbers) -> float:
    """What the stronger kind of meaningless direction is expected to reach at a layer."""
    return max([*finite([row["bar"]]), 0.0])
