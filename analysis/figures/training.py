"""The figures of a training run: what was learned, what was kept, and how the optimizer went there.

Every function takes results and returns one figure. Blue circles are wanted answers, vermilion squares unwanted ones.
Of a pair of marks the small one is before, the large one after; what is hollow and dotted is the same run without
general data. By kind of weight, green circles are GDN layers and purple diamonds attention layers: filled with frozen
contexts, hollow with full ones. On a logarithmic axis a triangle is a value that lies below its end, or is not above
zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.figures import parts
from analysis.figures.parts import (
    GLYPHS,
    INK,
    KINDS,
    LINES,
    MUTED,
    NATS,
    NOISE,
    TARGET,
    TEMPLATE,
    TITLE,
    WRONG,
    not_measured,
)
from analysis.figures.shift import known, numbers
from analysis.gradients import GradientRow, Gradients
from analysis.sharpness import NAMES, PUBLISHED, Sharpness
from analysis.updates import UpdateRow, Updates
from analysis.words import Numbers, ends, estimate, finite, lines, number, percent, safe
from probes.stats import Estimate
from training.evaluation import Evaluation
from training.result import Training

LOSS = 3.0
"""Points by which an ability may fall before it counts as lost."""
LEAST = 1e-5  # shares and relative changes below this are off the axis
WITHOUT = "without general data"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_LOOKS = {"apollo": TARGET, "apollo-mini": TARGET, "adamw": INK, "sgd": MUTED}
Pick = Callable[[Evaluation], "Estimate | None"]


def draw_training(
    training: Training,
    alone: Training | None = None,
    gradients: Gradients | None = None,
    updates: Updates | None = None,
    sharpness: Sharpness | None = None,
) -> dict[str, go.Figure]:
    """Every figure of a run, by name, in the order in which a page shows them; none of a result that is not there."""
    found = {
        "learning": learning(training, alone),
        "abilities": abilities(training, alone),
        "abilities-by-step": abilities_by_step(training, alone),
        "losses": losses(training),
        "limiter-and-ratio": limiter_and_ratio(training),
    }
    if gradients is not None:
        found |= {"gradient-shares": gradient_shares(gradients), "gradient-cosines": gradient_cosines(gradients)}
    if updates is not None:
        found["update-sizes"] = update_sizes(updates)
    if sharpness is not None:
        found["sharpness"] = sharpness_beside(sharpness)
    return found


# -- over the steps ----------------------------------------------------------------------------------------------------


def learning(training: Training, alone: Training | None = None) -> go.Figure:
    """Shares of wanted and unwanted answers, and propensity, at each evaluation."""
    judged = training.before.wanted is not None
    headings = ["% of free answers to held-out prompts"] if judged else []
    figure = _panels("What was learned, step by step", [*headings, f"propensity ({NATS})"])
    sides: list[tuple[str, Pick, str, str]] = [
        ("wanted", lambda found: found.wanted, TARGET, "circle"),
        ("unwanted", lambda found: found.unwanted, WRONG, "square"),
    ]
    for run, apart in _runs(training, alone):
        for name, pick, color, symbol in sides if judged else ():
            _curve(figure, run.evaluations, pick, f"{name}{apart}", color, symbol, scale=100.0, unit="%")
        last = 1 + judged
        _curve(figure, run.evaluations, _propensity, f"propensity{apart}", INK, "diamond", panel=last, unit="nats")
    if judged:
        figure.update_yaxes(range=[-4, 104], row=1, col=1)
    return figure.update_yaxes(zeroline=True)


def abilities(training: Training, alone: Training | None = None) -> go.Figure:
    """Share of right answers of each ability, before, after, and after the same run without general data."""
    title, names = "What was kept", list(training.before.abilities)
    if not names:
        return not_measured(title, "no questions with one right answer were asked")
    figure = parts.rows(title, [safe(name) for name in names], "% right answers to held-out questions")
    figure.update_layout(height=150 + 84 * len(names))
    colors = [WRONG if training.changes.get(name, 0) < -LOSS - 1e-9 else INK for name in names]
    sides = [("before", training.before, -0.32, 7, ""), ("after", training.after, 0.0, 13, "")]
    if alone is not None:
        sides.append((WITHOUT, alone.after, 0.26, 10, "-open"))
    for row, name in enumerate(names):
        pair = [numbers(found.abilities[name], 100)["value"] for found in (training.before, training.after)]
        figure.add_scatter(
            x=pair, y=[row - 0.32, row], mode="lines", line=dict(color=colors[row], width=1.5), hoverinfo="skip",
            name=f"{name} line",
        )  # fmt: skip
    for side, found, aside, size, form in sides:
        places = [(row, name) for row, name in enumerate(names) if name in found.abilities]
        for row, name in places:
            seen, color = numbers(found.abilities[name], 100), NOISE if form else colors[row]
            change = training.changes[name]
            said = number(change) if side == "after" and change else ""
            figure.add_scatter(
                x=[seen["value"]], y=[row + aside], mode="markers+text", error_x={**parts.bars([seen], color)},
                marker=dict(size=size, color=color, symbol=f"{'diamond' if form else 'circle'}{form}"),
                text=[f"<b>{'+' if change > 0 else ''}{said}</b>" if said else ""],
                textposition="top center", name=f"{name} {side}",
                hovertext=[_words(f"{safe(name)}, {side}", seen, "%")],
            )  # fmt: skip
    reach = [end for _, found, *_ in sides for part in found.abilities.values() for end in ends(numbers(part, 100))]
    figure.update_xaxes(range=_around(reach))
    keys = "small: before; large: after, with its change in points" + (f"; hollow: {WITHOUT}" if alone else "")
    parts.label(figure, 0.0, 1.0, keys, anchor=("left", "bottom"), domain=True)
    figure.layout.annotations[-1].xref = "x domain"  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    return figure


def abilities_by_step(training: Training, alone: Training | None = None) -> go.Figure:
    """Share of right answers of each ability at each evaluation."""
    title, names = "What was kept, step by step", list(training.before.abilities)
    if not names:
        return not_measured(title, "no questions with one right answer were asked")
    runs, last = _runs(training, alone), training.after.step
    figure = _panels(title, ["% right answers", f"% right answers, {WITHOUT}"][: len(runs)])
    for panel, (run, apart) in enumerate(runs, 1):
        for i, name in enumerate(names):
            _curve(
                figure, run.evaluations, lambda found, name=name: found.abilities.get(name), f"{safe(name)}{apart}",
                LINES[i % len(LINES)], _SYMBOLS[i % len(_SYMBOLS)], panel=panel, scale=100.0, unit="%",
                listed=panel == 1, aside=0.01 * last * (i - (len(names) - 1) / 2),
            )  # fmt: skip
    reach = [
        end
        for run, _ in runs
        for found in run.evaluations
        for part in found.abilities.values()
        for end in ends(numbers(part, 100))
    ]
    return figure.update_yaxes(range=_around(reach))


def _around(reach: Sequence[float]) -> list[float]:
    """An axis of percents that holds all values, with room to see even those that all are 100."""
    low = min([*reach, 95.0])
    return [max(low - 0.08 * (104 - low), -4), 102]


def losses(training: Training) -> go.Figure:
    """Loss of each step's batch, by kind of segment, and the loss on held-out general data at each evaluation."""
    title, steps = "Losses, step by step", training.steps
    terms = [("behavior", "the behaviour's answers", TARGET), ("general", "general data", INK)]
    contrast = any("contrast_loss" in row for row in steps)
    if not steps:
        return not_measured(title, "no step was taken")
    figure = _panels(title, ["loss (nats a token)", *(["contrast loss (nats)"] if contrast else [])])
    for kind, name, color in [*terms, ("contrast", "contrast", WRONG)]:
        found = {row["step"]: known(row[f"{kind}_loss"]) for row in steps if f"{kind}_loss" in row}
        if found:
            figure.add_scatter(
                x=list(found), y=list(found.values()), mode="lines", line=dict(color=color, width=1.8), name=name,
                hovertext=[f"<b>{name}</b>, step {step}<br>{number(value)} nats" for step, value in found.items()],
                row=2 if kind == "contrast" else 1, col=1,
            )  # fmt: skip
    _curve(
        figure, training.evaluations, lambda found: found.loss, "held-out general data", INK, "diamond",
        unit="nats a token", mode="markers",
    )  # fmt: skip
    return figure.update_yaxes(rangemode="tozero")


