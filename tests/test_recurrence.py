"""The recurrence: against a float64 scan that goes step by step, and against transformers' own kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from transformers.models.qwen3_5 import modeling_qwen3_5 as kernels

from probes.errors import WrongInput
from probes.recurrence import Directions, Recurrence, scan

# Relative to the largest value of a tensor. Measured: at most 3e-7 and 2e-13 (6e-16 without strong decays).
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129)
DTYPES = (torch.float32, torch.float64)


def example(
    tokens: int, *, prompts: int = 2, heads: int = 2, group: int = 2, d_k: int = 8, d_v: int = 6, fade: float = 0.1,
    initial: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Recurrence:  # fmt: skip
    """A random recurrence; decays are uniform in [-fade, 0]."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    def uniform() -> Tensor:
        return torch.rand(prompts, tokens, heads * group, dtype=torch.float64, generator=random)

    x = Recurrence.of_kernel(
        normal(prompts, tokens, heads, d_k),
        normal(prompts, tokens, heads, d_k),
        normal(prompts, tokens, heads * group, d_v),
        beta=uniform(),
        decay=-fade * uniform(),
        initial=normal(prompts, heads * group, d_k, d_v) if initial else None,
    )
    converted: dict[str, Any] = {name: None if value is None else value.to(dtype) for name, value in vars(x).items()}
    return Recurrence(**converted)


def steps(x: Recurrence) -> dict[str, Tensor]:
    """The definition, token by token in float64. `states[:, t + 1]` is the state after token t."""
    doubles: dict[str, Any] = {name: None if value is None else value.double() for name, value in vars(x).items()}
    q, k = (doubles[name].repeat_interleave(x.group, dim=2) for name in "qk")
    S = torch.zeros(len(k), k.shape[2], k.shape[3], x.v.shape[3], dtype=torch.float64)
    S = S if x.initial is None else doubles["initial"]
    found: dict[str, list[Tensor]] = {"states": [S], "outputs": [], "writes": [], "predictions": []}
    for t in range(x.tokens):
        S = S * doubles["decay"][:, t, :, None, None].exp()
        predicted = torch.einsum("phkv,phk->phv", S, k[:, t])
        u = doubles["beta"][:, t, :, None] * (doubles["v"][:, t] - predicted)
        S = S + torch.einsum("phk,phv->phkv", k[:, t], u)
        for name, value in (("states", S), ("writes", u), ("predictions", predicted)):
            found[name].append(value)
        found["outputs"].append(torch.einsum("phkv,phk->phv", S, q[:, t]))
    return {name: torch.stack(values, 1) for name, values in found.items()}


