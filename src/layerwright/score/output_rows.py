"""What each output row of a linear layer costs in the loss when it is rounded (Zheng et al., 2024, MixLLM)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, evaluating
from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, read_matrix
from layerwright.nn.quantizer import fake_quantize, find_scale

__all__ = ["Order", "RoundRows", "RowLosses", "output_row_loss", "round_rows", "row_terms", "weight_row_error"]

Order = Literal["first+second", "second", "diagonal"]
RoundRows = Callable[[Tensor], Tensor]
"""Weights ``(out, in)`` to their rounded values."""


@dataclass(frozen=True)
class RowLosses:
    """Scores of rows by layer.

    Attributes:
        losses: path to ``(out,)`` float32, of 0 and above, in units of the loss summed over samples.
        unused: layers that some sample never reached (their loss is 0 there).
        samples: how many were summed.
    """

    losses: Mapping[str, Tensor]
    unused: tuple[str, ...] = ()
    samples: int = 0


def round_rows(bits: int, group_size: int = 128) -> RoundRows:
    """Plain rounding to nearest in groups, with a zero point below 8 bits."""

    def rounded(weight: Tensor) -> Tensor:
        symmetric = bits == 8
        scale, zero = find_scale(weight, bits, group_size, symmetric, full_range=symmetric)
        return fake_quantize(weight, scale, zero, bits)

    return rounded


def row_terms(x: Tensor, gradient: Tensor, delta: Tensor, order: Order = "first+second") -> Tensor:
    """Loss change of each row ``(out,)`` float32 for one sample.

    With the weight gradient ``G = gradient^T x`` of the sample and ``t_o = sum_k G[o, k] * delta[o, k]``:
    ``|t_o + t_o**2 / 2|``; the second term is half of ``d^T (g g^T) d`` with the empirical Fisher matrix of that row.
    `second` leaves out the first-order term, `diagonal` keeps ``sum_k (G * delta)**2 / 2``.

    Args:
        x: ``(tokens, in)``.
        gradient: ``(tokens, out)``, of the loss at the layer's output.
        delta: ``(out, in)``, rounded minus original weight.
    """
    x, gradient, delta = x.float(), gradient.float(), delta.float()
    if order == "diagonal":
        return ((gradient.t() @ x) * delta).square().sum(1) / 2
    # t_o = sum_s gradient[s, o] * (x @ delta^T)[s, o]: the gradient of the weight itself is never formed.
    t = (gradient * (x @ delta.t())).sum(0)
    return (t + t.square() / 2).abs() if order == "first+second" else t.square() / 2


def output_row_loss(
    model: nn.Module,
    calibration: Calibration,
    refs: Sequence[LayerRef],
    quantizer: RoundRows,
    *,
    order: Order = "first+second",
    reduction: Literal["sum", "mean"] = "sum",
    progress: Callable[[int, int], None] | None = None,
) -> RowLosses:
    """Score every output row of the linear layers `refs` by what rounding it does to the loss of each sample.

    One forward and one backward pass for each sample (sequence); what a batch holds several of is taken apart. Text
    without labels is its own label. Parameters receive no gradients: the outputs of the first layers are the roots of
    the graph, and each layer's term is formed when its output gradient arrives, with the input at hand. Memory: one
    sample's activations, and one rounding error per layer in the dtype of the weights.

    Args:
        model: left as it is.
        calibration: data and loss.
        refs: layers with layout `linear` or `conv1d`.
        quantizer: rounds a weight to the *lower* of the widths that are to be told apart (`round_rows`).
        order: see `row_terms`.
        reduction: over samples.
        progress: called with (done, total).

    Raises:
        InputError: a layer that is not linear, or whose weight is tied to another's; a model that gives no loss, or one
            whose loss has no gradient.
    """
    if order not in ("first+second", "second", "diagonal") or reduction not in ("sum", "mean"):
        raise InputError(
            f"order: got {order!r} and {reduction!r}, expected first+second, second or diagonal; sum, mean"
        )
    _check(model, refs)
    deltas = {ref.path: _delta(model, ref, quantizer) for ref in refs}
    losses = {ref.path: torch.zeros(ref.shape[0]) for ref in refs}
    unused: dict[str, None] = {}
    samples = [sample for batch in calibration for sample in _samples(batch)]
    for number, sample in enumerate(samples):
        seen: set[str] = set()
        found = {ref.path: torch.zeros_like(losses[ref.path]) for ref in refs}

        def add(path: str, x: Tensor, gradient: Tensor, found: dict[str, Tensor] = found) -> None:
            rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            found[path] += row_terms(*rows, deltas[path].to(x.device), order).cpu()

        _backward(model, calibration, sample, refs, seen, add)
        for path, term in found.items():
            losses[path] += term
        unused |= dict.fromkeys(path for path in losses if path not in seen)
        if progress:
            progress(number + 1, len(samples))
    if reduction == "mean":
        losses = {path: total / len(samples) for path, total in losses.items()}
    return RowLosses(losses, tuple(path for path in losses if path in unused), len(samples))


def weight_row_error(model: nn.Module, refs: Sequence[LayerRef], quantizer: RoundRows) -> dict[str, Tensor]:
    """The same kind of table by the mean squared error of each row's weights: what to hold loss-based rows against."""
    return {ref.path: _delta(model, ref, quantizer).float().square().mean(1) for ref in refs}


