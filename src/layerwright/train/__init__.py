"""Start and train networks: optimizers and their schedules.

- `ScaledAdam`: Adam whose steps are a share of each parameter's size, which it learns as well.
- `Eden`: a learning rate that falls with the number of batches and of epochs, whatever the batch size.
"""

from __future__ import annotations

from layerwright.train.eden import Eden
from layerwright.train.scaled_adam import ScaledAdam

__all__ = ["Eden", "ScaledAdam"]
