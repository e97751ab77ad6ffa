"""Evol-Q: evolve the weight scales of a quantized model, block by block, under a loss on its outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration, as_calibration, evaluating, logits_of
from layerwright.core.errors import InputError
from layerwright.core.kept_blocks import KeptBlocks
from layerwright.core.layers import structure_copy
from layerwright.tune._scales import BlockScales, blocks_with_scales
from layerwright.tune.losses import OutputLoss, output_loss

__all__ = ["PAPER_STEPS", "EvolQ", "EvolReport", "EvolStep", "Population", "evolq_tuner"]

PAPER_STEPS = {bits: 1e-3 if bits <= 4 else 1e-4 for bits in range(2, 9)}
"""Half width of a mutation by weight bits: 1e-3 for 3 and 4 bits, 1e-4 for 8 (those between are ours)."""

FLOOR = float(torch.finfo(torch.float32).eps)
"""The smallest scale."""

Progress = Callable[[str, int, int], None]


@dataclass
class Population:
    """Members ``(loss, scales)`` of constant number."""

    members: list[tuple[float, Tensor]]

    @classmethod
    def of(cls, loss: float, theta: Tensor, size: int) -> Population:
        """`size` copies of one member."""
        return cls([(loss, theta)] * size)

    def parent(self, tournament: int, generator: torch.Generator) -> Tensor:
        """The fittest of `tournament` members drawn with replacement."""
        drawn = torch.randint(len(self.members), (tournament,), generator=generator).tolist()
        return min((self.members[place] for place in drawn), key=lambda member: member[0])[1]

    def insert(self, loss: float, theta: Tensor) -> None:
        """Add a member and drop the worst."""
        self.members.append((loss, theta))
        del self.members[max(range(len(self.members)), key=lambda place: self.members[place][0])]

    @property
    def best(self) -> tuple[float, Tensor]:
        """The fittest member."""
        return min(self.members, key=lambda member: member[0])


@dataclass(frozen=True)
class EvolStep:
    """One visit of a block: its best `loss` afterwards, and whether a child was better than the start (`accepted`)."""

    number: int
    block: str
    loss: float
    accepted: bool


@dataclass(frozen=True)
class EvolReport:
    """What a search did.

    Attributes:
        start_loss: fitness of the model that was given.
        best_loss: fitness of the model that came out; never above `start_loss` on the data that was searched on.
        history: visits in order.
        n_evals: evaluated members, starts included.
        accepted: visits that changed a block.
        forwards: forwards of all batches that it took; below `n_evals`, since blocks before the changed one are not run.
        rounded: layers whose codes followed their scales.
        heldout_losses: by pass, on the batches that were kept back; empty without any.
    """

    start_loss: float
    best_loss: float
    history: tuple[EvolStep, ...]
    n_evals: int
    accepted: int
    forwards: float
    rounded: tuple[str, ...] = ()
    heldout_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class EvolQ:
    """Evolutionary search over weight scales: local mutations, judged by the whole model's outputs.

    In each pass every block, the last one first, gets a population of copies of its scales (one vector over all its
    quantized layers). `cycles` times the fittest of a tournament is mutated, ``|parent + U(-e, e)|``, the child is
    judged by a run of the model over all data, and the worst member goes. The block takes its best member, so that the
    fitness never rises. Zero points stay. Codes are rounded anew from the original weights where they came from plain
    rounding (`blocks_with_scales`), which makes the loss the jagged one that the method is made for.

    Blocks before a mutated one are not run again (`KeptBlocks`): about half of the work. The last batch is dropped if
    it is smaller than the others. Memory: the data, the original outputs ``(samples, classes)`` and the outputs of
    all blocks. Source: Frumkin, Gope and Marculescu (2023), arXiv 2308.10814, with its defaults.

    Attributes:
        passes: over all blocks.
        cycles: children per block and pass; 0 changes nothing.
        population, tournament: members, and those that are drawn to find a parent.
        step: half width ``e`` of a mutation, ``paper`` for `PAPER_STEPS`.
        relative: `step` is a share of the block's median scale.
        loss: ``infonce``, ``mse``, ``kl`` or ``cosine`` (`OUTPUT_LOSSES`).
        temperature: of InfoNCE.
        order: ``reverse`` (last block first) or ``forward``.
        blocks: paths of modules; None for the attention modules (`blocks_with_scales`).
        heldout: share of the batches that is not searched on: after each pass they judge the scales, and the best are
            taken. 0 takes the last pass.
        keep_prefix: False runs the whole model for each child (slower, the same).
        seed: of all draws.

    Raises:
        InputError: settings outside their ranges.
    """

    passes: int = 10
    cycles: int = 3
    population: int = 15
    tournament: int = 10
    step: float | Literal["paper"] = "paper"
    relative: bool = False
    loss: Literal["infonce", "mse", "kl", "cosine"] = "infonce"
    temperature: float = 3.0
    order: Literal["reverse", "forward"] = "reverse"
    blocks: tuple[str, ...] | None = None
    heldout: float = 0.0
    keep_prefix: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("passes", 0), ("cycles", 0), ("population", 1), ("tournament", 1)):
            if getattr(self, name) < low:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        if self.step != "paper" and not (isinstance(self.step, float | int) and self.step > 0):
            raise InputError(f"step: got {self.step!r}, expected a number above 0 or 'paper'")
        if not 0 <= self.heldout < 1 or self.order not in ("reverse", "forward"):
            raise InputError(f"heldout: got {self.heldout}, expected 0 to below 1; order: reverse or forward")
        output_loss(self.loss, self.temperature)

    def fit(
        self, model: nn.Module, data: Any, reference: nn.Module | Sequence[Tensor] | None = None, **settings: Any
    ) -> tuple[nn.Module, EvolReport]:
        """`fit_` on a copy, which shares all tensors but the new scales and codes with `model`."""
        copy = structure_copy(model)
        return copy, self.fit_(copy, data, reference, **settings)

    def fit_(
        self,
        model: nn.Module,
        data: Any,
        reference: nn.Module | Sequence[Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> EvolReport:
        """Move the scales of `model`, in place; on an exception it is as it was.

        Args:
            model: with packed integer weights.
            data: a `Calibration` or a list of batches in a fixed order; labels are not used.
            reference: the original model, or its outputs ``(rows, classes)`` for each batch of `data`.
            progress: ``progress("evolving scales", visits done, visits)``.

        Raises:
            TypeError: the model has no weight scales.
            InputError: no reference, batches of one sample for InfoNCE, data that is in another order when walked again.
        """
        if reference is None:
            raise InputError("reference: the original model or its outputs are needed to compare with; give reference=")
        calibration = as_calibration(data)
        source = reference if isinstance(reference, nn.Module) else None
        blocks = blocks_with_scales(model, self.blocks, source)
        batches, wanted = _outputs(calibration, reference)
        count = round(self.heldout * len(batches)) if self.heldout else 0
        if self.heldout and not 0 < count < len(batches):
            raise InputError(f"heldout: {self.heldout} of {len(batches)} batches leaves nothing to search or judge on")
        loss = output_loss(self.loss, self.temperature)
        cut = len(batches) - count
        units = _units(model) if self.keep_prefix else ()
        search = _Fitness(model, calibration, batches[:cut], wanted[:cut], loss, units)
        judge = _Fitness(model, calibration, batches[cut:], wanted[cut:], loss, ()) if count else None
        saved = [block.saved() for block in blocks]
        try:
            with torch.no_grad(), evaluating(model):
                return _Search(self, blocks, search, judge, progress).run()
        except BaseException:
            for block, buffers in zip(blocks, saved, strict=True):
                block.restore_(buffers)
            raise


class _Fitness:
    """Mean loss over batches."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        batches: Sequence[Any],
        wanted: Sequence[Tensor],
        loss: OutputLoss,
        units: Sequence[str],
    ) -> None:
        self.runs = KeptBlocks(model, calibration, units, batches)
        self.wanted, self.loss, self.evaluations = wanted, loss, 0

    def whole(self, changed: str = "") -> float:
        """Of the model as it is, with all blocks' outputs kept anew from `changed` on."""
        return self._mean(self.runs.keep(changed))

    def child(self, changed: str) -> float:
        """Of the model as it is, where `changed` and what comes after it differ from what is kept."""
        return self._mean(self.runs.logits(changed))

    def _mean(self, outputs: Sequence[Tensor]) -> float:
        self.evaluations += 1
        found = [float(self.loss(q, k)) for q, k in zip(outputs, self.wanted, strict=True)]
        return sum(found) / len(found)


