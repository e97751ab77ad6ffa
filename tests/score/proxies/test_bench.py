from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from layerwright.core.errors import InputError
from layerwright.score.proxies import BitBench, spearman, vector_scores
from oracles.proxies import rank_correlation

VALUES = st.lists(st.integers(-4, 4), min_size=12, max_size=12)


@settings(max_examples=80, deadline=None)
@given(VALUES, VALUES, st.sampled_from([0.2, 0.5, 1.0]))
def test_spearman_at_k_with_ties(scores: list[int], noise: list[int], top: float) -> None:
    a = np.array(scores, dtype=float)
    quality = np.array([10 * x + i / 100 for i, x in enumerate(noise)])
    found = spearman(a, quality, top)
    best = np.argsort(-quality)[: int(np.ceil(12 * top))]
    if len(set(a[best].tolist())) == 1:
        assert np.isnan(found)
        return
    assert found == pytest.approx(float(spearmanr(a[best], quality[best]).statistic), abs=1e-12)
    assert found == pytest.approx(rank_correlation(a[best].tolist(), quality[best].tolist()), abs=1e-12)


def test_scores_that_are_not_finite_have_no_correlation() -> None:
    assert np.isnan(spearman(np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0])))
    with pytest.raises(InputError, match="1 of 3 values are left"):
        spearman(np.ones(3), np.arange(3.0), 0.2)
    with pytest.raises(InputError, match="expected equal lengths"):
        spearman(np.ones(3), np.arange(4.0))


def records(count: int = 12) -> dict[tuple[int, ...], float]:
    return {(2 + i // 9, 2 + i // 3 % 3, 2 + i % 3): 1.0 / (i + 1) for i in range(count)}


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    bench = BitBench(("a", "b", "c"), records(), base=0.01, model="m", data="d", generator="g", meta={"seed": 1})
    path = bench.save(tmp_path / "deep" / "bench.json")
    assert BitBench.load(path) == bench
    assert list(path.parent.iterdir()) == [path]
    assert bench[(2, 2, 3)] == 0.5 and len(bench) == 12 and bench.widths == (2, 3, 4)
    assert bench.vectors.shape == (12, 3)
    np.testing.assert_array_equal(bench.quality, -np.array(list(records().values())))
    assert BitBench(("a", "b", "c"), records(), higher_is_better=True).quality[0] == 1.0
    with pytest.raises(InputError, match="was not measured"):
        bench[(8, 8, 8)]


def test_halves_share_nothing_and_make_the_whole() -> None:
    bench = BitBench(("a", "b", "c"), records(24))
    one, two = bench.split_half(3)
    assert len(one) == len(two) == 12 and not set(one.records) & set(two.records)
    assert {**one.records, **two.records} == bench.records
    assert bench.split_half(3)[0] == one and bench.split_half(4)[0] != one


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (records(9), "got 9 records, expected at least 10"),
        (dict.fromkeys(records(), 0.5), "same metric"),
        (records() | {(2, 2, 2): float("nan")}, "metric of .* is nan"),
        (records() | {(2, 2): 0.5}, "a vector has 2 bits"),
    ],
)
def test_bad_tables_are_refused(found: dict[tuple[int, ...], float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BitBench(("a", "b", "c"), found)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"layerwright_bit_bench": 2})])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(InputError, match="is not a table of bit vectors"):
        BitBench.load(path)


def test_vector_scores_are_sums_of_gains() -> None:
    gains = np.arange(6.0).reshape(2, 3)
    scores = vector_scores(gains, np.array([[2, 8], [4, 2]]), (2, 8, 4))
    np.testing.assert_array_equal(scores, [0.0 + 4.0, 2.0 + 3.0])
    with pytest.raises(InputError, match="gains are known for"):
        vector_scores(gains, np.array([[2, 5]]), (2, 8, 4))
    with pytest.raises(InputError, match=r"expected \(n, 2\)"):
        vector_scores(gains, np.array([[2, 4, 8]]), (2, 8, 4))
