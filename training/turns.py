"""How a model's chat template writes turns, and how the tokens divide between what was asked and what is answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from probes.errors import WrongInput
from probes.model import HybridModel

PLAIN = (  # for a base model, which has no chat template: what probes.prompts.render writes
    "{{ begin }}{% for turn in messages %}{{ turn['role'] | capitalize }}: {{ turn['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def divided(
    prompt: Sequence[int], cut: int, answer: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """(context, decision, scored): at least one token of the prompt goes into the decision, to predict the answer."""
    cut = max(min(cut, len(prompt) - 1), 0)
    decision = (*prompt[cut:], *answer)
    scored = tuple(i >= len(prompt) - cut and i > 0 for i in range(len(decision)))
    return tuple(prompt[:cut]), decision, scored


def end_of_turn(model: HybridModel) -> tuple[int, ...]:
    """What follows an assistant's content: up to the first special token, or the end-of-text token where none does."""
    tokenizer, content = model.tokenizer, "answer"
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": content}]
        written = rendered(model, turns, None, "the end of a turn", answer=False).rpartition(content)[2]
        ids = tuple(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"])
        special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        special.discard(tokenizer.unk_token_id)  # a word that is not known ends nothing
        if (stop := next((i for i, token in enumerate(ids) if token in special), None)) is not None:
            return ids[: stop + 1]
    if tokenizer.eos_token_id is None:
        raise WrongInput(f"the tokenizer of {model.name} has no token that ends a turn: no special token, no eos token")
    return (tokenizer.eos_token_id,)


def rendered(
    model: HybridModel, turns: Iterable[Mapping[str, Any]], tools: list[Any] | None, where: str, *, answer: bool
) -> str:
    """The turns as the chat template writes them, with the generation prompt if `answer`."""
    tokenizer, turns = model.tokenizer, [dict(turn) for turn in turns]
    plain: dict[str, Any] = {}
    if tokenizer.chat_template is None:
        first = tokenizer("a")["input_ids"][:1]
        begin = tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""
        plain = {"chat_template": PLAIN, "begin": begin}
    try:
        return tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=answer, enable_thinking=False, **plain
        )
    except (TemplateError, TypeError, ValueError) as error:  # what templates raise for turns they do not know
        roles = ", ".join(turn["role"] for turn in turns)
        raise WrongInput(f"{where}: the chat template refuses these turns ({roles}): {error}") from error
