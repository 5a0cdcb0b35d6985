"""One verdict, one page: an HTML file that explains itself and loads nothing (see `analysis.pages`).

The page is made from a `Verdict` alone, beside what is known of the gate itself, so it can be written again from
`verdict.json` at any time. What it says in its own words is in `templates/verdict.html.j2`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.calibration import Calibration, shipped_calibration
from analysis.figures import draw
from analysis.pages import as_sentence, render_page, settings, typeset
from analysis.words import ON_TEXT, PHASES, UNITS, Numbers, estimate, finite, number, percent, ratio, reason
from probes.criteria import Criterion, Verdict
from probes.store import write_text

EXAMPLES_SHOWN = 6
OUTCOMES = {
    "PASS": "Every deciding criterion was met: training may start from this direction.",
    "FAIL": "At least one deciding criterion was not met. Nothing should be trained from this direction.",
    "INCONCLUSIVE": "Something could not be decided, for want of data or controls. This is not a pass.",
}
CONDITIONS = {"unsteered": "left alone", "steered": "steered", "against": "steered against", "asked": "just asked"}
WANTING = ("decodability", "selectivity", "effect", "wrong way", "dose-response", "controls", "specificity")
"""What is left open where there are too few held-out prompts or topics."""
CONTRASTS = {
    "persona": "the same prompts under both personas, read at the last prompt token",
    "answer": "the two answers, as a mean over their tokens: it may describe the text rather than the disposition",
}
ANY = ("seed", "reuse", "site")  # settings that the gate was calibrated for in any value
THRESHOLDS = {
    "length": "0: largest distance from 0.5 of the AUROC with which length alone tells the two sides apart",
    "reliability": "1: least split-half agreement of the direction",
    "auroc": "2: least held-out AUROC (lower end of its interval)",
    "selectivity": "2: least AUROC above that of shuffled labels",
    "wrong_way": "3: largest share of held-out prompts that may move the wrong way",
    "dose_response": "4: least Spearman correlation of dose and mean propensity",
    "min_doses": "4: fewest coherent doses, both signs among them",
    "control_percentile": "5, 6: percentile of the controls that the direction has to exceed",
    "specificity": "7: largest effect on another behaviour, as a share of the effect on its own",
    "perplexity_ratio": "8: largest ratio of perplexities on ordinary text, or of its inverse",
    "repetition": "8: largest rise of the share of repeated trigrams",
    "min_prompts": "0: fewest held-out prompts to decide on",
    "min_groups": "0: fewest held-out topic groups to decide on",
    "min_controls": "5, 6: fewest controls of each drawn kind",
    "min_control_prompts": "5, 6: fewest prompts that controls are run on",
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
    generation, scorer = evidence.get("generation") or {}, _scorer(evidence)
    facts = {
        "verdict": verdict,
        "sentence": as_sentence(verdict.sentence),
        "consequence": OUTCOMES[verdict.verdict],
        "tally": f"{sum(c.status == 'pass' for c in deciding)} of {len(deciding)} deciding criteria passed.",
        "kind": {"gdn": "GDN"}.get(chosen["kind"], chosen["kind"]) if chosen else "",
        "asked": _asked(evidence.get("behavior") or {}),
        "first": [_asking(verdict), _elsewhere(verdict), _anti_steered(verdict)],
        "criteria": [_criterion(c) for c in verdict.criteria],
        "shortcomings": _shortcomings(verdict),
        "mode": (verdict.recipe.get("config") or {}).get("mode", ""),
        "unit": UNITS[verdict.site],
        "phases": PHASES.get(verdict.site, PHASES["resid"]),
        "on_text": ON_TEXT.get(verdict.site, ON_TEXT["resid"]),
        "conditions": {key: label for key, label in CONDITIONS.items() if key in generation},
        "shares": _shares(generation, scorer["usable"]),
        "scorer": scorer["words"],
        "examples": [_example(row, generation, scorer["usable"]) for row in evidence.get("examples") or []],
        "shown": EXAMPLES_SHOWN,
        "direction": _direction(evidence.get("direction") or {}),
        "split": evidence.get("split") or {"fit": [], "held_out": []},
        "search": _search(verdict),
        "controls": _controls(verdict),
        "trust": trust(verdict, shipped_calibration()),
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


def _asking(verdict: Verdict) -> dict[str, str]:
    """The first of three figures that no page goes without: what simply asking does, beside the direction."""
    found, effect = (verdict.evidence.get("baseline") or {}).get("persona") or {}, verdict.evidence.get("effect")
    why = reason(verdict.criteria, "prompt baseline")
    words = f"what asking by a system turn ({found.get('how', 'persona turns')}) does without any intervention"
    return _first("prompt baseline", found.get("gain"), f"{words}; {_own(effect)}", why)


def _elsewhere(verdict: Verdict) -> dict[str, str]:
    found, effect = verdict.evidence.get("ood") or {}, verdict.evidence.get("effect")
    why = reason(verdict.criteria, "effect elsewhere")
    return _first("out of distribution", found.get("effect"), f"effect on {found.get('what', '')}; {_own(effect)}", why)


def _own(effect: Numbers | None) -> str:
    return f"the direction does {number(effect['value'])} nats on held-out prompts" if effect else ""


def _anti_steered(verdict: Verdict) -> dict[str, str]:
    """The share of prompts that move the wrong way; older verdicts have it in their criteria alone."""
    found, away = verdict.evidence.get("wrong_way"), verdict.evidence.get("ood") or {}
    line = next((c for c in verdict.criteria if c.name == "wrong way"), None)
    if not isinstance(found, Mapping) and line is not None:
        found = {"value": line.observed, "lower": line.lower, "upper": line.upper, "n": line.n}
    if not found or not finite([found["value"]]):
        return _first("anti-steered", None, "", "no held-out prompt was scored")
    limit = f" (at most {percent(line.threshold)} allowed)" if line is not None else ""
    words = f"of {found['n']} held-out prompts move the wrong way{limit}"
    if away:
        words += f"; out of distribution {percent(away['wrong_way']['value'])} of {away['wrong_way']['n']}"
    between = " to ".join(map(percent, finite([found["lower"], found["upper"]])))
    return {"name": "anti-steered", "value": percent(found["value"]), "interval": between, "words": words}


def _first(name: str, found: Numbers | None, words: str, why: str) -> dict[str, str]:
    if not found or not finite([found["value"]]):
        return {"name": name, "value": "not measured", "interval": "", "words": why}
    between = " to ".join(map(number, finite([found["lower"], found["upper"]])))
    return {"name": name, "value": f"{number(found['value'])} nats", "interval": between, "words": words}


def _shortcomings(verdict: Verdict) -> dict[str, Any]:
    """Lines that failed or are open, and the names of those that are open only for want of held-out prompts."""
    lacking = any(c.name == "enough data" and c.status == "inconclusive" for c in verdict.criteria)
    least, drawn = _rules(verdict).get("min_controls", 0), (verdict.evidence.get("counts") or {}).get("controls", 0)
    alone = {name for name in WANTING if lacking and (name != "controls" or drawn >= least)}
    lines, waiting = [], []
    for c in verdict.criteria:
        if c.status == "inconclusive" and c.name in alone:
            waiting.append(c.name)
        elif c.status in ("fail", "inconclusive"):
            lines.append(_criterion(c))
    return {"lines": lines, "waiting": waiting, "failed": any(line["status"] == "fail" for line in lines)}


def _rules(verdict: Verdict) -> Mapping[str, Any]:
    return (verdict.recipe.get("config") or {}).get("criteria") or {}


def _scorer(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Who said on which side a free answer is, in words, and whether that says anything."""
    made, found = evidence.get("generation") or {}, evidence.get("scorer")
    if not found:  # of an older version
        if all(row["shares"] for row in made.values()):
            return {"usable": True, "words": "The behaviour's own patterns say which side an answer is on."}
        words = "Which side the answers are on was not measured: the behaviour has no scoring patterns."
        return {"usable": False, "words": words}
    kind, usable = found["kind"], found["usable"]
    if kind == "rule":
        words = "A rule says which side an answer is on: the behaviour's own patterns."
    elif kind == "classifier":
        words = (
            f"A classifier of texts says which side an answer is on. It learned from {found['n']} answers of the fit "
            f"split, and cross-validated over topics it tells the two sides of these apart with an AUROC of "
            f"{estimate(found['auroc'])}. "
        )
        words += (
            f"It is usable: that is above chance and above all of {found['shuffles']} refits on swapped sides. Free "
            "answers are other texts still, and of those about other things it puts most on one side."
            if usable
            else "It is not usable, since that is not clearly above chance: the sides count as not measured."
        )
    else:
        replies = ", ".join(f"{word} {n}" for word, n in found["replies"].items())
        words = (
            f"A judge says which side an answer is on: the model {found['model']} at {found['url']} (it calls itself "
            f"{', '.join(found['answered_as']) or 'nothing'}), asked once about each different answer at temperature "
            f"{found['temperature']}, with a prompt whose SHA-256 begins with {found['prompt_sha256'][:12]} (in "
            f"verdict.json). Of {found['asked']} replies: {replies}, unreadable {found['unreadable']} (taken as "
            "neither)."
        )
        words += (
            "" if usable else " It is not usable: more than half could not be read. The sides count as not measured."
        )
    return {"usable": usable, "words": words}


