"""From a contrast to a direction: what the difference between wanted and unwanted looks like inside.

Extraction has two steps. `contrast` records both sides of a behaviour at a site. An extraction turns one layer's pairs
into a `Direction`, a unit vector in the site's space that points from unwanted to wanted, with its reliability: how
well directions from two disjoint halves of the topic groups agree. A direction whose halves disagree is noise.

Three sites can be steered along a direction. In the residual stream (`resid`) it is a vector, in an attention layer
(`attn.heads`) one vector for each head, and in a GDN layer (`gdn.state`) one matrix for each value head, since a state
is a map from keys to values. All are stored flat, as one unit vector with its `shape`, so the same code compares,
controls and judges them. Three extractions exist:

    mean        wanted minus unwanted, on average (arXiv:2312.06681)
    low-rank    for states: each head's mean difference, cut to its largest singular values; a GDN layer writes rank 1
    whitened    the mean difference divided by the covariance within the sides (Fisher's discriminant), shrunk as by
                Ledoit and Wolf; of a state, by the covariances of its rows and of its columns

Two kinds of contrast exist. With persona turns the same question is asked under both personas and read at the last
prompt token, before a word of the answer is there. Without them the two answers are read instead, as a mean over
their tokens (a state: after the answer); such a direction may describe the text rather than the disposition, and says
so in `Direction.contrast`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from probes.behaviors import Behavior, Item, Side
from probes.capture import capture
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Prompt, answer_ids
from probes.sites import SITES, keeps_tokens, resolve
from probes.stats import Estimate, repeated, spearman_brown, split_groups
from probes.store import read_metadata, read_tensors, write_tensors

Contrast = Literal["persona", "answer"]
Method = Literal["mean", "low-rank", "whitened"]
STEERABLE = ("resid", "gdn.state", "attn.heads")
SPLITS = 50
_FIELDS = ("layer", "norm", "midpoint", "gap", "site", "shape", "heads", "method", "contrast", "behavior", "n")


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


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Both sides of a behaviour at one layer of a site: flat float32 features, row i of both from item i."""

    layer: int
    wanted: Float[Tensor, "prompt feature"]
    unwanted: Float[Tensor, "prompt feature"]
    groups: tuple[str, ...]
    behavior: str
    contrast: Contrast
    site: str = "resid"
    shape: tuple[int, ...] = ()
    heads: tuple[int, ...] | None = None

    @property
    def differences(self) -> Float[Tensor, "prompt feature"]:
        return self.wanted - self.unwanted

    @property
    def middle(self) -> Float[Tensor, " feature"]:
        """The mean of the two sides' means."""
        return (self.wanted.mean(0) + self.unwanted.mean(0)) / 2

    @property
    def equal(self) -> bool:
        """Whether the two sides have the same mean, so that there is no direction."""
        return not bool(self.differences.mean(0).any())

    @property
    def headed(self) -> bool:
        """Whether the first axis of `shape` are heads."""
        return SITES[self.site].axes[2] in ("head", "v_head")

    def where(self, mask: NDArray[np.bool_]) -> Pairs:
        """The pairs at which a mask is true."""
        index = torch.from_numpy(np.flatnonzero(mask))
        groups = tuple(group for group, kept in zip(self.groups, mask, strict=True) if kept)
        return replace(self, wanted=self.wanted[index], unwanted=self.unwanted[index], groups=groups)

    def only(self, heads: Sequence[int]) -> Pairs:
        """The pairs with every other head set to zero, so that whatever is made from them lives in these heads.

        Raises:
            WrongInput: the site has no heads, or no such head.
        """
        if not self.headed:
            raise WrongInput(f"heads were chosen, but '{self.site}' has no heads; {' and '.join(STEERABLE[1:])} have")
        chosen = tuple(sorted(set(heads)))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < self.shape[0]:
            seen = ", ".join(map(str, heads)) or "none"
            raise WrongInput(f"heads of {self.site} at layer {self.layer} are 0 to {self.shape[0] - 1}, saw {seen}")
        keep = torch.zeros(self.shape[0])
        keep[list(chosen)] = 1.0
        mask = keep.repeat_interleave(self.wanted.shape[1] // self.shape[0])
        return replace(self, wanted=self.wanted * mask, unwanted=self.unwanted * mask, heads=chosen)

    def scores(self, vector: Float[Tensor, " feature"]) -> tuple[list[float], list[float]]:
        """Projections of both sides on a vector."""
        return (self.wanted @ vector).tolist(), (self.unwanted @ vector).tolist()


def contrast(
    model: HybridModel,
    behavior: Behavior,
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid",
    positions: str = "auto",
    progress: bool = True,
) -> dict[int, Pairs]:
    """Record both sides of a behaviour at a site, one pass for all layers.

    Args:
        layers: 0-based; None for every layer that has the site.
        site: any site whose values have one shape for all prompts; those of `STEERABLE` can also be steered.
        positions: as in `capture`, or "auto": the last prompt token for a persona contrast, the mean over the answer
            for an answer contrast (a state is always read after the last token).

    Raises:
        WrongInput: a site without a fixed shape, or a layer without it.
    """
    return contrasts(model, behavior, {site: layers}, positions=positions, progress=progress)[site]


def contrasts(
    model: HybridModel,
    behavior: Behavior,
    sites: Mapping[str, Sequence[int] | None],
    *,
    positions: str = "auto",
    progress: bool = True,
) -> dict[str, dict[int, Pairs]]:
    """As `contrast`, at several sites in one pass: pairs by layer by site.

    Raises:
        WrongInput: see `contrast`.
    """
    plan = {site: resolve(model, site, layers) for site, layers in sites.items()}
    kind: Contrast = "persona" if behavior.has_persona else "answer"
    if positions == "auto":
        positions = "last" if kind == "persona" else "mean:decision"
    for site in plan:
        if "source" in SITES[site].axes:
            raise WrongInput(f"'{site}' has one entry for each earlier token, so prompts cannot be contrasted there")
        if keeps_tokens(site, positions):
            raise WrongInput(
                f"positions '{positions}' keep several tokens of a prompt; a contrast needs one, or a mean"
            )
    sides: tuple[Side, ...] = get_args(Side)
    prompts = [_sided(model, item, side, kind) for side in sides for item in behavior.items]
    record = capture(model, prompts, sites=tuple(plan), layers=plan, positions=positions, progress=progress)
    n, groups = len(behavior.items), tuple(item.group for item in behavior.items)
    result: dict[str, dict[int, Pairs]] = {site: {} for site in plan}
    for site, layer in ((site, layer) for site, chosen in plan.items() for layer in chosen):
        both = torch.as_tensor(record[site, layer]).float()
        flat = both.flatten(1)
        result[site][layer] = Pairs(
            layer=layer, wanted=flat[:n], unwanted=flat[n:], groups=groups, behavior=behavior.name, contrast=kind,
            site=site, shape=tuple(both.shape[1:]),
        )  # fmt: skip
    return result


def _sided(model: HybridModel, item: Item, side: Side, kind: Contrast) -> Prompt:
    if kind == "persona":
        return item.prompt(model, persona=side)
    prompt = item.prompt(model)
    answer = answer_ids(model, item.wanted if side == "wanted" else item.unwanted)
    spans = {**prompt.spans, "decision": (len(prompt), len(prompt) + len(answer))}
    return Prompt(text=prompt.text, ids=(*prompt.ids, *answer), spans=spans)


Raw = Callable[[Pairs], Tensor]  # pairs -> an unnormalised direction, flat


def extract(pairs: Pairs, *, method: Method = "mean", rank: int = 1, seed: int = 0) -> Direction:
    """A direction by one of the methods above; `rank` is for "low-rank" alone.

    Raises:
        WrongInput: the two sides are the same, the method is unknown, or it does not fit the site.
    """
    names = {
        "mean": "mean difference",
        "low-rank": f"rank-{rank} mean difference",
        "whitened": "whitened mean difference",
    }
    raw = raw_of(method, rank=rank)
    return _direction(pairs, raw, method=names[method], seed=seed)


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


def mean_of(pairs: Pairs) -> Float[Tensor, " feature"]:
    """Wanted minus unwanted, on average."""
    return pairs.differences.mean(0)


def raw_of(method: Method, *, rank: int = 1) -> Raw:
    """What a method does with pairs before the result is normalised.

    Raises:
        WrongInput: the method is unknown.
    """
    found: dict[str, Raw] = {"mean": mean_of, "low-rank": partial(_cut, rank=rank), "whitened": _discriminant}
    if method not in found:
        raise WrongInput(f"unknown method '{method}'; allowed are {', '.join(found)}")
    return found[method]


def _cut(pairs: Pairs, *, rank: int) -> Tensor:
    """Each head's mean difference, cut to its largest singular values."""
    if pairs.site != "gdn.state":
        raise WrongInput(f"a low-rank direction is one of states (gdn.state), saw '{pairs.site}'")
    most = min(pairs.shape[1:])
    if not 1 <= rank <= most:
        size = f"{pairs.shape[1]}x{pairs.shape[2]}"
        raise WrongInput(f"rank must lie between 1 and {most} for states of {size}, saw {rank}")
    u, s, vh = torch.linalg.svd(mean_of(pairs).reshape(pairs.shape), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank] @ vh[..., :rank, :]).flatten()


