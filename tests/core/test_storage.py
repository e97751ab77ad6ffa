"""Formulas of stored bytes against arrays that are really built and measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.core.storage import kept_weights, packed_bytes, quantized_bytes, stored_bytes
from layerwright.core.treatment import LowRank, Quantize, Sparsify

sides = st.integers(1, 40)
bits = st.integers(2, 8)


def pack_row(values: np.ndarray, width: int) -> np.ndarray:
    """Codes written bit by bit into 32-bit words."""
    stream = [int(v) >> b & 1 for v in values for b in range(width)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(bit << i for i, bit in enumerate(stream[k : k + 32])) for k in range(0, len(stream), 32)]
    return np.array(words, dtype=np.uint32)


def counted_quantized(rows: int, columns: int, q: Quantize, element: int) -> int:
    """Bytes of the arrays one would write."""
    codes = np.arange(rows * columns).reshape(rows, columns) % 2**q.bits
    if q.act_bits:
        arrays = [codes.astype(np.int8)]
    else:
        arrays = [np.stack([pack_row(row, q.bits) for row in codes])]
    groups = columns // (columns if q.group_size == -1 else q.group_size)
    arrays.append(np.zeros((rows, groups), dtype={2: np.float16, 4: np.float32}[element]))
    if not q.symmetric:
        arrays.append(np.zeros((rows, groups), dtype=np.int8))
    return sum(a.nbytes for a in arrays)


@given(sides, sides, bits)
def test_packed_codes(rows, columns, width):
    codes = np.zeros((rows, columns), dtype=int)
    assert packed_bytes(rows, columns, width) == sum(pack_row(row, width).nbytes for row in codes)


@given(sides, st.integers(1, 5), st.integers(1, 8), bits, st.booleans(), st.booleans(), st.sampled_from([2, 4]))
def test_quantized_matrices(rows, groups, group, width, symmetric, whole_rows, element):
    q = Quantize(width, -1 if whole_rows else group, symmetric)
    assert quantized_bytes(rows, groups * group, q, element) == counted_quantized(rows, groups * group, q, element)
    assert stored_bytes((q,), rows, groups * group, 3, element) == 3 * counted_quantized(
        rows, groups * group, q, element
    )


@given(sides, sides)
def test_integer_products_store_whole_bytes(rows, columns):
    q = Quantize(8, act_bits=8)
    assert quantized_bytes(rows, columns, q, 2) == counted_quantized(rows, columns, q, 2) == rows * columns + 2 * rows


@given(sides, sides, st.floats(0.01, 0.99), st.integers(1, 3))
def test_sparse_matrices(rows, columns, sparsity, count):
    weight = np.random.default_rng(0).normal(size=(rows, columns))
    zeros = int(sparsity * rows * columns)
    mask = np.ones(rows * columns, dtype=bool)
    mask[np.argsort(np.abs(weight).ravel())[:zeros]] = False
    assert kept_weights(rows, columns, sparsity) == mask.sum()
    bitmask = np.packbits(mask.reshape(rows, columns), axis=1)
    values = np.zeros(count * mask.sum(), dtype=np.float16)
    assert stored_bytes((Sparsify(sparsity),), rows, columns, count, 2) == count * bitmask.nbytes + values.nbytes


@given(sides, st.integers(1, 5), st.integers(1, 8), bits, st.booleans(), st.integers(1, 3))
def test_sparse_quantized_matrices(rows, groups, group, width, symmetric, count):
    columns, q = groups * group, Quantize(width, group, symmetric)
    kept = count * kept_weights(rows, columns, 0.5)
    mask = np.packbits(np.zeros((rows, columns), dtype=bool), axis=1).nbytes * count
    scales = count * rows * groups * (2 + (not symmetric))
    codes = pack_row(np.zeros(kept, dtype=int), width).nbytes
    assert stored_bytes((Sparsify(), q), rows, columns, count, 2) == mask + scales + codes


@given(st.integers(3, 40), st.integers(1, 5), st.integers(1, 8), st.integers(1, 12), bits, st.sampled_from([2, 4]))
def test_low_rank_matrices(rows, groups, group, inner, width, element):
    columns = groups * group
    assume(inner < min(rows, columns))
    dense = stored_bytes((LowRank(inner),), rows, columns, 2, element)
    assert dense == 2 * element * (np.zeros((rows, inner)).size + np.zeros((inner, columns)).size)
    q = Quantize(width, group)
    left = counted_quantized(rows, inner, Quantize(width), element)
    right = counted_quantized(inner, columns, q, element)
    assert stored_bytes((LowRank(inner), q), rows, columns, 2, element) == 2 * (left + right)


def test_an_untreated_matrix_is_its_elements():
    assert stored_bytes((), 3, 5, 2, 4) == np.zeros((2, 3, 5), dtype=np.float32).nbytes


@given(st.integers(1, 8).map(lambda k: 32 * k), sides)
def test_fewer_bits_never_take_more(columns, rows):
    sizes = [stored_bytes((Quantize(b, 32),), rows, columns) for b in range(2, 9)]
    assert sizes == sorted(sizes)


def test_what_cannot_be_stored():
    with pytest.raises(InputError, match="group_size: 32 does not divide the 48 inputs"):
        stored_bytes((Quantize(4, 32),), 8, 48)
    with pytest.raises(InputError, match=r"rank 8 is not below min\(8, 48\)"):
        stored_bytes((LowRank(8),), 8, 48)
    with pytest.raises(InputError, match="low_rank and sparsify cannot be combined"):
        stored_bytes((LowRank(2), Sparsify()), 8, 48)
