"""The layers that are started anew: what each multiplies, and where its outputs come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from layerwright.core.errors import InputError, unknown_name

__all__ = [
    "Chosen",
    "Layer",
    "attention_weights",
    "cuda_devices",
    "find_layers",
    "first_weights_",
    "is_frozen",
    "shared_with_embedding",
]

Chosen = Sequence[str] | Callable[[str, nn.Module], bool] | None
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A linear layer, convolution or attention layer, whose output is a product with `weight`.

    Attributes:
        name: path of the module.
        module: itself.
        weight: name of the parameter below the module; of an `nn.MultiheadAttention` ``out_proj.weight``, and its
            three inputs' weights besides.
        bias: name of the bias, or None.
    """

    name: str
    module: nn.Module
    weight: str = "weight"
    bias: str | None = "bias"

    def parameters(self) -> list[nn.Parameter]:
        """All weights that may be scaled, then biases."""
        names = [self.weight]
        if isinstance(self.module, nn.MultiheadAttention):
            names += ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"]
            names += ["out_proj.bias"]
        elif self.bias:
            names.append(self.bias)
        found = [_parameter(self.module, name) for name in names]
        return [parameter for parameter in found if parameter is not None]


def _parameter(module: nn.Module, path: str) -> nn.Parameter | None:
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name, None)
    return found if isinstance(found, nn.Parameter) else None


def find_layers(model: nn.Module, layers: Chosen, exclude: Sequence[str]) -> list[Layer]:
    """The layers that `layers` chooses and `exclude` does not, in the order of the modules.

    Raises:
        InputError: a name that matches nothing, nothing left, or a weight that is computed from others.
        TypeError: weights without values, or not of floating point.
    """
    inside = {f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    found = {
        name: Layer(name, module, *(("out_proj.weight", None) if isinstance(module, nn.MultiheadAttention) else ()))
        for name, module in model.named_modules()
        if name not in inside and _multiplies(module)
    }
    for argument, patterns in (("layers", layers if not callable(layers) else ()), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in found):
                raise unknown_name(argument, pattern, found)
    chosen = [
        layer
        for name, layer in found.items()
        if not any(fnmatchcase(name, pattern) for pattern in exclude) and _wanted(layers, name, layer.module)
    ]
    if not chosen:
        raise InputError(
            "layers: none is left; the model needs a linear layer, a convolution or an nn.MultiheadAttention"
        )
    for layer in chosen:
        _check(layer)
    return chosen


def _wanted(layers: Chosen, name: str, module: nn.Module) -> bool:
    if layers is None:
        return True
    return layers(name, module) if callable(layers) else any(fnmatchcase(name, pattern) for pattern in layers)


def _multiplies(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, nn.MultiheadAttention, *_CONVOLUTIONS)):
        return True
    # Of transformers: a linear layer whose weight is stored the other way round.
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor)


def _check(layer: Layer) -> None:
    parametrized = parametrize.is_parametrized(layer.module)
    weight = None if parametrized else _parameter(layer.module, layer.weight)
    if weight is None:
        raise InputError(
            f"layers: the weight of {layer.name} is computed from other parameters; remove the parametrization first, or "
            "exclude the layer"
        )
    if weight.device.type == "meta" or not weight.is_floating_point():
        what = "no values (meta device)" if weight.device.type == "meta" else str(weight.dtype)
        raise TypeError(f"layers: the weight of {layer.name} has {what}, expected floating-point values")


def first_weights_(layer: Layer, start: Callable[[Tensor], Any]) -> None:
    """Give every weight matrix of `layer` to `start`, and set its biases to zero."""
    module = layer.module
    if isinstance(module, nn.MultiheadAttention):
        for matrix in attention_weights(module):
            start(matrix)
        start(module.out_proj.weight.data)
        biases = [module.in_proj_bias, module.out_proj.bias, module.bias_k, module.bias_v]
    else:
        weight = _parameter(module, layer.weight)
        assert weight is not None  # checked when the layer was found
        start(weight.data)
        biases = [_parameter(module, layer.bias or "bias")]
    for bias in biases:
        if bias is not None:
            bias.data.zero_()


def attention_weights(module: nn.MultiheadAttention) -> list[Tensor]:
    """Views of the weights of queries, keys and values."""
    if module.in_proj_weight is not None:
        return list(module.in_proj_weight.data.chunk(3))
    return [weight.data for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]


def is_frozen(layer: Layer) -> bool:
    """Whether no weight of the layer may be trained."""
    return not any(p.requires_grad for p in layer.parameters() if p.dim() > 1)


def shared_with_embedding(model: nn.Module, layer: Layer) -> str | None:
    """Path of the embedding whose table is the layer's weight, or None."""
    weight = _parameter(layer.module, layer.weight)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.weight is weight:
            return name
    return None


def cuda_devices(model: nn.Module) -> list[int]:
    """CUDA devices of the parameters, whose random state must be kept."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    return sorted(devices) if torch.cuda.is_available() else []