def _discriminant(pairs: Pairs) -> Tensor:
    within = torch.cat([pairs.wanted - pairs.wanted.mean(0), pairs.unwanted - pairs.unwanted.mean(0)])
    raw = mean_of(pairs)
    if pairs.site != "gdn.state":
        return _divided(raw[:, None], within)[:, 0]
    result = torch.zeros(pairs.shape)
    chosen = pairs.heads if pairs.heads is not None else range(pairs.shape[0])
    states = within.reshape(-1, *pairs.shape)
    for head in chosen:
        one = states[:, head]
        left = _divided(raw.reshape(pairs.shape)[head], one.transpose(1, 2).flatten(0, 1))
        result[head] = _divided(left.T, one.flatten(0, 1)).T
    return result.flatten()


def _divided(raw: Tensor, samples: Tensor) -> Tensor:
    """Sigma^-1 raw, Sigma being the shrunk covariance of centred samples (in float64: it is nearly singular)."""
    covariance, _ = ledoit_wolf(samples.double().numpy(), assume_centered=True)
    return torch.linalg.solve(torch.from_numpy(covariance), raw.double()).float()


def _direction(pairs: Pairs, raw_of: Raw, *, method: str, seed: int) -> Direction:
    if len(set(pairs.groups)) < 2:
        raise WrongInput(f"a direction needs pairs in at least 2 topic groups, saw {len(set(pairs.groups))}")
    if pairs.equal:
        raise WrongInput(f"both sides of '{pairs.behavior}' are equal at layer {pairs.layer}: there is no direction")
    difference, raw = mean_of(pairs), raw_of(pairs)
    vector = raw / raw.norm()
    norms = torch.cat([pairs.wanted, pairs.unwanted]).norm(dim=1)
    return Direction(
        layer=pairs.layer, vector=vector, norm=float(norms.median()), midpoint=float(pairs.middle @ vector),
        gap=float(difference @ vector), site=pairs.site, shape=pairs.shape or tuple(vector.shape), heads=pairs.heads,
        method=method, contrast=pairs.contrast, behavior=pairs.behavior, n=len(pairs.groups),
        reliability=split_half(pairs, raw_of, seed=seed),
    )  # fmt: skip


def split_half(pairs: Pairs, raw_of: Raw = mean_of, *, times: int = SPLITS, seed: int = 0) -> Estimate:
    """Cosine of the directions from two random halves of the groups, stepped up by Spearman-Brown.

    The interval covers the choice of halves, over `times` splits.
    """

    def agreement(rng: np.random.Generator) -> float:
        half = split_groups(pairs.groups, rng)
        a, b = (raw_of(pairs.where(part)).double() for part in (half, ~half))
        scale = float(a.norm() * b.norm())
        return spearman_brown(float(a @ b) / scale) if scale else 0.0

    value, lower, upper = repeated(agreement, times=times, seed=seed)
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
