"""The gate: does this direction cause this behaviour? A verdict before anything is trained.

The behaviour's topic groups are divided once. On the *fit* part directions are extracted, and layer, method and dose
are chosen by cross-validation (`probes.search`); the *held-out* part is used once, for the evidence (`probes.measure`).
`GateCriteria` says what has to hold. Every step is also run for directions that mean nothing: drawn at random, taken
from shuffled labels, or made for other behaviours.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from probes import stats
from probes.answers import scorer_for
from probes.audit import length_auroc
from probes.behaviors import Behavior, check_vocabulary, knows_words, read_behavior, shipped_behaviors
from probes.controls import centred, random_direction, shuffle_labels
from probes.cost import Cost, counting
from probes.criteria import Verdict, decide
from probes.damage import read_general
from probes.directions import Direction, extract, mean_difference, split_half
from probes.errors import WrongInput
from probes.evidence import judge, sentence
from probes.extraction import Method, methods_at, null_of, raw_of
from probes.gate import GateConfig
from probes.measure import Question, how, measure, record
from probes.model import HybridModel
from probes.pairs import Pairs
from probes.partial import fitting_chunks
from probes.propensity import prepare
from probes.search import FOLDS, Way, best_of, choose, search
from probes.sites import resolve
from probes.store import library_versions, read_text
from probes.texts import Texts
from probes.trials import Trials

__all__ = ["GateConfig", "candidate_layers", "recipe", "unrelated_behaviors", "verify"]

DEFAULT = GateConfig()
MAX_LAYERS_SEARCHED = 8
SEARCH_TOKENS = 400  # of general text on which doses are chosen: enough to see that a model breaks
STEPS = ("doses", "phases", "modes", "methods", "necessity", "baseline", "specificity", "ood", "free", "controls")


def candidate_layers(model: HybridModel, site: str = "resid") -> tuple[int, ...]:
    """All layers that have the site, if they are few; otherwise eight between a fifth and nine tenths of the depth."""
    existing, n = np.array(resolve(model, site)), len(model.layers)
    if len(existing) <= MAX_LAYERS_SEARCHED:
        return tuple(existing.tolist())
    spread = np.linspace(0.2 * n, 0.9 * (n - 1), MAX_LAYERS_SEARCHED)
    return tuple(np.unique([existing[np.abs(existing - at).argmin()] for at in spread.round()]).tolist())


def verify(
    model: HybridModel,
    behavior: Behavior,
    config: GateConfig = DEFAULT,
    *,
    others: Sequence[Behavior] | None = None,
    progress: bool = True,
) -> Verdict:
    """Run the gate on one behaviour of one model.

    Args:
        others: behaviours that have nothing to do with it, for controls and specificity; None takes the other shipped
            ones of the same language.

    Raises:
        WrongInput: the behaviour does not fit the tokenizer, or a layer is out of range.
    """
    check_vocabulary(model, behavior)
    started = time.monotonic()
    others = unrelated_behaviors(model, behavior) if others is None else tuple(others)
    with counting(model) as cost, fitting_chunks(model):
        gate = _Gate(model, behavior, config, others, cost, started, progress)
        with gate.bar:
            asked = gate.choose()
            measure(model, asked, gate.evidence, cost=cost, tick=gate.tick)
    criteria = judge(gate.evidence, config.criteria)
    outcome = decide(criteria)
    return Verdict(
        verdict=outcome,
        sentence=sentence(outcome, criteria, gate.evidence, behavior, config.criteria),
        behavior=behavior.name,
        model=model.name,
        site=asked.direction.site,
        layer=asked.direction.layer,
        dose=asked.dose,
        phase=config.phase,
        criteria=criteria,
        controls=gate.evidence["controls"],
        phases=gate.evidence["phases"],
        cost={**cost.as_dict(), "seconds": round(time.monotonic() - started, 2)},
        evidence=gate.evidence,
        recipe=recipe(model, behavior, config, others=others),
        direction=asked.direction,
    )


def recipe(
    model: HybridModel, behavior: Behavior, config: GateConfig, *, others: Sequence[Behavior] | None = None
) -> dict[str, Any]:
    """Everything that determines a verdict's numbers."""
    others = unrelated_behaviors(model, behavior) if others is None else others
    question = config.scorer.judge_prompt
    asked = {"judge_prompt_hash": hashlib.sha256(read_text(question).encode()).hexdigest()[:16]} if question else {}
    return asked | {
        "behavior": behavior.name,
        "behavior_hash": behavior.hash,
        **model.identity,
        "general_hash": read_general(model, config.general).hash,
        "unrelated": {other.name: other.hash for other in others},
        "config": asdict(config),
        "versions": library_versions(),
    }