def limiter_and_ratio(training: Training) -> go.Figure:
    """Factor of the norm-growth limiter and size of the update against the weight, of every tenth step."""
    title = "How large the steps were"
    rows = [row for row in training.steps if "limiter" in row and "update_ratio" in row]
    if not rows:
        named = (training.recipe.get("config") or {}).get("optimizer", "the optimizer")
        return not_measured(title, f"{safe(named)} reports no limiter<br>(APOLLO does, for tensors that it projects)")
    headings = ["limiter, mean over tensors (1: nothing was limited)", "update / weight, median over tensors"]
    figure = _panels(title, headings, listed=False)
    for panel, (key, name) in enumerate((("limiter", "limiter"), ("update_ratio", "ratio")), 1):
        found = {row["step"]: known(row[key]) for row in rows}
        figure.add_scatter(
            x=list(found), y=list(found.values()), mode="lines+markers", name=name, showlegend=False,
            line=dict(color=TARGET, width=1.8), marker=dict(size=7, color=TARGET), row=panel, col=1,
            hovertext=[f"step {step}<br>{name} {number(value)}" for step, value in found.items()],
        )  # fmt: skip
    parts.line(figure, "y", 1.0, color=MUTED)
    figure.update_yaxes(rangemode="tozero")
    return figure.update_yaxes(exponentformat="power", row=2, col=1)


