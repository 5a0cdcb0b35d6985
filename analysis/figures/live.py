"""A figure that grows while a model trains, for notebooks.

    training = train(model, behavior, config, verdict=verdict, watch=LivePlot())

It is one output of the cell, drawn again in place, so the notebook keeps its last state when it is saved.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from analysis.figures import parts
from analysis.figures.parts import INK, TARGET
from analysis.figures.shift import known
from analysis.words import finite, number

PLOTLY = "application/vnd.plotly.v1+json"
EVERY = 0.5


class LivePlot:
    """Collects rows of metrics and draws loss and behaviour by step; outside a notebook it only collects.

    Args:
        every: least seconds from one drawing to the next. What is left over is drawn when the cell ends, also if it
            ends with an error.
    """

    def __init__(self, *, every: float = EVERY):
        self.every = every
        self.rows: list[Mapping[str, Any]] = []
        self._handle: Any = None
        self._drawn, self._pending = -float("inf"), False

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics: `step`, `loss`, and after an evaluation `propensity` and perhaps `wanted`."""
        self.rows.append(dict(row))
        self._pending = True
        if time.monotonic() - self._drawn >= self.every:
            self.draw()

    @property
    def figure(self) -> go.Figure:
        """All rows so far: the loss of each step and, on an axis of its own, what the evaluations found."""
        if not self.rows:
            return parts.not_measured("Training", "no step was taken yet")
        last = self.rows[-1]
        figure = parts.blank(f"Training, step {last['step']}: loss {number(known(last.get('loss')))}", height=380)
        self._line(figure, "loss", "loss (of the batch)", INK, "lines")
        judged = any("wanted" in row for row in self.rows)
        if judged:
            self._line(figure, "wanted", "wanted answers (%, right axis)", TARGET, "lines+markers", scale=100.0)
        elif any("propensity" in row for row in self.rows):
            self._line(figure, "propensity", "propensity (nats, right axis)", TARGET, "lines+markers")
        figure.update_xaxes(title="step", zeroline=False).update_yaxes(rangemode="tozero")
        right: dict[str, Any] = dict(overlaying="y", side="right", showgrid=False, zeroline=False)
        right |= dict(range=[-4, 104]) if judged else {}
        return figure.update_layout(yaxis2=right, showlegend=True, margin_r=56)

    def draw(self) -> None:
        """Draw what was collected, in the place where it was first drawn."""
        if not self._pending or (shell := _notebook()) is None:
            return
        bundle = _bundle(self.figure)
        if self._handle is None:
            from IPython.display import display  # comes with the notebooks

            self._handle = display(bundle, raw=True, display_id=True)
            shell.events.register("post_run_cell", self._end)
        else:
            self._handle.update(bundle, raw=True)
        self._drawn, self._pending = time.monotonic(), False

    def _end(self, *_: object) -> None:
        self.draw()

    def _line(self, figure: go.Figure, key: str, name: str, color: str, mode: str, *, scale: float = 1.0) -> None:
        rows = [row for row in self.rows if key in row]
        values = [scale * row[key] if finite([row[key]]) else None for row in rows]  # messages hold no NaN
        figure.add_scatter(
            x=[row["step"] for row in rows], y=values, mode=mode, name=name, yaxis="y" if key == "loss" else "y2",
            line=dict(color=color, width=1.8), marker=dict(size=8, color=color),
            hovertext=[f"step {row['step']}<br>{number(v)}" for row, v in zip(rows, values, strict=True)],
        )  # fmt: skip


def _notebook() -> Any:
    """The shell of the notebook that runs this; None elsewhere. Where IPython was never imported there is none."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    shell: Any = get_ipython()
    return shell if getattr(shell, "kernel", None) is not None else None


def _bundle(figure: Any) -> dict[str, Any]:
    """What a notebook shows, in plotly's own format; as text where that is not known.

    A figure that is handed to `display` shows itself and takes no place that could be drawn in again. Nor is what
    plotly would show taken: it holds plotly.js, megabytes each time.
    """
    return {PLOTLY: figure.to_plotly_json(), "text/plain": figure.layout.title.text}
