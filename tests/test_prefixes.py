"""Caches taken apart and put together, against whole prompts and transformers' cache edited by hand."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch

from probes.behaviors import read_behavior
from probes.errors import WrongInput
from probes.prefixes import CHANNELS, Channel, _masked, continued, disturbed, exchanged, prefixes
from probes.propensity import prepare, propensity
from probes.taps import AttentionCall

GDN, ATTENTION = (0, 1, 2, 4, 5, 6), (3, 7)
LAYERS: dict[Any, tuple[int, ...]] = {"state": GDN, "convolution": GDN, "attention": ATTENTION}


@pytest.fixture(scope="module")
def both(tiny):
    """Two sets of prompts that differ in their system turns, some of them in length; small batches."""
    behavior = read_behavior("sentiment").take(6)
    wanted, unwanted = prepare(tiny, behavior, persona="wanted"), prepare(tiny, behavior, persona="unwanted")
    assert any(len(a) != len(b) for a, b in zip(wanted.prompts, unwanted.prompts, strict=True))
    return wanted, unwanted, *prefixes(tiny, wanted, unwanted, batch_tokens=120)


def close(one, other, tolerance=2e-4):
    return max(map(abs, one.minus(other))) < tolerance


def test_a_prompt_continued_gives_the_propensity_of_the_whole(tiny, both):
    wanted, unwanted, begun, other = both
    assert len(begun.parts) > 1
    assert close(continued(tiny, begun), propensity(tiny, wanted))
    assert close(continued(tiny, other), propensity(tiny, unwanted))
    assert not close(continued(tiny, begun), propensity(tiny, unwanted), 1e-3)


@pytest.mark.parametrize("last", [2, 3])
def test_wherever_it_is_cut(tiny, both, last):
    (begun,) = prefixes(tiny, both[0], last=last)
    assert close(continued(tiny, begun), propensity(tiny, both[0]))


def test_exchanging_every_channel_gives_the_other_prompt(tiny, both):
    """Nothing else crosses tokens. The lengths differ, so this also holds the masks and positions to account."""
    _, _, begun, other = both
    for channel in CHANNELS:
        swap = partial(exchanged, tiny, channel=channel, layers=LAYERS[channel])
        begun = begun.each(swap, other)
    assert close(continued(tiny, begun), continued(tiny, other), 1e-5)


@pytest.mark.parametrize("channel", CHANNELS)
def test_exchanging_one_channel_changes_it_and_nothing_else(tiny, both, channel):
    _, _, begun, other = both
    before = continued(tiny, begun)
    layer = LAYERS[channel][1]
    changed = begun.each(lambda a, b: exchanged(tiny, a, b, channel=channel, layers=[layer]), other)
    assert not close(continued(tiny, changed), before, 1e-4)
    assert continued(tiny, begun).values == before.values  # the original is as it was, bit for bit
    names = {"state": "recurrent_states", "convolution": "conv_states"}
    for own, new, foreign in zip(begun.parts, changed.parts, other.parts, strict=True):
        for index, entry in enumerate(new.cache.layers):
            for name in ("recurrent_states", "conv_states", "keys", "values"):
                if (value := getattr(entry, name, None)) is None:
                    continue
                touched = index == layer and (
                    name == names.get(channel) or (channel == "attention" and name in ("keys", "values"))
                )
                source = getattr((foreign if touched else own).cache.layers[index], name)
                pairs = [(value[0], source[0])] if isinstance(value, dict) else [(value, source)]
                assert all(torch.equal(a, b) for a, b in pairs)


def test_one_head_of_a_state(tiny, both):
    _, _, begun, other = both
    changed = begun.each(lambda a, b: exchanged(tiny, a, b, channel="state", layers=[4], head=2), other)
    own, new, foreign = (p.parts[0].cache.layers[4].recurrent_states[0] for p in (begun, changed, other))
    assert torch.equal(new[:, 2], foreign[:, 2])
    assert torch.equal(new[:, [0, 1, 3]], own[:, [0, 1, 3]])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_head_exchanged_with_itself_does_nothing(tiny, both, attention):
    """However long the other prompt is: the heads that keep their own keep their own tokens too."""
    _, _, begun, other = both
    before = continued(tiny, begun)

    def back_and_forth(a, b):
        once = exchanged(tiny, a, b, channel="attention", layers=ATTENTION, head=1)
        return exchanged(tiny, once, a, channel="attention", layers=ATTENTION, head=1)

    tiny.hf.set_attn_implementation(attention)
    try:
        assert close(continued(tiny, begun.each(back_and_forth, other)), before, 1e-4)
        once = begun.each(lambda a, b: exchanged(tiny, a, b, channel="attention", layers=[3], head=1), other)
        twice = once.each(lambda a, b: exchanged(tiny, a, b, channel="attention", layers=[3], head=0), other)
        whole = begun.each(lambda a, b: exchanged(tiny, a, b, channel="attention", layers=[3]), other)
        assert close(continued(tiny, twice), continued(tiny, whole), 1e-4)
        assert not close(continued(tiny, once), continued(tiny, whole), 1e-4)
    finally:
        tiny.hf.set_attn_implementation("sdpa")


def test_controls_are_as_far_away_as_the_exchange_and_elsewhere(tiny, both):
    _, _, begun, other = both
    one = begun.each(lambda a, b: disturbed(tiny, a, b, channel="state", layers=[4], seed=1), other)
    own, new, foreign = (p.parts[0].cache.layers[4].recurrent_states[0] for p in (begun, one, other))
    true, drawn = foreign - own, new - own
    values = torch.linalg.svdvals(true)
    assert torch.allclose(torch.linalg.svdvals(drawn), values, atol=1e-4 * float(values.max()))
    cosine = (true * drawn).sum((2, 3)) / (true.norm(dim=(2, 3)) * drawn.norm(dim=(2, 3)))
    assert cosine.abs().max() < 0.5
    cases: list[tuple[str, Channel, int]] = [
        ("conv_states", "convolution", 4),
        ("keys", "attention", 3),
        ("values", "attention", 3),
    ]
    for (name, channel, layer), (here, there) in product(cases, ((begun, other), (other, begun))):
        two = here.each(partial(disturbed, tiny, channel=channel, layers=[layer], seed=1), there)
        part = 0
        found = [getattr(p.parts[part].cache.layers[layer], name) for p in (here, two, there)]
        own, new, foreign = (v[0] if isinstance(v, dict) else v for v in found)
        if channel == "attention":  # what only one prompt has counts in the norm, and is not touched itself
            mine, theirs = (p.parts[part].mask[:, :-1].bool() for p in (here, there))
            assert torch.equal(new.transpose(1, 2)[~(mine & theirs)], own.transpose(1, 2)[~(mine & theirs)])
            true = foreign * theirs[:, None, :, None] - own * mine[:, None, :, None]
            true, drawn = (x.norm(dim=(2, 3)) for x in (true, new - own))
        else:
            moved, turned = (x[0] - own[0] for x in (foreign, new))  # [channel kernel]
            signs = {
                sign: sum(bool(torch.isclose(moved, sign * row, atol=1e-6).all(1).any()) for row in turned)
                for sign in (1, -1)
            }
            assert min(signs.values()) > len(turned) / 4
            true, drawn = ((x - own).flatten(1).norm(dim=1) for x in (foreign, new))
        assert torch.allclose(true, drawn, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(new, foreign, atol=1e-2)


def test_each_query_head_sees_the_tokens_of_its_own_key_head():
    """Two queries over five keys: three that the heads see differently, then the queries' own."""
    seen = torch.tensor([[[1, 0, 1], [0, 1, 1]]])
    q, k = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 5, 8)
    masks = []

    def run(call):
        masks.append(call.mask)
        return q, None

    _masked(seen)(AttentionCall(q=q, k=k, v=k, mask=None, scaling=1.0), run)
    first, second = [1, 0, 1], [0, 1, 1]
    expected = [[[*row, 1, 0], [*row, 1, 1]] for row in (first, first, second, second)]
    assert masks[0].long()[0].tolist() == expected


def test_seeds_decide_the_controls(tiny, both):
    _, _, begun, other = both
    states = [
        begun.each(lambda a, b, s=seed: disturbed(tiny, a, b, channel="state", layers=[4], seed=s), other)
        .parts[0].cache.layers[4].recurrent_states[0]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_eager_attention_gets_masks_of_its_own_kind(tiny, both):
    """An additive mask gives what a boolean one gives."""
    _, _, begun, other = both
    changed = begun.each(lambda a, b: exchanged(tiny, a, b, channel="attention", layers=ATTENTION), other)
    expected = continued(tiny, changed)
    tiny.hf.set_attn_implementation("eager")
    try:
        assert close(continued(tiny, changed), expected)
    finally:
        tiny.hf.set_attn_implementation("sdpa")


def test_what_cannot_be_cut_or_compared_is_refused(tiny, both):
    wanted, unwanted, *_ = both
    with pytest.raises(WrongInput, match="cannot be cut before its last 500"):
        prefixes(tiny, wanted, last=500)
    with pytest.raises(WrongInput, match="the sets of prompts are of different items"):
        prefixes(tiny, wanted, replace(unwanted, ids=("other", *unwanted.ids[1:])))
