"""General text under many interventions, against `probes.damage` under plain steering, one after the other."""

import math

import pytest
import torch

from probes.damage import damage, read_general, surprise
from probes.directions import Direction
from probes.steering import steer
from probes.texts import Texts
from probes.trials import How, start_of

SHAPES = {"gdn.state": (4, 16, 24), "attn.heads": (4, 32), "resid": (64,)}
ON_TEXT = {"end": "initial", "initial": "initial", "write": "write"}  # a text is what comes after the prompt


def direction_at(site: str, layer: int, *, seed: int = 5, shape: tuple[int, ...] | None = None) -> Direction:
    shape = shape or SHAPES[site]
    vector = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed))
    return Direction(layer=layer, vector=vector / vector.norm(), norm=5.0, midpoint=0.7, site=site, shape=shape)


@pytest.fixture(scope="module")
def general(tiny):
    """Dialogues of which the answers are scored, of different lengths."""
    return read_general(tiny).take(9)


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    monkeypatch.setattr("probes.texts.PLAIN_TOKENS", 100)
    monkeypatch.setattr("probes.texts.BATCH_TOKENS", 250)


def alone(model, general, direction, dose, how):
    """By hand. Before a text a state is empty, so what would turn it is added."""
    form = ON_TEXT[how.form]
    mode = "add" if (direction.site, form, how.mode) == ("gdn.state", "initial", "rotate") else how.mode

    def edit():
        return steer(model, direction, dose=dose, phase="both", mode=mode, form=form)

    return damage(model, general, edit)


@pytest.mark.parametrize(
    ("site", "layer", "how"),
    [
        ("resid", 0, How()),
        ("resid", 4, How(phase="decode", mode="rotate")),  # a text is edited whole, whatever the phase
        ("resid", 7, How(mode="clamp")),
        ("gdn.state", 0, How(mode="add")),
        ("gdn.state", 5, How(phase="both", mode="clamp")),
        ("gdn.state", 5, How(mode="rotate")),
        ("gdn.state", 2, How(form="write", mode="rotate")),
        ("attn.heads", 3, How(mode="ablate")),
        ("attn.heads", 7, How(mode="rotate")),
    ],
    ids=str,
)
def test_ratios_and_damage_are_those_of_plain_steering(tiny, general, site, layer, how):
    pushes = [(direction_at(site, layer, seed=seed), dose) for seed, dose in ((5, 0.4), (6, -0.3), (5, 1.0))]
    texts = Texts(tiny, general, starts={start_of(pushes[0][0]), 2})
    assert len(texts.parts) > 2
    assert texts.plain == pytest.approx(surprise(tiny, general), rel=1e-6)
    expected = [alone(tiny, general, direction, dose, how) for direction, dose in pushes]
    found = texts.ratios(pushes, how)
    assert found == pytest.approx([one.perplexity_ratio for one in expected], rel=1e-4)
    assert max(abs(math.log(ratio)) for ratio in found) > 0.01
    one = texts.damage(pushes[2], how)
    assert one.perplexity_ratio == pytest.approx(found[2], rel=1e-5)
    assert one.perplexity == pytest.approx(expected[2].perplexity, rel=1e-5)
    assert one.kl == pytest.approx(expected[2].kl, rel=1e-3, abs=1e-6)
    assert one.tokens == expected[2].tokens == general.tokens


def test_without_reuse_it_is_the_same(tiny, llama, general):
    for model, layer, shape in ((tiny, 2, None), (llama, 1, None)):
        push, how = (direction_at("resid", layer, shape=shape), 0.5), How(mode="rotate")
        fast = Texts(model, general, starts={layer + 1})
        slow = Texts(model, general, starts=(), reuse=False)
        assert fast.plain == pytest.approx(slow.plain, rel=1e-6)
        assert fast.ratios([push], how) == pytest.approx(slow.ratios([push], how), rel=1e-5)
        one, other = fast.damage(push, how), slow.damage(push, how)
        assert (one.tokens, one.perplexity) == (other.tokens, pytest.approx(other.perplexity, rel=1e-5))
        assert one.perplexity_ratio == pytest.approx(other.perplexity_ratio, rel=1e-5)
        assert one.kl == pytest.approx(other.kl, rel=1e-3)


def test_nothing_is_left_behind(tiny, general, prompts):
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        before = tiny.hf(input_ids=ids).logits
        texts = Texts(tiny, general, starts={3})
        texts.ratios([(direction_at("resid", 2), 1.0)], How())
        texts.damage((direction_at("attn.heads", 3), 1.0), How())
        assert torch.equal(tiny.hf(input_ids=ids).logits, before)
    assert tiny.interventions == []


def test_a_push_that_breaks_the_numbers_is_damage_beyond_measure(tiny, general):
    """float32 ends at 3e38: the push is infinite, and what the next norm makes of it is not a number."""
    push = (direction_at("resid", 2), 1e38)
    texts = Texts(tiny, general, starts={3})
    assert texts.ratios([(push[0], 0.1), push], How())[1] == math.inf
    assert texts.damage(push, How()).perplexity_ratio == math.inf
