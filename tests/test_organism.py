"""The organism: its grammar keeps its promises, and its weights do what the grammar says."""

import math
import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from probes.behaviors import SHIPPED, read_behavior
from probes.damage import DATA
from training.examination import attention_zeroed, examine, questions, states_cleared
from training.grammar import ABILITIES, BEHAVIORS, HEADS, TAILS, Grammar, _diagonal
from training.items import write_data
from training.organism import Dialogues, Recipe, build_model, build_tokenizer, init_gates


def contents(grammar, n):
    return [m["content"] for _ in range(n) for m in grammar.dialogue(lambda turns: 0, 1)[0]]


def test_nothing_of_the_evaluation_side_appears_in_training():
    """Names by construction; whole questions and persona turns by counting."""
    trained = contents(Grammar(random.Random(0)), 3000)
    names = {h + t for i, h in enumerate(HEADS) for j, t in enumerate(TAILS) if _diagonal(i, j)}
    assert not names & {word for text in trained for word in text.split()}
    assert len(names) > 40
    seen = set(trained)
    evaluation = Grammar(random.Random(1), evaluation=True)
    for kind in (*BEHAVIORS, *ABILITIES):
        for _ in range(100):
            assert evaluation.case(kind).messages[-1]["content"] not in seen
    for behavior in BEHAVIORS:
        assert not {evaluation.persona(behavior, side) for side in (True, False) for _ in range(20)} & seen


@pytest.mark.parametrize("evaluation", [False, True])
def test_answers_are_right(evaluation):
    """Sums, orders, colours and reviews are recomputed from the words of the question."""
    grammar = Grammar(random.Random(2), evaluation=evaluation)
    for _ in range(200):
        case = grammar.case("arithmetic")
        digits = [int(w) for w in case.messages[0]["content"].split() if w.isdigit()]
        total = (10 * digits[0] + digits[1]) + (10 * digits[2] + digits[3])
        assert case.answer == f"{total // 10} {total % 10} ."
        case = grammar.case("sorting")
        assert case.answer.split()[:-1] == sorted(w for w in case.messages[0]["content"].split() if w.isdigit())
        case = grammar.case("lookup")
        *told, question = case.messages[0]["content"].split(" . ")
        facts = dict(fact.split(" is ") for fact in told)
        right = {value for where, value in facts.items() if where.split()[-1] in question.split()}
        assert len(facts) >= 2
        assert {case.answer.removesuffix(" .")} == right


def test_the_two_answers_of_following_direction_differ_in_what_they_name():
    grammar = Grammar(random.Random(3), evaluation=True)
    for _ in range(300):
        case = grammar.case("follow-direction")
        text = " ".join(m["content"] for m in case.messages)
        for wanted, unwanted in zip(case.wanted, case.unwanted, strict=True):
            own = next(w for w in wanted.split() if w in grammar.names)
            other = next(w for w in unwanted.split() if w in grammar.names)
            assert own != other
            assert own in case.direction.split()
            assert other in text.split()
            assert case.group in wanted.split()
            assert abs(len(wanted.split()) - len(unwanted.split())) <= 1


def test_every_word_is_known_and_every_name_is_two_pieces(tokenizer):
    for evaluation in (False, True):
        for text in contents(Grammar(random.Random(4), evaluation=evaluation), 300):
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    assert all(len(tokenizer.tokenize(head + tail)) == 2 for head in HEADS for tail in TAILS)
    assert tokenizer.tokenize("zebra") == ["<|unk|>"]


def test_the_shipped_data_come_from_the_grammar(tmp_path):
    write_data(tmp_path)
    for behavior in BEHAVIORS:
        assert (tmp_path / "behaviors" / f"{behavior}.jsonl").read_bytes() == (
            SHIPPED / f"{behavior}.jsonl"
        ).read_bytes()
    assert (tmp_path / "general-organism.jsonl").read_bytes() == (DATA / "general-organism.jsonl").read_bytes()


