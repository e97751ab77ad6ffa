"""Candidates of factorised convolutions at work: their weights computed once, their accuracy on search batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.allocate.factor_options import FactorOption
from layerwright.core.calibration import Calibration, evaluating, logits_of
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.core.treatment import FactorConv, Treatments
from layerwright.recipes.prefix_runs import PrefixRuns
from layerwright.treat.factorize import composed_kernel, conv_kernels

__all__ = ["FactorBench", "search_batches"]

DENSE_BYTES = 256 << 20
"""Kernels that are kept as the chain amounts to them; beyond, they are multiplied out for every forward."""
TIE = 1e-3
"""Weight of the right label's probability beside the accuracy: few samples tie often."""


class FactorBench:
    """A classifier whose convolutions can be exchanged for what their chains amount to; the model is left untouched.

    Forwards of an ``nn.Sequential`` on search batches begin at the first layer in which they differ from earlier ones.

    Args:
        model: the classifier.
        calibration: batches with labels.
        batch_size: samples of one search batch.

    Raises:
        InputError: data without labels, or a model whose output is not one row of logits for each label.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, batch_size: int = 128) -> None:
        self.model, self.calibration = structure_copy(model), calibration
        self._batches = search_batches(calibration, batch_size)
        self._kernels: dict[tuple[str, FactorConv], list[Tensor]] = {}
        self._dense: dict[tuple[str, FactorConv], Tensor] = {}
        self._dense_bytes = 0
        self._weights = {
            path: module.weight for path, module in self.model.named_modules() if isinstance(module, nn.Conv2d)
        }
        self._known: dict[tuple[tuple[tuple[str, Treatments], ...], int], float] = {}
        plain = calibration.loss_fn is None and all(isinstance(batch, tuple) for batch in self._batches)
        self._prefix = PrefixRuns(self.model, self._weights) if plain and PrefixRuns.suits(self.model) else None

    @property
    def batches(self) -> int:
        """Number of search batches."""
        return len(self._batches)

    def kernel(self, path: str, factor: FactorConv) -> Tensor:
        """The kernel that the chain of `factor` at `path` amounts to; its factors are computed once."""
        weight = self._weights[path]
        key = (path, factor)
        if key in self._dense:
            return self._dense[key]
        if key not in self._kernels:
            # No seed of the search goes in here: applying the plan must find the same factors.
            found = conv_kernels(weight.detach(), factor, name=path)
            self._kernels[key] = [kernel.to(weight.dtype) for kernel in found]
        dense = composed_kernel(self._kernels[key], factor).to(weight.dtype)
        size = dense.numel() * dense.element_size()
        if self._dense_bytes + size <= DENSE_BYTES:
            self._dense[key] = dense
            self._dense_bytes += size
        return dense

    def batch_accuracy(self, layers: Mapping[str, Treatments], batch: int) -> float:
        """Share of right labels in one search batch, plus `TIE` times their mean probability (then divided by 1 + `TIE`)."""
        key = (tuple(sorted((path, t) for path, t in layers.items() if t)), batch)
        if key not in self._known:
            right, probability, rows = self._run(layers, self._batches[batch], batch)
            self._known[key] = (right + TIE * probability) / (rows * (1 + TIE))
        return self._known[key]

    def accuracy(self, layers: Mapping[str, Treatments], data: Calibration | None = None) -> float:
        """Share of right labels in `data`, by default in all search batches."""
        if data is None:
            found = [self._run(layers, batch, number) for number, batch in enumerate(self._batches)]
        else:
            found = [self._run(layers, batch) for batch in data]
        return sum(right for right, _, _ in found) / sum(rows for _, _, rows in found)

    def admit(
        self,
        options: Mapping[str, Sequence[FactorOption]],
        tolerance: float,
        scan: str = "smallest",
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, tuple[FactorOption, ...]]:
        """Candidates that cost at most `tolerance` of the first batch's accuracy when they are the only change.

        Within one decomposition ranks are tried from one end; the first that passes admits those after it untried. The
        layer as it is always stays, in the last place.

        Args:
            options: candidates by layer, as `enumerate_factorizations` lists them.
            tolerance: accuracy, 0 to 1; at 1 everything is admitted untried.
            scan: ``smallest`` or ``largest`` rank first.
            progress: ``progress(words, done, total)``, after each layer.
        """
        if scan not in ("smallest", "largest"):
            raise unknown_name("scan", scan, ("smallest", "largest"))
        floor = self.batch_accuracy({}, 0) - tolerance
        kept: dict[str, tuple[FactorOption, ...]] = {}
        for number, (path, own) in enumerate(options.items()):
            families: dict[Any, list[FactorOption]] = {}
            for option in own:
                factor = next((t for t in option.treatments if isinstance(t, FactorConv)), None)
                if factor is not None:
                    families.setdefault((factor.method, factor.scheme, factor.groups), []).append(option)
            passed: list[FactorOption] = []
            for family in families.values():
                ordered = family if scan == "smallest" else family[::-1]
                good = 0 if tolerance >= 1 else len(ordered)
                for place, option in enumerate(ordered[:good]):
                    if self.batch_accuracy({path: option.treatments}, 0) >= floor - 1e-12:
                        good = place
                        break
                passed += ordered[good:]
            kept[path] = (*passed, own[-1])
            if progress:
                progress("trying candidates", number + 1, len(options))
        return kept

    @torch.no_grad()
    def _run(self, layers: Mapping[str, Treatments], batch: Any, number: int | None = None) -> tuple[int, float, int]:
        """``(right labels, sum of the right labels' probabilities, labels)``; `number` is that of a search batch."""
        with _kernels_of(self, layers) as changed, evaluating(self.model):
            if self._prefix is None or number is None:
                output = self.calibration.forward(self.model, batch)
            else:
                output = self._prefix.run(batch[0], number, changed.factors)
            logits = logits_of(output).float()
        labels = _labels(batch)
        if logits.dim() != 2 or len(logits) != len(labels):
            raise InputError(
                f"mixed_td: the model gives {tuple(logits.shape)} for {len(labels)} labels, expected (labels, classes)"
            )
        if not bool(logits.isfinite().all()):
            return 0, 0.0, len(labels)
        chances = logits.softmax(-1).gather(1, labels[:, None])
        return int((logits.argmax(-1) == labels).sum()), float(chances.sum()), len(labels)


class _kernels_of:  # noqa: N801 - reads as a statement
    """Context: the bench's model with other kernels."""

    def __init__(self, bench: FactorBench, layers: Mapping[str, Treatments]) -> None:
        self.bench = bench
        self.factors = {p: t for p, own in layers.items() for t in own if isinstance(t, FactorConv)}

    def __enter__(self) -> _kernels_of:
        for path, factor in self.factors.items():
            kernel = nn.Parameter(self.bench.kernel(path, factor), requires_grad=False)
            self.bench.model.get_submodule(path)._parameters["weight"] = kernel
        return self

    def __exit__(self, *_: object) -> None:
        for path in self.factors:
            self.bench.model.get_submodule(path)._parameters["weight"] = self.bench._weights[path]  # type: ignore[assignment]


def search_batches(calibration: Calibration, batch_size: int) -> list[Any]:
    """The calibration's samples in batches of `batch_size` (the last may be smaller, but not below half of it).

    Raises:
        InputError: batches without labels.
    """
    batches = list(calibration)
    for batch in batches:
        _labels(batch)
    joined: Any
    if isinstance(batches[0], Mapping):
        joined = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
        parts = {key: value.split(batch_size) for key, value in joined.items()}
        cut: list[Any] = [dict(zip(parts, items, strict=True)) for items in zip(*parts.values(), strict=True)]
    else:
        joined = [torch.cat([b[i] for b in batches]) for i in range(2)]
        cut = list(zip(*(part.split(batch_size) for part in joined), strict=True))
    if len(cut) > 1 and 2 * len(_labels(cut[-1])) < batch_size:
        del cut[-1]
    return cut


def _labels(batch: Any) -> Tensor:
    labels = (
        batch.get("labels")
        if isinstance(batch, Mapping)
        else batch[1]
        if isinstance(batch, tuple | list) and len(batch) == 2
        else None
    )
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        raise InputError("mixed_td: the data has no labels, one for each sample; it goes by accuracy")
    return labels
