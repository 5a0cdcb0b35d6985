"""Runs that begin in the middle, against whole runs: what is computed, what comes out, and what is left behind."""

import copy
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from probes.directions import Direction
from probes.model import HybridModel
from probes.partial import fitting_chunks, joined, recording, starting_at, tiled
from probes.prompts import pad
from probes.steering import steer


def batch_of(model, prompts):
    return pad([p.ids for p in prompts], pad_id=model.tokenizer.pad_token_id, device=model.device)


@contextmanager
def noting(model):
    """The layers whose mixer and MLP are really run, in order; by hooks of the test's own."""
    seen = []
    with ExitStack() as stack:
        for layer in model.layers:
            for module in (layer.mixer, layer.mlp):
                handle = module.register_forward_hook(lambda *_, index=layer.index: seen.append(index))
                stack.callback(handle.remove)
        yield seen


@torch.no_grad()
def hidden(model, batch):
    """transformers' own record: entry i is what enters layer i. (Its last entry is normalised, and left out.)"""
    return model.hf(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states[:-1]


@torch.no_grad()
def logits(model, batch):
    return model.hf(**batch.inputs, use_cache=False).logits


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_a_recording_is_what_transformers_records(name, prompts, request):
    model = request.getfixturevalue(name)
    batch, depth = batch_of(model, prompts), len(model.layers)
    expected, plain = hidden(model, batch), logits(model, batch)
    with recording(model, {0, 1, 2, depth}) as found:
        assert torch.equal(logits(model, batch), plain)
        logits(model, batch_of(model, prompts[:2]))
    assert sorted(found) == [1, 2, depth]  # nothing lies below layer 0
    assert all(len(kept) == 2 for kept in found.values())  # forward by forward
    assert all(torch.equal(found[start][0], expected[start]) for start in (1, 2))
    with torch.no_grad():
        assert torch.equal(model.hf.lm_head(model.decoder.norm(found[depth][0])), plain)
    with recording(model, {1}) as later:
        pass
    logits(model, batch)
    assert later == {1: []}  # the hooks are gone


@pytest.mark.parametrize(("name", "starts"), [("tiny", (0, 1, 3, 4, 7, 8)), ("llama", (0, 1, 3))])
def test_exactly_the_layers_from_the_start_on_are_computed(name, starts, prompts, request):
    model = request.getfixturevalue(name)
    batch, depth = batch_of(model, prompts), len(model.layers)
    with recording(model, starts) as streams, noting(model) as all_layers:
        plain = logits(model, batch)
    assert all_layers == sorted([*range(depth)] * 2)
    for start in starts:
        stream = streams[start][0] if start else torch.full_like(plain[..., :1], torch.nan).expand(-1, -1, 64)
        with noting(model) as seen, starting_at(model, start, stream):
            assert torch.equal(logits(model, batch), plain)  # the same numbers by the same operations
        assert seen == sorted([*range(start, depth)] * 2)
        assert torch.equal(logits(model, batch), plain)


def test_what_comes_before_the_start_cannot_matter(tiny, prompts):
    """The stream alone decides: other tokens below it change nothing, another stream changes everything."""
    batch = batch_of(tiny, prompts)
    with recording(tiny, {4}) as streams:
        plain = logits(tiny, batch)
    other = {**batch.inputs, "input_ids": torch.full_like(batch.ids, 9)}
    with torch.no_grad(), starting_at(tiny, 4, streams[4][0]):
        assert torch.equal(tiny.hf(**other, use_cache=False).logits, plain)
    with starting_at(tiny, 4, 2 * streams[4][0]):
        assert not torch.allclose(logits(tiny, batch), plain, atol=0.1)


def test_an_edit_after_the_last_skipped_layer_works_on_the_stream(tiny, prompts):
    batch = batch_of(tiny, prompts)
    vector = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    for layer in (0, 3, 7):
        direction = Direction(layer=layer, vector=vector, norm=4.0, midpoint=0.0)
        with recording(tiny, {layer + 1}) as streams:
            plain = logits(tiny, batch)
        with steer(tiny, direction, dose=1.0):
            whole = logits(tiny, batch)
            with starting_at(tiny, layer + 1, streams[layer + 1][0]):
                assert torch.equal(logits(tiny, batch), whole)
        assert not torch.allclose(whole, plain, atol=0.1)


def test_forwards_are_put_back_after_an_error_and_when_nested(tiny, prompts, monkeypatch):
    batch, stream = batch_of(tiny, prompts[:2]), torch.zeros(2, 1, 64)
    blocks = [layer.block for layer in tiny.layers]
    monkeypatch.setitem(vars(blocks[1]), "forward", blocks[1].forward)  # as a library may have wrapped it
    before, found = logits(tiny, batch), [vars(block).get("forward") for block in blocks]

    def replaced():
        return [i for i, block in enumerate(blocks) if vars(block).get("forward") is not found[i]]

    with starting_at(tiny, 4, stream):
        with starting_at(tiny, 6, stream):
            assert replaced() == [0, 1, 2, 3, 4, 5]
        assert replaced() == [0, 1, 2, 3]
    with pytest.raises(ZeroDivisionError), starting_at(tiny, 4, stream):
        _ = 1 / 0
    assert replaced() == []
    assert torch.equal(logits(tiny, batch), before)
    with pytest.raises(RuntimeError), starting_at(tiny, 4, torch.zeros(2, 1, 63)):  # the model's own error
        logits(tiny, batch)
    hooked = [m for m in tiny.hf.modules() if m._forward_hooks or m._forward_pre_hooks]
    with pytest.raises(ZeroDivisionError), recording(tiny, {2, 5}):
        _ = 1 / 0
    assert [m for m in tiny.hf.modules() if m._forward_hooks or m._forward_pre_hooks] == hooked
    assert replaced() == []
    assert torch.equal(logits(tiny, batch), before)


@pytest.mark.parametrize("tokens", [1, 5, 20, 70])
@torch.no_grad()
def test_smaller_chunks_give_the_same_states_and_logits(tiny, tokens):
    """The tolerance is that of float32 sums in another order; a run in whole chunks of 64 is what transformers does."""
    ids = torch.randint(5, 200, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    states, sizes = [], []
    mixers: Any = sys.modules[type(tiny.layers[0].mixer).__module__]
    kernel = mixers.torch_chunk_gated_delta_rule

    def noting(*args, **options):
        sizes.append(options.get("chunk_size", 64))
        return kernel(*args, **options)

    mixers.torch_chunk_gated_delta_rule = noting
    try:
        for around in (nullcontext(), fitting_chunks(tiny)):
            with around:
                out = tiny.hf(input_ids=ids, use_cache=True)
                again = tiny.hf(input_ids=ids[:, :3], past_key_values=out.past_key_values, use_cache=True).logits
            found = [
                layer.recurrent_states[0] for layer in out.past_key_values.layers if hasattr(layer, "recurrent_states")
            ]
            states.append((out.logits, again, *found))
        assert mixers.torch_chunk_gated_delta_rule is noting
        with pytest.raises(ZeroDivisionError), fitting_chunks(tiny):
            _ = 1 / 0
        assert mixers.torch_chunk_gated_delta_rule is noting
    finally:
        mixers.torch_chunk_gated_delta_rule = kernel
    assert len(states[0]) == 2 + 6
    for plain, other in zip(*states, strict=True):
        assert float((plain - other).norm() / plain.norm()) < 1e-5
    assert max(sizes) == 64
    assert min(sizes) < 64


@torch.no_grad()
def cached(model, batch, tokens):
    """The cache after some tokens of each row, and the logits of the last of them."""
    part = {name: tensor[:, tokens] for name, tensor in batch.inputs.items()}
    out = model.hf(**part, use_cache=True)
    return out.logits[:, -1], out.past_key_values


def tensors(cache):
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim > 1:
                    yield tensor


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_a_tiled_cache_is_that_of_the_repeated_prompts(name, prompts, request):
    model: HybridModel = request.getfixturevalue(name)
    several = [prompts[0], prompts[2], prompts[6]]
    batch = batch_of(model, several)
    _, cache = cached(model, batch, slice(None))
    before = [tensor.clone() for tensor in tensors(cache)]
    rows = [0, 0, 1, 1, 2, 2] * 3  # all of them three times, then each twice
    found = tiled(cache, 3, each=2, layers=range(len(model.layers)))
    for one, other in zip(tensors(found), tensors(cache), strict=True):
        assert torch.equal(one, other[rows])
    some = tiled(cache, 2, layers=[1])
    assert all((a is b) == (i != 1) for i, (a, b) in enumerate(zip(some.layers, cache.layers, strict=True)))
    mask = torch.cat([batch.mask[rows], torch.ones(18, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        model.hf(input_ids=torch.full((18, 1), 7), attention_mask=mask, past_key_values=found, use_cache=True)
    assert all(torch.equal(one, other) for one, other in zip(tensors(cache), before, strict=True))
    assert len(before) >= 2 * len(model.layers) - 2


@pytest.mark.parametrize(("name", "starts"), [("tiny", (1, 3, 4, 8)), ("llama", (1, 3))])
def test_a_continuation_from_a_layer_on_needs_only_the_cache_from_there(name, starts, prompts, request):
    """The last token of each prompt, twice over, with nothing in the lower layers' rows; then a token after it."""
    model = request.getfixturevalue(name)
    batch = batch_of(model, prompts)
    whole, after = cached(model, batch, slice(None))
    _, before = cached(model, batch, slice(0, -1))
    last = {"input_ids": batch.ids[:, -1:], "attention_mask": batch.mask, "position_ids": batch.positions[:, -1:]}
    twice = {key: tensor.repeat(2, 1) for key, tensor in last.items()}
    with recording(model, starts) as streams, torch.no_grad():
        model.hf(**last, past_key_values=tiled(before, 1, layers=range(len(model.layers))), use_cache=True)
    mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], 1)
    said = {"input_ids": batch.ids[:, :1] * 0 + 7, "attention_mask": mask, "position_ids": mask.sum(1)[:, None] - 1}
    with torch.no_grad():
        spoken = model.hf(**said, past_key_values=copy.deepcopy(after), use_cache=True).logits[:, -1]
    for start in starts:
        live = range(start, len(model.layers))
        stream = streams[start][0].repeat(2, 1, 1)
        with torch.no_grad(), starting_at(model, start, stream):
            out = model.hf(**twice, past_key_values=tiled(before, 2, layers=live), use_cache=True)
        assert torch.allclose(out.logits[:, -1], whole.repeat(2, 1), atol=1e-4)
        cache = joined(tiled(after, 2, layers=range(start)), out.past_key_values, start)
        with torch.no_grad():
            again = model.hf(
                **{key: tensor.repeat(2, 1) for key, tensor in said.items()}, past_key_values=cache, use_cache=True
            )
        assert torch.allclose(again.logits[:, -1], spoken.repeat(2, 1), atol=1e-4)
