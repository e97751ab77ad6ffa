"""Start a network so that every layer's output has unit variance on real data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.core.capture import first_tensor
from layerwright.core.errors import InputError
from layerwright.train._lsuv_layers import (
    Chosen,
    Layer,
    attention_weights,
    cuda_devices,
    find_layers,
    first_weights_,
    is_frozen,
    shared_with_embedding,
)

__all__ = ["LSUVReport", "LSUVRow", "lsuv_", "orthonormal_"]


@dataclass(frozen=True)
class LSUVRow:
    """One product with a weight.

    Attributes:
        name: path of the layer; of `nn.MultiheadAttention` with ``.query``, ``.key``, ``.value`` or ``.output``.
        order: 0 for the layer that runs first.
        var_before: variance of its output with orthonormal weights (or the given ones), earlier layers done.
        var_after: with the new weights.
        tries: times that the weight was divided.
        scale: what the weight was multiplied by, in all.
        converged: whether `var_after` is within the tolerance.
        note: why the layer was left alone; empty otherwise.
    """

    name: str
    order: int
    var_before: float
    var_after: float
    tries: int
    scale: float
    converged: bool
    note: str = ""


@dataclass(frozen=True)
class LSUVReport:
    """What `lsuv_` did, layer by layer in the order in which they run."""

    rows: tuple[LSUVRow, ...]
    target_var: float
    tol: float

    @property
    def converged(self) -> bool:
        """Whether every layer that was not left alone is within the tolerance."""
        return all(row.converged or row.note for row in self.rows)

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "converged": self.converged,
            "target_var": self.target_var,
            "tol": self.tol,
            "layers": [asdict(row) for row in self.rows],
        }


def orthonormal_(weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill `weight` with orthonormal rows (or columns, if they are fewer), times `gain`.

    Axes after the first are one. Computed in float32 for half precision. Source: Saxe et al., "Exact solutions to the
    nonlinear dynamics of learning in deep linear neural networks" (2014).
    """
    exact = torch.empty_like(
        weight, dtype=torch.promote_types(weight.dtype, torch.float32), memory_format=torch.contiguous_format
    )
    nn.init.orthogonal_(exact, gain, generator)
    with torch.no_grad():
        return weight.copy_(exact)


def lsuv_(
    model: nn.Module,
    batch: Any,
    layers: Chosen = None,
    *,
    tol: float = 0.1,
    max_iter: int = 10,
    orthonormal: bool = True,
    streaming: bool = True,
    target_var: float = 1.0,
    exclude: Sequence[str] = (),
    forward: Callable[[nn.Module, Any], Any] | None = None,
    generator: torch.Generator | None = None,
) -> LSUVReport:
    """Layer-sequential unit-variance initialisation (Mishkin and Matas, 2016, arXiv 1511.06422), in place.

    Every linear layer, convolution and attention layer starts orthonormal, with biases of zero. Then, in the order in
    which they run, each weight is divided by the standard deviation of its output, over samples, positions and
    channels, while earlier layers keep what they were given. The model runs in evaluation mode; its flags and the
    random state are as before afterwards.

    Frozen layers and those that share an embedding's table are left as they are. A layer that runs several times counts
    by its first run. Time with `streaming`: one forward pass; else one for each layer and try. If anything fails, the
    model is as it was.

    Args:
        model: any module.
        batch: what the model takes: a tensor, or a dictionary or tuple of arguments; several hundred samples, with
            variance near one. Or, without `streaming`, a function that returns the next batch.
        layers: names or patterns (``"blocks.*"``), or ``chosen(name, module)``; all if left out.
        tol: how far the variance may be off, as a share of `target_var`.
        max_iter: divisions of a layer at most.
        orthonormal: False keeps weights and biases and scales only.
        streaming: scale each layer while the batch passes through it. Exact for layers without a bias; others are
            computed again on the same input.
        target_var: the variance that is wanted.
        exclude: names or patterns of layers that are left alone.
        forward: ``forward(model, batch)``, for models that take something else.
        generator: of the orthonormal weights.

    Raises:
        InputError: a setting outside its range, an empty batch, names that match nothing, a layer that does not run,
            weights that are computed from others, or an output without variance.
        TypeError: weights without values or not of floating point.
    """
    if not tol > 0 or not target_var > 0:
        raise InputError(f"tol, target_var: got {tol} and {target_var}, expected positive numbers")
    if max_iter < 1:
        raise InputError(f"max_iter: got {max_iter}, expected at least 1")
    if callable(batch) and streaming:
        raise InputError("batch: got a function; streaming passes one batch, so give one, or streaming=False")
    chosen = find_layers(model, layers, exclude)
    job = _Job(model, chosen, tol, max_iter, target_var)
    next_batch: Callable[[], Any] = batch if callable(batch) else lambda: batch
    run = forward or (lambda network, inputs: as_calibration([inputs]).forward(network, inputs))
    saved = [(p, p.detach().clone()) for layer in chosen for p in layer.parameters()]
    first = next_batch()
    _check_batch(first)
    with evaluating(model), torch.no_grad(), _kept_state(model):
        try:
            if orthonormal:
                for layer in job.layers:
                    first_weights_(layer, partial(orthonormal_, generator=generator))
            if streaming:
                job.stream(lambda: run(model, first))
            else:
                job.repeat(lambda: run(model, next_batch()))
        except BaseException:
            for parameter, values in saved:
                parameter.copy_(values)
            raise
    rows = sorted(job.rows, key=lambda row: row.order)
    return LSUVReport(tuple(rows), target_var, tol)