def error(seen: Tensor | None, truth: Tensor) -> float:
    """Largest difference, relative to the largest true value."""
    assert seen is not None
    assert seen.shape == truth.shape
    return ((seen - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


def pick(trajectory: Tensor, at: Tensor) -> Tensor:
    """States after tokens `at` from a trajectory that begins with the initial state."""
    return torch.stack([row[places + 1] for row, places in zip(trajectory, at, strict=True)])


def any_positions(tokens: int, prompts: int = 2, n: int = 9) -> Tensor:
    """Unsorted, with repeats, the initial state, the first and the last token, different for each prompt."""
    random = torch.Generator().manual_seed(tokens)
    at = torch.randint(-1, tokens, (prompts, n), generator=random)
    at[0, :3] = torch.tensor([tokens - 1, -1, 0])
    at[-1, -1] = at[-1, 0]
    return at


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_scan_agrees_with_single_steps(tokens: int, dtype: torch.dtype) -> None:
    x = example(tokens, dtype=dtype, seed=tokens)
    at, truth = any_positions(tokens), steps(x)
    directions = Directions.of(torch.randn(4, 8, 6, dtype=dtype), rank=2)
    found = scan(x, at=at, directions=directions, writes=True, predictions=True)
    read = torch.einsum("pthkv,hkv->pth", truth["states"][:, 1:], directions.matrices.double())
    assert found.outputs.dtype == dtype
    assert error(found.outputs, truth["outputs"]) < TOLERANCE[dtype]
    assert error(found.final, truth["states"][:, -1]) < TOLERANCE[dtype]
    assert error(found.states, pick(truth["states"], at)) < TOLERANCE[dtype]
    assert error(found.readouts, read) < TOLERANCE[dtype]
    assert error(found.writes, truth["writes"]) < TOLERANCE[dtype]
    assert error(found.predictions, truth["predictions"]) < TOLERANCE[dtype]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    tokens=st.integers(1, 40), prompts=st.integers(1, 3), heads=st.integers(1, 3), group=st.integers(1, 3),
    d_k=st.integers(1, 9), d_v=st.integers(1, 9), chunk=st.integers(1, 45), fade=st.sampled_from((0.0, 0.3, 100.0)),
    initial=st.booleans(), n=st.integers(0, 7), tracked=st.booleans(), seed=st.integers(0, 99999),
)  # fmt: skip
def test_scan_agrees_for_any_shape(
    tokens: int, prompts: int, heads: int, group: int, d_k: int, d_v: int, chunk: int, fade: float,
    initial: bool, n: int, tracked: bool, seed: int,
) -> None:  # fmt: skip
    shape: dict[str, Any] = {"prompts": prompts, "heads": heads, "group": group, "d_k": d_k, "d_v": d_v}
    x = example(tokens, **shape, fade=fade, initial=initial, seed=seed)
    at = torch.randint(-1, tokens, (prompts, n), generator=torch.Generator().manual_seed(seed))
    truth = steps(x)
    found = scan(replace(x, v=x.v.requires_grad_(tracked)), at=at, chunk=chunk)
    assert error(found.outputs, truth["outputs"]) < 1e-12
    assert found.states is not None
    assert found.states.shape == (prompts, n, heads * group, d_k, d_v)
    if n:
        assert error(found.states, pick(truth["states"], at)) < 1e-12


def test_autograd_changes_no_result() -> None:
    """Under autograd results are put together from pieces; else each piece is written to its place."""
    x, at = example(129), any_positions(129)
    directions = Directions.of(torch.randn(4, 8, 6, dtype=torch.float64), rank=2)
    bare = scan(x, at=at, directions=directions, writes=True, predictions=True)
    tracked = scan(
        replace(x, beta=x.beta.requires_grad_()), at=at, directions=directions, writes=True, predictions=True
    )
    for name, value in vars(tracked).items():
        assert value.requires_grad, name
        assert torch.equal(value, vars(bare)[name]), name


def test_every_state_at_once() -> None:
    """More snapshots of a chunk than are worked on together."""
    x = example(70, prompts=1, heads=1, group=1, d_k=128, d_v=128, dtype=torch.float32)
    at = torch.arange(69, -2, -1)[None]
    assert error(scan(x, at=at).states, steps(x)["states"].flip(1)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 16, 64, 200])
def test_strong_decays(chunk: int, dtype: torch.dtype) -> None:
    """Tokens that forget everything, between tokens that keep it: what comes after must not lose precision."""
    x = example(150, dtype=dtype, fade=0.02)
    decay = x.decay.clone()
    decay[:, 5:40:3] = -60
    decay[0, 70:80] = -100
    decay[1, 100] = -1e30
    x = replace(x, decay=decay)
    truth, at = steps(x), any_positions(150)
    found = scan(x, at=at, chunk=chunk)
    assert error(found.outputs, truth["outputs"]) < TOLERANCE[dtype]
    assert error(found.states, pick(truth["states"], at)) < TOLERANCE[dtype]


def test_chunks_that_only_decay_keep_gradients_finite() -> None:
    x = example(130, dtype=torch.float32, fade=100)
    leaves = {name: value.requires_grad_() for name, value in vars(x).items()}
    found = scan(Recurrence(**leaves), at=any_positions(130))
    (found.outputs.sum() + found.states.sum()).backward()  # pyright: ignore[reportOptionalMemberAccess]
    assert all(value.grad.isfinite().all() for value in leaves.values())


def kernel_input(tokens: int, *, initial: bool) -> dict[str, Any]:
    """What transformers' kernels are given: not normalised, float32, grouped heads."""
    torch.manual_seed(tokens)
    q, k, v = torch.randn(2, tokens, 2, 16), torch.randn(2, tokens, 2, 16), torch.randn(2, tokens, 6, 24)
    beta, decay = torch.rand(2, tokens, 6), -0.2 * torch.rand(2, tokens, 6)
    return dict(q=q, k=k, v=v, beta=beta, decay=decay, initial=torch.randn(2, 6, 16, 24) if initial else None)


