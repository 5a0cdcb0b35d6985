"""Results, drawn. The only place that imports plotly.

`parts` holds the look and the marks; the other files draw one kind of result each.
"""

from analysis.figures.parts import KINDS, NOISE, TARGET, WRONG, as_html, not_measured, plotly_script
from analysis.figures.verdict import (
    CLIP,
    baseline,
    controls,
    damage,
    decodability,
    dose_curve,
    dose_response,
    draw,
    layer_sweep,
    necessity,
    phases,
    prompt_effects,
)

__all__ = [
    "CLIP", "KINDS", "NOISE", "TARGET", "WRONG", "as_html", "baseline", "controls", "damage", "decodability",
    "dose_curve", "dose_response", "draw", "layer_sweep", "necessity", "not_measured", "phases", "plotly_script",
    "prompt_effects",
]  # fmt: skip
