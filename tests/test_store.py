"""Files are whole or absent, equal content has equal bytes, and nothing that is not JSON gets into JSON."""

from __future__ import annotations

import copy
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same
from safetensors.torch import load_file

from probes import capture as capture_module
from probes import store
from probes.capture import POSITIONS, capture, prompts_hash
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Prompt
from probes.sites import SITES
from probes.store import (
    library_versions,
    open_capture,
    read_json,
    read_metadata,
    read_tensors,
    recipe_differs,
    write_json,
    write_tensors,
    write_text,
)

EVERY = tuple(SITES)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    value: float
    low: float


# --- JSON and text


def test_json_has_no_nan_and_keeps_the_order_of_keys(tmp_path):
    write_json(
        tmp_path / "a.json", {"z": math.nan, "a": [math.inf, -math.inf, 1.5], "m": Estimate(value=0.1, low=math.nan)}
    )
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    loaded = json.loads(text)
    assert list(loaded) == ["z", "a", "m"]
    assert loaded == {"z": None, "a": [None, None, 1.5], "m": {"value": 0.1, "low": None}}
    assert text.startswith('{\n "z": null')


def test_json_takes_what_numpy_torch_and_paths_hold(tmp_path):
    obj = {
        "n": np.int64(3), "x": np.float32(0.5), "nan": np.float64("nan"), "b": np.bool_(True), "array": np.eye(2),
        "tensor": torch.tensor([1.0, torch.nan]), "scalar": torch.tensor(2), "path": Path("a") / "b",
        5: (1, None, True),
    }  # fmt: skip
    write_json(tmp_path / "a.json", obj)
    assert read_json(tmp_path / "a.json") == {
        "n": 3, "x": 0.5, "nan": None, "b": True, "array": [[1.0, 0.0], [0.0, 1.0]],
        "tensor": [1.0, None], "scalar": 2, "path": "a/b", "5": [1, None, True],
    }  # fmt: skip
    assert read_json(tmp_path / "a.json")["b"] is True


def test_text_is_utf8_and_folders_are_made(tmp_path):
    write_text(tmp_path / "deep" / "er" / "a.txt", "Ä → β\n")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "Ä → β\n".encode()
    write_json(tmp_path / "b.json", {"ü": "→"})
    assert '"ü": "→"' in (tmp_path / "b.json").read_text(encoding="utf-8")


def test_what_has_no_json_form_is_refused_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(TypeError, match="object has no JSON form"):
        write_json(tmp_path / "a.json", [object()])
    assert read_json(tmp_path / "a.json") == [1]


def test_reading_json_that_is_not_there_or_not_json(tmp_path):
    with pytest.raises(WrongInput, match=r"^no such file: "):
        read_json(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(WrongInput, match="is not JSON"):
        read_json(tmp_path / "a.json")


# --- atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    old = (tmp_path / "a.safetensors").read_bytes()

    def half(tensors, path, note):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(store, "save_file", half)
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(OSError, match="disk full"):
            write_tensors(tmp_path / name, {"x": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == old


def test_the_new_name_appears_only_when_the_content_is_synced(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(store.os, "fsync", lambda descriptor: events.append(("sync", sorted(names()))))
    replace = store.os.replace

    def names():
        return [path.name for path in tmp_path.iterdir()]

    def replacing(old, new):
        events.append(("replace", Path(old).parent == Path(new).parent))
        replace(old, new)

    monkeypatch.setattr(store.os, "replace", replacing)
    write_text(tmp_path / "a.txt", "x")
    (sync, before), (rename, beside) = events
    assert (sync, rename, beside) == ("sync", "replace", True)
    assert len(before) == 1
    assert before[0].startswith(".a.txt.")
    assert names() == ["a.txt"]


def test_tensor_files_are_readable_by_others_as_text_files_are(tmp_path):
    write_text(tmp_path / "a.txt", "x")
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "a.safetensors")]
    assert modes[0] == modes[1]


# --- tensors


def test_tensors_come_back_in_their_dtype_with_their_note(tmp_path):
    tensors = {
        "half": torch.randn(3, 4, dtype=torch.bfloat16), "ids": torch.arange(3), "view": torch.randn(4, 6)[:, ::2],
        "weight": torch.nn.Parameter(torch.randn(2)), "scalar": torch.tensor(1.5),
    }  # fmt: skip
    write_tensors(tmp_path / "a.safetensors", tensors, {"rows": (1, 2), "name": "ü", "x": math.nan})
    for loaded in (read_tensors(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    assert read_metadata(tmp_path / "a.safetensors") == {"rows": [1, 2], "name": "ü", "x": None}


def test_equal_content_has_equal_bytes(tmp_path):
    note = {letter: letter for letter in "qwertyuiopasdf"}
    tensors = {name: torch.ones(2) for name in "hgjk"}
    written = set()
    for _ in range(5):
        write_tensors(tmp_path / "a", tensors, note)
        written.add((tmp_path / "a").read_bytes())
    assert len(written) == 1


def test_reading_tensors_that_are_not_there_or_not_whole(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(9)})
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-1])
    for read in (read_tensors, read_metadata):
        with pytest.raises(WrongInput, match=r"^no such file: "):
            read(tmp_path / "none")
        with pytest.raises(WrongInput, match="is not a whole safetensors file"):
            read(tmp_path / "cut")


# --- recipes


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ({"a": 1, "b": (1, 2)}, {"a": 1, "b": [1, 2]}, None),
        ({"b": 1, "a": 1}, {"a": 2, "b": 2}, "a was 1 and is now 2"),
        ({"v": {"x": "1", "y": "1"}}, {"v": {"x": "1", "y": "2"}}, 'v.y was "1" and is now "2"'),
        ({"a": None}, {}, "a was null and is now null"),
        ({}, {"a": 1}, "a was null and is now 1"),
        ({"a": math.nan}, {"a": math.nan}, None),
        ({"a": 1}, {"a": "x" * 100}, f'a was 1 and is now "{"x" * 56}...'),
        ({"a": {"b": 1}}, {"a": 2}, 'a was {"b": 1} and is now 2'),
    ],
)
def test_recipe_differs(old, new, difference):
    assert recipe_differs(old, new) == difference


