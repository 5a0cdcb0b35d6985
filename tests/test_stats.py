"""Intervals and scores against closed forms, scipy and brute force."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from probes import stats


def test_mean_interval_matches_theory_for_independent_items():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = stats.mean(values.tolist(), [str(i) for i in range(400)])
    error = values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.lower == pytest.approx(values.mean() - 1.96 * error, abs=0.05)
    assert found.upper == pytest.approx(values.mean() + 1.96 * error, abs=0.05)


@pytest.mark.parametrize(("confidence", "reach"), [(0.8, 1.2816), (0.95, 1.96), (0.99, 2.5758)])
def test_a_mean_interval_is_as_wide_as_its_confidence(confidence, reach):
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    groups = [str(i) for i in range(400)]
    found = stats.mean(values.tolist(), groups, draws=20_000, confidence=confidence)
    error = values.std() / math.sqrt(400)
    assert found.lower == pytest.approx(values.mean() - reach * error, abs=0.02)
    assert found.upper == pytest.approx(values.mean() + reach * error, abs=0.02)
    assert found.confidence == found.as_dict()["confidence"] == confidence
    assert stats.mean(values.tolist(), groups).confidence == 0.95


def test_intervals_of_any_confidence_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    names, times = [str(i // 5) for i in range(50)], 600
    for confidence in (0.8, 0.98):
        hits = 0
        for trial in range(times):
            values = np.repeat(rng.normal(0, 1, 10), 5) + rng.normal(0, 1, 50)
            found = stats.mean(values.tolist(), names, seed=trial, draws=1000, confidence=confidence)
            hits += found.lower <= 0 <= found.upper
        assert hits / times == pytest.approx(confidence, abs=0.045)


def test_mean_interval_widens_when_items_of_a_group_agree():
    rng = np.random.default_rng(1)
    levels = rng.normal(0, 1, 10)
    values = np.repeat(levels, 20) + rng.normal(0, 0.01, 200)
    groups = [str(i // 20) for i in range(200)]
    clustered = stats.mean(values.tolist(), groups)
    naive = stats.mean(values.tolist(), [str(i) for i in range(200)])
    assert clustered.groups == 10
    assert clustered.upper - clustered.lower > 3 * (naive.upper - naive.lower)


@pytest.mark.parametrize("groups", [5, 6, 8, 20])
def test_intervals_hold_the_truth_about_as_often_as_they_say(groups):
    rng = np.random.default_rng(2)
    names = [str(i // 5) for i in range(5 * groups)]
    hits, plain, times = 0, 0, 800
    for trial in range(times):
        values = np.repeat(rng.normal(0, 1, groups), 5) + rng.normal(0, 1, 5 * groups)
        found = stats.mean(values.tolist(), names, seed=trial)
        again = stats.jackknife(
            float(values.mean()), np.array([values[np.array(names) != name].mean() for name in dict.fromkeys(names)]),
            n=len(values),
        )  # fmt: skip
        hits += found.lower <= 0 <= found.upper
        plain += again.lower <= 0 <= again.upper
    assert hits / times == pytest.approx(0.95, abs=0.02 if groups > 5 else 0.06)
    assert plain / times == pytest.approx(0.95, abs=0.02)  # of a mean, the jackknife is the t interval
    values = rng.normal(size=groups)
    mine = stats.jackknife(0.0, (values.sum() - values) / (groups - 1), n=groups)
    limits = scipy_stats.t.interval(0.95, groups - 1, loc=0, scale=scipy_stats.sem(values))
    assert (mine.lower, mine.upper) == pytest.approx(limits)


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=19, max_size=60, unique=True), st.floats(0, 1.1), st.sampled_from([0.9, 0.95])
)
def test_a_size_beyond_its_bar_is_one_whose_rank_says_so(null, size, confidence):
    p = (1 + sum(other >= size for other in null)) / (1 + len(null))
    assert (size > stats.null_bar(null, confidence=confidence)) == (p <= 1 - confidence + 1e-9)


def test_bars_of_few_draws_are_their_largest():
    assert stats.null_bar([0.3, 0.1], confidence=0.95) == 0.3
    assert stats.null_bar([], confidence=0.95) == 0


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_least_number_of_draws_is_the_first_that_allows_a_small_enough_p(confidence):
    needed = stats.least_draws(confidence)
    assert 1 / (needed + 1) <= 1 - confidence + 1e-9 < 1 / needed


def test_tails_approach_the_percentiles_with_many_groups():
    assert stats.tail(0.95, 100_000) == pytest.approx(2.5, abs=1e-3)
    tails = [stats.tail(0.95, groups) for groups in (1, 2, 5, 6, 8, 20, 100)]
    assert tails == sorted(tails)
    assert tails[0] == 0
    cut = stats.jackknife(0.9, np.array([0.2, 0.9, 1.0]), n=3, within=(0.0, 1.0))
    assert (cut.value, cut.lower, cut.upper) == (0.9, 0.0, 1.0)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.integers(0, 1000))
def test_auroc_is_the_share_of_ordered_pairs(positive, seed):
    negative = np.random.default_rng(seed).normal(0, 2, len(positive)).tolist()
    pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    found = stats.auroc(positive, negative, [str(i) for i in range(len(positive))], draws=5)
    assert found.value == pytest.approx(np.mean(pairs))


def test_auroc_draws_whole_groups_as_scikit_learn_would_weigh_them():
    rng = np.random.default_rng(5)
    positive, negative = rng.normal(0.5, 1, 30).round(1), rng.normal(0, 1, 30).round(1)  # with ties
    groups = [str(i**2 % 7) for i in range(30)]
    names, index = np.unique(groups, return_inverse=True)
    drawn = np.random.default_rng(8).multinomial(len(names), np.full(len(names), 1 / len(names)), size=50)
    truth, scores = np.repeat([1, 0], 30), np.concatenate([positive, negative])
    areas = [roc_auc_score(truth, scores, sample_weight=np.tile(row[index], 2)) for row in drawn]
    tail = stats.tail(0.95, len(names))
    found = stats.auroc(positive.tolist(), negative.tolist(), groups, seed=8, draws=50)
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    assert (found.lower, found.upper) == pytest.approx(tuple(np.percentile(areas, [tail, 100 - tail])))


def test_auroc_interval_contains_half_for_noise_and_excludes_it_for_signal():
    rng = np.random.default_rng(3)
    groups = [str(i % 12) for i in range(120)]
    noise = stats.auroc(rng.normal(size=120).tolist(), rng.normal(size=120).tolist(), groups)
    signal = stats.auroc((rng.normal(size=120) + 1.5).tolist(), rng.normal(size=120).tolist(), groups)
    assert noise.lower < 0.5 < noise.upper
    assert signal.lower > 0.7


def test_spearman_matches_scipy_and_refuses_constants():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 9.0]
    assert stats.spearman(x, y) == pytest.approx(scipy_stats.spearmanr(x, y)[0])
    assert math.isnan(stats.spearman(x, [1.0] * 5))


def test_spearman_over_groups_sees_the_mean_curve():
    x = [-1.0, -0.5, 0.0, 0.5, 1.0]
    rows = [[dose + offset for offset in (0.0, 10.0, -3.0, 2.0)] for dose in x]
    found = stats.spearman_over_groups(x, rows, ["a", "b", "c", "d"])
    assert (found.value, found.lower, found.upper) == pytest.approx((1.0, 1.0, 1.0))
    assert stats.spearman_over_groups(x, rows[::-1], ["a", "b", "c", "d"]).value == pytest.approx(-1.0)


def test_spearman_brown_doubles_the_test():
    """Of k parallel items with correlation r, halves correlate r' and the whole has reliability 2r'/(1+r')."""
    rng = np.random.default_rng(4)
    truth = rng.normal(size=20000)
    items = truth + rng.normal(0, 2, size=(8, 20000))
    halves = np.corrcoef(items[:4].mean(0), items[4:].mean(0))[0, 1]
    whole = np.corrcoef(items.mean(0), (truth + rng.normal(0, 2, size=(8, 20000))).mean(0))[0, 1]
    assert stats.spearman_brown(halves) == pytest.approx(whole, abs=0.01)


def test_split_groups_never_divides_a_group():
    groups = [g for g in "abcdefgh" for _ in range(3)]
    half = stats.split_groups(groups, np.random.default_rng(0))
    assert half.sum() == 12
    assert all(len({bool(h) for h, g in zip(half, groups, strict=True) if g == name}) == 1 for name in "abcdefgh")


def test_a_share_of_nothing_but_hits_still_has_an_interval():
    found = stats.share([True] * 24, [str(i) for i in range(24)])
    assert (found.value, found.upper) == (1.0, 1.0)
    assert found.lower == pytest.approx(24 / (24 + 1.959964**2), abs=1e-6)  # Wilson's score interval at all hits
    mixed = stats.share([True, False] * 24, [str(i // 12) for i in range(48)])
    plain = stats.mean([1.0, 0.0] * 24, [str(i // 12) for i in range(48)])
    assert mixed.lower <= plain.lower
    assert mixed.upper >= plain.upper


def test_shares_of_independent_trials_hold_the_truth_often_enough():
    rng = np.random.default_rng(0)
    held = 0
    for i in range(200):
        hits = (rng.random(48) < 0.95).tolist()
        found = stats.share(hits, [str(k) for k in range(48)], seed=i, draws=200)
        held += found.lower <= 0.95 <= found.upper
    assert held >= 184  # 95 % of 200 is 190, with a standard error of 3
