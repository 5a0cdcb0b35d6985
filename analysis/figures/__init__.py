"""Results, drawn. The only place that imports plotly.

`parts` holds the look and the marks; the other files draw one kind of result each.
"""

from analysis.figures.calibration import draw_calibration
from analysis.figures.live import LivePlot
from analysis.figures.localization import channels, draw_localization, head_by_head, layer_by_layer
from analysis.figures.parts import KINDS, NOISE, TARGET, WRONG, as_html, not_measured, plotly_script
from analysis.figures.shift import along_direction, claims, decodable, draw_shift, token_shares, what_moved
from analysis.figures.states import before_after_map, state_heatmap
from analysis.figures.text import attribution_text
from analysis.figures.tokens import implicit_attention_beside, readout_trajectories
from analysis.figures.training import (
    abilities,
    abilities_by_step,
    draw_training,
    gradient_cosines,
    gradient_shares,
    learning,
    limiter_and_ratio,
    losses,
    sharpness_beside,
    update_sizes,
)
from analysis.figures.verdict import (
    CLIP,
    baseline,
    controls,
    damage,
    decodability,
    dose_curve,
    dose_response,
    draw,
    elsewhere,
    layer_sweep,
    methods,
    modes,
    necessity,
    phases,
    prompt_effects,
    specificity,
)

__all__ = [
    "CLIP", "KINDS", "NOISE", "TARGET", "WRONG", "LivePlot", "abilities", "abilities_by_step", "along_direction",
    "as_html", "attribution_text", "baseline", "before_after_map", "channels", "claims", "controls", "damage",
    "decodability", "decodable", "dose_curve", "dose_response", "draw", "draw_calibration", "draw_localization",
    "draw_shift", "draw_training", "elsewhere", "gradient_cosines", "gradient_shares", "head_by_head",
    "implicit_attention_beside",
    "layer_by_layer", "layer_sweep", "learning", "limiter_and_ratio", "losses", "methods", "modes", "necessity",
    "not_measured", "phases", "plotly_script", "prompt_effects", "readout_trajectories", "sharpness_beside",
    "specificity", "state_heatmap", "token_shares", "update_sizes", "what_moved",
]  # fmt: skip
