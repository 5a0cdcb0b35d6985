"""One verdict, one page: an HTML file that explains itself and loads nothing (see `analysis.pages`).

The page is made from a `Verdict` alone, so it can be written again from `verdict.json` at any time. What it says in its
own words is in `templates/verdict.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.figures import draw
from analysis.pages import as_sentence, render_page, settings, typeset
from analysis.words import ON_TEXT, PHASES, UNITS, number, ratio
from probes.criteria import Criterion, Verdict
from probes.store import write_text

EXAMPLES_SHOWN = 6
OUTCOMES = {
    "PASS": "Every deciding criterion was met: training may start from this direction.",
    "FAIL": "At least one deciding criterion was not met. Nothing should be trained from this direction.",
    "INCONCLUSIVE": "There was too little data to decide. This is not a pass: add prompts or topics and run it again.",
}
CONDITIONS = {"unsteered": "left alone", "steered": "steered", "against": "steered against"}
CONTRASTS = {
    "persona": "the same prompts under both personas, read at the last prompt token",
    "answer": "the two answers, as a mean over their tokens: it may describe the text rather than the disposition",
}
THRESHOLDS = {
    "reliability": "1: least split-half agreement of the direction",
    "auroc": "2: least held-out AUROC (lower end of its interval)",
    "selectivity": "2: least AUROC above that of shuffled labels",
    "wrong_way": "3: largest share of held-out prompts that may move the wrong way",
    "dose_response": "4: least Spearman correlation of dose and mean propensity",
    "min_doses": "4: fewest coherent doses, both signs among them",
    "control_percentile": "5, 6: percentile of the controls that the direction has to exceed",
    "perplexity_ratio": "8: largest ratio of perplexities on ordinary text, or of its inverse",
    "repetition": "8: largest rise of the share of repeated trigrams",
    "min_prompts": "0: fewest held-out prompts to decide on",
    "min_groups": "0: fewest held-out topic groups to decide on",
    "min_controls": "5: fewest controls of each drawn kind",
    "min_tokens": "8: fewest scored tokens of ordinary text",
    "min_answers": "8: fewest free answers",
}


def write_report(verdict: Verdict, path: str | Path) -> Path:
    """Write the page of a verdict, whole or not at all. Nothing but the verdict is needed."""
    write_text(path, render(verdict))
    return Path(path)


def render(verdict: Verdict) -> str:
    """The page as a string; equal verdicts give equal pages."""
    evidence, deciding = verdict.evidence, [c for c in verdict.criteria if c.status != "reported"]
    chosen = next((row for row in evidence.get("layers") or [] if row["chosen"]), None)
    facts = {
        "verdict": verdict,
        "sentence": as_sentence(verdict.sentence),
        "consequence": OUTCOMES[verdict.verdict],
        "tally": f"{sum(c.status == 'pass' for c in deciding)} of {len(deciding)} deciding criteria passed.",
        "kind": {"gdn": "GDN"}.get(chosen["kind"], chosen["kind"]) if chosen else "",
        "asked": _asked(evidence.get("behavior") or {}),
        "criteria": [_criterion(c) for c in verdict.criteria],
        "unit": UNITS[verdict.site],
        "phases": PHASES.get(verdict.site, PHASES["resid"]),
        "on_text": ON_TEXT.get(verdict.site, ON_TEXT["resid"]),
        "conditions": CONDITIONS,
        "shares": _shares(evidence.get("generation") or {}),
        "examples": [_example(row) for row in evidence.get("examples") or []],
        "shown": EXAMPLES_SHOWN,
        "direction": _direction(evidence.get("direction") or {}),
        "split": evidence.get("split") or {"fit": [], "held_out": []},
        "cost": _cost(verdict.cost),
        "thresholds": settings((verdict.recipe.get("config") or {}).get("criteria") or {}, THRESHOLDS),
    }
    return render_page("verdict.html.j2", draw(verdict), verdict.recipe, facts)


def _asked(found: Mapping[str, Any]) -> dict[str, Any]:
    words = {"wanted": "shows the wanted behaviour", "unwanted": "shows the unwanted behaviour", "description": ""}
    return {**words, **found, "pairs": found.get("items", 0), "topics": found.get("groups", 0)}


def _criterion(c: Criterion) -> dict[str, Any]:
    """One row of the table, in words."""
    rule = typeset(c.rule)
    return {
        "number": c.number,
        "name": c.name,
        "status": c.status,
        "meaning": c.meaning,
        "observed": ratio(c.observed) if c.name.startswith("damage") else number(c.observed),
        "interval": f"{number(c.lower)} to {number(c.upper)}" if c.lower is not None and c.upper is not None else "",
        "rule": f"{rule} {number(c.threshold)}" if rule.endswith((">", "≥", "≤", "<")) else rule,
        "n": f"{c.n:,}" if c.n else "–",
    }


def _shares(generation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each condition: shares in percent (None where the behaviour has no patterns), repetition and n."""
    rows = []
    for key in CONDITIONS:
        if key in generation:
            made = generation[key]
            shares = {side: 100 * share for side, share in made["shares"].items()} if made["shares"] else None
            words = {"repetition": number(made["repetition"]), "n": made["n"]}
            rows.append({"label": CONDITIONS[key], "shares": shares, **words})
    return rows


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    sides = row.get("sides") or {}
    answers = [{"text": row.get(key) or "(empty)", "side": sides.get(key, "neither")} for key in CONDITIONS]
    return {"id": row["id"], "prompt": row["prompt"], "answers": answers}


def _direction(found: Mapping[str, Any]) -> dict[str, str]:
    if not found:
        return {"direction": "not measured"}
    agreed, reliability = found.get("reliability"), "not measured: a drawn vector has none"
    if agreed:
        reliability = f"{number(agreed['value'])} ({number(agreed['lower'])} to {number(agreed['upper'])})"
    return {
        "method": found["method"],
        "contrast": CONTRASTS.get(found["contrast"], str(found["contrast"])),
        "pairs": str(found["n"]),
        "heads": "all" if found["heads"] is None else ", ".join(map(str, found["heads"])),
        "norm": f"{number(found['norm'])}, typical of the site (dose 1 adds as much)",
        "gap": f"{number(found['gap'])} between the means of the two sides",
        "reliability": reliability,
    }


def _cost(cost: Mapping[str, Any]) -> dict[str, str]:
    words = {"forward_tokens": "tokens through the model", "seconds": "seconds"}
    return {words.get(key, key): number(value) for key, value in cost.items()}
