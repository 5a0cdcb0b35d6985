"""Segments against the chat template's own rendering of whole dialogues, mixes against counts, items against the
grammar's division."""

import copy
import json
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest

from probes.behaviors import read_behavior
from probes.damage import DATA
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import render
from training.data import Mix, Segment, behavior_segments, examples
from training.general import general_data, general_segments
from training.grammar import ABILITIES, BEHAVIORS, NEUTRAL_SYSTEM, ORDER, TOPICS, Grammar
from training.items import write_data

QUESTION = {"role": "user", "content": "sort 3 1 2 ."}
ANSWER = {"role": "assistant", "content": "1 2 3 ."}
CALL = {"function": {"name": "move", "arguments": {"bridge": "red"}}}
# a call is written as "move : bridge red", the tools as a system turn
TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system {% for tool in tools %}{{ tool['function']['name'] }} . {% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] }} :{% for key, value in c['function']['arguments'].items() %} {{ key }} {{ value }}"
    "{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the generation prompt says more than stands before an answer later
REWRITING = TOOLS_TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\nmode :\n{%")


def with_template(model, template):
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return HybridModel(model.hf, tokenizer, name=model.name)


def write(path, *records):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


def whole(model, messages, **options):
    """Token ids of a dialogue as the template writes it, up to the last end of a turn."""
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: len(ids) - ids[::-1].index(model.tokenizer.convert_tokens_to_ids("<|im_end|>"))]


def scored(model, segment, rival=False):
    ids, marks = (segment.rival, segment.rival_scored) if rival else (segment.decision, segment.scored)
    return model.tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark])


def segment(name, kind: Literal["behavior", "general"] = "behavior", context=3, decision=5):
    marks = (False, False, *[True] * (decision - 2))
    return Segment(
        id=name, kind=kind, group="g", context=tuple(range(context)), decision=tuple(range(decision)), scored=marks
    )


def mix(behavior=10, general=7, share=0.25, batch=8, seed=0):
    return Mix(
        behavior=tuple(segment(f"b{i}") for i in range(behavior)),
        general=tuple(segment(f"g{i}", "general", decision=4) for i in range(general)),
        share=share, batch=batch, seed=seed,
    )  # fmt: skip


# -- a behaviour ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("persona", [None, "wanted"])
@pytest.mark.parametrize("name", BEHAVIORS)
def test_behavior_segments_are_the_whole_dialogue(organism, name, persona):
    behavior = read_behavior(name).take(20)
    segments = behavior_segments(organism, behavior, persona=persona)
    assert len(segments) == len(behavior.items)
    for item, found in zip(behavior.items, segments, strict=True):
        system = [{"role": "system", "content": item.persona["wanted"]}] if persona and item.persona else []
        for answer, decision, rival in (
            (item.wanted, found.decision, False),
            (item.unwanted, found.rival, True),
        ):
            turns = [*system, *item.messages, {"role": "assistant", "content": answer}]
            assert decision is not None
            assert [*found.context, *decision] == whole(organism, turns)
            assert scored(organism, found, rival) == f"{answer} <|im_end|>"
        assert (found.id, found.group, found.kind) == (item.id, item.group, "behavior")
        assert organism.tokenizer.decode(found.decision).startswith("<|im_end|> <|im_start|> assistant ")
        assert organism.tokenizer.decode(found.context).endswith(item.direction or item.messages[-1]["content"])


def test_without_a_generation_prompt_one_token_of_the_prompt_is_left_to_predict(organism):
    bare = with_template(organism, "{% for m in messages %}{{ m['content'] }} {% endfor %}")
    behavior = read_behavior("sentiment").take(3)
    for item, found in zip(behavior.items, behavior_segments(bare, behavior), strict=True):
        prompt = render(bare, item.messages).ids
        assert found.context == prompt[:-1]
        assert found.decision[0] == prompt[-1]
        assert found.scored == (False, *[True] * (len(found.decision) - 1))
        assert found.decision[-1] == bare.tokenizer.eos_token_id  # the template ends no turn


def test_the_end_of_a_turn_comes_from_the_template(organism):
    template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . <|endoftext|> <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    )
    behavior = read_behavior("hedging").take(2)
    item, found = behavior.items[0], behavior_segments(with_template(organism, template), behavior)[0]
    assert scored(organism, found) == f"{item.wanted} . <|endoftext|>"


