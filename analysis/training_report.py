"""One training run, one page (see `analysis.pages`): what was learned, what was lost, and how it went there.

The page is made from what lies in the run's folder: the run itself and, where they were asked for, the same run without
general data, the gradients and the directional sharpness of the model before, and the update of the weights. What it
says in its own words is in `templates/training.html.j2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.figures import draw_training
from analysis.figures.shift import known, numbers
from analysis.figures.training import LOSS, WITHOUT
from analysis.gradients import RESULT as GRADIENTS
from analysis.gradients import Gradients, open_gradients
from analysis.pages import as_sentence, render_page, settings
from analysis.sharpness import NAMES, PUBLISHED, Sharpness, SharpnessComparison, open_sharpness
from analysis.sharpness import RESULT as SHARPNESS
from analysis.updates import RESULT as UPDATES
from analysis.updates import UpdateRow, Updates, open_updates
from analysis.words import finite, number, percent
from probes.errors import WrongInput
from probes.stats import Estimate
from probes.store import write_text
from training.evaluation import Evaluation
from training.result import Training, open_training

ABLATION = "without-general.json"
CONFIG = {
    "examples": "examples of the behaviour, spread over its topics",
    "general_share": "share of general data in each batch",
    "general": "file of general data; auto: the organism's abilities, or the shipped English text",
    "abilities": "file of questions with one right answer; auto: the organism's, none for other models",
    "contrast": "weight of the contrast loss between the wanted and the unwanted answer",
    "context": "frozen: the context's memory is computed once; full: gradient through all of it",
    "refill": "steps after which frozen contexts are computed again; auto: never",
    "parameters": "what is trained; auto: all for full contexts, for frozen ones what writes no memory of a context",
    "optimizer": "the optimizer",
    "rank": "rank of APOLLO's projections; auto: 256, and at most a quarter of the model's width",
    "refresh": "steps after which APOLLO draws new projections",
    "lr": "largest learning rate; auto: 5e-5, and 2e-4 below 20M parameters",
    "warmup": "steps over which the learning rate rises; afterwards it falls to a tenth",
    "weight_decay": "decoupled decay of the weights",
    "steps": "optimizer steps",
    "batch": "segments (answers with their contexts) a step",
    "accumulate": "parts in which a batch goes through the model",
    "checkpointing": "whether activations are computed again in the backward pass",
    "in_backward": "whether each parameter steps as soon as its gradient is there",
    "clip": "largest norm of the whole gradient; 0: not clipped",
    "steer": "dose of the verdict's direction while training; 0: none",
    "evaluate_every": "steps between evaluations; auto: a quarter of the run",
    "questions": "most held-out prompts, and questions of each ability",
    "max_new_tokens": "most tokens of a free answer",
    "checkpoint_every": "steps between checkpoints; auto: a quarter of the run",
    "keep": "checkpoints that stay on disk",
    "seed": "decides the data and their order, projections and rounding",
}
OPEN = 24  # tables with more rows are folded
_MINUS = re.compile(r"(?<!\w)-(?=\d)")
Cell = tuple[str, str]
"""What a cell says, and what stands below it in small type."""


def write_training_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's folder, whole or not at all, from the results that are there.

    Raises:
        WrongInput: there is no training run, or a result beside it is damaged or of another model or behaviour.
    """
    place = Path(folder)

    def read(name: str, opened: Any) -> Any:
        return opened(place / name) if (place / name).is_file() else None

    page = render_training_report(
        open_training(place),
        alone=read(ABLATION, open_training),
        gradients=read(GRADIENTS, open_gradients),
        updates=read(UPDATES, open_updates),
        sharpness=read(SHARPNESS, open_sharpness),
    )
    write_text(place / "report.html", page)
    return place / "report.html"


