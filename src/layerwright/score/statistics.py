"""What calibration tells about one layer input: second moments, ranges and the number of tokens."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, get_parameter
from layerwright.nn.conv_settings import ConvSettings

__all__ = ["InputStatistics", "gram_energy", "unfold"]

CHUNK_NUMEL = 1 << 22
"""Input values that are held in float32 at a time, 16 MiB."""

_PANEL = 128


class InputStatistics:
    """Sums over all calibration tokens that reached one input, shared by every layer that reads it.

    One matrix of statistics is kept for each of `count` sets of weights with inputs of their own: 1 for an ordinary
    layer, the number of experts for a mixture, the number of groups for a grouped convolution (each group of output
    channels sees its own slice of the input channels, so its gram is exact and small; a depthwise one is 9 by 9).

    Memory: ``4 * count * in**2`` bytes, or ``4 * count * in`` with `only_diagonal`, and `CHUNK_NUMEL` floats while
    updating (a convolution: one line of windows of one sample, if that is more). Time: one product ``X^T X``, of which
    only the upper triangle of panels is computed. Inputs in half precision are widened first: products of bfloat16
    numbers are exact in float32, while a product that returns bfloat16 would keep three digits of every sum.

    Attributes:
        tokens: ``(count,)`` int64, rows seen.
        low: ``(count, in)`` float32, least value of each input, ``inf`` where none was seen.
        high: ``(count, in)`` float32, largest value.
    """

    def __init__(
        self,
        in_features: int,
        count: int = 1,
        *,
        only_diagonal: bool = False,
        conv: ConvSettings | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start empty: `count` sets of `in_features` inputs.

        With `only_diagonal` there is no gram (Wanda and ranges need none); with `conv` every position of a
        convolution's input counts as a token.
        """
        self.in_features, self.count, self.only_diagonal, self.conv = in_features, count, only_diagonal, conv
        shape = (count, in_features) if only_diagonal else (count, in_features, in_features)
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self._mirrored = True
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.low = torch.full((count, in_features), math.inf, dtype=torch.float32, device=device)
        self.high = torch.full((count, in_features), -math.inf, dtype=torch.float32, device=device)

    @classmethod
    def for_layer(cls, model: nn.Module, ref: LayerRef, *, only_diagonal: bool = False) -> Self:
        """Empty statistics for the input of the layer `ref` of `model`, on the device of its weight.

        Experts and convolutions are told apart.
        """
        conv = ConvSettings.of(model.get_submodule(ref.path)) if ref.layout == "conv" else None
        count = conv.groups if conv is not None else ref.count
        device = get_parameter(model, ref.parameter).device
        return cls(ref.shape[1], count, only_diagonal=only_diagonal, conv=conv, device=device)

    @property
    def gram(self) -> Tensor:
        """``(count, in, in)`` float32, the sum of ``x x^T``.

        Raises:
            InputError: only the diagonal was kept.
        """
        if self.only_diagonal:
            raise InputError("gram: these statistics keep the diagonal only; collect them with only_diagonal=False")
        if not self._mirrored:
            _mirror_(self._sum)
            self._mirrored = True
        return self._sum

    @property
    def square_sum(self) -> Tensor:
        """``(count, in)`` float32, the sum of ``x**2``."""
        return self._sum if self.only_diagonal else self._sum.diagonal(dim1=-2, dim2=-1)

    @property
    def total_tokens(self) -> int:
        """Rows seen, all sets together; positions of a convolution count once, whatever its groups."""
        return int(self.tokens.max() if self.conv is not None else self.tokens.sum())

    @torch.no_grad()
    def update(self, x: Tensor, expert: int | None = None) -> None:
        """Add tokens ``(..., in)`` of any float dtype, or the input ``(batch, channels, *size)`` of a convolution.

        Args:
            x: what the layer reads.
            expert: the set that these tokens belong to, where there are several.

        Raises:
            InputError: a last dimension that is not `in_features`, or channels that are not the convolution's.
        """
        if self.conv is not None:
            self._update_conv(x, self.conv)
            return
        if x.shape[-1] != self.in_features:
            raise InputError(f"calibration input has {x.shape[-1]} features, expected {self.in_features}")
        if expert is None and self.count > 1:
            raise InputError(f"calibration input of one of {self.count} experts: say which")
        rows = x.reshape(-1, self.in_features)
        step = max(CHUNK_NUMEL // self.in_features, 1)
        for start in range(0, rows.shape[0], step):
            self._add(self._own(rows[start : start + step]), expert or 0)

    def _update_conv(self, x: Tensor, conv: ConvSettings) -> None:
        windows = unfold(x, conv)
        dimensions = len(conv.kernel_size)
        row = windows[0, 0].numel() if windows.shape[0] and windows.shape[1] else 1
        samples = max(CHUNK_NUMEL // max(row * windows.shape[1], 1), 1)
        lines = max(CHUNK_NUMEL // row, 1)
        for sample in range(0, windows.shape[0], samples):
            for line in range(0, windows.shape[1], lines):
                part = windows[sample : sample + samples, line : line + lines]
                if self.count == 1:
                    self._add(self._own(part.reshape(-1, self.in_features)), 0)
                else:
                    split = torch.unflatten(part, dimensions + 1, (self.count, -1)).movedim(dimensions + 1, 0)
                    self._add_groups(self._own(split.reshape(self.count, -1, self.in_features)))

    def finite(self) -> bool:
        """Whether every input was a usable number; see `check`."""
        return bool(self.square_sum.isfinite().all())

    def check(self, name: str) -> None:
        """Refuse what cannot be used.

        A NaN or an infinity in any input shows on the diagonal, so that this reads ``count * in`` numbers only.

        Raises:
            InputError: NaN, infinity, or squares beyond float32 in the inputs of the layer `name`.
        """
        bad = (~self.square_sum.isfinite()).nonzero()
        if len(bad):
            index, feature = bad[0].tolist()
            where = f" of set {index}" if self.count > 1 else ""
            raise InputError(
                f"{name}: its calibration input {feature}{where} ({len(bad)} in all) holds NaN, infinity or values"
                " whose squares exceed float32; check the calibration data and the model's dtype"
            )

    def energy(self, weight: Tensor) -> Tensor:
        """``(count,)`` float64: the sum over tokens of ``||weight x||^2`` for `weight` ``(count, out, in)``.

        With the diagonal alone the inputs count as uncorrelated.
        """
        if self.only_diagonal:
            return (weight.float().square().sum(1).double() * self.square_sum.double()).sum(-1)
        return gram_energy(weight, self.gram)

    def select(self, kept: Tensor) -> InputStatistics:
        """The statistics of some of the inputs of one layer; `kept` ``(n,)`` are their indices."""
        part = InputStatistics(len(kept), self.count, only_diagonal=self.only_diagonal, device=self._sum.device)
        source = self.square_sum if self.only_diagonal else self.gram[:, kept]
        part._sum = source[..., kept].clone()
        part.tokens, part.low, part.high = self.tokens.clone(), self.low[:, kept], self.high[:, kept]
        return part

    def _own(self, x: Tensor) -> Tensor:
        return x.to(self._sum.device, torch.float32)

    def _add(self, x: Tensor, index: int) -> None:
        """Add float32 rows ``(tokens, in)``."""
        if not x.shape[0]:
            return
        self.tokens[index] += x.shape[0]
        torch.minimum(self.low[index], x.amin(0), out=self.low[index])
        torch.maximum(self.high[index], x.amax(0), out=self.high[index])
        if self.only_diagonal:
            self._sum[index] += x.square().sum(0)
            return
        self._mirrored = False
        gram = self._sum[index]
        # Panels of the upper triangle: half the work of the full product. An accelerator prefers one launch.
        width = _PANEL if x.device.type == "cpu" else self.in_features
        for start in range(0, self.in_features, width):
            gram[start : start + width, start:].addmm_(x[:, start : start + width].t(), x[:, start:])

    def _add_groups(self, x: Tensor) -> None:
        """Add float32 rows ``(count, tokens, in)``, as many for each set."""
        self.tokens += x.shape[1]
        torch.minimum(self.low, x.amin(1), out=self.low)
        torch.maximum(self.high, x.amax(1), out=self.high)
        if self.only_diagonal:
            self._sum += x.square().sum(1)
        else:
            self._mirrored = False
            self._sum.baddbmm_(x.transpose(1, 2), x)


def gram_energy(weight: Tensor, gram: Tensor) -> Tensor:
    """``(count,)`` float64 traces of ``weight @ gram @ weight^T``."""
    weight = weight.float()
    return ((weight @ gram) * weight).sum((1, 2), dtype=torch.float64)


def _mirror_(gram: Tensor) -> None:
    """Copy the upper triangle to the lower one: a product's two halves may differ in the last bit."""
    size = gram.shape[-1]
    for start in range(0, size, _PANEL):
        stop = start + _PANEL
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].transpose(1, 2)
        inside = gram[:, start:stop, start:stop]
        inside.copy_(inside.triu() + inside.triu(1).transpose(1, 2))


def unfold(x: Tensor, conv: ConvSettings) -> Tensor:
    """What a convolution multiplies its weight with: a view ``(batch, *positions, channels, *kernel)`` on padded `x`.

    Args:
        x: ``(batch, channels, *size)`` or ``(channels, *size)``, with one to three dimensions of size.
        conv: kernel, stride, padding and dilation.

    Raises:
        InputError: other dimensions or channels than the convolution's.
    """
    spatial = len(conv.kernel_size)
    x = x.unsqueeze(0) if x.dim() == spatial + 1 else x
    if x.dim() != spatial + 2 or x.shape[1] != conv.in_channels:
        raise InputError(
            f"calibration input has shape {tuple(x.shape)}, expected (batch, {conv.in_channels}) and {spatial} sizes"
        )
    reach = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if conv.padding == "same":
        sides = [(total // 2, total - total // 2) for total in reach]
    elif isinstance(conv.padding, str):
        sides = [(0, 0)] * spatial
    else:
        sides = [(p, p) for p in conv.padding]
    if any(a or b for a, b in sides):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, [side for pair in reversed(sides) for side in pair], mode=mode)
    positions = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, conv.stride, strict=True)]
    steps = x.stride()
    return x.as_strided(
        (x.shape[0], *positions, x.shape[1], *conv.kernel_size),
        (
            steps[0],
            *(step * s for step, s in zip(steps[2:], conv.stride, strict=True)),
            steps[1],
            *(step * d for step, d in zip(steps[2:], conv.dilation, strict=True)),
        ),
        x.storage_offset(),
    )
