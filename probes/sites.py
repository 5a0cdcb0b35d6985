"""Sites: the named places of a model where a tensor can be read, their axes, and the layers that have them.

A decoder layer adds two things to the residual stream: the output of its mixer (a Gated DeltaNet or an attention
block) and the output of its MLP. Three sites follow the stream and exist in every layer:

    resid[i] = resid[i - 1] + mixer[i] + mlp[i]        resid[-1] being the embeddings

The other two look inside a mixer, so they exist only in layers of its kind. `gdn.state` is what a GDN layer remembers
of all tokens so far, one matrix for each value head. `attn.heads` is what each attention head hands to the output
projection: `mixer = attn.heads (head and d_head flattened) @ o_proj.weight.T`.

Layers count from 0, and `resid` at layer i is the stream *after* layer i. Negative numbers are refused: in a library
whose embeddings come before layer 0, -1 has two readings.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from probes.errors import WrongInput
from probes.model import HybridModel, Kind

_SHOWN = 12  # how many layers an error lists


@dataclass(frozen=True, kw_only=True)
class Site:
    """A named place.

    Attributes:
        name: as the user writes it.
        axes: names of the axes of one layer's tensor, before positions are chosen.
        kind: the kind of layer that has it; None when every layer does.
        doc: what the tensor is, in one line.
    """

    name: str
    axes: tuple[str, ...]
    kind: Kind | None
    doc: str

    def __str__(self) -> str:
        return f"{self.name} [{' '.join(self.axes)}]: {self.doc}"

    def layers(self, model: HybridModel) -> tuple[int, ...]:
        """The layers of a model that have this site; empty when none has."""
        return tuple(layer.index for layer in model.layers if self.kind in (None, layer.kind))


_ALL = (
    Site(
        name="resid",
        axes=("prompt", "token", "d_model"),
        kind=None,
        doc="the residual stream after the layer",
    ),
    Site(
        name="mixer",
        axes=("prompt", "token", "d_model"),
        kind=None,
        doc="what the GDN or attention block adds to the stream",
    ),
    Site(
        name="mlp",
        axes=("prompt", "token", "d_model"),
        kind=None,
        doc="what the MLP adds to the stream",
    ),
    Site(
        name="gdn.state",
        axes=("prompt", "v_head", "d_k", "d_v"),
        kind="gdn",
        doc="the recurrent state after the last token, float32",
    ),
    Site(
        name="attn.heads",
        axes=("prompt", "token", "head", "d_head"),
        kind="attention",
        doc="each head's output before o_proj (in Qwen3.5: after the output gate)",
    ),
)
SITES: Mapping[str, Site] = MappingProxyType({site.name: site for site in _ALL})


def site(name: str) -> Site:
    """Look a site up by name.

    Raises:
        WrongInput: there is no such site.
    """
    if name not in SITES:
        raise WrongInput(f"unknown site '{name}'; allowed are {', '.join(SITES)}")
    return SITES[name]


def resolve(model: HybridModel, site_name: str, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers at which to read a site, ascending and without repetition.

    Args:
        model: the model that is asked about.
        site_name: one of `SITES`.
        layers: 0-based indices, all of which must have the site; None for every layer that has it.

    Raises:
        WrongInput: the site is unknown or absent from the model; a layer is negative, out of range or has no such
            site; `layers` is empty.
    """
    found = site(site_name)
    existing = found.layers(model)
    if not existing:
        raise WrongInput(f"site '{site_name}' does not exist in {model.name}: it has no {found.kind} layers")
    if layers is None:
        return existing
    chosen = sorted({_index(model, layer) for layer in layers})
    if not chosen:
        raise WrongInput(f"no layers were given; {model.name} has layers 0 to {len(model.layers) - 1}")
    for layer in chosen:
        if layer not in existing:
            shown = ", ".join(str(i) for i in existing[:_SHOWN]) + (", ..." if len(existing) > _SHOWN else "")
            seen = f"layer {layer} ({model.layers[layer].kind})"
            raise WrongInput(f"site '{site_name}' does not exist at {seen}; it exists at layers {shown}")
    return tuple(chosen)


def _index(model: HybridModel, layer: int) -> int:
    index = operator.index(layer)  # numpy integers are welcome
    last = len(model.layers) - 1
    if index < 0:
        raise WrongInput(f"layer {index} is negative: layers count from the first, {model.name} has layers 0 to {last}")
    if index > last:
        raise WrongInput(f"layer {index} is out of range: {model.name} has layers 0 to {last}")
    return index
