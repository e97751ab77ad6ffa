"""Give an encoder classifier an exit after each of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerwright.core.layers import structure_copy
from layerwright.nn.attached import detach_
from layerwright.nn.encoder_exits import MultiExit, encoder_blocks
from layerwright.nn.exit_head import ExitHead, ExitPooling
from layerwright.treat.exits import exit_positions

__all__ = ["add_encoder_exits", "find_exits", "remove_exits"]

STD = 0.02
"""Deviation of a new head's weights where the configuration states none."""


def add_encoder_exits(
    model: nn.Module,
    blocks: Sequence[int] | None = None,
    *,
    pooling: ExitPooling = "cls",
    dense: bool = False,
    equalize: bool = True,
    dropout: float | None = None,
    seed: int = 0,
) -> MultiExit:
    """A classifier with an exit after each block, or after those named (Shen et al., 2022, COST-EFF, arXiv 2210.15523).

    The last exit is the model's own classifier. New heads are random, and useless before they are trained. They cost
    ``hidden * classes`` numbers each (and ``hidden ** 2`` with `dense`).

    Args:
        model: a sequence or image classifier of transformers with one stack of encoder blocks (BERT, RoBERTa,
            DistilBERT, ViT, ...); the result shares its tensors, and it is left as it is. Exits it has are replaced.
        blocks: numbers of blocks behind which exits stand, from 1; the last block always has one. None for all.
        pooling: ``cls`` reads the first token, ``mean`` the mean over tokens without padding.
        dense: a linear map before the tanh.
        equalize: average gradients of several exits instead of summing them (see `MultiExit`).
        dropout: of the heads; None takes the model's own.
        seed: of the heads' weights.

    Raises:
        TypeError: the model is no such classifier: its hidden states cannot be reached.
        InputError: a block that is not there, or an unknown pooling.
    """
    names = encoder_blocks(model).names
    depth = len(names)
    chosen = exit_positions(depth, positions=range(1, depth + 1) if blocks is None else blocks)
    copy = remove_exits(model)
    config: Any = copy.config
    width, classes = int(config.hidden_size), int(config.num_labels)
    share = _dropout(config) if dropout is None else dropout
    generator = torch.Generator().manual_seed(seed)
    like = next(parameter for parameter in copy.parameters() if parameter.is_floating_point())
    for position in chosen:
        if position == depth:
            continue
        head = ExitHead(width, classes, pooling, dense, share, equalize)
        head.initialize_(getattr(config, "initializer_range", STD), generator)
        block = copy.get_submodule(names[position - 1])
        head.to(like.device, like.dtype).attach_(block).train(block.training)
    return MultiExit(copy).train(model.training)


def find_exits(model: nn.Module) -> MultiExit | None:
    """The exits of a model that was saved and loaded, or tuned, as a `MultiExit` around it; None if it has none."""
    if isinstance(model, MultiExit):
        return model
    if not any(isinstance(module, ExitHead) for module in model.modules()):
        return None
    return MultiExit(model).train(model.training)


def remove_exits(model: nn.Module) -> nn.Module:
    """The model without its early exits; it shares its tensors with `model`, which is left as it is."""
    copy = structure_copy(model.model if isinstance(model, MultiExit) else model)
    owners = [module for module in copy.modules() if isinstance(module._modules.get(ExitHead.child), ExitHead)]
    for owner in owners:
        detach_(owner, ExitHead.child)
    return copy


def _dropout(config: object) -> float:
    names = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
    values = [value for name in names if (value := getattr(config, name, None)) is not None]
    return float(values[0]) if values else 0.0
