"""The report: it says everything that the verdict holds, shows hostile text without obeying it, and loads nothing."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

import pytest
from pages import Page, assert_browser_draws, assert_shown_and_not_obeyed, assert_stands_alone, needs_browser
from test_verdicts import NAMES, TOPICS, classifier, complete, first_version, judging, sample, verdict_of

from analysis import figures, report
from analysis.calibration import Calibration
from analysis.report import trust
from analysis.words import number
from probes.criteria import GateCriteria, Verdict, open_verdict


@pytest.fixture(params=["PASS", "FAIL", "INCONCLUSIVE"])
def verdict(request: pytest.FixtureRequest) -> Verdict:
    return sample(request.param)


@cache
def html_of(name: str) -> str:
    return report.render(sample(name))


@cache
def page_of(name: str) -> Page:
    return Page(html_of(name))


def test_every_criterion_is_on_the_page_with_its_numbers(verdict):
    page = page_of(verdict.verdict)
    assert verdict.verdict in page.words
    assert verdict.sentence[1:].replace(">=", "≥").replace("<=", "≤") in page.words
    for criterion in verdict.criteria:
        row = page.cells.index(criterion.name + criterion.meaning) - 1
        seen = page.cells[row : row + 6]
        assert seen[0] == str(criterion.number)
        assert seen[2] == criterion.status
        between = f"{number(criterion.lower)} to {number(criterion.upper)}" if criterion.lower is not None else ""
        assert seen[3] == number(criterion.observed) + between
        if criterion.threshold is not None:
            assert seen[4].endswith(number(criterion.threshold))
        assert seen[5] == (f"{criterion.n:,}" if criterion.n else "–")


def test_page_says_what_was_asked_how_it_was_run_and_what_was_answered():
    page = page_of("PASS")
    words = re.sub(r"\s+", " ", page.words)
    for said in (
        "Does what it is told, or something else.", "the model does what is asked", "the model turns to something else",
        "120 contrast pairs in 20 topic groups", "arches, doors, roofs", ", ".join(TOPICS), "1,234,567", "41.2",
        "74 combinations of layer, method and dose (8 layers, 3 methods), by 4-fold cross-validation on 24 prompts of "
        "the fit split", "mean at layer 4, dose 0.5, and judged once, on held-out topics", "2.31 [2.02, 2.6] nats",
        "3.5 times fewer layer tokens", "A rule says which side an answer is on", "the bridge 3 , sealed .", "94%",
        "20 random (0 at least as strong); 20 shuffled labels (0 at least as strong); 2 unrelated (0 at",
        "p ≤ 1/(n + 1) = 0.0476; the highest confidence that can be claimed is n/(n + 1) = 95.2%.",
        "0.95 (0.92 to 0.97)", "i brace the tower first .", "i seal the bridge 15 now .", "10 more", "88%", "44%",
        '"weights_hash": "fedcba9876543210"',
    ):  # fmt: skip
        assert said in words, said
    held = sum(row["effect"] for row in sample("PASS").evidence["prompts"]) / 48
    assert re.search(rf"{number(held)} \[[^]]*\] nats: {100 * held / 2.31:.0f}% of that", words)
    for rule, value in asdict(GateCriteria()).items():
        row = [rule, number(value), report.THRESHOLDS[rule]]
        assert row in [page.cells[at : at + 3] for at in range(len(page.cells))]


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("resid", ("residual norms", "Which tokens have to be edited?", "with every token edited")),
        ("gdn.state", ("state norms", "When has the state to be edited?", "with a state that was edited before")),
        ("attn.heads", ("norms of the heads' output", "Which tokens have to be edited?", "with every token edited")),
    ],
)
def test_page_speaks_of_the_site_that_was_edited(site, words):
    made = sample("PASS")
    page = Page(report.render(replace(made, site=site)))
    assert all(word in page.words for word in words)
    other = replace(made, site="gdn.state" if site == "resid" else "resid")
    assert not all(word in Page(report.render(other)).words for word in words)


def test_every_threshold_is_explained():
    assert set(report.THRESHOLDS) == {f.name for f in fields(GateCriteria)}


def test_page_stands_alone(verdict):
    assert_stands_alone(html_of(verdict.verdict), page_of(verdict.verdict), NAMES)


def test_page_is_of_bearable_size(verdict):
    size = len(html_of(verdict.verdict).encode())
    assert size < 6_000_000
    assert size - len(figures.plotly_script().encode()) < 200_000


def test_hostile_text_is_shown_and_not_obeyed():
    harmless = replace(sample("PASS"), model="another")  # not what the gate was calibrated on, which the page says
    assert_shown_and_not_obeyed(page_of("hostile"), Page(report.render(harmless)), times=18)


def test_page_says_what_is_missing():
    words = page_of("FAIL").words
    assert "not measured: a drawn vector has none" in words
    assert "It is not usable, since that is not clearly above chance" in words
    assert "just asked" not in words
    assert "Not measured: nothing was generated." in words
    whole = sample("FAIL")
    bare = replace(whole, evidence={}, controls={}, phases=(), recipe={}, criteria=whole.criteria[:2], cost={})
    assert Page(report.render(bare)).words.count("not measured") >= 3


BARE = replace(sample("FAIL"), evidence={}, controls={}, phases=(), recipe={}, criteria=(), cost={})


def first_seen(verdict: Verdict) -> str:
    """What a page says between its headline and its first section."""
    words = re.sub(r"\s+", " ", Page(report.render(verdict)).words)
    return words[words.index(" prompt baseline ") : words.index(" What was asked ")]


def test_every_page_shows_three_figures_first(verdict):
    seen = first_seen(verdict)
    effects = [row["effect"] for row in verdict.evidence["prompts"]]
    wrong = 100 * sum(effect < 0 for effect in effects) / len(effects)
    share = f"{wrong:.0f}%" if wrong >= 10 else f"{wrong:.1f}%"
    assert f"anti-steered {share} (" in seen
    assert f"of {len(effects)} held-out prompts move the wrong way (at most 25% allowed)" in seen
    if verdict.verdict == "FAIL":
        assert "prompt baseline not measured no personas, and no way to ask is known" in seen
        assert "out of distribution not measured no other templates are known for its language" in seen
    else:
        found, own = verdict.evidence["ood"], number(sum(effects) / len(effects))
        assert "prompt baseline 5 nats (4.6 to 5.3) what asking by a system turn (persona turns) does" in seen
        assert f"out of distribution {number(found['effect']['value'])} nats (" in seen
        assert seen.count(f"the direction does {own} nats") == 2
        assert f"out of distribution {100 * found['wrong_way']['value']:.0f}% of {len(effects)}" in seen


def test_three_figures_come_first_even_where_nothing_was_measured(verdict):
    assert re.findall("not measured", first_seen(BARE)) == ["not measured"] * 3
    old = first_seen(first_version(verdict))
    assert "out of distribution not measured this verdict does not hold it" in old
    assert "held-out prompts move the wrong way" in old
    assert ("prompt baseline 5 nats" in old) == (verdict.verdict != "FAIL")


def test_page_says_what_each_failure_means_and_what_to_do():
    good = sample("PASS")
    assert "and what it means" not in page_of("PASS").words
    deciding = [c.name for c in good.criteria if c.status == "pass" and c.name != "enough data"]
    failed = tuple(replace(c, status="fail") if c.name in deciding else c for c in good.criteria)
    page = Page(report.render(replace(good, verdict="FAIL", criteria=failed)))
    assert "What failed, and what it means" in page.words
    texts = []
    for c in failed:
        if c.status == "fail":
            at = page.cells.index(f"{c.number} {c.name} fail")
            assert page.cells[at + 1].startswith(number(c.observed))
            assert page.cells[at + 2].endswith(number(c.threshold))
            texts += page.cells[at + 3 : at + 5]
    assert len(texts) == 2 * len(deciding) == 26
    assert "This line was not met." not in texts
    assert all(len(text) > 40 for text in texts)


def test_page_says_what_is_open_and_what_is_missing():
    page = page_of("INCONCLUSIVE")
    assert "What is open, and what it means" in page.words
    assert "0 enough data inconclusive" in page.cells
    waiting = "decodability, selectivity, effect, wrong way, dose-response, controls, specificity."
    assert f"Also open, for want of held-out prompts alone: {waiting}" in re.sub(r"\s+", " ", page.words)
    assert "5 controls inconclusive" not in page.cells
    few = complete(prompts=16)
    few["counts"]["controls"] = 3
    page = Page(report.render(verdict_of(few)))
    assert "5 controls inconclusive" in page.cells
    assert "wrong way, dose-response, specificity." in re.sub(r"\s+", " ", page.words)
    good = sample("PASS")
    for name in ("enough data", "controls", "necessity", "damage: perplexity", "damage: repetition"):
        some = tuple(replace(c, status="inconclusive") if c.name == name else c for c in good.criteria)
        page = Page(report.render(replace(good, verdict="INCONCLUSIVE", criteria=some)))
        at = next(i for i, cell in enumerate(page.cells) if cell.endswith(f"{name} inconclusive"))
        assert "This line was not met." not in page.cells[at : at + 5]


def test_a_budget_says_what_it_does_to_the_certainty():
    evidence = complete()
    for kind in ("random", "shuffled labels"):
        del evidence["controls"]["kinds"][kind][15:]
    evidence["counts"]["controls"] = 15
    evidence["budget"] = {"seconds": 600.0, "asked": 20, "controls": 15}
    verdict = verdict_of(evidence)
    assert verdict.verdict == "INCONCLUSIVE"
    page = Page(report.render(verdict))
    words = re.sub(r"\s+", " ", page.words)
    assert "600 seconds: 15 controls of each drawn kind were run, 20 were asked for. Fewer than 20 leave" in words
    assert "With n = 15 controls of a kind and none above, p ≤ 1/(n + 1) = 0.0625;" in words
    assert "n/(n + 1) = 93.8%." in words
    assert "5 controls inconclusive" in page.cells
    assert "a larger --budget" in words
    assert "seconds: " not in page_of("PASS").words


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (classifier(True), ("A classifier of texts", "an AUROC of 0.81 [0.74, 0.88]", "It is usable", "39 refits")),
        (classifier(False), ("an AUROC of 0.52 [0.41, 0.63]", "It is not usable")),
        (
            judging(),
            ("the model judge-32b at http://localhost:8000/v1 (it calls itself judge-32b-0401)",
             "SHA-256 begins with ab12cd34ef56 (in",
             "Of 40 replies: A 21, B 15, NEITHER 2, unreadable 2 (taken as neither)."),
        ),
        (judging(unreadable=24), ("unreadable 24", "It is not usable: more than half could not be read.")),
    ],
)  # fmt: skip
def test_page_says_who_put_answers_on_a_side(scorer, said):
    evidence = {**complete(), "scorer": scorer}
    page = Page(report.render(verdict_of(evidence)))
    words = re.sub(r"\s+", " ", page.words)
    assert all(part in words for part in said)
    at = page.cells.index("just asked")
    shares = ["94%", "6%", "0%"] if scorer["usable"] else ["not measured"] * 3
    assert page.cells[at : at + 6] == ["just asked", *shares, "0.01", "16"]
    tag = "wanted" if scorer["usable"] else "not scored"
    assert f"i seal the bridge 3 now .{tag}" in page.cells


def test_a_verdict_of_the_first_version_still_gives_a_page(verdict, tmp_path):
    old = first_version(verdict)
    page = Page(report.render(old))
    assert page.words.count("just asked") == 0
    assert "not measured: this verdict does not hold it" in page.words
    assert "layer tokens" not in page.words
    for c in old.criteria:
        assert c.name + c.meaning in page.cells
    old.save(tmp_path / "verdict.json")
    assert report.render(open_verdict(tmp_path)) == report.render(old)
    made = {key: {**row, "shares": None} for key, row in old.evidence["generation"].items()}
    bare = replace(old, evidence={**old.evidence, "generation": made})
    assert "was not measured: the behaviour has no scoring patterns" in Page(report.render(bare)).words


def test_page_is_the_same_from_a_verdict_on_disk(verdict, tmp_path):
    verdict.save(tmp_path / "verdict.json")
    assert report.render(open_verdict(tmp_path)) == html_of(verdict.verdict)


def test_report_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert report.write_report(sample("PASS"), path) == path
    before = path.read_text(encoding="utf-8")
    assert before == html_of("PASS")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(sample("FAIL"), path)
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@needs_browser
@pytest.mark.parametrize("name", ["FAIL", "hostile"])
def test_a_browser_draws_every_figure_without_a_network(name, tmp_path):
    path = report.write_report(sample(name), tmp_path / "report.html")
    assert_browser_draws(path, tmp_path, NAMES)


def test_the_page_says_how_often_the_gate_is_wrong_and_what_that_rests_on():
    verdict = sample("PASS")
    rows = tuple(case(truth, i) for truth, n in (("null", 100), ("planted", 20)) for i in range(n))
    rows += tuple({**case("null", i), "site": "attn.heads"} for i in range(49))
    gate = {**verdict.recipe["config"], "site": "gdn.state", "seed": 7, "phase": "prefill", "doses": (1, 2)}
    known = Calibration(rows=rows, recipe={"model": verdict.model, "config": {"gate": gate}})
    assert trust(verdict, known) == {
        "nonsense that passes": "1 of 100 (with 95% confidence at most 4.7%)",
        "plants that are found": "20 of 20 (with 95% confidence at least 86%)",
        "measured": "at resid, with dispositions calibrate, on the organism",
    }
    other = replace(
        verdict, model="another", recipe={"config": {**gate, "phase": "decode", "doses": [1, 2], "criteria": {}}}
    )
    assert trust(other, known)["as far as it carries over"] == (
        "It was measured on another model than another; this verdict was reached with other settings (criteria, phase)."
    )
    heads = trust(replace(verdict, site="attn.heads"), known)
    assert heads["nonsense that passes"] == "0 of 49 (with 95% confidence at most 5.9%)"
    assert heads["plants that are found"] == "none"
    assert "nothing could be planted at this site" in heads["as far as it carries over"].lower()
    assert trust(verdict, None) == {"error rates": "not measured: no calibration comes with this version"}


def case(truth, i):
    passed = truth == "planted" or i == 50
    return {"site": "resid", "truth": truth, "working": truth == "planted", "verdict": "PASS" if passed else "FAIL"}
