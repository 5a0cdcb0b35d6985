"""What each command takes and does. Thin: numbers come from `probes`, pages from `analysis`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from tyro.conf import Positional

from analysis.compare import CompareConfig, compare
from analysis.compare import recipe as compare_recipe
from analysis.localization_report import write_localization_report
from analysis.report import write_report
from analysis.shift import Shift, open_shift
from analysis.shift_report import write_shift_report
from analysis.training_report import write_training_report
from dispositions.asked import Asked, Device, Dtype
from dispositions.batch import Batch
from dispositions.cells import PAGE, judge
from dispositions.runs import checked, claimed, model_slug, slug, variant
from probes.behaviors import Behavior, check_vocabulary, read_behavior
from probes.capture import capture
from probes.criteria import Verdict, open_verdict
from probes.errors import WrongInput
from probes.gate import GateConfig
from probes.linear import ProbeConfig, cells, check_groups, probe_all
from probes.localization import Localization, open_localization
from probes.localize import LocalizeConfig, localize
from probes.localize import recipe as localize_recipe
from probes.model import HybridModel, load
from probes.pairs import contrast
from probes.sites import positions_at
from probes.store import RECIPE, library_versions, read_json, write_text
from training.result import open_training

RESULTS = {
    "verdict.json": "criteria",
    "localization.json": "carrier",
    "shift.json": "aligned",
    "training.json": "evaluations",
}
"""What a run folder holds, and the field that only such a result has."""


@dataclass(frozen=True, kw_only=True)
class Verify(Asked):
    """Judge whether a behaviour's direction causes the behaviour.

    Extracts the direction on some topics, judges it on others, and writes verdict.json, direction.safetensors and
    report.html. Exit code 0 means PASS, 1 FAIL, 3 INCONCLUSIVE (too little data), 2 wrong input.

    dispositions verify follow-direction

    dispositions verify sentiment-en --model models/SmolLM2-135M-Instruct.Q4_1.gguf

    dispositions verify my.jsonl --model ./my-qwen3.5 --layers 8,12,16 --out runs/mine
    """

    out: Path | None = None
    """Folder of the run; when not given runs/BEHAVIOR-MODEL, with the options that are not the default. A finished run
    of the same recipe is not repeated."""
    gate: GateConfig = field(default_factory=GateConfig)

    def run(self) -> int:
        model, behavior = self.load()
        out = self.folder(self.out, "", behavior)
        verdict = judge(model, behavior, self.gate, out)
        return _say(verdict, out / PAGE)


@dataclass(frozen=True, kw_only=True)
class Localize(Asked):
    """Tell what carries a behaviour from token to token, and at which layers and heads it can be given.

    Exchanges what the two personas left in the states, the convolutions, and the keys and values: nothing else crosses
    tokens, so one of these is named as the carrier where the numbers allow it. Then gives prompts without a persona the
    mean difference at each layer of the residual stream, of the states and of the attention heads. Prints a table of
    causal effects with intervals and controls of equal size, and writes localization.json and report.html.

    dispositions localize follow-direction

    dispositions localize sentiment --model organism-attention --out runs/where
    """

    out: Path | None = None
    """Folder of the run; when not given runs/localize-BEHAVIOR-MODEL, with the options that are not the default. A
    finished run of the same recipe is not repeated."""
    config: LocalizeConfig = field(default_factory=LocalizeConfig)

    def run(self) -> int:
        model, behavior = self.load()
        out = self.folder(self.out, "localize-", behavior)
        asked = {"kind": "localize", **localize_recipe(model, behavior, self.config)}
        with claimed(out, asked, "localization.json", model, behavior) as finished:
            if finished:
                found = open_localization(out)
            else:
                found = localize(model, behavior, self.config)
                found.save(out / "localization.json")
        return _show(found, write_localization_report(found, out / "report.html"))


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Tell what moved between two checkpoints, and whether it moved toward a behaviour.

    Compares the recurrent states on prompts without a persona, and holds their change against the behaviour's direction
    and against changes that mean nothing. Prints the headlines and the conclusion (direction-shaped, no, or not shown),
    and writes shift.json and report.html.

    dispositions compare ./base ./tuned --behavior follow-direction

    dispositions compare organism organism --behavior follow-direction
    """

    before: Annotated[Positional[str], tyro.conf.arg(metavar="BASE")]
    """The model before: organism, a local folder, a .gguf file or a hub id."""
    after: Annotated[Positional[str], tyro.conf.arg(metavar="TUNED")]
    """The model after, of the same architecture and tokenizer."""
    behavior: str
    """A shipped behaviour (see `dispositions behaviors`) or a JSONL file of contrast pairs with personas."""
    out: Path | None = None
    """Folder of the run; when not given runs/compare-BEHAVIOR-BASE-TUNED, with the options that are not the default. A
    finished run of the same recipe is not repeated."""
    device: Device = "cpu"
    dtype: Dtype = "auto"
    config: CompareConfig = field(default_factory=CompareConfig)

    def run(self) -> int:
        behavior = read_behavior(self.behavior)
        before, after = (load(source, device=self.device, dtype=self.dtype) for source in (self.before, self.after))
        check_vocabulary(before, behavior)
        models = f"{model_slug(self.before)}-{model_slug(self.after)}"
        out = checked(self.out, Path("runs") / f"compare-{slug(behavior.name)}-{models}{variant(self)}")
        asked = compare_recipe(before, after, behavior, self.config)
        with claimed(out, asked, "shift.json", before, after, behavior) as finished:
            if finished:
                shift = open_shift(out)
            else:
                shift = compare(before, after, behavior, self.config)
                shift.save(out / "shift.json")
        return _show(shift, write_shift_report(shift, out / "report.html"))


