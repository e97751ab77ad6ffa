"""What a layer, an option or a model costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Cost", "total"]


@dataclass(frozen=True)
class Cost:
    """Costs that add up over layers. A resource that was not measured is 0.

    Attributes:
        params: number of parameters that are kept (a pruned weight is not).
        bytes: stored bytes, scales, zero points and masks included.
        flops: floating-point operations of one forward over the calibration's batch shape (a multiply-add is 2).
        kv_bytes_per_token: key-value cache bytes that one token takes.
        ms: milliseconds of one forward; `ms_source` says whether they were measured or come from a model of time.
    """

    params: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    kv_bytes_per_token: float = 0.0
    ms: float = 0.0
    ms_source: Literal["measured", "modelled", "none"] = "none"

    def get(self, resource: str) -> float:
        """The amount of one resource by field name."""
        return float(getattr(self, resource))

    def __add__(self, other: Cost) -> Cost:
        return _combine(self, other, 1.0)

    def __sub__(self, other: Cost) -> Cost:
        return _combine(self, other, -1.0)

    def to_data(self) -> dict[str, float | str]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


RESOURCES = ("params", "bytes", "flops", "kv_bytes_per_token", "ms")


def _combine(a: Cost, b: Cost, sign: float) -> Cost:
    source = (
        a.ms_source if b.ms_source in ("none", a.ms_source) else b.ms_source if a.ms_source == "none" else "modelled"
    )
    return Cost(
        a.params + sign * b.params,
        a.bytes + sign * b.bytes,
        a.flops + sign * b.flops,
        a.kv_bytes_per_token + sign * b.kv_bytes_per_token,
        a.ms + sign * b.ms,
        ms_source=source,
    )


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of `costs`."""
    result = Cost()
    for cost in costs:
        result = result + cost
    return result
