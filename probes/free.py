"""What a model says when left free, steered or asked: greedy answers, and the baseline of simply asking.

Asking is the wanted persona's system turn. A behaviour in English without personas is asked by a turn made from what
its card says of the two sides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from probes.behaviors import Behavior, Side
from probes.cost import Cost
from probes.directions import Direction
from probes.model import HybridModel
from probes.propensity import Propensity, generate, prepare, propensity
from probes.trials import How, Trial, Trials, start_of

STEERED = {"steered": 1, "against": -1}  # and the sign of the dose that answers are given at


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A behaviour whose every item can be asked for either side; `how` says in which way."""

    behavior: Behavior
    how: str

    @classmethod
    def of(cls, behavior: Behavior) -> Asked | None:
        """None where there is no way to ask: no personas, and not in English or with system turns of its own."""
        if behavior.has_persona:
            return cls(behavior=behavior, how="persona turns")
        if behavior.language != "en" or any(item.messages[0]["role"] == "system" for item in behavior.items):
            return None
        sides = {"wanted": behavior.wanted_means, "unwanted": behavior.unwanted_means}
        persona = {side: f"In this conversation the assistant always {means}." for side, means in sides.items()}
        items = tuple(replace(item, persona=persona) for item in behavior.items)
        return cls(behavior=replace(behavior, items=items), how="a system turn made from the behaviour's card")

    def propensity(self, model: HybridModel, side: Side) -> Propensity:
        return propensity(model, prepare(model, self.behavior, persona=side))

    def answers(self, model: HybridModel, *, max_new_tokens: int) -> list[str]:
        prompts = [item.prompt(model, persona="wanted") for item in self.behavior.items]
        return generate(model, prompts, max_new_tokens=max_new_tokens)


def free_answers(
    model: HybridModel, behavior: Behavior, direction: Direction, dose: float, how: How, *, max_new_tokens: int,
    reuse: bool = True, cost: Cost | None = None,
) -> dict[str, list[str]]:  # fmt: skip
    """Greedy answers to every item: unsteered, steered, steered against, and, where one can ask, asked."""
    trials = Trials(model, prepare(model, behavior), starts={start_of(direction)}, reuse=reuse, cost=cost)
    nothing = trials.answers([Trial.of(direction, 0.0)], replace(how, mode="add"), max_new_tokens=max_new_tokens)
    both = [Trial.of(direction, sign * dose) for sign in STEERED.values()]
    steered = trials.answers(both, how, max_new_tokens=max_new_tokens)
    found = {"unsteered": nothing[0], **dict(zip(STEERED, steered, strict=True))}
    asked = Asked.of(behavior)
    return found | ({"asked": asked.answers(model, max_new_tokens=max_new_tokens)} if asked else {})
