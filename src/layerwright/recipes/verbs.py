"""The package's verbs on models in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.core.calibration import Calibration, LossFunction, as_calibration
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.layers import list_layers
from layerwright.core.plan import Plan
from layerwright.core.profile import Profile
from layerwright.core.treatment import Treatments
from layerwright.recipes.bench import Bench
from layerwright.recipes.inspect import inspect_bench
from layerwright.recipes.job import decide
from layerwright.treat.apply import apply_plan

__all__ = ["apply", "inspect", "plan", "save", "tune"]

Data = Calibration | Iterable[Any]
Progress = Callable[[str, int, int], None]


def _bench(model: nn.Module, data: Data, loss_fn: LossFunction | None) -> Bench:
    calibration = as_calibration(data, loss_fn)
    return Bench(model, None, calibration, calibration, type(model).__name__)


def inspect(
    model: nn.Module,
    data: Data,
    *,
    loss_fn: LossFunction | None = None,
    scores: Sequence[str] = (),
    seed: int = 0,
) -> Profile:
    """The per-layer table of `model`: what each layer is and costs, and its sensitivity by each of `scores`.

    Example:
        >>> import torch, layerwright
        >>> model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(3)])
        >>> profile = layerwright.inspect(model, [(torch.randn(4, 8), torch.tensor([0, 1, 2, 3]))])
        >>> int(profile.total.params)
        216
    """
    return inspect_bench(_bench(model, data, loss_fn), scores=scores, seed=seed)[0]


def plan(
    model: nn.Module,
    data: Data,
    *,
    budget: str,
    recipe: str | None = None,
    target: str = "layerwright",
    loss_fn: LossFunction | None = None,
    scores: str | Path | None = None,
    seed: int = 0,
) -> Plan:
    """Decide a treatment for every layer under `budget`; see the `recipes` page for the methods.

    Args:
        scores: folder of saved scores; reused where they fit, else measured and written there.

    Raises:
        BudgetError: the budget is malformed or cannot be reached (the message names the reachable minimum).
    """
    folder = Path(scores) if scores is not None else None
    return decide(_bench(model, data, loss_fn), budget, recipe, to=target, seed=seed, scores_folder=folder).plan


def apply(
    model: nn.Module,
    plan: Plan | Mapping[str, Treatments],
    data: Data | None = None,
    *,
    loss_fn: LossFunction | None = None,
    simulate: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """A treated copy of `model`; the model that was given is left untouched.

    The copy carries its `ApplyReport` as ``copy.layerwright_report``.

    Raises:
        PlanError: the plan does not fit the model (every problem is named).
    """
    if isinstance(plan, Plan):
        refs = list_layers(model)
        problems = plan.check(
            [ref.path for ref in refs],
            fingerprint_model(model),
            shapes={ref.path: ref.shape for ref in refs if ref.layout != "none"},
        )
        if problems:
            from layerwright.core.errors import CheckError

            raise CheckError(problems)
    calibration = None if data is None else as_calibration(data, loss_fn)
    treated, report = apply_plan(model, plan, calibration, simulate=simulate, progress=progress)
    object.__setattr__(treated, "layerwright_report", report)
    return treated


def tune(
    model: nn.Module,
    data: Data,
    method: str = "lora",
    *,
    teacher: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    **settings: Any,
) -> nn.Module:
    """A copy of `model`, trained to recover or adapt by `method` (``lora``, ``distill``, ``full``, ...)."""
    from layerwright.tune import TUNERS

    return TUNERS.get(method)(model, as_calibration(data, loss_fn), teacher=teacher, seed=seed, **settings)


def save(model: nn.Module, out: str | Path, format: str = "safetensors", **settings: Any) -> Path:
    """Write `model` to `out` as ``safetensors`` (our layout), ``compressed-tensors``, ``gguf`` or ``onnx``.

    Raises:
        CheckpointError: the folder cannot be used, or the format cannot express the model (it says what).
    """
    from layerwright.treat.export import export_model

    if not isinstance(model, nn.Module):
        raise InputError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    return export_model(model, out, format, **settings)
