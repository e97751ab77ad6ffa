"""How many layers a number of attention heads is shared out over, under a limit on time or parameters (2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from layerwright.core.errors import BudgetError, InputError

__all__ = ["AspectCost", "depth_width_plan"]


@dataclass(frozen=True)
class AspectCost:
    """What one aspect ratio costs, measured.

    Attributes:
        layers, heads_per_layer: the shape; their product is the number of heads.
        parameters: all of them.
        body_parameters: without tables of tokens and positions.
        flops: of one forward pass, a multiply-add as 2.
        activation_bytes: what a forward pass keeps for the backward pass.
        latency_ms: median of a forward pass (which clock: see `layerwright.models.aspect_report.aspect_report`).
        spread_ms: between the quartiles.
        relative_latency: over the first model's that was measured with it: the median of the ratios of rounds.
        operations: kernels that are called one after the other.
        weight_ms: bytes of the weights in use over the bandwidth of memory, measured on the spot.
        overhead_ms: `operations` times what a call of the smallest kernel takes, measured on the spot.
    """

    layers: int
    heads_per_layer: int
    parameters: int
    body_parameters: int
    flops: float
    activation_bytes: int
    latency_ms: float
    spread_ms: float
    relative_latency: float
    operations: int
    weight_ms: float
    overhead_ms: float

    @property
    def total_heads(self) -> int:
        """Heads in all layers."""
        return self.layers * self.heads_per_layer

    @property
    def name(self) -> str:
        """Layers by heads, such as ``6x8``."""
        return f"{self.layers}x{self.heads_per_layer}"

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"name": self.name, **asdict(self)}


def depth_width_plan(
    total_heads: int,
    measured: Sequence[AspectCost],
    *,
    budget_latency_ms: float | None = None,
    budget_params: float | None = None,
    quality: Mapping[int, float] | None = None,
) -> AspectCost:
    """The aspect ratio to take among those that were measured and keep to the limits.

    With `quality` the best one, and of equally good ones the fastest; without, the deepest, which has most parameters.

    Source: Brown, Zhao, Shumailov and Mullins, 2022, arXiv 2210.00640.

    Args:
        total_heads: heads of every candidate.
        measured: such as `layerwright.models.aspect_report.aspect_report` returns.
        budget_latency_ms: limit on the median milliseconds of a forward pass.
        budget_params: limit on all parameters.
        quality: by number of layers; higher is better. Candidates without are left out.

    Raises:
        InputError: no limit, nothing measured, or a candidate with another number of heads.
        BudgetError: no candidate keeps to the limits.
    """
    if budget_latency_ms is None and budget_params is None:
        raise InputError("budget: got none, expected budget_latency_ms, budget_params or both")
    for name, limit in (("budget_latency_ms", budget_latency_ms), ("budget_params", budget_params)):
        if limit is not None and not limit > 0:
            raise InputError(f"{name}: got {limit}, expected a positive number")
    if not measured:
        raise InputError("measured: got no candidates, expected those of aspect_report")
    if other := [cost.name for cost in measured if cost.total_heads != total_heads]:
        raise InputError(f"measured: {', '.join(other)} do not have total_heads={total_heads} heads in all")
    candidates = [cost for cost in measured if quality is None or cost.layers in quality]
    if not candidates:
        raise InputError("quality: got none for the layers that were measured")
    fitting = [
        cost
        for cost in candidates
        if (budget_latency_ms is None or cost.latency_ms <= budget_latency_ms)
        and (budget_params is None or cost.parameters <= budget_params)
    ]
    if not fitting:
        fastest = min(cost.latency_ms for cost in candidates)
        smallest = min(cost.parameters for cost in candidates)
        raise BudgetError(
            f"budget: none of {', '.join(cost.name for cost in candidates)} fits; the fastest takes {fastest:.3g} ms, the "
            f"smallest has {smallest} parameters"
        )
    if quality is None:
        return max(fitting, key=lambda cost: cost.layers)
    return max(fitting, key=lambda cost: (quality[cost.layers], -cost.latency_ms))
