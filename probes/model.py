"""Load a model and know its layers. The only file that imports nnsight.

`load` accepts the shipped organism, a folder, a GGUF file or a hub id and returns a `HybridModel`: the transformers
model as it is, plus what the rest of the suite needs to know about it - which layer is Gated DeltaNet and which is
attention, where the decoder sits inside a multimodal wrapper, and a hash of the weights, so that a verdict can never
be carried over to another checkpoint. A weight conversion is never done silently and remote code is never trusted.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from probes.errors import WrongInput

# Said at the first forward of every process: that the reference kernels run. On a CPU there are no others.
logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)

Kind = Literal["gdn", "attention"]
ORGANISMS = {
    name: Path(__file__).parent / "data" / name for name in ("organism", "organism-state", "organism-attention")
}  # the one that ships, and its two controls
ORGANISM = ORGANISMS["organism"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_QWEN35 = {"qwen3_5", "qwen3_5_text"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer: 0-based index, kind of its mixer, and the modules themselves."""

    index: int
    kind: Kind
    block: nn.Module
    mixer: nn.Module
    mlp: nn.Module

    def __str__(self) -> str:
        return f"layer {self.index} ({self.kind})"


class HybridModel:
    """A causal language model whose layers are known by kind. Built by `load`, or around a model that you already have.

    Attributes:
        hf: the transformers model, in eval mode, gradients as they were.
        tokenizer: its tokenizer, left-padding.
        decoder: the module that holds `embed_tokens`, `layers` and `norm`.
        layers: one `Layer` each, in order.
        name: what the user asked for ("organism", a path, a hub id).
        interventions: what `probes.steering` is doing to it at the moment.
    """

    def __init__(self, hf: Any, tokenizer: Any, *, name: str = "model"):
        self.hf, self.tokenizer, self.name = hf.eval(), tokenizer, name
        self.decoder = _decoder(hf)
        self.config = getattr(hf.config, "text_config", None) or hf.config
        self.layers = _layers(self.decoder, self.config)
        self.interventions: list[dict[str, Any]] = []
        self._hashed: tuple[tuple[tuple[int, int], ...], str] | None = None
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def max_tokens(self) -> int:
        """The longest sequence the model was built for."""
        return int(getattr(self.config, "max_position_embeddings", 0) or 2**31)

    @property
    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers (first 16 hex digits).

        Taken again when a tensor was replaced or changed in place (a write through `.data` goes unseen).
        """
        state = self.hf.state_dict()
        seen = tuple((value.data_ptr(), value._version) for value in state.values())
        if self._hashed is None or self._hashed[0] != seen:
            self._hashed = seen, self._hash(state)
        return self._hashed[1]

    @property
    def identity(self) -> dict[str, str]:
        """What of the model decides a computation's numbers, for recipes."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.name, "weights_hash": self.weights_hash, "dtype": dtype, "device": self.device.type}

    @staticmethod
    def _hash(state: Mapping[str, torch.Tensor]) -> str:
        digest = hashlib.sha256()
        for key, value in sorted(state.items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def envoy(self) -> Any:
        """The nnsight view of the model, for traces."""
        from nnsight import NNsight  # importing nnsight patches torch.Tensor: only when a trace is asked for

        return NNsight(self.hf)

    def envoy_of(self, module: nn.Module) -> Any:
        """The nnsight envoy of one of the model's own modules (such as `layer.mixer`)."""
        for path, candidate in self.hf.named_modules():
            if candidate is module:
                envoy = self.envoy
                for part in path.split("."):
                    envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
                return envoy
        raise WrongInput(f"{type(module).__name__} is not a module of {self.name}")

    def of_kind(self, kind: Kind) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kind == kind)

    def __str__(self) -> str:
        gdn, attention = len(self.of_kind("gdn")), len(self.of_kind("attention"))
        millions = sum(p.numel() for p in self.hf.parameters()) / 1e6
        dtype = str(self.dtype).removeprefix("torch.")
        depth = f"{len(self.layers)} layers ({gdn} GDN, {attention} attention)"
        return f"{self.name}: {depth}, {millions:.1f}M, {dtype}, {self.weights_hash}"

    __repr__ = __str__


