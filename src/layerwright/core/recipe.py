"""Recipes: scorer + allocator + treatments + tuner, by name, with settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.treatment import Treatments, treatments_from_data, treatments_to_data

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """A published compression method, or anybody's own, as data.

    Attributes:
        name: lower case.
        title: one sentence for the list.
        paper: author, year and identifier; empty for our own.
        scorer: name of a scorer.
        allocator: name of an allocator.
        candidates: treatment sets that a weight layer may get (leaving it alone is always one more).
        drop_blocks: whether blocks may be removed.
        drop_scorer: scorer of a block's removal.
        attention: what every attention module gets (`RoundAttention`), besides what is decided.
        cache_shares: shares of the context that an attention module's cache may keep, offered where a budget limits the
            cache (`KVBudget`); none by default.
        prepare: steps that change weights but not what the model computes (``shift_smooth``, ...), done before scoring
            and treating: name to settings.
        group_size: group size of the uniform quantization that ``bits=`` refers to.
        scorer_settings, allocator_settings: keyword settings of the two.
        tuner: name of a tuner that recovers quality afterwards; empty for none.
        tuner_settings: its settings.
        decider: name of a decider that takes the place of scorer and allocator; empty for none.
        decider_settings: its settings.
        measured_choice: also apply each kind of treatment alone, and take what has the lowest calibration loss.
        needs: what the model must have: ``batchnorm``, ``decoder``, ``labels``, ...
        samples: calibration samples; length: tokens in one.
        score_samples: calibration samples that scorers look at.
    """

    name: str
    title: str = ""
    paper: str = ""
    scorer: str = "fisher"
    allocator: str = "integer"
    candidates: tuple[Treatments, ...] = ()
    drop_blocks: bool = False
    drop_scorer: str = "block_removal"
    attention: Treatments = ()
    cache_shares: tuple[float, ...] = ()
    prepare: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    group_size: int = -1
    scorer_settings: Mapping[str, Any] = field(default_factory=dict)
    allocator_settings: Mapping[str, Any] = field(default_factory=dict)
    tuner: str = ""
    tuner_settings: Mapping[str, Any] = field(default_factory=dict)
    decider: str = ""
    decider_settings: Mapping[str, Any] = field(default_factory=dict)
    measured_choice: bool = False
    needs: tuple[str, ...] = ()
    samples: int = 128
    length: int = 256
    score_samples: int = 32

    @classmethod
    def from_data(cls, data: Any, where: str = "recipe") -> Recipe:
        """Build from plain data; unknown fields and wrong types are refused by name."""
        if not isinstance(data, Mapping):
            raise InputError(f"{where}: expected a mapping with name, scorer, allocator, candidates, ...")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                raise unknown_name("field", str(key), fields, where)
        if not isinstance(data.get("name"), str):
            raise InputError(f"{where}: a recipe needs a name")
        values = dict(data)
        listed = values.get("candidates") or []
        if not isinstance(listed, list):
            raise InputError(f"{where}: candidates: expected a list of treatments")
        values["candidates"] = tuple(treatments_from_data(item, f"{where}: candidates") for item in listed)
        values["attention"] = treatments_from_data(values.get("attention"), f"{where}: attention")
        values["needs"] = tuple(values.get("needs") or ())
        shares = values.get("cache_shares") or []
        if not isinstance(shares, list) or not all(isinstance(s, int | float) and 0 < s < 1 for s in shares):
            raise InputError(f"{where}: cache_shares: got {shares!r}, expected a list of shares between 0 and 1")
        values["cache_shares"] = tuple(shares)
        steps = values.get("prepare") or {}
        if not isinstance(steps, Mapping) or not all(isinstance(s or {}, Mapping) for s in steps.values()):
            raise InputError(
                f"{where}: prepare: expected steps with settings, such as {{shift_smooth: {{alpha: 0.5}}}}"
            )
        values["prepare"] = {name: dict(settings or {}) for name, settings in steps.items()}
        for key, value in values.items():
            default = fields[key].default
            known = type(default) if default is not dataclasses.MISSING else None
            if known in (str, int, bool) and not isinstance(value, known):
                raise InputError(f"{where}: {key}: got {value!r}, expected {known.__name__}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file."""
        try:
            data = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise InputError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
        return cls.from_data(data, str(path))

    def to_data(self) -> dict[str, Any]:
        """Plain data; `from_data` reads it back."""
        data = dataclasses.asdict(self)
        data["candidates"] = [treatments_to_data(treatments) for treatments in self.candidates]
        data["attention"] = treatments_to_data(self.attention)
        data["needs"] = list(self.needs)
        data["cache_shares"] = list(self.cache_shares)
        return data
