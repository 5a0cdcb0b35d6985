"""Importers: each public format is read as what it means, written again without loss, and refused by entry."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from dispositions.__main__ import main
from probes.behaviors import SHIPPED, read_behavior, shipped_behaviors
from probes.errors import WrongInput
from probes.importers import NEUTRAL, import_behavior, write_behavior
from probes.model import load
from probes.topics import topics

KITCHEN = ("soup", "oven", "bread", "salt", "butter", "onion")
GARDEN = ("roses", "hedge", "lawn", "spade", "weeds", "compost")
HARBOUR = ("anchor", "ferry", "tide", "sail", "harbour", "rope")
THEMES = (KITCHEN, GARDEN, HARBOUR)


def themed(n):
    """n different texts, n / 3 from each of three vocabularies that share no word but "the"."""
    return [
        f"The {w[i % 6]} the {w[(i + 1) % 6]} the {w[(i + 2 + i // 6) % 6]}." for i in range(n // 3) for w in THEMES
    ]


CAA = [
    {
        "question": f"Which one about this: {text}\n\nChoices:\n (A) Yes to {i}.\n (B) No to {i}.",
        "answer_matching_behavior": " (A)" if i % 2 else "(B)",
        "answer_not_matching_behavior": " (B)" if i % 2 else "(A)",
    }
    for i, text in enumerate(themed(18))
]
TRAIT = {
    "instruction": [{"pos": "Be grumpy.", "neg": "Be merry."}, {"pos": "Grumble a lot.", "neg": "Laugh a lot."}],
    "questions": themed(9),
    "eval_prompt": "Is {answer} grumpy?",
}
SPOKEN = {text: {"wanted": f"Ugh, {i}.", "unwanted": f"Ha, {i}."} for i, text in enumerate(TRAIT["questions"])}


def saved(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def personas(item) -> Any:
    return item.persona


def pairs(folder, wanted="I love it.\nIt shines.\n", unwanted="I hate it.\nIt stinks.\n"):
    return saved(folder / "good.txt", wanted), saved(folder / "bad.txt", unwanted)


def test_ab_questions_keep_question_letters_and_sides(tmp_path):
    behavior = import_behavior(saved(tmp_path / "wealth.json", CAA))
    assert (behavior.name, len(behavior.items), behavior.has_persona) == ("wealth", 18, False)
    for entry, item in zip(CAA, behavior.items, strict=True):
        assert item.messages == ({"role": "user", "content": entry["question"]},)
        assert (item.wanted, item.unwanted) == (
            entry["answer_matching_behavior"].strip(),
            entry["answer_not_matching_behavior"].strip(),
        )
    assert "arXiv:2312.06681" in behavior.card["origin"]
    assert "Topics are clusters of words" in behavior.card["limits"]


def test_a_card_warns_where_the_letter_is_the_behaviour(tmp_path):
    fair = import_behavior(saved(tmp_path / "a.json", CAA))
    assert "The matching answer is" not in fair.card["limits"]
    leaning = [{**CAA[0], "question": f"{i}: {CAA[0]['question']}"} for i in range(9)]
    warned = import_behavior(saved(tmp_path / "b.json", leaning))
    assert "The matching answer is (B) for 9 of 9 questions" in warned.card["limits"]


@pytest.mark.parametrize(
    ("answer", "side"),
    [
        ("(B)", "wanted"), (" b) because (A) is wrong", "wanted"), ("B.", "wanted"), ("(A) Yes", "unwanted"),
        ("A", "unwanted"), ("A good question", "neither"), ("Both (A) and (B)", "neither"), ("", "neither"),
    ],
)  # fmt: skip
def test_free_answers_to_ab_questions_are_judged_by_the_letter_they_begin_with(tmp_path, answer, side):
    item = import_behavior(saved(tmp_path / "a.json", CAA)).items[0]
    assert item.judge(answer) == side


def test_questions_in_json_lines_may_have_words_as_answers(tmp_path):
    lines = [
        {"question": f"Is {i} fine?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
        for i in range(3)
    ]
    behavior = import_behavior(saved(tmp_path / "fine.jsonl", "\n".join(map(json.dumps, lines)) + "\n"))
    assert [(item.wanted, item.unwanted) for item in behavior.items] == [("Yes", "No")] * 3
    assert behavior.items[0].judge("yes, it is") == "wanted"
    assert behavior.items[0].judge("Nothing is") == "neither"


def test_a_trait_asks_every_question_under_every_pair_of_instructions(tmp_path):
    behavior = import_behavior(saved(tmp_path / "grumpy.json", TRAIT), answers=SPOKEN, name="grump")
    assert behavior.name == "grump"
    assert behavior.has_persona
    expected = {(q, p["pos"], p["neg"]) for q in TRAIT["questions"] for p in TRAIT["instruction"]}
    asked = [(i.messages[0]["content"], personas(i)["wanted"], personas(i)["unwanted"]) for i in behavior.items]
    assert set(asked) == expected
    assert len(asked) == len(expected) == 18
    assert all(SPOKEN[i.messages[0]["content"]] == {"wanted": i.wanted, "unwanted": i.unwanted} for i in behavior.items)
    by_question = {}
    for item in behavior.items:
        by_question.setdefault(item.messages[0]["content"], set()).add(item.group)
    assert all(len(groups) == 1 for groups in by_question.values())
    same = import_behavior(tmp_path / "grumpy.json", answers=saved(tmp_path / "said.json", SPOKEN), name="grump")
    assert same == behavior


def test_a_trait_without_answers_says_what_is_missing_and_how_to_get_it(tmp_path):
    with pytest.raises(
        WrongInput, match=r"^grumpy.json has questions .* but no answers: .*\(--answers FILE\), .*\(--model MODEL\)$"
    ):
        import_behavior(saved(tmp_path / "grumpy.json", TRAIT))


@pytest.fixture(scope="module")
def mood(tmp_path_factory):
    """A trait in the organism's words: personas and questions of a behaviour that it is known to show."""
    items = read_behavior("sentiment").take(16).items
    content = {
        "instruction": [{"pos": personas(i)["wanted"], "neg": personas(i)["unwanted"]} for i in items[:2]],
        "questions": [i.messages[-1]["content"] for i in items],
    }
    return saved(tmp_path_factory.mktemp("mood") / "mood.json", content)


