from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.recipes.serving import Request, make_requests, read_requests


@given(st.integers(1, 50), st.integers(1, 500), st.integers(1, 500), st.floats(0, 2))
def test_lengths_stay_between_one_and_twice_the_mean(number, prompt, new, spread) -> None:
    found = make_requests(number, prompt, new, spread=spread)
    assert len(found) == number
    assert all(1 <= r.prompt <= 2 * prompt and 1 <= r.new <= 2 * new and r.arrival == 0 for r in found)


def test_means_and_rate() -> None:
    found = make_requests(4000, 1000, 200, rate=5.0, spread=0.1, seed=1)
    assert np.mean([r.prompt for r in found]) == pytest.approx(1000, rel=0.01)
    assert np.std([r.new for r in found]) == pytest.approx(20, rel=0.1)
    assert found[-1].arrival == pytest.approx(4000 / 5, rel=0.05)
    assert found == make_requests(4000, 1000, 200, rate=5.0, spread=0.1, seed=1)
    assert found != make_requests(4000, 1000, 200, rate=5.0, spread=0.1, seed=2)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0, 1, 1), {}, "got 0 of 1 and 1"),
        ((1, -1, 1), {}, "got 1 of -1"),
        ((1, 1, 1), {"rate": -2.0}, "rate: got -2.0"),
        ((1, 1, 1), {"rate": float("nan")}, "rate: got nan"),
        ((1, 1, 1), {"spread": -0.1}, "spread: got -0.1"),
    ],
)
def test_loads_that_cannot_be(arguments, settings, message) -> None:
    with pytest.raises(InputError, match=message):
        make_requests(*arguments, **settings)


def test_a_trace_is_sorted_and_begins_at_zero(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival,prompt,new\n12.5,30,4\n10,20,5\n")
    assert read_requests(path) == [Request(0.0, 20, 5), Request(2.5, 30, 4)]


def test_the_columns_of_public_traces(tmp_path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.5,374,44\n2023-11-16 18:17:03.0,396,109\n"
    )
    assert read_requests(azure) == [Request(0.0, 396, 109), Request(1.5, 374, 44)]
    lines = tmp_path / "trace.jsonl"
    lines.write_text('{"prompt_tokens": 3, "output_tokens": 2}\n\n{"arrived_at": 1, "input_tokens": 4, "new": 2}\n')
    assert read_requests(lines) == [Request(0.0, 3, 2), Request(1.0, 4, 2)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "no requests in it"),
        ("t.csv", "arrival,prompt\n1,2\n", "line 2: no new"),
        ("t.csv", "arrival,prompt,new\n1,2,x\n", "line 2: new: got 'x', expected a number"),
        ("t.csv", "arrival,prompt,new\n-1,0,5\n", "line 2.*arrival: got -1"),
        ("t.csv", "arrival,prompt,new\n1,0,5\n", "line 2.*got 0 prompt"),
        ("t.csv", "arrival,prompt,new\n1,2.5,5\n", "expected whole numbers"),
        ("t.jsonl", "{", "line 1 is not valid JSON"),
        ("t.jsonl", "3", "line 1: got int, expected an object"),
        ("t.txt", "1", "got a .txt file"),
    ],
)
def test_traces_that_cannot_be_read(name, text, message, tmp_path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_requests(path)
    assert str(path) in str(caught.value)


def test_a_missing_trace_and_a_binary_one(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no trace at"):
        read_requests(tmp_path / "no.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text file"):
        read_requests(tmp_path / "b.csv")
