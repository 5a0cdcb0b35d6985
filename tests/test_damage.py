"""Perplexity and divergence against plain formulas, and repetition against texts whose answer is plain."""

import json
import math
from contextlib import nullcontext

import pytest
import torch

from probes.damage import (
    DATA,
    LEAST,
    Damage,
    damage,
    divergence,
    perplexity_ratio,
    read_general,
    repetition,
    surprise,
    text_batches,
)
from probes.directions import Direction
from probes.errors import WrongInput
from probes.steering import steer


def pushed(model, dose):
    vector = torch.nn.functional.normalize(torch.ones(64), dim=0)
    return steer(model, Direction(layer=4, vector=vector, norm=2.0, midpoint=0.0), dose=dose)


@torch.no_grad()
def test_perplexity_and_divergence_equal_an_unbatched_computation(tiny, monkeypatch):
    monkeypatch.setattr("probes.damage.BATCH_TOKENS", 200)  # several batches, of different widths
    general = read_general(tiny).take(12)
    found = damage(tiny, general, lambda: pushed(tiny, 1.0))
    nll = {False: 0.0, True: 0.0}
    kl, count = 0.0, 0
    for ids, scored in zip(general.ids, general.scored, strict=True):
        tensor, logs = torch.tensor([ids]), {}
        for edited in (False, True):
            with pushed(tiny, 1.0) if edited else nullcontext():
                logs[edited] = tiny.hf(input_ids=tensor, use_cache=False).logits[0].double().log_softmax(-1)
        for i in range(1, len(ids)):
            if scored[i]:
                count += 1
                kl += float((logs[False][i - 1].exp() * (logs[False][i - 1] - logs[True][i - 1])).sum())
                for edited in (False, True):
                    nll[edited] -= float(logs[edited][i - 1, ids[i]])
    assert found.tokens == count == general.tokens
    assert surprise(tiny, general) == pytest.approx(nll[False], rel=1e-5)
    with pushed(tiny, 1.0):
        assert surprise(tiny, general) == pytest.approx(nll[True], rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll[False] / count), rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(math.exp((nll[True] - nll[False]) / count), rel=1e-4)
    assert found.kl == pytest.approx(kl / count, rel=1e-3, abs=1e-6)


def test_batches_hold_every_text_once_with_its_own_marks(tiny):
    general = read_general(tiny).take(11)
    seen = []
    for batch, scored in text_batches(tiny, general, batch_tokens=120):
        assert batch.ids.numel() <= 120
        for row, i in enumerate(batch.rows):
            at = batch.offset(row)
            assert tuple(batch.ids[row, at:].tolist()) == general.ids[i]
            assert scored[row, at:].tolist() == [False, *general.scored[i][1:]]  # the first token has none before it
            assert not scored[row, :at].any()
            seen.append(i)
    assert sorted(seen) == list(range(11))
    assert sum(int(scored.sum()) for _, scored in text_batches(tiny, general)) == general.tokens


def test_divergence_is_that_of_its_definition():
    base, other = torch.randn(2, 150, 40, generator=torch.Generator().manual_seed(0))
    p, q = base.double().softmax(1), other.double().softmax(1)
    assert divergence(base, other) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert divergence(base, base + 3.0) == pytest.approx(0, abs=1e-4)
    assert divergence(base, other) != pytest.approx(divergence(other, base), rel=1e-3)  # the plain model weighs


def test_damage_from_sums_and_from_what_is_no_number(tiny):
    general = read_general(tiny).take(6)
    found = Damage.of(general, plain=2.0 * general.tokens, edited=2.5 * general.tokens, kl=0.3 * general.tokens)
    assert found.perplexity == pytest.approx(math.e**2)
    assert found.perplexity_ratio == pytest.approx(math.e**0.5)
    assert (found.kl, found.tokens) == (pytest.approx(0.3), general.tokens)
    for edited in (math.nan, math.inf):
        broken = Damage.of(general, plain=1.0, edited=edited, kl=math.nan)
        assert (broken.perplexity, broken.perplexity_ratio, broken.kl) == (math.inf,) * 3
        assert perplexity_ratio(general, 1.0, edited) == math.inf
    assert math.isfinite(perplexity_ratio(general, 0.0, 1e9 * general.tokens))


def test_no_intervention_does_no_damage(tiny):
    found = damage(tiny, read_general(tiny).take(6), nullcontext)
    assert (found.perplexity_ratio, found.kl) == (1.0, 0.0)


def test_general_text_of_dialogues_scores_answers_only(tiny, tmp_path):
    path = tmp_path / "g.jsonl"
    line = {"messages": [{"role": "user", "content": "sort 2 1 ."}, {"role": "assistant", "content": "1 2 ."}]}
    path.write_text(f"{json.dumps(line)}\n" * LEAST)
    general = read_general(tiny, path)
    marked = [token for token, scored in zip(general.ids[0], general.scored[0], strict=True) if scored]
    assert tiny.tokenizer.decode(marked) == "1 2 ."


def test_the_shipped_text_is_chosen_by_what_the_tokenizer_knows(tiny):
    assert read_general(tiny).name == "general-organism"


def test_missing_and_empty_texts_are_refused(tiny, tmp_path):
    with pytest.raises(WrongInput, match="no such file"):
        read_general(tiny, tmp_path / "absent.txt")
    (tmp_path / "e.txt").write_text("\n")
    with pytest.raises(WrongInput, match=r"e.txt has 0 texts, general text needs at least 6"):
        read_general(tiny, tmp_path / "e.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "g.jsonl line 2: not valid JSON"),
        ('{"text": "a"}', "g.jsonl line 2: 'messages' must be a list of turns, saw None"),
        (
            '{"messages": [{"role": "user", "content": "sort 2 1 ."}]}',
            "g.jsonl line 2: a dialogue must end with a turn",
        ),
    ],
)
def test_malformed_dialogues_are_refused_with_their_line(tiny, tmp_path, line, message):
    (tmp_path / "g.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(WrongInput, match=message):
        read_general(tiny, tmp_path / "g.jsonl")


def test_text_in_another_language_is_refused(tiny):
    """A model that is broken finds unknown tokens likelier: they must never be what damage is measured on."""
    with pytest.raises(WrongInput, match=r"general-en.txt does not fit tiny: \d+% of its tokens are unknown"):
        read_general(tiny, DATA / "general-en.txt")


def test_texts_that_cannot_be_scored_are_refused(tiny, tmp_path):
    (tmp_path / "g.txt").write_text("sort 2 1 .\nsort\n")
    with pytest.raises(WrongInput, match=r"g.txt line 2: 1 tokens; tiny can score texts of 2 to 512"):
        read_general(tiny, tmp_path / "g.txt")
    (tmp_path / "g.txt").write_text("sort " * 600)
    with pytest.raises(WrongInput, match=r"g.txt line 1: 600 tokens; tiny can score texts of 2 to 512"):
        read_general(tiny, tmp_path / "g.txt")


def test_repetition_counts_trigrams_seen_before():
    assert repetition("a b c d e f") == 0.0
    assert repetition("a b c a b c a b c") == pytest.approx(4 / 7)
    assert repetition("word") == 0.0
    assert repetition(" ") == 0.0
    assert repetition("no no no no no no no no no no no no") == pytest.approx(0.9)
