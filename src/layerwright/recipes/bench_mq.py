"""Measure bit vectors of a model once, keep them, and hold proxies against them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.layer import LayerRef, read_matrix
from layerwright.core.layers import list_layers, treatable
from layerwright.core.treatment import Quantize
from layerwright.data.demo_data import demo_data
from layerwright.score.proxies import (
    BIT_PROXIES,
    BitBench,
    BitProxy,
    LayerStatistics,
    as_proxy,
    layer_statistics,
    spearman,
    vector_scores,
)
from layerwright.score.replay import with_weight
from layerwright.treat.probe import treat_weights

__all__ = ["bench_data", "build_bench", "correlations", "measure_vectors", "rank_proxies", "refs_at", "stored_bench"]

_FOLDER = Path(__file__).parent / "bit_benches"
TOPS = (0.2, 0.5, 1.0)
"""Shares of the best bit vectors that the paper's tables report."""


def build_bench(
    model: nn.Module,
    data: Any,
    refs: Sequence[LayerRef] | None = None,
    *,
    widths: Sequence[int] = (2, 3, 4),
    count: int | None = None,
    method: str = "mse",
    seed: int = 0,
    name: str = "",
    generator: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> BitBench:
    """The loss of `model` for every vector of bits, or for `count` random distinct ones.

    Weights are rounded once per layer and width, one scale per output channel; no training follows, as for
    MQ-Bench-101 (Dong et al., EMQ, 2023). One pass over `data` per vector. Memory: ``len(widths)`` more copies of the
    weights.

    Args:
        model: left as it is.
        refs: the layers that get bits; by default all that can be treated.
        count: None for every vector there is.
        method: of `Quantize`: ``mse`` or ``rtn``.

    Raises:
        InputError: no layers, fewer than two widths, fewer than 10 vectors, a loss that is not finite.
    """
    calibration = as_calibration(data)
    layers = tuple(treatable(model, list_layers(model)) if refs is None else refs)
    if not layers:
        raise InputError("bench: the model has no layer that can be treated")
    if len(set(widths)) < 2:
        raise InputError(f"widths: got {tuple(widths)}, expected at least two")
    paths = tuple(ref.path for ref in layers)
    vectors = _vectors(len(layers), sorted(set(widths)), count, seed)
    losses = measure_vectors(model, calibration, paths, vectors, method=method, progress=progress)
    return BitBench(
        layers=paths,
        records=dict(zip(vectors, losses, strict=True)),
        metric=calibration.unit,
        base=calibration.mean_loss(model),
        model=f"{name or type(model).__name__} {fingerprint_model(model)}",
        data=f"{calibration.name} {calibration.fingerprint()}",
        generator=generator,
        meta={"method": method, "seed": seed, "samples": calibration.samples},
    )


def measure_vectors(
    model: nn.Module,
    data: Any,
    paths: Sequence[str],
    vectors: Sequence[tuple[int, ...]],
    *,
    method: str = "mse",
    progress: Callable[[str, int, int], None] | None = None,
) -> list[float]:
    """The loss of `model` with the layers `paths` rounded to each vector of bits; see `build_bench`.

    Raises:
        InputError: an unknown layer or method, or a vector of the wrong length.
    """
    if method not in ("mse", "rtn"):
        raise unknown_name("method", method, ("mse", "rtn"))
    calibration, refs = as_calibration(data), refs_at(model, paths)
    for bits in vectors:
        if len(bits) != len(refs):
            raise InputError(f"bits: got {len(bits)} numbers, expected one for each of {len(refs)} layers")
    rounded = _rounded(model, refs, sorted({b for bits in vectors for b in bits}), method)
    losses = []
    for number, bits in enumerate(vectors):
        losses.append(_loss(model, calibration, refs, [rounded[i][b] for i, b in enumerate(bits)]))
        if progress:
            progress("measuring bit vectors", number + 1, len(vectors))
    return losses


@torch.no_grad()
def _rounded(
    model: nn.Module, refs: Sequence[LayerRef], widths: Sequence[int], method: str
) -> list[Mapping[int, Tensor]]:
    found: list[Mapping[int, Tensor]] = []
    for ref in refs:
        weight = read_matrix(model, ref)
        options = [(Quantize(b, method="rtn" if method == "rtn" else "mse"),) for b in widths]
        dense = treat_weights([weight] * len(options), options, None)
        found.append(dict(zip(widths, dense, strict=True)))
    return found


def _vectors(layers: int, widths: Sequence[int], count: int | None, seed: int) -> list[tuple[int, ...]]:
    everything = len(widths) ** layers
    if count is None or count >= everything:
        if everything > 1_000_000:
            raise InputError(f"bench: {len(widths)}^{layers} vectors are too many to measure; give a count")
        return list(itertools.product(widths, repeat=layers))
    return list(itertools.islice(_random_vectors(layers, widths, seed), count))


def _random_vectors(layers: int, widths: Sequence[int], seed: int) -> Iterator[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    seen: set[tuple[int, ...]] = set()
    while True:
        bits = tuple(int(b) for b in random.choice(widths, layers))
        if bits not in seen:
            seen.add(bits)
            yield bits


def _loss(model: nn.Module, data: Calibration, refs: Sequence[LayerRef], weights: Sequence[Tensor]) -> float:
    with ExitStack() as stack:
        for ref, weight in zip(refs, weights, strict=True):
            stack.enter_context(with_weight(model, ref, weight))
        return data.mean_loss(model)


# -- proxies against a bench ----------------------------------------------------------------------------------------


def rank_proxies(
    bench: BitBench,
    model: nn.Module,
    calibration: Calibration,
    proxies: Sequence[str | BitProxy] = (),
    *,
    tops: Sequence[float] = TOPS,
    samples: int = 64,
    seed: int = 0,
) -> dict[str, dict[float, float]]:
    """Spearman's correlation of each proxy with the bench, among its best shares `tops`.

    Args:
        proxies: names, expressions or files, see `as_proxy`; by default the bundled one and all hand-made.

    Raises:
        InputError: a bench of other layers than the model's.
    """
    refs = refs_at(model, bench.layers)
    chosen = {str(getattr(p, "name", p)): as_proxy(p) for p in proxies or ("emq", *BIT_PROXIES)}
    needs = tuple(dict.fromkeys(name for proxy in chosen.values() for name in proxy.needs))
    statistics = layer_statistics(model, calibration, refs, needs, samples=samples, seed=seed)
    return {name: correlations(bench, proxy, statistics, tops) for name, proxy in chosen.items()}


def correlations(
    bench: BitBench, proxy: BitProxy, statistics: LayerStatistics, tops: Sequence[float] = TOPS
) -> dict[float, float]:
    """Spearman's correlation of one proxy with the bench, by share."""
    scores = vector_scores(proxy.gains(statistics, bench.widths), bench.vectors, bench.widths)
    return {top: spearman(scores, bench.quality, top) for top in tops}


def refs_at(model: nn.Module, paths: Sequence[str]) -> tuple[LayerRef, ...]:
    """The layers of `model` at `paths`.

    Raises:
        InputError: there is no such layer; close names are listed.
    """
    known = {ref.path: ref for ref in list_layers(model)}
    for path in paths:
        if path not in known:
            raise unknown_name("layer", path, known, "the bench")
    return tuple(known[path] for path in paths)


# -- stored tables --------------------------------------------------------------------------------------------------


def stored_bench(name: str) -> BitBench:
    """The table of ``demo:cnn`` or ``demo:vit`` that ships with the package; its `generator` measures it again.

    Raises:
        InputError: there is none of that model.
    """
    path = _FOLDER / f"{name.replace(':', '_')}.json"
    if not path.is_file():
        stored = [item.stem.replace("_", ":") for item in _FOLDER.glob("*.json")]
        raise unknown_name("stored table of bit vectors", name, stored)
    return BitBench.load(path)


def bench_data(name: str, processor: Any = None) -> Calibration:
    """What the stored tables are measured on: the whole calibration part of the demo's data, never the held-out one."""
    return demo_data(name, processor, "calibration", 10_000)