def by_kernel(name: str, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return getattr(kernels, name)(
        given["q"], given["k"], given["v"], g=given["decay"], beta=given["beta"], initial_state=given["initial"],
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("tokens", [1, 65, 150])
@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_scan_agrees_with_the_kernels_of_transformers(name: str, tokens: int, initial: bool) -> None:
    given = kernel_input(tokens, initial=initial)
    found = scan(Recurrence.of_kernel(**given))
    outputs, state = by_kernel(name, given)
    assert error(found.outputs, outputs) < 1e-5
    assert error(found.final, state) < 1e-5


def test_kernel_input_in_half_precision_becomes_float32() -> None:
    given = {name: value.bfloat16() for name, value in kernel_input(70, initial=True).items()}
    found = scan(Recurrence.of_kernel(**given))
    outputs, state = by_kernel("torch_recurrent_gated_delta_rule", {n: value.float() for n, value in given.items()})
    assert found.outputs.dtype == torch.float32
    assert error(found.outputs, outputs) < 1e-5
    assert error(found.final, state) < 1e-5


@pytest.mark.parametrize("convert", [torch.Tensor.long, torch.Tensor.bool, torch.Tensor.float])
def test_left_padding_is_exact(convert: Any) -> None:
    """A prompt behind padding, with a given initial state, has the states and outputs that it has alone."""
    given = kernel_input(100, initial=True)
    padding = torch.tensor([37, 0])
    mask = torch.arange(100) >= padding[:, None]
    whole = scan(Recurrence.of_kernel(**given, mask=convert(mask)), at=torch.tensor([[36, 37, 99], [0, 1, 99]]))
    assert whole.states is not None
    assert torch.equal(whole.states[0, 0], given["initial"][0])
    for prompt, start in enumerate(padding.tolist()):
        alone = {
            name: value[[prompt]] if name == "initial" else value[[prompt], start:] for name, value in given.items()
        }
        truth = steps(Recurrence.of_kernel(**alone))
        assert error(whole.outputs[[prompt], start:], truth["outputs"]) < 1e-5
        assert error(whole.final[[prompt]], truth["states"][:, -1]) < 1e-5
    unmasked = scan(Recurrence.of_kernel(**given))
    assert error(unmasked.final[0], whole.final[0]) > 1e-3  # without the mask padding does leave its trace


def test_a_scan_continues_where_another_ended() -> None:
    x = example(100)
    whole, first = scan(x), scan(x.keep(0, 41))
    second = scan(x.keep(41, 100, initial=first.final))
    assert error(torch.cat([first.outputs, second.outputs], 1), whole.outputs) < 1e-12
    assert error(second.final, whole.final) < 1e-12
    afresh = x.keep(41, 100)
    assert afresh.initial is None
    assert (
        error(scan(afresh).final, steps(replace(afresh, initial=torch.zeros_like(first.final)))["states"][:, -1])
        < 1e-12
    )


def test_directions_of_full_rank_are_exact_and_of_lower_rank_the_nearest() -> None:
    matrices = torch.randn(3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error(Directions.of(matrices, rank=6).matrices, matrices) < 1e-12
    lost = (Directions.of(matrices, rank=2).matrices - matrices).square().sum((-1, -2))
    assert error(lost, torch.linalg.svdvals(matrices)[:, 2:].square().sum(-1)) < 1e-12  # Eckart and Young


def test_gradients_agree_with_finite_differences() -> None:
    x = example(7, prompts=1, heads=1, group=2, d_k=3, d_v=2, fade=0.5)
    x = replace(x, decay=x.decay - 0.01)  # finite differences must not leave what is allowed
    at = torch.tensor([[4, -1, 6, 4]])
    left, right = torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, 2, 2, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (*vars(x).values(), left, right)]

    def everything(*given: Tensor) -> tuple[Tensor, ...]:
        inner = Recurrence(**dict(zip(("q", "k", "v", "beta", "decay", "initial"), given, strict=False)))
        directions = Directions(left=given[6], right=given[7])
        found = scan(inner, at=at, directions=directions, writes=True, predictions=True, chunk=3)
        return tuple(vars(found).values())

    assert gradcheck(everything, leaves, fast_mode=True)
    assert gradgradcheck(everything, leaves, fast_mode=True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 9, 2, 7)}, r"q must fit the shapes of k and v: q \[2, 9, 2, 7\], k \[2, 9, 2, 8\]"),
        ({"v": torch.zeros(2, 8, 4, 6)}, r"v must fit the shapes of k and v"),
        ({"beta": torch.zeros(2, 9, 4, 1)}, r"needs q, k, v \[prompt token head d\].*beta \[2, 9, 4, 1\]"),
        ({"initial": torch.zeros(2, 4, 6, 8)}, r"initial must fit .*initial \[2, 4, 6, 8\]"),
        ({"decay": torch.full((2, 9, 4), 0.5)}, r"finite and <= 0, seen from 0.5 to 0.5"),
        ({"decay": torch.full((2, 9, 4), -math.inf)}, r"finite and <= 0"),
        ({"decay": torch.full((2, 9, 4), math.nan)}, r"finite and <= 0"),
        ({"beta": torch.zeros(2, 9, 4).double()}, r"not torch.float32, torch.float64; `of_kernel` converts"),
    ],
)
def test_input_that_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    x = example(9, dtype=torch.float32)
    with pytest.raises(WrongInput, match=message):
        replace(x, **change)


