"""Captures against transformers' own outputs, a float64 scan, and arithmetic that the sites must obey."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, qwen_config, wake
from torch import Tensor
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from dispositions.commands import Capture
from probes import capture as capture_module
from probes.behaviors import read_behavior
from probes.capture import POSITIONS, capture
from probes.errors import WrongInput
from probes.model import HybridModel, load
from probes.prompts import SPANS, Prompt, pad
from probes.sites import SITES, resolve
from probes.store import open_capture

EVERY = tuple(SITES)
NAMED = ", ".join(SITES)
WORDS = "last, all, mean:context, mean:direction, mean:decision, last:context, last:direction, last:decision, "
WORDS += "tokens:context, tokens:direction, tokens:decision, generated, mean:generated"
GDN = (0, 1, 2, 4, 5, 6)


def forward(model: HybridModel, prompt: Prompt, **options: bool) -> Any:
    """The plain forward of one prompt, without padding."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([prompt.ids]), **options)


# --- oracles


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_residuals_are_the_hidden_states_of_transformers(name, prompts, request):
    model = request.getfixturevalue(name)
    got = capture(model, prompts, positions="all", batch_tokens=200, progress=False)
    last = len(model.layers) - 1
    for i, prompt in enumerate(prompts):
        expected = forward(model, prompt, output_hidden_states=True).hidden_states
        for layer in range(last):
            torch.testing.assert_close(got["resid", layer][i], expected[layer + 1][0], rtol=0, atol=2e-5)
        with torch.no_grad():
            torch.testing.assert_close(model.decoder.norm(got["resid", last][i]), expected[-1][0], rtol=0, atol=2e-5)


def test_states_are_those_of_the_cache(tiny, prompts):
    got = capture(tiny, prompts, sites=("gdn.state",), batch_tokens=200, progress=False)
    for i, prompt in enumerate(prompts):
        cache = forward(tiny, prompt, use_cache=True).past_key_values
        for layer in GDN:
            expected = cache.layers[layer].recurrent_states[0][0]
            assert relative_error(got["gdn.state", layer][i], expected) < 1e-5


