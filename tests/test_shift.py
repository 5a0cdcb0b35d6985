"""Before and after, on pairs of checkpoints whose truth is known: the same one, noise, and planted shifts."""

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3_5ForCausalLM

from analysis.alignment import NULLS, AlignedRow, Thresholds, align, check_pair, corrected, random_cosines, redrawn
from analysis.attention import control_spans, span_shares
from analysis.compare import CompareConfig, _difference, compare
from analysis.shift import FRAMES, conclude, open_shift
from analysis.states import Change, Topics
from probes.behaviors import read_behavior
from probes.capture import RECURRENCE, capture
from probes.controls import random_direction
from probes.directions import mean_difference
from probes.errors import WrongInput
from probes.linear import ProbeConfig, cells, probe_all
from probes.model import HybridModel
from probes.pairs import Pairs, contrast
from probes.prompts import Prompt
from probes.propensity import prepare, propensity
from probes.stats import Estimate, derived_seed
from probes.store import recipe_differs
from tests.conftest import qwen_config
from training.grammar import PERSONA_WORDS

SMALL = CompareConfig(prompts=16, pairs=40, nulls=60, updates=19, shuffles=1, heads=False, layers=(4, 5, 6, 7))


@pytest.fixture(scope="module")
def behavior():
    return read_behavior("follow-direction")


def twin(model):
    return HybridModel(copy.deepcopy(model.hf), model.tokenizer, name="twin")


