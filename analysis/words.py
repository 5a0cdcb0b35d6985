"""Results in words: how numbers and estimates are read from evidence and written in figures and reports.

A verdict on disk holds null where a number was NaN or infinite, so each of these takes None as well.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from probes.criteria import Criterion

Numbers = Mapping[str, Any]
"""An `Estimate` as a dict: value, lower, upper, n, groups."""


def real(value: float | None) -> float:
    return math.nan if value is None else float(value)


def reals(values: Iterable[Any]) -> list[float]:
    """Numbers of any kind (of arrays and tensors, too), NaN for None."""
    return [math.nan if value is None else float(value) for value in values]


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def ends(numbers: Numbers) -> list[float]:
    """The value and both ends of an estimate, those that are known."""
    return finite([numbers["value"], numbers["lower"], numbers["upper"]])


def number(value: float | None) -> str:
    """Three significant digits; "not measured" for NaN and None."""
    if value is None or math.isnan(value):
        return "not measured"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.0f}" if 999.5 <= abs(value) < 1e7 else f"{value:.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def estimate(numbers: Numbers) -> str:
    """value [lower, upper], or the value alone where there is no interval."""
    interval = finite([numbers["lower"], numbers["upper"]])
    return number(numbers["value"]) + (f" [{number(interval[0])}, {number(interval[1])}]" if len(interval) == 2 else "")


def ratio(value: float | None) -> str:
    """A ratio that is known to have been measured, so that None was infinite."""
    return "∞" if value is None or not math.isfinite(value) else number(value)


def lines(*parts: str) -> str:
    """Parts below each other in a plotly label; empty ones are left out."""
    return "<br>".join(part for part in parts if part)


def safe(text: str) -> str:
    """Plotly reads a little HTML in its labels; words from data files and models are shown as they are."""
    return html.escape(str(text), quote=False)


def wrapped(text: str, width: int) -> str:
    """`safe` text on lines of at most so many characters, for a plotly label."""
    return lines(*(safe(part) for part in textwrap.wrap(str(text), width)))


def reason(criteria: Iterable[Criterion], name: str) -> str:
    """Why a line of the criteria has no value; verdicts of older versions do not have every line."""
    return next(
        (c.rule for c in criteria if c.name == name and math.isnan(c.observed)), "this verdict does not hold it"
    )


def searched(row: Numbers) -> str:
    """What a layer did when it was tried, in a plotly label; a row of `evidence["layers"]`."""
    return lines(
        f"<b>{row['layer']}</b>{', ' + safe(row['method']) if 'method' in row else ''}",
        f"effect {estimate(row['effect'])} nats at dose {row['dose']:g}",
        f"random directions {_around(row['random_effect'])}",
        f"shuffled labels {_around(row['shuffled_effect'])}",
        f"AUROC {number(row['auroc'])}, reliability {number(row['reliability'])}",
        f"perplexity ratio {ratio(row['perplexity_ratio'])}",
    )


def _around(size: float | None) -> str:
    return f"±{number(size)} nats on average" if finite([size]) else "were not run here"


def percent(share: float | None) -> str:
    """A share in percent, with one decimal below ten; "not measured" for NaN and None."""
    if share is None or not math.isfinite(share):
        return number(share)
    text = f"{100 * share:.{0 if abs(share) >= 0.0995 else 1}f}".removesuffix(".0")
    return ("0" if text == "-0" else text.replace("-", "−", 1)) + "%"


def nats(value: float | None) -> str:
    """Two decimals, without a sign on zero; "not measured" for NaN and None."""
    if value is None or not math.isfinite(value):
        return number(value)
    text = f"{value:,.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−", 1)


def limits(numbers: Numbers) -> str:
    """lower to upper, in nats; empty where there is no interval."""
    ends = finite([numbers["lower"], numbers["upper"]])
    return f"{nats(ends[0])} to {nats(ends[1])}" if len(ends) == 2 else ""


UNITS = {"resid": "residual norms", "gdn.state": "state norms", "attn.heads": "norms of the heads' output"}
"""What a dose counts, by the site of the direction."""

EDITED = {
    "resid": "the residual stream after it is edited",
    "gdn.state": "the recurrent state of its heads is edited",
    "attn.heads": "the output of its heads is edited",
}
"""What is edited at a layer."""

PHASES = {
    "resid": (
        "Which tokens have to be edited? Only those of the prompt (prefill), only those of the answer (decode), or "
        "both."
    ),
    "gdn.state": (
        "When has the state to be edited? Before the last prompt token (prefill), before the answer's first token is "
        "read (decode), or at both moments; every later token reads what is left of the edit. (Where --form says so: "
        "from the first token on, or at every token.)"
    ),
}
"""What the phases of an intervention mean; attention heads are edited token by token like the stream."""

ON_TEXT = {
    "resid": "with every token edited",
    "gdn.state": "with a state that was edited before its first token",
}
"""How ordinary text meets an intervention."""
