"""The figures of a training run: what is drawn is what the results say, and what is not there is named."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
from test_figures import trace, words_of

from analysis import figures
from analysis.curvature import Curvature
from analysis.figures import live
from analysis.figures.live import PLOTLY, LivePlot
from analysis.gradients import Answer, GradientRow, Gradients, RankRow
from analysis.sharpness import PUBLISHED, Sharpness, SharpnessConfig, SharpnessRow
from analysis.updates import UpdateRow, Updates
from analysis.words import number
from probes.stats import Estimate
from training.config import TrainConfig
from training.evaluation import Evaluation
from training.result import Training

NAMES = [
    "learning", "abilities", "abilities-by-step", "losses", "limiter-and-ratio", "gradient-shares", "gradient-cosines",
    "update-sizes", "sharpness",
]  # fmt: skip
ALWAYS = NAMES[:5]
NAN = math.nan
GROUPS = [("qkv", "gdn"), ("qkv.q", "gdn"), ("q", "attention"), ("k", "attention"), ("embedding", "model")]


def estimate(value: float, below: float = 0.04, above: float = 0.06) -> Estimate:
    return Estimate(value=value, lower=value - below, upper=value + above, n=24, groups=6)


def evaluation(step: int, wanted: float, **rights: float) -> Evaluation:
    return Evaluation(
        step=step, wanted=estimate(wanted), unwanted=estimate(0.9 - wanted), propensity=estimate(8 * wanted - 4),
        abilities={name: estimate(right, 0.02, 0.01) for name, right in rights.items()},
        loss=estimate(2.0 + step / 100),
    )  # fmt: skip


def row(step: int) -> dict[str, Any]:
    found = {"step": step, "loss": 3 / step, "lr": 2e-4, "grad_norm": 1.5, "behavior_loss": 2 / step}
    found |= {"general_loss": 1 / step, "seconds": 0.5 * step}
    return found | ({"limiter": 1 - step / 100, "update_ratio": 1e-4 * step} if step % 5 == 1 else {})


def complete(**changed: Any) -> Training:
    """A run of 20 steps that learned the behaviour and lost nothing."""
    evaluations = (
        evaluation(0, 0.1, copying=0.95, sorting=0.9), evaluation(10, 0.5, copying=0.91, sorting=0.91),
        evaluation(20, 0.8, copying=0.94, sorting=0.92),
    )  # fmt: skip
    told = {"behavior": "follow-direction", "weights_hash": "fedcba98"}
    found = Training(
        behavior="follow-direction", model="organism", weights_hash="fedcba98", trained_hash="01234567", verified=True,
        lr=2e-4, rank=16, evaluations=evaluations, steps=tuple(row(step) for step in range(1, 21)),
        mix={"share": 0.25, "batch": 32, "seed": 0, "hash": "abcdef0123456789",
             "behavior": {"segments": 200, "context_tokens": 12345, "scored_tokens": 2345},
             "general": {"segments": 160, "context_tokens": 6789, "scored_tokens": 1789}},
        telemetry=({"kind": "q_proj", "scale_mean": 2.5, "scale_min": 0.25, "scale_max": 7.5, "limiter": 0.875,
                    "ratio": 3.25e-4},),
        recipe={**told, "behavior_hash": "00ff00ff", "dtype": "float32", "device": "cpu",
                "config": asdict(TrainConfig(steps=20)),
                "verdict": {"verdict": "PASS", "sentence": "the direction causes it", "recipe": told}},
    )  # fmt: skip
    return replace(found, **changed)


def without_general() -> Training:
    evaluations = (
        evaluation(0, 0.1, copying=0.95, sorting=0.9), evaluation(20, 0.85, copying=0.7, sorting=0.6),
    )  # fmt: skip
    return complete(evaluations=evaluations, verified=False)


def gradients() -> Gradients:
    rows = []
    for i, (group, kind) in enumerate(GROUPS):
        for context in ("frozen", "full"):
            share = 8.0 ** -(i + 1) if context == "frozen" else 0.0 if i == 3 else 0.04 * (i + 1)
            own = Estimate(value=share, lower=share / 2, upper=share * 1.5, n=8, groups=8)
            rows.append(
                GradientRow(
                    group=group, kind=kind, whole="." not in group, context=context, share=own,
                    parameters=0.03 * (i + 2),
                    cosine=estimate(NAN if i == 3 else 0.9 - i / 10), ratio=estimate(0.4 + i / 10),
                )
            )  # fmt: skip
    contexts: tuple[Literal["frozen", "full"], ...] = ("frozen", "full")
    ranks = [
        RankRow(
            group="qkv", kind="gdn", layer=layer, context=context, rank=estimate(7 + layer), tokens=estimate(9),
            limit=estimate(8), beyond=layer,
        )
        for layer in (0, 1) for context in contexts
    ]  # fmt: skip
    return Gradients(
        behavior="follow-direction", model="organism", tied=True, rows=tuple(rows), tensors=(), ranks=tuple(ranks),
        answers=(Answer(question="does it?", value=estimate(0.7), expected=None, sentence="it does, at 0.7"),),
        recipe={"weights_hash": "fedcba98"},
    )  # fmt: skip


def updates() -> Updates:
    def one(group: str, kind: str, i: int) -> UpdateRow:
        ranked = group != "embedding"
        return UpdateRow(
            group=group, kind=kind, tensors=2, elements=4096 * (i + 1), norm=0.1,
            relative=0.0 if i == 3 else 0.01 * (i + 1),
            saved=0.31, in_place=0.11 + i / 100, concentrated=0.5 - i / 10, unchanged=1.0 if i == 3 else 0.0,
            effective_rank=12.5 + i if ranked else None, stable_rank=3.5 if ranked else None,
            full_rank=64.0 if ranked else None,
        )  # fmt: skip

    rows = [one(group, kind, i) for i, (group, kind) in enumerate(GROUPS)]
    return Updates(rows=tuple(rows), overall=one("all", "all", 2))


def sharpness() -> Sharpness:
    """SGD never reaches the target; one of APOLLO-Mini's curvatures is below zero."""
    config, rows = SharpnessConfig(seeds=3), []
    for name, value in (("apollo", 0.02), ("apollo-mini", 0.03), ("adamw", 0.015), ("sgd", None)):
        for i in range(config.seeds):
            bent = None if value is None else value * (1 + i / 10) - (0.05 if name == "apollo-mini" and i == 2 else 0)
            curvature = None if bent is None else Curvature(value=bent, method="exact")
            rows.append(
                SharpnessRow(
                    optimizer=name, seed=100 + i, reached=value is not None, lr=2e-4, steps=15, initial=2.0, loss=1.0,
                    size=0.1, update=curvature, gradient=curvature, random=curvature,
                )
            )  # fmt: skip
    return Sharpness(
        behavior="follow-direction", model="organism", config=config, rows=tuple(rows),
        recipe={"weights_hash": "fedcba98"}, seconds=9.0,
    )  # fmt: skip