def test_library_versions():
    versions = library_versions()
    assert versions["torch"] == torch.__version__
    assert set(versions) == {"dispositions", "torch", "transformers", "nnsight", "safetensors", "numpy"}
    assert all(versions.values())


# --- captures on disk


@pytest.fixture
def folder(tiny, prompts, tmp_path):
    capture(tiny, prompts, sites=("resid", "gdn.state"), batch_tokens=60, out=tmp_path / "capture", progress=False)
    return tmp_path / "capture"


def test_opening_and_describing_read_no_tensor(folder, monkeypatch):
    read = []

    class Counting:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exception):
            return self.file.__exit__(*exception)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    safe_open = store.safe_open
    monkeypatch.setattr(store, "safe_open", Counting)
    opened = open_capture(folder)
    assert len(opened.frame()) == 14
    assert str(opened)
    assert read == []
    assert opened["gdn.state", 1].shape[0] == len(opened)
    assert set(read) == {"gdn.state.1"}
    assert len(read) == len(opened.parts)


def test_what_is_read_is_safe_to_change(folder, tiny, prompts):
    memory = capture(tiny, prompts, positions="all", layers=[0], progress=False)
    expected = memory["resid", 0][2].clone()
    memory["resid", 0][2].zero_()
    assert torch.equal(memory["resid", 0][2], expected)
    opened = open_capture(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    piece = opened.parts[0].tensor("resid.0")
    piece += 1
    opened["resid", 0].zero_()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert opened["resid", 0].abs().max() > 0


def test_an_unfinished_capture_is_not_opened(folder):
    total = len(open_capture(folder))
    last = sorted(folder.glob("batch-*"))[-1]
    missing = len(read_metadata(last)["rows"])
    last.unlink()
    with pytest.raises(WrongInput, match=rf"is unfinished \({total - missing} of {total} prompts\); run it again"):
        open_capture(folder)


def test_a_folder_without_a_capture_is_refused(folder, tmp_path):
    with pytest.raises(WrongInput, match=r"^no such file: .*recipe.json$"):
        open_capture(tmp_path / "nowhere")
    write_json(tmp_path / "run" / "recipe.json", {"kind": "verdict"})
    with pytest.raises(WrongInput, match="holds no capture"):
        open_capture(tmp_path / "run")
    write_tensors(folder / "batch-99999.safetensors", {"x": torch.ones(1)})
    with pytest.raises(WrongInput, match="is not a batch of a capture"):
        open_capture(folder)


# --- streaming, interruption, refusal


@pytest.mark.parametrize("positions", POSITIONS)
def test_on_disk_equals_in_memory(positions, tiny, prompts, tmp_path):
    options = {"sites": EVERY, "positions": positions, "batch_tokens": 150, "progress": False}
    memory = capture(tiny, prompts, **options)
    disk = capture(tiny, prompts, out=tmp_path / "capture", **options)
    assert_same(disk, memory)
    assert disk.recipe == memory.recipe
    assert disk.frame().equals(memory.frame())
    assert str(disk) == str(memory)
    assert all(disk.axes(site) == memory.axes(site) for site in EVERY)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Killed(Exception):
    pass


def test_an_interrupted_capture_resumes_to_the_same_bytes(tiny, prompts, tmp_path, monkeypatch):
    options = {"sites": EVERY, "batch_tokens": 60, "progress": False}
    capture(tiny, prompts, out=tmp_path / "whole", **options)
    record, calls = capture_module._record, []

    def dies_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return record(*args)

    monkeypatch.setattr(capture_module, "_record", dies_at_the_third)
    with pytest.raises(Killed):
        capture(tiny, prompts, out=tmp_path / "cut", **options)
    left = contents(tmp_path / "cut")
    assert set(left) == {"recipe.json", "batch-00000.safetensors", "batch-00001.safetensors"}
    (tmp_path / "cut" / ".batch-00002.safetensors.1.tmp").write_bytes(b"half")
    resumed = capture(tiny, prompts, out=tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(calls) == 3 + len(resumed.parts) - 2  # the two whole batches were not computed again
    assert_same(resumed, capture(tiny, prompts, **options))


def test_a_batch_that_was_cut_short_is_computed_again(tiny, prompts, tmp_path):
    options = {"batch_tokens": 60, "progress": False, "out": tmp_path}
    capture(tiny, prompts, **options)
    whole = contents(tmp_path)
    (tmp_path / "batch-00001.safetensors").write_bytes(whole["batch-00001.safetensors"][:-5])
    capture(tiny, prompts, **options)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"positions": "all"}, 'positions was "last" and is now "all"'),
        ({"layers": [0, 1]}, "layers.resid was [0, 1, 2, 3, 4, 5, 6, 7] and is now [0, 1]"),
        ({"sites": ("mlp",)}, "layers.mlp was null and is now [0, 1, 2, 3, 4, 5, 6, 7]"),
        ({"batch_tokens": 100}, "batch_tokens was 4096 and is now 100"),
    ],
)
def test_another_recipe_is_refused(change, field, tiny, prompts, tmp_path):
    capture(tiny, prompts, out=tmp_path, progress=False)
    before = contents(tmp_path)
    with pytest.raises(WrongInput) as refused:
        capture(tiny, prompts, out=tmp_path, progress=False, **change)
    assert str(refused.value) == f"{tmp_path} holds another capture: {field}"
    assert contents(tmp_path) == before


