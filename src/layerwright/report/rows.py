"""The layers of a job as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwright.report.numbers import finite

__all__ = ["Layer", "layers_of", "visible"]


@dataclass(frozen=True)
class Layer:
    """One row of the job's table, with blanks filled in.

    Attributes:
        path, kind, shape, label, reason, status, note: as in ``report.json``.
        group: stack and block in words (``model.layers 3``), empty outside of blocks.
        name: the path inside its block.
        before, after: stored bytes.
        damage, sensitivity, error: None where they were not measured.
        tokens: calibration tokens seen.
        planned: the plan decides this layer.
        dropped: the whole block is gone.
        container: holds other rows of the table, so its bytes are theirs.
    """

    path: str
    kind: str
    shape: str
    label: str
    reason: str
    status: str
    note: str
    group: str
    name: str
    before: float
    after: float
    damage: float | None
    sensitivity: float | None
    error: float | None
    tokens: int
    planned: bool
    dropped: bool
    container: bool


def layers_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Layer, ...]:
    """Rows of ``report.json`` in the model's order.

    A block is dropped if any of its layers is: then every layer of it is shown as gone, whatever its own row says,
    and takes the reason that was given for its block where it has none of its own.
    """
    paths = [str(row.get("path", "")) for row in rows]
    parents = {path[:end] for path in paths for end in range(len(path)) if path[end] == "."}
    gone = {_group(row) for row in rows if _group(row) and _is_drop(row)}
    blocks = {_group(row): row for row in rows if row.get("kind") == "block" and _group(row)}
    return tuple(_layer(row, path, parents, gone, blocks) for row, path in zip(rows, paths, strict=True))


def visible(layers: Sequence[Layer], share: float = 0.01) -> tuple[tuple[Layer, ...], int]:
    """The layers worth a bar, and how many were left out.

    Containers never are. A layer that the plan did not weigh (also one that went with its block) is if it has at least
    `share` of the largest layer's bytes.
    """
    leaves = [layer for layer in layers if not layer.container and (layer.before > 0 or layer.planned)]
    largest = max((layer.before for layer in leaves), default=0.0)
    kept = tuple(x for x in leaves if (x.planned and not x.dropped) or x.before >= share * largest)
    return kept, len(leaves) - len(kept)


def _layer(
    row: Mapping[str, Any],
    path: str,
    parents: set[str],
    gone: set[str],
    blocks: Mapping[str, Mapping[str, Any]],
) -> Layer:
    group = _group(row)
    dropped = group in gone
    block = blocks.get(group, {})
    prefix = str(block.get("path", "")) + "."
    before = finite(row.get("bytes_before")) or 0.0
    after = finite(row.get("bytes_after"))
    shape = row.get("shape") or ()
    return Layer(
        path=path,
        kind=str(row.get("kind") or ""),
        shape=" × ".join(map(str, shape)) if any(shape) else "",
        label="drop" if dropped else str(row.get("label") or "not planned"),
        reason=str(row.get("reason") or (block.get("reason") if dropped else "") or ""),
        status=str((block if dropped and block.get("status") == "done" else row).get("status") or ""),
        note=str(row.get("note") or ""),
        group=group,
        name=path.removeprefix(prefix) if block and path != block.get("path") else path,
        before=before,
        after=0.0 if dropped else before if after is None else after,
        damage=finite(row.get("damage")),
        sensitivity=finite(row.get("sensitivity")),
        error=finite(row.get("error")),
        tokens=int(finite(row.get("tokens")) or 0),
        planned=bool(row.get("planned")) or dropped,
        dropped=dropped,
        container=path in parents,
    )


def _group(row: Mapping[str, Any]) -> str:
    return "" if row.get("block") is None else f"{row.get('stack') or 'block'} {row['block']}"


def _is_drop(row: Mapping[str, Any]) -> bool:
    return "drop" in (row.get("treatments") or {})
