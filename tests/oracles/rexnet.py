"""Ranks by a full decomposition in float64, and ReXNet's widths by the published loop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rank(matrix: NDArray[np.float64], tol: float) -> int:
    """Singular values above `tol` times the largest."""
    largest = np.linalg.svd(matrix, compute_uv=False).max()
    return int(np.linalg.matrix_rank(matrix, tol=tol * largest))


def nuclear(matrix: NDArray[np.float64]) -> float:
    """``||Y||_* / (sqrt(rows) ||Y||_F)``."""
    return float(np.linalg.norm(matrix, "nuc") / (np.sqrt(len(matrix)) * np.linalg.norm(matrix)))


def widths(depth: int, step: float, multiplier: float) -> list[int]:
    """16 channels, and `step` more in each block, before the multiplier."""
    width = 16 / multiplier if multiplier < 1.0 else 16
    found = [round(width * multiplier)]
    for _ in range(depth - 1):
        width += step
        found.append(round(width * multiplier))
    return found
