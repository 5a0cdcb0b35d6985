"""Probes against scikit-learn without the span, brute force, planted signals and labels that mean nothing."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from probes.behaviors import read_behavior
from probes.errors import WrongInput
from probes.linear import ProbeConfig, _held_out, _p_values, cells, probe, probe_all
from probes.pairs import contrast

FAST = ProbeConfig(folds=4, shuffles=19)


def topics(n, count):
    return [f"topic {i % count}" for i in range(n)]


def data(seed, n=32, features=12, signal=0.0, shared=0.0, count=8):
    """Gaussian features; `signal` separates the sides along the first; `shared` is common to a topic's side."""
    rng = np.random.default_rng(seed)
    common = shared * rng.normal(size=(count, 2, features))[np.arange(n) % count]
    wanted, unwanted = rng.normal(size=(2, n, features)) + common.transpose(1, 0, 2)
    wanted[:, 0] += signal
    return wanted, unwanted


def direct(wanted, unwanted, groups, folds, C):
    """AUROC within folds from scikit-learn on all features; and the scores."""
    X, y = np.concatenate([wanted, unwanted]), np.repeat([1, 0], len(wanted))
    both, scores, areas, sizes = np.tile(groups, 2), np.zeros(len(y)), [], []
    for train, test in GroupKFold(folds).split(X, y, both):
        scaler = StandardScaler().fit(X[train])
        length = np.linalg.norm(np.asarray(scaler.transform(X[train]))) / np.sqrt(len(train))
        model = LogisticRegression(C=C, solver="lbfgs", tol=1e-10, max_iter=5000)
        model.fit(scaler.transform(X[train]) / length, y[train])
        scores[test] = scaler.transform(X[test]) / length @ model.coef_[0]
        areas.append(roc_auc_score(y[test], scores[test]))
        sizes.append(len(test))
    return np.average(areas, weights=sizes), scores


@pytest.mark.parametrize("features", [5, 300])
def test_equals_scikit_learn_without_the_span(features):
    wanted, unwanted = data(0, features=features, signal=1.0)
    groups = topics(32, 8)
    found = probe(wanted, unwanted, groups, FAST)
    area, scores = direct(wanted, unwanted, groups, 4, FAST.C)
    assert found.auroc.value == pytest.approx(area, abs=1e-12)
    fold = np.empty(32, dtype=np.int64)
    for i, (_, held) in enumerate(GroupKFold(4).split(np.zeros(32), groups=groups)):
        fold[held] = i
    everything, nothing = np.ones((1, 32), dtype=bool), np.zeros((1, 32), dtype=bool)
    mine, again = _held_out(np.concatenate([wanted, unwanted]), fold, nothing, everything, FAST)
    np.testing.assert_allclose(mine.ravel(), scores, atol=1e-6)
    np.testing.assert_allclose(again, mine)


def test_the_jackknife_fits_and_scores_again_without_each_topic():
    wanted, unwanted = data(3, features=5, signal=0.5)
    groups = np.array(topics(32, 8))
    both, y = np.tile(groups, 2), np.repeat([1, 0], 32)
    X, expected = np.concatenate([wanted, unwanted]), []
    for topic in sorted(set(groups)):
        areas, sizes = [], []
        for train, test in GroupKFold(4).split(X, y, both):
            scaler = StandardScaler().fit(X[train])  # as for the whole
            rows = np.asarray(scaler.transform(X)) / (np.linalg.norm(scaler.transform(X[train])) / np.sqrt(len(train)))
            some, seen = (part[both[part] != topic] for part in (train, test))
            model = LogisticRegression(C=FAST.C, tol=1e-10, max_iter=5000).fit(rows[some], y[some])
            if len(seen):
                areas.append(roc_auc_score(y[seen], rows[seen] @ model.coef_[0]))
                sizes.append(len(seen))
        expected.append(np.average(areas, weights=sizes))
    found = probe(wanted, unwanted, groups.tolist(), FAST)
    np.testing.assert_allclose(found.without, expected, atol=1e-12)
    assert len(set(expected)) > 4
    spread = np.sqrt(7 / 8 * ((np.array(expected) - np.mean(expected)) ** 2).sum()) * scipy_stats.t.ppf(0.975, 7)
    assert found.auroc.lower == pytest.approx(max(found.auroc.value - spread, 0.0))
    assert found.auroc.upper == pytest.approx(min(found.auroc.value + spread, 1.0))


