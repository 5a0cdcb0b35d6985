"""Attribution: the parts sum to the whole, and each part is what the definition by linearity says it is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recurrence import DTYPES, LENGTHS, TOLERANCE, any_positions, error, example, kernel_input, pick, steps
from torch import Tensor
from torch.autograd import gradcheck

from probes.attribution import (
    attribute_output,
    attribute_readout,
    attribute_state,
    implicit_attention,
    over_spans,
    state_parts,
    statistics,
)
from probes.errors import WrongInput
from probes.recurrence import Directions, Recurrence, scan


def gather(values: Tensor, rows: Tensor) -> Tensor:
    """Some tokens of [prompt token ...], different for each prompt."""
    return torch.stack([value[places] for value, places in zip(values, rows, strict=True)])


def without(x: Recurrence, token: int) -> Recurrence:
    """The same recurrence with one token's value taken out; its key still erases."""
    v = x.v.clone()
    v[:, token] = 0
    return replace(x, v=v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_implicit_attention_puts_outputs_together_again(tokens: int, dtype: torch.dtype) -> None:
    x = example(tokens, dtype=dtype, seed=tokens)
    rows = any_positions(tokens).clamp(min=0)
    found = implicit_attention(x, rows)
    truth = gather(steps(x)["outputs"], rows).transpose(1, 2)
    assert error(found.outputs(x), truth) < TOLERANCE[dtype]
    assert error(found.parts(x).sum(3) + found.initial, truth) < TOLERANCE[dtype]
    after = torch.arange(tokens) > rows[:, None, :, None]
    assert not (found.weights * after).any()


def test_a_weight_is_the_change_of_an_output_by_a_value() -> None:
    """Autograd through the step-by-step scan: d o_t / d v_s is A[t, s] times the identity."""
    x = example(40, prompts=1, heads=1, group=2)
    rows = torch.tensor([[0, 17, 39]])
    found = implicit_attention(x, rows, chunk=16)
    x.v.requires_grad_()
    outputs = steps(x)["outputs"]
    for i, t in enumerate(rows[0].tolist()):
        for head in range(2):
            (slope,) = torch.autograd.grad(outputs[0, t, head, 3], x.v, retain_graph=True)
            assert error(found.weights[0, head, i], slope[0, :, head, 3]) < 1e-12
            assert not slope[0, :, head, :3].any()


def test_erasure_belongs_to_the_weights() -> None:
    """A second write with the same key and beta 1 leaves nothing of the first; without erasures both would stay."""
    k = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    k[..., 0] = 1
    x = Recurrence(q=k, k=k, v=torch.randn(1, 2, 1, 3).double(), beta=torch.ones(1, 2, 1).double(),
                   decay=torch.zeros(1, 2, 1).double())  # fmt: skip
    assert implicit_attention(x, torch.tensor([[0, 1]])).weights[0, 0].tolist() == [[1, 0], [0, 1]]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    tokens=st.integers(1, 30), prompts=st.integers(1, 3), heads=st.integers(1, 2), group=st.integers(1, 3),
    d_k=st.integers(1, 7), d_v=st.integers(1, 7), chunk=st.integers(1, 35), fade=st.sampled_from((0.0, 0.3, 100.0)),
    initial=st.booleans(), seed=st.integers(0, 99999),
)  # fmt: skip
def test_parts_sum_to_the_whole_for_any_shape(
    tokens: int, prompts: int, heads: int, group: int, d_k: int, d_v: int, chunk: int, fade: float, initial: bool,
    seed: int,
) -> None:  # fmt: skip
    shape: dict[str, Any] = {"prompts": prompts, "heads": heads, "group": group, "d_k": d_k, "d_v": d_v}
    x = example(tokens, **shape, fade=fade, initial=initial, seed=seed)
    at = torch.randint(-1, tokens, (prompts, 3), generator=torch.Generator().manual_seed(seed))
    truth = steps(x)
    states = pick(truth["states"], at)
    directions = Directions.of(torch.randn(heads * group, d_k, d_v, dtype=torch.float64), rank=min(d_k, d_v))
    read = attribute_readout(x, directions, at=at, chunk=chunk)
    expected = torch.einsum("pnhkv,hkv->pnh", states, directions.matrices)
    assert (read.tokens.sum(-1) + read.initial - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())
    norm = attribute_state(x, at=at, chunk=chunk)
    assert error(norm.whole, states.square().sum((-1, -2))) < 1e-12
    assert error(norm.tokens.sum(-1) + norm.initial, norm.whole) < 1e-12
    output = attribute_output(x, rows=at.clamp(min=0), chunk=chunk)
    expected = gather(truth["outputs"], at.clamp(min=0)).square().sum(-1)
    assert error(output.whole, expected) < 1e-12
    assert error(output.tokens.sum(-1) + output.initial, expected) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_contributes_what_is_missing_without_its_value(dtype: torch.dtype) -> None:
    x = example(80, dtype=dtype)
    at = torch.tensor([[79, 66, 12], [70, 63, -1]])
    directions = Directions.of(torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1)).double(), rank=3)
    matrices, S = directions.matrices, pick(steps(x)["states"], at)
    o = gather(steps(x)["outputs"], at.clamp(min=0))
    read, norm = attribute_readout(x, directions, at=at), attribute_state(x, at=at)
    output, parts = attribute_output(x, rows=at.clamp(min=0)), implicit_attention(x, at.clamp(min=0)).parts(x)
    for token in (0, 12, 13, 63, 64, 70, 79):
        less = steps(without(x, token))
        C = S - pick(less["states"], at)  # the token's part of the state
        c = o - gather(less["outputs"], at.clamp(min=0))
        one = [torch.einsum("pnhkv,hkv->pnh", C, matrices), (C * S).sum((-1, -2)), (c * o).sum(-1)]
        scales = [read.whole.abs().max(), norm.whole.max(), output.whole.max()]
        for found, expected, scale in zip((read, norm, output), one, scales, strict=True):
            assert (found.tokens[..., token] - expected).abs().max() < TOLERANCE[dtype] * scale
        assert (parts[:, :, :, token].transpose(1, 2) - c).abs().max() < TOLERANCE[dtype] * o.abs().max()
    start = steps(replace(x, v=torch.zeros_like(x.v)))
    assert error(read.initial, torch.einsum("pnhkv,hkv->pnh", pick(start["states"], at), matrices)) < TOLERANCE[dtype]
    assert error(norm.initial, (pick(start["states"], at) * S).sum((-1, -2))) < TOLERANCE[dtype]
    assert error(output.initial, (gather(start["outputs"], at.clamp(min=0)) * o).sum(-1)) < TOLERANCE[dtype]
    shares = norm.shares.sum(-1) + norm.initial_share
    assert error(shares, torch.ones_like(shares)) < TOLERANCE[dtype]