# -- by kind of weight -------------------------------------------------------------------------------------------------


def gradient_shares(gradients: Gradients) -> go.Figure:
    """Share of the squared gradient by kind of weight, with frozen and full contexts, beside that of parameters."""
    sides = [{_key(row): row for row in gradients.rows if row.context == side} for side in ("frozen", "full")]
    title, names = "Where the gradient goes", list(sides[0])
    if not names:
        return not_measured(title, "there are no rows")
    figure = _weights(title, names, listed=True)
    for name, rows, form, aside in (("frozen", sides[0], "", -0.17), ("full", sides[1], "-open", 0.17)):
        seen = [_on_log(numbers(rows[key].share), LEAST) for key in names]
        _marks(figure, names, seen, name, form=form, aside=aside, words=[_gradient_words(rows[key]) for key in names])
    held = [max(known(sides[0][key].parameters), LEAST) for key in names]
    figure.add_scatter(
        x=held, y=list(range(len(names))), mode="markers", name="parameters",
        marker=dict(symbol="line-ns", size=13, line=dict(width=2.5, color=NOISE)), showlegend=False,
        hovertext=[f"{percent(sides[0][key].parameters)} of the parameters" for key in names],
    )  # fmt: skip
    _log_shares(figure, "share of the squared norm of the gradient", 1)
    _legend(figure, (("filled: frozen contexts", MUTED, "circle"), ("hollow: full contexts", MUTED, "circle-open"),
                     ("tick: share of the parameters", NOISE, "line-ns")))  # fmt: skip
    return figure


def gradient_cosines(gradients: Gradients) -> go.Figure:
    """Cosine of the gradient with frozen contexts and the one with full contexts, by kind of weight."""
    rows = {_key(row): row for row in gradients.rows if row.context == "frozen"}
    title, names = "How alike both gradients are", list(rows)
    if not names:
        return not_measured(title, "there are no rows")
    figure = _weights(title, names)
    seen = [(numbers(rows[key].cosine), False) for key in names]
    _marks(figure, names, seen, "cosine", words=[_gradient_words(rows[key]) for key in names])
    reach = [min([0.0, *(end for one, _ in seen for end in ends(one))]) - 0.04, 1.04]
    figure.update_xaxes(title="cosine of the frozen and the full gradient (1: the same way)", range=reach)
    missing = [safe(key[0]) for key, (one, _) in zip(names, seen, strict=True) if not finite([one["value"]])]
    return parts.unmeasured(figure, missing)