def render_training_report(
    training: Training,
    *,
    alone: Training | None = None,
    gradients: Gradients | None = None,
    updates: Updates | None = None,
    sharpness: Sharpness | None = None,
) -> str:
    """The page as a string; equal results give equal pages.

    Args:
        alone: the same run without general data.
        gradients, sharpness: of the model before.
        updates: from the weights before to those after.

    Raises:
        WrongInput: one of them is of another behaviour or of other weights.
    """
    for name, other in ((WITHOUT, alone), ("gradients", gradients), ("sharpness", sharpness)):
        _same(training, name, other)
    config = training.recipe.get("config") or {}
    tone, badge, consequence = _outcome(training, alone)
    verified, word = _verified(training)
    said = training.sentence.removesuffix("; its direction was not verified")
    facts = {
        "training": training,
        "tone": tone,
        "badge": badge,
        "sentence": _MINUS.sub("−", as_sentence(said)),
        "consequence": consequence,
        "verified": verified,
        "verdict": word,
        "facts": _facts(training, config),
        "changed": _changed(training, alone),
        "alone": _why_not_alone(alone, config),
        "limiter": _limiter(training),
        "telemetry": _telemetry(training),
        "optimizer": str(config.get("optimizer", "")),
        "data": _data(training),
        "kinds": _kinds(training),
        "gradients": gradients is not None,
        "answers": _answers(gradients, ranks=False),
        "rank_answers": _answers(gradients, ranks=True),
        "gradient_tables": _gradient_tables(gradients),
        "updates": None if updates is None else as_sentence(str(updates)),
        "update_table": _update_table(updates),
        "sharpness": None
        if sharpness is None
        else as_sentence(sharpness.sentence) + _beside_paper(sharpness.comparisons),
        "target": "" if sharpness is None else percent(sharpness.config.target),
        "sharpness_tables": _sharpness_tables(sharpness),
        "loss": f"{LOSS:g}",
        "open": OPEN,
        "run": _run(training),
        "config": settings(config, CONFIG),
    }
    figures = draw_training(training, alone, gradients, updates, sharpness)
    return render_page("training.html.j2", figures, training.recipe, facts)


def _same(training: Training, name: str, other: Training | Gradients | Sharpness | None) -> None:
    if other is None:
        return
    seen = (other.behavior, other.recipe.get("weights_hash"))
    allowed = (training.behavior, training.weights_hash)
    if seen != allowed:
        raise WrongInput(
            f"the result '{name}' is of {seen[0]} on weights {seen[1]}; the run is of {allowed[0]} on {allowed[1]}"
        )


# -- what is said first ------------------------------------------------------------------------------------------------


def _apart(before: Estimate | None, after: Estimate | None) -> int:
    """1 where the interval after lies above that before, -1 where it lies below, 0 where that cannot be said."""
    if before is None or after is None:
        return 0
    return 1 if after.lower > before.upper else -1 if after.upper < before.lower else 0


def _outcome(training: Training, alone: Training | None) -> tuple[str, str, str]:
    """What the headline looks like, what it says, and what follows from it."""
    one, two = training.before, training.after
    judged = one.wanted is not None and two.wanted is not None
    what = "The share of wanted answers" if judged else "The propensity"
    moved = _apart(one.wanted, two.wanted) if judged else _apart(one.propensity, two.propensity)
    lost = {name: change for name, change in training.changes.items() if change < -LOSS - 1e-9}
    tone, badge, says = {
        1: ("pass", "Learned", f"{what} is higher than before: the intervals do not overlap."),
        -1: ("away", "Moved away", f"{what} is lower than before: the intervals do not overlap."),
        0: ("not-shown", "Not shown", f"{what} has not clearly changed: the intervals before and after overlap, or are "
            "unknown. This does not say that nothing was learned; more questions or topics make intervals narrower."),
    }[moved]  # fmt: skip
    if judged and (leaning := _apart(one.propensity, two.propensity)) != moved:
        way = {1: "rose", -1: "fell", 0: "did not clearly change"}[leaning]
        says += f" The propensity {way}."
    if lost:
        tone, badge = ("elsewhere" if moved == 1 else tone), f"{badge}, with losses"
        named = ", ".join(f"{name} ({_signed(lost[name])})" for name in sorted(lost, key=lambda name: lost[name]))
        says += f" More than {LOSS:g} points were lost in: {named}."
    elif training.changes:
        says += f" No ability fell by more than {LOSS:g} points."
    else:
        says += " No abilities were asked for, so this cannot tell what was forgotten."
    if _apart(one.loss, two.loss) == 1:
        says += " Held-out general text is modelled worse than before: its loss rose beyond the intervals."
    if alone is not None and training.changes and alone.changes:
        with_, without = (min(run.changes.items(), key=lambda row: row[1]) for run in (training, alone))
        says += (
            f" The ability that changed worst did so by {_signed(with_[1])} points ({with_[0]}), and {WITHOUT} by "
            f"{_signed(without[1])} ({without[0]})."
        )
    return tone, badge, says


