"""Packing one bit at a time, with Python integers."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_slowly(codes: Tensor, bits: int) -> Tensor:
    """int32 ``(rows, ceil(columns * bits / 32))`` for signed codes ``(rows, columns)``."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    packed = torch.zeros(rows, words, dtype=torch.int32)
    for i in range(rows):
        stream = 0
        for j in range(columns):
            stream |= (int(codes[i, j]) + 2 ** (bits - 1)) << (j * bits)
        for k in range(words):
            word = (stream >> (32 * k)) & 0xFFFFFFFF
            packed[i, k] = word - (1 << 32) if word >= 1 << 31 else word
    return packed


def pack_mask_slowly(mask: Tensor) -> Tensor:
    """uint8 ``(rows, ceil(columns / 8))`` for a bool mask ``(rows, columns)``."""
    rows, columns = mask.shape
    packed = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            packed[i, j // 8] += int(mask[i, j]) << (j % 8)
    return packed
