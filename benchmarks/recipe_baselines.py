"""What a recipe is held against: one plain rule for all layers, at the bytes (or the time) that the recipe took."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwright.allocate.luc import LayerCompression
from layerwright.core.cost import Cost
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, parameter_bytes
from layerwright.core.storage import activation_bytes, stored_bytes
from layerwright.core.treatment import Drop, MixRows, Quantize, RoundActivations, RoundAttention, Treatments
from layerwright.recipes.bench import Bench
from layerwright.recipes.job import Decision, element_bytes, uniform_layers
from layerwright.recipes.luc import luc_layers
from layerwright.treat.apply import apply_plan
from layerwright.tune import TUNERS
from layerwright.tune.bias_tune import divergence

__all__ = ["ABOUT", "Baselines", "baselines", "tuned"]

ABOUT = (
    "The baselines take no more bytes than the recipe's result, measured, and see the same calibration data. "
    "Where bits are decided: one width for all layers that the recipe treats, one bit more in the first layers until "
    "the bytes are used up, rounded to nearest and by GPTQ (in the recipe's group size; where it has zero points, with or without "
    "them, whichever diverges less from the untouched model on the calibration data). Where the recipe rounds activations "
    "too, so do the baselines: uniform grids of the recipe's median width, the same observer, one scale for the same "
    "things. `edge_llm`: one width and one sparsity for all blocks, the pair that diverges least on the calibration data. "
    "`shortened-llama`: as many of the last blocks dropped, and retrained alike. `mixed_td`: plain channel SVD with "
    "one share of every layer's multiplications, at the same latency of the modelled device."
)
"""What the baselines are, for the page's head."""

_SHARES = [n / 200 for n in range(191)]
"""Sparsities that are tried, the smallest that fits is taken."""


@dataclass(frozen=True)
class Baselines:
    """The models a recipe is held against.

    Attributes:
        nearest: rounded to nearest; None where nothing is rounded.
        best: the one that differences are taken from.
        words: what `best` is, in a few words.
        plan: bits of `best` by layer where it is weights alone that are rounded, which other packages can do too.
    """

    nearest: nn.Module | None
    best: nn.Module
    words: str
    plan: Mapping[str, Quantize] = dataclasses.field(default_factory=dict)


def tuned(bench: Bench, decision: Decision, model: nn.Module, seed: int) -> nn.Module:
    """`model` after the recipe's tuner; as it is where there is none."""
    chosen = decision.recipe
    if not chosen.tuner:
        return model
    done = TUNERS.get(chosen.tuner)(model, bench.calibration, teacher=bench.model, seed=seed, **chosen.tuner_settings)
    assert isinstance(done, nn.Module)
    return done


def baselines(bench: Bench, decision: Decision, after: nn.Module, seed: int) -> Baselines:
    """The plain counterparts of `after`, which `decision` led to."""
    chosen = decision.recipe
    if chosen.decider == "mixed_td":
        return _uniform_factors(bench, decision, after)
    if chosen.decider == "luc":
        return _uniform_compression(bench, decision, after)
    if chosen.drop_blocks and not chosen.candidates:
        return _last_blocks(bench, decision, seed)
    return _uniform_bits(bench, decision, after)


# -- bits ---------------------------------------------------------------------------------------------------------


def _uniform_bits(bench: Bench, decision: Decision, after: nn.Module) -> Baselines:
    layers = decision.plan.layers
    refs = [ref for ref in decision.refs if not decision.recipe.decider or ref.path in layers]
    own, product = _rounding([t for treatments in layers.values() for t in treatments])
    inputs = [ref for ref in refs if own and ref.layout in ("linear", "conv1d")]
    modules = [ref for ref in list_layers(bench.model) if product and ref.kind == "attention"]
    ranges = sum(activation_bytes(own, ref.shape[1]) for ref in inputs) + activation_bytes(product) * len(modules)
    room = parameter_bytes(after) - ranges
    extra: dict[str, Treatments] = dict.fromkeys((ref.path for ref in inputs), own)
    products: dict[str, Treatments] = dict.fromkeys((ref.path for ref in modules), product)
    found: dict[tuple[bool, str], tuple[nn.Module, dict[str, Quantize]]] = {}
    for symmetric in (True, False) if _asymmetric(layers) else (True,):
        for method in ("rtn", "gptq"):
            weights = _uniform_weights(bench, decision, refs, room, symmetric, method)
            plan: dict[str, Treatments] = {path: (t, *extra.get(path, ())) for path, t in weights.items()}
            model, _ = apply_plan(bench.model, plan | products, bench.calibration)
            found[symmetric, method] = model, weights
    best = {
        method: min((item for (_, m), item in found.items() if m == method), key=lambda i: _harm(bench, i[0]))
        for method in ("rtn", "gptq")
    }
    model, weights = best["gptq"]
    words = "GPTQ" + (f", {own[0].label()}" if own else "") + (f", {product[0].label()}" if product else "")
    return Baselines(best["rtn"][0], model, words, {} if own or product else weights)


def _uniform_weights(
    bench: Bench, decision: Decision, refs: Sequence[LayerRef], room: float, symmetric: bool, method: Any
) -> dict[str, Quantize]:
    width, group = element_bytes(bench, decision.refs), decision.recipe.group_size
    rest = Cost(bytes=decision.table.original.bytes - sum(ref.numel for ref in refs) * width)
    eight, _ = uniform_layers(tuple(refs), float("inf"), rest, group, width)
    sizes = {ref.path: ref for ref in refs}

    def stored(path: str, treatment: Quantize) -> int:
        ref = sizes[path]
        return stored_bytes((treatment,), *ref.shape, ref.count, width)

    whole = {path: t for path, (t,) in eight.items() if isinstance(t, Quantize)}
    zeros = sum(stored(p, dataclasses.replace(t, symmetric=symmetric)) - stored(p, t) for p, t in whole.items())
    layers, _ = uniform_layers(tuple(refs), room - zeros, rest, group, width)
    return {
        path: dataclasses.replace(t, symmetric=symmetric, method=method)
        for path, (t,) in layers.items()
        if isinstance(t, Quantize)
    }


