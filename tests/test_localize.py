"""Localization on truths that are known: planted, trained by construction, or without anything to find."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from probes.behaviors import read_behavior
from probes.controls import random_direction
from probes.directions import mean_difference
from probes.errors import WrongInput
from probes.localization import Row, conclude, open_localization
from probes.localize import LocalizeConfig, _Work, localize, recipe
from probes.pairs import contrast
from probes.prefixes import continued, disturbed, exchanged, prefixes
from probes.propensity import prepare, propensity
from probes.stats import Estimate, derived_seed
from probes.steering import steer, steer_first

QUICK = LocalizeConfig(prompts=12, controls=19, layer_controls=2)


@pytest.fixture(scope="module")
def found(organism):
    return localize(organism, read_behavior("follow-direction"), QUICK, progress=False)


def test_in_the_organism_the_states_carry_it(found):
    """By construction attention saw neither the persona nor the token that decides."""
    print(found.table())
    assert found.carrier == "state"
    whole = {row.carrier: row for row in found.rows if row.kind == "exchange" and row.layer is None}
    assert whole["state"].share > 0.95
    assert abs(whole["attention"].share) < 0.05
    assert abs(whole["convolution"].share) < 0.05
    assert not whole["attention"].shown


def test_shares_are_what_the_effects_are_of_the_personas(found):
    for row in found.rows:
        assert row.share == pytest.approx(row.effect.value / found.persona.value)
        assert row.effect.lower <= row.effect.value <= row.effect.upper
        assert len(row.controls) == (19 if row.layer is None else 2)
        assert row.bar == max(abs(value) for value in row.controls)  # 20 or fewer: none may be as large
        assert row.least == pytest.approx(QUICK.least_share * found.persona.value)


@pytest.fixture(scope="module")
def split():
    """The topics that directions come from, and the prompts that are judged."""
    fit, held = read_behavior("follow-direction").split(held_out=0.4, seed=0)
    return fit, held.take(12, seed=0)


def row_of(found, kind, carrier, layer, head=None):
    (one,) = [r for r in found.rows if (r.kind, r.carrier, r.layer, r.head) == (kind, carrier, layer, head)]
    return one


@pytest.mark.parametrize(
    ("channel", "layer", "head"),
    [("state", 4, 1), ("state", 5, None), ("attention", 3, None), ("convolution", None, None)],
)
def test_an_exchange_is_the_mean_of_both_ways_beside_its_controls(organism, found, split, channel, layer, head):
    """Put together anew from what one exchange and one disturbance do."""
    sides = prefixes(organism, *(prepare(organism, split[1], persona=side) for side in ("wanted", "unwanted")))
    wanted, unwanted = sides
    plain = [continued(organism, side) for side in sides]
    how: dict[str, Any] = {"channel": channel, "layers": [layer] if layer else [0, 1, 2, 4, 5, 6], "head": head}

    def lost(change):
        return float(np.mean(plain[0].minus(continued(organism, wanted.each(change, unwanted)))))

    def gained(change):
        return float(np.mean(continued(organism, unwanted.each(change, wanted)).minus(plain[1])))

    row, swap = row_of(found, "exchange", channel, layer, head), partial(exchanged, organism, **how)
    assert row.effect.value == pytest.approx((lost(swap) + gained(swap)) / 2, abs=1e-3)
    for i in range(2):  # by turns on either side
        seed = derived_seed(0, f"exchange {channel} {layer} {head}", i)
        change = partial(disturbed, organism, **how, seed=seed)
        assert row.controls[i] == pytest.approx((lost, gained)[i](change), abs=1e-3)


@pytest.mark.parametrize(
    ("site", "layer", "head"),
    [("resid", 4, None), ("gdn.state", 4, 1), ("gdn.state", 5, None), ("attn.heads", 7, None)],
)
def test_a_gift_is_half_the_gap_added_and_subtracted(organism, found, split, site, layer, head):
    """By steering whole prompts."""
    fit, judged = split
    pairs = contrast(organism, fit, site=site, layers=[layer], progress=False)[layer]
    direction = mean_difference(pairs if head is None else pairs.only([head]))
    dose, prepared = direction.gap / 2 / direction.norm, prepare(organism, judged)

    def moved(one):
        scores = []
        for sign in (1, -1):
            with steer(organism, one, dose=sign * dose, phase="prefill", last=1):
                scores.append(propensity(organism, prepared))
        return float(np.mean(scores[0].minus(scores[1])))

    row = row_of(found, "give", site, layer, head)
    assert row.effect.value == pytest.approx(moved(direction), abs=3e-3)
    for i, control in enumerate(row.controls):
        drawn = random_direction(direction, seed=derived_seed(0, f"give {site} {layer} {head}", i))
        assert control == pytest.approx(moved(drawn), abs=3e-3)


def test_heads_are_those_of_what_is_exchanged_or_given(tiny):
    work = _Work(tiny, read_behavior("sentiment"), QUICK, False)
    seen = {carrier: work.head_count(carrier) for carrier in ("state", "gdn.state", "attention", "attn.heads")}
    assert seen == {"state": 4, "gdn.state": 4, "attention": 2, "attn.heads": 4}


def test_the_personas_effect_is_that_of_whole_prompts(organism, found):
    judged = read_behavior("follow-direction").split(held_out=0.4, seed=0)[1].take(12, seed=0)
    wanted, unwanted = (propensity(organism, prepare(organism, judged, persona=p)) for p in ("wanted", "unwanted"))
    assert found.persona.value == pytest.approx(sum(wanted.minus(unwanted)) / 12, abs=1e-3)


def test_every_layer_is_asked_once_and_strong_ones_head_by_head(found):
    assert [row.layer for row in found.layers("exchange", "state")] == [0, 1, 2, 4, 5, 6]
    assert [row.layer for row in found.layers("exchange", "attention")] == [3, 7]
    assert [row.layer for row in found.layers("give", "resid")] == list(range(8))
    heads = [(row.layer, row.head) for row in found.rows if row.kind == "exchange" and row.head is not None]
    strongest = max(found.layers("exchange", "state"), key=lambda row: row.effect.value)
    assert heads == [(strongest.layer, 0), (strongest.layer, 1)]


@pytest.mark.parametrize("site", ["resid", "gdn.state", "attn.heads"])
def test_a_gift_to_a_continuation_is_a_gift_to_the_last_prompt_token(organism, site):
    """The shortcut through prefixes against steering whole prompts."""
    behavior = read_behavior("follow-direction").take(12)
    layer = {"resid": 4, "gdn.state": 4, "attn.heads": 3}[site]
    direction = mean_difference(contrast(organism, behavior, site=site, layers=[layer], progress=False)[layer])
    prepared = prepare(organism, behavior)
    (begun,) = prefixes(organism, prepared)
    for one, dose in ((direction, 0.3), (random_direction(direction, seed=1), 2.0)):
        with steer_first(organism, one, dose=dose):
            short = continued(organism, begun)
        with steer(organism, one, dose=dose, phase="prefill", last=1):
            whole = propensity(organism, prepared)
        assert max(map(abs, short.minus(whole))) < 1e-3
        assert max(map(abs, whole.minus(propensity(organism, prepared)))) > 1e-2


def test_attention_is_named_where_there_is_nothing_else(llama):
    """Untrained weights follow no persona to speak of: whatever is moved crosses in keys and values."""
    result = localize(llama, read_behavior("sentiment"), replace(QUICK, least_share=0.0), progress=False)
    assert {row.carrier for row in result.rows if row.kind == "exchange"} == {"attention"}
    assert result.carrier in ("attention", "not shown")
    whole = next(row for row in result.rows if row.layer is None)
    assert whole.share == pytest.approx(1.0, abs=1e-4)
    strict = replace(QUICK, prompts=8, layer_controls=1, head_layers=0, least_groups=99)
    assert (
        "groups are too few to decide on, 99 are needed" in localize(llama, read_behavior("sentiment"), strict).sentence
    )
    strict = replace(strict, least_groups=5, percentile=99.0)
    said = localize(llama, read_behavior("sentiment"), strict).sentence
    assert said == "19 controls are too few to decide on, 99 are needed"


def test_without_personas_only_gifts_are_left(organism):
    behavior = read_behavior("sentiment")
    bare = replace(behavior, items=tuple(replace(item, persona=None) for item in behavior.items))
    result = localize(organism, bare, replace(QUICK, layers=(3, 4), head_layers=0), progress=False)
    assert result.carrier == "not shown"
    assert result.persona is None
    assert "has no personas" in result.sentence
    assert {row.kind for row in result.rows} == {"give"}
    assert {(row.carrier, row.layer) for row in result.rows} == {
        ("resid", 3), ("resid", 4), ("gdn.state", 4), ("attn.heads", 3),
    }  # fmt: skip
    assert all(math.isnan(row.share) for row in result.rows)


def test_a_localization_is_repeated_number_for_number_and_survives_the_disk(organism, tmp_path):
    config = replace(QUICK, prompts=8, layers=(4,), head_layers=0)
    one, two = (localize(organism, read_behavior("sentiment"), config, progress=False) for _ in range(2))
    assert one.rows == two.rows
    one.save(tmp_path / "localization.json")
    back = open_localization(tmp_path)
    assert replace(back, recipe=one.recipe) == one  # JSON has lists where the recipe has tuples
    assert back.frame().equals(one.frame())
    assert list(one.frame()["layer"].dropna().unique()) == [4]
    (tmp_path / "other.json").write_text('{"rows": [{}], "persona": null}')
    with pytest.raises(WrongInput, match=r"other.json is not a localization"):
        open_localization(tmp_path / "other.json")
    assert recipe(organism, read_behavior("sentiment"), config)["weights_hash"] == organism.weights_hash


def row(carrier, low, high, bar=0.5, controls=20):
    effect = Estimate(value=(low + high) / 2, lower=low, upper=high, n=48, groups=6)
    return Row(
        kind="exchange", carrier=carrier, layer=None, head=None, effect=effect, share=effect.value / 10,
        controls=(bar,) * controls, bar=bar, least=0.2,
    )  # fmt: skip


PERSONA = Estimate(value=10.0, lower=9.0, upper=11.0, n=48, groups=6)
CLEAR, UNCLEAR = (replace(PERSONA, value=v, lower=v - 1, upper=v + 1) for v in (5.0, 0.5))


@pytest.mark.parametrize(
    ("state", "convolution", "attention", "leads", "carrier", "words"),
    [
        (row("", 9, 11), row("", 0, 0), row("", -0.1, 0.1), (CLEAR, CLEAR), "state", "the GDN states carry it: "),
        (row("", -0.1, 0.1), row("", 0, 0), row("", 9, 11), (CLEAR, CLEAR), "attention", "the attention carries it: "),
        (row("", 0.2, 0.4), row("", 8, 9.5), row("", 0, 0.2), (CLEAR, CLEAR), "convolution", "the windows of the"),
        # two that are enough, each clear of the other or not
        (row("", 4.5, 6), row("", 0, 0), row("", 5.5, 6.5), (UNCLEAR, CLEAR), "several", "all GDN states and all keys"),
        (row("", 9, 9.6), row("", 0, 0), row("", 8.5, 9), (CLEAR, CLEAR), "several", "all GDN states and all keys"),
        # one that is enough, and one whose lead is only uncertain
        (
            row("", 8, 11),
            row("", 0, 0),
            row("", 0.1, 0.9),
            (CLEAR, UNCLEAR),
            "not shown",
            "all keys and values are not",
        ),
        (row("", 3, 4), row("", 0, 0), row("", 1, 2), (CLEAR, CLEAR), "several", "none moves half of it alone"),
        (
            row("", 1.2, 9),
            row("", 0, 0),
            row("", 0, 0),
            (CLEAR, CLEAR),
            "not shown",
            "may move more than half of it or",
        ),
        (row("", 2, 6), row("", 0, 0), row("", 0, 0), (CLEAR, CLEAR), "not shown", "may move more than half of it or"),
        (row("", 0.2, 0.4, 0.1), row("", 0, 0), row("", 8, 9.4, 8.1), (CLEAR, CLEAR), "not shown", "no exchange moves"),
        (row("", -0.1, 0.4), row("", 0, 0), row("", -1, 0.3), (UNCLEAR, UNCLEAR), "not shown", "no exchange moves"),
        (row("", 9, 11, controls=5), row("", 0, 0), row("", 0, 0), (CLEAR, CLEAR), "not shown", "5 controls are too"),
    ],
)
def test_the_conclusion_names_what_the_rows_allow(state, convolution, attention, leads, carrier, words):
    whole: dict[Any, Row] = {"state": state, "convolution": convolution, "attention": attention}
    first = max(whole, key=lambda channel: whole[channel].effect.value)
    others = [channel for channel in whole if channel != first]
    named, sentence = conclude(whole, PERSONA, dict(zip(others, leads, strict=True)), halves_of(whole))
    assert named == carrier
    assert words in sentence


def halves_of(whole):
    """Beyond half of the personas' 10 nats, as certain as the effects themselves."""
    moved = {channel: row.effect for channel, row in whole.items()}
    return {c: replace(e, value=e.value - 5, lower=e.lower - 5, upper=e.upper - 5) for c, e in moved.items()}


