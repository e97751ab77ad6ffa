"""Deciders that give bits to weights and activations by measuring whole models: greedy descent, or one precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwright.allocate.measured_descent import Descent, DescentStep, greedy_descent
from layerwright.core.errors import BudgetError, InputError, unknown_name
from layerwright.core.treatment import Treatments
from layerwright.recipes.deciders import Choice, Task
from layerwright.recipes.mixed_precision import Forms, Metric, MixedPrecision

__all__ = ["DescentSettings", "decide_descent", "decide_uniform"]

ACTIVATIONS = ("input", "products", "norm")
"""Kinds of variables that are no weights."""


@dataclass(frozen=True)
class DescentSettings:
    """What ``decider_settings`` may hold.

    Attributes:
        widths: bits from high to low, for weights and activations alike.
        activation_bits: one width for all activations; None lets them take part.
        attention: whether the operands of attention's products are rounded.
        norms: whether what norms read is rounded, with power-of-two factors by channel (Lin et al., 2022, FQ-ViT).
        symmetric, method, observer, two_regions: see `Forms`.
        metric, samples: what a choice is judged by, and on how many calibration samples.
        lazy: see `greedy_descent`.
    """

    widths: tuple[int, ...] = (8, 6, 5, 4, 3)
    activation_bits: int | None = None
    attention: bool = True
    norms: bool = False
    symmetric: bool = True
    method: Any = "mse"
    observer: Any = "mse"
    two_regions: bool = False
    metric: Metric = "kl"
    samples: int = 64
    lazy: bool = True

    def __post_init__(self) -> None:
        if not self.widths or list(self.widths) != sorted(set(self.widths), reverse=True):
            raise InputError(f"widths: got {list(self.widths)}, expected falling numbers of bits, such as [8, 6, 4]")
        if self.samples < 1:
            raise InputError(f"samples: got {self.samples}, expected at least 1")

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> DescentSettings:
        """From plain data; unknown names are refused."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in data:
            if name not in known:
                raise unknown_name("setting", name, known, "decider_settings")
        return cls(**{**data, **({"widths": tuple(data["widths"])} if "widths" in data else {})})

    @property
    def forms(self) -> Forms:
        """How widths are carried out."""
        return Forms(self.symmetric, self.method, self.observer, self.two_regions)


def decide_descent(task: Task) -> Choice:
    """Greedy mixed precision: all tensors start at the highest width; the one whose step down damages least for what it
    saves goes first, measured on the whole model (`greedy_descent`).

    Weights hold the budget's bytes. Activations hold the same average of bits (weighted by their values), unless
    `activation_bits` fixes them.

    Raises:
        BudgetError: not reachable with the widths, or a limit that bits do not change.
        InputError: unknown settings, or a target that cannot load the treatments.

    Source: Tai and Wu (2024), arXiv 2401.14895, MPTQ-ViT.
    """
    settings = DescentSettings.read(task.recipe.decider_settings)
    _refuse_others(task)
    fixed = {} if settings.activation_bits is None else dict.fromkeys(ACTIVATIONS, settings.activation_bits)
    mixed = _mixed(task, settings, settings.widths, fixed)
    rest = _rest(task)
    goal = _average_limit(task)
    limits = {"bytes": task.limits["bytes"]}
    if not fixed:
        limits["activation bits"] = goal

    def costs(choice: Mapping[str, int]) -> dict[str, float]:
        found = {"bytes": rest + mixed.stored(choice, task.element_bytes)}
        return found if fixed else {**found, "activation bits": mixed.average(choice, "activation")}

    def step(done: DescentStep, share: float) -> None:
        mixed.keep({**mixed.kept, done.variable: done.after})
        if task.progress:
            task.progress("lowering bits", round(1000 * share), 1000)

    found = greedy_descent(mixed.evaluate, mixed.options, costs, limits, lazy=settings.lazy, progress=step)
    return _choice(task, settings, mixed, found)


