"""Token mixing in which every channel is read at its own place on a spiral."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.drop_path import DropPath

__all__ = ["SpiralBlock", "SpiralFC", "SpiralMixing", "shift_channels", "spiral_offsets"]


def spiral_offsets(channels: int, partitions: int = 2, a_max: int = 7, period: float = 32) -> Tensor:
    """Where each input channel is read: rows and columns ``(channels, 2)``, whole numbers up to `a_max` from 0.

    Channel `c` of a partition of `n` lies at the angle ``2 pi c / period`` on a radius that grows from 0 to `a_max` at
    ``n / 2`` and falls again, so that both ends are local. Each partition runs through the whole spiral.

    Source: Mu, Ul Tayyab and Chua, "SpiralMLP: A Lightweight Vision MLP Architecture" (2024, arXiv 2404.00648).

    Raises:
        InputError: partitions that do not divide the channels, a negative radius, a period of 0 or less.
    """
    if channels < 1 or partitions < 1 or channels % partitions:
        raise InputError(f"partitions: got {partitions} for {channels} channels, expected a divisor")
    if isinstance(a_max, bool) or a_max < 0 or a_max != int(a_max):
        raise InputError(f"a_max: got {a_max}, expected a whole number from 0")
    if not period > 0:
        raise InputError(f"period: got {period}, expected a positive number")
    size = channels // partitions
    places = []
    for number in range(size):
        step = 2 * a_max / size
        radius = number * step if number <= size // 2 else 2 * a_max - number * step
        angle = 2 * math.pi * number / period
        places.append((round(radius * math.cos(angle)), round(radius * math.sin(angle))))
    return torch.tensor(places * partitions)


def shift_channels(x: Tensor, offsets: Tensor, a_max: int) -> Tensor:
    """``y[b, i, j, c] = x[b, i + offsets[c, 0], j + offsets[c, 1], c]``, zero outside the map.

    One padded copy and one gather, in one pass each.

    Args:
        x: ``(batch, height, width, channels)``.
        offsets: ``(channels, 2)`` whole numbers.
        a_max: none of them is larger, with or without its sign.
    """
    if not a_max:
        return x
    batch, height, width, channels = x.shape
    wide = functional.pad(x, (0, 0, a_max, a_max, a_max, a_max)).flatten(1)
    row = torch.arange(height, device=x.device)[:, None, None] + (offsets[:, 0] + a_max)
    column = torch.arange(width, device=x.device)[None, :, None] + (offsets[:, 1] + a_max)
    # One product of full size, in as few bytes as will do: it is read once for every picture.
    small = torch.int32 if wide.shape[1] < 2**31 else torch.int64
    first = (row * ((width + 2 * a_max) * channels)).to(small)
    places = first + (column * channels + torch.arange(channels, device=x.device)).to(small)
    return wide.index_select(1, places.flatten()).view(batch, height, width, channels)


class SpiralFC(nn.Module):
    """A linear layer over channels, each of which is read at its own offset: ``y[i, j] = W x[i + dh(c), j + dw(c), c] + b``.

    Its cost is that of ``nn.Linear`` and one gather. ``a_max = 0`` is ``nn.Linear``. Any height and width.

    Source: Mu, Ul Tayyab and Chua (2024, arXiv 2404.00648).

    Args:
        in_channels, out_channels: at least 1.
        partitions, a_max, period: see `spiral_offsets`.
        bias: of the outputs.
        offsets: others than those of the spiral ``(in_channels, 2)``, within `a_max`; fixed, not learnt.

    Raises:
        InputError: a number outside its range, or offsets that do not fit.
    """

    offsets: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, partitions: int = 2, a_max: int = 7, period: float = 32,
        bias: bool = True, offsets: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if out_channels < 1:
            raise InputError(f"out_channels: got {out_channels}, expected at least 1")
        spiral = spiral_offsets(in_channels, partitions, a_max, period)
        if offsets is not None and (offsets.shape != spiral.shape or offsets.abs().max() > a_max):
            raise InputError(
                f"offsets: got shape {tuple(offsets.shape)}, expected ({in_channels}, 2) with values from {-a_max} to {a_max}"
            )
        self.a_max = a_max
        self.register_buffer("offsets", spiral if offsets is None else offsets.long())
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, height, width, in_channels)`` to ``(batch, height, width, out_channels)``.

        Raises:
            InputError: another shape, or an empty batch.
        """
        _check_map(x, self.weight.shape[1])
        return functional.linear(shift_channels(x, self.offsets, self.a_max), self.weight, self.bias)

    def as_convolutions(self) -> nn.Sequential:
        """The same on ``(batch, channels, height, width)``: a depth-wise one-hot convolution and a 1 x 1 convolution.

        For export to programs that know convolutions alone; ``(2 a_max + 1)^2`` times the work of a shift.
        """
        outputs, inputs = self.weight.shape
        side = 2 * self.a_max + 1
        read = nn.Conv2d(inputs, inputs, side, padding=self.a_max, groups=inputs, bias=False)
        mix = nn.Conv2d(inputs, outputs, 1, bias=self.bias is not None)
        made = nn.Sequential(read, mix).to(self.weight)
        with torch.no_grad():
            read.weight.zero_()
            rows, columns = (self.offsets.cpu() + self.a_max).unbind(1)
            read.weight[torch.arange(inputs), 0, rows, columns] = 1.0
            mix.weight.copy_(self.weight[:, :, None, None])
            if mix.bias is not None and self.bias is not None:
                mix.bias.copy_(self.bias)
        return made

    def extra_repr(self) -> str:
        """Widths and radius."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, a_max={self.a_max}, bias={self.bias is not None}"


class SpiralMixing(nn.Module):
    """A `SpiralFC` and a linear layer side by side, weighed channel by channel by what the whole map holds.

    ``a = cross(x)``, ``b = self(x)``; a two-layer network reads the mean of ``a + b`` over the positions and gives, by a
    softmax, the shares of `a` and `b` in each channel; a linear layer follows. Source: Mu et al. (2024, arXiv 2404.00648).

    Args:
        dim: channels.
        reduction: `dim` over the width between the two layers.
        partitions, a_max, period, offsets: see `SpiralFC`.
        dropout: behind the shares' network and the last layer.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self, dim: int, reduction: int = 4, partitions: int = 2, a_max: int = 7, period: float = 32,
        dropout: float = 0.0, offsets: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= reduction <= dim:
            raise InputError(f"reduction: got {reduction}, expected 1 to dim = {dim}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout: got {dropout}, expected a probability in [0, 1)")
        self.cross = SpiralFC(dim, dim, partitions, a_max, period, offsets=offsets)
        self.local = nn.Linear(dim, dim)
        self.reweight = nn.Sequential(
            nn.Linear(dim, dim // reduction), nn.GELU(), nn.Linear(dim // reduction, 2 * dim), nn.Dropout(dropout)
        )
        self.proj, self.drop = nn.Linear(dim, dim), nn.Dropout(dropout)

    def shares(self, cross: Tensor, local: Tensor) -> Tensor:
        """Shares of both parts ``(batch, channels, 2)``, which sum to 1."""
        return self.reweight((cross + local).mean((1, 2))).unflatten(1, (-1, 2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, height, width, dim)`` to the same."""
        cross, local = self.cross(x), self.local(x)
        first, second = self.shares(cross, local)[:, None, None].unbind(-1)
        out: Tensor = self.drop(self.proj(cross * first + local * second))
        return out


class SpiralBlock(nn.Module):
    """``x + mixing(LN(x))``, then ``x + MLP(LN(x))``, on maps with channels last.

    Source: Mu et al. (2024, arXiv 2404.00648).

    Args:
        dim: channels.
        mlp_ratio: hidden channels over `dim`.
        partitions, a_max, period, offsets: see `SpiralFC`.
        dropout: in the mixing and behind the MLP.
        drop_path: rate of both branches.
        inner_residual: the MLP adds its own input, which the norm has passed, as in the authors' code.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self, dim: int, mlp_ratio: float = 4, partitions: int = 2, a_max: int = 7, period: float = 32,
        dropout: float = 0.0, drop_path: float = 0.0, inner_residual: bool = False, offsets: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = int(mlp_ratio * dim)
        if hidden < 1:
            raise InputError(f"mlp_ratio: got {mlp_ratio} for {dim} channels, expected at least one hidden channel")
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixing = SpiralMixing(dim, min(4, dim), partitions, a_max, period, dropout=dropout, offsets=offsets)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim), nn.Dropout(dropout))
        self.drop_path, self.inner_residual = DropPath(drop_path), inner_residual

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, height, width, dim)`` to the same."""
        x = x + self.drop_path(self.mixing(self.norm1(x)))
        normed = self.norm2(x)
        out = self.mlp(normed)
        return x + self.drop_path(out + normed if self.inner_residual else out)


def _check_map(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[-1] != channels or not x.numel():
        raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, height, width, {channels}), channels last")
