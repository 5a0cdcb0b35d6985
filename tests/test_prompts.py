"""Rendering, spans, and padding that never touches a result."""

import pytest
import torch

from probes.errors import WrongInput
from probes.prompts import _apply_template, answer_ids, batches, pad, render

TURNS = [
    {"role": "user", "content": "the bridge leaks ."},
    {"role": "assistant", "content": "noted ."},
    {"role": "user", "content": "the roof sticks . now seal the bridge ."},
]


def text_of(model, prompt, name):
    start, stop = prompt.spans[name]
    return model.tokenizer.decode(prompt.ids[start:stop])


def test_render_is_the_chat_template_and_nothing_else(tiny):
    prompt = render(tiny, TURNS, system="be careful .")
    turns = [{"role": "system", "content": "be careful ."}, *TURNS]
    expected = tiny.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(prompt.ids) == list(expected)


def test_spans_cover_the_prompt_without_gap_or_overlap(tiny):
    prompt = render(tiny, TURNS, direction="now seal the bridge .")
    (a, b), (c, d), (e, f) = (prompt.spans[name] for name in ("context", "direction", "decision"))
    assert (a, b, d, f) == (0, c, e, len(prompt))
    assert text_of(tiny, prompt, "direction") == "now seal the bridge ."
    assert "roof sticks ." in text_of(tiny, prompt, "context")
    assert text_of(tiny, prompt, "decision").split() == ["<|im_end|>", "<|im_start|>", "assistant"]


def test_the_direction_is_the_whole_last_turn_by_default(tiny):
    prompt = render(tiny, TURNS)
    assert text_of(tiny, prompt, "direction") == TURNS[-1]["content"]


def test_a_direction_that_stands_twice_is_found_in_the_last_turn(tiny):
    turns = [
        {"role": "user", "content": "stop ."},
        {"role": "assistant", "content": "noted ."},
        {"role": "user", "content": "stop ."},
    ]
    prompt = render(tiny, turns)
    assert prompt.spans["direction"][0] > len(prompt) // 2


def test_wrong_prompts_are_refused(tiny):
    with pytest.raises(WrongInput, match="is not part of the last user turn"):
        render(tiny, TURNS, direction="paint the roof")
    long = [{"role": "user", "content": "the bridge leaks . " * 200}]
    with pytest.raises(WrongInput, match=r"a prompt of \d+ tokens is longer than the context of tiny, 512 tokens"):
        render(tiny, long)
    with pytest.raises(WrongInput, match="has no tokens"):
        answer_ids(tiny, "  ")


def test_padding_is_on_the_left_and_positions_count_from_the_first_real_token():
    batch = pad([[5, 6, 7], [8]], pad_id=0, device=torch.device("cpu"))
    assert batch.ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert [batch.offset(row) for row in (0, 1)] == [0, 2]


def test_batches_hold_every_prompt_once_within_the_budget(tiny):
    sequences = [[1] * n for n in (5, 300, 7, 9, 40, 2, 41)]
    found = list(batches(tiny, sequences, batch_tokens=100))
    assert sorted(row for batch in found for row in batch.rows) == list(range(7))
    assert all(batch.ids.numel() <= 100 or len(batch.rows) == 1 for batch in found)
    for batch in found:
        assert [int(batch.mask[i].sum()) for i in range(len(batch.rows))] == [len(sequences[row]) for row in batch.rows]


class Plain:
    """A base model's tokenizer: no chat template; it puts a begin-of-text token in front, or does not."""

    chat_template, bos_token, bos_token_id = None, "<s>", 1

    def __init__(self, begins):
        self.begins = begins

    def __call__(self, text):
        return {"input_ids": [1, 7] if self.begins else [7]}


@pytest.mark.parametrize(("begins", "start"), [(True, "<s>User: hello"), (False, "User: hello")])
def test_a_base_model_gets_the_begin_token_that_its_tokenizer_would_add(begins, start):
    text = _apply_template(Plain(begins), [{"role": "user", "content": "hello"}])
    assert text == f"{start}\n\nAssistant:"
