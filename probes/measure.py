"""What is measured on the held-out split, once, for a direction and a dose that were chosen before.

`measure` fills the evidence, as plain values, in the order of the criteria. Everything that pushes the held-out prompts
goes through one `Trials`, so prompts and answers are computed plainly once, and all doses, controls, phases and modes
side by side from the layer on where they begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from probes import stats
from probes.answers import Scorer
from probes.behaviors import Behavior
from probes.controls import centred, random_direction, shuffled_direction
from probes.cost import Cost
from probes.criteria import intact
from probes.damage import General, repetition
from probes.directions import Direction, mean_difference, vector_hash
from probes.free import Asked, free_answers
from probes.gate import GateConfig
from probes.model import HybridModel
from probes.ood import out_of_distribution
from probes.pairs import Pairs, contrast
from probes.propensity import Propensity, prepare
from probes.search import FOLDS, Candidate, Way
from probes.steering import PHASES, Phase
from probes.texts import Texts
from probes.trials import How, Trial, Trials, start_of

DOSE_TEXTS = 12  # general texts behind each point of the dose curve; the working dose is judged on all of them
MIN_WORDINGS = 6  # persona turns of which some can be held out
UNRELATED = 32  # items of another behaviour that its own direction is made from
LEAST_CONTROLS, MOST_CONTROLS = 5, 500  # what a budget may make of the number of controls


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be judged, and on what.

    Attributes:
        fit, judged: the topics that everything was chosen on, and those that decide.
        pairs: both sides on the fit split, at the direction's layer. way: how the direction was made of them.
        by_method: each method's best candidate of the search, for a look beside the one that is judged.
        others: behaviours that should not move. scorer: says on which side a free answer is.
        deadline: on time.monotonic's clock; None for none.
    """

    behavior: Behavior
    fit: Behavior
    judged: Behavior
    direction: Direction
    dose: float
    pairs: Pairs
    way: Way
    by_method: Sequence[Candidate]
    others: Sequence[Behavior]
    general: General
    scorer: Scorer
    config: GateConfig
    deadline: float | None = None


def measure(
    model: HybridModel, asked: Question, evidence: dict[str, Any], *, cost: Cost, tick: Callable[[str], None]
) -> None:
    """Fill `evidence` with what was observed on the held-out split. `tick` is told what has been done."""
    _Held(model, asked, evidence, cost, tick).run()


