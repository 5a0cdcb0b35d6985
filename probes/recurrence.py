"""The recurrence of a Gated DeltaNet (GDN) layer, on plain tensors: what its state holds at any token, and says there.

A GDN head has one matrix as its memory, the state S [d_k, d_v], and at every token does four things with it:

    S <- exp(g) S               decay: everything fades by the same factor, g <= 0
    u  = beta (v - S^T k)       compare: the value against what the state already predicts for this key
    S <- S + k u^T              write: only the correction is added, beta says how much of it
    o  = S^T q                  readout: the head's output

The third line erases as well as it writes: S <- (I - beta k k^T) S + beta k v^T. So k and q choose directions of the
memory, and for given k, q, beta and g everything here is linear in v and in the initial state. `probes.attribution`
rests on that.

States are large (2 MiB a token in the 27B model, for each layer), so no trajectory of them is ever kept. `scan` goes
through the tokens in chunks. Inside a chunk that starts from S, with G the decay summed since its start, the writes
solve one triangular system for all tokens at once,

    u_i = beta_i (v_i - exp(G_i) S^T k_i - sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j),

and everything else is a product of matrices: the outputs, the next chunk's starting state, the state after any one
token (`at`), and a state read along a direction at every token (`directions`), which is but one more query. That
costs about as much as transformers' own kernel alone; `benchmarks/state_snapshots.py` measures it.

All functions are differentiable (twice where torch's operations are) and keep float32 or float64. Left padding is
exact: see `Recurrence.of_kernel`.

Sources: Gated DeltaNet, arXiv:2412.06464; the chunked form, arXiv:2406.06484.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from probes.errors import WrongInput

CHUNK = 64  # tokens that one triangular system solves; longer chunks cost more in pairs than they save in steps
EPSILON = 1e-6  # under the root of the kernel's normalisation of q and k
COPIED = 1 << 18  # numbers of states worked on at once by snapshots: 1 MiB of float32, so they need little room


@dataclass(frozen=True, kw_only=True, eq=False)
class Recurrence:
    """Everything the recurrence of one GDN layer is given, as it meets the state.

    One key head serves `v_heads / heads` consecutive value heads. All tensors have one dtype, float32 or float64, and
    are on one device.

    Attributes:
        q: queries, normalised and scaled by d_k**-0.5.
        k: keys, normalised.
        v: values.
        beta: how much of the correction is written, in [0, 1].
        decay: logarithm of the factor by which the state shrinks at each token, finite and <= 0.
        initial: the state before the first token; None is a state of zeros.

    Raises:
        WrongInput: shapes or dtypes do not fit together, there is no token, or a decay is above 0 or not finite.
    """

    q: Float[Tensor, "prompt token head d_k"]
    k: Float[Tensor, "prompt token head d_k"]
    v: Float[Tensor, "prompt token v_head d_v"]
    beta: Float[Tensor, "prompt token v_head"]
    decay: Float[Tensor, "prompt token v_head"]
    initial: Float[Tensor, "prompt v_head d_k d_v"] | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        seen = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items())
        ranks = {"q": 4, "k": 4, "v": 4, "beta": 3, "decay": 3, "initial": 4}
        if any(value.ndim != ranks[name] for name, value in given.items()):
            raise WrongInput(
                f"a recurrence needs q, k, v [prompt token head d], beta, decay [prompt token v_head]: {seen}"
            )
        prompts, tokens, heads, d_k = self.k.shape
        v_heads, d_v = self.v.shape[2:]
        fits = {
            "q": (prompts, tokens, heads, d_k), "v": (prompts, tokens, v_heads, d_v),
            "beta": (prompts, tokens, v_heads), "decay": (prompts, tokens, v_heads),
            "initial": (prompts, v_heads, d_k, d_v),
        }  # fmt: skip
        wrong = [name for name, shape in fits.items() if name in given and tuple(given[name].shape) != shape]
        if wrong:
            raise WrongInput(f"{' and '.join(wrong)} must fit the shapes of k and v: {seen}")
        if tokens == 0 or heads == 0 or v_heads % heads:
            raise WrongInput(f"a recurrence needs at least one token, and v_heads must be a multiple of heads: {seen}")
        dtypes = {value.dtype for value in given.values()}
        if dtypes not in ({torch.float32}, {torch.float64}):
            found = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise WrongInput(f"a recurrence is all float32 or all float64, not {found}; `of_kernel` converts")
        if not bool((self.decay.isfinite() & (self.decay <= 0)).all()):
            raise WrongInput(
                f"a decay is the logarithm of a factor: finite and <= 0, "
                f"seen from {self.decay.min().item():.3g} to {self.decay.max().item():.3g}"
            )

    @classmethod
    def of_kernel(
        cls,
        q: Float[Tensor, "prompt token head d_k"],
        k: Float[Tensor, "prompt token head d_k"],
        v: Float[Tensor, "prompt token v_head d_v"],
        *,
        beta: Float[Tensor, "prompt token v_head"],
        decay: Float[Tensor, "prompt token v_head"],
        initial: Float[Tensor, "prompt v_head d_k d_v"] | None = None,
        mask: Shaped[Tensor, "prompt token"] | None = None,
    ) -> Recurrence:
        """From what transformers' kernel is given: q, k, v after the convolution, not normalised yet.

        Does what the kernel does first: L2-normalises q and k, scales q by d_k**-0.5, and converts to float32
        (float64 stays). With `mask` (1 for a real token, 0 for padding) padding gets beta 0 and decay 0, so that it
        neither writes nor fades: behind left padding a prompt then has exactly the states it has alone. Without the
        mask, padding decays a given initial state.
        """
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        q, k, v, beta, decay = (tensor.to(dtype) for tensor in (q, k, v, beta, decay))
        if mask is not None:
            if mask.shape != beta.shape[:2]:
                raise WrongInput(f"mask {list(mask.shape)} must be [prompt token], here {list(beta.shape[:2])}")
            padding = (mask == 0)[..., None]
            beta, decay = beta.masked_fill(padding, 0), decay.masked_fill(padding, 0)
        return cls(
            q=normalised(q) * q.shape[-1] ** -0.5,
            k=normalised(k),
            v=v,
            beta=beta,
            decay=decay,
            initial=None if initial is None else initial.to(dtype),
        )

    @property
    def tokens(self) -> int:
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Value heads that one key head serves."""
        return self.v.shape[2] // self.k.shape[2]

    @property
    def start(self) -> Float[Tensor, "prompt v_head d_k d_v"]:
        """The initial state, zeros where none was given."""
        if self.initial is not None:
            return self.initial
        return self.v.new_zeros(len(self.v), self.v.shape[2], self.k.shape[3], self.v.shape[3])

    def keep(
        self, start: int, stop: int, *, initial: Float[Tensor, "prompt v_head d_k d_v"] | None = None
    ) -> Recurrence:
        """Tokens `start` to `stop` (exclusive) alone.

        `initial` is the state they start from. Without it they start from this recurrence's own initial state when
        `start` is 0, and from zeros otherwise: as if nothing had come before.
        """
        if not 0 <= start < stop <= self.tokens:
            raise WrongInput(f"tokens {start} to {stop} cannot be kept; this recurrence has tokens 0 to {self.tokens}")
        parts = {name: getattr(self, name)[:, start:stop] for name in ("q", "k", "v", "beta", "decay")}
        return Recurrence(**parts, initial=self.initial if initial is None and start == 0 else initial)

    def __str__(self) -> str:
        prompts, tokens, v_heads, d_v = self.v.shape
        given = "none" if self.initial is None else "given"
        return (
            f"{prompts} prompts x {tokens} tokens, {v_heads} states of {self.k.shape[3]}x{d_v}, initial state {given}"
        )


