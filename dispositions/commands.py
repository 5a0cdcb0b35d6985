"""What each command takes and does. Thin: numbers come from `probes`, pages from `analysis`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from analysis.report import write_report
from probes.behaviors import Behavior, check_vocabulary, read_behavior, shipped_behaviors
from probes.capture import capture
from probes.criteria import Verdict, open_verdict
from probes.directions import save_direction
from probes.errors import WrongInput
from probes.model import HybridModel, load
from probes.store import RECIPE, read_json, recipe_differs, write_json
from probes.verify import GateConfig, recipe, verify

BehaviorName = Annotated[Positional[str], tyro.conf.arg(metavar="BEHAVIOR")]
Device = Annotated[str, tyro.conf.arg(help="Where to run: cpu, cuda, cuda:0, ...")]
Dtype = Annotated[str, tyro.conf.arg(help="auto (what the checkpoint says), float32, bfloat16 or float16.")]


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Judge whether a behaviour's direction causes the behaviour.

    Extracts the direction on some topics, judges it on others, and writes verdict.json, direction.safetensors and
    report.html. Exit code 0 means PASS, 1 FAIL, 3 INCONCLUSIVE (too little data), 2 wrong input.

    dispositions verify follow-direction

    dispositions verify sentiment-en --model models/SmolLM2-135M-Instruct.Q4_1.gguf

    dispositions verify my.jsonl --model ./my-qwen3.5 --layers 8,12,16 --out runs/mine
    """

    behavior: BehaviorName
    """A shipped behaviour (see `dispositions behaviors`) or a JSONL file of contrast pairs."""
    model: str = "organism"
    """organism, a local folder, a .gguf file or a hub id."""
    out: Path | None = None
    """Folder of the run; runs/BEHAVIOR-MODEL when not given. A finished run of the same recipe is not repeated."""
    device: Device = "cpu"
    dtype: Dtype = "auto"
    gate: GateConfig = field(default_factory=GateConfig)

    def run(self) -> int:
        behavior = read_behavior(self.behavior)
        model = load(self.model, device=self.device, dtype=self.dtype)
        check_vocabulary(model, behavior)
        out = self.out or Path("runs") / f"{_slug(behavior.name)}-{_model_slug(self.model)}"
        asked = {"kind": "verify", **recipe(model, behavior, self.gate)}
        finished = _claim(out, asked) and (out / "verdict.json").is_file()
        print(model)
        print(behavior)
        if finished:
            print(f"{out} holds this verdict already")
            verdict = open_verdict(out)
        else:
            verdict = verify(model, behavior, self.gate)
            if verdict.direction is not None:
                save_direction(verdict.direction, out / "direction.safetensors", weights_hash=model.weights_hash)
            verdict.save(out / "verdict.json")
        report = write_report(verdict, out / "report.html")
        return _say(verdict, report)


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Record what happens inside a model on a behaviour's prompts, to a folder of safetensors.

    Resumes where an interrupted capture stopped. Read it back with probes.store.open_capture(folder).

    dispositions capture follow-direction --sites resid gdn.state --persona wanted --out runs/states
    """

    behavior: BehaviorName
    """A shipped behaviour or a JSONL file; its prompts are captured up to the point where the model answers."""
    model: str = "organism"
    """organism, a local folder, a .gguf file or a hub id."""
    sites: tuple[str, ...] = ("resid",)
    """resid, mixer, mlp, gdn.state, attn.heads."""
    layers: tuple[int, ...] | None = None
    """Layers, such as 3,5; auto takes every layer that has the site."""
    positions: str = "last"
    """last, all, or mean:context, mean:direction, mean:decision."""
    persona: str = "none"
    """Put the system turn of one side in front: none, wanted or unwanted."""
    out: Path | None = None
    """Folder; runs/capture-BEHAVIOR-MODEL when not given."""
    device: Device = "cpu"
    dtype: Dtype = "auto"

    def run(self) -> int:
        if self.persona not in ("none", "wanted", "unwanted"):
            raise WrongInput(f"unknown persona '{self.persona}'; allowed are none, wanted, unwanted")
        behavior = read_behavior(self.behavior)
        model = load(self.model, device=self.device, dtype=self.dtype)
        check_vocabulary(model, behavior)
        prompts = _prompts(model, behavior, self.persona)
        out = self.out or Path("runs") / f"capture-{_slug(behavior.name)}-{_model_slug(self.model)}"
        record = capture(model, prompts, sites=self.sites, layers=self.layers, positions=self.positions, out=out)
        print(record)
        print(out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Behaviors:
    """List the shipped behaviours, or show one: what it contrasts and a few of its items."""

    behavior: Annotated[Positional[str | None], tyro.conf.arg(metavar="[BEHAVIOR]")] = None
    """A shipped behaviour or a JSONL file to show."""

    def run(self) -> int:
        if self.behavior is None:
            for name in shipped_behaviors():
                found = read_behavior(name)
                print(f"{name:<22} {len(found.items):>4} items, {len(found.groups):>3} groups  {found.description}")
            return 0
        found = read_behavior(self.behavior)
        print(found)
        print(f"{found.description}\nwanted: {found.wanted_means}\nunwanted: {found.unwanted_means}")
        for item in found.take(3).items:
            turns = "".join(f"\n  {turn['role']}: {turn['content']}" for turn in item.messages)
            print(f"\n{item.id} ({item.group}){turns}\n  wanted:   {item.wanted}\n  unwanted: {item.unwanted}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html again from a run's verdict.json."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder, such as runs/demo."""

    def run(self) -> int:
        verdict = open_verdict(self.run_folder)
        folder = self.run_folder if self.run_folder.is_dir() else self.run_folder.parent
        return _say(verdict, write_report(verdict, folder / "report.html"))


def _say(verdict: Verdict, report: Path) -> int:
    for criterion in verdict.criteria:
        print(criterion)
    print(f"{verdict.verdict}: {verdict.sentence}")
    print(report)
    return verdict.exit_code


def _prompts(model: HybridModel, behavior: Behavior, persona: str) -> list:
    side = None if persona == "none" else "wanted" if persona == "wanted" else "unwanted"
    return [item.prompt(model, persona=side) for item in behavior.items]


def _claim(out: Path, asked: dict) -> bool:
    """Take a run folder for a recipe; True when it already holds this one.

    Raises:
        WrongInput: it is a file, or it holds another recipe.
    """
    if out.exists() and not out.is_dir():
        raise WrongInput(f"'{out}' is a file; --out must be a folder")
    if (out / RECIPE).is_file():
        old = read_json(out / RECIPE)
        if not isinstance(old, dict):
            raise WrongInput(f"'{out / RECIPE}' is not a recipe; choose another --out or remove it")
        difference = recipe_differs(old, asked)
        # a run that stopped before its verdict has nothing to lose; another kind of run (a capture) does
        if difference and (old.get("kind") != "verify" or (out / "verdict.json").is_file()):
            raise WrongInput(f"'{out}' holds another recipe ({difference}); choose another --out or remove it")
        if not difference:
            return True
    write_json(out / RECIPE, asked)
    return False


def _model_slug(source: str) -> str:
    return _slug(Path(source).name.removesuffix(".gguf"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
