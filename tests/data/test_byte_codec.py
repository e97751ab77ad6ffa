from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.data.byte_codec import ByteCodec


@given(st.text(max_size=60))
def test_text_there_and_back(text: str) -> None:
    codec = ByteCodec()
    ids = codec.encode(text, bos=True, eos=True)
    assert ids[0] == 257 and ids[-1] == 258 and all(0 <= i < 256 for i in ids[1:-1])
    assert codec.decode(ids) == text
    assert bytes(ids[1:-1]) == text.encode()


@given(st.binary(max_size=60))
def test_bytes_there_and_back_and_invalid_text_replaced(data: bytes) -> None:
    codec = ByteCodec()
    assert codec.decode_bytes(codec.encode_bytes(data)) == data == codec.decode_bytes(codec.encode(data))
    assert codec.decode([256, *data, 258]) == data.decode("utf-8", "replace")


def test_what_is_invalid() -> None:
    codec = ByteCodec()
    assert codec.decode([0xFF, ord("a"), 0xC3]) == "\ufffda\ufffd"
    with pytest.raises(UnicodeDecodeError):
        codec.decode([0xFF], errors="strict")


def test_specials_and_padding() -> None:
    codec = ByteCodec(("pad", "bos", "eos", "mask"))
    assert len(codec) == 260 and codec.special("mask") == 259 and len(ByteCodec()) == 259
    assert codec.pad([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, 256, 256]]
    assert ByteCodec(()).encode("a") == [97]


def test_bad_input() -> None:
    codec = ByteCodec()
    with pytest.raises(TypeError, match="expected bytes; use encode"):
        codec.encode_bytes("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a string or bytes"):
        codec.encode(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 259, expected 0 to 258"):
        codec.decode([259])
    with pytest.raises(InputError, match="got -1"):
        codec.decode_bytes([-1])
    with pytest.raises(InputError, match="no 'mask', expected one of pad, bos, eos"):
        codec.special("mask")
    with pytest.raises(InputError, match="no 'bos'"):
        ByteCodec(("pad",)).encode("a", bos=True)
    with pytest.raises(InputError, match="each name once"):
        ByteCodec(("pad", "pad"))
    with pytest.raises(InputError, match="rows: got none"):
        codec.pad([])
