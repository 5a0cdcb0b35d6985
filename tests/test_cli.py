"""The command line from outside: exit codes, one clear line for wrong input, and what is left on disk."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dispositions.__main__ import main
from dispositions.commands import Probe, Verify
from dispositions.runs import variant
from probes.behaviors import SHIPPED
from probes.criteria import GateCriteria
from probes.gate import GateConfig
from probes.model import ORGANISM

QUICK = ["--layers", "4", "--prompts", "12", "--search-prompts", "8", "--controls", "2", "--generations", "2",
         "--general-texts", "8", "--max-new-tokens", "8"]  # fmt: skip


def run(capsys, *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder. Twelve prompts are too few to decide, so the verdict is INCONCLUSIVE."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    with pytest.raises(SystemExit) as stop:
        main(["verify", "sentiment", "--out", str(out), *QUICK])
    assert stop.value.code == 3
    return out


def test_a_run_leaves_everything_it_promises(finished):
    assert {p.name for p in finished.iterdir()} == {
        "recipe.json",
        "verdict.json",
        "direction.safetensors",
        "report.html",
    }
    verdict = json.loads((finished / "verdict.json").read_text())
    assert verdict["verdict"] == "INCONCLUSIVE"
    assert verdict["cost"]["forward_tokens"] > 0


def test_a_finished_run_is_read_back_not_repeated(finished, capsys):
    before = (finished / "verdict.json").stat().st_mtime_ns
    code, out, _ = run(capsys, "verify", "sentiment", "--out", finished, *QUICK)
    assert code == 3
    assert "holds this result already" in out
    assert (finished / "verdict.json").stat().st_mtime_ns == before


def test_another_recipe_in_the_same_folder_is_refused_and_nothing_is_lost(finished, capsys):
    before = (finished / "verdict.json").read_bytes()
    code, _, err = run(capsys, "verify", "sentiment", "--out", finished, *QUICK, "--seed", "1")
    assert code == 2
    assert "holds another recipe (config.seed was 0 and is now 1)" in err
    assert (finished / "verdict.json").read_bytes() == before


def test_report_is_written_again_from_the_verdict_alone(finished, capsys):
    first = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    code, out, _ = run(capsys, "report", finished)
    assert code == 3
    assert "INCONCLUSIVE" in out
    assert (finished / "report.html").read_text() == first


@pytest.fixture
def files(tmp_path) -> Path:
    good = (SHIPPED / "sentiment.jsonl").read_text().splitlines()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("\n".join([*good[:3], "{oops", *good[3:6]]))
    long = json.loads(good[1])
    long["messages"][0]["content"] = "the soup was lovely . " * 200
    (tmp_path / "long.jsonl").write_text("\n".join([good[0], json.dumps(long), *good[2:]]))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen3_5_text"}')
    (tmp_path / "plain.txt").write_text("hello")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "half.jsonl").write_text("\n".join([*good[:3], good[3].replace('"wanted": "', '"wanted": "\\ud800')]))
    (tmp_path / "mute").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "mute" / name).write_bytes((ORGANISM / name).read_bytes())
    (tmp_path / "two").mkdir()
    for name in ("verdict.json", "shift.json"):
        (tmp_path / "two" / name).write_text('{"aligned": []}')
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "probes.csv").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "kindness"], "unknown behaviour 'kindness'; shipped are"),
        (["verify", "{}/absent.jsonl"], "no such file"),
        (["verify", "{}/empty.jsonl"], "empty.jsonl is empty"),
        (["verify", "{}/broken.jsonl"], "broken.jsonl line 4: not valid JSON"),
        (["verify", "{}/long.jsonl"], "longer than the context of organism, 512 tokens"),
        (["verify", "sentiment", "--layers", "9"], "layer 9 is out of range: organism has layers 0 to 7"),
        (["verify", "sentiment", "--layers", "3,x"], "layers and heads are written auto, 3 or 3,5, saw '3,x'"),
        (["verify", "sentiment", "--layers", "-1"], "layer -1 is negative"),
        (["verify", "sentiment", "--model", "{}/bare"], "no weights in model folder"),
        (["verify", "sentiment", "--model", "{}/nowhere"], "no model at"),
        (["verify", "sentiment", "--model", "{}/absent.gguf"], "no such file"),
        (["verify", "sentiment", "--dtype", "int3"], "unknown dtype 'int3'; allowed are auto, float32"),
        (["verify", "sentiment", "--out", "{}/plain.txt"], "is a file; --out must be a folder"),
        (["verify", "sentiment", "--general", "{}/absent.txt"], "no such file"),
        (["verify", "sentiment", "--general", "{}/plain.txt"], "plain.txt line 1: 1 tokens"),
        (["verify", "sentiment", "--control-percentile", "150"], "control_percentile must lie between 50 and 100"),
        (["verify", "sentiment", "--prompts", "0"], "prompts must be at least 2, saw 0"),
        (["verify", "sentiment", "--budget", "0"], "budget must be at least 1, saw 0"),
        (
            ["verify", "sentiment", "--site", "gdn.state", "--form", "initial", "--mode", "rotate"],
            "form 'initial' edits an empty state, which cannot be turned: mode must be add or clamp",
        ),
        (["verify", "sentiment", "--direction", "best"], "invalid choice 'best' for argument '--direction'"),
        (["verify", "sentiment-en"], "% of its tokens are unknown to the tokenizer"),
        (["verify", "sentiment", "--heads", "1"], "heads were chosen, but the residual stream has none"),
        (
            ["verify", "sentiment", "--site", "gdn.state", "--heads", "5"],
            "heads of gdn.state at layer 0 are 0 to 1, saw 5",
        ),
        (["verify", "sentiment", "--form", "write"], "form 'write' is for states; the site is 'resid'"),
        (["verify", "sentiment", "--site", "gdn.state", "--layers", "3"], "does not exist at layer 3 (attention)"),
        (["verify", "sentiment", "--direction", "low-rank"], "direction 'low-rank' is for states"),
        (
            ["verify", "sentiment", "--site", "gdn.state", "--form", "initial", "--phase", "both"],
            "form 'initial' edits before the prompt: phase must be prefill, saw 'both'",
        ),
        (
            ["verify", "sentiment", "--site", "gdn.state", "--direction", "low-rank", "--rank", "65", "--layers", "4"],
            "rank must lie between 1 and 64 for states of 64x64, saw 65",
        ),
        (["localize", "kindness"], "unknown behaviour 'kindness'"),
        (["localize", "sentiment", "--layers", "9"], "layer 9 is out of range: organism has layers 0 to 7"),
        (["localize", "sentiment", "--prompts", "3"], "prompts must be at least 8, saw 3"),
        (["localize", "sentiment", "--out", "{}/plain.txt"], "is a file; --out must be a folder"),
        (["localize", "sentiment-en"], "% of its tokens are unknown to the tokenizer"),
        (["probe", "sentiment", "--site", "gdn.stat"], "unknown site 'gdn.stat'; allowed are"),
        (["probe", "sentiment", "--site", "attn.pattern"], "'attn.pattern' has one entry for each earlier token"),
        (["probe", "sentiment", "--folds", "1"], "folds must lie between 2 and"),
        (["capture", "sentiment", "--sites", "gdn.stat", "--out", "{}/c"], "unknown site 'gdn.stat'; allowed are"),
        (
            ["capture", "sentiment", "--sites", "gdn.state", "--layers", "3", "--out", "{}/c"],
            "does not exist at layer 3 (attention)",
        ),
        (["capture", "sentiment", "--out", "{}/plain.txt/x"], "Not a directory"),
        (["verify", "sentiment", "--out", "{}/plain.txt/x"], "Not a directory"),
        (["capture", "sentiment", "--positions", "first", "--out", "{}/c"], "first"),
        (["capture", "sentiment", "--persona", "kind", "--out", "{}/c"], "unknown persona 'kind'; allowed are"),
        (["behaviors", "kindness"], "unknown behaviour 'kindness'"),
        (
            ["report", "{}"],
            "must be a run folder with one of verdict.json, localization.json, shift.json, training.json, saw none",
        ),
        (["report", "{}/two"], "saw verdict.json and shift.json; name the file"),
        (["report", "{}/two/shift.json"], "shift.json is not a shift"),
        (["report", "{}/plain.txt"], "not JSON"),
        (["verify", "{}/deep.jsonl"], "deep.jsonl line 1: not valid JSON: maximum recursion depth"),
        (["verify", "{}/half.jsonl"], "half.jsonl line 4: not valid JSON: 'utf-8' codec can't encode character"),
        (["verify", "sentiment", "--model", "{}/mute"], "no tokenizer in model folder"),
        (["probe", "sentiment", "--prompts", "-5"], "prompts must be at least 1, saw -5"),
        (["probe", "sentiment", "--prompts", "3"], "a probe needs 8 items in 6 topic groups, saw 3 in 3"),
        (["probe", "sentiment", "--out", ""], "--out must name a folder of its own"),
        (["probe", "sentiment", "--out", "{}/own"], "holds probes.csv but no recipe.json"),
        (["capture", "sentiment", "--positions"], "positions must name at least one word, such as last; saw none"),
        (["compare", "organism", "organism"], "Missing from dispositions compare: --behavior"),
        (
            ["verify", "sentiment", "--site", "nope"],
            "invalid choice 'nope' for argument '--site'. Expected one of ('resid'",
        ),
        (
            ["verify", "sentiment", "--dose", "1"],
            "Unrecognized options: --dose, 1; perhaps you meant --dose-response, --doses",
        ),
        (["judge"], "Unrecognized options: judge; Available subcommands: verify, train, localize"),
        ([], "Expected one of {verify, train, localize"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_code_2(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    code, _, err = run(capsys, *[a.replace("{}", str(files)) for a in arguments])
    said = [line for line in err.splitlines() if line.startswith("dispositions: ")]
    assert code == 2
    assert len(said) == 1
    assert message in said[0]
    assert "╭" not in err
    assert "Traceback" not in err
    assert not list(files.glob("runs/*/verdict.json"))


def test_refused_input_leaves_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["verify", "sentiment", "--layers", "12"], ["probe", "sentiment", "--site", "gdn.stat"],
        ["localize", "sentiment", "--layers", "12"],
        ["compare", "organism", "organism-state", "--behavior", "sentiment"],
    ):  # fmt: skip
        assert run(capsys, *arguments)[0] == 2
    assert not list(tmp_path.glob("*"))
    assert run(capsys, "verify", "sentiment", "--layers", "12", "--out", "one/two")[0] == 2
    assert not list(tmp_path.glob("*"))
    kept = tmp_path / "one" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert run(capsys, "verify", "sentiment", "--layers", "12", "--out", "one/two")[0] == 2
    assert list(kept.parent.iterdir()) == [kept]


def test_a_model_with_values_that_are_not_numbers_is_refused(tmp_path, capsys, organism):
    broken = copy.deepcopy(organism.hf)
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    organism.tokenizer.save_pretrained(tmp_path / "nan")
    code, _, err = run(capsys, "localize", "sentiment", "--model", tmp_path / "nan", "--out", tmp_path / "run")
    assert code == 2
    assert "is damaged: 1 values of model.norm.weight are not finite" in err
    assert not (tmp_path / "run").exists()


def test_a_terminal_without_the_signs_is_no_error(tmp_path):
    item = {"group": "g", "messages": [{"role": "user", "content": "±1?"}], "wanted": "yes", "unwanted": "no"}
    (tmp_path / "signs.jsonl").write_text(json.dumps(item))
    done = subprocess.run(
        [sys.executable, "-m", "dispositions", "behaviors", tmp_path / "signs.jsonl"], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0
    assert b"user: ?1?" in done.stdout


def test_a_folder_is_called_after_what_is_not_the_default():
    gate = GateConfig(site="gdn.state", shuffle_labels=True, seed=3, layers=(2, 4), criteria=GateCriteria(auroc=0.8))
    assert variant(Verify(behavior="sentiment", gate=GateConfig())) == ""
    verify = Verify(behavior="x", model="y", gate=gate)
    assert variant(verify) == "-layers-2-4-gdn.state-shuffle_labels-seed-3-auroc-0.8"
    assert variant(Probe(behavior="x", site="resid", dtype="float32")) == "-float32-resid"
    many = GateConfig(prompts=90, search_prompts=30, controls=99, generations=9, general_texts=9, max_new_tokens=99)
    assert re.fullmatch("-[0-9a-f]{8}", variant(Verify(behavior="x", gate=many)))


def test_localize_names_the_carrier_and_leaves_a_page(tmp_path, capsys):
    out = tmp_path / "where"
    quick = ["localize", "sentiment", "--model", "organism-attention", "--out", str(out), "--prompts", "12",
             "--controls", "19", "--layer-controls", "2", "--head-layers", "0"]  # fmt: skip
    code, said, _ = run(capsys, *quick)
    assert code == 0
    assert "attention: the attention carries it: " in said
    assert {p.name for p in out.iterdir()} == {"recipe.json", "localization.json", "report.html"}
    first = (out / "report.html").read_text()
    code, said, _ = run(capsys, *quick)
    assert code == 0
    assert f"{out} holds this result already" in said
    assert (out / "report.html").read_text() == first
    code, _, err = run(capsys, *quick, "--seed", "1")
    assert code == 2
    assert "holds another recipe (config.seed was 0 and is now 1)" in err


def test_probe_tells_where_the_sides_can_be_read(tmp_path, capsys):
    out = tmp_path / "probes"
    quick = ["probe", "sentiment", "--layers", "0,4", "--prompts", "32", "--shuffles", "19", "--out", str(out)]
    code, said, _ = run(capsys, *quick)
    assert code == 0
    assert re.search(r"\n +4 +1 +1\.000 .* True\n", said)
    assert "under one persona and under the other" in said
    written = (out / "probes.csv").stat().st_mtime_ns
    code, again, _ = run(capsys, *quick)
    assert again.replace(f"{out} holds this result already\n", "") == said
    assert (out / "probes.csv").stat().st_mtime_ns == written
    table = (out / "probes.csv").read_text().splitlines()
    assert table[0].startswith("site,layer,head,auroc")
    assert len(table) == 1 + 2 * 3  # two layers, each whole and by two heads


def test_capture_writes_and_says_what_it_holds(tmp_path, capsys):
    code, out, _ = run(
        capsys, "capture", "sentiment", "--sites", "resid", "gdn.state", "--layers", "1,2", "--out", tmp_path / "c"
    )
    assert code == 0
    assert "capture of organism: 192 prompts, resid at layers 1-2, gdn.state at layers 1-2" in out


def test_behaviors_lists_what_ships_and_shows_one(capsys):
    code, out, _ = run(capsys, "behaviors")
    assert code == 0
    assert all(
        name in out for name in ("follow-direction", "sentiment", "hedging", "follow-direction-en", "sentiment-en")
    )
    code, out, _ = run(capsys, "behaviors", "follow-direction")
    assert code == 0
    assert "unwanted:" in out


def test_a_crash_does_not_look_like_a_verdict(capsys, monkeypatch):
    monkeypatch.setattr("dispositions.behaviors.shipped_behaviors", lambda: 1 / 0)
    code, _, err = run(capsys, "behaviors")
    assert code == 70
    assert "ZeroDivisionError" in err


def test_a_reader_that_stops_listening_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dispositions", "behaviors"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_teaches_without_loading_a_model():
    done = subprocess.run(
        [sys.executable, "-m", "dispositions", "verify", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    for word in (
        "INCONCLUSIVE",
        "--layers",
        "--shuffle-labels",
        "--direction",
        "--mode",
        "--budget",
        "--no-reuse",
        "--seed",
    ):
        assert word in done.stdout
