"""The report: it says everything that the verdict holds, shows hostile text without obeying it, and loads nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, fields, replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from test_verdicts import HOSTILE, NAMES, TOPICS, sample

from analysis import figures, report
from analysis.words import number
from probes.criteria import GateCriteria, Verdict, open_verdict


@pytest.fixture(params=["PASS", "FAIL", "INCONCLUSIVE"])
def verdict(request: pytest.FixtureRequest) -> Verdict:
    return sample(request.param)


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles, by tag."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.words, self.styles, self.scripts = "", "", 0
        self._inside, self._in_cell = "", False
        self.feed(html)
        self.cells = [cell.strip() for cell in self.cells]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self.scripts += tag == "script"
        if tag in ("td", "th"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = ""
        elif tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.styles += data
        elif self._inside != "script":
            self.words += data
            if self._in_cell:
                self.cells[-1] += data


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


def test_page_refers_to_nothing_outside_itself(verdict):
    page = page_of(verdict.verdict)
    loading = ("src", "srcset", "href", "data", "action", "formaction", "poster", "background", "ping")
    references = [value for _, attrs in page.tags for key, value in attrs.items() if key in loading]
    assert [value for value in references if not (value or "").startswith("#")] == []
    assert not {"link", "base", "iframe", "object", "embed", "img"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"https?:|\*", policy)


def test_plotly_is_inside_exactly_once(verdict):
    html = html_of(verdict.verdict)
    assert html.count(figures.plotly_script()) == 1
    assert html.count("Plotly.newPlot(") - figures.plotly_script().count("Plotly.newPlot(") == len(NAMES)


def test_page_is_of_bearable_size(verdict):
    size = len(html_of(verdict.verdict).encode())
    assert size < 6_000_000
    assert size - len(figures.plotly_script().encode()) < 200_000


def test_hostile_text_is_shown_and_not_obeyed():
    harmless, page = page_of("PASS"), page_of("hostile")
    assert page.scripts == harmless.scripts
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert page.words.count(HOSTILE) >= 9
    assert all("onerror" not in attrs for _, attrs in page.tags)


def test_page_can_be_read_by_machines(verdict):
    page = page_of(verdict.verdict)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for tag, attrs in page.tags if tag == "a"} <= set(ids)


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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("name", ["FAIL", "hostile"])
def test_a_browser_draws_every_figure_without_a_network(name, tmp_path):
    path = report.write_report(sample(name), tmp_path / "report.html")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    dom = re.sub(r"<script.*?</script>", "", result.stdout, flags=re.DOTALL)
    assert re.findall(r'<div id="([a-z-]+)" class="[^"]*js-plotly-plot', dom) == NAMES
    assert dom.count('class="main-svg"') >= len(NAMES)
    assert "<title>owned" not in dom
    assert "Content Security Policy" not in result.stderr