class _Search:
    """The state of one `fit_`."""

    def __init__(
        self,
        settings: EvolQ,
        blocks: Sequence[BlockScales],
        search: _Fitness,
        judge: _Fitness | None,
        progress: Progress | None,
    ) -> None:
        self.settings, self.blocks, self.search, self.judge = settings, blocks, search, judge
        self.progress = progress
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.history: list[EvolStep] = []
        self.widths = [self._width(block) for block in blocks]

    def run(self) -> EvolReport:
        start = best = self.search.whole()
        judged: list[float] = []
        kept: list[Any] = []
        position = self.search.runs.position
        order = sorted(range(len(self.blocks)), key=lambda place: position(self.blocks[place].path))
        order = order[::-1] if self.settings.order == "reverse" else order
        for number in range(self.settings.passes if self.settings.cycles else 0):
            if number:
                self.search.whole()
            for place in order:
                best = self._visit(number, place, best)
                # Backwards, what is kept of earlier blocks stays true; forwards, the later ones have a new input.
                outside = position(self.blocks[place].path) < 0
                if self.history[-1].accepted and (self.settings.order == "forward" or outside):
                    self.search.whole("" if outside else self.blocks[place].path)
                if self.progress:
                    self.progress("evolving scales", len(self.history), self.settings.passes * len(order))
            if self.judge is not None:
                judged.append(self.judge.whole())
                if judged[-1] <= min(judged):
                    kept = [block.saved() for block in self.blocks]
        if kept and judged[-1] > min(judged):
            for block, buffers in zip(self.blocks, kept, strict=True):
                block.restore_(buffers)
            best = self.search.whole()
        return EvolReport(
            start,
            best,
            tuple(self.history),
            self.search.evaluations,
            sum(step.accepted for step in self.history),
            self.search.runs.forwards,
            tuple(path for block in self.blocks for path in block.weights),
            tuple(judged),
        )

    def _visit(self, number: int, place: int, loss: float) -> float:
        block = self.blocks[place]
        start, buffers = block.read(), block.saved()
        population = Population.of(loss, start, self.settings.population)
        for _ in range(self.settings.cycles):
            parent = population.parent(self.settings.tournament, self.generator)
            noise = (2 * torch.rand(len(parent), generator=self.generator) - 1).to(parent.device)
            child = (parent + noise * self.widths[place]).abs().clamp(min=FLOOR)
            block.write_(child)
            population.insert(self.search.child(block.path), child)
        best, theta = population.best
        accepted = best < loss
        if accepted:
            block.write_(theta)
        else:
            block.restore_(buffers)
        self.history.append(EvolStep(number, block.path, min(best, loss), accepted))
        return min(best, loss)

    def _width(self, block: BlockScales) -> Tensor:
        """Half width of the mutation of each scale."""
        scales, step = block.read(), self.settings.step
        found = block.steps(PAPER_STEPS) if step == "paper" else torch.full((len(scales),), float(step))
        width = found.to(scales.device) * (scales.median() if self.settings.relative else 1.0)
        if bool((width >= scales).any()):
            warnings.warn(
                f"{block.path}: the step {float(width.max()):.2g} is not below its smallest scale "
                f"{float(scales.min()):.2g}; children are kept above {FLOOR:.1g}. Use a smaller step, or relative=True",
                stacklevel=2,
            )
        return width


