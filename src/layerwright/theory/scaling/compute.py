"""What to train with a given amount of compute."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from scipy.optimize import brentq, minimize_scalar
from torch import nn

from layerwright.core.errors import InputError
from layerwright.theory.scaling.batch import BatchLaw
from layerwright.theory.scaling.fit import REACH, LawFit

__all__ = [
    "CAUTION",
    "Allocation",
    "allocate_compute",
    "count_params",
    "data_needed",
    "early_stop_step",
    "suggest_shape",
    "training_flops",
]

CAUTION = (
    "Kaplan et al. found N ~ C^0.73; Hoffmann et al. (2022) N ~ C^0.5, mainly by schedules fitted to each run and by other "
    "counts of small models: what follows holds for runs trained as those that were fitted"
)


def count_params(model: nn.Module, *, embeddings: bool = False) -> int:
    """Parameters of `model`, without tables of tokens and positions unless `embeddings`; what is shared counts once."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return sum(p.numel() for p in model.parameters() if embeddings or id(p) not in tables)


def training_flops(
    n_params: float, tokens: float, n_layer: int | None = None, n_ctx: int | None = None, d_attn: int | None = None
) -> float:
    """``6 N D``, a multiplication and an addition being two; with the last three, attention's products over the context
    too: ``3 (2 N + 2 n_layer n_ctx d_attn) D`` (Kaplan et al., 2020, table 1).

    Raises:
        InputError: some of the last three are given and others not.
    """
    shape = [value for value in (n_layer, n_ctx, d_attn) if value is not None]
    if shape and len(shape) < 3:
        raise InputError("n_layer, n_ctx, d_attn: give all three or none")
    return 3 * (2 * n_params + (2 * math.prod(shape) if shape else 0)) * tokens


@dataclass(frozen=True)
class Allocation:
    """What to train with a budget of compute.

    Attributes:
        flops: of the training.
        n_params, tokens: without embeddings; of data.
        batch_tokens, steps: None where the law says nothing about them.
        loss, low, high: predicted, with its 95 % interval.
        n_params_interval: 95 % interval of the best size.
        reach: compute over that of the largest fitted run.
        caution: what a reader must know.
    """

    flops: float
    n_params: float
    tokens: float
    batch_tokens: float | None
    steps: float | None
    loss: float
    low: float
    high: float
    n_params_interval: tuple[float, float]
    reach: float
    caution: str = CAUTION

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def allocate_compute(
    fit: LawFit,
    flops: float,
    *,
    batch: BatchLaw | float | None = None,
    allow_extrapolation: bool = False,
) -> Allocation:
    """The size and the data (or batch and steps) that reach the lowest loss with `flops`.

    For laws in ``n_params`` and ``tokens`` along ``6 N D = C``. For ``NS`` along ``6 N B S = C``: at the critical batch
    size of a `BatchLaw`, ``S = 2 S_min`` steps (`flops` counts the compute that is really spent, twice the least); or at
    a fixed batch, with ``S_min = S / (1 + B_crit / B)`` taken as `S`.

    Args:
        fit: of ``ND``, ``chinchilla`` or ``NS``.
        flops: of the training, positive.
        batch: for ``NS``: a `BatchLaw`, or tokens of a batch.
        allow_extrapolation: see `LawFit.predict`.

    Raises:
        InputError: `flops` not positive, a law that cannot tell, no batch for ``NS``, or what `LawFit.predict` refuses.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise InputError(f"flops: got {flops}, expected a positive number")
    inputs = fit.law.inputs
    if inputs not in (("n_params", "tokens"), ("n_params", "steps")):
        raise InputError(f"law {fit.law.name}: it does not divide compute; fit ND, NS or chinchilla")
    if "steps" in inputs and batch is None:
        raise InputError("batch: law NS needs a BatchLaw (see critical_batch) or the tokens of a batch")
    reach = flops / fit.largest["flops"]
    if not allow_extrapolation and (reach > REACH or not fit.identified):
        why = fit.reasons[0] if fit.reasons else f"{reach:.3g} times beyond the largest run"
        raise InputError(
            f"flops: the runs do not support this ({why}); pass allow_extrapolation=True to ask all the same"
        )
    size = _best_size(fit, fit.theta, flops, batch)
    sizes = numpy.array([_best_size(fit, theta, flops, batch) for theta in fit.samples[:200]])
    rest = _rest(fit, fit.theta, size, flops, batch)
    given: dict[str, Any] = {
        "n_params": size,
        inputs[1]: rest["tokens"] if inputs[1] == "tokens" else rest["least_steps"],
    }
    told = fit.predict(allow_extrapolation=True, **given)
    low, high = numpy.quantile(sizes, [0.025, 0.975])
    return Allocation(
        flops,
        size,
        rest["tokens"],
        rest.get("batch_tokens"),
        rest.get("steps"),
        told.loss,
        told.low,
        told.high,
        (float(low), float(high)),
        reach,
    )


def _best_size(fit: LawFit, theta: Any, flops: float, batch: BatchLaw | float | None) -> float:
    """The size with the lowest loss: of the logarithm, by Brent's method on a wide bracket."""
    middle = math.log(math.sqrt(flops / 6))

    def loss(log_size: float) -> float:
        return _loss(fit, theta, math.exp(log_size), flops, batch)

    grid = numpy.linspace(middle - 25, middle + 25, 101)
    values = [loss(float(point)) for point in grid]
    place = int(numpy.argmin(values))
    low, high = float(grid[max(place - 1, 0)]), float(grid[min(place + 1, 100)])
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    return math.exp(float(found.x))


def _loss(fit: LawFit, theta: Any, size: float, flops: float, batch: BatchLaw | float | None) -> float:
    rest = _rest(fit, theta, size, flops, batch)
    other = rest["tokens"] if "tokens" in fit.law.inputs else rest["least_steps"]
    return float(fit.law.log_loss(theta, numpy.log([[size], [other]]))[0])


def _rest(fit: LawFit, theta: Any, size: float, flops: float, batch: BatchLaw | float | None) -> dict[str, float]:
    """Tokens, and for laws in steps the batch and the steps, of a model of that size."""
    tokens = flops / (6 * size)
    if "tokens" in fit.law.inputs:
        return {"tokens": tokens}
    if not isinstance(batch, BatchLaw):
        steps = tokens / float(batch or 1)
        return {"tokens": tokens, "batch_tokens": float(batch or 1), "steps": steps, "least_steps": steps}
    law = batch

    def log_least(log_loss: float) -> float:
        """Log of the least steps: half of those at the critical batch size."""
        return math.log(tokens / 2 / law.scale) + log_loss / law.alpha

    def gap(log_loss: float) -> float:  # rises with the loss: a higher one allows a smaller batch and more steps
        return log_loss - float(fit.law.log_loss(theta, numpy.array([[math.log(size)], [log_least(log_loss)]]))[0])

    log_loss = float(brentq(gap, -100, 500, xtol=1e-13))
    critical = law(math.exp(log_loss))
    least = math.exp(log_least(log_loss))
    return {"tokens": tokens, "batch_tokens": critical, "steps": 2 * least, "least_steps": least}


def data_needed(fit: LawFit, n_params: float, excess: float = 0.02) -> float:
    """Tokens with which the loss of a model of `n_params` is within `excess` of that with unlimited data.

    Raises:
        InputError: a law without tokens, or a number that is not positive.
    """
    _positive(n_params=n_params, excess=excess)
    if fit.law.inputs != ("n_params", "tokens"):
        raise InputError(f"law {fit.law.name}: it does not tell what data is worth; fit ND or chinchilla")
    unlimited = _at(fit, n_params, math.exp(600))

    def gap(log_tokens: float) -> float:
        return _at(fit, n_params, math.exp(log_tokens)) - unlimited - excess

    return math.exp(brentq(gap, -50, 500))


def early_stop_step(fit: LawFit, tokens_loss: float, unlimited_loss: float) -> float:
    """A lower bound of the step at which a run on limited data stops improving: ``S_c / (L(N, D) - L(N, inf))**(1 / alpha_S)``
    (Kaplan et al., 2020, equation 5.7).

    Args:
        fit: of the law ``NS``.
        tokens_loss, unlimited_loss: of the model with the data there is, and with unlimited data.

    Raises:
        InputError: another law, or losses that are no different.
    """
    if fit.law.inputs != ("n_params", "steps"):
        raise InputError(f"law {fit.law.name}: it does not tell about steps; fit NS")
    if not tokens_loss > unlimited_loss > 0:
        raise InputError(f"losses: got {tokens_loss} and {unlimited_loss}, expected the first to be the larger")
    params = fit.params
    return float(params["S_c"] / (tokens_loss - unlimited_loss) ** (1 / params["alpha_S"]))


def suggest_shape(n_params: float, aspect: float = 96.0, multiple: int = 64) -> dict[str, int]:
    """Layers and width of a transformer of about `n_params` parameters ``12 n_layer d_model**2``.

    Args:
        n_params: without embeddings.
        aspect: width over layers that is aimed at; 64 to 128 are common.
        multiple: of which the width is one, such as the size of a head.

    Raises:
        InputError: a number that is not positive, or no shape near that size.
    """
    _positive(n_params=n_params, aspect=aspect, multiple=multiple)
    best: tuple[float, int, int] | None = None
    for layers in range(1, 513):
        width = multiple * max(1, round(math.sqrt(n_params / (12 * layers)) / multiple))
        error = abs(math.log(12 * layers * width**2 / n_params)) + 0.5 * abs(math.log(width / layers / aspect))
        if best is None or error < best[0]:
            best = (error, layers, width)
    assert best is not None
    _, layers, width = best
    return {"n_layer": layers, "d_model": width, "n_params": 12 * layers * width**2}


def _at(fit: LawFit, n_params: float, tokens: float) -> float:
    return math.exp(float(fit.law.log_loss(fit.theta, numpy.log([[n_params], [tokens]]))[0]))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}: got {value}, expected a positive number")
