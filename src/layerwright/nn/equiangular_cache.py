"""Equiangular vectors made once and kept in the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layerwright.nn.equiangular import EBVResult, generate_ebv, measure_cosines

__all__ = ["STEPS", "cached_ebv"]

STEPS = 1000
"""Of descent, for vectors that are made here."""
_FORM = "1"
"""Of the stored files: one of another form is made anew."""


def cached_ebv(n: int, d: int, seed: int = 0, folder: Path | None = None) -> EBVResult:
    """The vectors of ``generate_ebv(n, d, steps=1000, seed=seed)``, from a file where they were made before.

    Files lie in ``~/.cache/layerwright/ebv``, or below ``$XDG_CACHE_HOME``, or in `folder`. A damaged file is made
    anew; where the folder cannot be written, nothing is kept. Orthonormal vectors are not stored.
    """
    if n <= d:
        return generate_ebv(n, d, seed=seed)
    base = os.environ.get("XDG_CACHE_HOME")
    folder = folder or (Path(base) if base else Path.home() / ".cache") / "layerwright" / "ebv"
    path = folder / f"{n}x{d}-seed{seed}.safetensors"
    if stored := _read(path, n, d):
        return stored
    made = generate_ebv(n, d, steps=STEPS, seed=seed)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": made.vectors}, temporary, {"form": _FORM, "steps": str(made.steps)})
        temporary.replace(path)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True) if folder.is_dir() else None
    return made


def _read(path: Path, n: int, d: int) -> EBVResult | None:
    """What `path` holds, or nothing where it is missing, damaged or of another form."""
    try:
        with safe_open(path, "pt") as file:
            marks, vectors = file.metadata() or {}, file.get_tensor("vectors")
        steps = int(marks.get("steps", "x"))
    except (OSError, SafetensorError, ValueError):
        return None
    if marks.get("form") != _FORM or vectors.shape != (n, d) or vectors.dtype != torch.float32:
        return None
    if not bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all()):
        return None
    return EBVResult(vectors, *measure_cosines(vectors), steps, True)