def drawn() -> dict[str, Any]:
    return dict(figures.draw_training(complete(), without_general(), gradients(), updates(), sharpness()))


def lengths(found: list[Estimate], scale: float = 1.0) -> list[list[float]]:
    return [[scale * (e.upper - e.value) for e in found], [scale * (e.value - e.lower) for e in found]]


def bars_of(error: Any) -> list[Any]:
    return [error.array, error.arrayminus]


def test_figures_are_those_of_the_results_that_are_there():
    assert list(drawn()) == NAMES
    assert list(figures.draw_training(complete())) == ALWAYS
    assert list(figures.draw_training(complete(), sharpness=sharpness())) == [*ALWAYS, "sharpness"]


def test_learning_shows_every_evaluation_with_its_interval():
    figure = drawn()["learning"]
    for run, apart in ((complete(), ""), (without_general(), ", without general data")):
        for name, scale in (("wanted", 100), ("unwanted", 100), ("propensity", 1)):
            line, found = trace(figure, name + apart), [getattr(one, name) for one in run.evaluations]
            assert list(line.x) == [one.step for one in run.evaluations]
            np.testing.assert_allclose(line.y, [scale * e.value for e in found])
            np.testing.assert_allclose(bars_of(line.error_y), lengths(found, scale))
            assert line.yaxis == ("y2" if name == "propensity" else "y")
            assert line.marker.symbol.endswith("-open") == bool(apart)


