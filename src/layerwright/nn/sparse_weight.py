"""A weight stored as a bit mask and the values, or codes, that the mask keeps."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.nn.packing import mask_columns, pack, pack_mask, unpack, unpack_mask, word_columns
from layerwright.nn.quantized_weight import quantize_to_data, quantized_activations, scaled_codes
from layerwright.nn.stored import Stored
from layerwright.nn.treated import TreatedWeight, dtype_name, owned

__all__ = ["SparseWeight", "expand_rows"]

_READ_VALUES = 1 << 19
"""Weights that are put in their places at once."""


class SparseWeight(TreatedWeight):
    """Kept values in one flat array, in the order of the mask's set bits, row after row.

    Buffers: ``weight_mask`` uint8 ``(out, ceil(in / 8))``, a stack has ``count`` in front; then either
    ``weight_values`` ``(kept,)``, or ``weight_packed`` int32 ``(words,)`` with ``weight_scale`` and ``weight_zero`` as
    in `layerwright.nn.quantized_weight.QuantizedWeight`; ``input_scale`` if activations have a static scale. Together
    they take exactly `layerwright.core.storage.stored_bytes` of the sparsity that the mask has.

    **Bytes shrink; on a CPU time shrinks only for very sparse weights.** Where a compressed-row copy (8 bytes per kept
    weight) and the stored form together stay below the dense bytes, that is above about 68 % zeros in float32 and 81 %
    in bfloat16 and float16, the first product builds that copy and later ones use it; measured at 2048 x 2048 and one
    thread against a dense float32 product, 1 and 16 rows: 75 % zeros 0.8x and 0.5x of its time, 90 % zeros 0.25x and
    0.2x. Anything less sparse is expanded for every call, about 5 ns per weight, which is many times slower than a
    dense product at few input rows (0.15 ns per weight at one row) and disappears only with thousands of rows. Where
    that time matters and memory does not, set `keep_dense`: the first product then keeps the expanded weight.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        kept: int,
        quantize: Quantize | None,
        dtype: torch.dtype,
        *,
        static: bool = False,
        stacked: bool = False,
    ) -> None:
        super().__init__(shape, stacked=stacked)
        self.kept, self.quantize = kept, quantize
        self.keep_dense = False
        lead = shape[:2] if stacked else shape[1:2]
        self.weight_mask: Tensor
        self.weight_values: Tensor | None
        self.weight_packed: Tensor | None
        self.weight_scale: Tensor | None
        self.weight_zero: Tensor | None
        self.input_scale: Tensor | None
        self.register_buffer("weight_mask", torch.empty(*lead, mask_columns(self.columns), dtype=torch.uint8))
        self.register_buffer("weight_values", None)
        for name in ("weight_packed", "weight_scale", "weight_zero"):
            self.register_buffer(name, None)
        self.register_buffer("input_scale", torch.empty((), dtype=dtype) if static else None)
        if quantize is None:
            self.weight_values = torch.empty(kept, dtype=dtype)
        else:
            group = self.columns if quantize.group_size == -1 else quantize.group_size
            if group < 1 or self.columns % group:
                raise InputError(f"group_size: {group} does not divide the {self.columns} inputs; use a divisor, or -1")
            self.weight_packed = torch.empty(word_columns(kept, quantize.bits), dtype=torch.int32)
            self.weight_scale = torch.empty(*lead, self.columns // group, dtype=dtype)
            if not quantize.symmetric:
                self.weight_zero = torch.empty(*lead, self.columns // group, dtype=torch.int8)
        self._derived: dict[int | str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is computed with."""
        return self._values().dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight_mask.device

    def logical_parameters(self) -> int:
        """The weights that the mask keeps, and the bias."""
        bias = self._buffers.get("bias")
        return self.kept + (0 if bias is None else bias.numel())

    def forget(self) -> None:
        """Drop the processor's own forms of the weight."""
        self._derived = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_derived": {}}

    @torch.no_grad()
    def fill_(self, stored: Stored) -> None:
        """Take over mask and values of `stored`, whose shape and number of kept weights must be this module's."""
        if stored.mask is None:
            raise InputError("stored: expected a mask")
        mask = stored.mask.reshape(-1, self.columns)
        self.weight_mask = pack_mask(mask).reshape(self.weight_mask.shape)
        if self.quantize is None:
            if stored.dense is None:
                raise InputError("stored: expected a dense weight with its mask")
            self.weight_values = stored.dense.reshape(-1, self.columns)[mask].to(self.dtype)
        else:
            if stored.codes is None or stored.scale is None or self.weight_scale is None:
                raise InputError("stored: expected codes and a scale with their mask")
            kept = stored.codes.reshape(-1, self.columns)[mask]
            self.weight_packed = pack(kept.unsqueeze(0), self.quantize.bits)[0]
            self.weight_scale = owned(stored.scale, self.dtype, self.weight_scale.shape)
            if self.weight_zero is not None and stored.zero is not None:
                self.weight_zero = owned(stored.zero, torch.int8, self.weight_zero.shape)
        if self.input_scale is not None and stored.input_scale is not None:
            self.input_scale = owned(stored.input_scale, self.dtype, ())
        self.forget()

    def read_rows(self, part: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:stop`` of matrix `part`, dense in `dtype`."""
        dense = torch.empty(stop - start, self.columns, dtype=dtype, device=self.device)
        step = max(1, _READ_VALUES // max(1, self.columns))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            self._read_piece(part * self.rows + first, part * self.rows + last, dense[first - start : last - start])
        return dense

    def multiply(self, x: Tensor, bias: Tensor | None, part: int) -> Tensor:
        """``x @ W.T + bias`` the fastest way for that many rows; see `TreatedWeight.multiply`."""
        if self.quantize is not None and self.quantize.act_bits:
            codes, scale = quantized_activations(x, self.input_scale)
            x = (codes * scale).to(x.dtype)
        if self.keep_dense:
            if part not in self._derived:
                self._derived[part] = self.matrix(part)
            y = x @ self._derived[part].to(x.dtype).t()
        elif x.device.type == "cpu" and x.shape[0] and self._compressed_rows_pay():
            if part not in self._derived:
                self._derived[part] = _compressed_rows(self.matrix(part, torch.float32))
            y = _sparse_product(self._derived[part], x)
        else:
            return super().multiply(x, bias, part)
        return y if bias is None else y + bias.to(y.dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None, part: int = 0) -> Tensor:
        """As `TreatedWeight.linear`."""
        if self.input_scale is not None and x.requires_grad:  # no gradient where a static range clamps
            scale = float(self.input_scale)
            x = x.clamp(-128 * scale, 127 * scale)
        return super().linear(x, bias, part)

    def _compressed_rows_pay(self) -> bool:
        stored = sum(buffer.nbytes for buffer in self._buffers.values() if buffer is not None)
        copy = 8 * self.kept + 4 * self.count * (self.rows + 1)
        return stored + copy < self.count * self.rows * self.columns * self.dtype.itemsize

    def _read_piece(self, first: int, last: int, out: Tensor) -> None:
        """Write rows ``first:last`` of all matrices one above the other into `out`."""
        offsets = self._offsets()
        begin, end = int(offsets[first]), int(offsets[last])
        mask = self.weight_mask.view(-1, self.weight_mask.shape[-1])[first:last]
        if self.quantize is None:
            assert self.weight_values is not None
            out.copy_(expand_rows(mask, self.weight_values[begin:end], self.columns))
            return
        assert self.weight_packed is not None
        assert self.weight_scale is not None
        bits, aligned = self.quantize.bits, begin // 32 * 32
        words = self.weight_packed[aligned * bits // 32 : word_columns(end, bits)]
        codes = unpack(words.unsqueeze(0), bits, end - aligned)[0, begin - aligned :]
        scale = self.weight_scale.view(-1, self.weight_scale.shape[-1])[first:last]
        zero = None if self.weight_zero is None else self.weight_zero.view(-1, scale.shape[1])[first:last]
        scaled_codes(expand_rows(mask, codes, self.columns), scale, zero, out)
        if zero is not None:
            out.masked_fill_(~unpack_mask(mask, self.columns), 0)

    def _offsets(self) -> Tensor:
        """Position in the flat array at which each row begins, int64 ``(count * out + 1,)``; 8 bytes per row, kept."""
        if "offsets" not in self._derived:
            kept = _tables(self.device)[0][self.weight_mask.view(-1, self.weight_mask.shape[-1]).int()].sum(1)
            self._derived["offsets"] = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).cpu()
        return self._derived["offsets"]

    def _values(self) -> Tensor:
        values = self.weight_values if self.quantize is None else self.weight_scale
        assert values is not None
        return values

    def _weight_spec(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "quantize": None if self.quantize is None else quantize_to_data(self.quantize),
            "dtype": dtype_name(self.dtype),
            "static": self.input_scale is not None,
        }


def expand_rows(mask: Tensor, values: Tensor, columns: int) -> Tensor:
    """Put `values` where the mask's bits are set, zeros elsewhere: ``(rows, columns)`` in the dtype of `values`.

    Each byte of the mask is looked up in tables of ranks, so that every weight is one gather; twice as fast as
    ``masked_scatter``.

    Args:
        mask: uint8 ``(rows, ceil(columns / 8))``, see `layerwright.nn.packing.pack_mask`.
        values: ``(kept,)``, row after row.
        columns: weights per row.
    """
    population, rank, bits = _tables(mask.device)
    byte = mask.reshape(-1).int()
    kept = population.index_select(0, byte)
    before = kept.cumsum(0, dtype=torch.int32) - kept + 1
    index = rank.index_select(0, byte).add_(before.unsqueeze(1)).mul_(bits.index_select(0, byte))
    padded = torch.nn.functional.pad(values, (1, 0))  # pruned weights read the zero in front
    dense = padded.index_select(0, index.view(-1)).view(mask.shape[0], 8 * mask.shape[1])
    return dense[:, :columns]


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each byte: how many bits are set ``(256,)``, how many below each bit ``(256, 8)``, and the bits."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    bits = (byte.unsqueeze(1) >> torch.arange(8, dtype=torch.int32, device=device)) & 1
    rank = bits.cumsum(1, dtype=torch.int32) - bits
    return bits.sum(1, dtype=torch.int32), rank, bits


def _compressed_rows(dense: Tensor) -> Tensor:
    """`dense` float32 ``(rows, columns)`` in compressed rows with 32-bit indices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        wide = dense.to_sparse_csr()
        return torch.sparse_csr_tensor(
            wide.crow_indices().int(), wide.col_indices().int(), wide.values(), dense.shape, check_invariants=False
        )


def _sparse_product(weight: Tensor, x: Tensor) -> Tensor:
    """``x @ weight.T`` for compressed rows `weight`, summed in float32, in the dtype of `x`."""
    wide = x.float()
    y = weight.mv(wide[0]).unsqueeze(0) if x.shape[0] == 1 else (weight @ wide.t()).t()
    return y.to(x.dtype).contiguous()
