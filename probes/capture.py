"""Capture: run prompts through a model and record its sites.

One pass per batch, and of it only what was asked for is copied out: the positions wanted, at the layers wanted. Where
nothing is wanted after some layer, the pass stops there.

    states = capture(model, prompts, sites=("resid", "gdn.state"))
    states["resid", 5]         # [prompt, d_model]
    states["gdn.state", 4]     # [prompt, v_head, d_k, d_v]

    spoken = capture(model, prompts, sites=("resid", "attn.pattern"), positions="generated", new_tokens=20)
    spoken["resid", 5][0]      # [token, d_model], of the tokens that the first prompt was continued with

Prompts are batched by length and padded on the left. Every value is taken from a prompt's own tokens by position, so
padding never enters a result, and a prompt gives the same numbers alone as in company (to 1e-5 in float32).

A capture hears what the model works with, whatever intervenes: inside `with steer(...)` values are those after the
edit. `resid` is read where the next layer reads it, so an edit made by a PyTorch hook on the layer is seen too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from probes.errors import WrongInput
from probes.model import HybridModel
from probes.prompts import SPANS, Batch, Prompt, batches
from probes.recorder import Points, Recorder
from probes.recurrence import Recurrence
from probes.sites import SITES, keeps_tokens, positions_at, resolve, site
from probes.store import (
    RECIPE,
    Capture,
    Part,
    library_versions,
    open_capture,
    read_json,
    read_part,
    recipe_differs,
    write_json,
    write_tensors,
)

__all__ = ["GENERATED", "POSITIONS", "RECURRENCE", "Capture", "capture", "prompts_hash", "recurrences"]

POSITIONS = ("last", "all", *(f"{what}:{span}" for what in ("mean", "last", "tokens") for span in SPANS))
GENERATED = ("generated", "mean:generated")
RECURRENCE: tuple[str, ...] = ("gdn.q", "gdn.k", "gdn.v", "gdn.beta", "gdn.decay")
MOST_STATES = 64  # of one prompt and layer: 128 MiB at Qwen3.5's default sizes

Layers = Sequence[int] | Mapping[str, Sequence[int]] | None
Where = str | Sequence[Sequence[int]]


def capture(
    model: HybridModel,
    prompts: Sequence[Prompt],
    *,
    sites: Sequence[str] = ("resid",),
    layers: Layers = None,
    positions: Where | Mapping[str, Where] = "last",
    new_tokens: int = 0,
    out: str | Path | None = None,
    batch_tokens: int = 4096,
    chunk_tokens: int | None = None,
    progress: bool = True,
) -> Capture:
    """Record sites over prompts, without gradients.

    Positions, for all sites or by site ("last" for a site that is left out):

        "last"        the last token of the prompt, or of what it was continued with
        "all"         every token of both
        "generated"   every token that the prompt was continued with
        "last:S"      the last token of the span S: "context", "direction" or "decision"
        "tokens:S"    every token of the span
        "mean:S"      the mean over the span, or over S = "generated": summed in float32, given in the site's dtype
        indices       for each prompt its own tokens, ascending; negative ones count from the end of the prompt

    "all", "generated", "tokens:S" and indices give a list with one tensor [token ...] for each prompt; the others give
    one tensor without a token axis (but a list for a site with an axis of sources).

    `gdn.state`, `gdn.conv` and `gdn.attribution` sum up all tokens so far, so they are what is there *after* a token.
    They are kept after at most 64 tokens of a prompt. "all" and means do not exist for them: said for all sites, those
    words keep the last value; said for these sites by name, they are refused.

    Args:
        model: in eval mode.
        prompts: at least one; results keep their order.
        sites: names from `probes.sites.SITES`.
        layers: 0-based indices that must exist for every site; or such indices by site (a site that is left out gets
            all of its layers); or None, for every layer that has the site.
        positions: see above.
        new_tokens: continue each prompt greedily by at most this many tokens, ending with the end-of-turn token, and
            record these tokens like the prompt's: each is run through the model, the last one too. `Capture.generated`
            has their ids.
        out: a folder to stream finished batches to. An interrupted capture resumes there: whole batches are not
            computed again, and the bytes are those of an uninterrupted run. Without it everything stays in memory.
        batch_tokens: at most this many tokens, with padding, in one forward pass. With `gdn.state` a batch holds one
            state for each prompt, position and GDN layer (27B: 151 MiB for all layers), so lower it for short prompts.
        chunk_tokens: run longer prompts in pieces of this many tokens, at least 2, so that activations of one piece
            are held at a time (but for `gdn.attention` and `gdn.attribution` the q, k and v of all tokens). The same
            numbers to 1e-5 in float32. To an intervention that tells prefill from decoding, pieces after the first are
            decoding.
        progress: show a progress bar over batches.

    Raises:
        WrongInput: unknown site, layer or positions; positions that a site does not have; no prompts; a prompt without
            tokens in the span or longer than the model's context; the model is in training mode; an intervention edits
            states between tokens whose parts are wanted (`gdn.attention`, `gdn.attribution`); `out` holds something
            else or another capture (the message names the first difference).
    """
    names = _sites(sites)
    plan = {name: resolve(model, name, layers.get(name) if isinstance(layers, Mapping) else layers) for name in names}
    for what, given in (("layers", layers), ("positions", positions)):
        if isinstance(given, Mapping) and (extra := sorted(set(given) - set(names))):
            allowed = ", ".join(names)
            raise WrongInput(f"{what} were given for '{extra[0]}', which is not captured; captured are {allowed}")
    if not prompts:
        raise WrongInput("no prompts were given")
    if batch_tokens < 1:
        raise WrongInput(f"batch_tokens must be at least 1, saw {batch_tokens}")
    if chunk_tokens is not None and chunk_tokens < 2:
        raise WrongInput(f"chunk_tokens must be at least 2, saw {chunk_tokens}")
    if new_tokens < 0:
        raise WrongInput(f"new_tokens must be at least 0, saw {new_tokens}")
    if model.hf.training:
        raise WrongInput(f"{model.name} is in training mode; call model.hf.eval() before a capture")
    for number, prompt in enumerate(prompts):
        _check_length(model, prompt, number, new_tokens)
    asked = _plain(positions, names)
    spots = {name: _spots(prompts, name, positions_at(name, asked), new_tokens) for name in names}
    recipe = {
        "kind": "capture",
        **model.identity,
        "prompts": len(prompts),
        "prompts_hash": prompts_hash(prompts),
        "layers": {name: list(chosen) for name, chosen in plan.items()},
        "positions": asked,
        "new_tokens": new_tokens,
        "batch_tokens": batch_tokens,
        "chunk_tokens": chunk_tokens,
        "interventions": list(model.interventions),
        "versions": library_versions(),
    }
    folder = None if out is None else _prepare(Path(out), recipe)
    work = list(batches(model, [prompt.ids for prompt in prompts], batch_tokens=batch_tokens))
    parts = []
    for number, batch in enumerate(tqdm(work, desc="capture", unit="batch", disable=not progress)):
        path = folder / f"batch-{number:05d}.safetensors" if folder else None
        if path and _is_whole(path, batch):
            continue
        part = _record(model, batch, recipe, spots)
        if path and isinstance(part.tensors, Mapping):
            write_tensors(path, part.tensors, part.note)
        else:
            parts.append(part)
    return open_capture(folder) if folder else Capture(recipe=recipe, parts=tuple(parts))


def recurrences(record: Capture, *, layer: int) -> list[Recurrence]:
    """What the recurrence of a GDN layer was given, for `probes.recurrence` and `probes.attribution`: one per prompt.

    `probes.recurrence.left_padded` makes one of them all.

    Args:
        record: a capture of the sites `RECURRENCE` with positions "all".

    Raises:
        WrongInput: the capture lacks one of the sites or the layer, or not all tokens were kept.
    """
    for name in RECURRENCE:
        if (kept := positions_at(name, record.recipe["positions"])) != "all":
            raise WrongInput(f"a recurrence needs all tokens of '{name}'; this capture has positions {kept}")
    given = zip(*(record[name, layer] for name in RECURRENCE), strict=True)
    return [
        Recurrence.of_kernel(q[None], k[None], v[None], beta=beta[None], decay=decay[None])
        for q, k, v, beta, decay in given
    ]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over token ids and spans, in order (first 16 hex digits)."""
    content = [[list(prompt.ids), [list(prompt.spans[span]) for span in SPANS]] for prompt in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _sites(names: Sequence[str]) -> tuple[str, ...]:
    wanted = {site(name).name for name in ((names,) if isinstance(names, str) else names)}
    if not wanted:
        raise WrongInput(f"no sites were given; allowed are {', '.join(SITES)}")
    return tuple(name for name in SITES if name in wanted)


def _check_length(model: HybridModel, prompt: Prompt, number: int, new_tokens: int) -> None:
    if not len(prompt):
        raise WrongInput(f"prompt {number} has no tokens")
    if len(prompt) + new_tokens > model.max_tokens:
        raise WrongInput(
            f"prompt {number} of {len(prompt)} tokens and {new_tokens} new ones are longer than the context of "
            f"{model.name}, {model.max_tokens} tokens"
        )


# --- positions


@dataclass(frozen=True, kw_only=True)
class _Spots:
    """Which tokens of one prompt are wanted, ascending, and which of those it is continued with."""

    prompt: Sequence[int] = ()
    generated: Literal["none", "all", "last"] = "none"


def _plain(positions: Where | Mapping[str, Where], names: Sequence[str]) -> Any:
    """Positions as the recipe holds them: a word, a list of indices for each prompt, or these by site."""
    if isinstance(positions, Mapping):
        return {name: _plain(positions.get(name, "last"), names) for name in names}
    if isinstance(positions, str):
        return positions
    return [[operator.index(index) for index in indices] for indices in positions]


def _spots(prompts: Sequence[Prompt], name: str, where: Any, new_tokens: int) -> list[_Spots]:
    if isinstance(where, str):
        _check_word(name, where, new_tokens)
        found = [_worded(prompt, where, number, new_tokens) for number, prompt in enumerate(prompts)]
    else:
        if len(where) != len(prompts):
            raise WrongInput(f"positions by index need one list for each prompt: saw {len(where)} for {len(prompts)}")
        found = [_indexed(len(prompt), where[number], number) for number, prompt in enumerate(prompts)]
    if site(name).sums_up:
        most = [len(spots.prompt) + (new_tokens if spots.generated == "all" else 0) for spots in found]
        if max(most) > MOST_STATES:
            raise WrongInput(
                f"site '{name}' is kept after at most {MOST_STATES} tokens of a prompt, "
                f"saw {max(most)} for prompt {most.index(max(most))}"
            )
    return found


def _check_word(name: str, word: str, new_tokens: int) -> None:
    if word not in POSITIONS + GENERATED:
        allowed = ", ".join(POSITIONS + GENERATED)
        raise WrongInput(f"unknown positions '{word}'; allowed are {allowed}, or token indices for each prompt")
    if word in GENERATED and not new_tokens:
        raise WrongInput(f"positions '{word}' need new_tokens of at least 1, saw 0")
    if site(name).sums_up and (word == "all" or word.startswith("mean:")):
        raise WrongInput(
            f"site '{name}' has no '{word}': it sums up all tokens so far, and is kept after single tokens "
            "(last, last:<span>, tokens:<span>, generated, or token indices for each prompt)"
        )


def _worded(prompt: Prompt, word: str, number: int, new_tokens: int) -> _Spots:
    if word == "last":
        return _Spots(generated="last") if new_tokens else _Spots(prompt=(len(prompt) - 1,))
    if word == "all":
        return _Spots(prompt=range(len(prompt)), generated="all" if new_tokens else "none")
    if word in GENERATED:
        return _Spots(generated="all")
    what, span = word.split(":")
    start, stop = prompt.spans[span]
    if not 0 <= start < stop <= len(prompt):
        raise WrongInput(f"prompt {number} has no tokens in its {span}; its spans are {dict(prompt.spans)}")
    return _Spots(prompt=range(stop - 1 if what == "last" else start, stop))


def _indexed(length: int, indices: Sequence[int], number: int) -> _Spots:
    if wrong := [index for index in indices if not -length <= index < length]:
        raise WrongInput(f"prompt {number} has no token {wrong[0]}; it has tokens 0 to {length - 1}")
    chosen = [index % length for index in indices]
    if not chosen or any(after <= before for before, after in pairwise(chosen)):
        raise WrongInput(f"token indices must be given, and ascend; saw {list(indices)} for prompt {number}")
    return _Spots(prompt=chosen)


# --- files


def _prepare(folder: Path, recipe: dict[str, Any]) -> Path:
    """Make the folder ready for batches of this recipe, or refuse it."""
    if folder.exists() and not folder.is_dir():
        raise WrongInput(f"{folder} is a file; a capture needs a folder")
    if not (folder / RECIPE).exists():
        if any(folder.glob("batch-*.safetensors")):
            raise WrongInput(f"{folder} holds batches of a capture but no {RECIPE}; give another folder")
        write_json(folder / RECIPE, recipe)
        return folder
    if difference := recipe_differs(read_json(folder / RECIPE), recipe):
        raise WrongInput(f"{folder} holds another capture: {difference}")
    for stale in folder.glob(".batch-*.tmp"):  # what a killed run left behind
        stale.unlink(missing_ok=True)
    return folder


def _is_whole(path: Path, batch: Batch) -> bool:
    if not path.exists():
        return False
    try:
        return read_part(path).rows == batch.rows
    except WrongInput:  # cut short by something that does not rename, such as a copy to a full disk
        return False


# --- running


def _record(model: HybridModel, batch: Batch, recipe: Mapping[str, Any], spots: Mapping[str, list[_Spots]]) -> Part:
    """Run one batch, in pieces where it is long, and continue it. The tensors are on the CPU, without padding."""
    new_tokens, (rows, width) = recipe["new_tokens"], batch.ids.shape
    piece = recipe["chunk_tokens"] or width
    offsets = [batch.offset(row) for row in range(rows)]
    wanted = {name: [found[i] for i in batch.rows] for name, found in spots.items()}
    means = {name for name in wanted if str(positions_at(name, recipe["positions"])).startswith("mean:")}
    recorder = Recorder(model, recipe["layers"], means=means, offsets=offsets)
    options: dict[str, Any] = {"use_cache": False}
    if new_tokens or piece < width:
        options = {"use_cache": True, "past_key_values": DynamicCache(config=model.config)}
    if "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        options["logits_to_keep"] = 1
    generated: list[list[int]] = [[] for _ in range(rows)]
    with torch.no_grad(), recorder.listening(all_layers=new_tokens > 0):
        output: Any = None
        for first in range(0, width, piece):
            stop = min(first + piece, width)
            inputs = {
                "input_ids": batch.ids[:, first:stop],
                "attention_mask": batch.mask[:, :stop],
                "position_ids": batch.positions[:, first:stop],
            }
            points = {name: _read(found, offsets, first, stop) for name, found in wanted.items()}
            output = recorder.forward({**inputs, **options}, points=points, first=first)
        mask, at, open_rows, ends = batch.mask, batch.positions[:, -1:], list(range(rows)), _ends(model)
        for step in range(new_tokens):
            ids = output.logits[:, -1].argmax(-1)
            chosen = ids.tolist()
            ended = {row for row in open_rows if chosen[row] in ends or step == new_tokens - 1}
            for row in open_rows:
                generated[row].append(chosen[row])
            mask, at = torch.cat([mask, mask.new_ones(rows, 1)], 1), at + 1
            inputs = {"input_ids": ids[:, None], "attention_mask": mask, "position_ids": at}
            points = {name: _heard(found, open_rows, ended) for name, found in wanted.items()}
            output = recorder.forward({**inputs, **options}, points=points, first=width + step)
            open_rows = [row for row in open_rows if row not in ended]
            if not open_rows:
                break
    lengths = [width - offset + len(ids) for offset, ids in zip(offsets, generated, strict=True)]
    tensors = recorder.tensors(lengths)
    many = [name for name in wanted if keeps_tokens(name, recipe["positions"])]
    return Part(
        rows=batch.rows,
        lengths=tuple(lengths),
        counts={name: recorder.counts(name) for name in many},
        generated=tuple(tuple(ids) for ids in generated),
        tensors=tensors,
    )


def _read(spots: Sequence[_Spots], offsets: Sequence[int], first: int, stop: int) -> Points:
    """What is wanted of the batch's columns `first` to `stop`, all of them in prompts."""
    found = [
        (row, token + offset - first)
        for row, (wanted, offset) in enumerate(zip(spots, offsets, strict=True))
        for token in wanted.prompt
        if first <= token + offset < stop
    ]
    return Points(rows=[row for row, _ in found], columns=[column for _, column in found])


def _heard(spots: Sequence[_Spots], open_rows: Sequence[int], ended: set[int]) -> Points:
    """What is wanted of one generated token of each row that is still open; some end with it."""
    rows = [
        row for row in open_rows if spots[row].generated == "all" or (spots[row].generated == "last" and row in ended)
    ]
    return Points(rows=rows, columns=[0] * len(rows))


def _ends(model: HybridModel) -> set[int]:
    """Tokens that end an answer, for the checkpoint or for its tokenizer."""
    said = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    return {model.tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])} - {None}
