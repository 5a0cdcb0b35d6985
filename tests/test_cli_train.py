"""`dispositions train` from outside: what it leaves, what it refuses, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dispositions.__main__ import main
from training.checkpoints import checkpoints

QUICK = [
    "--examples", "20", "--steps", "4", "--batch", "4", "--questions", "4", "--max-new-tokens", "3", "--warmup", "1",
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
