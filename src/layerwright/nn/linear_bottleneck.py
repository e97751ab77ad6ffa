"""The inverted bottleneck of ReXNet, with a shortcut that reaches the first channels of a wider output."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.squeeze_excite import SqueezeExcite

__all__ = ["LinearBottleneck", "conv_norm"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu6": nn.ReLU6}


class LinearBottleneck(nn.Module):
    """Widen by 1 x 1, mix positions by a depth-wise convolution, weigh channels, project without an activation.

    ``project(relu6(squeeze_excite(depthwise(expand(x)))))``, with BatchNorm behind every convolution and the activation
    behind `expand` alone. With stride 1 and no fewer channels out than in, the input is added to the first `in_channels` of
    the output, so that widths may grow block by block and the shortcut stays. Source: Han et al., 2021, Rethinking Channel
    Dimensions for Efficient Model Design, arXiv 2007.00992.

    Args:
        in_channels, out_channels: at least 1.
        expand: width inside over `in_channels`, a whole number; 1 leaves the first convolution out.
        stride: of the depth-wise convolution.
        use_se: squeeze-excite, whose width is the inner one over `se_ratio`, rounded down.
        se_ratio: at most the inner width.
        kernel_size: odd.
        activation: behind `expand`: ``silu``, or ``relu6``.

    Raises:
        InputError: a number outside its range, or an unknown activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand: int = 6,
        stride: int = 1,
        use_se: bool = True,
        se_ratio: int = 12,
        kernel_size: int = 3,
        activation: Literal["silu", "relu6"] = "silu",
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels), ("out_channels", out_channels), ("expand", expand), ("stride", stride),
            ("se_ratio", se_ratio),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: got {value!r}, expected a whole number from 1")
        if kernel_size < 1 or not kernel_size % 2:
            raise InputError(f"kernel_size: got {kernel_size}, expected an odd number")
        if activation not in _ACTIVATIONS:
            raise InputError(f"activation: got {activation!r}, expected one of {', '.join(_ACTIVATIONS)}")
        inner = in_channels * expand
        if use_se and inner < se_ratio:
            raise InputError(
                f"se_ratio: got {se_ratio} for {inner} channels inside, which leaves none; expected at most {inner}"
            )
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride
        self.shortcut = stride == 1 and in_channels <= out_channels
        self.expand: nn.Module = conv_norm(in_channels, inner, activation=activation) if expand > 1 else nn.Identity()
        self.depthwise = conv_norm(inner, inner, kernel_size, stride, groups=inner)
        self.se: nn.Module = SqueezeExcite(inner, inner // se_ratio, batch_norm=True) if use_se else nn.Identity()
        self.act = nn.ReLU6()
        self.project = conv_norm(inner, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in_channels, height, width)`` to ``(batch, out_channels, height / stride, width / stride)``, rounded up."""
        out: Tensor = self.project(self.act(self.se(self.depthwise(self.expand(x)))))
        if not self.shortcut:
            return out
        if self.in_channels == self.out_channels:
            return out + x
        return torch.cat([out[:, : self.in_channels] + x, out[:, self.in_channels :]], 1)

    def extra_repr(self) -> str:
        """Whether there is a shortcut, for the printed form."""
        return f"shortcut={self.shortcut}"


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: Literal["silu", "relu6"] | None = None,
) -> nn.Sequential:
    """A convolution without bias (`conv`), BatchNorm (`norm`) and perhaps an activation (`act`)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        norm=nn.BatchNorm2d(out_channels),
    )
    if activation:
        layers["act"] = _ACTIVATIONS[activation]()
    return nn.Sequential(layers)
