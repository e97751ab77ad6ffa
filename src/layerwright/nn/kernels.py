"""Integer products of PyTorch's CPU library, and the forms in which they want a weight.

Three products are used. ``int4`` (weights of at most 4 bits, a scale per group) and ``int8`` (5 to 8 bits, a scale per
row) multiply bfloat16 inputs, read the weight in its codes and accumulate in float32; grouped weights of 5 to 8 bits
become two planes of 4 bits, one above the other, in one ``int4`` product. ``int8 x int8`` is exact. In float32 and
float16 the first two fall into scalar code many times slower than a dense product, so they are not used there.

Their weight layout belongs to the running processor. It is built when first needed, held next to the stored codes and
never saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.nn.packing import unpack

__all__ = [
    "INT4_MAX_ROWS",
    "INT8_MAX_ROWS",
    "PLANES_MAX_ROWS",
    "Int4Weight",
    "Int8Weight",
    "build_kernel",
    "int8_matmul",
]

INT4_MAX_ROWS = 192
"""Input rows up to which the ``int4`` product beats a dense copy made for the call and multiplied in bfloat16.

Measured on AVX-512 without AMX, one thread of a busy machine, best of 12 in turn, 2048 x 2048 (ms of kernel / dense
copy and product): 1 row 0.4 / 6.7, 64 rows 9 / 20, 128 rows 27 / 32, 192 rows 40 / 43, 256 rows 49 / 51; 5632 x 2048
crosses between 192 and 256 too. A processor with AMX multiplies dense bfloat16 faster and would cross earlier; that
was not measured."""

INT8_MAX_ROWS = 128
"""The same for the ``int8`` product: 1 row 0.6 / 9, 64 rows 17 / 23, 128 rows 33 / 37, 256 rows 58 / 46."""

PLANES_MAX_ROWS = 32
"""The same for two planes of 4 bits: 1 row 0.65 / 4.8, 24 rows 6.3 / 8.5, 32 rows 11 / 13, 64 rows 22 / 16."""

_GROUPS = (256, 128, 64, 32)
_ALIGN = 32
_BLOCK_ROWS = 256
_FAST_CPUS = ("AVX2", "AVX512")
_PRODUCT_BYTES = 64 << 20


@dataclass(frozen=True)
class Int4Weight:
    """A weight for the ``int4`` product.

    Attributes:
        packed: uint8 ``(padded rows, planes * columns / 2)`` in the processor's layout.
        scale_offset: bfloat16 ``(planes * groups, padded rows, 2)``; ``w = (code - 8) * scale + offset``.
        group: columns that share a scale.
        rows: rows before padding to a multiple of 16.
        planes: 1, or 2 for codes of more than 4 bits.
    """

    packed: Tensor
    scale_offset: Tensor
    group: int
    rows: int
    planes: int

    @property
    def max_rows(self) -> int:
        """Input rows up to which it should be used."""
        return INT4_MAX_ROWS if self.planes == 1 else PLANES_MAX_ROWS

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self.packed.nbytes + self.scale_offset.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for bfloat16 `x` ``(M, columns)``."""
        x = x.contiguous() if self.planes == 1 else torch.cat((x, x), 1)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, self.scale_offset)
        product: Tensor = y if y.shape[1] == self.rows else y[:, : self.rows]
        return product