def test_states_are_those_of_decoding_token_by_token(tiny, prompts):
    got = capture(tiny, prompts[:1], sites=("gdn.state",), progress=False)
    cache: Any = None
    with torch.no_grad():
        for token in prompts[0].ids:
            cache = tiny.hf(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
    for layer in GDN:
        assert relative_error(got["gdn.state", layer][0], cache.layers[layer].recurrent_states[0][0]) < 1e-5


def test_states_are_those_of_a_float64_scan(tiny, prompts):
    got = capture(tiny, prompts, sites=("gdn.state",), batch_tokens=200, progress=False)
    for i in (0, 3):
        hidden = forward(tiny, prompts[i], output_hidden_states=True).hidden_states
        for layer in GDN:
            assert relative_error(got["gdn.state", layer][i], scanned_state(tiny, layer, hidden[layer][0])) < 1e-5


def layer_of(model: HybridModel, index: int) -> Any:
    """A layer whose modules may be looked into."""
    return model.layers[index]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def scanned_state(model: HybridModel, layer: int, stream: Tensor) -> Tensor:
    """S <- exp(g) S; u = beta (v - S^T k); S <- S + k u^T, token by token in float64. stream is [token d_model]."""
    block = copy.deepcopy(layer_of(model, layer).block).double()
    mixer, x = block.linear_attn, block.input_layernorm(stream.double())
    mixed = F.pad(mixer.in_proj_qkv(x).T, (3, 0)).unfold(1, 4, 1)  # [channel token kernel]
    mixed = F.silu((mixed * mixer.conv1d.weight).sum(-1)).T
    _, k, v = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    k = k.unflatten(-1, (mixer.num_k_heads, -1)).repeat_interleave(mixer.num_v_heads // mixer.num_k_heads, dim=1)
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    v = v.unflatten(-1, (mixer.num_v_heads, -1))
    beta = mixer.in_proj_b(x).sigmoid()
    g = -mixer.A_log.exp() * F.softplus(mixer.in_proj_a(x) + mixer.dt_bias)
    state = torch.zeros(mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim, dtype=torch.float64)
    for t in range(len(x)):
        state = state * g[t].exp()[:, None, None]
        u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + torch.einsum("hk,hv->hkv", k[t], u)
    return state


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_mixer_and_mlp_add_up_to_the_stream(name, prompts, request):
    model = request.getfixturevalue(name)
    got = capture(model, prompts, sites=("resid", "mixer", "mlp"), positions="all", progress=False)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            stream = model.decoder.embed_tokens(torch.tensor(prompt.ids))
        for layer in range(len(model.layers)):
            stream = stream + got["mixer", layer][i] + got["mlp", layer][i]
            torch.testing.assert_close(got["resid", layer][i], stream, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("name", "layers"), [("tiny", (3, 7)), ("llama", (0, 1, 2))])
def test_heads_through_the_output_projection_are_the_mixer(name, layers, prompts, request):
    model = request.getfixturevalue(name)
    got = capture(model, prompts, sites=("mixer", "attn.heads"), layers=layers, progress=False)
    assert got.axes("attn.heads") == ("prompt", "head", "d_head")
    for layer in layers:
        heads = got["attn.heads", layer]
        assert heads.shape == (len(prompts), 4, layer_of(model, layer).mixer.head_dim)
        projected = heads.flatten(1) @ layer_of(model, layer).mixer.o_proj.weight.detach().T
        torch.testing.assert_close(projected, got["mixer", layer], rtol=0, atol=1e-5)
        assert got["mixer", layer].abs().max() > 0.01


def test_heads_lie_head_by_head(tiny, prompts):
    """Head 2 alone, through its own columns of o_proj, is what the mixer loses when the others are silenced."""
    got = capture(tiny, prompts[:1], sites=("attn.heads",), layers=[3], progress=False)["attn.heads", 3]
    width = layer_of(tiny, 3).mixer.head_dim
    keep = slice(2 * width, 3 * width)

    def only_head_2(module, args):
        silenced = torch.zeros_like(args[0])
        silenced[..., keep] = args[0][..., keep]
        return (silenced,)

    handle = layer_of(tiny, 3).mixer.o_proj.register_forward_pre_hook(only_head_2)
    try:
        alone = capture(tiny, prompts[:1], sites=("mixer",), layers=[3], progress=False)["mixer", 3]
    finally:
        handle.remove()
    weight = layer_of(tiny, 3).mixer.o_proj.weight.detach()[:, keep]
    torch.testing.assert_close(got[:, 2] @ weight.T, alone, rtol=0, atol=1e-5)


# --- positions, batches, padding


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_prompt_gives_the_same_alone_and_in_company(positions, tiny, prompts):
    together = capture(tiny, prompts, sites=EVERY, positions=positions, progress=False)
    for i, prompt in enumerate(prompts):
        alone = capture(tiny, [prompt], sites=EVERY, positions=positions, progress=False)
        for site in EVERY:
            for layer in alone.layers(site):
                got, expected = together[site, layer][i], alone[site, layer][0]
                assert got.shape == expected.shape
                assert (got - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_batching_does_not_reorder(tiny, prompts):
    one = capture(tiny, prompts, sites=EVERY, positions="all", batch_tokens=1, progress=False)
    some = capture(tiny, prompts, sites=EVERY, positions="all", batch_tokens=150, progress=False)
    assert len(one.parts) == len(prompts)
    assert 1 < len(some.parts) < len(prompts)
    assert_same(one, some, tolerance=1e-5)
    assert [len(t) for t in one["resid", 0]] == [len(p) for p in prompts]


def test_padding_does_not_leak(tiny, prompts, monkeypatch):
    """The same batch, 17 columns wider."""
    expected = capture(tiny, prompts, sites=EVERY, positions="all", progress=False)

    def wide(model, sequences, *, batch_tokens):
        whole = pad([*sequences, [5] * (max(map(len, sequences)) + 17)], pad_id=0, device=model.device)
        yield type(whole)(
            ids=whole.ids[:-1], mask=whole.mask[:-1], positions=whole.positions[:-1], rows=whole.rows[:-1]
        )

    monkeypatch.setattr(capture_module, "batches", wide)
    assert_same(capture(tiny, prompts, sites=EVERY, positions="all", progress=False), expected, tolerance=1e-5)


def test_nan_in_the_padding_stays_there(tiny, prompts):
    """A mean by weights would spread it: zero times NaN is NaN."""

    def poison(module, args, output):
        output = output.clone()
        output[:, 0] = torch.nan  # the first column is padding for every prompt but the longest
        return output

    shorter = [p for p in prompts if len(p) < max(map(len, prompts))]
    handle = layer_of(tiny, 7).block.register_forward_hook(poison)
    try:
        got = capture(tiny, [*shorter, prompts[3]], layers=[7], positions="mean:context", progress=False)["resid", 7]
    finally:
        handle.remove()
    assert got[: len(shorter)].isfinite().all()
    assert got[-1].isnan().all()


@pytest.mark.parametrize("span", SPANS)
def test_mean_over_a_span(span, tiny, prompts):
    tokens = capture(tiny, prompts, sites=("resid", "attn.heads"), layers=[3], positions="all", progress=False)
    means = capture(tiny, prompts, sites=("resid", "attn.heads"), layers=[3], positions=f"mean:{span}", progress=False)
    for site in ("resid", "attn.heads"):
        for i, prompt in enumerate(prompts):
            start, stop = prompt.spans[span]
            expected = tokens[site, 3][i][start:stop].double().mean(0)
            torch.testing.assert_close(means[site, 3][i].double(), expected, rtol=1e-5, atol=1e-6)


def test_last_is_the_last_of_all(tiny, prompts):
    tokens = capture(tiny, prompts, sites=EVERY, positions="all", progress=False)
    last = capture(tiny, prompts, sites=EVERY, positions="last", progress=False)
    for site in ("resid", "mixer", "mlp", "attn.heads"):
        for layer in last.layers(site):
            assert torch.equal(last[site, layer], torch.stack([t[-1] for t in tokens[site, layer]]))
    for layer in GDN:  # the state is the last one whatever the positions
        assert torch.equal(last["gdn.state", layer], tokens["gdn.state", layer])


def test_bfloat16_is_kept_and_means_are_summed_in_float32(tiny, prompts):
    model = HybridModel(copy.deepcopy(tiny.hf).to(torch.bfloat16), tiny.tokenizer, name="half")
    tokens = capture(model, prompts, sites=EVERY, positions="all", progress=False)
    means = capture(model, prompts, sites=EVERY, positions="mean:context", progress=False)
    assert means["resid", 2].dtype == torch.bfloat16
    assert means["gdn.state", 2].dtype == torch.float32
    for i, prompt in enumerate(prompts):
        stop = prompt.spans["context"][1]
        assert torch.equal(means["resid", 2][i], tokens["resid", 2][i][:stop].float().mean(0).bfloat16())


# --- what a capture leaves behind, and what it costs


def test_the_model_is_as_it_was(tiny, prompts):
    before = forward(tiny, prompts[0]).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.hf.modules())
    for layers in (None, [1]):
        capture(tiny, prompts, layers=layers, progress=False)
    assert torch.equal(forward(tiny, prompts[0]).logits, before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.hf.modules()) == hooks
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad is None for p in tiny.hf.parameters())


def test_only_what_was_asked_for_is_kept(tiny, prompts):
    got = capture(tiny, prompts, sites=EVERY, progress=False)
    for part in got.parts:
        assert isinstance(part.tensors, Mapping)
        for tensor in part.tensors.values():
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_layers_after_the_last_one_asked_for_do_not_run(tiny, prompts):
    ran: list[int] = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, index=layer.index: ran.append(index)) for layer in tiny.layers
    ]
    try:
        capture(tiny, prompts, layers=[0, 2], progress=False)
        assert sorted(set(ran)) == [0, 1, 2]
        ran.clear()
        for site in ("gdn.state", "gdn.conv", "gdn.attention", "gdn.attribution"):
            capture(tiny, prompts, sites=(site,), layers=[0], progress=False)
        capture(tiny, prompts, sites=("resid",), layers=[0], chunk_tokens=20, progress=False)
        assert sorted(set(ran)) == [0]
    finally:
        for handle in handles:
            handle.remove()


