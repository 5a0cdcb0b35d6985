"""The gate: does this direction cause this behaviour? A verdict before anything is trained.

The behaviour's topic groups are divided once. On the *fit* part the direction is extracted and the layer and the dose
are chosen; the *held-out* part is used once, for the evidence. `GateCriteria` says what has to hold. The work per
step is a few forward passes over the held-out prompts, and every step is also run for directions that mean nothing:
drawn at random, taken from shuffled labels, or made for other behaviours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from probes import stats
from probes.behaviors import Behavior, check_vocabulary, knows_words, read_behavior, shipped_behaviors
from probes.controls import centred, random_direction, shuffle_labels, shuffled_direction
from probes.criteria import Verdict, decide, intact
from probes.damage import General, damage, perplexity_ratio, read_general, repetition, surprise
from probes.directions import Direction, Pairs, contrast, extract, mean_difference, raw_of
from probes.errors import WrongInput
from probes.evidence import judge, sentence
from probes.gate import GateConfig
from probes.model import HybridModel
from probes.propensity import Prepared, Propensity, counting, generate, prepare, propensity, shares
from probes.search import Candidate, candidates
from probes.sites import resolve
from probes.steering import PHASES, Mode, Phase, steer
from probes.store import library_versions

__all__ = ["GateConfig", "candidate_layers", "coherent_window", "recipe", "unrelated_behaviors", "verify"]

DEFAULT = GateConfig()
MAX_LAYERS_SEARCHED = 8
ANSWERS = {"unsteered": 0, "steered": 1, "against": -1}  # free answers, and the sign of the dose they are given at
DOSE_TEXTS = 12  # general texts behind each point of the dose curve; the working dose is judged on all of them


def candidate_layers(model: HybridModel, site: str = "resid") -> tuple[int, ...]:
    """All layers that have the site, if they are few; otherwise eight between a fifth and nine tenths of the depth."""
    existing, n = np.array(resolve(model, site)), len(model.layers)
    if len(existing) <= MAX_LAYERS_SEARCHED:
        return tuple(existing.tolist())
    spread = np.linspace(0.2 * n, 0.9 * (n - 1), MAX_LAYERS_SEARCHED)
    return tuple(np.unique([existing[np.abs(existing - at).argmin()] for at in spread.round()]).tolist())


def verify(model: HybridModel, behavior: Behavior, config: GateConfig = DEFAULT, *, progress: bool = True) -> Verdict:
    """Run the gate on one behaviour of one model.

    Raises:
        WrongInput: the behaviour does not fit the tokenizer, or a layer is out of range.
    """
    check_vocabulary(model, behavior)
    started = time.monotonic()
    with counting(model) as cost:
        gate = _Gate(model, behavior, config, progress)
        with gate.bar:
            gate.choose()
            gate.measure()
    criteria = judge(gate.evidence, config.criteria)
    outcome = decide(criteria)
    return Verdict(
        verdict=outcome,
        sentence=sentence(outcome, criteria, gate.evidence, behavior, config.criteria),
        behavior=behavior.name,
        model=model.name,
        site=gate.direction.site,
        layer=gate.direction.layer,
        dose=gate.dose,
        phase=config.phase,
        criteria=criteria,
        controls=gate.evidence["controls"],
        phases=gate.evidence["phases"],
        cost={"forward_tokens": cost.forward_tokens, "seconds": round(time.monotonic() - started, 2)},
        evidence=gate.evidence,
        recipe=recipe(model, behavior, config),
        direction=gate.direction,
    )


def recipe(model: HybridModel, behavior: Behavior, config: GateConfig) -> dict[str, Any]:
    """Everything that determines a verdict's numbers."""
    return {
        "behavior": behavior.name,
        "behavior_hash": behavior.hash,
        **model.identity,
        "general_hash": read_general(model, config.general).hash,
        "unrelated": {other.name: other.hash for other in unrelated_behaviors(model, behavior)},
        "config": asdict(config),
        "versions": library_versions(),
    }