def left_padded(xs: Sequence[Recurrence]) -> tuple[Recurrence, Float[Tensor, "prompt token"]]:
    """Several recurrences without initial states as one, and its mask: 1 for real tokens, 0 for the padding in front.

    Padding neither writes nor fades (see `of_kernel`), so every prompt has the states that it has alone.
    """
    width = max(x.tokens for x in xs)

    def stack(name: str) -> Tensor:
        rows = [getattr(x, name) for x in xs]
        return torch.cat([torch.cat([r.new_zeros(len(r), width - r.shape[1], *r.shape[2:]), r], 1) for r in rows])

    mask = torch.cat([(torch.arange(width) >= width - x.tokens).float().expand(len(x.v), -1) for x in xs])
    return Recurrence(**{name: stack(name) for name in ("q", "k", "v", "beta", "decay")}), mask


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """One direction of the state per head, as a sum of r outer products: sum_r left_r right_r^T.

    The readout of a state S along it is sum_r left_r^T S right_r, the inner product of the two matrices.
    """

    left: Float[Tensor, "r v_head d_k"]
    right: Float[Tensor, "r v_head d_v"]

    @classmethod
    def of(cls, matrices: Float[Tensor, "v_head d_k d_v"], *, rank: int) -> Directions:
        """The best approximation of given matrices of this rank (truncated SVD); exact at rank min(d_k, d_v)."""
        most = min(matrices.shape[1:])
        if not 1 <= rank <= most:
            raise WrongInput(f"rank {rank} is impossible for matrices {list(matrices.shape)}; allowed are 1 to {most}")
        U, sizes, V = torch.linalg.svd(matrices, full_matrices=False)
        left = (U * sizes[:, None])[..., :rank]
        return cls(left=left.permute(2, 0, 1), right=V[:, :rank].transpose(0, 1))

    @property
    def matrices(self) -> Float[Tensor, "v_head d_k d_v"]:
        return torch.einsum("rhk,rhv->hkv", self.left, self.right)

    def fitting(self, x: Recurrence) -> tuple[Float[Tensor, "v_head r d_k"], Float[Tensor, "v_head r d_v"]]:
        """Left and right by head, in the dtype and on the device of a recurrence; refused where they do not fit it."""
        wanted = (x.v.shape[2], x.k.shape[3]), (x.v.shape[2], x.v.shape[3])
        if (tuple(self.left.shape[1:]), tuple(self.right.shape[1:])) != wanted or len(self.left) != len(self.right):
            raise WrongInput(
                f"directions with left {list(self.left.shape)} and right {list(self.right.shape)} do not fit; "
                f"this recurrence needs [r, {wanted[0][0]}, {wanted[0][1]}] and [r, {wanted[1][0]}, {wanted[1][1]}]"
            )
        return self.left.transpose(0, 1).to(x.v), self.right.transpose(0, 1).to(x.v)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """What came out of a scan; what was not asked for is None.

    Attributes:
        outputs: o = S^T q at every token.
        final: the state after the last token.
        states: the states asked for with `at`, in that order.
        readouts: the state read along the directions at every token.
        writes: u = beta (v - S^T k); the token adds k u^T to the state.
        predictions: S^T k after the token's decay, what the state says before the token writes.
    """

    outputs: Float[Tensor, "prompt token v_head d_v"]
    final: Float[Tensor, "prompt v_head d_k d_v"]
    states: Float[Tensor, "prompt n v_head d_k d_v"] | None = None
    readouts: Float[Tensor, "prompt token v_head"] | None = None
    writes: Float[Tensor, "prompt token v_head d_v"] | None = None
    predictions: Float[Tensor, "prompt token v_head d_v"] | None = None

    def __str__(self) -> str:
        found = (f"{name} {list(value.shape)}" for name, value in vars(self).items() if value is not None)
        return "scan: " + ", ".join(found)


