"""Scorers that judge each candidate treatment of each layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.layer import LayerRef, get_parameter, read_matrix
from layerwright.core.option import Scores
from layerwright.core.treatment import Treatments
from layerwright.score.base import SCORERS, Subject
from layerwright.score.gradients import OutputGradients, output_gradients, weight_gradients
from layerwright.score.hessian import hessian_traces
from layerwright.score.inputs import walk_inputs
from layerwright.score.replay import with_weight
from layerwright.score.statistics import InputStatistics

__all__ = [
    "fisher",
    "fisher_judge",
    "hutchinson",
    "loss_swap",
    "output_error",
    "score_options",
    "second_order",
    "snr",
    "taylor",
    "weight_error",
]

Judge = Callable[[LayerRef, Tensor, Tensor, InputStatistics | None], float]
"""``judge(layer, weight, change, statistics) -> damage``, weights as ``(count, out, in)`` float32."""
Correct = Callable[[LayerRef, Mapping[Treatments, float], Mapping[Treatments, Tensor]], dict[Treatments, float]]
"""``correct(layer, damages, treated weights) -> damages`` of all of one layer's candidates."""


@SCORERS.register("output_error")
def output_error(subject: Subject) -> Scores:
    """Relative squared error of the layer's output, ``|dW X|^2 / |W X|^2``: no gradient, no unit of the loss."""

    def judge(_ref: LayerRef, weight: Tensor, change: Tensor, statistics: InputStatistics | None) -> float:
        if statistics is None:
            return _ratio(change.square().sum(), weight.square().sum())
        return _ratio(statistics.energy(change).sum(), statistics.energy(weight).sum())

    return score_options(subject, "output_error", judge, loss_units=False)


@SCORERS.register("fisher")
def fisher(subject: Subject) -> Scores:
    """Second-order change of the loss under the Fisher information, factored per layer as in K-FAC.

    ``damage = T / (2 N) tr(dW A dW^T G)`` with ``A`` and ``G`` the mean second moments of inputs and output gradients
    over the ``T`` rows that passed the layer, and ``N`` loss terms. The weight change is the treatment's own (GPTQ's
    for GPTQ). In units of the loss. Source: Martens and Grosse (2015), Hassibi and Stork (1993).
    """
    return score_options(subject, "fisher", fisher_judge(subject))


def fisher_judge(subject: Subject) -> Judge:
    """The factored quadratic form of `fisher` as a judge of weight changes; one backward pass over the data."""
    gradients = output_gradients(subject.model, subject.calibration, subject.layers)

    def judge(ref: LayerRef, _weight: Tensor, change: Tensor, statistics: InputStatistics | None) -> float:
        if ref.path not in gradients or statistics is None:
            return _fallback(ref, change, statistics)
        if ref.path not in roots:
            roots[ref.path] = _root(gradients[ref.path].moment)
        return _quadratic(change, statistics, gradients[ref.path], roots[ref.path])

    roots: dict[str, Tensor] = {}
    scales: dict[str, float] = {}

    def _fallback(ref: LayerRef, change: Tensor, statistics: InputStatistics | None) -> float:
        # Experts stored in one parameter have no output of their own to hook: their squared gradient stands in.
        if ref.path not in scales:
            gradient = weight_gradients(subject.model, subject.calibration, [ref])[ref.path]
            scales[ref.path] = float(gradient.square().mean()) * _terms(subject)
        del statistics
        return 0.5 * scales[ref.path] * float(change.square().sum())

    return judge


def _terms(subject: Subject) -> int:
    from layerwright.score.gradients import loss_terms

    return sum(loss_terms(batch) for batch in subject.calibration)


def _root(moment: Tensor) -> Tensor:
    """``R`` with ``R^T R = moment``, ``(out, out)``; for a diagonal ``(out,)`` its square root."""
    if moment.dim() == 1:
        return moment.sqrt()
    values, vectors = torch.linalg.eigh(moment.double())
    return ((vectors * values.clamp(min=0).sqrt()).T).float()


