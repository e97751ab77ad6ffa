"""Run a model from one block on: the blocks before it hand on the outputs that were kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating, logits_of

__all__ = ["KeptBlocks", "Returning"]


class KeptBlocks:
    """Outputs of a model on a fixed set of batches, with the blocks before a change left out.

    The model's own code runs; only the forward of a block whose output is known returns it. Exact: nothing before a
    changed block depends on it. Blocks that run twice in a forward, or whose output is written to afterwards, cannot be
    kept, and then everything runs. Memory: the outputs of all blocks on all batches, on the model's device.

    Args:
        model: evaluated without gradients; its parameters may change between calls.
        calibration: re-iterable in a fixed order.
        units: paths of the blocks, none inside another; without any, every call is a whole forward.
        batches: the batches to run; by default those of `calibration`.
        predict: what is returned for a batch; by default the logits ``(rows, classes)`` in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        units: Sequence[str] = (),
        batches: Sequence[Any] | None = None,
        predict: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.model, self.calibration, self.units = model, calibration, tuple(units)
        self.batches = list(calibration) if batches is None else list(batches)
        self._predict = predict or self._logits
        self._kept: list[dict[str, Any]] = [{} for _ in self.batches]
        self.forwards = 0.0

    @torch.no_grad()
    def keep(self, changed: str = "") -> list[Tensor]:
        """Predictions on each batch, and every block's output kept anew.

        With `changed`, a path, the blocks before it are taken as they were kept.
        """
        logits = []
        with evaluating(self.model):
            for number, batch in enumerate(self.batches):
                with self._skipping(number, changed) as skipped, self._recording(skipped) as seen:
                    logits.append(self._predict(batch))
                self._count(skipped)
                outputs = {**{path: self._kept[number][path] for path in skipped}, **dict(seen)}
                written = any(t._version for _, out in seen for t in _tensors(out) if not t.is_inference())
                whole = len(outputs) == len(seen) + len(skipped) and not written
                self._kept[number] = outputs if whole else {}
        return logits

    @torch.no_grad()
    def logits(self, changed: str = "") -> list[Tensor]:
        """Predictions on each batch where at most the block that holds `changed`, and later ones, differ from what is kept."""
        found = []
        with evaluating(self.model):
            for number, batch in enumerate(self.batches):
                with self._skipping(number, changed) as skipped:
                    found.append(self._predict(batch))
                self._count(skipped)
        return found

    def position(self, path: str) -> int:
        """Place of the unit that holds `path` in the order in which units ran, -1 if none was kept that does."""
        order = list(self._kept[0]) if self._kept else []
        return next((i for i, unit in enumerate(order) if path == unit or path.startswith(unit + ".")), -1)

    def _logits(self, batch: Any) -> Tensor:
        logits = logits_of(self.calibration.forward(self.model, batch)).float()
        return logits.flatten(0, -2)

    def _count(self, skipped: Sequence[str]) -> None:
        """Adds up how much of a forward was run, in forwards of all batches."""
        self.forwards += (1 - len(skipped) / max(len(self.units), 1)) / len(self.batches)

    @contextmanager
    def _recording(self, skipped: Sequence[str]) -> Iterator[list[tuple[str, Any]]]:
        """Context: yields the list that ``(path, output)`` of each unit that really runs is added to."""
        seen: list[tuple[str, Any]] = []
        handles = []
        for path in (unit for unit in self.units if unit not in skipped):

            def hook(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
                seen.append((path, output))

            handles.append(self.model.get_submodule(path).register_forward_hook(hook))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _skipping(self, number: int, changed: str) -> Iterator[list[str]]:
        """Context: the units that ran before the one that holds `changed` return what is kept; yields their paths."""
        kept = self._kept[number]
        order = list(kept)
        skipped = order[: max(self.position(changed), 0)] if changed and order else []
        patched: list[tuple[nn.Module, Any]] = []
        try:
            for unit in skipped:
                module = self.model.get_submodule(unit)
                patched.append((module, module.__dict__.get("forward")))
                module.forward = Returning(kept[unit])  # type: ignore[method-assign]
            yield skipped
        finally:
            for module, forward in patched:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward  # type: ignore[method-assign]


class Returning:
    """A forward that returns what it holds."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """What it holds."""
        return self.output


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in _tensors(item)]
