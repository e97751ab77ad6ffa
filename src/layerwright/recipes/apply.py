"""Apply a plan file to a model by name: checked first, forecast, streamed from the files where possible."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.core.checkpoint import Checkpoint
from layerwright.core.errors import CheckError, CheckpointError, LayerwrightError, NotFiniteError, PlanError
from layerwright.core.forecast import Forecast
from layerwright.core.layers import list_layers
from layerwright.core.memory import peak_memory_bytes
from layerwright.core.plan import Plan
from layerwright.core.records import ApplyReport
from layerwright.core.treatment import KVBudget, RoundActivations, RoundAttention, RoundCache
from layerwright.data.loading import Source, check_device, load, locate, torch_dtype
from layerwright.recipes.bench import read_data
from layerwright.recipes.forecast import forecast_apply
from layerwright.treat.apply import apply_plan
from layerwright.treat.stream import apply_checkpoint, empty_model, fingerprint_checkpoint, streams
from layerwright.treat.writer import check_folder, copy_side_files, save_model, staged_folder

__all__ = ["ApplyResult", "apply_job"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ApplyResult:
    """What `apply` did, and how well it was foreseen."""

    report: ApplyReport
    forecast: Forecast
    out: Path
    seconds: float
    streamed: bool

    def disk_bytes(self) -> int:
        """Size of the output folder."""
        return sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())

    def comparison(self) -> str:
        """Forecast against measured."""
        return self.forecast.compare(self.report.peak_memory_bytes, self.seconds, self.disk_bytes())

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "checkpoint": str(self.out),
            "streamed": self.streamed,
            "seconds": self.seconds,
            "peak_memory_bytes": self.report.peak_memory_bytes,
            "disk_bytes": self.disk_bytes(),
            "forecast": self.forecast.to_data(),
            "layers": self.report.to_data(),
        }


def refuse_plan(plan: Plan, skeleton: nn.Module, folder: Path) -> None:
    """Raise `CheckError` with everything that is wrong with `plan` for the checkpoint in `folder`."""
    refs = list_layers(skeleton)
    try:
        fingerprint = fingerprint_checkpoint(skeleton, Checkpoint.open(folder))
    except NotFiniteError:
        raise
    except CheckpointError:
        fingerprint = ""  # names are converted on loading: compared once the model is loaded
    problems = plan.check(
        [ref.path for ref in refs],
        fingerprint,
        shapes={ref.path: ref.shape for ref in refs if ref.layout != "none"},
        roles={ref.path: ref.role for ref in refs if ref.role},
    )
    if problems:
        raise CheckError(problems)


def _check(
    model: str | Path,
    plan: str | Path,
    out: str | Path,
    dtype: str | None,
    device: str,
    *,
    force: bool,
    resume: bool,
) -> tuple[Source, Plan]:
    """Everything that can be known before a weight is loaded, all problems together."""
    problems: list[str] = []
    found: dict[str, Any] = {}
    looks: dict[str, Callable[[], Any]] = {
        "plan": lambda: Plan.load(plan),
        "model": lambda: locate(model),
        "dtype": lambda: torch_dtype(dtype),
        "device": lambda: check_device(device),
        "out": lambda: check_folder(out, force=force, resume=resume),
    }
    for name, look in looks.items():
        try:
            found[name] = look()
        except PlanError as error:
            problems.extend(error.problems)
        except (LayerwrightError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise CheckError(problems)
    return found["model"], found["plan"]


def apply_job(
    model: str | Path,
    plan: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    whole: bool = False,
    samples: int = 128,
    length: int = 256,
    dtype: str | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> ApplyResult:
    """Carry out the plan in a file on a model by name, and write the result to `out`.

    The checkpoint is treated block by block from its files; it is loaded whole where its names are converted on
    loading, where another dtype or device is wanted, or with `whole`.

    Raises:
        PlanError, CheckError, CheckpointError: before any weight is loaded.
    """
    begun = time.perf_counter()
    reason = (
        "asked to load it whole" if whole else "" if dtype is None and device == "cpu" else "another dtype or device"
    )
    source, decided = _check(model, plan, out, dtype, device, force=force, resume=not reason)
    skeleton = empty_model(source.folder)
    refuse_plan(decided, skeleton, source.folder)
    calibration, _ = read_data(source, data, samples=samples, length=length)
    if source.structure:
        reason = "it is treated already"
    if decided.prepare:
        reason = reason or f"the plan prepares the whole model first: {', '.join(decided.prepare)}"
    roundings = KVBudget | RoundActivations | RoundAttention | RoundCache
    if any(isinstance(t, roundings) for own in decided.layers.values() for t in own):
        reason = reason or "the plan rounds activations, or rounds or limits the cache"
    reason = reason or streams(source.folder)
    forecast = forecast_apply(
        skeleton,
        decided,
        calibration,
        streamed=not reason,
        folder=source.folder,
        spent_seconds=time.perf_counter() - begun,
    )
    if say:
        say(f"loading {source.name} {'block by block' if not reason else f'whole ({reason})'}; {forecast}")
    if not reason:
        report = apply_checkpoint(
            source.folder, decided, calibration, out, progress=progress, force=force, name=source.name
        )
    else:
        check_folder(out, force=force, resume=False)
        network, processor = load(source, dtype=dtype, device=device)
        treated, report = apply_plan(network, decided, calibration.to(device), progress=progress)
        with staged_folder(Path(out), force) as folder:
            save_model(treated, folder)
            copy_side_files(source.folder, folder, processor)
            decided.save(folder / "plan.yaml")
            report.save(folder / "apply.jsonl")
        report.path = Path(out) / "apply.jsonl"
    report.peak_memory_bytes = peak_memory_bytes()
    return ApplyResult(report, forecast, Path(out), time.perf_counter() - begun, not reason)