@dataclass(frozen=True)
class Int8Weight:
    """A weight for the ``int8`` product: int8 `codes` ``(rows, columns)`` and a bfloat16 `scale` ``(rows,)``."""

    codes: Tensor
    scale: Tensor

    @property
    def max_rows(self) -> int:
        """Input rows up to which it should be used."""
        return INT8_MAX_ROWS

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self.codes.nbytes + self.scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ W.T`` for bfloat16 `x` ``(M, columns)``."""
        product: Tensor = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, self.scale)
        return product


def build_kernel(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int
) -> Int4Weight | Int8Weight | None:
    """The fast form of a packed matrix, or None where no fast product takes it.

    It takes bfloat16 scales on an x86 CPU with AVX2 or AVX-512, columns in multiples of 32, and groups in multiples
    of 32 (a longer group, or a whole row, is cut into equal ones). Memory while building: the result and about seven
    bytes per code of 256 rows.

    Args:
        packed: int32 ``(rows, words)``, see `layerwright.nn.packing.pack`.
        scale: ``(rows, groups)``.
        zero: int8 ``(rows, groups)`` or None.
        bits: 2 to 8.
        columns: codes per row.
    """
    fast = packed.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in _FAST_CPUS
    if not fast or scale.dtype != torch.bfloat16 or not packed.shape[0]:
        return None
    if bits > 4 and scale.shape[1] == 1 and zero is None:
        if columns % _ALIGN:  # the product reads past the end of such rows
            return None
        return Int8Weight(unpack(packed, bits, columns), scale[:, 0].contiguous())
    group = next((size for size in _GROUPS if (columns // scale.shape[1]) % size == 0), 0)
    if not group:
        return None
    planes = _split_scales(scale, zero, 1 if bits <= 4 else 2)
    repeats = columns // (scale.shape[1] * group)
    spare = -packed.shape[0] % 16
    scale_offset = torch.cat([p.repeat_interleave(repeats, 1) for p in planes], 1).transpose(0, 1)
    scale_offset = torch.nn.functional.pad(scale_offset, (0, 0, 0, spare)).contiguous()
    columns_held = len(planes) * columns // 2
    held = torch.empty(packed.shape[0] + spare, columns_held, dtype=torch.uint8)
    for start in range(0, packed.shape[0], _BLOCK_ROWS):
        block = _int4_block(unpack(packed[start : start + _BLOCK_ROWS], bits, columns), len(planes))
        held[start : start + block.shape[0]] = block
    return Int4Weight(held, scale_offset, group, packed.shape[0], len(planes))


def _split_scales(scale: Tensor, zero: Tensor | None, planes: int) -> list[Tensor]:
    """Scale and offset ``(rows, groups, 2)`` of each plane of 4 bits; the offsets add up to ``-zero * scale``.

    One plane holds ``code + 8``. Two planes hold ``code = 16 high + low`` as ``high + 8`` and `low`, both 0 to 15; the
    second offset also takes what rounding to bfloat16 left of the first.
    """
    exact = scale.float()
    wanted = torch.zeros_like(exact) if zero is None else -zero.float() * exact
    first = wanted.to(torch.bfloat16)
    if planes == 1:
        return [torch.stack((scale, first), -1)]
    second = (8 * exact + (wanted - first.float())).to(torch.bfloat16)
    return [torch.stack((16 * scale, first), -1), torch.stack((scale, second), -1)]


def _int4_block(codes: Tensor, planes: int) -> Tensor:
    """Signed codes ``(rows, columns)`` in the processor's layout, rows padded to a multiple of 16."""
    wide = codes.to(torch.int32)
    wide = wide + 8 if planes == 1 else torch.cat(((wide >> 4) + 8, wide & 15), 1)
    spare = -wide.shape[0] % 16
    if spare:
        wide = torch.nn.functional.pad(wide, (0, 0, 0, spare))
    block: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide.contiguous(), 1)
    return block


def int8_matmul(x: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x * x_scale) @ (codes * scale).T`` from an exact integer product, ``(M, rows)`` in `dtype`.

    The int32 sums are scaled in float32. Input rows are taken in pieces whose sums take at most 64 MiB.

    Args:
        x: int8 ``(M, columns)``.
        x_scale: ``(M, 1)`` or a scalar.
        codes: int8 ``(rows, columns)``; at most 131072 columns, so that no sum overflows.
        scale: ``(rows, 1)``.
        dtype: dtype of the result.
    """
    if codes.shape[1] > 1 << 17:
        raise InputError(f"codes: {codes.shape[1]} columns may overflow 32-bit sums; at most {1 << 17}")
    row_scale = scale.view(1, -1).float()
    x_scale = x_scale.float()
    step = max(1, _PRODUCT_BYTES // max(1, 8 * codes.shape[0]))
    if x.shape[0] <= step:
        return (_int_mm(x, codes).float() * x_scale).mul_(row_scale).to(dtype)
    y = x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        y[rows] = (_int_mm(x[rows], codes).float() * (x_scale[rows] if x_scale.ndim else x_scale)).mul_(row_scale)
    return y


def _int_mm(x: Tensor, codes: Tensor) -> Tensor:
    return torch._int_mm(x, codes.t())