def scan(
    x: Recurrence,
    *,
    at: Int[Tensor, "prompt n"] | None = None,
    directions: Directions | None = None,
    writes: bool = False,
    predictions: bool = False,
    chunk: int = CHUNK,
) -> Scan:
    """Run the recurrence, and look at the state on the way.

    Without autograd, everything returned is written into its place once; beyond that the scan needs room for one
    chunk only. Measured against a float64 scan that goes step by step, float32 results agree to about 1e-6 of their
    largest value, after decays of -100 a token too.

    Args:
        at: `states[p, i]` is the state after token `at[p, i]` of prompt p; -1 is the initial state. Positions may
            differ between prompts, come in any order and repeat.
        directions: along which the state is read at every token.
        writes: keep u of every token.
        predictions: keep S^T k of every token.
        chunk: tokens taken at once; changes speed and rounding, nothing else.

    Raises:
        WrongInput: a position is not a token of `x`, directions do not fit, or `chunk` is below 1.
    """
    pieces = chunks(x, chunk)
    sides = directions.fitting(x) if directions else ()
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*vars(x).values(), *sides))
    outputs = _Filling(x.v, x.v.shape, tracked)
    kept = _Filling(x.v, x.v.shape, tracked) if writes else None
    said = _Filling(x.v, x.v.shape, tracked) if predictions else None
    read = _Filling(x.v, x.v.shape[:3], tracked) if directions else None
    snapshots = None if at is None else _Snapshots(x, at, chunk, tracked)
    S = x.start
    for piece in pieces:
        span = slice(piece.start, piece.stop)
        u = piece.writes(S, by_head(x.v, span))
        outputs.put(span, piece.outputs(S, u, by_head(x.q, span, x.group)).transpose(1, 2))
        if kept:
            kept.put(span, u.transpose(1, 2))
        if said:
            said.put(span, piece.predictions(S, u).transpose(1, 2))
        if read:
            read.put(span, piece.readouts(S, u, *sides).transpose(1, 2))
        if snapshots:
            snapshots.take(piece, S, u)
        S = piece.end(S, u)
    return Scan(
        outputs=outputs.whole(),
        final=S,
        states=snapshots.states() if snapshots else None,
        readouts=read.whole() if read else None,
        writes=kept.whole() if kept else None,
        predictions=said.whole() if said else None,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """What the tokens of one chunk have to do with each other, whatever state S they start from; heads come first.

    Attributes:
        start: the first token; `stop` is the one after the last.
        k: keys, once for every value head.
        since: the factor by which S has shrunk after each token's decay.
        between: the same from after token j (last axis) to token i; 0 where j comes later than i.
        overlap: `between` times k_i . k_j, how much of what j wrote i finds at its own key.
    """

    start: int
    k: Float[Tensor, "prompt v_head piece d_k"]
    beta: Float[Tensor, "prompt v_head piece 1"]
    since: Float[Tensor, "prompt v_head piece 1"]
    between: Float[Tensor, "prompt v_head piece piece"]
    overlap: Float[Tensor, "prompt v_head piece piece"]

    @classmethod
    def of(cls, x: Recurrence, start: int, size: int) -> Chunk:
        """At most `size` tokens from `start` on."""
        span = slice(start, start + size)
        k, beta = by_head(x.k, span, x.group), by_head(x.beta, span)[..., None]
        # Sums are float64 because a strong decay (-100 a token) would swallow in float32 what comes after it. Only
        # differences between a token and an earlier one are raised, so nothing overflows. exp(-800) is 0 already.
        total = by_head(x.decay, span).double().clamp(min=-800).cumsum(-1)
        later = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).triu(1)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -math.inf).to(k.dtype).exp()
        since = total.exp().to(k.dtype)[..., None]
        return cls(start=start, k=k, beta=beta, since=since, between=between, overlap=k @ k.mT * between)

    @property
    def stop(self) -> int:
        return self.start + self.k.shape[2]

    @property
    def system(self) -> Float[Tensor, "prompt v_head piece piece"]:
        """The part below the diagonal is that of the triangular system; its diagonal counts as ones."""
        return self.beta * self.overlap

    def writes(
        self, S: Float[Tensor, "prompt v_head d_k d_v"], v: Float[Tensor, "prompt v_head piece d_v"]
    ) -> Float[Tensor, "prompt v_head piece d_v"]:
        new = self.beta * (v - self.since * (self.k @ S))
        return torch.linalg.solve_triangular(self.system, new, upper=False, unitriangular=True)

    def outputs(self, S: Tensor, u: Tensor, q: Tensor) -> Float[Tensor, "prompt v_head piece d_v"]:
        return self.since * (q @ S) + (q @ self.k.mT * self.between) @ u

    def predictions(self, S: Tensor, u: Tensor) -> Float[Tensor, "prompt v_head piece d_v"]:
        return self.since * (self.k @ S) + self.overlap.tril(-1) @ u

    def readouts(self, S: Tensor, u: Tensor, left: Tensor, right: Tensor) -> Float[Tensor, "prompt v_head piece"]:
        """The directions are queries, the same at every token, whose output is needed along `right` alone."""
        before = ((left @ S) * right).sum((-1, -2))[..., None]
        written = ((self.k @ left.mT) * (u @ right.mT)).sum(-1, keepdim=True)
        return self.since[..., 0] * before + (self.between @ written)[..., 0]

    def end(self, S: Tensor, u: Tensor) -> Float[Tensor, "prompt v_head d_k d_v"]:
        return self.since[:, :, -1:] * S + (self.between[:, :, -1, :, None] * self.k).mT @ u

    def states(self, S: Tensor, u: Tensor, prompts: Tensor, tokens: Tensor) -> Float[Tensor, "m v_head d_k d_v"]:
        """States after tokens (counted from the chunk's start) of prompts, one of each for every state."""
        keys = self.between[prompts, :, tokens][..., None] * self.k[prompts]
        return self.since[prompts, :, tokens][..., None] * S[prompts] + keys.mT @ u[prompts]