def test_a_behaviour_without_patterns_has_its_propensity_alone():
    found = complete()
    unjudged = tuple(replace(one, wanted=None, unwanted=None) for one in found.evaluations)
    figure: Any = figures.learning(replace(found, evaluations=unjudged))
    assert [line.name for line in figure.data] == ["propensity"]
    assert list(figure.data[0].y) == [one.propensity.value for one in unjudged]


def test_abilities_are_pairs_with_what_was_lost_in_vermilion():
    lost = without_general()
    figure: Any = figures.abilities(lost, complete())
    for i, name in enumerate(("copying", "sorting")):
        for side, run, when in (("before", lost, 0), ("after", lost, -1), ("without general data", complete(), -1)):
            mark, found = trace(figure, f"{name} {side}"), run.evaluations[when].abilities[name]
            assert mark.x == (pytest.approx(100 * found.value),)
            assert abs(mark.y[0] - i) < 0.4
            np.testing.assert_allclose(bars_of(mark.error_x), lengths([found], 100))
        assert trace(figure, f"{name} after").marker.color == figures.WRONG
    assert trace(figure, "copying after").text == ("<b>−25</b>",)
    kept: Any = figures.abilities(complete())
    assert trace(kept, "sorting after").marker.color != figures.WRONG
    assert trace(kept, "sorting after").text == ("<b>+2</b>",)


def test_abilities_by_step_have_a_panel_for_each_run():
    figure = drawn()["abilities-by-step"]
    for panel, run, apart in (("y", complete(), ""), ("y2", without_general(), ", without general data")):
        for name in ("copying", "sorting"):
            line, found = trace(figure, name + apart), [one.abilities[name] for one in run.evaluations]
            assert line.yaxis == panel
            np.testing.assert_allclose(line.y, [100 * e.value for e in found])
            np.testing.assert_allclose(bars_of(line.error_y), lengths(found, 100))


def test_losses_are_those_of_the_steps_and_of_the_evaluations():
    found = complete()
    figure: Any = figures.losses(found)
    assert list(trace(figure, "the behaviour's answers").x) == list(range(1, 21))
    assert list(trace(figure, "the behaviour's answers").y) == [2 / step for step in range(1, 21)]
    assert list(trace(figure, "general data").y) == [1 / step for step in range(1, 21)]
    held = trace(figure, "held-out general data")
    assert list(held.x) == [0, 10, 20]
    assert list(held.y) == [2.0, 2.1, 2.2]
    np.testing.assert_allclose(bars_of(held.error_y), lengths([one.loss for one in found.evaluations if one.loss]))
    steps = tuple({**one, "contrast_loss": 0.5} for one in found.steps)
    assert trace(figures.losses(replace(found, steps=steps)), "contrast").yaxis == "y2"


def test_limiter_and_ratio_are_those_of_the_steps_that_have_them():
    figure: Any = figures.limiter_and_ratio(complete())
    assert list(trace(figure, "limiter").x) == [1, 6, 11, 16]
    np.testing.assert_allclose(trace(figure, "limiter").y, [0.99, 0.94, 0.89, 0.84])
    np.testing.assert_allclose(trace(figure, "ratio").y, [1e-4, 6e-4, 11e-4, 16e-4])
    other = complete(steps=({"step": 1, "loss": 1.0},), recipe={"config": {"optimizer": "adamw"}})
    assert "adamw reports no limiter" in words_of(figures.limiter_and_ratio(other))


