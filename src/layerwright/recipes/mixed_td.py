"""The recipe `mixed_td`: SVD or CP for each convolution, its shape and rank, by accuracy and the time on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from layerwright.allocate.evolve_surrogate import Evolved, evolve
from layerwright.allocate.factor_options import RATIOS, FactorOption, enumerate_factorizations
from layerwright.allocate.forest import CostForest
from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.conv_factors import ConvShape
from layerwright.core.errors import BudgetError, InputError, unknown_name
from layerwright.core.layer import LayerRef
from layerwright.core.layers import treatable
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import FactorConv, Treatments
from layerwright.recipes.deciders import Choice, Task
from layerwright.recipes.factor_bench import FactorBench
from layerwright.recipes.factor_cost import COSTS, NetworkCost, TimeOf, make_time
from layerwright.score.conv_shapes import conv_shapes

__all__ = ["MixedTD", "Settings", "decide_mixed_td", "mixed_td"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How `mixed_td` searches; the published numbers are the defaults, but for `margin`.

    Attributes:
        cost: what ``ms`` means: ``dataflow`` (latency on a streaming device), ``macs`` (multiplications, relative
            only) or ``measured`` (each candidate timed on this machine).
        device: settings of `DataflowModel`.
        ratios: shares of a layer's multiplications that candidates aim at.
        methods: ``svd``, ``cp`` or both.
        groups: of the schemes 4 and 5; None is 1, and one for each channel.
        tolerance: accuracy, 0 to 1, that one candidate alone may cost to be admitted (0.01 for ResNet-18, 0.05 for
            RepVGG-A0); doubled for as long as the budget cannot be met.
        scan: rank from which a decomposition's candidates are tried; once one passes, the ones after it are admitted
            untried: ``smallest`` or ``largest``.
        batch_size: samples of a search batch; calibration batches are joined or cut to it.
        population, parents, mutate, generations, warmup, floor: see `evolve`.
        margin: multiplications must be below the target's share less this. 0.23 in the paper, whose device needs that
            much less; 0 where time follows multiplications.
        trees: of the forest that predicts costs; 0 prices every design truly.
    """

    cost: str = "dataflow"
    device: Mapping[str, Any] = field(default_factory=dict)
    ratios: Sequence[float] = RATIOS
    methods: Sequence[str] = ("svd", "cp")
    groups: Sequence[int] | None = None
    tolerance: float = 0.01
    scan: str = "smallest"
    batch_size: int = 128
    population: int = 100
    parents: int = 25
    mutate: float = 0.2
    generations: int = 500
    warmup: int = 3
    floor: float = 0.05
    margin: float = 0.0
    trees: int = 370

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise unknown_name("cost", self.cost, COSTS, "mixed_td")
        if self.scan not in ("smallest", "largest"):
            raise unknown_name("scan", self.scan, ("smallest", "largest"), "mixed_td")
        if not 0 < self.tolerance <= 1 or self.batch_size < 1 or self.trees < 0:
            raise InputError(
                f"mixed_td: got tolerance={self.tolerance}, batch_size={self.batch_size}, trees={self.trees}; "
                "expected a tolerance above 0 up to 1, at least 1 sample and 0 trees"
            )

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Settings:
        """Read a recipe's settings; unknown names are refused with close matches."""
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise unknown_name("setting", str(name), known, "mixed_td")
        return cls(**data)


@dataclass(frozen=True)
class MixedTD:
    """What `mixed_td` found.

    Attributes:
        layers: path of each factorised convolution to its treatment.
        accuracy, baseline_accuracy: on the search data, after and before.
        used, baseline: amount of each limited resource after and before; ``ms`` in the unit of the cost.
        limits: the same as they may be at most.
        candidates: admitted candidates by layer, the layer as it is in the last place.
        tolerance: accuracy that one candidate alone was allowed to cost in the end.
        search: the evolution.
    """

    layers: Mapping[str, Treatments]
    accuracy: float
    baseline_accuracy: float
    used: Mapping[str, float]
    baseline: Mapping[str, float]
    limits: Mapping[str, float]
    candidates: Mapping[str, Sequence[FactorOption]]
    tolerance: float
    search: Evolved