def test_a_hook_on_a_layer_is_seen_in_its_stream(tiny, prompts):
    plain = capture(tiny, prompts, progress=False)
    for layer in (2, 7):
        handle = layer_of(tiny, layer).block.register_forward_hook(lambda module, args, output: output + 3)
        try:
            got = capture(tiny, prompts, progress=False)
        finally:
            handle.remove()
        torch.testing.assert_close(got["resid", layer], plain["resid", layer] + 3)
        assert torch.equal(got["resid", layer - 1], plain["resid", layer - 1])


def test_a_hook_on_a_block_is_seen_in_what_it_adds(tiny, prompts):
    sites = ("resid", "mixer", "mlp", "attn.heads", "gdn.heads")
    plain = capture(tiny, prompts, sites=sites, progress=False)
    handle = layer_of(tiny, 2).mixer.register_forward_hook(lambda module, args, output: 2 * output)
    try:
        got = capture(tiny, prompts, sites=sites, progress=False)
    finally:
        handle.remove()
    torch.testing.assert_close(got["mixer", 2], 2 * plain["mixer", 2])
    assert torch.equal(got["gdn.heads", 2], plain["gdn.heads", 2])
    stream = got["resid", 1] + got["mixer", 2] + got["mlp", 2]
    torch.testing.assert_close(got["resid", 2], stream, rtol=0, atol=2e-5)


