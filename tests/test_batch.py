"""Many verdicts at once: the table of numbers, the page, and a batch that survives what goes wrong in it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pages import HOSTILE, Page, assert_browser_draws, assert_shown_and_not_obeyed, assert_stands_alone, needs_browser
from test_verdicts import complete, sample, verdict_of

from analysis.batch import Cell, Matrix
from analysis.batch_report import chance, render_batch, write_batch_report
from analysis.calibration import Calibration
from dispositions import batch
from dispositions.__main__ import main
from probes.behaviors import SHIPPED, Behavior
from probes.criteria import Verdict, open_verdict
from probes.errors import WrongInput
from probes.gate import GateConfig
from probes.model import HybridModel, load
from probes.store import write_json
from probes.verify import recipe

QUICK = ["--layers", "2", "--prompts", "4", "--search-prompts", "4", "--controls", "1", "--generations", "1",
         "--general-texts", "3", "--max-new-tokens", "8", "--direction", "mean",
         "--doses", "-0.5", "-0.25", "0", "0.25", "0.5"]  # fmt: skip


def cell(result: str, *, model: str = "m", behavior: str = "b", site: str = "resid", said: str = "") -> Cell:
    """A made-up cell; those that were judged have a whole verdict."""
    verdict = sample(result) if result in ("PASS", "FAIL", "INCONCLUSIVE") else None
    name = f"{model}-{behavior}-{site}"
    return Cell(name=name, model=model, behavior=behavior, site=site, result=result, verdict=verdict, said=said)  # type: ignore[arg-type]


def matrix(*cells: Cell) -> Matrix:
    return Matrix(cells=cells, recipe={"config": {"seed": 0, "criteria": {"auroc": 0.75}}})


def run(capsys: Any, *arguments: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_number_of_a_verdict_is_in_the_table():
    """Whatever has a decimal point in the JSON of the evidence is in a column of numbers, and nothing is made up."""
    verdict = sample("PASS")
    table = matrix(cell("PASS")).frame()
    kept = {key: value for key, value in verdict.as_dict().items() if key in ("criteria", "evidence")}
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

    def one(kind: str, name: str, **where: object) -> pd.Series:
        rows = table[(table.table == kind) & (table.name == name)]
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
    table = matrix(cell("not applicable", site="gdn.state"), cell("error", said="x"), cell("PASS")).frame()
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
    return Calibration(rows=tuple(rows), recipe={}, seconds=1.0)


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
    missed = [c.name for c in sample("FAIL").criteria if c.status == "fail"]
    assert page.cells[7].endswith(f"failed: {', '.join(missed[:3])} and {len(missed) - 3} more")
    assert page.cells[9].endswith("open: enough data, decodability, selectivity and 5 more")
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


# -- the command, with a gate that only says what it is told -----------------------------------------------------------


class Gate:
    """Stands in for the gate: what it is to do, by behaviour and site, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.does: dict[tuple[str, str], str | BaseException] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.loaded: list[str] = []
        monkeypatch.setattr("dispositions.cells.verify", self.verify)
        monkeypatch.setattr("dispositions.batch.load", self.load)

    def load(self, source: str, *, device: str, dtype: str) -> HybridModel:
        self.loaded.append(source)
        return load(source, device=device, dtype=dtype)

    def verify(self, model: HybridModel, behavior: Behavior, config: GateConfig) -> Verdict:
        self.asked.append((model.name, behavior.name, config.site))
        does = self.does.get((behavior.name, config.site), "PASS")
        if isinstance(does, BaseException):
            raise does
        return replace(
            sample(does), behavior=behavior.name, model=model.name, site=config.site,
            recipe=recipe(model, behavior, config),
        )  # fmt: skip


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def cells_of(out: Path, name: str) -> dict[str, tuple[int, int]]:
    """Each cell's file of this name by its inode and time: what was not written again."""
    found = {path.parent.name: path.stat() for path in out.glob(f"cells/*/{name}")}
    return {cell: (stat.st_ino, stat.st_mtime_ns) for cell, stat in found.items()}


