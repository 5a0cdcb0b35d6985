"""Maps of states and figures along tokens: every number is drawn where it belongs, and what is missing is named."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from pages import HOSTILE, Page, browse, needs_browser
from test_figures import trace, words_of

from analysis import figures
from analysis.figures.parts import DIVERGING, NEGATIVE, POSITIVE
from analysis.figures.tokens import visible
from analysis.words import number
from probes.attribution import attribute_state, implicit_attention
from probes.errors import WrongInput
from probes.recurrence import Recurrence

KINDS = ["gdn", "gdn", "gdn", "attention"] * 2
TOKENS = ["<|im_start|>", "please", " seal", "\n", "the", "tower", "."]


def table(seed: int = 0, heads: int = 3) -> dict[int, list[float]]:
    rng = np.random.default_rng(seed)
    return {i: rng.normal(0, 2, heads).tolist() for i, kind in enumerate(KINDS) if kind == "gdn"}


def cells(drawn: Any) -> np.ndarray:
    """A heatmap's numbers as [layer, head], NaN where a cell is empty."""
    return np.array([[math.nan if value is None else value for value in row] for row in drawn.z], dtype=float).T


def expected(values: dict[int, list[float]], heads: int = 3) -> np.ndarray:
    return np.array([values.get(i, [math.nan] * heads) for i in range(len(KINDS))])


def test_heatmap_holds_every_number_and_says_which_layers_have_none():
    values = table()
    figure: Any = figures.state_heatmap(values, kinds=KINDS, title="Norm", unit="Frobenius norm", head="v_head")
    drawn = trace(figure, "panel 1")
    np.testing.assert_array_equal(cells(drawn), expected(values))
    known = [value for row in values.values() for value in row]
    assert (drawn.zmin, drawn.zmax) == (min(known), max(known))
    assert [[number(v) for v in row] for row in values.values()] == [
        [drawn.text[head][i] for head in range(3)] for i in values
    ]
    columns = [(shape.x0, shape.x1) for shape in figure.layout.shapes]
    assert columns == [(2.5, 3.5), (6.5, 7.5)]
    assert "attention layer: has no state (grey column)" in words_of(figure)
    assert "Frobenius norm, one row for each v_head" in words_of(figure)
    assert "not measured" not in " ".join(t.name for t in figure.data)
    ticks = figure.layout.xaxis.ticktext
    assert [("●" in tick, "◆" in tick) for tick in ticks] == [(kind == "gdn", kind == "attention") for kind in KINDS]


def test_signed_heatmap_has_white_at_zero_and_reaches_equally_far_both_ways():
    values = table() | {0: [0.0, -5.5, 1.0]}
    drawn: Any = trace(
        figures.state_heatmap(values, kinds=KINDS, title="Readout", unit="nats", diverging=True), "panel 1"
    )
    assert (drawn.zmin, drawn.zmid, drawn.zmax) == (-5.5, 0, 5.5)
    scale = [tuple(step) for step in drawn.colorscale]
    assert scale == [tuple(step) for step in DIVERGING]
    assert scale[2] == (0.5, "#ffffff")


def test_missing_cells_are_crossed_and_named():
    values: dict[int, Any] = table() | {1: [1.0, None, math.nan], 2: [1.0]}
    del values[5]
    figure: Any = figures.state_heatmap(values, kinds=KINDS, title="Norm", unit="norm")
    holes = trace(figure, "holes 1")
    assert set(zip(holes.x, holes.y, strict=True)) == {(1, 1), (1, 2), (2, 1), (2, 2), (5, 0), (5, 1), (5, 2)}
    assert set(holes.hovertext) == {
        f"<b>layer {i}, head {h}</b><br>not measured" for i, h in zip(holes.x, holes.y, strict=True)
    }
    assert "not measured" in [t.name for t in figure.data]
    assert cells(trace(figure, "panel 1"))[1, 0] == 1.0


