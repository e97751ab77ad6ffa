"""LayerNorm Scaling (Sun et al., 2025, arXiv 2502.05795): norms of deep blocks give less.

A deep and narrow byte-level Llama is trained from the start with norms before their parts, scaled or not, and with norms
after the parts in its first quarter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.nn.residual_block import ResidualBlock
from layerwright.score.depth_effect import angular_distance, drop_impact, residual_variance
from layerwright.studies.sequence import Arm, compare, mean_of, tiny_llama, train_windows
from layerwright.treat.layernorm_scaling import apply_layernorm_scaling

__all__ = ["CLAIM", "deep_llama", "run"]

CLAIM = (
    "Dividing what norms give by the root of the block's number keeps the residual stream small, so that deep blocks of a "
    "model trained this way turn it more and are missed more, at no cost in quality."
)
RATES = (1e-3, 3e-3)
Progress = Callable[[str, int, int], None]


def deep_llama(kind: str, layers: int, seed: int) -> nn.Module:
    """A Llama of width 64: ``pre``, ``lns``, ``mix`` or ``lns, scaled init``, all of the same first weights."""
    model = tiny_llama(64, layers, 4, seed=seed)
    if kind == "mix":
        blocks = model.model.layers
        for number, block in enumerate(list(blocks)):
            blocks[number] = ResidualBlock(64, block.self_attn, block.mlp, "mix", number + 1, layers)
    if kind == "lns, scaled init":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter /= (2 * layers) ** 0.5
    if kind.startswith("lns"):
        apply_layernorm_scaling(model, copy=False)
    return model


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    layers, steps, batch, context = (4, 6, 4, 32) if quick else (16, 150, 16, 128)
    kinds = ("pre", "lns", "mix", "lns, scaled init")
    heldout = Calibration(train_windows(1 if quick else 4, context, split="heldout", seed=7, batch=8), name="held out")

    def measure(_arm: str, model: nn.Module) -> Mapping[str, Any]:
        last = slice(layers // 2, None)
        return {
            "variance after the last block": list(residual_variance(model, heldout).values())[-1],
            "angle, last half": _mean(list(angular_distance(model, heldout).values())[last]),
            "missed, last half": _mean(list(drop_impact(model, heldout).values())[last]),
        }

    def arm(kind: str, rate: float) -> Arm:
        return Arm(kind, lambda seed: deep_llama(kind, layers, seed), {"learning_rate": rate}, {"rate": rate})

    size: dict[str, Any] = {"steps": steps, "batch": batch, "context": context, "windows": 8 if quick else 128}
    rows: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    for kind in kinds:
        tried = [compare([arm(kind, rate)], seeds=(0,), measure=measure, **size)[0] for rate in RATES[quick:]]
        best = min(tried, key=lambda row: row["bits/byte"])
        rates[kind] = best["rate"]
        rows.append(best)
        if progress:
            progress("choosing rates", len(rows), len(kinds))
    if not quick and seeds > 1:
        rest = [arm(kind, rates[kind]) for kind in kinds]
        rows += compare(rest, seeds=range(1, seeds), measure=measure, progress=progress, **size)
    value = {(kind, name): mean_of(rows, kind, name) for kind in kinds for name in rows[0] if name not in ("arm",)}
    variance, angle, missed = "variance after the last block", "angle, last half", "missed, last half"
    checks = (
        Check("variance after the last block, lns over pre", value["lns", variance] / value["pre", variance], 0.6),
        Check(
            "angle between blocks of the last half, lns over pre", value["lns", angle] / value["pre", angle], 1.15, ">="
        ),
        Check("rise of the loss without a block of the last half, lns less pre", _less(value, missed), 0.0, ">="),
        Check("bits per byte, lns less pre", _less(value, "bits/byte"), 0.01),
    )
    notes = [
        f"{layers} blocks of width 64, {steps} steps of {batch} x {context} bytes; deviation 0.02 at the start",
        "rates from "
        + ", ".join(f"{rate:g}" for rate in RATES)
        + " by arm on seed 0: "
        + ", ".join(f"{kind} {rate:g}" for kind, rate in rates.items()),
        "after so few steps the deep blocks of no arm do much, and scaled norms begin with less from them: what deep blocks turn "
        "and how they are missed needs far longer training",
    ]
    used = tuple(range(1 if quick else seeds))
    return Evidence("layernorm-scaling", CLAIM, rows, checks, time.perf_counter() - begun, used, notes)


def _less(value: Mapping[tuple[str, str], float], name: str) -> float:
    return value["lns", name] - value["pre", name]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
