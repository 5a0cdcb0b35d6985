"""The page of a shift and its figures: what is drawn and written is what the result says, and nothing is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE, Page, assert_browser_draws, assert_shown_and_not_obeyed, assert_stands_alone, needs_browser
from test_figures import trace, words_of

from analysis import figures
from analysis.alignment import NULLS, AlignedRow
from analysis.attention import ShareRow
from analysis.compare import CompareConfig, compare
from analysis.figures.shift import held_against, layer_kinds
from analysis.shift import POINTS, WAY, Claim, ProbeRow, Shift, open_shift
from analysis.shift_report import CONFIG, THRESHOLDS, render_shift, write_shift_report
from analysis.states import Change, Moved, MovedRow
from analysis.words import number, percent
from probes.behaviors import read_behavior
from probes.stats import Estimate

FIGURES = [
    "claims", "what-moved", "effective-rank", "half-life", "along-direction", "decodable", "token-shares",
]  # fmt: skip
GDN, ATTENTION, HEADS = (0, 1, 2, 4), (3,), 2
NAN = math.nan


def estimate(value: float, below: float = 0.04, above: float = 0.06) -> Estimate:
    return Estimate(value=value, lower=value - below, upper=value + above, n=24, groups=6)


def change(before: float, after: float) -> Change:
    return Change(before=estimate(before), after=estimate(after), change=estimate(after - before))


def aligned(site: str, layer: int, way: float, *, decides: bool = True, beyond: bool = False) -> AlignedRow:
    nulls = {name: 0.01 * (i + 1) for i, name in enumerate(NULLS)}
    return AlignedRow(
        site=site, layer=layer, way=estimate(way), cosine=0.3 + way / 1e4, size=0.5, gap=0.4 if decides else 0.001,
        reliability=0.9, decides=decides, p=nulls, bars=nulls, bar=0.21 if decides else 40.0 + layer, beyond=beyond,
    )  # fmt: skip


def moved(layer: int, head: int) -> MovedRow:
    x = 1 + layer + head / 4
    return MovedRow(
        layer=layer, head=head, equal=False, relative=estimate(x / 10), cosine=estimate(0.9), keys=estimate(3 * x),
        values=estimate(4 * x), cka=estimate(0.97), rank=change(x, x + 0.5), retention=change(0.8, 0.9),
        half_life=change(2 * x, 4 * x), write=change(0.1, 0.2),
    )  # fmt: skip


def share(kind: Any, layer: int | None, head: int | None, after: float, bar: float) -> ShareRow:
    return ShareRow(
        kind=kind, layer=layer, head=head, direction=change(0.3, after), control=change(0.1, 0.12),
        excess=change(0.2, after - 0.12), controls=(0.01, -0.02), updates=(0.005,), bar=bar,
    )  # fmt: skip


def complete() -> Shift:
    """A shift toward the behaviour in a model of five layers; layer 0 does not decide and lies far off the scale."""
    ways = [
        aligned("gdn.state", 0, 661.0, decides=False), aligned("gdn.state", 1, 0.1), aligned("gdn.state", 2, -0.15),
        aligned("gdn.state", 4, 0.7, beyond=True), aligned("attn.heads", 3, 0.2),
        *(aligned("resid", layer, 0.05 * layer, beyond=layer == 4) for layer in range(5)),
    ]  # fmt: skip
    probes = [
        ProbeRow(
            site="gdn.state", layer=layer, head=head, auroc=change(0.6 + layer / 20, 0.65 + layer / 20),
            selectivity=change(0.1, 0.2), significant=(False, layer > 1),
        )
        for layer in GDN for head in (None, 0, 1)
    ]  # fmt: skip
    shares = [
        *(share("state", layer, None, 0.5, 0.05) for layer in (None, *GDN)),
        *(share("readout", layer, None, 0.35, 0.2) for layer in (None, *GDN)),
        *(share("attention", layer, None, 0.4, 0.01) for layer in (None, *ATTENTION)),
        *(share("state", layer, head, 0.45, 0.05) for head in range(HEADS) for layer in GDN),
    ]
    claims = [
        ("behaviour", 5.5, "nats", 0.28, True), ("decodability at layer 4", 0.05, "AUROC", NAN, False),
        ("the request's share of the states", 18.0, POINTS, 5.0, True),
        ("GDN states, layer 4", 0.7, WAY, 0.21, True), ("attention heads, layer 3", 9.0, WAY, 50.0, False),
    ]  # fmt: skip
    config = {name: getattr(CompareConfig(), name) for name in (f.name for f in fields(CompareConfig))}
    return Shift(
        behavior="follow-direction", before="base", after="tuned", conclusion="direction-shaped", sense="toward",
        sentence="moved toward the behaviour along its direction: a lot", behavior_change=change(-3.0, 2.5),
        drift=0.2, persona=estimate(11.2),
        moved=Moved(
            rows=tuple(moved(layer, head) for layer in GDN for head in range(HEADS)), overall=estimate(0.6),
            subspace=4, recipe={},
        ),
        probes=tuple(probes), shares=tuple(shares), aligned=tuple(ways),
        claims=tuple(
            Claim(name=name, value=estimate(value), unit=unit, bar=bar, against="nulls within", shown=shown)
            for name, value, unit, bar, shown in claims
        ),
        prompts=24, topics=6, left_out=2, seconds=12.5,
        recipe={"kind": "shift", "before": {"model": "base", "weights_hash": "fedcba98"}, "config": config},
    )  # fmt: skip


def without_gdn() -> Shift:
    whole = complete()
    only = {"attn.heads", "resid"}
    rows = [replace(row, layer=row.layer - 3) for row in whole.aligned if row.site in only and row.layer == 3]
    probes = [replace(row, site="attn.heads", layer=0) for row in whole.probes if row.layer == 0]
    return replace(
        whole, moved=Moved(rows=(), overall=None, subspace=4, recipe={}), aligned=tuple(rows), probes=tuple(probes),
        shares=tuple(row for row in whole.shares if row.kind == "attention"), conclusion="not shown", sense="neither",
        sentence="the attention heads moved by 14 % of their norm, but the personas do nothing",
        claims=tuple(claim for claim in whole.claims if "state" not in claim.name),
    )  # fmt: skip


def with_gaps() -> Shift:
    """What a model that breaks leaves: values without numbers, one of them infinite."""
    whole, nothing = complete(), Estimate(value=NAN, lower=NAN, upper=NAN, n=24, groups=6)
    gone = Change(before=nothing, after=nothing, change=nothing)
    endless = Change(before=replace(nothing, value=math.inf), after=nothing, change=nothing)
    states = list(whole.moved.rows)
    states[0] = replace(states[0], relative=nothing, cka=nothing, rank=gone, half_life=endless, retention=None)
    ways, claims, shares = list(whole.aligned), list(whole.claims), list(whole.shares)
    ways[1] = replace(ways[1], way=nothing)
    claims[0] = replace(claims[0], value=nothing)
    shares[1] = replace(shares[1], direction=gone, excess=gone)
    return replace(
        whole, moved=replace(whole.moved, rows=tuple(states)), aligned=tuple(ways), claims=tuple(claims),
        shares=tuple(shares), behavior_change=gone,
    )  # fmt: skip


def hostile() -> Shift:
    whole = complete()
    claims = [replace(claim, name=HOSTILE, unit=HOSTILE, against=HOSTILE) for claim in whole.claims]
    return replace(
        whole, behavior=HOSTILE, before=HOSTILE, after=HOSTILE, sentence=HOSTILE, claims=tuple(claims),
        recipe={**whole.recipe, "before": {"model": HOSTILE, "weights_hash": HOSTILE}},
    )  # fmt: skip


def broken() -> Shift:
    """The same where the numbers around the estimates are gone, too."""
    found = with_gaps()
    ways = [replace(row, cosine=NAN, bar=NAN, gap=NAN, reliability=math.inf) for row in found.aligned]
    claims = [replace(claim, bar=NAN) for claim in found.claims]
    return replace(found, aligned=tuple(ways), claims=tuple(claims))


SAMPLES = {
    "complete": complete,
    "away": lambda: replace(complete(), conclusion="no", sense="away"),
    "elsewhere": lambda: replace(complete(), conclusion="no", sense="neither"),
    "no GDN": without_gdn,
    "gaps": with_gaps,
    "broken": broken,
    "hostile": hostile,
    "bare": lambda: replace(without_gdn(), probes=(), shares=(), aligned=(), claims=(), recipe={}),
}


@cache
def html_of(name: str) -> str:
    return render_shift(SAMPLES[name]())


@cache
def page_of(name: str) -> Page:
    return Page(html_of(name))


def plain(page: Page) -> str:
    return re.sub(r"\s+", " ", page.words)


def lengths(found: list[Estimate], scale: float = 1.0) -> list[list[float]]:
    return [[scale * (e.upper - e.value) for e in found], [scale * (e.value - e.lower) for e in found]]


def test_claims_of_one_unit_share_an_axis_with_their_intervals_and_bands():
    found = complete()
    figure: Any = figures.claims(found)
    panels = {unit: i for i, unit in enumerate(dict.fromkeys(claim.unit for claim in found.claims), 1)}
    bands = {(s.xref, round(s.y0 + 0.42)): (s.x0, s.x1) for s in figure.layout.shapes}
    for claim in found.claims:
        drawn = trace(figure, claim.name)
        axis = "x" if panels[claim.unit] == 1 else f"x{panels[claim.unit]}"
        assert drawn.xaxis == axis
        assert drawn.marker.symbol.endswith("-open") == (not claim.shown)
        if claim.value.value > 5 and claim.unit == WAY:  # beyond any meaning: clipped, marked and named
            assert drawn.marker.symbol == "triangle-right-open"
            assert drawn.x[0] < 4
            assert drawn.text == ("<b>+9</b>",)
            continue
        assert drawn.x == (pytest.approx(claim.value.value),)
        np.testing.assert_allclose([drawn.error_x.array, drawn.error_x.arrayminus], lengths([claim.value]))
        if math.isfinite(claim.bar):
            assert bands[axis, drawn.y[0]] == pytest.approx((-claim.bar, claim.bar))
        assert held_against(claim) in drawn.hovertext[0]
        assert ("±" in held_against(claim)) == math.isfinite(claim.bar)


def test_maps_of_states_show_every_head():
    found = complete()
    layers = {row.layer: [r for r in found.moved.rows if r.layer == row.layer] for row in found.moved.rows}
    cells = trace(figures.what_moved(found), "panel 1")
    assert cells.zmin == 0
    drawn = figures.draw_shift(found)
    for layer, rows in layers.items():
        assert [cells.z[head][layer] for head in range(HEADS)] == [r.relative.value for r in rows]
        for panel, side in ((1, "before"), (2, "after"), (3, "change")):
            z = trace(drawn["effective-rank"], f"panel {panel}").z
            np.testing.assert_allclose([z[h][layer] for h in range(HEADS)], [getattr(r.rank, side).value for r in rows])
        doubled = trace(drawn["half-life"], "panel 3").z
        assert [doubled[head][layer] for head in range(HEADS)] == pytest.approx([1.0, 1.0])
    assert cells.z[0][3] is None  # attention


def test_maps_name_the_layers_that_were_compared():
    whole = complete()
    states = replace(whole.moved, rows=tuple(row for row in whole.moved.rows if row.layer in (2, 4)))
    some = [row for row in whole.aligned if row.layer in (2, 3, 4)]
    figure: Any = figures.what_moved(replace(whole, moved=states, aligned=tuple(some)))
    assert [text.split("<br>")[0] for text in figure.layout.xaxis.ticktext] == ["2", "3", "4"]
    cells = trace(figure, "panel 1")
    assert [row[2].split("</b>")[0] for row in cells.hovertext] == ["<b>layer 4, head 0", "<b>layer 4, head 1"]
    assert cells.z[1][2] == moved(4, 1).relative.value


def test_ways_show_every_layer_with_interval_nulls_and_whether_it_decides():
    found = complete()
    figure: Any = figures.along_direction(found)
    assert layer_kinds(found) == {i: "attention" if i == 3 else "gdn" for i in range(5)}
    low, high = figure.layout.yaxis.range
    for panel, site in enumerate(("gdn.state", "attn.heads", "resid"), 1):
        rows = [row for row in found.aligned if row.site == site]
        grey = trace(figure, f"nulls {panel}")
        assert list(grey.x) == [row.layer for row in rows]
        bars = np.array([row.bar for row in rows])
        np.testing.assert_allclose(grey.base, np.maximum(-bars, low))
        np.testing.assert_allclose(np.add(grey.base, grey.y), np.minimum(bars, high))
        for kind in dict.fromkeys(layer_kinds(found)[row.layer] for row in rows):
            some = [row for row in rows if layer_kinds(found)[row.layer] == kind]
            drawn = trace(figure, f"{kind} {panel}")
            assert drawn.yaxis == ("y" if panel == 1 else f"y{panel}")
            assert [s.endswith("-open") for s in drawn.marker.symbol] == [not row.decides for row in some]
            assert ["*" in text for text in drawn.text] == [row.beyond for row in some]
            inside = [i for i, row in enumerate(some) if row.decides]
            assert [drawn.y[i] for i in inside] == [some[i].way.value for i in inside]
            got = [[drawn.error_y[key][i] for i in inside] for key in ("array", "arrayminus")]
            np.testing.assert_allclose(got, lengths([some[i].way for i in inside]))
    far = trace(figure, "gdn 1")
    assert (far.marker.symbol[0], far.y[0]) == ("triangle-up-open", high)
    assert "661" in far.hovertext[0]


def test_probes_and_shares_show_before_and_after():
    found = complete()
    figure: Any = figures.decodable(found)
    rows = [row for row in found.probes if row.head is None]
    shares: Any = figures.token_shares(found)
    for i, side in enumerate(("before", "after")):
        drawn, seen = trace(figure, f"gdn.state {side}"), [getattr(row.auroc, side) for row in rows]
        assert list(drawn.y) == [e.value for e in seen]
        np.testing.assert_allclose([drawn.error_y.array, drawn.error_y.arrayminus], lengths(seen))
        assert [s.endswith("-open") for s in drawn.marker.symbol] == [not row.significant[i] for row in rows]
        for kind in ("state", "readout", "attention"):
            some = [row for row in found.shares if row.kind == kind and row.head is None]
            for name in ("direction", "control"):
                drawn, seen = trace(shares, f"{name} {kind} {side}"), [getattr(getattr(r, name), side) for r in some]
                np.testing.assert_allclose(drawn.y, [100 * e.value for e in seen])
                np.testing.assert_allclose([drawn.error_y.array, drawn.error_y.arrayminus], lengths(seen, 100))
            hollow = [s.endswith("-open") for s in trace(shares, f"direction {kind} after").marker.symbol]
            assert hollow == [not row.shown for row in some]
    assert [text.strip("</b>") for text in shares.layout.xaxis.ticktext] == ["all", "0", "1", "2", "4"]


def test_page_says_what_was_concluded_and_holds_every_number():
    found, page = complete(), page_of("complete")
    words = plain(page)
    for said in (
        "Direction-shaped", found.sentence[1:], "60% [56%, 66%] of their norm", "5.5 [5.46, 5.56] nats",
        "11.2 [11.2, 11.3] nats", "24 in 6 topics (2 without control spans)", '"weights_hash": "fedcba98"',
    ):  # fmt: skip
        assert said in words, said
    cells, start = page.cells, 0
    for row in found.aligned:
        where = {"gdn.state": "GDN states", "attn.heads": "attention heads", "resid": "residual stream"}[row.site]
        start = cells.index(f"{where}, layer {row.layer}", start)
        if found.claims and cells[start + 1].startswith(number(row.way.value)) and cells[start + 2] == WAY:
            start = cells.index(f"{where}, layer {row.layer}", start + 1)  # that was the claim
        assert cells[start + 2 : start + 4] == [f"±{number(row.bar)}", number(row.cosine)]
        assert cells[start + 4 : start + 7] == [number(row.p[name]) for name in NULLS]
        assert cells[start + 9 : start + 11] == ["yes" if row.decides else "no", "yes" if row.beyond else "no"]
    for state in found.moved.rows:
        start = cells.index(f"layer {state.layer} head {state.head}", start + 1)
        assert cells[start + 1].startswith(number(state.relative.value))
    for some in found.shares:
        place = "all layers" if some.layer is None else f"layer {some.layer}"
        start = cells.index(f"{some.kind}, {place}" + ("" if some.head is None else f" head {some.head}"), start)
        after = percent(some.direction.after.value)
        assert cells[start + 1] == f"30% → {after}"
        assert cells[start + 6] == ("yes" if some.shown else "no")


@pytest.mark.parametrize(
    ("name", "badge", "words"),
    [
        ("away", "Moved away from the behaviour", "toward the unwanted side"),
        ("elsewhere", "Moved, but not toward the behaviour", "meaningless changes of its size"),
        ("no GDN", "Not shown", "The sentence above says what is missing"),
    ],
)
def test_each_conclusion_has_its_headline(name, badge, words):
    page = plain(page_of(name))
    assert badge in page
    assert words in page


def test_every_setting_and_threshold_is_explained():
    assert {*CONFIG, *THRESHOLDS} == {f.name for f in fields(CompareConfig)}
    assert not set(CONFIG) & set(THRESHOLDS)
    assert [THRESHOLDS["least_gap"] in cell for cell in page_of("complete").cells].count(True) == 1


def test_a_model_without_gdn_layers_has_a_page_about_its_attention():
    found, words = without_gdn(), plain(page_of("no GDN"))
    assert "It rests on the attention heads" in words
    assert "no GDN layers compared" in words
    assert words.count("Not measured: no GDN layer was compared") == 2
    drawn = figures.draw_shift(found)
    assert all("no GDN layer was compared" in words_of(drawn[name]) for name in FIGURES[1:4])
    assert len(trace(drawn["along-direction"], "attention 1").x) == 1
    assert "GDN states" not in words_of(drawn["along-direction"])


def test_missing_values_are_named():
    drawn = figures.draw_shift(with_gaps())
    assert "not measured: no value" in words_of(drawn["claims"])
    assert "not measured: layer 1" in words_of(drawn["along-direction"])
    assert "layer 0, head 0</b><br>not measured" in words_of(drawn["what-moved"])
    assert page_of("gaps").words.count("not measured") >= 5
    for name in ("gaps", "broken"):
        assert not {"nan", "inf", "∞", "±nan"} & set(plain(page_of(name)).lower().split())


def test_a_shift_without_any_row_still_gives_a_page():
    drawn = figures.draw_shift(SAMPLES["bare"]())
    assert list(drawn) == FIGURES
    assert all("<b>not measured</b>" in words_of(figure) for figure in drawn.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_page_stands_alone(name):
    assert_stands_alone(html_of(name), page_of(name), FIGURES)


def test_hostile_text_is_shown_and_not_obeyed():
    assert_shown_and_not_obeyed(page_of("hostile"), page_of("complete"), times=8)


@pytest.mark.parametrize("name", ["complete", "no GDN", "gaps"])
def test_page_is_the_same_from_a_shift_on_disk(name, tmp_path):
    SAMPLES[name]().save(tmp_path / "shift.json")
    path = write_shift_report(open_shift(tmp_path), tmp_path / "shift.html")
    assert path.read_text(encoding="utf-8") == html_of(name)


def test_a_checkpoint_compared_with_itself_gives_a_page_of_zeros(organism, tmp_path):
    config = CompareConfig(prompts=8, pairs=16, nulls=20, updates=19, shuffles=1, heads=False, layers=(3, 4))
    found = compare(organism, organism, read_behavior("follow-direction"), config, progress=False)
    found.save(tmp_path / "shift.json")
    html = render_shift(found)
    assert html == render_shift(open_shift(tmp_path))
    words = plain(Page(html))
    assert "Not shown" in words
    assert "Nothing moved: the GDN states and the answers are equal, bit for bit." in words
    assert "0% [0%, 0%] of their norm" in words
    assert "Labels were shuffled 1 times only" in words
    drawn: Any = figures.draw_shift(found)
    assert list(drawn) == FIGURES
    assert not any("<b>not measured</b>" in words_of(figure) for figure in drawn.values())
    assert trace(drawn["what-moved"], "panel 1").z[0][1] == 0
    assert (trace(drawn["what-moved"], "panel 1").zmin, trace(drawn["what-moved"], "panel 1").zmax) == (0, 1)
    assert {y for t in drawn["along-direction"].data if t.name.startswith(("gdn", "attn")) for y in t.y} == {0.0}
    assert layer_kinds(found) == {3: "attention", 4: "gdn"}


@needs_browser
def test_a_browser_draws_every_figure_without_a_network(tmp_path):
    path = write_shift_report(SAMPLES["hostile"](), tmp_path / "report.html")
    assert_browser_draws(path, tmp_path, FIGURES)
