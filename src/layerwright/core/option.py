"""Options, scores and the option table: the heart of every decision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwright.core.cost import Cost
from layerwright.core.errors import InputError
from layerwright.core.treatment import Treatments, describe, treatments_from_data, treatments_to_data

__all__ = ["Allocation", "Option", "OptionTable", "Scores"]


@dataclass(frozen=True)
class Option:
    """One row of the decision table: give `treatments` to `layer`, and this is what it costs and what it damages.

    Attributes:
        layer: path of the layer or of the block.
        treatments: what it gets; empty leaves it alone.
        cost: cost after treatment of everything the option covers. A dropped block's cost may be negative: it also
            removes parameters (norms, biases) that the table counts as fixed.
        damage: increase of the loss, lower is better.
        covers: paths of the layers it decides; more than one for tied layers and for a block.
    """

    layer: str
    treatments: Treatments
    cost: Cost
    damage: float
    covers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.covers:
            object.__setattr__(self, "covers", (self.layer,))

    def __str__(self) -> str:
        return f"{self.layer}: {describe(self.treatments)} (damage {self.damage:.4g}, {self.cost.bytes:,.0f} bytes)"


@dataclass(frozen=True)
class OptionTable:
    """All options of a model. A choice takes options so that each layer in `layers` is covered exactly once.

    Attributes:
        options: the rows.
        fixed: cost of everything that no option decides.
        original: cost of the whole model as it is.
        base_loss: loss before any treatment, if known.
    """

    options: tuple[Option, ...]
    fixed: Cost = field(default_factory=Cost)
    original: Cost = field(default_factory=Cost)
    base_loss: float | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer that is covered by some option, in order of first appearance."""
        return tuple(dict.fromkeys(path for option in self.options for path in option.covers))

    def __len__(self) -> int:
        return len(self.options)


@dataclass(frozen=True)
class Allocation:
    """What an allocator chose.

    Attributes:
        chosen: options that together cover each layer once.
        cost: predicted cost of the whole model (`fixed` included).
        damage: predicted increase of the loss (the sum over `chosen`); NaN where the method predicts none.
        reasons: layer path to one sentence: marginal damage per byte of the choice and of the next best option.
        method: name of the allocator.
        optimal: whether the choice is proven optimal.
        bound: proven lower bound of the damage under the same limits; None where the allocator has none.
    """

    chosen: tuple[Option, ...]
    cost: Cost
    damage: float
    reasons: Mapping[str, str] = field(default_factory=dict)
    method: str = ""
    optimal: bool = False
    bound: float | None = None

    @property
    def predicted(self) -> float | None:
        """The damage, None where the method predicts none."""
        return self.damage if math.isfinite(self.damage) else None


@dataclass(frozen=True)
class Scores:
    """Damages measured once by one scorer, saved and reused for every budget.

    Attributes:
        scorer: name of the scorer.
        damages: ``(layer path, treatments) -> damage`` in units of the loss; lower is better.
        sensitivities: ``layer path -> number`` where the scorer knows a layer or block but no single treatment.
        model: fingerprint of the model.
        data: fingerprint of the calibration data.
        base_loss: loss of the untouched model on that data.
        seconds: how long the measurement took.
        meta: settings and notes.
    """

    scorer: str
    damages: Mapping[tuple[str, Treatments], float] = field(default_factory=dict)
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    model: str = ""
    data: str = ""
    base_loss: float | None = None
    seconds: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def damage(self, layer: str, treatments: Treatments) -> float:
        """The damage of giving `treatments` to `layer`; no treatment does none."""
        if not treatments:
            return 0.0
        try:
            return self.damages[(layer, treatments)]
        except KeyError:
            raise InputError(
                f"scores by {self.scorer!r} have no entry for {layer} with {describe(treatments)}: measure them again"
            ) from None

    def save(self, path: str | Path) -> Path:
        """Write JSON; a folder gets ``<scorer>.json``."""
        path = Path(path)
        if path.suffix != ".json":
            path.mkdir(parents=True, exist_ok=True)
            path = path / f"{self.scorer}.json"
        rows = [
            {"layer": layer, "treatments": treatments_to_data(treatments), "damage": damage}
            for (layer, treatments), damage in self.damages.items()
        ]
        data = {
            "layerwright_scores": 1,
            "scorer": self.scorer,
            "model": self.model,
            "data": self.data,
            "base_loss": self.base_loss,
            "seconds": self.seconds,
            "meta": dict(self.meta),
            "sensitivities": dict(self.sensitivities),
            "damages": rows,
        }
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(data, indent=1))
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote."""
        try:
            data = json.loads(Path(path).read_text())
            if data["layerwright_scores"] != 1:
                raise KeyError("version")
            damages = {
                (row["layer"], treatments_from_data(row["treatments"], str(path))): float(row["damage"])
                for row in data["damages"]
            }
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a scores file of this version ({error}); measure the scores again"
            ) from error
        return cls(
            data["scorer"],
            damages,
            data["sensitivities"],
            data["model"],
            data["data"],
            data["base_loss"],
            data["seconds"],
            data["meta"],
        )
