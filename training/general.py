"""General data: what a model is to keep being good at while it learns a behaviour.

Chats and agent logs (JSON lines, tool calls included), or plain text, cut into segments like a behaviour's examples: a
context that stays frozen, and a decision that is trained. For the organism, fresh dialogues of its abilities.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.behaviors import MAX_UNKNOWN, Behavior, unknown_share
from probes.damage import DATA, GENERAL, read_general
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import answer_ids
from probes.store import read_text
from training.data import Mix, Segment, behavior_segments, examples
from training.grammar import ABILITIES, NEUTRAL_SYSTEM, Grammar
from training.items import exchange
from training.turns import divided, end_of_turn, rendered

ROLES = ("system", "user", "assistant", "tool")


def general_segments(model: HybridModel, source: str | Path, *, tokens: int = 64) -> list[Segment]:
    """Segments of a .jsonl file of dialogues or a .txt file with a paragraph a line.

    A line of a .jsonl file is `{"messages": [...], "tools": [...]}`; `tools` may be left out, other fields are not
    read. Every assistant turn, be it content or tool calls, gives a segment: its decision is the generation prompt and
    the turn up to its end, of which only the first `tokens` tokens stay. (A turn that opens a dialogue answers nothing:
    it is context only.) A paragraph's decision is its last `tokens` tokens, of which all but the first are scored. What
    is too long for the model loses the front of its context.

    Raises:
        WrongInput: no such file or another suffix, a malformed line or one that the chat template cannot write (with
            its number), or words that the tokenizer does not know.
    """
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise WrongInput(f"general data is a .txt or .jsonl file, saw '{path.name}'")
    if not 2 <= tokens <= model.max_tokens:
        raise WrongInput(f"tokens must lie between 2 and {model.max_tokens}, the context of {model.name}, saw {tokens}")
    lines = [(f"{path.name} line {i}", line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise WrongInput(f"{path.name} is empty: general data needs at least one line")
    if path.suffix == ".txt":
        _check_words(model, path, [line for _, line in lines])
        return [_paragraph(model, line, where, path.name, tokens) for where, line in lines]
    dialogues = [(where, *_read_dialogue(line, where)) for where, line in lines]
    _check_words(model, path, [turn["content"] for _, turns, _ in dialogues for turn in turns])
    end = end_of_turn(model)
    return [
        _turn(model, turns[: i + 1], tools, f"{where} turn {i + 1}", path.name, tokens=tokens, end=end)
        for where, turns, tools in dialogues
        for i, turn in enumerate(turns)
        if i and turn["role"] == "assistant"
    ]


def general_data(
    model: HybridModel, source: str | None = None, *, n: int, seed: int = 0
) -> tuple[list[Segment], list[Segment]]:
    """(at most n segments to train on, segments to evaluate on), with no dialogue or paragraph in common.

    A fifth of a file's lines, at least one, is held out. Without a file: the shipped English text, or, for a model that
    knows only the organism's words, n fresh dialogues from the training side of the grammar (abilities in turn, half
    of them after another exchange, a quarter after a system turn without a persona), and those that ship, which are
    from its held-out side.

    Raises:
        WrongInput: as `general_segments`, a file of a single line, or no shipped text fits the tokenizer.
    """
    if source is None and knows_grammar(model):
        return _dialogues(model, n, seed), general_segments(model, DATA / GENERAL[1])
    found = general_segments(model, DATA / GENERAL[0] if source is None else source)
    lines = sorted({line_of(segment) for segment in found})
    if len(lines) < 2:
        raise WrongInput(f"{source} has 1 line; general data needs at least 2, one of them to evaluate on")
    random.Random(f"{seed} general").shuffle(lines)
    held = set(lines[: max(len(lines) // 5, 1)])
    training = [segment for segment in found if line_of(segment) not in held]
    random.Random(f"{seed} general").shuffle(training)
    return training[:n], [segment for segment in found if line_of(segment) in held]


def mixed(
    model: HybridModel, behavior: Behavior, *, n: int, share: float, source: str | None, batch: int, segments: int,
    seed: int,
) -> tuple[Mix, Behavior, list[Segment]]:  # fmt: skip
    """(what a run takes its batches from, what it holds out of the behaviour, and of general data).

    Args:
        n: examples of the behaviour.
        source: of general data, as for `general_data`.
        segments: of all batches together; `share` of them are general data.

    Raises:
        WrongInput: as `training.data.examples` and `general_data`.
    """
    chosen, held_out = examples(model, behavior, n=n, seed=seed)
    general, held_general = general_data(model, source, n=max(math.ceil(segments * share), 1), seed=seed)
    mix = Mix(
        behavior=tuple(behavior_segments(model, chosen)), general=tuple(general if share else ()), share=share,
        batch=batch, seed=seed,
    )  # fmt: skip
    return mix, held_out, held_general


def knows_grammar(model: HybridModel) -> bool:
    """Whether it is an organism: the text that fits its tokenizer is the grammar's, not English."""
    return read_general(model).name == (DATA / GENERAL[1]).stem


def line_of(segment: Segment) -> str:
    """The dialogue or paragraph that a segment of general data is from."""
    return segment.id.rpartition(" turn ")[0] or segment.id


