"""Scaling laws of language models, fitted to one's own runs (Kaplan et al., 2020, arXiv 2001.08361).

- `Run`, `RunTable`: what was trained; from records, ``.csv`` or ``.jsonl``.
- `fit_law`: a `LawFit` with intervals from resampled runs; `LAWS`: by name.
- `critical_batch`, `BatchLaw`, `noise_scale`: how large a batch is of use.
- `allocate_compute`, `data_needed`, `early_stop_step`, `suggest_shape`, `plan_runs`: what to train.
- `count_params`, `training_flops`: the units that the laws are in.
"""

from __future__ import annotations

from layerwright.theory.scaling.batch import BatchLaw, critical_batch, minimum_steps, noise_scale
from layerwright.theory.scaling.compute import (
    Allocation,
    allocate_compute,
    count_params,
    data_needed,
    early_stop_step,
    suggest_shape,
    training_flops,
)
from layerwright.theory.scaling.design import plan_runs
from layerwright.theory.scaling.fit import LawFit, Prediction, fit_law
from layerwright.theory.scaling.laws import LAWS, Law
from layerwright.theory.scaling.runs import Run, RunTable

__all__ = [
    "LAWS",
    "Allocation",
    "BatchLaw",
    "Law",
    "LawFit",
    "Prediction",
    "Run",
    "RunTable",
    "allocate_compute",
    "count_params",
    "critical_batch",
    "data_needed",
    "early_stop_step",
    "fit_law",
    "minimum_steps",
    "noise_scale",
    "plan_runs",
    "suggest_shape",
    "training_flops",
]
