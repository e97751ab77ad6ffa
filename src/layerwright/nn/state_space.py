"""Diagonal state space layers in heads: a convolution over all frames at once, or one step for each frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError

__all__ = ["DiagonalSSM", "MultiHeadSSM"]

DT_RANGE = (1e-3, 1e-1)
"""Time steps of the first and the last head; those between are spread evenly in the logarithm."""


SHIFT = 0.05
"""Deviation of the exponents that time steps and frequencies start with."""


class DiagonalSSM(nn.Module):
    """A linear state space system with a diagonal matrix for each channel.

    ``s_k = Abar s_{k-1} + Bbar x_k``, ``y_k = Re(C s_k) + D x_k`` with ``Abar = exp(dt A)``, ``Bbar = (Abar - 1) / A B``
    and ``A = -exp(a) + i w``, so that ``|Abar| < 1``. Time steps and frequencies are learned as small numbers in the
    exponent, so that an optimizer that moves parameters by a share of their size keeps near the start. Computed in float32. Memory of `forward`: ``channels x states x
    frames`` complex numbers for the kernel. Source: Gu et al. (2022), S4D, arXiv 2206.11893.

    Args:
        dt: first time step of each channel ``(channels,)``, above 0.
        states: complex ones of each channel.
        generator: of the first weights.
    """

    first_log_dt: Tensor
    first_frequency: Tensor

    def __init__(self, dt: Tensor, states: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        channels = dt.shape[0]
        order = torch.arange(states, dtype=torch.float32).expand(channels, states)
        self.register_buffer("first_log_dt", dt.float().log())
        self.register_buffer("first_frequency", math.pi * order)
        self.dt_shift = nn.Parameter(SHIFT * torch.randn(channels, generator=generator))
        self.frequency_shift = nn.Parameter(SHIFT * torch.randn(channels, states, generator=generator))
        self.log_decay = nn.Parameter(torch.full((channels, states), math.log(0.5)))
        ones = torch.stack([torch.ones(channels, states), torch.zeros(channels, states)], -1)
        self.input_weight = nn.Parameter(ones)
        self.output_weight = nn.Parameter(torch.randn(channels, states, 2, generator=generator) * states**-0.5)
        self.skip = nn.Parameter(torch.randn(channels, generator=generator))

    @property
    def dt(self) -> Tensor:
        """Time steps ``(channels,)``, in float32."""
        return (self.first_log_dt.float() + self.dt_shift.float()).exp()

    @property
    def frequency(self) -> Tensor:
        """``w``, ``(channels, states)``, in float32."""
        return self.first_frequency.float() * self.frequency_shift.float().exp()

    def discrete(self) -> tuple[Tensor, Tensor]:
        """``Abar`` and ``C Bbar``, complex ``(channels, states)``."""
        dt_a, gain = self._exponents()
        return dt_a.exp(), gain

    def _exponents(self) -> tuple[Tensor, Tensor]:
        """``log Abar`` and ``C Bbar``."""
        a = torch.complex(-self.log_decay.float().exp(), self.frequency)
        dt_a = self.dt[:, None] * a
        weights = torch.view_as_complex(self.input_weight.float()) * torch.view_as_complex(self.output_weight.float())
        return dt_a, torch.expm1(dt_a) / a * weights

    def kernel(self, frames: int) -> Tensor:
        """What an impulse leaves after 0 to ``frames - 1`` frames, ``(channels, frames)``, without the skip."""
        dt_a, gain = self._exponents()
        steps = torch.arange(frames, device=dt_a.device, dtype=torch.float32)
        powers = (dt_a[..., None] * steps).exp()
        return (gain[..., None] * powers).real.sum(1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of all frames ``(batch, frames, channels)`` at once, by FFT, in float32."""
        x = x.float()
        frames = x.shape[1]
        spectrum = torch.fft.rfft(self.kernel(frames), 2 * frames).T
        mixed = torch.fft.irfft(torch.fft.rfft(x, 2 * frames, dim=1) * spectrum, 2 * frames, dim=1)
        return mixed[:, :frames] + self.skip.float() * x

    def start(self, batch: int) -> Tensor:
        """The state before the first frame: zeros ``(batch, channels, states)``, complex."""
        return torch.zeros(batch, *self.log_decay.shape, dtype=torch.complex64, device=self.log_decay.device)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Output ``(batch, channels)`` of one frame in float32, and the state after it.

        The state is that of a system whose ``C`` went into ``Bbar``.
        """
        x = x.float()
        decay, gain = self.discrete()
        state = decay * state + gain * x[..., None]
        return state.real.sum(-1) + self.skip.float() * x, state


class MultiHeadSSM(nn.Module):
    """State space layers in heads that see different spans of time, half of which gate the other half.

    Inputs are projected to `heads`; each passes its own `layers` of diagonal systems, and the output is
    ``W (y_1 * gelu(y_2))`` with the first half of the heads ``y_1`` and the second ``y_2``. Heads start with time steps
    of 0.001 to 0.1, even in the logarithm in each half, so that every span gates its like. Source: Fathullah et al.
    (2023), arXiv 2305.12498.

    Args:
        dim: features ``(batch, frames, dim)``; a multiple of `heads`.
        heads: an even number.
        state_size: complex states of each channel.
        bidirectional: adds systems that run from the last frame to the first; no `step` then.
        layers: systems in a row.
        generator: of the first weights; seed 0 if left out.

    Raises:
        InputError: a number out of its range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        state_size: int = 16,
        bidirectional: bool = False,
        layers: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if heads < 2 or heads % 2 or dim % heads:
            raise InputError(f"heads: got {heads} for dim {dim}, expected an even number that divides it")
        if state_size < 1 or layers < 1:
            raise InputError(f"state_size, layers: got {state_size}, {layers}, expected at least 1")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.dim, self.heads, self.bidirectional = dim, heads, bidirectional
        self.project_in = _linear(dim, dim, generator)
        self.project_out = _linear(dim // 2, dim, generator)
        low, high = (math.log10(value) for value in DT_RANGE)
        spans = torch.logspace(low, high, heads // 2) if heads > 2 else torch.tensor([10 ** ((low + high) / 2)])
        dt = spans.repeat(2).repeat_interleave(dim // heads)
        self.forwards = nn.ModuleList(DiagonalSSM(dt, state_size, generator) for _ in range(layers))
        self.backwards = nn.ModuleList(
            DiagonalSSM(dt, state_size, generator) for _ in range(layers if bidirectional else 0)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Outputs of the shape of `x` ``(batch, frames, dim)``.

        Args:
            x: features.
            mask: True at real frames ``(batch, frames)``; needed where frames are padded and both directions run.
        """
        inputs = self.project_in(x)
        if mask is not None:
            inputs = inputs * mask[..., None]
        values = inputs
        for system in self.forwards:
            values = system(values)
        if self.bidirectional:
            turned = inputs.flip(1)
            for system in self.backwards:
                # Frames behind the end come first here: they must leave nothing behind, which zeros do.
                turned = system(turned)
            values = values + turned.flip(1)
        return self._gate(values, x)

    def scan(self, x: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The same frame by frame: outputs, and the state from which the next frames go on.

        Raises:
            InputError: both directions run.
        """
        outputs = []
        for frame in x.unbind(1):
            output, state = self.step(frame, state)
            outputs.append(output)
        return torch.stack(outputs, 1), self.start(x.shape[0]) if state is None else state

    def start(self, batch: int) -> list[Tensor]:
        """The state before the first frame, one tensor for each of the layers.

        Raises:
            InputError: both directions run.
        """
        if self.bidirectional:
            raise InputError(
                "step: a bidirectional layer needs all frames; build it with bidirectional=False to stream"
            )
        return [system.start(batch) for system in self._systems()]

    def step(self, x: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Output ``(batch, dim)`` of one frame, and the state after it; None starts anew.

        Raises:
            InputError: both directions run.
        """
        state = self.start(x.shape[0]) if state is None else state
        values, after = self.project_in(x), []
        for system, before in zip(self._systems(), state, strict=True):
            values, own = system.step(values, before)
            after.append(own)
        return self._gate(values, x), after

    def _systems(self) -> list[DiagonalSSM]:
        return [system for system in self.forwards if isinstance(system, DiagonalSSM)]

    def _gate(self, values: Tensor, like: Tensor) -> Tensor:
        first, second = values.chunk(2, -1)
        output: Tensor = self.project_out((first * F.gelu(second)).to(like.dtype))
        return output


def _linear(in_: int, out: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, in_, out, device="cpu")
    bound = in_**-0.5
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer
