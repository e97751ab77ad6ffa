"""Fit a law to runs, and say how sure it is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy
from numpy.typing import NDArray
from scipy.stats import t as student

from layerwright.core.errors import InputError, unknown_name
from layerwright.theory.scaling._solver import finite_rows, solve
from layerwright.theory.scaling.laws import LAWS, Law
from layerwright.theory.scaling.runs import Run, RunTable

__all__ = ["LawFit", "Prediction", "fit_law"]

Array = NDArray[numpy.float64]
REACH = 100.0
"""Compute beyond that of the largest fitted run, as a factor, up to which a law is asked without further ado."""
ILL_CONDITIONED = 1e8
SMALLEST = 1e-3
"""The smallest outer exponent that is tried; an exponent whose interval comes near it may as well be zero."""


@dataclass(frozen=True)
class Prediction:
    """A loss, its interval, and how far beyond the runs it lies (1 is the largest run)."""

    loss: float
    low: float
    high: float
    reach: float


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Attributes:
        law: its form.
        theta: its parameters (see `Law.log_loss`).
        samples: ``(resamplings, parameters)``, spread as few runs ask for it.
        residuals: ``(runs,)``, log of observed over predicted loss.
        largest: largest value of each input and of the compute among the runs.
        condition: of the normal matrix, with columns of unit length.
        aicc: Akaike's criterion for small samples, lower is better; of fits to the same runs.
        reasons: why exponents are not identified, empty if they are.
    """

    law: Law
    theta: Array
    samples: Array
    residuals: Array
    largest: Mapping[str, float]
    condition: float
    aicc: float
    reasons: tuple[str, ...] = field(default=())

    @property
    def params(self) -> dict[str, float]:
        """Exponents, scales and floor by name (``alpha_N``, ``N_c``, ``L_inf``). Scales mean little without exponents."""
        return self.law.named(self.theta)

    @property
    def identified(self) -> bool:
        """Whether the runs determine the exponents."""
        return not self.reasons

    @property
    def noise(self) -> float:
        """Standard deviation of the log loss around the law, corrected for the parameters."""
        free = max(1, len(self.residuals) - self.law.parameters)
        return math.sqrt(float((self.residuals**2).sum()) / free)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Interval of a parameter of `params` from the resamplings."""
        values = [self.law.named(theta)[name] for theta in self.samples]
        low, high = numpy.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def predict(
        self, interval: float = 0.95, *, allow_extrapolation: bool = False, seed: int = 0, **inputs: float
    ) -> Prediction:
        """The loss at ``n_params=``, ``tokens=``, ``flops=`` or ``steps=``, as the law asks; the band includes the noise of a run.

        Raises:
            InputError: an input that is missing, unknown or not positive; exponents that the runs do not determine; more
                than a hundred times the compute (or, for laws in one other quantity, that quantity) of the largest run,
                unless `allow_extrapolation`.
        """
        for name in inputs:
            if name not in self.law.inputs:
                raise unknown_name("input", name, self.law.inputs, f"law {self.law.name}")
        missing = [name for name in self.law.inputs if name not in inputs]
        if missing:
            raise InputError(f"law {self.law.name}: needs {missing[0]}=")
        values = [float(inputs[name]) for name in self.law.inputs]
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise InputError(f"inputs: got {inputs}, expected positive numbers")
        reach = self.reach(inputs)
        if not allow_extrapolation:
            if not self.identified:
                raise InputError(
                    f"law {self.law.name}: not identified ({self.reasons[0]}); add runs, or pass allow_extrapolation=True"
                )
            if reach > REACH:
                raise InputError(
                    f"inputs: {reach:.3g} times beyond the largest run, and at most {REACH:g} is supported by the data; "
                    "pass allow_extrapolation=True to ask all the same"
                )
        logs = numpy.log(numpy.array(values))[:, None]
        center = float(numpy.exp(self.law.log_loss(self.theta, logs))[0])
        drawn = self.law.log_loss(self.samples, logs)[:, 0]
        noise = numpy.random.default_rng(seed).normal(0, self.noise, len(drawn))
        low, high = numpy.exp(numpy.quantile(drawn + noise, [(1 - interval) / 2, (1 + interval) / 2]))
        return Prediction(center, float(low), float(high), reach)

    def reach(self, inputs: Mapping[str, float]) -> float:
        """How many times beyond the largest run the inputs lie: in compute where it is known, else in the furthest input."""
        if {"n_params", "tokens"} <= set(inputs):
            return 6 * inputs["n_params"] * inputs["tokens"] / self.largest["flops"]
        return max(value / self.largest[name] for name, value in inputs.items())

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "law": self.law.name,
            "floor": self.law.floor,
            "params": self.params,
            "intervals": {name: list(self.interval(name)) for name in self.params},
            "noise": self.noise,
            "condition": self.condition,
            "aicc": self.aicc,
            "identified": self.identified,
            "reasons": list(self.reasons),
            "largest": dict(self.largest),
        }

    def to_json(self) -> str:
        """`to_data` as text."""
        return json.dumps(self.to_data(), indent=2)


def fit_law(
    table: RunTable | list[Run] | list[dict[str, Any]],
    law: str = "ND",
    *,
    irreducible: Literal["zero", "fit"] | float = "zero",
    robust: Literal["huber", "none"] = "huber",
    bootstrap: int = 500,
    seed: int = 0,
) -> LawFit:
    """Fit `law` to runs by robust least squares on log losses, and resample the runs for intervals.

    Cost: a few hundred small systems side by side; 500 resamplings of 30 runs take about a second.

    Args:
        table: the runs.
        law: a name of `LAWS`.
        irreducible: a loss that no run falls below: ``zero`` for none, ``fit`` to find it (needed for small models; the
            ``chinchilla`` law always does), or its value.
        robust: ``huber`` counts residuals beyond 0.02 linearly.
        bootstrap: resamplings of whole runs (repetitions with other seeds stay together), 0 for no intervals.
        seed: of the starts and resamplings.

    Raises:
        InputError: an unknown law, fewer runs than parameters and two more, or runs that all share one size (or one
            amount of data, compute or steps).
    """
    runs = table if isinstance(table, RunTable) else RunTable.from_records(table)
    if law not in LAWS:
        raise unknown_name("law", law, LAWS)
    form = LAWS[law]
    given = 0.0
    if irreducible == "fit":
        form = dataclasses.replace(form, floor=True)
    elif irreducible != "zero":
        given = float(irreducible)
        if not 0 <= given < runs.losses.min():
            raise InputError(f"irreducible: got {irreducible}, expected 'zero', 'fit' or a number below every loss")
    _refuse_poor(runs, form)
    logs = numpy.log(runs.columns(form.inputs))
    observed = numpy.log(runs.losses - given)
    delta = 0.02 if robust == "huber" else 1e9
    draw = numpy.random.default_rng(seed)

    def model(theta: Array) -> tuple[Array, Array]:
        return form.gradient(theta, logs)

    def valid(theta: Array) -> NDArray[numpy.bool_]:
        usable = finite_rows(theta)
        return usable & (theta[:, 1] > SMALLEST) if form.form == "joint" else usable

    starts = _starts(form, logs, observed, draw)
    ones = numpy.ones((len(starts), len(observed)))
    tried, costs = solve(model, observed, starts, ones, delta=delta, valid=valid, steps=200)
    theta = tried[int(numpy.argmin(costs))]
    weights = _resampled(runs.groups(), bootstrap, draw)
    samples = theta[None].copy()
    if bootstrap:
        again = numpy.repeat(theta[None], len(weights), 0)
        samples, _ = solve(model, observed, again, weights, delta=delta, valid=valid)
        samples = theta + (samples - theta) * _few(len(observed), form.parameters)
    residuals = observed - form.log_loss(theta, logs)
    condition = _condition(form.gradient(theta, logs)[1])
    largest = dict(zip(form.inputs, runs.columns(form.inputs).max(1).tolist(), strict=True))
    largest["flops"] = float(runs.columns(("flops",)).max())
    return LawFit(
        _shifted(form, given),
        _with_floor(theta, given, form),
        _with_floor(samples, given, form),
        residuals,
        largest,
        condition,
        _aicc(residuals, form.parameters),
        _reasons(form, theta, samples, condition),
    )


def _few(runs: int, parameters: int) -> float:
    """By how much resampling understates the spread: residuals shrink by what is fitted, and Student's tails are wider."""
    free = runs - parameters
    return math.sqrt(runs / free) * float(student.ppf(0.975, free) / student.ppf(0.975, math.inf))


