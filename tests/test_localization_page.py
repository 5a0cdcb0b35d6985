"""The page of a localization and its figures: what is drawn and written is what the rows say, and nothing is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
from pages import HOSTILE, Page, assert_browser_draws, assert_shown_and_not_obeyed, assert_stands_alone, needs_browser
from test_figures import trace, words_of

from analysis import figures
from analysis.figures.localization import layer_kinds
from analysis.localization_report import CONFIG, render_localization, write_localization_report
from analysis.words import limits, nats, percent
from probes.behaviors import read_behavior
from probes.localization import Carrier, Localization, Row, conclude, open_localization
from probes.localize import LocalizeConfig, localize
from probes.stats import Estimate

NAMES = ["channels", "layer-by-layer", "head-by-head"]
PERSONA = Estimate(value=8.0, lower=7.0, upper=9.0, n=24, groups=6)


def row(kind: Any, carrier: str, layer: int | None, head: int | None, value: float, bar: float = 0.5) -> Row:
    effect = Estimate(value=value, lower=value - 0.4, upper=value + 0.6, n=24, groups=6)
    return Row(
        kind=kind, carrier=carrier, layer=layer, head=head, effect=effect, share=value / PERSONA.value,
        controls=(0.1, -bar, *(0.3 * bar for _ in range(17))), bar=bar, least=0.16,
    )  # fmt: skip


def complete(layers: int = 8, heads: int = 4) -> Localization:
    """A behaviour that one GDN layer carries, and a little the attention; every kind of row."""
    gdn = [i for i in range(layers) if i % 4 != 3]
    attention = [i for i in range(layers) if i % 4 == 3]
    chosen = gdn[len(gdn) // 2]
    size = {i: 6.0 if i == chosen else 0.02 * i for i in range(layers)}
    rows = [
        row("exchange", "state", None, None, 6.4), row("exchange", "convolution", None, None, -0.01, 0.1),
        row("exchange", "attention", None, None, 1.6, 0.4),
        *(row("exchange", "state", i, None, size[i]) for i in gdn),
        *(row("exchange", "attention", i, None, 1.5 if i == 3 else 0.1) for i in attention),
        *(row("exchange", "state", chosen, head, 6.0 * (head == 1), 0.2) for head in range(heads)),
        *(row("give", "resid", i, None, 5.0 if i >= chosen else 0.0, 1.2) for i in range(layers)),
        *(row("give", "gdn.state", i, None, 0.8 * size[i]) for i in gdn),
        *(row("give", "attn.heads", i, None, 0.3) for i in attention),
        *(row("give", "gdn.state", chosen, head, 4.0 * (head == 1)) for head in range(heads)),
    ]  # fmt: skip
    whole: Any = {r.carrier: r for r in rows[:3]}
    lead = replace(PERSONA, value=4.8, lower=4, upper=5)
    sizes = {channel: r.effect for channel, r in whole.items()}
    half = PERSONA.value / 2
    halves: Any = {
        channel: replace(effect, value=effect.value - half, lower=effect.lower - half, upper=effect.upper - half)
        for channel, effect in sizes.items()
    }
    carrier, sentence = conclude(whole, PERSONA, {"convolution": lead, "attention": lead}, halves)
    recipe = {
        "model": "organism",
        "weights_hash": "fedcba98",
        "config": {"percentile": 95.0, "layers": None, "seed": 3},
    }
    return Localization(
        behavior="follow-direction", model="organism", carrier=carrier, sentence=sentence, persona=PERSONA,
        rows=tuple(rows), recipe=recipe, seconds=12.5,
    )  # fmt: skip


def without_personas() -> Localization:
    whole = complete()
    carrier, sentence = conclude({}, None, {}, {})
    rows = [replace(r, share=math.nan, least=0.0) for r in whole.rows if r.kind == "give" and r.head is None]
    return replace(whole, rows=tuple(rows), persona=None, carrier=carrier, sentence=sentence)


def with_gaps() -> Localization:
    """Rows without values, as a model that breaks leaves them."""
    whole, nothing = complete(), Estimate(value=math.nan, lower=math.nan, upper=math.nan, n=24, groups=6)
    blank = {("exchange", "state", None), ("exchange", "attention", 3), ("give", "resid", 2)}
    rows = [
        replace(r, effect=nothing, share=math.nan, bar=math.nan, controls=(math.nan,))
        if r.head is None and (r.kind, r.carrier, r.layer) in blank else r
        for r in whole.rows
    ]  # fmt: skip
    return replace(whole, rows=tuple(rows))


SAMPLES = {
    "complete": complete,
    "no personas": without_personas,
    "gaps": with_gaps,
    "hostile": lambda: replace(
        complete(), behavior=HOSTILE, model=HOSTILE, sentence=HOSTILE, recipe={**complete().recipe, "model": HOSTILE}
    ),
    "bare": lambda: replace(complete(), rows=(), persona=None, recipe={}, carrier="not shown"),
}


@cache
def html_of(name: str) -> str:
    return render_localization(SAMPLES[name]())


@cache
def page_of(name: str) -> Page:
    return Page(html_of(name))


def bounds(rows: list[Row], scale: float = 1.0) -> list[list[float]]:
    up = [scale * (r.effect.upper - r.effect.value) for r in rows]
    return [up, [scale * (r.effect.value - r.effect.lower) for r in rows]]


def test_channels_show_shares_with_intervals_and_every_control():
    found = complete()
    figure: Any = figures.channels(found)
    assert figure.layout.xaxis.title.text == "% of the personas' effect"
    for r in found.rows[:3]:
        drawn = trace(figure, r.carrier)
        assert drawn.x == (pytest.approx(100 * r.share),)
        np.testing.assert_allclose([drawn.error_x.array, drawn.error_x.arrayminus], bounds([r], 100 / 8))
        assert drawn.text == (f"<b>{percent(r.share)}</b>",)
        assert drawn.marker.symbol[0].endswith("-open") == (not r.shown)
        np.testing.assert_allclose(trace(figure, f"controls: {r.carrier}").x, [100 / 8 * c for c in r.controls])
    bands = [(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect"]
    np.testing.assert_allclose(bands, [(-100 / 8 * r.bar, 100 / 8 * r.bar) for r in found.rows[:3]])
    assert [s.x0 for s in figure.layout.shapes if s.type == "line"] == [100.0]
    low, high = figure.layout.xaxis.range
    assert low < 0
    assert high > 100


def test_channels_are_in_nats_where_the_personas_do_nothing_clear():
    found = replace(complete(), persona=replace(PERSONA, value=0.1, lower=-0.4, upper=0.6))
    figure: Any = figures.channels(found)
    assert "nats" in figure.layout.xaxis.title.text
    assert trace(figure, "state").x == (6.4,)
    assert not [s for s in figure.layout.shapes if s.type == "line"]


def test_layers_show_every_row_by_kind_with_intervals_and_control_bars():
    found = complete()
    figure: Any = figures.layer_by_layer(found)
    assert layer_kinds(found) == {i: "attention" if i % 4 == 3 else "gdn" for i in range(8)}
    panels = [("exchange", ("state", "attention")), ("give", ("resid",)), ("give", ("gdn.state", "attn.heads"))]
    for panel, (kind, carriers) in enumerate(panels, 1):
        rows = [r for carrier in carriers for r in found.layers(kind, carrier)]
        grey = trace(figure, f"controls {panel}")
        assert list(grey.x) == [r.layer for r in rows]
        np.testing.assert_allclose(grey.y, [2 * r.bar for r in rows])
        np.testing.assert_allclose(grey.base, [-r.bar for r in rows])
        for its in figures.KINDS:
            some = [r for r in rows if ("attention" if (r.layer or 0) % 4 == 3 else "gdn") == its]
            drawn = trace(figure, f"{its} {panel}")
            assert drawn.yaxis == ("y" if panel == 1 else f"y{panel}")
            assert list(drawn.x) == [r.layer for r in some]
            assert list(drawn.y) == [r.effect.value for r in some]
            np.testing.assert_allclose([drawn.error_y.array, drawn.error_y.arrayminus], bounds(some))
            color, symbol = figures.KINDS[its][1:]
            assert drawn.marker.color == color
            assert list(drawn.marker.symbol) == [symbol + ("" if r.shown else "-open") for r in some]
    assert "most: layer 4</b> (75% of the personas')" in words_of(figure)
    assert figure.layout.yaxis.range == figure.layout.yaxis2.range == figure.layout.yaxis3.range


def test_heads_show_every_head_of_the_layers_that_stand_out():
    found = complete()
    figure: Any = figures.head_by_head(found)
    rows = [r for r in found.rows if r.head is not None and r.kind == "exchange"]
    drawn = trace(figure, "gdn 1")
    assert list(drawn.x) == [0, 1, 2, 3]
    assert list(drawn.y) == [r.effect.value for r in rows]
    np.testing.assert_allclose([drawn.error_y.array, drawn.error_y.arrayminus], bounds(rows))
    assert "<b>exchange</b>: GDN state, layer 4" in words_of(figure)
    assert "<b>give</b>: GDN state, layer 4" in words_of(figure)


def test_a_deep_model_fits_into_the_figures():
    found = complete(layers=64, heads=48)
    figure: Any = figures.layer_by_layer(found)
    assert len(trace(figure, "gdn 1").x) == 48
    assert list(figure.layout.xaxis.tickvals) == list(range(0, 64, 4))
    assert len(trace(figures.head_by_head(found), "gdn 1").x) == 48


def test_without_personas_there_is_nothing_to_exchange_and_the_page_says_so():
    found = without_personas()
    assert "<b>not measured</b><br>the behaviour has no personas" in words_of(figures.channels(found))
    layers = figures.layer_by_layer(found)
    assert "not measured: the behaviour has no personas" in words_of(layers)
    assert list(trace(layers, "gdn 2").x) == [0, 1, 2, 4, 5, 6]
    assert "<b>not measured</b><br>no layer stood out" in words_of(figures.head_by_head(found))
    words = re.sub(r"\s+", " ", page_of("no personas").words)
    assert "This behaviour has no personas, so nothing was exchanged" in words
    assert "Not measured: the behaviour has no personas to exchange" in words
    assert "Not shown" in words
    assert "no personas" not in re.sub(r"\s+", " ", page_of("complete").words)


def test_missing_values_are_named_and_never_count():
    found = with_gaps()
    assert "not measured: no value" in words_of(figures.channels(found))
    layers = words_of(figures.layer_by_layer(found))
    assert "not measured: layer 3" in layers
    assert "not measured: layer 2" in layers
    gaps = [r for r in found.rows if math.isnan(r.effect.value)]
    assert len(gaps) == 3
    assert not any(r.shown for r in gaps)
    assert page_of("gaps").words.count("not measured") >= 3


def test_a_localization_without_any_row_still_gives_a_page():
    drawn = figures.draw_localization(SAMPLES["bare"]())
    assert list(drawn) == NAMES
    assert all("<b>not measured</b>" in words_of(figure) for figure in drawn.values())
    assert "Not measured" in page_of("bare").words


def test_page_holds_every_row_with_its_numbers():
    found, page = complete(), page_of("complete")
    words = re.sub(r"\s+", " ", page.words)
    for said in (found.sentence[1:], "8 [7, 9] nats", "24 in 6 topics", "80%", '"weights_hash": "fedcba98"', "auto"):
        assert said in words, said
    cells, start = page.cells, 0
    for r in sorted(found.rows, key=lambda r: (r.layer is not None) + (r.head is not None)):  # as the tables are
        seen = [nats(r.effect.value) + limits(r.effect.as_dict()), percent(r.share), f"±{nats(r.bar)} (n = 19)"]
        start = next(at for at in range(start, len(cells)) if cells[at] == r.where and cells[at + 1 : at + 4] == seen)
        assert cells[start + 4] == ("yes" if r.shown else "no")
        assert cells[start - 2] == r.kind


def test_every_setting_is_explained():
    assert set(CONFIG) == {f.name for f in fields(LocalizeConfig)}


def test_percentages_and_nats_read_well():
    seen = [percent(x) for x in (1.0, 0.876, 0.024, -0.0004, -0.5, math.nan, None)]
    assert seen == ["100%", "88%", "2.4%", "0%", "−50%", "not measured", "not measured"]
    assert [nats(x) for x in (11.238, -0.0004, -1.5, None)] == ["11.24", "0.00", "−1.50", "not measured"]


@pytest.mark.parametrize("name", SAMPLES)
def test_page_stands_alone(name):
    assert_stands_alone(html_of(name), page_of(name), NAMES)


@pytest.mark.parametrize("carrier", get_args(Carrier))
def test_page_of_each_carrier_stands_alone(carrier):
    html = render_localization(replace(complete(), carrier=carrier))
    assert_stands_alone(html, Page(html), NAMES)


def test_hostile_text_is_shown_and_not_obeyed():
    assert_shown_and_not_obeyed(page_of("hostile"), page_of("complete"), times=4)


@pytest.mark.parametrize("name", ["complete", "no personas"])
def test_page_is_the_same_from_a_localization_on_disk(name, tmp_path):
    SAMPLES[name]().save(tmp_path / "localization.json")
    path = write_localization_report(open_localization(tmp_path), tmp_path / "localization.html")
    assert path.read_text(encoding="utf-8") == html_of(name) == render_localization(SAMPLES[name]())


def test_a_real_localization_has_the_form_of_the_samples(organism, tmp_path):
    config = LocalizeConfig(layers=(3, 4), controls=1, layer_controls=1, prompts=8)
    found = localize(organism, read_behavior("follow-direction").take(16, seed=0), config, progress=False)
    found.save(tmp_path / "localization.json")
    assert {(r.kind, r.carrier) for r in found.rows} == {(r.kind, r.carrier) for r in complete().rows}
    assert layer_kinds(found) == {3: "attention", 4: "gdn"}
    page = Page(render_localization(open_localization(tmp_path)))
    assert percent(found.rows[0].share) in page.words
    assert all(r.where in page.cells for r in found.rows)


@needs_browser
def test_a_browser_draws_every_figure_without_a_network(tmp_path):
    path = write_localization_report(SAMPLES["hostile"](), tmp_path / "report.html")
    assert_browser_draws(path, tmp_path, NAMES)