def load(source: str | Path = "organism", *, device: str = "cpu", dtype: str = "auto") -> HybridModel:
    """Load an organism by its name (`ORGANISMS`), a local folder, a `.gguf` file or a hub id.

    `dtype` is "auto" (what the checkpoint says; of a GGUF file bfloat16, or float32 on a CPU without it), "float32",
    "bfloat16" or "float16".

    Raises:
        WrongInput: the path does not exist, holds no weights or no tokenizer, or weights that are not finite, or is not
            an architecture the suite knows.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise WrongInput(f"unknown dtype '{dtype}'; allowed are auto, {', '.join(DTYPES)}")
    name = str(source)
    path = ORGANISMS.get(name, Path(source))
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "trust_remote_code": False}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise WrongInput(f"no such file: {name}")
        options |= {"gguf_file": path.name, "dtype": DTYPES.get(dtype, _unpacked(device))}
        folder = str(path.parent)
    elif path.is_dir():
        _check_folder(path, name)
        folder = str(path)
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise WrongInput(
            f"no model at '{name}'; allowed are {', '.join(ORGANISMS)}, a folder with weights, a .gguf file "
            "or a hub id owner/name"
        )
    else:
        folder = name
    _check_device(device)
    try:
        with _quiet():
            tokenizer_options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **tokenizer_options)
            factory: Any = AutoModelForImageTextToText if _is_multimodal(folder, options) else AutoModelForCausalLM
            hf, found = factory.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise WrongInput(f"cannot load '{name}': {str(error).strip().splitlines()[0]}") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise WrongInput(f"'{name}' is incomplete: {len(missing)} weights are missing, {missing[0]} among them")
    for key, value in hf.named_parameters():
        if not bool(value.isfinite().all()):
            raise WrongInput(f"'{name}' is damaged: {int((~value.isfinite()).sum())} values of {key} are not finite")
    return HybridModel(hf.to(device), tokenizer, name=name)


def _unpacked(device: str) -> torch.dtype:
    """What a quantised file is unpacked to: bfloat16, or float32 on a CPU for which bfloat16 is much slower."""
    fast = device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise WrongInput(f"unknown device '{device}'; allowed are cpu, cuda, cuda:0, mps") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available:
        raise WrongInput(f"unknown device '{device}'; allowed are cpu, cuda, cuda:0, mps")
    if not available[kind]:
        raise WrongInput(f"device '{device}' is not available on this machine; cpu is")


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only while loading: notes on sharding and kernels concern nobody who runs on one device."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_folder(path: Path, name: str) -> None:
    if not (path / "config.json").is_file():
        raise WrongInput(f"no config.json in model folder '{name}'")
    if not any(path.glob("*.safetensors")):
        raise WrongInput(f"no weights in model folder '{name}': expected *.safetensors")
    if not any((path / file).is_file() for file in _TOKENIZERS):
        raise WrongInput(f"no tokenizer in model folder '{name}': expected {' or '.join(_TOKENIZERS)}")


def _is_multimodal(folder: str, options: dict[str, Any]) -> bool:
    """Whether a checkpoint is the multimodal wrapper (`model_type` qwen3_5 holds a vision tower)."""
    if "gguf_file" in options:
        return False
    return AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type == "qwen3_5"


def _decoder(hf: Any) -> Any:
    inner = getattr(hf, "model", None)
    inner = getattr(inner, "language_model", inner)
    if inner is None or not hasattr(inner, "layers"):
        raise WrongInput(f"{type(hf).__name__} is not supported: no decoder with .layers was found")
    return inner


def _layers(decoder: Any, config: Any) -> tuple[Layer, ...]:
    """Kinds come from `config.layer_types`; the mixer module must agree with them."""
    declared = getattr(config, "layer_types", None)
    layers = []
    for index, block in enumerate(decoder.layers):
        linear = getattr(block, "linear_attn", None)
        attention = getattr(block, "self_attn", None)
        said = declared[index] if declared else "full_attention"
        if said == "linear_attention" and linear is not None and config.model_type in _QWEN35:
            kind, mixer = "gdn", linear
        elif said != "linear_attention" and attention is not None:
            kind, mixer = "attention", attention
        else:
            raise WrongInput(
                f"{config.model_type} is not supported: layer {index} is a '{said}' layer of {type(block).__name__}; "
                "allowed are Qwen3.5 (linear_attention, full_attention) and decoders whose layers have self_attn"
            )
        if not hasattr(block, "mlp"):
            raise WrongInput(f"{config.model_type} is not supported: layer {index} has no .mlp")
        layers.append(Layer(index=index, kind=kind, block=block, mixer=mixer, mlp=block.mlp))
    return tuple(layers)
