"""From evidence to criteria: each rule of the gate applied to what was observed, and a conclusion in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from probes.behaviors import Behavior
from probes.criteria import Criterion, GateCriteria, Outcome, Status

Evidence = Mapping[str, Any]


def judge(evidence: Evidence, rules: GateCriteria) -> tuple[Criterion, ...]:
    """Apply every criterion, in the order of the gate."""
    counts = evidence["counts"]
    enough = counts["prompts"] >= rules.min_prompts and counts["groups"] >= rules.min_groups
    return (
        _data(counts, rules),
        _reliability(evidence, rules),
        *_decodability(evidence, rules, enough),
        *_effect(evidence, rules, enough),
        _dose_response(evidence, rules, enough),
        _controls(evidence, rules, enough),
        *_necessity(evidence, rules, enough),
        *_damage(evidence, rules),
        *_reported(evidence),
    )


def control_threshold(controls: Mapping[str, Any]) -> tuple[float, str]:
    """The bar that the target has to clear: the highest, over kinds, of the given percentile of |effect|."""
    bars = {
        kind: float(np.percentile([abs(row["effect"]) for row in rows], controls["percentile"]))
        for kind, rows in controls["kinds"].items()
        if rows
    }
    if not bars:
        return math.nan, "none"
    worst = max(bars, key=lambda kind: bars[kind])
    return bars[worst], worst


def _status(passed: bool, enough: bool = True) -> Status:
    """Too little data never passes and never fails."""
    return ("pass" if passed else "fail") if enough else "inconclusive"


def _data(counts: Mapping[str, int], rules: GateCriteria) -> Criterion:
    enough = counts["prompts"] >= rules.min_prompts and counts["groups"] >= rules.min_groups
    return Criterion(
        number=0, name="enough data", status=_status(enough, enough), observed=counts["prompts"],
        threshold=rules.min_prompts, rule=f"at least {rules.min_groups} held-out groups, and prompts >=", n=counts["groups"],
        meaning="Held-out prompts and topic groups to decide on; fewer give INCONCLUSIVE.",
    )  # fmt: skip


def _reliability(evidence: Evidence, rules: GateCriteria) -> Criterion:
    found = evidence["direction"]["reliability"]
    meaning = "Directions from two halves of the topics agree, so there is one thing to find."
    if found is None:
        return Criterion(
            number=1, name="reliability", status="reported", observed=math.nan, rule="not defined for a drawn vector",
            meaning=meaning,
        )  # fmt: skip
    return Criterion(
        number=1, name="reliability", status=_status(found["value"] >= rules.reliability), observed=found["value"],
        lower=found["lower"], upper=found["upper"], threshold=rules.reliability, rule=">=", n=found["n"], meaning=meaning,
    )  # fmt: skip


def _decodability(evidence: Evidence, rules: GateCriteria, enough: bool) -> tuple[Criterion, ...]:
    auroc, gain = evidence["decodability"]["auroc"], evidence["decodability"]["selectivity"]
    return (
        Criterion(
            number=2, name="decodability", status=_status(auroc["lower"] >= rules.auroc, enough), observed=auroc["value"],
            lower=auroc["lower"], upper=auroc["upper"], threshold=rules.auroc, rule="AUROC, lower end >=", n=auroc["n"],
            meaning="On unseen topics the direction tells the two sides apart.",
        ),
        Criterion(
            number=2, name="selectivity", status=_status(gain >= rules.selectivity, enough), observed=gain,
            threshold=rules.selectivity, rule="AUROC above shuffled labels >=", n=auroc["n"],
            meaning="Directions from shuffled labels do not.",
        ),
    )  # fmt: skip


def _effect(evidence: Evidence, rules: GateCriteria, enough: bool) -> tuple[Criterion, ...]:
    effect = evidence["effect"]
    wrong = float(np.mean([row["effect"] < 0 for row in evidence["prompts"]]))
    return (
        Criterion(
            number=3, name="effect", status=_status(effect["lower"] > 0, enough), observed=effect["value"],
            lower=effect["lower"], upper=effect["upper"], threshold=0.0, rule="nats, lower end >", n=effect["n"],
            meaning="Adding the direction makes the wanted answer more likely on unseen topics.",
        ),
        Criterion(
            number=3, name="wrong way", status=_status(wrong <= rules.wrong_way, enough), observed=wrong,
            threshold=rules.wrong_way, rule="share of prompts <=", n=effect["n"],
            meaning="Few single prompts move against it.",
        ),
    )  # fmt: skip


def _dose_response(evidence: Evidence, rules: GateCriteria, enough: bool) -> Criterion:
    response = evidence["dose_response"]
    doses, rho = response["doses"], response["spearman"]
    window = len(doses) >= rules.min_doses and min(doses) < 0 < max(doses)
    return Criterion(
        number=4, name="dose-response", status=_status(window and rho["value"] >= rules.dose_response, enough),
        observed=rho["value"], lower=rho["lower"], upper=rho["upper"], threshold=rules.dose_response,
        rule=f"Spearman over {len(doses)} coherent doses (>= {rules.min_doses}, both signs) >=", n=rho["n"],
        meaning="More of it does more, and its opposite does the opposite, while the model stays coherent.",
    )  # fmt: skip


def _controls(evidence: Evidence, rules: GateCriteria, enough: bool) -> Criterion:
    kinds = evidence["controls"]["kinds"]
    drawn = min(len(kinds["random"]), len(kinds["shuffled labels"]))
    bar, worst = control_threshold(evidence["controls"])
    effect = evidence["effect"]
    return Criterion(
        number=5, name="controls", status=_status(effect["value"] > bar, enough and drawn >= rules.min_controls),
        observed=effect["value"], lower=effect["lower"], upper=effect["upper"], threshold=bar,
        rule=f"nats, above the {rules.control_percentile:g}th percentile of |effect| ({worst}) >",
        n=sum(len(rows) for rows in kinds.values()),
        meaning="Directions of equal length that mean nothing, or something else, do less.",
    )  # fmt: skip


def _necessity(evidence: Evidence, rules: GateCriteria, enough: bool) -> tuple[Criterion, ...]:
    found = evidence["necessity"]
    meaning = "Taking the direction out weakens the behaviour where the model shows it."
    if found is None:
        return (
            Criterion(
                number=6, name="necessity", status="inconclusive", observed=math.nan,
                rule="no held-out prompt shows the behaviour", meaning=meaning,
            ),
        )  # fmt: skip
    drop = found["drop"]
    bar = float(np.percentile(np.abs(found["random_drops"]), rules.control_percentile))
    return (
        Criterion(
            number=6, name="necessity", status=_status(drop["lower"] > 0 and drop["value"] > bar, enough),
            observed=drop["value"], lower=drop["lower"], upper=drop["upper"], threshold=bar,
            rule="nats lost, lower end > 0 and more than by random directions >", n=drop["n"], meaning=meaning,
        ),
    )  # fmt: skip


def _damage(evidence: Evidence, rules: GateCriteria) -> tuple[Criterion, ...]:
    hurt, made = evidence["damage"], evidence["generation"]
    rise = made["steered"]["repetition"] - made["unsteered"]["repetition"]
    return (
        Criterion(
            number=8, name="damage: perplexity", status=_status(hurt["perplexity_ratio"] <= rules.perplexity_ratio),
            observed=hurt["perplexity_ratio"], threshold=rules.perplexity_ratio, rule="ratio on general text <=",
            n=hurt["tokens"], meaning="The steered model still models ordinary text.",
        ),
        Criterion(
            number=8, name="damage: repetition", status=_status(rise <= rules.repetition), observed=rise,
            threshold=rules.repetition, rule="rise of repeated trigrams <=", n=made["steered"]["n"],
            meaning="Free answers do not fall into loops.",
        ),
        Criterion(
            number=8, name="damage: KL", status="reported", observed=hurt["kl"], rule="nats a token on general text",
            n=hurt["tokens"], meaning="How far the next-token distribution moves at the working dose.",
        ),
    )  # fmt: skip


def _reported(evidence: Evidence) -> tuple[Criterion, ...]:
    lines = [
        Criterion(
            number=9, name=f"phase: {row['phase']}", status="reported", observed=row["effect"]["value"],
            lower=row["effect"]["lower"], upper=row["effect"]["upper"], rule="nats", n=row["effect"]["n"],
            meaning="Effect when only these tokens are edited.",
        )
        for row in evidence["phases"]
    ]  # fmt: skip
    gain = evidence["baseline"]["persona"].get("gain")
    if gain:
        lines.append(
            Criterion(
                number=10, name="prompt baseline", status="reported", observed=gain["value"], lower=gain["lower"],
                upper=gain["upper"], rule="nats", n=gain["n"], meaning="What simply asking (the wanted persona) does.",
            )
        )  # fmt: skip
    return tuple(lines)


def sentence(outcome: Outcome, criteria: Sequence[Criterion], evidence: Evidence, behavior: Behavior) -> str:
    """The verdict in words that a newcomer understands."""
    effect = evidence["effect"]
    moved = float(np.mean([row["effect"] > 0 for row in evidence["prompts"]]))
    if outcome == "PASS":
        bar, _ = control_threshold(evidence["controls"])
        return (
            f"adding the direction moves {moved:.0%} of {effect['n']} unseen prompts towards answers where the model "
            f"{behavior.wanted_means}, by {effect['value']:.2f} nats on average where meaningless directions reach "
            f"{bar:.2f}; taking it out weakens the behaviour, and ordinary text is left intact."
        )
    failed = [c for c in criteria if c.status == ("fail" if outcome == "FAIL" else "inconclusive")]
    named = "; ".join(f"{c.name} {c.observed:.3g} ({c.rule} {c.threshold:.3g})" if c.threshold is not None else c.name for c in failed)
    if outcome == "FAIL":
        return f"the evidence does not show that this direction causes the behaviour. Not met: {named}."
    return f"there is too little data to decide. Undecided: {named}."
