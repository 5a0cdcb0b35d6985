"""On whose word a run starts: the verdict it needs, and what it records of itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from probes.behaviors import Behavior
from probes.criteria import Verdict
from probes.directions import Direction, vector_hash
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.store import library_versions
from training.config import TrainConfig


def recipe(
    model: HybridModel, behavior: Behavior, config: TrainConfig, verdict: Verdict | None, *, unverified: bool = False
) -> dict[str, Any]:
    """Everything that determines a run's numbers, and on whose word it started."""
    told = None
    if verdict is not None:
        told = {"verdict": verdict.verdict, "sentence": verdict.sentence, "recipe": verdict.recipe}
    return {
        "behavior": behavior.name, "behavior_hash": behavior.hash, **model.identity, "config": asdict(config),
        "verified": not unverified, "verdict": told, "versions": library_versions(),
    }  # fmt: skip


def checked_verdict(
    verdict: Verdict | None, behavior: Behavior, model: HybridModel, *, unverified: bool = False
) -> None:
    """Refuse to start without a PASS for this behaviour and these weights.

    Raises:
        WrongInput: naming what is missing or differs.
    """
    if unverified:
        return
    if verdict is None:
        raise WrongInput(
            f"no verdict for '{behavior.name}': verify its direction first (dispositions verify) and give the verdict, "
            "or train unverified (--unverified)"
        )
    verdict.require()
    told = verdict.recipe
    for what, seen, allowed in (
        ("behaviour", f"{told.get('behavior')} {told.get('behavior_hash')}", f"{behavior.name} {behavior.hash}"),
        ("weights", told.get("weights_hash"), model.weights_hash),
    ):
        if seen != allowed:
            raise WrongInput(f"the verdict is about other {what}: {seen}, here {allowed}; verify again")


def identity_of(direction: Direction | None) -> dict[str, Any] | None:
    """What of a direction decides a computation's numbers, for recipes."""
    if direction is None:
        return None
    return {"site": direction.site, "layer": direction.layer, "hash": vector_hash(direction.vector)}