def _units(model: nn.Module) -> list[str]:
    try:
        return [path for stack in find_blocks(model) for path in stack.names]
    except InputError:
        return []


@torch.no_grad()
def _outputs(calibration: Calibration, reference: nn.Module | Sequence[Tensor]) -> tuple[list[Any], list[Tensor]]:
    """Batches of full size and the reference's outputs for each."""
    batches = list(calibration)
    if not batches:
        raise InputError("calibration: it is empty; the search has nothing to compare outputs on")
    first = Calibration([batches[0]]).fingerprint()
    if Calibration([next(iter(calibration))]).fingerprint() != first:
        raise InputError("calibration: its batches come in another order when walked again; turn shuffling off")
    sizes = [Calibration([batch]).samples for batch in batches]
    full = [place for place, size in enumerate(sizes) if size == sizes[0] or len(batches) == 1]
    if isinstance(reference, nn.Module):
        with evaluating(reference):
            outputs = [logits_of(calibration.forward(reference, batches[place])).float() for place in full]
        return [batches[place] for place in full], [rows.flatten(0, -2) for rows in outputs]
    if len(reference) != len(batches):
        raise InputError(f"reference: got outputs of {len(reference)} batches, the data has {len(batches)}")
    return [batches[place] for place in full], [reference[place].float().flatten(0, -2) for place in full]


def evolq_tuner(
    model: nn.Module, calibration: Any, *, teacher: nn.Module | None = None, seed: int = 0, **settings: Any
) -> nn.Module:
    """`EvolQ` as a tuner of a carried-out plan; `settings` are those of `EvolQ`.

    Raises:
        InputError: no teacher, or unknown settings.
    """
    try:
        search = EvolQ(seed=seed, **settings)
    except TypeError as error:
        raise InputError(f"evolq: {error}; its settings are those of layerwright.tune.EvolQ") from error
    return search.fit(model, calibration, teacher)[0]
