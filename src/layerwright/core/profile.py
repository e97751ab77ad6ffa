"""The per-layer table that `inspect` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwright.core.cost import Cost
from layerwright.core.errors import require_extra
from layerwright.core.layer import LayerRef

__all__ = ["LayerProfile", "Profile"]


@dataclass(frozen=True)
class LayerProfile:
    """One layer: what it is, what it costs, what it produces.

    Attributes:
        ref: its address and shape.
        cost: for a layer with a weight, that layer alone; for a block, attention or mlp, all it contains.
        activation_bytes: size of its output over one calibration batch.
        scores: sensitivity by scorer name.
    """

    ref: LayerRef
    cost: Cost
    activation_bytes: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """All layers of a model with their costs.

    Attributes:
        layers: rows, in the model's order; containers (blocks, attention, mlp) come before what they hold.
        total: cost of the whole model.
        name: of the model.
        fingerprint: of the model.
        rows: tokens (or samples, for images) in the batch that was profiled.
        loss: mean loss on the calibration data, None if it was not measured.
    """

    layers: tuple[LayerProfile, ...]
    total: Cost
    name: str = ""
    fingerprint: str = ""
    rows: int = 0
    loss: float | None = None

    def __iter__(self) -> Iterator[LayerProfile]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, path: str) -> LayerProfile:
        for layer in self.layers:
            if layer.ref.path == path:
                return layer
        raise KeyError(path)

    def with_scores(self, name: str, values: Mapping[str, float]) -> Profile:
        """The same table with one more column."""
        rows = tuple(
            LayerProfile(
                row.ref,
                row.cost,
                row.activation_bytes,
                {**row.scores, name: values[row.ref.path]} if row.ref.path in values else row.scores,
            )
            for row in self.layers
        )
        return Profile(rows, self.total, self.name, self.fingerprint, self.rows, self.loss)

    def to_data(self) -> list[dict[str, Any]]:
        """One flat mapping per layer."""
        return [
            {
                "path": row.ref.path,
                "kind": row.ref.kind,
                "role": row.ref.role,
                "block": row.ref.block,
                "shape": list(row.ref.shape),
                "count": row.ref.count,
                **row.cost.to_data(),
                "activation_bytes": row.activation_bytes,
                **row.scores,
            }
            for row in self.layers
        ]

    def to_pandas(self) -> Any:
        """A pandas ``DataFrame``, one row per layer (extra ``tables``)."""
        return require_extra("pandas", "tables").DataFrame(self.to_data()).set_index("path")

    def __repr__(self) -> str:
        blocks = sum(row.ref.kind == "block" for row in self.layers)
        return (
            f"Profile({self.name or 'model'}: {len(self.layers)} layers in {blocks} blocks, "
            f"{self.total.params:,.0f} parameters, {self.total.bytes / 1e6:,.1f} MB)"
        )
