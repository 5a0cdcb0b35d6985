"""Gradients against finite differences in float64 and `backward`, updates against matrices whose truth is known."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from analysis.gradients import (
    GradientConfig,
    Gradients,
    bringing_tokens,
    gradient,
    gradients,
    mix_of,
    objectives,
    open_gradients,
)
from analysis.updates import Updates, numerical_rank, pieces, snapshot, updates
from probes.behaviors import read_behavior
from probes.errors import WrongInput
from probes.model import HybridModel
from training.optimizers import text_parameters

CONFIG = GradientConfig(batches=2, batch=4, examples=8)
BEHAVIOR = read_behavior("follow-direction")


@pytest.fixture(scope="module")
def found(tiny) -> Gradients:
    return gradients(tiny, BEHAVIOR, CONFIG, progress=False)


def copied(model: HybridModel) -> HybridModel:
    return HybridModel(copy.deepcopy(model.hf), model.tokenizer, name=model.name)


def backward(model, objective, batch):
    """Squared norms of the gradients of a batch, by `backward` on a copy of the loss's model."""
    model.hf.zero_grad()
    objective.loss(batch)[0].backward()
    return {name: float(p.grad.double().square().sum()) for name, p in model.hf.named_parameters()}


def row_of(found, group, kind, context):
    return next(row for row in found.rows if (row.group, row.kind, row.context) == (group, kind, context))