def _verified(training: Training) -> tuple[bool, str]:
    """Whether a PASS about this behaviour and these weights allowed the run, and the sentence that says so."""
    verdict: Mapping[str, Any] = training.recipe.get("verdict") or {}
    if not training.verified or not verdict:
        return False, "No verdict allowed this run: its direction was not verified."
    told: Mapping[str, Any] = verdict.get("recipe") or {}
    if verdict.get("verdict") != "PASS":
        return False, (
            f"The verdict that was given is {verdict.get('verdict')}, so its direction was not verified: "
            f"{verdict.get('sentence')}."
        )
    if told.get("weights_hash") != training.weights_hash or told.get("behavior") != training.behavior:
        return False, (
            f"The verdict that was given is of {told.get('behavior')} on weights {told.get('weights_hash')}, so the "
            "direction of this run was not verified."
        )
    words = str(verdict.get("sentence", "")).rstrip(".")
    return True, f"Before the run, its direction was verified on weights {training.weights_hash}: {words}."


def _facts(training: Training, config: Mapping[str, Any]) -> dict[str, str]:
    """The numbers beside the headline."""
    one, two, found = training.before, training.after, {}
    if one.wanted and two.wanted:
        found["wanted answers"] = f"{percent(one.wanted.value)} → {percent(two.wanted.value)}"
    found["propensity"] = f"{number(known(one.propensity.value))} → {number(known(two.propensity.value))} nats"
    if training.changes:
        name = min(training.changes, key=lambda name: training.changes[name])
        found["ability that changed worst"] = f"{name}, {_signed(training.changes[name])} points"
    if one.loss and two.loss:
        found["held-out loss"] = f"{number(known(one.loss.value))} → {number(known(two.loss.value))} nats a token"
    rank = "" if training.rank is None else f", rank {training.rank}"
    found["trained with"] = f"{config.get('optimizer', 'unknown')}{rank}, lr {number(training.lr)}, {two.step} steps"
    return found


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(known(value))}"


def _run(training: Training) -> dict[str, str]:
    recipe = training.recipe
    found = {"behaviour": training.behavior, "data": str(recipe.get("behavior_hash", "unknown"))}
    found |= {"model": training.model, "weights before": training.weights_hash, "weights after": training.trained_hash}
    found |= {name: str(recipe[name]) for name in ("dtype", "device") if name in recipe}
    seconds = sum(known(row.get("seconds")) for row in training.steps)
    return found | {"evaluations": str(len(training.evaluations)), "seconds in steps": number(seconds)}


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]], mark: str = "") -> dict[str, Any]:
    """Rows are a name, cells and (where `mark` names a last column) a yes or no."""
    return {"columns": [*columns, mark] if mark else list(columns), "rows": list(rows)}


def _plain(*texts: str) -> list[Cell]:
    return [(text, "") for text in texts]


def _measures(found: Evaluation) -> dict[str, tuple[Estimate | None, float, str]]:
    """By name: the estimate, what it is multiplied by, and its unit."""
    return {
        "wanted answers": (found.wanted, 100.0, "%"),
        "unwanted answers": (found.unwanted, 100.0, "%"),
        "propensity": (found.propensity, 1.0, " nats"),
        **{f"ability: {name}": (part, 100.0, "%") for name, part in found.abilities.items()},
        "held-out loss": (found.loss, 1.0, " nats a token"),
    }


