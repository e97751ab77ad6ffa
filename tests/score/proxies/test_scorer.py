from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwright.allocate import ALLOCATORS
from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.option import Option, OptionTable, Scores
from layerwright.core.treatment import Quantize, Sparsify
from layerwright.score import SCORERS, Subject
from layerwright.score.proxies import (
    BIT_PROXIES,
    ProxyTree,
    as_proxy,
    bit_weights,
    bundled_proxy,
    emq,
    layer_statistics,
    proxy_damages,
)
from oracles.proxies import two_layers

WIDTHS = (2, 3, 4)


def subject(candidates: tuple[object, ...] = tuple(Quantize(b) for b in WIDTHS)) -> Subject:
    model, data, refs = two_layers()
    return Subject(model, data, refs, {ref.path: [(c,) for c in candidates] for ref in refs})


def test_the_scorer_is_registered_and_gives_damages_that_fall_with_bits(tmp_path: Path) -> None:
    given_ = subject()
    before = fingerprint_model(given_.model)
    scores = SCORERS.get("emq")(given_)
    assert fingerprint_model(given_.model) == before
    for ref in given_.layers:
        own = [scores.damage(ref.path, (Quantize(b),)) for b in WIDTHS]
        assert own[0] >= own[1] >= own[2] == 0.0
    assert scores.meta["loss_units"] is False and scores.meta["proxy"] == bundled_proxy().to_string()
    assert Scores.load(scores.save(tmp_path)) == scores


def test_the_mean_hessian_weighted_by_rounding_errors_is_hawq2() -> None:
    model, data, refs = two_layers()
    statistics = layer_statistics(model, data, refs, ("H", "W"))
    mine = as_proxy("noop(H)", "rounding").gains(statistics, WIDTHS)
    np.testing.assert_allclose(mine, BIT_PROXIES.get("hawq2").gains(statistics, WIDTHS), rtol=1e-6)
    assert (np.diff(bit_weights(statistics, WIDTHS, "rounding"), axis=1) > 0).all()
    np.testing.assert_array_equal(bit_weights(statistics, WIDTHS), [WIDTHS] * len(refs))
    scores = emq(subject(), "noop(H)", weighting="rounding")
    assert scores.damage(refs[0].path, (Quantize(2),)) >= scores.damage(refs[0].path, (Quantize(3),)) >= 0
    with pytest.raises(InputError, match="snip is a proxy of its own form"):
        emq(subject(), "snip", weighting="rounding")
    with pytest.raises(InputError, match="weighting"):
        bit_weights(statistics, WIDTHS, "errors")  # type: ignore[arg-type]


@pytest.mark.parametrize("proxy", [*BIT_PROXIES, "product(abs(G), abs(W))", "V"])
def test_every_proxy_serves_every_allocator(proxy: str) -> None:
    given_ = subject()
    scores = emq(given_, proxy)
    rows = []
    for ref in given_.layers:
        for bits in WIDTHS:
            t = (Quantize(bits),)
            cost = Cost(params=ref.numel, bytes=ref.numel * bits / 8)
            rows.append(Option(ref.path, t, cost, scores.damage(ref.path, t)))
    limit = sum(ref.numel for ref in given_.layers) * 3 / 8
    best = ALLOCATORS.get("integer")(OptionTable(tuple(rows)), {"bytes": limit})
    for name in ("bit_search", "greedy", "lagrangian"):
        found = ALLOCATORS.get(name)(OptionTable(tuple(rows)), {"bytes": limit})
        assert found.cost.bytes <= limit and found.damage >= best.damage - 1e-9


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_choices_of_one_size_keep_their_order(seed: int) -> None:
    """Damages are not negative, and rank vectors of equal size as the gains did."""
    random = np.random.default_rng(seed)
    numel = random.integers(1, 5, 4) * 8
    gains = np.outer(random.normal(size=4) * numel, WIDTHS)
    damages = proxy_damages(gains, WIDTHS, numel.tolist())
    assert (damages >= 0).all() and np.allclose(damages[:, -1], 0.0)
    vectors = random.integers(0, 3, (60, 4))
    sizes = (numel * np.array(WIDTHS)[vectors]).sum(axis=1)
    score, damage = (table[np.arange(4), vectors].sum(axis=1) for table in (gains, damages))
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        spread = np.abs(np.diff(score[same])) > 1e-9
        np.testing.assert_array_equal((np.diff(score[same]) > 0)[spread], (np.diff(damage[same]) < 0)[spread])


def test_ready_proxies_on_a_model_agree_with_their_formula() -> None:
    model, data, refs = two_layers()
    found = layer_statistics(model, data, refs, ("A", "H", "V", "W", "F", "E"))
    numel = np.array([ref.numel for ref in refs])
    np.testing.assert_array_equal(BIT_PROXIES.get("size").gains(found, WIDTHS), np.outer(numel, WIDTHS))
    flow = [float((v * w).abs().mean()) for v, w in zip(found.lists["V"], found.lists["W"], strict=True)]
    np.testing.assert_allclose(BIT_PROXIES.get("synflow").gains(found, WIDTHS), np.outer(flow, WIDTHS), rtol=1e-6)
    hawq2 = BIT_PROXIES.get("hawq2").gains(found, (2, 8))
    traces = np.array([float(h.mean()) for h in found.lists["H"]])
    assert (np.abs(hawq2[:, 0]) > 20 * np.abs(hawq2[:, 1])).all()
    assert (np.sign(hawq2[:, 0]) == -np.sign(traces)).all()
    qe = BIT_PROXIES.get("qe").gains(found, WIDTHS)
    assert (np.diff(qe, axis=1) > 0).all()
    # Layers that compute the same have one orthogonality, and one that is like no other counts more.
    a = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    b = torch.linalg.qr(torch.randn(12, 6, generator=torch.Generator().manual_seed(1)))[0]
    alike = layer_statistics(model, data, refs, ("W",))
    table = type(alike)(("x", "y", "z"), (1, 1, 1), (1, 1, 1), {"A": (a, a, b)})
    theta = BIT_PROXIES.get("ompq").gains(table, (1,))[:, 0]
    assert theta[2] > theta[1]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"offered .*, expected quantization alone"):
        emq(subject((Sparsify(0.5),)))
    with pytest.raises(InputError, match=r"unknown bit proxy 'synflw'.*synflow"):
        as_proxy("synflw")
    with pytest.raises(FileNotFoundError, match="no proxy file"):
        as_proxy(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match="no proxy that a search has written"):
        as_proxy(tmp_path / "bad.json")
    with pytest.raises(InputError, match="not finite"):
        proxy_damages(np.array([[np.nan, 1.0]]), (2, 3), (4,))
    assert as_proxy(ProxyTree.from_string("GW")).needs == ("G", "W")
