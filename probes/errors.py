"""Wrong input: the one exception for it, whose message is one line that names what was seen and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

SEEDS = (0, 2**31 - 1)  # what every library takes


class WrongInput(Exception):
    """Raised for anything the caller can mend; the command line prints it and exits with 2.

    Not a ValueError, which argument parsers catch and dress up.
    """


def check_ranges(config: object, ranges: Mapping[str, tuple[float, float]], *, inside: Collection[str] = ()) -> None:
    """Check numbers of a configuration against the least and the largest value allowed.

    None is allowed, NaN and infinity are not.

    Args:
        inside: those that may not be the least or the largest value itself.

    Raises:
        WrongInput: the first that lies outside.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is None or low < value < high or (low <= value <= high and name not in inside and value < math.inf):
            continue
        allowed = f"be at least {_said(low)}" if math.isinf(high) else f"lie between {_said(low)} and {_said(high)}"
        allowed += " and be finite" if value == math.inf == high else ""
        raise WrongInput(f"{name} must {allowed}, saw {_said(value)}")


def _said(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