@contextmanager
def _kept_state(model: nn.Module) -> Iterator[None]:
    """Keep the random state, and attention of PyTorch off its path that passes modules by."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=cuda_devices(model)):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _check_batch(batch: Any) -> None:
    values: Sequence[Any] = batch if isinstance(batch, list | tuple) else [batch]
    if isinstance(batch, Mapping):
        values = list(batch.values())
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        return
    if not tensors[0].numel():
        raise InputError("batch: got no samples, expected some hundreds")
    if len(tensors[0]) == 1:
        warnings.warn(
            "batch: one sample only; variances are over its positions and channels", UserWarning, stacklevel=3
        )
    for tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError("batch: got numbers that are not finite; clean the data first")


class _Found(Exception):  # noqa: N818 - stops a pass, no error
    """The layer that was looked for has run."""


class _Job:
    """Layers on their way to unit variance."""

    def __init__(self, model: nn.Module, chosen: Sequence[Layer], tol: float, max_iter: int, target: float) -> None:
        self.tol, self.max_iter, self.target = tol, max_iter, target
        self.rows: list[LSUVRow] = []
        self._done: set[int] = set()
        self._notes: dict[str, str] = {}
        self.layers: list[Layer] = []
        self._chosen = chosen
        for layer in chosen:
            table = shared_with_embedding(model, layer)
            if table is not None:
                warnings.warn(f"{layer.name}: left alone, since {table} has the same weight", UserWarning, stacklevel=3)
                self._notes[layer.name] = f"shares the weight of {table}"
            elif is_frozen(layer):
                self._notes[layer.name] = "frozen"
            else:
                self.layers.append(layer)

    def stream(self, run: Callable[[], Any]) -> None:
        """Scale every layer in one pass."""
        handles = [handle for layer in self._chosen for handle in self._watch(layer)]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        self._all_ran()

    def repeat(self, run: Callable[[], Any]) -> None:
        """Scale one layer after the other; every measurement is a pass that ends at the layer."""
        order: list[Layer] = []

        def remember(layer: Layer) -> Callable[..., None]:
            return lambda *_: order.append(layer) if layer not in order else None

        handles = [layer.module.register_forward_hook(remember(layer)) for layer in self._chosen]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        for layer in order:
            for part in range(4 if isinstance(layer.module, nn.MultiheadAttention) else 1):
                self._settle_by_passes(layer, part, run)
            self._done.update(id(p) for p in layer.parameters() if p.dim() > 1)
        self._all_ran(ran={layer.name for layer in order})

    def _settle_by_passes(self, layer: Layer, part: int, run: Callable[[], Any]) -> None:
        if self._passed(layer):
            return

        def variance() -> float:
            seen: list[float] = []

            def stop(*values: Any) -> None:
                outputs = _outputs(layer, *values)
                seen.append(_variance(outputs[part]()))
                raise _Found

            handle = layer.module.register_forward_hook(stop, with_kwargs=True)
            try:
                run()
            except _Found:
                pass
            finally:
                handle.remove()
            return seen[0]

        weight = _weights(layer)[part]
        self._settle(_part_names(layer)[part], weight, variance, None if self._notes.get(layer.name) else weight)

    def _watch(self, layer: Layer) -> list[Any]:
        attention = isinstance(layer.module, nn.MultiheadAttention)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._passed(layer):
                return
            outputs = _outputs(layer, module, args, kwargs, None)
            for part in range(3):
                self._scale(layer, part, outputs[part])

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._passed(layer):
                return None
            self._done.update(id(p) for p in layer.parameters() if p.dim() > 1)
            if attention:
                again = lambda: first_tensor(module.forward(*args, **kwargs))  # noqa: E731
                self._scale(layer, 3, again)
                return module.forward(*args, **kwargs)
            bias = getattr(module, layer.bias or "", None)
            if bias is None or not bias.any():
                factor = self._scale(layer, 0, lambda: output, linear=True)
                return output * factor
            self._scale(layer, 0, lambda: module.forward(*args, **kwargs))
            return module.forward(*args, **kwargs)

        hooks = [layer.module.register_forward_hook(after, with_kwargs=True)]
        if attention:
            hooks.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
        return hooks

    def _passed(self, layer: Layer) -> bool:
        return any(id(p) in self._done for p in layer.parameters() if p.dim() > 1)

    def _scale(self, layer: Layer, part: int, output: Callable[[], Tensor], linear: bool = False) -> float:
        weight = _weights(layer)[part]
        factor = [1.0]

        def variance() -> float:
            return _variance(output()) * (factor[0] ** 2 if linear else 1.0)

        free = None if self._notes.get(layer.name) else weight
        factor[0] = self._settle(_part_names(layer)[part], weight, variance, free, factor)
        return factor[0]

    def _settle(
        self,
        name: str,
        weight: Tensor,
        variance: Callable[[], float],
        free: Tensor | None,
        factor: list[float] | None = None,
    ) -> float:
        """Divide `weight` until the variance fits; returns what it was multiplied by."""
        order, tries = len(self.rows), 0
        factor = factor or [1.0]
        now = first = variance()
        layer_name = name
        while True:
            if not math.isfinite(now) or now <= 0:
                raise InputError(
                    f"batch: the output of {layer_name} (number {order + 1} to run) has variance {now:g}: its input is "
                    "constant or not finite; use other data, or exclude the layer"
                )
            fits = abs(now / self.target - 1) < self.tol
            if free is None or fits or tries >= self.max_iter:
                break
            step = math.sqrt(self.target / now)
            weight.mul_(step)
            factor[0] *= step
            tries += 1
            now = variance()
        note = next((text for owner, text in self._notes.items() if name == owner or name.startswith(owner + ".")), "")
        self.rows.append(LSUVRow(name, order, first, now, tries, factor[0], fits, note if free is None else ""))
        return factor[0]

    def _all_ran(self, ran: set[str] | None = None) -> None:
        ran = ran if ran is not None else {row.name for row in self.rows}
        for layer in self._chosen:
            if layer.name not in ran and not self._passed(layer) and f"{layer.name}.output" not in ran:
                raise InputError(f"layers: {layer.name} does not run when the batch passes; exclude it")


def _part_names(layer: Layer) -> list[str]:
    if isinstance(layer.module, nn.MultiheadAttention):
        return [f"{layer.name}.{part}" for part in ("query", "key", "value", "output")]
    return [layer.name]


def _weights(layer: Layer) -> list[Tensor]:
    if isinstance(layer.module, nn.MultiheadAttention):
        return [*attention_weights(layer.module), layer.module.out_proj.weight.data]
    owner: Any = layer.module
    return [owner.weight.data]


def _outputs(layer: Layer, module: nn.Module, args: Any, kwargs: Any, output: Any) -> list[Callable[[], Tensor]]:
    """Each product of the layer, computed from what it was given."""
    if not isinstance(module, nn.MultiheadAttention):
        return [lambda: first_tensor(output)]
    given = dict(zip(("query", "key", "value"), args, strict=False)) | {
        k: v for k, v in kwargs.items() if k in ("query", "key", "value")
    }
    biases = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.chunk(3))

    def product(place: int, name: str) -> Callable[[], Tensor]:
        return lambda: nn.functional.linear(given[name], attention_weights(module)[place], biases[place])

    products = [product(place, name) for place, name in enumerate(("query", "key", "value"))]
    return [*products, lambda: first_tensor(output)]


def _variance(output: Any) -> float:
    return float(first_tensor(output).float().var(unbiased=False))