# --- other architectures


def test_attention_only(llama, prompts):
    got = capture(llama, prompts, sites=("resid", "attn.heads"), progress=False)
    assert got.layers("resid") == got.layers("attn.heads") == (0, 1, 2)
    with pytest.raises(WrongInput, match=r"^site 'gdn.state' does not exist in llama: it has no gdn layers$"):
        capture(llama, prompts, sites=("gdn.state",), progress=False)


def test_a_multimodal_checkpoint_gives_what_its_language_model_gives(tokenizer, tiny, prompts, tmp_path):
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(text_config=qwen_config(tokenizer).to_dict(), vision_config=vision)
    hf: Any = wake(Qwen3_5ForConditionalGeneration(config))
    hf.model.language_model.load_state_dict(tiny.hf.model.state_dict())
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model.hf) is Qwen3_5ForConditionalGeneration
    expected = capture(tiny, prompts, sites=EVERY, progress=False)
    assert_same(capture(model, prompts, sites=EVERY, progress=False), expected, tolerance=1e-6)


# --- what is refused


@pytest.mark.parametrize(
    ("site", "layers", "message"),
    [
        ("gdn.stat", None, f"unknown site 'gdn.stat'; allowed are {NAMED}"),
        ("resid", [12], "layer 12 is out of range: tiny has layers 0 to 7"),
        ("resid", [-1], "layer -1 is negative: layers count from the first, tiny has layers 0 to 7"),
        ("resid", [], "no layers were given; tiny has layers 0 to 7"),
        (
            "gdn.state",
            [0, 3],
            "site 'gdn.state' does not exist at layer 3 (attention); it exists at layers 0, 1, 2, 4, 5, 6",
        ),
        ("attn.heads", [4], "site 'attn.heads' does not exist at layer 4 (gdn); it exists at layers 3, 7"),
    ],
)
def test_wrong_sites_and_layers(site, layers, message, tiny):
    with pytest.raises(WrongInput) as refused:
        resolve(tiny, site, layers)
    assert str(refused.value) == message


def test_resolve(tiny):
    assert resolve(tiny, "gdn.state") == GDN
    assert resolve(tiny, "attn.heads") == (3, 7)
    assert resolve(tiny, "mlp", [5, 2, 5]) == (2, 5)
    assert resolve(tiny, "resid", range(8)) == tuple(range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"positions": "first"},
            f"unknown positions 'first'; allowed are {WORDS}, or token indices for each prompt",
        ),
        ({"sites": ()}, f"no sites were given; allowed are {NAMED}"),
        ({"sites": ("resid", "nope")}, f"unknown site 'nope'; allowed are {NAMED}"),
        ({"layers": {"mlp": [1]}}, "layers were given for 'mlp', which is not captured; captured are resid"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, saw 0"),
        ({"chunk_tokens": 1}, "chunk_tokens must be at least 2, saw 1"),
        ({"new_tokens": -1}, "new_tokens must be at least 0, saw -1"),
        ({"positions": "generated"}, "positions 'generated' need new_tokens of at least 1, saw 0"),
        (
            {"new_tokens": 500},
            "prompt 0 of 25 tokens and 500 new ones are longer than the context of tiny, 512 tokens",
        ),
        ({"positions": {"mlp": "all"}}, "positions were given for 'mlp', which is not captured; captured are resid"),
        ({"positions": [[0]]}, "positions by index need one list for each prompt: saw 1 for 7"),
        ({"positions": [[0, 3]] * 6 + [[99]]}, "prompt 6 has no token 99; it has tokens 0 to 34"),
        ({"positions": [[-1, 3]] * 7}, "token indices must be given, and ascend; saw [-1, 3] for prompt 0"),
        ({"positions": [[]] * 7}, "token indices must be given, and ascend; saw [] for prompt 0"),
        (
            {"sites": ("gdn.conv",), "positions": {"gdn.conv": "mean:context"}},
            "site 'gdn.conv' has no 'mean:context': it sums up all tokens so far, and is kept after single tokens "
            "(last, last:<span>, tokens:<span>, generated, or token indices for each prompt)",
        ),
        (
            {"sites": ("gdn.state",), "positions": "generated", "new_tokens": 65},
            "site 'gdn.state' is kept after at most 64 tokens of a prompt, saw 65 for prompt 0",
        ),
    ],
)
def test_wrong_requests(change, message, tiny, prompts):
    with pytest.raises(WrongInput) as refused:
        capture(tiny, prompts, progress=False, **change)
    assert str(refused.value) == message