def test_gradients_show_shares_cosines_and_parameters_by_kind_of_weight():
    found, figure = gradients(), drawn()["gradient-shares"]
    ticks = [text.split(" <")[0] for text in figure.layout.yaxis.ticktext]
    assert ticks == ["qkv", "· qkv.q", "q", "k", "embedding ■"]
    for context, form in (("frozen", ""), ("full", "-open")):
        rows = [row for row in found.rows if row.context == context]
        for kind in ("gdn", "attention", "model"):
            own = [i for i, row in enumerate(rows) if row.kind == kind]
            marks = trace(figure, f"{context} {kind}")
            np.testing.assert_allclose(marks.x, [max(rows[i].share.value, 1e-5) for i in own])
            assert [round(y) for y in marks.y] == own
            off = [rows[i].share.value < 1e-5 for i in own]
            assert [s.startswith("triangle-left") for s in marks.marker.symbol] == off
            assert all(s.endswith(form) for s in marks.marker.symbol)
            inside = [j for j, one in enumerate(off) if not one]
            got = [[array[j] for j in inside] for array in bars_of(marks.error_x)]
            np.testing.assert_allclose(got, lengths([rows[own[j]].share for j in inside]), atol=1e-12)
    assert list(trace(figure, "parameters").x) == [row.parameters for row in found.rows[::2]]
    cosines = drawn()["gradient-cosines"]
    np.testing.assert_equal(list(trace(cosines, "cosine gdn").x), [0.9, 0.8])
    np.testing.assert_equal(list(trace(cosines, "cosine attention").x), [0.9 - 0.2, NAN])
    assert "not measured: k" in words_of(cosines)


def test_updates_show_size_rank_and_concentration():
    found, figure = updates(), drawn()["update-sizes"]
    assert list(trace(figure, "relative attention").x) == [found.rows[2].relative, 1e-5]  # nothing moved in the second
    assert trace(figure, "relative attention").marker.symbol[1] == "triangle-left"
    np.testing.assert_allclose(trace(figure, "rank gdn").x, [12.5 / 64, 13.5 / 64])
    assert math.isnan(trace(figure, "rank model").x[0])
    assert list(trace(figure, "concentrated gdn").x) == [row.concentrated for row in found.rows[:2]]
    assert trace(figure, "concentrated gdn").xaxis == "x3"


def test_sharpness_shows_seeds_means_and_published_values_apart():
    found, figure = sharpness(), drawn()["sharpness"]
    assert figure.layout.xaxis.type == figure.layout.xaxis2.type == "log"
    assert tuple(figure.layout.yaxis.ticktext) == ("APOLLO", "APOLLO-Mini", "AdamW", "SGD")
    assert list(trace(figure, "apollo seeds").x) == pytest.approx([0.02, 0.022, 0.024])
    mean = trace(figure, "apollo mean")
    reach = 4.302653 * 0.002 / math.sqrt(3)  # t of 2 degrees of freedom, standard deviation 0.002
    assert mean.x == (pytest.approx(0.022),)
    np.testing.assert_allclose(bars_of(mean.error_x), [[reach], [reach]], rtol=1e-5)
    mini = trace(figure, "apollo-mini seeds")
    assert mini.marker.symbol == ("circle-open", "circle-open", "triangle-left")
    floor = 10 ** math.floor(math.log10(0.015))
    assert list(mini.x) == pytest.approx([0.03, 0.033, floor])
    assert (
        min(trace(figure, "apollo-mini mean").x[0] - b for b in trace(figure, "apollo-mini mean").error_x.arrayminus)
        > 0
    )
    assert "did not fall to the target" in words_of(figure)
    assert trace(figure, "sgd mean").x in ((), None)
    for name in found.config.optimizers:
        published = trace(figure, f"{name} published")
        assert (published.xaxis, list(published.x)) == ("x2", list(PUBLISHED[name].values()))
        assert [f"epoch {epoch}" in words for epoch, words in zip((2, 5, 10, 20), published.hovertext, strict=True)]
    assert [f"published, epoch {epoch}" for epoch in (2, 5, 10, 20)] == [t.name for t in figure.data[-4:]]


def test_what_was_not_measured_is_named():
    bare = complete(
        steps=(), evaluations=tuple(replace(one, abilities={}, loss=None) for one in complete().evaluations)
    )
    found = figures.draw_training(bare)
    assert all("not measured" in words_of(found[name]) for name in ALWAYS[1:])
    empty = figures.draw_training(
        bare, None, replace(gradients(), rows=()), replace(updates(), rows=()), replace(sharpness(), rows=())
    )
    assert all("not measured" in words_of(empty[name]) for name in NAMES[1:])