@dataclass(frozen=True, kw_only=True)
class Probe(Asked):
    """Tell at which layers and heads wanted and unwanted can be told apart by a linear probe.

    Logistic regression on the two sides of a behaviour, scored on topics it was not fitted on, against the same probe
    with swapped sides, corrected for all layers and heads together. Prints a table and writes probes.csv. What can be
    decoded is not yet what the model uses: `dispositions localize` and `verify` tell that.

    dispositions probe follow-direction --site gdn.state
    """

    site: str = "gdn.state"
    """Any site of `dispositions capture` that has one shape for all prompts."""
    layers: tuple[int, ...] | None = None
    """Layers, such as 3,5; auto takes every layer that has the site."""
    prompts: int = 96
    """At most this many contrast pairs, spread over the topics."""
    out: Path | None = None
    """Folder of the run; when not given runs/probe-BEHAVIOR-MODEL, with the options that are not the default. A
    finished run of the same recipe is not repeated."""
    config: ProbeConfig = field(default_factory=ProbeConfig)

    def run(self) -> int:
        model, behavior = self.load()
        if self.prompts < 1:
            raise WrongInput(f"prompts must be at least 1, saw {self.prompts}")
        behavior = behavior.take(self.prompts, seed=self.config.seed)
        check_groups([item.group for item in behavior.items])
        out = self.folder(self.out, "probe-", behavior)
        asked = {
            "kind": "probe", "behavior": behavior.name, "behavior_hash": behavior.hash, **model.identity,
            "site": self.site, "layers": self.layers, "prompts": self.prompts, "config": asdict(self.config),
            "versions": library_versions(),
        }  # fmt: skip
        table = out / "probes.csv"
        with claimed(out, asked, table.name, model, behavior) as finished:
            if not finished:
                pairs = contrast(model, behavior, site=self.site, layers=self.layers)
                groups = next(iter(pairs.values())).groups
                found = probe_all(cells(pairs), groups, site=self.site, config=self.config)
                write_text(table, found.frame().to_csv(index=False))
        return _probed(pd.read_csv(table, dtype={"layer": "Int64", "head": "Int64"}), behavior, table)