def _asymmetric(layers: Mapping[str, Treatments]) -> bool:
    return any(
        isinstance(t, MixRows) or (isinstance(t, Quantize) and not t.symmetric)
        for treatments in layers.values()
        for t in treatments
    )


def _rounding(treatments: Sequence[Any]) -> tuple[tuple[RoundActivations, ...], tuple[RoundAttention, ...]]:
    """How the plan rounds activations and attention, as one uniform treatment each."""
    own = [t for t in treatments if isinstance(t, RoundActivations)]
    products = [t for t in treatments if isinstance(t, RoundAttention)]
    first: tuple[RoundActivations, ...] = ()
    if own:
        plain = [t for t in own if t.grid == "uniform"] or own
        share, symmetric, observer = (
            Counter(getattr(t, name) for t in plain).most_common(1)[0][0] for name in ("share", "symmetric", "observer")
        )
        first = (RoundActivations(_median([t.bits for t in own]), "uniform", share, symmetric, observer),)
    elif any(isinstance(t, MixRows) and t.act_bits for t in treatments):
        first = (RoundActivations(8, share="token", symmetric=True, observer="minmax"),)
    if not products:
        return first, ()
    observer = Counter(t.observer for t in products).most_common(1)[0][0]
    bits = _median([b for t in products for b in (t.bits, t.key_bits or t.bits)])
    return first, (RoundAttention(bits, observer=observer),)


def _median(numbers: Sequence[int]) -> int:
    return sorted(numbers)[len(numbers) // 2]


def _harm(bench: Bench, model: nn.Module) -> float:
    """Divergence of the predictions from the untouched model's on the calibration data: it tells closer models apart
    than the loss does.
    """
    return divergence(model, bench.model, bench.calibration)


# -- other kinds --------------------------------------------------------------------------------------------------


def _uniform_compression(bench: Bench, decision: Decision, after: nn.Module) -> Baselines:
    settings = decision.recipe.decider_settings
    layers = decision.plan.layers
    blocks = list(decision.extra["blocks"])
    refs = [ref for ref in decision.refs if ref.path in layers]
    width = element_bytes(bench, decision.refs)
    rest = decision.table.original.bytes - sum(ref.numel for ref in refs) * width
    room = parameter_bytes(after) - rest
    found: dict[str, list[tuple[float, str, nn.Module]]] = {"rtn": [], "gptq": []}
    for bits in (2, 3, 4, 8):
        for method, kept in found.items():
            share = next(
                (s for s in _SHARES if _compressed(refs, blocks, bits, s, method, settings, width) <= room), None
            )
            if share is None:
                continue
            plan = _compression(refs, blocks, bits, share, method, settings)
            model, _ = apply_plan(bench.model, plan, bench.calibration)
            kept.append((_harm(bench, model), f"{bits} bits, {share:.1%} zeros", model))
    nearest, best = (min(kept, key=lambda item: item[0]) for kept in (found["rtn"], found["gptq"]))
    return Baselines(nearest[2], best[2], f"GPTQ, {best[1]} (to nearest {nearest[1]})")


def _compression(
    refs: Sequence[LayerRef], blocks: Sequence[str], bits: int, share: float, method: str, settings: Mapping[str, Any]
) -> dict[str, Treatments]:
    alike = dict.fromkeys(blocks, LayerCompression(bits, share))
    return luc_layers(alike, refs, activations=settings.get("activations", True), method=method)


def _compressed(
    refs: Sequence[LayerRef],
    blocks: Sequence[str],
    bits: int,
    share: float,
    method: str,
    settings: Mapping[str, Any],
    width: int,
) -> int:
    layers = _compression(refs, blocks, bits, share, method, settings)
    return sum(stored_bytes(layers.get(ref.path, ()), *ref.shape, ref.count, width) for ref in refs)


def _last_blocks(bench: Bench, decision: Decision, seed: int) -> Baselines:
    dropped = [path for path, own in decision.plan.layers.items() if any(isinstance(t, Drop) for t in own)]
    stack = dropped[0].rpartition(".")[0]
    names = [
        row.ref.path for row in decision.profile if row.ref.kind == "block" and row.ref.path.rpartition(".")[0] == stack
    ]
    last = names[len(names) - len(dropped) :]
    model, _ = apply_plan(bench.model, {path: (Drop(),) for path in last}, bench.calibration)
    return Baselines(None, tuned(bench, decision, model, seed), f"last {len(last)} blocks dropped, retrained")


def _uniform_factors(bench: Bench, decision: Decision, after: nn.Module) -> Baselines:
    from layerwright.score.conv_shapes import conv_shapes
    from layerwright.studies.mixed_td import _mapped, _uniform

    data, device = bench.calibration, decision.recipe.decider_settings.get("device", {})
    batch = next(iter(data))
    shapes, treated = (
        conv_shapes(model, lambda model=model: data.forward(model, batch))  # type: ignore[misc]
        for model in (bench.model, after)
    )
    target = _mapped(treated, device).latency_ms / _mapped(shapes, device).latency_ms
    factors, ratio = _uniform(shapes, tuple(decision.extra["candidates"]), target, device)
    model, _ = apply_plan(bench.model, {path: (t,) for path, t in factors.items()}, bench.calibration)
    return Baselines(None, model, f"SVD, {ratio:.2f} of the multiplications, {target:.2f}x the latency")