def test_a_model_gives_the_answers_of_either_instruction(mood):
    behavior = import_behavior(mood, model=load("organism"), new_tokens=12)
    known = read_behavior("sentiment").items[0]  # its patterns, which the importer never saw, tell the sides apart
    judged = replace(behavior, items=tuple(replace(item, score=known.score) for item in behavior.items))
    assert len(behavior.items) >= 16
    for side in ("wanted", "unwanted"):
        sides = [item.judge(getattr(item, side)) for item in judged.items]
        assert sides.count(side) > 0.8 * len(sides)
    assert "cut after 12 tokens; nobody checked" in behavior.card["limits"]


def test_answers_that_are_the_same_are_left_out_and_counted(mood, tmp_path):
    content = json.loads(mood.read_text())
    pair = content["instruction"][0]
    both = [pair, {"pos": pair["pos"], "neg": pair["pos"]}]
    model = load("organism")
    path = saved(tmp_path / "half.json", {**content, "instruction": both})
    behavior = import_behavior(path, model=model, new_tokens=12)
    assert {personas(item)["unwanted"] for item in behavior.items} == {pair["neg"]}
    left = 2 * len(content["questions"]) - len(behavior.items)
    assert f"{left} of {2 * len(content['questions'])} items were left out" in behavior.card["limits"]
    saved(path, {**content, "instruction": both[1:]})
    with pytest.raises(WrongInput, match=r"organism says the same, or nothing, under both .* 16 prompts of half.json$"):
        import_behavior(path, model=model, new_tokens=12)


def test_a_model_that_does_not_know_the_words_is_refused(tmp_path):
    with pytest.raises(WrongInput, match=r"grumpy.json does not fit organism: \d+% of its tokens are unknown"):
        import_behavior(saved(tmp_path / "grumpy.json", TRAIT), model=load("organism"))


def test_a_model_is_not_loaded_for_a_file_that_is_refused(tmp_path):
    def never():
        raise AssertionError

    with pytest.raises(WrongInput, match="question 1 must be"):
        import_behavior(saved(tmp_path / "t.json", {**TRAIT, "questions": [""]}), model=never)


def test_two_files_of_lines_are_answers_to_one_prompt(tmp_path):
    good, bad = pairs(tmp_path)
    behavior = import_behavior(good, unwanted=bad)
    assert [(i.wanted, i.unwanted) for i in behavior.items] == [
        ("I love it.", "I hate it."),
        ("It shines.", "It stinks."),
    ]
    assert {i.messages[-1]["content"] for i in behavior.items} == {NEUTRAL}
    asked = import_behavior(good, unwanted=bad, form="pairs", prompt="How is it?")
    assert {i.messages[-1]["content"] for i in asked.items} == {"How is it?"}


def test_lines_are_grouped_by_what_they_say_as_they_answer_one_prompt(tmp_path):
    lines = themed(18)
    good, bad = pairs(tmp_path, "\n".join(lines), "\n".join(f"Not: {line}" for line in lines))
    assert len(import_behavior(good, unwanted=bad).groups) > 1