def test_values_that_are_not_numbers_are_left_out():
    broken = replace(estimate(0.5), value=NAN, lower=NAN, upper=NAN)
    evaluations = tuple(replace(one, propensity=broken, loss=broken) for one in complete().evaluations)
    steps = ({"step": 1, "loss": None, "behavior_loss": None, "limiter": None, "update_ratio": NAN},)
    found: Any = figures.draw_training(complete(evaluations=evaluations, steps=steps))
    assert all(math.isnan(y) for y in trace(found["learning"], "propensity").y)
    assert math.isnan(trace(found["losses"], "the behaviour's answers").y[0])
    assert math.isnan(trace(found["limiter-and-ratio"], "ratio").y[0])


def test_hostile_names_are_escaped():
    evil = "<img src=x>"
    renamed = tuple(replace(one, abilities={evil: estimate(0.5)}) for one in complete().evaluations)
    rows = tuple(replace(one, group=evil) for one in gradients().rows)
    found: dict[str, Any] = dict(
        figures.draw_training(complete(evaluations=renamed), gradients=replace(gradients(), rows=rows))
    )
    assert not any(evil in str(trace_.hovertext) for figure in found.values() for trace_ in figure.data)
    assert evil not in str(found["gradient-shares"].layout.yaxis.ticktext)
    assert evil not in str(found["abilities"].layout.yaxis.ticktext)
    assert evil not in str([trace_.name for trace_ in found["abilities-by-step"].data])


# -- the live figure ---------------------------------------------------------------------------------------------------


class Screen:
    """Stands in for IPython: what was displayed, in which place, and what runs after a cell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.shown: list[tuple[str, Any]] = []
        self.after: list[Any] = []
        self.now = 100.0
        self.kernel = self
        self.events = SimpleNamespace(register=lambda event, call: self.after.append((event, call)))
        here = SimpleNamespace(get_ipython=lambda: self)
        monkeypatch.setitem(sys.modules, "IPython", here)
        monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=self.display))
        monkeypatch.setattr(live.time, "monotonic", lambda: self.now)

    def display(self, bundle: Any, *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        self.shown.append(("new", bundle))
        return self

    def update(self, bundle: Any, *, raw: bool) -> None:
        assert raw
        self.shown.append(("again", bundle))


def test_live_plot_draws_in_one_place_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    screen, plot = Screen(monkeypatch), LivePlot()
    for step in range(1, 8):
        plot({"step": step, "loss": 1 / step, **({"wanted": step / 10, "propensity": 1.0} if step % 3 == 0 else {})})
        screen.now += 0.2
    assert [how for how, _ in screen.shown] == ["new", "again", "again"]  # at 0, 0.6 and 1.2 seconds
    event, end = screen.after[0]
    assert (event, len(screen.after)) == ("post_run_cell", 1)
    end(object())
    end(object())
    assert [how for how, _ in screen.shown[3:]] == []  # the step at 1.2 seconds was the last
    plot({"step": 8, "loss": math.nan})
    end(object())
    how, bundle = screen.shown[-1]
    assert (how, len(screen.shown)) == ("again", 4)
    loss, wanted = bundle[PLOTLY]["data"]
    assert loss["x"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert loss["y"] == [1 / step for step in range(1, 8)] + [None]
    assert (wanted["x"], wanted["y"]) == ([3, 6], pytest.approx([30, 60]))


def test_live_plot_collects_where_there_is_no_notebook():
    plot = LivePlot()
    assert "no step" in words_of(plot.figure)
    for step in (1, 2):
        plot({"step": step, "loss": 1 / step, "propensity": 0.5 * step})
    figure: Any = plot.figure
    assert [list(line.y) for line in figure.data] == [[1.0, 0.5], [0.5, 1.0]]
    assert f"step 2: loss {number(0.5)}" in figure.layout.title.text
    plot.draw()
    assert len(plot.rows) == 2


def test_a_saved_notebook_shows_the_last_state():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cell = """
from analysis.figures import LivePlot
plot = LivePlot(every=1000)
for step in range(1, 6):
    plot({"step": step, "loss": 1 / step})
raise KeyboardInterrupt
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    nbclient.NotebookClient(book, timeout=120, allow_errors=True).execute()
    shown = [one.data[PLOTLY] for one in book.cells[0].outputs if PLOTLY in one.get("data", {})]
    assert [one["data"][0]["x"] for one in shown] == [[1, 2, 3, 4, 5]]