def test_where_the_personas_move_nothing_or_topics_are_few_nothing_is_named():
    whole: Any = {"state": row("state", 9, 11)}
    broken = replace(PERSONA, value=math.nan, lower=math.nan, upper=math.nan)
    assert "not clear of zero" in conclude(whole, broken, {}, halves_of(whole))[1]
    assert conclude(whole, replace(PERSONA, value=0.1, lower=-0.2), {}, halves_of(whole))[0] == "not shown"
    named, sentence = conclude(whole, replace(PERSONA, groups=1, lower=10.0, upper=10.0), {}, halves_of(whole))
    assert named == "not shown"
    assert "1 held-out topic groups are too few" in sentence


def test_equal_personas_have_no_share(organism):
    """Both sides of each item speak with one voice: nothing is exchanged, given or divided by zero."""
    behavior = read_behavior("sentiment")
    mute = tuple(
        replace(item, persona={side: (item.persona or {})["wanted"] for side in ("wanted", "unwanted")})
        for item in behavior.items
    )
    config = replace(QUICK, layers=(4,), head_layers=0, prompts=8)
    result = localize(organism, replace(behavior, items=mute), config, progress=False)
    assert result.carrier == "not shown"
    assert all(row.effect.value == 0 and math.isnan(row.share) for row in result.rows if row.kind == "exchange")


