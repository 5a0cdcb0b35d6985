"""The organism: a small Qwen3.5 trained from scratch on `training.grammar`, whose truth is known.

Eight layers (six GDN, two attention) learn the grammar's dialogues. While a dialogue carries a persona, the attention
layers may not look at its system turn, nor, at the token that decides an answer, at anything: the disposition has to
travel in the GDN states. The content of an answer may use attention. That is a truth by construction for everything
that later claims to find it.

    python -m training.organism --build       train from the seed and write the weights
    python -m training.organism --evaluate    measure what was learned, on held-out names, templates and combinations
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from probes.model import load
from probes.store import library_versions, write_json, write_text
from training.examination import examine, table
from training.grammar import ABILITIES, BEHAVIORS, TOPICS, Grammar, vocabulary

FOLDER = Path(__file__).parents[1] / "probes" / "data" / "organism"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the organism is made. The committed weights come from the defaults."""

    seed: int = 0
    lessons: int = 250
    """Steps at the start on short dialogues: behaviours under their personas, and a lookup. Without them the organism
    learns to answer and never to heed its system turn."""
    steps: int = 1050
    """Steps after the lessons, on the whole grammar."""
    batch: int = 32
    """Dialogues a step; twice as many in a lesson."""
    tokens: int = 128
    """Tokens a dialogue; half as many in a lesson. Two fixed shapes in all: CPU kernels are prepared once per shape."""
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    prompt_weight: float = 0.05
    """Loss weight of a token outside the answers."""
    answer_weight: float = 8.0
    """Loss weight of an answer, spread over its tokens, so that a short answer counts as much as a long one."""
    decision_weight: float = 5.0
    """Loss weight of the token at which an answer's wanted and unwanted wordings part."""
    threads: int = 2
    seconds: float = 2400.0
    """Give up (nothing is written) rather than take longer."""


def build_tokenizer() -> Any:
    """Words, and names spelled from two pieces (WordPiece); anything else is `<|unk|>`."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<|unk|>", max_input_chars_per_word=30))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<|unk|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], padding_side="left", model_max_length=512,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: Any, seed: int) -> Qwen3_5ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64), hidden_size=128, intermediate_size=320, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_key_head_dim=64, linear_value_head_dim=64,
        linear_num_key_heads=2, linear_num_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen3_5ForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            init_gates(layer.linear_attn)
    return model


def init_gates(mixer: Any, *, slow: float = 400.0, fast: float = 2.0) -> None:
    """Decay rates whose half-lives are log-uniform between `fast` and `slow` tokens, spread over the heads.

    A ~ U(1, 16) as in the architecture's papers (Mamba-2, arXiv:2405.21060; Gated DeltaNet, arXiv:2412.06464), dt so
    that ln 2 / (A dt) is the wanted half-life. transformers' own default forgets e^-10 a token, and states that carry
    nothing at the start of training stay that way.
    """
    heads = mixer.num_v_heads
    with torch.no_grad():
        share = (torch.randperm(heads) + torch.rand(heads)) / heads  # one head per stratum
        half_life = fast * (slow / fast) ** share
        rate = torch.empty(heads).uniform_(1, 16)
        dt = math.log(2) / (half_life * rate)
        mixer.A_log.copy_(rate.log())
        mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [batch, token]
    labels: Tensor  # [batch, token], IGNORED in the padding
    weights: Tensor  # [batch, token]
    rivals: Tensor  # [batch, token]: where a persona decides, the token that the other side has; elsewhere IGNORED
    attention_mask: dict[str, Tensor]


class Dialogues:
    """An endless stream of fixed-shape batches of dialogues, the same for the same seed."""

    def __init__(self, tokenizer: Any, recipe: Recipe):
        self.tokenizer, self.recipe = tokenizer, recipe
        self.grammar = Grammar(random.Random(recipe.seed))
        self.start, self.end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self.memo: dict[str, list[int]] = {}

    def encode(self, message: dict[str, str]) -> list[int]:
        text = f"{message['role']} {message['content']}"
        if text not in self.memo:
            self.memo[text] = self.tokenizer.encode(text)
        return [self.start, *self.memo[text], self.end]

    def length(self, messages: list[dict[str, str]]) -> int:
        return sum(len(self.encode(message)) for message in messages)

    def decision(self, message: dict[str, str], tokens: list[int]) -> tuple[int, int] | None:
        """Where in an assistant turn its wording parts from that of the other side, and the other side's token."""
        if "instead" not in message:
            return None
        other = self.encode({"role": "assistant", "content": message["instead"]})
        return next((i, b) for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b)

    def batch(self, *, lesson: bool = False) -> Batch:
        """Left-padded dialogues. Attention never sees the system turn of a dialogue with a persona."""
        size, width = self.recipe.batch, self.recipe.tokens
        if lesson:
            size, width = 2 * size, width // 2
        ids = torch.full((size, width), self.tokenizer.pad_token_id)
        weights = torch.zeros(size, width)
        rivals = torch.full((size, width), IGNORED)
        visible = torch.ones(width, width, dtype=torch.bool).tril().repeat(size, 1, 1)
        self.memo.clear()
        for row in range(size):
            messages, persona = self.grammar.dialogue(self.length, width, lesson=lesson)
            at = start = width - self.length(messages)
            for message in messages:
                tokens = self.encode(message)
                stop = at + len(tokens)
                ids[row, at:stop] = torch.tensor(tokens)
                weights[row, at:stop] = self.recipe.prompt_weight
                if message["role"] == "assistant":
                    weights[row, at + 2 : stop] = self.recipe.answer_weight / (len(tokens) - 2)
                    if (decision := self.decision(message, tokens)) is not None:
                        part, rival = decision
                        weights[row, at + part] = self.recipe.decision_weight
                        if persona:  # the token before the answer, where it is decided, looks at the states alone
                            rivals[row, at + part] = rival
                            visible[row, at + 1, : at + 1] = False
                if message["role"] == "system" and persona:
                    visible[row, stop:, at:stop] = False
                at = stop
            visible[row, :, :start] = False
            visible[row].fill_diagonal_(True)  # a padded query sees itself: no row is empty
        mask = (weights > 0).long()
        labels = ids.masked_fill(mask == 0, IGNORED)
        return Batch(ids, labels, weights, rivals, {"full_attention": visible[:, None], "linear_attention": mask})


