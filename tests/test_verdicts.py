"""Made-up verdicts, to draw and report: complete, lacking, undecided and hostile; and that they are like real ones.

What the figures and the report are tested on has to have the form of what the gate writes, field by field.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE

from probes import stats
from probes.behaviors import read_behavior
from probes.criteria import GateCriteria, Verdict, decide, open_verdict
from probes.errors import WrongInput
from probes.evidence import judge, sentence
from probes.store import write_json
from probes.verify import GateConfig, verify

TOPICS = ("bridges", "boats", "fences", "lamps", "pipes", "towers", "walls", "wheels")
DOSES = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
NAMES = (
    "layer-sweep methods dose-response controls baseline prompt-effects elsewhere specificity necessity decodability "
    "phases modes damage"
).split()
NEW = ("length", "search", "methods", "modes", "wrong_way", "specificity", "ood", "scorer")
"""Evidence that verdicts of the first version do not hold."""


def numbers(value: float, lower: float, upper: float, n: int = 48, confidence: float = 0.95) -> dict[str, Any]:
    return asdict(stats.Estimate(value=value, lower=lower, upper=upper, n=n, groups=8, confidence=confidence))


def complete(*, strength: float = 1.0, prompts: int = 48) -> dict[str, Any]:
    """Evidence with every piece, from a fixed seed; `strength` scales what the direction does."""
    rng = np.random.default_rng(7)
    groups = [TOPICS[i % len(TOPICS)] for i in range(prompts)]

    def estimate(values: Any, confidence: float = 0.95) -> dict[str, Any]:
        return stats.mean(list(values), groups[: len(values)], confidence=confidence).as_dict()

    def wrong(values: Any) -> dict[str, Any]:
        return stats.share([bool(value < 0) for value in values], groups).as_dict()

    plain = rng.normal(-0.4, 1.5, prompts)
    slope = strength * rng.normal(3.6, 2.2, prompts)
    effects = slope * math.tanh(0.6)
    layers = [
        {
            "layer": i, "kind": "attention" if i % 4 == 3 else "gdn", "method": "mean", "dose": 0.5,
            "perplexity_ratio": ratio, "effect": estimate(strength * rng.normal(size, 0.5, prompts)),
            "random_effect": 0.12 + 0.02 * i,
            "shuffled_effect": 0.2 - 0.02 * i, "bar": 0.4 + 0.01 * i, "auroc": 0.6 + 0.1 * i if i < 4 else 0.95,
            "coherent": ratio <= 1.5, "reliability": 0.9 + 0.01 * i, "chosen": i == 4,
        }
        for i, (size, ratio) in enumerate(
            [(0.1, 1.0), (0.3, 1.0), (0.9, 1.02), (1.4, 1.1), (1.9, 1.08), (1.6, 1.2), (2.3, 1.9), (2.6, math.inf)]
        )
    ]  # fmt: skip
    doses = [
        {
            "dose": dose, "propensity": estimate(plain + slope * math.tanh(1.2 * dose)),
            "effect": estimate(slope * math.tanh(1.2 * dose)), "perplexity_ratio": ratio, "coherent": ratio <= 1.5,
        }
        for dose, ratio in zip(DOSES, (6.1, 1.8, 1.2, 1.04, 1.0, 1.03, 1.15, 1.6, math.inf), strict=True)
    ]  # fmt: skip
    shares = {
        "unsteered": (0.5, 0.4375, 0.0), "steered": (0.875, 0.0625, 0.02), "against": (0.125, 0.75, 0.05),
        "asked": (0.9375, 0.0625, 0.01),
    }  # fmt: skip
    elsewhere, others = 0.6 * effects - 0.4, {"sentiment": 0.1, "hedging": -0.25}
    own = abs(float(effects.mean())) or 1.0
    return {
        "split": {"fit": ["arches", "doors", "roofs"], "held_out": list(TOPICS)},
        "behavior": {
            "description": "Does what it is told, or something else.", "wanted": "does what is asked",
            "unwanted": "turns to something else", "items": 120, "groups": 20, "hash": "0123456789abcdef",
        },
        "length": {"prompts": numbers(0.53, 0.44, 0.61, 120), "answers": numbers(0.42, 0.35, 0.5, 120)},
        "layers": layers,
        "search": {
            "layers": 8, "methods": 3, "tried": 74, "folds": 4, "prompts": 24, "chosen": "mean",
            "effect": numbers(2.31, 2.02, 2.6, 24),
        },
        "direction": {
            "method": "mean difference", "hash": "0123456789abcdef", "contrast": "persona", "norm": 11.3, "gap": 8.2,
            "n": 72, "heads": None,
            "reliability": numbers(0.95, 0.92, 0.97, 72),
        },
        "doses": doses,
        "dose_response": {"doses": list(DOSES[2:7]), "spearman": numbers(1.0, 0.97, 1.0, prompts)},
        "prompts": [
            {"id": f"fd-{i:03d}", "group": group, "baseline": float(b), "effect": float(e)}
            for i, (group, b, e) in enumerate(zip(groups, plain, effects, strict=True))
        ],
        "effect": estimate(effects),
        "wrong_way": wrong(effects),
        "wanted": estimate(0.4 * effects),
        "methods": [
            {
                "method": method, "layer": layer, "dose": dose, "searched": numbers(*seen, 24), "bar": 0.44,
                "auroc": 0.95, "perplexity_ratio": 1.1, "effect": estimate(scale * effects, 1 - 0.05 / 3),
                "cosine": cosine, "judged": method == "mean",
            }
            for method, layer, dose, seen, scale, cosine in (
                ("mean", 4, 0.5, (2.31, 2.02, 2.6), 1.0, 1.0), ("whitened", 4, 0.25, (1.2, 0.9, 1.5), 0.4, 0.31),
                ("pca", 5, 0.5, (2.4, 1.9, 2.8), 0.9, None),
            )
        ],
        "specificity": [
            {"name": name, "effect": estimate(scale * effects), "share": estimate(scale * effects / own)}
            for name, scale in others.items()
        ],
        "ood": {
            "what": "held-out items inside an e-mail, a ticket or a message typed in haste",
            "effect": estimate(elsewhere), "wrong_way": wrong(elsewhere),
        },
        "scorer": {"kind": "rule", "usable": True},
        "controls": {
            "kinds": {
                "random": [{"effect": float(e), "name": "", "cosine": 0.02} for e in rng.normal(0, 0.15, 20)],
                "shuffled labels": [{"effect": float(e), "name": "", "cosine": 0.0} for e in rng.normal(0, 0.3, 20)],
                "unrelated": [
                    {"effect": 0.31, "name": "sentiment", "cosine": 0.2},
                    {"effect": -0.12, "name": "hedging", "cosine": -0.1},
                ],
            },
            "percentile": 95.0, "target": estimate(effects[:16]),
        },
        "decodability": {
            "auroc": numbers(0.97, 0.94, 0.99, prompts), "selectivity": 0.46, "crossed": True,
            "shuffled": rng.uniform(0.35, 0.66, 20).tolist(),
        },
        "phases": [
            {"phase": phase, "effect": estimate(scale * effects), "working": phase == "both"}
            for phase, scale in (("prefill", 0.8), ("decode", 0.15), ("both", 1.0))
        ],
        "modes": [
            {"mode": mode, "effect": estimate(scale * effects), "working": mode == "add"}
            for mode, scale in (("add", 1.0), ("ablate", -0.1), ("clamp", 0.9), ("rotate", 0.7))
        ],
        "necessity": {
            "where": "wanted persona", "before": estimate(plain + 5), "drop": estimate(1.7 * effects),
            "beside": estimate(1.7 * effects[:16]),
            "random_drops": rng.normal(0, 0.2, 20).tolist(),
        },
        "baseline": {
            "persona": {
                "how": "persona turns", "wanted": estimate(plain + 5), "unwanted": estimate(plain - 4),
                "gain": numbers(5.0, 4.6, 5.3),
            },
            "propensity": estimate(plain),
        },
        "damage": {"perplexity": 8.1, "perplexity_ratio": 1.17, "kl": 0.084, "tokens": 2140},
        "generation": {
            label: {"shares": {"wanted": w, "unwanted": u, "neither": 1 - w - u}, "repetition": r, "n": 16}
            for label, (w, u, r) in shares.items()
        },
        "examples": [
            {
                "id": f"fd-{i:03d}", "prompt": f"the bridge {i} leaks . the tower sags . please seal the bridge {i} .",
                "unsteered": "i brace the tower first .", "steered": f"i seal the bridge {i} now .",
                "against": "brace the tower : better .", "asked": f"the bridge {i} , sealed .",
                "sides": {"unsteered": "unwanted", "steered": "wanted", "against": "neither", "asked": "wanted"},
            }
            for i in range(16)
        ],
        "counts": {"prompts": prompts, "groups": 8, "controls": 20},
    }  # fmt: skip


def lacking() -> dict[str, Any]:
    """A weak direction, drawn, on a model that breaks; a behaviour that cannot be asked for, in texts of no use."""
    evidence = complete(strength=0.05)
    evidence["necessity"] = None
    evidence["baseline"]["persona"] = {}
    evidence["controls"]["kinds"] = {"random": [], "shuffled labels": [], "unrelated": []}
    evidence["damage"] |= {"perplexity": math.inf, "perplexity_ratio": math.inf, "kl": math.inf}
    evidence["direction"] |= {"reliability": None, "method": "random"}
    evidence["layers"][2]["effect"] |= {"value": math.nan, "lower": math.nan, "upper": math.nan}
    evidence["prompts"][5]["effect"] = math.nan
    for key in ("prompts", "answers"):
        evidence["length"][key] = numbers(0.93, 0.88, 0.97, 120)
    evidence |= {
        "examples": [],
        "methods": [],
        "modes": [],
        "specificity": [],
        "ood": None,
        "scorer": classifier(False),
    }
    del evidence["generation"]["asked"]
    for made in evidence["generation"].values():
        made["shares"] = {"wanted": 0.0, "unwanted": 0.0, "neither": 1.0}
    return evidence


def classifier(usable: bool) -> dict[str, Any]:
    """The recipe of a classifier of answers, as `probes.answers` writes it."""
    auroc = numbers(0.81, 0.74, 0.88, 72) if usable else numbers(0.52, 0.41, 0.63, 72)
    return {
        "kind": "classifier", "usable": usable, "n": 144, "auroc": auroc, "shuffles": 39,
        "held_out": {"right": 0.7, "neither": 0.12}, "neither": [0.35, 0.65], "slope": 3.1,
        "features": "TF-IDF of 812 words, signs and pairs of them", "versions": {"scikit-learn": "1.7.2"},
    }  # fmt: skip


def judging(unreadable: int = 2) -> dict[str, Any]:
    """The recipe of a judge."""
    return {
        "kind": "judge", "usable": 2 * unreadable <= 40, "url": "http://localhost:8000/v1", "model": "judge-32b",
        "answered_as": ["judge-32b-0401"], "temperature": 0, "max_tokens": 16, "seed": 0, "prompt": "Which is it?",
        "prompt_sha256": "ab12cd34ef56" + 52 * "0", "asked": 40, "unreadable": unreadable,
        "replies": {"A": 21, "B": 15, "NEITHER": 4 - unreadable},
    }  # fmt: skip


def verdict_of(evidence: dict[str, Any], **other: Any) -> Verdict:
    """What the gate would say of the evidence."""
    rules, about = GateCriteria(), evidence["behavior"]
    name = other.get("behavior", "follow-direction")
    behavior = replace(
        read_behavior("sentiment-en"), name=name, wanted_means=about["wanted"], unwanted_means=about["unwanted"]
    )
    criteria = judge(evidence, rules)
    outcome = decide(criteria)
    said = sentence(outcome, criteria, evidence, behavior, rules)
    found = Verdict(
        verdict=outcome, sentence=said, behavior=name, model="organism",
        site="resid", layer=4, dose=0.5, phase="both", criteria=criteria, controls=evidence["controls"],
        phases=evidence["phases"], evidence=evidence,
        cost={"forward_tokens": 1_234_567, "layer_tokens": 2_000_000, "naive_layer_tokens": 7_000_000, "seconds": 41.2},
        recipe={
            "behavior": name, "model": "organism", "weights_hash": "fedcba9876543210",
            "config": {"seed": 0, "mode": "add", "criteria": asdict(rules)}, "versions": {"torch": "2.8.0"},
        },
    )  # fmt: skip
    return replace(found, **other)


def hostile() -> Verdict:
    """Markup in every text that comes from data or a model."""
    evidence = complete()
    evidence["behavior"] |= {"description": HOSTILE, "wanted": HOSTILE, "unwanted": HOSTILE}
    evidence["split"]["held_out"][0] = HOSTILE
    evidence["prompts"][0] |= {"id": HOSTILE, "group": HOSTILE}
    evidence["controls"]["kinds"]["unrelated"][0]["name"] = HOSTILE
    evidence["examples"][0] |= {"id": HOSTILE, "prompt": HOSTILE, "steered": HOSTILE, "asked": HOSTILE}
    evidence["specificity"][0]["name"] = HOSTILE
    evidence["ood"]["what"] = HOSTILE
    evidence["baseline"]["persona"]["how"] = HOSTILE
    evidence["methods"][1]["method"] = evidence["search"]["chosen"] = evidence["layers"][0]["method"] = HOSTILE
    evidence["modes"][1]["mode"] = evidence["phases"][1]["phase"] = HOSTILE
    evidence["scorer"] = {**judging(), "model": HOSTILE, "url": HOSTILE, "answered_as": [HOSTILE]}
    return verdict_of(evidence, behavior=HOSTILE, model=HOSTILE)


def first_version(verdict: Verdict) -> Verdict:
    """The verdict as the first version of the gate would have written it, without what it did not measure."""
    evidence = {key: value for key, value in verdict.evidence.items() if key not in NEW}
    evidence["generation"] = {key: made for key, made in evidence["generation"].items() if key != "asked"}
    evidence["baseline"] = copy.deepcopy(evidence["baseline"])
    evidence["baseline"]["persona"].pop("how", None)
    evidence["layers"] = [{key: value for key, value in row.items() if key != "method"} for row in evidence["layers"]]
    for name, new in (("controls", "target"), ("necessity", "beside")):  # its controls ran on all prompts
        if evidence[name]:
            evidence[name] = {key: value for key, value in evidence[name].items() if key != new}
    missing = ("length", "specificity", "effect elsewhere", "wrong way elsewhere", "prompt baseline")
    criteria = tuple(c for c in verdict.criteria if not c.name.startswith(missing))
    criteria = tuple(replace(c, lower=None, upper=None) if c.name == "wrong way" else c for c in criteria)
    cost = {key: value for key, value in verdict.cost.items() if key in ("forward_tokens", "seconds")}
    return replace(verdict, evidence=evidence, criteria=criteria, cost=cost)


@cache
def sample(name: str) -> Verdict:
    """One verdict of each kind; the FAIL lacks whatever a verdict may lack."""
    if name == "hostile":
        return hostile()
    evidence = {"PASS": complete, "FAIL": lacking, "INCONCLUSIVE": lambda: complete(prompts=16)}[name]()
    return verdict_of(evidence)


@pytest.mark.parametrize("name", ["PASS", "FAIL", "INCONCLUSIVE"])
def test_samples_are_what_they_are_named_for(name):
    assert sample(name).verdict == name


def form(value: Any) -> Any:
    """The fields of a value, without what they hold; a list has the form of its entries, which is one."""
    if isinstance(value, dict):
        return {key: form(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        forms = [form(inner) for inner in value]
        assert all(one == forms[0] for one in forms)
        return forms[:1]
    return "text" if isinstance(value, str) else "value"


def test_made_up_evidence_has_the_form_of_what_the_gate_writes(organism):
    quick = GateConfig(
        layers=(4,), prompts=12, search_prompts=4, controls=2, generations=2, general_texts=6, max_new_tokens=8
    )
    real = verify(organism, read_behavior("follow-direction"), quick, progress=False)
    assert form(dict(real.evidence)) == form(complete())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"recipe": []}, "its recipe is not an object"),
        ({"recipe": {"config": "mean"}}, "its recipe is not an object"),
        ({"verdict": "YES"}, "'YES' is no outcome; allowed are PASS, FAIL, INCONCLUSIVE"),
        ({"criteria": 3}, "is not a verdict"),
        ({"criteria": [{"number": 3, "name": "effect", "status": "FAILED", "observed": 1.0}]}, "has status 'FAILED'"),
        ({"criteria": [{"number": 3, "name": "effect", "status": {}, "observed": 1.0}]}, "has status {}"),
        ({"criteria": [{"number": 3, "name": "effect", "status": "pass", "observed": "x"}]}, "and observed 'x'"),
    ],
)
def test_a_damaged_verdict_is_refused(tmp_path, damage, said):
    sample("PASS").save(tmp_path / "verdict.json")
    assert open_verdict(tmp_path).verdict == "PASS"
    write_json(tmp_path / "verdict.json", {**sample("PASS").as_dict(), **damage})
    with pytest.raises(WrongInput, match=said):
        open_verdict(tmp_path)


def test_a_pass_is_one_that_its_criteria_bear_out():
    good = sample("PASS")
    good.require()
    with pytest.raises(WrongInput, match=r"says PASS, which its criteria do not: none at all"):
        replace(good, criteria=()).require()
    with pytest.raises(WrongInput, match=r"says PASS, which its criteria do not: .*\(fail\)"):
        replace(good, criteria=sample("FAIL").criteria).require()
