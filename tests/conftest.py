"""Models that every test file may use. They are shared by the whole session: copy one before changing its weights."""

# ruff: noqa: E402 - the import hook comes first

from __future__ import annotations

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as it is for pyright

# Annotations, with shapes and dtypes, are checked while tests run; this has to come before the suite is imported.
install_import_hook(["probes", "training", "analysis", "dispositions"], f"{__name__}.checked")

import math
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from probes.capture import Capture
from probes.model import HybridModel, load
from probes.prompts import Prompt, render

torch.set_num_threads(1)


def assert_same(one: Capture, other: Capture, tolerance: float = 0.0) -> None:
    """Equal captures, site by site; `tolerance` is relative to the largest value of a tensor."""
    assert one.sites == other.sites
    assert len(one) == len(other)
    for site in one.sites:
        for layer in one.layers(site):
            for a, b in zip(one[site, layer], other[site, layer], strict=True):
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                assert (a - b).abs().max() <= tolerance * b.abs().max(), (site, layer)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked during this test: for what is refused by the suite itself, whatever its type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The organism's tokenizer: words of its grammar, a chat template, left padding."""
    from training.organism import build_tokenizer

    return build_tokenizer()


def qwen_config(tokenizer: Any) -> Qwen3_5TextConfig:
    """Eight layers (attention at 3 and 7); two key heads serve four value heads, d_k differs from d_v."""
    return Qwen3_5TextConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64), hidden_size=64, intermediate_size=96, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_key_head_dim=16, linear_value_head_dim=24,
        linear_num_key_heads=2, linear_num_value_heads=4, tie_word_embeddings=True, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def wake(hf: torch.nn.Module) -> torch.nn.Module:
    """Give a random model states that remember and norms that are not all the identity."""
    from training.organism import init_gates

    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.mul_(3)  # a standard deviation of 0.02 would leave the embeddings to dominate everything
        for module in hf.modules():
            if hasattr(module, "A_log"):
                init_gates(module)
    return hf


@pytest.fixture(scope="session")
def tiny(tokenizer: Any) -> HybridModel:
    """A random Qwen3.5: float32, 6 GDN and 2 attention layers."""
    torch.manual_seed(0)
    return HybridModel(wake(Qwen3_5ForCausalLM(qwen_config(tokenizer))), tokenizer, name="tiny")


@pytest.fixture(scope="session")
def llama(tokenizer: Any) -> HybridModel:
    """A random Llama: float32, three attention layers, no GDN."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64), hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return HybridModel(wake(LlamaForCausalLM(config)), tokenizer, name="llama")


@pytest.fixture(scope="session")
def organism() -> HybridModel:
    """The organism that ships with the suite: trained, its truth known."""
    return load("organism")


@pytest.fixture(scope="session")
def prompts(tiny: HybridModel) -> list[Prompt]:
    """Seven prompts of different lengths, unsorted, with a system turn; for any model with the organism's tokenizer."""
    words = (
        "how was the soup ?",
        "the bridge leaks . the roof sticks . please seal the bridge .",
        "will the tower hold ?",
    )
    return [
        render(tiny, [{"role": "user", "content": " ".join([words[i % 3]] * repeats)}], system="be careful")
        for i, repeats in enumerate((3, 1, 2, 9, 1, 1, 5))
    ]