def test_attention_layers_with_numbers_of_their_own_are_drawn():
    values = table() | {3: [1.0, 2.0, 3.0]}
    figure: Any = figures.state_heatmap(values, kinds=KINDS, title="Heads", unit="norm")
    np.testing.assert_array_equal(cells(trace(figure, "panel 1"))[3], [1.0, 2.0, 3.0])
    assert [shape.x0 for shape in figure.layout.shapes] == [6.5]


def test_nothing_measured_is_said_and_wrong_layers_are_refused():
    nothing = figures.state_heatmap({}, kinds=KINDS, title="Norm", unit="norm")
    assert "<b>not measured</b><br>no layer has a value" in words_of(nothing)
    gaps = {0: [math.nan]}
    assert "<b>not measured</b>" in words_of(
        figures.before_after_map(gaps, gaps, kinds=KINDS, title="Norm", unit="norm")
    )
    with pytest.raises(WrongInput, match="layer 8 has values, but kinds names layers 0 to 7"):
        figures.state_heatmap({8: [1.0]}, kinds=KINDS, title="Norm", unit="norm")


def test_constant_values_have_a_scale():
    drawn: Any = trace(figures.state_heatmap({0: [2.0, 2.0]}, kinds=["gdn"], title="Norm", unit="norm"), "panel 1")
    assert drawn.zmin < 2 < drawn.zmax
    zero: Any = figures.state_heatmap({0: [0.0]}, kinds=["gdn"], title="Norm", unit="norm", diverging=True)
    assert trace(zero, "panel 1").zmax > 0


def test_before_and_after_share_a_scale_and_the_change_is_their_difference():
    before, after = table(0), table(1)
    after[4][1] = math.nan
    figure: Any = figures.before_after_map(before, after, kinds=KINDS, title="Norm", unit="norm")
    first, second, change = (trace(figure, f"panel {panel}") for panel in (1, 2, 3))
    np.testing.assert_array_equal(cells(first), expected(before))
    np.testing.assert_array_equal(cells(second), expected(after))
    np.testing.assert_array_equal(cells(change), expected(after) - expected(before))
    assert (first.zmin, first.zmax) == (second.zmin, second.zmax)
    every = np.r_[expected(before).ravel(), expected(after).ravel()]
    assert (first.zmin, first.zmax) == (np.nanmin(every), np.nanmax(every))
    largest = np.nanmax(np.abs(expected(after) - expected(before)))
    assert (change.zmin, change.zmax) == (-largest, largest)
    assert list(trace(figure, "holes 1").x) == []
    assert list(trace(figure, "holes 3").x) == [4]


def test_maps_of_different_layers_have_no_difference_and_say_so():
    figure = figures.before_after_map({0: [1.0]}, {1: [1.0]}, kinds=KINDS, title="Norm", unit="norm")
    assert "not measured: no cell has a value both before and after" in words_of(figure)


def test_trajectories_hold_every_readout_spans_and_tokens():
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {f"layer {i}": rng.normal(0, 1, len(TOKENS)) for i in range(9)}
    values["layer 2"] = torch.tensor([1.0, 2, math.nan, 4, 5, 6, 7])
    spans = {"context": (0, 1), "direction": (1, 6), "decision": (6, 7)}
    figure: Any = figures.readout_trajectories(values, TOKENS, title="Readout", unit="readout (nats)", spans=spans)
    for name, row in values.items():
        np.testing.assert_array_equal(np.array(trace(figure, name).y, dtype=float), np.asarray(row, dtype=float))
    looks = [(line.line.color, line.line.dash, line.marker.symbol) for line in figure.data]
    assert len(set(looks)) == len(looks)
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(-0.5, 0.5), (0.5, 5.5), (5.5, 6.5)]
    for said in ("readout (nats)", "<b>direction</b>", "not measured: layer 2 at some tokens"):
        assert said in words_of(figure)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;|im_start|&gt;", "please", "·seal", "↵", "the", "tower", "."]
    low, high = figure.layout.yaxis.range
    assert low < 0 < 7 < high
    assert visible(" a\n") == "·a↵"