def test_other_weights_and_other_prompts_are_refused(tiny, llama, prompts, tmp_path):
    capture(tiny, prompts, out=tmp_path, progress=False)
    with pytest.raises(WrongInput, match="holds another capture: prompts_hash was"):
        capture(tiny, prompts[::-1], out=tmp_path, progress=False)
    other = HybridModel(copy.deepcopy(tiny.hf), tiny.tokenizer, name="tiny")
    with torch.no_grad():
        next(other.layers[0].mlp.parameters())[0, 0] += 1
    with pytest.raises(WrongInput, match="holds another capture: weights_hash was"):
        capture(other, prompts, out=tmp_path, progress=False)


def test_foreign_folders_are_refused(tiny, prompts, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WrongInput, match="is a file; a capture needs a folder"):
        capture(tiny, prompts, out=tmp_path / "file", progress=False)
    (tmp_path / "batch-00000.safetensors").write_bytes(b"")
    with pytest.raises(WrongInput, match=r"holds batches of a capture but no recipe.json"):
        capture(tiny, prompts, out=tmp_path, progress=False)


def test_the_recipe_is_json_and_complete(tiny, prompts, tmp_path):
    got = capture(tiny, prompts, sites=("gdn.state", "resid"), out=tmp_path, progress=False)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe == got.recipe
    assert recipe["weights_hash"] == tiny.weights_hash
    assert recipe["layers"] == {"resid": list(range(8)), "gdn.state": [0, 1, 2, 4, 5, 6]}
    assert recipe["versions"]["torch"] == torch.__version__
    spans = Prompt(text="", ids=prompts[0].ids, spans={**prompts[0].spans, "direction": (0, 1)})
    assert len({prompts_hash([spans]), prompts_hash(prompts[:1]), prompts_hash(prompts[1:2])}) == 3