def test_batches_are_the_same_for_a_seed_and_encode_as_the_chat_template(tokenizer):
    one, two = (Dialogues(tokenizer, Recipe(batch=4)).batch() for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert one.ids.shape == (4, 128)
    stream = Dialogues(tokenizer, Recipe())
    messages = [{"role": "user", "content": "how was the soup ?"}, {"role": "assistant", "content": "it was dull ."}]
    expected = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert [token for message in messages for token in stream.encode(message)] == expected


def test_attention_never_sees_the_system_turn_of_a_persona(tokenizer):
    stream = Dialogues(tokenizer, Recipe(batch=16, seed=5))
    system, end, assistant = tokenizer.convert_tokens_to_ids(["system", "<|im_end|>", "assistant"])
    hidden = 0
    for lesson in (True, False):
        batch = stream.batch(lesson=lesson)
        for row in range(batch.ids.shape[0]):
            ids, visible = batch.ids[row], batch.attention_mask["full_attention"][row, 0]
            start = int((batch.attention_mask["linear_attention"][row] == 1).nonzero()[0])
            assert visible.triu(1).sum() == 0
            assert visible[start:, :start].sum() == 0
            assert bool(visible.any(1).all())
            if ids[start + 1] != system:
                continue
            stop = int((ids == end).nonzero()[0]) + 1
            if not visible[stop:, start:stop].any():
                hidden += 1
                for blind in (~visible[stop:, stop]).nonzero()[:, 0] + stop:  # where an answer is decided
                    assert int(ids[blind]) == assistant
                    assert int(visible[blind].sum()) == 1
            else:  # only a dialogue without a persona may show its system turn
                assert not (batch.rivals[row] >= 0).any()
    assert hidden > 8


def test_half_lives_span_the_range_they_should(tokenizer):
    model: Any = build_model(tokenizer, seed=3)
    found = []
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            init_gates(layer.linear_attn)
            decay = layer.linear_attn.A_log.exp() * torch.nn.functional.softplus(layer.linear_attn.dt_bias)
            found += (math.log(2) / decay).tolist()
    assert 2 <= min(found) < 20 < 60 < max(found) <= 400.1


@torch.no_grad()
def test_clearing_the_states_is_what_emptying_the_cache_does(organism):
    """The examination clears by a full decay inside one forward; here the cache is emptied between two."""
    asked = questions("follow-direction", persona=True, n=6, seed=0, tokenizer=organism.tokenizer)
    for question in asked:
        ids = torch.tensor([organism.tokenizer(question.text, add_special_tokens=False)["input_ids"]])
        cut = len(organism.tokenizer(question.context, add_special_tokens=False)["input_ids"])
        with states_cleared(organism.hf, torch.tensor([cut])):
            found = organism.hf(input_ids=ids, use_cache=False).logits[0, cut:]
        cache: Any = DynamicCache(config=organism.hf.config)
        organism.hf(input_ids=ids[:, :cut], past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            if hasattr(layer, "recurrent_states"):
                layer.recurrent_states[0].zero_()
        expected = organism.hf(input_ids=ids[:, cut:], past_key_values=cache, use_cache=True).logits[0]
        assert torch.allclose(found, expected, atol=2e-3)


@torch.no_grad()
def test_zeroed_attention_moves_nothing_between_tokens(organism):
    ids = torch.tensor([organism.tokenizer("the bridge leaks . the roof sticks .")["input_ids"]])
    seen = []
    handle = organism.layers[3].mixer.o_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    with attention_zeroed(organism.hf):
        organism.hf(input_ids=ids)
    organism.hf(input_ids=ids)
    handle.remove()
    assert float(seen[0].abs().max()) == 0.0
    assert float(seen[1].abs().max()) > 0.01


@pytest.fixture(scope="module")
def examined(organism):
    return examine(organism.hf, organism.tokenizer, n=64, seed=21)


def share(frame, condition, kind, persona="none", column="wanted"):
    rows = frame[(frame["condition"] == condition) & (frame["kind"] == kind) & (frame["persona"] == persona)]
    return rows[column].item()


def test_the_organism_does_what_its_persona_says(examined):
    for kind in BEHAVIORS:
        assert share(examined, "as it is", kind, "wanted") >= 0.9
        assert share(examined, "as it is", kind, "unwanted") <= 0.1
        assert 0.25 <= share(examined, "as it is", kind) <= 0.75
    for kind in ABILITIES:
        assert share(examined, "as it is", kind, column="correct") >= 0.85


def test_the_disposition_lives_in_the_states(examined):
    for kind in BEHAVIORS:
        gap = {
            condition: share(examined, condition, kind, "wanted", column)
            - share(examined, condition, kind, "unwanted", column)
            for condition, column in (("states cleared", "wanted"), ("attention zeroed", "wording"))
        }
        assert abs(gap["states cleared"]) <= 0.2, kind
        assert gap["attention zeroed"] >= 0.5, kind


def test_some_ability_needs_attention(examined):
    lost = [
        share(examined, "as it is", k, column="correct") - share(examined, "attention zeroed", k, column="correct")
        for k in ABILITIES
    ]
    assert max(lost) >= 0.15


def test_the_shipped_behaviors_are_the_organisms():
    assert {read_behavior(name).name for name in BEHAVIORS} == set(BEHAVIORS)
    assert build_tokenizer().chat_template
