"""Laws and limits: what follows before anything is trained.

- `scaling`: losses of a bigger run from a user's own small ones: laws, fits with intervals, compute-optimal choices.
- `expected_rank`: what rank random layers give, by width and activation (ReXNet).
"""

from __future__ import annotations

from layerwright.theory import scaling
from layerwright.theory.expected_rank import ExpectedRank, expected_rank

__all__ = [
    "ExpectedRank",
    "expected_rank",
    "scaling",
]
