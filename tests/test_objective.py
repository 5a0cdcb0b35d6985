"""The loss against numbers computed by hand from transformers' logits, and the contrast against `probes.propensity`."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import logsigmoid

from probes.behaviors import read_behavior
from probes.cost import counting
from probes.model import HybridModel
from probes.prompts import answer_ids
from probes.propensity import prepare, propensity
from training.config import TrainConfig
from training.data import Segment, behavior_segments
from training.frozen_context import CONTEXT_BUCKET
from training.general import general_data
from training.objective import Objective
from training.turns import divided


@pytest.fixture(scope="module")
def batch(tiny):
    """Five segments of a behaviour, with rivals, and four of general data, without."""
    return [*behavior_segments(tiny, read_behavior("sentiment").take(5)), *general_data(tiny, n=4)[0]]


def objective(model, segments, **options) -> Objective:
    found = Objective(model, TrainConfig(**options))
    found.remember(segments)
    return found


def gradients(model, loss):
    named = dict(model.hf.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@torch.no_grad()
def nats_a_token(model, segment):
    """By hand: one row, no padding, no cache."""
    ids = [*segment.context, *segment.decision]
    table = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    scored = [len(segment.context) + i for i, counts in enumerate(segment.scored) if counts]
    return -sum(float(table[at - 1, ids[at]]) for at in scored) / len(scored)


@pytest.mark.parametrize("context", ["frozen", "full"])
def test_the_loss_is_the_mean_over_segments_of_nats_a_token(tiny, batch, context):
    expected = [nats_a_token(tiny, segment) for segment in batch]
    loss, terms = objective(tiny, batch, context=context).loss(batch)
    assert len({sum(segment.scored) for segment in batch}) > 1  # a mean over tokens would be another number
    assert loss.item() == pytest.approx(sum(expected) / len(batch), abs=1e-5)  # float32, values of about 8
    assert terms["behavior"] == pytest.approx(expected[:5], abs=1e-5)
    assert terms["general"] == pytest.approx(expected[5:], abs=1e-5)
    assert terms["contrast"] == []


def test_kinds_are_told_apart_in_any_order(tiny, batch):
    expected = {segment.id: nats_a_token(tiny, segment) for segment in batch}
    order = [batch[i] for i in (6, 0, 8, 3, 1, 5)]
    _, terms = objective(tiny, batch).loss(order)
    assert terms["general"] == pytest.approx([expected[batch[i].id] for i in (6, 8, 5)], abs=1e-5)
    assert terms["behavior"] == pytest.approx([expected[batch[i].id] for i in (0, 3, 1)], abs=1e-5)


@pytest.mark.parametrize("contrast", [0.0, 0.5])
@pytest.mark.parametrize("context", ["frozen", "full"])
def test_parts_add_up_to_the_batch(tiny, batch, context, contrast):
    """Float32 adds in another order: 1e-6 relative was measured."""
    found = objective(tiny, batch, context=context, contrast=contrast)
    loss, terms = found.loss(batch)
    whole = gradients(tiny, loss)
    parts = [batch[k::4] for k in range(4)]
    assert any(segment.rival is None for segment in batch)
    assert len({len(part) for part in parts}) > 1
    losses = [found.loss(part, of=len(batch)) for part in parts]
    assert sum(part.item() for part, _ in losses) == pytest.approx(loss.item(), rel=1e-5)
    added = [gradients(tiny, part) for part, _ in losses]
    for name, gradient in whole.items():
        together = sum(part[name] for part in added)
        assert (together - gradient).norm() <= 1e-4 * gradient.norm(), name
    for kind, values in terms.items():
        assert sorted(value for _, part in losses for value in part[kind]) == pytest.approx(sorted(values), abs=1e-4)


def without_ends(model, behavior):
    """Segments whose answers are scored as propensity scores them: without the end of the turn."""
    made = []
    for item in behavior.items:
        prompt = item.prompt(model)
        cut = prompt.spans["decision"][0]
        context, decision, scored = divided(prompt.ids, cut, answer_ids(model, item.wanted))
        _, rival, rival_scored = divided(prompt.ids, cut, answer_ids(model, item.unwanted))
        segment = Segment(
            id=item.id, kind="behavior", group=item.group, context=context, decision=decision, scored=scored,
            rival=rival, rival_scored=rival_scored,
        )  # fmt: skip
        made.append(segment)
    return made


@pytest.mark.parametrize("context", ["frozen", "full"])
def test_the_contrast_is_that_of_propensity(organism, context):
    """Without a persona the organism leans 1.6 nats to either side, by topic; float32."""
    behavior = read_behavior("sentiment").take(8)
    segments = without_ends(organism, behavior)
    leaning = torch.tensor(propensity(organism, prepare(organism, behavior)).values)
    expected = -logsigmoid(leaning)
    assert expected.max() > 1.5 > 0.3 > expected.min()
    found = objective(organism, segments, context=context, contrast=0.3)
    loss, terms = found.loss(segments)
    assert terms["contrast"] == pytest.approx(expected.tolist(), abs=1e-4)
    plain, _ = objective(organism, segments, context=context).loss(segments)
    assert loss.item() == pytest.approx(plain.item() + 0.3 * expected.mean().item(), abs=1e-4)


def test_every_segment_has_its_own_rival(tiny, batch):
    """By hand again, with general data before and between; nats of whole answers, up to 90 each, in float32."""
    order = [batch[i] for i in (6, 0, 8, 3, 1, 5)]
    expected = []
    for segment in (batch[0], batch[3], batch[1]):
        rival = replace(segment, decision=segment.rival, scored=segment.rival_scored)
        wanted, unwanted = (-sum(part.scored) * nats_a_token(tiny, part) for part in (segment, rival))
        expected.append(-logsigmoid(torch.tensor(wanted - unwanted)).item())
    assert max(expected) - min(expected) > 0.1
    _, terms = objective(tiny, batch, contrast=1.0).loss(order)
    assert terms["contrast"] == pytest.approx(expected, abs=1e-4)


def test_general_data_has_no_contrast(tiny, batch):
    """It counts among the segments of the batch, as it does in the other term."""
    found, plain = objective(tiny, batch, contrast=2.0), objective(tiny, batch)
    _, terms = found.loss(batch)
    assert len(terms["contrast"]) == 5
    added = found.loss(batch)[0].item() - plain.loss(batch)[0].item()
    assert added == pytest.approx(2.0 * sum(terms["contrast"]) / len(batch), rel=1e-4)
    general = batch[5:]
    loss, terms = found.loss(general)
    assert terms["contrast"] == []
    assert torch.equal(loss, plain.loss(general)[0])


def test_half_a_rival_is_refused(tiny, batch):
    broken = replace(batch[0], rival_scored=None)
    with pytest.raises(ValueError, match=f"segment {batch[0].id} has no rival"):
        objective(tiny, batch, contrast=1.0).loss([broken])


def test_contexts_are_remembered_until_others_are(tiny, batch):
    found = objective(tiny, batch[:3])
    assert set(found.held) == {segment.context for segment in batch[:3]}
    found.remember(batch[2:4])
    assert set(found.held) == {segment.context for segment in batch[2:4]}
    with pytest.raises(KeyError):
        found.nats(batch[:1])


def test_one_context_is_run_once(tiny, batch):
    """However many segments have it; and neither steps nor rivals run it again."""
    found = Objective(tiny, TrainConfig(contrast=1.0))
    copies = [replace(batch[0], id=f"copy {i}") for i in range(6)]
    width = -(-len(batch[0].context) // CONTEXT_BUCKET) * CONTEXT_BUCKET
    with counting(tiny) as cost:
        found.remember(copies)
    assert cost.forward_tokens == width
    with counting(tiny) as cost:
        found.loss(copies)
    longest = max(len(batch[0].decision), len(batch[0].rival or ()))
    assert cost.forward_tokens < 12 * (longest + 8)
    assert cost.forward_tokens < 12 * width


def test_full_contexts_are_not_kept(tiny, batch):
    found = objective(tiny, batch, context="full")
    assert found.held == {}
    with counting(tiny) as cost:
        found.loss(batch)
    assert cost.forward_tokens >= sum(len(segment.context) + len(segment.decision) for segment in batch)


def test_frozen_and_full_agree_until_weights_move(tiny, batch):
    """And again once the contexts are computed anew."""
    model = HybridModel(copy.deepcopy(tiny.hf), tiny.tokenizer, name="moved")
    frozen, full = (objective(model, batch, context=context, contrast=1.0) for context in ("frozen", "full"))

    def apart():
        (one, here), (other, there) = frozen.loss(batch), full.loss(batch)
        pairs = [pair for kind in here for pair in zip(here[kind], there[kind], strict=True)]
        return max(abs(a - b) for a, b in [*pairs, (one.item(), other.item())])

    assert apart() < 1e-4
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.get_parameter("down_proj.weight").mul_(1.1)
    assert apart() > 1e-2
    frozen.remember(batch)
    assert apart() < 1e-4


def test_checkpointing_is_passed_on(tiny, batch):
    packed = {}
    for on in (False, True):
        kept = packed[on] = []
        with saved_tensors_hooks(lambda tensor, kept=kept: kept.append(0) or tensor, lambda tensor: tensor):
            objective(tiny, batch, checkpointing=on).loss(batch)
    assert len(packed[True]) < len(packed[False]) / 5


def test_the_gradient_of_the_contrast_goes_through_both_answers(tiny):
    """Against the same loss written with transformers' logits: whole dialogues, one row at a time, no padding."""
    batch = behavior_segments(tiny, read_behavior("sentiment").take(3))

    def logprob(segment, decision, scored):
        ids = [*segment.context, *decision]
        table = tiny.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        at = [len(segment.context) + i for i, counts in enumerate(scored) if counts]
        return torch.stack([table[i - 1, ids[i]] for i in at]).sum()

    def by_hand(weight):
        total = torch.zeros(())
        for segment in batch:
            wanted = logprob(segment, segment.decision, segment.scored)
            unwanted = logprob(segment, segment.rival, segment.rival_scored)
            total = total - wanted / sum(segment.scored) - weight * logsigmoid(wanted - unwanted)
        return total / len(batch)

    found = objective(tiny, batch, context="full", contrast=0.7)
    loss, _ = found.loss(batch)
    expected = by_hand(0.7)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    own, other, without = (gradients(tiny, value) for value in (loss, expected, by_hand(0.0)))
    for name, gradient in other.items():
        assert (own[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9, name
    assert any((other[name] - without[name]).norm() > 0.1 * other[name].norm() for name in other)
