"""Scorers that judge whole blocks: what is lost if one is removed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.calibration import evaluating
from layerwright.core.capture import first_tensor, watch_outputs
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.option import Scores
from layerwright.core.skip import skip_blocks
from layerwright.nn.treated import TreatedWeight
from layerwright.score.attention_prompt import attention_sites, watch_attention_steps
from layerwright.score.base import SCORERS, Subject
from layerwright.score.gradients import loss_terms

__all__ = ["attention_similarity", "block_magnitude", "block_perplexity", "block_removal", "block_taylor", "similarity"]

Reduction = Literal["sum", "mean", "max", "prod"]


@SCORERS.register("block_removal")
def block_removal(subject: Subject) -> Scores:
    """Loss with one block skipped minus the loss with all: measured, in units of the loss.

    One pass over the data per block. Removing a block that helps nothing may give a negative number.
    """
    begun = time.perf_counter()
    base = subject.calibration.mean_loss(subject.model)
    lost = {path: loss - base for path, loss in _losses_without(subject).items()}
    return _scores(subject, "block_removal", lost, begun, base)


@SCORERS.register("block_perplexity")
def block_perplexity(subject: Subject) -> Scores:
    """Perplexity without the block, ``exp(mean NLL)`` (Kim et al., 2024, arXiv 2402.02834): higher is more important.

    A perplexity that is not finite counts as infinite importance, with a warning.
    """
    begun = time.perf_counter()
    base = _finite(subject.calibration.mean_loss(subject.model))
    values: dict[str, float] = {}
    for path, loss in _losses_without(subject).items():
        values[path] = math.exp(loss) if math.isfinite(loss) and loss < 700 else math.inf
        if values[path] == math.inf:
            warnings.warn(f"the perplexity without {path} is not finite: it counts as indispensable", stacklevel=2)
    return _scores(subject, "block_perplexity", values, begun, base)


def _losses_without(subject: Subject) -> dict[str, float]:
    found: dict[str, float] = {}
    for number, path in enumerate(subject.blocks):
        try:
            with skip_blocks(subject.model, [path]):
                found[path] = subject.calibration.mean_loss(subject.model)
        except InputError:
            continue  # a block that cannot be removed (it changes the shape, or others depend on it) has no score
        if subject.progress:
            subject.progress(number + 1, len(subject.blocks))
    return found


@SCORERS.register("block_magnitude")
def block_magnitude(subject: Subject, power: int = 1) -> Scores:
    """Sum of ``|w| ** power`` over the block's weight matrices and norm vectors, no biases: higher is more important.

    Source: Kim et al. (2024), arXiv 2402.02834, ``Mag``. No data.
    """
    begun = time.perf_counter()
    values = {
        path: sum(float(w.detach().float().abs().pow(power).sum()) for _, w in _scored_weights(subject.model, path))
        for path in subject.blocks
    }
    return _scores(subject, "block_magnitude", values, begun, None)


@SCORERS.register("block_taylor")
def block_taylor(
    subject: Subject,
    power: int = 1,
    accumulate: Literal["signed", "absolute"] = "signed",
    row_reduction: Reduction = "sum",
    matrix_reduction: Reduction = "sum",
) -> Scores:
    """First-order importance of each block, ``sum |w * dL/dw|`` over its weights: higher is more important.

    ``S = w * dL/dw`` is summed over batches with its sign and made absolute afterwards (`signed`, as published), or
    made absolute in each batch (`absolute`). Reductions run over a matrix's rows and over the block's matrices.
    Source: Kim et al. (2024), arXiv 2402.02834, ``Taylor``. Accumulates in float32.

    Raises:
        InputError: a weight that cannot have gradients (quantized).
    """
    begun = time.perf_counter()
    model = subject.model
    weights = {f"{path}|{name}": w for path in subject.blocks for name, w in _scored_weights(model, path)}
    for key, weight in weights.items():
        if not weight.is_floating_point() or not isinstance(weight, nn.Parameter):
            raise InputError(
                f"block_taylor: {key.partition('|')[2]} has no gradient (quantized?): score before treating"
            )
    sums = {key: torch.zeros_like(w, dtype=torch.float32) for key, w in weights.items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with evaluating(model), torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in subject.calibration:
                loss = subject.calibration.loss(model, batch)
                _finite(float(loss.detach()))
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for (key, weight), gradient in zip(weights.items(), gradients, strict=True):
                    if gradient is not None:
                        change = weight.detach().float() * gradient.float()
                        sums[key] += change if accumulate == "signed" else change.abs()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
    values: dict[str, float] = {}
    for path in subject.blocks:
        matrices = [
            _reduce_rows(sums[key].abs().pow(power), row_reduction) for key in sums if key.startswith(f"{path}|")
        ]
        values[path] = float(_reduce(torch.stack(matrices), matrix_reduction)) if matrices else 0.0
    return _scores(subject, "block_taylor", values, begun, None)


def _reduce_rows(values: Tensor, how: Reduction) -> Tensor:
    """Elements of a row are summed, rows are reduced by `how`."""
    rows = values.flatten(1).sum(1) if values.dim() > 1 else values
    return _reduce(rows, how)


def _reduce(values: Tensor, how: Reduction) -> Tensor:
    if how == "max":
        return values.max()
    return values.sum() if how == "sum" else values.mean() if how == "mean" else values.prod()


def _scored_weights(model: nn.Module, block: str) -> list[tuple[str, Tensor]]:
    """Matrices and norm vectors of a block, no biases; a packed weight as the dense one it stands for."""
    module = model.get_submodule(block)
    dense = [(name, p) for name, p in module.named_parameters() if not name.endswith("bias")]
    treated = [(name, m) for name, m in module.named_modules() if isinstance(m, TreatedWeight)]
    return dense + [(f"{name}.weight", m.dequantize()) for name, m in treated]


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise InputError(
            f"batches: the loss of the whole model is {loss}; sequences need at least 2 tokens that count, and the "
            "model's weights must be finite"
        )
    return loss


@SCORERS.register("similarity")
def similarity(subject: Subject) -> Scores:
    """One minus the cosine of a block's input and output, averaged over tokens (block influence, Men et al., 2024):
    higher is more important. No unit of the loss.
    """
    return _similarity(subject, "similarity", list(subject.blocks))


@SCORERS.register("attention_similarity")
def attention_similarity(subject: Subject) -> Scores:
    """One minus the cosine of the stream before and after each block's attention, averaged over tokens.

    The attention's share is its output added to the block's input. Source: SqueezeAttention (Wang et al., 2024).
    """
    begun = time.perf_counter()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def see(block: str, before: Tensor, after: Tensor) -> None:
        _add_distance(sums, counts, block, before, after)

    sites = attention_sites(subject.model, list(subject.blocks))
    with torch.no_grad(), evaluating(subject.model), watch_attention_steps(subject.model, sites, see):
        for batch in subject.calibration:
            subject.calibration.forward(subject.model, batch)
    values = {path: sums[path] / counts[path] for path in sums}
    return _scores(subject, "attention_similarity", values, begun, None)


def _similarity(subject: Subject, name: str, paths: Sequence[str]) -> Scores:
    begun = time.perf_counter()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}

    def see(path: str, args: Any, output: Any) -> None:
        before, after = first_tensor(args), first_tensor(output)
        if before.shape == after.shape:
            _add_distance(sums, counts, path, before, after)

    _run(subject, paths, see)
    return _scores(subject, name, {path: sums[path] / counts[path] for path in sums}, begun, None)


def _add_distance(sums: dict[str, float], counts: dict[str, int], path: str, before: Tensor, after: Tensor) -> None:
    if before.dim() == 4:  # images: channels are the features of a position
        before, after = before.movedim(1, -1), after.movedim(1, -1)
    cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
    sums[path] = sums.get(path, 0.0) + float((1 - cosine).sum())
    counts[path] = counts.get(path, 0) + cosine.numel()


def _run(subject: Subject, paths: Sequence[str], see: Any) -> None:
    with torch.no_grad(), evaluating(subject.model), watch_outputs(subject.model, paths, see):
        for batch in subject.calibration:
            subject.calibration.forward(subject.model, batch)


def _scores(subject: Subject, name: str, values: Mapping[str, float], begun: float, base: float | None) -> Scores:
    return Scores(
        scorer=name,
        sensitivities=values,
        model=fingerprint_model(subject.model),
        data=subject.calibration.fingerprint(),
        base_loss=base,
        seconds=time.perf_counter() - begun,
        meta={"terms": sum(loss_terms(batch) for batch in subject.calibration)},
    )
