"""Put attention over patches in the place of a model's convolutions, with the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.nn.conv_as_attention import conv_to_attention
from layerwright.nn.patches import from_patches, to_patches
from layerwright.nn.rel_pos_patch_attention import RelPosPatchAttention, ShiftedPatchProducts

__all__ = ["SwappedConvolution", "swap_convolution"]


class SwappedConvolution(nn.Module):
    """Attention over patches behind the call of a convolution: maps to patches, the layer, and back.

    Maps whose height or width is no multiple of the patch are filled up with zeros on the right and below, and cut back:
    where the border is zero, this changes nothing else.

    Args:
        attention: from ``(batch, tokens, C patch^2)`` to ``(batch, tokens, C' patch^2)``.
        patch: side of a patch in pixels.
        fill: False refuses maps that are no multiple.
    """

    def __init__(self, attention: RelPosPatchAttention | ShiftedPatchProducts, patch: int, fill: bool = True) -> None:
        super().__init__()
        self.attention, self.patch, self.fill = attention, patch, fill

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C, height, width)`` to ``(batch, C', height, width)``, or both without the batch.

        Raises:
            InputError: not such a map, or a height or width that is no multiple of the patch, unless it can be filled up.
        """
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if x.dim() != 4:
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, channels, height, width)")
        height, width = x.shape[2:]
        below, right = -height % self.patch, -width % self.patch
        if self.fill and (below or right):
            x = functional.pad(x, (0, right, 0, below))
        tokens = to_patches(x, self.patch)
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        return from_patches(self.attention(tokens, grid), self.patch, grid)[..., :height, :width]


def swap_convolution(
    model: nn.Module,
    names: str | Sequence[str],
    patch: int,
    sharpness: float = 40.0,
    *,
    shifts: bool = False,
    copy: bool = True,
    **settings: Any,
) -> nn.Module:
    """A model in which attention over patches computes what the convolutions `names` computed.

    To at most rounding at sharpness 40, from any input of stride 1 to a map of the same size; see `conv_to_attention`.
    Attention costs ``tokens^2`` per head: use it to train on as attention, or to compare.

    Source: Li et al., "Can Vision Transformers Perform Convolution?" (2021, arXiv 2111.01353).

    Args:
        model: stays as it is; the result shares all other tensors with it.
        names: paths of ``nn.Conv2d`` modules.
        patch: side of a patch in pixels.
        sharpness: about 6 to train on; 40 to have the same outputs.
        shifts: run the heads as products with shifted patches, without softmax: equal, faster, and fixed in where it looks.
        copy: False changes `model` itself.
        settings: ``border``, ``content``, ``head_dim``, ``encoding`` and more of `conv_to_attention`.

    Raises:
        TypeError: a module that is no plain ``nn.Conv2d``.
        InputError: no such module, or a convolution that attention cannot be; names it.
    """
    paths = [names] if isinstance(names, str) else list(names)
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules or not path:
            raise unknown_name(
                "module", path, [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
            )
    result = structure_copy(model) if copy else model
    for path in paths:
        old: Any = modules[path]
        try:
            layer = conv_to_attention(old, patch, sharpness=sharpness, **settings)
            running = layer.shifted((64, 64)) if shifts else layer
        except (InputError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error
        swapped = SwappedConvolution(running, patch, layer.border in ("zero_token", "null_token"))
        result.set_submodule(path, swapped.train(old.training))
    return result
