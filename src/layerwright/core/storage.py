"""Exact stored bytes of a treated weight: the planner's prediction and the files agree to the byte."""

from __future__ import annotations

from layerwright.core.conv_factors import factored_weights
from layerwright.core.errors import InputError
from layerwright.core.treatment import (
    FactorConv,
    LowRank,
    MixRows,
    Narrow,
    Quantize,
    RoundActivations,
    RoundAttention,
    Sparsify,
    Treatments,
)

__all__ = ["activation_bytes", "kept_weights", "packed_bytes", "quantized_bytes", "stored_bytes"]


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of ``(rows, columns)`` codes packed densely along each row into 32-bit words."""
    return rows * ((columns * bits + 31) // 32) * 4


def quantized_bytes(rows: int, columns: int, q: Quantize, scale_bytes: int) -> int:
    """Bytes of a quantized matrix: codes, one scale per group, one 8-bit zero point per group if asymmetric."""
    group = columns if q.group_size == -1 else q.group_size
    if columns % group:
        raise InputError(f"group_size: {group} does not divide the {columns} inputs; use a divisor, or -1 per channel")
    groups = rows * (columns // group)
    codes = rows * columns if q.act_bits else packed_bytes(rows, columns, q.bits)
    return codes + groups * scale_bytes + (0 if q.symmetric else groups)


def kept_weights(rows: int, columns: int, sparsity: float) -> int:
    """Number of weights that unstructured or 2:4 pruning keeps."""
    return rows * columns - int(sparsity * rows * columns)


def stored_bytes(treatments: Treatments, out: int, in_: int, count: int = 1, element_bytes: int = 2) -> int:
    """Bytes that `treatments` leave of `count` matrices ``(out, in)`` whose element takes `element_bytes`.

    A sparse matrix is a bit mask (one bit per weight, rows padded to bytes) and its kept values in one flat array;
    quantized, the values are codes packed into 32-bit words. A low-rank matrix is its two factors ``(out, rank)`` and
    ``(rank, in)``; quantized, each factor is stored as a quantized matrix, the first one per channel. Rounded
    activations add their ranges (`activation_bytes`), rounded keys and values nothing. Rows of mixed widths are one
    quantized matrix for each width and a 32-bit place for each row. A factorised convolution is the weights of all its
    stages. A narrowed projection has fewer inputs, and is otherwise stored as its other treatments say.
    """
    return activation_bytes(treatments, in_) + _weight_bytes(treatments, out, in_, count, element_bytes)


def activation_bytes(treatments: Treatments, channels: int = 1) -> int:
    """Bytes of the ranges that rounded activations need: a float32 scale, and an 8-bit zero point where one is used."""
    total = 0
    for t in treatments:
        if isinstance(t, RoundActivations) and t.share != "token":
            zero = t.grid == "uniform" and not t.symmetric
            total += (channels if t.share == "channel" else 1) * (5 if zero else 4)
        if isinstance(t, RoundAttention):
            total += 3 * 5 + (5 if t.probabilities == "uniform" else 4)
    return total


def _weight_bytes(treatments: Treatments, out: int, in_: int, count: int, element_bytes: int) -> int:
    for t in treatments:
        if isinstance(t, Narrow):
            in_ = t.kept(in_)
    quantize = next((t for t in treatments if isinstance(t, Quantize)), None)
    sparsify = next((t for t in treatments if isinstance(t, Sparsify)), None)
    low_rank = next((t for t in treatments if isinstance(t, LowRank)), None)
    mixed = next((t for t in treatments if isinstance(t, MixRows)), None)
    factor = next((t for t in treatments if isinstance(t, FactorConv)), None)
    if factor:
        if count > 1 or quantize or sparsify or low_rank or mixed:
            raise InputError("factor_conv is for one convolution, without another treatment of its weight")
        return factored_weights(factor, out, in_) * element_bytes
    if mixed:
        if quantize or sparsify or low_rank:
            raise InputError("mix_rows cannot be combined with another treatment of the weight: choose one")
        widths = mixed.widths(out)
        parts = sum(quantized_bytes(len(rows), in_, mixed.part(bits), element_bytes) for bits, rows in widths.items())
        return count * (parts + (4 * out if len(widths) > 1 else 0))
    if low_rank and sparsify:
        raise InputError("low_rank and sparsify cannot be combined on one layer: choose one")
    if low_rank:
        if low_rank.inner >= min(out, in_):
            raise InputError(f"inner: rank {low_rank.inner} is not below min{(out, in_)}")
        if quantize is None:
            return count * low_rank.inner * (out + in_) * element_bytes
        channel = Quantize(quantize.bits, -1, quantize.symmetric)
        return count * (
            quantized_bytes(out, low_rank.inner, channel, element_bytes)
            + quantized_bytes(low_rank.inner, in_, quantize, element_bytes)
        )
    if sparsify:
        kept = count * kept_weights(out, in_, sparsify.sparsity)
        mask = count * out * ((in_ + 7) // 8)
        if quantize is None:
            return mask + kept * element_bytes
        dense = quantized_bytes(out, in_, quantize, element_bytes)
        codes = out * in_ if quantize.act_bits else packed_bytes(out, in_, quantize.bits)
        return mask + packed_bytes(1, kept, quantize.bits) + count * (dense - codes)
    if quantize:
        return count * quantized_bytes(out, in_, quantize, element_bytes)
    return count * out * in_ * element_bytes