@dataclass(frozen=True, kw_only=True)
class Capture(Asked):
    """Record what happens inside a model on a behaviour's prompts, to a folder of safetensors.

    Resumes where an interrupted capture stopped. Read it back with probes.store.open_capture(folder).

    dispositions capture follow-direction --sites resid gdn.state --persona wanted --out runs/states

    dispositions capture follow-direction --sites gdn.state attn.pattern --positions gdn.state=last:direction

    dispositions capture follow-direction --sites resid --positions generated --new-tokens 16
    """

    sites: tuple[str, ...] = ("resid",)
    """resid, mixer, mlp; in GDN layers gdn.q, gdn.k, gdn.v, gdn.beta, gdn.decay, gdn.gate, gdn.readout, gdn.heads,
    gdn.state, gdn.conv, gdn.attention, gdn.attribution; in attention layers attn.q, attn.k, attn.v, attn.gate,
    attn.pattern, attn.heads."""
    layers: tuple[int, ...] | None = None
    """Layers, such as 3,5; auto takes every layer that has the site."""
    positions: tuple[str, ...] = ("last",)
    """last, all, generated, or last:, tokens: or mean: before context, direction or decision (mean:generated too); for
    single sites, SITE=WORD."""
    new_tokens: int = 0
    """Continue each prompt greedily by at most this many tokens, and record these too."""
    persona: str = "none"
    """Put the system turn of one side in front: none, wanted or unwanted."""
    out: Path | None = None
    """Folder; when not given runs/capture-BEHAVIOR-MODEL, with the options that are not the default."""

    def run(self) -> int:
        if self.persona not in ("none", "wanted", "unwanted"):
            raise WrongInput(f"unknown persona '{self.persona}'; allowed are none, wanted, unwanted")
        model, behavior = self.load()
        prompts = _prompts(model, behavior, self.persona)
        out = self.folder(self.out, "capture-", behavior)
        record = capture(
            model, prompts, sites=self.sites, layers=self.layers, positions=_positions(self.positions, self.sites),
            new_tokens=self.new_tokens, out=out,
        )  # fmt: skip
        print(record)
        print(out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Report(Batch):
    """Write a run's page again, or judge many models, behaviours and sites at once.

    dispositions report RUN writes report.html again from the run's verdict.json, localization.json, shift.json or
    training.json, and takes no options.

    Without RUN it needs --models, --behaviors and --out. Every model, behaviour and site is a cell: a run of
    `dispositions verify` in OUT/cells, with the options below. Runs what is missing, then writes OUT/index.html (a
    matrix of verdicts with links to their pages) and every number to OUT/numbers.csv and OUT/numbers.parquet. A cell
    that fails is noted there, with its error.txt, and the others go on; the same command tries it again.

    Exit code, the first that holds: 70 a cell crashed, 2 a cell could not be judged (wrong input) or none was, 1 at
    least one FAIL, 3 something INCONCLUSIVE, 0 all PASS. A site that a model does not have is not applicable and does
    not count.

    dispositions report runs/demo

    dispositions report --models organism,organism-state --behaviors follow-direction,sentiment --sites resid,gdn.state
    --out runs/many
    """

    run_folder: Annotated[Positional[Path | None], tyro.conf.arg(metavar="[RUN]")] = None
    """A run folder, such as runs/demo."""

    def run(self) -> int:
        if self.run_folder is None:
            if not (self.models or self.behaviors):
                raise WrongInput("report needs a RUN, or --models, --behaviors and --out; saw neither")
            return self.judge_all()
        if mixed := _chosen(self, Report(run_folder=self.run_folder)):
            raise WrongInput(
                f"report takes a RUN alone, or --models and what goes with it; saw '{self.run_folder}' and --{mixed[0]}"
            )
        return self.write_again(self.run_folder)

    def write_again(self, result: Path) -> int:
        """Write the page of one run again.

        Raises:
            WrongInput: it is no run, not finished, or a batch.
        """
        if not result.is_file():
            found = [result / name for name in RESULTS if (result / name).is_file()]
            if not found and _begun(result, "report"):
                raise WrongInput(f"'{result}' holds many runs; name one of its cells, or give its command again")
            if not found and _begun(result, "verify", "localize", "compare", "train"):
                raise WrongInput(f"'{result}' is not finished; give the command that began it again")
            if len(found) != 1:
                seen = f"{' and '.join(path.name for path in found)}; name the file" if found else "none of them"
                raise WrongInput(f"'{result}' must be a run folder with one of {', '.join(RESULTS)}, saw {seen}")
            result = found[0]
        page, data = result.parent / "report.html", read_json(result)
        kind = next((key for key in RESULTS.values() if isinstance(data, dict) and key in data), None)
        if kind == "carrier":
            where = open_localization(result)
            return _show(where, write_localization_report(where, page))
        if kind == "aligned":
            shift = open_shift(result)
            return _show(shift, write_shift_report(shift, page))
        if kind == "evaluations":
            print(open_training(result).sentence)
            print(write_training_report(result.parent))
            return 0
        verdict = open_verdict(result)
        return _say(verdict, write_report(verdict, page))


def _begun(folder: Path, *kinds: str) -> bool:
    """Whether a run of such a kind began there."""
    recipe = read_json(folder / RECIPE) if (folder / RECIPE).is_file() else None
    return isinstance(recipe, dict) and recipe.get("kind") in kinds


def _chosen(options: Any, default: Any) -> list[str]:
    """The options that are not the default, those inside of options too, as they are written."""
    found = []
    for option in fields(options):
        value, usual = getattr(options, option.name), getattr(default, option.name)
        if value != usual:
            found += _chosen(value, usual) if is_dataclass(value) else [option.name.replace("_", "-")]
    return found


def _show(found: Localization | Shift, report: Path) -> int:
    print(found.table())
    outcome = found.carrier if isinstance(found, Localization) else found.conclusion
    print(f"{outcome}: {found.sentence}")
    print(report)
    return 0


def _probed(frame: pd.DataFrame, behavior: Behavior, table: Path) -> int:
    print(
        "read after the last prompt token, under one persona and under the other"
        if behavior.has_persona
        else "read in the answers themselves, as the behaviour has no personas: their words may be all that differs"
    )
    shown = ["layer", "head", "auroc", "auroc_lower", "auroc_upper", "shuffled", "p_adjusted", "significant"]
    heads = frame["head"].astype("string").fillna("all")
    print(frame[shown].assign(head=heads).round(3).to_string(index=False))
    print(f"{frame['significant'].sum()} of {len(frame)} probes significant")
    print(table)
    return 0


def _say(verdict: Verdict, report: Path) -> int:
    print(f"judged: {verdict.site} at layer {verdict.layer}, dose {verdict.dose:g}")
    for criterion in verdict.criteria:
        print(criterion)
    print(f"{verdict.verdict}: {verdict.sentence}")
    print(report)
    return verdict.exit_code


def _prompts(model: HybridModel, behavior: Behavior, persona: str) -> list:
    side = None if persona == "none" else "wanted" if persona == "wanted" else "unwanted"
    return [item.prompt(model, persona=side) for item in behavior.items]


def _positions(words: tuple[str, ...], sites: tuple[str, ...]) -> str | dict[str, str]:
    """One word for all sites, or words by site with at most one for the others ("last" when there is none)."""
    if not words:
        raise WrongInput("positions must name at least one word, such as last; saw none")
    by_site = dict(word.split("=", 1) for word in words if "=" in word)
    rest = [word for word in words if "=" not in word]
    if len(rest) > 1 or len(by_site) + len(rest) < len(words):
        raise WrongInput(f"positions are one word, and SITE=WORD once for a site; saw {' '.join(words)}")
    everywhere = rest[0] if rest else "last"
    return {site: positions_at(site, everywhere) for site in sites} | by_site if by_site else everywhere
