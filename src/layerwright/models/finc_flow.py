"""FInC Flow: a normalising flow of pictures with k x k convolutions that can be inverted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.backbone import named_config
from layerwright.nn.flow_layers import (
    ActNorm2d,
    AffineCoupling,
    InvertibleConv1x1,
    SplitPrior,
    Squeeze2d,
    log_normal,
)
from layerwright.nn.invertible_conv import FInCConv

__all__ = ["FInCFlow", "FlowStep"]

ALPHA = 1e-6
_CONFIGS: dict[str, dict[str, Any]] = {
    "mnist": {"in_shape": (1, 28, 28), "levels": 2, "steps": 16},
    "cifar10": {"in_shape": (3, 32, 32), "levels": 3, "steps": 32},
    "imagenet32": {"in_shape": (3, 32, 32), "levels": 3, "steps": 48},
    "imagenet64": {"in_shape": (3, 64, 64), "levels": 4, "steps": 48},
    "test": {"in_shape": (1, 8, 8), "levels": 2, "steps": 2, "width": 16},
}


class _Steps(nn.ModuleList):
    """Invertible layers, one after another."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for layer in self:
            x, logdet = layer(x)
            total = total + logdet
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        for layer in reversed(self):  # type: ignore[call-overload]
            y = layer.inverse(y)  # type: ignore[operator]
        return y


class FlowStep(_Steps):
    """FInC unit, ActNorm, 1 x 1 convolution, affine coupling.

    Args:
        channels: of the map, a multiple of 4.
        width: of the coupling's hidden layers.
        kernel_size: of the FInC unit.
        spatial: False leaves the FInC unit out, which is a step of Glow.
        lu: form of the 1 x 1 convolution.
    """

    def __init__(
        self, channels: int, width: int = 512, kernel_size: int = 3, spatial: bool = True, lu: bool = False
    ) -> None:
        layers: list[nn.Module] = [FInCConv(channels, kernel_size)] if spatial else []
        super().__init__(
            [*layers, ActNorm2d(channels), InvertibleConv1x1(channels, lu), AffineCoupling(channels, width)]
        )


