"""Teacher-forced scores against plain forwards over the whole text, and what a batch must not change."""

import pytest
import torch

from probes.behaviors import read_behavior
from probes.cost import counting
from probes.directions import Direction
from probes.errors import WrongInput
from probes.prompts import answer_ids
from probes.propensity import fork, prepare, propensity, shares
from probes.steering import steer


@pytest.fixture(scope="module")
def behavior():
    return read_behavior("follow-direction").take(12)


@torch.no_grad()
def by_hand(model, ids, answer, push=None, layer=4, phase="both"):
    """Sum of log-probabilities from one uncached forward of prompt and answer, unpadded."""
    where = torch.zeros(len(ids) + len(answer), 1)
    where[: len(ids)] += phase in ("both", "prefill")
    where[len(ids) :] += phase in ("both", "decode")
    handle = None
    if push is not None:
        handle = model.layers[layer].block.register_forward_hook(lambda m, a, out: out + where * push)
    logits = model.hf(input_ids=torch.tensor([[*ids, *answer]]), use_cache=False).logits[0].double().log_softmax(-1)
    if handle:
        handle.remove()
    return sum(logits[len(ids) - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_scores_equal_plain_forwards_whatever_the_batch(name, behavior, request):
    model = request.getfixturevalue(name)
    for batch_tokens in (1, 150, 100_000):
        found = propensity(model, prepare(model, behavior, batch_tokens=batch_tokens))
        for i, item in enumerate(behavior.items):
            ids = item.prompt(model).ids
            assert found.wanted[i] == pytest.approx(by_hand(model, ids, answer_ids(model, item.wanted)), abs=1e-4)
            assert found.unwanted[i] == pytest.approx(by_hand(model, ids, answer_ids(model, item.unwanted)), abs=1e-4)


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_steered_scores_equal_steered_forwards(tiny, behavior, phase):
    vector = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(1)), dim=0)
    direction = Direction(layer=4, vector=vector, norm=4.0, midpoint=0.0)
    prepared = prepare(tiny, behavior, batch_tokens=300)
    with steer(tiny, direction, dose=0.8, phase=phase):
        found = propensity(tiny, prepared)
    for i, item in enumerate(behavior.items):
        expected = by_hand(tiny, item.prompt(tiny).ids, answer_ids(tiny, item.wanted), 3.2 * vector, phase=phase)
        assert found.wanted[i] == pytest.approx(expected, abs=2e-4)


def test_each_prefix_is_computed_once(tiny, behavior):
    prepared = prepare(tiny, behavior, batch_tokens=1)  # no padding between prompts
    with counting(tiny) as cost:
        propensity(tiny, prepared)
    prompts = sum(len(p) for p in prepared.prompts)
    suffixes = sum(2 * (max(map(len, pair)) - 1) for pair in prepared.answers)
    assert cost.forward_tokens == prompts + suffixes


def test_a_fork_leaves_the_original_cache_alone(tiny, prompts):
    ids = torch.tensor([prompts[0].ids])
    with torch.no_grad():
        cache = tiny.hf(input_ids=ids, use_cache=True).past_key_values
        before = [v.clone() for layer in cache.layers for v in _tensors(layer)]
        twin = fork(cache, 3)
        tiny.hf(input_ids=ids[:, :4].expand(3, -1), past_key_values=twin, use_cache=True)
    after = [v for layer in cache.layers for v in _tensors(layer)]
    assert len(before) > 8
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _tensors(layer):
    for value in vars(layer).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from (v for v in value.values() if isinstance(v, torch.Tensor))


def test_differences_need_the_same_items(tiny, behavior):
    one = propensity(tiny, prepare(tiny, behavior))
    other = propensity(tiny, prepare(tiny, behavior.take(3)))
    with pytest.raises(WrongInput, match="different items"):
        one.minus(other)
    assert set(one.minus(one)) == {0.0}


def test_shares_use_the_scorer_of_each_item(behavior):
    answers = [item.wanted if i < 9 else item.unwanted for i, item in enumerate(behavior.items)]
    assert shares(behavior, answers) == {"wanted": 0.75, "unwanted": 0.25, "neither": 0.0}
    assert shares(behavior, ["hello"] * 12)["neither"] == 1.0


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(tiny, behavior, monkeypatch):
    monkeypatch.setattr(type(tiny), "max_tokens", property(lambda self: 60))
    with pytest.raises(WrongInput, match="context of tiny"):
        prepare(tiny, behavior)
