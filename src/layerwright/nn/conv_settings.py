"""Everything about a convolution but its weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.quantizer import quantize, quantize_tokens

__all__ = ["ConvSettings"]

_RUN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MODULES: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class ConvSettings:
    """The settings of ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, in plain data.

    Attributes:
        in_channels, out_channels, groups: as in `torch.nn`.
        kernel_size, stride, dilation: one number per dimension.
        padding: one number per dimension, or ``same`` or ``valid``.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation", "padding"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value))
        if len(self.kernel_size) not in _RUN:
            raise InputError(f"kernel_size: got {self.kernel_size}, expected one to three numbers")

    @classmethod
    def of(cls, module: nn.Module) -> ConvSettings:
        """The settings of a plain convolution.

        Raises:
            InputError: a transposed convolution, or another module.
        """
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise InputError(f"{type(module).__name__} is not nn.Conv1d, nn.Conv2d or nn.Conv3d")
        return cls(**{field.name: getattr(module, field.name) for field in dataclasses.fields(cls)})

    @property
    def columns(self) -> int:
        """Inputs of one output value: ``in_channels / groups * kernel``."""
        size = self.in_channels // self.groups
        for k in self.kernel_size:
            size *= k
        return size

    def kernel(self, matrix: Tensor) -> Tensor:
        """``(out, in / groups * kernel)`` as ``(out, in / groups, *kernel_size)``."""
        return matrix.view(matrix.shape[0], self.in_channels // self.groups, *self.kernel_size)

    def run(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of `x` ``(batch, in_channels, *size)`` or ``(in_channels, *size)`` with `kernel`."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = self._pad(x), (0,) * len(self.kernel_size)
        bias = None if bias is None else bias.to(x.dtype)
        result: Tensor = _RUN[len(self.kernel_size)](x, kernel, bias, self.stride, padding, self.dilation, self.groups)
        return result

    def module(self, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A dense convolution of these settings."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _MODULES[len(self.kernel_size)](**settings, bias=bias, dtype=dtype)

    def round_input(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """`x` rounded to int8 and back: with a static `scale`, or one for each sample; the gradient passes straight."""
        flat = x.detach().reshape(x.shape[0] if x.ndim == len(self.kernel_size) + 2 else 1, -1)
        codes, used = (
            quantize_tokens(flat) if scale is None else (quantize(flat, scale.float(), None, 8), scale.float())
        )
        rounded = (codes * used).to(x.dtype).view(x.shape)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return rounded
        passed = x if scale is None else x.clamp(-128 * float(scale), 127 * float(scale))
        return passed + (rounded - passed).detach()

    def to_data(self) -> dict[str, Any]:
        """Plain data, from which ``ConvSettings(**data)`` is the same again."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, padding_mode={self.padding_mode}"
        )

    def _pad(self, x: Tensor) -> Tensor:
        """`x` with this padding mode's border."""
        border: list[int] = []
        for axis in reversed(range(len(self.kernel_size))):
            if isinstance(self.padding, str):
                spread = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
                border += [spread // 2, spread - spread // 2]
            else:
                border += [self.padding[axis], self.padding[axis]]
        return F.pad(x, border, mode=self.padding_mode)