def chunks(x: Recurrence, size: int, *, backwards: bool = False) -> Iterator[Chunk]:
    """The tokens in chunks, the last of which may be shorter.

    Raises:
        WrongInput: `size` is below 1.
    """
    if size < 1:
        raise WrongInput(f"a chunk of {size} tokens is impossible; allowed are 1 and more")
    starts = range(0, x.tokens, size)
    return (Chunk.of(x, start, size) for start in (reversed(starts) if backwards else starts))


def by_head(values: Tensor, span: slice, group: int = 1) -> Tensor:
    """Some tokens of [prompt token head ...] as [prompt v_head token ...], each head `group` times, in one block."""
    heads = values[:, span].transpose(1, 2)
    return (heads if group == 1 else heads.repeat_interleave(group, dim=1)).contiguous()


def positions(
    x: Recurrence, at: Int[Tensor, "prompt n"], *, name: str = "at", first: int = -1
) -> Int[Tensor, "prompt n"]:
    """Positions on the device of a recurrence; refused where they are not its tokens."""
    if at.ndim != 2 or len(at) != len(x.v):
        raise WrongInput(f"{name} {list(at.shape)} must be [prompt n] with {len(x.v)} prompts")
    wrong = ((at < first) | (at >= x.tokens)).nonzero().tolist()
    if wrong:
        prompt, i = wrong[0]
        more = ", and -1 is the initial state" if first < 0 else ""
        raise WrongInput(
            f"{name}[{prompt}, {i}] is {at[prompt, i].item()}; this recurrence has tokens 0 to {x.tokens - 1}{more}"
        )
    return at.to(x.v.device)


