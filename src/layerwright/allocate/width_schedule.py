"""The way from a full shape to a narrow one, in steps."""

from __future__ import annotations

from dataclasses import dataclass, fields

from layerwright.core.errors import InputError

__all__ = ["Widths", "proportional_widths", "width_schedule"]


@dataclass(frozen=True)
class Widths:
    """Uniform widths of an encoder.

    Attributes:
        heads: attention heads of each block.
        neurons: of each feed-forward part.
        rank: of the embedding; None leaves it alone.

    Raises:
        InputError: a number below 1.
    """

    heads: int
    neurons: int
    rank: int | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{item.name}: got {value!r}, expected a whole number from 1")


def proportional_widths(full: Widths, heads: int) -> Widths:
    """Widths in which everything shrinks as the heads do (``neurons * heads / all heads``), as in COST-EFF.

    Raises:
        InputError: more heads than there are, or none.
    """
    _check("heads", heads, full.heads)
    rank = None if full.rank is None else max(1, full.rank * heads // full.heads)
    return Widths(heads, max(1, full.neurons * heads // full.heads), rank)


def width_schedule(full: Widths, target: Widths, steps: int | None = None) -> list[Widths]:
    """The widths after each pruning step: evenly spread, the last is `target` (Shen et al., 2022, COST-EFF).

    Args:
        full: what there is.
        target: at most that.
        steps: number of steps; None removes one head per step (one step where all heads stay).

    Raises:
        InputError: a target that is larger than `full`, or below 1; a rank for a model without; no steps.
    """
    for name in ("heads", "neurons", "rank"):
        present, wanted = getattr(full, name), getattr(target, name)
        if wanted is not None:
            if present is None:
                raise InputError(f"rank: got {wanted}, but the model has no embedding that can be factorized")
            _check(name, wanted, present)
    count = max(1, full.heads - target.heads) if steps is None else steps
    if isinstance(count, bool) or count < 1:
        raise InputError(f"steps: got {steps}, expected at least 1")

    def between(present: int | None, wanted: int | None, step: int) -> int | None:
        if present is None or wanted is None:
            return None
        return present - (present - wanted) * step // count

    path = []
    for step in range(1, count + 1):
        heads, neurons = between(full.heads, target.heads, step), between(full.neurons, target.neurons, step)
        assert heads is not None and neurons is not None
        path.append(Widths(heads, neurons, between(full.rank, target.rank, step)))
    return path


def _check(name: str, wanted: int, present: int) -> None:
    if not 1 <= wanted <= present:
        raise InputError(f"{name}: got {wanted}, expected 1 to the present {present}")