def test_direction_is_the_refitted_weights_in_raw_coordinates():
    wanted, unwanted = data(1, features=200, signal=3.0)
    scales = np.exp(np.random.default_rng(0).normal(size=200))
    X, y = np.concatenate([wanted, unwanted]) * scales, np.repeat([1, 0], 32)
    found = probe(wanted * scales, unwanted * scales, topics(32, 8), FAST).direction
    scaler = StandardScaler().fit(X)
    model = LogisticRegression(C=FAST.C / 200, tol=1e-10, max_iter=5000).fit(scaler.transform(X), y)
    raw = model.coef_[0] / scaler.scale_
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), raw / np.linalg.norm(raw), atol=1e-6)
    assert float(torch.from_numpy((wanted - unwanted) * scales).mean(0).float() @ found) > 0


def test_planted_signal_is_found_where_it_is():
    cells = {(layer, None): data(layer, n=48, signal=2.0 * (layer == 2)) for layer in range(5)}
    found = probe_all(cells, topics(48, 8), site="resid", config=ProbeConfig(shuffles=39), progress=False)
    assert [result.significant for result in found.results] == [False, False, True, False, False]
    best = found.best()
    assert best.layer == 2
    assert best.auroc.value == pytest.approx(scipy_stats.norm.cdf(2 / np.sqrt(2)), abs=0.08)  # what the truth allows
    assert best.p_adjusted == 1 / 40
    assert best.auroc.lower > best.shuffled_upper - 0.1
    assert best.selectivity.value == pytest.approx(best.auroc.value - best.shuffled)
    wide = best.selectivity.upper - best.selectivity.lower  # the mean of 39 shuffles is not known exactly
    assert best.auroc.upper - best.auroc.lower < wide < best.auroc.upper - best.auroc.lower + 0.1
    assert "1 of 5 probes significant" in str(found)
    assert "resid 2: AUROC" in str(best)
    frame = found.frame()
    assert len(frame) == 5
    assert frame.loc[2, "auroc"] == best.auroc.value
    assert frame.loc[2, "selectivity_lower"] == best.selectivity.lower
    assert frame["head"].tolist() == [pd.NA] * 5


def test_labels_without_meaning_are_rejected_as_rarely_as_promised():
    """Sides that differ by topic, but not in the same way: dependent items, and cells that share half their noise."""
    smallest, outside, means = [], [], []
    for trial in range(50):
        one, two = (data((trial, i), n=16, features=2, shared=1.0) for i in range(2))
        cells = {(0, 0): one, (0, 1): two, (0, 2): tuple(a + b for a, b in zip(one, two, strict=True))}
        config = ProbeConfig(folds=2, shuffles=19, seed=trial)
        found = probe_all(cells, topics(16, 8), site="gdn.state", config=config, progress=False).results
        smallest.append(min(result.p_adjusted for result in found))
        outside += [not result.auroc.lower <= 0.5 <= result.auroc.upper for result in found]
        means += [result.shuffled for result in found]
    for level in (0.05, 0.2, 0.5):
        allowed = scipy_stats.binom.ppf(0.99, 50, level)
        assert sum(p <= level + 1e-9 for p in smallest) <= allowed
    assert np.mean(means) == pytest.approx(0.5, abs=0.01)
    assert np.mean(outside) < 0.12  # 5 % are allowed, and the three cells of a trial stray together