def _quadratic(change: Tensor, statistics: InputStatistics, gradients: OutputGradients, root: Tensor) -> float:
    if statistics.count > 1:  # grouped convolution: each group of outputs reads its own inputs
        return _grouped_quadratic(change, statistics, gradients)
    rows = (root.unsqueeze(-1) * change[0] if root.dim() == 1 else root @ change[0]).unsqueeze(0)
    energy = float(statistics.energy(rows).sum()) / max(int(statistics.tokens.sum()), 1)
    return 0.5 * gradients.tokens / gradients.terms * energy


def _grouped_quadratic(change: Tensor, statistics: InputStatistics, gradients: OutputGradients) -> float:
    diagonal = gradients.moment if gradients.moment.dim() == 1 else gradients.moment.diagonal()
    scaled = diagonal.sqrt().unsqueeze(-1) * change[0]
    split = scaled.reshape(statistics.count, -1, scaled.shape[-1])
    energy = float((statistics.energy(split) / statistics.tokens.clamp(min=1)).sum())
    return 0.5 * gradients.tokens / gradients.terms * energy


@SCORERS.register("taylor")
def taylor(subject: Subject) -> Scores:
    """First-order change of the loss, ``|<dL/dW, dW>|`` (Molchanov et al., 2017). In units of the loss."""
    gradients = weight_gradients(subject.model, subject.calibration, subject.layers)

    def judge(ref: LayerRef, _weight: Tensor, change: Tensor, _statistics: InputStatistics | None) -> float:
        return abs(float((gradients[ref.path] * change).sum()))

    return score_options(subject, "taylor", judge)


@SCORERS.register("second_order")
def second_order(subject: Subject) -> Scores:
    """First- and second-order terms of the loss together: ``max(<g, dW>, 0) +`` the `fisher` damage."""
    first, second = taylor(subject), fisher(subject)
    damages = {key: second.damages[key] + first.damages[key] for key in second.damages}
    return Scores(
        "second_order",
        damages,
        {},
        second.model,
        second.data,
        second.base_loss,
        first.seconds + second.seconds,
        second.meta,
    )


@SCORERS.register("hutchinson")
def hutchinson(subject: Subject, samples: int = 4) -> Scores:
    """``1/2 tr(H) / n |dW|^2`` with the trace of each layer's Hessian by Hutchinson's estimator (HAWQ-V2, Dong et
    al., 2020). In units of the loss; negative traces count as zero.
    """
    traces = hessian_traces(subject.model, subject.calibration, subject.layers, samples=samples, seed=subject.seed)

    def judge(ref: LayerRef, _weight: Tensor, change: Tensor, _statistics: InputStatistics | None) -> float:
        return 0.5 * max(traces[ref.path], 0.0) / ref.numel * float(change.square().sum())

    scores = score_options(subject, "hutchinson", judge)
    return Scores(
        scores.scorer, scores.damages, traces, scores.model, scores.data, scores.base_loss, scores.seconds, scores.meta
    )


@SCORERS.register("weight_error")
def weight_error(subject: Subject) -> Scores:
    """Squared change of the weight, ``|dW|^2``: no data, no unit of the loss."""
    return score_options(
        subject, "weight_error", lambda _r, _w, change, _s: float(change.square().sum()), loss_units=False
    )


@SCORERS.register("snr")
def snr(subject: Subject) -> Scores:
    """Noise over signal in the weight, ``|dW|^2 / |W|^2``: no data, no unit of the loss."""
    return score_options(
        subject, "snr", lambda _r, w, change, _s: _ratio(change.square().sum(), w.square().sum()), loss_units=False
    )