def update_sizes(updates: Updates) -> go.Figure:
    """How large, how many-sided and how sparse the update is, by kind of weight."""
    rows = {(row.group, row.kind, "." not in row.group): row for row in updates.rows}
    title, names = "How the weights moved", list(rows)
    if not names:
        return not_measured(title, "there are no rows")
    figure = _weights(title, names, columns=3)

    def rank(row: UpdateRow) -> float | None:
        return row.effective_rank / row.full_rank if row.effective_rank is not None and row.full_rank else None

    measures: list[tuple[str, Callable[[UpdateRow], float | None]]] = [
        ("relative", lambda row: row.relative),
        ("rank", rank),
        ("concentrated", lambda row: row.concentrated),
    ]
    for panel, (name, value) in enumerate(measures, 1):
        plain = [_exact(value(rows[key])) for key in names]
        seen = [_on_log(one, LEAST) for one in plain] if panel == 1 else [(one, False) for one in plain]
        _marks(figure, names, seen, name, words=[_update_words(rows[key]) for key in names], panel=panel)
    most = max([LEAST * 10, *finite(row.relative for row in rows.values())])
    _log_shares(figure, "size against the weight", 1, most=most)
    for panel, words in ((2, "effective rank / full rank"), (3, "share of elements that holds 90%")):
        figure.update_xaxes(title=words, range=[-0.03, 1.03], tickformat=".0%", row=1, col=panel)
    return figure


# -- directional sharpness ---------------------------------------------------------------------------------------------


def sharpness_beside(sharpness: Sharpness) -> go.Figure:
    """Curvature along the update, a row for each optimizer; below, on an axis of its own, what was published."""
    title, names = "Directional sharpness", list(sharpness.config.optimizers)
    found = {name: sharpness.values(name) for name in names}
    above = [value for values in found.values() for value in finite(values.values()) if value > 0]
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.2)
    top, bottom = TITLE + 34, 100
    height = 2 * 46 * len(names) + 100
    figure.update_layout(template=TEMPLATE, title=title, height=height + top + bottom, showlegend=True)
    figure.update_layout(margin=dict(t=top, b=bottom), legend_y=-58 / height)
    floor = 10.0 ** math.floor(math.log10(min(above))) if above else 1e-3
    means = {name: sharpness.estimate(name) for name in names}
    lower = [mean.lower for mean in means.values() if mean is not None and 0.1 * floor <= mean.lower < floor]
    floor = 0.1 * floor if lower else floor
    most = max([10 * floor, *above])
    for row, name in enumerate(names):
        color, mean = _LOOKS.get(name, INK), means[name]
        if mean is None:
            parts.absent(figure, row, "the loss did not fall to the target")
            figure.add_scatter(x=[], y=[], name=f"{name} mean", showlegend=False, row=1, col=1)
            continue
        single = [_on_log(_exact(value), floor) for value in found[name].values()]
        figure.add_scatter(
            x=[one["value"] for one, _ in single], y=[row + 0.2] * len(single), mode="markers", name=f"{name} seeds",
            showlegend=False,
            marker=dict(size=7, color=color, symbol=["triangle-left" if off else "circle-open" for _, off in single]),
            hovertext=[f"<b>{NAMES[name]}</b>, seed {seed}<br>{number(v)}" for seed, v in found[name].items()],
            row=1, col=1,
        )  # fmt: skip
        seen, off = _on_log(numbers(mean), floor)
        most = max([most, *finite([seen["upper"]])])
        figure.add_scatter(
            x=[seen["value"]], y=[row - 0.08], mode="markers+text", name=f"{name} mean", showlegend=False,
            error_x=parts.bars([seen], color),
            marker=dict(size=12, color=color, symbol="triangle-left" if off else "circle"),
            text=[f"<b>{number(mean.value)}</b>"], textposition="top center", row=1, col=1,
            hovertext=[lines(f"<b>{NAMES[name]}</b>, mean over {mean.n} seeds", estimate(numbers(mean)))],
        )  # fmt: skip
    epochs = list(dict.fromkeys(epoch for table in PUBLISHED.values() for epoch in table))
    for row, name in enumerate(names):
        table = PUBLISHED.get(name, {})
        places = [epochs.index(epoch) for epoch in table]
        figure.add_scatter(
            x=list(table.values()), y=[row + 0.14 * (i - (len(epochs) - 1) / 2) for i in places], mode="markers",
            marker=dict(size=9, color=_LOOKS.get(name, INK), symbol=[_SYMBOLS[i % len(_SYMBOLS)] for i in places]),
            name=f"{name} published", showlegend=False, row=2, col=1,
            hovertext=[f"<b>{NAMES[name]}</b>, epoch {epoch}<br>{number(value)}" for epoch, value in table.items()],
        )  # fmt: skip
    for i, epoch in enumerate(epochs):
        parts.legend(figure, f"published, epoch {epoch}", MUTED, _SYMBOLS[i % len(_SYMBOLS)])
    ticks: dict[str, Any] = dict(tickvals=list(range(len(names))), ticktext=[NAMES[name] for name in names])
    around = [len(names) - 0.5, -0.7]
    figure.update_yaxes(**ticks, range=around, showgrid=False, zeroline=False, ticks="", ticklabelstandoff=8)
    figure.update_xaxes(type="log", dtick=1, exponentformat="power", zeroline=False)
    figure.update_xaxes(range=[math.log10(floor), math.log10(most) + 0.3], row=1, col=1)
    figure.update_xaxes(title="vᵀHv along the update", row=2, col=1)
    at = f"{sharpness.config.target:.0%}"
    parts.heading(figure, f"<b>here</b>, once the loss fell to {at} (small: seeds, large: mean with 95% interval)")
    words = "<b>published</b> (arXiv:2412.05270, table 10), by epoch: another model, another scale"
    return parts.heading(figure, words, panel=2)


