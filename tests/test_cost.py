"""What work costs, against hooks of the test's own and against lengths counted by hand."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from probes.behaviors import read_behavior
from probes.cost import Cost, counting
from probes.damage import read_general
from probes.directions import Direction
from probes.prompts import answer_ids
from probes.propensity import generate, prepare
from probes.texts import Texts
from probes.trials import How, Trial, Trials, start_of


@contextmanager
def tallied(model):
    """[tokens that entered the embedding, tokens that came out of an MLP], by hooks on modules of the test's choice."""
    tally = [0, 0]

    def add(at):
        def note(_, args, output):
            tally[at] += output.shape[0] * output.shape[1]

        return note

    with ExitStack() as stack:
        for module, at in ((model.decoder.embed_tokens, 0), *((layer.mlp, 1) for layer in model.layers)):
            stack.callback(module.register_forward_hook(add(at)).remove)
        yield tally


@pytest.fixture(scope="module")
def behavior():
    """Six items; one pair of single tokens, one of unequal length."""
    whole = read_behavior("follow-direction").take(6, seed=3)
    short = replace(whole.items[0], wanted="yes", unwanted="no")
    uneven = replace(whole.items[1], wanted="yes , the wall .", unwanted="no")
    return replace(whole, items=(short, uneven, *whole.items[2:]))


def direction_at(site: str, layer: int, size: int, shape: tuple[int, ...]) -> Direction:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return Direction(layer=layer, vector=vector / vector.norm(), norm=3.0, midpoint=0.0, site=site, shape=shape)


RESID, STATE = direction_at("resid", 4, 64, (64,)), direction_at("gdn.state", 5, 1536, (4, 16, 24))


def by_hand(model, behavior) -> int:
    """Layer tokens of both answers of every item, each after a run of its prompt; the last token predicts nothing."""
    tokens = 0
    for item in behavior.items:
        for answer in (item.wanted, item.unwanted):
            tokens += len(item.prompt(model)) + len(answer_ids(model, answer)) - 1
    return tokens * len(model.layers)


def test_forwards_and_generation_are_counted(tiny, prompts):
    with counting(tiny) as cost, tallied(tiny) as tally, torch.no_grad():
        ids = torch.tensor([prompts[0].ids])
        tiny.hf(input_ids=ids)
        assert (cost.forward_tokens, cost.layer_tokens) == (ids.shape[1], 8 * ids.shape[1])
        tiny.hf(inputs_embeds=torch.zeros(2, 5, 64))
        generate(tiny, prompts[:2], max_new_tokens=3)
    assert cost.forward_tokens == tally[0] + 10
    assert cost.layer_tokens == tally[1] == 8 * cost.forward_tokens
    assert cost.naive_layer_tokens == cost.layer_tokens  # nobody said that anything was saved
    with torch.no_grad():
        tiny.hf(input_ids=ids)
    assert cost.layer_tokens == tally[1]  # counting has ended
    assert cost.as_dict() == {
        "forward_tokens": cost.forward_tokens, "layer_tokens": tally[1], "naive_layer_tokens": tally[1],
    }  # fmt: skip


def test_what_a_block_does_instead_of_is_saved():
    cost = Cost(layer_tokens=5)
    with cost.instead_of(100):
        cost.layer_tokens += 30
    assert (cost.saved, cost.naive_layer_tokens) == (70, 105)


@pytest.mark.parametrize(
    ("direction", "how"), [(RESID, How()), (RESID, How(phase="decode")), (STATE, How(phase="both"))]
)
def test_the_cost_without_reuse_is_that_of_the_lengths(tiny, behavior, direction, how):
    some = [Trial.of(direction, dose) for dose in (0.3, -0.3)]
    turns = tuple(i % 2 for i in range(6))
    some.append(Trial(pushes=((direction, 0.3), (direction, 0.2)), turns=turns))
    with counting(tiny) as cost, tallied(tiny) as tally:
        trials = Trials(tiny, prepare(tiny, behavior), starts={start_of(direction)}, cost=cost)
        fast = trials.effects(some, how)
    assert (cost.forward_tokens, cost.layer_tokens) == tuple(tally)
    assert cost.naive_layer_tokens == 4 * by_hand(tiny, behavior)  # three trials, and the prompts without any
    with counting(tiny) as slow, tallied(tiny) as tally:
        trials = Trials(
            tiny, prepare(tiny, behavior, batch_tokens=1), starts=(), reuse=False, cost=slow, batch_tokens=1
        )
        assert trials.effects(some, how)[0] == pytest.approx(fast[0], abs=1e-3)
    assert (slow.forward_tokens, slow.layer_tokens) == tuple(tally)
    assert slow.naive_layer_tokens == slow.layer_tokens == 4 * by_hand(tiny, behavior)  # one by one there is no padding
    assert cost.layer_tokens < slow.layer_tokens / 2
    with counting(tiny) as padded:
        Trials(tiny, prepare(tiny, behavior), starts=(), reuse=False, cost=padded).scores(some[:1], how)
    assert padded.layer_tokens >= by_hand(tiny, behavior)


def test_only_what_an_edit_can_change_is_computed(tiny, behavior):
    """The prompts, the answers and one trial in one batch of equal prompts, where nothing is padding."""
    same = replace(behavior, items=tuple(replace(behavior.items[2], id=str(i)) for i in range(2)))
    prompt, answer = len(same.items[0].prompt(tiny)), len(answer_ids(tiny, same.items[0].wanted))
    assert answer == len(answer_ids(tiny, same.items[0].unwanted))
    answers = 2 * 2 * (answer - 1)
    for direction, edited in ((RESID, 2 * prompt), (STATE, 2)):  # a state is edited before the last token
        with counting(tiny) as cost:
            trials = Trials(tiny, prepare(tiny, same), starts={5}, cost=cost)
            _ = trials.base
            assert cost.layer_tokens == 8 * (2 * prompt + answers)
            trials.scores([Trial.of(direction, 1.0)])
            assert cost.layer_tokens == 8 * (2 * prompt + answers) + 3 * (edited + answers)
            trials.scores([Trial.of(direction, 1.0)], How(phase="decode"))
        assert cost.layer_tokens == 8 * (2 * prompt + answers) + 3 * (edited + 2 * answers)


def test_general_text_is_counted_alike(tiny):
    general = read_general(tiny).take(7)
    lengths = 8 * sum(map(len, general.ids))
    pushes = [(RESID, dose) for dose in (0.1, 0.2, -0.3)]
    with counting(tiny) as cost, tallied(tiny) as tally:
        texts = Texts(tiny, general, starts={5}, cost=cost)
        assert cost.naive_layer_tokens == lengths
        texts.ratios(pushes, How())
        assert cost.naive_layer_tokens == 4 * lengths
        texts.damage(pushes[0], How())  # plain and edited
    assert (cost.forward_tokens, cost.layer_tokens) == tuple(tally)
    assert cost.naive_layer_tokens == 6 * lengths
    with counting(tiny) as slow:
        texts = Texts(tiny, general, starts=(), reuse=False, cost=slow)
        texts.ratios(pushes, How())
        texts.damage(pushes[0], How())
    assert cost.layer_tokens < cost.naive_layer_tokens <= slow.layer_tokens
