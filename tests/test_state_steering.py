"""Edits of states and heads against transformers' own cache, edited by hand, and a float64 scan."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from probes.controls import random_direction
from probes.directions import Direction
from probes.errors import WrongInput
from probes.prompts import pad
from probes.propensity import fork
from probes.steering import steer
from probes.taps import tapped

SHAPES = {"gdn.state": (4, 16, 24), "attn.heads": (4, 32), "resid": (64,)}
LAYERS = {"gdn.state": 2, "attn.heads": 3, "resid": 2}
ANSWER = (7, 30, 12, 9)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def direction_at(site: str, **fields: Any) -> Direction:
    vector = torch.randn(math.prod(SHAPES[site]), generator=torch.Generator().manual_seed(5))
    made = Direction(
        layer=LAYERS[site], vector=vector / vector.norm(), norm=3.0, midpoint=0.7, site=site, shape=SHAPES[site]
    )
    return replace(made, **fields)


def batch_of(model, prompts):
    return pad([p.ids for p in prompts], pad_id=model.tokenizer.pad_token_id, device=model.device)


@torch.no_grad()
def run(model, ids, *, past=None, mask=None):
    """Logits of a piece and the cache after it."""
    start = past.get_seq_length() if past is not None else 0
    mask = torch.ones(len(ids), start + ids.shape[1], dtype=torch.long) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    past = past if past is not None else DynamicCache(config=model.hf.config)
    out = model.hf(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
    return out.logits, out.past_key_values


def edit_by_hand(cache, direction, dose, mode):
    """The edit of the docstring, on the cache's own tensor."""
    state = cache.layers[direction.layer].recurrent_states[0]
    push = dose * direction.norm * direction.tensor
    if mode != "add":
        along = torch.einsum("phkv,hkv->p", state, direction.tensor)
        target = direction.midpoint + (0 if mode == "ablate" else dose * direction.norm)
        push = (target - along)[:, None, None, None] * direction.tensor
    cache.layers[direction.layer].recurrent_states[0] = state + push


@torch.no_grad()
def answered(model, batch, answer=ANSWER):
    """Logits of every answer token, the last prompt token's among them: prefill, then token by token."""
    logits, cache = run(model, batch.ids, mask=batch.mask)
    return spoken(model, logits, cache, batch.mask, answer)


@torch.no_grad()
def answered_by_hand(model, batch, direction, *, dose, mode, last, answer=ANSWER):
    """The same with transformers' cache edited before the last `last` prompt tokens (0: after all of them)."""
    cut = batch.ids.shape[1] - last
    logits, cache = run(model, batch.ids[:, :cut], mask=batch.mask[:, :cut])
    edit_by_hand(cache, direction, dose, mode)
    if last:
        logits, cache = run(model, batch.ids[:, cut:], past=cache, mask=batch.mask)
    return spoken(model, logits, cache, batch.mask, answer)


def spoken(model, logits, cache, mask, answer):
    """The last token's logits and those of the answer, token by token."""
    found = [logits[:, -1]]
    for token in answer:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits, cache = run(model, torch.full((len(mask), 1), token), past=cache, mask=mask)
        found.append(logits[:, -1])
    return torch.stack(found, 1)


@pytest.mark.parametrize("mode", ["add", "ablate", "clamp"])
@pytest.mark.parametrize("last", [1, 3])
def test_an_edit_at_the_prompts_end_is_that_of_an_edited_cache(tiny, prompts, mode, last):
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    plain = answered(tiny, batch)
    with steer(tiny, direction, dose=2.0, phase="prefill", mode=mode, last=last):
        steered = answered(tiny, batch)
    expected = answered_by_hand(tiny, batch, direction, dose=2.0, mode=mode, last=last)
    assert torch.allclose(steered, expected, atol=2e-5 * float(expected.abs().max()))
    assert ((steered - plain).abs().amax(-1) > 0.05).all()  # every later token feels it


def test_an_edit_in_decoding_is_that_of_an_edited_cache_bit_for_bit(tiny, prompts):
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    with steer(tiny, direction, dose=2.0, phase="decode"):
        steered = answered(tiny, batch)
    assert torch.equal(steered, answered_by_hand(tiny, batch, direction, dose=2.0, mode="add", last=0))
    assert torch.equal(steered[:, 0], answered(tiny, batch)[:, 0])  # the prompt's own logits are untouched


def test_both_phases_are_both_edits(tiny, prompts):
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    with steer(tiny, direction, dose=1.0, phase="both"):
        both = answered(tiny, batch)
    with steer(tiny, direction, dose=1.0, phase="prefill"), steer(tiny, direction, dose=1.0, phase="decode"):
        nested = answered(tiny, batch)
    assert torch.allclose(both, nested, atol=1e-4)
    with steer(tiny, direction, dose=1.0, phase="prefill"):
        assert not torch.allclose(both, answered(tiny, batch), atol=1e-2)


