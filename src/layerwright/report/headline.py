"""What changed and what it cost: the sentence on top and the table below it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwright.report import numbers
from layerwright.report.numbers import MISSING, finite

__all__ = ["Line", "comparison", "headline"]

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of the comparison: a name and one text per model; `note` says how to read it."""

    name: str
    values: tuple[str, ...]
    note: str = ""


def headline(data: Mapping[str, Any]) -> str:
    """One sentence: sizes before and after, what the loss did, and what the uniform baseline did.

    Parts that were not measured are left out. A change whose interval holds zero is called one that cannot be told
    from none.
    """
    measured = data.get("measured") or {}
    model = str(data.get("model") or "the model")
    before, after, uniform = (measured.get(name) or {} for name in ("before", "after", "uniform"))
    if finite(before.get("bytes")) is None or finite(after.get("bytes")) is None:
        return f"{model}: sizes before and after were not measured."
    change = (
        f"{model} went from {numbers.size(before['bytes'])} to {numbers.size(after['bytes'], like=before['bytes'])}"
    )
    parts = [f"{change} ({numbers.ratio(after['bytes'], before['bytes'])})", _loss(after)]
    if finite(uniform.get("difference")) is not None:
        name = str(data.get("uniform") or "the uniform baseline")
        parts.append(f"{name} {_where(uniform, after)}: {_signed(uniform)}{_bounds(uniform)}")
    return "; ".join(part for part in parts if part) + "."


def comparison(measured: Mapping[str, Figures], names: Sequence[str]) -> tuple[Line, ...]:
    """Lines of the table for the models `names`; a line that nobody has a value for is left out."""
    models = [measured[name] for name in names]
    unit = next((str(m["unit"]) for m in models if m.get("unit")), "")
    lines = [
        _line(
            models, f"Loss ({unit})" if unit else "Loss", "loss", numbers.number, "held-out samples; lower is better"
        ),
        _line(models, "Loss, 95 % interval", "loss_interval", numbers.interval, "over samples"),
        _line(models, "Rise of the loss", "difference", _plus, "against before, on the same samples"),
        _line(models, "Rise, 95 % interval", "difference_interval", _short_interval, "paired by sample"),
        _line(models, "Accuracy", "accuracy", numbers.percent),
        _line(models, "Perplexity", "perplexity", numbers.number),
        _line(models, "Bits per byte", "bits_per_byte", numbers.number),
        _line(models, "Size", "bytes", lambda v: numbers.size(v, like=models[0].get("bytes")), "stored weights"),
        _ratio(models),
        _line(models, "FLOPs", "flops", lambda v: numbers.count(v, "FLOP"), "one forward pass over one sample"),
        _line(models, "Time", "ms", numbers.milliseconds, "median of one forward pass over one sample"),
        *_speeds(models),
        _line(models, "Peak memory", "memory_bytes", lambda v: numbers.size(v or None), "of the process so far"),
    ]
    return tuple(line for line in lines if any(value != MISSING for value in line.values))


def _line(models: Sequence[Figures], name: str, key: str, show: Callable[[Any], str], note: str = "") -> Line:
    return Line(name, tuple(show(model.get(key)) for model in models), note)


def _ratio(models: Sequence[Figures]) -> Line:
    return Line("Size against before", tuple(numbers.ratio(m.get("bytes"), models[0].get("bytes")) for m in models))


def _speeds(models: Sequence[Figures]) -> list[Line]:
    """``tokens_per_second_batch_16`` and its like: one line each."""
    lines = []
    for stem in dict.fromkeys(str(m["speed_unit"]) for m in models if m.get("speed_unit")):
        keys = dict.fromkeys(
            key for model in models for key in model if key == stem or key.startswith(f"{stem}_batch_")
        )
        for key in keys:
            batch = key.removeprefix(stem).removeprefix("_batch_") or "1"
            name = f"{stem.replace('_', ' ').capitalize()}, batch {batch}"
            lines.append(_line(models, name, key, lambda v: numbers.number(v or None, 3), "higher is better"))
    return lines


def _loss(after: Figures) -> str:
    difference = finite(after.get("difference"))
    if difference is None:
        return ""
    unit = f" {after['unit']}" if after.get("unit") else ""
    verb = "rose" if difference > 0 else "fell" if difference < 0 else "changed"
    doubt = ", not to be told from no change" if _holds_zero(after) else ""
    return f"held-out loss {verb} by {numbers.number(abs(difference), 3)}{unit}{_bounds(after)}{doubt}"


def _holds_zero(figures: Figures) -> bool:
    bounds = numbers.bounds_of(figures.get("difference_interval"))
    return bounds is not None and bounds[0] <= 0 <= bounds[1]


def _bounds(figures: Figures) -> str:
    text = numbers.interval(figures.get("difference_interval"), 3)
    return "" if text == MISSING else f" (95 % interval {text})"


def _where(uniform: Figures, after: Figures) -> str:
    """Half a percent is called equal: packing pads the last words of a layer."""
    mine, theirs = finite(after.get("bytes")), finite(uniform.get("bytes"))
    if mine is None or theirs is None:
        return "as baseline"
    return "at equal bytes" if abs(mine - theirs) <= 0.005 * mine else f"at {numbers.size(theirs)}"


def _plus(value: Any) -> str:
    found = finite(value)
    return MISSING if found is None else f"{'+' if found > 0 else ''}{numbers.number(found, 3)}"


def _short_interval(bounds: Any) -> str:
    return numbers.interval(bounds, 3)


def _signed(figures: Figures) -> str:
    return _plus(figures.get("difference"))
