"""llama.cpp's control vectors: what is in the file, where it is added, and what made elsewhere is taken.

Files are read with the gguf package and applied the way llama.cpp's source says it applies them. Where llama.cpp itself
is installed (the package llama-cpp-python), it applies them.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from test_vectors import DOSE, drawn, floats, foreign, pack

from probes.capture import capture
from probes.damage import read_general
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.steering import steer
from probes.vectors import export_vectors, import_vectors


def test_a_control_vector_is_what_llama_cpp_reads(tiny, tmp_path):
    two = [drawn(64, layer=layer, seed=layer) for layer in (1, 7)]
    reader = GGUFReader(export_vectors(pack(tiny, *two, dose=-0.25), tmp_path / "v.gguf"))
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "controlvector"
    assert values["controlvector.model_hint"] == "qwen35"  # as in llama.cpp's src/llama-arch.cpp
    assert values["controlvector.layer_count"] == 2
    assert values["dispositions.weights_hash"] == tiny.weights_hash
    assert values["dispositions.status"] == "unverified"
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.7"]
    for tensor, one in zip(reader.tensors, two, strict=True):
        assert (tensor.tensor_type.name, tensor.shape.tolist()) == ("F32", [64])
        assert np.array_equal(tensor.data, np.float32(-0.25 * math.e) * one.vector.numpy())


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3, 7])
def test_scale_one_after_block_n_is_the_working_dose(tiny, prompts, tmp_path, layer):
    """llama.cpp: `cur = build_cvec(cur, il)` at the end of block il, counted from 0, at every token."""
    direction, ids = drawn(64, layer=layer), torch.tensor([prompts[0].ids])
    [tensor] = GGUFReader(export_vectors(pack(tiny, direction), tmp_path / "v.gguf")).tensors
    il, added = int(tensor.name.split(".")[1]), torch.from_numpy(np.array(tensor.data))
    handle = tiny.hf.model.layers[il].register_forward_hook(lambda module, args, out: out + added)
    llama = tiny.hf(input_ids=ids).logits
    handle.remove()
    with steer(tiny, direction, dose=DOSE, phase="both"):
        assert torch.equal(tiny.hf(input_ids=ids).logits, llama)
    assert not torch.equal(tiny.hf(input_ids=ids).logits, llama)


@torch.no_grad()
def test_a_vector_of_repeng_stays_at_the_layer_where_it_was_found(llama, prompts, tmp_path):
    """repeng takes layer N from `hidden_states[N + 1]`; what is captured as `resid` at layer N has to be the same."""
    hidden = llama.hf(input_ids=torch.tensor([prompts[0].ids]), output_hidden_states=True).hidden_states
    tensors = {"direction.1": hidden[2][0, -1].numpy()}
    found = import_vectors(foreign(tmp_path / "v.gguf", tensors), llama, norm=2.0)
    there = capture(llama, [prompts[0]], layers=[1], progress=False)["resid", 1][0]
    assert torch.allclose(found.only.vector, there / there.norm(), atol=1e-6)
    assert found.doses[1] == pytest.approx(float(there.norm()) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("direction", "about", "message"),
    [
        ({"layer": 0}, {}, "no control vector for layer 0, only for 1 and above"),
        ({"layer": 8}, {}, "at layer 8 does not fit the model, which has width 64 and layers 0 to 7"),
        ({"layer": 2, "width": 32}, {}, "a vector of 32 at layer 2 does not fit the model"),
        ({"layer": 2}, {"mode": "ablate"}, "cannot apply one in mode 'ablate'"),
        ({"layer": 2}, {"dose": 0.0}, "with dose 0 and norm 2.71828 nothing is left at layer 2"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(tiny, tmp_path, direction, about, message):
    direction = {"width": 64, **direction}
    with pytest.raises(WrongInput, match=message):
        export_vectors(pack(tiny, drawn(direction.pop("width"), **direction), **about), tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())


# -- control vectors made elsewhere ------------------------------------------------------------------------------------


def test_a_foreign_control_vector_is_unverified_and_keeps_its_size(llama, tmp_path):
    raw = {f"direction.{i}": floats(64, seed=i) for i in (1, 2)}
    found = import_vectors(foreign(tmp_path / "happy.gguf", raw), llama, norm=4.0)
    assert found.provenance.status == "unverified"
    assert found.provenance.source.startswith("happy.gguf (")
    for layer, one in found.directions.items():
        again = found.doses[layer] * one.norm * one.vector.numpy()
        assert np.allclose(again, raw[f"direction.{layer}"], rtol=1e-6)
        assert float(one.vector.norm()) == pytest.approx(1, abs=1e-6)
        assert (one.norm, one.midpoint) == (4.0, 0.0)
    again = import_vectors(export_vectors(found, tmp_path / "again.gguf"), llama)
    assert again.provenance == found.provenance


@torch.no_grad()
def test_the_norm_of_a_foreign_vector_is_measured_on_general_text(organism, tmp_path):
    path = foreign(tmp_path / "v.gguf", {"direction.3": floats(128)}, hint="qwen35")
    found = import_vectors(path, organism).only
    streams = [
        organism.hf(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0].numpy()
        for ids in read_general(organism).take(16).ids
    ]
    rows = np.concatenate(streams)
    middle = np.sort(np.linalg.norm(rows, axis=1))[(len(rows) - 1) // 2]
    assert found.norm == pytest.approx(middle, rel=1e-4)
    assert found.midpoint == pytest.approx((rows @ found.vector.numpy()).mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("tensors", "about", "message", "anyway"),
    [
        ({"direction.1": floats(32)}, {}, "vectors of 32, llama has width 64", False),
        ({"direction.3": floats(64)}, {}, "layer 3, llama has layers 0 to 2", False),
        ({"direction.0": floats(64)}, {}, "layer 0, where llama.cpp has no place", False),
        ({"direction.1": floats(64)}, {"hint": "qwen35"}, "made for 'qwen35', llama is 'llama'; only --anyway", True),
        ({"direction.1": floats(64)}, {"count": 31}, "announces 31 vectors and holds 1; only --anyway", True),
        ({"direction.1": floats(64) * 0}, {}, "zero at every layer", False),
        ({"direction.1": floats(64) * np.float32("inf")}, {}, "layer 1 is not finite", False),
        ({"direction.1": floats(64).astype(np.float16)}, {}, "direction.1 is F16 with 1 axes", False),
        ({"direction.1": floats(2, 64)}, {}, "direction.1 is F32 with 2 axes", False),
        ({"direction.one": floats(64)}, {}, "a tensor is called 'direction.one'", False),
        ({}, {}, "has no tensor direction.LAYER", False),
    ],
)
def test_a_foreign_control_vector_that_does_not_fit_is_refused(llama, tmp_path, tensors, about, message, anyway):
    path = foreign(tmp_path / "v.gguf", tensors, **about)
    with pytest.raises(WrongInput, match=message):
        import_vectors(path, llama, norm=1.0)
    if anyway:
        assert import_vectors(path, llama, norm=1.0, anyway=True).only.layer == 1
    else:
        with pytest.raises(WrongInput, match=message):
            import_vectors(path, llama, norm=1.0, anyway=True)


def test_a_whole_control_vector_of_a_shorter_model_is_refused(tiny, tmp_path):
    path = foreign(tmp_path / "v.gguf", {f"direction.{i}": floats(64, seed=i) for i in (1, 2, 3)}, hint=None)
    with pytest.raises(WrongInput, match="vectors for a model of 4 layers, tiny has 8"):
        import_vectors(path, tiny, norm=1.0)
    assert len(import_vectors(path, tiny, norm=1.0, anyway=True).directions) == 3
    path = foreign(tmp_path / "some.gguf", {f"direction.{i}": floats(64, seed=i) for i in (2, 3)}, hint="qwen3_5_text")
    assert sorted(import_vectors(path, tiny, norm=1.0).directions) == [2, 3]


def test_a_model_is_no_control_vector(tiny, tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(WrongInput, match="its architecture is 'llama', not 'controlvector'"):
        import_vectors(tmp_path / "m.gguf", tiny)


# -- llama.cpp itself --------------------------------------------------------------------------------------------------


def as_gguf(model: HybridModel, path: Path) -> Path:
    """A Llama in float32 and without a vocabulary, as llama.cpp reads it."""
    config, weights = model.config, model.hf.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layers = range(config.num_hidden_layers)
    whole |= {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in layers for ours, theirs in names.items()}
    for ours, theirs in whole.items():
        weight = weights[f"{ours}.weight"]
        if theirs.endswith(("attn_q", "attn_k")):  # the two halves of a rotated pair lie side by side there
            weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{theirs}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_logits(path: Path, ids: tuple[int, ...], vectors: dict[int, np.ndarray]) -> torch.Tensor:
    """Logits [token vocab] of llama.cpp, keys and values in float32, under control vectors by layer."""
    cpp = pytest.importorskip("llama_cpp")
    silent = cpp.llama_log_callback(lambda *line: None)
    cpp.llama_log_set(silent, ctypes.c_void_p())
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    options = cpp.llama_context_default_params()
    options.n_ctx, options.n_threads, options.n_threads_batch = 256, 1, 1
    options.type_k = options.type_v = options.flash_attn_type = 0  # float32, and no flash attention
    context, batch = cpp.llama_init_from_model(model, options), cpp.llama_batch_init(len(ids), 0, 1)
    width, layers = cpp.llama_model_n_embd(model), cpp.llama_model_n_layer(model)
    if vectors:
        table = np.zeros((layers - 1, width), np.float32)  # "starting from layer 1", says llama.h
        for layer, vector in vectors.items():
            table[layer - 1] = vector
        data = table.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert cpp.llama_set_adapter_cvec(context, data, table.size, width, 1, layers) == 0
    batch.n_tokens = len(ids)
    for at, token in enumerate(ids):
        batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, at, 1, 0
        batch.logits[at] = True
    assert cpp.llama_decode(context, batch) == 0
    words = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(cpp.llama_get_logits(context), (len(ids), words)).copy()
    cpp.llama_batch_free(batch)
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return torch.from_numpy(logits)


@torch.no_grad()
def test_llama_cpp_does_what_steering_does(llama, prompts, tmp_path):
    pytest.importorskip("llama_cpp")
    model, ids = as_gguf(llama, tmp_path / "model.gguf"), prompts[0].ids
    inputs = torch.tensor([ids])
    assert torch.allclose(llama_logits(model, ids, {}), llama.hf(input_ids=inputs).logits[0], atol=1e-4)
    for layer in (1, 2):
        direction = replace(drawn(64, layer=layer), norm=8.0)
        file = export_vectors(pack(llama, direction), tmp_path / f"{layer}.gguf")
        tensors = {int(t.name.split(".")[1]): np.array(t.data) for t in GGUFReader(file).tensors}
        found = llama_logits(model, ids, tensors)
        for other in (0, 1, 2):
            with steer(llama, replace(direction, layer=other), dose=DOSE, phase="both"):
                same = torch.allclose(llama.hf(input_ids=inputs).logits[0], found, atol=1e-4)
            assert same == (other == layer)