def test_in_decoding_each_cache_is_edited_once(tiny, prompts):
    """A prompt computed once serves two answers: each fork of its cache carries the edit, once."""
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    _, cache = run(tiny, batch.ids, mask=batch.mask)
    mask = torch.cat([batch.mask, torch.ones(len(prompts), len(ANSWER), dtype=torch.long)], 1)
    ids = torch.tensor([ANSWER]).expand(len(prompts), -1)
    with steer(tiny, direction, dose=2.0, phase="decode"):
        one, _ = run(tiny, ids, past=fork(cache, 1), mask=mask)
        two, _ = run(tiny, ids, past=fork(cache, 1), mask=mask)
        token_by_token = answered(tiny, batch)[:, 1:]
    assert torch.equal(one, two)
    assert torch.allclose(one, token_by_token, atol=1e-4)


@pytest.mark.parametrize("mode", ["add", "clamp"])
def test_an_initial_state_is_that_of_a_cache_that_begins_with_it(tiny, prompts, mode):
    """Each prompt alone, without padding, from a cache whose state was set; together they are padded."""
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    with steer(tiny, direction, dose=2.0, phase="prefill", mode=mode, form="initial"):
        together = answered(tiny, batch)
    push = 2.0 * direction.norm if mode == "add" else direction.midpoint + 2.0 * direction.norm
    for row, prompt in enumerate(prompts):
        start = (push * direction.tensor)[None]

        def begin(call, run, start=start):
            return run(replace(call, state=start) if call.state is None else call)

        with tapped(tiny, {direction.layer: begin}):
            alone = answered(tiny, batch_of(tiny, [prompt]))
        assert torch.allclose(together[row], alone[0], atol=1e-4)


def test_padding_would_wear_off_an_initial_state(tiny, prompts):
    """What the test above rests on: without care the same edit, behind padding, is another one."""
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    start = (6.0 * direction.tensor)[None].expand(len(prompts), -1, -1, -1)
    careless = {direction.layer: lambda call, run: run(replace(call, state=start) if call.state is None else call)}
    with tapped(tiny, careless):
        worn = answered(tiny, batch)
    with steer(tiny, direction, dose=2.0, phase="prefill", form="initial"):
        kept = answered(tiny, batch)
    short = min(range(len(prompts)), key=lambda i: len(prompts[i]))
    assert (worn[short] - kept[short]).abs().max() > 0.02
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    assert torch.allclose(worn[longest], kept[longest], atol=1e-4)