# -- marks -------------------------------------------------------------------------------------------------------------


def _runs(training: Training, alone: Training | None) -> list[tuple[Training, str]]:
    """A run and, if it is there, the one without general data, with what is added to its names."""
    return [(training, "")] if alone is None else [(training, ""), (alone, f", {WITHOUT}")]


def _propensity(found: Evaluation) -> Estimate:
    return found.propensity


def _panels(title: str, headings: Sequence[str], *, each: int = 200, listed: bool = True) -> go.Figure:
    """Panels below each other with the steps as their common axis, and a legend at the foot where one is asked for."""
    gap, top, bottom, count = 76, TITLE + 40, 108 if listed else 56, len(headings)
    inside = each * count + gap * (count - 1)
    if count == 1:
        inside = each = 2 * each
    figure = make_subplots(rows=count, cols=1, vertical_spacing=gap / inside if count > 1 else 0)
    figure.update_layout(template=TEMPLATE, title=title, height=inside + top + bottom, showlegend=listed)
    figure.update_layout(margin=dict(t=top, b=bottom), legend_y=-58 / inside)
    for panel, words in enumerate(headings, 1):
        parts.heading(figure, words, panel=panel)
    figure.update_xaxes(zeroline=False)
    return figure.update_xaxes(title="step", row=count, col=1)


def _curve(
    figure: go.Figure, evaluations: Iterable[Evaluation], pick: Pick, name: str, color: str, symbol: str, *,
    panel: int = 1, scale: float = 1.0, unit: str = "", mode: str = "lines+markers", listed: bool = True,
    aside: float = 0.0,
) -> None:  # fmt: skip
    """An estimate at each evaluation, with intervals; dotted and hollow for the run without general data.

    `aside` moves it along the axis of steps, so that equal curves do not hide each other.
    """
    apart = WITHOUT in name
    found = [(one.step, part) for one in evaluations if (part := pick(one)) is not None]
    seen = [numbers(part, scale) for _, part in found]
    figure.add_scatter(
        x=[step + aside for step, _ in found], y=[one["value"] for one in seen], mode=mode, name=name,
        showlegend=listed, line=dict(color=color, width=1.8, dash="dot" if apart else "solid"), row=panel, col=1,
        marker=dict(size=9, color=color, symbol=symbol + ("-open" if apart else "")),
        error_y={**parts.bars(seen, color), "thickness": 1.2, "width": 3},
        hovertext=[_words(f"{name}, step {step}", one, unit) for (step, _), one in zip(found, seen, strict=True)],
    )  # fmt: skip


def _words(name: str, seen: Numbers, unit: str) -> str:
    return lines(f"<b>{name}</b>", f"{estimate(seen)} {unit}", f"n = {seen['n']} in {seen['groups']} groups")


Key = tuple[str, str, bool]
"""A kind of weight: its group, the kind of its layer, and whether it is whole."""


def _key(row: GradientRow) -> Key:
    return row.group, row.kind, row.whole