class _Held:
    def __init__(
        self, model: HybridModel, asked: Question, evidence: dict[str, Any], cost: Cost, tick: Callable[[str], None]
    ):
        self.model, self.asked, self.evidence, self.cost, self.tick = model, asked, evidence, cost, tick
        self.config, self.seed = asked.config, asked.config.seed
        self.direction, self.dose = asked.direction, asked.dose
        starts = {start_of(one.direction) for one in asked.by_method} | {start_of(asked.direction)}
        self.trials = self.begin(asked.judged, starts=starts)
        self.base = self.trials.base

    def begin(self, behavior: Behavior, *, persona: Any = None, starts: set[int] | None = None) -> Trials:
        return Trials(
            self.model, prepare(self.model, behavior, persona=persona), starts=starts or {start_of(self.direction)},
            reuse=self.config.reuse, cost=self.cost,
        )  # fmt: skip

    def run(self) -> None:
        direction = self.direction
        self.evidence["direction"] = {
            "method": direction.method,
            "hash": vector_hash(direction.vector),
            "contrast": direction.contrast,
            "norm": direction.norm,
            "gap": direction.gap,
            "n": direction.n,
            "heads": direction.heads,
            "reliability": direction.reliability.as_dict() if direction.reliability else None,
        }
        self.doses()
        self.beside()
        self.necessity_and_baseline()
        self.specificity()
        self.out_of_distribution()
        self.free_answers()
        self.controls()
        self.evidence["counts"] = {
            "prompts": len(self.base.ids),
            "groups": len(set(self.base.groups)),
            "controls": len(self.evidence["controls"]["kinds"]["random"]),
        }

    # -- the direction itself -----------------------------------------------------------------------------------------

    def doses(self) -> None:
        """The dose curve, the effect at the working dose prompt by prompt, and what it does to general text."""
        doses, starts = self.config.doses, {start_of(self.direction)}
        pushes = [(self.direction, dose) for dose in doses]
        sample = Texts(
            self.model, self.asked.general.take(DOSE_TEXTS), starts=starts, reuse=self.config.reuse, cost=self.cost
        )
        whole = Texts(self.model, self.asked.general, starts=starts, reuse=self.config.reuse, cost=self.cost)
        edits = [push for push in pushes if push[1]]  # at dose 0 nothing is run
        scored = self.trials.scores([Trial(pushes=(push,)) for push in edits], self.how())
        steered = {dose: score for (_, dose), score in zip(edits, scored, strict=True)} | {0.0: self.base}
        effects = {dose: steered[dose].minus(self.base) for dose in doses}
        ratios = iter(sample.ratios(edits, self.how()))
        rows, curve = [], []
        for dose in doses:
            values = [b + e for b, e in zip(self.base.values, effects[dose], strict=True)]
            rows.append(
                {
                    "dose": dose,
                    "propensity": self.mean(values),
                    "effect": self.mean(effects[dose]),
                    "perplexity_ratio": next(ratios) if dose else 1.0,
                }
            )
            curve.append(values)
        window = coherent_window(rows, self.config.criteria.perplexity_ratio)
        inside = [i for i, row in enumerate(rows) if row["dose"] in window]
        response = stats.spearman_over_groups(
            [doses[i] for i in inside], [curve[i] for i in inside], self.base.groups, seed=self.seed
        )
        self.target = effects[self.dose]
        self.evidence["doses"] = [{**row, "coherent": row["dose"] in window} for row in rows]
        self.evidence["dose_response"] = {"doses": [doses[i] for i in inside], "spearman": response.as_dict()}
        self.evidence["prompts"] = [
            {"id": i, "group": g, "baseline": b, "effect": e}
            for i, g, b, e in zip(self.base.ids, self.base.groups, self.base.values, self.target, strict=True)
        ]
        self.evidence["effect"] = self.mean(self.target)
        wanted = zip(steered[self.dose].wanted, self.base.wanted, strict=True)
        self.evidence["wanted"] = self.mean([after - before for after, before in wanted])
        self.evidence["wrong_way"] = self.wrong_way(self.base, self.target)
        self.evidence["damage"] = asdict(whole.damage((self.direction, self.dose), self.how()))
        self.tick("doses")

    def beside(self) -> None:
        """Other phases, other ways of editing, and the other methods, each at the layer and dose that suited it."""
        trial = [Trial.of(self.direction, self.dose)]
        self.evidence["phases"] = [
            {
                "phase": phase,
                "effect": self.mean(self.trials.effects(trial, self.how(phase=phase))[0]),
                "working": phase == self.config.phase,
            }
            for phase in PHASES
        ]
        self.tick("phases")
        self.evidence["modes"] = [
            {
                "mode": mode,
                "effect": self.mean(self.trials.effects(trial, self.how(mode=mode))[0]),
                "working": mode == self.config.mode,
            }
            for mode in ("add", "ablate", "clamp", "rotate")
            if not (mode == "rotate" and self.config.form == "initial")  # an empty state cannot be turned
        ]
        self.tick("modes")
        several = len(self.asked.by_method)
        self.evidence["methods"] = []
        for one in self.asked.by_method:
            own = one.direction.vector is self.direction.vector and one.dose == self.dose
            values = self.target if own else self.trials.effects([Trial.of(one.direction, one.dose)], self.how())[0]
            sure = stats.mean(values, self.base.groups, seed=self.seed, confidence=1 - 0.05 / several)
            cosine = None
            if one.direction.layer == self.direction.layer:
                cosine = float(one.direction.vector @ self.direction.vector)
            self.evidence["methods"].append(
                {
                    "method": one.method, "layer": one.direction.layer, "dose": one.dose,
                    "searched": one.effect.as_dict(), "bar": one.bar, "auroc": one.auroc,
                    "perplexity_ratio": one.perplexity_ratio, "effect": sure.as_dict(), "cosine": cosine,
                    "judged": own,
                }
            )  # fmt: skip
        self.tick("methods")

    # -- where the behaviour is shown, and where it should not be -----------------------------------------------------

    def necessity_and_baseline(self) -> None:
        """Take the direction out where the model shows the behaviour, beside taking out random directions; and ask.

        Shown means: under the wanted persona, or, for a behaviour without personas, on prompts that lean to wanted.
        """
        judged, persona = self.asked.judged, self.asked.judged.has_persona
        leaning = {i for i, value in zip(self.base.ids, self.base.values, strict=True) if value > 0}
        shown = judged if persona else replace(judged, items=tuple(i for i in judged.items if i.id in leaning))
        self.evidence["baseline"] = {"propensity": self.base.estimate(seed=self.seed).as_dict(), "persona": {}}
        self.evidence["necessity"] = None
        if shown.items:
            trials = self.begin(shown, persona="wanted" if persona else None)
            beside = self.some(trials, shown)
            drawn = [
                random_direction(self.direction, seed=self.draw("necessity", i)) for i in range(self.config.controls)
            ]
            how = self.how(phase="both", mode="ablate")

            def lost(some: Trials, directions: Sequence[Direction]) -> list[list[float]]:
                return [[-e for e in one] for one in some.effects([Trial.of(one, 0.0) for one in directions], how)]

            (drop,) = lost(trials, [self.direction])
            known = dict(zip(trials.base.ids, drop, strict=True))
            self.evidence["necessity"] = {
                "where": "wanted persona" if persona else "prompts that lean to wanted",
                "before": trials.base.estimate(seed=self.seed).as_dict(),
                "drop": stats.mean(drop, trials.base.groups, seed=self.seed).as_dict(),
                "beside": self.among(known, beside),
                "random_drops": [
                    float(np.mean(one)) for one in lost(beside, [centred(one, self.asked.pairs) for one in drawn])
                ],
            }
        self.tick("necessity")
        asked = Asked.of(judged)
        if asked is None:
            return
        told = trials.base if persona else asked.propensity(self.model, "wanted")
        other = asked.propensity(self.model, "unwanted")
        self.evidence["baseline"]["persona"] = {
            "how": asked.how,
            "wanted": told.estimate(seed=self.seed).as_dict(),
            "unwanted": other.estimate(seed=self.seed).as_dict(),
            "gain": stats.mean(told.minus(self.base), self.base.groups, seed=self.seed).as_dict(),
        }
        self.tick("baseline")

    def specificity(self) -> None:
        """What the working intervention does to every other behaviour, in shares of what it does to its own."""
        own = abs(self.evidence["effect"]["value"]) or np.inf
        rows = []
        for other in self.asked.others:
            trials = self.begin(other.take(self.config.search_prompts, seed=self.seed))
            (values,) = trials.effects([Trial.of(self.direction, self.dose)], self.how())
            effect = stats.mean(values, trials.base.groups, seed=self.seed)
            share = stats.mean([v / own for v in values], trials.base.groups, seed=self.seed)
            rows.append({"name": other.name, "effect": effect.as_dict(), "share": share.as_dict()})
        self.evidence["specificity"] = rows
        self.tick("specificity")

    def out_of_distribution(self) -> None:
        found = out_of_distribution(self.asked.behavior, self.asked.judged, self.asked.fit.groups)
        self.evidence["ood"] = None
        if found is not None:
            other, what = found
            trials = self.begin(other.take(self.config.prompts, seed=self.seed))
            (values,) = trials.effects([Trial.of(self.direction, self.dose)], self.how())
            self.evidence["ood"] = {
                "what": what,
                "effect": stats.mean(values, trials.base.groups, seed=self.seed).as_dict(),
                "wrong_way": self.wrong_way(trials.base, values),
            }
        self.tick("out of distribution")

    # -- what means nothing -------------------------------------------------------------------------------------------

    def controls(self) -> None:
        """The same dose along directions that should do nothing, and how well shuffled labels separate the sides."""
        held = self.record(self.asked.judged)
        unrelated = [mean_difference(self.record(other.take(UNRELATED, seed=self.seed))) for other in self.asked.others]
        beside = self.some(self.trials, self.asked.judged)
        effects: dict[str, list[dict[str, Any]]] = {
            "random": [], "shuffled labels": [], "unrelated": self.pushed(beside, unrelated, named=True),
        }  # fmt: skip
        areas: list[float] = []
        for i in self.rounds():
            drawn = [
                centred(random_direction(self.direction, seed=self.draw("control", j)), self.asked.pairs) for j in i
            ]
            shuffled = [
                shuffled_direction(
                    self.asked.pairs, self.direction, seed=self.draw("control", j), raw=self.asked.way.null
                )
                for j in i
            ]
            effects["random"] += self.pushed(beside, drawn)
            effects["shuffled labels"] += self.pushed(beside, shuffled)
            areas += [stats.auroc(*held.scores(one.vector), held.groups, draws=1).value for one in shuffled]
            self.tick(f"controls: {len(effects['random'])} of each kind")
        known = dict(zip(self.base.ids, self.target, strict=True))
        self.evidence["controls"] = {
            "kinds": effects, "percentile": self.config.criteria.control_percentile,
            "target": self.among(known, beside),
        }  # fmt: skip
        null = [max(area, 1 - area) for area in areas]  # a shuffled direction has no sign: either end separates
        above, below, crossed = self.unseen(held)
        area = stats.auroc(above, below, held.groups, seed=self.seed)
        selectivity = area.value - float(np.mean(null))
        self.evidence["decodability"] = {
            "auroc": area.as_dict(), "shuffled": null, "selectivity": selectivity, "crossed": crossed,
        }  # fmt: skip

    def unseen(self, held: Pairs) -> tuple[list[float], list[float], bool]:
        """Where both sides of the held-out pairs lie, and whether along directions that knew no persona turn of theirs.

        The topics are held out, but persona turns come again with every topic. So for each of a few parts of them a
        direction is made in the same way from the fit split's other ones, and its scale is set to its own two sides.
        """
        fit = self.asked.pairs
        names = sorted({*fit.wordings, *held.wordings})
        if len(names) < MIN_WORDINGS:
            return *held.scores(self.direction.vector), False
        order = np.random.default_rng(self.draw("wordings", 0)).permutation(len(names)) % FOLDS
        part = dict(zip(names, order.tolist(), strict=True))
        found = np.zeros((2, len(held.groups)))
        for fold in range(FOLDS):
            own = np.array([part[words] == fold for words in held.wordings])
            rest = fit.where(np.array([part[words] != fold for words in fit.wordings]))
            if not own.any() or rest.equal:  # nothing to tell the sides apart by
                continue
            one = self.asked.way.extract(rest)
            found[:, own] = (np.array(held.where(own).scores(one.vector)) - one.midpoint) / (one.gap or 1.0)
        return found[0].tolist(), found[1].tolist(), True

    def rounds(self) -> Iterator[range]:
        """Which controls to run next: all that were asked for, or with a budget as many as there is time for."""
        asked, deadline = self.config.controls, self.asked.deadline
        if deadline is None:
            yield range(asked)
            return
        done, begun = 0, time.monotonic()
        while done < MOST_CONTROLS:
            yield range(done, done + LEAST_CONTROLS)
            done += LEAST_CONTROLS
            now = time.monotonic()
            if now + (now - begun) / (done / LEAST_CONTROLS) > deadline:
                break
        self.evidence["budget"] = {"seconds": self.config.budget, "asked": asked, "controls": done}

    def pushed(self, trials: Trials, directions: Sequence[Direction], *, named: bool = False) -> list[dict[str, Any]]:
        """Effects of directions at the target's dose and length."""
        matched = [Trial.of(replace(one, norm=self.direction.norm), self.dose) for one in directions]
        return [
            {
                "effect": float(np.mean(values)),
                "name": one.behavior if named else "",
                "cosine": float(self.direction.vector @ one.vector),
            }
            for one, values in zip(directions, trials.effects(matched, self.how()), strict=True)
        ]

    def some(self, trials: Trials, behavior: Behavior) -> Trials:
        """The trials on those prompts on which controls are run."""
        return trials.only({item.id for item in behavior.take(self.config.control_prompts, seed=self.seed).items})

    def among(self, known: dict[str, float], trials: Trials) -> dict[str, Any]:
        """What is known of the target on the prompts of the controls."""
        return stats.mean([known[i] for i in trials.base.ids], trials.base.groups, seed=self.seed).as_dict()

    # -- free answers -------------------------------------------------------------------------------------------------

    def free_answers(self) -> None:
        """Free answers without, with and against the direction, and when asked: sides, repetition, examples."""
        config, some = self.config, self.asked.judged.take(self.config.generations, seed=self.seed)
        answers = free_answers(
            self.model, some, self.direction, self.dose, self.how(), max_new_tokens=config.max_new_tokens,
            reuse=config.reuse, cost=self.cost,
        )  # fmt: skip
        sides = {label: self.asked.scorer.sides(some.items, texts) for label, texts in answers.items()}
        self.evidence["generation"] = {
            label: {
                "shares": {side: found.count(side) / max(len(found), 1) for side in ("wanted", "unwanted", "neither")},
                # an intervention that silences a model breaks it as much as one that sends it into loops
                "repetition": float(
                    np.mean([repetition(t) if t or label in ("unsteered", "asked") else 1.0 for t in answers[label]])
                ),
                "n": len(found),
            }
            for label, found in sides.items()
        }
        self.evidence["scorer"] = self.asked.scorer.recipe()
        self.evidence["examples"] = [
            {
                "id": item.id,
                "prompt": item.messages[-1]["content"],
                **{label: texts[row] for label, texts in answers.items()},
                "sides": {label: found[row] for label, found in sides.items()},
            }
            for row, item in enumerate(some.items)
        ]
        self.tick("free answers")

    # -- shared -------------------------------------------------------------------------------------------------------

    def how(self, *, phase: Phase | None = None, mode: str | None = None) -> How:
        """The working intervention, or one like it; before a prompt there is nothing to edit but the initial state."""
        return how(self.config, phase=phase, mode=mode)

    def mean(self, values: Sequence[float]) -> dict[str, Any]:
        return stats.mean(values, self.base.groups, seed=self.seed).as_dict()

    def wrong_way(self, base: Propensity, values: Sequence[float]) -> dict[str, Any]:
        return stats.share([value < 0 for value in values], base.groups, seed=self.seed).as_dict()

    def record(self, behavior: Behavior) -> Pairs:
        return record(self.model, behavior, [self.direction.layer], self.config)[self.direction.layer]

    def draw(self, purpose: str, i: int) -> int:
        return stats.derived_seed(self.seed, purpose, i)


def how(config: GateConfig, *, phase: Phase | None = None, mode: str | None = None) -> How:
    """What a configuration does with a direction, in another phase or mode where one is named."""
    phase = phase or config.phase
    form = "end" if config.form == "initial" and phase != "prefill" else config.form
    return How(phase=phase, mode=mode or config.mode, form=form)


def record(model: HybridModel, behavior: Behavior, layers: Sequence[int], config: GateConfig) -> dict[int, Pairs]:
    """Both sides of a behaviour at the site of a configuration, in its heads."""
    found = contrast(model, behavior, layers=layers, site=config.site, progress=False)
    return {i: pairs.only(config.heads) for i, pairs in found.items()} if config.heads else found


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
