"""Ways of extracting a direction: from pairs of activations to one raw vector, before it is made a unit vector.

mean        wanted minus unwanted, on average (arXiv:2312.06681)
whitened    the mean difference divided by the covariance within the sides (Fisher's discriminant), shrunk as by
            Ledoit and Wolf; of a state, by the covariances of its rows and of its columns
pca         the axis along which the differences are largest: their first right singular vector, not centred
            (arXiv:2310.01405), turned to the wanted side
logistic    the weights of a regularised logistic regression of the two sides (`probes.linear`), in raw units
low-rank    for states: each head's mean difference, cut to its largest singular values; a GDN layer writes rank 1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from probes.errors import WrongInput
from probes.pairs import Pairs
from probes.span import logistic_direction

Method = Literal["mean", "whitened", "pca", "logistic", "low-rank"]
Raw = Callable[[Pairs], Tensor]  # pairs -> an unnormalised direction, flat
NAMES: dict[Method, str] = {
    "mean": "mean difference", "whitened": "whitened mean difference", "pca": "first principal axis of differences",
    "logistic": "logistic probe", "low-rank": "low-rank mean difference",
}  # fmt: skip
LOGISTIC_C = 1.0  # inverse penalty, for standardised features of mean squared length 1


def methods_at(site: str) -> tuple[Method, ...]:
    """The methods that a site has, the default first."""
    return tuple(name for name in NAMES if name != "low-rank" or site == "gdn.state")


def mean_of(pairs: Pairs) -> Float[Tensor, " feature"]:
    """Wanted minus unwanted, on average."""
    return pairs.differences.mean(0)


def raw_of(method: Method, *, rank: int = 1) -> Raw:
    """What a method does with pairs before the result is normalised.

    Raises:
        WrongInput: the method is unknown.
    """
    found: dict[str, Raw] = {
        "mean": mean_of, "whitened": _discriminant, "pca": _axis, "logistic": _probe,
        "low-rank": partial(_cut, rank=rank),
    }  # fmt: skip
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


def null_of(method: Method, *, rank: int = 1) -> Raw:
    """What shuffled labels go through, for controls: the method itself, but for one that knows labels by sign alone.

    Exchanging the sides of a pair leaves the principal axis of the differences where it is; the mean stands in.
    """
    return raw_of("mean" if method == "pca" else method, rank=rank)


def _axis(pairs: Pairs) -> Tensor:
    """By way of the products of differences, since a state has more entries than there are pairs."""
    differences = pairs.differences.double()
    weights = torch.linalg.eigh(differences @ differences.T).eigenvectors[:, -1]
    axis = (weights @ differences).float()
    return axis if float(axis @ mean_of(pairs)) >= 0 else -axis


def _probe(pairs: Pairs) -> Tensor:
    return logistic_direction(torch.cat([pairs.wanted, pairs.unwanted]).numpy(), C=LOGISTIC_C)
