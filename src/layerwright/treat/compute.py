"""Treatments of a weight, jointly and in rank order: low rank, sparsity, quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.treatment import (
    LowRank,
    MixRows,
    Narrow,
    Quantize,
    RoundActivations,
    Sparsify,
    Treatments,
    describe,
)
from layerwright.nn.quantizer import range_scale
from layerwright.nn.stored import Stored
from layerwright.score.statistics import InputStatistics, gram_energy
from layerwright.treat._pieces import join_counts, merge_rows, split_rows
from layerwright.treat.checks import check_treatments, needed_statistics
from layerwright.treat.factorize import low_rank
from layerwright.treat.narrow import choose_neurons, fitted_columns
from layerwright.treat.prune import magnitude_mask, removed_weights, sparsegpt, spread_evenly, wanda_mask
from layerwright.treat.quantize import Factor, Order, factor_notes, gptq_with, mix_rows, prepare, round_to_nearest

__all__ = ["relative_error", "treated", "treated_group"]

CHUNK_NUMEL = 1 << 26
"""Gram elements that are factorised at a time (256 MiB, of which three copies live); at least one matrix."""

_FALLBACK = {
    "gptq": "gptq rounds to nearest",
    "wanda": "wanda goes by magnitude",
    "sparsegpt": "sparsegpt goes by magnitude",
    "activation": "the weight itself is factorised",
}


@torch.no_grad()
def treated(
    weight: Tensor,
    treatments: Treatments,
    stats: InputStatistics | None,
    *,
    scale_dtype: torch.dtype,
    name: str = "layer",
) -> tuple[Stored, list[str]]:
    """Treat `weight` ``(count, out, in)``; return what it became, and notes on what did not go as planned.

    Methods that need statistics fall back where there are none (`gptq` rounds to nearest, `wanda` and `sparsegpt` go
    by magnitude, `activation` factorises the weight, static activations become dynamic), and a note says so.

    Args:
        weight: any float dtype; computed in float32.
        treatments: any of `LowRank`, `Sparsify` and `Quantize`, at most one each; none keeps the weight.
        stats: of the layer's input. A grouped convolution has one set for each group: ``stats.count`` of them for a
            weight of count 1.
        scale_dtype: dtype that scales are stored in.
        name: the layer's, for errors.

    Raises:
        InputError: sizes that do not fit, weights or statistics that are not finite; names the layer.
    """
    return treated_group([weight], [treatments], stats, scale_dtype=scale_dtype, names=[name])[0]


@torch.no_grad()
def treated_group(
    weights: Sequence[Tensor],
    treatments: Sequence[Treatments],
    stats: InputStatistics | None,
    *,
    scale_dtype: torch.dtype,
    names: Sequence[str] = (),
) -> list[tuple[Stored, list[str]]]:
    """`treated` for layers that read the same input: its second moments are factorised once.

    Weights with equal `Quantize` treatments by GPTQ go through its loop stacked, which gives the same codes. Experts
    are taken as many at a time as `CHUNK_NUMEL` allows.
    """
    names = names or [f"layer {i}" for i in range(len(weights))]
    if any(isinstance(t, Narrow) for own in treatments for t in own):
        return [_narrowed(*job, stats, scale_dtype) for job in zip(names, weights, treatments, strict=True)]
    jobs = [_parse(*job) for job in zip(names, weights, treatments, strict=True)]
    if any(job.mixed is not None for job in jobs):
        return _with_mixed_rows(jobs, stats, scale_dtype)
    if stats is None or not bool((stats.tokens > 0).any()):
        return [_without_statistics(job, scale_dtype) for job in jobs]
    stats.check(", ".join(names))
    for job in jobs:
        _check_statistics(job, stats)

    masks = [_static_mask(job, stats) for job in jobs]
    done: list[list[tuple[Stored, Tensor]]] = [[] for _ in jobs]
    for i, job in enumerate(jobs):
        if job.low_rank is not None and stats.count != len(job.weight):
            # A grouped convolution has no single input that the right factor could read.
            stored, _ = _treat(job, job.weight, None, None, None, scale_dtype)
            done[i].append((stored, torch.zeros(3, 1, dtype=torch.bool)))
    stacks = _stacks({i: job for i, job in enumerate(jobs) if not done[i]})
    size = max(CHUNK_NUMEL // stats.in_features**2, 1)
    for start in range(0, stats.count, size):
        part = slice(start, start + size)
        moments = _Moments(None if stats.only_diagonal else stats.gram[part], stats.tokens[part])
        for numbers in stacks:
            job, mask = jobs[numbers[0]], masks[numbers[0]]
            rows = [_fold(jobs[i].weight, stats.count)[part] for i in numbers]
            kept = None if mask is None else _fold(mask, stats.count)[part]
            stacked = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
            stored, used = _treat(job, stacked, kept, moments, _removed(job, stats.count, part), scale_dtype)
            flags = _flags(used, moments.tokens)
            pieces = [stored] if len(rows) == 1 else split_rows(stored, [row.shape[1] for row in rows])
            for i, piece in zip(numbers, pieces, strict=True):
                done[i].append((piece, flags))
    return [_finish(job, pieces, stats) for job, pieces in zip(jobs, done, strict=True)]


@torch.no_grad()
def relative_error(weight: Tensor, stored: Stored, moments: InputStatistics | Tensor | None) -> float:
    """``||(W - W^) X||^2 / ||W X||^2`` over all matrices ``(count, out, in)``, without another forward pass.

    Args:
        weight: as it was.
        stored: what it became.
        moments: the statistics of the input, or its gram ``(count, in, in)`` or ``(in, in)``; None compares the
            weights themselves.

    Returns:
        0 for a perfect copy, 1 for a weight of zeros; 0 or inf where the outputs are all zero.
    """
    error, energy = (_energy(w, moments) for w in (weight.float() - stored.to_dense(), weight))
    return error / energy if energy else (0.0 if error == 0 else float("inf"))


@dataclass(frozen=True)
class _Job:
    """One weight and what it gets."""

    name: str
    weight: Tensor
    treatments: Treatments
    low_rank: LowRank | None
    sparsify: Sparsify | None
    quantize: Quantize | None
    mixed: MixRows | None = None

    @property
    def stackable(self) -> bool:
        """GPTQ and nothing else: its rows do not depend on each other."""
        return len(self.treatments) == 1 and self.quantize is not None and self.quantize.method == "gptq"

    @property
    def static(self) -> bool:
        return self.quantize is not None and self.quantize.act_bits is not None and self.quantize.act_mode == "static"


class _Moments:
    """Second moments of some of the inputs, and their factors once they are asked for."""

    def __init__(self, gram: Tensor | None, tokens: Tensor) -> None:
        self.gram, self.tokens = gram, tokens
        self._factors: dict[Order, Factor] = {}

    def factor(self, order: Order) -> Factor | None:
        if self.gram is None:
            return None
        if order not in self._factors:
            self._factors[order] = prepare(self.gram, self.tokens, order=order)
        return self._factors[order]


def _parse(name: str, weight: Tensor, treatments: Treatments) -> _Job:
    if weight.dim() != 3 or not weight.is_floating_point():
        raise InputError(f"{name}: got a {weight.dtype} weight {tuple(weight.shape)}, expected floats (count, out, in)")
    treatments = tuple(t for t in treatments if not isinstance(t, RoundActivations))
    check_treatments(treatments, weight.shape[1], weight.shape[2], name)
    if not bool(weight.isfinite().all()):
        raise InputError(f"{name}: its weight holds NaN or infinity; check the checkpoint")
    low = next((t for t in treatments if isinstance(t, LowRank)), None)
    sparse = next((t for t in treatments if isinstance(t, Sparsify)), None)
    quantize = next((t for t in treatments if isinstance(t, Quantize)), None)
    mixed = next((t for t in treatments if isinstance(t, MixRows)), None)
    if mixed is not None and len(weight) > 1:
        raise InputError(f"{name}: mix_rows is for one matrix, it has {len(weight)}; use quantize")
    return _Job(name, weight, treatments, low, sparse, quantize, mixed)


def _narrowed(
    name: str, weight: Tensor, treatments: Treatments, stats: InputStatistics | None, scale_dtype: torch.dtype
) -> tuple[Stored, list[str]]:
    """`treated` where some layers lose inputs: their columns become zero, dense; the others are treated as usual."""
    narrow = next((t for t in treatments if isinstance(t, Narrow)), None)
    if narrow is None:
        return treated_group([weight], [treatments], stats, scale_dtype=scale_dtype, names=[name])[0]
    _, out, in_ = weight.shape
    check_treatments(treatments, out, in_, name)
    if len(weight) > 1:
        raise InputError(f"{name}: {narrow.label()} is for one projection, it has {len(weight)} matrices")
    seen = stats is not None and not stats.only_diagonal and bool((stats.tokens > 0).any())
    gram = stats.gram[0] if stats is not None and seen else None
    kept = choose_neurons(weight[0], gram, narrow)
    columns = fitted_columns(weight[0], gram if narrow.compensate else None, kept)
    rest = tuple(t for t in treatments if t is not narrow)
    part = None if stats is None else stats.select(kept)
    stored, notes = treated_group([columns[None]], [rest], part, scale_dtype=scale_dtype, names=[name])[0]
    dense = torch.zeros_like(weight, dtype=torch.float32)
    dense[:, :, kept] = stored.to_dense(torch.float32)
    if gram is None:
        notes = [*notes, "never reached by the calibration data: neurons are chosen by magnitude"]
    return Stored(_shape(weight), dense=dense.to(weight.dtype)), notes


def _with_mixed_rows(
    jobs: Sequence[_Job], stats: InputStatistics | None, scale_dtype: torch.dtype
) -> list[tuple[Stored, list[str]]]:
    """`treated_group` where some jobs mix the widths of rows: these share their factors among themselves."""
    factors: dict[int, Factor] = {}
    done = []
    for job in jobs:
        if job.mixed is None:
            done += treated_group([job.weight], [job.treatments], stats, scale_dtype=scale_dtype, names=[job.name])
            continue
        seen = stats is not None and bool((stats.tokens > 0).any())
        gram = None
        if stats is not None and seen and job.mixed.method == "gptq":
            stats.check(job.name)
            _check_statistics(job, stats)
            if stats.count > 1:
                raise InputError(f"{job.name}: mix_rows is for linear layers; use quantize for a grouped convolution")
            gram = stats.gram[0]
        tokens = stats.tokens if stats is not None else 0
        stored, notes = mix_rows(job.weight[0], job.mixed, gram, tokens, scale_dtype, factors=factors)
        if gram is None and job.mixed.method == "gptq":
            notes = [f"never reached by the calibration data: {_FALLBACK['gptq']}"]
        done.append((stored, notes))
    return done


def _check_statistics(job: _Job, stats: InputStatistics) -> None:
    count, out, in_ = job.weight.shape
    if stats.in_features != in_ or (stats.count != count and (count != 1 or out % stats.count)):
        raise InputError(
            f"{job.name}: its weight is {(count, out, in_)}, its statistics are of {stats.count} inputs of size"
            f" {stats.in_features}; collect them at this layer's input"
        )
    if stats.only_diagonal and needed_statistics(job.treatments) == "gram":
        raise InputError(f"{job.name}: {describe(job.treatments)} needs the gram of its input; use only_diagonal=False")


def _without_statistics(job: _Job, scale_dtype: torch.dtype) -> tuple[Stored, list[str]]:
    notes = []
    if needed_statistics(job.treatments) != "none":
        methods = [getattr(t, "method", "") for t in job.treatments]
        fallbacks = [_FALLBACK[method] for method in methods if method in _FALLBACK]
        if job.static:
            fallbacks.append("static activation scales become dynamic")
        notes = [f"never reached by the calibration data: {', '.join(fallbacks)}"]
    if job.static and job.quantize is not None:
        job = dataclasses.replace(job, quantize=dataclasses.replace(job.quantize, act_mode="dynamic"))
    return _treat(job, job.weight, _static_mask(job, None), None, None, scale_dtype)[0], notes


def _treat(
    job: _Job,
    weight: Tensor,
    mask: Tensor | None,
    moments: _Moments | None,
    removed: Tensor | None,
    scale_dtype: torch.dtype,
) -> tuple[Stored, list[Factor]]:
    """Treat `weight` as `job` says; also the factors that were used."""
    sparsify, quantize = job.sparsify, job.quantize
    by_gptq = quantize is not None and quantize.method == "gptq"
    used: list[Factor] = []
    if job.low_rank is not None:
        factor = moments.factor("descending") if moments is not None and by_gptq else None
        gram = None if moments is None else moments.gram
        return low_rank(weight, job.low_rank, gram, quantize, scale_dtype, factor=factor)
    if sparsify is not None and mask is None:
        assert moments is not None
        factor = moments.factor("natural")
        assert factor is not None
        used.append(factor)
        joint = quantize if by_gptq else None
        pruned = sparsegpt(weight, factor, sparsify, joint, scale_dtype, removed=removed)
        if pruned.dense is None:
            return pruned, used
        weight, mask = pruned.dense.to(weight.dtype), pruned.mask
    if quantize is None:
        return Stored(_shape(weight), dense=weight if mask is None else weight * mask, mask=mask), used
    factor = moments.factor("descending") if moments is not None and by_gptq else None
    if factor is not None:
        return gptq_with(weight, factor, quantize, scale_dtype, mask=mask), [*used, factor]
    stored = round_to_nearest(
        weight if mask is None else weight * mask, quantize, scale_dtype, clip=quantize.method != "rtn"
    )
    return dataclasses.replace(stored, mask=mask), used


def _static_mask(job: _Job, stats: InputStatistics | None) -> Tensor | None:
    """The mask that the weight and the diagonal tell; None if there is none, or SparseGPT is to find it."""
    sparsify = job.sparsify
    if sparsify is None or (sparsify.method == "sparsegpt" and stats is not None):
        return None
    if sparsify.method != "wanda" or stats is None:
        return magnitude_mask(job.weight, sparsify.sparsity, sparsify.pattern)
    squares = stats.square_sum
    if stats.count != len(job.weight):
        squares = squares.repeat_interleave(job.weight.shape[1] // stats.count, 0).unsqueeze(0)
    return wanda_mask(job.weight, squares, sparsify.sparsity, sparsify.pattern)


def _removed(job: _Job, count: int, part: slice) -> Tensor | None:
    """Zeros ``(count,)`` of each group of a grouped convolution: together what is promised for the whole weight."""
    if job.sparsify is None or count == len(job.weight):
        return None
    _, out, in_ = job.weight.shape
    return spread_evenly(removed_weights(out, in_, job.sparsify.sparsity), count)[part]


def _stacks(jobs: dict[int, _Job]) -> list[list[int]]:
    """Indices of the jobs, those together that can share one pass."""
    stacks: dict[object, list[int]] = {}
    for i, job in jobs.items():
        key = (job.treatments, len(job.weight)) if job.stackable else i
        stacks.setdefault(key, []).append(i)
    return list(stacks.values())


def _fold(tensor: Tensor, count: int) -> Tensor:
    """``(1, out, in)`` as ``(count, out / count, in)``; experts as they are."""
    return tensor.reshape(count, -1, tensor.shape[-1])


def _flags(used: list[Factor], tokens: Tensor) -> Tensor:
    """``(3, count)`` bool: unseen, damped, failed."""
    flags = torch.stack([tokens == 0, torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens).bool()])
    for factor in used:
        flags = flags | torch.stack([factor.unseen, factor.damped, factor.failed])
    return flags


def _finish(job: _Job, pieces: list[tuple[Stored, Tensor]], stats: InputStatistics) -> tuple[Stored, list[str]]:
    stored = join_counts([piece for piece, _ in pieces])
    if job.low_rank is None:
        stored = merge_rows(stored, len(job.weight))
    unseen, damped, failed = torch.cat([flags for _, flags in pieces], -1)
    notes = [] if needed_statistics(job.treatments) == "none" else factor_notes(unseen, damped, failed)
    if job.low_rank is not None and stats.count != len(job.weight) and needed_statistics(job.treatments) == "gram":
        notes.append("a grouped convolution is factorised without regard to its inputs")
    if job.static:
        scale, _ = range_scale(stats.low.min(), stats.high.max(), 8)
        right = stored if stored.factors is None else stored.factors[1]
        right = dataclasses.replace(right, input_scale=scale)
        stored = right if stored.factors is None else dataclasses.replace(stored, factors=(stored.factors[0], right))
    return stored, notes


def _energy(weight: Tensor, moments: InputStatistics | Tensor | None) -> float:
    if moments is None:
        return float(weight.float().square().sum(dtype=torch.float64))
    if isinstance(moments, InputStatistics):
        return float(moments.energy(_fold(weight, moments.count)).sum())
    gram = moments.unsqueeze(0) if moments.dim() == 2 else moments
    return float(gram_energy(_fold(weight, len(gram)), gram).sum())


def _shape(weight: Tensor) -> tuple[int, int, int]:
    count, out, in_ = weight.shape
    return count, out, in_
