"""From a contrast to a direction: what the difference between wanted and unwanted looks like inside.

Extraction has two steps. `probes.pairs.contrast` records both sides of a behaviour at a site. An extraction
(`probes.extraction` has the methods) turns one layer's pairs into a `Direction`, a unit vector in the site's space that
points from unwanted to wanted, with its reliability: how well directions from two disjoint halves of the topic groups
agree. A direction whose halves disagree is noise.

Three sites can be steered along a direction. In the residual stream (`resid`) it is a vector, in an attention layer
(`attn.heads`) one vector for each head, and in a GDN layer (`gdn.state`) one matrix for each value head, since a state
is a map from keys to values. All are stored flat, as one unit vector with its `shape`, so the same code compares,
controls and judges them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.errors import WrongInput
from probes.extraction import NAMES, Method, Raw, mean_of, raw_of
from probes.model import HybridModel
from probes.pairs import Contrast, Pairs
from probes.stats import Estimate, repeated, spearman_brown, split_groups
from probes.store import read_metadata, read_tensors, write_tensors

SPLITS = 50
_FIELDS = ("layer", "norm", "midpoint", "gap", "site", "shape", "heads", "method", "contrast", "behavior", "n")


def vector_hash(vector: Tensor) -> str:
    """What tells one vector from another: 16 hex digits of the SHA-256 of its bytes."""
    return hashlib.sha256(vector.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A unit vector in the space of one site at one layer, pointing from unwanted to wanted.

    Attributes:
        vector: float32, flat, length 1; `tensor` has the site's own shape.
        norm: the typical size of the site's values (median over the prompts that gave the direction; of a state the
            Frobenius norm over the heads in use); the unit of dose.
        midpoint: the mean of both sides projected on the vector, in raw units; "ablate" sets the component to it.
        gap: distance between the two sides' means along the vector, in raw units.
        shape: (d_model,), (head, d_head) or (v_head, d_k, d_v).
        heads: the heads it is confined to; None for all.
        method, contrast, behavior, n: where it came from. reliability: split-half agreement, None for a drawn vector.
    """

    layer: int
    vector: Float[Tensor, " feature"]
    norm: float
    midpoint: float
    gap: float = 0.0
    site: str = "resid"
    shape: tuple[int, ...] = ()
    heads: tuple[int, ...] | None = None
    method: str = "mean difference"
    contrast: Contrast = "persona"
    behavior: str = ""
    n: int = 0
    reliability: Estimate | None = None

    @property
    def tensor(self) -> Float[Tensor, "..."]:
        """The vector in the shape of the site."""
        return self.vector.reshape(self.shape or (-1,))

    def __str__(self) -> str:
        agreement = f", reliability {self.reliability.value:.2f}" if self.reliability else ""
        where = f"{self.site} {self.layer}{heads_in_words(self.heads)}"
        return f"{self.method} of {self.behavior or 'nothing'} at {where} (n={self.n}{agreement})"


def heads_in_words(heads: Sequence[int] | None) -> str:
    """Head 3, or heads 0, 3, after a space; empty for all heads."""
    if heads is None:
        return ""
    return f" head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"


