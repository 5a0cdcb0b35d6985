"""What a capture says about the inside of GDN and attention blocks, at any token, in prompts and in answers.

Oracles: a float64 scan that goes step by step from the weights, transformers' eager attention and its cache, prompts
cut short, a pass over the finished answer, and the identities that hold between sites.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from probes.capture import RECURRENCE, capture, recurrences
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Prompt
from probes.recurrence import left_padded, scan
from probes.sites import SITES
from probes.taps import GDNCall, Run, tapped

EVERY = tuple(SITES)
GDN = (0, 1, 2, 4, 5, 6)
INSIDE = {name: (0, 5) if site.kind == "gdn" else (3,) for name, site in SITES.items() if site.kind}


def take(model: HybridModel, prompts: list[Prompt], *sites: str, **options: Any) -> Any:
    layers = {site: INSIDE[site] for site in sites} if model.name == "tiny" else None
    return capture(model, prompts, **{"sites": sites, "layers": layers, "progress": False, **options})


def cut(prompt: Prompt, length: int) -> Prompt:
    return replace(prompt, ids=prompt.ids[:length])


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To a fraction of the largest value; float32 sums of some hundred terms are good to about 1e-6."""
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


# --- GDN blocks


@torch.no_grad()
def scanned(model: HybridModel, layer: int, stream: Tensor) -> dict[str, Tensor]:
    """What a GDN block does with a stream [token d_model], in float64 and token by token."""
    block: Any = copy.deepcopy(model.layers[layer].block).double()
    mixer, x = block.linear_attn, block.input_layernorm(stream.double())
    inputs = F.pad(mixer.in_proj_qkv(x).T, (3, 0)).unfold(1, 4, 1)  # [channel token kernel]
    mixed = F.silu((inputs * mixer.conv1d.weight).sum(-1)).T
    q, k, v = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    q, k = (side.unflatten(-1, (mixer.num_k_heads, -1)) for side in (q, k))
    v = v.unflatten(-1, (mixer.num_v_heads, -1))
    beta = mixer.in_proj_b(x).sigmoid()
    decay = -mixer.A_log.exp() * F.softplus(mixer.in_proj_a(x) + mixer.dt_bias)
    gate = mixer.in_proj_z(x).unflatten(-1, (mixer.num_v_heads, -1))
    times = mixer.num_v_heads // mixer.num_k_heads
    unit_q, unit_k = (
        (side / (side.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(times, 1) for side in (q, k)
    )
    S = torch.zeros(mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim, dtype=torch.float64)
    states, readouts = [], []
    for t in range(len(x)):
        S = S * decay[t].exp()[:, None, None]
        u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", S, unit_k[t]))
        S = S + torch.einsum("hk,hv->hkv", unit_k[t], u)
        states.append(S)
        readouts.append(torch.einsum("hkv,hk->hv", S, unit_q[t]) / mixer.head_k_dim**0.5)
    found = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "gate": gate, "readout": torch.stack(readouts)}
    found |= {"state": torch.stack(states), "conv": inputs.transpose(0, 1)}
    return {f"gdn.{name}": value for name, value in found.items()}


def test_gdn_sites_are_those_of_a_float64_scan(tiny, prompts):
    indices = [[0, 2, len(prompt) // 2, -1] for prompt in prompts]
    names = tuple(f"gdn.{name}" for name in "q k v beta decay gate readout state conv".split())
    got = take(tiny, prompts, *names, positions=indices, batch_tokens=200)
    assert got.axes("gdn.state") == ("prompt", "token", "v_head", "d_k", "d_v")
    for i in (1, 3):
        with torch.no_grad():
            hidden = tiny.hf(input_ids=torch.tensor([prompts[i].ids]), output_hidden_states=True).hidden_states
        for layer in INSIDE["gdn.q"]:
            expected = scanned(tiny, layer, hidden[layer][0])
            assert set(expected) == set(names)
            for name, value in expected.items():
                close(got[name, layer][i], value[indices[i]])


def test_heads_through_the_output_projection_are_the_mixer(tiny, prompts):
    got = capture(tiny, prompts, sites=("mixer", "gdn.heads"), layers=GDN, positions="mean:direction", progress=False)
    assert got.axes("gdn.heads") == ("prompt", "v_head", "d_v")
    for layer in GDN:
        mixer: Any = tiny.layers[layer].mixer
        close(got["gdn.heads", layer].flatten(1) @ mixer.out_proj.weight.detach().T, got["mixer", layer])


def test_heads_are_normed_and_gated_readouts(tiny, prompts):
    got = take(tiny, prompts, "gdn.readout", "gdn.gate", "gdn.heads")
    for layer in INSIDE["gdn.heads"]:
        mixer: Any = tiny.layers[layer].mixer
        readout, gate = got["gdn.readout", layer], got["gdn.gate", layer]
        normed = F.rms_norm(readout, readout.shape[-1:], mixer.norm.weight.detach(), eps=mixer.norm.variance_epsilon)
        close(got["gdn.heads", layer], normed * F.silu(gate))


def test_implicit_attention_times_values_is_the_readout(tiny, prompts):
    got = take(tiny, prompts, "gdn.v", "gdn.readout", "gdn.attention", positions="all")
    few = take(tiny, prompts, "gdn.attention", positions="last:direction", batch_tokens=100)
    assert got.axes("gdn.attention") == ("prompt", "token", "v_head", "source")
    assert few.axes("gdn.attention") == ("prompt", "v_head", "source")
    for layer in INSIDE["gdn.attention"]:
        for i, prompt in enumerate(prompts):
            weights = got["gdn.attention", layer][i]
            assert weights.shape == (len(prompt), 4, len(prompt))
            later = torch.ones(len(prompt), len(prompt), dtype=torch.bool).triu(1)
            assert not weights.transpose(1, 2)[later].any()
            readout = torch.einsum("thc,chv->thv", weights, got["gdn.v", layer][i])
            close(readout, got["gdn.readout", layer][i])
            close(few["gdn.attention", layer][i], weights[prompt.spans["direction"][1] - 1])


def test_attribution_is_what_is_left_of_each_write_in_the_state(tiny, prompts):
    prompts = [cut(prompt, 24) for prompt in prompts[:3]]  # left-padded, one is shorter
    indices = [[0, 9, -1], [5, 6, 22], [1, 2, 3]]
    got = take(tiny, prompts, "gdn.attribution", positions=indices, batch_tokens=60)
    assert got.axes("gdn.attribution") == ("prompt", "token", "v_head", "source")
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            hidden = tiny.hf(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        for layer in INSIDE["gdn.attribution"]:
            brought = scanned(tiny, layer, hidden[layer][0])
            k, v, beta = brought["gdn.k"].repeat_interleave(2, 1), brought["gdn.v"], brought["gdn.beta"]
            k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            left = torch.zeros_like(brought["gdn.state"])  # of each token's write
            for t in range(len(prompt)):
                left *= brought["gdn.decay"][t].exp()[:, None, None]
                left -= torch.einsum("hk,hl,shlv->shkv", beta[t, :, None] * k[t], k[t], left)
                left[t] = torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * v[t])
                if t in (chosen := [index % len(prompt) for index in indices[i]]):
                    state = brought["gdn.state"][t]
                    share = (left * state).sum((-2, -1)) / state.square().sum((-2, -1))
                    seen = got["gdn.attribution", layer][i][chosen.index(t)]
                    close(seen, share.T)
                    close(seen.sum(1), torch.ones(4))


def test_states_are_the_last_states_of_shorter_prompts(tiny, prompts):
    indices = [[1, len(prompt) // 3, len(prompt) - 2] for prompt in prompts]
    got = take(tiny, prompts, "gdn.state", "gdn.conv", positions=indices)
    for n in range(3):
        short = [cut(prompt, chosen[n] + 1) for prompt, chosen in zip(prompts, indices, strict=True)]
        expected = take(tiny, short, "gdn.state", "gdn.conv")
        for site in ("gdn.state", "gdn.conv"):
            for layer in INSIDE[site]:
                for i in range(len(prompts)):
                    close(got[site, layer][i][n], expected[site, layer][i])


def test_the_convolution_state_is_that_of_the_cache(tiny, prompts):
    got = take(tiny, [*prompts, cut(prompts[0], 2)], "gdn.conv")  # the last one is shorter than the kernel
    for i, prompt in enumerate([*prompts, cut(prompts[0], 2)]):
        with torch.no_grad():
            cache: Any = tiny.hf(input_ids=torch.tensor([prompt.ids]), use_cache=True).past_key_values
        for layer in INSIDE["gdn.conv"]:
            close(got["gdn.conv", layer][i], cache.layers[layer].conv_states[0][0])


def test_looking_at_states_on_the_way_changes_nothing_after(tiny, prompts):
    plain = capture(tiny, prompts, progress=False)
    looked = capture(
        tiny, prompts, sites=("resid", "gdn.state"), positions={"gdn.state": "tokens:decision"}, progress=False
    )
    for layer in range(8):
        close(looked["resid", layer], plain["resid", layer])
    assert looked.axes("resid") == ("prompt", "d_model")
    assert looked.axes("gdn.state") == ("prompt", "token", "v_head", "d_k", "d_v")


# --- attention blocks


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_patterns_are_the_weights_of_eager_attention(name, prompts, request):
    model = request.getfixturevalue(name)
    got = capture(model, prompts, sites=("attn.pattern",), positions="all", batch_tokens=150, progress=False)
    mean = capture(model, prompts, sites=("attn.pattern",), positions="mean:context", progress=False)
    eager = copy.deepcopy(model.hf)
    eager.set_attn_implementation("eager")
    of_eager = HybridModel(eager, model.tokenizer, name=name)
    again = capture(of_eager, prompts, sites=("attn.pattern",), positions="all", progress=False)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = eager(input_ids=torch.tensor([prompt.ids]), output_attentions=True).attentions
        expected = [weights for weights in expected if weights is not None]
        for layer, weights in zip(got.layers("attn.pattern"), expected, strict=True):
            close(got["attn.pattern", layer][i], weights[0].transpose(0, 1))
            close(again["attn.pattern", layer][i], weights[0].transpose(0, 1))
            start, stop = prompt.spans["context"]
            close(mean["attn.pattern", layer][i], weights[0][:, start:stop].mean(1))


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_patterns_and_heads_follow_from_queries_keys_values_and_gate(name, prompts, request):
    model = request.getfixturevalue(name)
    gate = ("attn.gate",) if name == "tiny" else ()
    sites = ("attn.q", "attn.k", "attn.v", "attn.pattern", "attn.heads", *gate)
    got = capture(model, prompts, sites=sites, positions="all", progress=False)
    assert got.axes("attn.k") == ("prompt", "token", "head", "d_head")
    for layer in got.layers("attn.q"):
        for i in range(len(prompts)):
            q, k, v, pattern, heads = (got[site, layer][i] for site in sites[:5])
            assert (q.shape[1], k.shape[1]) == (4, 2)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = torch.einsum("thd,shd->ths", q, k) / q.shape[-1] ** 0.5
            later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)[:, None]
            close(pattern, scores.masked_fill(later, -torch.inf).softmax(-1))
            mixed = torch.einsum("ths,shd->thd", pattern, v)
            close(heads, mixed * got["attn.gate", layer][i].sigmoid() if gate else mixed)


def test_a_block_without_an_output_gate_has_no_gate(llama, prompts):
    with pytest.raises(WrongInput, match=r"^site 'attn.gate' does not exist in llama: it has no attention layers with"):
        capture(llama, prompts, sites=("attn.gate",), progress=False)


def test_patterns_of_a_sliding_window_keep_their_place(tokenizer, prompts):
    """Its cache drops the first keys, so in later pieces a pattern's first source is not the prompt's first token."""
    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, pad_token_id=0,
    )  # fmt: skip
    hf = MistralForCausalLM(config)
    model = HybridModel(hf, tokenizer, name="sliding")
    got = capture(model, prompts, sites=("attn.pattern",), positions="all", chunk_tokens=6, progress=False)
    eager = copy.deepcopy(hf)
    eager.set_attn_implementation("eager")
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            expected: Any = eager(input_ids=torch.tensor([prompt.ids]), output_attentions=True).attentions
        for layer in (0, 1):
            close(got["attn.pattern", layer][i], expected[layer][0].transpose(0, 1))


# --- positions


def test_every_way_to_say_where(tiny, prompts):
    """Everything is a choice from all tokens; "all" itself is held against oracles above."""
    sites = ("resid", "gdn.q", "gdn.heads", "attn.k", "attn.pattern")
    layers = {"resid": [3], "gdn.q": [2], "gdn.heads": [2]}
    options: dict[str, Any] = {"sites": sites, "layers": layers, "progress": False}
    every = capture(tiny, prompts, positions="all", **options)
    by_index = capture(tiny, prompts, positions=[[2, -3] for _ in prompts], **options)
    for span in ("context", "direction", "decision"):
        last = capture(tiny, prompts, positions=f"last:{span}", **options)
        tokens = capture(tiny, prompts, positions=f"tokens:{span}", **options)
        for site in sites:
            for layer in every.layers(site):
                for i, prompt in enumerate(prompts):
                    start, stop = prompt.spans[span]
                    close(tokens[site, layer][i], every[site, layer][i][start:stop], tolerance=1e-6)
                    close(last[site, layer][i], every[site, layer][i][stop - 1], tolerance=1e-6)
                    close(by_index[site, layer][i], every[site, layer][i][[2, -3]], tolerance=1e-6)
    by_site = capture(tiny, prompts, positions={"resid": "all", "attn.k": "last"}, **options)
    assert torch.equal(by_site["resid", 3][4], every["resid", 3][4])
    assert torch.equal(by_site["gdn.q", 2][4], every["gdn.q", 2][4][-1])


def test_a_capture_by_site_and_index_is_read_back(tiny, prompts, tmp_path):
    positions = {"gdn.state": [[0, -1]] * len(prompts), "attn.pattern": "mean:decision", "gdn.attention": "generated"}
    options = {"positions": positions, "new_tokens": 3, "batch_tokens": 120}
    memory = take(tiny, prompts, *positions, **options)
    disk = take(tiny, prompts, *positions, **options, out=tmp_path)
    assert_same(disk, memory)
    assert disk.recipe == memory.recipe
    assert disk.generated == memory.generated
    assert disk.frame().equals(memory.frame())
    for site in positions:
        size = sum(value.nbytes for layer in disk.layers(site) for value in disk[site, layer])
        assert disk.frame().groupby("site")["bytes"].sum()[site] == size
    assert disk.frame().set_index("site")["shape"]["attn.pattern"] == (7, 4, -1)
    said = "positions given by index (gdn.state), generated (gdn.attention), mean:decision (attn.pattern)"
    assert said in str(disk)


# --- long prompts, answers


def test_pieces_of_a_prompt_give_what_the_whole_gives(tiny, prompts):
    options: dict[str, Any] = {"positions": "tokens:direction"}
    whole = take(tiny, prompts, *INSIDE, **options)
    widths: list[int] = []
    handle = tiny.decoder.embed_tokens.register_forward_hook(lambda _, args, out: widths.append(args[0].shape[1]))
    try:
        pieces = take(tiny, prompts, *INSIDE, **options, chunk_tokens=9)
    finally:
        handle.remove()
    assert max(widths) == 9  # what bounds the memory
    assert_same(pieces, whole, tolerance=1e-5)
    for positions in ("mean:direction", "last"):
        options = {"sites": ("resid", "attn.pattern", "gdn.state"), "positions": positions, "progress": False}
        whole = capture(tiny, prompts, **options)
        assert_same(capture(tiny, prompts, **options, chunk_tokens=9), whole, tolerance=1e-5)


@pytest.fixture(scope="module")
def talker(tiny):
    """A random model repeats one token; this one is told to end its answers, some of them early."""
    hf = copy.deepcopy(tiny.hf)
    return HybridModel(hf, tiny.tokenizer, name="tiny")


@pytest.fixture(scope="module")
def talk(talker, prompts):
    """An answer of each prompt, ended by the token that the longest one says third."""
    free = capture(talker, prompts, layers=[0], new_tokens=8, progress=False).generated
    talker.hf.generation_config.eos_token_id = [free[3][2]]
    return capture(
        talker, prompts, layers=INSIDE, sites=tuple(INSIDE), positions="generated", new_tokens=8, progress=False
    )


def test_answers_are_those_of_greedy_generation(talker, talk, prompts):
    lengths = set()
    for prompt, got in zip(prompts, talk.generated, strict=True):
        out = talker.hf.generate(
            input_ids=torch.tensor([prompt.ids]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8, do_sample=False, pad_token_id=talker.tokenizer.pad_token_id,
        )  # fmt: skip
        assert got == tuple(out[0, len(prompt) :].tolist())
        lengths.add(len(got))
    assert len(lengths) > 1  # some end early


def said(prompts: list[Prompt], talk: Any) -> list[Prompt]:
    """The prompts with their answers, as prompts; the answer is the decision."""
    result = []
    for prompt, ids in zip(prompts, talk.generated, strict=True):
        spans = {**prompt.spans, "decision": (len(prompt), len(prompt) + len(ids))}
        result.append(replace(prompt, ids=(*prompt.ids, *ids), spans=spans))
    return result


def test_what_is_heard_while_it_speaks_is_a_pass_over_what_it_said(talker, talk, prompts):
    over = take(talker, said(prompts, talk), *INSIDE, positions="tokens:decision")
    assert_same(talk, over, tolerance=1e-5)
    for ids, weights in zip(talk.generated, talk["attn.pattern", 3], strict=True):
        assert len(weights) == len(ids)


@pytest.mark.parametrize(("spoken", "read"), [("all", "all"), ("last", "last"), ("mean:generated", "mean:decision")])
def test_prompt_and_answer_together(spoken, read, talker, talk, prompts):
    sites = ("resid", "gdn.state", "gdn.k", "gdn.attention", "attn.heads", "attn.pattern")
    where = {"gdn.state": "last"} | {site: spoken for site in sites if site != "gdn.state"}
    options: dict[str, Any] = {"sites": sites, "progress": False, "batch_tokens": 250}
    got = capture(talker, prompts, positions=where, new_tokens=8, chunk_tokens=20, **options)
    where = {"gdn.state": "last"} | {site: read for site in sites if site != "gdn.state"}
    assert got.generated == talk.generated
    assert_same(got, capture(talker, said(prompts, talk), positions=where, **options), tolerance=1e-5)


# --- interventions


@contextmanager
def split(model: HybridModel, layer: int, *, push: float) -> Iterator[None]:
    """Edit the state before the last token: one kernel call becomes two."""

    def tap(call: GDNCall, run: Run) -> tuple[Tensor, Any]:
        if call.continued or call.tokens == 1:
            return run(call)
        head, state = run(call.between(0, call.tokens - 1, state=call.state))
        tail, final = run(call.between(call.tokens - 1, call.tokens, state=state + push))
        return torch.cat([head, tail], 1), final

    with tapped(model, {layer: tap}):
        yield


def test_a_call_in_two_parts_is_joined(tiny, prompts):
    where = {"gdn.state": "tokens:decision", "gdn.k": "tokens:decision", "gdn.attention": "last:direction"}
    plain = take(tiny, prompts, *where, positions=where)
    with split(tiny, 5, push=0.0):
        assert_same(take(tiny, prompts, *where, positions=where), plain, tolerance=1e-5)
        assert_same(take(tiny, prompts, *where, positions=where, new_tokens=2, chunk_tokens=7),
                    take(tiny, prompts, *where, positions=where, new_tokens=2), tolerance=1e-5)  # fmt: skip


def test_an_edit_of_a_state_is_heard(tiny, prompts):
    where = {"gdn.state": "tokens:decision", "gdn.readout": "last", "gdn.decay": "last", "gdn.beta": "last"}
    plain = take(tiny, prompts, *where, "gdn.k", positions=where)
    with split(tiny, 5, push=1.0):
        got = take(tiny, prompts, *where, "gdn.k", positions=where)
        for site in ("gdn.attention", "gdn.attribution"):
            with pytest.raises(WrongInput, match=rf"site '{site}' needs .* that of layer 5 \(gdn\) was edited before"):
                take(tiny, prompts, site)
    assert_same_layer(got, plain, "gdn.state", 0)
    k = plain["gdn.k", 5].repeat_interleave(2, 1)
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    erased = plain["gdn.beta", 5][..., None] * k  # what (I - beta k k^T) takes from a state of ones
    left = plain["gdn.decay", 5].exp()[..., None] * (1 - k.sum(-1, keepdim=True) * erased)
    for i in range(len(prompts)):
        before, after = plain["gdn.state", 5][i], got["gdn.state", 5][i]
        close(after[:-1], before[:-1])
        close(after[-1] - before[-1], left[i][..., None].expand_as(after[-1]), tolerance=1e-4)  # a difference
    assert (got["gdn.readout", 5] - plain["gdn.readout", 5]).abs().max() > 0.01


def assert_same_layer(one: Any, other: Any, site: str, layer: int) -> None:
    for a, b in zip(one[site, layer], other[site, layer], strict=True):
        close(a, b)


def test_an_intervention_that_hides_the_kernel_is_refused(tiny, prompts):
    def twice(call: GDNCall, run: Run) -> tuple[Tensor, Any]:
        run(call)
        return run(call)

    with tapped(tiny, {5: twice}):
        with pytest.raises(WrongInput, match=r"the kernel of layer 5 \(gdn\) was called for \d+ tokens in a forward"):
            take(tiny, prompts, "gdn.k")
    take(tiny, prompts, "gdn.k")  # nothing is left behind


def test_captured_recurrences_give_the_layers_readouts_again(tiny, prompts):
    record = capture(tiny, prompts, sites=(*RECURRENCE, "gdn.readout", "gdn.state"), positions="all", progress=False)
    found = recurrences(record, layer=4)
    assert len(found) == len(prompts)
    together, mask = left_padded(found)
    whole = scan(together)
    for i, x in enumerate(found):
        alone = scan(x)
        torch.testing.assert_close(alone.outputs[0], record["gdn.readout", 4][i], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.final[0], record["gdn.state", 4][i], rtol=0, atol=1e-5)
        torch.testing.assert_close(whole.outputs[i][mask[i] > 0], alone.outputs[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(whole.final[i], alone.final[0], rtol=0, atol=1e-6)
    last = capture(tiny, prompts, sites=RECURRENCE, progress=False)
    with pytest.raises(WrongInput, match=r"needs all tokens of 'gdn\.q'; this capture has positions last"):
        recurrences(last, layer=4)