def mixed_td(
    model: nn.Module,
    data: Calibration | Any,
    target: float | Mapping[str, float],
    cost: str | TimeOf = "dataflow",
    *,
    refs: Sequence[LayerRef] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    bench: FactorBench | None = None,
) -> MixedTD:
    """Choose SVD or CP, its shape and its rank for every convolution, so that accuracy is highest at `target`.

    Candidates are enumerated per layer, tried one at a time, and searched by `evolve`; the weights of each are computed
    once. Memory: the factors of all candidates that were tried, about 40 times half the weights. Source: Yu and
    Bouganis (2023), Mixed-TD.

    Args:
        model: a classifier; left untouched.
        data: batches with labels.
        target: highest time as a share of the model's own, or highest amounts by ``ms``, ``macs`` and ``params``.
        cost: see `Settings.cost`, or ``time(path to stages) -> number``.
        refs: layers that may be factorised; None takes all convolutions but the stem. Only those with one group, in
            two dimensions and with a kernel above 1 x 1 get candidates.
        settings: of the search.
        seed: of everything random.
        progress: ``progress(words, done, total)``.
        bench: candidates of the same model and data from another search, to be used again.

    Raises:
        InputError: no convolution to factorise, data without labels, a layer that the data does not reach.
        BudgetError: a target that cannot be reached.
    """
    chosen = settings or Settings()
    calibration = as_calibration(data)
    own = bench or FactorBench(model, calibration, chosen.batch_size)
    wanted = _targets(model, treatable(model) if refs is None else refs)
    batch = next(iter(calibration))
    shapes = conv_shapes(model, lambda: calibration.forward(model, batch), [ref.path for ref in wanted])
    options = {
        ref.path: enumerate_factorizations(
            shapes[ref.path], chosen.ratios, chosen.methods, groups=chosen.groups, name=ref.path
        )
        for ref in wanted
    }
    timed = not isinstance(target, Mapping) or "ms" in target
    made = make_time(cost, model, calibration, shapes, chosen.device) if timed and isinstance(cost, str) else None
    time_of = cost if timed and not isinstance(cost, str) else made
    whole = {path: (shape,) for path, shape in shapes.items()}
    pricing = NetworkCost(whole, time_of)
    before = pricing.amounts({})
    limits = dict(target) if isinstance(target, Mapping) else {"ms": float(target) * before["ms"]}
    for name, limit in limits.items():
        if name not in before:
            raise unknown_name("limit", name, before, "mixed_td")
        if not 0 < limit < math.inf:
            raise BudgetError(f"target: got {name} of at most {limit}, expected a finite number above 0")
    need = 1.0 / max(before[name] / limit for name, limit in limits.items())
    tolerance = chosen.tolerance
    while True:
        admitted = own.admit(options, tolerance, chosen.scan, progress)
        try:
            found = _search(own, pricing, admitted, shapes, limits, need, chosen, seed, progress)
            break
        except BudgetError as error:
            if tolerance >= 1:
                raise BudgetError(f"mixed_td: {_reach(pricing, options, limits)}") from error
            tolerance = min(2 * tolerance, 1.0)
    picked = {path: admitted[path][i] for path, i in found.choice.items()}
    return MixedTD(
        layers={path: option.treatments for path, option in picked.items() if option.treatments},
        accuracy=own.accuracy({path: option.treatments for path, option in picked.items()}),
        baseline_accuracy=own.accuracy({}),
        used=pricing.amounts({path: option.stages for path, option in picked.items()}),
        baseline=before,
        limits=limits,
        candidates=admitted,
        tolerance=tolerance,
        search=found,
    )


def _search(
    bench: FactorBench,
    pricing: NetworkCost,
    admitted: Mapping[str, Sequence[FactorOption]],
    shapes: Mapping[str, ConvShape],
    limits: Mapping[str, float],
    need: float,
    settings: Settings,
    seed: int,
    progress: Progress | None,
) -> Evolved:
    paths = tuple(admitted)

    def picked(choice: Sequence[int]) -> dict[str, FactorOption]:
        return {path: admitted[path][i] for path, i in zip(paths, choice, strict=True)}

    def accuracy(choice: Sequence[int], batch: int) -> float:
        return bench.batch_accuracy({path: option.treatments for path, option in picked(choice).items()}, batch)

    def cost(choice: Sequence[int]) -> float:
        used = pricing.amounts({path: option.stages for path, option in picked(choice).items()})
        return max(used[name] / limit for name, limit in limits.items())

    rest = [shape for path, shape in shapes.items() if path not in admitted]
    every = sum(shape.macs for shape in shapes.values())
    most = every * (need - settings.margin) if "ms" in limits and need < 1 else math.inf
    return evolve(
        admitted,
        accuracy,
        cost,
        1.0,
        predictor=CostForest(settings.trees, seed=seed) if settings.trees else None,
        population=settings.population,
        parents=settings.parents,
        mutate=settings.mutate,
        generations=settings.generations,
        warmup=settings.warmup,
        batches=bench.batches,
        aim=min(need, 1.0),
        margin=settings.margin,
        macs_limit=most,
        fixed=(float(sum(s.macs for s in rest)), float(sum(s.params for s in rest))),
        floor=settings.floor,
        start=[tuple(len(own) - 1 for own in admitted.values())],
        seed=seed,
        progress=progress,
    )


