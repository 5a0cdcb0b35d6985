"""Apply a direction while the model runs, and leave no trace afterwards.

    with steer(model, direction, dose=0.5, phase="both"):
        model.hf.generate(...)

One interface for three places. `dose` is in units of the site's typical norm, so 0.5 means a push half as large as
what is there; positive doses push towards "wanted". Phases: "prefill" edits at the prompt's tokens, "decode" at the
answer's, "both" at both. A forward that continues a cache is decoding; one without a past is prefill, all of it.

In the residual stream and in attention heads an edit changes single tokens. A GDN state is memory: it is edited at one
point in time, and the recurrence carries the edit to every later token. So `form` says when:

    end       once in a phase, before its last tokens: in prefill before the prompt's last token (so that the first
              answer token is already chosen under the edit), in decoding before the answer's first token is read
    initial   in the state that the sequence starts from, before its first token (prefill only)
    write     at every token of the phase, in the form the layer itself writes: a token's value v becomes
              v + dose x norm x D^T k, D being the head's matrix and k the token's key. The delta rule fits v to k, so
              this moves what it is fitting by exactly D, and each write k u^T stays of rank 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.weak import WeakIdKeyDictionary

from probes.directions import Direction, vector_hash
from probes.errors import WrongInput
from probes.model import HybridModel
from probes.pairs import STEERABLE
from probes.recurrence import normalised
from probes.sites import resolve
from probes.taps import GDNCall, Run, tapped, without_padding

Phase = Literal["prefill", "decode", "both"]
Mode = Literal["add", "ablate", "clamp", "rotate"]
Form = Literal["end", "initial", "write"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Push = tuple[Direction, float]  # a direction and its dose
BEFORE_PROMPTS = "an initial state is there before the prompt: form 'initial' needs phase prefill or both"


@contextmanager
def steer(
    model: HybridModel,
    direction: Direction,
    *,
    dose: float = 0.5,
    phase: str = "both",
    mode: str = "add",
    last: int | None = None,
    form: str = "end",
) -> Iterator[None]:
    """Edit the site of a direction at its layer while the block runs.

    Args:
        dose: strength in units of `direction.norm`; ignored by "ablate".
        phase: which tokens are edited: "prefill", "decode" or "both".
        mode: "add" adds dose x norm x vector. "clamp" sets the component along the vector to midpoint + dose x norm,
            whatever it was. "ablate" is a clamp at the midpoint, where neither side is shown. (At writes there is no
            midpoint: the value's component along D^T k is set to dose x norm x |D^T k|, or to 0.) "rotate" turns a
            value toward the vector by as much as "add" would, and leaves its norm (in heads: each head's) as it was.
        last: edit only the last n tokens of the prompt; of a state in form "end", edit it before the last n tokens.
            None: all tokens, and for form "end" 1. It does not count in decoding.
        form: for states, when: "end", "initial" or "write".

    Raises:
        WrongInput: unknown phase, mode or form, a dose that is not finite, or a direction that does not fit the model.
        RuntimeError: from the model, of a state whose layer had its forward rewritten, by an nnsight trace with
            `.source` for instance: load the model again.
    """
    for name, value, allowed in (("phase", phase, Phase), ("mode", mode, Mode), ("form", form, Form)):
        if value not in get_args(allowed):
            raise WrongInput(f"unknown {name} '{value}'; allowed are {', '.join(get_args(allowed))}")
    if not math.isfinite(dose):
        raise WrongInput(f"dose must be finite, saw {dose}")
    if last is not None and last < 1:
        raise WrongInput(f"last must be at least 1 token, saw {last}")
    if not (math.isfinite(direction.norm) and bool(direction.vector.isfinite().all())):
        raise WrongInput(f"the direction at {direction.site} {direction.layer} is not finite")
    if direction.site not in STEERABLE:
        raise WrongInput(f"'{direction.site}' cannot be steered; allowed are {', '.join(STEERABLE)}")
    resolve(model, direction.site, [direction.layer])
    edit = _Edit.of(model, [(direction, dose)], mode=mode)
    if direction.site == "gdn.state" and form == "initial" and phase == "decode":
        raise WrongInput(BEFORE_PROMPTS)

    def chosen(decoding: bool) -> slice | None:
        if phase != "both" and (phase == "decode") != decoding:
            return None
        return slice(None) if decoding or last is None else slice(-last, None)

    with (
        _noted(model, direction, {"dose": dose, "phase": phase, "mode": mode, "last": last, "form": form}),
        _edited(model, direction, _StateTap(edit=edit, phase=phase, form=form, last=last), chosen),
    ):
        yield


@contextmanager
def _noted(model: HybridModel, direction: Direction, how: dict[str, Any]) -> Iterator[None]:
    """The intervention is on the model's list while it lasts: a capture writes it into its recipe."""
    what = {"site": direction.site, "layer": direction.layer, "vector": vector_hash(direction.vector)}
    model.interventions.append({**what, **how})
    try:
        yield
    finally:
        model.interventions.pop()


@contextmanager
def steer_first(model: HybridModel, direction: Direction, *, dose: float, tokens: int = 1) -> Iterator[None]:
    """Add a direction at the first tokens of every forward (a state: before them), whether or not it continues a cache.

    For prompts that were computed up to their last tokens and are continued many times (`probes.prefixes`): what
    `steer(phase="prefill", last=tokens)` does to whole prompts, this does to their continuation.
    """
    edit = _Edit.of(model, [(direction, dose)], mode="add")
    tap = _StateTap(edit=edit, phase="both", form="end", last=None)
    with (
        _noted(model, direction, {"dose": dose, "first": tokens}),
        _edited(model, direction, tap, lambda decoding: slice(0, tokens)),
    ):
        yield


@contextmanager
def steer_rows(
    model: HybridModel, pushes: Sequence[Push], rows: Sequence[int], *, mode: str = "add", form: str = "end"
) -> Iterator[None]:
    """Edit every token of every forward (a state: as `form` says), each row of the batch along a push of its own.

    Many interventions at one place in one batch. A batch of k times as many rows has k consecutive ones for each.

    Args:
        pushes: directions of one site and layer, each with its dose.
        rows: for each row of the batch, which of the pushes it gets.
    """
    first = pushes[0][0]
    if any((one.site, one.layer) != (first.site, first.layer) for one, _ in pushes):
        raise WrongInput("the rows of one batch must be steered at one site of one layer")
    edit = _Edit.of(model, pushes, mode=mode, rows=rows)
    tap = _StateTap(edit=edit, phase="both", form=form, last=None)
    with (
        _noted(model, first, {"dose": [dose for _, dose in pushes], "mode": mode, "form": form}),
        _edited(model, first, tap, lambda decoding: slice(None)),
    ):
        yield


def _edited(
    model: HybridModel, direction: Direction, tap: _StateTap, chosen: Callable[[bool], slice | None]
) -> AbstractContextManager[None]:
    """A state is edited by its tap, anything else token by token."""
    if direction.site == "gdn.state":
        return tapped(model, {direction.layer: tap})
    return _tokens_edited(model, direction, tap.edit, chosen)


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """What happens to values [row ... *shape]: their components along unit tensors are pushed, set, or turned.

    `units` [push *shape] with `sizes` and `targets` [push] are the pushes, and `rows` [row] says which of them each row
    of the batch gets; None where there is one for all.
    """

    units: Tensor
    sizes: Tensor
    targets: Tensor  # "clamp" and "ablate" set the component to this; at writes, which have no midpoint, to `sizes`
    mode: str
    rows: Tensor | None

    @classmethod
    def of(cls, model: HybridModel, pushes: Sequence[Push], *, mode: str, rows: Sequence[int] | None = None) -> _Edit:
        shape = _expected_shape(model, pushes[0][0])
        for direction, _ in pushes:
            if direction.tensor.shape != shape:
                seen, allowed = (" x ".join(map(str, s)) for s in (direction.tensor.shape, shape))
                where = f"{direction.site} of {model.name} at layer {direction.layer}"
                raise WrongInput(f"the direction has {seen} elements, {where} {allowed}")
        sizes = torch.tensor([dose * one.norm if mode != "ablate" else 0.0 for one, dose in pushes])
        middles = torch.tensor([one.midpoint for one, _ in pushes])
        units = torch.stack([one.tensor for one, _ in pushes]).to(device=model.device, dtype=torch.float32)
        return cls(
            units=units, sizes=sizes.to(model.device), targets=(middles + sizes).to(model.device), mode=mode,
            rows=None if rows is None else torch.tensor(rows, device=model.device),
        )  # fmt: skip

    @property
    def shape(self) -> torch.Size:
        return self.units.shape[1:]

    def each(self, table: Tensor, batch: int, ndim: int) -> Tensor:
        """A table [push ...] spread over a batch's rows, with room for `ndim` axes in all between rows and the rest."""
        found = table if self.rows is None else table[self.rows.repeat_interleave(batch // len(self.rows))]
        return found.reshape(len(found), *[1] * (ndim - found.ndim), *found.shape[1:])

    def __call__(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        axes = tuple(range(-len(self.shape), 0))
        unit = self.each(self.units, len(values), values.ndim)
        size = self.each(self.sizes, len(values), values.ndim)
        if self.mode == "add":
            return values + (size * unit).to(values.dtype)
        wide = values.float()
        if self.mode == "rotate":  # each head keeps its norm: those that the direction leaves out stay as they are
            return turned(wide, size * unit, axes[1:] or axes).to(values.dtype)
        along = (wide * unit).sum(axes, keepdim=True)
        target = self.each(self.targets, len(values), values.ndim)
        return values + ((target - along) * unit).to(values.dtype)


def turned(values: Tensor, push: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Values plus a push, at the norm over `axes` that they had before."""
    moved = values + push
    before, after = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (values, moved))
    return moved * (before / after.clamp(min=torch.finfo(torch.float32).tiny))


def _expected_shape(model: HybridModel, direction: Direction) -> tuple[int, ...]:
    mixer: Any = model.layers[direction.layer].mixer
    if direction.site == "gdn.state":
        return mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim
    if direction.site == "attn.heads":
        return model.config.num_attention_heads, mixer.head_dim
    return (model.config.hidden_size,)


@contextmanager
def _tokens_edited(
    model: HybridModel, direction: Direction, edit: _Edit, chosen: Callable[[bool], slice | None]
) -> Iterator[None]:
    """Edit the residual stream after a layer, or what its attention heads hand to the output projection.

    `chosen` says which tokens of a forward are edited, given whether it continues a cache; None for none of them.
    """
    layer, decoding = model.layers[direction.layer], False

    def note_phase(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal decoding
        past = kwargs.get("past_key_values")
        decoding = past is not None and past.get_seq_length() > 0

    def edited(stream: Tensor) -> Tensor:
        if (part := chosen(decoding)) is None:
            return stream
        result = stream.clone()
        result[:, part] = edit(stream[:, part].unflatten(-1, edit.shape)).flatten(2)
        return result

    def after_block(_: Any, args: tuple, output: Any) -> Any:
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    def before_projection(_: Any, args: tuple) -> Any:
        return (edited(args[0]), *args[1:])

    with ExitStack() as stack:
        note = model.decoder.register_forward_pre_hook(note_phase, with_kwargs=True)
        stack.callback(note.remove)
        if direction.site == "resid":
            handle = layer.block.register_forward_hook(after_block)
        else:
            projection: Any = layer.mixer.o_proj
            handle = projection.register_forward_pre_hook(before_projection)
        stack.callback(handle.remove)
        yield


class _StateTap:
    """Stands beside the recurrence of one layer and edits its state."""

    def __init__(self, *, edit: _Edit, phase: str, form: str, last: int | None):
        self.edit, self.phase, self.form, self.last = edit, phase, form, last
        # In decoding a state is edited once for each cache; a copy of a cache is another one.
        self.met: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, call: GDNCall, run: Run) -> tuple[Tensor, Any]:
        """A forward may come in pieces, when another tap has split it: each moment of an edit lies in one of them."""
        decoding = call.continued
        if self.phase != "both" and (self.phase == "decode") != decoding:
            return run(call)
        if self.form == "write":
            first = 0 if decoding or self.last is None else max(call.forward - self.last - call.first, 0)
            return run(self.rewritten(call, first))
        if decoding:
            fresh = self.form == "end" and call.first == 0 and not self.seen(call.memory)
            return run(self.edited(call) if fresh else call)
        call = without_padding(call)  # padding would wear off an edit that is made before it
        moment = 0 if self.form == "initial" else max(call.forward - (self.last or 1), 0)
        at = moment - call.first
        if not 0 <= at < call.tokens:
            return run(call)
        if at == 0:
            return run(self.edited(call))
        before, state = run(call.between(0, at, state=call.state))
        after, state = run(self.edited(call.between(at, call.tokens, state=state)))
        return torch.cat([before, after], 1), state

    def seen(self, memory: Any) -> bool:
        known = memory in self.met
        self.met[memory] = True
        return known

    def edited(self, call: GDNCall) -> GDNCall:
        state = call.state
        if state is None:
            state = torch.zeros(len(call.v), *self.edit.shape, device=call.v.device)
        return replace(call, state=self.edit(state))

    def rewritten(self, call: GDNCall, first: int) -> GDNCall:
        """Other values for the tokens from `first` on: what each is to be, or has along what D says to its key."""
        if first >= call.tokens:
            return call
        edit, heads = self.edit, self.edit.shape[0]
        keys = normalised(call.k[:, first:].float()).repeat_interleave(heads // call.k.shape[2], 2)
        unit = edit.each(edit.units, len(keys), 4).expand(len(keys), -1, -1, -1)
        told = torch.einsum("pthk,phkv->pthv", keys, unit)
        values, size = call.v[:, first:].float(), edit.each(edit.sizes, len(keys), 4)
        if edit.mode == "add":
            values = values + size * told
        elif edit.mode == "rotate":
            values = turned(values, size * told, (-1,))
        else:
            along = normalize(told, dim=-1)
            wanted = size * told.norm(dim=-1, keepdim=True)
            values = values + (wanted - (values * along).sum(-1, keepdim=True)) * along
        return replace(call, v=torch.cat([call.v[:, :first], values.to(call.v.dtype)], 1))