def _shares(generation: Mapping[str, Any], usable: bool) -> list[dict[str, Any]]:
    """For each condition: shares in percent (None where they say nothing), repetition and n."""
    rows = []
    for key in CONDITIONS:
        if key in generation:
            made = generation[key]
            shares = {side: 100 * share for side, share in made["shares"].items()} if usable else None
            words = {"repetition": number(made["repetition"]), "n": made["n"]}
            rows.append({"label": CONDITIONS[key], "shares": shares, **words})
    return rows


def _example(row: Mapping[str, Any], generation: Mapping[str, Any], usable: bool) -> dict[str, Any]:
    sides = (row.get("sides") or {}) if usable else {}
    answers = [
        {"text": row.get(key) or "(empty)", "side": sides.get(key, "not scored")}
        for key in CONDITIONS
        if key in generation
    ]
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


def _search(verdict: Verdict) -> dict[str, str]:
    """How layer, method and dose were chosen, and what was left of the effect on held-out topics."""
    found, effect = verdict.evidence.get("search"), verdict.evidence.get("effect")
    if not found or not effect:
        return {"tried": "not measured: this verdict does not hold it"}
    layers, methods = _count(found["layers"], "layer"), _count(found["methods"], "method")
    seen, held = found["effect"]["value"], effect["value"]
    left = f": {percent(held / seen)} of that" if len(finite([seen, held])) == 2 and seen > 0 else ""
    return {
        "tried": f"{_count(found['tried'], 'combination')} of layer, method and dose ({layers}, {methods}), by "
        f"{found['folds']}-fold cross-validation on {found['prompts']} prompts of the fit split",
        "taken": f"{found['chosen']} at layer {verdict.layer}, dose {verdict.dose:g}, and judged once, on held-out "
        "topics",
        "effect in the search": f"{estimate(found['effect'])} nats",
        "effect held out": f"{estimate(effect)} nats{left}",
    }


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _controls(verdict: Verdict) -> dict[str, str]:
    """How many meaningless directions were run, and how much certainty so many can give."""
    kinds, least = (verdict.evidence.get("controls") or {}).get("kinds") or {}, _rules(verdict).get("min_controls")
    drawn = min((len(kinds.get(kind) or []) for kind in ("random", "shuffled labels")), default=0)
    if not drawn:
        return {"run": "not measured: no control directions were run"}
    same = verdict.evidence["controls"].get("target") or verdict.evidence["effect"]
    target, found = same["value"], {}
    above = {
        kind: sum(target is None or row["effect"] is None or abs(row["effect"]) >= target for row in rows)
        for kind, rows in kinds.items()
    }
    found["run"] = "; ".join(f"{len(rows)} {kind} ({above[kind]} at least as strong)" for kind, rows in kinds.items())
    if budget := verdict.evidence.get("budget"):
        found["budget"] = (
            f"{number(budget['seconds'])} seconds: {budget['controls']} controls of each drawn kind were run, "
            f"{budget['asked']} were asked for. " + (f"Fewer than {least} leave criterion 5 open." if least else "")
        )
    found["certainty"] = (
        f"With n = {drawn} controls of a kind and none above, p ≤ 1/(n + 1) = {number(1 / (drawn + 1))}; the highest "
        f"confidence that can be claimed is n/(n + 1) = {number(100 * drawn / (drawn + 1))}%."
    )
    return found


