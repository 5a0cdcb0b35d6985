"""The command that shows, audits and imports behaviours. Thin: numbers and formats come from `probes`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from dispositions.asked import Device, Dtype
from probes.audit import audit
from probes.behaviors import read_behavior, shipped_behaviors
from probes.errors import WrongInput
from probes.importers import NEUTRAL, Form, check_target, import_behavior, write_behavior
from probes.model import HybridModel, load

_USES = "behaviors, behaviors NAME, behaviors audit NAME, or behaviors import FILE OUT.jsonl"


@dataclass(frozen=True, kw_only=True)
class Behaviors:
    """List the shipped behaviours, show or audit one, or import contrast data in another format.

    Shown is what a behaviour contrasts, its data card and a few items. An audit tells whether lengths or single words
    give a side away, and what repeats itself; exit code 0 means passed, 1 failed. An import reads the A/B questions of
    Contrastive Activation Addition (caa), a trait of Persona Vectors (persona-vectors), or two files of lines (pairs),
    groups them by their words, and writes the suite's own JSONL.

    dispositions behaviors

    dispositions behaviors sentiment-en

    dispositions behaviors audit my.jsonl

    dispositions behaviors import sycophancy.json my.jsonl

    dispositions behaviors import evil.json my.jsonl --model ./my-qwen3.5 --name evil

    dispositions behaviors import kind.txt my.jsonl --unwanted-file unkind.txt
    """

    words: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[[audit] BEHAVIOR | import FILE OUT]")] = ()
    """Nothing; a shipped behaviour or a JSONL file to show; audit and one of these; or import, the file to read and the
    .jsonl file to write."""
    format: Form = "auto"
    """Of the file to import; auto goes by what it holds."""
    unwanted_file: Path | None = None
    """For pairs: the file of unwanted lines. FILE holds as many wanted ones."""
    prompt: str = NEUTRAL
    """For pairs: what all lines are answers to."""
    answers: Path | None = None
    """For persona-vectors: a JSON file of answers, {question: {"wanted": ..., "unwanted": ...}}."""
    model: str | None = None
    """For persona-vectors without answers: the model that gives them, greedily, under either instruction: organism, a
    local folder, a .gguf file or a hub id."""
    new_tokens: int = 48
    """Tokens after which an answer of the model is cut."""
    name: str | None = None
    """Of the imported behaviour; when not given, that of its file."""
    language: str = "en"
    """Of the imported behaviour, by which a verdict finds other behaviours and general text to compare with."""
    seed: int = 0
    """Of the audit's swaps and folds, and of the imported topics."""
    device: Device = "cpu"
    dtype: Dtype = "auto"

    def run(self) -> int:
        if self.words[:1] != ("import",):
            only = [option.name for option in fields(self) if option.name not in ("words", "seed")]
            self._refuse(*only, need="import")
        match self.words:
            case ():
                return _list()
            case ("import", source, out):
                return self._import(source, out)
            case ("audit", behavior):
                found = audit(read_behavior(behavior), seed=self.seed)
                print(found.table())
                print(found)
                return 0 if found.passed else 1
            case (behavior,) if behavior not in ("audit", "import"):
                return _show(behavior)
        raise WrongInput(f"expected {_USES}; saw behaviors {' '.join(self.words)}")

    def _import(self, source: str, out: str) -> int:
        check_target(out)
        if not self.model:
            self._refuse("new_tokens", "device", "dtype", need="import with --model")
        found = import_behavior(
            source, form=self.format, unwanted=self.unwanted_file, prompt=self.prompt, answers=self.answers,
            model=self._load if self.model else None, new_tokens=self.new_tokens, name=self.name,
            language=self.language, seed=self.seed,
        )  # fmt: skip
        write_behavior(found, out)
        print(found)
        print(found.card["limits"])
        print(out)
        return 0

    def _load(self) -> HybridModel:
        return load(self.model or "organism", device=self.device, dtype=self.dtype)

    def _refuse(self, *options: str, need: str) -> None:
        """Options that would be passed over are wrong input."""
        defaults = {option.name: option.default for option in fields(self)}
        if given := [option for option in options if getattr(self, option) != defaults[option]]:
            raise WrongInput(f"--{given[0].replace('_', '-')} is an option of behaviors {need}")


def _list() -> int:
    for name in shipped_behaviors():
        found = read_behavior(name)
        print(f"{name:<22} {len(found.items):>4} items, {len(found.groups):>3} groups  {found.description}")
    return 0


def _show(source: str) -> int:
    found = read_behavior(source)
    print(found)
    print(f"{found.description}\nwanted: {found.wanted_means}\nunwanted: {found.unwanted_means}")
    for key, text in found.card.items():
        print(f"{key}: {text}")
    if found.forms:
        print(f"forms: {', '.join(found.forms)}")
    if found.ood:
        print(f"forms out of distribution: {', '.join(sorted({item.form for item in found.ood}))}")
    for item in found.take(3).items:
        turns = "".join(f"\n  {turn['role']}: {turn['content']}" for turn in item.messages)
        kind = f"{item.group}, {item.form}" if item.form else item.group
        print(f"\n{item.id} ({kind}){turns}\n  wanted:   {item.wanted}\n  unwanted: {item.unwanted}")
    return 0
