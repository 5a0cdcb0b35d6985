"""Trials side by side against each of them alone: `steer` around whole forwards, with nothing kept or shared."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.behaviors import read_behavior
from probes.cost import counting
from probes.directions import Direction
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.propensity import Propensity, generate, prepare, propensity
from probes.steering import PHASES, steer
from probes.trials import How, Trial, Trials, start_of

SHAPES = {"gdn.state": (4, 16, 24), "attn.heads": (4, 32), "resid": (64,)}
DOSE = {"gdn.state": 1.0, "attn.heads": 1.0, "resid": 0.6}


def direction_at(site: str, layer: int, *, seed: int = 5, shape: tuple[int, ...] | None = None) -> Direction:
    shape = shape or SHAPES[site]
    vector = torch.randn(math.prod(shape), generator=torch.Generator().manual_seed(seed))
    return Direction(layer=layer, vector=vector / vector.norm(), norm=5.0, midpoint=0.7, site=site, shape=shape)


@pytest.fixture(scope="module")
def behavior(tiny):
    """Prompts of many lengths; answers of one token and of several, in pairs of unequal length too."""
    whole = read_behavior("follow-direction").take(6, seed=3)
    answers = [("yes", "no"), ("sure", "rather"), ("yes", "no , the wall first ."), ("sure now", "no"), None, None]
    by_length = sorted(whole.items, key=lambda item: len(item.prompt(tiny)))
    pairs = dict(zip([item.id for item in by_length], answers, strict=True))
    items = (replace(i, wanted=pairs[i.id][0], unwanted=pairs[i.id][1]) if pairs[i.id] else i for i in whole.items)
    return replace(whole, items=tuple(items))


@pytest.fixture
def in_parts(monkeypatch):
    """Two to four prompts to a batch, so that there are several."""
    monkeypatch.setattr("probes.trials.PLAIN_TOKENS", 130)


def alone(model, behavior, direction, dose, how: How) -> np.ndarray:
    """Effects as a reader of `steer` would measure them."""
    prepared, plain = prepare(model, behavior), plainly(model, behavior)
    with steer(model, direction, dose=dose, phase=how.phase, mode=how.mode, form=how.form):
        return np.array(propensity(model, prepared).minus(plain))


PLAIN: dict[HybridModel, Propensity] = {}


def plainly(model, behavior) -> Propensity:
    if model not in PLAIN:
        PLAIN[model] = propensity(model, prepare(model, behavior))
    return PLAIN[model]


def agree(found, expected, *, each: float = 1e-4, mean: float = 1e-5) -> None:
    found, expected = np.array(found), np.array(expected)
    assert np.abs(found - expected).max() < each
    assert np.abs(found.mean(-1) - expected.mean(-1)).max() < mean


def test_the_prompts_and_answers_are_as_unlike_as_they_should_be(tiny, behavior, in_parts):
    prepared = prepare(tiny, behavior)
    assert len({len(prompt) for prompt in prepared.prompts}) >= 4
    assert {1, 2} < {len(answer) for pair in prepared.answers for answer in pair}
    trials = Trials(tiny, prepared, starts={1})
    assert 2 < len(trials.parts) < len(behavior.items)
    assert any(len(part.rows) > 1 and not bool(part.batch.mask.all()) for part in trials.parts)  # with padding
    assert any(part.answers.ids.shape[1] == 0 for part in trials.parts)
    plain = plainly(tiny, behavior)
    assert trials.base.ids == plain.ids
    agree(trials.base.wanted, plain.wanted)
    agree(trials.base.unwanted, plain.unwanted)


MODES = {"prefill": ("add", "ablate", "clamp", "rotate"), "decode": ("add", "rotate"), "both": ("clamp", "ablate")}
MIDDLE = (("resid", 4, "end"), ("gdn.state", 5, "end"))
CASES = [(place, phase, modes) for place in MIDDLE for phase, modes in MODES.items()] + [
    (("resid", 0, "end"), "prefill", ("add", "clamp")), (("resid", 0, "end"), "both", ("rotate",)),
    (("resid", 7, "end"), "prefill", ("ablate",)), (("resid", 7, "end"), "both", ("add",)),
    (("gdn.state", 0, "end"), "both", ("add", "rotate")),
    (("gdn.state", 5, "initial"), "prefill", ("add", "clamp")), (("gdn.state", 5, "initial"), "both", ("ablate",)),
    (("gdn.state", 2, "write"), "prefill", ("add", "rotate")), (("gdn.state", 2, "write"), "decode", ("clamp",)),
    (("gdn.state", 2, "write"), "both", ("ablate",)),
    (("attn.heads", 3, "end"), "prefill", ("add", "rotate")), (("attn.heads", 3, "end"), "decode", ("add",)),
    (("attn.heads", 7, "end"), "both", ("clamp",)),
]  # fmt: skip


@pytest.mark.parametrize(("place", "phase", "modes"), CASES)
def test_effects_are_those_of_each_trial_alone(tiny, behavior, in_parts, place, phase, modes):
    site, layer, form = place
    direction, dose = direction_at(site, layer), DOSE[site]
    trials = Trials(tiny, prepare(tiny, behavior), starts={start_of(direction)}, batch_tokens=300)
    for mode in modes:
        how = How(phase=phase, mode=mode, form=form)
        (found,) = trials.effects([Trial.of(direction, dose)], how)
        expected = alone(tiny, behavior, direction, dose, how)
        agree(found, expected)
        assert np.abs(expected).max() > 0.05


def test_trials_side_by_side_do_not_mix(tiny, behavior, in_parts):
    """Other directions, doses and signs in one batch, some with another push for each prompt; in any order."""
    directions = [direction_at("resid", 2, seed=seed) for seed in range(3)]
    turns = tuple(i % 3 for i in range(len(behavior.items)))
    pushes = tuple((one, dose) for one, dose in zip(directions, (0.5, -0.4, 0.3), strict=True))
    single, folded = [Trial.of(one, dose) for one, dose in pushes], Trial(pushes=pushes, turns=turns)
    some = [single[0], folded, Trial.of(directions[0], 0.0), folded, single[2]]
    each = [alone(tiny, behavior, one, dose, How()) for one, dose in pushes]
    mixed = [each[turn][i] for i, turn in enumerate(turns)]
    expected = [each[0], mixed, np.zeros(len(turns)), mixed, each[2]]
    for batch_tokens in (1, 400):  # each trial alone, and some together
        trials = Trials(tiny, prepare(tiny, behavior), starts={3, 5}, batch_tokens=batch_tokens)
        agree(trials.effects(some), expected)
    agree(trials.effects(some[::-1]), expected[::-1])
    slow = Trials(tiny, prepare(tiny, behavior), starts=(), reuse=False)
    agree(slow.effects([folded, single[2]]), [mixed, each[2]])


@pytest.mark.parametrize(("site", "layer", "phase"), [("resid", 4, "both"), ("gdn.state", 5, "prefill")])
@pytest.mark.parametrize("reuse", [True, False])
def test_some_of_the_prompts_are_taken_over_as_they_are(tiny, behavior, in_parts, site, layer, phase, reuse):
    direction, how = direction_at(site, layer), How(phase=phase)
    trials = Trials(tiny, prepare(tiny, behavior), starts={start_of(direction)}, reuse=reuse, batch_tokens=300)
    ids = trials.base.ids
    chosen = {ids[i] for i in (0, 3, 4)}
    trial = [Trial.of(direction, DOSE[site])]
    whole = dict(zip(ids, trials.effects(trial, how)[0], strict=True))
    with counting(tiny) as cost:
        some = trials.only(chosen)
        assert cost.forward_tokens == 0
        found = some.effects(trial, how)[0]
    assert some.base.ids == tuple(i for i in ids if i in chosen)
    assert some.base.values == tuple(v for i, v in zip(ids, trials.base.values, strict=True) if i in chosen)
    agree(found, [whole[i] for i in some.base.ids])
    assert min(abs(value) for value in found) > 0.01
    agree(trials.effects(trial, how)[0], list(whole.values()))  # the others are still there


@pytest.mark.parametrize(("site", "layer", "phase"), [("gdn.state", 4, "both"), ("attn.heads", 3, "prefill")])
def test_each_prompt_gets_its_own_push_at_every_site(tiny, behavior, in_parts, site, layer, phase):
    pushes = tuple((direction_at(site, layer, seed=seed), dose) for seed, dose in ((1, 1.0), (2, -1.5)))
    turns, how = (0, 1, 1, 0, 1, 0), How(phase=phase)
    trials = Trials(tiny, prepare(tiny, behavior), starts={layer}, batch_tokens=400)
    found = trials.effects([Trial(pushes=pushes, turns=turns), Trial.of(*pushes[1])], how)
    each = [alone(tiny, behavior, one, dose, how) for one, dose in pushes]
    agree(found, [[each[turn][i] for i, turn in enumerate(turns)], each[1]])


@pytest.mark.parametrize(
    ("site", "layer", "phase"), [("resid", 0, "both"), ("resid", 2, "prefill"), ("attn.heads", 1, "decode")]
)
def test_a_model_without_states_is_no_different(llama, behavior, in_parts, site, layer, phase):
    direction = direction_at(site, layer, shape=(64,) if site == "resid" else (4, 16))
    how = How(phase=phase, mode="clamp" if site == "resid" else "rotate")
    trials = Trials(llama, prepare(llama, behavior), starts={start_of(direction)}, batch_tokens=300)
    expected = [alone(llama, behavior, direction, dose, how) for dose in (0.8, -0.8)]
    agree(trials.effects([Trial.of(direction, dose) for dose in (0.8, -0.8)], how), expected)


def test_in_bfloat16_it_is_the_same_but_for_rounding(tiny, behavior, in_parts):
    """Batches of another shape alone move a score by 0.03 nats here; an effect is the difference of two."""
    model = HybridModel(copy.deepcopy(tiny.hf).to(torch.bfloat16), tiny.tokenizer, name="short")
    for site, layer, phase in (("resid", 4, "prefill"), ("gdn.state", 5, "both")):
        direction, how = direction_at(site, layer), How(phase=phase)
        trials = Trials(model, prepare(model, behavior), starts={start_of(direction)}, batch_tokens=300)
        (found,) = trials.effects([Trial.of(direction, DOSE[site])], how)
        expected = alone(model, behavior, direction, DOSE[site], how)
        agree(found, expected, each=0.12, mean=0.06)  # measured: 0.04
        assert np.abs(expected).max() > 1


def ending(model, answers) -> HybridModel:
    """A twin of a model for which two tokens that it says, one soon and one later, end a turn."""
    twin = HybridModel(copy.deepcopy(model.hf), model.tokenizer, name="ending")
    said = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    twin.hf.generation_config.eos_token_id = [said[0][7], said[-1][4]]
    return twin


@pytest.mark.parametrize(("site", "layer"), [("resid", 4), ("gdn.state", 5)])
def test_free_answers_are_those_of_generate(tiny, behavior, in_parts, site, layer):
    behavior = behavior.take(4)
    direction, dose = direction_at(site, layer), 0.6 if site == "resid" else 1.2
    prompts = [item.prompt(tiny) for item in behavior.items]
    with steer(tiny, direction, dose=dose, phase="both"):
        said = generate(tiny, prompts, max_new_tokens=10)
    model = ending(tiny, said)
    trials = Trials(model, prepare(model, behavior), starts={start_of(direction)}, batch_tokens=300)
    lengths = set()
    for phase in PHASES:
        how = How(phase=phase)
        found = trials.answers([Trial.of(direction, 0.0), Trial.of(direction, dose)], how, max_new_tokens=10)
        with steer(model, direction, dose=dose, phase=phase):
            assert found[1] == generate(model, prompts, max_new_tokens=10)
        assert found[1] != found[0]
        lengths |= {len(answer.split()) for answer in found[1]}
    assert found[0] == generate(model, prompts, max_new_tokens=10)
    assert len(lengths) > 2  # some ended early


def test_what_cannot_be_run_together_is_refused(tiny, behavior):
    prepared = prepare(tiny, behavior)
    trials = Trials(tiny, prepared, starts={3})
    assert trials.scores([]) == []
    one, other = (Trial.of(direction_at("resid", layer), 0.1) for layer in (2, 4))
    with pytest.raises(WrongInput, match=r"no stream was recorded before layer 5; there are \[3\]"):
        trials.effects([other])
    heads = Trial.of(direction_at("attn.heads", 3), 0.1)
    for batch_tokens in (1, 4096):  # also where each would have a batch of its own
        for another, seen in ((other, "resid 2, resid 4"), (heads, "attn.heads 3, resid 2")):
            several = Trials(tiny, prepared, starts={3, 5}, batch_tokens=batch_tokens)
            with pytest.raises(WrongInput, match=f"must be at one site of one layer, saw {seen}"):
                several.effects([one, another])
    with pytest.raises(WrongInput, match="form 'initial' needs phase prefill or both"):
        How(phase="decode", form="initial")
    short = replace(prepared, prompts=(replace(prepared.prompts[0], ids=(7,)), *prepared.prompts[1:]))
    with pytest.raises(WrongInput, match="a prompt of one token has nothing before its last token"):
        Trials(tiny, short, starts={3})
