"""Random numbers that need no generator: each is a function of a key and of its place.

The projections of APOLLO are never stored, and a resumed run must round its weights as the uninterrupted one would. So
whatever is random in an optimizer step is computed from (seed, name, index) alone, by integer arithmetic that gives the
same bits on every device: the place runs through an arithmetic sequence of the key's own start and stride, and a 32-bit
mixer (three shifts and two multiplications with the constants of "lowbias32", the least biased that C. Wellons' search
found) makes each term a number of its own.

Normal numbers are looked up: 16 bits choose one of 65,536 equally likely quantiles, scaled to variance 1. The largest
is 4.3 standard deviations from 0.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEVELS = 1 << 16
_MIXER = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 0))  # shifts and factors of lowbias32


def key_of(seed: int, name: str, index: int = 0) -> tuple[int, int]:
    """Start and (odd) stride of a sequence, 32-bit signed integers from the SHA-256 of what it is for."""
    digest = hashlib.sha256(f"{seed} {name} {index}".encode()).digest()
    start, stride = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
    return start, stride | 1


def bits(keys: list[tuple[int, int]], n: int, *, device: torch.device | str = "cpu") -> Int[Tensor, "key n"]:
    """n uniform 32-bit integers (int32) for each key; n at most 2^31."""
    pair = torch.tensor(keys, dtype=torch.int32).to(device)
    x = torch.addcmul(pair[:, :1], torch.arange(n, dtype=torch.int32, device=device), pair[:, 1:])
    # Products wrap around; the masks make the arithmetic shifts of signed integers logical ones.
    shifted = torch.empty_like(x)
    for shift, factor in _MIXER:
        torch.bitwise_right_shift(x, shift, out=shifted)
        shifted &= (1 << (32 - shift)) - 1
        x ^= shifted
        if factor:
            x *= factor
    return x


def normal(
    keys: list[tuple[int, int]], rows: int, columns: int, *, device: torch.device | str = "cpu"
) -> Float[Tensor, "key rows columns"]:
    """Independent normal numbers (float32, mean 0, variance 1) for each key."""
    size = rows * columns
    halves = bits(keys, -(-size // 2), device=device).view(torch.int16)[:, :size]  # two draws of 16 bits from each
    places = halves.int().add_(_LEVELS // 2).reshape(-1)
    return _quantiles(str(device)).index_select(0, places).view(-1, rows, columns)


def signs(
    keys: list[tuple[int, int]], rows: int, columns: int, size: float, *, device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Float[Tensor, "key rows columns"]:  # fmt: skip
    """Independent random signs times `size` (float32): each bit is put where a float keeps its sign.

    `out` is float32 memory for them, of 32-bit words enough for each key: [key, ceil(rows columns / 32), 32].
    """
    words = bits(keys, -(-rows * columns // 32), device=device)
    spread = torch.empty(*words.shape, 32, dtype=torch.int32, device=device) if out is None else out.view(torch.int32)
    torch.bitwise_left_shift(words[:, :, None], torch.arange(32, dtype=torch.int32, device=device), out=spread)
    spread &= -(1 << 31)
    spread |= torch.tensor(size, dtype=torch.float32).view(torch.int32).item()
    return spread.view(torch.float32).view(len(keys), -1)[:, : rows * columns].view(len(keys), rows, columns)


@cache
def _quantiles(device: str) -> Tensor:
    """Of the normal distribution, at the middles of equal probabilities; computed once on the CPU, in float64."""
    middles = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    values = torch.special.ndtri(middles)
    return (values / values.square().mean().sqrt()).float().to(device)


def stochastically_rounded(values: Tensor, key: tuple[int, int]) -> Tensor:
    """float32 to bfloat16, up or down at random so that the expectation is the value itself.

    16 random bits are added below the 16 that stay; the carry does the rest.
    """
    noise = bits([key], (values.numel() + 1) // 2, device=values.device).view(torch.int16)[0, : values.numel()]
    # reshape: what is transposed gets the noise in its own order, as it lies in memory
    raised = values.contiguous().view(torch.int32) + (noise.view(values.shape).int() & 0xFFFF)
    return (raised & ~0xFFFF).view(torch.float32).bfloat16()
