"""What proxies look at: activation, gradient, weight, Hessian and virtual gradient of every layer, measured once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating, logits_of
from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layer import LayerRef, get_parameter, read_matrix
from layerwright.score.gradients import loss_terms, weight_gradients
from layerwright.score.hessian import hessian_diagonals, top_eigenvalues
from layerwright.score.replay import thin_batch

__all__ = ["STATISTICS", "LayerStatistics", "joined", "layer_statistics"]

STATISTICS: dict[str, str] = {
    "A": "output of the layer, (samples, features)",
    "G": "gradient of the loss for the weight, (out, in)",
    "W": "weight, (out, in)",
    "H": "diagonal of the Hessian for the weight, (out, in)",
    "V": "virtual gradient: of the summed output for an input of ones with absolute weights, (out, in)",
    "GW": "gradient times weight, (out, in)",
}
"""Inputs of proxy expressions."""

EXTRA: dict[str, str] = {
    "F": "Fisher information of the output channels, (1, channels)",
    "E": "top eigenvalue of the Hessian, (1, 1)",
}
"""What hand-made proxies need beyond those."""

EIGEN_SAMPLES = 16
"""Samples for the top eigenvalues, which cost a pass per layer and iteration; at least one batch."""


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of layers, each a float32 matrix per layer.

    Attributes:
        paths: of the layers.
        numel: weights of each layer; positions: outputs per sample and channel (1 where not measured).
        lists: statistic to one matrix per layer; large ones are thinned to evenly spaced rows and columns.
        weights: the whole weights ``(count, out, in)``, as they are in the model: for proxies that quantize them.
    """

    paths: tuple[str, ...]
    numel: tuple[int, ...]
    positions: tuple[int, ...]
    lists: Mapping[str, tuple[Tensor, ...]]
    weights: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        """One matrix per layer.

        Raises:
            InputError: unknown, or not measured.
        """
        if name in self.lists:
            return self.lists[name]
        if name == "GW" and {"G", "W"} <= set(self.lists):
            return tuple(g * w for g, w in zip(self.lists["G"], self.lists["W"], strict=True))
        if name not in STATISTICS and name not in EXTRA:
            raise unknown_name("statistic", name, [*STATISTICS, *EXTRA])
        raise InputError(f"statistic {name} was not measured; measure it with which=({name!r}, ...)")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Statistics that expressions may read here."""
        return tuple(
            name for name in STATISTICS if name in self.lists or (name == "GW" and {"G", "W"} <= set(self.lists))
        )


def joined(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """The layers of several networks as one list, with the statistics that all of them have."""
    first, *others = parts
    if not others:
        return first
    shared = [name for name in first.lists if all(name in part.lists for part in others)]
    return LayerStatistics(
        paths=tuple(path for part in parts for path in part.paths),
        numel=tuple(n for part in parts for n in part.numel),
        positions=tuple(n for part in parts for n in part.positions),
        lists={name: tuple(x for part in parts for x in part.lists[name]) for name in shared},
        weights=tuple(weight for part in parts for weight in part.weights),
    )


def layer_statistics(
    model: nn.Module,
    calibration: Calibration,
    refs: Sequence[LayerRef],
    which: Sequence[str] = ("A", "G", "W", "H", "V"),
    *,
    samples: int = 64,
    probes: int = 4,
    limit: int = 1 << 17,
    seed: int = 0,
) -> LayerStatistics:
    """Measure statistics of `refs` on the first `samples` samples; `model` is left as it is.

    Memory: `limit` numbers per layer and statistic are kept; while measuring, one float32 copy of the weights for each
    of G and H, and a float64 copy of the model for V.

    Args:
        which: names in `STATISTICS`, ``F`` (Fisher information) and ``E`` (top eigenvalue).
        probes: random probes for H.
        limit: numbers of one matrix that are kept.

    Raises:
        InputError: unknown statistic; a layer without a weight; one without an output of its own, for A and F; a loss
            without a gradient, for G, H, F and E; a statistic that is not finite.
    """
    for name in which:
        if name not in STATISTICS and name not in EXTRA:
            raise unknown_name("statistic", name, [*STATISTICS, *EXTRA])
    if not refs:
        raise InputError("statistics: no layers were given; give those that can be treated")
    wanted = set(which) | ({"G", "W"} if "GW" in which else set())
    for ref in refs:
        if not ref.parameter or ref.numel == 0:
            raise InputError(f"{ref.path}: this layer has no weight, so it has no statistics; leave it out")
    data = calibration.head(samples)
    _refuse_flat_loss(model, data, refs, wanted)
    lists: dict[str, Sequence[Tensor]] = {"W": [_flat(read_matrix(model, ref)) for ref in refs]}
    positions = (1,) * len(refs)
    if "G" in wanted:
        lists["G"] = [_flat(gradient) for gradient in weight_gradients(model, data, refs).values()]
    if "H" in wanted:
        diagonals = hessian_diagonals(model, data, refs, samples=probes, seed=seed)
        lists["H"] = [_flat(diagonals[ref.path]) for ref in refs]
    if "V" in wanted:
        lists["V"] = [_flat(gradient) for gradient in _virtual_gradients(model, data, refs)]
    if "E" in wanted:
        found = top_eigenvalues(model, data.head(EIGEN_SAMPLES), refs, iterations=8, seed=seed)
        lists["E"] = [torch.tensor([[found[ref.path]]]) for ref in refs]
    if wanted & {"A", "F"}:
        lists["A"], lists["F"], positions = _outputs(model, data, refs, gradient="F" in wanted)
    kept = {
        name: tuple(_thin(x, limit, columns_only=name == "A") for x in lists[name]) for name in lists if name in wanted
    }
    for name, tensors in kept.items():
        for ref, tensor in zip(refs, tensors, strict=True):
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"{ref.path}: its statistic {name} is not finite; check weights and data, or leave {name} out"
                )
    weights = tuple(read_matrix(model, ref) for ref in refs)
    return LayerStatistics(tuple(ref.path for ref in refs), tuple(r.numel for r in refs), positions, kept, weights)


def _flat(matrices: Tensor) -> Tensor:
    """``(count, out, in)`` as ``(count * out, in)`` float32."""
    return matrices.detach().float().flatten(0, 1)


def _thin(x: Tensor, limit: int, *, columns_only: bool = False) -> Tensor:
    """Evenly spaced rows and columns, `limit` numbers at most; the same ones for matrices of one shape.

    With `columns_only` all rows stay as long as there are at most `limit`: they are samples, and layers are compared.
    """
    if x.numel() <= limit:
        return x.contiguous()
    share = limit / x.numel()
    rows = min(len(x), limit) if columns_only else max(1, int(len(x) * math.sqrt(share)))
    columns = max(1, min(int(x.shape[1] * math.sqrt(share)) if not columns_only else x.shape[1], limit // rows))
    for axis, count in enumerate((rows, columns)):
        x = x.index_select(axis, torch.linspace(0, x.shape[axis] - 1, count, device=x.device).round().long())
    return x.contiguous()


def _refuse_flat_loss(model: nn.Module, data: Calibration, refs: Sequence[LayerRef], wanted: set[str]) -> None:
    """Raise `InputError` where statistics need a gradient that the loss does not have."""
    needing = sorted(wanted & {"G", "H", "E", "F"})
    if not needing:
        return
    weight = get_parameter(model, refs[0].parameter)
    required = weight.requires_grad
    try:
        with evaluating(model), torch.enable_grad():
            weight.requires_grad_(True)
            loss = data.loss(model, next(iter(data)))
    finally:
        weight.requires_grad_(required)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise InputError(
            f"statistics {', '.join(needing)} need a loss with a gradient, and this one has none; give a loss that can be "
            "differentiated, or use W, V and A only"
        )


def _virtual_gradients(model: nn.Module, data: Calibration, refs: Sequence[LayerRef]) -> list[Tensor]:
    """Gradient of the log of the summed output for an input of ones, with absolute weights (Tanaka et al., 2020).

    The logarithm divides all layers by one number, so that deep networks do not overflow. Inputs that are indices
    (tokens) stay as they are.
    """
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    batch = _map(thin_batch(next(iter(data)), 1), lambda x: torch.ones_like(x, dtype=torch.float64))

    def loss(network: nn.Module, inputs: Any) -> Tensor:
        total = logits_of(data.forward(network, inputs)).sum()
        return total / total.detach().abs().clamp(min=1e-300)

    try:
        found = weight_gradients(twin, Calibration([batch], loss), refs)
    except RuntimeError as error:
        raise InputError(f"statistic V: the model does not run on an input of ones ({error}); leave V out") from error
    return [found[ref.path] for ref in refs]


def _map(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`batch` with its floating-point tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_map(value, change) for value in batch)
    return batch


def _outputs(
    model: nn.Module, data: Calibration, refs: Sequence[LayerRef], *, gradient: bool
) -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
    """Outputs ``(samples, features)``, Fisher information ``(1, channels)`` and positions of every layer."""
    modules = dict(model.named_modules())
    for ref in refs:
        if ref.path not in modules or ref.layout not in ("linear", "conv1d", "conv"):
            raise InputError(
                f"{ref.path}: has no output of its own, so it has no statistic A or F; leave the layer or these out"
            )
    outputs: dict[str, list[Tensor]] = {ref.path: [] for ref in refs}
    fisher: dict[str, Tensor] = {}
    rows = positions = 0
    sizes: dict[str, int] = dict.fromkeys(outputs, 1)

    def hook(ref: LayerRef) -> Any:
        def forward(_module: nn.Module, _args: Any, output: Tensor) -> None:
            x = output.detach().float()
            sizes[ref.path] = max(x.numel() // max(rows, 1) // ref.shape[0], 1)
            outputs[ref.path].append(x.reshape(rows, -1) if x.numel() % rows == 0 else x.flatten(1))
            if gradient and output.requires_grad:
                output.register_hook(lambda slope: add(ref, x, slope.detach().float() * rows))

        return forward

    def add(ref: LayerRef, x: Tensor, slope: Tensor) -> None:
        # As in Theis et al. (2018): a channel's effect is summed over positions before it is squared.
        product = (x * slope).flatten(2).transpose(1, 2) if ref.layout == "conv" else x * slope
        effect = (
            product.reshape(rows, -1, ref.shape[0]).sum(1) if product.numel() % rows == 0 else product.flatten(0, -2)
        )
        found = 0.5 * effect.square().sum(0, keepdim=True)
        fisher[ref.path] = fisher[ref.path] + found if ref.path in fisher else found

    handles = [modules[ref.path].register_forward_hook(hook(ref)) for ref in refs]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with evaluating(model), torch.set_grad_enabled(gradient):
            first = next(iter(model.parameters()))
            for parameter in model.parameters():
                parameter.requires_grad_(gradient and parameter is first)
            for batch in data:
                rows = _samples(batch)
                positions += rows
                if gradient:
                    torch.autograd.grad(data.loss(model, batch), [first], allow_unused=True)
                else:
                    data.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    for ref in refs:
        if not outputs[ref.path]:
            raise InputError(f"{ref.path}: does not run on this data, so it has no statistic A or F; leave it out")
    empty = {ref.path: torch.zeros(1, ref.shape[0]) for ref in refs}
    joined = [torch.cat(parts) if len({p.shape[1] for p in parts}) == 1 else parts[0] for parts in outputs.values()]
    channels = [fisher.get(ref.path, empty[ref.path]) / max(positions, 1) for ref in refs]
    return joined, channels, tuple(sizes[ref.path] for ref in refs)


def _samples(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), loss_terms(batch))
