"""FPTQ (Li et al., 2023): int4 weights in groups, int8 activations rounded as the range of each layer asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from layerwright.allocate.activation_strategy import Strategy, fptq_strategy
from layerwright.core.calibration import Calibration
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layer import LayerRef
from layerwright.core.layers import treatable
from layerwright.core.plan import Plan
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Quantize, RoundActivations, Treatments
from layerwright.recipes.deciders import Choice, Task
from layerwright.score.activation_range import activation_range
from layerwright.treat.log_equalize import equalizable_layers

__all__ = ["decide_fptq", "fptq_layers", "fptq_plan"]

_WORDS: Mapping[Strategy, str] = {
    "static": "one scale for all tokens",
    "lae": "equalized, then one scale for all tokens",
    "dynamic": "a scale for each token",
}


def fptq_layers(
    strategies: Mapping[str, Strategy], refs: Sequence[LayerRef], *, group_size: int = 128, bits: int = 4
) -> dict[str, Treatments]:
    """Treatments of each layer: `bits`-bit symmetric weights rounded to nearest, symmetric 8-bit activations.

    Where `group_size` does not divide a layer's inputs, its greatest common divisor with them is taken.
    """
    found: dict[str, Treatments] = {}
    for ref in refs:
        if ref.path in strategies:
            size = -1 if group_size == -1 else math.gcd(group_size, ref.shape[1])
            share: Any = "token" if strategies[ref.path] == "dynamic" else "tensor"
            act = RoundActivations(8, share=share, symmetric=True, observer="minmax")
            found[ref.path] = (Quantize(bits, size, method="rtn"), act)
    return found


def fptq_plan(
    model: nn.Module,
    calibration: Calibration,
    *,
    v0: float = 15.0,
    v1: float = 150.0,
    group_size: int = 128,
    bits: int = 4,
) -> Plan:
    """The whole method as a plan that a person can edit; `apply_plan` carries it out.

    The layers that are equalized are listed under ``prepare``; the strategy of each layer is its reason.

    Raises:
        InputError: bounds out of order, or ranges that are not finite.
    """
    refs = _linear(treatable(model))
    ranges = activation_range(model, calibration, refs)
    movable = {path for item in equalizable_layers(model, calibration) for path in item.readers}
    chosen = fptq_strategy(ranges, v0, v1, layers=[ref.path for ref in refs], equalizable=movable)
    equalized = [path for path, strategy in chosen.items() if strategy == "lae"]
    return Plan(
        fptq_layers(chosen, refs, group_size=group_size, bits=bits),
        reasons={path: f"{strategy}: {_WORDS[strategy]}" for path, strategy in chosen.items()},
        recipe="fptq",
        prepare={"log_equalize": {"layers": " ".join(equalized)}} if equalized else {},
    )


def decide_fptq(task: Task) -> Choice:
    """Choose how each linear layer's activations are rounded, by the ranges of the model as it was prepared.

    The recipe's step `log_equalize`, with the same bounds, has taken those between `v0` and `v1` below `v0` where it
    could; what still lies above is rounded for each token.

    Settings: `v0` (15), `v1` (150), `group_size` (128), `bits` (4).

    Raises:
        BudgetError: the bytes are above the budget, or it limits something else.
        InputError: unknown settings, bounds out of order, or a target that cannot load these layers.
    """
    known: dict[str, Any] = {"v0": 15.0, "v1": 150.0, "group_size": 128, "bits": 4}
    unknown = [key for key in task.recipe.decider_settings if key not in known]
    if unknown:
        raise InputError(f"decider_settings: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    settings = {**known, **task.recipe.decider_settings}
    refs = _linear(task.refs)
    if not refs:
        raise InputError(f"{task.bench.name} has no linear layers; fptq treats only these")
    ranges = activation_range(task.bench.model, task.bench.calibration, refs)
    v0, v1 = float(settings["v0"]), float(settings["v1"])
    chosen = fptq_strategy(ranges, v0, v1, layers=[ref.path for ref in refs], equalizable=())
    layers = fptq_layers(chosen, refs, group_size=settings["group_size"], bits=settings["bits"])
    for treatments in dict.fromkeys(layers.values()):
        refusal = task.target.refuses(treatments)
        if refusal:
            raise InputError(refusal)
    _hold(task, refs, layers)
    reasons = {}
    for ref in refs:
        strategy = chosen[ref.path]
        v = f"largest input {float(ranges[ref.path].max()):.1f}" if ref.path in ranges else "never reached by the data"
        reasons[ref.path] = f"{v}: {_WORDS[strategy]}"
    static = sum(strategy == "static" for strategy in chosen.values())
    notes = f"{static} of {len(chosen)} layers have one activation scale, the others one for each token (bound {v0:g})"
    return Choice(
        layers, reasons=reasons, notes=notes, extra={"strategies": dict(chosen), "nominal_bits": settings["bits"]}
    )


def _linear(refs: Sequence[LayerRef]) -> list[LayerRef]:
    return [ref for ref in refs if ref.layout in ("linear", "conv1d") and not ref.tied]


def _hold(task: Task, refs: Sequence[LayerRef], layers: Mapping[str, Treatments]) -> None:
    other = [limit.name for limit in task.budget if limit.name not in ("bits", "size")]
    if other:
        raise BudgetError(f"budget: fptq holds bits= and size=, not {', '.join(other)}=")
    before = sum(ref.numel for ref in refs) * task.element_bytes
    after = sum(stored_bytes(layers[ref.path], *ref.shape, ref.count, task.element_bytes) for ref in refs)
    total = task.profile.total.bytes - before + after
    bits = next((limit.value for limit in task.budget if limit.name == "bits"), math.inf)
    width = max((t.bits for own in layers.values() for t in own if isinstance(t, Quantize)), default=0)
    if width > bits:
        raise BudgetError(f"bits={bits:g} cannot be reached: fptq gives every layer {width} bits")
    if any(limit.name == "size" for limit in task.budget) and total > task.limits["bytes"]:
        raise BudgetError(f"size: {task.limits['bytes']:,.0f} bytes cannot be reached; fptq takes {total:,.0f}")
