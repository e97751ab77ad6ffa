"""Start a model anew: every layer with unit variance on the data, and a checkpoint of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.checkpoint import model_class, model_config
from layerwright.core.errors import CheckpointError, InputError
from layerwright.data.loading import DEMOS, Source, check_device, load, locate, processor_for, torch_dtype
from layerwright.recipes.bench import read_data
from layerwright.recipes.verbs import save
from layerwright.train.lsuv import LSUVReport, lsuv_

__all__ = ["Initialised", "initialise"]

REPORT = "initialisation.json"


@dataclass(frozen=True)
class Initialised:
    """A model that was started anew.

    Attributes:
        model: with its new weights.
        report: what was done to each layer.
        folder: the checkpoint, or None.
    """

    model: nn.Module
    report: LSUVReport
    folder: Path | None


def initialise(
    name: str | Path,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    fresh: bool = False,
    samples: int = 128,
    length: int = 128,
    layers: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tol: float = 0.1,
    max_iter: int = 10,
    orthonormal: bool = True,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    force: bool = False,
) -> Initialised:
    """Load or build a model, give it a layer-sequential unit-variance start (`layerwright.train.lsuv_`), write it.

    Args:
        name: of the model, as for `layerwright.load`; with `fresh`, a folder with ``config.json`` is enough.
        data: as for calibration; a text model takes the standard library's sources if left out.
        out: folder for the checkpoint and ``initialisation.json``; nothing is written if left out.
        fresh: build the model from its configuration with new random weights instead of loading them.
        samples: of one batch that passes through the model.
        length: tokens of a sample.

    Raises:
        InputError, FileNotFoundError, CheckpointError: see `load` and `lsuv_`; a model that only loads as trained.
    """
    source = locate(name)
    calibration, _ = read_data(source, data, samples=samples, length=length)
    model, processor = _fresh(source, dtype, device, seed) if fresh else load(source, dtype=dtype, device=device)
    batch = _one_batch(calibration.to(device))
    generator = torch.Generator().manual_seed(seed)
    report = lsuv_(
        model, batch, tuple(layers) or None, tol=tol, max_iter=max_iter, orthonormal=orthonormal, exclude=tuple(exclude),
        forward=calibration.forward, generator=generator,
    )  # fmt: skip
    if out is None:
        return Initialised(model, report, None)
    folder = save(model, out, processor=processor, force=force)
    (folder / REPORT).write_text(json.dumps({"method": "lsuv", "seed": seed, **report.to_data()}, indent=1) + "\n")
    return Initialised(model, report, folder)


def _fresh(source: Source, dtype: str | None, device: str, seed: int) -> tuple[nn.Module, Any]:
    """A model of the configuration of `source` with the random weights of its class."""
    if source.structure is not None or (source.name in DEMOS and not source.config.get("architectures")):
        raise CheckpointError(f"{source.name}: no plain configuration to build from; leave out --fresh")
    config = model_config(source.folder)
    cls = model_class(config)
    build = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build(config)
    model = model.to(device=check_device(device), dtype=torch_dtype(dtype) or torch.float32).eval()
    return model, processor_for(source)


def _one_batch(data: Calibration) -> Any:
    """All batches of `data` as one."""
    batches = list(data.batches)
    if not batches:
        raise InputError("data: got no samples")
    shapes = {key: {tuple(b[key].shape[1:]) for b in batches} for key in batches[0]}
    if any(len(found) > 1 for found in shapes.values()):
        return batches[0]
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
