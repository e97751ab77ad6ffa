"""Tune a model by name, and measure models side by side."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.core.errors import CheckError, CheckpointError, InputError, LayerwrightError
from layerwright.core.processes import main_process
from layerwright.data.loading import Source, load, locate
from layerwright.nn.treated import TreatedLinear
from layerwright.recipes._labelled import labelled_data
from layerwright.recipes.bench import open_bench, read_data
from layerwright.recipes.measure import Measurement, measure
from layerwright.treat.writer import check_folder, copy_side_files, save_model, staged_folder
from layerwright.tune.mixture import find_mixture
from layerwright.tune.mixture_files import save_adapter

__all__ = ["measure_job", "tune_job"]

Progress = Callable[[str, int, int], None]
_NEEDS_TEACHER = ("distill", "distill_layers")


def tune_job(
    model: str | Path,
    method: str,
    out: str | Path,
    *,
    data: str | Path | None = None,
    teacher: str | Path | None = None,
    steps: int = 100,
    rank: int = 8,
    keep_adapter: bool = False,
    samples: int = 128,
    length: int = 256,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
    settings: Mapping[str, Any] | None = None,
    seconds: float = 1.0,
) -> dict[str, Measurement]:
    """Tune a model by name, write the result to `out`, and measure before and after (and the teacher).

    Started by ``torchrun`` or ``accelerate launch`` all processes train together; the first one alone writes and
    measures, and the others return nothing.

    Args:
        model: a folder, hub name or ``demo:*``.
        method: name of a tuner.
        out: folder for the tuned model; with `keep_adapter`, for the adapter alone.
        data: calibration data; see `open_bench`. For a tuner that makes a new readout (``subtuning``) its classes may
            be others than the model's; see `labelled_data`.
        teacher: the original model, where the tuner needs one.
        steps, rank: for the tuners that take them.
        keep_adapter: save the adapter alone (``lora``, ``distill``, ``adamole``) instead of merging it. Over packed weights the
            adapter cannot be merged: the model is then saved with its adapters in place.
        settings: further settings of the tuner, by name. A tuner that keeps a record of its search (``subtuning``)
            writes ``<out>.<method>.json`` while it runs, from which the same job goes on; it ends in `out`.
        seconds: of timing for each model and batch size.

    Raises:
        CheckError, InputError, FileNotFoundError, CheckpointError: before any weight is loaded, as far as that can be
            known.
    """
    tuner, source, other = _check(model, method, out, teacher, keep_adapter, force)
    accepted = inspect.signature(tuner).parameters
    labelled, classes = labelled_data(source, data, length) if "classes" in accepted else (data, None)
    bench = open_bench(model, labelled, samples=samples, length=length, dtype=dtype, device=device)
    original = load(other.name, dtype=dtype, device=device)[0] if other is not None else None
    packed = any(isinstance(module, TreatedLinear) for module in bench.model.modules())
    record = Path(out).absolute().with_name(f"{Path(out).name}.{method}.json")
    given: dict[str, Any] = {"steps": steps, "rank": rank, "progress": progress, "merge": not (keep_adapter or packed)}
    given |= {"classes": classes, "record": record}
    chosen = {key: value for key, value in given.items() if key in accepted} | dict(settings or {})
    for key in chosen:
        if key not in accepted:
            raise InputError(f"{method} takes no setting {key!r}; it takes {', '.join(list(accepted)[2:])}")
    before = bench.model
    tuned = tuner(_own(before), bench.calibration, teacher=original, seed=seed, **chosen)
    if not main_process():  # all processes hold the same weights now
        return {}
    with staged_folder(Path(out), force) as folder:
        _save(tuned, folder, keep_adapter and method == "adamole")
        copy_side_files(source.folder, folder, bench.processor)
        if chosen.get("record") == record and record.exists():
            shutil.copyfile(record, folder / f"{method}.json")
    if chosen.get("record") == record:
        record.unlink(missing_ok=True)
    models: dict[str, nn.Module] = {} if original is None else {"teacher": original}
    if _labels(before) == _labels(tuned):  # with other classes there is nothing to compare
        models["before"] = before
    return measure(
        models | {"after": tuned},
        bench.heldout,
        seconds=seconds,
        byte_tokens=source.name == "demo:lm",
        seed=seed,
    )


def _labels(model: nn.Module) -> Any:
    """Names of the classes, None where the model has none."""
    return getattr(getattr(model, "config", None), "id2label", None)


def _own(model: nn.Module) -> nn.Module:
    """A deep copy: some tuners work in place, and the model is measured again afterwards."""
    import copy

    return copy.deepcopy(model)


def _check(
    model: str | Path, method: str, out: str | Path, teacher: str | Path | None, keep_adapter: bool, force: bool
) -> tuple[Callable[..., nn.Module], Source, Source | None]:
    """Everything that can be known before a weight is loaded, all problems together."""
    from layerwright.tune import TUNERS

    problems: list[str] = []
    found: dict[str, Any] = {}
    for name, look in (
        ("tuner", lambda: TUNERS.get(method)),
        ("model", lambda: locate(model)),
        ("teacher", lambda: locate(teacher) if teacher is not None else None),
        ("out", lambda: check_folder(out, force=force, resume=False) if main_process() else None),
    ):
        try:
            found[name] = look()
        except (LayerwrightError, FileNotFoundError) as error:
            problems.append(str(error))
    if method in _NEEDS_TEACHER and teacher is None:
        problems.append(f"{method} needs the original model: pass --teacher")
    if keep_adapter and method not in ("lora", "distill", "adamole"):
        problems.append(f"--keep-adapter: {method} makes no adapter; use lora, distill or adamole")
    if problems:
        raise CheckError(problems)
    return found["tuner"], found["model"], found["teacher"]


def _save(tuned: nn.Module, folder: Path, mixture: bool) -> None:
    if mixture:
        save_adapter(find_mixture(tuned), folder)
    elif hasattr(tuned, "peft_config"):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft looks for the base model's page on the hub
            try:
                tuned.save_pretrained(folder)  # type: ignore[operator]
            except OSError as error:
                raise CheckpointError(f"{folder} cannot be written ({error})") from error
    else:
        save_model(tuned, folder, force=True)


def measure_job(
    models: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    samples: int = 64,
    length: int = 256,
    seconds: float = 1.0,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Measurement]:
    """Measure models by name on the held-out data of the first one; that one is the reference.

    Args:
        models: folders, hub names or ``demo:*``; a name that comes twice is numbered.
        data: as in `open_bench`.
        samples: held-out samples of a text model's own or default data.
        seconds: of timing for each model and batch size.

    Raises:
        InputError, FileNotFoundError, CheckpointError: a model or data that cannot be read.
    """
    if not models:
        raise InputError("models: expected at least one")
    sources = [locate(name) for name in models]
    _, heldout = read_data(sources[0], data, samples=samples, length=length, heldout_samples=samples)
    networks: dict[str, nn.Module] = {}
    for source in sources:
        name = source.name
        while name in networks:
            name += " (again)"
        networks[name] = load(source.name, dtype=dtype, device=device)[0]
    return measure(networks, heldout.to(device), seconds=seconds, byte_tokens=sources[0].name == "demo:lm", seed=seed)