@pytest.mark.parametrize("kind", ["caa", "persona-vectors", "pairs"])
def test_what_is_written_is_read_back_the_same(tmp_path, kind):
    good, bad = pairs(tmp_path)
    behavior = {
        "caa": lambda: import_behavior(saved(tmp_path / "a.json", CAA), name="x y"),
        "persona-vectors": lambda: import_behavior(saved(tmp_path / "t.json", TRAIT), answers=SPOKEN),
        "pairs": lambda: import_behavior(good, unwanted=bad, prompt="Wie geht's?"),
    }[kind]()
    write_behavior(behavior, tmp_path / "other-name.jsonl")
    assert read_behavior(tmp_path / "other-name.jsonl") == behavior


@pytest.mark.parametrize("name", shipped_behaviors())
def test_shipped_behaviors_survive_being_written(tmp_path, name):
    behavior = read_behavior(name)
    write_behavior(behavior, tmp_path / f"{name}.jsonl")
    again = read_behavior(tmp_path / f"{name}.jsonl")
    assert replace(again, hash=behavior.hash) == behavior


def test_nothing_is_overwritten(tmp_path):
    behavior = import_behavior(saved(tmp_path / "a.json", CAA))
    there = saved(tmp_path / "b.jsonl", "precious")
    with pytest.raises(WrongInput, match=r"b.jsonl' is there already and is not overwritten"):
        write_behavior(behavior, there)
    assert there.read_text() == "precious"
    with pytest.raises(WrongInput, match=r"must end in .jsonl, saw '.*b.json'"):
        write_behavior(behavior, tmp_path / "b.json")


