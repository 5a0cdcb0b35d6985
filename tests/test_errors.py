"""Ranges of configurations: what is refused, and in which words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from probes.errors import SEEDS, WrongInput, check_ranges

RANGES = {"share": (0, 1), "count": (2, math.inf), "seed": SEEDS}


@dataclass
class Config:
    share: float | None = 0.5
    count: int = 2
    seed: int = 0


@pytest.mark.parametrize("config", [Config(), Config(share=None), Config(count=10**9), Config(seed=2**31 - 1)])
def test_what_lies_in_its_range_is_taken(config):
    check_ranges(config, RANGES, inside=("share",))


def test_bounds_belong_to_a_range_unless_it_says_otherwise():
    check_ranges(Config(share=0.0), RANGES)
    with pytest.raises(WrongInput, match=r"^share must lie between 0 and 1, saw 0$"):
        check_ranges(Config(share=0.0), RANGES, inside=("share",))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Config(share=1.5), "share must lie between 0 and 1, saw 1.5"),
        (Config(share=math.nan), "share must lie between 0 and 1, saw nan"),
        (Config(count=1), "count must be at least 2, saw 1"),
        (Config(seed=2**31), "seed must lie between 0 and 2147483647, saw 2147483648"),
    ],
)
def test_what_lies_outside_is_named(config, said):
    with pytest.raises(WrongInput, match=f"^{said}$"):
        check_ranges(config, RANGES)
