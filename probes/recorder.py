"""The recorder: listens while one batch runs through a model, and keeps what is wanted of it.

Single tokens pass through modules, so most sites are read by a PyTorch hook. Where tokens meet there is no module but a
kernel call; there the recorder is a tap (`probes.taps`). Both are set last, after whatever intervenes in the model, so
they hear what the model really works with: values after they were edited, a stream where the next layer reads it. An
intervention may split the kernel call of one forward into several; the recorder counts tokens and joins them.

A batch may take several forwards: pieces of long prompts, then one forward for each generated token. Each comes with
its `Points`, the tokens that are wanted of it, and only those are copied. A state inside a forward costs no second
pass: `probes.recurrence.scan` then does the kernel's work, and looks at the state on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from probes.attribution import attribute_state, implicit_attention
from probes.errors import WrongInput
from probes.model import HybridModel, Layer
from probes.recurrence import Recurrence, scan
from probes.sites import SITES
from probes.taps import AttentionCall, GDNCall, Run, causal_pattern, tapped

_BROUGHT = {"gdn.q": "q", "gdn.k": "k", "gdn.v": "v", "gdn.beta": "beta", "gdn.decay": "decay"}
# of all that tokens brought, at some tokens: [prompt n v_head source]
_DERIVED: dict[str, Callable[[Recurrence, Tensor], Tensor]] = {
    "gdn.attention": lambda x, at: implicit_attention(x, at).weights.transpose(1, 2),
    "gdn.attribution": lambda x, at: attribute_state(x, at=at).shares,
}
_TAPPED = {*_BROUGHT, *_DERIVED, "gdn.state", "attn.q", "attn.k", "attn.v", "attn.pattern"}


class _Enough(Exception):
    """Everything that is wanted of a forward has been read."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """The tokens wanted of one forward: (row in the batch, column in the forward), rows and then columns ascending."""

    rows: Sequence[int]
    columns: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def between(self, start: int, stop: int) -> Points:
        """Those in some of the columns, counted from the first of these."""
        chosen = [
            (row, column - start) for row, column in zip(self.rows, self.columns, strict=True) if start <= column < stop
        ]
        return Points(rows=[row for row, _ in chosen], columns=[column for _, column in chosen])

    def of(self, values: Tensor) -> Tensor:
        """A copy of the points' entries in [prompt token ...]."""
        return values[self._index(self.rows, values), self._index(self.columns, values)]

    def grid(self, height: int, device: torch.device) -> Tensor:
        """Columns as a rectangle [prompt n], int64; rows with fewer points are filled up with column 0."""
        columns = torch.zeros(height, max(self._rank) + 1, dtype=torch.long)
        columns[list(self.rows), self._rank] = torch.tensor(self.columns)
        return columns.to(device)

    def of_grid(self, values: Tensor) -> Tensor:
        """A copy of the points' entries in [prompt n ...], n being those of `grid`."""
        return values[self._index(self.rows, values), self._index(self._rank, values)]

    @cached_property
    def _rank(self) -> list[int]:
        """Which of its row's points each point is."""
        return [rank for _, group in groupby(self.rows) for rank, _ in enumerate(group)]

    @staticmethod
    def _index(numbers: Sequence[int], like: Tensor) -> Tensor:
        return torch.tensor(numbers, device=like.device)


NO_POINTS = Points(rows=(), columns=())


