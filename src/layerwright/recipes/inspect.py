"""The per-layer table, with scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.layers import list_layers, treatable
from layerwright.core.option import Scores
from layerwright.core.profile import Profile
from layerwright.core.treatment import Quantize
from layerwright.recipes.bench import Bench, open_bench
from layerwright.score.base import SCORERS, Subject
from layerwright.score.costs import find_blocks_or_none, profile_model
from layerwright.treat.probe import treat_weights

__all__ = ["PROBE", "inspect_bench", "inspect_model"]

PROBE = (Quantize(3, method="mse"),)
"""The treatment whose damage `inspect` shows for scorers that judge treatments."""

Progress = Callable[[str, int, int], None]


def inspect_model(
    model: str | Path | nn.Module,
    data: str | Path | Calibration | Iterable[Any] | None = None,
    *,
    scores: Sequence[str] = (),
    samples: int = 32,
    length: int = 256,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Profile, dict[str, Scores]]:
    """Profile a model and run `scores` (names; ``all`` for every scorer). Returns the table and the scores.

    Raises:
        InputError: unknown scorer (close matches are listed), or what `open_bench` raises.
    """
    names = list(SCORERS.names()) if "all" in scores else list(scores)
    for name in names:
        SCORERS.get(name)
    bench = open_bench(model, data, samples=samples, length=length, dtype=dtype, device=device)
    return inspect_bench(bench, scores=names, seed=seed, progress=progress)


def inspect_bench(
    bench: Bench, *, scores: Sequence[str] = (), seed: int = 0, progress: Progress | None = None
) -> tuple[Profile, dict[str, Scores]]:
    """`inspect_model` for a model that is loaded."""
    refs = list_layers(bench.model)
    profile = profile_model(bench.model, bench.calibration, refs=refs, name=bench.name)
    layers = treatable(bench.model, refs)
    found: dict[str, Scores] = {}
    for number, name in enumerate(scores):
        subject = Subject(
            bench.model,
            bench.calibration,
            layers=layers,
            candidates={ref.path: (PROBE,) for ref in layers},
            blocks=[path for stack in find_blocks_or_none(bench.model) for path in stack.names],
            treat=treat_weights,
            seed=seed,
        )
        if progress:
            progress(name, number, len(scores))
        found[name] = SCORERS.get(name)(subject)
        values = dict(found[name].sensitivities) or {path: damage for (path, _), damage in found[name].damages.items()}
        profile = profile.with_scores(name, values)
    return profile, found
