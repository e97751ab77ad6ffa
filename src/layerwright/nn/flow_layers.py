"""The layers of a Glow-like normalising flow; each gives its output and the logarithm of its determinant.

Source: Kingma and Dhariwal, "Glow" (2018, arXiv 1807.03039); the forms are those of Kallappa et al., "FInC Flow" (2023,
arXiv 2301.09266).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError, LayerwrightError

__all__ = ["ActNorm2d", "AffineCoupling", "InvertibleConv1x1", "NotInitialisedError", "SplitPrior", "Squeeze2d"]

_LOG_TWO_PI = 1.8378770664093453


class NotInitialisedError(LayerwrightError, RuntimeError):
    """A layer that takes its first values from data has seen none."""


class ActNorm2d(nn.Module):
    """``y = (x - mean) exp(-log_std)`` with parameters for each channel that start as the first batch's statistics.

    The first batch in training mode sets them; later they are learnt, and saved with the state.

    Args:
        channels: of the map, at least 1.

    Raises:
        InputError: fewer than one channel.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        _check_count("channels", channels, 1)
        self.channels = channels
        self.mean = nn.Parameter(torch.zeros(channels))
        self.log_std = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        # The same fact as the buffer, where reading it does not wait for a device.
        self.ready = False
        self.register_load_state_dict_post_hook(_read_ready)

    @torch.no_grad()
    def initialize_(self, x: Tensor) -> None:
        """Set mean and standard deviation to those of `x`, ``(batch, channels, height, width)``."""
        rows = x.detach().float() if x.dtype.itemsize < 4 else x.detach()
        self.mean.copy_(rows.mean((0, 2, 3)))
        self.log_std.copy_((rows.std((0, 2, 3), correction=0) + 1e-8).log())
        self.initialized.fill_(True)
        self.ready = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map ``(batch, channels, height, width)`` and the logarithm ``(batch,)`` of the determinant.

        Raises:
            InputError: another number of axes or channels.
            NotInitialisedError: evaluation mode before the first batch.
        """
        _check_map(x, self.channels)
        if not self.ready:
            if not self.training:
                raise NotInitialisedError("ActNorm2d: no batch was seen; run one in training mode, or load a state")
            self.initialize_(x)
        y = (x - self.mean.view(1, -1, 1, 1)) * (-self.log_std).exp().view(1, -1, 1, 1)
        return y.to(x.dtype), -_constant(x, self.log_std.sum())

    def inverse(self, y: Tensor) -> Tensor:
        """The map whose image is `y`.

        Raises:
            NotInitialisedError: no batch was seen.
        """
        _check_map(y, self.channels)
        if not self.ready:
            raise NotInitialisedError("ActNorm2d: no batch was seen; run one in training mode, or load a state")
        return (y * self.log_std.exp().view(1, -1, 1, 1) + self.mean.view(1, -1, 1, 1)).to(y.dtype)


def _read_ready(module: ActNorm2d, _keys: Any) -> None:
    if not module.initialized.is_meta:
        module.ready = bool(module.initialized)


class InvertibleConv1x1(nn.Module):
    """A square matrix over the channels of each position, orthogonal at first.

    Args:
        channels: of the map, at least 1.
        lu: keep the matrix as a fixed permutation times a lower and an upper triangular matrix, so that the determinant
            is a product of `channels` numbers; else it is computed from the matrix each time.
        generator: of the first matrix.

    Raises:
        InputError: fewer than one channel.
    """

    permutation: Tensor
    signs: Tensor

    def __init__(self, channels: int, lu: bool = False, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check_count("channels", channels, 1)
        self.channels, self.lu = channels, lu
        start = torch.empty(channels, channels)
        if not start.is_meta:
            nn.init.orthogonal_(start, generator=generator)
        if not lu:
            self.weight = nn.Parameter(start)
            return
        permutation, lower, upper = (start, start, start) if start.is_meta else torch.linalg.lu(start)
        diagonal = upper.diagonal()
        self.lower, self.upper = nn.Parameter(lower.clone()), nn.Parameter(upper.clone())
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.register_buffer("permutation", permutation.clone())
        self.register_buffer("signs", diagonal.sign())

    def matrix(self) -> Tensor:
        """The matrix ``(channels, channels)``."""
        if not self.lu:
            return self.weight
        eye = torch.eye(self.channels, dtype=self.lower.dtype, device=self.lower.device)
        upper = torch.triu(self.upper, 1) + torch.diag_embed(self.signs * self.log_diagonal.exp())
        return self.permutation @ (torch.tril(self.lower, -1) + eye) @ upper

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map ``(batch, channels, height, width)`` and the logarithm ``(batch,)`` of the determinant."""
        _check_map(x, self.channels)
        matrix = self.matrix()
        log = self.log_diagonal.sum() if self.lu else torch.linalg.slogdet(_wide(matrix))[1]
        return functional.conv2d(x, matrix.to(x.dtype)[:, :, None, None]), _constant(x, log)

    def inverse(self, y: Tensor) -> Tensor:
        """The map whose image is `y`."""
        _check_map(y, self.channels)
        inverse = torch.linalg.inv(_wide(self.matrix())).to(y.dtype)
        return functional.conv2d(y, inverse[:, :, None, None])