def test_what_is_wrong_with_one_cell_stays_in_it(gate, tmp_path, capsys):
    broken, out = tmp_path / "broken.jsonl", tmp_path / "many"
    good = (SHIPPED / "sentiment.jsonl").read_text().splitlines()
    broken.write_text("\n".join([*good[:3], "{oops", *good[3:]]))
    gate.does["hedging", "gdn.state"] = ZeroDivisionError("no\nluck")
    asked = ["report", "--models", f"organism,{tmp_path}/nowhere", "--behaviors", f"sentiment,{broken}", "hedging,"
             "kindness,sentiment-en", "--sites", "resid,gdn.state", "--out", str(out)]  # fmt: skip
    code, said, err = run(capsys, *asked)
    assert code == 70
    assert "Traceback" not in err
    assert set(gate.asked) == {("organism", b, s) for b in ("sentiment", "hedging") for s in ("resid", "gdn.state")}
    assert gate.loaded == ["organism", f"{tmp_path}/nowhere"]
    assert set(cells_of(out, "verdict.json")) == {
        "organism-sentiment-resid", "organism-sentiment-gdn.state", "organism-hedging-resid",
    }  # fmt: skip
    errors = {path.parent.name: path.read_text() for path in out.glob("cells/*/error.txt")}
    assert len(errors) == 2 * 5 * 2 - 3
    crash = errors["organism-hedging-gdn.state"]
    assert crash.startswith("crash: ZeroDivisionError: no\n\nTraceback (most recent call last)")
    assert "in verify" in crash
    one_line = {name: text for name, text in errors.items() if "Traceback" not in text}
    assert all(text.count("\n") == 1 and text.startswith("error: ") for text in one_line.values())
    assert len(one_line) == len(errors) - 1
    (there,) = (name for name in errors if re.fullmatch(r"organism-broken-\w{6}-resid", name))
    said_there = "broken.jsonl line 4: not valid JSON: Expecting property name enclosed in double quotes at column 2"
    assert errors[there] == f"error: {said_there}\n"
    assert "unknown behaviour 'kindness'; shipped are" in errors["organism-kindness-gdn.state"]
    assert "of its tokens are unknown to the tokenizer" in errors["organism-sentiment-en-resid"]
    page = Page((out / "index.html").read_text())
    assert f"error{said_there}" in page.cells
    assert "crashZeroDivisionError: no" in page.cells
    assert "3 of 20 PASS" in page.words
    assert "organism, hedging, gdn.state: crash: ZeroDivisionError: no" in said
    table = pd.read_parquet(out / "numbers.parquet")
    outcomes = table[table.table == "outcome"]
    assert len(outcomes) == 20
    assert outcomes.status.value_counts().to_dict() == {"error": 16, "PASS": 3, "crash": 1}
    assert str(tmp_path) not in (out / "numbers.csv").read_text()

    written = cells_of(out, "verdict.json")
    gate.does.clear()
    gate.asked.clear()
    asked[2] = "organism"
    broken.write_text("\n".join(good))
    assert run(capsys, *asked)[0] == 2  # kindness is still unknown
    assert gate.asked == [("organism", "sentiment", s) for s in ("resid", "gdn.state")] + [
        ("organism", "hedging", "gdn.state")
    ]
    assert written.items() <= cells_of(out, "verdict.json").items()
    assert not list(out.glob("cells/organism-broken-*/error.txt"))
    assert not list(out.glob("cells/organism-hedging-*/error.txt"))