def _shifted(form: Law, given: float) -> Law:
    return dataclasses.replace(form, floor=True) if given and not form.floor else form


def _with_floor(theta: Array, given: float, form: Law) -> Array:
    """Parameters with the given floor among them."""
    if not given or form.floor:
        return theta
    return numpy.concatenate([theta, numpy.full((*theta.shape[:-1], 1), math.log(given))], -1)


def _refuse_poor(runs: RunTable, form: Law) -> None:
    distinct = len(set(runs.groups().tolist()))
    if distinct < form.parameters + 2:
        raise InputError(
            f"law {form.name}: {distinct} different runs for {form.parameters} parameters, expected at least "
            f"{form.parameters + 2}; add runs"
        )
    for name, values in zip(form.inputs, runs.columns(form.inputs), strict=True):
        if len(set(values.tolist())) == 1:
            raise InputError(f"law {form.name}: all runs have the same {name} ({values[0]:g}); vary it")


def _starts(form: Law, logs: Array, observed: Array, draw: numpy.random.Generator, count: int = 96) -> Array:
    """Exponents from 0.03 to 1, intercepts so that each term is a share of the losses, floors below them."""
    inputs = len(form.inputs)
    exponents = numpy.exp(draw.uniform(math.log(0.03), math.log(1.0), (count, inputs)))
    shares = numpy.log(draw.uniform(0.2, 0.9, (count, inputs)))
    intercepts = float(observed.mean()) + shares + exponents * logs.mean(1)
    columns = [exponents, intercepts]
    if form.floor:
        columns.append(float(observed.min()) + numpy.log(draw.uniform(0.05, 0.95, (count, 1))))
    return numpy.concatenate(columns, 1)


