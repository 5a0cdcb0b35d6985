"""The page of a training run: what it says follows the numbers, what is missing is named, and nothing is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pages import HOSTILE, Page, assert_browser_draws, assert_shown_and_not_obeyed, assert_stands_alone, needs_browser
from test_figures_training import ALWAYS, NAMES, complete, estimate, gradients, sharpness, updates, without_general

from analysis.sharpness import PUBLISHED, SharpnessComparison
from analysis.training_report import (
    ABLATION,
    CONFIG,
    GRADIENTS,
    SHARPNESS,
    UPDATES,
    _beside_paper,
    render_training_report,
    write_training_report,
)
from analysis.words import number, percent
from probes.errors import WrongInput
from probes.stats import Estimate
from probes.store import write_json
from training.config import TrainConfig
from training.result import Training


def beside() -> dict[str, Any]:
    """Everything that may lie beside a run."""
    return {"alone": without_general(), "gradients": gradients(), "updates": updates(), "sharpness": sharpness()}


def changed(index: int, **parts: Any) -> Training:
    """A run with another evaluation: 0 is before, -1 after."""
    found = list(complete().evaluations)
    found[index] = replace(found[index], **parts)
    return complete(evaluations=tuple(found))


def told(verdict: Mapping[str, Any] | None, *, verified: bool = True) -> Training:
    return complete(recipe={**complete().recipe, "verdict": verdict}, verified=verified)


def renamed(training: Training) -> Training:
    """With an ability of a hostile name."""
    evaluations = tuple(
        replace(one, abilities={HOSTILE: one.abilities["copying"], "sorting": one.abilities["sorting"]})
        for one in training.evaluations
    )
    return replace(training, evaluations=evaluations)


def hostile() -> Training:
    whole = complete()
    verdict = {**whole.recipe["verdict"], "sentence": HOSTILE}
    return replace(
        renamed(whole), model=HOSTILE, telemetry=({**whole.telemetry[0], "kind": HOSTILE},),
        recipe={**whole.recipe, "device": HOSTILE, "verdict": verdict},
        mix={**whole.mix, "hash": HOSTILE},
    )  # fmt: skip


def hostile_beside() -> dict[str, Any]:
    found = beside()
    rows = tuple(replace(row, group=HOSTILE if row.group == "embedding" else row.group) for row in gradients().rows)
    answers = (replace(gradients().answers[0], sentence=HOSTILE),)
    return {**found, "alone": renamed(without_general()), "gradients": replace(gradients(), rows=rows, answers=answers)}


SAMPLES: dict[str, Any] = {
    "complete": lambda: (complete(), beside()),
    "alone": lambda: (complete(), {}),
    "hostile": lambda: (hostile(), hostile_beside()),
    "unverified": lambda: (told(None, verified=False), {}),
    "lost": lambda: (without_general(), {}),
    "unmoved": lambda: (changed(-1, wanted=estimate(0.12)), {}),
    "away": lambda: (changed(0, wanted=estimate(0.95)), {}),
    "bare": lambda: (
        complete(
            evaluations=tuple(
                replace(one, wanted=None, unwanted=None, abilities={}, loss=None) for one in complete().evaluations
            ),
            steps=(), telemetry=(), mix={}, recipe={}, rank=None, verified=False,
        ),
        {},
    ),
}  # fmt: skip


@cache
def html_of(name: str) -> str:
    training, others = SAMPLES[name]()
    return render_training_report(training, **others)


@cache
def page_of(name: str) -> Page:
    return Page(html_of(name))


def plain(page: Page) -> str:
    return re.sub(r"\s+", " ", page.words)


def cells_after(page: Page, *names: str) -> list[str]:
    """Cells from the row that has these cells one after the other."""
    places = [i for i in range(len(page.cells)) if page.cells[i : i + len(names)] == list(names)]
    assert places, names
    return page.cells[places[0] + len(names) :]


def test_page_holds_every_number_of_the_run():
    training, page = complete(), page_of("complete")
    words = plain(page)
    for said in (
        "Learned", "wanted answers went from 10.0% to 80.0%", "propensity from −3.20 to 2.40 nats",
        "the intervals do not overlap", "No ability fell by more than 3 points", "2 → 2.2 nats a token",
        "Before the run, its direction was verified on weights fedcba98: the direction causes it.",
        "apollo, rank 16, lr 0.0002, 20 steps",
        "by −1 points (copying), and without general data by −30 (sorting)", '"weights_hash": "fedcba98"',
        "In the 4 steps that were looked at it was 0.915 on average (a mean over tensors), 0.84 at the lowest",
    ):  # fmt: skip
        assert said in words, said
    alone = without_general()
    for name, one, two, third in (
        ("wanted answers", training.before.wanted, training.after.wanted, alone.after.wanted),
        ("unwanted answers", training.before.unwanted, training.after.unwanted, alone.after.unwanted),
        *((f"ability: {a}", e, training.after.abilities[a], alone.after.abilities[a])
          for a, e in training.before.abilities.items()),
    ):  # fmt: skip
        assert one is not None
        assert two is not None
        assert third is not None
        row = cells_after(page, name)[:6]
        for cell, seen in ((row[0], one), (row[1], two), (row[3], third)):
            assert cell == f"{number(100 * seen.value)}%{number(100 * seen.lower)} to {number(100 * seen.upper)}"
        for cell, seen in ((row[2], two), (row[4], third)):
            assert cell.lstrip("+") == f"{number(100 * (seen.value - one.value))} points"
        assert row[5] == ("yes" if two.lower > one.upper or two.upper < one.lower else "no")
    assert cells_after(page, "q_proj")[:5] == ["2.5", "0.25", "7.5", "0.875", "0.000325"]
    assert cells_after(page, "the behaviour's answers")[:3] == ["200", "2,345", "12,345"]
    assert cells_after(page, "general data")[:3] == ["160", "1,789", "6,789"]
    assert "abcdef0123456789" in words


def test_page_holds_every_number_of_what_lies_beside_the_run():
    page = page_of("complete")
    assert "It does, at 0.7." in plain(page)
    frozen, full = gradients().rows[0:2]
    row = cells_after(page, "qkv, gdn")
    assert row[:3] == ["12.5%6.25 to 18.8", f"{number(100 * full.share.value)}%2 to 6", "6%"]
    assert row[3].startswith(number(frozen.cosine.value))
    assert row[4].startswith(number(frozen.ratio.value))
    assert cells_after(page, "qkv, gdn, layer 1")[:6] == ["87.96 to 8.06", "8", "1", "87.96 to 8.06", "8", "1"]
    found = updates()
    for i, name in ((2, "q, attention"), (4, "embedding, model")):
        own = found.rows[i]
        row = cells_after(page, name, f"{own.elements:,}")
        shares = (own.relative, own.saved, own.in_place, own.concentrated, own.unchanged)
        assert row[:5] == [f"{number(100 * share)}%" for share in shares]
        assert row[5:7] == (["14.5of 64", "3.5"] if i == 2 else ["–", "–"])
    assert str(found)[1:] in plain(page)
    bent = sharpness()
    assert bent.sentence[1:] in plain(page)
    for name, words in (("apollo", "APOLLO"), ("adamw", "AdamW")):
        mean = bent.estimate(name)
        assert mean is not None
        row = cells_after(page, words)
        assert row[0] == f"{number(mean.value)}{number(mean.lower)} to {number(mean.upper)}"
        assert row[2:6] == [f"{value:.6f}" for value in PUBLISHED[name].values()]
    assert cells_after(page, "AdamW")[1] == "1"
    assert cells_after(page, "APOLLO")[1].startswith(number(0.02 / 0.015))
    assert cells_after(page, "SGD")[:2] == ["not measured", "not measured"]
    assert percent(0.5) in plain(page)


@pytest.mark.parametrize(
    ("ends", "said"),
    [((0.5, 0.4, 0.6), "agrees with"), ((2.0, 1.5, 2.5), "contradicts"), ((1.0, 0.5, 1.5), "does not show")],
)
def test_the_order_is_held_against_the_published_one(ends, said):
    ratio = Estimate(value=ends[0], lower=ends[1], upper=ends[2], n=3, groups=3)
    found = SharpnessComparison(optimizer="apollo-mini", seeds=3, ratio=ratio, difference=None)
    words = _beside_paper([found])
    assert words == f"; the paper has APOLLO-Mini below AdamW at every epoch, and this run {said} that"


@pytest.mark.parametrize(
    ("name", "badge", "said"),
    [
        ("lost", "Learned, with losses", "More than 3 points were lost in: sorting (−30), copying (−25)."),
        ("unmoved", "Not shown", "The share of wanted answers has not clearly changed"),
        ("away", "Moved away", "The share of wanted answers is lower than before"),
        ("bare", "Learned", "The propensity is higher than before"),
    ],
)
def test_the_headline_follows_the_numbers(name, badge, said):
    page = page_of(name)
    assert f"<title>{badge}: " in html_of(name)
    assert said in plain(page)
    assert ("No ability fell" in plain(page)) == (name not in ("lost", "bare"))


def test_a_fall_of_three_points_is_no_loss_and_more_is():
    right = {"copying": estimate(0.92), "sorting": estimate(0.9)}
    assert "with losses" not in render_training_report(changed(-1, abilities=right))
    right["copying"] = estimate(0.9199)
    assert "More than 3 points were lost in: copying (−3.01)." in render_training_report(changed(-1, abilities=right))


def test_answers_and_propensity_that_disagree_are_told_apart():
    words = plain(Page(render_training_report(changed(-1, wanted=estimate(0.12)))))
    assert "has not clearly changed: the intervals before and after overlap" in words
    assert "The propensity rose." in words


@pytest.mark.parametrize(
    ("verdict", "verified", "said"),
    [
        (None, False, "No verdict allowed this run: its direction was not verified."),
        ({"verdict": "FAIL", "sentence": "it does not", "recipe": {}}, True, "The verdict that was given is FAIL"),
        ({"verdict": "PASS", "recipe": {"behavior": "follow-direction", "weights_hash": "other"}}, True,
         "is of follow-direction on weights other, so the direction of this run was not verified"),
    ],
)  # fmt: skip
def test_a_run_without_a_pass_has_a_warning(verdict, verified, said):
    page = Page(render_training_report(told(verdict, verified=verified)))
    assert said in plain(page)
    assert 'class="status fail">its direction was not verified<' in render_training_report(
        told(verdict, verified=verified)
    )
    assert 'class="status fail"' not in html_of("complete")


def test_what_was_not_measured_is_said_with_its_option():
    words = plain(page_of("alone"))
    for option in ("--ablation yes", "--gradients yes", "--sharpness yes", "updates.json"):
        assert option in words
        assert option not in plain(page_of("complete"))
    config = {**complete().recipe["config"], "general_share": 0.0}
    other = complete(recipe={**complete().recipe, "config": config})
    assert "This run itself had no general data." in plain(Page(render_training_report(other)))
    bare = plain(page_of("bare"))
    assert "Not recorded." in bare
    assert "no tensor was projected" in bare


def test_results_of_other_weights_or_behaviours_are_refused():
    with pytest.raises(
        WrongInput, match=r"'gradients' is of follow-direction on weights 99; the run is of .* fedcba98"
    ):
        render_training_report(complete(), gradients=replace(gradients(), recipe={"weights_hash": "99"}))
    with pytest.raises(WrongInput, match="'without general data' is of hedging"):
        render_training_report(complete(), alone=replace(without_general(), behavior="hedging"))
    with pytest.raises(WrongInput, match="'sharpness' is of hedging"):
        render_training_report(complete(), sharpness=replace(sharpness(), behavior="hedging"))


def test_every_setting_is_explained():
    assert set(CONFIG) == {f.name for f in fields(TrainConfig)}
    assert CONFIG["clip"] in page_of("complete").cells


@pytest.mark.parametrize("name", SAMPLES)
def test_page_stands_alone(name):
    shown = NAMES if SAMPLES[name]()[1] else ALWAYS
    assert_stands_alone(html_of(name), page_of(name), shown)
    assert not {"nan", "inf", "∞"} & set(plain(page_of(name)).lower().split())


def test_hostile_text_is_shown_and_not_obeyed():
    assert_shown_and_not_obeyed(page_of("hostile"), page_of("complete"), times=8)


def saved(folder: Path, name: str) -> Path:
    training, others = SAMPLES[name]()
    training.save(folder / "training.json")
    for key, file in (("alone", ABLATION), ("gradients", GRADIENTS), ("updates", UPDATES), ("sharpness", SHARPNESS)):
        if key in others:
            write_json(folder / file, others[key].as_dict())
    return folder


@pytest.mark.parametrize("name", ["complete", "alone", "bare"])
def test_page_is_the_same_from_a_run_on_disk(name, tmp_path):
    path = write_training_report(saved(tmp_path, name))
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == html_of(name)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(WrongInput, match=r"expected a run folder with training\.json"):
        write_training_report(tmp_path)
    saved(tmp_path, "complete")
    write_json(tmp_path / UPDATES, {"rows": []})
    with pytest.raises(WrongInput, match=r"updates\.json: these are not updates"):
        write_training_report(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data.update(evaluations=[]), "it has no evaluation"),
        (lambda data: data["evaluations"][0]["abilities"].popitem(), "its evaluations are of different measures"),
        (lambda data: data.update(recipe=[]), r"its recipe is \[\]"),
        (lambda data: data.update(mix=3), "its mix is 3"),
        (lambda data: data.update(lr="fast"), "its learning rate is 'fast'"),
        (lambda data: data.update(steps=[3]), "is not a training run"),
        (lambda data: data.update(verified="no"), "its verified is 'no'"),
        (lambda data: data["steps"][0].update(seconds="x"), "its seconds of .* is 'x'"),
        (lambda data: data["evaluations"][1].update(step=None), "its step of evaluation 1 is None"),
        (lambda data: [part.update(propensity=None) for part in data["evaluations"]], "propensity"),
        (lambda data: data["mix"].update(behavior=5), "its mix of behavior data is 5"),
        (lambda data: data["recipe"].update(config="abc"), "its config is 'abc'"),
        (lambda data: data["recipe"].update(verdict="x"), "its verdict is 'x'"),
        (lambda data: data["recipe"]["verdict"].update(recipe="x"), "its recipe of the verdict is 'x'"),
        (lambda data: data.pop("model"), "is not a training run"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, damage, said, unchecked):
    data = json.loads((saved(tmp_path, "complete") / "training.json").read_text())
    damage(data)
    write_json(tmp_path / "training.json", data)
    with pytest.raises(WrongInput, match=rf"{tmp_path.name}.* is not a training run.*"):
        write_training_report(tmp_path)
    with pytest.raises(WrongInput, match=said):
        write_training_report(tmp_path)


def test_numbers_that_are_gone_are_named():
    """Losses and gradients that were not finite are null on disk."""
    steps = ({"step": 1, "loss": None, "limiter": None, "update_ratio": None, "behavior_loss": None},)
    broken = {key: None if key != "kind" else value for key, value in complete().telemetry[0].items()}
    page = Page(render_training_report(complete(steps=steps, telemetry=(broken,))))
    assert cells_after(page, "q_proj")[:5] == ["not measured"] * 5
    assert not {"nan", "inf", "∞"} & set(plain(page).lower().split())


@needs_browser
def test_a_browser_draws_every_figure_without_a_network(tmp_path):
    path = write_training_report(saved(tmp_path, "hostile"))
    assert_browser_draws(path, tmp_path, NAMES)
