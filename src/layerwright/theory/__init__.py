"""Laws and limits: what follows before anything is trained.

- `scaling`: losses of a bigger run from a user's own small ones: laws, fits with intervals, compute-optimal choices.
"""

from __future__ import annotations

from layerwright.theory import scaling

__all__ = ["scaling"]
