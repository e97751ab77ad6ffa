from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.data.byte_windows import byte_parts, even_windows, random_windows


def test_parts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(32, 82)) * 20)
    train, held = byte_parts(path, least=50)
    assert bytes(train.tolist()) + bytes(held.tolist()) == path.read_bytes()
    assert len(held) == 100
    assert len(byte_parts(path, least=150)[1]) == 150
    with pytest.raises(InputError, match="has 1000 bytes, expected at least 1500"):
        byte_parts(path, least=300)


def test_parts_of_the_library_are_apart() -> None:
    train, held = byte_parts()
    assert len(train) > 8 * len(held) > 1000
    piece = bytes(held[5000:5200].tolist())
    assert piece not in train.numpy().tobytes()


def test_windows() -> None:
    stream = torch.arange(100, dtype=torch.uint8)
    even = even_windows(stream, 3, 20)
    assert even[:, 0].tolist() == [0, 40, 80] and even.dtype == torch.int64
    assert len(even_windows(stream, 50, 20)) == 5
    drawn = random_windows(stream, 200, 30, seed=1)
    assert torch.equal(drawn - drawn[:, :1], torch.arange(30).expand(200, 30))
    assert drawn.max() == 99 and drawn.min() == 0
    assert torch.equal(drawn, random_windows(stream, 200, 30, seed=1))
    for call in (even_windows, random_windows):
        with pytest.raises(InputError, match="length: got 101"):
            call(stream, 1, 101)
