"""Numbers as people read them. Whatever is missing or not finite becomes a dash."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["MISSING", "bounds_of", "count", "finite", "interval", "milliseconds", "number", "percent", "ratio", "size"]

MISSING = "–"
_BYTES = ("B", "kB", "MB", "GB", "TB")


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is no finite number (a bool is none either)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def bounds_of(value: Any) -> tuple[float, float] | None:
    """Low and high of an interval, or None where `value` is no pair of finite numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def size(value: Any, like: Any = None) -> str:
    """Bytes in decimal units: ``4.01 MB``; in the unit of the size `like`, so that two sizes compare at a glance."""
    found, model = finite(value), finite(like)
    if found is None or not model:
        return _scaled(value, _BYTES)
    power = min(max(math.floor(math.log10(abs(model) * 1000 / 999.5) / 3), 0), len(_BYTES) - 1)
    return f"{number(found / 1000**power, 3)} {_BYTES[power]}"


def count(value: Any, unit: str = "") -> str:
    """A large count: ``1.29 GFLOP``, ``16.4 k``; whole below a thousand."""
    return _scaled(value, tuple(f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P")))


def number(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant digits; very small ones as ``2.2e-05``."""
    found = finite(value)
    if found is None:
        return MISSING
    if found == 0:
        return "0"
    if abs(found) < 1e-3:
        return f"{found:.2g}"
    whole = math.floor(math.log10(abs(found))) + 1
    return f"{found:,.{max(digits - whole, 0)}f}"


def ratio(after: Any, before: Any) -> str:
    """``0.21x``, or a dash where there is nothing to compare with."""
    top, bottom = finite(after), finite(before)
    found = None if top is None or not bottom else finite(top / bottom)
    return MISSING if found is None else f"{found:.2f}x"


def interval(bounds: Any, digits: int = 4) -> str:
    """``0.0080 to 0.0141``, with as many decimals as the larger bound needs for `digits` significant digits."""
    found = bounds_of(bounds)
    if found is None:
        return MISSING
    low, high = found
    largest = max(abs(low), abs(high))
    decimals = 0 if largest == 0 else max(digits - 1 - math.floor(math.log10(largest)), 0)
    return f"{low:.{decimals}f} to {high:.{decimals}f}"


def milliseconds(value: Any) -> str:
    """``65.3 ms``; zero means that nothing was measured."""
    found = finite(value)
    return f"{number(found, 3)} ms" if found else MISSING


def percent(value: Any) -> str:
    """A share as ``98.4 %``."""
    found = finite((finite(value) or 0.0) * 100)
    return MISSING if found is None or finite(value) is None else f"{found:.1f} %"


def _scaled(value: Any, units: tuple[str, ...]) -> str:
    found = finite(value)
    if found is None:
        return MISSING
    # 999.9 would be printed as 1000, so the step to the next unit comes just before it
    power = 0
    while abs(found) >= 999.5 and power < len(units) - 1:
        found, power = found / 1000, power + 1
    text = f"{found:.0f}" if power == 0 or abs(found) >= 99.95 else f"{found:.{1 if abs(found) >= 9.995 else 2}f}"
    return f"{text} {units[power]}".rstrip()