@pytest.mark.usefixtures("unchecked")
def test_heads_and_tokens_that_do_not_fit_are_refused() -> None:
    x = example(9, dtype=torch.float32)
    three = {"q": torch.zeros(2, 9, 3, 8), "k": torch.zeros(2, 9, 3, 8)}
    with pytest.raises(WrongInput, match="v_heads must be a multiple of heads"):
        replace(x, **three)
    none = {name: getattr(x, name)[:, :0] for name in ("q", "k", "v", "beta", "decay")}
    with pytest.raises(WrongInput, match="at least one token"):
        replace(x, **none)
    with pytest.raises(WrongInput, match=r"not torch\.float16"):
        Recurrence(**{name: value.half() for name, value in vars(x).items()})
    given = kernel_input(9, initial=False)
    with pytest.raises(WrongInput, match=r"mask \[2, 8\] must be \[prompt token\], here \[2, 9\]"):
        Recurrence.of_kernel(**given, mask=torch.ones(2, 8))


@pytest.mark.usefixtures("unchecked")
def test_questions_that_make_no_sense_are_refused() -> None:
    x = example(9)
    with pytest.raises(WrongInput, match=r"at\[1, 0\] is 9; this recurrence has tokens 0 to 8, and -1 is the initial"):
        scan(x, at=torch.tensor([[0], [9]]))
    with pytest.raises(WrongInput, match=r"at\[0, 1\] is -2"):
        scan(x, at=torch.tensor([[0, -2], [9, 1]]))
    with pytest.raises(WrongInput, match=r"at \[1, 1\] must be \[prompt n\] with 2 prompts"):
        scan(x, at=torch.tensor([[0]]))
    with pytest.raises(WrongInput, match="chunk of 0 tokens"):
        scan(x, at=torch.tensor([[0], [1]]), chunk=0)
    with pytest.raises(WrongInput, match=r"left \[1, 4, 6\].*needs \[r, 4, 8\] and \[r, 4, 6\]"):
        scan(x, directions=Directions(left=torch.zeros(1, 4, 6), right=torch.zeros(1, 4, 8)))
    with pytest.raises(WrongInput, match=r"rank 7 is impossible .* allowed are 1 to 6"):
        Directions.of(torch.randn(4, 8, 6), rank=7)
    with pytest.raises(WrongInput, match="tokens 5 to 5 cannot be kept"):
        x.keep(5, 5)


def test_results_say_what_they_are() -> None:
    x = example(9)
    assert str(x) == "2 prompts x 9 tokens, 4 states of 8x6, initial state given"
    assert str(scan(x)) == "scan: outputs [2, 9, 4, 6], final [2, 4, 8, 6]"