def test_items_that_do_not_fit_the_model_are_refused(organism, monkeypatch):
    behavior = read_behavior("hedging").take(2)
    item = behavior.items[0]
    longest = max(len(render(organism, item.messages)) for item in behavior.items)
    monkeypatch.setattr(HybridModel, "max_tokens", longest + 2)
    with pytest.raises(WrongInput, match=r"item \S+: \d+ tokens with its answer are more than the context of organism"):
        behavior_segments(organism, behavior)
    monkeypatch.undo()
    with pytest.raises(WrongInput, match="has no persona turns"):
        behavior_segments(organism, replace(behavior, items=(replace(item, persona=None),)), persona="wanted")
    with pytest.raises(WrongInput, match="'sentiment-en' does not fit organism"):
        behavior_segments(organism, read_behavior("sentiment-en"))


# -- examples ------------------------------------------------------------------------------------------------------


def asked(behavior):
    return [turn["content"] for item in behavior.items for turn in item.messages if turn["role"] == "user"]


def follows(text, templates):
    """Whether a text is one of the templates, with any words in its fields."""
    return any(re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template)), text) for template in templates)


def test_examples_and_evaluation_share_no_names(organism):
    trained, evaluated = (set(Grammar(random.Random(0), evaluation=side).names) for side in (False, True))
    fit, rest = examples(organism, read_behavior("follow-direction"), n=64, seed=0)
    assert rest is not fit
    assert rest.hash == read_behavior("follow-direction").hash != fit.hash
    for behavior, own, other in ((fit, trained, evaluated), (rest, evaluated, trained)):
        words = {word for text in asked(behavior) for word in text.split()}
        assert words & own
        assert not words & other


def test_examples_and_evaluation_share_no_templates(organism):
    fit, rest = examples(organism, read_behavior("follow-direction"), n=64, seed=0)
    kept = len(ORDER) - len(ORDER) // 3
    for behavior, own, other in ((fit, ORDER[:kept], ORDER[kept:]), (rest, ORDER[kept:], ORDER[:kept])):
        # where the direction comes first, the whole turn is said to be it
        directions = [item.direction for item in behavior.items if item.direction and item.direction.count(".") == 1]
        assert len(directions) > 40
        assert all(follows(text, own) for text in directions)
        assert not any(follows(text, other) for text in directions)


@pytest.mark.parametrize(("name", "pattern"), [("sentiment", r"in (?:the|that) (\w+)"), ("hedging", r"it will (\w+)")])
def test_examples_and_evaluation_share_no_combinations(organism, name, pattern):
    fit, rest = examples(organism, read_behavior(name), n=150, seed=1)
    pairs = []
    for behavior in (fit, rest):  # a thing and the place it was in; a subject and what it may do
        words = [item.messages[-1]["content"] if name == "sentiment" else item.wanted for item in behavior.items]
        found = [re.search(pattern, text) for text in words]
        pairs.append({(item.group, m.group(1)) for item, m in zip(behavior.items, found, strict=True) if m})
    assert min(map(len, pairs)) >= 40
    assert not pairs[0] & pairs[1]
    assert not set(asked(fit)) & set(asked(rest))


def follows_another(item):
    """Whether the assistant has said something already (other than that it noted the report)."""
    return any(turn["role"] == "assistant" and turn["content"] != "noted ." for turn in item.messages)