def _changed(training: Training, alone: Training | None) -> dict[str, Any]:
    """Before, after and the change of every measure, and the same without general data."""
    before, after = _measures(training.before), _measures(training.after)
    start, end = ({}, {}) if alone is None else (_measures(alone.before), _measures(alone.after))
    rows = []
    for name, (one, scale, unit) in before.items():
        two = after.get(name, (None, scale, unit))[0]
        if one is None or two is None:
            continue
        points = " points" if unit == "%" else unit
        cells = [_seen(one, scale, unit), _seen(two, scale, unit)]
        cells.append((_signed(scale * (two.value - one.value)) + points, ""))
        if alone is not None:
            first, third = (side.get(name, (None,))[0] for side in (start, end))
            cells.append(("not measured", "") if third is None else _seen(third, scale, unit))
            if first is None or third is None:
                cells += _plain("not measured")
            else:
                cells += _plain(_signed(scale * (third.value - first.value)) + points)
        rows.append({"name": name, "cells": cells, "mark": _apart(one, two) != 0})
    columns = ["measure", "before", "after", "change"]
    return _table(columns if alone is None else [*columns, WITHOUT, "its change"], rows, "intervals apart")


def _seen(found: Estimate, scale: float = 1.0, unit: str = "") -> Cell:
    """A value, and its interval below it."""
    seen = numbers(found, scale)
    ends = finite([seen["lower"], seen["upper"]])
    value = number(seen["value"]) + (unit if finite([seen["value"]]) else "")
    return value, f"{number(ends[0])} to {number(ends[1])}" if len(ends) == 2 else ""


def _why_not_alone(alone: Training | None, config: Mapping[str, Any]) -> str:
    if alone is not None:
        return ""
    if config.get("general_share") == 0:
        return "This run itself had no general data."
    return "What the general data kept was not measured. --ablation yes also trains without it, from the same start."


def _limiter(training: Training) -> str:
    """What the limiter did, from the rows of the steps."""
    found = finite(known(row.get("limiter")) for row in training.steps)
    if not found:
        return ""
    return (
        f"In the {len(found)} steps that were looked at it was {number(sum(found) / len(found))} on average (a mean "
        f"over tensors), {number(min(found))} at the lowest and {number(found[-1])} at the last."
    )


def _telemetry(training: Training) -> dict[str, Any]:
    keys = ("scale_mean", "scale_min", "scale_max", "limiter", "ratio")
    rows = [
        {"name": str(row.get("kind")), "cells": _plain(*(number(known(row.get(key))) for key in keys))}
        for row in training.telemetry
    ]
    return _table(["kind of tensor", "scale", "least", "largest", "limiter", "update / weight"], rows)


def _data(training: Training) -> dict[str, str]:
    mix = training.mix
    found = {"share of general data": percent(mix["share"])} if "share" in mix else {}
    names = {"batch": "segments a step", "seed": "seed", "hash": "hash of all segments"}
    return found | {words: str(mix[key]) for key, words in names.items() if key in mix}


def _kinds(training: Training) -> dict[str, Any]:
    names = {"behavior": "the behaviour's answers", "general": "general data"}
    keys = ("segments", "scored_tokens", "context_tokens")
    rows = [
        {"name": words, "cells": _plain(*(f"{training.mix[kind].get(key, 0):,}" for key in keys))}
        for kind, words in names.items() if kind in training.mix
    ]  # fmt: skip
    return _table(["kind", "segments", "tokens in the loss", "tokens of contexts"], rows)


def _answers(found: Gradients | None, *, ranks: bool) -> list[str]:
    """What was found, in words: about ranks, matrix by matrix, or about everything else."""
    told = () if found is None else found.answers
    return [as_sentence(answer.sentence) for answer in told if ("ranks" in answer.question) == ranks]


def _gradient_tables(found: Gradients | None) -> dict[str, dict[str, Any]]:
    if found is None:
        return {}
    full = {(row.group, row.kind): row for row in found.rows if row.context == "full"}
    rows = []
    for row in found.rows:
        other = full.get((row.group, row.kind))
        if row.context != "frozen" or other is None:
            continue
        cells = [_seen(row.share, 100, "%"), _seen(other.share, 100, "%"), (_exactly(row.parameters), "")]
        rows.append({"name": f"{row.group}, {row.kind}", "cells": [*cells, _seen(row.cosine), _seen(row.ratio)]})
    columns = ["kind of weight", "share, frozen", "share, full", "of the parameters", "cosine", "norm, frozen / full"]
    sides = {(row.group, row.kind, row.layer, row.context): row for row in found.ranks}
    ranks = []
    for group, kind, layer in dict.fromkeys(key[:3] for key in sides):
        cells: list[Cell] = []
        for context in ("frozen", "full"):
            row = sides.get((group, kind, layer, context))
            told = ("not measured", "") if row is None else (number(row.limit.value), str(row.beyond))
            cells += [_or_not(row.rank if row else None), *_plain(*told)]
        ranks.append({"name": f"{group}, {kind}, layer {layer}", "cells": cells})
    heads = [f"{word}, {context}" for context in ("frozen", "full") for word in ("rank", "limit", "beyond")]
    return {
        "By kind of weight": _table(columns, rows),
        "Ranks of single segments": _table(["matrix", *heads], ranks),
    }


