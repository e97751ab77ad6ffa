"""Codes of 2 to 8 bits and bit masks as dense bit streams.

A row of codes is one little-endian bit stream: code ``i`` takes the bits ``[i * bits, (i + 1) * bits)``, after the
offset ``2**(bits - 1)`` has made it unsigned, and the row ends on a 32-bit word. That is the layout ``pack-quantized``
of compressed-tensors 0.20. A period of ``8 / gcd(bits, 8)`` codes fills whole bytes, so that both directions work on
byte planes: at most eight vector operations per plane, none per code.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["mask_columns", "pack", "pack_mask", "unpack", "unpack_mask", "word_columns"]

_CHUNK_CODES = 1 << 20
"""Codes that are worked on at once; temporary memory is about three bytes for each."""


def word_columns(columns: int, bits: int) -> int:
    """Number of 32-bit words that a row of `columns` codes of `bits` bits takes."""
    return (columns * bits + 31) // 32


def mask_columns(columns: int) -> int:
    """Number of bytes that a row of `columns` mask bits takes."""
    return (columns + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes densely along each row.

    Args:
        codes: int8 ``(rows, columns)`` on the grid ``[-2**(bits-1), 2**(bits-1) - 1]``.
        bits: 2 to 8.

    Returns:
        int32 ``(rows, ceil(columns * bits / 32))``; the bits behind the last code are zero.

    Raises:
        InputError: another dtype or shape, bits out of range, or a code outside the grid.
    """
    _check_bits(bits)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise InputError(f"codes: got {codes.dtype} {tuple(codes.shape)}, expected int8 (rows, columns)")
    half = 1 << (bits - 1)
    if codes.numel() and not (-half <= int(codes.min()) and int(codes.max()) < half):
        raise InputError(f"codes: outside the {bits}-bit grid [{-half}, {half - 1}]; clamp them first")
    rows, columns = codes.shape
    words = torch.empty(rows, word_columns(columns, bits), dtype=torch.int32, device=codes.device)
    stream = words.view(torch.uint8)
    step = _chunk_rows(columns)
    for start in range(0, rows, step):
        _pack_bytes(codes[start : start + step], bits, stream[start : start + step])
    return words


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int8 codes ``(rows, columns)`` on the signed grid.

    Args:
        packed: int32 ``(rows, ceil(columns * bits / 32))``.
        bits: 2 to 8.
        columns: codes per row.

    Raises:
        InputError: another dtype, bits out of range, or a width that does not fit `columns`.
    """
    _check_bits(bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != word_columns(columns, bits):
        raise InputError(
            f"packed: got {packed.dtype} {tuple(packed.shape)}, expected int32 (rows, {word_columns(columns, bits)}) "
            f"for {columns} codes of {bits} bits"
        )
    rows = packed.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    step = _chunk_rows(columns)
    for start in range(0, rows, step):
        _unpack_bytes(packed[start : start + step], bits, codes[start : start + step])
    return codes


def pack_mask(mask: Tensor) -> Tensor:
    """Pack bool ``(rows, columns)`` into uint8 ``(rows, ceil(columns / 8))``, the first column in the lowest bit."""
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise InputError(f"mask: got {mask.dtype} {tuple(mask.shape)}, expected bool (rows, columns)")
    rows, columns = mask.shape
    packed = torch.empty(rows, mask_columns(columns), dtype=torch.uint8, device=mask.device)
    step = _chunk_rows(columns)
    for start in range(0, rows, step):
        planes = _padded(mask[start : start + step].view(torch.uint8), 8)
        byte = planes[..., 0].clone()
        for bit in range(1, 8):
            byte |= planes[..., bit] << bit
        packed[start : start + step] = byte
    return packed


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_mask`: bool ``(rows, columns)``."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != mask_columns(columns):
        raise InputError(
            f"packed: got {packed.dtype} {tuple(packed.shape)}, expected uint8 (rows, {mask_columns(columns)})"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts).bitwise_and_(1)
    return bits.view(torch.bool).flatten(1)[:, :columns]


def _pack_bytes(codes: Tensor, bits: int, stream: Tensor) -> None:
    """Write the codes ``(rows, columns)`` into `stream`, uint8 ``(rows, bytes)``."""
    period, width = _period(bits)
    planes = _padded(codes.view(torch.uint8) + (1 << (bits - 1)), period)
    if bits < 8:
        planes.bitwise_and_((1 << bits) - 1)
    packed = torch.zeros(*planes.shape[:2], width, dtype=torch.uint8, device=codes.device)
    for j in range(period):
        byte, shift = divmod(j * bits, 8)
        packed[..., byte] |= planes[..., j] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= planes[..., j] >> (8 - shift)
    flat = packed.flatten(1)
    shared = min(flat.shape[1], stream.shape[1])
    stream[:, :shared] = flat[:, :shared]
    stream[:, shared:] = 0


def _unpack_bytes(packed: Tensor, bits: int, codes: Tensor) -> None:
    """Write the codes of `packed`, int32 ``(rows, words)``, into `codes`, int8 ``(rows, columns)``."""
    rows, columns = codes.shape
    stream = packed.contiguous().view(torch.uint8)
    if bits == 4:  # the common case without strides: spread each byte over two
        spread = stream.to(torch.int16)
        spread |= spread << 4
        spread &= 0x0F0F
        torch.sub(spread.view(torch.int8)[:, :columns], 8, out=codes)
        return
    period, width = _period(bits)
    periods = -(-columns // period)
    if stream.shape[1] < periods * width:
        stream = torch.nn.functional.pad(stream, (0, periods * width - stream.shape[1]))
    planes = stream[:, : periods * width].reshape(rows, periods, width)
    whole = columns == periods * period and codes.is_contiguous()
    out = codes.view(torch.uint8).view(rows, periods, period) if whole else planes.new_empty(rows, periods, period)
    for j in range(period):
        byte, shift = divmod(j * bits, 8)
        target = out[..., j]
        torch.bitwise_right_shift(planes[..., byte], shift, out=target)
        if shift + bits > 8:
            target |= planes[..., byte + 1] << (8 - shift)
    if bits < 8:
        out.bitwise_and_((1 << bits) - 1)
    out -= 1 << (bits - 1)
    if not whole:
        codes.copy_(out.flatten(1)[:, :columns].view(torch.int8))


def _padded(values: Tensor, period: int) -> Tensor:
    """`values` ``(rows, columns)`` as ``(rows, periods, period)``, zeros behind the last column."""
    spare = -values.shape[1] % period
    padded = torch.nn.functional.pad(values, (0, spare)) if spare else values
    return padded.reshape(values.shape[0], padded.shape[1] // period, period)


def _period(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole bytes, and that number of bytes."""
    return 8 // gcd(bits, 8), bits // gcd(bits, 8)


def _chunk_rows(columns: int) -> int:
    return max(1, _CHUNK_CODES // max(1, columns))


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise InputError(f"bits: got {bits!r}, expected a whole number from 2 to 8")