def test_a_cell_is_a_run_like_any_other(gate, tmp_path, capsys):
    gate.does["sentiment", "resid"] = "FAIL"
    out = tmp_path / "many"
    assert run(capsys, "report", "--models", "organism", "--behaviors", "sentiment", "--out", out)[0] == 1
    one = out / "cells" / "organism-sentiment-resid"
    page, index = (one / "report.html").read_bytes(), (out / "index.html").read_bytes()
    (one / "report.html").unlink()
    code, said, _ = run(capsys, "report", one)
    assert (code, (one / "report.html").read_bytes()) == (1, page)
    assert "FAIL: " in said
    before = cells_of(out, "verdict.json")
    code, said, _ = run(capsys, "verify", "sentiment", "--out", one)
    assert code == 1
    assert f"{one} holds this result already" in said
    (one / "report.html").unlink()
    gate.loaded.clear()
    assert run(capsys, "report", "--models", "organism", "--behaviors", "sentiment", "--out", out)[0] == 1
    assert (one / "report.html").read_bytes() == page
    assert (out / "index.html").read_bytes() == index
    assert gate.loaded == []
    assert cells_of(out, "verdict.json") == before
    assert len(gate.asked) == 1


def test_models_are_loaded_once_and_only_for_what_is_missing(gate, tmp_path, capsys):
    out = tmp_path / "many"
    both = ["report", "--models", "organism,organism-state", "--out", out, "--behaviors"]
    assert run(capsys, *both, "sentiment")[0] == 0
    assert gate.loaded == ["organism", "organism-state"]
    assert run(capsys, *both, "sentiment,hedging", "--sites", "resid")[0] == 0
    assert gate.loaded == ["organism", "organism-state"] * 2
    assert len(gate.asked) == 4
    (out / "cells" / "organism-state-hedging-resid" / "verdict.json").unlink()
    assert run(capsys, *both, "sentiment,hedging")[0] == 0
    assert gate.loaded[4:] == ["organism-state"]
    assert gate.asked[4:] == [("organism-state", "hedging", "resid")]
    (out / "checked.json").unlink()  # the record saves time, no more
    assert run(capsys, *both, "sentiment,hedging")[0] == 0
    assert gate.loaded[5:] == ["organism", "organism-state"]
    assert len(gate.asked) == 5


def test_weights_that_changed_on_disk_are_noticed(gate, tmp_path, capsys, organism):
    copy, out = tmp_path / "mine", tmp_path / "many"
    organism.hf.save_pretrained(copy)
    organism.tokenizer.save_pretrained(copy)
    asked = ["report", "--models", copy, "--behaviors", "sentiment", "--out", out]
    assert run(capsys, *asked)[0] == 0
    changed = load(copy)
    with torch.no_grad():
        changed.hf.model.norm.weight[0] += 1
    changed.hf.save_pretrained(copy)
    code, said, _ = run(capsys, *asked)
    assert code == 2
    assert "holds another recipe (weights_hash was " in said
    organism.hf.save_pretrained(copy)
    gate.loaded.clear()
    assert run(capsys, *asked)[0] == 0
    assert gate.loaded == [str(copy)]
    assert len(gate.asked) == 1
    assert not list(out.glob("cells/*/error.txt"))


def test_models_of_one_name_are_told_apart(gate, tmp_path, capsys, organism):
    for folder in ("a", "b"):
        organism.hf.save_pretrained(tmp_path / folder / "model")
        organism.tokenizer.save_pretrained(tmp_path / folder / "model")
    models, out = f"{tmp_path}/a/model,{tmp_path}/b/model", tmp_path / "many"
    assert run(capsys, "report", "--models", models, "--behaviors", "sentiment", "--out", out)[0] == 0
    names = pd.read_csv(out / "numbers.csv").model.unique()
    assert len(names) == 2
    assert all(re.fullmatch(r"model-\w{6}", name) for name in names)
    assert len(cells_of(out, "verdict.json")) == 2