@torch.no_grad()
def scanned(call, change):
    """Float64, token by token, with the values changed: the final state [prompt v_head d_k d_v]."""
    q_heads, v_heads = call.k.shape[2], call.v.shape[2]
    k = call.k.double() / (call.k.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    k = k.repeat_interleave(v_heads // q_heads, 2)
    v, state = call.v.double(), torch.zeros(len(k), v_heads, k.shape[-1], call.v.shape[-1], dtype=torch.float64)
    for t in range(call.tokens):
        value = change(v[:, t], k[:, t], t)
        state = state * call.decay[:, t].double().exp()[..., None, None]
        u = call.beta[:, t, :, None].double() * (value - torch.einsum("phkv,phk->phv", state, k[:, t]))
        state = state + torch.einsum("phk,phv->phkv", k[:, t], u)
    return state


@pytest.mark.parametrize("mode", ["add", "clamp", "ablate"])
@pytest.mark.parametrize("last", [None, 2])
def test_writes_are_edited_through_their_values(tiny, prompts, mode, last):
    direction, seen = direction_at("gdn.state"), []
    batch = batch_of(tiny, [prompts[3]])

    def note(call, run):
        seen.append(call)
        return run(call)

    with tapped(tiny, {direction.layer: note}):
        run(tiny, batch.ids)
    with steer(tiny, direction, dose=0.5, phase="prefill", mode=mode, form="write", last=last):
        _, cache = run(tiny, batch.ids)
    amount, tokens = 0.0 if mode == "ablate" else 0.5 * direction.norm, batch.ids.shape[1]

    def change(v, k, t):
        if last and t < tokens - last:
            return v
        told = torch.einsum("hkv,phk->phv", direction.tensor.double(), k)
        if mode == "add":
            return v + amount * told
        size = told.norm(dim=-1, keepdim=True)
        return v + (amount * size - (v * told).sum(-1, keepdim=True) / size) * told / size

    expected = scanned(seen[0], change)
    assert relative_error(cache.layers[direction.layer].recurrent_states[0], expected) < 1e-5
    assert relative_error(scanned(seen[0], lambda v, k, t: v), expected) > 1e-3


def test_writes_move_what_the_layer_learns_by_the_direction():
    """The claim of the docstring: with full writes and no decay, orthonormal keys end up at S + dose x norm x D."""
    keys, values = torch.eye(16).double(), torch.randn(16, 24).double()
    push, state, moved = torch.randn(16, 24).double(), torch.zeros(16, 24).double(), torch.zeros(16, 24).double()
    for k, v in zip(keys, values, strict=True):
        state = state + torch.outer(k, v - state.T @ k)
        moved = moved + torch.outer(k, v + push.T @ k - moved.T @ k)
    assert torch.allclose(moved - state, push)


@pytest.mark.parametrize("form", ["end", "initial", "write"])
@pytest.mark.parametrize("mode", ["add", "ablate", "clamp", "rotate"])
@pytest.mark.parametrize("site", ["gdn.state", "attn.heads"])
def test_afterwards_the_logits_are_bitwise_what_they_were(tiny, prompts, site, mode, form):
    direction, batch = direction_at(site), batch_of(tiny, prompts)
    before = answered(tiny, batch)
    with steer(tiny, direction, dose=2.0, mode=mode, form=form):
        during = answered(tiny, batch)
    assert torch.equal(before, answered(tiny, batch))
    still = (site, mode, form) == ("gdn.state", "rotate", "initial")  # there is nothing yet that could be turned
    assert torch.allclose(before, during, atol=1e-2) == still


@pytest.mark.parametrize("heads", [(1,), (0, 3)])
def test_other_heads_are_left_alone(tiny, prompts, heads):
    direction, batch = direction_at("gdn.state"), batch_of(tiny, prompts)
    keep = torch.zeros(4, 1, 1)
    keep[list(heads)] = 1
    some = replace(direction, vector=F.normalize((direction.tensor * keep).flatten(), dim=0), heads=heads)
    states = {}
    for name, dose in (("plain", 0.0), ("steered", 2.0)):
        with steer(tiny, some, dose=dose, phase="prefill"):
            _, cache = run(tiny, batch.ids, mask=batch.mask)
        states[name] = cache.layers[direction.layer].recurrent_states[0]
    moved = (states["steered"] - states["plain"]).flatten(2).norm(dim=2).amin(0)
    assert {h for h in range(4) if moved[h] > 1e-3} == set(heads)
    control = random_direction(some, seed=1)
    assert control.tensor[[h for h in range(4) if h not in heads]].abs().max() == 0
    assert torch.allclose(
        torch.linalg.svdvals(control.tensor)[list(heads)], torch.linalg.svdvals(some.tensor)[list(heads)], atol=1e-5
    )


def test_attention_heads_are_edited_before_the_output_projection(tiny, prompts):
    direction, batch, seen = direction_at("attn.heads"), batch_of(tiny, prompts), []
    projection: Any = tiny.layers[3].mixer.o_proj

    def heads(**options):
        seen.clear()
        with steer(tiny, direction, phase="prefill", **options):
            handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
            run(tiny, batch.ids, mask=batch.mask)
            handle.remove()
        return seen[0]

    plain = heads(dose=0.0)
    moved = heads(dose=0.5, last=2) - plain
    assert torch.allclose(moved[:, -2:], (1.5 * direction.vector).expand_as(moved[:, -2:]), atol=1e-5)
    assert moved[:, :-2].abs().max() == 0
    clamped = heads(dose=0.5, mode="clamp")
    assert torch.allclose(clamped @ direction.vector, torch.tensor(0.7 + 1.5).expand(batch.ids.shape), atol=1e-5)


def test_wrong_steering_of_states_is_refused(tiny, llama):
    direction = direction_at("gdn.state")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"form": "always"}, "unknown form 'always'; allowed are end, initial, write"),
        ({"last": 0}, "last must be at least 1 token, saw 0"),
        ({"form": "initial", "phase": "decode"}, "form 'initial' needs phase prefill or both"),
    ]
    for arguments, message in refused:
        with pytest.raises(WrongInput, match=message), steer(tiny, direction, **arguments):
            pass
    for wrong, message in (
        ({"layer": 3}, r"'gdn.state' does not exist at layer 3 \(attention\)"),
        ({"shape": (2, 32, 24)}, "the direction has 2 x 32 x 24 elements, gdn.state of tiny at layer 2 4 x 16 x 24"),
        ({"site": "mlp"}, "'mlp' cannot be steered; allowed are resid, gdn.state, attn.heads"),
    ):
        with pytest.raises(WrongInput, match=message), steer(tiny, replace(direction, **wrong)):
            pass
    with pytest.raises(WrongInput, match="llama: it has no gdn layers"), steer(llama, direction):
        pass
