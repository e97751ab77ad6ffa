"""The three jobs of `layerwright bench-mq`: measure bit vectors, rank proxies on them, search a proxy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.data.loading import DEMOS
from layerwright.recipes.bench import Bench, open_bench
from layerwright.recipes.bench_mq import bench_data, build_bench, rank_proxies, refs_at, stored_bench
from layerwright.score.proxies import STATISTICS, BitBench, EvolvedProxy, evolve_proxy, layer_statistics

__all__ = ["bench_job", "proxy_job", "search_job"]

Progress = Callable[[str, int, int], None]
Correlations = dict[str, dict[float, float]]


def bench_job(
    model: str,
    data: str | Path | None,
    *,
    count: int,
    widths: str = "2,3,4",
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> BitBench:
    """Measure `count` random bit vectors of a model on its calibration data, and write the table to `out`.

    Raises:
        InputError: `widths` are no whole numbers.
    """
    numbers = _widths(widths)
    bench = open_bench(model, data)
    table = build_bench(
        bench.model,
        _measured_on(bench, data),
        widths=numbers,
        count=count,
        seed=seed,
        name=bench.name,
        generator=f"layerwright bench-mq {model} --build {count} --widths {widths} --seed {seed} --out FILE",
        progress=progress,
    )
    if out is not None:
        table.save(out)
    return table


def _measured_on(bench: Bench, data: str | Path | None) -> Calibration:
    images = data is None and bench.name in DEMOS and bench.name != "demo:lm"
    return bench_data(bench.name, bench.processor) if images else bench.calibration


def _widths(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if len(found) < 2 or not 2 <= found[0] <= found[-1] <= 8:
        raise InputError(f"widths: got {text!r}, expected two or more whole numbers from 2 to 8 such as 2,3,4")
    return found


def proxy_job(
    model: str, data: str | Path | None, table: str | Path | None, proxies: Sequence[str] = (), *, seed: int = 0
) -> Correlations:
    """Correlation of each proxy with the table, by share of the best vectors."""
    records = _table(model, table)
    bench = open_bench(model, data)
    return rank_proxies(records, bench.model, bench.calibration, proxies, seed=seed)


def search_job(
    model: str,
    data: str | Path | None,
    table: str | Path | None,
    *,
    iterations: int,
    also: Sequence[str] = (),
    inputs: str | None = None,
    top: float = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> tuple[EvolvedProxy, Correlations]:
    """Search a proxy on half of the table; returns it, and correlations on the other half beside other proxies'.

    Args:
        also: more demo models, whose stored tables count as much.
    """
    wanted = tuple(STATISTICS) if inputs is None else tuple(part.strip() for part in inputs.split(","))
    found_on, statistics, judged = [], [], []
    for name in dict.fromkeys([model, *also]):
        own, others = _table(name, table if name == model else None).split_half(seed)
        bench = open_bench(name, data if name == model else None)
        statistics.append(layer_statistics(bench.model, bench.calibration, refs_at(bench.model, own.layers), wanted))
        found_on.append(own)
        judged.append((name, others, bench))
    found = evolve_proxy(
        found_on,
        statistics,
        iterations=iterations,
        inputs=wanted,
        topk=top,
        seed=seed,
        samples=None,
        progress=progress,
        **settings,
    )
    if out is not None:
        found.save(out)
    names = [found.best.to_string(), "emq", "snip", "synflow", "size"]
    rows: Correlations = {}
    for name, others, bench in judged:
        ranks = rank_proxies(others, bench.model, bench.calibration, names, seed=seed)
        rows |= {f"{proxy} on {name}" if also else proxy: row for proxy, row in ranks.items()}
    return found, rows


def _table(model: str, table: str | Path | None) -> BitBench:
    return stored_bench(model) if table is None else BitBench.load(table)
