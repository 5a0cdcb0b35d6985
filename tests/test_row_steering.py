"""Rows of one batch steered each its own way, against one `steer` for each; and turning, by plane geometry."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from probes.directions import Direction
from probes.errors import WrongInput
from probes.prompts import pad
from probes.steering import steer, steer_rows
from probes.taps import tapped

SHAPES = {"gdn.state": (4, 16, 24), "attn.heads": (4, 32), "resid": (64,)}
LAYERS = {"gdn.state": 2, "attn.heads": 3, "resid": 2}
PLACES = [
    ("resid", "end"),
    ("attn.heads", "end"),
    ("gdn.state", "end"),
    ("gdn.state", "initial"),
    ("gdn.state", "write"),
]
MODES = ("add", "ablate", "clamp", "rotate")


def direction_at(site: str, *, seed: int = 5, **fields: Any) -> Direction:
    vector = torch.randn(math.prod(SHAPES[site]), generator=torch.Generator().manual_seed(seed))
    made = Direction(
        layer=LAYERS[site], vector=vector / vector.norm(), norm=3.0 + seed, midpoint=0.1 * seed, site=site,
        shape=SHAPES[site],
    )  # fmt: skip
    return replace(made, **fields)


def batch_of(model, prompts):
    return pad([p.ids for p in prompts], pad_id=model.tokenizer.pad_token_id, device=model.device)


@torch.no_grad()
def run(model, ids, mask, past=None):
    """Logits of the last token and the cache after it."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    past = past if past is not None else DynamicCache(config=model.hf.config)
    out = model.hf(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
    return out.logits[:, -1], out.past_key_values


def spoken(model, batch):
    """Logits after the prompt and after each of two more tokens: [prompt 3 vocab]."""
    logits, cache = run(model, batch.ids, batch.mask)
    found, mask = [logits], batch.mask
    for token in (7, 30):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits, cache = run(model, torch.full((len(mask), 1), token), mask, cache)
        found.append(logits)
    return torch.stack(found, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("site", "form"), PLACES)
def test_each_row_is_steered_as_if_alone(tiny, prompts, site, form, mode):
    """Three pushes over prompts of different lengths, then tokens that continue their cache."""
    pushes = [(direction_at(site, seed=seed), dose) for seed, dose in ((1, 0.6), (2, -0.8), (3, 0.0))]
    rows, batch = (0, 1, 1, 2, 0, 2, 1), batch_of(tiny, prompts)
    with steer_rows(tiny, pushes, rows, mode=mode, form=form):
        found = spoken(tiny, batch)
        assert [noted["dose"] for noted in tiny.interventions] == [[0.6, -0.8, 0.0]]
    assert tiny.interventions == []
    alone = []
    for direction, dose in pushes:
        with steer(tiny, direction, dose=dose, mode=mode, form=form):
            alone.append(spoken(tiny, batch))
    expected = torch.stack([alone[turn][i] for i, turn in enumerate(rows)])
    assert torch.allclose(found, expected, atol=1e-4)
    changed = (found - spoken(tiny, batch)).abs().amax((1, 2))
    turns = torch.tensor(rows)
    still = torch.tensor([mode in ("add", "rotate") and turn == 2 for turn in rows])  # a push of dose 0
    if (form, mode) == ("initial", "rotate"):  # an empty state cannot be turned
        still |= turns >= 0
    assert (changed[still] < 1e-5).all()
    assert (changed[~still] > 0.05).all()


@pytest.mark.parametrize(("site", "form"), [("resid", "end"), ("gdn.state", "end"), ("gdn.state", "write")])
def test_a_batch_of_several_rows_for_each_has_them_side_by_side(tiny, prompts, site, form):
    """As answers are: two rows after another for each row that was named."""
    pushes = [(direction_at(site, seed=seed), dose) for seed, dose in ((1, 0.6), (2, -0.8))]
    some = batch_of(tiny, [prompts[1], prompts[2], prompts[4]])
    twice = batch_of(tiny, [prompts[i] for i in (1, 1, 2, 2, 4, 4)])
    with steer_rows(tiny, pushes, (1, 0, 1), form=form):
        one, both = spoken(tiny, some), spoken(tiny, twice)
    assert torch.allclose(both[0::2], one, atol=1e-4)
    assert torch.allclose(both[1::2], one, atol=1e-4)


def test_rows_of_one_batch_are_steered_at_one_place(tiny):
    one = direction_at("resid")
    for other in (replace(one, layer=3), direction_at("attn.heads")):
        with (
            pytest.raises(WrongInput, match="the rows of one batch must be steered at one site of one layer"),
            steer_rows(tiny, [(one, 1.0), (other, 1.0)], (0, 1)),
        ):
            pass
    with (
        pytest.raises(WrongInput, match=r"the direction has 32 elements, resid of tiny at layer 2 64"),
        steer_rows(tiny, [(one, 1.0), (replace(one, vector=torch.ones(32), shape=(32,)), 1.0)], (0, 1)),
    ):
        pass


def rotated(values: torch.Tensor, unit: torch.Tensor, size: float | torch.Tensor, axes: int) -> torch.Tensor:
    """In the plane of a value x and the vector u: cos(angle) x + sin(angle) |x| e, e being what of u is not along x.

    The angle is that of x + size u against x. In float64, over the last `axes` axes.
    """
    x = values.double().flatten(-axes)
    u = unit.double().flatten(-axes).expand_as(x)
    length = (x * x).sum(-1, keepdim=True).sqrt()
    along = (x * u).sum(-1, keepdim=True) / length
    across = u - along * x / length
    rest = (across * across).sum(-1, keepdim=True).sqrt()
    angle = torch.atan2(rest * size, length + along * size)
    return (angle.cos() * x + angle.sin() * length * across / rest).reshape(values.shape)


@torch.no_grad()
def seen_at(model, site, batch, *, direction=None, **options):
    """What the site holds while it is steered: [prompt token ...], or a state after a prompt's last but one token."""
    direction, found = direction or direction_at(site), []
    layer: Any = model.layers[direction.layer]
    with steer(model, direction, phase="prefill", mode="rotate", **options):
        if site == "gdn.state":

            def note(call, kernel):
                found.append(call.state)
                return kernel(call)

            with tapped(model, {direction.layer: note}):
                model.hf(**batch.inputs)
            return found[-1]
        if site == "resid":
            handle = layer.block.register_forward_hook(lambda _, args, out: found.append(out.clone()))
        else:
            handle = layer.mixer.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
        model.hf(**batch.inputs)
        handle.remove()
    return found[0].unflatten(-1, SHAPES[site])


@pytest.mark.parametrize("dose", [0.7, -2.0])
@pytest.mark.parametrize("site", ["resid", "attn.heads", "gdn.state"])
def test_turning_keeps_the_norm_and_turns_in_one_plane(tiny, prompts, site, dose):
    direction, batch = direction_at(site), batch_of(tiny, prompts)
    axes, unit, size = max(len(SHAPES[site]) - 1, 1), direction.tensor, dose * direction.norm
    plain, turned = seen_at(tiny, site, batch, dose=0.0), seen_at(tiny, site, batch, dose=dose)
    expected = rotated(plain, unit, size, axes)
    real = batch.mask.bool() if site != "gdn.state" else torch.ones(len(prompts), dtype=torch.bool)
    norms = [
        x[real].double().flatten(-axes).norm(dim=-1) for x in (plain, turned)
    ]  # of each head, where there are heads
    assert torch.allclose(norms[1], norms[0], rtol=1e-5)
    assert torch.allclose(turned[real].double(), expected[real], atol=2e-6 * float(norms[0].max()))
    toward = ((turned - plain)[real].flatten(1) @ direction.vector) * math.copysign(1, dose)
    assert (toward > 0).all()
    assert (turned - plain)[real].flatten(1).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("site", ["attn.heads", "gdn.state"])
def test_turning_some_heads_leaves_the_others_bit_by_bit(tiny, prompts, site):
    whole, batch = direction_at(site), batch_of(tiny, prompts)
    only = whole.tensor.clone()
    only[1:] = 0
    one = replace(whole, vector=only.flatten() / only.norm())
    plain, turned = (seen_at(tiny, site, batch, direction=one, dose=dose) for dose in (0.0, 1.5))
    others = -len(SHAPES[site])
    moved = (turned - plain).select(others, 0).norm() / plain.select(others, 0).norm()
    assert moved > 0.1
    rest = range(1, SHAPES[site][0])
    assert all(torch.equal(plain.select(others, head), turned.select(others, head)) for head in rest)


def test_values_of_writes_are_turned_head_by_head(tiny, prompts):
    """Each token's value v toward D^T k, k being its normalised key, at the norm it had; and an empty state cannot."""
    direction, batch, calls = direction_at("gdn.state"), batch_of(tiny, [prompts[3]]), []

    def note(call, kernel):
        calls.append(call)
        return kernel(call)

    for dose in (0.0, 0.5):
        with steer(tiny, direction, dose=dose, phase="prefill", mode="rotate", form="write"):
            with tapped(tiny, {direction.layer: note}), torch.no_grad():
                tiny.hf(**batch.inputs)
    plain, steered = (call.v for call in calls)
    keys = calls[0].k.double()
    keys = keys / (keys.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # as the kernel normalises them
    told = torch.einsum("pthk,hkv->pthv", keys.repeat_interleave(2, 2), direction.tensor.double())
    size = 0.5 * direction.norm * told.norm(dim=-1, keepdim=True)
    expected = rotated(plain, told / told.norm(dim=-1, keepdim=True), size, 1)
    assert torch.allclose(steered.double(), expected, atol=1e-5 * float(plain.abs().max()))
    assert torch.allclose(steered.norm(dim=-1), plain.norm(dim=-1), rtol=1e-5)
    before = spoken(tiny, batch)
    assert not torch.allclose(steered, plain, atol=1e-2)
    with steer(tiny, direction, dose=2.0, phase="prefill", mode="rotate", form="initial"):
        assert torch.allclose(spoken(tiny, batch), before, atol=1e-5)
