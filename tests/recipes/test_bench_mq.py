from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.layer import read_matrix, write_matrix_
from layerwright.core.treatment import Quantize
from layerwright.recipes.bench import open_bench
from layerwright.recipes.bench_mq import bench_data, build_bench, measure_vectors, rank_proxies, refs_at, stored_bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide
from layerwright.recipes.optimize import optimize
from layerwright.treat.probe import treat_weights
from oracles.proxies import two_layers


def test_every_vector_is_measured_once() -> None:
    model, data, refs = two_layers()
    before = fingerprint_model(model)
    bench = build_bench(model, data, refs, widths=(2, 4, 8), method="rtn")
    assert fingerprint_model(model) == before
    assert list(bench.records) == list(itertools.product((2, 4, 8), repeat=len(refs)))
    assert bench.base == pytest.approx(data.mean_loss(model))
    for bits in list(bench.records)[::7]:  # one layer at a time, in a copy
        twin = copy.deepcopy(model)
        for ref, width in zip(refs, bits, strict=True):
            (dense,) = treat_weights([read_matrix(model, ref)], [(Quantize(width, method="rtn"),)], None)
            write_matrix_(twin, ref, dense)
        assert bench[bits] == pytest.approx(data.mean_loss(twin), rel=1e-5)


def test_random_vectors_are_distinct_and_their_seed_decides() -> None:
    model, data, refs = two_layers()
    first, again, other = (build_bench(model, data, refs, widths=(2, 3, 4, 8), count=12, seed=s) for s in (0, 0, 1))
    assert first.records == again.records and len(first) == 12
    assert set(first.records) != set(other.records)


@pytest.mark.parametrize("name", ["demo:cnn", "demo:vit"])
def test_stored_tables_are_what_their_generator_measures(name: str) -> None:
    bench = stored_bench(name)
    assert len(bench) == 400 and bench.generator.startswith(f"layerwright bench-mq {name} --build 400")
    opened = open_bench(name)
    assert bench.model == f"{name} {fingerprint_model(opened.model)}"
    data = bench_data(name, opened.processor)
    assert bench.data.endswith(data.fingerprint())
    some = list(bench.records)[::190]
    again = measure_vectors(opened.model, data, bench.layers, some)
    np.testing.assert_allclose(again, [bench[bits] for bits in some], rtol=1e-3)
    assert data.mean_loss(opened.model) == pytest.approx(bench.base, rel=1e-4)


@pytest.mark.parametrize(("name", "least"), [("demo:cnn", 0.75), ("demo:vit", 0.5)])
def test_the_bundled_proxy_ranks_the_stored_vectors(name: str, least: float) -> None:
    bench, opened = stored_bench(name), open_bench(name)
    found = rank_proxies(bench, opened.model, opened.calibration, ["emq", "snip", "synflow", "size"])
    assert set(found["emq"]) == {0.2, 0.5, 1.0}
    assert found["emq"][1.0] > least
    assert found["emq"][1.0] >= max(row[1.0] for row in found.values())


def test_bad_input_is_refused(tmp_path: Path) -> None:
    model, data, refs = two_layers()
    with pytest.raises(InputError, match="at least two"):
        build_bench(model, data, refs, widths=(4,))
    with pytest.raises(InputError, match="no layer that can be treated"):
        build_bench(torch.nn.Flatten(), data)
    with pytest.raises(InputError, match="got 9 records"):
        build_bench(model, data, refs, widths=(2, 3, 4), count=9)
    with pytest.raises(InputError, match="unknown method"):
        build_bench(model, data, refs, method="gptq")
    with pytest.raises(InputError, match="got 2 numbers"):
        measure_vectors(model, data, ["0", "1", "2"], [(2, 2)])
    with pytest.raises(InputError, match="unknown layer"):
        refs_at(model, ["7"])
    with pytest.raises(InputError, match=r"unknown stored table .*demo:cnn"):
        stored_bench("demo:cn")
    with pytest.raises(InputError, match="too many to measure"):
        build_bench(model, data, [refs[0]] * 20)


def test_the_recipe_plans_within_the_budget_and_applies() -> None:
    bench = open_bench("demo:cnn", samples=64)
    decision = decide(bench, "bits=3", "emq")
    assert decision.recipe == recipe("emq") and decision.plan.recipe == "emq"
    assert decision.allocation.cost.bytes <= decision.limits["bytes"]
    widths = {t.bits for own in decision.plan.layers.values() for t in own if isinstance(t, Quantize)}
    assert widths <= {2, 3, 4} and len(widths) > 1
    assert decision.scores["layers"].scorer == "emq"
    result = optimize("demo:cnn", "bits=3", "emq", samples=64, uniform=False)
    assert result.plan.layers == decision.plan.layers
    assert result.measured["after"].bytes <= decision.limits["bytes"] * 1.001
    assert result.measured["after"].loss < 0.5
    assert all(record.status == "done" for record in result.report if record.layer in result.plan.layers)
