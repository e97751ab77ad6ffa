from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.core.errors import InputError
from layerwright.score.device import LMShape, draw_counts, preset_shape
from layerwright.score.device import routing as routing_module


def shape(experts: int, top_k: int, layers: int = 2) -> LMShape:
    return LMShape("m", layers, 8, 8, 2, 2, num_experts=experts, top_k=top_k)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.data(), st.integers(0, 40), st.sampled_from([0.0, 1.3]))
def test_every_token_takes_k_different_experts(experts, data, tokens, skew) -> None:
    top_k = data.draw(st.integers(1, experts))
    counts = draw_counts(shape(experts, top_k), tokens, np.random.default_rng(0), skew=skew)
    assert counts.shape == (2, experts)
    assert (counts.sum(1) == tokens * top_k).all()
    assert counts.max(initial=0) <= tokens  # no repetition


def test_all_subsets_are_equally_likely() -> None:
    chosen = routing_module._uniform(1, 60_000, 5, 3, np.random.default_rng(0))[0]
    codes, found = np.unique((1 << np.sort(chosen, -1)).sum(-1), return_counts=True)
    assert len(codes) == len(list(combinations(range(5), 3)))
    # 10 subsets, 6000 expected each; six standard deviations
    assert abs(found - 6000).max() < 6 * np.sqrt(6000)


def test_skew_makes_favourites_that_last() -> None:
    model = shape(16, 2, layers=1)
    first, second = (draw_counts(model, 4000, np.random.default_rng(seed), skew=1.5) for seed in (0, 1))
    assert first.max() > 4 * np.median(first)
    assert first.argmax() == second.argmax()


def test_same_seed_same_counts_and_chunks_do_not_matter_to_the_sum(monkeypatch) -> None:
    model = preset_shape("mixtral")
    again = [draw_counts(model, 50, np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    monkeypatch.setattr(routing_module, "_CHUNK", 200)
    assert (draw_counts(model, 50, np.random.default_rng(3)).sum(1) == 100).all()


def test_bad_input_and_models_without_experts() -> None:
    with pytest.raises(InputError, match=r"skew: got -1"):
        draw_counts(shape(4, 1), 3, np.random.default_rng(0), skew=-1)
    assert draw_counts(preset_shape("opt-66b"), 3, np.random.default_rng(0)).shape == (0, 0)
