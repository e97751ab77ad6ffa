"""Scaling laws (Kaplan et al., 2020, arXiv 2001.08361): fitted to runs with known constants, and to our own.

First, tables made from published constants with noise; then small byte-level Llamas, all but the largest of which are
fitted, and the largest predicted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy

from layerwright.core.evidence import Check, Evidence
from layerwright.studies.sequence import bits_per_byte, corpus_hash, tiny_llama, train_bytes
from layerwright.theory.scaling import LAWS, Run, count_params, fit_law
from layerwright.theory.scaling.laws import published

__all__ = ["CLAIM", "made_runs", "run", "small_runs"]

CLAIM = (
    "Losses follow power laws in size and data: constants are found again from noisy runs, with intervals that hold them, and "
    "a law fitted to small runs predicts a larger one."
)
NOISE = 0.005
FLOOR = {"alpha_N": 0.34, "N_c": 4.7e7, "alpha_D": 0.28, "D_c": 2.1e9, "L_inf": 1.2}
SHAPES = ((16, 2, 2), (24, 2, 2), (32, 3, 2), (48, 4, 4), (64, 6, 4), (96, 8, 4))
"""Width, blocks and heads: 10 thousand to 0.9 million parameters outside the embedding."""
Progress = Callable[[str, int, int], None]


def made_runs(constants: Mapping[str, float], law: str, seed: int, count: int = 30) -> list[Run]:
    """`count` runs of 1e5 to 1e8 parameters on 1e6 to 1e10 tokens whose losses follow a law with `NOISE`."""
    form, draw = LAWS[law], numpy.random.default_rng(seed)
    n = numpy.exp(draw.uniform(math.log(1e5), math.log(1e8), count))
    d = numpy.exp(draw.uniform(math.log(1e6), math.log(1e10), count))
    logs = form.log_loss(form.theta(constants), numpy.log([n, d])) + draw.normal(0, NOISE, count)
    return [Run(float(a), float(b), float(c)) for a, b, c in zip(n, d, numpy.exp(logs), strict=True)]


def small_runs(
    shapes: tuple[tuple[int, int, int], ...], steps: tuple[int, ...], seed: int, tell: Progress
) -> list[Run]:
    """Byte-level Llamas trained from nothing: every shape for every number of steps of 16 windows of 128 bytes."""
    found = []
    for number, (dim, layers, heads) in enumerate(shapes):
        for count in steps:
            model = tiny_llama(dim, layers, heads, seed=seed)
            rate = 4e-3 * (16 / dim) ** 0.5
            train_bytes(model, steps=count, batch=16, context=128, learning_rate=rate, seed=seed)
            loss = bits_per_byte(model, windows=128) * math.log(2)
            found.append(Run(count_params(model), count * 16 * 128, loss, 16 * 128, count, seed=seed))
        tell("small runs", number + 1, len(shapes))
    return found


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    table: list[dict[str, Any]] = []
    inside, errors = [], []
    names = ("alpha_N", "alpha_D")
    for seed in range(4 if quick else 20):
        fit = fit_law(made_runs(published("ND"), "ND", seed), "ND", bootstrap=100 if quick else 500, seed=seed)
        for name in names:
            low, high = fit.interval(name)
            inside.append(low <= published("ND")[name] <= high)
            errors.append(abs(fit.params[name] / published("ND")[name] - 1))
        table.append({"runs": "made, ND", "seed": seed} | {name: fit.params[name] for name in names})
    floors, gains = [], []
    for seed in range(2 if quick else 5):
        rows = made_runs(FLOOR, "chinchilla", seed)
        fit, none = fit_law(rows, "chinchilla", bootstrap=0), fit_law(rows, "ND", bootstrap=0)
        floors.append(abs(fit.params["L_inf"] / FLOOR["L_inf"] - 1))
        gains.append(none.aicc - fit.aicc)
        table.append({"runs": "made, floor 1.2", "seed": seed, **fit.params, "AICc gained": gains[-1]})
    checks = [
        Check("published exponents inside their 95 % intervals (share)", statistics.fmean(inside), 0.85, ">="),
        Check("error of an exponent, median", statistics.median(errors), 0.04),
        Check("error of the floor, largest of the seeds", max(floors), 0.1),
        Check("AICc that a floor gains, smallest of the seeds", min(gains), 0.0, ">="),
    ]
    shapes, steps = (SHAPES[:3], (4, 8, 12)) if quick else (SHAPES, (150, 450))
    runs = small_runs(shapes, steps, 0, tell)
    largest, rest = runs[-1], runs[:-1]
    table += [{"runs": "ours", "n_params": r.n_params, "tokens": r.tokens, "loss": r.loss} for r in runs]
    fit = fit_law(rest, "ND", irreducible="fit", bootstrap=100 if quick else 500)
    told = fit.predict(allow_extrapolation=True, n_params=largest.n_params, tokens=largest.tokens)
    off = abs(told.loss / largest.loss - 1)
    checks += [
        Check("largest of our runs, predicted from the others (relative error)", off, 0.04),
        Check("largest of our runs, above the lower end of its interval", largest.loss, told.low, ">="),
        Check("largest of our runs, below the upper end of its interval", largest.loss, told.high),
    ]
    notes = [
        f"corpus {corpus_hash()}; our runs: {len(shapes)} shapes x {steps} steps of 2,048 bytes, one seed",
        f"predicted {told.loss:.4f} [{told.low:.4f}, {told.high:.4f}], measured {largest.loss:.4f} nats/byte",
        "exponents of our runs: "
        + ", ".join(f"{name} {fit.params[name]:.3f} {_interval(fit.interval(name))}" for name in (*names, "L_inf")),
        "identified" if fit.identified else f"our exponents are not identified: {'; '.join(fit.reasons)}",
        "the floor is looked for with the exponents of Hoffmann et al. (2022): under those of Kaplan et al. losses of this "
        "range do not tell a floor from smaller exponents",
    ]
    return Evidence("scaling-laws", CLAIM, table, tuple(checks), time.perf_counter() - begun, (0,), notes)


def _interval(bounds: tuple[float, float]) -> str:
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"
