"""Mean differences against numpy, reliability against its meaning, and directions on disk."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.behaviors import read_behavior
from probes.capture import capture
from probes.controls import random_direction, shuffle_labels, shuffled_direction
from probes.directions import extract, low_rank, mean_difference, open_direction, save_direction, whitened
from probes.errors import WrongInput
from probes.extraction import mean_of, methods_at, null_of, raw_of
from probes.pairs import Pairs, contrast
from probes.span import logistic_direction

SIDES = ("wanted", "unwanted")


def made(signal: float, *, n: int = 64, noise: float = 1.0, seed: int = 0) -> Pairs:
    """Pairs whose difference is `signal` along the first axis, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    base = 5 * torch.randn(n, 32, generator=generator)
    truth = torch.zeros(32)
    truth[0] = signal
    unwanted = base + noise * torch.randn(n, 32, generator=generator)
    groups = tuple(f"g{i % 8}" for i in range(n))
    return Pairs(layer=0, wanted=base + truth, unwanted=unwanted, groups=groups, behavior="made", contrast="persona")


def test_the_direction_is_the_normalised_mean_difference():
    pairs = made(3.0)
    direction = mean_difference(pairs)
    raw = pairs.wanted.numpy().mean(0) - pairs.unwanted.numpy().mean(0)
    assert np.allclose(direction.vector.numpy(), raw / np.linalg.norm(raw), atol=1e-6)
    assert direction.gap == pytest.approx(np.linalg.norm(raw), rel=1e-5)
    both = np.concatenate([pairs.wanted.numpy(), pairs.unwanted.numpy()])
    assert direction.midpoint == pytest.approx(both.mean(0) @ direction.vector.numpy(), rel=1e-4)
    # torch's median is the lower of the two middle values
    assert direction.norm == pytest.approx(np.sort(np.linalg.norm(both, axis=1))[len(both) // 2 - 1], rel=1e-5)
    assert direction.vector[0] > 0.9  # it points from unwanted to wanted


def test_reliability_is_high_for_signal_and_low_for_noise():
    signal, noise = (
        mean_difference(made(3.0)).reliability,
        [mean_difference(made(0.0, seed=s)).reliability for s in range(8)],
    )
    assert signal is not None
    assert signal.value > 0.9
    assert np.mean([n.value for n in noise if n]) < 0.3


def test_reliability_predicts_how_well_fresh_data_agree():
    """Spearman-Brown of the halves estimates the cosine of two directions from full, independent samples."""
    found, agreement = [], []
    for seed in range(30):
        one, two = mean_difference(made(1.0, seed=seed)), mean_difference(made(1.0, seed=1000 + seed))
        assert one.reliability is not None
        found.append(one.reliability.value)
        agreement.append(float(one.vector @ two.vector))
    assert np.mean(found) == pytest.approx(np.mean(agreement), abs=0.05)


def test_equal_sides_have_no_direction():
    pairs = made(1.0)
    with pytest.raises(WrongInput, match="both sides of 'made' are equal at layer 0"):
        mean_difference(
            Pairs(
                layer=0,
                wanted=pairs.wanted,
                unwanted=pairs.wanted,
                groups=pairs.groups,
                behavior="made",
                contrast="persona",
            )
        )


def test_a_persona_contrast_reads_the_last_prompt_token_under_both_personas(tiny):
    behavior = read_behavior("follow-direction").take(6)
    pairs = contrast(tiny, behavior, layers=[2, 5], progress=False)
    assert pairs[5].contrast == "persona"
    for i, item in enumerate(behavior.items):
        for side in ("wanted", "unwanted"):
            ids = torch.tensor([item.prompt(tiny, persona=side).ids])
            with torch.no_grad():
                stream = tiny.hf(input_ids=ids, output_hidden_states=True).hidden_states[6][0, -1]
            assert torch.allclose(getattr(pairs[5], side)[i], stream, atol=1e-4)


def test_without_personas_the_answers_are_contrasted(tiny):
    behavior = read_behavior("sentiment").take(4)
    behavior = replace(behavior, items=tuple(replace(item, persona=None) for item in behavior.items))
    pairs = contrast(tiny, behavior, layers=[2], progress=False)[2]
    assert pairs.contrast == "answer"
    item = behavior.items[1]
    prompt, answer = item.prompt(tiny), tiny.tokenizer(item.unwanted, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ids = torch.tensor([[*prompt.ids, *answer]])
        stream = tiny.hf(input_ids=ids, output_hidden_states=True).hidden_states[3][0, len(prompt) :].mean(0)
    assert torch.allclose(pairs.unwanted[1], stream, atol=1e-4)


def test_one_capture_serves_all_layers(tiny, prompts):
    record = capture(tiny, prompts, layers=[1, 2], progress=False)
    assert record.layers("resid") == (1, 2)


def test_random_directions_are_unit_norm_matched_and_seeded():
    like = mean_difference(made(3.0))
    one, again, other = (random_direction(like, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.vector, again.vector)
    assert not torch.equal(one.vector, other.vector)
    assert float(one.vector.norm()) == pytest.approx(1.0, abs=1e-6)
    assert one.norm == like.norm
    assert one.reliability is None


def test_directions_survive_the_disk_and_are_refused_by_other_weights(tiny, llama, tmp_path):
    direction = mean_difference(made(3.0))
    path = save_direction(direction, tmp_path / "d.safetensors", weights_hash=tiny.weights_hash)
    back = open_direction(path, model=tiny)
    assert torch.equal(back.vector, direction.vector)
    assert (back.norm, back.midpoint, back.layer, back.behavior) == (direction.norm, direction.midpoint, 0, "made")
    with pytest.raises(WrongInput, match="was made for weights"):
        open_direction(path, model=llama)
    with pytest.raises(WrongInput, match="no such file"):
        open_direction(tmp_path / "absent", model=tiny)


def states(*, n: int = 60, seed: int = 0) -> Pairs:
    """Pairs of states whose difference is rank 1 in head 1 of three, under noise that is loud along some rows."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(2 * n, 3, 6, 8, generator=generator) * torch.linspace(0.2, 3, 6)[:, None]
    base[:n, 1] += torch.outer(torch.eye(6)[0] + torch.eye(6)[5], torch.eye(8)[2])
    groups = tuple(f"g{i % 10}" for i in range(n))
    return Pairs(
        layer=2, wanted=base[:n].flatten(1), unwanted=base[n:].flatten(1), groups=groups, behavior="made",
        contrast="persona", site="gdn.state", shape=(3, 6, 8),
    )  # fmt: skip


def test_a_low_rank_direction_is_the_best_of_its_rank_in_every_head():
    pairs = states()
    whole = mean_difference(pairs).tensor.numpy()
    for rank in (1, 3, 6):
        cut = low_rank(pairs, rank=rank)
        assert cut.method == f"rank-{rank} mean difference"
        u, s, v = np.linalg.svd(whole)
        best = np.stack([u[h][:, :rank] * s[h][:rank] @ v[h][:rank] for h in range(3)])
        assert np.allclose(cut.tensor.numpy(), best / np.linalg.norm(best), atol=1e-5)
    with pytest.raises(WrongInput, match="rank must lie between 1 and 6 for states of 6x8, saw 7"):
        low_rank(pairs, rank=7)
    with pytest.raises(WrongInput, match=r"a low-rank direction is one of states \(gdn.state\), saw 'resid'"):
        low_rank(made(1.0))


def test_a_principal_axis_is_numpys_and_points_to_wanted():
    """The first right singular vector of the differences, which are not centred, turned to the wanted side."""
    for pairs in (made(3.0), made(-3.0, seed=1), states(n=40)):  # more pairs than features, and fewer
        differences = pairs.wanted.double().numpy() - pairs.unwanted.double().numpy()
        axis = np.linalg.svd(differences)[2][0]
        axis *= np.sign(axis @ differences.mean(0))
        found = extract(pairs, method="pca", reliability=False)
        assert np.allclose(found.vector.numpy(), axis, atol=1e-5)
        assert found.method == "first principal axis of differences"
        assert found.gap > 0
        swapped = replace(pairs, wanted=pairs.unwanted, unwanted=pairs.wanted)
        assert torch.allclose(extract(swapped, method="pca", reliability=False).vector, -found.vector, atol=1e-6)
    loud = made(0.5, noise=3.0, n=400)  # not the mean: it is where differences are largest, whatever their sign
    loud.wanted[:, 7] *= 5
    assert abs(float(extract(loud, method="pca", reliability=False).vector[7])) > 0.9
    assert abs(float(mean_difference(loud).vector[7])) < 0.9


@pytest.mark.parametrize("pairs", [lambda: made(2.0), lambda: states(n=30)], ids=["few features", "many"])
def test_a_logistic_direction_is_that_of_scikit_learn_in_raw_units(pairs):
    """Standardised, scaled to mean squared length 1, fitted without the span, and taken back to raw features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    pairs = pairs()
    scales = torch.linspace(0.2, 5, pairs.wanted.shape[1])
    pairs = replace(pairs, wanted=pairs.wanted * scales, unwanted=pairs.unwanted * scales)
    features = np.concatenate([pairs.wanted.numpy(), pairs.unwanted.numpy()]).astype(np.float64)
    labels = np.repeat([1, 0], len(pairs.wanted))
    scaler = StandardScaler().fit(features)
    rows = np.asarray(scaler.transform(features))
    length = np.linalg.norm(rows) / np.sqrt(len(rows))
    fitted = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(rows / length, labels)
    raw = fitted.coef_[0] / scaler.scale_
    found = extract(pairs, method="logistic", reliability=False)
    assert found.method == "logistic probe"
    assert np.allclose(found.vector.numpy(), raw / np.linalg.norm(raw), atol=2e-5)
    assert found.gap > 0
    none = torch.zeros(6, 4)
    assert not logistic_direction(none.numpy(), C=1.0).any()


def test_every_method_has_a_null_that_is_not_the_method_found_again():
    """Exchanging the sides of pairs leaves the principal axis in place, so the mean stands in; others are their own."""
    pairs = made(4.0)
    shuffled = shuffle_labels(pairs, seed=0)
    assert torch.allclose(raw_of("pca")(shuffled).abs(), raw_of("pca")(pairs).abs(), atol=1e-5)
    assert torch.equal(null_of("pca")(shuffled), mean_of(shuffled))
    for method in ("mean", "whitened", "logistic"):
        assert torch.equal(null_of(method)(shuffled), raw_of(method)(shuffled))
        target = extract(pairs, method=method, reliability=False).vector
        null = raw_of(method)(shuffled)
        assert abs(float(null @ target / null.norm())) < 0.7
    both = states(n=12)
    assert torch.equal(null_of("low-rank", rank=2)(both), raw_of("low-rank", rank=2)(both))
    assert not torch.equal(null_of("low-rank", rank=2)(both), null_of("low-rank", rank=1)(both))


def test_methods_by_site_and_unknown_ones(unchecked):
    assert methods_at("resid") == ("mean", "whitened", "pca", "logistic")
    assert methods_at("gdn.state") == ("mean", "whitened", "pca", "logistic", "low-rank")
    with pytest.raises(WrongInput, match="unknown method 'best'; allowed are mean, whitened, pca, logistic, low-rank"):
        raw_of("best")  # pyright: ignore[reportArgumentType]


def test_a_whitened_direction_is_the_discriminant_of_scikit_learn():
    """With so many pairs that shrinkage is nothing, linear discriminant analysis finds the same."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    pairs = made(2.0, n=4000)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q for _ in range(2))
    mixing = left * torch.linspace(1, 4, 32) @ right
    pairs = replace(pairs, wanted=pairs.wanted @ mixing, unwanted=pairs.unwanted @ mixing)
    features = np.concatenate([pairs.wanted.numpy(), pairs.unwanted.numpy()]).astype(np.float64)
    labels = np.repeat([1, 0], len(pairs.wanted))
    found = LinearDiscriminantAnalysis(solver="lsqr").fit(features, labels).coef_[0]
    cosine = float(found @ whitened(pairs).vector.numpy() / np.linalg.norm(found))
    assert cosine > 0.999
    assert float(found @ mean_difference(pairs).vector.numpy() / np.linalg.norm(found)) < 0.9


def test_a_whitened_state_forgets_the_loud_rows():
    """Rows 0 and 5 differ alike, row 5 under 15 times the noise: dividing by the covariance leaves row 0."""
    raw, white = mean_difference(states(n=400)).tensor[1, :, 2], whitened(states(n=400)).tensor[1, :, 2]
    assert abs(float(raw[5] / raw[0])) > 0.4
    assert abs(float(white[5] / white[0])) < 0.1


def test_a_whitened_state_forgets_the_loud_columns():
    """The same with rows and columns exchanged."""
    loud = states(n=400)
    turned = {side: getattr(loud, side).unflatten(1, (3, 6, 8)).transpose(2, 3).flatten(1) for side in SIDES}
    pairs = replace(loud, **turned, shape=(3, 8, 6))
    raw, white = mean_difference(pairs).tensor[1, 2], whitened(pairs).tensor[1, 2]
    assert abs(float(raw[5] / raw[0])) > 0.4
    assert abs(float(white[5] / white[0])) < 0.1


def test_heads_confine_a_direction_and_its_controls():
    pairs = states().only([2, 0])
    for method in ("mean", "low-rank", "whitened", "pca", "logistic"):
        direction = extract(pairs, method=method, reliability=False)
        assert direction.heads == (0, 2)
        assert direction.tensor[1].abs().max() == 0
        assert float(direction.vector.norm()) == pytest.approx(1, abs=1e-6)
        shuffled = shuffled_direction(pairs, direction, seed=0, raw=null_of(method))
        assert shuffled.tensor[1].abs().max() == 0
        assert abs(float(shuffled.vector @ direction.vector)) < 1e-4
    with pytest.raises(WrongInput, match=r"heads of gdn\.state at layer 2 are 0 to 2, saw 3"):
        states().only([3])
    with pytest.raises(WrongInput, match="'resid' has no heads"):
        made(1.0).only([0])


def test_directions_of_states_survive_the_disk(tiny, tmp_path):
    direction = low_rank(states().only([1]), rank=2)
    path = save_direction(direction, tmp_path / "s.safetensors", weights_hash=tiny.weights_hash)
    back = open_direction(path, model=tiny)
    assert torch.equal(back.tensor, direction.tensor)
    assert (back.site, back.shape, back.heads, back.method) == ("gdn.state", (3, 6, 8), (1,), direction.method)


def test_what_gives_no_direction_is_refused(tiny):
    one = made(1.0, n=4)
    with pytest.raises(WrongInput, match="a direction needs pairs in at least 2 topic groups, saw 1"):
        mean_difference(Pairs(**{**vars(one), "groups": ("g",) * 4}))
    behavior = read_behavior("sentiment").take(2)
    with pytest.raises(WrongInput, match="positions 'all' keep several tokens of a prompt"):
        contrast(tiny, behavior, positions="all", progress=False)
    with pytest.raises(WrongInput, match=r"'attn\.pattern' has one entry for each earlier token"):
        contrast(tiny, behavior, site="attn.pattern", progress=False)
