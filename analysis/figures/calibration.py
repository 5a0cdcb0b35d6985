"""The figures of a calibration of the gate: what passes, how strong a plant has to be, and where thresholds lie."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analysis.calibration import LEAST_FOUND, SWEPT, Calibration, Rate
from analysis.figures import parts
from analysis.figures.parts import INK, LINES, TARGET, TEMPLATE, WRONG, not_measured
from analysis.words import percent, safe

COLUMNS = 2


def draw_calibration(found: Calibration) -> dict[str, go.Figure]:
    """Every figure of a calibration, by name, in the order in which the page shows them."""
    return {"passed": passed(found), "power": power(found), "operating": operating(found)}


def passed(found: Calibration) -> go.Figure:
    """Share of the cases of each kind that passed, with exact bounds."""
    title, groups = "What passes", []
    for row in found.by_kind().to_dict("records"):
        strength = f", strength {row['strength']:g}" if row["truth"] == "planted" else ""
        rate = Rate(hits=int(row["passed"]), n=int(row["cases"]))
        groups.append((f"{row['kind']}{strength}<br>{row['site']}, n = {rate.n}", rate, row["truth"]))
    figure = parts.rows(title, [label for label, *_ in groups], "share that passes").update_layout(margin_l=190)
    for y, (label, rate, truth) in enumerate(groups):
        color = WRONG if truth == "null" else TARGET
        words = f"<b>{label}</b><br>{rate} passed, {percent(rate.lower)} to {percent(rate.upper)}"
        figure.add_scatter(
            x=[rate.value], y=[y], mode="markers+text", marker=dict(size=11, color=color), name=label,
            error_x=dict(type="data", symmetric=False, array=[rate.upper - rate.value],
                         arrayminus=[rate.value - rate.lower], color=color, thickness=1.8, width=5),
            text=[f"<b>{percent(rate.value)}</b>"], textposition="top center", hovertext=[words],
        )  # fmt: skip
    return figure.update_xaxes(range=[-0.05, 1.05], tickformat=".0%")


def power(found: Calibration) -> go.Figure:
    """Share of plants that pass, by what the planted personas do."""
    title, table = "How strong a behaviour has to be", found.power()
    if table.empty:
        return not_measured(title, "nothing was planted")
    figure = parts.heading(parts.blank(title, height=380), "share of plants that pass")
    for color, (kind, rows) in zip(LINES, table.groupby("kind"), strict=False):
        rows = rows.sort_values("shown")
        words = [
            f"<b>{safe(str(kind))}</b>, strength {row['strength']:g}<br>{row['detected']} of {row['cases']} pass, "
            f"personas do {row['shown']:.1f} nats"
            for row in rows.to_dict("records")
        ]
        figure.add_scatter(
            x=rows["shown"], y=rows["rate"], mode="lines+markers", name=str(kind), hovertext=words,
            line=dict(color=color, width=2), marker=dict(size=9, color=color),
            error_y=dict(type="data", symmetric=False, array=rows["upper"] - rows["rate"],
                         arrayminus=rows["rate"] - rows["lower"], color=color, thickness=1.5, width=4),
        )  # fmt: skip
    parts.line(figure, "y", LEAST_FOUND)
    figure.update_yaxes(range=[-0.05, 1.08], tickformat=".0%")
    return figure.update_xaxes(title="what the planted personas do (nats, wanted minus unwanted persona)")


def operating(found: Calibration) -> go.Figure:
    """For each criterion: share of nulls and of plants that pass, if its threshold lay elsewhere."""
    names = [name for name in SWEPT if any(c["name"] == name for c in found.rows[0]["criteria"])]
    count = -(-len(names) // COLUMNS)
    figure = make_subplots(
        rows=count, cols=COLUMNS, vertical_spacing=0.42 / count, horizontal_spacing=0.1,
        subplot_titles=[f"<b>{name}</b>" for name in names],
    )  # fmt: skip
    title = "If a threshold lay elsewhere"
    figure.update_layout(template=TEMPLATE, title=title, height=110 + 190 * count, showlegend=True)
    figure.update_annotations(font_size=12.5)
    for i, name in enumerate(names):
        table, more, place = found.curve(name), SWEPT[name][1], dict(row=i // COLUMNS + 1, col=i % COLUMNS + 1)
        for column, color, label, dash in (
            ("false_positives", WRONG, "nulls", "dot"), ("detection", TARGET, "plants", "solid"),
        ):  # fmt: skip
            words = [
                f"<b>{name}</b> at {at:.3g}<br>{percent(share)} of {label} pass"
                for at, share in zip(table["threshold"], table[column], strict=True)
            ]
            figure.add_scatter(
                x=table["threshold"], y=table[column], mode="lines", name=label, hovertext=words, showlegend=i == 0,
                line=dict(color=color, width=2, dash=dash, shape="vh" if more else "hv"), **place,
            )  # fmt: skip
        chosen = float(table.loc[table["chosen"], "threshold"].iloc[0])
        if not more:  # a null may move others by millions of times what its own does, which would flatten the rest
            shown = [table["threshold"].min(), min(table["threshold"].max(), 4 * chosen)]
            figure.update_xaxes(range=shown, row=place["row"], col=place["col"])
        parts.line(figure, "x", chosen, color=INK, panel=i + 1)
    figure.update_yaxes(range=[-0.05, 1.08], tickformat=".0%")
    return figure