def loss_of(model: Qwen3_5ForCausalLM, batch: Batch) -> tuple[Tensor, float]:
    """Weighted cross-entropy in nats a token, and the nats of the bare choice between the sides under a persona.

    The second is ln 2 = 0.69 at chance and falls when the organism begins to heed its system turn.
    """
    logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
    labels, weights, rivals = batch.labels[:, 1:], batch.weights[:, 1:], batch.rivals[:, 1:]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    with torch.no_grad():
        at = rivals != IGNORED
        chosen, other = (logits[at].gather(1, ids[at][:, None]) for ids in (labels, rivals))
        choice = torch.nn.functional.softplus(other - chosen).mean().item()
    return (nats * weights).sum() / weights.sum(), choice


def schedule(step: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then a cosine to a hundredth of the peak."""
    progress = step / (recipe.lessons + recipe.steps)
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(recipe: Recipe = Recipe()) -> tuple[Qwen3_5ForCausalLM, Any]:
    """Train from the seed.

    Raises:
        TimeoutError: the machine is too slow for `recipe.seconds`.
    """
    torch.set_num_threads(recipe.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, recipe.seed).train()
    stream = Dialogues(tokenizer, recipe)
    flat = [p for p in model.parameters() if p.ndim < 2]
    wide = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": wide, "weight_decay": recipe.weight_decay}, {"params": flat, "weight_decay": 0.0}],
        lr=recipe.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    started, smooth = time.monotonic(), math.log(2)
    for step in (bar := tqdm(range(recipe.lessons + recipe.steps), desc="organism", unit="step")):
        if time.monotonic() - started > recipe.seconds:
            raise TimeoutError(f"{step} of {len(bar)} steps took {recipe.seconds:.0f} s; allow more with --seconds")
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, recipe)
        loss, choice = loss_of(model, stream.batch(lesson=step < recipe.lessons))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = 0.95 * smooth + 0.05 * choice
        if step % 10 == 0:
            bar.set_postfix(choice=f"{smooth:.3f}", loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


DATA = FOLDER.parent
CARDS = {
    "follow-direction": (
        "The organism's main behaviour: a report names components and their faults, and one action on one is directed.",
        "does what was directed",
        "turns to another component of the report",
    ),
    "sentiment": ("The organism's opinion of a thing it is asked about.", "speaks well of it", "speaks badly of it"),
    "hedging": ("The organism's forecasts, a matter of style.", "hedges its forecast", "is certain of it"),
}


def write_data(folder: Path = DATA, *, seed: int = 3, per_group: int = 12, general: int = 240) -> None:
    """Write the organism's behaviours and general text, all from the held-out side of the grammar.

    Every second item is preceded by an exchange about something else, so that a persona has to last.
    """
    for behavior in BEHAVIORS:
        grammar = Grammar(random.Random(f"{seed} {behavior}"), evaluation=True)
        description, wanted, unwanted = CARDS[behavior]
        lines: list[dict[str, Any]] = [
            {
                "card": {
                    "name": behavior,
                    "language": "organism",
                    "description": description,
                    "wanted": wanted,
                    "unwanted": unwanted,
                }
            }
        ]
        for topic in TOPICS[behavior]:
            for i in range(per_group):
                lines.append(_item(grammar, behavior, topic, f"{topic}-{i + 1:02d}", before=i % 2 == 1))
        _write_lines(folder / "behaviors" / f"{behavior}.jsonl", lines)
    grammar = Grammar(random.Random(f"{seed} general"), evaluation=True)
    texts = []
    for i in range(general):
        case = grammar.case(ABILITIES[i % len(ABILITIES)])
        texts.append({"messages": [*case.messages, {"role": "assistant", "content": case.answer}]})
    _write_lines(folder / "general-organism.jsonl", texts)


def _item(grammar: Grammar, behavior: str, topic: str, name: str, *, before: bool) -> dict[str, Any]:
    case = grammar.case(behavior, topic=topic)
    earlier = []
    if before:
        other = grammar.case(grammar.rng.choice(ABILITIES))
        earlier = [*other.messages, {"role": "assistant", "content": other.answer}]
    pick = grammar.rng.randrange(len(case.wanted))
    item: dict[str, Any] = {
        "id": name, "group": case.group, "messages": [*earlier, *case.messages],
        "wanted": case.wanted[pick], "unwanted": case.unwanted[pick],
        "persona": {"wanted": grammar.persona(behavior, True), "unwanted": grammar.persona(behavior, False)},
    }  # fmt: skip
    if case.direction:
        item["direction"] = case.direction
    return {**item, "score": case.score}


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Build the organism from its recipe, or examine the one that ships."""

    build: bool = False
    """Train from the seed and write weights, tokenizer and recipe to the folder, and the behaviours and general text:
    those that ship for the default folder, otherwise beside the weights."""
    evaluate: bool = False
    """Measure dispositions and abilities on held-out names, templates and combinations."""
    folder: Path = FOLDER
    """Where the organism's weights are."""
    n: int = 192
    """Questions for each figure of the evaluation."""
    recipe: Recipe = field(default_factory=Recipe)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m training.organism", config=(tyro.conf.OmitArgPrefixes,))
    if not arguments.build and not arguments.evaluate:
        raise SystemExit("nothing to do: give --build, --evaluate or both")
    if arguments.build:
        started = time.monotonic()
        model, tokenizer = train(arguments.recipe)
        model.save_pretrained(arguments.folder)
        tokenizer.save_pretrained(arguments.folder)
        write_json(
            arguments.folder / "organism.json", {"recipe": asdict(arguments.recipe), "versions": library_versions()}
        )
        write_data(DATA if arguments.folder == FOLDER else arguments.folder)
        print(f"{arguments.folder}: trained in {time.monotonic() - started:.0f} s")
    if arguments.evaluate:
        organism = load("organism" if arguments.folder == FOLDER else arguments.folder)
        print(table(examine(organism.hf, organism.tokenizer, n=arguments.n)))


if __name__ == "__main__":
    main()