def extract(
    pairs: Pairs, *, method: Method = "mean", rank: int = 1, seed: int = 0, reliability: bool = True
) -> Direction:
    """A direction by one of the methods of `probes.extraction`; `rank` is for "low-rank" alone.

    Args:
        reliability: False leaves out the split halves, which take a hundred extractions.

    Raises:
        WrongInput: the two sides are the same, the method is unknown, or it does not fit the site.
    """
    raw = raw_of(method, rank=rank)
    name = f"rank-{rank} mean difference" if method == "low-rank" else NAMES[method]
    if len(set(pairs.groups)) < 2:
        raise WrongInput(f"a direction needs pairs in at least 2 topic groups, saw {len(set(pairs.groups))}")
    if pairs.equal:
        raise WrongInput(f"both sides of '{pairs.behavior}' are equal at layer {pairs.layer}: there is no direction")
    difference, vector = mean_of(pairs), raw(pairs)
    vector = vector / vector.norm()
    norms = torch.cat([pairs.wanted, pairs.unwanted]).norm(dim=1)
    return Direction(
        layer=pairs.layer, vector=vector, norm=float(norms.median()), midpoint=float(pairs.middle @ vector),
        gap=float(difference @ vector), site=pairs.site, shape=pairs.shape or tuple(vector.shape), heads=pairs.heads,
        method=name, contrast=pairs.contrast, behavior=pairs.behavior, n=len(pairs.groups),
        reliability=split_half(pairs, raw, seed=seed) if reliability else None,
    )  # fmt: skip


def mean_difference(pairs: Pairs, *, seed: int = 0) -> Direction:
    """Mean of wanted minus mean of unwanted, as a unit vector with split-half reliability.

    Raises:
        WrongInput: the two sides are the same, so that there is no direction.
    """
    return extract(pairs, seed=seed)


def low_rank(pairs: Pairs, *, rank: int = 1, seed: int = 0) -> Direction:
    """Each head's mean difference of states, cut to its `rank` largest singular values.

    Raises:
        WrongInput: the site is not `gdn.state`, or the rank is not between 1 and the smaller side of a state.
    """
    return extract(pairs, method="low-rank", rank=rank, seed=seed)


def whitened(pairs: Pairs, *, seed: int = 0) -> Direction:
    """Fisher's discriminant: the mean difference divided by the shrunk covariance within the sides.

    For a state, each head's covariance is taken as the product of one over rows and one over columns (the matrix-normal
    model), since 128 x 128 entries have no covariance that a few hundred prompts could estimate.
    """
    return extract(pairs, method="whitened", seed=seed)


def split_half(pairs: Pairs, raw: Raw = mean_of, *, times: int = SPLITS, seed: int = 0) -> Estimate:
    """Mean cosine of the directions from two random halves of the groups, stepped up by Spearman-Brown.

    The interval covers the choice of halves, over `times` splits.
    """

    def agreement(rng: np.random.Generator) -> float:
        half = split_groups(pairs.groups, rng)
        a, b = (raw(pairs.where(part)).double() for part in (half, ~half))
        scale = float(a.norm() * b.norm())
        return float(a @ b) / scale if scale else 0.0

    value, lower, upper = map(spearman_brown, repeated(agreement, times=times, seed=seed))
    n, groups = len(pairs.groups), len(set(pairs.groups))
    return Estimate(value=value, lower=lower, upper=upper, n=n, groups=groups, seed=seed)


def save_direction(direction: Direction, path: str | Path, *, weights_hash: str) -> Path:
    """Write a safetensors file whose metadata says what the vector is and for which weights."""
    metadata = {field: getattr(direction, field) for field in _FIELDS}
    write_tensors(path, {"vector": direction.vector}, {**metadata, "weights_hash": weights_hash})
    return Path(path)


def open_direction(path: str | Path, *, model: HybridModel) -> Direction:
    """Read a direction back; refused on a model with other weights.

    Raises:
        WrongInput: no such file, not a direction, or made for other weights.
    """
    metadata = read_metadata(path)
    if not {*_FIELDS, "weights_hash"} <= set(metadata):
        raise WrongInput(f"{path} is not a direction")
    if metadata["weights_hash"] != model.weights_hash:
        made_for = metadata["weights_hash"]
        raise WrongInput(f"{path} was made for weights {made_for}, {model.name} has {model.weights_hash}")
    fields = {field: metadata[field] for field in _FIELDS}
    heads = fields["heads"]
    fields |= {"shape": tuple(fields["shape"]), "heads": tuple(heads) if heads is not None else None}
    return Direction(vector=read_tensors(path)["vector"], **fields)
