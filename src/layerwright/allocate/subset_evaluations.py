"""Evaluate sets of blocks once each: remembered in a file, in several processes, the same figures in any order."""

from __future__ import annotations

import json
import math
import pickle
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from layerwright.core.block_paths import check_block_paths
from layerwright.core.errors import InputError, unknown_name
from layerwright.score.proxies.bench import write_atomically

__all__ = ["SubsetEvaluations"]

Subset = tuple[str, ...]
Evaluate = Callable[[Subset], "float | Sequence[float]"]
"""``evaluate(blocks)``: accuracy after training those blocks, or the accuracies of several runs; higher is better."""
Told = Callable[[str, int, int], None]
VERSION = "layerwright_subsets"

_evaluate: Evaluate | None = None
"""Of a worker process, set once when it starts."""


class SubsetEvaluations:
    """What sets of blocks give, each evaluated once.

    Use as a context where there are several workers: it ends their processes.

    Args:
        evaluate: a function of the set alone: same set, same figures. With several workers it is sent to fresh
            processes of one thread each, so it must be a module's function or an object of a module's class; a script
            needs ``if __name__ == "__main__":``.
        blocks: all that can be chosen, in order; sets are kept in this order.
        path: JSON file that is rewritten whole after each evaluation; what it holds already is not evaluated again.
        key: what the figures depend on (settings, fingerprints); a file with another one is refused.
        workers: processes, at least 1.
        progress: ``progress(set and its accuracy, done, total)`` within one call.

    Raises:
        InputError: overlapping blocks, no workers, a file of something else, or an `evaluate` that cannot be sent.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        blocks: Sequence[str],
        *,
        path: str | Path | None = None,
        key: Mapping[str, Any] | None = None,
        workers: int = 1,
        progress: Told | None = None,
    ) -> None:
        self.blocks = check_block_paths(blocks)
        if workers < 1:
            raise InputError(f"parallel: got {workers}, expected at least 1")
        self.evaluate, self.workers, self.progress = evaluate, workers, progress
        self.path = None if path is None else Path(path)
        self.key = json.loads(json.dumps(dict(key or {})))
        self.known: dict[Subset, tuple[float, ...]] = {}
        self.results: dict[str, Any] = {}
        self.count = 0
        self._pool: Executor | None = None
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
            self._pool = None

    def ordered(self, chosen: Iterable[str]) -> Subset:
        """`chosen` in the order of the blocks.

        Raises:
            InputError: not one of the blocks.
        """
        wanted = set(chosen)
        for name in wanted - set(self.blocks):
            raise unknown_name("block", name, self.blocks, "blocks")
        return tuple(name for name in self.blocks if name in wanted)

    def runs(self, sets: Sequence[Iterable[str]], what: str = "") -> list[tuple[float, ...]]:
        """The accuracies of every run of each set, in the order of `sets`; only unknown ones are evaluated.

        Raises:
            InputError: an evaluation that gives NaN, infinity or nothing; the message names the set.
        """
        wanted = [self.ordered(chosen) for chosen in sets]
        missing = [chosen for chosen in dict.fromkeys(wanted) if chosen not in self.known]
        done = len(set(wanted)) - len(missing)
        for chosen, given in self._evaluated(missing):
            self.known[chosen] = _checked(chosen, given)
            self.count += 1
            self.write()
            done += 1
            if self.progress:
                named = " + ".join(chosen) or "readout alone"
                self.progress(f"{what}{named}: {statistics.fmean(self.known[chosen]):.1%}", done, len(set(wanted)))
        return [self.known[chosen] for chosen in wanted]

    def __call__(self, sets: Sequence[Iterable[str]], what: str = "") -> list[float]:
        """The mean accuracy of each set."""
        return [statistics.fmean(values) for values in self.runs(sets, what)]

    def write(self, **results: Any) -> None:
        """Write the file, with `results` beside the evaluations; nothing happens without a path."""
        self.results |= results
        if self.path is None:
            return
        rows = [{"blocks": list(chosen), "runs": list(values)} for chosen, values in sorted(self.known.items())]
        write_atomically(self.path, {VERSION: 1, "key": self.key, **self.results, "evaluations": rows})

    def _load(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data[VERSION] != 1:
                raise KeyError("version")
            key = data["key"]
            rows = {self.ordered(row["blocks"]): tuple(map(float, row["runs"])) for row in data["evaluations"]}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no record of evaluated blocks of this version ({error}); remove it") from error
        different = sorted(name for name in {*key, *self.key} if key.get(name) != self.key.get(name))
        if different:
            raise InputError(
                f"{path} was made with other settings ({', '.join(different)}): use the same ones to go on, or remove it"
            )
        self.known = {chosen: _checked(chosen, values) for chosen, values in rows.items()}

    def _evaluated(self, sets: Sequence[Subset]) -> Iterator[tuple[Subset, Any]]:
        """Each set with what it gives, as soon as it is known."""
        if self.workers == 1 or not sets:
            for chosen in sets:
                yield chosen, self.evaluate(chosen)
            return
        pool = self._open()
        waiting: dict[Future[Any], Subset] = {pool.submit(_work, chosen): chosen for chosen in sets}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        finally:
            for future in waiting:
                future.cancel()

    def _open(self) -> Executor:
        import multiprocessing

        if self._pool is None:
            # As bytes, since tensors would be shared through files that this process has to keep open. They go to children
            # that this process starts, and to nothing else.
            try:
                sent = pickle.dumps(self.evaluate)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise InputError(
                    f"parallel: evaluate cannot be sent to another process ({error}); define it in a module, or use 1"
                ) from error
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, _start, (sent,))
        return self._pool


def _checked(chosen: Subset, given: Any) -> tuple[float, ...]:
    values = tuple(map(float, given)) if isinstance(given, Sequence) else (float(given),)
    if not values or not all(math.isfinite(value) for value in values):
        shown = ", ".join(f"{value:g}" for value in values) or "nothing"
        raise InputError(f"evaluate: gave {shown} for the set {{{', '.join(chosen)}}}, expected finite accuracies")
    return values


def _start(sent: bytes) -> None:
    import torch

    global _evaluate
    torch.set_num_threads(1)
    _evaluate = pickle.loads(sent)


def _work(chosen: Subset) -> Any:
    assert _evaluate is not None
    return _evaluate(chosen)
