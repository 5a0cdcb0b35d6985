"""Teacher-forced scores against plain forwards over the whole text, and what a batch must not change."""

import copy
from dataclasses import replace

import pytest
import torch

from probes.behaviors import read_behavior
from probes.cost import counting
from probes.directions import Direction
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.partial import tiled
from probes.prompts import answer_ids, batches, pad
from probes.propensity import (
    Answers,
    answer_scores,
    continue_greedily,
    fork,
    generate,
    prepare,
    propensity,
)
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


@torch.no_grad()
def test_answers_of_any_length_and_number_are_scored_alike(tiny, behavior):
    """Single tokens, long ones beside them, three answers a prompt; and the same in rows that were repeated."""
    some = prepare(tiny, behavior.take(3))
    answers = (((9,), (7, 30, 12, 9), (30, 7)), ((12,), (9,), (7,)), ((7, 9, 9), (30,), (12, 12, 12, 12, 7)))
    for batch_tokens in (1, 100_000):
        rows = tuple(batches(tiny, [p.ids for p in some.prompts], batch_tokens=batch_tokens))
        found = answer_scores(tiny, replace(some, answers=answers, batches=rows))
        expected = [[by_hand(tiny, p.ids, a) for a in of] for p, of in zip(some.prompts, answers, strict=True)]
        assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4)
    batch = next(batches(tiny, [p.ids for p in some.prompts]))
    out = tiny.hf(**batch.inputs, use_cache=True)
    one = Answers.of(tiny, replace(some, answers=answers), batch.rows)
    two = one.tile(2)
    assert (one.each, two.each, two.ids.shape) == (3, 3, (18, 4))
    once = one.first(out.logits[:, -1]) + one.continued(tiny, fork(out.past_key_values, 3), batch.mask)
    cache = tiled(out.past_key_values, 2, each=3, layers=range(8))
    twice = two.first(out.logits[:, -1].repeat(2, 1)) + two.continued(tiny, cache, batch.mask.repeat(2, 1))
    assert torch.allclose(twice, once.repeat(2), atol=1e-4)
    assert torch.allclose(
        once.reshape(3, 3)[torch.tensor(batch.rows).argsort()].double(), torch.tensor(expected).double(), atol=1e-4
    )


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_greedy_answers_after_a_cache_are_those_of_generate(name, prompts, request):
    """Some end soon, at one of two tokens, one with its first; generation goes on for the others."""
    model = request.getfixturevalue(name)
    model = HybridModel(copy.deepcopy(model.hf), model.tokenizer, name="ending")
    batch = pad([p.ids for p in prompts], pad_id=model.tokenizer.pad_token_id, device=model.device)
    with torch.no_grad():
        out = model.hf(**batch.inputs, use_cache=True)
        said = model.hf.generate(**{k: v for k, v in batch.inputs.items() if k != "position_ids"}, max_new_tokens=9,
                                 do_sample=False)[:, batch.ids.shape[1] :]  # fmt: skip
    for ends in ([int(said[0, 3]), int(said[2, 6])], int(said[3, 0])):
        model.hf.generation_config.eos_token_id = ends
        for tokens in (1, 9):
            with torch.no_grad():
                cache = fork(out.past_key_values, 1)
                found = continue_greedily(model, out.logits[:, -1], cache, batch.mask, max_new_tokens=tokens)
            assert found == generate(model, prompts, max_new_tokens=tokens)
        lengths = {len(text.split()) for text in found}
        assert len(lengths) > 1
    assert 1 in lengths  # it ended at once


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


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(tiny, behavior, monkeypatch):
    monkeypatch.setattr(type(tiny), "max_tokens", property(lambda self: 60))
    with pytest.raises(WrongInput, match="context of tiny"):
        prepare(tiny, behavior)
