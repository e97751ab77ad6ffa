from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.storage import packed_bytes
from layerwright.nn import packing
from layerwright.nn.packing import mask_columns, pack, pack_mask, unpack, unpack_mask, word_columns
from oracles.bitstream import pack_mask_slowly, pack_slowly

BITS = range(2, 9)


def codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from(BITS), rows=st.integers(0, 4), columns=st.integers(0, 70), seed=st.integers(0, 99))
def test_pack_is_a_bit_stream_and_unpack_its_inverse(bits: int, rows: int, columns: int, seed: int) -> None:
    given_codes = codes(rows, columns, bits, seed)
    packed = pack(given_codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, word_columns(columns, bits))
    assert packed.nbytes == packed_bytes(rows, columns, bits)
    assert torch.equal(packed, pack_slowly(given_codes, bits))
    assert torch.equal(unpack(packed, bits, columns), given_codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 128, 257])
def test_layout_is_that_of_compressed_tensors(bits: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    given_codes = codes(5, columns, bits)
    theirs = helpers.pack_to_int32(given_codes, bits)
    assert torch.equal(pack(given_codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, columns), helpers.unpack_from_int32(theirs, bits, given_codes.shape))


@pytest.mark.parametrize("bits", [3, 4])
def test_chunks_of_rows_join(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given_codes = codes(7, 40, bits)
    whole = pack(given_codes, bits)
    monkeypatch.setattr(packing, "_CHUNK_CODES", 80)
    assert torch.equal(pack(given_codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 40), given_codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_views_that_are_not_contiguous(bits: int) -> None:
    given_codes = codes(12, 10, bits).t()
    packed = pack(given_codes, bits)
    assert torch.equal(packed, pack(given_codes.contiguous(), bits))
    wide = torch.cat((packed, packed), 1)
    assert torch.equal(unpack(wide[:, : packed.shape[1]], bits, 12), given_codes)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 5), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_masks(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (rows, mask_columns(columns))
    assert torch.equal(packed, pack_mask_slowly(mask))
    assert torch.equal(unpack_mask(packed, columns), mask)


@pytest.mark.parametrize("bits", [1, 9, True, 4.0])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(InputError, match="bits"):
        pack(codes(2, 4, 2), bits)
    with pytest.raises(InputError, match="bits"):
        unpack(torch.zeros(2, 1, dtype=torch.int32), bits, 4)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="4-bit grid"):
        pack(torch.tensor([[8]], dtype=torch.int8), 4)
    with pytest.raises(InputError, match="expected int8"):
        pack(torch.zeros(2, 4), 4)
    with pytest.raises(InputError, match=r"expected int32 \(rows, 2\)"):
        unpack(torch.zeros(2, 1, dtype=torch.int32), 4, 9)
    with pytest.raises(InputError, match="expected bool"):
        pack_mask(torch.zeros(2, 4))
    with pytest.raises(InputError, match="uint8"):
        unpack_mask(torch.zeros(2, 4), 4)