@pytest.mark.parametrize("name", BEHAVIORS)
def test_drawn_examples_are_even_over_topics_and_repeat_by_seed(organism, name):
    behavior, rounds = read_behavior(name), 4
    n = rounds * len(TOPICS[name])
    fit, _ = examples(organism, behavior, n=n, seed=5)
    assert Counter(item.group for item in fit.items) == dict.fromkeys(TOPICS[name], rounds)
    assert len({item.id for item in fit.items}) == n
    preceded = [item for item in fit.items if follows_another(item)]
    assert Counter(item.group for item in preceded) == dict.fromkeys(TOPICS[name], rounds // 2)
    again, other = (examples(organism, behavior, n=n, seed=seed)[0] for seed in (5, 6))
    assert again == fit
    assert other.hash != fit.hash
    few, _ = examples(organism, behavior, n=10, seed=5)
    assert few.items == fit.items[:10]
    assert fit.has_persona
    assert fit.has_scorer
    assert all(item.judge(item.wanted) == "wanted" for item in fit.items)


def test_examples_of_other_behaviors_are_split_by_topic(tmp_path, organism):
    lines = (DATA / "behaviors" / "hedging.jsonl").read_text().splitlines()
    behavior = read_behavior(write(tmp_path / "hedging.jsonl", *lines[:-1]))  # not the one that ships
    fit, rest = examples(organism, behavior, n=20, seed=2, held_out=0.25)
    assert len(fit.items) == 20
    assert len(rest.groups) == 4
    assert not set(fit.groups) & set(rest.groups)
    left = len(behavior.items) - len(rest.items)
    with pytest.raises(WrongInput, match=f"{left + 1} examples of 'hedging' were asked for, there are {left} beside"):
        examples(organism, behavior, n=left + 1, seed=2, held_out=0.25)
    with pytest.raises(WrongInput, match="at least 1 example is needed, saw 0"):
        examples(organism, behavior, n=0, seed=2)


def test_the_files_that_ship_are_still_what_is_written(tmp_path):
    write_data(tmp_path)
    for name in ("general-organism.jsonl", *(f"behaviors/{behavior}.jsonl" for behavior in BEHAVIORS)):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


# -- general data --------------------------------------------------------------------------------------------------


def test_every_assistant_turn_becomes_a_segment(organism, tmp_path):
    system = {"role": "system", "content": "you are a helper ."}
    turns = [system, QUESTION, ANSWER, {**QUESTION, "content": "say bridge ."}, {**ANSWER, "content": "bridge ."}]
    found = general_segments(
        organism, write(tmp_path / "chat.jsonl", {"messages": turns}, "", {"messages": turns[1:3]})
    )
    assert [s.id for s in found] == ["chat.jsonl line 1 turn 3", "chat.jsonl line 1 turn 5", "chat.jsonl line 3 turn 2"]
    for one, until in zip(found, (turns[:3], turns, turns[1:3]), strict=True):
        assert [*one.context, *one.decision] == whole(organism, until)
        assert scored(organism, one) == until[-1]["content"] + " <|im_end|>"
        assert organism.tokenizer.decode(one.decision[:2]) == "<|im_start|> assistant"
        assert (one.kind, one.group, one.rival) == ("general", "chat.jsonl", None)


@pytest.mark.parametrize("arguments", [{"bridge": "red"}, '{"bridge": "red"}'])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_tool_calls_are_written_by_the_template(organism, tmp_path, arguments, content):
    model = with_template(organism, TOOLS_TEMPLATE)
    call = {"type": "function", "function": {"name": "move", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "please move the bridge ."},
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "yes , the bridge ."},
    ]
    tools = [{"type": "function", "function": {"name": "move"}}]
    path = write(tmp_path / "agent.jsonl", {"messages": turns, "tools": tools, "model": "any"})
    called, told = general_segments(model, path)
    assert model.tokenizer.decode(called.context) == (
        "<|im_start|> system move . <|im_end|> <|im_start|> user please move the bridge . <|im_end|>"
    )
    assert scored(model, called) == "move : bridge red <|im_end|>"
    assert scored(model, told) == "yes , the bridge . <|im_end|>"
    plain = [turns[0], {**turns[1], "content": "", "tool_calls": [CALL]}, *turns[2:]]
    assert [*told.context, *told.decision] == whole(model, plain, tools=tools)


def test_a_template_that_rewrites_turns_gets_content_and_refuses_calls(organism, tmp_path):
    model = with_template(organism, REWRITING)
    (found,) = general_segments(model, write(tmp_path / "chat.jsonl", {"messages": [QUESTION, ANSWER]}))
    assert model.tokenizer.decode(found.decision) == "<|im_start|> assistant mode : 1 2 3 . <|im_end|>"
    assert scored(model, found) == "1 2 3 . <|im_end|>"
    calling = {"messages": [QUESTION, {"role": "assistant", "tool_calls": [CALL]}]}
    with pytest.raises(
        WrongInput, match=r"a\.jsonl line 1 turn 2: the chat template of organism writes the call of 'm"
    ):
        general_segments(model, write(tmp_path / "a.jsonl", calling))


