"""Fold batch normalisation into the layer before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.treat._following import Following, follow

__all__ = ["FOLDED_MEAN", "FOLDED_STD", "fold_batchnorm"]

FOLDED_MEAN, FOLDED_STD = "folded_mean", "folded_std"
"""Names of the buffers (not saved) in which a folded layer remembers its normalisation's shift and absolute scale."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_EXAMPLE = 64


def fold_batchnorm(model: nn.Module, keep_statistics: bool = True, *, data: Any = None) -> nn.Module:
    """A copy of `model` in which each BatchNorm is part of the convolution or linear layer whose output it reads.

    ``W <- g W`` and ``b <- g (b - mean) + shift`` with ``g = scale / sqrt(var + eps)`` per output channel (Jacob et
    al., 2018); the normalisation becomes `nn.Identity`. Pairs are found by running one forward in evaluation mode,
    not by names. The weights' copies are made in float64 and stored in their own dtype.

    Args:
        model: left as it is.
        keep_statistics: remember shift and ``|scale|`` on the layer (`FOLDED_MEAN`, `FOLDED_STD`): the mean and
            standard deviation of its output, which `layerwright.tune.renormalize` brings back.
        data: a calibration for the forward; without it, a random image or sequence that fits the first layer is made.

    Raises:
        InputError: a BatchNorm that reads anything else than the output of one such layer, or that has no running
            statistics; a layer that runs more than once or whose output something else reads too. Names it.
    """
    folded = copy.deepcopy(model)
    norms: dict[str, nn.Module] = {path: m for path, m in folded.named_modules() if isinstance(m, _NORMS)}
    layers: dict[str, nn.Module] = {path: m for path, m in folded.named_modules() if isinstance(m, _LAYERS)}
    if not norms:
        return folded
    with evaluating(folded):
        found = follow(folded, layers, _forward_of(folded, layers, data))
    pairs = _pairs(norms, layers, found)
    for norm_path, layer_path in pairs.items():
        _fold(layers[layer_path], norms[norm_path], keep_statistics)
        identity = nn.Identity()
        identity.training = norms[norm_path].training
        folded.set_submodule(norm_path, identity)
    return folded


def _pairs(norms: dict[str, nn.Module], layers: dict[str, nn.Module], found: dict[str, Following]) -> dict[str, str]:
    """Path of each norm to the path of the layer it is folded into."""
    pairs: dict[str, str] = {}
    for norm_path, norm in norms.items():
        if getattr(norm, "running_var", None) is None:
            raise InputError(
                f"{norm_path}: has no running statistics (track_running_stats=False), so it is not foldable"
            )
        before = [path for path, item in found.items() if any(at == norm_path for _, at in item.readers)]
        if len(before) != 1:
            what = f"reads the outputs of {' and '.join(before)}" if before else "does not read a layer's output"
            raise InputError(f"{norm_path}: {what}; only a BatchNorm right after one convolution or linear layer folds")
        path = before[0]
        if found[path].calls > 1:
            raise InputError(f"{path}: runs {found[path].calls} times in a forward, so {norm_path} cannot be folded in")
        others = sorted({at or name for name, at in found[path].readers if at != norm_path})
        if others:
            raise InputError(f"{path}: its output is also read by {', '.join(others)}: {norm_path} cannot be folded in")
        pairs[norm_path] = path
    return pairs


@torch.no_grad()
def _fold(layer: Any, norm: Any, keep_statistics: bool) -> None:
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    gain = scale / (var + norm.eps).sqrt()
    weight = layer.weight.double()
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...): inputs of one group make the outputs of that group
        split = weight.reshape(layer.groups, -1, *weight.shape[1:])
        by_group = gain.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = (split * by_group).reshape(weight.shape)
    else:
        weight = weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
    dtype, trainable = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=trainable)
    layer.bias = nn.Parameter((gain * (bias - mean) + shift).to(dtype), requires_grad=trainable)
    if keep_statistics:
        layer.register_buffer(FOLDED_MEAN, shift.float(), persistent=False)
        # A signed scale would flip the sign of the output that is normalised to it: only its size is a deviation.
        layer.register_buffer(FOLDED_STD, scale.abs().float(), persistent=False)


@torch.no_grad()
def _forward_of(model: nn.Module, layers: dict[str, nn.Module], data: Any) -> Callable[[], object]:
    """One forward of `model`, on the first batch of `data` or on the first random input that it runs on."""
    if data is not None:
        calibration = as_calibration(data)
        batch = next(iter(calibration))
        return lambda: calibration.forward(model, batch)
    name = getattr(model, "main_input_name", None)

    def run(example: Tensor) -> object:
        return model(**{name: example}) if isinstance(name, str) else model(example)

    problem: Exception | None = None
    # The layer that is registered first need not be the one that runs first.
    shapes = dict.fromkeys(_shape(layer) for layer in layers.values())
    for shape in shapes:
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(shape, generator=generator).to(next(model.parameters()))
        try:
            run(example)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            problem = problem or error
        else:
            return lambda: run(example)
    tried = ", ".join(map(str, shapes)) or "none, as it has no convolution or linear layer"
    raise InputError(f"data: the model runs on no random input (tried {tried}: {problem}); give data=") from problem


def _shape(layer: Any) -> tuple[int, ...]:
    """Of a random input for `layer`."""
    if isinstance(layer, nn.Linear):
        return 2, layer.in_features
    return 2, layer.in_channels, *[_EXAMPLE] * (layer.weight.dim() - 2)
