"""Both sides of a behaviour inside a model: what an extraction is made from, and a probe is fitted on.

Two kinds of contrast exist. With persona turns the same question is asked under both personas and read at the last
prompt token, before a word of the answer is there. Without them the two answers are read instead, as a mean over
their tokens (a state: after the answer); such a direction may describe the text rather than the disposition, and says
so in `Direction.contrast`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from probes.behaviors import Behavior, Item, Side
from probes.capture import capture
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import Prompt, answer_ids
from probes.sites import SITES, keeps_tokens, resolve

Contrast = Literal["persona", "answer"]
STEERABLE = ("resid", "gdn.state", "attn.heads")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Both sides of a behaviour at one layer of a site: flat float32 features, row i of both from item i."""

    layer: int
    wanted: Float[Tensor, "prompt feature"]
    unwanted: Float[Tensor, "prompt feature"]
    groups: tuple[str, ...]
    behavior: str
    contrast: Contrast
    site: str = "resid"
    shape: tuple[int, ...] = ()
    heads: tuple[int, ...] | None = None
    wordings: tuple[str, ...] = ()
    """The persona turns of each pair (`Item.wording`); empty where they are not known."""

    @property
    def differences(self) -> Float[Tensor, "prompt feature"]:
        return self.wanted - self.unwanted

    @property
    def middle(self) -> Float[Tensor, " feature"]:
        """The mean of the two sides' means."""
        return (self.wanted.mean(0) + self.unwanted.mean(0)) / 2

    @property
    def equal(self) -> bool:
        """Whether the two sides have the same mean, so that there is no direction."""
        return not bool(self.differences.mean(0).any())

    @property
    def headed(self) -> bool:
        """Whether the first axis of `shape` are heads."""
        return SITES[self.site].axes[2] in ("head", "v_head")

    def where(self, mask: NDArray[np.bool_]) -> Pairs:
        """The pairs at which a mask is true."""
        index = torch.from_numpy(np.flatnonzero(mask))
        groups = tuple(group for group, kept in zip(self.groups, mask, strict=True) if kept)
        wordings = tuple(words for words, kept in zip(self.wordings, mask, strict=False) if kept)
        return replace(self, wanted=self.wanted[index], unwanted=self.unwanted[index], groups=groups, wordings=wordings)

    def only(self, heads: Sequence[int]) -> Pairs:
        """The pairs with every other head set to zero, so that whatever is made from them lives in these heads.

        Raises:
            WrongInput: the site has no heads, or no such head.
        """
        if not self.headed:
            raise WrongInput(f"heads were chosen, but '{self.site}' has no heads; {' and '.join(STEERABLE[1:])} have")
        chosen = tuple(sorted(set(heads)))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < self.shape[0]:
            seen = ", ".join(map(str, heads)) or "none"
            raise WrongInput(f"heads of {self.site} at layer {self.layer} are 0 to {self.shape[0] - 1}, saw {seen}")
        keep = torch.zeros(self.shape[0])
        keep[list(chosen)] = 1.0
        mask = keep.repeat_interleave(self.wanted.shape[1] // self.shape[0])
        return replace(self, wanted=self.wanted * mask, unwanted=self.unwanted * mask, heads=chosen)

    def scores(self, vector: Float[Tensor, " feature"]) -> tuple[list[float], list[float]]:
        """Projections of both sides on a vector."""
        return (self.wanted @ vector).tolist(), (self.unwanted @ vector).tolist()


def contrast(
    model: HybridModel,
    behavior: Behavior,
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid",
    positions: str = "auto",
    progress: bool = True,
) -> dict[int, Pairs]:
    """Record both sides of a behaviour at a site, one pass for all layers.

    Args:
        layers: 0-based; None for every layer that has the site.
        site: any site whose values have one shape for all prompts; those of `STEERABLE` can also be steered.
        positions: as in `capture`, or "auto": the last prompt token for a persona contrast, the mean over the answer
            for an answer contrast (a state is always read after the last token).

    Raises:
        WrongInput: a site without a fixed shape, or a layer without it.
    """
    return contrasts(model, behavior, {site: layers}, positions=positions, progress=progress)[site]


def contrasts(
    model: HybridModel,
    behavior: Behavior,
    sites: Mapping[str, Sequence[int] | None],
    *,
    positions: str = "auto",
    progress: bool = True,
) -> dict[str, dict[int, Pairs]]:
    """As `contrast`, at several sites in one pass: pairs by layer by site.

    Raises:
        WrongInput: see `contrast`.
    """
    plan = {site: resolve(model, site, layers) for site, layers in sites.items()}
    kind: Contrast = "persona" if behavior.has_persona else "answer"
    if positions == "auto":
        positions = "last" if kind == "persona" else "mean:decision"
    for site in plan:
        if "source" in SITES[site].axes:
            raise WrongInput(f"'{site}' has one entry for each earlier token, so prompts cannot be contrasted there")
        if keeps_tokens(site, positions):
            raise WrongInput(
                f"positions '{positions}' keep several tokens of a prompt; a contrast needs one, or a mean"
            )
    sides: tuple[Side, ...] = get_args(Side)
    prompts = [_sided(model, item, side, kind) for side in sides for item in behavior.items]
    record = capture(model, prompts, sites=tuple(plan), layers=plan, positions=positions, progress=progress)
    n, groups = len(behavior.items), tuple(item.group for item in behavior.items)
    wordings = tuple(item.wording for item in behavior.items) if kind == "persona" else ()
    result: dict[str, dict[int, Pairs]] = {site: {} for site in plan}
    for site, layer in ((site, layer) for site, chosen in plan.items() for layer in chosen):
        both = torch.as_tensor(record[site, layer]).float()
        flat = both.flatten(1)
        result[site][layer] = Pairs(
            layer=layer, wanted=flat[:n], unwanted=flat[n:], groups=groups, behavior=behavior.name, contrast=kind,
            site=site, shape=tuple(both.shape[1:]), wordings=wordings,
        )  # fmt: skip
    return result


def _sided(model: HybridModel, item: Item, side: Side, kind: Contrast) -> Prompt:
    if kind == "persona":
        return item.prompt(model, persona=side)
    prompt = item.prompt(model)
    answer = answer_ids(model, item.wanted if side == "wanted" else item.unwanted)
    spans = {**prompt.spans, "decision": (len(prompt), len(prompt) + len(answer))}
    return Prompt(text=prompt.text, ids=(*prompt.ids, *answer), spans=spans)