def test_long_prompts_say_that_tokens_are_left_out():
    figure: Any = figures.readout_trajectories({"layer 0": np.ones(200)}, ["a"] * 200, title="Readout", unit="nats")
    assert len(figure.layout.xaxis.ticktext) == 40
    assert "every 5th is written" in figure.layout.xaxis.title.text


def test_rows_that_do_not_fit_the_tokens_are_refused():
    with pytest.raises(WrongInput, match="layer 0 has 2 values for 7 tokens"):
        figures.readout_trajectories({"layer 0": [1, 2]}, TOKENS, title="Readout", unit="nats")
    with pytest.raises(WrongInput, match="query 7 is not one of 7 tokens"):
        figures.implicit_attention_beside({}, {}, TOKENS, query=7)
    nothing = figures.readout_trajectories({"a": [None] * 7}, TOKENS, title="Readout", unit="nats")
    assert "<b>not measured</b><br>no token has a value" in words_of(nothing)


def gdn_layer(tokens: int) -> Recurrence:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    unit = [torch.nn.functional.normalize(draw(1, tokens, 1, 8), dim=-1) for _ in range(2)]
    return Recurrence(
        q=unit[0], k=unit[1], v=draw(1, tokens, 2, 6), beta=torch.sigmoid(draw(1, tokens, 2)),
        decay=-draw(1, tokens, 2).abs(),
    )  # fmt: skip


def test_implicit_attention_is_signed_beside_full_attention_and_ends_at_the_query():
    query, layer = 4, gdn_layer(len(TOKENS))
    weights = implicit_attention(layer, torch.tensor([[query]])).weights[0, :, 0]
    full = torch.softmax(torch.randn(len(TOKENS), generator=torch.Generator().manual_seed(1)), 0)
    gdn = {f"layer 0 head {head}": weights[head] for head in range(2)}
    figure: Any = figures.implicit_attention_beside(gdn, {"layer 3 head 0": full}, TOKENS, query=query)
    implicit, softmax = trace(figure, "implicit"), trace(figure, "full")
    seen = np.array(implicit.z, dtype=float)
    np.testing.assert_array_equal(seen[:, : query + 1], weights[:, : query + 1].numpy())
    assert np.isnan(seen[:, query + 1 :]).all()
    assert (implicit.zmin, implicit.zmid, implicit.zmax) == (-weights.abs().max(), 0, weights.abs().max())
    np.testing.assert_array_equal(np.array(softmax.z, dtype=float)[0, : query + 1], full[: query + 1].numpy())
    assert (softmax.zmin, softmax.zmid) == (0, None)
    assert softmax.zmax == full[: query + 1].max()
    boxes = [(s.x0, s.x1) for s in figure.layout.shapes if s.line.color]
    assert boxes == [(3.5, 4.5), (3.5, 4.5)]
    assert words_of(figure).count("later tokens") == 2
    assert "boxed: the query: token 4, the" in words_of(figure)


def test_missing_weights_and_layers_are_named():
    row = [0.1, math.nan, 0.2, 0, 0, 0, 0]
    figure: Any = figures.implicit_attention_beside({"layer 0": row}, {}, TOKENS, query=3)
    assert list(trace(figure, "holes 1").x) == [1]
    assert "× not measured" in words_of(figure)
    assert "not measured: no such layer was looked at" in words_of(figure)
    nothing = figures.implicit_attention_beside({}, {}, TOKENS, query=3)
    assert "<b>not measured</b><br>no weight is known" in words_of(nothing)


def spans_of(text: str) -> list[tuple[dict[str, str], str]]:
    """Style, title and words of each token, in order."""
    found = re.findall(r'<span style="([^"]*)" title="([^"]*)">(.*?)</span>', text, flags=re.DOTALL)
    return [({"style": style, "title": html.unescape(title)}, html.unescape(words)) for style, title, words in found]