def _weights(title: str, names: Sequence[Key], *, columns: int = 1, listed: bool = False) -> go.Figure:
    """One row for each kind of weight; parts stand below their whole."""
    figure = make_subplots(rows=1, cols=columns, shared_yaxes=True, horizontal_spacing=0.05)
    top, bottom = TITLE + 8, 122 if listed else 56
    figure.update_layout(template=TEMPLATE, title=title, height=top + bottom + 23 * len(names), showlegend=listed)
    figure.update_layout(margin=dict(t=top, b=bottom, l=130), legend=dict(y=-64 / (23 * len(names))))
    marks = {kind: f" <span style='color:{KINDS[kind][1]}'>{glyph}</span>" for kind, glyph in GLYPHS.items()}
    texts = [("" if whole else "· ") + safe(group) + marks.get(kind, " ■") for group, kind, whole in names]
    ticks: dict[str, Any] = dict(tickvals=list(range(len(names))), ticktext=texts)
    return figure.update_yaxes(**ticks, zeroline=False, range=[len(names) - 0.5, -0.5], ticks="")


def _marks(
    figure: go.Figure, names: Sequence[Key], seen: Sequence[tuple[Numbers, bool]], name: str, *, words: Sequence[str],
    form: str = "", aside: float = 0.0, panel: int = 1,
) -> None:  # fmt: skip
    """A mark with its interval in each row, one trace for each kind of layer."""
    for kind in dict.fromkeys(key[1] for key in names):
        own = [i for i, key in enumerate(names) if key[1] == kind]
        color, symbol = KINDS[kind][1:] if kind in KINDS else (INK, "square")
        some = [seen[i][0] for i in own]
        figure.add_scatter(
            x=[one["value"] for one in some], y=[i + aside for i in own], mode="markers", name=f"{name} {kind}",
            error_x={**parts.bars(some, color), "thickness": 1.2, "width": 3}, showlegend=False, row=1, col=panel,
            marker=dict(size=8, color=color, symbol=[("triangle-left" if seen[i][1] else symbol) + form for i in own]),
            hovertext=[words[i] for i in own],
        )  # fmt: skip


def _exact(value: float | None) -> Numbers:
    """A number without an interval, as an estimate."""
    return {"value": known(value), "lower": known(value), "upper": known(value)}


def _on_log(seen: Mapping[str, Any], floor: float) -> tuple[dict[str, Any], bool]:
    """Value and interval as far down as a logarithmic axis goes, and whether the value lies below it."""
    off = known(seen["value"]) < floor
    ends_: dict[str, Any] = {key: max(seen[key], floor) for key in ("value", "lower", "upper") if finite([seen[key]])}
    return {**seen, **ends_}, off


def _log_shares(figure: go.Figure, words: str, column: int, *, most: float = 1.0) -> None:
    """A logarithmic axis of shares in percent, from `LEAST` up."""
    decades = range(round(math.log10(LEAST)), math.ceil(math.log10(most)) + 1)
    ticks: dict[str, Any] = dict(tickvals=[10.0**k for k in decades], ticktext=[f"{100 * 10.0**k:g}%" for k in decades])
    reach = [math.log10(LEAST) - 0.15, math.log10(most) + 0.25]
    figure.update_xaxes(**ticks, type="log", title=words, range=reach, zeroline=False, row=1, col=column)


def _legend(figure: go.Figure, entries: Iterable[tuple[str, str, str]]) -> None:
    for words, color, symbol in entries:
        parts.legend(figure, words, color, symbol)


def _gradient_words(row: GradientRow) -> str:
    return lines(
        f"<b>{safe(row.group)}, {safe(row.kind)}</b>, {row.context} contexts",
        f"share {estimate(numbers(row.share))}; {percent(row.parameters)} of the parameters",
        f"cosine of frozen and full {estimate(numbers(row.cosine))}",
        f"norm with frozen contexts over full {estimate(numbers(row.ratio))}",
    )


def _update_words(row: UpdateRow) -> str:
    ranks = f"effective rank {number(row.effective_rank)} of {number(row.full_rank)}" if row.full_rank else "no matrix"
    return lines(
        f"<b>{safe(row.group)}, {safe(row.kind)}</b>",
        f"moved by {percent(row.relative)} of its norm", ranks,
        f"{percent(row.concentrated)} of {row.elements:,} elements hold 90% of it; {percent(row.unchanged)} unchanged",
    )  # fmt: skip