def test_corrections_control_what_they_promise_and_the_maximum_has_more_power():
    rng = np.random.default_rng(0)
    false, power = {"max": 0, "holm": 0}, {"max": 0, "holm": 0}
    for _ in range(1500):
        common = rng.normal(size=(1, 200))
        table = 0.9 * common + np.sqrt(1 - 0.9**2) * rng.normal(size=(8, 200))  # correlated cells, all null but one
        table[0, 0] += 2.5
        for rule in false:
            p, adjusted = _p_values(table, rule)
            false[rule] += bool((adjusted[1:] <= 0.05).any())
            power[rule] += bool(adjusted[0] <= 0.05)
            assert (adjusted >= p - 1e-12).all()
    assert all(count <= scipy_stats.binom.ppf(0.999, 1500, 0.05) for count in false.values())
    assert power["max"] > 1.1 * power["holm"]


def test_corrections_by_hand():
    table = np.array([[0.9, 0.5, 0.6, 0.4], [0.7, 0.8, 0.5, 0.3], [0.6, 0.65, 0.75, 0.4]])
    p, adjusted = _p_values(table, "max")
    assert p.tolist() == [1 / 4, 2 / 4, 3 / 4]
    assert adjusted.tolist() == [1 / 4, 3 / 4, 3 / 4]  # maxima .8 .75 .4, then .8 .75 .4, then .65 .75 .4
    assert _p_values(table, "holm")[1].tolist() == [3 / 4, 1, 1]
    np.testing.assert_allclose(_p_values(table, "bh")[1], [3 / 4, 3 / 4, 3 / 4])


def test_controls_are_not_anti_predictive_as_balanced_ones_are():
    """Pairs that differ along one direction only: every control is plus or minus that direction."""
    wanted, unwanted = data(3, n=24, features=3, signal=6.0)
    groups = topics(24, 6)
    found = probe(wanted, unwanted, groups, ProbeConfig(folds=6, shuffles=99))
    assert found.shuffled == pytest.approx(0.5, abs=0.06)  # 6 coins a control: standard error 0.02
    assert found.p_value <= 0.08  # 2 of 64 swaps are as good as the real labels, so 3 of 99 on average
    balanced = []
    for heads in ((0, 1, 2), (0, 2, 4), (1, 3, 5)):
        swap = np.isin(np.arange(24) % 6, heads)[:, None]
        balanced.append(direct(np.where(swap, unwanted, wanted), np.where(swap, wanted, unwanted), groups, 6, 1.0)[0])
    assert max(balanced) < 0.1


def test_features_of_the_topic_alone_say_nothing():
    n = 32
    names = np.eye(8)[np.arange(n) % 8]
    found = probe(names, names, topics(n, 8), FAST)  # both sides equal
    assert found.auroc.value == 0.5
    assert found.p_value == 1
    assert not found.direction.any()
    noise = 0.1 * np.random.default_rng(0).normal(size=(2, n, 8))
    found = probe(5 * names + noise[0], 5 * names + noise[1], topics(n, 8), FAST)
    assert not found.significant
    assert abs(found.auroc.value - 0.5) < 0.2
    assert probe(np.ones((n, 3)), np.ones((n, 3)), topics(n, 8), FAST).auroc.value == 0.5


def test_what_a_topic_shares_does_not_leak_across_folds():
    """Sides that a probe could tell apart by remembering each topic, as random splits let it."""
    wanted, unwanted = data(11, n=64, features=200, shared=3.0)
    X, y = np.concatenate([wanted, unwanted]), np.repeat([1, 0], 64)
    half = np.arange(128) % 64 < 32  # every topic on both sides
    remembered = LogisticRegression(C=0.01).fit(X[half], y[half]).decision_function(X[~half])
    assert roc_auc_score(y[~half], remembered) > 0.95
    areas = []
    for seed in range(16):
        wanted, unwanted = data(seed, n=32, features=200, shared=3.0)
        areas.append(probe(wanted, unwanted, topics(32, 8), replace(FAST, shuffles=1)).auroc.value)
    assert np.mean(areas) == pytest.approx(0.5, abs=0.1)  # one topic's sides say nothing about another's


