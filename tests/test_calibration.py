"""What a calibration shows: rates against scipy, curves and tables by hand, and runs that go on where they stopped."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from pages import Page, assert_stands_alone
from scipy.stats import binomtest

from analysis import calibrate as running
from analysis.calibrate import CASES, CalibrationConfig, calibrate, cases, recipe
from analysis.calibration import RESULT, SWEPT, Calibration, Rate, open_calibration, shipped_calibration
from analysis.calibration_report import render_calibration
from probes.errors import WrongInput
from probes.gate import GateConfig

TINY = CalibrationConfig(
    seeds=1, steps=2, jobs=1,
    gate=GateConfig(layers=(4,), prompts=6, search_prompts=4, controls=2, generations=1, max_new_tokens=8,
                    general_texts=6, doses=(-0.5, -0.25, 0.0, 0.25, 0.5)),
)  # fmt: skip


def row(truth: str, *, seed: int, reliability: float, effect: bool = True, strength: float = 0.0) -> dict[str, Any]:
    """A case that passes everything else when `effect`, and reliability from 0.8 on."""
    passed = {"reliability": reliability >= 0.8, "controls": effect}
    criteria = [
        {"name": "reliability", "observed": reliability, "lower": None, "threshold": 0.8},
        {"name": "controls", "observed": 1.0, "lower": None, "threshold": 0.5},
    ]
    for criterion in criteria:
        criterion["status"] = "pass" if passed[str(criterion["name"])] else "fail"
    return {
        "name": f"{truth} {seed}", "kind": "random" if truth == "null" else "planted by training", "truth": truth,
        "behavior": "", "site": "resid", "seed": seed, "strength": strength, "taught": False, "working": strength >= 1,
        "verdict": "PASS" if all(passed.values()) else "FAIL", "layer": 4, "dose": 0.5, "method": "mean difference",
        "shown": 3 * strength, "percentile": 100.0 if effect else 60.0, "criteria": criteria, "seconds": 1.0,
    }  # fmt: skip


def sample() -> Calibration:
    nulls = [row("null", seed=i, reliability=i / 10, effect=i == 9) for i in range(10)]
    reliable = (0.7, 0.75, 0.8, 0.85)
    plants = [row("planted", seed=i, reliability=r, strength=s) for s in (0.5, 1.0) for i, r in enumerate(reliable)]
    return Calibration(rows=(*nulls, *plants), recipe=recipe(TINY))


@pytest.mark.parametrize(("hits", "n"), [(0, 200), (1, 216), (5, 24), (24, 24)])
def test_rates_have_the_exact_bounds_of_scipy(hits, n):
    rate = Rate(hits=hits, n=n)
    exact: Any = binomtest(hits, n).proportion_ci(confidence_level=0.9, method="exact")  # both ends at 95%
    assert (rate.lower, rate.upper) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert rate.value == hits / n


def test_every_curve_passes_through_the_rates_at_the_chosen_threshold():
    """Also where a criterion decided nothing: a drawn direction has no reliability, and may pass all the same."""
    whole = sample()
    drawn = copy.deepcopy(dict(whole.rows[9]))
    drawn["criteria"][0] |= {"status": "reported", "observed": None}
    for rows in (whole.rows, (*whole.rows, {**drawn, "name": "drawn"})):
        found = replace(whole, rows=rows)
        for name in SWEPT:
            if not any(c["name"] == name for row in rows for c in row["criteria"]):
                continue
            curve = found.curve(name)
            chosen = curve[curve.chosen].iloc[0]
            assert chosen.false_positives == pytest.approx(found.false_positives.value), name
            assert chosen.detection == pytest.approx(found.detection.value), name


def test_error_rates_count_verdicts_by_truth():
    found = sample()
    assert str(found.false_positives) == "1 of 10"
    assert str(found.detection) == "2 of 4"  # reliabilities 0.7 to 0.85; only the working strength counts
    assert not found.trusted
    good = replace(found, rows=tuple(r for r in found.rows if r["verdict"] == ("FAIL", "PASS")[r["truth"] != "null"]))
    assert good.false_positives.value == 0
    assert not good.trusted  # nothing wrong in 9 is no evidence for 3%
    many = [row("null", seed=100 + i, reliability=0.1) for i in range(120)]
    assert replace(good, rows=(*good.rows, *many)).trusted


def test_tables_say_what_each_criterion_is_good_for():
    found = sample()
    table = found.criteria().set_index("criterion")
    assert table.loc["reliability", "nulls_failed"] == 8
    assert table.loc["controls", "nulls_failed"] == 9
    assert table.loc["controls", "nulls_by_it_alone"] == 1  # reliability 0.8, no effect
    assert table.loc["reliability", "plants_by_it_alone"] == 2
    kinds = found.by_kind().set_index(["truth", "strength"])
    assert kinds.loc[("null", 0.0), "stopped_by"] == "controls (9), reliability (8)"
    assert list(found.power()["rate"]) == [0.5, 0.5]
    assert len(found.frame()) == 18


def test_a_curve_moves_one_threshold_and_leaves_the_others():
    curve = sample().curve("reliability").set_index("threshold")
    assert curve.loc[0.8, "chosen"]
    assert curve.loc[0.8, "detection"] == 0.5
    assert curve.loc[0.7, "detection"] == 1.0
    assert curve.loc[0.0, "false_positives"] == pytest.approx(0.1)  # the others have no effect beyond controls
    assert curve["detection"].is_monotonic_decreasing
    with pytest.raises(WrongInput, match="'dose' has no threshold to move; allowed are reliability, decodability"):
        sample().curve("dose")


def test_cases_are_as_many_as_promised_and_each_has_its_own_name():
    found = cases(CalibrationConfig())
    nulls = [case for case in found if case.truth == "null"]
    assert len({case.name for case in found}) == len(found)
    assert len(nulls) >= 200
    assert {case.kind for case in nulls} == {"random", "shuffled labels", "words", "length", "crossed"}
    assert len([case for case in found if case.working]) >= 20
    assert {case.kind for case in found[:40]} == {case.kind for case in found}  # kinds alternate


def test_a_run_goes_on_where_it_stopped_and_keeps_to_its_recipe(tmp_path, monkeypatch):
    kinds = ("random", "words", "planted by a rank-1 edit")
    some = [next(case for case in cases(TINY) if case.kind == kind) for kind in kinds]
    monkeypatch.setattr(running, "cases", lambda config: some[:2])
    first = calibrate(TINY, out=tmp_path, progress=False)
    assert [r["verdict"] for r in first.rows] == ["INCONCLUSIVE", "INCONCLUSIVE"]  # far too few prompts
    with (tmp_path / CASES).open("a") as file:
        file.write('{"name": "cut o')  # as an interruption leaves it
    monkeypatch.setattr(running, "cases", lambda config: some)
    lines = (tmp_path / CASES).read_text().split("\n")[:2]
    whole = calibrate(TINY, out=tmp_path, progress=False)
    kept = (tmp_path / CASES).read_text().split("\n")
    assert kept[:2] == lines
    assert len(kept) == 4
    assert list(whole.rows[:2]) == list(first.rows)
    assert whole.rows[2]["shown"] is not None
    whole.save(tmp_path / "calibration.json")
    assert list(open_calibration(tmp_path).rows) == json.loads(json.dumps(whole.rows))
    with pytest.raises(WrongInput, match="holds cases of another recipe"):
        calibrate(replace(TINY, steps=3), out=tmp_path, progress=False)


def test_the_page_stands_alone_and_says_both_rates():
    html = render_calibration(sample())
    page = Page(html)
    assert_stands_alone(html, page, ("passed", "power", "operating"))
    for said in ("1 of 10", "2 of 4", "The gate misses its limits", "dispositions calibrate", "nulls by it alone"):
        assert said in page.words


@pytest.mark.parametrize("broken", ["{}", '{"rows": [], "recipe": {}}', '{"rows": 3}'])
def test_what_is_no_calibration_is_refused(tmp_path, broken):
    (tmp_path / "calibration.json").write_text(broken)
    with pytest.raises(WrongInput, match="is not a calibration"):
        open_calibration(tmp_path)


def test_the_shipped_calibration_is_of_the_gate_that_ships():
    found = shipped_calibration()
    assert found is not None, f"there is no {RESULT} beside the data"
    asked = json.loads(json.dumps(recipe(CalibrationConfig())))
    assert {k: v for k, v in found.recipe.items() if k != "versions"} == {
        k: v for k, v in asked.items() if k != "versions"
    }
    assert [row["name"] for row in found.rows] == [case.name for case in cases(CalibrationConfig())]
    assert len(found.nulls) >= 200
    assert found.trusted, str(found)


@pytest.mark.parametrize("setting", [{"site": "gdn.state"}, {"seed": 3}, {"direction": "random"}, {"heads": (1,)}])
def test_what_each_case_decides_cannot_be_chosen(setting):
    gate = GateConfig(**({"site": "gdn.state"} if "heads" in setting else {}), **setting)
    with pytest.raises(WrongInput, match=f"{next(iter(setting))}.* cannot be chosen for a calibration"):
        CalibrationConfig(gate=gate)


@pytest.mark.parametrize("line", ["5", "{}", '{"name": "x"}', "not json"])
def test_a_line_that_is_no_case_is_named(tmp_path, line):
    (tmp_path / CASES).write_text(f"{line}\n")
    config = CalibrationConfig()
    running.write_json(tmp_path / running.RECIPE, recipe(config))
    with pytest.raises(WrongInput, match=r"line 1 of .* is not a case; remove the file to begin again"):
        calibrate(config, out=tmp_path, progress=False)
    config = CalibrationConfig(gate=GateConfig(layers=(4,)))  # not among those of attn.heads
    with pytest.raises(WrongInput, match=r"site 'attn.heads' does not exist at layer 4"):
        calibrate(config, out=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()