def test_a_site_that_a_model_lacks_is_not_applicable(gate, tmp_path, capsys, llama):
    llama.hf.save_pretrained(tmp_path / "llama")
    llama.tokenizer.save_pretrained(tmp_path / "llama")
    out = tmp_path / "many"
    asked = ["report", "--behaviors", "sentiment", "--sites", "gdn.state", "--out", out, "--models"]
    code, said, _ = run(capsys, *asked, tmp_path / "llama")
    assert code == 2  # nothing was judged
    assert "llama, sentiment, gdn.state: not applicable: llama has no gdn layers" in said
    assert not (out / "cells").exists()
    code, said, _ = run(capsys, *asked, f"organism,{tmp_path / 'llama'}")
    assert code == 0
    assert gate.loaded == [str(tmp_path / "llama"), "organism"]
    page = Page((out / "index.html").read_text())
    assert "not applicablellama has no gdn layers" in page.cells
    assert "1 of 1 PASS" in page.words


def test_an_interrupted_batch_keeps_what_is_finished(gate, tmp_path, capsys):
    out = tmp_path / "many"
    asked = ["report", "--models", "organism", "--behaviors", "sentiment,hedging", "--out", out]
    gate.does["hedging", "resid"] = KeyboardInterrupt()
    code, _, err = run(capsys, *asked)
    assert code == 130
    assert "run the same command to resume" in err
    assert not list(out.glob("cells/*/error.txt"))
    before = cells_of(out, "verdict.json")
    assert set(before) == {"organism-sentiment-resid"}
    gate.does.clear()
    assert run(capsys, *asked)[0] == 0
    assert before.items() <= cells_of(out, "verdict.json").items()
    assert [behavior for _, behavior, _ in gate.asked] == ["sentiment", "hedging", "hedging"]


def test_other_options_in_the_same_folder_are_refused_before_anything_runs(gate, tmp_path, capsys):
    out = tmp_path / "many"
    asked = ["report", "--models", "organism", "--behaviors", "sentiment", "--out", out]
    assert run(capsys, *asked)[0] == 0
    before = (out / "index.html").read_bytes()
    code, _, err = run(capsys, *asked, "--seed", "1")
    assert code == 2
    assert f"'{out}' holds cells of another recipe (config.seed was 0 and is now 1); choose another --out" in err
    assert (out / "index.html").read_bytes() == before
    code, _, err = run(capsys, "report", out)
    assert code == 2
    assert "holds many runs; name one of its cells" in err
    code, _, err = run(capsys, *asked[:-1], out / "cells" / "organism-sentiment-resid")
    assert code == 2
    assert "holds a run of another kind" in err


def test_a_calibration_is_taken_where_it_is_given(gate, tmp_path, capsys):
    calibration(1, 50).save(tmp_path / "calibration.json")
    asked = ["report", "--models", "organism", "--behaviors", "sentiment", "--out", tmp_path / "many"]
    assert run(capsys, *asked, "--calibration", tmp_path / "calibration.json")[0] == 0
    assert "1 of 50 directions that mean nothing passed" in (tmp_path / "many" / "index.html").read_text()
    write_json(tmp_path / "calibration.json", {"rows": []})
    code, _, err = run(capsys, *asked, "--calibration", tmp_path / "calibration.json")
    assert code == 2
    assert "is not a calibration" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "report needs a RUN, or --models, --behaviors and --out; saw neither"),
        (["{}", "--models", "m"], "takes a RUN alone, or --models and what goes with it; saw '{}' and --models"),
        (["{}", "--seed", "3"], "saw '{}' and --seed"),
        (["{}", "--control-percentile", "90"], "saw '{}' and --control-percentile"),
        (["{}", "--out", "{}/x"], "saw '{}' and --out"),
        (["--models", "organism", "--behaviors", "sentiment"], "many at once need --out"),
        (["--models", "organism", "--out", "{}/x"], "need --behaviors, names with commas between them; saw none"),
        (["--behaviors", "sentiment", "--models", ",", "--out", "{}/x"], "many at once need --models"),
        (["--behaviors", "a", "--models", "b", "--out", "{}/x", "--sites", "mlp"], "'mlp' cannot be steered; allowed"),
        (["--behaviors", "a", "--models", "b", "--out", "{}/x", "--heads", "1"], "heads were chosen, but the residual"),
        (
            ["--behaviors", "a", "--models", "b", "--out", "{}/x", "--site", "gdn.state", "--sites", "resid"],
            "sites are named by --sites or by --site, saw both: --site gdn.state",
        ),
        (["--behaviors", "a", "--models", "b", "--out", "{}/plain.txt"], "is a file; --out must be a folder"),
        (["--behaviors", "a", "--models", "b", "--out", "{}"], "holds index.html but no recipe.json"),
        (["--behaviors", "a", "--models", "b", "--out", ""], "--out must name a folder of its own"),
    ],
)  # fmt: skip
def test_mixtures_are_refused_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "plain.txt").write_text("mine")
    (tmp_path / "index.html").write_text("mine")
    code, _, err = run(capsys, "report", *(a.replace("{}", str(tmp_path)) for a in arguments))
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert message.replace("{}", str(tmp_path)) in err
    assert {path.name for path in tmp_path.iterdir()} == {"plain.txt", "index.html"}


