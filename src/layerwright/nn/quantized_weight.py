"""A weight stored as packed integer codes with scales."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.nn.kernels import Int4Weight, Int8Weight, build_kernel, int8_matmul
from layerwright.nn.packing import pack, unpack, word_columns
from layerwright.nn.quantizer import quantize, quantize_tokens
from layerwright.nn.stored import Stored
from layerwright.nn.treated import TreatedWeight, dtype_name, owned

__all__ = ["QuantizedWeight", "quantize_from_data", "quantize_to_data", "quantized_activations", "scaled_codes"]

_READ_CODES = 1 << 18
"""Codes that are turned into numbers at once, so that they stay in a core's cache."""


class QuantizedWeight(TreatedWeight):
    """``w = (code - zero) * scale``, codes packed along each row, a scale (and zero point) per row and group.

    Buffers (a stack has ``count`` in front): ``weight_packed`` int32 ``(out, words)``, or ``weight`` int8 ``(out, in)``
    where activations are integers too (W8A8); ``weight_scale`` ``(out, groups)``; ``weight_zero`` int8
    ``(out, groups)`` if asymmetric; ``input_scale`` ``()`` if activations have a static scale. Together they take
    exactly `layerwright.core.storage.stored_bytes`, and `input_scale` one element more.

    Memory: on a CPU in bfloat16 the first product builds the processor's own form of the codes (`build_kernel`), which
    then stays next to the buffers: another 4 bits per weight up to 4 bits, 8 bits above. It is never saved or copied.
    No dense weight outlives a call.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        quantize: Quantize,
        dtype: torch.dtype,
        *,
        static: bool = False,
        stacked: bool = False,
    ) -> None:
        super().__init__(shape, stacked=stacked)
        group = self.columns if quantize.group_size == -1 else quantize.group_size
        if group < 1 or self.columns % group:
            raise InputError(f"group_size: {group} does not divide the {self.columns} inputs; use a divisor, or -1")
        self.quantize = quantize
        lead = shape[:2] if stacked else shape[1:2]
        groups = self.columns // group
        if (
            quantize.act_bits
        ):  # the name that int-quantized checkpoints use; the property `weight` of the class is another
            self._buffers["weight"] = torch.empty(*lead, self.columns, dtype=torch.int8)
        else:
            words = word_columns(self.columns, quantize.bits)
            self.register_buffer("weight_packed", torch.empty(*lead, words, dtype=torch.int32))
        self.weight_scale: Tensor
        self.weight_zero: Tensor | None
        self.input_scale: Tensor | None
        self.register_buffer("weight_scale", torch.empty(*lead, groups, dtype=dtype))
        self.register_buffer(
            "weight_zero", None if quantize.symmetric else torch.empty(*lead, groups, dtype=torch.int8)
        )
        self.register_buffer("input_scale", torch.empty((), dtype=dtype) if static else None)
        self._kernels: dict[int, Int4Weight | Int8Weight | None] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is computed with."""
        return self.weight_scale.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight_scale.device

    def forget(self) -> None:
        """Drop the processor's own forms of the weight."""
        self._kernels = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernels": {}}

    @torch.no_grad()
    def fill_(self, stored: Stored) -> None:
        """Take over the codes and scales of `stored`, whose shape must be this module's."""
        codes, scale = stored.codes, stored.scale
        if codes is None or scale is None or stored.mask is not None:
            raise InputError("stored: expected codes and a scale without a mask")
        rows = codes.reshape(-1, self.columns)
        name = "weight" if self.quantize.act_bits else "weight_packed"
        stream = self._buffers[name]
        assert stream is not None
        packed = rows if self.quantize.act_bits else pack(rows, self.quantize.bits)
        self._buffers[name] = owned(packed, stream.dtype, stream.shape)
        self.weight_scale = owned(scale, self.dtype, self.weight_scale.shape)
        if self.weight_zero is not None:
            if stored.zero is None:
                raise InputError("stored: an asymmetric weight has no zero points")
            self.weight_zero = owned(stored.zero, torch.int8, self.weight_zero.shape)
        if self.input_scale is not None and stored.input_scale is not None:
            self.input_scale = owned(stored.input_scale, self.dtype, ())
        self.forget()

    @torch.no_grad()
    def set_scale_(self, scale: Tensor, weight: Tensor | None = None) -> None:
        """Take over `scale` ``(out, groups)`` (a stack: ``(count, out, groups)``), rounded to the dtype it is stored in.

        With `weight` ``(out, in)`` (a stack: ``(count, out, in)``) its codes are found anew on the new grid; without,
        codes stay as they are. Zero points stay in both. Buffers are replaced, so that copies that share them keep theirs.

        Raises:
            InputError: another shape, or scales that are not positive numbers.
        """
        if scale.shape != self.weight_scale.shape or not bool((scale.isfinite() & (scale > 0)).all()):
            raise InputError(
                f"scale: expected positive numbers {tuple(self.weight_scale.shape)}, got {tuple(scale.shape)}, "
                f"smallest {float(scale.min()) if scale.numel() else 'none'}"
            )
        if weight is not None and weight.shape != (*scale.shape[:-1], self.columns):
            raise InputError(f"weight: got {tuple(weight.shape)}, expected {(*scale.shape[:-1], self.columns)}")
        self.weight_scale = owned(scale, self.dtype, self.weight_scale.shape)
        if weight is not None:
            codes = quantize(weight.float(), self.weight_scale.float(), self.weight_zero, self.quantize.bits)
            name = "weight" if self.quantize.act_bits else "weight_packed"
            stream = self._buffers[name]
            assert stream is not None
            rows = codes.reshape(-1, self.columns)
            packed = rows if self.quantize.act_bits else pack(rows, self.quantize.bits)
            self._buffers[name] = owned(packed, stream.dtype, stream.shape)
        self.forget()

    def codes(self, part: int, start: int, stop: int) -> Tensor:
        """Signed codes of rows ``start:stop`` of matrix `part`, int8 ``(stop - start, columns)``."""
        rows = self._rows("weight" if self.quantize.act_bits else "weight_packed", part, start, stop)
        assert rows is not None
        return rows if self.quantize.act_bits else unpack(rows, self.quantize.bits, self.columns)

    def read_rows(self, part: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:stop`` of matrix `part`, dense in `dtype`."""
        dense = torch.empty(stop - start, self.columns, dtype=dtype, device=self.device)
        step = max(1, _READ_CODES // max(1, self.columns))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            scale = self._rows("weight_scale", part, first, last)
            zero = self._rows("weight_zero", part, first, last)
            assert scale is not None
            scaled_codes(self.codes(part, first, last), scale, zero, dense[first - start : last - start])
        return dense

    def multiply(self, x: Tensor, bias: Tensor | None, part: int) -> Tensor:
        """``x @ W.T + bias`` the fastest way for that many rows; see `TreatedWeight.multiply`."""
        if self.quantize.act_bits:
            return self._multiply_integers(x, bias, part)
        kernel = self._kernel(part) if x.dtype == torch.bfloat16 and x.device.type == "cpu" else None
        if kernel is None or x.shape[0] > kernel.max_rows:
            return super().multiply(x, bias, part)
        y = kernel(x)
        return y if bias is None else y + bias.to(y.dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None, part: int = 0) -> Tensor:
        """As `TreatedWeight.linear`."""
        if self.input_scale is not None and x.requires_grad:  # no gradient where a static range clamps
            scale = float(self.input_scale)
            x = x.clamp(-128 * scale, 127 * scale)
        return super().linear(x, bias, part)

    def _multiply_integers(self, x: Tensor, bias: Tensor | None, part: int) -> Tensor:
        codes, scale = quantized_activations(x, self.input_scale)
        if x.device.type != "cpu":  # other devices restrict the shapes of integer products
            return super().multiply((codes * scale).to(x.dtype), bias, part)
        weight_scale = self._rows("weight_scale", part, 0, self.rows)
        assert weight_scale is not None
        y = int8_matmul(codes, scale, self.codes(part, 0, self.rows), weight_scale, x.dtype)
        return y if bias is None else y.add_(bias.to(y.dtype))

    def _kernel(self, part: int) -> Int4Weight | Int8Weight | None:
        if part not in self._kernels:
            packed = self._rows("weight_packed", part, 0, self.rows)
            scale = self._rows("weight_scale", part, 0, self.rows)
            zero = self._rows("weight_zero", part, 0, self.rows)
            assert packed is not None
            assert scale is not None
            self._kernels[part] = build_kernel(packed, scale, zero, self.quantize.bits, self.columns)
        return self._kernels[part]

    def _rows(self, name: str, part: int, start: int, stop: int) -> Tensor | None:
        values = self._buffers[name]
        if values is None:
            return None
        return (values[part] if self.stacked else values)[start:stop]

    def _weight_spec(self) -> dict[str, Any]:
        return {
            "quantize": quantize_to_data(self.quantize),
            "dtype": dtype_name(self.dtype),
            "static": self.input_scale is not None,
        }


def scaled_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> None:
    """Write ``(codes - zero) * scale`` into `out`, ``(rows, columns)``; `scale` and `zero` are ``(rows, groups)``.

    In the scale's own dtype the product of a code and a scale is rounded once, as from float32, so that the wider
    detour of `layerwright.nn.quantizer.dequantize` gives the same bits four times slower.
    """
    compute = (
        out if out.dtype == scale.dtype else torch.empty_like(out, dtype=torch.promote_types(out.dtype, scale.dtype))
    )
    shape = (codes.shape[0], scale.shape[1], codes.shape[1] // scale.shape[1])
    grouped = compute.view(shape)
    grouped.copy_(codes.view(shape))
    if zero is not None:
        grouped -= zero.unsqueeze(-1)
    grouped *= scale.unsqueeze(-1)
    if compute is not out:
        out.copy_(compute)


def quantized_activations(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes of `x` ``(M, in)`` and their scale: `scale` if it is static, else one per row ``(M, 1)``."""
    if scale is None:
        return quantize_tokens(x)
    return quantize(x, scale.float(), None, 8), scale.float()


def quantize_to_data(quantize: Quantize) -> dict[str, Any]:
    """Plain data of the settings."""
    return dataclasses.asdict(quantize)


def quantize_from_data(data: dict[str, Any]) -> Quantize:
    """The inverse of `quantize_to_data`.

    Raises:
        InputError: unknown or wrong settings.
    """
    try:
        return Quantize(**data)
    except TypeError as error:
        raise InputError(f"quantize: {error}") from error