def test_scale_and_offset_of_features_do_not_matter():
    wanted, unwanted = data(4, signal=1.0)
    rng = np.random.default_rng(1)
    scale, offset = np.exp(3 * rng.normal(size=12)), 5 * rng.normal(size=12)
    one = probe(wanted, unwanted, topics(32, 8), FAST)
    other = probe(wanted * scale + offset, unwanted * scale + offset, topics(32, 8), FAST)
    assert other.auroc == one.auroc
    assert other.p_value == one.p_value
    assert other.shuffled == pytest.approx(one.shuffled, abs=1e-12)


def test_the_seed_decides_and_kinds_of_arrays_do_not():
    wanted, unwanted = (side.astype(np.float32) for side in data(5, signal=0.7))
    one = probe(wanted, unwanted, topics(32, 8), FAST)
    assert probe(wanted, unwanted, topics(32, 8), FAST) == one
    assert probe(torch.from_numpy(wanted), torch.from_numpy(unwanted), topics(32, 8), FAST) == one
    assert (
        probe(torch.from_numpy(wanted).bfloat16(), torch.from_numpy(unwanted).bfloat16(), topics(32, 8), FAST).n == 32
    )
    other = probe(wanted, unwanted, topics(32, 8), replace(FAST, seed=1))
    assert other.auroc.value == one.auroc.value
    assert other.shuffled != one.shuffled


def test_components_cap_the_span():
    wanted, unwanted = data(6, features=40, signal=1.0)
    exact = probe(wanted, unwanted, topics(32, 8), FAST)
    assert probe(wanted, unwanted, topics(32, 8), replace(FAST, components=100)) == exact
    assert probe(wanted, unwanted, topics(32, 8), replace(FAST, components=2)).auroc != exact.auroc


def test_wrong_input_is_refused(unchecked):
    wanted, unwanted = data(7)
    groups = topics(32, 8)
    broken = wanted.copy()
    broken[3, 2] = np.nan
    for cell, match in [
        ((broken, unwanted), "wanted at gdn.k 3 head 1 must be finite, 1 of its 384 values are not"),
        ((wanted[:9], unwanted), r"has shape \(9, 12\), allowed is \(32, features\)"),
        ((wanted, unwanted[:, :4]), r"unwanted at gdn.k 3 head 1 has shape \(32, 4\)"),
        ((wanted[:, :, None], unwanted), r"\(32, 12, 1\)"),
    ]:
        with pytest.raises(WrongInput, match=match):
            probe_all({(3, 1): cell}, groups, site="gdn.k", config=FAST, progress=False)
    with pytest.raises(WrongInput, match="8 items in 6 topic groups, saw 32 in 5"):
        probe(wanted, unwanted, topics(32, 5))
    with pytest.raises(WrongInput, match="saw 7 in 7"):
        probe(wanted[:7], unwanted[:7], topics(7, 7))
    with pytest.raises(WrongInput, match="no cells"):
        probe_all({}, groups, site="gdn.k")
    cells = {(layer, None): (wanted, unwanted) for layer in range(3)}
    with pytest.raises(WrongInput, match="Holm needs at least 59 shuffles for 3 cells, saw 58"):
        probe_all(cells, groups, site="resid", config=ProbeConfig(correction="holm", shuffles=58))
    with pytest.raises(WrongInput, match="folds must lie between 2"):
        ProbeConfig(folds=1)
    with pytest.raises(WrongInput, match="saw 'none'"):
        ProbeConfig(correction="none")  # pyright: ignore[reportArgumentType]


def test_cells_are_layers_and_their_heads(tiny):
    pairs = contrast(tiny, read_behavior("sentiment").take(8), layers=[2, 4], site="gdn.state", progress=False)
    found = cells(pairs)
    assert list(found) == [(i, head) for i in (2, 4) for head in (None, 0, 1, 2, 3)]
    assert torch.equal(found[4, 1][0], pairs[4].wanted.reshape(8, 4, -1)[:, 1])
    assert list(cells(pairs, heads=False)) == [(2, None), (4, None)]
    for site, per_layer in (("resid", 1), ("gdn.conv", 1), ("gdn.beta", 5)):  # channels are no heads
        other = contrast(tiny, read_behavior("sentiment").take(8), layers=[2], site=site, progress=False)
        assert len(cells(other)) == per_layer, site
