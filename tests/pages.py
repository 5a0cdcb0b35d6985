"""What holds for every report page: it stands alone, obeys no text that it shows, and a browser draws it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from analysis.figures import plotly_script

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
LOADING = ("src", "srcset", "href", "data", "action", "formaction", "poster", "background", "ping")
needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


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


def assert_stands_alone(html: str, page: Page, figures: Sequence[str], *, links: Sequence[str] = ()) -> None:
    """It loads nothing, has plotly inside exactly once with its figures, and machines can read it.

    `links` are all that it links to, in order: files beside it, which a reader may open and the page does not load. A
    page without figures has no scripts at all.
    """
    references = [(tag, value) for tag, attrs in page.tags for key, value in attrs.items() if key in LOADING]
    assert [one for one in references if not (one[1] or "").startswith("#")] == [("a", link) for link in links]
    assert all(re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", link) for link in links)
    assert not {"link", "base", "iframe", "object", "embed", "img"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"https?:|\*", policy)
    assert html.count(plotly_script()) == bool(figures)
    assert page.scripts > 0 if figures else (page.scripts == 0 and "script" not in policy)
    assert html.count("Plotly.newPlot(") - plotly_script().count("Plotly.newPlot(") == len(figures)
    found = next(str(attrs["class"]) for tag, attrs in page.tags if tag == "header").replace(" ", ".")
    assert re.search(rf"\.{found}(, [^{{]*)? \{{ --tone: ", page.styles), found  # what was found has a colour
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for tag, attrs in page.tags if tag == "a"} <= {*ids, *(link[1:] for link in links)}


def assert_shown_and_not_obeyed(page: Page, harmless: Page, *, times: int) -> None:
    """`HOSTILE` in a page is text like any other in `harmless`."""
    assert page.scripts == harmless.scripts
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert page.words.count(HOSTILE) >= times
    assert all("onerror" not in attrs for _, attrs in page.tags)


def assert_browser_draws(path: Path, folder: Path, figures: Sequence[str]) -> None:
    dom, console = browse(path, folder)
    assert re.findall(r'<div id="([a-z-]+)" class="[^"]*js-plotly-plot', dom) == list(figures)
    assert dom.count('class="main-svg"') >= len(figures)
    assert "<title>owned" not in dom
    assert "Content Security Policy" not in console
    assert "CONSOLE" not in console


def browse(path: Path, folder: Path) -> tuple[str, str]:
    """A page after its scripts ran, without them, and what the browser wrote."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
        path.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    return re.sub(r"<script.*?</script>", "", result.stdout, flags=re.DOTALL), result.stderr