def test_a_base_model_gets_plain_turns(organism, tmp_path):
    model = with_template(organism, None)
    turns = [QUESTION, ANSWER, {**QUESTION, "content": "say bridge ."}, {**ANSWER, "content": "bridge ."}]
    path = write(tmp_path / "chat.jsonl", {"messages": turns})
    for one, until in zip(general_segments(model, path), (2, 4), strict=True):
        prompt = render(model, turns[: until - 1])
        assert [*one.context, *one.decision][: len(prompt)] == list(prompt.ids)
        assert scored(model, one) == turns[until - 1]["content"] + " <|im_end|>"  # the eos token
        assert one.scored[:3] == (False, False, True)  # "Assistant" and ":"
    with pytest.raises(WrongInput, match="'move'"):
        general_segments(
            model,
            write(tmp_path / "c.jsonl", {"messages": [QUESTION, {"role": "assistant", "tool_calls": [CALL]}]}),
        )


def test_long_turns_and_long_contexts_are_cut(organism, tmp_path, monkeypatch):
    turns = [{**QUESTION, "content": "sort " + "1 2 3 " * 30}, {**ANSWER, "content": "1 2 3 4 5 6 7 8 9 ."}]
    path = write(tmp_path / "chat.jsonl", {"messages": turns})
    (full,), (short,) = general_segments(organism, path), general_segments(organism, path, tokens=4)
    assert short.context == full.context
    assert short.decision == full.decision[:6]
    assert scored(organism, short) == "1 2 3 4"
    monkeypatch.setattr(HybridModel, "max_tokens", 40)
    (fitted,) = general_segments(organism, path, tokens=4)
    assert fitted.context == full.context[-34:]
    assert fitted.decision == short.decision


def test_paragraphs_end_in_their_decision(organism, tmp_path, monkeypatch):
    long, brief = "the bridge will hold " * 30, "sort 1 2 ."
    path = write(tmp_path / "text.txt", long, "", brief)
    first, second = general_segments(organism, path, tokens=10)
    ids = organism.tokenizer(long)["input_ids"]
    assert (list(first.context), list(first.decision)) == (ids[:-10], ids[-10:])
    assert first.scored == (False, *[True] * 9)
    assert (second.context, second.scored, second.id) == ((), (False, True, True, True), "text.txt line 3")
    monkeypatch.setattr(HybridModel, "max_tokens", 30)
    assert list(general_segments(organism, path, tokens=10)[0].context) == ids[-30:-10]
    assert general_segments(organism, path, tokens=30)[0].context == ()


def test_a_file_is_divided_by_lines_and_drawn_from_by_the_seed(organism, tmp_path):
    dialogues = [{"messages": [QUESTION, ANSWER, QUESTION, ANSWER]} for _ in range(20)]
    path = write(tmp_path / "chats.jsonl", *dialogues)

    def line(segment: Segment) -> str:
        return segment.id.split(" turn ")[0]

    training, held = general_data(organism, str(path), n=1000, seed=0)
    assert len(training) == 32
    assert len({line(s) for s in held}) == 4  # a fifth of the dialogues, both turns of each
    assert not {line(s) for s in training} & {line(s) for s in held}
    assert general_data(organism, str(path), n=10, seed=0) == (training[:10], held)
    assert general_data(organism, str(path), n=1000, seed=1)[1] != held
    with pytest.raises(WrongInput, match="has 1 line; general data needs at least 2"):
        general_data(organism, str(write(tmp_path / "one.jsonl", dialogues[0])), n=5)


