"""Many verdicts side by side: every number in one table, and a page that stands alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import HOSTILE, Page, assert_browser_draws, assert_shown_and_not_obeyed, assert_stands_alone, needs_browser
from test_verdicts import sample

from analysis.batch import Cell, Matrix
from analysis.batch_report import chance, render_batch, write_batch_report
from analysis.calibration import Calibration
from probes.criteria import open_verdict


def cell(result: str, *, model: str = "m", behavior: str = "b", site: str = "resid", said: str = "") -> Cell:
    """A made-up cell; those that were judged have a whole verdict."""
    verdict = sample(result) if result in ("PASS", "FAIL", "INCONCLUSIVE") else None
    name = f"{model}-{behavior}-{site}"
    return Cell(name=name, model=model, behavior=behavior, site=site, result=result, verdict=verdict, said=said)  # type: ignore[arg-type]


def matrix(*cells: Cell) -> Matrix:
    return Matrix(cells=cells, recipe={"config": {"seed": 0, "criteria": {"auroc": 0.75}}})


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_number_of_a_verdict_is_in_the_table():
    """Whatever has a decimal point in the JSON of the evidence is in a column of numbers, and nothing is made up."""
    verdict = sample("PASS")
    table = matrix(cell("PASS")).frame()
    told = verdict.as_dict()
    kept = {"evidence": told["evidence"], "criteria": [{**c, "rule": ""} for c in told["criteria"]]}
    written = set(map(float, re.findall(r"(?<![\"\w])-?\d+\.\d+(?:e[+-]?\d+)?", json.dumps(kept)))) - {
        0.95,
        1 - 0.05 / 3,
    }
    columns = table[["value", "lower", "upper", "dose", "threshold"]].to_numpy().ravel()
    shown = set(columns[np.isfinite(columns)].tolist())
    assert written <= shown
    assert len(written) > 350
    integers = set(map(float, re.findall(r"(?<=[:\[ ])-?\d+(?=[,}\]])", json.dumps(verdict.as_dict()))))
    assert shown - {0.95, 1 - 0.05 / 3} <= written | integers


def test_rows_say_what_they_are_about():
    verdict, table = sample("PASS"), matrix(cell("PASS")).frame()
    assert list(table.columns) == [
        "model", "weights_hash", "behavior", "behavior_hash", "site", "layer", "method", "dose", "phase", "table",
        "name", "value", "lower", "upper", "n", "groups", "threshold", "status",
    ]  # fmt: skip
    assert not table.duplicated(["layer", "method", "dose", "phase", "table", "name"]).any()
    assert set(table.weights_hash) == {"fedcba9876543210"}
    assert set(table.method) == {"mean", "whitened", "pca"}
    criteria = table[table.table == "criterion"].set_index("name")
    for c in verdict.criteria:
        row = criteria.loc[c.name]
        assert (row["value"], row["n"], row["status"]) == (pytest.approx(c.observed), c.n, c.status)
        assert (row["layer"], row["dose"], row["phase"]) == (verdict.layer, verdict.dose, verdict.phase)
    evidence = verdict.evidence

    def one(kind: str, name: str, **where: object) -> Any:
        rows: Any = table[(table.table == kind) & (table.name == name)]
        for column, value in where.items():
            rows = rows[rows[column] == value]
        assert len(rows) == 1
        return rows.iloc[0]

    assert one("outcome", "verdict").status == "PASS"
    for row in evidence["doses"]:
        assert one("dose", "effect", dose=row["dose"]).lower == row["effect"]["lower"]
        assert one("dose", "effect", dose=row["dose"]).status == ("coherent" if row["coherent"] else "")
    for row in evidence["phases"]:
        found = one("phase", "effect", phase=row["phase"])
        assert (found["value"], found["groups"]) == (row["effect"]["value"], 8)
    assert one("layer", "effect", layer=4).status == "coherent, chosen"
    assert one("method", "cosine", method="whitened").value == 0.31
    assert np.isnan(one("method", "cosine", method="pca").value)
    assert one("mode", "rotate: effect").value == evidence["modes"][3]["effect"]["value"]
    assert one("specificity", "hedging: share").upper == evidence["specificity"][1]["share"]["upper"]
    assert one("prompt", "fd-007: effect").value == evidence["prompts"][7]["effect"]
    assert one("control", "random: 3: effect").value == evidence["controls"]["kinds"]["random"][3]["effect"]
    assert one("control", "unrelated: sentiment: cosine").value == 0.2
    assert one("generation", "against: shares: unwanted").value == 0.75
    assert one("necessity", "random_drops: 9").value == evidence["necessity"]["random_drops"][9]
    assert one("cost", "layer_tokens").value == 2_000_000
    assert not table.name.str.contains("second").any()


def test_cells_without_a_verdict_have_one_row():
    made = matrix(cell("not applicable", site="gdn.state"), cell("error", said="x"), cell("PASS"))
    table: Any = made.frame()
    assert table[:2][["site", "table", "name", "status"]].to_numpy().tolist() == [
        ["gdn.state", "outcome", "verdict", "not applicable"], ["resid", "outcome", "verdict", "error"],
    ]  # fmt: skip
    assert table[:2][["value", "layer", "dose", "n"]].isna().all().all()


def test_tables_are_the_same_from_disk_and_hold_the_same(tmp_path):
    """With what JSON cannot hold, infinities and NaN, among the numbers."""
    verdict = sample("FAIL")
    verdict.save(tmp_path / "verdict.json")
    made = matrix(cell("FAIL"), cell("PASS", model="other"))
    read = matrix(replace(made.cells[0], verdict=open_verdict(tmp_path)), made.cells[1])
    first, second = made.save(tmp_path / "one"), read.save(tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"numbers.csv", "numbers.parquet"}
    table, text = pd.read_parquet(first[1]), pd.read_csv(first[0], keep_default_na=False, na_values={"value": [""]})
    pd.testing.assert_frame_equal(table, made.frame())
    assert text["value"].tolist() == pytest.approx(table["value"].tolist(), nan_ok=True, abs=0, rel=0)
    assert (
        text[["model", "table", "name", "status"]].to_numpy()
        == table[list(("model", "table", "name", "status"))].to_numpy()
    ).all()
    assert (table.dtypes[["layer", "n", "groups"]] == "Int64").all()
    assert (table.dtypes[["dose", "value", "lower", "upper", "threshold"]] == "float64").all()


@pytest.mark.parametrize(
    ("results", "code"),
    [
        (["PASS", "PASS"], 0), (["PASS", "not applicable"], 0), (["PASS", "INCONCLUSIVE"], 3),
        (["FAIL", "INCONCLUSIVE"], 1), (["error", "FAIL"], 2), (["error", "crash", "FAIL", "PASS"], 70),
        (["not applicable"], 2), (["INCONCLUSIVE", "not applicable"], 3),
    ],
)  # fmt: skip
def test_the_worst_cell_decides_the_exit_code(results, code):
    assert matrix(*(cell(result) for result in results)).exit_code == code


# -- the page ---------------------------------------------------------------------------------------------------------


def calibration(passed: int, n: int) -> Calibration:
    rows = [
        {"truth": "null", "verdict": "PASS" if i < passed else "FAIL", "working": False, "criteria": []}
        for i in range(n)
    ]
    return Calibration(rows=tuple(rows), recipe={})


@pytest.fixture
def four() -> Matrix:
    """Two models, two behaviours and one site: one judged cell of each kind, and one that was not."""
    cells = (
        cell("PASS"), cell("FAIL", behavior="c"), cell("INCONCLUSIVE", model="k"),
        cell("error", model="k", behavior="c", said="c.jsonl line 4: not valid JSON"),
    )  # fmt: skip
    return matrix(*cells)


LINKS = ["cells/m-b-resid/report.html", "cells/m-c-resid/report.html", "cells/k-b-resid/report.html",
         "cells/k-c-resid/error.txt", "numbers.csv", "numbers.parquet"]  # fmt: skip


def test_the_page_stands_alone(four):
    html = render_batch(four)
    assert_stands_alone(html, Page(html), [], links=LINKS)
    assert len(html) < 60_000


def test_links_of_the_page_are_checked(four):
    """A page that loads something, or links elsewhere, is found out."""
    html = render_batch(four)
    for bad in (
        html.replace("cells/k-c-resid/error.txt", "https://example.org/error.txt"),
        html.replace("cells/k-c-resid/error.txt", "../error.txt"),
        html.replace("<main>", '<main><script src="x.js"></script>'),
        html.replace("<main>", "<main><script>1</script>"),
    ):
        links = [str(a["href"]) for tag, a in Page(bad).tags if tag == "a" and not str(a["href"]).startswith("#")]
        with pytest.raises(AssertionError):
            assert_stands_alone(bad, Page(bad), [], links=links)


def test_each_cell_says_what_was_found(four):
    page = Page(render_batch(four))
    assert page.cells[:7] == ["model", "b", "c", "resid", "resid", "m", page.cells[6]]
    effect = sample("PASS").evidence["effect"]
    found = f"PASS{effect['value']:.2f} nats{effect['lower']:.2f} to {effect['upper']:.2f}layer 4, dose 0.5"
    assert page.cells[6] == found
    assert page.cells[7].startswith("FAIL")
    assert page.cells[7].endswith("failed: length: prompts, length: answers, damage: perplexity")
    assert [c.name for c in sample("FAIL").criteria if c.status == "fail"] == [
        "length: prompts", "length: answers", "damage: perplexity",
    ]  # fmt: skip
    left = sum(c.status == "inconclusive" for c in sample("INCONCLUSIVE").criteria) - 3
    assert page.cells[9].endswith(f"open: enough data, decodability, selectivity and {left} more")
    assert page.cells[10] == "errorc.jsonl line 4: not valid JSON"
    assert "1 of 4 PASS" in page.words
    assert "(exit code 2)" in page.words


def test_the_page_counts_what_chance_may_do(four):
    assert "3 cells were judged, each by itself" in chance(four, None)
    assert "no calibration was given" in chance(four, None)
    upper = 1 - 0.05 ** (1 / 200)  # none of 200: solve (1 - p)^200 = 0.05
    said = chance(four, calibration(0, 200))
    assert (
        f"0 of 200 directions that mean nothing passed, so that with 95% confidence at most {100 * upper:.1f}%" in said
    )
    assert f"at most {3 * upper:.3g} false PASSes would be expected among 3 cells" in said
    assert said in re.sub(r"\s+", " ", Page(render_batch(four, calibration(0, 200))).words)


def test_hostile_words_are_shown_and_not_obeyed(four):
    def said(words: str) -> Matrix:
        return replace(four, cells=(*four.cells[:3], replace(four.cells[3], said=words)))

    hostile, harmless = Page(render_batch(said(HOSTILE))), Page(render_batch(said("harmless")))
    assert_shown_and_not_obeyed(hostile, harmless, times=1)


@needs_browser
def test_a_browser_shows_the_page_without_complaint(four, tmp_path):
    assert_browser_draws(write_batch_report(four, tmp_path / "index.html"), tmp_path, [])