def test_attribution_text_says_every_share_by_colour_line_and_number():
    shares = [0.6, -0.3, 0.15, 0.0, math.nan, -0.6, 0.01]
    seen = spans_of(figures.attribution_text(TOKENS, shares, title="Shares", unit="share"))
    assert [words for _, words in seen] == [token.replace("\n", "↵\n") for token in TOKENS]
    assert [found["title"] for found, _ in seen] == [
        "+0.6 (share)", "−0.3 (share)", "+0.15 (share)", "0 (share)", "not measured", "−0.6 (share)", "+0.01 (share)",
    ]  # fmt: skip
    for (found, _), share in zip(seen, shares, strict=True):
        assert (f"solid {POSITIVE}" in found["style"]) == (share > 0)
        assert (f"dashed {NEGATIVE}" in found["style"]) == (share < 0)
        assert ("dotted" in found["style"]) == math.isnan(share)
        assert ("background" in found["style"]) == (share != 0 and not math.isnan(share))

    def depth(i: int) -> int:
        rgb = re.search(r"rgb\((\d+),(\d+),(\d+)\)", seen[i][0]["style"])
        assert rgb is not None
        return sum(255 - int(part) for part in rgb.groups())

    assert depth(0) > depth(2) > depth(6)
    assert depth(5) > depth(1)


def test_attribution_text_shows_the_shares_of_a_state():
    layer = gdn_layer(len(TOKENS))
    found = attribute_state(layer, at=torch.tensor([[len(TOKENS) - 1]]))
    shares = found.shares[0, 0, 1]
    seen = spans_of(figures.attribution_text(TOKENS, shares, title="State"))
    said = [float(tip["title"].split(" ")[0].replace("−", "-")) for tip, _ in seen]
    np.testing.assert_allclose(said, shares.numpy(), rtol=5e-3)
    assert sum(said) == pytest.approx(1, abs=0.02)


def test_attribution_text_without_values_says_so_and_keeps_its_scale():
    assert "not measured: no token has a value" in figures.attribution_text(TOKENS, [None] * 7, title="Shares")
    deep = figures.attribution_text(["a"], [0.5], title="Shares", largest=1.0)
    assert "adds: +1" in deep
    assert spans_of(deep)[0][0]["style"] != spans_of(figures.attribution_text(["a"], [0.5], title="S"))[0][0]["style"]


def hostile() -> dict[str, Any]:
    tokens, row = [HOSTILE, "a"], [0.5, -0.5]
    return {
        "heat": figures.state_heatmap(table(), kinds=KINDS, title=HOSTILE, unit=HOSTILE, head=HOSTILE),
        "change": figures.before_after_map(table(), table(1), kinds=KINDS, title=HOSTILE, unit=HOSTILE),
        "readout": figures.readout_trajectories(
            {HOSTILE: row}, tokens, title=HOSTILE, unit=HOSTILE, spans={HOSTILE: (0, 1)}
        ),
        "beside": figures.implicit_attention_beside(
            {HOSTILE: row}, {HOSTILE: [0.5, 0.5]}, tokens, query=1, title=HOSTILE, unit=HOSTILE
        ),
        "text": figures.attribution_text(tokens, row, title=HOSTILE, unit=HOSTILE),
    }


def test_hostile_text_is_escaped():
    drawn = hostile()
    text = drawn.pop("text")
    assert "<script" not in text
    assert Page(str(text)).words.count(HOSTILE) == 3
    assert all(set(attrs) <= {"style", "title", "class"} for _, attrs in Page(str(text)).tags)
    for name, figure in drawn.items():
        assert "<img" not in figure.to_json().replace("\\u003c", "<"), name


@needs_browser
def test_a_browser_draws_every_figure_without_complaint(tmp_path):
    drawn = hostile()
    text = drawn.pop("text")
    body = "".join(figures.as_html(figure, name) for name, figure in drawn.items())
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>ours</title>'
    path = tmp_path / "figures.html"
    path.write_text(f"<!doctype html>{head}<script>{figures.plotly_script()}</script>{body}{text}", encoding="utf-8")
    dom, console = browse(path, tmp_path)
    assert re.findall(r'<div id="([a-z-]+)" class="[^"]*js-plotly-plot', dom) == list(drawn)
    assert "<title>ours" in dom
    assert "Content Security Policy" not in console
    assert "CONSOLE" not in console