def trust(verdict: Verdict, calibration: Calibration | None) -> dict[str, str]:
    """How often the gate is wrong, as measured on the organism, and where this verdict was reached in another way."""
    if calibration is None:
        return {"error rates": "not measured: no calibration comes with this version"}
    here = calibration.at(verdict.site)
    wrong, found = here.false_positives, here.detection
    used, known = verdict.recipe.get("config") or {}, calibration.recipe["config"]["gate"]
    other = [
        name
        for name, value in known.items()
        if name in used and name not in ANY and json.dumps(used[name]) != json.dumps(value)
    ]
    doubts = [f"it was measured on another model than {verdict.model}"] * (verdict.model != calibration.recipe["model"])
    doubts += [f"this verdict was reached with other settings ({', '.join(other)})"] * bool(other)
    doubts += ["nothing could be planted at this site, so what the gate misses here is not known"] * (not found.n)
    said = {
        "nonsense that passes": f"{wrong} (with 95% confidence at most {percent(wrong.upper)})",
        "plants that are found": f"{found} (with 95% confidence at least {percent(found.lower)})"
        if found.n
        else "none",
        "measured": f"at {verdict.site}, with dispositions calibrate, on the organism",
    }
    return said | ({"as far as it carries over": as_sentence(f"{'; '.join(doubts)}.")} if doubts else {})


def _cost(cost: Mapping[str, Any]) -> dict[str, str]:
    words = {
        "forward_tokens": "tokens through the model",
        "layer_tokens": "layer tokens (tokens × layers)",
        "naive_layer_tokens": "layer tokens without reuse",
    }
    rows = {words.get(key, key): number(value) for key, value in cost.items()}
    computed, naive = cost.get("layer_tokens"), cost.get("naive_layer_tokens")
    if computed and naive:
        saved = f"{number(naive / computed)} times fewer layer tokens" if naive > computed else "nothing"
        rows["saved by reuse"] = saved
    return rows
