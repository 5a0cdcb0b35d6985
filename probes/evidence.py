"""From evidence to criteria: each rule of the gate applied to what was observed, and a conclusion in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probes import stats
from probes.behaviors import Behavior
from probes.criteria import Criterion, GateCriteria, Outcome, Status, intact

Evidence = Mapping[str, Any]


def judge(evidence: Evidence, rules: GateCriteria) -> tuple[Criterion, ...]:
    """Apply every criterion, in the order of the gate."""
    counts = evidence["counts"]
    enough = counts["prompts"] >= rules.min_prompts and counts["groups"] >= rules.min_groups
    return (
        _data(counts, rules, enough),
        *_length(evidence, rules),
        _reliability(evidence, rules),
        *_decodability(evidence, rules, enough),
        *_effect(evidence, rules, enough),
        _dose_response(evidence, rules, enough),
        _controls(evidence, rules, enough),
        _necessity(evidence, rules),
        _specificity(evidence, rules, enough),
        *_damage(evidence, rules),
        *_reported(evidence),
    )


def control_threshold(controls: Mapping[str, Any]) -> tuple[float, str]:
    """The bar that the target has to clear, and the kind of control that sets it.

    Of drawn directions so many stay below it that one of their own kind would clear it with 1 - percentile, itself
    counted (`stats.null_bar`: with 20 draws and 95%, all of them). Unrelated behaviours are few and named: all do.
    """
    bars = {
        kind: stats.null_bar([abs(row["effect"]) for row in rows], confidence=_confidence(kind, controls))
        for kind, rows in controls["kinds"].items()
        if rows
    }
    if not bars:
        return math.nan, "none"
    worst = max(bars, key=lambda kind: bars[kind])
    return bars[worst], worst


def _confidence(kind: str, controls: Mapping[str, Any]) -> float:
    return 1.0 if kind == "unrelated" else controls["percentile"] / 100


def _line(
    number: int,
    name: str,
    status: Status,
    found: Mapping[str, Any] | float,
    *,
    rule: str,
    meaning: str,
    threshold: float | None = None,
    n: int | None = None,
) -> Criterion:
    """A criterion from an estimate (value, lower, upper, n) or from a bare number."""
    if not isinstance(found, Mapping):
        found = {"value": found, "lower": None, "upper": None, "n": 0}
    return Criterion(
        number=number,
        name=name,
        status=status,
        observed=found["value"],
        lower=found["lower"],
        upper=found["upper"],
        threshold=threshold,
        rule=rule,
        n=found["n"] if n is None else n,
        meaning=meaning,
    )


def _enough(found: Mapping[str, Any], rules: GateCriteria) -> bool:
    return found["n"] >= rules.min_prompts and found["groups"] >= rules.min_groups


def _status(passed: bool, enough: bool = True) -> Status:
    """Too little data never passes and never fails."""
    return ("pass" if passed else "fail") if enough else "inconclusive"


def _data(counts: Mapping[str, int], rules: GateCriteria, enough: bool) -> Criterion:
    return _line(
        0,
        "enough data",
        _status(enough, enough),
        float(counts["prompts"]),
        threshold=float(rules.min_prompts),
        rule=f"held-out prompts, in {counts['groups']} topic groups (>= {rules.min_groups}), >=",
        n=counts["prompts"],
        meaning="Held-out prompts and topic groups to decide on; fewer give INCONCLUSIVE.",
    )


def _length(evidence: Evidence, rules: GateCriteria) -> tuple[Criterion, ...]:
    """Of the data alone: where one side is longer, a direction of length would do as well."""
    return tuple(
        _line(
            0,
            f"length: {what}",
            _status(abs(found["value"] - 0.5) <= rules.length),
            abs(found["value"] - 0.5),
            threshold=rules.length,
            rule=f"|AUROC of length alone - 0.5| (AUROC {found['value']:.2f}) <=",
            n=found["n"],
            meaning=f"The two sides' {what} are about as long, so that length does not tell them apart.",
        )
        for what, found in evidence["length"].items()
    )


def _reliability(evidence: Evidence, rules: GateCriteria) -> Criterion:
    found = evidence["direction"]["reliability"]
    meaning = "Directions from two halves of the topics agree, so there is one thing to find."
    if found is None:
        return _line(1, "reliability", "reported", math.nan, rule="not defined for a drawn vector", meaning=meaning)
    status = _status(found["value"] >= rules.reliability)
    return _line(1, "reliability", status, found, threshold=rules.reliability, rule=">=", meaning=meaning)


def _decodability(evidence: Evidence, rules: GateCriteria, enough: bool) -> tuple[Criterion, ...]:
    auroc, gain = evidence["decodability"]["auroc"], evidence["decodability"]["selectivity"]
    words = "and persona turns" if evidence["decodability"]["crossed"] else "(but not on unseen persona turns)"
    return (
        _line(
            2,
            "decodability",
            _status(auroc["lower"] >= rules.auroc, enough),
            auroc,
            threshold=rules.auroc,
            rule="AUROC, lower end >=",
            meaning=f"On unseen topics {words} such a direction tells the two sides apart.",
        ),
        _line(
            2,
            "selectivity",
            _status(gain >= rules.selectivity, enough),
            gain,
            threshold=rules.selectivity,
            rule="AUROC above shuffled labels >=",
            n=auroc["n"],
            meaning="Directions from shuffled labels, without their share of the target, do so less, on either side.",
        ),
    )


def _effect(evidence: Evidence, rules: GateCriteria, enough: bool) -> tuple[Criterion, ...]:
    effect, wrong = evidence["effect"], evidence["wrong_way"]
    return (
        _line(
            3,
            "effect",
            _status(effect["lower"] > 0, enough),
            effect,
            threshold=0.0,
            rule="nats, lower end >",
            meaning="Adding the direction moves the odds of wanted against unwanted answers up, on unseen topics.",
        ),
        _line(
            3,
            "wrong way",
            _status(wrong["value"] <= rules.wrong_way, enough),
            wrong,
            threshold=rules.wrong_way,
            rule="share of prompts <=",
            meaning="Few single prompts move against it (are anti-steered).",
        ),
    )


def _window(evidence: Evidence, rules: GateCriteria) -> bool:
    """Whether enough doses, of both signs, leave the model coherent."""
    doses = evidence["dose_response"]["doses"]
    return len(doses) >= rules.min_doses and min(doses) < 0 < max(doses)


def _dose_response(evidence: Evidence, rules: GateCriteria, enough: bool) -> Criterion:
    doses, rho = evidence["dose_response"]["doses"], evidence["dose_response"]["spearman"]
    return _line(
        4,
        "dose-response",
        _status(_window(evidence, rules) and rho["value"] >= rules.dose_response, enough),
        rho,
        threshold=rules.dose_response,
        rule=f"Spearman over {len(doses)} coherent doses (>= {rules.min_doses}, both signs) >=",
        meaning="More of it does more, and its opposite does the opposite, while the model stays coherent.",
    )


def _drawn(evidence: Evidence) -> int:
    """Controls of the drawn kind that has fewer."""
    kinds = evidence["controls"]["kinds"]
    return min(len(kinds["random"]), len(kinds["shuffled labels"]))


def _controls(evidence: Evidence, rules: GateCriteria, enough: bool) -> Criterion:
    kinds, effect, drawn = evidence["controls"]["kinds"], evidence["effect"], _drawn(evidence)
    same = evidence["controls"]["target"]
    bar, worst = control_threshold(evidence["controls"])
    return _line(
        5,
        "controls",
        _status(
            min(effect["value"], same["value"]) > bar,
            enough and drawn >= rules.min_controls and same["n"] >= rules.min_control_prompts,
        ),
        effect,
        threshold=bar,
        rule=f"nats ({same['value']:.2f} on the controls' {same['n']} prompts), more than any unrelated direction and "
        f"{rules.control_percentile:g}% of the drawn ones (most: {worst}) >",
        n=sum(len(rows) for rows in kinds.values()),
        meaning="Directions of equal length that mean nothing, or something else, do less.",
    )


def _necessity(evidence: Evidence, rules: GateCriteria) -> Criterion:
    found = evidence["necessity"]
    meaning = "Taking the direction out weakens the behaviour where the model shows it."
    if found is None:
        rule = "no held-out prompt shows the behaviour"
        return _line(6, "necessity", "inconclusive", math.nan, rule=rule, meaning=meaning)
    drop, same = found["drop"], found["beside"]
    drawn = found["random_drops"]
    bar = stats.null_bar([abs(lost) for lost in drawn], confidence=rules.control_percentile / 100)
    return _line(
        6,
        "necessity",
        _status(
            drop["lower"] > 0 and min(drop["value"], same["value"]) > bar,
            _enough(drop, rules) and len(drawn) >= rules.min_controls and same["n"] >= rules.min_control_prompts,
        ),
        drop,
        threshold=bar,
        rule=f"nats lost ({same['value']:.2f} on the controls' {same['n']} prompts), lower end > 0 and more than by "
        "random directions >",
        meaning=meaning,
    )


def _specificity(evidence: Evidence, rules: GateCriteria, enough: bool) -> Criterion:
    rows, meaning = evidence["specificity"], "Behaviours that have nothing to do with it move much less."
    if not rows:
        rule = "no other shipped behaviour is in words that the model knows"
        return _line(7, "specificity", "inconclusive", math.nan, rule=rule, meaning=meaning)
    worst = max(rows, key=lambda row: abs(row["share"]["value"]))
    low, high = sorted((abs(worst["share"]["lower"]), abs(worst["share"]["upper"])))
    if worst["share"]["lower"] < 0 < worst["share"]["upper"]:
        low = 0.0
    found = {**worst["share"], "value": abs(worst["share"]["value"]), "lower": low, "upper": high}
    return _line(
        7,
        "specificity",
        _status(found["value"] <= rules.specificity, enough),
        found,
        threshold=rules.specificity,
        rule=f"|effect| on {worst['name']}, as a share of its own, <=",
        meaning=meaning,
    )


def _damage(evidence: Evidence, rules: GateCriteria) -> tuple[Criterion, ...]:
    hurt, made, limit = evidence["damage"], evidence["generation"], rules.perplexity_ratio
    rise = made["steered"]["repetition"] - made["unsteered"]["repetition"]
    return (
        _line(
            8,
            "damage: perplexity",
            _status(intact(hurt["perplexity_ratio"], limit), hurt["tokens"] >= rules.min_tokens),
            hurt["perplexity_ratio"],
            threshold=limit,
            rule="ratio on general text, or its inverse, <=",
            n=hurt["tokens"],
            meaning="The steered model still models ordinary text.",
        ),
        _line(
            8,
            "damage: repetition",
            _status(rise <= rules.repetition, made["steered"]["n"] >= rules.min_answers),
            rise,
            threshold=rules.repetition,
            rule="rise of repeated trigrams <=",
            n=made["steered"]["n"],
            meaning="Free answers do not fall into loops.",
        ),
        _line(
            8,
            "damage: KL",
            "reported",
            hurt["kl"],
            rule="nats a token on general text",
            n=hurt["tokens"],
            meaning="How far the next-token distribution moves at the working dose.",
        ),
    )


def _reported(evidence: Evidence) -> tuple[Criterion, ...]:
    meaning = "Effect when the tokens of this phase are edited."
    phases = [
        _line(9, f"phase: {row['phase']}", "reported", row["effect"], rule="nats", meaning=meaning)
        for row in evidence["phases"]
    ]
    gain = evidence["baseline"]["persona"].get("gain") or math.nan
    rule = "nats" if isinstance(gain, dict) else "no personas, and no way to ask is known for its language"
    meaning = "What simply asking does, by a system turn, without any intervention."
    asked = _line(10, "prompt baseline", "reported", gain, rule=rule, meaning=meaning)
    itself = _line(
        3,
        "wanted answer itself",
        "reported",
        evidence["wanted"],
        rule="nats",
        meaning="How far the wanted answer's own log-probability moves; the rest of the effect is the unwanted one's.",
    )
    return (*phases, asked, itself, *_elsewhere(evidence))


def _elsewhere(evidence: Evidence) -> tuple[Criterion, ...]:
    """The working intervention on prompts unlike those that it was made from."""
    found, meaning = evidence["ood"], "The same on other templates, about other topics (out of distribution)."
    if found is None:
        rule = "no other templates are known for its language; the card can keep forms apart"
        return (_line(3, "effect elsewhere", "reported", math.nan, rule=rule, meaning=meaning),)
    return (
        _line(3, "effect elsewhere", "reported", found["effect"], rule="nats", meaning=meaning),
        _line(
            3,
            "wrong way elsewhere",
            "reported",
            found["wrong_way"],
            rule="share of prompts",
            meaning="Single prompts out of distribution that move against it.",
        ),
    )


def sentence(
    outcome: Outcome, criteria: Sequence[Criterion], evidence: Evidence, behavior: Behavior, rules: GateCriteria
) -> str:
    """The verdict in words that a newcomer understands."""
    if outcome == "PASS":
        effect, (bar, _) = evidence["effect"], control_threshold(evidence["controls"])
        moved, damage = float(np.mean([row["effect"] > 0 for row in evidence["prompts"]])), evidence["damage"]
        return (
            f"adding the direction moves the odds of the wanted answer, where the model {behavior.wanted_means}, "
            f"against the unwanted one up on {moved:.0%} of {effect['n']} unseen prompts, by {effect['value']:.2f} "
            f"nats on average; of equally long directions the unrelated ones, and {rules.control_percentile:g}% of the "
            f"meaningless ones, do no more than {bar:.2f}; taking it out weakens the behaviour; the perplexity of "
            f"ordinary text changes by a factor of {damage['perplexity_ratio']:.2f} (limit "
            f"{rules.perplexity_ratio:g})."
        )
    if outcome == "FAIL":
        found = "; ".join(_shortcoming(c, evidence, rules) for c in criteria if c.status == "fail")
        return f"the evidence does not show that this direction causes the behaviour: {found}."
    return f"there is too little data to decide: {'; '.join(_missing(criteria, evidence, rules))}."


SHORTCOMINGS = {
    "length: prompts": "the prompts of one side are longer, so that what was found may be length",
    "length: answers": "the answers of one side are longer, so that what was found may be length",
    "specificity": "it moves another behaviour as well",
    "reliability": "two halves of the topics give different directions",
    "decodability": "it is not shown to tell the two sides apart on what it was not made from",
    "selectivity": "directions from shuffled labels tell the sides apart nearly as well",
    "effect": "adding it is not shown to make the wanted answers likelier than the unwanted ones",
    "wrong way": "too many prompts move the wrong way",
    "dose-response": "more of it does not steadily do more",
    "controls": "meaningless or unrelated directions do as much",
    "necessity": "taking it out is not shown to weaken the behaviour more than taking out random directions",
    "damage: perplexity": "the steered model no longer models ordinary text as before",
    "damage: repetition": "its free answers fall into loops or silence",
}
NARROW = "too few doses of both signs leave the model coherent, so a dose-response cannot be seen"


def _shortcoming(criterion: Criterion, evidence: Evidence, rules: GateCriteria) -> str:
    if criterion.name == "dose-response" and not _window(evidence, rules):
        return NARROW
    return SHORTCOMINGS[criterion.name]


def _missing(criteria: Sequence[Criterion], evidence: Evidence, rules: GateCriteria) -> list[str]:
    """What there was too little of, in words."""
    undecided, counts = {c.name: c for c in criteria if c.status == "inconclusive"}, evidence["counts"]
    found = []
    if "enough data" in undecided:
        found.append(
            f"{counts['prompts']} held-out prompts in {counts['groups']} topic groups, where {rules.min_prompts} in "
            f"{rules.min_groups} are needed"
        )
    elif not (necessary := evidence["necessity"]) or not _enough(necessary["drop"], rules):
        found.append("too few held-out prompts on which the model shows the behaviour, so it cannot be taken out")
    elif (drawn := len(necessary["random_drops"])) < rules.min_controls:
        found.append(f"{drawn} random directions taken out, where {rules.min_controls} are needed")
    if "specificity" in undecided and not evidence["specificity"]:
        found.append("no other behaviour in words that the model knows, so it may be about anything")
    if _drawn(evidence) < rules.min_controls:
        found.append(f"{_drawn(evidence)} controls of each drawn kind, where {rules.min_controls} are needed")
    if (run := evidence["controls"]["target"]["n"]) < rules.min_control_prompts:
        found.append(f"controls on {run} prompts, where {rules.min_control_prompts} are needed")
    if "damage: perplexity" in undecided:
        found.append(f"{evidence['damage']['tokens']} tokens of ordinary text, where {rules.min_tokens} are needed")
    if "damage: repetition" in undecided:
        answers = evidence["generation"]["steered"]["n"]
        found.append(f"{answers} free answers, where {rules.min_answers} are needed")
    return found
