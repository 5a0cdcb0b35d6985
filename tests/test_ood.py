"""Prompts unlike the others: forms that the card keeps apart, or frames, on topics that nothing was fitted on."""

from dataclasses import replace

import pytest

from probes.behaviors import read_behavior
from probes.ood import FRAMES, framed, out_of_distribution
from probes.propensity import prepare


@pytest.fixture(scope="module")
def kept_apart():
    return read_behavior("follow-direction")


@pytest.fixture(scope="module")
def english():
    """An English behaviour whose card keeps no form apart."""
    return replace(read_behavior("sentiment-en"), ood=())


def test_forms_kept_apart_are_taken_on_topics_that_were_not_fitted(kept_apart):
    fit, held = kept_apart.split(seed=3)
    found, what = out_of_distribution(kept_apart, held, fit.groups) or (None, "")
    assert found is not None
    groups = {item.group for item in found.items}
    assert groups <= set(held.groups) | ({item.group for item in kept_apart.ood} - set(kept_apart.groups))
    assert groups.isdisjoint(fit.groups)
    assert {item.id for item in found.items} == {i.id for i in kept_apart.ood if i.group not in fit.groups}
    assert len(found.items) < len(kept_apart.ood)  # some are on topics that were fitted
    forms = {item.form for item in found.items}
    assert forms.isdisjoint({item.form for item in kept_apart.items})
    assert all(form in what for form in forms)
    assert not {item.id for item in found.items} & {item.id for item in kept_apart.items}


def test_with_every_topic_fitted_nothing_is_left_apart(kept_apart):
    """Not in English, so there are no frames for it either."""
    everything = {item.group for item in (*kept_apart.items, *kept_apart.ood)}
    assert out_of_distribution(kept_apart, kept_apart, everything) is None
    assert out_of_distribution(replace(kept_apart, ood=()), kept_apart, ()) is None


def test_english_without_such_forms_is_framed(english):
    fit, held = english.split(seed=0)
    found, what = out_of_distribution(english, held, fit.groups) or (None, "")
    assert found is not None
    assert "e-mail" in what
    assert {item.group for item in found.items}.isdisjoint(fit.groups)
    assert len(found.items) == len(held.items)
    used = set()
    for new, old in zip(found.items, held.items, strict=True):
        text, said = new.messages[-1]["content"], old.messages[-1]["content"]
        before, after = text.split(said, 1)
        assert before or after
        used.add((before, after))
        assert new.messages[:-1] == old.messages[:-1]
        assert new.messages[-1]["role"] == "user"
        assert replace(new, messages=old.messages) == old  # answers, personas, patterns and topic are the item's own
    assert used == {tuple(frame.split("{}")) for frame in FRAMES}
    texts = {message["content"] for item in (*english.items, *english.ood) for message in item.messages}
    assert not any(frame.split("{}")[0] in text for frame in FRAMES for text in texts if frame.split("{}")[0])


def test_an_english_behaviour_with_forms_apart_uses_them_first(english):
    topic = english.items[0].group
    apart = tuple(replace(item, id=f"apart-{item.id}", form="poem") for item in english.items[:30])
    behavior = replace(english, ood=apart)
    found, what = out_of_distribution(behavior, behavior, {topic}) or (None, "")
    assert found is not None
    assert {item.form for item in found.items} == {"poem"}
    assert topic not in {item.group for item in found.items}
    assert "poem" in what
    # when all their topics were fitted, held-out items are framed
    held = replace(behavior, items=tuple(i for i in behavior.items if i.group not in {a.group for a in apart}))
    found, what = out_of_distribution(behavior, held, {item.group for item in apart}) or (None, "")
    assert found is not None
    assert len(found.items) == len(held.items)
    assert "ticket" in what


def test_braces_and_the_words_of_the_direction_survive_a_frame(english, kept_apart, tiny):
    item = replace(english.items[0], messages=({"role": "user", "content": "what does {x} or {} do in a format?"},))
    assert "message: what does {x} or {} do in a format?\n" in framed(item, FRAMES[1]).messages[0]["content"]
    some = kept_apart.take(2)
    turned = replace(some, items=tuple(framed(item, FRAMES[i]) for i, item in enumerate(some.items)))
    for prompt, item in zip(prepare(tiny, turned).prompts, some.items, strict=True):
        start, stop = prompt.spans["direction"]
        assert item.direction is not None
        assert tiny.tokenizer.decode(prompt.ids[start:stop]).split() == item.direction.split()
