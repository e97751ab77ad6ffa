"""EDGE-LLM's compression (Yu et al., 2024): bits and sparsity of every transformer layer by two rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from layerwright.allocate.luc import LayerCompression, luc, reachable_sparsity
from layerwright.core.errors import BudgetError, InputError
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers
from layerwright.core.option import Scores
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import Quantize, RoundActivations, RoundCache, Sparsify, Treatments
from layerwright.nn.rounded_cache import takes_cache
from layerwright.recipes.deciders import Choice, Task
from layerwright.score.compression_probes import PROBES, ProbeTable, compression_sensitivity
from layerwright.treat.probe import treat_weights

__all__ = ["caching_attention", "decide_luc", "luc_layers"]

_KNOWN: Mapping[str, Any] = {
    "base_bits": 4,
    "sparsity": 0.5,
    "max_sparsity": 0.95,
    "prune": tuple(PROBES["prune"]),
    "bits": None,
    "activations": True,
    "cache": True,
    "relative": False,
    "method": "rtn",
    "exact": False,
}
_STEP = 0.005


def luc_layers(
    compression: Mapping[str, LayerCompression],
    refs: Sequence[LayerRef],
    *,
    activations: bool = True,
    method: str = "rtn",
    attention: Sequence[str] = (),
) -> dict[str, Treatments]:
    """Treatments of the blocks that `compression` names: SparseGPT, symmetric weights, rounded inputs, rounded caches.

    Args:
        compression: by block path (`layerwright.allocate.luc.luc`).
        refs: weights.
        activations: round what each layer reads to its bits, one scale for each token.
        method: how weights are rounded: ``rtn`` (one scale per output, as in the paper), ``mse`` or ``gptq``.
        attention: paths of attention modules whose keys and values get the bits of their block too (`caching_attention`).
    """
    found: dict[str, Treatments] = {}
    for path, chosen in compression.items():
        for ref in refs:
            if ref.path != path and not ref.path.startswith(path + "."):
                continue
            own: list[Any] = []
            removed = int(chosen.sparsity * ref.shape[0] * ref.shape[1])
            if removed:
                own.append(Sparsify(chosen.sparsity, method="sparsegpt"))
            if chosen.bits < 16:
                own.append(Quantize(chosen.bits, -1, symmetric=True, method=method))  # type: ignore[arg-type]
                if activations and ref.layout in ("linear", "conv1d"):
                    own.append(RoundActivations(chosen.bits, share="token", symmetric=True, observer="minmax"))
            if own:
                found[ref.path] = tuple(own)
        if chosen.bits < 16:
            inside = [one for one in attention if one.startswith(path + ".")]
            found |= {one: (RoundCache(chosen.bits),) for one in inside}
    return found


def caching_attention(model: nn.Module) -> list[str]:
    """Paths of the attention modules of a decoder that keep keys and values which can be rounded."""
    paths = [ref.path for ref in list_layers(model) if ref.kind == "attention"]
    return [path for path in paths if takes_cache(model.get_submodule(path))]


def decide_luc(task: Task) -> Choice:
    """Probe every transformer layer, then give it bits by the mean rule and sparsity by the linear rule.

    Settings (`Recipe.decider_settings`): `base_bits` (4) and the mean `sparsity` (0.5); `max_sparsity` (0.95); the probes
    `prune` and `bits` (the base and its double); `relative` (errors over the output's energy, false); `activations` and
    `cache` (rounded too, true); `method` of rounding weights (``rtn``); `exact` (take base and sparsity as they are, whatever the budget leaves over).

    A budget in bytes (``size=``, ``bits=``) moves the two targets as little as it needs: the mean sparsity is the
    smallest, in steps of 0.005, that fits, up to the recipe's; where that is not enough, the base goes down from
    `base_bits` to 4, 3 and 2; where 2 bits at the recipe's sparsity do not fit, sparsity goes up to `max_sparsity`.
    Adapters that the recipe's tuner `window` will leave beside the weights are counted.

    Raises:
        BudgetError: a limit that cannot be reached, or of another kind.
        InputError: unknown settings, no weights in blocks, or a target that cannot load these layers.
    """
    settings = _settings(task.recipe.decider_settings)
    refs = [ref for ref in task.refs if ref.block is not None and not ref.tied and ref.kind in ("linear", "experts")]
    if not refs:
        raise InputError(f"{task.bench.name} has no linear layers in blocks; edge_llm treats only these")
    other = [limit.name for limit in task.budget if limit.name not in ("bits", "size")]
    if other:
        raise BudgetError(f"budget: edge_llm holds bits= and size=, not {', '.join(other)}=")
    data = task.bench.calibration.head(task.recipe.score_samples)
    base = settings["base_bits"]
    probes = {"prune": settings["prune"], "bits": settings["bits"] or (base, 2 * base)}
    progress = task.progress
    table = compression_sensitivity(
        task.bench.model,
        data,
        treat_weights,
        probes=probes,
        layers=refs,
        relative=settings["relative"],
        progress=None if progress is None else lambda done, total: progress("probing blocks", done, total),
    )
    chosen, layers, target = _within(task, refs, table, settings)
    for treatments in dict.fromkeys(layers.values()):
        refusal = task.target.refuses(treatments)
        if refusal:
            raise InputError(f"{refusal}; edge_llm loads in layerwright only")
    first, mean = target
    reasons = {
        path: _reason(table, block, own)
        for block, own in chosen.items()
        for path in layers
        if path == block or path.startswith(block + ".")
    }
    doubled = sum(own.bits > first for own in chosen.values())
    notes = (
        f"{doubled} of {len(chosen)} transformer layers are more sensitive to rounding than the mean and have {2 * first}"
        f" bits, the others {first}; sparsity {mean:.1%} on average, {min(c.sparsity for c in chosen.values()):.0%} to "
        f"{max(c.sparsity for c in chosen.values()):.0%}, by {table.samples} samples"
    )
    return Choice(
        layers,
        reasons=reasons,
        notes=notes,
        scores={
            "prune": _scores("compression_probes_prune", table.prune_sensitivity, data.fingerprint()),
            "bits": _scores("compression_probes_bits", table.bits_sensitivity, data.fingerprint()),
        },
        extra={
            "base_bits": first,
            "mean_sparsity": mean,
            "blocks": {path: {"bits": own.bits, "sparsity": own.sparsity} for path, own in chosen.items()},
        },
    )


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [key for key in given if key not in _KNOWN]
    if unknown:
        raise InputError(f"decider_settings: unknown {', '.join(unknown)}; known: {', '.join(_KNOWN)}")
    settings = {**_KNOWN, **given}
    if settings["base_bits"] not in (2, 3, 4, 8):
        raise InputError(f"base_bits: got {settings['base_bits']!r}, expected 2, 3, 4 or 8 (its double is 16 at most)")
    for name in ("sparsity", "max_sparsity"):
        if not 0 <= settings[name] < 1:
            raise InputError(f"{name}: got {settings[name]}, expected a share from 0 to below 1")
    return settings


def _within(
    task: Task, refs: Sequence[LayerRef], table: ProbeTable, settings: Mapping[str, Any]
) -> tuple[dict[str, LayerCompression], dict[str, Treatments], tuple[int, float]]:
    """The mildest targets that keep to the budget: choice by block, treatments by layer, ``(base bits, sparsity)``."""
    limit = task.limits.get("bytes", math.inf) - _adapter_bytes(task, refs)
    prune, rounding = table.prune_sensitivity, table.bits_sensitivity
    attention = caching_attention(task.bench.model) if settings["cache"] else []
    least = math.inf
    for base, mean in _targets(settings, reachable_sparsity(prune, settings["max_sparsity"])):
        chosen = luc(prune, rounding, base_bits=base, sparsity=mean, max_sparsity=settings["max_sparsity"])
        layers = luc_layers(
            chosen, refs, activations=settings["activations"], method=settings["method"], attention=attention
        )
        total = _total(task, refs, layers)
        least = min(least, total)
        if total <= limit:
            return chosen, layers, (base, mean)
    raise BudgetError(
        f"budget: {limit:,.0f} bytes cannot be reached; the least with base_bits {settings['base_bits']} and sparsity "
        f"{settings['sparsity']:g} or more is {least:,.0f}"
    )


def _targets(settings: Mapping[str, Any], reachable: float) -> Iterator[tuple[int, float]]:
    """``(base bits, mean sparsity)`` from the mildest on."""
    goal, base = min(settings["sparsity"], reachable), settings["base_bits"]
    if settings["exact"]:
        yield base, settings["sparsity"]
        return
    bases = [width for width in (8, 4, 3, 2) if width <= base]
    for width in bases:
        steps = math.floor(goal / _STEP + 1e-9)
        yield from ((width, step * _STEP) for step in range(steps + 1))
        yield width, goal
    first = math.floor(goal / _STEP + 1e-9) + 1
    yield from ((bases[-1], step * _STEP) for step in range(first, math.floor(reachable / _STEP + 1e-9) + 1))


def _adapter_bytes(task: Task, refs: Sequence[LayerRef]) -> float:
    """Of the float32 adapters that the tuner leaves beside packed weights."""
    if task.recipe.tuner != "window" or task.recipe.tuner_settings.get("dequantize"):
        return 0.0
    rank = task.recipe.tuner_settings.get("rank", 8)
    return float(sum(4 * rank * sum(ref.shape) for ref in refs if ref.kind == "linear"))


def _total(task: Task, refs: Sequence[LayerRef], layers: Mapping[str, Treatments]) -> float:
    before = sum(ref.numel for ref in refs) * task.element_bytes
    after = sum(stored_bytes(layers.get(ref.path, ()), *ref.shape, ref.count, task.element_bytes) for ref in refs)
    return task.profile.total.bytes - before + after


def _reason(table: ProbeTable, block: str, own: LayerCompression) -> str:
    pruned, rounded = table.prune_sensitivity, table.bits_sensitivity
    mean = math.fsum(rounded.values()) / len(rounded)
    place = 1 + sum(value > pruned[block] for value in pruned.values())
    side = "above" if rounded[block] > mean else "at most"
    return (
        f"rounding error {rounded[block]:.3g}, {side} the mean {mean:.3g}: {own.bits} bits; "
        f"number {place} of {len(pruned)} in sensitivity to pruning: {own.sparsity:.1%} zeros"
    )


def _scores(name: str, found: Mapping[str, float], data: str) -> Scores:
    return Scores(name, sensitivities=dict(found), data=data, meta={"loss_units": False})
