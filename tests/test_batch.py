"""Many verdicts at once: a batch that survives what goes wrong in it. Its table and page: test_batch_page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pages import Page
from test_batch_page import calibration
from test_verdicts import sample

from dispositions import batch
from dispositions.__main__ import main
from dispositions.cells import known_recipe
from probes.behaviors import SHIPPED, Behavior
from probes.criteria import Verdict
from probes.damage import DATA
from probes.errors import WrongInput
from probes.gate import GateConfig
from probes.model import ORGANISMS, HybridModel, load
from probes.store import write_json

QUICK = ["--layers", "2", "--prompts", "4", "--search-prompts", "4", "--controls", "1", "--generations", "1",
         "--general-texts", "3", "--max-new-tokens", "8", "--direction", "mean",
         "--doses", "-0.5", "-0.25", "0", "0.25", "0.5"]  # fmt: skip


def run(capsys: Any, *arguments: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


# -- the command, with a gate that only says what it is told -----------------------------------------------------------


class Gate:
    """Stands in for the gate: what it is to do, by behaviour and site, and what it was asked.

    A recipe is the part of the real one that a behaviour's own file and the model decide, and a page is short.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.does: dict[tuple[str, str], str | BaseException] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.loaded: list[str] = []
        monkeypatch.setattr("dispositions.cells.verify", self.verify)
        monkeypatch.setattr("dispositions.cells.recipe", self.recipe)
        monkeypatch.setattr("dispositions.cells.unrelated_behaviors", lambda model, behavior: [])
        monkeypatch.setattr("dispositions.batch.load", self.load)
        for module in ("cells", "batch", "commands"):
            monkeypatch.setattr(f"dispositions.{module}.write_report", self.write_report)

    def load(self, source: str, *, device: str, dtype: str) -> HybridModel:
        self.loaded.append(source)
        return shipped(source) if source in ORGANISMS else load(source, device=device, dtype=dtype)

    def verify(
        self, model: HybridModel, behavior: Behavior, config: GateConfig, *, others: Sequence[Behavior]
    ) -> Verdict:
        self.asked.append((model.name, behavior.name, config.site))
        does = self.does.get((behavior.name, config.site), "PASS")
        if isinstance(does, BaseException):
            raise does
        return replace(
            sample(does), behavior=behavior.name, model=model.name, site=config.site,
            recipe=self.recipe(model, behavior, config, others=others),
        )  # fmt: skip

    def recipe(
        self, model: HybridModel, behavior: Behavior, config: GateConfig, *, others: Sequence[Behavior]
    ) -> dict[str, Any]:
        known = known_recipe(model.name, behavior, config)
        return {**{key: value for key, value in known.items() if key != "kind"}, **model.identity}

    def write_report(self, verdict: Verdict, path: Path) -> Path:
        path.write_text(str(verdict))
        return path


@cache
def shipped(name: str) -> HybridModel:
    return load(name)


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


def test_a_model_whose_name_no_file_can_have_fails_its_own_cells(gate, tmp_path, capsys):
    out = tmp_path / "many"
    code, said, _ = run(capsys, "report", "--models", f"{300 * 'a'},organism", "--behaviors", "sentiment", "--out", out)
    assert code == 2
    assert "sentiment, resid: error: File name too long: " in said
    assert "organism, sentiment, resid: PASS at layer 4" in said
    assert max(len(path.name) for path in out.glob("cells/*")) < 90


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
    """Some items of a shipped behaviour, in what is said to be another language."""
    lines = (SHIPPED / "sentiment.jsonl").read_text().splitlines()
    card = {"card": {**json.loads(lines[0])["card"], "name": "small", "language": "small"}}
    card["card"].pop("ood", None)
    path.write_text("\n".join([json.dumps(card), *lines[1::6]]))
    return path


def test_a_killed_batch_goes_on_and_ends_with_the_same_bytes(tmp_path, capsys):
    """SIGKILL while the second cell runs; then the same command. Beside it a batch that was never disturbed."""
    general = tmp_path / "general.jsonl"
    general.write_text("\n".join((DATA / "general-organism.jsonl").read_text().splitlines()[:9]))
    asked = ["report", "--models", "organism,organism-state", "--behaviors", str(small_behavior(tmp_path / "s.jsonl")),
             *QUICK, "--general", str(general), "--out"]  # fmt: skip
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
    assert len(before) == 1
    assert not (out / "index.html").exists()

    assert run(capsys, *asked, out)[0] == 3
    after = cells_of(out, "verdict.json")
    assert len(after) == 2
    assert before.items() <= after.items()
    assert run(capsys, *asked, tmp_path / "whole")[0] == 3
    for name in ("numbers.csv", "numbers.parquet", "index.html"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    table = pd.read_parquet(out / "numbers.parquet")
    assert set(table.model) == {"organism", "organism-state"}
    assert (table[table.table == "outcome"].status == "INCONCLUSIVE").all()
