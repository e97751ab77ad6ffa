"""Narrower feed-forward parts: neurons chosen by their share in the output, the rest fitted to stand for all."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef, get_parameter, to_matrices
from layerwright.core.layers import list_layers
from layerwright.core.records import ApplyReport, LayerRecord
from layerwright.core.treatment import Narrow, Treatments, weight_treatments
from layerwright.nn.resized import ResizedLinear
from layerwright.score.inputs import UnitInputs
from layerwright.score.statistics import gram_energy

__all__ = [
    "FeedForward",
    "add_widths",
    "choose_neurons",
    "feed_forwards",
    "fitted_columns",
    "keep_neurons_",
    "narrow_unit_",
    "narrowed_parts",
]

M = TypeVar("M", bound=nn.Module)
DAMPING = 0.01
"""Share of the mean squared activation that is added to each in the least squares fit."""


@dataclass(frozen=True)
class FeedForward:
    """A two-layer feed-forward part: the layers that compute its inner neurons, and the projection that reads them.

    Attributes:
        down: the last projection ``(hidden, neurons)``.
        producers: ``up`` alone, or ``gate`` and ``up``, or both in one (``gate_up``); a row for each neuron.
    """

    down: LayerRef
    producers: tuple[LayerRef, ...]

    @property
    def neurons(self) -> int:
        """Inner width."""
        return self.down.shape[1]

    @property
    def layers(self) -> tuple[LayerRef, ...]:
        """All of them, the last projection first."""
        return (self.down, *self.producers)


def feed_forwards(model: nn.Module, refs: Sequence[LayerRef] | None = None) -> dict[str, FeedForward]:
    """The feed-forward parts of `model` by the path of their last projection.

    Those are taken whose rows and columns agree and whose layers are plain: no experts, no convolutions, no weights
    that are shared, nothing in between that is no function of single neurons.

    Args:
        model: any model with blocks.
        refs: its layers, if listed already.
    """
    refs = list_layers(model) if refs is None else refs
    by_block: dict[tuple[str, int], list[LayerRef]] = {}
    for ref in refs:
        if ref.block is not None and ref.role in ("up", "gate", "gate_up", "down"):
            by_block.setdefault((ref.stack, ref.block), []).append(ref)
    found: dict[str, FeedForward] = {}
    for inside in by_block.values():
        downs = [ref for ref in inside if ref.role == "down"]
        producers = tuple(ref for ref in inside if ref.role != "down")
        if len(downs) != 1 or not producers:
            continue
        part = FeedForward(downs[0], producers)
        plain = all(r.layout in ("linear", "conv1d") and r.count == 1 and not r.tied for r in part.layers)
        rows = [r.shape[0] // (2 if r.role == "gate_up" else 1) for r in producers]
        if plain and all(row == part.neurons for row in rows) and not _between(model, part):
            found[part.down.path] = part
    return found


def _between(model: nn.Module, part: FeedForward) -> bool:
    """Whether the module around the layers has other parameters of the inner width: a norm, which mixes neurons."""
    owner = part.down.path.rpartition(".")[0]
    own = {ref.path for ref in part.layers}
    if part.neurons == part.down.shape[0]:
        return False
    return any(
        p.dim() == 1 and p.shape[0] == part.neurons and f"{owner}.{name}".rpartition(".")[0] not in own
        for name, p in model.get_submodule(owner).named_parameters()
    )


@torch.no_grad()
def choose_neurons(weight: Tensor, gram: Tensor | None, narrow: Narrow) -> Tensor:
    """Indices ``(kept,)`` of the neurons that stay, ascending.

    Args:
        weight: of the last projection, ``(out, neurons)``.
        gram: sum of ``a a^T`` of its input, ``(neurons, neurons)``; None goes by magnitude.
        narrow: how many, and by what.
    """
    energy = weight.float().square().sum(0)
    if gram is not None and narrow.method == "activation":
        energy = energy * gram.diagonal()
    kept = narrow.kept(weight.shape[1])
    return torch.sort(energy, descending=True, stable=True).indices[:kept].sort().values


@torch.no_grad()
def fitted_columns(weight: Tensor, gram: Tensor | None, kept: Tensor) -> Tensor:
    """The columns at `kept` of `weight` ``(out, neurons)``, fitted to the output of all (ridge least squares), float32.

    ``W G[:, K] (G[K, K] + d I)^-1`` with `gram` ``G`` of the input and ``d`` a hundredth of its mean diagonal, which
    also pulls the columns to their own values; without a gram the columns themselves.
    """
    weight = weight.float()
    if gram is None:
        return weight[:, kept]
    gram = gram.float()
    inside = gram[kept][:, kept]
    damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    matrix = inside + damping * torch.eye(len(kept), device=gram.device)
    goal = weight @ gram[:, kept] + damping * weight[:, kept]
    return torch.linalg.solve(matrix.double(), goal.double(), left=False).float()


@torch.no_grad()
def keep_neurons_(model: nn.Module, part: FeedForward, kept: Tensor, columns: Tensor | None = None) -> FeedForward:
    """Remove all other neurons of a feed-forward part, in place: rows of its producers, columns of its projection.

    New layers take the place of the old ones, whose tensors are not written to.

    Args:
        model: changed.
        part: one of `feed_forwards`.
        kept: indices of the neurons that stay, ascending.
        columns: the new weight of the last projection ``(out, kept)``; None takes its own columns.

    Returns:
        The part as it is now.

    Raises:
        InputError: no index, one that is not there, or indices that do not ascend.
    """
    indices = kept.tolist()
    if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < part.neurons:
        raise InputError(
            f"kept: got {indices[:8]} for {part.down.path}, expected ascending indices below {part.neurons}"
        )
    for ref in part.layers:
        rows, weight, bias = _tensors(model, ref)
        kept = kept.to(weight.device)
        if ref.role == "down":
            new = weight[:, kept] if columns is None else columns.to(weight)
        else:
            chosen = torch.cat([kept, kept + part.neurons]) if rows == 2 * part.neurons else kept
            new, bias = weight[chosen], None if bias is None else bias[chosen]
        old = model.get_submodule(ref.path)
        layer = ResizedLinear.from_weight(new.requires_grad_(get_parameter(model, ref.parameter).requires_grad), bias)
        owner, _, name = ref.path.rpartition(".")
        setattr(model.get_submodule(owner), name, layer.train(old.training))
    after = {ref.path: ref for ref in list_layers(model)}
    return FeedForward(after[part.down.path], tuple(after[ref.path] for ref in part.producers))


def narrowed_parts(
    model: nn.Module, refs: Sequence[LayerRef], plan: Mapping[str, Treatments]
) -> dict[str, tuple[FeedForward, Narrow]]:
    """The feed-forward parts that `plan` makes narrower, by the path of their last projection.

    Raises:
        InputError: `Narrow` for a layer that is not the last projection of a plain feed-forward part.
    """
    wanted = {path: t for path, own in plan.items() for t in own if isinstance(t, Narrow)}
    if not wanted:
        return {}
    parts = feed_forwards(model, refs)
    for path in wanted:
        if path not in parts:
            known = ", ".join(list(parts)[:3]) or "this model has none"
            raise InputError(f"narrow: {path} is not the last projection of a plain feed-forward part ({known})")
    return {path: (parts[path], narrow) for path, narrow in wanted.items()}


def narrow_unit_(
    model: nn.Module,
    refs: Sequence[LayerRef],
    parts: Mapping[str, tuple[FeedForward, Narrow]],
    plan: dict[str, Treatments],
    inputs: UnitInputs,
    *,
    names: Mapping[str, str],
) -> tuple[list[LayerRef], list[LayerRecord]]:
    """Make the feed-forward parts among `refs` narrower, in place, before their other treatments.

    `inputs` and `plan` follow: the statistics of the last projection lose the removed neurons, and `Narrow` is done.

    Returns:
        `refs` with their new shapes, without those for which nothing is left to do; and a record of each part, for
        `add_widths`.
    """
    records = []
    chosen = [ref.path for ref in refs if ref.path in parts]
    for path in chosen:
        begun = time.perf_counter()
        part, narrow = parts[path]
        _, weight, _ = _tensors(model, part.down)
        statistics = inputs.of.get(path)
        gram = None if statistics is None or statistics.only_diagonal else statistics.gram[0]
        kept = choose_neurons(weight, gram, narrow)
        columns = fitted_columns(weight, gram if narrow.compensate else None, kept)
        now = keep_neurons_(model, part, kept, columns)
        change = weight.float().clone()
        change[:, kept] -= columns
        plan[path] = tuple(t for t in plan[path] if t is not narrow)
        if statistics is not None:
            inputs.of[path] = statistics.select(kept)
        records.append(
            LayerRecord(
                layer=names.get(path, path),
                treatment=narrow.label(),
                status="done",
                reason="as planned" if statistics is not None else "never reached by the calibration data",
                error=_relative(change, weight, gram),
                tokens=statistics.total_tokens if statistics is not None else 0,
                bytes=sum(get_parameter(model, ref.parameter).nbytes for ref in now.layers),
                seconds=time.perf_counter() - begun,
                note=f"{len(kept)} of {part.neurons} neurons",
            )
        )
    if not chosen:
        return list(refs), []
    after = {ref.path: ref for ref in list_layers(model)}
    return [after[ref.path] for ref in refs if weight_treatments(plan.get(ref.path, ()))], records


def add_widths(report: ApplyReport, records: Sequence[LayerRecord]) -> None:
    """Add the records of narrowed parts; one of a layer that was treated besides joins that layer's record."""
    known = {record.layer: record for record in report}
    for record in records:
        other = known.get(record.layer)
        if other is not None:
            both = f"{record.treatment} + {other.treatment}"
            notes = "; ".join(note for note in (record.note, other.note) if note)
            seconds = record.seconds + other.seconds
            record = dataclasses.replace(other, treatment=both, note=notes, seconds=seconds)
        report.add(record)


def _relative(change: Tensor, weight: Tensor, gram: Tensor | None) -> float:
    """``|change X|^2 / |weight X|^2``; without a gram, of the weights themselves."""
    if gram is None:
        return float(change.square().sum() / weight.float().square().sum().clamp(min=1e-30))
    return float(gram_energy(change[None], gram[None])[0] / gram_energy(weight[None], gram[None])[0].clamp(min=1e-30))


def _tensors(model: nn.Module, ref: LayerRef) -> tuple[int, Tensor, Tensor | None]:
    """Rows, the weight ``(out, in)`` and the bias of a layer, detached."""
    weight = to_matrices(get_parameter(model, ref.parameter).detach(), ref.layout)[0]
    bias = getattr(model.get_submodule(ref.path), "bias", None)
    return weight.shape[0], weight, None if bias is None else bias.detach()
