"""What loads, what it is known to be, and what is refused."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen3_5ForCausalLM

from probes.errors import WrongInput
from probes.model import ORGANISM, HybridModel, load


def test_layers_are_known_by_kind(tiny, llama):
    assert [layer.kind for layer in tiny.layers] == ["gdn", "gdn", "gdn", "attention"] * 2
    assert [layer.index for layer in tiny.of_kind("attention")] == [3, 7]
    assert all(layer.mixer is layer.block.self_attn for layer in llama.layers)


def test_the_organism_is_a_plain_transformers_checkpoint(organism):
    hf: Any = AutoModelForCausalLM.from_pretrained(ORGANISM)
    tokenizer: Any = AutoTokenizer.from_pretrained(ORGANISM)
    assert type(hf) is Qwen3_5ForCausalLM
    assert [layer.kind for layer in organism.layers].count("gdn") == 6
    assert hf.config.linear_key_head_dim == hf.config.linear_value_head_dim == 64
    assert hf.config.head_dim >= 32
    assert 1_000_000 < sum(p.numel() for p in hf.parameters()) < 3_500_000
    assert sum(path.stat().st_size for path in ORGANISM.iterdir()) < 12 * 2**20
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how was the soup ?"}], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        assert torch.equal(hf(**ids).logits, organism.hf(**ids).logits)


def test_a_saved_model_loads_from_its_folder_in_the_dtype_asked_for(tiny, tmp_path):
    tiny.hf.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    same, half = load(tmp_path), load(tmp_path, dtype="bfloat16")
    assert same.weights_hash == tiny.weights_hash != half.weights_hash
    assert half.dtype == torch.bfloat16
    assert "8 layers (6 GDN, 2 attention)" in str(same)


def test_the_hash_sees_a_single_changed_weight(tiny):
    before = tiny.weights_hash
    weight = tiny.layers[0].mlp.down_proj.weight
    old = weight[3, 5].item()
    with torch.no_grad():
        weight[3, 5] = old + 1e-3
        after = tiny.weights_hash
        weight[3, 5] = old
    assert after != before
    assert tiny.weights_hash == before


def test_other_architectures_are_refused_in_one_line(tokenizer):
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=300))
    with pytest.raises(WrongInput, match=r"GPT2LMHeadModel is not supported: no decoder with \.layers"):
        HybridModel(gpt, tokenizer)


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(WrongInput, match=r"no config\.json in model folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_text"}))
    with pytest.raises(WrongInput, match=r"no weights in model folder '.*': expected \*\.safetensors"):
        load(tmp_path)
    with pytest.raises(WrongInput, match="no model at 'nonsense'; allowed are organism"):
        load("nonsense")
    with pytest.raises(WrongInput, match="no such file"):
        load(tmp_path / "x.gguf")


def test_envoys_are_found_for_the_models_own_modules_only(tiny, llama):
    assert tiny.envoy_of(tiny.layers[2].mixer) is not None
    with pytest.raises(WrongInput, match="is not a module of llama"):
        llama.envoy_of(tiny.layers[2].mixer)