@pytest.mark.parametrize("how", ["frozen", "full", "renewed"])
def test_gradients_are_those_of_finite_differences(tiny, monkeypatch, unchecked, how):
    """Frozen memory stays that of the weights as they were; renewed at each point it gives the full gradient.

    The kernel, the norms and the loss convert to float32 whatever the weights are; here they convert to float64. A
    central difference with h = 1e-5 is then off by h^2 times a third derivative and 1e-16 / h of the loss.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = copied(tiny)
    model.hf.double()
    batch = mix_of(model, BEHAVIOR, CONFIG).batch_at(0)[1:]  # two of the behaviour, one of general data
    frozen, full = objectives(model, CONFIG, batch)
    side = full if how == "full" else frozen
    named = text_parameters(model)
    measured = gradient(frozen if how == "frozen" else full, batch, named)
    generator = torch.Generator().manual_seed(0)
    along = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.detach().norm() for n, p in named}
    scale = math.sqrt(sum(float(d.square().sum()) for d in along.values()))
    start = {name: p.detach().clone() for name, p in named}

    def loss(step):
        with torch.no_grad():
            for name, p in named:
                p.copy_(start[name] + step / scale * along[name])
            if how == "renewed":
                frozen.remember(batch)
            return float(side.loss(batch)[0])

    h = 1e-5
    expected = (loss(h) - loss(-h)) / (2 * h)
    inner = sum(float((measured[name] * along[name]).sum()) for name, _ in named) / scale
    assert abs(expected) > 1e-3
    assert inner == pytest.approx(expected, rel=1e-6)


def test_norms_and_shares_are_those_of_backward(tiny, found):
    model = copied(tiny)
    mix = mix_of(model, BEHAVIOR, CONFIG)
    batches = [mix.batch_at(i) for i in range(CONFIG.batches)]
    sides = objectives(model, CONFIG, [segment for batch in batches for segment in batch])
    names = {id(p): name for name, p in model.hf.named_parameters()}
    own = {kind: {names[id(p)] for layer in model.of_kind(kind) for p in layer.block.parameters()} for kind in
           ("gdn", "attention")}  # fmt: skip
    for context, side in zip(("frozen", "full"), sides, strict=True):
        squares = [backward(model, side, batch) for batch in batches]
        for row in found.tensors:  # float32, and BLAS may add in another order: 1e-5
            expected = np.mean([s[row.name] for s in squares])
            assert getattr(row, context).value == pytest.approx(expected, rel=1e-5, abs=1e-14)
        sums = {kind: np.array([sum(s[name] for name in own[kind]) for s in squares]) for kind in own}
        answer = next(
            a for a in found.answers if "GDN layers hold" in a.sentence and f"{context} contexts" in a.question
        )
        assert answer.expected == 0.75
        assert answer.value.value == pytest.approx(np.mean(sums["gdn"] / sum(sums.values())), rel=1e-5)
        assert answer.value.lower <= answer.value.value <= answer.value.upper
        embedding = row_of(found, "embedding", "model", context).share.value
        assert embedding == pytest.approx(
            np.mean([s["model.embed_tokens.weight"] / sum(s.values()) for s in squares]), rel=1e-5
        )
    assert {row.name for row in found.tensors} == set(names.values())
    assert found.tied


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_shares_add_up_to_one_and_parts_to_their_whole(request, name):
    found = gradients(request.getfixturevalue(name), BEHAVIOR, CONFIG, progress=False)
    frame = found.frame()
    for context in ("frozen", "full"):
        rows = [row for row in found.rows if row.whole and row.context == context]
        assert sum(row.share.value for row in rows) == pytest.approx(1, abs=1e-12)
        assert sum(row.parameters for row in rows) == pytest.approx(1, abs=1e-12)
    if name == "llama":
        assert set(frame["kind"]) == {"attention", "model"}
        assert not found.tied
        assert {"embedding", "output"} <= set(frame["group"])
        assert not any("GDN" in answer.sentence for answer in found.answers)
        return
    for context in ("frozen", "full"):
        for whole, kind, parts in (("qkv", "gdn", "qkv.q qkv.k qkv.v"), ("q", "attention", "q.query q.gate")):
            of_parts = [row_of(found, part, kind, context).share.value for part in parts.split()]
            assert sum(of_parts) == pytest.approx(row_of(found, whole, kind, context).share.value, rel=1e-12)


def test_rows_of_a_part_are_those_that_make_it(tiny):
    """The rows q.query make what enters q_norm, and the rows of qkv are divided as the mixer divides them."""
    parts = {(p.name, p.part): p for p in pieces({n: tuple(p.shape) for n, p in tiny.hf.named_parameters()})}
    assert sum(p.elements for p in parts.values()) == sum(p.numel() for p in tiny.hf.parameters())
    mixer, seen = tiny.layers[3].mixer, {}
    handles = [
        mixer.q_proj.register_forward_hook(lambda _, args, __: seen.update(x=args[0])),
        mixer.q_norm.register_forward_hook(lambda _, args, __: seen.update(query=args[0])),
    ]
    with torch.no_grad():
        tiny.hf(input_ids=torch.arange(5)[None])
    for handle in handles:
        handle.remove()
    weight = parts["model.layers.3.self_attn.q_proj.weight", "q.query"].of(mixer.q_proj.weight)
    assert torch.allclose(seen["x"] @ weight.T, seen["query"].flatten(2), atol=1e-5)
    gdn = tiny.layers[0].mixer
    ends = [parts["model.layers.0.linear_attn.in_proj_qkv.weight", f"qkv.{x}"].rows[0][1] for x in "qkv"]
    assert ends == [gdn.key_dim, 2 * gdn.key_dim, 2 * gdn.key_dim + gdn.value_dim]


def test_without_an_output_of_attention_its_q_k_and_v_have_no_gradient(tiny, tmp_path):
    model = copied(tiny)
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "o_proj" in name:
                parameter.zero_()
    found = gradients(model, BEHAVIOR, CONFIG, progress=False)
    for context in ("frozen", "full"):
        for group in ("q", "q.query", "q.gate", "k", "v", "q_norm", "k_norm"):
            row = row_of(found, group, "attention", context)
            assert row.share.value == row.share.upper == 0
            assert math.isnan(row.cosine.value)
            assert math.isnan(row.ratio.value)
        assert row_of(found, "o", "attention", context).share.value > 0
        assert row_of(found, "mlp up", "attention", context).share.value > 0
    told = next(answer for answer in found.answers if answer.question.startswith("does W_q of attention"))
    assert "not measured" in told.sentence
    assert [row.rank.value for row in found.ranks if row.group in ("q", "k", "v")] == [0] * 12
    found.save(tmp_path / "gradients.json")
    again = open_gradients(tmp_path)  # what is not a number stays none
    assert math.isnan(row_of(again, "k", "attention", "full").cosine.value)
    assert str(again) == str(found)


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_without_a_context_both_gradients_are_the_same(request, name):
    model = request.getfixturevalue(name)
    batch = [replace(segment, context=()) for segment in mix_of(model, BEHAVIOR, CONFIG).batch_at(0)]
    frozen, full = objectives(model, CONFIG, batch)
    named = text_parameters(model)
    one, other = gradient(frozen, batch, named), gradient(full, batch, named)
    for key in one:  # the sums of float32 are in another order, since one is padded on the left
        assert (one[key] - other[key]).norm() <= 1e-4 * other[key].norm() + 1e-7, key


def test_a_frozen_gradient_has_at_most_as_many_ranks_as_decision_tokens(tiny, found):
    assert {(row.group, row.kind) for row in found.ranks} == {
        *((group, "attention") for group in ("q", "k", "v", "o")), *((group, "gdn") for group in ("qkv", "z", "b", "a"))
    }  # fmt: skip
    assert all(row.beyond == 0 for row in found.ranks)
    by = {(row.group, row.layer, row.context): row for row in found.ranks}
    for layer in (3, 7):
        frozen, full = (by["k", layer, context] for context in ("frozen", "full"))
        assert frozen.rank.value <= frozen.tokens.value < full.rank.value
        assert frozen.rank.value > frozen.tokens.value - 3  # and nearly as many
    mix = mix_of(tiny, BEHAVIOR, CONFIG)
    segment = mix.behavior[0]
    sides = objectives(tiny, CONFIG, [segment])
    for context, side in zip(("frozen", "full"), sides, strict=True):
        measured = gradient(side, [segment], text_parameters(tiny))
        for name in ("layers.3.self_attn.k_proj", "layers.4.linear_attn.in_proj_qkv"):
            matrix = measured[f"model.{name}.weight"].double().numpy()
            rank = numerical_rank(torch.from_numpy(matrix))
            assert rank == np.linalg.matrix_rank(matrix, rtol=1e-5)
            assert rank <= bringing_tokens(segment, context)


def test_only_tokens_up_to_the_last_that_predicts_bring_gradient(llama):
    """The embedding of a model whose output layer is another has gradients in the rows of exactly those tokens."""
    segment = mix_of(llama, BEHAVIOR, CONFIG).behavior[0]
    for context, side in zip(("frozen", "full"), objectives(llama, CONFIG, [segment]), strict=True):
        ids = [*(segment.context if context == "full" else ()), *segment.decision]
        expected = set(ids[: bringing_tokens(segment, context)])
        measured = gradient(side, [segment], text_parameters(llama))["model.embed_tokens.weight"]
        assert set(measured.norm(dim=1).nonzero()[:, 0].tolist()) == expected
        assert bringing_tokens(segment, context) == len(ids) - 1


def test_ranks_are_left_out_where_rounding_would_fill_them(tiny):
    model = copied(tiny)
    model.hf.bfloat16()
    found = gradients(model, BEHAVIOR, replace(CONFIG, batch=2), progress=False)
    assert found.ranks == ()
    assert not any("rank" in answer.question for answer in found.answers)
    assert found.frame("ranks").empty


def test_the_model_is_left_as_it_was(tiny):
    model = copied(tiny)
    parameters = list(model.hf.parameters())
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    grads = [parameter.grad for parameter in parameters]
    before = snapshot(model)
    found = gradients(model, BEHAVIOR, CONFIG, progress=False)
    assert [parameter.requires_grad for parameter in parameters] == [i % 3 > 0 for i in range(len(parameters))]
    for i, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        assert parameter.grad is grad
        assert grad is None or bool((grad == i).all())
    assert all(torch.equal(value, before[name]) for name, value in model.hf.named_parameters())
    assert row_of(found, "embedding", "model", "full").share.value > 0  # asked for or not


def test_a_result_is_read_as_it_was_written(found, tmp_path):
    found.save(tmp_path / "gradients.json")
    assert open_gradients(tmp_path) == found
    assert str(found).startswith("follow-direction on tiny: with frozen contexts W_q of attention layers (q.query)")
    assert "\n" not in str(found)
    for what in ("groups", "tensors", "ranks", "answers"):
        assert len(found.frame(what)) > 4
    assert {"share", "share_lower", "share_upper", "cosine", "ratio"} <= set(found.frame().columns)


def test_wrong_input_is_refused(tiny, found, tmp_path):
    with pytest.raises(WrongInput, match="batches must be at least 2, saw 1"):
        GradientConfig(batches=1)
    with pytest.raises(WrongInput, match=r"general_share must lie between 0 and 1, saw 1\.5"):
        GradientConfig(general_share=1.5)
    with pytest.raises(WrongInput, match="unknown table 'layers'; allowed are groups, tensors, ranks, answers"):
        found.frame("layers")
    with pytest.raises(WrongInput, match="no gradients at"):
        open_gradients(tmp_path)
    (tmp_path / "gradients.json").write_text('{"rows": 3}')
    with pytest.raises(WrongInput, match="is not a measurement of gradients"):
        open_gradients(tmp_path)
    model = copied(tiny)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(WrongInput, match="the loss of a batch is nan"):
        gradients(model, BEHAVIOR, CONFIG, progress=False)


def planted(change: torch.Tensor, before: torch.Tensor | None = None) -> Updates:
    """Updates of a single k_proj."""
    name = "model.layers.0.self_attn.k_proj.weight"
    before = torch.zeros_like(change) if before is None else before
    return updates({name: before}, {name: before + change})


def test_ranks_of_known_updates():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (7, 12))
    row = planted(torch.outer(u, v)).rows[0]
    assert (row.effective_rank, row.stable_rank, row.full_rank) == (
        pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-9), 7,
    )  # fmt: skip
    orthogonal = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    row = planted(0.01 * orthogonal).rows[0]
    assert (row.effective_rank, row.stable_rank) == (pytest.approx(9, rel=1e-9), pytest.approx(9, rel=1e-9))
    matrix = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    shares = squares / squares.sum()
    row = planted(matrix).rows[0]
    assert row.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert row.stable_rank == pytest.approx(squares.sum() / squares.max(), rel=1e-9)
    assert (row.group, row.kind) == ("k", "attention")


def test_size_and_sparseness_of_an_update_made_by_hand():
    """Above 1 the numbers of bfloat16 are 2^-7 = 0.0078 apart, so 1.0039 and less become 1."""
    before = torch.tensor([[1, 1, 1, 1.0038]], dtype=torch.float32)
    change = torch.tensor([[0, 0.001, 0.005, 0.0004]], dtype=torch.float32)
    row = planted(change, before).rows[0]
    assert row.unchanged == 0.25
    assert row.saved == 0.5  # the last one crosses the middle between 1 and 1.0078
    assert row.in_place == 0.25  # but is too little to move a weight that is 1 already
    assert row.concentrated == 0.25
    assert row.relative == pytest.approx(math.sqrt((0.001**2 + 0.005**2 + 0.0004**2) / (3 + 1.0038**2)), rel=1e-3)
    assert planted(torch.ones(2, 5)).rows[0].concentrated == 0.9
    assert planted(torch.ones(2, 5)).rows[0].relative == math.inf
    low = planted(torch.tensor([[0.5, 0.0]], dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bfloat16)).rows[0]
    assert (low.saved, low.in_place, low.unchanged) == (0.5, 0.5, 0.5)


def test_updates_of_a_model(tiny):
    model = copied(tiny)
    before = snapshot(model)
    none = updates(before, snapshot(model))
    assert str(none).startswith("no weight changed")
    assert none.overall.unchanged == 1
    assert none.overall.concentrated == none.overall.saved == none.overall.relative == 0
    assert none.overall.effective_rank is None
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if "in_proj_qkv" in name:
                parameter[: tiny.layers[0].mixer.key_dim].mul_(1.5)
    found = updates(before, snapshot(model))
    frame = found.frame().set_index(["group", "kind"])
    moved = frame[frame["relative"] > 0].index
    assert set(moved) == {("qkv", "gdn"), ("qkv.q", "gdn"), ("all", "all")}
    assert frame.loc[("qkv.q", "gdn"), "relative"] == pytest.approx(0.5, rel=1e-6)
    assert frame.loc[("conv", "gdn"), ["effective_rank", "stable_rank"]].isna().all()
    assert before["model.embed_tokens.weight"].data_ptr() != model.hf.model.embed_tokens.weight.data_ptr()
    assert found.overall.elements == sum(p.numel() for p in model.hf.parameters())
    assert Updates.of(json.loads(json.dumps(found.as_dict()))) == found
    assert str(found).startswith("weights moved by ")


def test_weights_that_cannot_be_compared_are_refused():
    one = torch.ones(2, 2)
    with pytest.raises(WrongInput, match="b is only in those after"):
        updates({"a": one}, {"a": one, "b": one})
    with pytest.raises(WrongInput, match=r"a is \[2, 2\] before and \[2\] after"):
        updates({"a": one}, {"a": one[0]})
    with pytest.raises(WrongInput, match="4 values of a after are not finite"):
        updates({"a": one}, {"a": one / 0})
    with pytest.raises(WrongInput, match="no weights of a float dtype"):
        updates({"a": one.int()}, {"a": one.int()})
    with pytest.raises(WrongInput, match="these are not updates"):
        Updates.of({"rows": [3]})
