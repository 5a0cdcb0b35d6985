"""Steering vectors as files: exact round trips, what a foreign reader finds in them, and what is refused.

What llama.cpp's control vectors are in particular is in test_control_vectors.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors import safe_open

import probes.model
from dispositions.__main__ import main
from probes.behaviors import read_behavior
from probes.criteria import Criterion, Verdict
from probes.directions import Direction, open_direction, save_direction
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.propensity import prepare, propensity
from probes.provenance import hash_of
from probes.stats import Estimate
from probes.steering import steer
from probes.vectors import (
    Provenance,
    Vectors,
    architecture_of,
    export_vectors,
    import_vectors,
    read_run,
)

DOSE = 0.7
ENDINGS = (".safetensors", ".gguf")


def drawn(width: int, *, layer: int, seed: int = 0, **fields: Any) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    reliability = Estimate(value=1 / 3, lower=0.1, upper=0.7, n=24, groups=6, seed=3)
    plain = {"shape": (width,), "behavior": "sentiment", "n": 24, "gap": math.pi, "reliability": reliability}
    unit = vector / vector.norm()
    return Direction(layer=layer, vector=unit, norm=math.e, midpoint=-0.1, **{**plain, **fields})


def pack(model: HybridModel, *directions: Direction, dose: float = DOSE, **about: Any) -> Vectors:
    note = {"model": model.name, "weights_hash": model.weights_hash, "architecture": architecture_of(model), **about}
    doses = {one.layer: dose for one in directions}
    return Vectors(directions={one.layer: one for one in directions}, doses=doses, provenance=Provenance(**note))


def assert_equal(one: Direction, other: Direction) -> None:
    assert one.vector.dtype == other.vector.dtype == torch.float32
    assert torch.equal(one.vector, other.vector)
    for field in fields(Direction):
        if field.name != "vector":
            assert getattr(one, field.name) == getattr(other, field.name), field.name


def foreign(path: Path, tensors: dict[str, Any], *, hint: str | None = "llama", count: int | None = None) -> Path:
    """A control vector as repeng writes it."""
    writer = GGUFWriter(path, "controlvector")
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(tensors) if count is None else count)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_written_is_read_back_bit_for_bit(tiny, tmp_path, ending):
    several = [drawn(64, layer=layer, seed=layer) for layer in (6, 2, 3)]
    vectors = pack(
        tiny, *several, behavior="sentiment", behavior_hash="00ff", phase="prefill", status="verified",
        verdict={"outcome": "PASS", "sentence": "es wirkt, fünfmal", "criteria": [], "recipe_hash": "ab"},
    )  # fmt: skip
    path = export_vectors(vectors, tmp_path / f"v{ending}")
    found = import_vectors(path, tiny)
    assert found.provenance == vectors.provenance
    assert found.doses == vectors.doses
    for one in several:
        assert_equal(found.directions[one.layer], one)
    assert export_vectors(found, tmp_path / f"again{ending}").read_bytes() == path.read_bytes()
    assert found.frame()["layer"].tolist() == [2, 3, 6]
    assert_equal(found.at(3).only, several[2])
    with pytest.raises(WrongInput, match="there are 3 vectors, at layers 2, 3, 6; choose one"):
        _ = found.only
    with pytest.raises(WrongInput, match="no vector at layer 4; there are some at 2, 3, 6"):
        found.at(4)


@pytest.mark.parametrize(
    "about",
    [
        {"site": "gdn.state", "shape": (4, 16, 24), "layer": 0, "heads": (1, 3)},
        {"site": "attn.heads", "shape": (4, 32), "layer": 7},
    ],
)
def test_states_and_heads_go_to_safetensors_and_llama_cpp_has_no_place_for_them(tiny, tmp_path, about):
    direction = drawn(math.prod(about["shape"]), **about)
    path = export_vectors(pack(tiny, direction, form="write"), tmp_path / "v.safetensors")
    found = import_vectors(path, tiny)
    assert_equal(found.only, direction)
    assert found.provenance.form == "write"
    with pytest.raises(WrongInput, match=f"llama.cpp has no place for {about['site']}$"):
        export_vectors(pack(tiny, direction), tmp_path / "v.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


def test_safetensors_say_in_plain_words_what_they_hold(tiny, tmp_path):
    direction = drawn(64, layer=5)
    path = export_vectors(pack(tiny, direction, behavior="sentiment"), tmp_path / "v.safetensors")
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == ["direction.5"]
        assert np.array_equal(file.get_tensor("direction.5"), direction.vector.numpy())
        said = json.loads(file.metadata()["json"])
    assert {key: said[key] for key in ("format", "version", "model", "status", "verdict", "site")} == {
        "format": "dispositions-vectors", "version": 1, "model": "tiny", "status": "unverified", "verdict": None,
        "site": "resid",
    }  # fmt: skip
    assert (said["model_type"], said["hidden_size"], said["n_layers"]) == ("qwen3_5_text", 64, 8)
    assert said["weights_hash"] == tiny.weights_hash
    assert said["layer_convention"] == "from 0; resid at layer i is the stream after block i"
    [entry] = said["vectors"]
    assert (entry["layer"], entry["norm"], entry["dose"]) == (5, math.e, DOSE)
    assert said["sign_convention"].startswith("positive doses push from unwanted to wanted")


# -- an imported vector steers like the original -----------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_imported_vector_steers_bitwise_like_the_original(organism, tmp_path, ending):
    direction = drawn(128, layer=4)
    found = import_vectors(export_vectors(pack(organism, direction), tmp_path / f"v{ending}"), organism)
    prepared = prepare(organism, read_behavior("sentiment").take(4))
    scores = []
    for one, dose in ((direction, DOSE), (found.only, found.doses[4])):
        with steer(organism, replace(one, norm=8 * one.norm), dose=dose, phase="prefill"):
            scores.append(propensity(organism, prepared))
    assert scores[0] == scores[1]
    assert scores[0] != propensity(organism, prepared)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_whose_words_were_changed_is_refused(tiny, tmp_path, ending):
    path = export_vectors(pack(tiny, drawn(64, layer=2, behavior="hedging")), tmp_path / f"v{ending}")
    path.write_bytes(path.read_bytes().replace(b"hedging", b"candour"))
    with pytest.raises(WrongInput, match="is damaged: what it says is not what was written"):
        import_vectors(path, tiny)


@pytest.mark.parametrize("ending", ENDINGS)
def test_other_weights_are_refused(tiny, llama, tmp_path, ending):
    path = export_vectors(pack(tiny, drawn(64, layer=2)), tmp_path / f"v{ending}")
    said = f"made for weights '{tiny.weights_hash}' .'tiny'., llama has '{llama.weights_hash}'"
    with pytest.raises(WrongInput, match=said):
        import_vectors(path, llama, anyway=True)
    with pytest.raises(WrongInput, match="has norms of its own"):
        import_vectors(path, tiny, norm=3.0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_damaged_file_is_one_line_or_gives_the_same_vector(tiny, tmp_path, ending):
    direction = drawn(64, layer=2)
    whole = export_vectors(pack(tiny, direction), tmp_path / f"v{ending}").read_bytes()
    path, rng = tmp_path / f"damaged{ending}", np.random.default_rng(0)
    for length in (0, 3, 4, 23, *rng.integers(24, len(whole) - 32, 30).tolist()):
        path.write_bytes(whole[:length])
        with pytest.raises(WrongInput) as refused:
            import_vectors(path, tiny)
        assert "\n" not in str(refused.value)
    refusals = []
    for at in rng.integers(0, len(whole), 60).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
        try:
            found = import_vectors(path, tiny)
        except WrongInput as error:
            refusals.append(str(error))
        else:
            assert_equal(found.only, direction)
    assert len(refusals) > 40  # the rest hit what nobody reads: padding, the description
    assert not [line for line in refusals if "\n" in line]


def test_vectors_that_are_not_numbers_and_other_endings_are_refused(tiny, tmp_path):
    with pytest.raises(WrongInput, match="the vector at resid 2 is not finite"):
        pack(tiny, drawn(64, layer=2, gap=math.nan))
    with pytest.raises(WrongInput, match=r"written to .safetensors or .gguf, saw 'v.pt'"):
        export_vectors(pack(tiny, drawn(64, layer=2)), tmp_path / "v.pt")
    (tmp_path / "v.pt").touch()
    with pytest.raises(WrongInput, match=r"read from .safetensors or .gguf, saw 'v.pt'"):
        import_vectors(tmp_path / "v.pt", tiny)
    save_direction(drawn(64, layer=2), tmp_path / "d.safetensors", weights_hash=tiny.weights_hash)
    with pytest.raises(WrongInput, match=r"is a run's own direction: export the run .*and import that"):
        import_vectors(tmp_path / "d.safetensors", tiny)


# -- runs and commands -------------------------------------------------------------------------------------------------


def judged(folder: Path, model: HybridModel, direction: Direction, outcome: str = "PASS", **changed: Any) -> Path:
    """A run folder as `dispositions verify` leaves it, as far as an export reads it."""
    status = "pass" if outcome == "PASS" else "fail"
    values = {
        "verdict": outcome, "sentence": "it does", "behavior": direction.behavior, "model": model.name,
        "site": direction.site, "layer": direction.layer, "dose": 0.5, "phase": "prefill",
        "criteria": (Criterion(number=3, name="effect", status=status, observed=1.5),), "controls": {}, "phases": [],
        "cost": {}, "evidence": {"direction": {"norm": direction.norm, "method": direction.method}},
        "recipe": {**model.identity, "behavior_hash": "00ff", "config": {"form": "end"}}, **changed,
    }  # fmt: skip
    Verdict(**values).save(folder / "verdict.json")
    save_direction(direction, folder / "direction.safetensors", weights_hash=model.weights_hash)
    return folder


def run(capsys, *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_a_run_is_exported_without_its_weights(organism, tmp_path, monkeypatch):
    monkeypatch.setattr(probes.model.AutoModelForCausalLM, "from_pretrained", None)
    direction = replace(drawn(128, layer=4), reliability=None)
    vectors = read_run(judged(tmp_path, organism, direction))
    about = vectors.provenance
    assert_equal(vectors.only, direction)
    assert vectors.doses == {4: 0.5}
    assert (about.status, about.behavior_hash, about.phase) == ("verified", "00ff", "prefill")
    assert about.architecture == architecture_of(organism)
    assert about.verdict is not None
    assert about.verdict["criteria"] == [{"number": 3, "name": "effect", "status": "pass", "observed": 1.5}]
    recipe = json.loads((tmp_path / "verdict.json").read_text())["recipe"]
    assert about.verdict["recipe_hash"] == hash_of(dict(reversed(recipe.items())))
    assert about.verdict["recipe_hash"] != hash_of({**recipe, "dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": 5}, "its layer is 5, the direction's 4"),
        ({"behavior": "hedging"}, "its behaviour is hedging, the direction's sentiment"),
        ({"recipe": {"weights_hash": "0"}}, "its weights is 0"),
        ({"evidence": {"direction": {"norm": 1.0}}}, "its norm is 1.0, the direction's 2.7"),
        ({"outcome": "FAIL"}, "is FAIL: 3 effect .fail.; only --unverified exports it"),
        ({"criteria": ()}, "says PASS, which its criteria do not: none at all; only --unverified"),
        ({"recipe": {"model": "./gone"}}, "no model at './gone'; say where the model is with --model"),
    ],
)
def test_a_verdict_on_something_else_is_not_exported(organism, tmp_path, changed, message):
    if "recipe" in changed:
        changed = {**changed, "recipe": {**organism.identity, **changed["recipe"]}}
    judged(tmp_path, organism, drawn(128, layer=4), **changed)
    with pytest.raises(WrongInput, match=message):
        read_run(tmp_path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_export_and_import_by_command(organism, tmp_path, capsys, ending):
    direction = replace(drawn(128, layer=4), reliability=None)
    folder, out = judged(tmp_path / "run", organism, direction), tmp_path / f"v{ending}"
    code, said, _ = run(capsys, "export", folder, out)
    assert code == 0
    assert f"verified: sentiment on organism ({organism.weights_hash}) at resid, layer 4" in said
    assert ("llama.cpp adds it after block 4 at every token" in said) == (ending == ".gguf")
    written = out.read_bytes()
    code, said, _ = run(capsys, "export", folder, out)
    assert (code, f"{out} holds this already" in said, out.read_bytes()) == (0, True, written)
    code, said, _ = run(capsys, "import", out, "--model", "organism", "--out", tmp_path / "in")
    assert code == 0
    assert {p.name for p in (tmp_path / "in").iterdir()} == {"recipe.json", "provenance.json", "direction.safetensors"}
    assert_equal(open_direction(tmp_path / "in" / "direction.safetensors", model=organism), direction)
    assert json.loads((tmp_path / "in" / "provenance.json").read_text())["verdict"]["outcome"] == "PASS"
    code, _, err = run(capsys, "import", out, "--model", "organism-state", "--out", tmp_path / "no")
    assert code == 2
    assert f"made for weights '{organism.weights_hash}' ('organism'), organism-state has" in err
    assert not (tmp_path / "no").exists()


def test_only_what_passed_is_exported_and_nothing_is_overwritten(organism, tmp_path, capsys):
    folder = judged(tmp_path / "run", organism, drawn(128, layer=4), "FAIL")
    code, _, err = run(capsys, "export", folder, tmp_path / "v.gguf")
    assert (code, err.count("\n")) == (2, 1)
    assert "sentiment on organism is FAIL" in err
    code, said, _ = run(capsys, "export", folder, tmp_path / "v.gguf", "--unverified")
    assert code == 0
    assert said.startswith("unverified: sentiment on organism")
    about = import_vectors(tmp_path / "v.gguf", organism).provenance
    assert about.status == "unverified"
    assert about.verdict is not None
    assert about.verdict["outcome"] == "FAIL"
    (tmp_path / "mine.gguf").write_text("mine")
    code, _, err = run(capsys, "export", folder, tmp_path / "mine.gguf", "--unverified")
    assert code == 2
    assert "exists and is something else" in err
    assert (tmp_path / "mine.gguf").read_text() == "mine"
    code, _, err = run(capsys, "export", folder, tmp_path / "v.pt", "--unverified")
    assert code == 2
    assert "OUT must end in .safetensors or .gguf" in err


def test_several_layers_are_imported_as_several_files_or_one_is_chosen(organism, tmp_path, capsys):
    path = foreign(tmp_path / "v.gguf", {f"direction.{i}": floats(128, seed=i) for i in (2, 5)}, hint="qwen35")
    asked = ["import", path, "--model", "organism", "--norm", "9"]
    code, said, _ = run(capsys, *asked, "--out", tmp_path / "all")
    assert code == 0
    assert "unverified: v.gguf (" in said
    names = {p.name for p in (tmp_path / "all").glob("*.safetensors")}
    assert names == {"direction-2.safetensors", "direction-5.safetensors"}
    assert run(capsys, *asked, "--layer", "5", "--out", tmp_path / "one")[0] == 0
    assert open_direction(tmp_path / "one" / "direction.safetensors", model=organism).layer == 5


@pytest.mark.parametrize(("command", "word"), [("export", "--unverified"), ("import", "--anyway")])
def test_help_shows_an_example(capsys, command, word):
    code, said, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"dispositions {command} " in said
    assert word in said