class _Filling:
    """A tensor [prompt token ...] that is filled piece by piece.

    Pieces are copied to their place, so that nothing is held twice. Autograd would go through the whole tensor once
    for each such copy, so where it is `tracked` the pieces are kept, and joined in the end.
    """

    def __init__(self, like: Tensor, shape: Sequence[int], tracked: bool) -> None:
        self._pieces: list[Tensor] | None = [] if tracked else None
        self._places: list[Tensor] = []
        self._tensor = like.new_empty((shape[0], 0, *shape[2:]) if tracked else shape)
        self._tokens = torch.arange(shape[1], device=like.device)

    def put(self, places: slice | Tensor, piece: Tensor) -> None:
        if self._pieces is None:
            self._tensor[:, places] = piece
        else:
            self._pieces.append(piece)
            self._places.append(self._tokens[places])

    def whole(self) -> Tensor:
        if not self._pieces:
            return self._tensor
        return torch.cat(self._pieces, 1)[:, torch.cat(self._places).argsort()]


class _Snapshots:
    """States after given tokens, taken while a scan passes them."""

    def __init__(self, x: Recurrence, at: Tensor, size: int, tracked: bool) -> None:
        at = positions(x, at)
        shape, self._device = x.start.shape, x.v.device
        self._shape = (*at.shape, *shape[1:])
        self._filling = _Filling(x.v, (1, at.numel(), *shape[1:]), tracked)
        self._at_once = max(1, COPIED // math.prod(shape[1:]))
        self._due: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # by chunk: place, prompt, token in it
        for prompt, row in enumerate(at.tolist()):
            for i, token in enumerate(row):
                self._due[token // size * size].append((prompt * at.shape[1] + i, prompt, token % size))
        for rows in self._rows(self._due.pop(-size, [])):  # the initial state counts as the end of a chunk before
            self._filling.put(rows[0], x.start[rows[1]][None])

    def _rows(self, due: list[tuple[int, int, int]]) -> Iterator[Int[Tensor, "3 m"]]:
        for i in range(0, len(due), self._at_once):
            yield torch.tensor(due[i : i + self._at_once], device=self._device).T

    def take(self, piece: Chunk, S: Tensor, u: Tensor) -> None:
        for places, prompts, tokens in self._rows(self._due.get(piece.start, [])):
            self._filling.put(places, piece.states(S, u, prompts, tokens)[None])

    def states(self) -> Float[Tensor, "prompt n v_head d_k d_v"]:
        return self._filling.whole().reshape(self._shape)


def normalised(vectors: Float[Tensor, "*axes d_k"]) -> Float[Tensor, "*axes d_k"]:
    """Keys or queries of length 1, but for the 1e-6 that the kernel adds under the root."""
    return vectors * torch.rsqrt((vectors * vectors).sum(-1, keepdim=True) + EPSILON)
