"""Losses on outputs against double loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.tune.losses import (
    OUTPUT_LOSSES,
    cosine_outputs,
    info_nce_outputs,
    kl_outputs,
    mse_outputs,
    output_loss,
)


def naive_info_nce(q: Tensor, k: Tensor, temperature: float) -> float:
    """Two loops in float64."""
    q, k = q.double(), k.double()
    total = 0.0
    for i in range(len(q)):
        terms = []
        for j in range(len(k)):
            dot = float((q[i] * k[j]).sum() / (q[i].norm() * k[j].norm()))
            terms.append(dot / temperature)
        total += math.log(sum(math.exp(t) for t in terms)) - terms[i]
    return 2 * temperature * total / len(q)


@settings(deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.floats(0.05, 10), st.integers(0, 1000))
def test_info_nce_is_the_double_loop(samples: int, classes: int, temperature: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(samples, classes, generator=g) for _ in range(2))
    expected = naive_info_nce(q, k, temperature)
    # A loss below the rounding of float32 numbers near 1 comes out as zero.
    assert float(info_nce_outputs(q, k, temperature)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_info_nce_is_least_at_the_identity() -> None:
    k = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found = {order: float(info_nce_outputs(k[list(order)], k)) for order in itertools.permutations(range(4))}
    assert min(found, key=lambda order: found[order]) == (0, 1, 2, 3)
    assert sorted(found.values())[1] > found[(0, 1, 2, 3)] + 1e-3


def test_the_others_are_zero_at_home_and_grow() -> None:
    k = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for loss in (mse_outputs, kl_outputs, cosine_outputs):
        assert float(loss(k, k)) == pytest.approx(0, abs=1e-6)
        assert 0 < float(loss(k + 0.1 * k.flip(0), k)) < float(loss(k + k.flip(0), k))
    assert float(mse_outputs(k + 2, k)) == pytest.approx(4)
    by_hand = sum(
        float(p * (p / q).log())
        for i in range(5)
        for p, q in zip(k[i].double().softmax(-1), (-k[i]).double().softmax(-1), strict=True)
    )
    assert float(kl_outputs(-k, k)) == pytest.approx(by_hand / 5, rel=1e-5)
    assert float(cosine_outputs(-k, k)) == pytest.approx(2)
    assert all(output_loss(name)(k.bfloat16(), k).dtype == torch.float32 for name in OUTPUT_LOSSES)


def test_bad_input() -> None:
    one = torch.randn(1, 4)
    with pytest.raises(InputError, match="batch_size: got 1 sample"):
        info_nce_outputs(one, one)
    two = torch.randn(2, 4)
    for temperature in (0, -1, math.nan):
        with pytest.raises(InputError, match="temperature"):
            info_nce_outputs(two, two, temperature)
        with pytest.raises(InputError, match="temperature"):
            output_loss("mse", temperature)
    with pytest.raises(InputError, match=r"got \(2, 4\) and \(1, 4\)"):
        mse_outputs(two, one)
    with pytest.raises(InputError, match="unknown loss 'infonse'"):
        output_loss("infonse")
