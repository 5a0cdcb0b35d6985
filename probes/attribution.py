"""Which tokens made a GDN state, an output or a readout what it is: exact shares that sum to the whole.

For given keys, queries, beta and decay the recurrence (see `probes.recurrence`) is linear in the values and in the
initial state. So whatever is read from a state is a sum of one part for each token and one for the initial state:

    o_t = sum_s A[t, s] v_s + what is left of the initial state

A is the layer's *implicit attention*. Unlike the weights of softmax attention its entries have either sign and no
fixed sum. It is not q_t . k_s times a decay: every later token also erases along its own key, (I - beta k k^T), and
those erasures belong to A.

The weights of a row are found by running the recurrence backwards. Start with w = q_t; going back from s = t,

    A[t, s] = beta_s (w . k_s);    w <- exp(g_s) (w - A[t, s] k_s)

Whatever else is read from a state starts with its own w: a direction sum_r a_r b_r^T of the state with each a_r, and
the state itself, for shares of its squared norm, with its columns. Like the scan this goes in chunks, whose system is
the transposed one, so a row costs one matrix product more and not one run more.

Sources: Gated DeltaNet, arXiv:2412.06464; the chunked form, arXiv:2406.06484. The backward form follows by transposing
each step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.errors import WrongInput
from probes.recurrence import CHUNK, Directions, Recurrence, chunks, positions, scan

Spans = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStatistics:
    """What each token does to the state of each head, and how large and how many-sided the state is at some tokens.

    Attributes:
        write: Frobenius norm of the write k u^T.
        retention: exp(decay), the share of the state that survives the token's decay, in (0, 1].
        half_life: tokens until the state would be halved at this decay, ln 2 / -decay; infinite where nothing decays.
        predicted: |p| with p = S^T k after the decay: how much the state has to say about the token's key.
        novelty: |v - p|^2 / (|v|^2 + |p|^2), in [0, 2]: 0 where the state predicts the value exactly, 1 where they
            have nothing in common (a state that says nothing, or something orthogonal), 2 where it predicts -v; 0
            where both are zero.
        at: the tokens whose states are described; -1 is the initial state.
        norm: Frobenius norm of the state after those tokens.
        effective_rank: exp of the entropy (in nats) of the state's squared singular values divided by their sum:
            between 1 and min(d_k, d_v), and 0 for a state of zeros.
    """

    write: Float[Tensor, "prompt token v_head"]
    retention: Float[Tensor, "prompt token v_head"]
    half_life: Float[Tensor, "prompt token v_head"]
    predicted: Float[Tensor, "prompt token v_head"]
    novelty: Float[Tensor, "prompt token v_head"]
    at: Int[Tensor, "prompt n"]
    norm: Float[Tensor, "prompt n v_head"]
    effective_rank: Float[Tensor, "prompt n v_head"]

    def frame(self) -> pd.DataFrame:
        """One row for each prompt, token and v_head."""
        names = ("write", "retention", "half_life", "predicted", "novelty")
        return _frame({name: getattr(self, name) for name in names}, ("prompt", "token", "v_head"))

    def states_frame(self) -> pd.DataFrame:
        """One row for each prompt, position of `at` and v_head."""
        at = self.at[..., None].expand_as(self.norm)
        values = {"at": at, "norm": self.norm, "effective_rank": self.effective_rank}
        return _frame(values, ("prompt", "n", "v_head"))

    def __str__(self) -> str:
        prompts, tokens, v_heads = self.write.shape
        return (
            f"{prompts} prompts x {tokens} tokens x {v_heads} heads: median write {self.write.median().item():.3g}, "
            f"half-life {self.half_life.median().item():.3g} tokens, novelty {self.novelty.median().item():.3g}"
        )


def statistics(x: Recurrence, *, at: Int[Tensor, "prompt n"]) -> TokenStatistics:
    """Describe every token, and the states after the tokens `at` (see `scan`), in one scan.

    Where padding was masked by `Recurrence.of_kernel` its write is 0 and its retention 1; its `predicted` and
    `novelty` mean nothing.
    """
    found = scan(x, at=at, writes=True, predictions=True)
    states, writes, predictions = _asked(found.states), _asked(found.writes), _asked(found.predictions)
    norm = torch.linalg.vector_norm
    known, new = (predictions**2 + x.v**2).sum(-1), ((x.v - predictions) ** 2).sum(-1)
    return TokenStatistics(
        write=norm(x.k, dim=-1).repeat_interleave(x.group, dim=2) * norm(writes, dim=-1),
        retention=x.decay.exp(),
        half_life=math.log(2) / x.decay.abs(),
        predicted=norm(predictions, dim=-1),
        novelty=new / torch.where(known > 0, known, 1),
        at=at,
        norm=norm(states, dim=(-2, -1)),
        effective_rank=effective_rank(states),
    )


def effective_rank(states: Float[Tensor, "*axes d_k d_v"]) -> Float[Tensor, "*axes"]:
    """See `TokenStatistics`: between 1 and min(d_k, d_v), and 0 for a state of zeros."""
    weights = torch.linalg.svdvals(states) ** 2
    total = weights.sum(-1, keepdim=True)
    entropy = torch.special.entr(weights / torch.where(total > 0, total, 1)).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImplicitAttention:
    """Rows of a layer's implicit attention: `o_t = sum_s weights[t, s] v_s + initial_t`, erase terms included.

    Attributes:
        rows: the tokens t whose outputs are explained.
        weights: the weight of every token's value, of either sign; 0 for tokens after t.
        initial: what the initial state contributes to the output, zeros where none was given.
    """

    rows: Int[Tensor, "prompt n"]
    weights: Float[Tensor, "prompt v_head n token"]
    initial: Float[Tensor, "prompt v_head n d_v"]

    def parts(self, x: Recurrence) -> Float[Tensor, "prompt v_head n token d_v"]:
        """Each token's part of the outputs as a vector, A[t, s] v_s; with `initial` they sum to the outputs.

        This holds n x token x d_v numbers for each head: ask for few rows.
        """
        return self.weights[..., None] * x.v.transpose(1, 2)[:, :, None]

    def outputs(self, x: Recurrence) -> Float[Tensor, "prompt v_head n d_v"]:
        """The outputs of the rows, put together again."""
        return self.weights @ x.v.transpose(1, 2) + self.initial

    def frame(self) -> pd.DataFrame:
        """One row for each prompt, v_head, row and token."""
        rows = self.rows[:, None, :, None].expand_as(self.weights)
        return _frame({"row": rows, "weight": self.weights}, ("prompt", "v_head", "n", "token"))

    def __str__(self) -> str:
        prompts, v_heads, n, tokens = self.weights.shape
        return f"implicit attention of {n} rows to {tokens} tokens, {prompts} prompts x {v_heads} heads"


def implicit_attention(x: Recurrence, rows: Int[Tensor, "prompt n"], *, chunk: int = CHUNK) -> ImplicitAttention:
    """The weights with which the values of all tokens enter the outputs of some.

    Exact: float32 weights put outputs together again to about 1e-6 of their largest value. 16 rows cost less than one
    scan (`benchmarks/implicit_attention.py`).

    Args:
        rows: tokens t whose outputs are explained; they may differ between prompts, come in any order and repeat.
        chunk: tokens taken at once; changes speed and rounding, nothing else.

    Raises:
        WrongInput: a row is not a token of `x`.
    """
    rows = positions(x, rows, name="rows", first=0)
    prompts = torch.arange(len(rows), device=rows.device)[:, None]
    q = x.q[prompts, rows].repeat_interleave(x.group, dim=2).transpose(1, 2)
    weights, back = _pull_back(x, q[..., None, :], rows, chunk=chunk)
    return ImplicitAttention(rows=rows, weights=weights, initial=back[..., 0, :] @ x.start)


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """How much each token, and the initial state, contributed to one number for each position and head.

    Attributes:
        at: the positions; the number is read after token `at`.
        tokens: contributions, in the number's own units and of either sign; 0 for tokens after `at`.
        initial: the contribution of the initial state.
        whole: the number itself. `tokens` and `initial` sum to it, up to rounding.
    """

    at: Int[Tensor, "prompt n"]
    tokens: Float[Tensor, "prompt n v_head token"]
    initial: Float[Tensor, "prompt n v_head"]
    whole: Float[Tensor, "prompt n v_head"]

    @property
    def shares(self) -> Float[Tensor, "prompt n v_head token"]:
        """`tokens` divided by `whole`: with `initial_share` they sum to 1. NaN where the whole is 0."""
        return self.tokens / self.whole[..., None]

    @property
    def initial_share(self) -> Float[Tensor, "prompt n v_head"]:
        return self.initial / self.whole

    def over(self, spans: Spans) -> Float[Tensor, "prompt n v_head span"]:
        """Contributions summed over spans of tokens, see `over_spans`."""
        return over_spans(self.tokens, spans)

    def frame(self) -> pd.DataFrame:
        """One row for each prompt, position, v_head and token."""
        at = self.at[..., None, None].expand_as(self.tokens)
        values = {"at": at, "contribution": self.tokens, "share": self.shares}
        return _frame(values, ("prompt", "n", "v_head", "token"))

    def __str__(self) -> str:
        prompts, n, v_heads, tokens = self.tokens.shape
        return f"contributions of {tokens} tokens at {n} positions, {prompts} prompts x {v_heads} heads"


def attribute_readout(
    x: Recurrence, directions: Directions, *, at: Int[Tensor, "prompt n"], chunk: int = CHUNK
) -> Attribution:
    """Token contributions to the state after tokens `at`, read along directions: sum_r left_r^T S right_r.

    `whole` is the sum of the parts. -1 is the initial state, to which no token contributes. Costs one run for all
    positions, with n times r rows.

    Raises:
        WrongInput: a position is not a token of `x`, or the directions do not fit it.
    """
    at = positions(x, at)
    left, right = directions.fitting(x)
    covectors = left[None, :, None].expand(len(at), -1, at.shape[1], -1, -1)
    along = x.v.transpose(1, 2) @ right.mT
    tokens, back = _pull_back(x, covectors, at, values=along, chunk=chunk)
    initial = ((back @ x.start[:, :, None]) * right[:, None]).sum((-1, -2))
    return _attribution(at, tokens, initial, tokens.sum(-1) + initial)


def attribute_state(x: Recurrence, *, at: Int[Tensor, "prompt n"], chunk: int = CHUNK) -> Attribution:
    """Token contributions to the squared Frobenius norm of the states after tokens `at`.

    With C_s the part of the state S that came from token s (its write, decayed and partly erased since), the
    contribution is <C_s, S> and the share <C_s, S> / |S|^2: negative for a token that works against the rest.
    `whole` is |S|^2 of the scanned state. Costs a scan and a run with n times d_v rows.

    Raises:
        WrongInput: a position is not a token of `x`.
    """
    at = positions(x, at)
    S = _asked(scan(x, at=at, chunk=chunk).states).transpose(1, 2)
    tokens, back = _pull_back(x, S.mT, at, values=x.v.transpose(1, 2), chunk=chunk)
    return _attribution(at, tokens, (back.mT * x.start[:, :, None]).sum((-1, -2)), (S * S).sum((-1, -2)))


def attribute_output(x: Recurrence, *, rows: Int[Tensor, "prompt n"], chunk: int = CHUNK) -> Attribution:
    """Token contributions to the squared norm of the outputs of some tokens: A[t, s] v_s . o_t.

    `whole` is |o_t|^2, with o_t put together from its parts. `ImplicitAttention.parts` has them as vectors.

    Raises:
        WrongInput: a row is not a token of `x`.
    """
    found = implicit_attention(x, rows, chunk=chunk)
    o = found.outputs(x)
    tokens = found.weights * (o @ x.v.permute(0, 2, 3, 1))
    return _attribution(found.rows, tokens, (found.initial * o).sum(-1), (o * o).sum(-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class StateParts:
    """States split into what spans of tokens wrote and what is left of the initial state.

    Where the spans cover each token up to a position once, the parts and `initial` sum to the state there.
    """

    parts: Float[Tensor, "prompt n span v_head d_k d_v"]
    initial: Float[Tensor, "prompt n v_head d_k d_v"]

    def __str__(self) -> str:
        prompts, n, spans, v_heads = self.parts.shape[:4]
        return f"states at {n} positions split into {spans} spans, {prompts} prompts x {v_heads} heads"


def state_parts(x: Recurrence, spans: Spans, *, at: Int[Tensor, "prompt n"]) -> StateParts:
    """The part of the states after tokens `at` that came from each span, as matrices: one scan for each span.

    Later decays and erasures are included, whoever caused them.

    Args:
        spans: (start, stop) of each span, stop exclusive, for each prompt; equally many for all prompts.

    Raises:
        WrongInput: spans or positions are not tokens of `x`.
    """
    inside = _inside(spans, len(x.v), x.tokens).to(x.v)

    def states(part: Recurrence) -> Tensor:
        return _asked(scan(part, at=at).states)

    parts = [
        states(dataclasses.replace(x, v=x.v * chosen[..., None, None], initial=None)) for chosen in inside.unbind(1)
    ]
    return StateParts(parts=torch.stack(parts, 2), initial=states(dataclasses.replace(x, v=torch.zeros_like(x.v))))


def over_spans(values: Float[Tensor, "prompt *axes token"], spans: Spans) -> Float[Tensor, "prompt *axes span"]:
    """Sums of values over spans of tokens.

    Args:
        spans: (start, stop) of each span, stop exclusive, for each prompt; equally many for all prompts. Spans may
            overlap.

    Raises:
        WrongInput: a span is not within the tokens, or prompts have different numbers of spans.
    """
    inside = _inside(spans, len(values), values.shape[-1]).to(values)
    return torch.einsum("p...t,pst->p...s", values, inside)


def _inside(spans: Spans, prompts: int, tokens: int) -> Float[Tensor, "prompt span token"]:
    """1 where a token belongs to a span."""
    if len(spans) != prompts or len({len(row) for row in spans}) != 1 or not spans[0]:
        seen = ", ".join(str(len(row)) for row in spans)
        raise WrongInput(f"each of {prompts} prompts needs equally many spans, and at least one; seen are [{seen}]")
    for prompt, row in enumerate(spans):
        for start, stop in row:
            if not 0 <= start < stop <= tokens:
                raise WrongInput(f"span ({start}, {stop}) of prompt {prompt} is not within tokens 0 to {tokens}")
    edges = torch.tensor([[list(span) for span in row] for row in spans])
    token = torch.arange(tokens)
    return ((token >= edges[..., :1]) & (token < edges[..., 1:])).float()


def _asked(found: Tensor | None) -> Tensor:
    if found is None:
        raise RuntimeError("the scan left out what it was asked for")
    return found


def _attribution(at: Tensor, tokens: Tensor, initial: Tensor, whole: Tensor) -> Attribution:
    """Position before head, as attributions have it."""
    return Attribution(
        at=at, tokens=tokens.transpose(1, 2), initial=initial.transpose(1, 2), whole=whole.transpose(1, 2)
    )


def _pull_back(
    x: Recurrence,
    covectors: Float[Tensor, "prompt v_head n m d_k"],
    at: Int[Tensor, "prompt n"],
    *,
    values: Float[Tensor, "prompt v_head token m"] | None = None,
    chunk: int,
) -> tuple[Float[Tensor, "prompt v_head n token"], Float[Tensor, "prompt v_head n m d_k"]]:
    """Run w_m^T S, read after tokens `at`, back to where it came from.

    Returns the weight of every token's value in it, times that token's `values` where they are given and summed over
    m (without them m is 1), and the w that reads the same from the initial state.
    """
    n, m = covectors.shape[2:4]
    w = torch.zeros_like(covectors)
    found: list[Tensor] = []
    for piece in chunks(x, chunk, backwards=True):
        span = slice(piece.start, piece.stop)
        enters = (at >= piece.start) & (at < piece.stop)
        w = torch.where(enters[:, None, :, None, None], covectors, w).flatten(2, 3)
        # The token of this chunk after which a row's w reads the state: its own, or the last one where the row lies
        # further on. A row of an earlier chunk has not entered yet; its w is 0, so any token will do.
        token = (at.clamp(max=piece.stop - 1) - piece.start).clamp(min=0)[:, None, :, None]
        reaching = piece.between.take_along_dim(token, 2).repeat_interleave(m, dim=2)
        faded = piece.since.take_along_dim(token, 2).repeat_interleave(m, dim=2)
        weights = torch.linalg.solve_triangular(
            piece.system, reaching * (w @ piece.k.mT), upper=False, left=False, unitriangular=True
        )
        weights = weights * piece.beta.mT
        w = (faded * w - (weights * piece.since.mT) @ piece.k).unflatten(2, (n, m))
        weights = weights.unflatten(2, (n, m))
        if values is not None:
            weights = weights * values[:, :, None, span].mT
        found.append(weights.sum(3))
    return torch.cat(found[::-1], -1), torch.where((at < 0)[:, None, :, None, None], covectors, w)


def _frame(values: dict[str, Tensor], axes: Sequence[str]) -> pd.DataFrame:
    """One row for each entry of tensors of one shape, with its index along each axis."""
    shape = next(iter(values.values())).shape
    grids = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    columns = {axis: grid.flatten().numpy() for axis, grid in zip(axes, grids, strict=True)}
    return pd.DataFrame(columns | {name: value.detach().cpu().flatten().numpy() for name, value in values.items()})