@dataclass(kw_only=True)
class _Kept:
    """What was kept of one site in one layer, forward by forward. Of a mean only sums are kept, in float32."""

    mean: bool
    rows: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    dtype: torch.dtype = torch.float32

    def add(self, rows: Sequence[int], values: Tensor) -> None:
        self.counts.update(rows)
        self.dtype = values.dtype
        if self.mean:
            sizes = [len(list(group)) for _, group in groupby(rows)]
            wide = torch.promote_types(values.dtype, torch.float32)
            # summed row by row: weights would spread a NaN of one row to the others, zero times NaN being NaN
            values = torch.stack([part.to(wide).sum(0) for part in values.split(sizes)])
            rows = [row for row, _ in groupby(rows)]
        self.rows += rows
        self.values.append(values)

    def to_cpu(self) -> None:
        for i in reversed(range(len(self.values))):
            if self.values[i].device.type == "cpu":
                return
            self.values[i] = self.values[i].cpu()

    def whole(self, width: int | None) -> tuple[list[int], Tensor]:
        """Rows, ascending, and their values along the first axis; `width` is that of a last axis of sources."""
        values = self.values if width is None else [pad(value, (0, width - value.shape[-1])) for value in self.values]
        order = sorted(range(len(self.rows)), key=self.rows.__getitem__)
        rows, result = [self.rows[i] for i in order], torch.cat(values)[order]
        if not self.mean:
            return rows, result
        sizes = [len(list(group)) for _, group in groupby(rows)]
        rows = [row for row, _ in groupby(rows)]
        sums = zip(rows, result.split(sizes), strict=True)
        return rows, torch.stack([(part.sum(0) / self.counts[row]).to(self.dtype) for row, part in sums])


