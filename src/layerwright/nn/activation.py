"""Quantizers of activations: one affine grid, logarithmic grids for probabilities, two grids for long tails.

Each rounds to `bits`-bit codes and computes on with the values they stand for, so that quality is that of integer
arithmetic; what is stored for it are a scale and a zero point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.attached import Attachment
from layerwright.nn.quantizer import fake_quantize, find_scale, grid
from layerwright.nn.two_regions import choose_region

__all__ = ["ActivationQuantizer", "InputQuantizer", "round_log2", "round_log_sqrt2", "round_two_regions"]

Grid = Literal["uniform", "log2", "log_sqrt2", "two_region"]
Share = Literal["tensor", "channel", "token"]


def round_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """``scale * 2**-q`` with ``q = round(-log2(x / scale))`` from 0 to ``2**bits - 1``, for `x` of 0 and above.

    What would need a larger code becomes 0. Gradients pass straight through up to `scale`, and are zero above it.
    """
    codes = (-torch.log2((x / scale).clamp(min=1e-30))).round()
    values = scale * torch.exp2(-codes.clamp(min=0))
    return _straight_through(x, values.masked_fill(codes >= 1 << bits, 0.0), scale)


def round_log_sqrt2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """As `round_log2` with steps of the square root of 2: ``q = round(-2 log2(x / scale))``.

    Written with powers of two and one constant factor for odd codes, ``scale * 2**-ceil(q/2) * (sqrt(2) if q is odd)``,
    as integer hardware computes it (Li et al., 2023, RepQ-ViT).
    """
    codes = (-2 * torch.log2((x / scale).clamp(min=1e-30))).round()
    clamped = codes.clamp(min=0)
    odd = 1 + (clamped % 2) * (math.sqrt(2) - 1)
    values = scale * torch.exp2(-(clamped / 2).ceil()) * odd
    return _straight_through(x, values.masked_fill(codes >= 1 << bits, 0.0), scale)


def round_two_regions(x: Tensor, scale: Tensor, bits: int, ratio: int, *, signed: bool) -> Tensor:
    """Two uniform grids whose steps differ by ``2**ratio``: the small values keep a fine one (Tai et al., 2023).

    One bit of the code says which grid. The fine one has the step `scale`: codes ``0 .. 2**(bits-1) - 1``, or
    ``-2**(bits-2) .. 2**(bits-2) - 1`` if `signed`. The coarse one has ``scale * 2**ratio`` and codes
    ``0 .. 2**(bits-1) - 1``. A value takes the grid that comes nearer to it, the fine one if they tie.
    """
    half = 1 << (bits - 1)
    coarse = scale * 2.0**ratio
    far, place = choose_region(x, scale, bits, ratio, signed=signed)
    low = -(half // 2) * scale if signed else 0.0
    return _straight_through(x, torch.where(far, place * coarse, place * scale), coarse * (half - 1), low)


def _straight_through(x: Tensor, values: Tensor, high: Tensor, low: Tensor | float = 0.0) -> Tensor:
    if not (x.requires_grad and torch.is_grad_enabled()):
        return values
    inside = torch.minimum(torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device)), high)
    return inside + (values - inside).detach()


class ActivationQuantizer(nn.Module):
    """Rounds activations to a grid of `bits` bits and returns the values of the codes, in the dtype it was given.

    Args:
        bits: 2 to 8.
        kind: `uniform` (affine), `log2` or `log_sqrt2` (for values from 0 to 1), or `two_region`.
        share: what has a scale of its own: the `tensor`; each `channel` (the last dimension, `channels` of them); each
            `token` (all but the last dimension; found anew in every call, nothing is stored).
        symmetric: no zero point; uniform only.
        channels: size of the last dimension where `share` is `channel`.
        ratio: of the two regions' steps, as a power of two.
        signed: two regions: whether the fine one has negative codes.

    Buffers (none for `token`): `scale` float32 ``(1,)`` or ``(channels,)``; `zero` int8 of that shape where uniform and
    not symmetric.
    """

    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self,
        bits: int,
        kind: Grid = "uniform",
        share: Share = "tensor",
        *,
        symmetric: bool = False,
        channels: int = 0,
        ratio: int = 0,
        signed: bool = False,
    ) -> None:
        super().__init__()
        grid(bits)  # refuses what is no width
        if kind != "uniform" and share != "tensor":
            raise InputError(f"share: got {share!r} for a {kind} grid, expected 'tensor'")
        if share == "channel" and channels < 1:
            raise InputError(f"channels: got {channels}, expected the size of the last dimension")
        if kind == "two_region" and bits < 3:
            raise InputError(f"bits: got {bits} for two regions, expected at least 3 (one bit says which region)")
        self.bits, self.kind, self.share, self.symmetric = bits, kind, share, symmetric
        self.channels, self.ratio, self.signed = channels, ratio, signed
        count = channels if share == "channel" else 1
        stored = share != "token"
        self.register_buffer("scale", torch.ones(count) if stored else None)
        asymmetric = stored and kind == "uniform" and not symmetric
        self.register_buffer("zero", torch.zeros(count, dtype=torch.int8) if asymmetric else None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def set_(self, scale: Tensor, zero: Tensor | None = None) -> Self:
        """Take `scale` and `zero` over, in place.

        Raises:
            InputError: scales that are not positive numbers, shapes that do not fit, a zero point where there is none.
        """
        if self.scale is None or (zero is None) != (self.zero is None):
            raise InputError(f"{self}: expected {'no ' if self.zero is None else 'a '}zero point and a stored scale")
        if scale.numel() != self.scale.numel() or not bool((scale.isfinite() & (scale > 0)).all()):
            raise InputError(f"scale: expected {self.scale.numel()} positive numbers, got shape {tuple(scale.shape)}")
        self.scale = scale.detach().float().reshape(self.scale.shape).clone()
        if zero is not None and self.zero is not None:
            self.zero = zero.detach().to(torch.int8).reshape(self.zero.shape).clone()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`x` ``(..., channels)`` rounded; gradients pass straight through the rounding (Bengio et al., 2013)."""
        if not x.numel():
            return x
        wide = x.float()
        if self.scale is None:
            scale, zero = find_scale(wide.detach(), self.bits, -1, self.symmetric)
            return fake_quantize(wide, scale, zero, self.bits).to(x.dtype)
        if self.kind == "uniform":
            if self.share == "channel":
                return fake_quantize(wide, self.scale, self.zero, self.bits).to(x.dtype)
            zero = None if self.zero is None else self.zero.reshape(())
            return fake_quantize(wide, self.scale.reshape(()), zero, self.bits).to(x.dtype)
        if self.kind == "two_region":
            rounded = round_two_regions(wide, self.scale, self.bits, self.ratio, signed=self.signed)
        elif self.kind == "log2":
            rounded = round_log2(wide, self.scale, self.bits)
        else:
            rounded = round_log_sqrt2(wide, self.scale, self.bits)
        return rounded.to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Scales stay float32 whatever the model becomes."""
        before = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale = before.to(self.scale.device) if before.device.type != "meta" else self.scale.float()
        return self

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {
            "type": "activation_quantizer",
            "bits": self.bits,
            "kind": self.kind,
            "share": self.share,
            "symmetric": self.symmetric,
            "channels": self.channels,
            "ratio": self.ratio,
            "signed": self.signed,
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> ActivationQuantizer:
        """A quantizer of that form."""
        settings = {k: v for k, v in spec.items() if k not in ("type", "bits", "kind", "share")}
        return cls(spec["bits"], spec["kind"], spec["share"], **settings)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"bits={self.bits}, {self.kind}, per {self.share}"


class InputQuantizer(Attachment):
    """Rounds what a layer reads (its first argument), wherever the model calls that layer."""

    child = "input_quantizer"

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same arguments with the first one rounded."""
        if args:
            return (self.quantizer(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.quantizer(kwargs[name])}

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form."""
        return {"type": "input_quantizer", "quantizer": self.quantizer.spec()}

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """An attachment of that form."""
        return cls(ActivationQuantizer.empty(spec["quantizer"]))