def test_parts_of_a_state_by_span() -> None:
    x = example(70)
    at, spans = torch.tensor([[69, 30], [64, -1]]), [[(0, 20), (20, 70)], [(0, 64), (64, 70)]]
    found, norm = state_parts(x, spans, at=at), attribute_state(x, at=at)
    S = pick(steps(x)["states"], at)
    assert error(found.parts.sum(2) + found.initial, S) < 1e-12
    for prompt, row in enumerate(spans):
        for i, (start, stop) in enumerate(row):
            v = x.v.clone()
            v[:, start:stop] = 0
            rest = pick(steps(replace(x, v=v))["states"], at)
            assert error(found.parts[prompt, :, i], (S - rest)[prompt]) < 1e-12
    inner = (found.parts * S[:, :, None]).sum((-1, -2)).transpose(2, 3)
    assert error(norm.over(spans), inner) < 1e-12


def test_left_padding_gets_no_share() -> None:
    given, mask = kernel_input(90, initial=True), torch.arange(90) >= torch.tensor([[37], [0]])
    at = torch.tensor([[89, 50], [89, 50]])
    padded = Recurrence.of_kernel(**given, mask=mask)
    alone = Recurrence.of_kernel(**{n: x[[0]] if n == "initial" else x[[0], 37:] for n, x in given.items()})
    rows, short = implicit_attention(padded, at), implicit_attention(alone, at[[0]] - 37)
    assert not rows.weights[0, :, :, :37].any()
    assert error(rows.weights[[0], :, :, 37:], short.weights) < 1e-5
    assert error(rows.initial[[0]], short.initial) < 1e-5
    norm, less = attribute_state(padded, at=at), attribute_state(alone, at=at[[0]] - 37)
    assert not norm.tokens[0, :, :, :37].any()
    assert error(norm.tokens[[0], ..., 37:], less.tokens) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_strong_decays_leave_weights_exact(dtype: torch.dtype) -> None:
    x = example(150, dtype=dtype, fade=0.02)
    decay = x.decay.clone()
    decay[:, 5:40:3] = -60
    decay[0, 70:80] = -100
    x = replace(x, decay=decay)
    rows = any_positions(150).clamp(min=0)
    found = implicit_attention(x, rows)
    assert found.weights.isfinite().all()
    assert error(found.outputs(x), gather(steps(x)["outputs"], rows).transpose(1, 2)) < TOLERANCE[dtype]


def test_gradients_agree_with_finite_differences() -> None:
    x = example(6, prompts=1, heads=1, group=2, d_k=3, d_v=2, fade=0.5)
    x = replace(x, decay=x.decay - 0.01)
    at = torch.tensor([[3, 5, -1]])
    directions = Directions.of(torch.randn(2, 3, 2, dtype=torch.float64), rank=1)
    leaves = [value.requires_grad_() for value in vars(x).values()]

    def everything(*given: Tensor) -> tuple[Tensor, ...]:
        inner = Recurrence(**dict(zip(("q", "k", "v", "beta", "decay", "initial"), given, strict=True)))
        rows = implicit_attention(inner, at.clamp(min=0), chunk=4)
        read = attribute_readout(inner, directions, at=at, chunk=4)
        norm = attribute_state(inner, at=at, chunk=4)
        return rows.weights, rows.initial, read.tokens, read.initial, norm.tokens, norm.initial, norm.whole

    assert gradcheck(everything, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_follow_their_definitions(dtype: torch.dtype) -> None:
    x = example(70, dtype=dtype)
    at, truth = any_positions(70), steps(x)
    found = statistics(x, at=at)
    before, after = truth["states"][:, :-1], truth["states"][:, 1:]
    decayed = before * x.decay.double().exp()[..., None, None]
    assert error(found.write, torch.linalg.matrix_norm(after - decayed)) < TOLERANCE[dtype]
    assert error(found.predicted, truth["predictions"].norm(dim=-1)) < TOLERANCE[dtype]
    cosine = torch.cosine_similarity(truth["predictions"], x.v.double(), dim=-1)
    p, v = truth["predictions"].norm(dim=-1), x.v.double().norm(dim=-1)
    assert error(found.novelty, 1 - 2 * cosine * p * v / (p**2 + v**2)) < TOLERANCE[dtype]
    assert ((found.novelty >= 0) & (found.novelty <= 2)).all()
    halves = (found.retention**found.half_life)[
        x.decay < -0.01
    ]  # of a weak decay the power of a rounded base says little
    assert error(halves, torch.full_like(halves, 0.5)) < 1e-5
    states = pick(truth["states"], at)
    assert error(found.norm, torch.linalg.matrix_norm(states)) < TOLERANCE[dtype]
    eigenvalues = torch.linalg.eigvalsh(states.mT @ states).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum(-1)
    assert error(found.effective_rank, entropy.exp()) < TOLERANCE[dtype]


def test_statistics_at_their_ends() -> None:
    """One key and one value, repeated with beta 1: the first is new, the second known, its opposite a surprise."""
    k = torch.zeros(1, 4, 1, 4, dtype=torch.float64)
    k[..., 0] = 1
    v = torch.tensor([1.0, 1, -1, 0]).double()[None, :, None, None] * torch.tensor([0.6, 0.8, 0]).double()
    ones = torch.ones(1, 4, 1).double()
    found = statistics(Recurrence(q=k, k=k, v=v, beta=ones, decay=0 * ones), at=torch.tensor([[-1, 0, 3]]))
    assert found.novelty[0, :, 0].tolist() == pytest.approx([1, 0, 2, 1])
    assert found.predicted[0, :, 0].tolist() == pytest.approx([0, 1, 1, 1])
    assert found.write[0, :, 0].tolist() == pytest.approx([1, 0, 2, 1])
    assert found.half_life[0, :, 0].tolist() == [math.inf] * 4
    assert found.norm[0, :, 0].tolist() == pytest.approx([0, 1, 0])
    assert found.effective_rank[0, :, 0].tolist() == pytest.approx([0, 1, 0])
    silent = statistics(Recurrence(q=k, k=k, v=0 * v, beta=ones, decay=0 * ones), at=torch.tensor([[0]]))
    assert not silent.novelty.any()


def test_sums_over_spans() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    found = over_spans(values, [[(0, 4), (1, 3)], [(3, 4), (0, 2)]])
    assert found[0].tolist() == [[6, 3], [22, 11], [38, 19]]
    assert found[1].tolist() == [[15, 25], [19, 33], [23, 41]]
    assert over_spans(values[:, 0], [[(0, 4)], [(3, 4)]]).tolist() == [[6], [15]]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[(0, 2)]], r"each of 2 prompts needs equally many spans, and at least one; seen are \[1\]"),
        ([[(0, 2)], [(0, 1), (1, 2)]], r"seen are \[1, 2\]"),
        ([[], []], r"seen are \[0, 0\]"),
        ([[(0, 2)], [(3, 5)]], r"span \(3, 5\) of prompt 1 is not within tokens 0 to 4"),
        ([[(2, 2)], [(0, 1)]], r"span \(2, 2\) of prompt 0"),
    ],
)
def test_wrong_spans_are_refused(spans: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        over_spans(torch.zeros(2, 3, 4), spans)
    with pytest.raises(WrongInput, match=message):
        state_parts(example(4), spans, at=torch.tensor([[3], [3]]))


def test_wrong_positions_are_refused() -> None:
    x = example(9)
    with pytest.raises(WrongInput, match=r"rows\[0, 0\] is -1; this recurrence has tokens 0 to 8$"):
        implicit_attention(x, torch.tensor([[-1], [2]]))
    with pytest.raises(WrongInput, match=r"at\[1, 0\] is 9"):
        attribute_state(x, at=torch.tensor([[-1], [9]]))
    with pytest.raises(WrongInput, match=r"this recurrence needs \[r, 4, 8\]"):
        attribute_readout(
            x, Directions(left=torch.zeros(1, 3, 8), right=torch.zeros(1, 3, 6)), at=torch.tensor([[1], [2]])
        )


def test_frames_are_tidy() -> None:
    x, at = example(5), torch.tensor([[4, 0], [3, 1]])
    tokens = statistics(x, at=at).frame()
    assert len(tokens) == 2 * 5 * 4
    found = attribute_state(x, at=at)
    row = found.frame().query("prompt == 1 and at == 3 and v_head == 2 and token == 1").iloc[0]
    assert row["contribution"] == found.tokens[1, 0, 2, 1].item()
    rows = implicit_attention(x, at)
    row = rows.frame().query("prompt == 0 and row == 4 and v_head == 3 and token == 2").iloc[0]
    assert row["weight"] == rows.weights[0, 3, 0, 2].item()
    states = statistics(x, at=at).states_frame()
    seen = states.query("prompt == 1 and at == 1 and v_head == 0")["norm"].item()
    expected = scan(x, at=at).states
    assert expected is not None
    assert seen == pytest.approx(expected[1, 1, 0].norm().item())
    assert str(rows) == "implicit attention of 2 rows to 5 tokens, 2 prompts x 4 heads"
    assert str(found) == "contributions of 5 tokens at 2 positions, 2 prompts x 4 heads"
