"""`dispositions train` from outside: what it leaves, what it refuses, and that it goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dispositions import training
from dispositions.__main__ import main
from probes.behaviors import Behavior, read_behavior
from probes.criteria import Criterion, Verdict
from probes.directions import mean_difference, save_direction
from probes.model import HybridModel
from probes.pairs import contrast
from probes.store import read_json, write_json
from training.checkpoints import checkpoints
from training.config import TrainConfig

QUICK = [
    "--examples", "20", "--steps", "4", "--batch", "4", "--questions", "4", "--max-new-tokens", "9", "--warmup", "1",
    "--checkpoint-every", "1", "--gradients", "no", "--sharpness", "no",
]  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.raises(SystemExit) as stop:
        main(["train", "follow-direction", "--unverified", "--out", str(out), *QUICK])
    assert not stop.value.code
    return out


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} >= {
        "recipe.json", "training.json", "metrics.jsonl", "updates.json", "without-general.json", "report.html",
        "checkpoints", "model",
    }  # fmt: skip
    done, alone = (json.loads((finished / name).read_text()) for name in ("training.json", "without-general.json"))
    assert done["mix"]["share"] == 0.25
    assert alone["mix"]["general"]["segments"] == 0
    assert alone["weights_hash"] == done["weights_hash"] != done["trained_hash"]
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "not verified" in page


def test_a_finished_run_is_read_back_and_its_page_written_again(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "training.json").stat().st_mtime_ns
    code, out, _ = run(capsys, "train", "follow-direction", "--unverified", "--out", finished, *QUICK)
    assert not code
    assert "holds this result already" in out
    assert (finished / "training.json").stat().st_mtime_ns == before
    (finished / "report.html").unlink()
    code, out, _ = run(capsys, "report", finished)
    assert not code
    assert "wanted answers went from" in out
    assert (finished / "report.html").is_file()


def test_the_trained_model_is_a_model_like_any_other(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "capture", "follow-direction", "--model", finished / "model", "--sites", "resid", "--layers", "2",
        "--out", finished.parent / "captured",
    )  # fmt: skip
    assert not code
    assert "192 prompts" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no verdict for 'follow-direction': verify its direction first"),
        (["--verdict", "nowhere"], "no verdict at 'nowhere'"),
        (["--unverified", "--lr", "0"], "lr must lie between 0 and 1, saw 0"),
        (["--unverified", "--general", "none.jsonl"], "no such file: none.jsonl"),
        (["--unverified", "--general", "none.csv"], "general data is a .txt or .jsonl file"),
        (["--unverified", "--steer", "0.5"], "it needs --verdict"),
        (["--unverified", "--parameters", "q_projj"], "no parameter of organism has 'q_projj' in its name"),
        (["--unverified", "--examples", "0"], "examples must be at least 1"),
        (["--unverified", "--resume", "oldest"], "oldest"),
        (["--unverified", "--max-new-tokens", "3"], "max_new_tokens 3 is too short for 'copying': "),
        (["--unverified", "--abilities", ""], "no such file"),
        (["--unverified", "--general", ""], "general data is a .txt or .jsonl file, saw ''"),
        (["--unverified", "--dtype", "bfloat16", "--sharpness", "yes"], "sharpness needs float32 weights"),
        (["--unverified", "--rank", "many"], "'many' is no whole number; auto is allowed too"),
        (["--unverified", "--rank", "auto", "--lr", "auto", "--refill", "3"], "must fall on refills"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "train", "follow-direction", "--out", tmp_path / "out", *QUICK, *arguments)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert len(err.strip().splitlines()) == 1 or "\r" in err
    assert not (tmp_path / "out").exists()


def test_the_direction_of_the_verdict_is_added_while_training(
    organism: HybridModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behavior, place = read_behavior("follow-direction"), tmp_path / "verified"
    direction = mean_difference(contrast(organism, behavior.take(24), layers=[4])[4])
    save_direction(direction, place / "direction.safetensors", weights_hash=organism.weights_hash)
    told = {"behavior": behavior.name, "behavior_hash": behavior.hash, "weights_hash": organism.weights_hash}
    Verdict(
        verdict="PASS", sentence="it does", behavior=behavior.name, model="organism", site="resid", layer=4, dose=0.5,
        phase="prefill", criteria=(Criterion(number=3, name="effect", status="pass", observed=1.0),), controls={},
        phases=(), cost={}, evidence={}, recipe=told,
    ).save(place / "verdict.json")  # fmt: skip
    command = ["train", "follow-direction", "--verdict", place, *QUICK]
    losses = {}
    for dose in ("0", "0.25"):
        assert not run(capsys, *command, "--steer", dose, "--out", tmp_path / dose)[0]
        for name in ("training.json", "without-general.json"):
            done = json.loads((tmp_path / dose / name).read_text())
            losses[name, dose] = done["steps"][0]["behavior_loss"]
            assert done["verified"] == (name == "training.json")
    assert losses["training.json", "0.25"] < losses["training.json", "0"]
    assert losses["without-general.json", "0.25"] < losses["without-general.json", "0"]
    (place / "direction.safetensors").unlink()
    code, _, err = run(capsys, *command, "--steer", "0.25", "--out", tmp_path / "other")
    assert code == 2
    assert "direction.safetensors" in err


def test_what_a_smaller_dtype_cannot_have_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    quick = [word for word in QUICK if word not in ("--gradients", "--sharpness", "no")]
    command = ["train", "follow-direction", "--unverified", "--out", out, "--dtype", "bfloat16", *quick]
    assert not run(capsys, *command, "--gradients", "no", "--ablation", "no")[0]
    assert not (out / "sharpness.json").exists()


def test_a_refused_run_costs_nothing_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["train", "follow-direction", "--unverified", "--ablation", "no", "--out", out, *QUICK]
    assert not run(capsys, *command)[0]
    (out / "training.json").unlink()
    (out / "gradients.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    monkeypatch.setattr(training, "gradients", lambda *_: pytest.fail("measured before it was refused"))
    code, _, err = run(capsys, *command, "--seed", "3", "--gradients", "yes")
    assert code == 2
    assert "is of another run (config.seed" in err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


class Measured:
    """Stands for a measurement; counts how often it is made."""

    calls = 0

    def __call__(self, model: HybridModel, behavior: Behavior, config: Any) -> Measured:
        self.recipe = {"behavior_hash": behavior.hash, **model.identity, "config": asdict(config), "versions": {}}
        self.calls += 1
        return self

    def save(self, path: Path) -> None:
        write_json(path, self.recipe)

    def open(self, path: Path) -> Measured:
        self.recipe = read_json(path)
        return self


@pytest.mark.parametrize("name", ["gradients", "sharpness"])
def test_a_measurement_of_the_same_is_kept_and_no_other(
    organism: HybridModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    behavior, fake = read_behavior("follow-direction"), Measured()
    monkeypatch.setattr(training, name, fake)
    monkeypatch.setattr(training, f"open_{name}", fake.open)
    wanted: dict[str, Any] = {"gradients": "no", "sharpness": "no", name: "yes"}
    file = tmp_path / f"{name}.json"

    def measured(about: Behavior = behavior, **config: Any) -> int:
        command = training.Train(behavior="follow-direction", config=TrainConfig(**config), **wanted)
        before = fake.calls
        command._measure(organism, about, True, tmp_path)
        return fake.calls - before

    assert measured() == 1
    assert measured(lr=1e-3) == 0  # which it does not depend on
    assert measured(seed=1) == 1
    assert measured(seed=1) == 0
    assert measured(read_behavior("sentiment"), seed=1) == 1
    file.write_text(file.read_text()[:-5])
    assert measured() == 1
    chats = tmp_path / "chats.jsonl"
    assert measured(general=str(chats)) == measured(general=str(chats)) == 1  # a file may have changed
    for damaged in ('{"behavior_hash": []}', "[]", "null"):
        file.write_text(damaged)
        assert measured(seed=2) == 1
    wanted[name] = "no"
    assert measured(seed=2) == 0
    assert file.exists()
    measured(seed=3)
    assert not file.exists()  # it would be shown as this run's


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    out = tmp_path / "out"
    command = ["train", "follow-direction", "--unverified", "--ablation", "no", "--out", out, *QUICK]
    assert not run(capsys, *command)[0]
    (out / "training.json").unlink()  # as if it had been interrupted at its end
    weights = checkpoints(out)[-1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "step-000004" in err
    assert "model.safetensors" in err
    assert "--resume previous" in err
    assert checkpoints(out)  # nothing is lost
    assert not run(capsys, *command, "--resume", "previous")[0]
    ends = [json.loads((folder / "training.json").read_text())["trained_hash"] for folder in (out, finished)]
    assert ends[0] == ends[1]
