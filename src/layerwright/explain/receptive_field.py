"""Which input positions an output position of a map depends on, found by gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerwright.core.calibration import evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError

__all__ = ["receptive_field"]


def receptive_field(
    model: nn.Module,
    images: Tensor | Sequence[int],
    position: tuple[int, int],
    *,
    channels_last: bool = False,
    seed: int = 0,
) -> Tensor:
    """How much the output of `model` at one position changes with each position of its input.

    The magnitude of the gradient of a random mixture of the output's channels, summed over the input's channels and the
    batch: ``sum_bc |d sum_k r_k out[b, k, i, j] / d in[b, c, p, q]|``. It is above zero exactly where the output depends on
    the input to first order, for these inputs: units that are closed there, such as those behind a ReLU, pass nothing, so
    give several pictures. A random mixture, since the plain sum over the channels behind a layer norm does not change at all.

    The model runs in evaluation mode, as it is; its own gradients are left alone. One forward and one backward pass.

    Source: the effective receptive field of Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional
    Neural Networks" (2016, arXiv 1701.04128).

    Args:
        model: from ``(batch, channels, height, width)`` to ``(batch, channels', rows, columns)``; of a tuple or list the
            first tensor counts.
        images: floating point, or a shape, for random normal numbers.
        position: row and column of the output.
        channels_last: input and output are ``(batch, height, width, channels)``.
        seed: of the mixture and of the random numbers.

    Returns:
        ``(height, width)`` of the input, 0 and more; ``> 0`` gives the field as a mask.

    Raises:
        InputError: another number of axes, or a position outside the output.
        TypeError: whole numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    if not isinstance(images, Tensor):
        like = next(model.parameters(), torch.empty(0))
        images = torch.randn(tuple(images), generator=draw).to(like)
    if not images.is_floating_point():
        raise TypeError(f"images: got {images.dtype}, expected floating-point numbers")
    if images.dim() != 4:
        raise InputError(f"images: got shape {tuple(images.shape)}, expected four axes, {_AXES[channels_last]}")
    pixels = images.detach().clone().requires_grad_()
    with evaluating(model), torch.enable_grad():
        values = _channels_last(first_tensor(model(pixels)), channels_last)
        row, column = position
        if not (0 <= row < values.shape[1] and 0 <= column < values.shape[2]):
            raise InputError(f"position: got {position}, expected a place in {values.shape[1]} x {values.shape[2]}")
        mixture = torch.randn(values.shape[-1], generator=draw).to(values)
        mixed = (values[:, row, column] @ mixture).sum()
        # A model that ignores its input gives no gradient at all.
        mixed = mixed + 0 * pixels.sum() if not mixed.requires_grad else mixed
        (found,) = torch.autograd.grad(mixed, pixels, materialize_grads=True)
    return found.abs().sum((0, -1 if channels_last else 1))


def _channels_last(output: Tensor, already: bool) -> Tensor:
    if output.dim() != 4:
        raise InputError(f"model: gave shape {tuple(output.shape)}, expected a map {_AXES[already]}")
    return output if already else output.movedim(1, -1)


_AXES = {False: "(batch, channels, height, width)", True: "(batch, height, width, channels)"}