class FInCFlow(nn.Module):
    """A density of pictures, with samples of it: levels of ``squeeze, steps, split`` behind a logit.

    Pictures in [0, 1) go to ``logit(a + (1 - 2 a) x)`` with ``a = 1e-6``. Each level makes 2 x 2 pixels into channels
    and runs `steps` of `FlowStep`; all but the last hand half of their channels to a Gaussian whose mean and scale
    depend on the other half. Everything that is left is standard normal.

    Source: Kallappa et al., "FInC Flow" (2023, arXiv 2301.09266). Training there: Adam at 1e-3, falling by 0.99 each
    epoch.

    Args:
        in_shape: channels, height and width of the pictures; both sides multiples of ``2 ** levels``.
        levels: at least 1.
        steps: of each level, at least 1.
        width: of the couplings.
        kernel_size: of the FInC units.
        spatial: False leaves the FInC units out, which makes a Glow of as many steps.
        lu: form of the 1 x 1 convolutions.
        num_bins: grey values of whole-numbered pictures.

    Raises:
        InputError: a number outside its range.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        levels: int = 3,
        steps: int = 32,
        width: int = 512,
        kernel_size: int = 3,
        spatial: bool = True,
        lu: bool = False,
        num_bins: int = 256,
    ) -> None:
        super().__init__()
        for name, count, least in (("levels", levels, 1), ("steps", steps, 1), ("num_bins", num_bins, 2)):
            if count < least:
                raise InputError(f"{name}: got {count}, expected at least {least}")
        channels, height, width_pixels = in_shape
        if channels < 1 or height % 2**levels or width_pixels % 2**levels or min(height, width_pixels) < 1:
            raise InputError(
                f"in_shape: got {tuple(in_shape)}, expected channels, height and width, both multiples of {2**levels}"
            )
        self.in_shape, self.levels, self.num_bins = tuple(in_shape), levels, num_bins
        self.squeeze = Squeeze2d()
        self.stages, self.splits = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            channels *= 4
            self.stages.append(_Steps(FlowStep(channels, width, kernel_size, spatial, lu) for _ in range(steps)))
            if level < levels - 1:
                self.splits.append(SplitPrior(channels, width))
                channels //= 2

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """``mnist``, ``cifar10``, ``imagenet32``, ``imagenet64`` or ``test``.

        Raises:
            InputError: no such variant.
        """
        return cls(**named_config(name, _CONFIGS, changes))

    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes, without the batch, of the parts of the latent code: one for each level."""
        channels, height, width = self.in_shape
        shapes = []
        for level in range(self.levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            if level < self.levels - 1:
                channels //= 2
            shapes.append((channels, height, width))
        return shapes

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Latent code, a part for each level, and the logarithm ``(batch,)`` of the determinant of the whole map.

        Args:
            x: ``(batch, *in_shape)`` in [0, 1).
        """
        inner = ALPHA + (1 - 2 * ALPHA) * x
        logdet = (math.log(1 - 2 * ALPHA) - inner.log() - (1 - inner).log()).flatten(1).sum(1)
        z, parts = inner.log() - (1 - inner).log(), []
        for level, stage in enumerate(self.stages):
            z, more = stage(self.squeeze(z))
            logdet = logdet + more
            if level < self.levels - 1:
                z, left, more = self.splits[level](z)
                parts.append(left)
                logdet = logdet + more
        return [*parts, z], logdet

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Pictures ``(batch, *in_shape)`` in [0, 1) of a latent code."""
        if len(parts) != self.levels:
            raise InputError(f"parts: got {len(parts)}, expected one for each of {self.levels} levels")
        z = parts[-1]
        for level in reversed(range(self.levels)):
            if level < self.levels - 1:
                z = self.splits[level].inverse(z, parts[level])  # type: ignore[operator]
            z = self.squeeze.inverse(self.stages[level].inverse(z))  # type: ignore[operator]
        x = (torch.sigmoid(z) - ALPHA) / (1 - 2 * ALPHA)
        return x.clamp(0, 1 - torch.finfo(x.dtype).eps / 2)

    def dequantize(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Whole numbers of ``0 .. num_bins - 1`` with uniform noise, as numbers in [0, 1)."""
        dtype = next(self.parameters()).dtype
        noise = torch.rand(x.shape, generator=generator, dtype=dtype, device=x.device)
        # The sum may round up to the next bin, and the last one to 1.
        return ((x + noise) / self.num_bins).clamp_max(1 - torch.finfo(dtype).eps / 2)

    def log_prob(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logarithms ``(batch,)`` of the density of pictures in [0, 1).

        Args:
            x: ``(batch, *in_shape)``: floating-point in [0, 1), or whole numbers of ``0 .. num_bins - 1``, which are
                dequantised first.
            generator: of the noise.

        Raises:
            InputError: another shape, or numbers outside that range.
            NotInitialisedError: evaluation mode before a first batch in training mode.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.in_shape or not len(x):
            raise InputError(f"x: got shape {tuple(x.shape)}, expected (batch, {', '.join(map(str, self.in_shape))})")
        whole = not x.is_floating_point()
        low, high = (float(edge) for edge in torch.aminmax(x))
        if not (low >= 0 and (high < self.num_bins if whole else high < 1)):
            wanted = f"whole numbers of 0 to {self.num_bins - 1}" if whole else "numbers in [0, 1)"
            raise InputError(f"x: got values of {low:g} to {high:g}, expected {wanted}")
        parts, logdet = self.encode(self.dequantize(x, generator) if whole else x)
        return logdet + torch.stack([log_normal(part) for part in parts]).sum(0)

    def bits_per_dim(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bits ``(batch,)`` for each pixel and channel that code the whole-numbered picture, an upper bound.

        ``-log_prob / (D log 2) + log2 num_bins``, since a bin takes ``1 / num_bins`` of [0, 1). Arguments as for `log_prob`;
        floating-point pictures are taken as dequantised already.
        """
        return -self.log_prob(x, generator) / (math.prod(self.in_shape) * math.log(2)) + math.log2(self.num_bins)

    def forward(self, x: Tensor) -> Tensor:
        """As `log_prob`, so that a hook or a wrapper sees the flow as any other network."""
        return self.log_prob(x)

    @torch.no_grad()
    def sample(self, count: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Pictures ``(count, *in_shape)`` in [0, 1); `temperature` scales the latent code.

        Raises:
            InputError: a negative number.
            NotInitialisedError: no batch was seen.
        """
        if count < 1 or temperature < 0:
            raise InputError(f"count, temperature: got {count} and {temperature}, expected at least 1 and 0")
        like = next(self.parameters())
        parts = [
            temperature * torch.randn(count, *shape, generator=generator, dtype=like.dtype, device=like.device)
            for shape in self.latent_shapes()
        ]
        return self.decode(parts)