class _Gate:
    """The search on the fit split. `evidence` collects plain values for the criteria and the report."""

    def __init__(
        self,
        model: HybridModel,
        behavior: Behavior,
        config: GateConfig,
        others: Sequence[Behavior],
        cost: Cost,
        started: float,
        progress: bool,
    ):
        self.model, self.behavior, self.config, self.others, self.cost = model, behavior, config, others, cost
        self.deadline = None if config.budget is None else started + config.budget
        self.fit, self.held = behavior.split(held_out=config.held_out, seed=config.seed)
        self.sample = self.fit.take(config.search_prompts, seed=config.seed)
        self.layers = (
            resolve(model, config.site, config.layers) if config.layers else candidate_layers(model, config.site)
        )
        if len(self.fit.groups) < FOLDS:
            raise WrongInput(f"{len(self.fit.groups)} topic groups are left to fit on, at least {FOLDS} are needed")
        general = read_general(model, config.general)
        first = min(config.general_texts, len(general.ids)) // 3
        self.search_general = general.take(first).within(SEARCH_TOKENS)
        self.general = general.skip(first).take(config.general_texts)
        self.scorer = scorer_for(behavior, self.fit, config.scorer, seed=config.seed)
        prompts, answers = length_auroc(behavior, seed=config.seed)
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
            "length": {"prompts": prompts.as_dict(), "answers": answers.as_dict()},
        }
        self.ways = tuple(self.way(method) for method in self.methods())
        steps = 2 * len(self.layers) + len(STEPS)
        self.bar = tqdm(total=steps, desc=f"verify {behavior.name}", disable=not progress, leave=False)

    def tick(self, what: str) -> None:
        self.bar.set_postfix_str(what)
        self.bar.update()

    def methods(self) -> tuple[Method | str, ...]:
        if self.config.direction == "auto":
            found = methods_at(self.config.site)
            # The first axis of differences has no sign of its own: shuffled labels leave it where it was.
            return tuple(one for one in found if one != "pca") if self.config.shuffle_labels else found
        return (self.config.direction,)

    def way(self, method: Any) -> Way:
        """A method, and for the two nulls what stands in its place."""
        config = self.config
        base: Method = "mean" if method == "random" else method

        def made(pairs: Pairs) -> Direction:
            if method == "random":
                like = mean_difference(pairs, seed=config.seed)
                return centred(random_direction(like, seed=self.seed("random target")), pairs)
            if config.shuffle_labels:
                pairs = shuffle_labels(pairs, seed=self.seed("shuffled target"))
            found = extract(pairs, method=method, rank=config.rank, seed=config.seed, reliability=False)
            return replace(found, method=f"{found.method} of shuffled labels") if config.shuffle_labels else found

        return Way(name=method, extract=made, raw=raw_of(base, rank=config.rank), null=null_of(base, rank=config.rank))

    def choose(self) -> Question:
        """Try every layer, method and dose on the fit split, and take one of each."""
        config = self.config
        self.bar.set_postfix_str("extracting")
        recorded = record(self.model, self.fit.take(config.pairs, seed=config.seed), self.layers, config)
        pairs = {layer: found for layer, found in recorded.items() if not found.equal}
        if not pairs:
            where = f"{config.site} of the layers {', '.join(map(str, self.layers))}"
            raise WrongInput(f"both sides of '{self.behavior.name}' are equal in {where}: there is no direction")
        starts = {layer + (config.site == "resid") for layer in pairs}
        shared: dict[str, Any] = {"starts": starts, "reuse": config.reuse, "cost": self.cost}
        trials = Trials(self.model, prepare(self.model, self.sample), **shared)
        texts = Texts(self.model, self.search_general, **shared)
        groups = trials.base.groups
        found = search(
            pairs, self.ways, lambda some: trials.effects(some, how(config)),
            lambda pushes: texts.ratios(pushes, how(config)),
            groups=groups, doses=config.doses, rules=config.criteria, seed=config.seed, tick=self.tick,
        )  # fmt: skip
        best = choose(found, default=self.ways[0].name, groups=groups, seed=config.seed)
        by_method = [one for way in self.ways if (one := best_of(found, way.name)) is not None]
        by_method = [best if one.method == best.method else one for one in by_method]
        kinds = {layer.index: layer.kind for layer in self.model.layers}
        self.evidence["layers"] = [
            {**one.row(kinds[one.direction.layer]), "chosen": one is best} for one in found if one.method == best.method
        ]
        self.evidence["search"] = {
            "layers": len(pairs), "methods": len(self.ways), "tried": sum(one.tried for one in found),
            "folds": FOLDS, "prompts": len(groups), "chosen": best.method, "effect": best.effect.as_dict(),
        }  # fmt: skip
        way = next(way for way in self.ways if way.name == best.method)
        both = pairs[best.direction.layer]
        return Question(
            behavior=self.behavior, fit=self.fit,
            judged=self.held.take(config.prompts, seed=config.seed),
            direction=self.reliable(best.direction, both, way), dose=best.dose, pairs=both, way=way,
            by_method=by_method, others=self.others, general=self.general, scorer=self.scorer, config=config,
            deadline=self.deadline,
        )  # fmt: skip

    def reliable(self, direction: Direction, both: Pairs, way: Way) -> Direction:
        """The chosen direction with the agreement of its halves, which is only worth its time once."""
        if way.name == "random":
            return direction
        pairs = shuffle_labels(both, seed=self.seed("shuffled target")) if self.config.shuffle_labels else both
        return replace(direction, reliability=split_half(pairs, way.raw, seed=self.config.seed))

    def seed(self, purpose: str, i: int = 0) -> int:
        return stats.derived_seed(self.config.seed, purpose, i)


def unrelated_behaviors(model: HybridModel, behavior: Behavior) -> list[Behavior]:
    """The other shipped behaviours in words that the model knows: those in the same language, or else in any."""
    shipped = [read_behavior(name) for name in shipped_behaviors()]
    others = (other for other in shipped if other.name != behavior.name and other.hash != behavior.hash)
    found = [other for other in others if other.has_persona and knows_words(model, other)]
    return [other for other in found if other.language == behavior.language] or found