def test_wrong_prompts(tiny, prompts):
    with pytest.raises(WrongInput, match=r"^no prompts were given$"):
        capture(tiny, [], progress=False)
    empty = Prompt(text="", ids=(), spans=dict.fromkeys(SPANS, (0, 0)))
    with pytest.raises(WrongInput, match=r"^prompt 1 has no tokens$"):
        capture(tiny, [prompts[0], empty], progress=False)
    bare = Prompt(text="", ids=(5, 6), spans={"context": (0, 0), "direction": (0, 1), "decision": (1, 2)})
    with pytest.raises(WrongInput, match=r"^prompt 0 has no tokens in its context"):
        capture(tiny, [bare], positions="mean:context", progress=False)


def test_a_model_in_training_mode_is_refused(tiny, prompts):
    tiny.hf.train()
    try:
        with pytest.raises(WrongInput, match=r"^tiny is in training mode"):
            capture(tiny, prompts, progress=False)
    finally:
        tiny.hf.eval()


def test_reading_what_was_not_captured(tiny, prompts):
    got = capture(tiny, prompts, layers=[1, 2, 5], progress=False)
    with pytest.raises(WrongInput, match=r"^this capture has no site 'mlp'; it has resid$"):
        got["mlp", 1]
    with pytest.raises(WrongInput, match=r"^this capture has no layer 3 of 'resid'; it has layers 1-2, 5$"):
        got["resid", 3]


# --- how it reads


def test_summary(tiny, prompts):
    got = capture(tiny, prompts, sites="gdn.state", layers={"gdn.state": [4, 0]}, progress=False)
    size = len(prompts) * 4 * 16 * 24 * 4
    assert got.layers("gdn.state") == (0, 4)
    assert got.axes("gdn.state") == ("prompt", "v_head", "d_k", "d_v")
    assert got["gdn.state", 4].shape == (len(prompts), 4, 16, 24)
    assert got.nbytes == 2 * size
    assert str(got) == "capture of tiny: 7 prompts, gdn.state at layers 0, 4, positions last, 0.1 MiB"
    assert list(got.frame().columns) == ["site", "layer", "axes", "shape", "dtype", "bytes"]
    assert got.frame().iloc[1].tolist() == ["gdn.state", 4, "prompt v_head d_k d_v", (7, 4, 16, 24), "float32", size]


def test_bytes_of_a_ragged_capture(tiny, prompts):
    got = capture(tiny, prompts, layers=[0, 1], positions="all", progress=False)
    assert got.axes("resid") == ("prompt", "token", "d_model")
    assert got.nbytes == sum(t.nbytes for layer in (0, 1) for t in got["resid", layer])
    assert got.frame()["shape"].tolist() == [(7, -1, 64)] * 2


# --- the command


def test_the_command_takes_positions_by_site_and_new_tokens(organism, tmp_path, capsys):
    command = Capture(
        behavior="sentiment", sites=("resid", "gdn.state"), layers=(1,), new_tokens=2,
        positions=("all", "gdn.state=last:direction"), out=tmp_path,
    )  # fmt: skip
    assert command.run() == 0
    assert "positions all (resid), last:direction (gdn.state)" in capsys.readouterr().out
    got = open_capture(tmp_path)
    assert got.recipe["positions"] == {"resid": "all", "gdn.state": "last:direction"}
    assert got.recipe["new_tokens"] == 2
    items = read_behavior("sentiment").items
    lengths = [len(item.prompt(organism)) + len(ids) for item, ids in zip(items, got.generated, strict=True)]
    assert [len(values) for values in got["resid", 1]] == lengths
    assert got["gdn.state", 1].ndim == 4


@pytest.mark.parametrize("words", [("last", "all"), ("resid=last", "resid=all")])
def test_the_command_refuses_two_words_for_one_site(words, tmp_path):
    command = Capture(behavior="sentiment", positions=words, out=tmp_path / "c")
    with pytest.raises(WrongInput, match=r"^positions are one word, and SITE=WORD once for a site; saw "):
        command.run()
