"""Reading a user's files."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from layerwright.core.corpus import read_arrays, read_texts
from layerwright.core.errors import InputError


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n"y"\n{"text": ""}\n')
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo"]
    assert read_texts(tmp_path / "a.jsonl") == ["x", "y"]
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"is a .csv file"):
        read_texts(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"give a .txt, .jsonl or .parquet"):
        read_texts(tmp_path / "b.txt")


def test_arrays(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    numpy.savez(file, x=numpy.arange(4, dtype="uint8").reshape(2, 2), y=numpy.array([1, 0], dtype="uint8"))
    x, y = read_arrays(file)
    assert x.tolist() == [[0, 1], [2, 3]] and y.tolist() == [1, 0]
    bad = {
        "same number above 0": {"x": numpy.ones(3), "y": numpy.zeros(2, dtype=int)},
        "expected the arrays x and y": {"x": numpy.ones(3)},
        "one whole number a sample in y": {"x": numpy.ones(2), "y": numpy.array([0.5, 1.0])},
        "Object arrays": {"x": numpy.array([{}], dtype=object), "y": numpy.zeros(1, dtype=int)},
    }
    for message, arrays in bad.items():
        numpy.savez(file, **arrays)
        with pytest.raises(InputError, match=message):
            read_arrays(file)
    numpy.save(tmp_path / "bare.npy", numpy.ones(2))
    with pytest.raises(InputError, match="one bare array"):
        read_arrays(tmp_path / "bare.npy")
