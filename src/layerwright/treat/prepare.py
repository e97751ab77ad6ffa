"""Steps before any treatment: they change weights, not what the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.errors import InputError
from layerwright.core.registry import Registry

__all__ = ["PREPARERS", "Preparer", "prepare_"]


class Preparer(Protocol):
    """Changes `model` in place without changing its function; returns what it did, in words."""

    def __call__(self, model: nn.Module, calibration: Calibration, *, seed: int, **settings: Any) -> list[str]:
        """Replace parameters (never write into them: they may be shared with the user's model)."""


PREPARERS: Registry[Preparer] = Registry("preparation")
"""Steps by name; `Recipe.prepare` and `Plan.prepare` name them."""

PREPARERS.add("log_equalize", "layerwright.treat.log_equalize:log_equalize_")
PREPARERS.add("smooth", "layerwright.treat.smooth:smooth_")
PREPARERS.add("reparameterize", "layerwright.treat.reparameterize:reparameterize_")


def prepare_(
    model: nn.Module, steps: Mapping[str, Mapping[str, Any]], calibration: Calibration | None, *, seed: int = 0
) -> list[str]:
    """Carry out `steps` on `model`, in place, in their order; parameters are replaced, not written to.

    Raises:
        InputError: an unknown step, settings that it does not take, or no calibration data.
    """
    notes: list[str] = []
    for name, settings in steps.items():
        step = PREPARERS.get(name)
        if calibration is None:
            raise InputError(f"prepare: {name} looks at activations: pass calibration data")
        try:
            notes += step(model, calibration, seed=seed, **settings)
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
            raise InputError(f"prepare: {name}: {error}; see its settings in the documentation") from error
    return notes
