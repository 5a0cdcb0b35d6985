"""Logistic regression on very many features, in the span of the rows: a state has thousands of times more entries than
there are prompts, but a regularised solution is a sum of the rows, and all refits share their inner products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from probes.stats import Floats

TIE = 1e-9  # log-odds, or AUROC, that differ by less are equal but for rounding
_BLOCK = 16384  # features that are held in float64 at a time


def blocks(rows: NDArray[Any], train: NDArray[np.bool_]) -> Iterator[tuple[Floats, Floats]]:
    """Features in blocks, standardised by the training rows alone, with their scales."""
    for start in range(0, rows.shape[1], _BLOCK):
        block = rows[:, start : start + _BLOCK].astype(np.float64)
        scaler = StandardScaler().fit(block[train])
        yield np.asarray(scaler.transform(block)), np.asarray(scaler.scale_)


def span(rows: NDArray[Any], train: NDArray[np.bool_], components: int | None) -> tuple[Floats, Floats]:
    """Coordinates of all rows on the principal axes of the training rows, and the axes as sums of training rows.

    A solution lies in the span of the training rows, so nothing is lost, and all shuffles are refitted in it.
    """
    gram = sum((block @ block[train].T for block, _ in blocks(rows, train)), start=np.zeros((1, 1)))
    size = float(np.trace(gram[train])) / int(train.sum())
    if size < 1e-12:  # no feature varies: what is left is rounding
        return np.zeros((len(rows), 1)), np.zeros((int(train.sum()), 1))
    values, vectors = np.linalg.eigh(gram[train] / size)
    kept = np.flatnonzero(values > 1e-13 * len(values) * values[-1])[::-1][:components]
    axes = vectors[:, kept] / np.sqrt(values[kept])
    return gram @ axes / size, axes


def weights(coordinates: Floats, labels: NDArray[np.bool_], C: float) -> Floats:
    return LogisticRegression(C=C, solver="lbfgs", tol=1e-8, max_iter=1000).fit(coordinates, labels).coef_[0]


def logistic_direction(rows: NDArray[Any], *, C: float, components: int | None = None) -> Tensor:
    """Weights of a logistic regression of the first half of the rows against the second, for features as they are.

    Float32 of length 1, pointing to the first half; zeros where the two halves are equal.
    """
    everything, labels = np.ones(len(rows), dtype=bool), np.arange(len(rows)) < len(rows) // 2
    if components is None and rows.shape[1] <= len(rows):  # few features: the same without a detour by the rows
        ((block, scale),) = blocks(rows, everything)
        size = float(np.sqrt((block**2).sum() / len(rows)))
        found = weights(block / size, labels, C) if size > TIE else np.zeros(rows.shape[1])
        raw = found / scale
    else:
        coordinates, axes = span(rows, everything, components)
        found = weights(coordinates, labels, C)
        raw = np.concatenate([block.T @ (axes @ found) / scale for block, scale in blocks(rows, everything)])
    length = float(np.linalg.norm(raw)) if np.linalg.norm(found) > TIE else np.inf
    return torch.from_numpy((raw / length).astype(np.float32))
