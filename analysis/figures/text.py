"""Tokens as coloured text: how much each of them adds to one number, or takes from it.

This is HTML and needs neither plotly nor a script. Colour is not the only mark: what adds is over a solid line, what
takes is over a dashed one, and each token says its number when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup, escape

from analysis.figures.parts import FONT, INK, MUTED, NEGATIVE, POSITIVE
from analysis.figures.tokens import fitting
from analysis.words import finite, number


def attribution_text(
    tokens: Sequence[str],
    values: Iterable[Any],
    *,
    title: str,
    unit: str = "share of the whole",
    largest: float | None = None,
) -> Markup:
    """Tokens in the order of the prompt; the deeper the colour, the larger the size.

    Args:
        values: one signed number for each token, for example a row of `probes.attribution.Attribution.shares`; None or
            NaN where it was not measured.
        unit: what the numbers are.
        largest: the size that has the deepest colour, to compare texts; the largest of `values` by default.

    Returns:
        HTML with its styles inside and everything escaped, for a page or (by `IPython.display.HTML`) a notebook.
    """
    row = fitting("values", values, tokens)
    known = finite(row)
    deepest = largest if largest is not None else max(map(abs, known), default=0.0)
    deepest = deepest if deepest > 0 else 1.0
    shown = Markup("").join(_token(token, value, deepest, unit) for token, value in zip(tokens, row, strict=True))
    if not known:
        shown = Markup("<em>not measured: no token has a value</em> ") + shown
    steps = [(deepest, "adds: +"), (deepest / 4, "+"), (0.0, ""), (-deepest / 4, ""), (-deepest, "takes away: ")]
    marks = [(_style(value, deepest), f"{words}{number(value)}") for value, words in steps]
    if len(known) < len(row):
        marks.append((_style(math.nan, deepest), "not measured"))
    key = Markup(" ").join(Markup('<span style="{}">{}</span>').format(style, words) for style, words in marks)
    return Markup(
        '<div class="attribution" style="font-family:{};color:{};background:#fff;max-width:92ch">'
        '<div style="font-weight:650;margin-bottom:4px">{}</div>'
        '<div style="font-size:0.88em;margin-bottom:8px"><span style="color:{}">{}:</span> {} '
        '<span style="color:{}">point at a token for its number</span></div>'
        '<div style="line-height:2.1;white-space:pre-wrap;overflow-wrap:anywhere">{}</div></div>'
    ).format(FONT, INK, title, MUTED, unit, key, MUTED, shown)


def _style(value: float, deepest: float) -> str:
    """Colour and underline of a token with this value."""
    shape = "padding:1px 2px;margin-right:2px;border-radius:3px 3px 0 0;"
    if not math.isfinite(value):
        return f"{shape}color:{MUTED};border-bottom:2px dotted {MUTED}"
    if value == 0:
        return f"{shape}border-bottom:2px solid transparent"
    color, stroke = (POSITIVE, "solid") if value > 0 else (NEGATIVE, "dashed")
    depth = 0.5 * min(abs(value) / deepest, 1.0)
    red, green, blue = (round(255 - depth * (255 - int(color[i : i + 2], 16))) for i in (1, 3, 5))
    return f"{shape}background:rgb({red},{green},{blue});border-bottom:2px {stroke} {color}"


def _token(token: str, value: float, deepest: float, unit: str) -> Markup:
    said = f"{'+' if value > 0 else ''}{number(value)}" + (f" ({unit})" if math.isfinite(value) else "")
    text = escape(token).replace("\n", Markup("↵\n"))
    return Markup('<span style="{}" title="{}">{}</span>').format(_style(value, deepest), said, text)
