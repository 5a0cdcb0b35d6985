"""The organism: a small Qwen3.5 trained from scratch on `training.grammar`, whose truth is known.

Eight layers (six GDN, two attention) learn the grammar's dialogues. While a dialogue carries a persona, the attention
layers may not look at its system turn, nor, at the token that decides an answer, at anything: the disposition has to
travel in the GDN states. The content of an answer may use attention. That is a truth by construction for everything
that later claims to find it.

Two controls of four layers learn the same grammar with one carrier only. In them nothing is hidden from attention; the
other carrier is taken away by parameters that training does not reach:

- `organism-state`: the output projection of its attention is zero. Whatever crosses tokens does so in the states (and,
  over three tokens a layer, in the convolutions of the GDN layers). Its attention layer is there because the cache of
  transformers needs one.
- `organism-attention`: its states lose all they hold at every token. Whatever crosses tokens does so by attention,
  except for the convolutions of its two GDN layers: they reach back three tokens each, six in all, which is less than
  the way from a system turn to an answer.

    python -m training.organism --build                    train from the seed and write the weights
    python -m training.organism --evaluate                 measure what was learned, on held-out names, templates and
                                                           combinations
    python -m training.organism --build --kind attention   the same for a control (state, attention)
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from probes.model import ORGANISMS, load
from probes.store import library_versions, write_json
from training.examination import examine, table
from training.grammar import Grammar, vocabulary
from training.items import write_data

Kind = Literal["hybrid", "state", "attention"]
NAMES: dict[Kind, str] = {"hybrid": "organism", "state": "organism-state", "attention": "organism-attention"}
GDN, ATTENTION = "linear_attention", "full_attention"
LAYERS: dict[Kind, list[str]] = {
    "hybrid": 2 * [GDN, GDN, GDN, ATTENTION],
    "state": [GDN, GDN, GDN, ATTENTION],
    "attention": 2 * [GDN, ATTENTION],
}
FORGETFUL = (16.0, 8.0)  # A and dt_bias that decay a state by 16 softplus(8) = 128 nats a token: e^-128 is 0 in float32
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an organism is made. The committed weights of each kind come from the defaults."""

    kind: Kind = "hybrid"
    """hybrid is the organism; state and attention are its controls, in which the other carrier is taken away."""
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
    noise: float = 0.2
    """Share of the words in users' turns that are replaced by any others, in every second dialogue of a control (never
    in the organism's). Without it organism-attention knew a question by its template's wording alone: to some held-out
    templates it said "noted ." or a number, whatever the persona. The price is that names are hardly ever copied."""
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


def build_model(tokenizer: Any, seed: int, kind: Kind = "hybrid") -> Qwen3_5ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=64 * math.ceil(len(tokenizer) / 64), hidden_size=128, intermediate_size=320,
        num_hidden_layers=len(LAYERS[kind]), layer_types=list(LAYERS[kind]),
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_key_head_dim=64, linear_value_head_dim=64,
        linear_num_key_heads=2, linear_num_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen3_5ForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer, "linear_attn"):
            init_gates(layer.linear_attn)
    take_away(model, kind)
    return model


@torch.no_grad()
def take_away(model: Any, kind: Kind) -> None:
    """Fix the parameters by which a control does without one of the carriers: they get no gradient and no decay."""
    for layer in model.model.layers:
        if kind == "state" and hasattr(layer, "self_attn"):
            layer.self_attn.requires_grad_(False)
            layer.self_attn.o_proj.weight.zero_()
        elif kind == "attention" and hasattr(layer, "linear_attn"):
            mixer = layer.linear_attn
            for parameter in (mixer.A_log, mixer.dt_bias, mixer.in_proj_a.weight):
                parameter.requires_grad_(False)
            mixer.A_log.fill_(math.log(FORGETFUL[0]))
            mixer.dt_bias.fill_(FORGETFUL[1])
            mixer.in_proj_a.weight.zero_()


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
        self.noise = random.Random(f"{recipe.seed} noise")
        self.words = range(len(SPECIAL), len(tokenizer))

    def encode(self, message: dict[str, str]) -> list[int]:
        text = f"{message['role']} {message['content']}"
        if text not in self.memo:
            self.memo[text] = self.tokenizer.encode(text)
        return [self.start, *self.memo[text], self.end]

    def garble(self, tokens: list[int]) -> list[int]:
        """A turn in which some words are replaced by any others; its role and its ends are kept."""

        def word(token: int) -> int:
            return self.noise.choice(self.words) if self.noise.random() < self.recipe.noise else token

        return [*tokens[:2], *map(word, tokens[2:-1]), tokens[-1]]

    def length(self, messages: list[dict[str, str]]) -> int:
        return sum(len(self.encode(message)) for message in messages)

    def decision(self, message: dict[str, str], tokens: list[int]) -> tuple[int, int] | None:
        """Where in an assistant turn its wording parts from that of the other side, and the other side's token."""
        if "instead" not in message:
            return None
        other = self.encode({"role": "assistant", "content": message["instead"]})
        return next((i, b) for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b)

    def batch(self, *, lesson: bool = False) -> Batch:
        """Left-padded dialogues. The organism's attention never sees the system turn of a dialogue with a persona."""
        blind = self.recipe.kind == "hybrid"  # a control may look wherever it can
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
                if row % 2 and message["role"] == "user" and not blind:
                    tokens = self.garble(tokens)
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
                            visible[row, at + 1, : at + 1] &= not blind
                if message["role"] == "system" and persona and blind:
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
    model = build_model(tokenizer, recipe.seed, recipe.kind).train()
    stream = Dialogues(tokenizer, recipe)
    learning = [p for p in model.parameters() if p.requires_grad]  # the others are out of reach of weight decay too
    flat = [p for p in learning if p.ndim < 2]
    wide = [p for p in learning if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": wide, "weight_decay": recipe.weight_decay}, {"params": flat, "weight_decay": 0.0}],
        lr=recipe.lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    started, smooth = time.monotonic(), math.log(2)
    for step in (bar := tqdm(range(recipe.lessons + recipe.steps), desc=NAMES[recipe.kind], unit="step")):
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


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Build an organism from its recipe, or examine the one that ships."""

    build: bool = False
    """Train from the seed and write weights, tokenizer and recipe to the folder, and the behaviours and general text:
    those that ship for the organism's own folder, otherwise beside the weights. The controls share the organism's."""
    evaluate: bool = False
    """Measure dispositions and abilities on held-out names, templates and combinations."""
    folder: Path | None = None
    """Where the weights are, if not where those of this kind ship."""
    n: int = 192
    """Questions for each figure of the evaluation."""
    recipe: Recipe = field(default_factory=Recipe)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m training.organism", config=(tyro.conf.OmitArgPrefixes,))
    if not arguments.build and not arguments.evaluate:
        raise SystemExit("nothing to do: give --build, --evaluate or both")
    recipe = arguments.recipe
    folder = arguments.folder or ORGANISMS[NAMES[recipe.kind]]
    if arguments.build:
        started = time.monotonic()
        model, tokenizer = train(recipe)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "organism.json", {"recipe": asdict(recipe), "versions": library_versions()})
        if folder not in ORGANISMS.values():
            write_data(folder)
        elif folder == ORGANISMS["organism"]:
            write_data()
        print(f"{folder}: trained in {time.monotonic() - started:.0f} s")
    if arguments.evaluate:
        organism = load(folder)
        print(table(examine(organism.hf, organism.tokenizer, n=arguments.n)))


if __name__ == "__main__":
    main()
