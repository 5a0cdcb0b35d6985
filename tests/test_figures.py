"""The figures: what is drawn is what the evidence says, and what is not there is named."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_verdicts import DOSES, NAMES, complete, first_version, numbers, sample, verdict_of

from analysis import figures
from analysis.words import number
from probes.criteria import Verdict
from probes.evidence import control_threshold


@pytest.fixture(params=["PASS", "FAIL", "INCONCLUSIVE"])
def verdict(request: pytest.FixtureRequest) -> Verdict:
    return sample(request.param)


def trace(figure: Any, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def words_of(figure: Any) -> str:
    """Everything that is written in a figure."""
    notes = [note.text for note in figure.layout.annotations]
    return " ".join([*notes, *(t.name or "" for t in figure.data), *(str(t.hovertext) for t in figure.data)])


def bounds(estimates: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [e["upper"] - e["value"] for e in estimates], [e["value"] - e["lower"] for e in estimates]


def test_layer_sweep_shows_each_layer_by_kind(verdict):
    evidence = verdict.evidence
    figure: Any = figures.layer_sweep(verdict)
    for kind, (label, color, symbol) in figures.KINDS.items():
        rows, drawn = [row for row in evidence["layers"] if row["kind"] == kind], trace(figure, label)
        assert list(drawn.x) == [row["layer"] for row in rows]
        np.testing.assert_equal(list(drawn.y), [row["effect"]["value"] for row in rows])
        np.testing.assert_allclose([drawn.error_y.array, drawn.error_y.arrayminus], bounds([r["effect"] for r in rows]))
        marks = ["-open" if not row["coherent"] else "-x-open" if row["auroc"] < 0.75 else "" for row in rows]
        assert list(drawn.marker.symbol) == [symbol + mark for mark in marks]
        assert drawn.marker.color == color
    noise = trace(figure, "± what meaningless directions are expected to reach")
    size = [row["bar"] for row in evidence["layers"]]
    np.testing.assert_allclose(noise.base, [-value for value in size])
    np.testing.assert_allclose(noise.y, [2 * value for value in size])
    assert "chosen: layer 4" in words_of(figure)
    few = copy.deepcopy(dict(evidence))
    few["layers"][1] |= {"bar": math.nan, "random_effect": math.nan, "shuffled_effect": None}
    figure = figures.layer_sweep(replace(verdict, evidence=few))
    assert list(trace(figure, noise.name).x) == [0, 2, 3, 4, 5, 6, 7]
    assert "random directions were not run here<br>shuffled labels were not run here" in words_of(figure)
    assert "layer 1: meaningless" not in words_of(figure)
    assert "hollow" in words_of(figure)
    assert "crossed" in words_of(figure)


def test_dose_response_shows_curve_window_and_clipped_perplexity(verdict):
    rows = verdict.evidence["doses"]
    figure: Any = figures.dose_response(verdict)
    curve, ratios = trace(figure, "propensity"), trace(figure, "perplexity ratio")
    assert list(curve.x) == list(ratios.x) == list(DOSES)
    assert list(curve.y) == [row["propensity"]["value"] for row in rows]
    np.testing.assert_allclose([curve.error_y.array, curve.error_y.arrayminus], bounds([r["propensity"] for r in rows]))
    assert list(curve.marker.symbol) == ["circle" if row["coherent"] else "circle-open" for row in rows]
    assert list(ratios.y[:-1]) == [row["perplexity_ratio"] for row in rows[:-1]]
    assert ratios.y[-1] == figures.CLIP
    assert ratios.marker.symbol[-1] == "triangle-up"
    assert list(ratios.text) == [""] * 8 + ["∞"]
    windows = {(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"}
    assert windows == {(-0.5, 0.5)}
    lines = [shape for shape in figure.layout.shapes if shape.type == "line"]
    assert {(shape.x0, shape.yref) for shape in lines if shape.x0 == shape.x1} == {
        (0.5, "y domain"),
        (0.5, "y2 domain"),
    }
    assert [(shape.y0, shape.yref) for shape in lines if shape.y0 == shape.y1] == [(1 / 1.5, "y2"), (1.5, "y2")]
    low, high = figure.layout.yaxis2.range
    assert low < 0 < math.log10(figures.CLIP) < high
    assert figure.layout.yaxis.range[0] < 0 < figure.layout.yaxis.range[1]


def test_dose_curve_without_perplexity_says_so():
    rows = [{"dose": dose, "propensity": numbers(dose, dose - 1, dose + 1)} for dose in (1.0, -1.0, 0.0)]
    figure: Any = figures.dose_curve(rows)
    assert list(trace(figure, "propensity").x) == [-1.0, 0.0, 1.0]
    assert "not measured: no ordinary text was modelled" in words_of(figure)


def test_controls_show_every_control_and_the_bar():
    verdict = sample("PASS")
    found = verdict.evidence["controls"]
    figure: Any = figures.controls(verdict)
    for kind, rows in found["kinds"].items():
        assert list(trace(figure, kind).x) == [row["effect"] for row in rows]
    target = figure.data[0]
    assert target.x == (found["target"]["value"],)  # on the prompts of the controls
    np.testing.assert_allclose([target.error_x.array, target.error_x.arrayminus], bounds([found["target"]]))
    bar = control_threshold(found)[0]
    by_hand = max(abs(row["effect"]) for rows in found["kinds"].values() for row in rows)  # of 20, none may be larger
    assert bar == pytest.approx(by_hand)
    assert sorted(shape.x0 for shape in figure.layout.shapes) == [-bar, bar]
    assert f"to clear: {number(bar)}" in words_of(figure)
    assert "sentiment" in words_of(figure)


def test_hostile_text_is_escaped_in_labels():
    drawn: dict[str, Any] = dict(figures.draw(sample("hostile")))
    assert "<script" not in "".join(words_of(figure) for figure in drawn.values())
    assert "&lt;script&gt;" in words_of(drawn["prompt-effects"])
    for name in ("layer-sweep", "methods", "controls", "baseline", "elsewhere", "specificity", "phases", "modes"):
        assert "&lt;script&gt;" in words_of(drawn[name]), name
    ticks = [str(figure.layout.yaxis.ticktext) for figure in drawn.values()]
    assert "<script" not in "".join(ticks)
    assert sum("&lt;script&gt;" in text for text in ticks) >= 4


def test_prompt_effects_show_every_prompt_sorted_and_count_the_wrong_way():
    verdict = sample("PASS")
    figure: Any = figures.prompt_effects(verdict)
    effects = sorted(row["effect"] for row in verdict.evidence["prompts"])
    wrong = sum(effect < 0 for effect in effects)
    assert wrong > 0
    bars = trace(figure, "prompts")
    assert list(bars.y) == effects
    assert list(bars.marker.color) == [figures.WRONG] * wrong + [figures.TARGET] * (48 - wrong)
    assert f"wrong way: {wrong} of 48</b></span> (allowed: 25%)" in words_of(figure)
    assert all(
        row["id"] in words_of(figure) and row["group"] in words_of(figure) for row in verdict.evidence["prompts"]
    )
    mean = verdict.evidence["effect"]
    band, line = figure.layout.shapes
    assert (band.y0, band.y1, line.y0) == (mean["lower"], mean["upper"], mean["value"])


def test_rows_of_estimates_are_the_evidence():
    verdict = sample("PASS")
    evidence, rows = verdict.evidence, {}
    rows["phases"] = [row["effect"] for row in evidence["phases"]]
    rows["modes"] = [row["effect"] for row in evidence["modes"]]
    rows["specificity"] = [evidence["effect"], *(row["effect"] for row in evidence["specificity"])]
    rows["elsewhere"] = [evidence["effect"], evidence["ood"]["effect"]]
    persona, steered = evidence["baseline"]["persona"], next(r for r in evidence["doses"] if r["dose"] == verdict.dose)
    rows["baseline"] = [
        persona["unwanted"],
        evidence["baseline"]["propensity"],
        steered["propensity"],
        persona["wanted"],
    ]
    rows["necessity"] = [evidence["necessity"]["before"], evidence["necessity"]["drop"]]
    rows["decodability"] = [evidence["decodability"]["auroc"]]
    for name, estimates in rows.items():
        figure: Any = figures.draw(verdict)[name]
        for y, (drawn, estimate) in enumerate(zip(figure.data, estimates, strict=False)):
            assert (drawn.x, drawn.y) == ((estimate["value"],), (y,))
            np.testing.assert_allclose([drawn.error_x.array, drawn.error_x.arrayminus], bounds([estimate]))
            low, high = figure.layout.xaxis.range
            assert low < min(0.0, estimate["lower"])
            assert high > max(0.0, estimate["upper"])
    assert list(trace(figures.necessity(verdict), "random").x) == evidence["necessity"]["random_drops"]
    assert list(trace(figures.decodability(verdict), "shuffled labels").x) == evidence["decodability"]["shuffled"]
    acting: Any = figures.phases(verdict)
    assert [drawn.marker.color for drawn in acting.data] == [
        figures.NOISE,
        figures.NOISE,
        figures.TARGET,
    ]
    ways: Any = figures.modes(verdict)
    assert [drawn.marker.color for drawn in ways.data] == [figures.TARGET] + 3 * [figures.NOISE]
    assert list(ways.layout.yaxis.ticktext)[1] == "ablate<br>take it out"


def test_methods_show_the_search_beside_the_held_out_effect():
    verdict = sample("PASS")
    rows = verdict.evidence["methods"]
    figure: Any = figures.methods(verdict)
    seen, held = ([t for t in figure.data if t.name == name] for name in ("fit split", "held-out"))
    for drawn, key, symbol in ((seen, "searched", "circle-open"), (held, "effect", "circle")):
        assert [t.x[0] for t in drawn] == [row[key]["value"] for row in rows]
        for mark, row in zip(drawn, rows, strict=True):
            np.testing.assert_allclose([mark.error_x.array, mark.error_x.arrayminus], bounds([row[key]]))
            assert mark.marker.symbol == symbol
    assert all(abs(one.y[0] - two.y[0]) > 0.3 for one, two in zip(seen, held, strict=True))
    assert [t.marker.color for t in held] == [figures.TARGET, figures.NOISE, figures.NOISE]
    assert {t.marker.color for t in seen} == {figures.NOISE}
    assert list(figure.layout.yaxis.ticktext) == [
        "<b>mean (judged)</b><br>layer 4, dose 0.5", "whitened<br>layer 4, dose 0.25", "pca<br>layer 5, dose 0.5",
    ]  # fmt: skip
    assert "held-out topics, 98.3% intervals (all 3 together)" in words_of(figure)
    assert "cosine with the judged direction 0.31" in words_of(figure)
    assert "together" not in words_of(
        figures.methods(replace(verdict, evidence={**verdict.evidence, "methods": rows[:1]}))
    )


def test_specificity_is_held_against_a_share_of_the_own_effect():
    verdict = sample("PASS")
    figure: Any = figures.specificity(verdict)
    limit = 0.5 * float(np.mean([row["effect"] for row in verdict.evidence["prompts"]]))
    np.testing.assert_allclose(sorted(s.x0 for s in figure.layout.shapes if s.line.dash == "dash"), [-limit, limit])
    assert f"limit: ±{number(limit)} (50% of its own)" in words_of(figure)
    low, high = figure.layout.xaxis.range
    assert low < -limit < limit < high
    assert [t.marker.color for t in figure.data] == [figures.TARGET, figures.NOISE, figures.NOISE]
    assert list(figure.layout.yaxis.ticktext)[2] == "hedging<br>−25% of its own"
    evidence = complete()
    for part in ("effect", "share"):
        evidence["specificity"][1][part] = {
            key: 4 * value if key in ("value", "lower", "upper") else value
            for key, value in evidence["specificity"][1][part].items()
        }
    moved = verdict_of(evidence)
    assert next(c for c in moved.criteria if c.name == "specificity").status == "fail"
    figure = figures.specificity(moved)
    assert [t.marker.color for t in figure.data] == [figures.TARGET, figures.NOISE, figures.WRONG]


def test_elsewhere_says_what_the_prompts_are_and_how_many_move_the_wrong_way():
    verdict = sample("PASS")
    figure: Any = figures.elsewhere(verdict)
    assert "inside an e-mail, a ticket" in words_of(figure)
    wrong = np.mean([row["effect"] < 0 for row in verdict.evidence["prompts"]])
    away = verdict.evidence["ood"]["wrong_way"]["value"]
    assert list(figure.layout.yaxis.ticktext) == [
        f"held-out<br>anti-steered: {100 * wrong:.1f}%", f"out of distribution<br>anti-steered: {100 * away:.0f}%",
    ]  # fmt: skip


def test_damage_shows_three_measures_against_their_limits():
    figure: Any = figures.damage(sample("PASS"))
    shown = {name: trace(figure, f"damage: {name}") for name in ("perplexity", "KL", "repetition")}
    assert {name: drawn.x[0] for name, drawn in shown.items()} == {"perplexity": 1.17, "KL": 0.084, "repetition": 0.02}
    assert {drawn.marker.color for drawn in shown.values()} == {figures.TARGET}
    limits = [(s.x0, s.xref) for s in figure.layout.shapes if s.line.dash == "dash"]
    assert limits == [(1 / 1.5, "x"), (1.5, "x"), (0.2, "x3")]


def test_text_that_became_far_likelier_is_drawn_as_damage():
    evidence = complete()
    evidence["damage"]["perplexity_ratio"] = 0.1
    figure: Any = figures.damage(verdict_of(evidence))
    drawn = trace(figure, "damage: perplexity")
    assert (drawn.x[0], drawn.marker.color) == (0.1, figures.WRONG)
    assert figure.layout.xaxis.range[0] < 0.1


def test_damage_beyond_the_scale_is_clipped_with_a_mark():
    figure: Any = figures.damage(sample("FAIL"))
    drawn = trace(figure, "damage: perplexity")
    assert drawn.marker.symbol == "triangle-right"
    assert drawn.marker.color == figures.WRONG
    assert drawn.text == ("<b>∞</b>",)
    assert drawn.x[0] <= figure.layout.xaxis.range[1]


def test_every_axis_has_its_unit():
    drawn: dict[str, Any] = dict(figures.draw(sample("PASS")))
    assert list(drawn) == NAMES
    for name in NAMES:
        said = f"{words_of(drawn[name])} {drawn[name].layout.xaxis.title.text}"
        unit = {"decodability": "AUROC", "damage": "nats a token"}.get(name, "nats of log-odds wanted/unwanted")
        assert unit in said, name
    assert "residual norms" in str(drawn["dose-response"].layout.xaxis2.title.text)


def test_what_is_missing_is_said_with_its_reason():
    drawn = {name: words_of(figure) for name, figure in figures.draw(sample("FAIL")).items()}
    assert "not measured: layer 2" in drawn["layer-sweep"]
    assert "<b>not measured</b><br>no control directions were run" in drawn["controls"]
    assert drawn["baseline"].count("not measured: no personas, and no other way to ask") == 2
    assert "<b>not measured</b><br>no other templates are known" in drawn["elsewhere"]
    assert "<b>not measured</b><br>no other shipped behaviour is in words" in drawn["specificity"]
    assert "<b>not measured</b><br>the methods were not run" in drawn["methods"]
    assert "<b>not measured</b><br>the modes were not run" in drawn["modes"]
    assert "not measured: fd-005" in drawn["prompt-effects"]
    assert "<b>not measured</b><br>no held-out prompt shows the behaviour" in drawn["necessity"]


def test_a_verdict_without_any_evidence_still_gives_a_page():
    whole = sample("FAIL")
    bare = replace(whole, evidence={}, controls={}, phases=(), recipe={}, criteria=whole.criteria[:2], cost={})
    drawn = figures.draw(bare)
    assert list(drawn) == NAMES
    assert all("<b>not measured</b>" in words_of(figure) for figure in drawn.values())


def test_a_verdict_of_the_first_version_is_drawn_without_what_it_lacks(verdict):
    drawn = {name: words_of(figure) for name, figure in figures.draw(first_version(verdict)).items()}
    assert list(drawn) == NAMES
    for name in ("elsewhere", "specificity"):
        assert "<b>not measured</b><br>this verdict does not hold it" in drawn[name]
    new = {"methods", "modes", "elsewhere", "specificity"}
    whole = {name: words_of(figure) for name, figure in figures.draw(verdict).items()}
    absent = [name for name in NAMES if name not in new and "<b>not measured</b>" in drawn[name]]
    assert absent == [name for name in NAMES if name not in new and "<b>not measured</b>" in whole[name]]


def test_figures_leave_the_evidence_alone(verdict):
    before = copy.deepcopy(dict(verdict.evidence))
    figures.draw(verdict)
    np.testing.assert_equal(dict(verdict.evidence), before)
