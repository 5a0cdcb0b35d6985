"""Which parameters are trained, and by which optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.errors import WrongInput
from probes.model import HybridModel
from training.apollo import Apollo
from training.config import TrainConfig

WRITERS = ("linear_attn", "k_proj", "v_proj", "k_norm", "embed_tokens")
"""What is left alone when contexts are frozen: embeddings, keys, values and the GDN mixers, which write a context's
memory. With them trained, later contexts are remembered in another way than those that were trained against, and no
gradient mends it: on the organism the worst ability fell by 12.5 to 15.6 points, without them by 2.6 (README). The
MLPs, queries and output projections that are left still feed the layers above and so change that memory a little."""


def text_parameters(model: HybridModel) -> list[tuple[str, Tensor]]:
    """Named parameters of the decoder and its output layer; a tied one is there once, as the embedding."""
    text = {id(p) for module in (model.decoder, model.hf.get_output_embeddings()) for p in module.parameters()}
    return [(name, p) for name, p in model.hf.named_parameters() if id(p) in text]


def trained_parameters(model: HybridModel, config: TrainConfig) -> list[tuple[str, Tensor]]:
    """Named parameters of the text model that are trained.

    Raises:
        WrongInput: none has such a name.
    """
    named, words = text_parameters(model), config.parameters
    if words == ("all",) or (words == ("auto",) and config.context == "full"):
        return named
    if words == ("auto",):
        return [(name, p) for name, p in named if not any(word in name for word in WRITERS)]
    for word in words:
        if not any(word in name for name, _ in named):
            kinds = sorted({part for name, _ in named for part in name.split(".")[:-1] if not part.isdigit()})
            raise WrongInput(f"no parameter of {model.name} has '{word}' in its name; there are {', '.join(kinds)}")
    return [(name, p) for name, p in named if any(word in name for word in words)]


def optimizer_of(named: list[tuple[str, Tensor]], model: HybridModel, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration asks for."""
    lr = config.lr_for(model)
    if config.optimizer == "sgd":
        return torch.optim.SGD(named, lr=lr, momentum=0.9, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(named, lr=lr, weight_decay=config.weight_decay, foreach=False)
    rank = 1 if config.optimizer == "apollo-mini" else config.rank_for(model)
    return Apollo(named, lr=lr, weight_decay=config.weight_decay, rank=rank, refresh=config.refresh, seed=config.seed)