def test_help_tells_both_forms_and_the_exit_codes(capsys):
    code, out, _ = run(capsys, "report", "--help")
    said = re.sub(r"[\s│]+", " ", out)
    assert code == 0
    for words in (
        "dispositions report RUN writes report.html again", "--models", "--behaviors", "--sites", "--out", "--seed",
        "70 a cell crashed, 2 a cell could not be judged (wrong input) or none was, 1 at least one FAIL, 3 something "
        "INCONCLUSIVE, 0 all PASS",
    ):  # fmt: skip
        assert words in said


def test_the_parts_of_a_batch_refuse_what_they_cannot_read(tmp_path):
    (tmp_path / "recipe.json").write_text("[")
    with pytest.raises(WrongInput, match="is not JSON"):
        batch._take(tmp_path, {"kind": "report"})


# -- the real thing ---------------------------------------------------------------------------------------------------


def small_behavior(path: Path) -> Path:
    """Some items of a shipped behaviour, in a language of its own, so that no other behaviour has to be measured."""
    lines = (SHIPPED / "sentiment.jsonl").read_text().splitlines()
    card = {"card": {**json.loads(lines[0])["card"], "name": "small", "language": "small"}}
    card["card"].pop("ood", None)
    path.write_text("\n".join([json.dumps(card), *lines[1::6]]))
    return path


def test_a_killed_batch_goes_on_and_ends_with_the_same_bytes(tmp_path, capsys):
    """SIGKILL while the second cell runs; then the same command. Beside it a batch that was never disturbed."""
    asked = ["report", "--models", "organism,organism-state", "--behaviors", str(small_behavior(tmp_path / "s.jsonl")),
             "--sites", "resid,gdn.state", *QUICK, "--out"]  # fmt: skip
    out, log = tmp_path / "killed", tmp_path / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "dispositions", *asked, str(out)], stdout=sink, stderr=sink,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until and not cells_of(out, "report.html"):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, log.read_text()
    before = cells_of(out, "verdict.json")
    assert 0 < len(before) < 4
    assert not (out / "index.html").exists()

    assert run(capsys, *asked, out)[0] == 3
    after = cells_of(out, "verdict.json")
    assert len(after) == 4
    assert before.items() <= after.items()
    assert run(capsys, *asked, tmp_path / "whole")[0] == 3
    for name in ("numbers.csv", "numbers.parquet", "index.html"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    table = pd.read_parquet(out / "numbers.parquet")
    assert table.groupby(["model", "site"]).ngroups == 4
    assert (table[table.table == "outcome"].status == "INCONCLUSIVE").all()


def test_samples_of_this_file_are_verdicts():
    assert verdict_of(complete()).verdict == sample("PASS").verdict == "PASS"