def _exactly(share: float | None) -> str:
    """A share in percent with three digits, however small."""
    return number(100 * known(share)) + ("%" if finite([share]) else "")


def _update_table(found: Updates | None) -> dict[str, Any]:
    def row(one: UpdateRow) -> dict[str, Any]:
        name = "all weights" if one.group == one.kind == "all" else f"{one.group}, {one.kind}"
        shares = (one.relative, one.saved, one.in_place, one.concentrated, one.unchanged)
        of = f"of {number(one.full_rank)}" if one.full_rank is not None else ""
        rank = number(one.effective_rank) if one.effective_rank is not None else "–"
        stable = number(one.stable_rank) if one.stable_rank is not None else "–"
        cells = [*_plain(f"{one.elements:,}", *map(_exactly, shares)), (rank, of), (stable, "")]
        return {"name": name, "cells": cells}

    columns = ["kind of weight", "elements", "moved by", "seen in bfloat16", "moves in bfloat16", "hold 90%",
               "unchanged", "effective rank", "stable rank"]  # fmt: skip
    return _table(columns, [] if found is None else [row(one) for one in (found.overall, *found.rows)])


def _beside_paper(comparisons: Sequence[SharpnessComparison]) -> str:
    """Whether the order is the published one."""
    said = []
    for part in comparisons:
        table, base = PUBLISHED[part.optimizer], PUBLISHED["adamw"]
        signs = {"below" if table[epoch] < base[epoch] else "above" for epoch in base}
        if not part.optimizer.startswith("apollo") or len(signs) != 1:
            continue
        (published,) = signs
        if part.relation == published:
            verb = "agrees with that"
        else:
            verb = "contradicts that" if part.relation in ("below", "above") else "does not show that"
        said.append(f"the paper has {NAMES[part.optimizer]} {published} AdamW at every epoch, and this run {verb}")
    return "; ".join(["", *said])


def _sharpness_tables(found: Sharpness | None) -> dict[str, dict[str, Any]]:
    if found is None:
        return {}
    epochs, ratios = list(PUBLISHED["adamw"]), {part.optimizer: part.ratio for part in found.comparisons}
    beside, rest = [], []
    for name in found.config.optimizers:
        own, table = [row for row in found.rows if row.optimizer == name], PUBLISHED.get(name, {})
        cells = [_or_not(found.estimate(name)), ("1", "") if name == "adamw" else _or_not(ratios.get(name))]
        cells += _plain(*(f"{table[epoch]:.6f}" if epoch in table else "not published" for epoch in epochs))
        beside.append({"name": NAMES.get(name, name), "cells": cells})
        some = [row for row in own if row.reached] or own
        loss, steps = (sum(values) / max(len(some), 1) for values in (
            [row.loss / row.initial for row in some], [row.steps for row in some],
        ))  # fmt: skip
        cells = [_or_not(found.estimate(name, "gradient")), _or_not(found.estimate(name, "random"))]
        reached = f"{sum(row.reached for row in own)} of {len(own)}"
        cells += _plain(percent(known(loss)), number(known(steps)), number(max([0.0, *(r.lr for r in own)])), reached)
        rest.append({"name": NAMES.get(name, name), "cells": cells})
    published = [f"published, epoch {epoch}" for epoch in epochs]
    columns = [
        "along the gradient",
        "random direction",
        "loss, of the initial",
        "steps",
        "largest lr",
        "seeds that reached it",
    ]
    return {
        "Beside the published values": _table(["optimizer", "along the update", "times AdamW", *published], beside),
        "Where it was measured": _table(["optimizer", *columns], rest),
    }


def _or_not(found: Estimate | None) -> Cell:
    return ("not measured", "") if found is None else _seen(found)