class AffineCoupling(nn.Module):
    """The second half of the channels, scaled and shifted by what a small network reads in the first half.

    ``y2 = x2 exp(s) + t`` with ``s = 2 tanh(h_s / 2)``; `h` comes from 3 x 3, 1 x 1 and 3 x 3 convolutions, its even
    channels are ``h_s`` and its odd ones `t`. The last convolution starts at zero and has a learnt gain ``exp(3 logs)``.

    Args:
        channels: of the map, an even number.
        width: channels of the hidden layers.

    Raises:
        InputError: odd channels or no width.
    """

    def __init__(self, channels: int, width: int = 512) -> None:
        super().__init__()
        _check_count("width", width, 1)
        if channels < 2 or channels % 2:
            raise InputError(f"channels: got {channels}, expected an even number")
        self.channels = channels
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU()
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.logs = nn.Parameter(torch.zeros(channels))
        if not self.logs.is_meta:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def _scale_and_shift(self, first: Tensor) -> tuple[Tensor, Tensor]:
        out = self.last(self.net(first)) * (3 * self.logs).exp().view(1, -1, 1, 1)
        return 2 * torch.tanh(out[:, ::2] / 2), out[:, 1::2]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The map ``(batch, channels, height, width)`` and the logarithm ``(batch,)`` of the determinant."""
        _check_map(x, self.channels)
        first, second = x.chunk(2, 1)
        scale, shift = self._scale_and_shift(first)
        return torch.cat([first, second * scale.exp() + shift], 1), scale.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """The map whose image is `y`."""
        _check_map(y, self.channels)
        first, second = y.chunk(2, 1)
        scale, shift = self._scale_and_shift(first)
        return torch.cat([first, (second - shift) * (-scale).exp()], 1)


class Squeeze2d(nn.Module):
    """Blocks of 2 x 2 pixels become four times the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch, 4 channels, height / 2, width / 2)``.

        Raises:
            InputError: an odd height or width, or another number of axes.
        """
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise InputError(
                f"x: got shape {tuple(x.shape)}, expected (batch, channels, height, width), both sides even"
            )
        return functional.pixel_unshuffle(x, 2)

    def inverse(self, y: Tensor) -> Tensor:
        """Back again."""
        if y.dim() != 4 or y.shape[1] % 4:
            raise InputError(f"y: got shape {tuple(y.shape)}, expected (batch, a multiple of 4, height, width)")
        return functional.pixel_shuffle(y, 2)


class SplitPrior(nn.Module):
    """Leaves out the second half of the channels, which is Gaussian once a coupling took out what the first half tells.

    Args:
        channels: of the map, an even number.
        width: of the coupling.
    """

    def __init__(self, channels: int, width: int = 512) -> None:
        super().__init__()
        self.coupling = AffineCoupling(channels, width)
        self.channels = channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first half, the second half as standard normal numbers, and the logarithm of the determinant."""
        y, logdet = self.coupling(x)
        kept, left = y.chunk(2, 1)
        return kept, left, logdet

    def inverse(self, kept: Tensor, left: Tensor) -> Tensor:
        """The map ``(batch, channels, height, width)`` of both halves."""
        x: Tensor = self.coupling.inverse(torch.cat([kept, left], 1))
        return x


def log_normal(x: Tensor) -> Tensor:
    """Logarithms ``(batch,)`` of the standard normal density."""
    return -0.5 * (x.square() + _LOG_TWO_PI).flatten(1).sum(1)


def _constant(x: Tensor, log: Tensor) -> Tensor:
    """A determinant that is the same at each position and for each sample."""
    return (log * (x.shape[2] * x.shape[3])).to(x.dtype).expand(x.shape[0])


def _wide(matrix: Tensor) -> Tensor:
    return matrix.float() if matrix.dtype.itemsize < 4 else matrix


def _check_count(name: str, count: int, least: int) -> None:
    if count < least:
        raise InputError(f"{name}: got {count}, expected at least {least}")


def _check_map(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, {channels}, height, width)")
