"""A resumed run equals one that was never interrupted, bit for bit, and a damaged checkpoint is never taken."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import qwen_config, wake
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from probes.errors import WrongInput
from probes.model import HybridModel, load
from probes.store import read_json
from training import checkpoints as module
from training.checkpoints import Checkpoint, checkpoints, open_checkpoint, restore, save_checkpoint

FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "config.json", "tokenizer.json")
Make = Callable[[HybridModel], torch.optim.Optimizer]


class Master(torch.optim.Optimizer):
    """Keeps float32 weights beside bfloat16 ones, and state of every kind that is not a tensor."""

    def __init__(self, params: Any, lr: float = 0.01):
        super().__init__(params, {"lr": lr, "gamma": math.inf, "range": (0.1, (1, None)), "name": "master"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(master=p.float(), taken=0, count=torch.tensor(0), limit=-math.inf, nothing=None)
                    state["mask"], state["noise"] = torch.rand(3, *p.shape)[1:]  # views of one tensor
                state["taken"] += 1
                state["count"] += 1
                state["master"] -= group["lr"] / state["taken"] * (state["mask"] < 0.9) * p.grad.float()
                p.copy_(state["master"])


def adamw(model: HybridModel) -> torch.optim.Optimizer:
    decayed = [p for p in model.hf.parameters() if p.ndim > 1]
    others = [p for p in model.hf.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "betas": (0.8, 0.95), "lr": 1e-3 / 3}]
    return torch.optim.AdamW(groups, lr=1e-3)


def named_adamw(model: HybridModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.hf.named_parameters(), lr=1e-3)


def sgd(model: HybridModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.hf.parameters(), lr=1e-2, momentum=0.9, nesterov=True)


def master(model: HybridModel) -> torch.optim.Optimizer:
    return Master(model.hf.parameters())


def copied(model: HybridModel, dtype: torch.dtype = torch.float32) -> HybridModel:
    return HybridModel(copy.deepcopy(model.hf).to(dtype), model.tokenizer)


def train(model: HybridModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps on tokens drawn from torch's own generator."""
    for _ in range(steps):
        ids = torch.randint(0, 60, (2, 9))
        model.hf(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def stepped(model: HybridModel, run: Path, *steps: int, keep: int = 2) -> torch.optim.Optimizer:
    """Checkpoints of a model that does not learn, at these steps."""
    optimizer = sgd(model)
    for step in steps:
        save_checkpoint(run, step=step, model=model, optimizer=optimizer, progress={"at": step}, keep=keep)
    return optimizer


def newest(run: Path, *, previous: bool = False) -> Checkpoint:
    checkpoint = open_checkpoint(run, previous=previous)
    assert checkpoint is not None
    return checkpoint


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tiny: HybridModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 3 and 6, to be copied."""
    run = tmp_path_factory.mktemp("saved")
    stepped(copied(tiny), run, 3, 6)
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


# --- what comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [adamw, named_adamw, sgd, master])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(make: Make, dtype, tiny, tmp_path):
    torch.manual_seed(5)
    whole = copied(tiny, dtype)
    optimizer = make(whole)
    train(whole, optimizer, 6)
    after = torch.rand(3)

    torch.manual_seed(5)
    first = copied(tiny, dtype)
    optimizer = make(first)
    train(first, optimizer, 3)
    progress = {"epoch": 1, "seen": [3, 1], "best": math.inf, "span": (0, 1 / 3)}
    folder = save_checkpoint(tmp_path, step=3, model=first, optimizer=optimizer, progress=progress)
    torch.manual_seed(99)
    second = copied(tiny, dtype)
    with torch.no_grad():
        for p in second.hf.parameters():
            p.zero_()
    again = make(second)
    again.param_groups[0]["lr"] = 7.0  # comes back too
    places = {key: value.data_ptr() for key, value in second.hf.state_dict().items()}
    checkpoint = newest(tmp_path)
    assert (checkpoint.step, checkpoint.folder, checkpoint.progress) == (3, folder, progress)
    restore(checkpoint, second, again)
    assert {key: value.data_ptr() for key, value in second.hf.state_dict().items()} == places
    train(second, again, 3)

    assert torch.equal(torch.rand(3), after)
    assert second.weights_hash == whole.weights_hash  # over the bytes
    assert second.weights_hash != first.weights_hash


@pytest.mark.parametrize("make", [adamw, named_adamw, sgd, master])
def test_the_optimizer_comes_back_with_its_dtypes_and_kinds(make: Make, tiny, tmp_path):
    model, other = copied(tiny, torch.bfloat16), copied(tiny, torch.bfloat16)
    optimizer, again = make(model), make(other)
    train(model, optimizer, 2)
    folder = save_checkpoint(tmp_path, step=2, model=model, optimizer=optimizer, progress={})
    restore(newest(tmp_path), other, again)
    was, now = optimizer.state_dict(), again.state_dict()
    assert now["param_groups"] == was["param_groups"]
    assert [type(value) for value in now["param_groups"][0].values()] == [
        type(value) for value in was["param_groups"][0].values()
    ]
    assert now["state"].keys() == was["state"].keys()
    for index, entries in was["state"].items():
        assert now["state"][index].keys() == entries.keys()
        for name, value in entries.items():
            seen = now["state"][index][name]
            assert type(seen) is type(value)
            if isinstance(value, torch.Tensor):
                assert (seen.dtype, seen.shape) == (value.dtype, value.shape)
                assert torch.equal(seen, value)
            else:
                assert seen == value
    twice = save_checkpoint(tmp_path / "twice", step=2, model=other, optimizer=again, progress={})
    assert [path.name for path in sorted(twice.iterdir())] == [path.name for path in sorted(folder.iterdir())]
    for path in twice.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_the_folder_is_a_model(tiny, saved):
    folder = checkpoints(saved)[-1]
    loaded = load(folder)
    ids = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded.hf(input_ids=ids).logits, tiny.hf(input_ids=ids).logits)
    assert loaded.tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == tiny.tokenizer.chat_template


def test_nothing_is_pickled_and_all_files_are_as_readable_as_text(saved):
    for folder in checkpoints(saved):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}
        assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in files)  # pickle, torch.save
        assert len({path.stat().st_mode for path in files}) == 1


def test_checksums_cover_every_other_file(saved):
    folder = checkpoints(saved)[-1]
    files = read_json(folder / "checksums.json")["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"checksums.json"}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_saving_draws_nothing_and_leaves_progress_bars_as_they_were(tiny, tmp_path, capfd):
    torch.manual_seed(3)
    before, bars = torch.get_rng_state(), transformers_logging.is_progress_bar_enabled()
    stepped(copied(tiny), tmp_path, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert transformers_logging.is_progress_bar_enabled() == bars
    assert capfd.readouterr().err == ""


def test_weights_of_two_dtypes_come_back(tiny, tmp_path):
    model, other = copied(tiny, torch.bfloat16), copied(tiny, torch.bfloat16)
    for one in (model, other):
        for name, p in one.hf.named_parameters():
            if name.endswith("A_log"):
                p.data = p.data.float()
    with torch.no_grad():
        for p in model.hf.parameters():
            p.add_(torch.randn_like(p))
    stepped(model, tmp_path, 1)
    restore(newest(tmp_path), other, sgd(other))
    assert other.weights_hash == model.weights_hash


def test_weights_in_several_files_come_back(tiny, tmp_path, monkeypatch):
    model, other = copied(tiny), copied(tiny)
    with torch.no_grad():
        for p in model.hf.parameters():
            p.add_(1)
    monkeypatch.setattr(
        model.hf, "save_pretrained", functools.partial(model.hf.save_pretrained, max_shard_size="200KB")
    )
    stepped(model, tmp_path, 1)
    folder = checkpoints(tmp_path)[0]
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    restore(newest(tmp_path), other, sgd(other))
    assert other.weights_hash == model.weights_hash
    shards[1].unlink()
    with pytest.raises(WrongInput, match=f"{shards[1].name} is missing"):
        open_checkpoint(tmp_path)


def test_the_multimodal_wrapper_comes_back(tokenizer, tmp_path):
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=qwen_config(tokenizer).to_dict(), vision_config=vision)
    torch.manual_seed(4)
    model = HybridModel(wake(Qwen3_5ForConditionalGeneration(config)), tokenizer)
    other = HybridModel(Qwen3_5ForConditionalGeneration(config), tokenizer)
    optimizer = adamw(model)
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, progress={})
    restore(newest(tmp_path), other, adamw(other))
    assert other.weights_hash == model.weights_hash


# --- what is refused


def damage(path: Path, how: str) -> str:
    """Damage a file; what has to be said of it."""
    content = path.read_bytes()
    half = len(content) // 2
    if how == "missing":
        path.unlink()
        return f"{path.name} is missing"
    if how == "truncated":
        path.write_bytes(content[:half])
        return f"{path.name} is truncated: {half} of {len(content)} bytes"
    if how == "longer":
        path.write_bytes(content + b"\n")
        return f"{path.name} is altered: {len(content) + 1} of {len(content)} bytes"
    path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    return f"{path.name} is altered: its SHA-256 is not what was recorded"


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "altered"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_refused_by_name(file, how, run):
    said = damage(run / "checkpoints" / "step-000006" / file, how)
    with pytest.raises(
        WrongInput, match=rf"checkpoint .*step-000006 is damaged: {said}; --resume previous uses step-000003$"
    ):
        open_checkpoint(run)
    checkpoint = newest(run, previous=True)
    assert (checkpoint.step, checkpoint.progress) == (3, {"at": 3})


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_damaged_checksums_are_refused(how, run):
    damage(run / "checkpoints" / "step-000006" / "checksums.json", how)
    with pytest.raises(WrongInput, match=r"step-000006 is damaged: checksums.json is .*; --resume previous"):
        open_checkpoint(run)


def test_a_checksum_that_was_changed_is_not_blamed_on_its_file(run):
    path = run / "checkpoints" / "step-000006" / "checksums.json"
    digest = read_json(path)["files"]["config.json"]["sha256"]
    path.write_text(path.read_text().replace(digest, digest[::-1]))
    with pytest.raises(WrongInput, match=r"checksums.json is altered: its SHA-256"):
        open_checkpoint(run)


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": 3, "sha256": 4}', "\udcff"])
def test_checksums_that_are_something_else_are_refused(text, run):
    path = run / "checkpoints" / "step-000006" / "checksums.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WrongInput, match=r"step-000006 is damaged: checksums.json is"):
        open_checkpoint(run)


def test_without_a_whole_one_there_is_nothing_to_resume(run):
    for folder in checkpoints(run):
        (folder / "config.json").unlink()
    for previous in (False, True):
        with pytest.raises(WrongInput, match=r"step-000006 is damaged: config.json is missing; no whole one is before"):
            open_checkpoint(run, previous=previous)


def test_previous_takes_the_newest_when_it_is_whole(run):
    checkpoint = newest(run, previous=True)
    assert str(checkpoint).endswith("step-000006: step 6")


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoints(tmp_path) == []
    assert open_checkpoint(tmp_path) is None
    assert open_checkpoint(tmp_path / "absent", previous=True) is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: torch.optim.SGD(model.hf.named_parameters()), r"groups\.0\.param_names\.0 was null"),
        (adamw, r'optimizer was "SGD" and is now "AdamW"'),
        (lambda model: torch.optim.SGD(list(model.hf.parameters())[:-1]), r"groups\.0\.trained\.\d+ was .* null"),
        (lambda model: torch.optim.SGD(list(model.hf.parameters())[::-1]), r"groups\.0\.trained\.0 was"),
        (
            lambda model: torch.optim.SGD([{"params": list(model.hf.parameters())[i::2]} for i in (0, 1)]),
            r"groups\.0\.trained\.1 was",
        ),
    ],
    ids=["names", "class", "fewer", "order", "groups"],
)
def test_another_optimizer_is_refused(make: Make, said, tiny, saved):
    model = copied(tiny)
    with pytest.raises(WrongInput, match=rf"^checkpoint step-000006 does not fit: {said}"):
        restore(newest(saved), model, make(model))


def test_another_model_is_refused_and_unchanged(tiny, llama, saved):
    checkpoint = newest(saved)
    half = copied(tiny, torch.bfloat16)
    before = half.weights_hash
    with pytest.raises(WrongInput, match=r'does not fit: weights\..* was "float32 \[.*\]" and is now "bfloat16 \['):
        restore(checkpoint, half, sgd(half))
    assert half.weights_hash == before
    with pytest.raises(WrongInput, match=r"does not fit: weights\..* and is now"):
        restore(checkpoint, llama, sgd(llama))


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tiny, tmp_path):
    model, stray = copied(tiny), torch.nn.Parameter(torch.zeros(2, 3))
    save = functools.partial(save_checkpoint, tmp_path, model=model)
    good = {"step": 1, "optimizer": sgd(model), "progress": {}}
    for changed, error, said in (
        ({"step": -1}, WrongInput, "step must be at least 0, saw -1"),
        ({"keep": 0}, WrongInput, "keep must be at least 1, saw 0"),
        ({"optimizer": torch.optim.SGD([stray])}, WrongInput, r"trains a tensor \[2, 3\] that is no weight of the"),
        ({"progress": {"loss": torch.tensor(1.0)}}, TypeError, "progress.loss has no exact JSON form: Tensor"),
        ({"progress": {"seen": {3: 1}}}, TypeError, "progress.seen has no exact JSON form: dict"),
        ({"progress": {"$float": "inf"}}, TypeError, "progress has no exact JSON form: dict"),
    ):
        with pytest.raises(error, match=said):
            save(**{**good, **changed})
    assert list(tmp_path.iterdir()) == []


# --- what stays


def test_the_newest_stay(tiny, tmp_path):
    stepped(copied(tiny), tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    stepped(copied(tiny), tmp_path, 1_000_000, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003", "step-1000000"]
    stepped(copied(tiny), tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["step-1000001"]


def test_a_checkpoint_is_replaced_and_later_ones_go(tiny, run):
    model = copied(tiny)
    save_checkpoint(run, step=3, model=model, optimizer=sgd(model), progress={"at": "again"})
    assert names(run) == ["step-000003"]
    checkpoint = newest(run)
    assert checkpoint.progress == {"at": "again"}


def test_what_killed_processes_left_is_removed(tiny, run):
    for name in (".step-000009.12345.tmp", f".step-000009.{os.getpid()}.tmp", ".step-000001.1.old.tmp"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "model.safetensors").write_text("half")
    assert [path.name for path in checkpoints(run)] == ["step-000003", "step-000006"]
    stepped(copied(tiny), run, 9)
    assert names(run) == ["step-000006", "step-000009"]


@pytest.mark.parametrize("killed", [False, True], ids=["error", "killed"])
@pytest.mark.parametrize("at", ["save_pretrained", "write_tensors", "write_json", "_seal", "_hidden"])
def test_an_interruption_leaves_whole_checkpoints_only(at, killed, tiny, run, monkeypatch):
    model = copied(tiny)
    optimizer = sgd(model)

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.hf if at == "save_pretrained" else module, at, stop)
        if killed:  # nothing is cleared up
            patch.setattr(module.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(run, step=6, model=model, optimizer=optimizer, progress={"at": "again"}, keep=1)
    checkpoint = newest(run)
    assert (checkpoint.step, checkpoint.progress) == (6, {"at": 6})
    assert [path.name for path in checkpoints(run)] == ["step-000003", "step-000006"]
    assert any(name.startswith(".") for name in names(run)) == killed
    save_checkpoint(run, step=6, model=model, optimizer=optimizer, progress={"at": "again"}, keep=1)
    assert names(run) == ["step-000006"]


def test_an_interruption_while_an_old_one_is_removed_leaves_no_half(tiny, run, monkeypatch):
    model = copied(tiny)

    def half(folder: Path, **options: Any) -> None:
        (folder / "config.json").unlink(missing_ok=True)
        if not options:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(run, step=9, model=model, optimizer=sgd(model), progress={}, keep=2)
    assert [path.name for path in checkpoints(run)] == ["step-000006", "step-000009"]
    assert open_checkpoint(run) is not None
    stepped(model, run, 12, keep=2)
    assert names(run) == ["step-000009", "step-000012"]