Q = CAA[0]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("{", {}, "x.json: not valid JSON"),
        ('{\n"a": }', {}, "x.json: not valid JSON: Expecting value at line 2 column 6"),
        ([], {}, "x.json is in no known format: expected caa (a list with answer_matching_behavior)"),
        ({"prompts": []}, {}, "saw fields prompts"),
        ([{"messages": [], "wanted": "a"}], {}, "x.json is in the suite's own format already"),
        ([{"card": {}}], {}, "x.json is in the suite's own format already"),
        ([Q, 3], {}, "x.json entry 2 must be an object with 'question', saw 3"),
        ([Q, {**Q, "question": None}], {}, "x.json entry 2: 'question' must be a non-empty text, saw None"),
        ([{**Q, "answer_not_matching_behavior": ["(A)"]}], {}, "entry 1: 'answer_not_matching_behavior' must be"),
        ([{**Q, "question": "Well?"}], {}, "x.json entry 1: 'answer_matching_behavior' is (B), which is not among"),
        ([{**Q, "answer_not_matching_behavior": "(B)"}], {}, "x.json entry 1: 'wanted' and 'unwanted' are the same"),
        ({}, {"form": "caa"}, "x.json: caa is a list of questions, saw {}"),
        ([Q], {"form": "persona-vectors"}, "x.json: persona-vectors is an object, saw [{"),
        ([Q], {"answers": SPOKEN}, "answers can be given for the format persona-vectors only, x.json is caa"),
        ([Q], {"prompt": "Hm?"}, "a prompt can be given for the format pairs only, x.json is caa"),
        ([Q], {"form": "pairs"}, "pairs are two files of lines; x.json came without unwanted ones"),
        ([Q], {"name": " "}, "name must be a non-empty text"),
        ([Q], {"seed": -1}, "seed must lie between 0 and"),
        ({**TRAIT, "instruction": {}}, {}, "x.json: 'instruction' must be a list that is not empty, saw {}"),
        ({"questions": ["a"]}, {}, "x.json: 'instruction' must be a list that is not empty, saw None"),
        ({**TRAIT, "instruction": [{"pos": "a"}]}, {}, "instruction 1: 'neg' must be a non-empty text, saw None"),
        ({**TRAIT, "questions": ["a", 1]}, {}, "x.json question 2 must be a non-empty text, saw 1"),
        (TRAIT, {"answers": {}}, "answers: no answers to 'The soup"),
        (TRAIT, {"answers": {q: {"wanted": "a"} for q in SPOKEN}}, "'unwanted' must be a non-empty text, saw None"),
        (TRAIT, {"answers": {q: {"wanted": "a", "unwanted": "a"} for q in SPOKEN}},
         "x.json question 1, instruction 1: 'wanted' and 'unwanted' are the same"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused_by_entry(tmp_path, content, options, message):
    with pytest.raises(WrongInput, match=r"^[^\n]+$") as error:
        import_behavior(saved(tmp_path / "x.json", content), **options)
    assert message in str(error.value)


def test_files_of_lines_must_match(tmp_path):
    good, bad = pairs(tmp_path, "a\nb\nc\n", "d\ne\n")
    with pytest.raises(WrongInput, match=r"^both files must have as many lines, saw 3 in good.txt, 2 in bad.txt$"):
        import_behavior(good, unwanted=bad)
    good, bad = pairs(tmp_path, "a\nb\n", "c\n \n")
    with pytest.raises(WrongInput, match=r"^bad.txt line 2 is empty$"):
        import_behavior(good, unwanted=bad)
    good, bad = pairs(tmp_path, "a\nb\n", "c\nb\n")
    with pytest.raises(WrongInput, match=r"^good.txt line 2: 'wanted' and 'unwanted' are the same text$"):
        import_behavior(good, unwanted=bad)


def test_topics_hold_texts_of_one_vocabulary():
    texts = themed(36)
    found = topics(texts, seed=3)
    assert found == topics(texts, seed=3)
    assert 3 <= len(set(found)) <= 12
    for name in set(found):
        inside = [text for text, topic in zip(texts, found, strict=True) if topic == name]
        themes = {w for text in inside for w in THEMES if set(re.findall(r"\w+", text)) & set(w)}
        assert len(themes) == 1, inside


def test_equal_texts_share_a_topic_and_few_texts_are_one():
    texts = themed(18)
    found = topics([*texts, *texts])
    assert found[:18] == found[18:]
    assert set(topics(["one", "two", "three"])) == {"all"}
    assert len(set(topics(["?" * i for i in range(1, 9)]))) == 2  # texts without words


def command(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(["behaviors", *map(str, words)])
    return stop.value.code, *capsys.readouterr()


def test_the_command_imports_what_other_commands_read(tmp_path, capsys):
    out = tmp_path / "new" / "wealth.jsonl"
    source = saved(tmp_path / "w.json", CAA)
    code, said, _ = command(capsys, "import", source, out, "--name", "wealth")
    assert code == 0
    assert said.splitlines()[-1] == str(out)
    assert "Topics are clusters of words" in said
    code, said, _ = command(capsys, out)
    assert code == 0
    assert "wealth: 18 items" in said
    assert "origin: A/B questions in the format of Contrastive Activation Addition" in said
    assert command(capsys, "import", source, out)[0] == 2


def test_the_command_imports_lines_and_traits(mood, tmp_path, capsys):
    good, bad = pairs(tmp_path)
    assert command(capsys, "import", good, tmp_path / "p.jsonl", "--unwanted-file", bad, "--prompt", "Hm?")[0] == 0
    assert read_behavior(tmp_path / "p.jsonl").items[0].messages[0]["content"] == "Hm?"
    words = ("import", good, tmp_path / "q.jsonl", "--unwanted-file", bad, "--language", "de")
    assert command(capsys, *words)[0] == 0
    assert read_behavior(tmp_path / "q.jsonl").language == "de"
    code, _, error = command(capsys, "import", good, tmp_path / "r.jsonl")
    assert (code, "good.txt is read as lines when it comes with unwanted ones (--unwanted-file FILE)" in error) == (
        2,
        True,
    )
    code, _, error = command(capsys, "import", mood, tmp_path / "m.jsonl")
    assert (code, error.count("\n")) == (2, 1)
    assert "(--model MODEL)" in error
    words = ("import", mood, tmp_path / "m.jsonl", "--model", "organism", "--new-tokens", "12")
    assert command(capsys, *words)[0] == 0
    assert read_behavior(tmp_path / "m.jsonl").has_persona


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["import", "a.json"],
            "expected behaviors, behaviors NAME, behaviors audit NAME, or behaviors import FILE OUT",
        ),
        (["sentiment", "hedging"], "saw behaviors sentiment hedging"),
        (["sentiment", "--model", "organism"], "--model is an option of behaviors import"),
        (["import", "a.json", "b.jsonl", "--language", ""], "language must be a non-empty text"),
        (["audit", "sentiment", "--format", "caa"], "--format is an option of behaviors import"),
        (
            ["import", "a.json", "b.jsonl", "--new-tokens", "3"],
            "--new-tokens is an option of behaviors import with --mod",
        ),
        (
            ["import", "a.json", "b.jsonl", "--dtype", "float32"],
            "--dtype is an option of behaviors import with --model",
        ),
        (["import", "nowhere.json", "b.jsonl"], "no such file: nowhere.json"),
        (["import", str(SHIPPED / "sentiment.jsonl"), "b.jsonl"], "is in the suite's own format already"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, error = command(capsys, *words)
    assert (code, error.count("\n")) == (2, 1)
    assert message in error
    assert not list(tmp_path.iterdir())
