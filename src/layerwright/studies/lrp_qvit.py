"""LRP-QViT (Ranjan and Savakis, 2024, arXiv 2401.11243): clipped channel-wise ranges, and bits by relevance.

A small vision transformer on digits, with three channels behind every norm made fifteen times as large without
changing what the model computes, quantized to 4 bits for weights and activations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from layerwright.allocate import ALLOCATORS
from layerwright.core.calibration import Calibration
from layerwright.core.cost import Cost
from layerwright.core.evidence import Check, Evidence
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, structure_copy, treatable
from layerwright.core.option import Option, OptionTable
from layerwright.core.treatment import Quantize, RoundActivations, RoundAttention, Treatments
from layerwright.score.relevance import lrp_contribution
from layerwright.score.relevance.contribution import quantization_noise
from layerwright.studies._vit import accuracy, calibration_digits, output_divergence, small_vit, unseen_digits
from layerwright.treat.activations import fit_quantizer
from layerwright.treat.apply import apply_plan
from layerwright.treat.migrate import find_norm_readers, migrate_, sample_norms
from layerwright.treat.reparameterize import (
    channel_params,
    clip_channel_params,
    reparameterize_,
    shared_grid,
)

__all__ = ["CLAIM", "blow_up", "mixed_bits", "random_bits", "run", "uniform_plan"]

CLAIM = (
    "Clipping outlier channels' ranges and moving the rest into the norm makes 4-bit activations behind norms as good as "
    "with a range per channel; relevance tells which layers need bits, so that a mixed plan is better than a uniform one."
)
BITS = 4
FACTOR = 15.0
CHANNELS = 3
RULES: dict[str, tuple[Any, float]] = {"RepQ": ("none", 0.0), "clipped": ("std", 3.0), "clipped (iqr)": ("iqr", 1.5)}
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    draws, plans, depth = (1, 2, 2) if quick else (3, 10, 4)
    test = unseen_digits(200 if quick else 500)
    table: list[dict[str, Any]] = []
    fixed: list[dict[str, float]] = []
    errors: list[float] = []
    mixed: list[dict[str, float]] = []
    ranks: list[float] = []
    for seed in range(seeds):
        model = small_vit(seed, 5 if quick else 30, depth)
        table.append({"seed": seed, "plan": "floating point", "accuracy": accuracy(model, test)})
        for draw in range(draws):
            row, error, rows = _fixed(model, seed, draw, test)
            table += rows
            fixed.append(row)
            errors.append(error)
            tell(f"seed {seed}: uniform plans", draw + 1, draws)
            mixed.append(_mixed(model, seed, draw, plans, tell))
            table.append({"seed": seed, "draw": draw, "plan": f"mixed, and {plans} random ones", **mixed[-1]})
        ranks.append(_rank_correlation(model, seed, every=3 if quick else 1))
        table.append({"seed": seed, "plan": "one layer at 2 bits", "rank correlation": ranks[-1]})
    mean = {name: statistics.fmean(row[name] for row in fixed) for name in fixed[0]}
    kl = {name: statistics.fmean(row[name] for row in mixed) for name in mixed[0]}
    checks = (
        Check("accuracy clipped over per tensor (points)", mean["clipped"] - mean["per tensor"], 5.0, ">="),
        Check("accuracy clipped over RepQ (points)", mean["clipped"] - mean["RepQ"], -0.3, ">="),
        Check("error behind norms, clipped over per tensor", statistics.fmean(errors), 0.3),
        Check("calibration KL mixed over fixed, equal size (nats)", kl["mixed KL"] - kl["fixed KL"], 0.0),
        Check("calibration KL mixed over random, equal size (nats)", kl["mixed KL"] - kl["random KL"], 0.0),
        Check("rank correlation of contribution with one layer's KL", statistics.fmean(ranks), 0.4, ">="),
    )
    notes = [
        f"ViT of width 48 and {depth} blocks on digits; {CHANNELS} channels behind each norm times {FACTOR:g}; W4A4, products of "
        "attention at 4 bits with logarithmic probabilities; 64 calibration images; patch embedding and head in float",
        "clipped: ends of channels' ranges within 3 standard deviations of the mean over channels; the fence of 1.5 "
        "interquartile ranges (shown) cuts channels of this size to a fraction of their values",
        f"means over {draws} draws of channels and calibration images for each seed",
        f"random plans, {plans * draws} for each seed: 3, 4 or 5 bits for each layer, of exactly the fixed plan's size",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("lrp-qvit", CLAIM, table, checks, seconds, tuple(range(seeds)), notes)


def blow_up(
    model: nn.Module, data: Calibration, *, factor: float = FACTOR, channels: int = CHANNELS, seed: int = 0
) -> nn.Module:
    """A copy of `model` that computes the same, with `channels` channels behind each norm `factor` times as large."""
    copy = structure_copy(model)
    generator = torch.Generator().manual_seed(seed)
    for group in find_norm_readers(model, data):
        if not group.others:
            scale = torch.ones(group.channels)
            scale[torch.randperm(group.channels, generator=generator)[:channels]] = 1 / factor
            migrate_(copy, group, scale)
    return copy


def _reparameterized(model: nn.Module, data: Calibration, rule: Any, k: float) -> nn.Module:
    copy = structure_copy(model)
    reparameterize_(copy, data, bits=BITS, rule=rule, k=k)
    return copy


def uniform_plan(model: nn.Module, bits: int | Mapping[str, int]) -> dict[str, Treatments]:
    """Weights and activations of every layer of the blocks at `bits` (or at those of each layer), attention at 4."""
    refs = list_layers(model)
    plan: dict[str, Treatments] = {}
    for ref in treatable(model, refs):
        plan[ref.path] = layer_treatments(bits if isinstance(bits, int) else bits[ref.path])
    rounding = RoundAttention(BITS, "log_sqrt2", observer="percentile")
    return plan | {ref.path: (rounding,) for ref in refs if ref.kind == "attention"}


def layer_treatments(bits: int) -> Treatments:
    """Weights asymmetric per output channel, inputs per tensor."""
    return (Quantize(bits, symmetric=False, method="mse"), RoundActivations(bits, observer="percentile"))


def norm_error_ratio(model: nn.Module, data: Calibration) -> float:
    """Squared error of 4-bit norm outputs with clipped, shared grids over that of one grid per tensor; mean over norms.

    Both in the coordinates of the norm's own output.
    """
    groups = tuple(group for group in find_norm_readers(model, data) if not group.others)
    ratios = []
    for path, samples in sample_norms(model, data, groups).items():
        x = samples.values(path).double()
        tensor = fit_quantizer(samples, BITS, path, observer="percentile")
        scale, zero = clip_channel_params(*channel_params(x, BITS), BITS, *RULES["clipped"])
        divisor, offset, step, common = shared_grid(scale, zero)
        codes = ((x - offset) / divisor / step + common).round().clamp(0, 2**BITS - 1)
        clipped = (codes - common) * step * divisor + offset
        plain = tensor(x.float()).double()
        ratios.append(float((clipped - x).square().sum() / (plain - x).square().sum()))
    return statistics.fmean(ratios)


def mixed_bits(refs: tuple[LayerRef, ...], omega: Mapping[str, float], bits: int = BITS) -> dict[str, int]:
    """3, 4 or 5 bits for each layer (one less, as many, one more than `bits`) of least noise at the same size."""
    rows = tuple(
        Option(ref.path, layer_treatments(b), Cost(bytes=ref.numel * b / 8), omega[ref.path] * quantization_noise(b))
        for ref in refs
        for b in (bits - 1, bits, bits + 1)
    )
    limit = sum(ref.numel for ref in refs) * bits / 8
    chosen = ALLOCATORS.get("integer")(OptionTable(rows), {"bytes": limit}).chosen
    return {option.layer: t.bits for option in chosen for t in option.treatments if isinstance(t, Quantize)}


def random_bits(refs: tuple[LayerRef, ...], generator: torch.Generator, bits: int = BITS) -> dict[str, int]:
    """One less, as many or one more than `bits` for each layer, of exactly the size of `bits` everywhere."""
    sizes = torch.tensor([ref.numel for ref in refs])
    while True:
        steps = torch.randint(-1, 2, (len(refs),), generator=generator)
        if int((steps * sizes).sum()) == 0 and bool(steps.any()):
            return {ref.path: bits + int(step) for ref, step in zip(refs, steps, strict=True)}


def _fixed(
    model: nn.Module, seed: int, draw: int, test: Calibration
) -> tuple[dict[str, float], float, list[dict[str, Any]]]:
    """Accuracies at 4 bits by method, the ratio of errors behind norms, and rows for the table."""
    data = calibration_digits(64, seed=100 * draw + seed)
    blown = blow_up(model, data, seed=100 * draw + seed)
    networks = {"per tensor": blown}
    networks |= {name: _reparameterized(blown, data, rule, k) for name, (rule, k) in RULES.items()}
    row: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, network in networks.items():
        quantized = apply_plan(network, uniform_plan(network, BITS), data, simulate=True)[0]
        row[name] = accuracy(quantized, test)
        divergence = output_divergence(quantized, model, data)
        rows.append({"seed": seed, "draw": draw, "plan": name, "accuracy": row[name], "calibration KL": divergence})
    return row, norm_error_ratio(blown, data), rows


def _mixed(model: nn.Module, seed: int, draw: int, plans: int, tell: Progress) -> dict[str, float]:
    """Calibration KL of the fixed, the mixed and random plans."""
    data = calibration_digits(64, seed=100 * draw + seed)
    network = _reparameterized(blow_up(model, data, seed=100 * draw + seed), data, *RULES["clipped"])
    refs = treatable(network)
    omega = lrp_contribution(network, data)

    def divergence(bits: int | Mapping[str, int]) -> float:
        return output_divergence(apply_plan(network, uniform_plan(network, bits), data, simulate=True)[0], model, data)

    generator = torch.Generator().manual_seed(100 * draw + seed)
    drawn = []
    for number in range(plans):
        drawn.append(divergence(random_bits(refs, generator)))
        tell(f"seed {seed}, draw {draw}: random plans", number + 1, plans)
    return {
        "fixed KL": divergence(BITS),
        "mixed KL": divergence(mixed_bits(refs, omega)),
        "random KL": statistics.fmean(drawn),
        "best random KL": min(drawn),
    }


def _rank_correlation(model: nn.Module, seed: int, every: int = 1) -> float:
    """Spearman's correlation of contributions with the calibration KL of one layer at 2 bits, the others in float."""
    data = calibration_digits(64, seed=seed)
    network = _reparameterized(blow_up(model, data, seed=seed), data, *RULES["clipped"])
    omega = lrp_contribution(network, data)
    drops = {
        ref.path: output_divergence(
            apply_plan(network, {ref.path: layer_treatments(2)}, data, simulate=True)[0], model, data
        )
        for ref in treatable(network)[::every]
    }
    return float(spearmanr([omega[path] for path in drops], list(drops.values())).statistic)