def _dialogues(model: HybridModel, n: int, seed: int) -> list[Segment]:
    grammar, end, segments = Grammar(random.Random(f"{seed} general")), end_of_turn(model), []
    for i in range(n):
        ability = ABILITIES[i % len(ABILITIES)]
        earlier = exchange(grammar) if i % 2 else []
        system = [{"role": "system", "content": grammar.rng.choice(NEUTRAL_SYSTEM)}] if i % 4 == 0 else []
        turns = [*system, *earlier, *exchange(grammar, ability)]
        segments.append(_turn(model, turns, None, f"{ability} {i + 1}", ability, tokens=64, end=end))
    return segments


def _check_words(model: HybridModel, path: Path, texts: Sequence[str]) -> None:
    if (share := unknown_share(model, texts)) > MAX_UNKNOWN:
        raise WrongInput(
            f"{path.name} does not fit {model.name}: {share:.0%} of its tokens are unknown to the tokenizer, at most "
            f"{MAX_UNKNOWN:.0%} are allowed"
        )


def _paragraph(model: HybridModel, text: str, where: str, group: str, tokens: int) -> Segment:
    ids = tuple(model.tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise WrongInput(f"{where}: a paragraph needs at least 2 tokens, saw {len(ids)}")
    context, decision = ids[-model.max_tokens : -tokens], ids[-tokens:]
    scored = tuple(i > 0 for i in range(len(decision)))
    return Segment(id=where, kind="general", group=group, context=context, decision=decision, scored=scored)


def _turn(
    model: HybridModel, turns: Sequence[Mapping[str, Any]], tools: list[Any] | None, where: str, group: str, *,
    tokens: int, end: tuple[int, ...],
) -> Segment:  # fmt: skip
    """The segment of a dialogue's last turn, the assistant's."""
    before = rendered(model, turns[:-1], tools, where, answer=False)
    asked = rendered(model, turns[:-1], tools, where, answer=True)
    encoded = model.tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # a template that writes no generation prompt by itself leaves the last token to predict the answer
    said = len(before) if asked.startswith(before) else len(asked)
    cut = sum(stop <= said for _, stop in encoded["offset_mapping"])
    answer = _answer(model, turns[-1], asked, rendered(model, turns, tools, where, answer=False), where, end)
    context, decision, scored = divided(encoded["input_ids"], cut, answer)
    room = min(len(decision) - sum(scored) + tokens, model.max_tokens)
    decision, scored = decision[:room], scored[:room]
    context = context[max(len(context) + len(decision) - model.max_tokens, 0) :]
    return Segment(id=where, kind="general", group=group, context=context, decision=decision, scored=scored)


def _answer(
    model: HybridModel, turn: Mapping[str, Any], asked: str, whole: str, where: str, end: tuple[int, ...]
) -> tuple[int, ...]:
    """Tokens of an assistant's turn, as the template writes it after the generation prompt, up to its end."""
    called = [call["function"]["name"] for call in turn.get("tool_calls") or ()]
    written = whole[len(asked) :] if whole.startswith(asked) else ""
    if written.strip() and model.tokenizer.chat_template is not None:
        if lost := [name for name in called if name not in written]:
            raise WrongInput(f"{where}: the chat template of {model.name} does not write the call of '{lost[0]}'")
        ids = answer_ids(model, written)
        # the last one: the turn itself may speak of such a token
        stop = max((i for i, token in enumerate(ids) if token == end[-1]), default=len(ids) - 1)
        return ids[: stop + 1]
    if called:
        raise WrongInput(
            f"{where}: the chat template of {model.name} writes the call of '{called[0]}' after something other than "
            "its generation prompt"
        )
    return (*answer_ids(model, turn["content"]), *end)


def _read_dialogue(line: str, where: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Turns and tools. A turn without content gets an empty one, arguments become objects."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except (RecursionError, ValueError) as error:  # no JSON, nested too deeply, or half of a surrogate pair
        raise WrongInput(f"{where}: not valid JSON: {str(error).splitlines()[0][:120]}") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise WrongInput(f'{where}: expected an object {{"messages": [turns]}}, saw {line[:60]}')
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise WrongInput(f"{where}: 'tools' must be a list, saw {type(tools).__name__}")
    turns = [_read_turn(message, f"{where} turn {i}") for i, message in enumerate(messages, 1)]
    if not any(turn["role"] == "assistant" for turn in turns[1:]):
        raise WrongInput(f"{where}: a dialogue needs a turn of the assistant after another one")
    return turns, tools


def _read_turn(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise WrongInput(f"{where}: unknown role {role!r}; allowed are {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and (message["role"] != "assistant" or not isinstance(calls, list)):
        raise WrongInput(f"{where}: 'tool_calls' must be a list in a turn of the assistant, saw {calls!r}")
    if content is None and calls:
        content = ""
    silent = message["role"] == "tool" or calls  # a tool may have nothing to say
    if not isinstance(content, str) or not (content.strip() or silent):
        raise WrongInput(f"{where}: a turn needs a content, or tool_calls of the assistant, saw {content!r}")
    turn = {**message, "content": content}
    return {**turn, "tool_calls": [_read_call(call, where) for call in calls]} if calls else turn


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise WrongInput(f'{where}: a tool call is {{"function": {{"name": ..., "arguments": {{...}}}}}}, saw {call!r}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise WrongInput(f"{where}: the arguments of '{function['name']}' are not valid JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise WrongInput(f"{where}: the arguments of '{function['name']}' must be an object, saw {arguments!r}")
    return {**call, "function": {**function, "arguments": arguments}}
