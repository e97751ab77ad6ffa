"""Where proxies are evaluated: in this process, in several, or on Ray. The result never depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from layerwright.core.errors import InputError, require_extra, unknown_name
from layerwright.score.proxies.expression import ProxyTree
from layerwright.score.proxies.statistics import LayerStatistics

__all__ = ["Engine", "Evaluate", "evaluator"]

Engine = Literal["serial", "processes", "ray"]
Evaluate = Callable[[Sequence[ProxyTree]], list[tuple[float, ...]]]
"""``evaluate(proxies) -> layer values``, in order; not finite where an operation is not defined."""

_statistics: LayerStatistics | None = None
"""Of a worker process, set once when it starts."""


@contextmanager
def evaluator(statistics: LayerStatistics, engine: Engine = "serial", workers: int = 1) -> Iterator[Evaluate]:
    """Context: a function that evaluates proxies on `statistics`.

    ``processes`` starts fresh interpreters, each with one thread and its own copy of the statistics: a script that
    searches this way needs ``if __name__ == "__main__":``.

    Raises:
        InputError: unknown engine or no workers. MissingExtraError: Ray is not installed.
    """
    if engine not in ("serial", "processes", "ray"):
        raise unknown_name("engine", str(engine), ("serial", "processes", "ray"))
    if workers < 1:
        raise InputError(f"workers: got {workers}, expected at least 1")
    if engine == "serial":
        yield lambda proxies: [_values(proxy, statistics) for proxy in proxies]
    elif engine == "processes":
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start, (_portable(statistics),)) as pool:
            yield lambda proxies: list(pool.map(_worker, [proxy.genotype() for proxy in proxies]))
    else:
        ray: Any = require_extra("ray", "search")
        started = not ray.is_initialized()
        if started:
            ray.init(num_cpus=workers, include_dashboard=False, logging_level="error")
        try:
            shared = ray.put(_portable(statistics))
            remote = ray.remote(_on_ray)
            yield lambda proxies: list(ray.get([remote.remote(proxy.genotype(), shared) for proxy in proxies]))
        finally:
            if started:
                ray.shutdown()


def _values(proxy: ProxyTree, statistics: LayerStatistics) -> tuple[float, ...]:
    return tuple(proxy.layer_values(statistics).tolist())


_Portable = tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], dict[str, list[Any]]]


def _portable(statistics: LayerStatistics) -> _Portable:
    """As arrays: tensors would be shared through files that the parent has to keep open."""
    arrays = {name: [x.cpu().numpy() for x in statistics.lists[name]] for name in statistics.lists}
    return statistics.paths, statistics.numel, statistics.positions, arrays


def _unpack(portable: _Portable) -> LayerStatistics:
    import torch

    paths, numel, positions, arrays = portable
    lists = {name: tuple(torch.from_numpy(x.copy()) for x in arrays[name]) for name in arrays}
    return LayerStatistics(paths, numel, positions, lists)


def _start(portable: _Portable) -> None:
    import torch

    global _statistics
    torch.set_num_threads(1)
    _statistics = _unpack(portable)


def _worker(genotype: dict[str, Any]) -> tuple[float, ...]:
    assert _statistics is not None
    return _values(ProxyTree.from_genotype(genotype), _statistics)


def _on_ray(genotype: dict[str, Any], portable: _Portable) -> tuple[float, ...]:
    return _values(ProxyTree.from_genotype(genotype), _unpack(portable))
