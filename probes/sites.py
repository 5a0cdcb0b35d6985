"""Sites: the named places of a model where a tensor can be read, their axes, and the layers that have them.

A decoder layer adds two things to the residual stream: the output of its mixer (a Gated DeltaNet or an attention
block) and the output of its MLP. Three sites follow the stream and exist in every layer:

    resid[i] = resid[i - 1] + mixer[i] + mlp[i]        resid[-1] being the embeddings

The others look inside a mixer, so they exist only in layers of its kind. Both kinds are read the same way: what the
tokens bring (`q`, `k`, `v`), what becomes of it, the gate, and the heads' outputs, which the output projection W adds
up: `mixer = heads (head and its dimension flattened) @ W.T`. In a GDN layer W is `out_proj`, S the state, k and q are
normalised by the kernel, and for each value head

    S <- exp(decay) S;  S <- S + k (beta (v - S^T k))^T;  readout = S^T q / sqrt(d_k)
    heads = norm(readout) * silu(gate)

In an attention layer W is `o_proj`, and for each head, a key and value head serving several of them,

    pattern = softmax(q k^T / sqrt(d_head));  heads = pattern v * sigmoid(gate)        without a gate: pattern v

`gdn.attention` says for a GDN layer what `attn.pattern` says for attention: `readout = gdn.attention v`, exactly, as
long as a sequence starts from an empty state. `gdn.attribution` says where the state itself came from: with C_s what is
left of the write of token s, it is `<C_s, S> / |S|^2`, which adds up to 1 over the sources.

Layers count from 0, and `resid` at layer i is the stream *after* layer i. Negative numbers are refused: in a library
whose embeddings come before layer 0, -1 has two readings.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from probes.errors import WrongInput
from probes.model import HybridModel, Kind, Layer

_SHOWN = 12  # how many layers an error lists


@dataclass(frozen=True, kw_only=True)
class Site:
    """A named place.

    Attributes:
        name: as the user writes it.
        axes: names of the axes of one layer's tensor, before positions are chosen. `source` are the tokens that a
            token looks back at: its own prompt's, from the first.
        kind: the kind of layer that has it; None when every layer does.
        doc: what the tensor is, in one line. Its dtype is the model's where the line names none.
        sums_up: whether one token's value stands for all tokens up to it, and is as large as many tokens.
        gated: whether only mixers with an output gate have it.
    """

    name: str
    axes: tuple[str, ...]
    kind: Kind | None
    doc: str
    sums_up: bool = False
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.name} [{' '.join(self.axes)}]: {self.doc}"

    def layers(self, model: HybridModel) -> tuple[int, ...]:
        """The layers of a model that have this site; empty when none has."""
        return tuple(layer.index for layer in model.layers if self._in(layer))

    def _in(self, layer: Layer) -> bool:
        return self.kind in (None, layer.kind) and (not self.gated or has_gate(layer))


_GDN, _ATTENTION = "gdn", "attention"
_ALL = (
    Site(
        name="resid", axes=("prompt", "token", "d_model"), kind=None,
        doc="the residual stream after the layer",
    ),
    Site(
        name="mixer", axes=("prompt", "token", "d_model"), kind=None,
        doc="what the GDN or attention block adds to the stream",
    ),
    Site(
        name="mlp", axes=("prompt", "token", "d_model"), kind=None,
        doc="what the MLP adds to the stream",
    ),
    Site(
        name="gdn.q", axes=("prompt", "token", "head", "d_k"), kind=_GDN,
        doc="queries after the convolution, before normalisation",
    ),
    Site(
        name="gdn.k", axes=("prompt", "token", "head", "d_k"), kind=_GDN,
        doc="keys after the convolution, before normalisation; one serves v_heads / heads consecutive value heads",
    ),
    Site(
        name="gdn.v", axes=("prompt", "token", "v_head", "d_v"), kind=_GDN,
        doc="values after the convolution",
    ),
    Site(
        name="gdn.beta", axes=("prompt", "token", "v_head"), kind=_GDN,
        doc="write strength, between 0 and 1",
    ),
    Site(
        name="gdn.decay", axes=("prompt", "token", "v_head"), kind=_GDN,
        doc="logarithm of the factor by which the state shrinks, at most 0, float32",
    ),
    Site(
        name="gdn.gate", axes=("prompt", "token", "v_head", "d_v"), kind=_GDN,
        doc="the output gate (in_proj_z), before its SiLU",
    ),
    Site(
        name="gdn.readout", axes=("prompt", "token", "v_head", "d_v"), kind=_GDN,
        doc="S^T q: what each value head reads from its state, as the gated norm gets it",
    ),
    Site(
        name="gdn.heads", axes=("prompt", "token", "v_head", "d_v"), kind=_GDN,
        doc="each value head's output before out_proj (after norm and gate)",
    ),
    Site(
        name="gdn.state", axes=("prompt", "token", "v_head", "d_k", "d_v"), kind=_GDN, sums_up=True,
        doc="the recurrent state S after the token, float32",
    ),
    Site(
        name="gdn.conv", axes=("prompt", "token", "channel", "kernel"), kind=_GDN, sums_up=True,
        doc="the convolution's state after the token: its last inputs, channels being q, k and v one after the other",
    ),
    Site(
        name="gdn.attention", axes=("prompt", "token", "v_head", "source"), kind=_GDN,
        doc="exact weights of the values in the readout, decay and erasure included; of either sign, float32",
    ),
    Site(
        name="gdn.attribution", axes=("prompt", "token", "v_head", "source"), kind=_GDN, sums_up=True,
        doc="exact share of each source in the state after the token, |S|^2 being 1; of either sign, float32",
    ),
    Site(
        name="attn.q", axes=("prompt", "token", "head", "d_head"), kind=_ATTENTION,
        doc="queries as they meet keys, after norm and rotation",
    ),
    Site(
        name="attn.k", axes=("prompt", "token", "head", "d_head"), kind=_ATTENTION,
        doc="keys as they meet queries; one head serves several consecutive query heads",
    ),
    Site(
        name="attn.v", axes=("prompt", "token", "head", "d_head"), kind=_ATTENTION,
        doc="values, with the heads of the keys",
    ),
    Site(
        name="attn.gate", axes=("prompt", "token", "head", "d_head"), kind=_ATTENTION, gated=True,
        doc="the output gate, before its sigmoid",
    ),
    Site(
        name="attn.pattern", axes=("prompt", "token", "head", "source"), kind=_ATTENTION,
        doc="softmax weights, float32; they add up to 1 over the sources",
    ),
    Site(
        name="attn.heads", axes=("prompt", "token", "head", "d_head"), kind=_ATTENTION,
        doc="each head's output before o_proj (in Qwen3.5: after the output gate)",
    ),
)  # fmt: skip
SITES: Mapping[str, Site] = MappingProxyType({site.name: site for site in _ALL})


def site(name: str) -> Site:
    """Look a site up by name.

    Raises:
        WrongInput: there is no such site.
    """
    if name not in SITES:
        raise WrongInput(f"unknown site '{name}'; allowed are {', '.join(SITES)}")
    return SITES[name]


def has_gate(layer: Layer) -> bool:
    """Whether an attention block makes an output gate beside its queries: its q_proj is then twice as wide."""
    queries, outputs = getattr(layer.mixer, "q_proj", None), getattr(layer.mixer, "o_proj", None)
    if queries is None or outputs is None:
        return False
    return queries.weight.shape[0] == 2 * outputs.weight.shape[1]


def positions_at(site_name: str, positions: Any) -> Any:
    """What a capture's `positions` mean at one site: its own entry of a mapping, or what was said for all sites.

    Said for all sites, "all" and "mean:..." keep the other sites' tokens and the last value of a site that sums up its
    tokens (`gdn.state`, `gdn.conv`, `gdn.attribution`).
    """
    if isinstance(positions, Mapping):
        return positions.get(site_name, "last")
    if site(site_name).sums_up and isinstance(positions, str) and (positions == "all" or positions.startswith("mean:")):
        return "last"
    return positions


def keeps_tokens(site_name: str, positions: Any) -> bool:
    """Whether a capture at these positions has a token axis at a site: several tokens for each prompt, or one."""
    where = positions_at(site_name, positions)
    return not isinstance(where, str) or where in ("all", "generated") or where.startswith("tokens:")


def having(model: HybridModel, site_name: str, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """Those of some layers that have a site, ascending; empty when none has. None asks for all layers.

    Raises:
        WrongInput: the site is unknown; a layer is negative or out of range.
    """
    asked = None if layers is None else {_index(model, layer) for layer in layers}
    return tuple(layer for layer in site(site_name).layers(model) if asked is None or layer in asked)


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
        lacking = f"{found.kind} layers" + (" with an output gate" if found.gated else "")
        raise WrongInput(f"site '{site_name}' does not exist in {model.name}: it has no {lacking}")
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
