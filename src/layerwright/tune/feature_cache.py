"""Features of a frozen prefix: what comes before the first trained block is computed once for each sample."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from layerwright.core.calibration import evaluating, logits_of
from layerwright.core.errors import InputError
from layerwright.core.kept_blocks import Returning

__all__ = ["FeatureCache", "Prefix"]

Run = Callable[[nn.Module, Tensor], Any]
"""``run(model, index)``: a forward of `model` on the samples at the positions `index` ``(rows,)``."""
_PROBE = 3


@dataclass(frozen=True)
class _Kept:
    """One module's output: its structure, and of each leaf whether it has a row for each sample, and its values."""

    spec: Any
    by_row: tuple[bool, ...]
    values: tuple[Any, ...]

    def take(self, index: Tensor) -> Any:
        """The output for the samples at `index`: copies, so that what is kept cannot be written to."""
        leaves = [
            value[index.to(value.device)] if rows else value.clone() if isinstance(value, Tensor) else value
            for rows, value in zip(self.by_row, self.values, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def blank(self, index: Tensor) -> Any:
        """NaN in the shape of the output, without memory: what nothing reads."""
        leaves = [
            value.new_full((), float("nan")).expand(len(index) if rows else value.shape[0], *value.shape[1:])
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim()
            else value
            for rows, value in zip(self.by_row, self.values, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    @property
    def can_blank(self) -> bool:
        """Whether NaN can stand for all of it."""
        return bool(self.values) and all(
            isinstance(value, Tensor) and value.is_floating_point() and value.dim() for value in self.values
        )

    @property
    def bytes(self) -> int:
        """Of the values."""
        return sum(value.numel() * value.element_size() for value in self.values if isinstance(value, Tensor))


class Prefix:
    """What is kept of the modules that run before a model's first trained one.

    Attributes:
        kept: outputs by path, of the modules that later ones read.
        skipped: further paths, whose outputs nothing behind the prefix reads.
    """

    def __init__(self, kept: Mapping[str, _Kept], skipped: Mapping[str, _Kept]) -> None:
        self.kept, self.skipped = dict(kept), dict(skipped)

    @property
    def bytes(self) -> int:
        """Memory of the features."""
        return sum(value.bytes for value in self.kept.values())

    @contextmanager
    def running(self, model: nn.Module, index: Tensor) -> Iterator[None]:
        """Context: the modules of the prefix in `model` (or a copy of it) return what is kept of the samples `index`."""
        replies = {path: value.take(index) for path, value in self.kept.items()}
        replies |= {path: value.blank(index) for path, value in self.skipped.items()}
        with _replying(model, replies):
            yield


class FeatureCache:
    """Outputs of a frozen model up to a module, kept for all samples, for one module after the other.

    Modules only, no tracing: the model's own code runs, and modules that end before the given one begins answer with
    what they gave before. Which of them later code reads is found by putting NaN in the place of each. Exact as long
    as the prefix is frozen, in evaluation mode, and the same samples give the same inputs (no augmentation).

    Args:
        model: frozen; copies of it with the same paths can use the features.
        run: ``run(model, index)``.
        samples: number of samples.
        batch_size: samples in one forward.
        max_bytes: of all features together; the oldest go first, and a prefix beyond it is not kept at all.
    """

    def __init__(
        self, model: nn.Module, run: Run, samples: int, *, batch_size: int = 256, max_bytes: float = 2e9
    ) -> None:
        if samples < 1 or batch_size < 1:
            raise InputError(f"samples, batch_size: got {samples} and {batch_size}, expected at least 1")
        self.model, self.run, self.samples = model, run, samples
        self.batch_size, self.max_bytes = batch_size, max_bytes
        self._prefixes: OrderedDict[str, Prefix | None] = OrderedDict()
        self._events: list[tuple[str, bool]] | None = None

    def first(self, paths: Sequence[str]) -> str:
        """The one of `paths` that begins first when the model runs.

        Raises:
            InputError: none of them runs.
        """
        order = [path for path, starts in self._recorded() if starts]
        ran = [path for path in paths if path in order]
        if not ran:
            raise InputError(f"blocks: none of {', '.join(paths)} runs when the model does")
        return min(ran, key=order.index)

    def prefix(self, paths: Sequence[str]) -> Prefix | None:
        """What can be kept before the first of `paths`; None if nothing can, or it is too large."""
        boundary = self.first(paths)
        if boundary not in self._prefixes:
            self._prefixes[boundary] = self._build(boundary)
            while len(self._prefixes) > 1 and self._bytes() > self.max_bytes:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(boundary)
        return self._prefixes[boundary]

    def _bytes(self) -> int:
        return sum(prefix.bytes for prefix in self._prefixes.values() if prefix is not None)

    def _recorded(self) -> list[tuple[str, bool]]:
        """``(path, whether it starts)`` of all modules, in the order of one forward."""
        if self._events is None:
            self._events = _events(self.model, lambda: self._forward(torch.arange(min(_PROBE, self.samples))))
        return self._events

    @torch.no_grad()
    def _forward(self, index: Tensor) -> Tensor:
        with evaluating(self.model):
            return logits_of(self.run(self.model, index))

    def _build(self, boundary: str) -> Prefix | None:
        candidates = _before(self._recorded(), boundary)
        if self.samples < _PROBE or not candidates:
            return None
        few, fewer = torch.arange(_PROBE), torch.arange(_PROBE - 1)
        seen, seen_fewer = self._capture(candidates, few), self._capture(candidates, fewer)
        probes = {path: _row_leaves(seen[path], seen_fewer[path]) for path in candidates}
        needed = [path for path in candidates if not probes[path].can_blank or self._reads(probes, [path], few)]
        blank = [path for path in candidates if path not in needed]
        if self._reads(probes, blank, few):  # one alone is not read, together they are
            needed, blank = list(candidates), []
        row_bytes = sum(probes[path].bytes for path in needed) / _PROBE
        if row_bytes * self.samples > self.max_bytes:
            return None
        kept = self._collect(needed, probes)
        return None if kept is None else Prefix(kept, {path: probes[path] for path in blank})

    def _capture(self, paths: Sequence[str], index: Tensor) -> dict[str, Any]:
        """Outputs of the modules called `paths` on the samples `index`."""
        found: dict[str, Any] = {}
        with _hooked(self.model, paths, lambda path, output: found.__setitem__(path, _cloned(output))):
            self._forward(index)
        return found

    def _reads(self, probes: Mapping[str, _Kept], blank: Sequence[str], index: Tensor) -> bool:
        """Whether the result changes when the outputs of `blank` are NaN and those of the others as they were."""
        replies = {path: kept.blank(index) if path in blank else kept.take(index) for path, kept in probes.items()}
        expected = self._forward(index)
        try:
            with _replying(self.model, replies):
                return not torch.equal(self._forward(index), expected)
        except (RuntimeError, ValueError, IndexError):
            return True

    def _collect(self, paths: Sequence[str], probes: Mapping[str, _Kept]) -> dict[str, _Kept] | None:
        """Outputs on all samples; None if one that has no row for each sample changes from batch to batch."""
        parts: dict[str, list[list[Any]]] = {path: [] for path in paths}
        for index in torch.arange(self.samples).split(self.batch_size):
            for path, output in self._capture(paths, index).items():
                leaves, spec = tree_flatten(output)
                if spec != probes[path].spec:
                    return None
                parts[path].append(leaves)
        kept: dict[str, _Kept] = {}
        for path, batches in parts.items():
            values = []
            for rows, *leaves in zip(probes[path].by_row, *batches, strict=True):
                if not rows and not all(_same(leaf, leaves[0]) for leaf in leaves):
                    return None
                values.append(torch.cat(leaves) if rows else leaves[0])
            kept[path] = _Kept(probes[path].spec, probes[path].by_row, tuple(values))
        return kept


def _events(model: nn.Module, forward: Callable[[], object]) -> list[tuple[str, bool]]:
    events: list[tuple[str, bool]] = []
    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: events.append((path, True))))
            handles.append(module.register_forward_hook(lambda *_, path=path: events.append((path, False))))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return events


def _before(events: Sequence[tuple[str, bool]], boundary: str) -> list[str]:
    """The outermost modules that run once and end before `boundary` begins."""
    starts = [path for path, begins in events if begins]
    ended = [path for path, begins in events[: events.index((boundary, True))] if not begins]
    once = {path for path in ended if starts.count(path) == 1}
    return [path for path in dict.fromkeys(ended) if path in once and not _has_ancestor(path, once)]


def _has_ancestor(path: str, paths: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:length]) in paths for length in range(1, len(parts)))


@contextmanager
def _hooked(model: nn.Module, paths: Sequence[str], see: Callable[[str, Any], None]) -> Iterator[None]:
    def hook(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: see(path, output)

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replying(model: nn.Module, replies: Mapping[str, Any]) -> Iterator[None]:
    """Context: these modules of `model` return these outputs instead of running."""
    patched: list[tuple[nn.Module, Any]] = []
    try:
        for path, reply in replies.items():
            module = model.get_submodule(path)
            patched.append((module, module.__dict__.get("forward")))
            module.forward = Returning(reply)  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in patched:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward  # type: ignore[method-assign]


def _row_leaves(three: Any, two: Any) -> _Kept:
    """The output on three samples, and which of its leaves have a row for each sample: they are shorter on two."""
    leaves, spec = tree_flatten(three)
    others, _ = tree_flatten(two)
    by_row = tuple(
        isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0 and (len(a), len(b)) == (_PROBE, _PROBE - 1)
        for a, b in zip(leaves, others, strict=True)
    )
    return _Kept(spec, by_row, tuple(leaves))


def _cloned(output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)
