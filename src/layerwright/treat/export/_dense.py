"""A copy of a treated model with plain weights in the layers it was built from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.checkpoint import build_empty
from layerwright.core.errors import InputError
from layerwright.core.layers import structure_copy
from layerwright.nn.attached import Attachment, detach_
from layerwright.nn.conv_settings import ConvSettings
from layerwright.nn.experts import ExpertStack
from layerwright.nn.factorized import FactorizedConv
from layerwright.nn.low_rank import LowRankConv, LowRankLinear
from layerwright.nn.quantized import QuantConv, QuantEmbedding
from layerwright.nn.replace import structure_of
from layerwright.nn.sparse import SparseConv
from layerwright.nn.tied import Tied
from layerwright.nn.treated import TreatedLinear
from layerwright.treat.export._chain import chain_kernel, chain_settings

__all__ = ["dense_copy", "original_layers", "tied_apart"]


@torch.no_grad()
def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in which every treated layer is the plain layer again, with the weight it computed with.

    Untreated tensors are shared. What layers, attention and caches rounded as it came is no longer rounded. Layers of a
    model with a Hugging Face configuration get back the class that the configuration asks for, others a plain
    ``nn.Linear``, convolution or ``nn.Embedding``. Memory: the dense weights of the treated layers.

    Raises:
        InputError: a layer whose plain form is not known.
    """
    structure = structure_of(model)
    if not structure:
        return model
    result = structure_copy(model)
    originals = original_layers(model)
    for path in sorted(structure, key=lambda path: _turn(model.get_submodule(path))):
        treated = model.get_submodule(path)
        owner_path, _, name = path.rpartition(".")
        owner = result.get_submodule(owner_path)
        if isinstance(treated, Attachment):
            detach_(owner, name)
            continue
        if isinstance(treated, ExpertStack):
            delattr(owner, name)
            owner.register_parameter(name, nn.Parameter(treated.dense().contiguous(), requires_grad=False))
            continue
        if isinstance(treated, Tied):
            weight: Tensor = _parameter(result.get_submodule(treated.to_path))
        else:
            weight = _dense_weight(treated)
        plain = _plain(treated, weight, originals.get_submodule(path) if originals is not None else None, path)
        old = owner.get_submodule(name)
        for parent in list(result.modules()):  # a layer may stand in several places
            for key, child in list(parent._modules.items()):
                if child is old:
                    parent._modules[key] = plain.train(treated.training)
    _declare_ties(result, originals)
    return result


def original_layers(model: nn.Module) -> nn.Module | None:
    """The model that the configuration of `model` builds, without values; None if it has no such configuration."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    return build_empty(config)


def tied_apart(model: nn.Module) -> bool:
    """Whether the configuration ties head and embedding and the model at hand does not."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return False
    head, table = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is None or table is None or isinstance(head, Tied) or isinstance(table, Tied):
        return False
    return getattr(head, "weight", None) is not getattr(table, "weight", None)


def _turn(module: nn.Module) -> int:
    """Attachments go while their owners are there, ties come when what they refer to is plain."""
    return 0 if isinstance(module, Attachment) else 2 if isinstance(module, Tied) else 1


def _dense_weight(module: nn.Module) -> Tensor:
    """The weight in the orientation of ``nn.Linear`` or of the convolution."""
    if isinstance(module, TreatedLinear | LowRankLinear | QuantEmbedding):
        return module.dequantize()
    if isinstance(module, FactorizedConv):
        return chain_kernel(module)
    if isinstance(module, QuantConv | SparseConv | LowRankConv):
        return module.weight
    raise InputError(f"{type(module).__name__} has no plain form")


def _parameter(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _plain(treated: Any, weight: Tensor, original: nn.Module | None, path: str) -> nn.Module:
    """The plain layer for `treated`: of the class of `original` where that is known."""
    if original is None:
        original = _like(treated, weight, path)
    turned = type(original).__name__ == "Conv1D"  # transformers' linear layer with a weight (in, out)
    if not isinstance(weight, nn.Parameter):
        weight = nn.Parameter((weight.t() if turned else weight).contiguous(), requires_grad=False)
    if weight.shape != _parameter(original).shape:
        expected = tuple(_parameter(original).shape)
        raise InputError(f"{path}: a weight of shape {tuple(weight.shape)} does not fit {expected}")
    original.weight = weight
    bias = getattr(treated, "bias", None)
    if isinstance(bias, Tensor):
        original.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return original


def _like(treated: Any, weight: Tensor, path: str) -> nn.Module:
    """An empty plain layer of the size of `treated`, for a model without configuration."""
    bias = getattr(treated, "bias", None) is not None
    with torch.device("meta"):
        if weight.ndim > 2:
            return _conv_settings(treated).module(bias, weight.dtype)
        if hasattr(treated, "num_embeddings"):
            if treated.multiplier != 1.0:
                raise InputError(f"{path}: a scaled embedding has no plain form without a configuration")
            rows, columns = weight.shape
            return nn.Embedding(rows, columns, padding_idx=treated.padding_idx, dtype=weight.dtype)
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)


def _conv_settings(treated: Any) -> ConvSettings:
    if isinstance(treated, FactorizedConv):
        return chain_settings(treated)
    if not isinstance(treated, LowRankConv):
        settings: ConvSettings = treated.settings
        return settings
    first = treated.right.settings if isinstance(treated.right, QuantConv) else ConvSettings.of(treated.right)
    channels = _parameter(treated.left).shape[0]
    return ConvSettings(
        first.in_channels * treated.groups,
        channels,
        first.kernel_size,
        first.stride,
        first.padding,
        first.dilation,
        treated.groups,
        first.padding_mode,
    )


def _declare_ties(result: nn.Module, originals: nn.Module | None) -> None:
    """Ties that hold again are declared again; where head and embedding stay apart, the configuration says so."""
    declared = getattr(originals, "all_tied_weights_keys", None)
    if not isinstance(declared, dict):
        return
    everything = dict(result.named_parameters(remove_duplicate=False))
    ties = {a: b for a, b in declared.items() if a in everything and everything[a] is everything.get(b)}
    result.all_tied_weights_keys = ties  # type: ignore[assignment]
    result._tied_weights_keys = ties  # type: ignore[assignment]
    if tied_apart(result):
        result.config = copy.deepcopy(result.config)
        result.config.tie_word_embeddings = False  # type: ignore[union-attr]
