"""Directions that mean nothing, as like a real one as can be: what an effect has to be held against.

A control has the same site, layer, heads and dose unit as its target. Where a site has heads, each head of a random
control is as large as the target's, so that the two push equally hard in the same places; and a random state has the
target's singular values in every head, since a matrix of one strong direction disturbs a model more than one of equal
norm that is spread over all of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.directions import Direction
from probes.errors import WrongInput
from probes.extraction import Raw, mean_of
from probes.pairs import Pairs


def shuffle_labels(pairs: Pairs, *, seed: int) -> Pairs:
    """Swap the sides of exactly half of the pairs.

    Swapping each pair by a coin would leave a part of the true direction in the mean, which normalising would then
    blow up to full length: exactly half is what makes this a null.
    """
    n = len(pairs.groups)
    order = np.random.default_rng(seed).permutation(n)
    swap = torch.zeros(n, dtype=torch.bool)
    swap[torch.from_numpy(order[: n // 2].copy())] = True
    swapped = swap[:, None]
    return replace(
        pairs,
        wanted=torch.where(swapped, pairs.unwanted, pairs.wanted),
        unwanted=torch.where(swapped, pairs.wanted, pairs.unwanted),
    )


def shuffled_direction(pairs: Pairs, target: Direction, *, seed: int, raw: Raw = mean_of) -> Direction:
    """A control with the target's norm: what shuffled labels give, at right angles to the target.

    Where the pairs differ along one direction and little else, any weighted mean of their differences is plus or minus
    that direction, however the labels are shuffled; at full length it would be the target itself and control nothing.
    What is left after the target is taken out is another direction that the same data can produce. `raw` is the
    target's own extraction (`probes.directions.raw_of`), so that the two differ in their labels alone.
    """
    found = raw(shuffle_labels(pairs, seed=seed))
    left = found - (found @ target.vector) * target.vector
    length = float(left.norm())
    if length <= 1e-5 * float(found.norm()):  # what is left is rounding
        raise WrongInput(f"the pairs of '{pairs.behavior}' differ along one direction only: no control can be shuffled")
    vector = left / length
    return replace(
        target, vector=vector, midpoint=float(pairs.middle @ vector), gap=0.0, method="shuffled labels",
        reliability=None,
    )  # fmt: skip


def random_direction(like: Direction, *, seed: int) -> Direction:
    """A drawn direction with the norm (so the dose) of another one, in each head, and for a state its spectrum."""
    generator = torch.Generator().manual_seed(seed)
    if len(like.shape) == 3:
        vector = _rotated(like.tensor, generator).flatten()
    else:
        drawn = torch.randn(like.vector.numel(), generator=generator).reshape(like.tensor.shape)
        vector = (drawn / drawn.norm(dim=-1, keepdim=True) * like.tensor.norm(dim=-1, keepdim=True)).flatten()
    return replace(like, vector=vector / vector.norm(), midpoint=0.0, gap=0.0, method="random", reliability=None)


def _rotated(states: Tensor, generator: torch.Generator) -> Tensor:
    """Matrices with the same singular values, in singular vectors drawn anew: [v_head d_k d_v]."""
    values = torch.linalg.svdvals(states)
    left, right = (orthonormal(len(states), size, values.shape[-1], generator) for size in states.shape[1:])
    return left * values[:, None, :] @ right.transpose(1, 2)


def orthonormal(
    count: int, size: int, columns: int, generator: torch.Generator
) -> Float[Tensor, "{count} {size} {columns}"]:
    """Matrices with orthonormal columns, drawn uniformly (Haar); square ones turn without a preferred direction.

    The signs that a QR decomposition leaves to the algorithm are made random again: taken as they come, the diagonal
    would lean to one side (Mezzadri, arXiv:math-ph/0609050), and a control with it.
    """
    Q, R = torch.linalg.qr(torch.randn(count, size, columns, generator=generator))
    return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


def centred(control: Direction, pairs: Pairs) -> Direction:
    """Give a drawn direction the midpoint that the data have along it, so that ablating it is a fair control."""
    return replace(control, midpoint=float(pairs.middle @ control.vector))