@SCORERS.register("loss_swap")
def loss_swap(subject: Subject) -> Scores:
    """Measured loss with one layer treated and the others left alone, minus the loss before; at least 1e-6.

    One pass over the data per layer and candidate. Source: Hubara et al. (2020), arXiv 2006.10518.
    """
    treat = _treatment(subject)
    begun = time.perf_counter()
    base = subject.calibration.mean_loss(subject.model)
    changed: dict[tuple[str, Treatments], Tensor] = {}
    for refs, inputs in walk_inputs(subject.model, subject.calibration, subject.layers, _needs(subject, "gram")):
        for ref in refs:
            weight = read_matrix(subject.model, ref).float()
            options = subject.candidates.get(ref.path, ())
            results = treat([weight] * len(options), list(options), inputs.of.get(ref.path))
            for treatments, result in zip(options, results, strict=True):
                changed[(ref.path, treatments)] = result.to(get_parameter(subject.model, ref.parameter).dtype)
    known = {ref.path: ref for ref in subject.layers}
    damages: dict[tuple[str, Treatments], float] = {}
    for number, ((path, treatments), result) in enumerate(changed.items()):
        loss = _loss_with(subject, known[path], result)
        damages[(path, treatments)] = max(loss - base, 1e-6)
        if subject.progress:
            subject.progress(number + 1, len(changed))
    return _scores(subject, "loss_swap", damages, begun, base)


def _loss_with(subject: Subject, ref: LayerRef, matrices: Tensor) -> float:
    """The calibration loss with the weight of `ref` replaced."""
    with with_weight(subject.model, ref, matrices):
        return subject.calibration.mean_loss(subject.model)


# -- shared -------------------------------------------------------------------------------------------------------


def score_options(
    subject: Subject, name: str, judge: Judge, correct: Correct | None = None, *, loss_units: bool = True
) -> Scores:
    """Walk the blocks, compute every candidate's weight change, judge it; `correct` may revise a layer's damages.

    With `loss_units` off, ``Scores.meta`` says that these numbers rank treatments and are no rise of the loss.

    Raises:
        InputError: a damage that is not finite; names the layer.
    """
    treat = _treatment(subject)
    begun = time.perf_counter()
    damages: dict[tuple[str, Treatments], float] = {}
    done = 0
    for refs, inputs in walk_inputs(subject.model, subject.calibration, subject.layers, _needs(subject, "gram")):
        for ref in refs:
            options = list(subject.candidates.get(ref.path, ()))
            weight = read_matrix(subject.model, ref).float()
            statistics = inputs.of.get(ref.path)
            results: Sequence[Tensor] = treat([weight] * len(options), options, statistics) if options else ()
            judged = {
                treatments: judge(ref, weight, result.float() - weight, statistics)
                for treatments, result in zip(options, results, strict=True)
            }
            if correct is not None and judged:
                judged = correct(ref, judged, dict(zip(options, results, strict=True)))
            for treatments, damage in judged.items():
                if not math.isfinite(damage):
                    raise InputError(f"{name}: the damage of {ref.path} is not a finite number; check weights and data")
                damages[(ref.path, treatments)] = damage
            done += 1
            if subject.progress:
                subject.progress(done, len(subject.layers))
    return _scores(subject, name, damages, begun, None, {"loss_units": loss_units})


def _scores(
    subject: Subject,
    name: str,
    damages: Mapping[tuple[str, Treatments], float],
    begun: float,
    base: float | None,
    meta: Mapping[str, Any] | None = None,
) -> Scores:
    return Scores(
        scorer=name,
        damages=damages,
        model=fingerprint_model(subject.model),
        data=subject.calibration.fingerprint(),
        base_loss=base,
        seconds=time.perf_counter() - begun,
        meta=meta or {"loss_units": True},
    )


def _needs(subject: Subject, need: str) -> dict[str, str]:
    return {ref.path: need for ref in subject.layers if subject.candidates.get(ref.path)}


def _treatment(subject: Subject) -> Any:
    if subject.treat is None:
        raise InputError("this scorer judges treatments: hand in treat, the function that computes treated weights")
    return subject.treat


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part) / max(float(whole), 1e-30)