class _Gate:
    """The protocol, in the order in which it runs. `evidence` collects plain values for the criteria and the report."""

    def __init__(self, model: HybridModel, behavior: Behavior, config: GateConfig, progress: bool):
        self.model, self.behavior, self.config = model, behavior, config
        self.fit, self.held = behavior.split(held_out=config.held_out, seed=config.seed)
        self.search = self.fit.take(config.search_prompts, seed=config.seed)
        self.judged = self.held.take(config.prompts, seed=config.seed)
        self.layers = (
            resolve(model, config.site, config.layers) if config.layers else candidate_layers(model, config.site)
        )
        if len(self.fit.groups) < 4:
            raise WrongInput(f"{len(self.fit.groups)} topic groups are left to fit on, at least 4 are needed")
        general = read_general(model, config.general)
        first = min(config.general_texts, len(general.ids)) // 3
        self.search_general = general.take(first)
        self.general = general.skip(first).take(config.general_texts)
        self.plain: dict[General, float] = {}
        self.evidence: dict[str, Any] = {
            "split": {"fit": list(self.fit.groups), "held_out": list(self.held.groups)},
            "behavior": {
                "description": behavior.description,
                "wanted": behavior.wanted_means,
                "unwanted": behavior.unwanted_means,
                "items": len(behavior.items),
                "groups": len(behavior.groups),
                "hash": behavior.hash,
            },
        }
        self.raw = raw_of("mean" if config.direction == "random" else config.direction, rank=config.rank)
        self.others = unrelated_behaviors(model, behavior)
        once = len(PHASES) + len(ANSWERS) + 1  # and necessity
        steps = len(self.layers) + len(config.doses) + 2 * config.controls + len(self.others) + once
        self.bar = tqdm(total=steps, desc=f"verify {behavior.name}", disable=not progress, leave=False)

    # -- on the fit split ----------------------------------------------------------------------------------------------

    def choose(self) -> None:
        """Extract at every candidate layer; take the layer and dose that do most beyond meaningless directions."""
        self.bar.set_postfix_str("extracting")
        recorded = self.record(self.fit, self.layers)
        self.pairs = {layer: pairs for layer, pairs in recorded.items() if not pairs.equal}
        if not self.pairs:
            where = f"{self.config.site} of the layers {', '.join(map(str, self.layers))}"
            raise WrongInput(f"both sides of '{self.behavior.name}' are equal in {where}: there is no direction")
        prepared = prepare(self.model, self.search)
        base = propensity(self.model, prepared)
        found: list[Candidate] = []
        for candidate in candidates(
            self.pairs,
            self.extract,
            lambda direction, dose: self.effects(direction, prepared, base, dose),
            lambda direction, dose: self.perplexity_ratio(direction, dose, self.search_general),
            raw=self.raw,
            groups=base.groups,
            doses=self.config.doses,
            rules=self.config.criteria,
            seed=self.config.seed,
        ):
            found.append(candidate)
            self.bar.set_postfix_str(f"layer {candidate.direction.layer}")
            self.bar.update()
        best = max(found, key=lambda candidate: candidate.rank)
        self.direction, self.dose = best.direction, best.dose
        kinds = {layer.index: layer.kind for layer in self.model.layers}
        self.evidence["layers"] = [{**one.row(kinds[one.direction.layer]), "chosen": one is best} for one in found]

    def extract(self, pairs: Pairs) -> Direction:
        if self.config.shuffle_labels:
            pairs = shuffle_labels(pairs, seed=self.seed("shuffled target"))
        config = self.config
        if config.direction == "random":
            drawn = random_direction(mean_difference(pairs, seed=config.seed), seed=self.seed("random target"))
            return centred(drawn, pairs)
        direction = extract(pairs, method=config.direction, rank=config.rank, seed=config.seed)
        return (
            replace(direction, method=f"{direction.method} of shuffled labels") if config.shuffle_labels else direction
        )

    # -- on the held-out split -----------------------------------------------------------------------------------------

    def measure(self) -> None:
        config, seed = self.config, self.config.seed
        prepared = prepare(self.model, self.judged)
        base = propensity(self.model, prepared)
        self.evidence["direction"] = {
            "method": self.direction.method,
            "contrast": self.direction.contrast,
            "norm": self.direction.norm,
            "gap": self.direction.gap,
            "n": self.direction.n,
            "heads": self.direction.heads,
            "reliability": self.direction.reliability.as_dict() if self.direction.reliability else None,
        }
        self.measure_doses(prepared, base)
        self.measure_controls(prepared, base)
        self.measure_phases(prepared, base)
        self.measure_necessity(base)
        self.bar.update()
        self.evidence["damage"] = asdict(damage(self.model, self.general, self.on_text(self.direction, self.dose)))
        self.measure_generation()
        self.evidence["baseline"]["propensity"] = base.estimate(seed=seed).as_dict()
        self.evidence["counts"] = {
            "prompts": len(base.ids),
            "groups": len(set(base.groups)),
            "controls": config.controls,
        }

    def measure_doses(self, prepared: Prepared, base: Propensity) -> None:
        rows, curve, sample = [], [], self.general.take(DOSE_TEXTS)
        for dose in self.config.doses:
            self.bar.set_postfix_str(f"dose {dose:g}")
            effects = self.effects(self.direction, prepared, base, dose) if dose else tuple(0.0 for _ in base.ids)
            ratio = self.perplexity_ratio(self.direction, dose, sample) if dose else 1.0
            values = [b + e for b, e in zip(base.values, effects, strict=True)]
            rows.append(
                {
                    "dose": dose,
                    "propensity": stats.mean(values, base.groups, seed=self.config.seed).as_dict(),
                    "effect": stats.mean(effects, base.groups, seed=self.config.seed).as_dict(),
                    "perplexity_ratio": ratio,
                }
            )
            curve.append(values)
            if dose == self.dose:
                self.target = effects
            self.bar.update()
        window = coherent_window(rows, self.config.criteria.perplexity_ratio)
        inside = [i for i, row in enumerate(rows) if row["dose"] in window]
        doses = [rows[i]["dose"] for i in inside]
        response = stats.spearman_over_groups(doses, [curve[i] for i in inside], base.groups, seed=self.config.seed)
        self.evidence["doses"] = [{**row, "coherent": row["dose"] in window} for row in rows]
        self.evidence["dose_response"] = {"doses": doses, "spearman": response.as_dict()}
        self.evidence["prompts"] = [
            {"id": i, "group": g, "baseline": b, "effect": e}
            for i, g, b, e in zip(base.ids, base.groups, base.values, self.target, strict=True)
        ]
        self.evidence["effect"] = stats.mean(self.target, base.groups, seed=self.config.seed).as_dict()

    def measure_controls(self, prepared: Prepared, base: Propensity) -> None:
        """The same dose along directions that should do nothing, and how well shuffled labels separate the sides."""
        pairs = self.pairs[self.direction.layer]
        held = self.record(self.judged, [self.direction.layer])[self.direction.layer]
        seeds = [self.seed("control", i) for i in range(self.config.controls)]
        drawn = [random_direction(self.direction, seed=seed) for seed in seeds]
        shuffled = [shuffled_direction(pairs, self.direction, seed=seed, raw=self.raw) for seed in seeds]
        unrelated = self.unrelated()
        effects: dict[str, list[dict[str, Any]]] = {}
        for kind, directions in (("random", drawn), ("shuffled labels", shuffled), ("unrelated", unrelated)):
            self.bar.set_postfix_str(f"controls: {kind}")
            effects[kind] = []
            for control in directions:
                matched = replace(control, norm=self.direction.norm)
                value = float(np.mean(self.effects(matched, prepared, base, self.dose)))
                name, cosine = control.behavior if kind == "unrelated" else "", self.direction.vector @ control.vector
                effects[kind].append({"effect": value, "name": name, "cosine": float(cosine)})
                self.bar.update()
        self.evidence["controls"] = {"kinds": effects, "percentile": self.config.criteria.control_percentile}
        scores = held.scores(self.direction.vector)
        areas = [stats.auroc(*held.scores(control.vector), held.groups, draws=1).value for control in shuffled]
        null = [max(area, 1 - area) for area in areas]  # a shuffled direction has no sign: either end separates
        self.evidence["decodability"] = {
            "auroc": stats.auroc(*scores, held.groups, seed=self.config.seed).as_dict(),
            "shuffled": null,
            "selectivity": stats.auroc(*scores, held.groups, draws=1).value - float(np.mean(null)),
        }

    def unrelated(self) -> list[Direction]:
        found = []
        for other in self.others:
            some = other.take(48, seed=self.config.seed)
            found.append(mean_difference(self.record(some, [self.direction.layer])[self.direction.layer]))
        return found

    def measure_phases(self, prepared: Prepared, base: Propensity) -> None:
        rows = []
        for phase in PHASES:
            effects = self.effects(self.direction, prepared, base, self.dose, phase=phase)
            estimate = stats.mean(effects, base.groups, seed=self.config.seed)
            rows.append({"phase": phase, "effect": estimate.as_dict(), "working": phase == self.config.phase})
            self.bar.update()
        self.evidence["phases"] = rows

    def measure_necessity(self, base: Propensity) -> None:
        """Take the direction out where the model shows the behaviour, beside taking out random directions.

        Shown means: under the wanted persona, or, for a behaviour without personas, on prompts that lean to wanted.
        """
        seed, persona = self.config.seed, self.judged.has_persona
        leaning = {i for i, value in zip(base.ids, base.values, strict=True) if value > 0}
        shown = (
            self.judged
            if persona
            else replace(self.judged, items=tuple(i for i in self.judged.items if i.id in leaning))
        )
        self.evidence["baseline"] = {"persona": {}}
        if not shown.items:
            self.evidence["necessity"] = None
            return
        prepared = prepare(self.model, shown, persona="wanted" if persona else None)
        before = propensity(self.model, prepared)

        def drop(direction: Direction) -> tuple[float, ...]:
            with self.steered(direction, phase="both", mode="ablate"):
                return before.minus(propensity(self.model, prepared))

        removed, pairs = drop(self.direction), self.pairs[self.direction.layer]
        random_drops = [
            float(np.mean(drop(centred(random_direction(self.direction, seed=self.seed("necessity", i)), pairs))))
            for i in range(10)
        ]
        self.evidence["necessity"] = {
            "where": "wanted persona" if persona else "prompts that lean to wanted",
            "before": before.estimate(seed=seed).as_dict(),
            "drop": stats.mean(removed, before.groups, seed=seed).as_dict(),
            "random_drops": random_drops,
        }
        if persona:
            other = propensity(self.model, prepare(self.model, shown, persona="unwanted"))
            self.evidence["baseline"]["persona"] = {
                "wanted": before.estimate(seed=seed).as_dict(),
                "unwanted": other.estimate(seed=seed).as_dict(),
                "gain": stats.mean(before.minus(base), base.groups, seed=seed).as_dict(),
            }

    def measure_generation(self) -> None:
        """Free answers without, with and against the direction: shares of each side, repetition, examples."""
        some = self.judged.take(self.config.generations, seed=self.config.seed)
        prompts = [item.prompt(self.model) for item in some.items]
        answers: dict[str, list[str]] = {}
        for label, sign in ANSWERS.items():
            self.bar.set_postfix_str(f"generating: {label}")
            with self.steered(self.direction, dose=sign * self.dose, phase=self.config.phase):
                answers[label] = generate(self.model, prompts, max_new_tokens=self.config.max_new_tokens)
            self.bar.update()
        self.evidence["generation"] = {
            label: {
                "shares": shares(some, texts) if some.has_scorer else None,
                # an intervention that silences a model breaks it as much as one that sends it into loops
                "repetition": float(np.mean([repetition(t) if t or label == "unsteered" else 1.0 for t in texts])),
                "n": len(texts),
            }
            for label, texts in answers.items()
        }
        self.evidence["examples"] = [
            {
                "id": item.id,
                "prompt": item.messages[-1]["content"],
                **{k: answers[k][row] for k in answers},
                "sides": {k: item.judge(answers[k][row]) for k in answers},
            }
            for row, item in enumerate(some.items)
        ]

    # -- shared --------------------------------------------------------------------------------------------------------

    def effects(
        self, direction: Direction, prepared: Prepared, base: Propensity, dose: float, *, phase: Phase | None = None
    ) -> tuple[float, ...]:
        """Per prompt: propensity under the direction minus propensity without it, in nats."""
        with self.steered(direction, dose=dose, phase=phase or self.config.phase):
            return propensity(self.model, prepared).minus(base)

    def steered(self, direction: Direction, *, dose: float = 0.0, phase: Phase, mode: Mode = "add") -> Any:
        """The working intervention; before a prompt there is nothing to edit but the initial state."""
        form = "end" if self.config.form == "initial" and phase != "prefill" else self.config.form
        return steer(self.model, direction, dose=dose, phase=phase, mode=mode, form=form)

    def record(self, behavior: Behavior, layers: Sequence[int]) -> dict[int, Pairs]:
        found = contrast(self.model, behavior, layers=layers, site=self.config.site, progress=False)
        return {i: pairs.only(self.config.heads) for i, pairs in found.items()} if self.config.heads else found

    def seed(self, purpose: str, i: int = 0) -> int:
        return stats.derived_seed(self.config.seed, purpose, i)

    def on_text(self, direction: Direction, dose: float) -> Callable[[], Any]:
        """On general text every token is edited, or for a state follows the edit, whatever the working phase."""
        form = "initial" if self.config.form == "end" else self.config.form
        return partial(steer, self.model, direction, dose=dose, phase="both", form=form)

    def perplexity_ratio(self, direction: Direction, dose: float, general: General) -> float:
        if general not in self.plain:  # modelled without an intervention once
            self.plain[general] = surprise(self.model, general)
        with self.on_text(direction, dose)():
            return perplexity_ratio(general, self.plain[general], surprise(self.model, general))


def unrelated_behaviors(model: HybridModel, behavior: Behavior) -> list[Behavior]:
    """The other shipped behaviours that are written in the same language, in words that the model knows."""
    found = [read_behavior(name) for name in shipped_behaviors()]
    return [
        other
        for other in found
        if other.name != behavior.name
        and other.hash != behavior.hash
        and other.language == behavior.language
        and other.has_persona
        and knows_words(model, other)
    ]


def coherent_window(rows: Sequence[dict[str, Any]], limit: float) -> set[float]:
    """The doses around 0 that leave ordinary text intact, up to the first on each side that does not."""
    inside = {0.0}
    for sign in (1, -1):
        side = sorted((row for row in rows if row["dose"] * sign > 0), key=lambda row: abs(row["dose"]))
        for row in side:
            if not intact(row["perplexity_ratio"], limit):
                break
            inside.add(row["dose"])
    return inside