def test_chosen_layers_do_not_change_what_is_named(organism):
    """Layer 3 is attention: the states are told as a whole all the same."""
    result = localize(organism, read_behavior("sentiment"), replace(QUICK, layers=(3,), head_layers=0), progress=False)
    assert result.carrier == "state"
    assert {row.layer for row in result.rows} == {None, 3}


def test_small_or_noisy_effects_are_not_shown():
    assert row("state", 1.0, 2.0, bar=0.5).shown
    assert not row("state", 1.0, 2.0, bar=1.2).shown  # controls do as much
    assert not row("state", -0.1, 2.0, bar=0.0).shown  # not clear of zero
    assert not row("state", 0.05, 0.15, bar=0.0).shown  # clear, and negligible


def test_wrong_configurations_are_refused(organism):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompts": 4}, "prompts must be at least 8, saw 4"),
        ({"controls": 0}, "controls must be at least 1, saw 0"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1"),
        ({"percentile": 100.0}, "percentile must lie between 50 and 99, saw 100"),
        ({"least_share": -0.1}, "least_share must lie between 0 and 1"),
        ({"layers": ()}, "layers must name at least one layer"),
    ]
    for fields, message in wrong:
        with pytest.raises(WrongInput, match=message):
            LocalizeConfig(**fields)
    with pytest.raises(WrongInput, match="layer 12 is out of range: organism has layers 0 to 7"):
        localize(organism, read_behavior("sentiment"), LocalizeConfig(layers=(12,)), progress=False)