def decide_uniform(task: Task) -> Choice:
    """One precision: the highest width that holds the budget for all weights, and the next higher one for the first
    layers while it fits; activations take `activation_bits`, or the weights' average rounded down.

    Raises:
        BudgetError, InputError: as `decide_descent`.
    """
    settings = DescentSettings.read(task.recipe.decider_settings)
    _refuse_others(task)
    bits = settings.activation_bits
    if bits is None:
        goal = _average_limit(task)
        bits = next((b for b in settings.widths if b <= goal + 1e-6), settings.widths[-1])
    mixed = _mixed(task, settings, settings.widths, dict.fromkeys(ACTIVATIONS, bits), build=False)
    rest, limit = _rest(task), task.limits["bytes"]

    def fits(choice: Mapping[str, int]) -> bool:
        return rest + mixed.stored(choice, task.element_bytes) <= limit

    def at(width: int) -> dict[str, int]:
        return {name: width if len(levels) > 1 else levels[0] for name, levels in mixed.options.items()}

    place = next((i for i, width in enumerate(settings.widths) if fits(at(width))), None)
    if place is None:
        least = rest + mixed.stored(at(settings.widths[-1]), task.element_bytes)
        raise BudgetError(f"budget: {limit:.6g} bytes are not reachable; with {settings.widths[-1]} bits: {least:.6g}")
    choice = at(settings.widths[place])
    weights = [name for name, v in mixed.variables.items() if v.kind == "weight"]
    for name in weights if place else ():
        higher = {**choice, name: settings.widths[place - 1]}
        if fits(higher):
            choice = higher
    layers = mixed.layers(choice)
    _refuse_target(task, layers)
    words = f"{settings.widths[place]} bits for weights, {bits} for activations"
    raised = sum(choice[name] != settings.widths[place] for name in weights)
    words += f"; {settings.widths[place - 1]} bits in {raised} layers that fit" if raised else ""
    return Choice(layers, notes=words, extra={"bits": dict(choice)})


def _mixed(
    task: Task, settings: DescentSettings, widths: Sequence[int], fixed: Mapping[str, int], *, build: bool = True
) -> MixedPrecision:
    return MixedPrecision(
        task.bench.model,
        task.refs,
        task.bench.calibration,
        widths,
        settings.forms,
        samples=settings.samples,
        metric=settings.metric,
        attention=settings.attention,
        norms=settings.norms,
        fixed=fixed,
        progress=task.progress,
        build=build,
    )


def _rest(task: Task) -> float:
    """Bytes of everything that is not the weight of a planned layer."""
    planned = sum(ref.numel for ref in task.refs if ref.layout in ("linear", "conv1d", "conv"))
    return task.profile.total.bytes - planned * task.element_bytes


def _average_limit(task: Task) -> float:
    """Bits per value that the budget asks for: its own number, or what its bytes leave for each weight."""
    for limit in task.budget:
        if limit.name == "bits":
            return limit.value
    weights = sum(ref.numel for ref in task.refs if ref.layout in ("linear", "conv1d", "conv"))
    return (task.limits["bytes"] - _rest(task)) * 8 / weights


def _refuse_others(task: Task) -> None:
    if "bytes" not in task.limits:
        raise BudgetError(
            f"budget: {task.budget} does not limit bits or size, and {task.recipe.name} changes bits alone"
        )
    for name, limit in task.limits.items():
        if name in ("params", "flops", "kv_bytes_per_token", "ms") and task.profile.total.get(name) > limit:
            raise BudgetError(f"budget: {task.recipe.name} changes bits alone and cannot lower {name} to {limit:.6g}")


def _refuse_target(task: Task, layers: Mapping[str, Treatments]) -> None:
    for path, treatments in layers.items():
        why = task.target.refuses(treatments)
        if why:
            raise InputError(f"{path}: {why}; use another target or recipe")


def _choice(task: Task, settings: DescentSettings, mixed: MixedPrecision, found: Descent[int]) -> Choice:
    layers = mixed.layers(found.choice)
    _refuse_target(task, layers)
    reasons: dict[str, str] = {}
    last = {step.variable: step for step in found.history}
    for name, variable in mixed.variables.items():
        step, bits = last.get(name), found.choice[name]
        words = f"{variable.kind} {bits} bits"
        words += f" (last step {step.before} to {step.after}: {step.damage:+.2g})" if step else ""
        for path in variable.paths:
            reasons[path] = f"{reasons[path]}, {words}" if path in reasons else words
    weights, activations = (mixed.average(found.choice, kind) for kind in ("weight", "activation"))
    notes = (
        f"greedy descent over {len(mixed.variables)} tensors, {len(found.history)} steps, {found.evaluations} "
        f"evaluations ({settings.metric} on {settings.samples} samples); average {weights:.2f} bits of weights, "
        f"{activations:.2f} of activations"
    )
    extra = {
        "bits": dict(found.choice),
        "evaluations": found.evaluations,
        "history": [
            {"variable": s.variable, "before": s.before, "after": s.after, "damage": s.damage, "costs": dict(s.costs)}
            for s in found.history
        ],
    }
    return Choice(layers, found.metric, reasons, notes, {}, extra)
