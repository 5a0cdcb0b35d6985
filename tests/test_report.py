"""The report: it says everything that the verdict holds, shows hostile text without obeying it, and loads nothing."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from functools import cache
from typing import Any

import pytest
from pages import Page, assert_browser_draws, assert_shown_and_not_obeyed, assert_stands_alone, needs_browser
from test_verdicts import NAMES, TOPICS, sample

from analysis import figures, report
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
        "0.95 (0.92 to 0.97)", "i brace the tower first .", "i seal the bridge 15 now .", "10 more", "88%", "44%",
        '"weights_hash": "fedcba9876543210"',
    ):  # fmt: skip
        assert said in words, said
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
    assert_shown_and_not_obeyed(page_of("hostile"), page_of("PASS"), times=9)


def test_page_says_what_is_missing():
    words = page_of("FAIL").words
    assert "not measured: a drawn vector has none" in words
    assert "was not measured: the behaviour has no scoring patterns" in words
    assert "Not measured: nothing was generated." in words
    whole = sample("FAIL")
    bare = replace(whole, evidence={}, controls={}, phases=(), recipe={}, criteria=whole.criteria[:2], cost={})
    assert Page(report.render(bare)).words.count("not measured") >= 3


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