LINES = {
    '{"messages": [': "not valid JSON",
    '["messages"]': r'expected an object \{"messages": \[turns\]\}, saw \["messages"\]',
    '{"messages": []}': "expected an object",
    '{"messages": [{"role": "user", "content": "a"}], "tools": {}}': "'tools' must be a list, saw dict",
    '{"messages": [{"role": "developer", "content": "a"}]}': "turn 1: unknown role 'developer'; allowed are system, us",
    '{"messages": ["a"]}': "turn 1: unknown role 'a'",
    '{"messages": [{"role": "user"}]}': "turn 1: a turn needs a content, or tool_calls of the assistant, saw None",
    '{"messages": [{"role": "user", "content": " "}]}': "turn 1: a turn needs a content",
    '{"messages": [{"role": "assistant", "tool_calls": []}]}': "turn 1: a turn needs a content",
    '{"messages": [{"role": "user", "content": [{"text": "a"}]}]}': "turn 1: a turn needs a content",
    '{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}': "'tool_calls' must be a list in a turn of",
    '{"messages": [{"role": "user", "content": "a"}]}': "needs a turn of the assistant after another one",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "needs a turn of the assistant after another one",
    '{"messages": [{"role": "assistant", "tool_calls": [{"name": "a"}]}]}': "a tool call is",
    '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}]}': "of 'a' must be an object, s",
    '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]}': (
        "the arguments of 'a' are not valid JSON"
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_malformed_lines_are_named(organism, tmp_path, line):
    path = write(tmp_path / "chat.jsonl", {"messages": [QUESTION, ANSWER]}, line)
    with pytest.raises(WrongInput, match=rf"^chat\.jsonl line 2.*{LINES[line]}"):
        general_segments(organism, path)


def test_files_and_numbers_that_cannot_be_used(organism, tmp_path):
    good = write(tmp_path / "good.jsonl", {"messages": [QUESTION, ANSWER]})
    with pytest.raises(WrongInput, match=r"general data is a \.txt or \.jsonl file, saw 'text\.md'"):
        general_segments(organism, tmp_path / "text.md")
    with pytest.raises(WrongInput, match="no such file"):
        general_segments(organism, tmp_path / "none.txt")
    with pytest.raises(WrongInput, match="is empty"):
        general_segments(organism, write(tmp_path / "empty.txt", ""))
    with pytest.raises(WrongInput, match=r"tokens must lie between 2 and 512, the context of organism, saw 1"):
        general_segments(organism, good, tokens=1)
    with pytest.raises(WrongInput, match=r"general-en\.txt does not fit organism: \d\d% of its tokens are unknown"):
        general_segments(organism, DATA / "general-en.txt")
    english = {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Welcome"}]}
    with pytest.raises(WrongInput, match=r"en\.jsonl does not fit organism: 100% of its tokens are unknown"):
        general_segments(organism, write(tmp_path / "en.jsonl", english))
    with pytest.raises(WrongInput, match=r"one\.txt line 1: a paragraph needs at least 2 tokens, saw 1"):
        general_segments(organism, write(tmp_path / "one.txt", "bridge"))


def test_what_a_template_does_not_know_is_refused(organism, tmp_path):
    calling = {"messages": [QUESTION, {"role": "assistant", "content": "sure .", "tool_calls": [CALL]}]}
    path = write(tmp_path / "agent.jsonl", calling)
    with pytest.raises(WrongInput, match=r"agent\.jsonl line 1 turn 2: .* does not write the call of 'move'"):
        general_segments(organism, path)  # its template writes contents alone
    strict = "{{ raise_exception('no such role') if messages[-1]['role'] == 'tool' else 'a <|im_end|>' }}"
    tool = {"messages": [QUESTION, ANSWER, {"role": "tool", "content": "red"}, ANSWER]}
    with pytest.raises(
        WrongInput, match=r"line 1 turn 4: the chat template refuses .*user, assistant, tool\): no such"
    ):
        general_segments(with_template(organism, strict), write(tmp_path / "tool.jsonl", tool))


def test_the_organism_trains_on_its_own_side_of_the_grammar(organism):
    segments, held = general_data(organism, n=40, seed=0)
    assert {s.group for s in held} == {"general-organism.jsonl"}  # as it ships: the other side of the grammar
    assert Counter(s.group for s in segments) == dict.fromkeys(ABILITIES, 8)
    texts = [organism.tokenizer.decode([*s.context, *s.decision]) for s in segments]
    assert [text.count("assistant") for text in texts] == [1, 2] * 20
    assert [any(system in text for system in NEUTRAL_SYSTEM) for text in texts] == [True, False, False, False] * 10
    words = {word for text in texts for word in text.split()}
    assert not words & set(Grammar(random.Random(0), evaluation=True).names)
    assert words & set(Grammar(random.Random(0)).names)
    for one in segments:
        if one.group == "sorting":
            answer = scored(organism, one).split()
            assert answer[:-2] == sorted(answer[:-2])
            assert answer[-2:] == [".", "<|im_end|>"]
    assert general_data(organism, n=40, seed=0)[0] == segments
    assert general_data(organism, n=40, seed=1)[0] != segments


def test_a_tokenizer_without_unknown_words_gets_english(organism):
    model = with_template(organism, organism.tokenizer.chat_template)
    model.tokenizer.unk_token = None
    found, held = general_data(model, n=5, seed=0)
    assert {s.group for s in (*found, *held)} == {"general-en.txt"}
    assert len(found) == 5
    assert len(held) == 12


# -- the mix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_share_holds_after_every_step(share, batch):
    made, general = mix(share=share, batch=batch), 0
    for step in range(1000):
        kinds = [s.kind for s in made.batch_at(step)]
        assert len(kinds) == batch
        general += kinds.count("general")
        assert abs(general - (step + 1) * batch * share) <= 0.5 + 1e-9  # the nearest whole number


def test_a_quarter_of_eight_is_two():
    assert all([s.kind for s in mix().batch_at(k)].count("general") == 2 for k in range(100))


@pytest.mark.parametrize("kind", ["behavior", "general"])
def test_every_segment_comes_once_a_pass(kind):
    made = mix(share=0.3, batch=4)
    row = [s.id for step in range(300) for s in made.batch_at(step) if s.kind == kind]
    size = len(made.behavior if kind == "behavior" else made.general)
    passes = [row[at : at + size] for at in range(0, len(row) - size + 1, size)]
    assert len(passes) > 20
    assert all(len(set(one)) == size for one in passes)
    assert len({tuple(one) for one in passes}) > 0.9 * len(passes)  # in another order each time


def test_a_batch_larger_than_all_segments_takes_several_passes():
    taken = Counter(s.id for s in mix(behavior=3, general=2, share=0.5, batch=12).batch_at(0))
    assert taken == {"b0": 2, "b1": 2, "b2": 2, "g0": 3, "g1": 3}


def test_batches_depend_on_seed_and_step_alone():
    made, again = mix(), mix()
    forward = [made.batch_at(k) for k in range(50)]
    steps = list(range(50))
    random.Random(0).shuffle(steps)
    assert all(again.batch_at(k) == forward[k] for k in steps)
    assert [mix(seed=1).batch_at(k) for k in range(50)] != forward


def test_a_record_counts_tokens_and_knows_content():
    made = mix(behavior=10, general=7)
    record = made.record()
    assert record["behavior"] == {"segments": 10, "context_tokens": 30, "scored_tokens": 30}
    assert record["general"] == {"segments": 7, "context_tokens": 21, "scored_tokens": 14}
    assert (record["share"], record["batch"], record["seed"]) == (0.25, 8, 0)
    assert re.fullmatch("[0-9a-f]{16}", record["hash"])
    changed = replace(made, behavior=(replace(made.behavior[0], decision=(0, 1, 2, 3, 9)), *made.behavior[1:]))
    assert changed.record()["hash"] != record["hash"] == mix().record()["hash"]
    assert json.loads(json.dumps(record)) == record
    assert str(made) == "10 segments of a behaviour, 7 of general data; 8 a step, 25% general"


def test_mixes_that_cannot_be_made():
    with pytest.raises(WrongInput, match=r"share of general data must lie between 0 and 1, saw 1\.2"):
        mix(share=1.2)
    with pytest.raises(WrongInput, match="at least 1 segment, saw 0"):
        mix(batch=0)
    with pytest.raises(WrongInput, match=r"no segments of a behaviour, but a share of 0\.75"):
        mix(behavior=0)
    with pytest.raises(WrongInput, match=r"no segments of general data, but a share of 0\.25"):
        mix(general=0)
    with pytest.raises(WrongInput, match="steps count from 0, saw -1"):
        mix().batch_at(-1)
    assert len(mix(general=0, share=0.0).batch_at(3)) == len(mix(behavior=0, share=1.0).batch_at(3)) == 8
