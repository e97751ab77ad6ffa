"""Which experts of a mixture of adapters serve which layers, and how many serve a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwright.core.calibration import as_calibration, evaluating
from layerwright.nn.lora_mixture import ExpertUsage
from layerwright.tune.mixture import find_mixture

__all__ = ["UsageTable", "expert_usage"]


@dataclass(frozen=True)
class UsageTable:
    """Use of experts by layer.

    Attributes:
        adapter: its name.
        layers: by path, in the model's order.
    """

    adapter: str
    layers: dict[str, ExpertUsage]

    @property
    def mean_active(self) -> float:
        """Experts of a token on average over layers."""
        return sum(usage.mean_active for usage in self.layers.values()) / len(self.layers)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer: mean and spread of the number of experts, share of tokens without, each expert's share."""
        return [
            {
                "layer": path,
                "tokens": usage.tokens,
                "mean active": usage.mean_active,
                "std active": usage.std_active,
                "no expert": usage.active[0],
                **{f"expert {number}": share for number, share in enumerate(usage.shares)},
            }
            for path, usage in self.layers.items()
        ]

    def __str__(self) -> str:
        width = max(len(path) for path in self.layers)
        lines = [f"{'layer':{width}}  active    std  share of the tokens by expert"]
        for path, usage in self.layers.items():
            shares = " ".join(f"{share:.2f}" for share in usage.shares)
            lines.append(f"{path:{width}}  {usage.mean_active:6.2f} {usage.std_active:6.2f}  {shares}")
        return "\n".join(lines)


@torch.no_grad()
def expert_usage(model: nn.Module, data: Any) -> UsageTable:
    """Count which experts serve the tokens of `data`, padding left out where a mask is given.

    Args:
        model: with a mixture of adapters; left in the mode it was in, its counts start again from zero.
        data: a `Calibration` or a list of batches; labels are not needed.

    Raises:
        InputError: the model has no mixture.
    """
    handle = find_mixture(model)
    calibration = as_calibration(data)
    handle.reset_usage()
    with evaluating(model):
        for batch in calibration:
            calibration.forward(model, batch)
    found = UsageTable(handle.active, handle.expert_usage())
    handle.reset_usage()
    return found