def _targets(model: nn.Module, refs: Sequence[LayerRef]) -> list[LayerRef]:
    found = []
    for ref in refs:
        module = model.get_submodule(ref.path) if ref.layout == "conv" else None
        if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward and module.groups == 1:
            found += [ref] if math.prod(module.kernel_size) > 1 else []
    if not found:
        raise InputError(
            "mixed_td: the model has no nn.Conv2d with one group and a kernel above 1 x 1 besides its stem; use another "
            "recipe"
        )
    return found


def _reach(pricing: NetworkCost, options: Mapping[str, Sequence[FactorOption]], limits: Mapping[str, float]) -> str:
    """What the smallest candidates of every layer reach, in words."""
    least = {path: min(own, key=lambda o: o.macs).stages for path, own in options.items()}
    used = pricing.amounts(least)
    before = pricing.amounts({})
    parts = [
        f"{name} {limit:,.4g} is below the smallest reachable, about {used[name]:,.4g} ({used[name] / before[name]:.3f}x)"
        for name, limit in limits.items()
        if used[name] > limit
    ]
    return "; ".join(parts) or f"no choice keeps to {', '.join(limits)} together; raise one of them"


def decide_mixed_td(task: Task) -> Choice:
    """The decider of the recipe `mixed_td`; budgets in ms, FLOPs, parameters and bytes."""
    settings = Settings.from_data(task.recipe.decider_settings)
    refusal = task.target.refuses((FactorConv(),))
    if refusal:
        raise InputError(f"mixed_td: {refusal}; use the target layerwright")
    result = mixed_td(
        task.bench.model,
        task.bench.calibration,
        _limits(task, settings),
        settings.cost,
        refs=task.refs,
        settings=settings,
        seed=task.seed,
        progress=task.progress,
    )
    unit = {"dataflow": "ms on the modelled device", "macs": "multiply-adds", "measured": "ms measured here"}
    words = [
        f"{name} {_amount(result.baseline[name])} -> {_amount(result.used[name])}"
        + (f" ({unit[settings.cost]})" if name == "ms" else "")
        for name in result.limits
    ]
    notes = (
        f"cost {settings.cost}: {'; '.join(words)}; accuracy on the search data {result.baseline_accuracy:.4f} -> "
        f"{result.accuracy:.4f}; {result.search.evaluations} designs priced, candidates alone may cost "
        f"{100 * result.tolerance:g} points"
    )
    reasons = {path: _reason(task, path, treatments) for path, treatments in result.layers.items()}
    extra = {
        "cost": settings.cost,
        "used": dict(result.used),
        "baseline": dict(result.baseline),
        "candidates": {path: len(own) for path, own in result.candidates.items()},
        "history": [asdict(generation) for generation in result.search.history],
    }
    return Choice(result.layers, reasons=reasons, notes=notes, extra=extra)


def _limits(task: Task, settings: Settings) -> dict[str, float]:
    """The budget in the amounts of `NetworkCost`."""
    model, data = task.bench.model, task.bench.calibration
    batch = next(iter(data))
    shapes = conv_shapes(model, lambda: data.forward(model, batch))
    whole = {path: (shape,) for path, shape in shapes.items()}
    params, macs = (sum(getattr(s, name) for s in shapes.values()) for name in ("params", "macs"))
    limits: dict[str, float] = {}
    for limit in task.budget:
        bound = task.limits[limit.resource]
        if limit.resource == "ms" and limit.unit == "relative":
            time_of = make_time(settings.cost, model, data, shapes, settings.device)
            limits["ms"] = limit.value * time_of(whole)
        elif limit.resource == "ms" and settings.cost == "macs":
            raise BudgetError(f"budget: {limit}: with cost macs a time must be relative, such as ms=0.65x")
        elif limit.resource == "ms":
            limits["ms"] = limit.value
        elif limit.resource == "flops":
            samples = max(task.profile.rows, 1)
            limits["macs"] = macs - (task.profile.total.flops - bound) / (2 * samples)
        elif limit.resource == "params":
            limits["params"] = params - (task.profile.total.params - bound)
        elif limit.resource == "bytes":
            held = params - (task.profile.total.bytes - bound) / task.element_bytes
            limits["params"] = min(held, limits.get("params", held))
        else:
            raise BudgetError(f"budget: {limit}: mixed_td holds ms, flops, params and size; leave the others out")
    for name, bound in limits.items():
        if bound <= 0:
            raise BudgetError(f"budget: {task.budget}: what is not factorised takes more than all {name} allowed")
    return limits


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _reason(task: Task, path: str, treatments: Treatments) -> str:
    ref = next(ref for ref in task.refs if ref.path == path)
    share = stored_bytes(treatments, *ref.shape, ref.count, task.element_bytes) / (ref.numel * task.element_bytes)
    return f"keeps {share:.0%} of its weights; chosen together with all other layers"