class Recorder:
    """Reads sites of a model over the forwards of one batch.

    Args:
        plan: layers by site.
        means: the sites of which a mean over the points is wanted instead of each point.
        offsets: for each row of the batch, the number of padding tokens in front.
    """

    def __init__(
        self, model: HybridModel, plan: Mapping[str, Sequence[int]], *, means: set[str], offsets: Sequence[int]
    ):
        self.model, self.plan, self.offsets = model, plan, offsets
        self.kept = {(site, layer): _Kept(mean=site in means) for site in plan for layer in plan[site]}
        self.points: Mapping[str, Points] = {}
        self.first = self.width = 0  # of the forward that runs now: its first column in the batch, its columns
        self.done: dict[int, int] = {}  # columns that a tapped layer has been called with in this forward
        self.tails: dict[int, Tensor] = {}  # by GDN layer: what the convolution still sees of earlier forwards
        self.joined: dict[int, list[GDNCall]] = {layer: [] for site in _DERIVED for layer in plan.get(site, ())}
        self.finals: dict[int, Tensor] = {}  # by the layers of `joined`: the state that the last call ended with
        self.asked: dict[str, list[tuple[int, int]]] = {site: [] for site in _DERIVED}  # (row, column in the batch)

    @contextmanager
    def listening(self, *, all_layers: bool) -> Iterator[None]:
        """Hooks and taps are set inside the block. Without `all_layers` forwards end after the last layer wanted."""
        layers = self.model.layers
        tapping = {layer for site in _TAPPED & set(self.plan) for layer in self.plan[site]}
        taps = {i: partial(self._gdn if layers[i].kind == "gdn" else self._attention, i) for i in sorted(tapping)}
        self.done = dict.fromkeys(taps, 0)
        with ExitStack() as stack:
            stack.enter_context(tapped(self.model, taps))
            for site, index in self.kept:
                if site not in _TAPPED:
                    stack.callback(self._hook(site, layers[index]).remove)
            if not all_layers:
                last = layers[max(layer for chosen in self.plan.values() for layer in chosen)]
                stack.callback(_next_reader(self.model, last).register_forward_pre_hook(_stop).remove)
            yield

    def forward(self, inputs: dict[str, Any], *, points: Mapping[str, Points], first: int) -> Any:
        """Run the model on the batch's columns from `first` on. Returns its output, None where it was ended early."""
        self.points, self.first, self.width = points, first, inputs["input_ids"].shape[1]
        self.done = dict.fromkeys(self.done, 0)
        try:
            output = self.model.hf(**inputs)
        except _Enough:
            output = None
        for layer, done in self.done.items():
            if done != self.width:
                where = self.model.layers[layer]
                raise WrongInput(
                    f"the kernel of {where} was called for {done} tokens in a forward of {self.width}: an intervention "
                    "calls it twice, or not at all, and what happens there cannot be recorded"
                )
        for (site, _), kept in self.kept.items():
            if len(points[site]):
                kept.to_cpu()
        for site, asked in self.asked.items():
            chosen = points.get(site, NO_POINTS)
            asked += [(row, first + column) for row, column in zip(chosen.rows, chosen.columns, strict=True)]
        return output

    def tensors(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Everything kept, as `<site>.<layer>`: the batch's rows one after the other along the first axis.

        The axis of sources has one length for each row, so it is put first too: for each point, one entry a source.
        `lengths` are the rows' tokens, so those of this axis.
        """
        for layer in self.joined:
            self._derive(layer)
        result = {}
        for (site, layer), kept in self.kept.items():
            if "source" not in SITES[site].axes:
                result[f"{site}.{layer}"] = kept.whole(None)[1]
                continue
            rows, values = kept.whole(max(map(sum, zip(self.offsets, lengths, strict=True))))
            starts = [self.offsets[row] for row in rows]
            cut = [
                value[:, start : start + lengths[row]].T for row, start, value in zip(rows, starts, values, strict=True)
            ]
            result[f"{site}.{layer}"] = torch.cat(cut)
        return result

    def counts(self, site: str) -> tuple[int, ...]:
        """How many points of each row were kept."""
        kept = self.kept[site, self.plan[site][0]]
        return tuple(kept.counts[row] for row in range(len(self.offsets)))

    def _keep(self, site: str, layer: int, values: Tensor, start: int = 0) -> None:
        """Keep what is wanted of [prompt token ...]; its tokens are the forward's from `start` on."""
        if (kept := self.kept.get((site, layer))) is None:
            return
        points = self.points[site]
        if values.shape[1] != self.width:
            points = points.between(start, start + values.shape[1])
        if len(points):
            kept.add(points.rows, points.of(values))

    # --- sites that modules show

    def _hook(self, site: str, layer: Layer) -> Any:
        mixer: Any = layer.mixer
        keep = partial(self._keep, site, layer.index)
        heads = getattr(mixer, "num_v_heads", None) or self.model.config.num_attention_heads

        def before(module: Any, read: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
            return module.register_forward_pre_hook(lambda _, args: keep(read(args[0])))

        def after(module: Any, read: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
            return module.register_forward_hook(lambda _, args, output: keep(read(_tensor(output))))

        match site:
            case "resid":
                return before(_next_reader(self.model, layer))
            case "mixer":
                return after(mixer)
            case "mlp":
                return after(layer.mlp)
            case "gdn.heads" | "attn.heads":
                return before(_output_projection(site, layer), lambda values: values.unflatten(-1, (heads, -1)))
            case "gdn.gate":
                return after(mixer.in_proj_z, lambda values: values.unflatten(-1, (heads, -1)))
            case "attn.gate":  # q_proj gives for each head its query, then its gate
                return after(mixer.q_proj, lambda values: values.unflatten(-1, (heads, 2, -1))[..., 1, :])
            case "gdn.readout":  # the gated norm gets all tokens' heads as one axis
                return before(mixer.norm, lambda values: values.reshape(len(self.offsets), self.width, heads, -1))
            case "gdn.conv":
                return after(mixer.in_proj_qkv, partial(self._windows, layer))
        raise WrongInput(f"site '{site}' cannot be read by a hook")

    def _windows(self, layer: Layer, inputs: Tensor) -> Tensor:
        """The convolution's last inputs at each token, a view: [prompt token channel kernel]."""
        mixer: Any = layer.mixer
        size = mixer.conv_kernel_size
        before = self.tails.get(layer.index)
        if before is None:
            before = inputs.new_zeros(len(inputs), size - 1, inputs.shape[2])
        seen = torch.cat([before, inputs], 1)
        self.tails[layer.index] = seen[:, seen.shape[1] - size + 1 :].clone()
        return seen.unfold(1, size, 1)

    # --- sites that kernel calls show

    def _gdn(self, layer: int, call: GDNCall, run: Run) -> tuple[Tensor, Any]:
        start = self.done[layer]
        self.done[layer] = stop = start + call.tokens
        for site, name in _BROUGHT.items():
            self._keep(site, layer, getattr(call, name), start)
        self._join(layer, call)
        kept = self.kept.get(("gdn.state", layer))
        points = self.points["gdn.state"].between(start, stop) if kept else NO_POINTS
        if any(column != call.tokens - 1 for column in points.columns):
            x = Recurrence.of_kernel(
                call.q, call.k, call.v, beta=call.beta, decay=call.decay, initial=call.state, mask=call.mask
            )
            found = scan(x, at=points.grid(len(call.v), call.v.device))
            outputs, final, states = found.outputs.to(call.q.dtype), found.final, found.states
        else:
            outputs, final = run(call)
            states = final[:, None]
        if kept and len(points) and states is not None:
            kept.add(points.rows, points.of_grid(states).float())
        if layer in self.joined:
            self.finals[layer] = final
        return outputs, final

    def _join(self, layer: int, call: GDNCall) -> None:
        """Hold on to a call, for the parts of all tokens in what later ones find."""
        if layer not in self.joined:
            return
        before = self.finals.get(layer)
        if before is not None and (call.state is None or not torch.equal(before, call.state.to(before))):
            names = " and ".join(f"'{site}'" for site in _DERIVED if layer in self.plan.get(site, ()))
            raise WrongInput(
                f"site {names} needs all of a state to come from tokens, but that of "
                f"{self.model.layers[layer]} was edited before token {self.first + self.done[layer] - call.tokens}"
            )
        self.joined[layer].append(call)

    def _derive(self, layer: int) -> None:
        calls = self.joined[layer]
        q, k, v, beta, decay = (torch.cat([getattr(call, name) for call in calls], 1) for name in _BROUGHT.values())
        columns = torch.arange(q.shape[1], device=q.device)
        mask = (columns >= torch.tensor(self.offsets, device=q.device)[:, None]).long()
        x = Recurrence.of_kernel(q, k, v, beta=beta, decay=decay, mask=mask)
        for site, derived in _DERIVED.items():
            if (kept := self.kept.get((site, layer))) is not None:
                asked = sorted(self.asked[site])
                points = Points(rows=[row for row, _ in asked], columns=[column for _, column in asked])
                kept.add(points.rows, points.of_grid(derived(x, points.grid(len(q), q.device))).cpu())

    def _attention(self, layer: int, call: AttentionCall, run: Run) -> tuple[Tensor, Any]:
        width = call.q.shape[2]
        self.done[layer] += width
        self._keep("attn.q", layer, call.q.transpose(1, 2))
        self._keep("attn.k", layer, call.k[:, :, -width:].transpose(1, 2))
        self._keep("attn.v", layer, call.v[:, :, -width:].transpose(1, 2))
        kept = self.kept.get(("attn.pattern", layer))
        if kept and len(points := self.points["attn.pattern"]):
            weights = causal_pattern(call, points.grid(len(call.q), call.q.device)).transpose(1, 2)
            forgotten = self.first + width - weights.shape[-1]  # a sliding window drops the first keys
            kept.add(points.rows, pad(points.of_grid(weights), (forgotten, 0)))
        return run(call)


def _stop(*_: Any) -> None:
    raise _Enough


def _tensor(output: Any) -> Tensor:
    """The tensor of a module's output; attention blocks return (output, weights)."""
    return output[0] if isinstance(output, tuple) else output


def _output_projection(site: str, layer: Layer) -> Any:
    name = "out_proj" if layer.kind == "gdn" else "o_proj"
    if not hasattr(layer.mixer, name):
        raise WrongInput(f"site '{site}' needs {name}, which {type(layer.mixer).__name__} of {layer} has not")
    return getattr(layer.mixer, name)


def _next_reader(model: HybridModel, layer: Layer) -> Any:
    """The module that takes a layer's residual stream: the next layer, or the final norm."""
    last = layer.index == len(model.layers) - 1
    return model.decoder.norm if last else model.layers[layer.index + 1].block