def _resampled(groups: NDArray[numpy.int64], count: int, draw: numpy.random.Generator) -> Array:
    """How often each run counts in each resampling: groups are drawn with replacement."""
    number = int(groups.max()) + 1
    drawn = draw.integers(number, size=(count, number))
    counts = (
        numpy.stack([numpy.bincount(row, minlength=number) for row in drawn]) if count else numpy.empty((0, number))
    )
    result: Array = counts[:, groups].astype(numpy.float64)
    return result


def _condition(slopes: Array) -> float:
    unit = slopes / numpy.maximum(numpy.linalg.norm(slopes, axis=0), 1e-300)
    values = numpy.linalg.eigvalsh(unit.T @ unit)
    return float(values[-1] / max(values[0], 1e-300))


def _aicc(residuals: Array, parameters: int) -> float:
    count, free = len(residuals), parameters + 1
    spread = max(float((residuals**2).mean()), 1e-300)
    return count * math.log(spread) + 2 * free + 2 * free * (free + 1) / max(count - free - 1, 1e-9)


def _reasons(form: Law, theta: Array, samples: Array, condition: float) -> tuple[str, ...]:
    found = []
    if condition > ILL_CONDITIONED:
        found.append(f"condition number {condition:.1e}")
    for number, symbol in enumerate(form.symbols):
        low, high = numpy.quantile(samples[:, number], [0.025, 0.975])
        if low <= 2 * SMALLEST:
            found.append(f"the interval of alpha_{symbol} reaches from {low:.3g} to {high:.3g}")
    return tuple(found)