def with_noise(model, size, seed):
    """Every weight of the GDN blocks disturbed by a share of its tensor's standard deviation."""
    other, generator = twin(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in other.of_kind("gdn"):
            for parameter in layer.mixer.parameters():
                parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def planted(model, alpha, token="<|im_start|>"):
    """A token of every prompt reads as if the wanted persona spoke (the unwanted, for a negative alpha)."""
    other = twin(model)
    E = other.decoder.embed_tokens.weight
    wanted, unwanted = (model.tokenizer.convert_tokens_to_ids(list(side)) for side in PERSONA_WORDS["follow-direction"])
    with torch.no_grad():
        E[model.tokenizer.convert_tokens_to_ids(token)] += alpha * (E[wanted].mean(0) - E[unwanted].mean(0))
    return other


def test_a_checkpoint_compared_with_itself_has_not_moved(organism, behavior):
    shift = compare(organism, twin(organism), behavior, SMALL, progress=False)
    assert (shift.conclusion, shift.sense) == ("not shown", "neither")
    assert shift.sentence == "nothing moved: the GDN states and the answers are equal, bit for bit"
    assert shift.moved.equal
    for what in FRAMES:
        frame = shift.frame(what)
        zero = [c for c in frame if c.endswith(("_change", "_change_lower", "_change_upper")) or c in ("way", "cosine")]
        if what == "moved":
            zero.remove("cosine")
        assert (frame[zero] == 0).to_numpy().all(), what
    assert all(claim.value.value == 0 and not claim.shown for claim in shift.claims)


@pytest.mark.parametrize(("size", "seed"), [(0.05, 0), (0.1, 1), (0.1, 2)])
def test_noise_moves_the_states_but_not_toward_the_behaviour(organism, behavior, size, seed):
    shift = compare(organism, with_noise(organism, size, seed), behavior, SMALL, progress=False)
    assert shift.moved.overall
    assert shift.moved.overall.lower > 0.02
    assert shift.moved.overall.value == pytest.approx(np.mean([row.relative.value for row in shift.moved.rows]))
    assert all(len(row.updates) == SMALL.updates and any(row.updates) for row in shift.shares)
    bars, least = {claim.name: claim.bar for claim in shift.claims}, SMALL.least_way * shift.persona.value / 2
    assert bars["behaviour"] == max(shift.drift, least) > 0
    assert (shift.conclusion, shift.sense) == ("no", "neither")
    assert shift.sentence.startswith("moved, but not toward the behaviour: the GDN states moved by")


def test_answers_are_held_against_what_redrawn_weights_do_to_them(organism, behavior):
    """The null of the answers, put together anew: exchange the weights, ask the same prompts, take the difference."""
    after, config = with_noise(organism, 0.1, 1), replace(SMALL, prompts=8, pairs=16, layers=(4, 7))
    shift = compare(organism, after, behavior, config, progress=False)
    _, held = behavior.split(held_out=config.held_out, seed=0)
    prepared = prepare(organism, held.take(8, seed=0))
    plain, moved = np.mean(propensity(organism, prepared).values), []
    for i in range(19):
        with redrawn(organism, after, seed=derived_seed(0, "redrawn update", i)):
            moved.append(abs(np.mean(propensity(organism, prepared).values) - plain))
    assert shift.drift == pytest.approx(max(moved), abs=1e-6)  # of 19 none may be as large
    assert min(moved) < 0.9 * max(moved)


def test_a_planted_shift_is_found_with_its_sense_and_survives_a_file(organism, behavior, tmp_path):
    before = organism.weights_hash
    shift = compare(organism, planted(organism, 1.5), behavior, SMALL, progress=False)
    assert (shift.conclusion, shift.sense) == ("direction-shaped", "toward")
    assert shift.behavior_change.change.lower > 2
    assert shift.sentence.startswith("moved toward the behaviour along its direction: the GDN states moved by")
    found = {row.layer: row for row in shift.aligned if row.site == "gdn.state"}
    assert found[4].beyond
    assert found[4].way.lower > 0.3
    assert found[4].bar < 0.5
    stream = [row for row in shift.aligned if row.site == "resid"]
    assert all(row.cosine > 0.7 for row in stream)  # the plant goes straight to the stream, cosine 0.79 to 1.00
    sample = behavior.take(SMALL.prompts, seed=0)
    asked = ProbeConfig(shuffles=SMALL.shuffles, seed=0)
    for model, side in ((organism, "before"), (planted(organism, 1.5), "after")):
        pairs = contrast(model, sample, site="gdn.state", layers=[4, 5, 6], progress=False)
        groups = [item.group for item in sample.items]
        alone = probe_all(cells(pairs, heads=False), groups, site="gdn.state", config=asked, progress=False).results
        assert [getattr(row.auroc, side).value for row in shift.probes] == [one.auroc.value for one in alone]
    assert organism.weights_hash == before
    again = open_shift(shift.save(tmp_path / "shift.json"))
    assert recipe_differs(again.recipe, shift.recipe) is None
    assert replace(again, recipe={}) == replace(shift, recipe={})
    assert open_shift(tmp_path).table() == shift.table()
    assert shift.recipe["after"]["weights_hash"] != shift.recipe["before"]["weights_hash"] == before
    with pytest.raises(WrongInput, match="unknown table 'heads'; allowed are moved, probes"):
        shift.frame("heads")

    away = compare(organism, planted(organism, -1.5), behavior, SMALL, progress=False)
    assert (away.conclusion, away.sense) == ("no", "away")
    assert away.sentence.startswith("moved, but away from the behaviour along its direction")
    few = compare(organism, twin(organism), behavior, replace(SMALL, least_groups=9), progress=False)
    assert few.conclusion == "not shown"
    assert "6 held-out topics are too few" in few.sentence


def test_redrawn_changes_keep_size_and_singular_values_and_are_taken_back(tiny):
    other, before, names = twin(tiny), tiny.weights_hash, []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.hf.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    start = {name: value.clone() for name, value in tiny.hf.named_parameters()}
    later = dict(other.hf.named_parameters())
    with redrawn(tiny, other, seed=1):
        for name, value in tiny.hf.named_parameters():
            real, drawn = later[name] - start[name], value - start[name]
            assert drawn.abs().detach().numpy() == pytest.approx(real.abs().detach().numpy(), abs=1e-6)
            if value.ndim == 2:
                spectra = [torch.linalg.svdvals(m).detach().numpy() for m in (real, drawn)]
                assert spectra[1] == pytest.approx(spectra[0], abs=1e-4)
                names.append(float(((real * drawn).sum() / real.norm() ** 2).detach()))
    assert abs(np.mean(names)) < 0.1  # and point elsewhere
    assert tiny.weights_hash == before
    assert all(torch.equal(value, start[name]) for name, value in tiny.hf.named_parameters())


def test_correction_over_layers_rejects_as_often_as_it_says():
    """Noise in 4 layers of very different scale, 400 times: at least one layer rejects in 5 % of them."""
    rng = np.random.default_rng(0)
    scales, hits = np.array([1.0, 0.1, 5.0, 0.01]), 0
    for _ in range(400):
        table = rng.normal(size=(4, 40)) * scales[:, None]
        p, _ = corrected(dict(enumerate(table[:, 0])), dict(enumerate(table[:, 1:])), confidence=0.95)
        hits += min(p.values()) <= 0.05
    assert hits / 400 == pytest.approx(0.05, abs=0.025)
    p, bars = corrected({0: 0.5, 1: 0.5}, {0: np.full(39, 0.01), 1: np.full(39, 0.5)}, confidence=0.95)
    assert p == {0: 1 / 40, 1: 1.0}
    assert bars[0] < 0.5


def test_shares_are_those_of_the_spans_and_short_contexts_are_left_out(tiny, prompts):
    found = control_spans(prompts, count=3)
    assert 0 < len(found.kept) < len(prompts)
    for i, (direction, *controls) in zip(found.kept, found.spans, strict=True):
        assert direction == prompts[i].spans["direction"]
        assert all(b - a == direction[1] - direction[0] and b <= direction[0] for a, b in controls)
    whole = [
        Prompt(text=p.text, ids=p.ids, spans={"context": (0, k), "direction": (k, 2 * k), "decision": (2 * k, len(p))})
        for p in prompts
        for k in [len(p) // 2]
    ]
    record = capture(tiny, prompts, sites=(*RECURRENCE, "attn.pattern"), positions=dict.fromkeys(RECURRENCE, "all"),
                     progress=False)  # fmt: skip
    table = span_shares(record, control_spans(whole, count=2))
    even = [i for i, p in enumerate(prompts) if len(p) % 2 == 0]
    for shares in table.values():  # direction and its only possible control are the prompt: shares sum to 1
        assert shares[even][..., :2].sum(-1).numpy() == pytest.approx(np.ones(shares[even].shape[:2]), abs=1e-4)


def test_models_that_do_not_fit_together_are_refused(tiny, llama, organism, behavior, tokenizer):
    def qwen(**changes):
        config = qwen_config(tokenizer)
        for name, value in changes.items():
            setattr(config, name, value)
        return HybridModel(Qwen3_5ForCausalLM(config), tokenizer, name="other")

    with pytest.raises(WrongInput, match="tiny has 8 layers, llama has 3"):
        check_pair(tiny, llama)
    kinds = [*tiny.config.layer_types[1:], "linear_attention"]
    with pytest.raises(WrongInput, match="layer 2 is gdn in tiny and attention in other"):
        check_pair(tiny, qwen(layer_types=kinds))
    with pytest.raises(WrongInput, match=r"states \[v_head d_k d_v\] are 4x16x24 in tiny and 4x16x32 in other"):
        check_pair(tiny, qwen(linear_value_head_dim=32))
    with pytest.raises(WrongInput, match=r"mlp.gate_proj.weight is \(96, 64\) in tiny and \(80, 64\) in other"):
        check_pair(tiny, qwen(intermediate_size=80))
    half = HybridModel(copy.deepcopy(tiny.hf).bfloat16(), tokenizer, name="half")
    with pytest.raises(WrongInput, match=r"tiny is torch.float32 and half is torch.bfloat16: load both in one dtype"):
        check_pair(tiny, half)
    words = copy.deepcopy(tokenizer)
    words.add_tokens(["zebra"])
    with pytest.raises(WrongInput, match="tokenizers of tiny and renamed differ, first in the token 'zebra'"):
        check_pair(tiny, HybridModel(tiny.hf, words, name="renamed"))
    plain = replace(behavior, items=tuple(replace(item, persona=None) for item in behavior.items))
    with pytest.raises(WrongInput, match="'follow-direction' has no personas"):
        compare(organism, organism, plain, progress=False)


def test_answers_that_move_without_the_states_are_not_called_still(organism, behavior):
    """The last layer's MLP is made to write the direction, where no state reads: only the answers move."""
    other, seen = twin(organism), []
    mlp: Any = other.layers[7].mlp
    direction = mean_difference(contrast(organism, behavior.take(40), layers=[7], progress=False)[7])
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
    capture(other, [item.prompt(other) for item in behavior.take(40).items], progress=False)
    handle.remove()
    usual = torch.cat(seen).mean(0)
    with torch.no_grad():
        mlp.down_proj.weight.add_(torch.outer(direction.norm * direction.vector, usual / usual.square().sum()))
    shift = compare(organism, other, behavior, SMALL, progress=False)
    assert shift.moved.equal
    assert shift.behavior_change.change.lower > 1
    assert (shift.conclusion, shift.sense) == ("not shown", "neither")
    assert shift.sentence.startswith(
        "unclear: the GDN states did not move: they are equal, bit for bit, and yet the answers moved by"
    )


@pytest.mark.parametrize(
    ("change", "answers", "persona", "said"),
    [
        (0.0, None, 8.0, "nothing moved: the GDN states and the answers are equal, bit for bit$"),
        (0.0, 0.0, 8.0, r"the GDN states did not move: they are equal, bit for bit; the answers moved by \+0 "),
        (0.005, 0.0, 8.0, r"the GDN states moved by 0.5 % .* counts as nothing; the answers moved by \+0 "),
        (0.2, 1.0, float("nan"), "but what toward the behaviour means is not known"),
        (0.005, 1.0, 8.0, r"unclear: .*, and less than 1 % counts as nothing, and yet the answers moved by \+1"),
        (0.2, 1.0, -1.0, "but what toward the behaviour means is not known"),
        (0.2, 1.0, 8.0, "but the personas leave no large and reliable direction"),
    ],
)
def test_what_cannot_be_concluded_is_said(change, answers, persona, said):
    def about(value):
        return Estimate(value=value, lower=value - 0.1, upper=value + 0.1, n=24, groups=6)

    none = Estimate(value=0, lower=0, upper=0, n=24, groups=6)
    answered = Change(before=about(0), after=about(0), change=none if answers is None else about(answers))
    found = conclude(
        site="gdn.state", change=about(change), equal=change == 0, answers=answered, drift=0.0, persona=about(persona),
        rows=[], least_change=0.01, least_way=0.05, least_groups=5,
    )  # fmt: skip
    assert found[:2] == ("not shown", "neither")
    assert re.match(said, found[2].removeprefix("the GDN states moved by 20 % of their norm, ")), found[2]


def pairs_at(layer, gap, noise, *, features=64, n=40):
    """Sides that lie `gap` apart along the first axis, under noise."""
    generator = torch.Generator().manual_seed(layer)
    wanted, unwanted = noise * torch.randn(2, n, features, generator=generator)
    wanted[:, 0] += gap
    wanted[:, 1] += 10
    unwanted[:, 1] += 10  # what both have: norms are about 10
    groups = tuple(f"g{i % 8}" for i in range(n))
    return Pairs(
        layer=layer, wanted=wanted, unwanted=unwanted, groups=groups, behavior="made", contrast="persona", shape=(64,)
    )


def test_alignment_is_told_in_halves_of_the_gap_and_only_where_the_direction_means_something():
    """Layers: 0 a small gap, 1 an unreliable direction, 2 a shift of 0.6 of the way, 3 one of 0.02."""
    limits = Thresholds(least_way=0.05, least_gap=0.1, least_reliability=0.8, confidence=0.95)
    pairs = {0: pairs_at(0, 0.3, 0.001), 1: pairs_at(1, 1.2, 3.0), 2: pairs_at(2, 4, 0.1), 3: pairs_at(3, 4, 0.1)}
    directions = {layer: mean_difference(pair) for layer, pair in pairs.items()}
    assert directions[1].gap / directions[1].norm > 0.1
    topics, ways = Topics([f"g{i % 6}" for i in range(24)]), {0: 0.6, 1: 0.6, 2: 0.6, 3: 0.02}
    spread = torch.randn(24, 64, generator=torch.Generator().manual_seed(9))
    changes = {
        layer: ways[layer] * (d.gap / 2) * (d.vector + 1e-3 * (spread - (spread @ d.vector)[:, None] * d.vector))
        for layer, d in directions.items()
    }
    still = {layer: np.linspace(-0.01, 0.01, 39) for layer in pairs}
    rows = align(topics, changes, pairs, directions, still, draws=60, seed=0, thresholds=limits)
    assert [row.way.value for row in rows] == pytest.approx([0.6, 0.6, 0.6, 0.02], abs=1e-4)
    assert [row.decides for row in rows] == [False, False, True, True]
    assert [row.beyond for row in rows] == [False, False, True, False]  # 0.02 of the way is negligible
    mean, seed = changes[2].mean(0), derived_seed(0, "layer 2")
    drawn = [random_direction(directions[2], seed=derived_seed(seed, "shift random", i)).vector for i in range(60)]
    cosines = [float(vector @ mean / mean.norm()) for vector in drawn]
    assert random_cosines(mean, directions[2], draws=60, seed=seed) == pytest.approx(cosines, abs=1e-6)
    common = {layer: np.ones(39) for layer in pairs}  # any change of these weights would do as much
    again = align(topics, changes, pairs, directions, common, draws=60, seed=0, thresholds=limits)
    assert [row.beyond for row in again] == [False] * 4
    assert again[2].p["updates"] == 1
    assert again[2].p["random"] == rows[2].p["random"] == pytest.approx(1 / 61)


def aligned_row(way, *, beyond=True, layer=4, bar=0.1, apart=0.1):
    value = Estimate(value=way, lower=way - apart, upper=way + apart, n=24, groups=6)
    nulls: dict[str, float] = {name: 0.01 for name in NULLS}
    return AlignedRow(
        site="gdn.state", layer=layer, way=value, cosine=0.5, size=0.1, gap=0.4, reliability=0.9, decides=True, p=nulls,
        bars=nulls, bar=bar, beyond=beyond,
    )  # fmt: skip


def still_row(way, **options):
    return aligned_row(way, beyond=False, **options)


@pytest.mark.parametrize(
    ("rows", "answers", "found", "said"),
    [
        ([aligned_row(0.5)], 2.0, ("direction-shaped", "toward"), "moved toward the behaviour along its direction"),
        ([aligned_row(-0.5)], -2.0, ("no", "away"), "moved, but away from the behaviour"),
        ([aligned_row(0.5)], -2.0, ("not shown", "neither"), "the answers did not follow"),
        ([aligned_row(0.5)], 0.15, ("not shown", "neither"), "the answers did not follow"),  # of 8 nats: negligible
        ([aligned_row(0.5), aligned_row(-0.5)], 2.0, ("not shown", "neither"), "moved in different senses"),
        ([still_row(0.05)], 2.0, ("not shown", "neither"), "unclear: .*, and yet the answers moved"),
        ([still_row(0.05)], 0.0, ("no", "neither"), "moved, but not toward the behaviour"),
        ([still_row(0.05)], -2.0, ("no", "neither"), "moved, but not toward the behaviour"),
        ([still_row(0.05)], 0.15, ("not shown", "neither"), "but perhaps the answers moved by"),  # up to 0.25 of 0.2
        (
            [still_row(0.05), still_row(0.5)],
            0.0,
            ("not shown", "neither"),
            r"\+0.5 .* layer 4, .*too uncertain to tell",
        ),
        ([still_row(0.02, bar=0.01, apart=0.02)], 0.0, ("no", "neither"), "not toward the behaviour"),  # negligible
        ([still_row(0.04, bar=0.01, apart=0.02)], 0.0, ("not shown", "neither"), "too uncertain to tell"),
    ],
)
def test_the_conclusion_weighs_the_states_against_the_answers(rows, answers, found, said):
    assert weighed(rows, answers)[:2] == found
    assert re.search(said, weighed(rows, answers)[2])


def test_answers_have_to_move_further_than_redrawn_weights_move_them():
    assert weighed([aligned_row(0.5)], 2.0, drift=1.9)[0] == "direction-shaped"
    assert weighed([aligned_row(0.5)], 2.0, drift=2.1)[:2] == ("not shown", "neither")
    conclusion, _, sentence = weighed([still_row(0.05)], 2.0, drift=2.1)
    assert conclusion == "no"
    assert sentence.endswith("where the personas do 8, meaningless changes of the weights up to ±2.1")


def weighed(rows, answers, *, drift=0.0):
    def about(value, apart=0.1):
        return Estimate(value=value, lower=value - apart, upper=value + apart, n=24, groups=6)

    return conclude(
        site="gdn.state", change=about(0.2), equal=False, drift=drift, persona=about(8.0), rows=rows,
        answers=Change(before=about(0), after=about(answers), change=about(answers)),
        least_change=0.01, least_way=0.05, least_groups=5,
    )  # fmt: skip


def test_the_difference_of_two_estimates_has_the_interval_of_both():
    """MOVER: the lower end comes from the later one's lower and the earlier one's upper end."""
    before = Estimate(value=0.8, lower=0.7, upper=0.84, n=24, groups=6)
    after = Estimate(value=0.9, lower=0.87, upper=0.98, n=24, groups=6)
    change = _difference(before, after, False).change
    assert change.value == pytest.approx(0.1)
    assert change.lower == pytest.approx(0.1 - 0.05)  # hypot(0.03, 0.04)
    assert change.upper == pytest.approx(0.1 + np.hypot(0.08, 0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 1}, "prompts must be at least 8, saw 1"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1, saw 1"),
        ({"confidence": 1.5}, "confidence must lie between 0.5 and 0.99, saw 1.5"),
        ({"updates": 18}, "at a confidence of 0.95 at least 19 nulls and updates are needed, saw 200 and 18"),
        ({"layers": ()}, "layers must name at least one layer"),
        ({"least_way": -0.1}, "least_way must lie between 0 and 1"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(WrongInput, match=message):
        CompareConfig(**changes)
