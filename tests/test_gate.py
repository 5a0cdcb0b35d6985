"""What can be chosen about the gate, what is refused, and what a budget of time does."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from probes import measure
from probes.behaviors import read_behavior
from probes.criteria import GateCriteria
from probes.errors import WrongInput
from probes.stats import derived_seed
from probes.verify import GateConfig, candidate_layers, verify


def test_layers_to_search(tiny, llama):
    assert candidate_layers(tiny) == tuple(range(8))
    assert candidate_layers(llama) == (0, 1, 2)


def test_words_that_a_configuration_does_not_know_are_refused(unchecked):
    with pytest.raises(WrongInput, match="unknown direction 'best'; allowed are auto, mean, whitened, pca, logistic"):
        GateConfig(direction="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(WrongInput, match="unknown mode 'ablate'; allowed are add, clamp, rotate"):
        GateConfig(mode="ablate")  # pyright: ignore[reportArgumentType]


def test_wrong_configurations_are_refused(tiny):
    behavior = read_behavior("sentiment")
    with pytest.raises(WrongInput, match="layer 12 is out of range: tiny has layers 0 to 7"):
        verify(tiny, behavior, GateConfig(layers=(12,)))
    with pytest.raises(WrongInput, match="doses must include 0 and both signs"):
        GateConfig(doses=(0.0, 0.5))
    with pytest.raises(WrongInput, match="doses must be finite"):
        GateConfig(doses=(-1.0, 0.0, 0.5, 1.0, math.nan))
    with pytest.raises(WrongInput, match="shuffle_labels has no effect on a random direction"):
        GateConfig(shuffle_labels=True, direction="random")
    with pytest.raises(WrongInput, match="general_texts must be at least 3, saw 1"):
        GateConfig(general_texts=1)
    with pytest.raises(WrongInput, match="held_out must lie between 0 and 1"):
        GateConfig(held_out=1.0)
    with pytest.raises(WrongInput, match="layers must name at least one layer"):
        GateConfig(layers=())
    with pytest.raises(WrongInput, match="budget must be at least 1, saw 0"):
        GateConfig(budget=0)
    with pytest.raises(WrongInput, match="an empty state, which cannot be turned: mode must be add or clamp"):
        GateConfig(site="gdn.state", form="initial", mode="rotate")
    three = replace(behavior, items=tuple(i for i in behavior.items if i.group in behavior.groups[:5]))
    with pytest.raises(WrongInput, match="3 topic groups are left to fit on, at least 4 are needed"):
        verify(tiny, three)
    with pytest.raises(WrongInput, match="control_percentile must lie between 50 and 100, saw 150"):
        GateCriteria(control_percentile=150)
    with pytest.raises(WrongInput, match="perplexity_ratio must be at least 1, saw nan"):
        GateCriteria(perplexity_ratio=math.nan)


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 1), (10, 1), (20, 2), (37, 3), (1e6, 100)])
def test_a_budget_runs_as_many_controls_as_there_is_time_for(monkeypatch, seconds, rounds):
    """Ten seconds for five controls of each kind: another five are begun where they would be done in time."""
    now = [100.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = GateConfig(budget=max(seconds, 1.0))
    held = SimpleNamespace(config=config, asked=SimpleNamespace(deadline=100.0 + seconds), evidence={})
    run: list[int] = []
    for some in measure._Held.rounds(held):  # pyright: ignore[reportArgumentType]
        run += some
        now[0] += 10.0
    assert run == list(range(5 * rounds))  # at most 500
    assert held.evidence["budget"]["controls"] == len(run)
    without = SimpleNamespace(config=GateConfig(), asked=SimpleNamespace(deadline=None), evidence={})
    assert [*measure._Held.rounds(without)] == [range(20)]  # pyright: ignore[reportArgumentType]
    assert without.evidence == {}


def test_no_two_uses_of_a_seed_share_their_draws():
    seeds = {derived_seed(seed, use, i) for seed in range(50) for use in ("control", "necessity") for i in range(50)}
    assert len(seeds) == 50 * 2 * 50