def _check(model: nn.Module, refs: Sequence[LayerRef]) -> None:
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{path}.{name}" if path else name
                other = owners.setdefault(id(parameter), full)
                tied = next((ref for ref in refs if ref.parameter in (full, other)), None) if other != full else None
                if tied is not None:
                    raise InputError(
                        f"{tied.path}: its weight is tied to {full if other == tied.parameter else other}; "
                        "leave such layers out"
                    )
    for ref in refs:
        if ref.layout not in ("linear", "conv1d") or ref.kind == "embedding":
            raise InputError(f"{ref.path}: rows are scored in linear layers, this is {ref.kind} ({ref.layout})")
        if ref.tied:
            raise InputError(f"{ref.path}: its weight is tied to {ref.tied}; leave such layers out")


def _delta(model: nn.Module, ref: LayerRef, quantizer: RoundRows) -> Tensor:
    weight = read_matrix(model, ref)[0]
    with torch.no_grad():
        return (quantizer(weight.float()) - weight.float()).to(weight.dtype)


def _samples(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each a batch of one."""
    tensors = [t for t in _leaves(batch) if t.dim()]
    rows = len(tensors[0]) if tensors else 1
    if rows == 1 or any(len(t) != rows for t in tensors):
        yield batch
        return
    for row in range(rows):
        yield _take(batch, row)


def _leaves(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in _leaves(value)]
    return [t for value in batch for t in _leaves(value)] if isinstance(batch, tuple | list) else []


def _take(batch: Any, row: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[row : row + 1] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {key: _take(value, row) for key, value in batch.items()}
    return type(batch)(_take(value, row) for value in batch) if isinstance(batch, tuple | list) else batch


def _labelled(calibration: Calibration, sample: Any) -> Any:
    own = calibration.loss_fn is None and isinstance(sample, Mapping) and "input_ids" in sample
    return {**sample, "labels": sample["input_ids"]} if own and "labels" not in sample else sample


def _backward(
    model: nn.Module,
    calibration: Calibration,
    sample: Any,
    refs: Sequence[LayerRef],
    seen: set[str],
    add: Callable[[str, Tensor, Tensor], None],
) -> None:
    """One forward and backward pass; ``add(path, input, output gradient)`` for every run of every layer."""
    roots: list[Tensor] = []

    def hook(path: str) -> Any:
        def forward(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            seen.add(path)
            if not torch.is_grad_enabled() or output.is_inference():
                return None
            fresh = None
            if not output.requires_grad:
                fresh = output = output.detach().requires_grad_()
                roots.append(output)
            output.register_hook(lambda gradient: add(path, x, gradient.detach()))
            return fresh

        return forward

    with ExitStack() as stack:
        for ref in refs:
            module = model.get_submodule(ref.path)
            handle = module.register_forward_hook(hook(ref.path), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_frozen(model))
        try:
            loss = calibration.loss(model, _labelled(calibration, sample))
        except TypeError as error:
            if str(error).startswith("no loss"):
                raise InputError(str(error)) from error
            raise
        if not loss.requires_grad or not roots:
            raise InputError(
                "the loss has no gradient at any of these layers: the model detaches its outputs, or inference mode is on"
            )
        torch.autograd.grad(loss, roots, allow_unused=True)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Context: no parameter asks for gradients."""
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
