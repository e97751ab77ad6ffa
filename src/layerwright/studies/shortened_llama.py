"""Shortened LLaMA (Kim et al., 2024, arXiv 2402.02834): remove whole blocks, retrain briefly.

Two of the eight blocks of the demo language model are removed by each criterion, and compared with all 28 pairs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerwright.allocate import keep_blocks
from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.core.option import Scores
from layerwright.core.skip import skip_blocks
from layerwright.score import block_magnitude, block_perplexity, block_taylor
from layerwright.score.base import Subject
from layerwright.studies._fixtures import byte_windows, decode_ratio, demo_language_model
from layerwright.treat.drop import drop_blocks
from layerwright.tune import full, lora

__all__ = ["CLAIM", "Criterion", "run"]

CLAIM = (
    "Removing the blocks that a simple criterion ranks lowest is close to the best choice of blocks, decodes faster in "
    "proportion, and a brief retraining recovers quality, continued pretraining at least as well as LoRA."
)
REMOVED = 2
DRAWS = 20
Pair = tuple[int, ...]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Criterion:
    """A way to rank blocks, and how many at the ends it must not touch."""

    name: str
    score: Callable[[Subject], Scores]
    first: int = 0
    last: int = 0


CRITERIA = (
    Criterion("PPL", block_perplexity),
    Criterion("Taylor+", block_taylor, 1, 1),
    Criterion("Mag+", block_magnitude, 1, 1),
    Criterion("Taylor", block_taylor),
)


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    model, tokenizer = demo_language_model()
    names = find_blocks(model)[0].names
    # Windows of their own: the retraining rates were chosen on others.
    heldout = byte_windows("heldout", tokenizer, 8 if quick else 48, 96 if quick else 128, seed=101)
    intact = heldout.mean_loss(model)
    pairs = pair_losses(model, names, heldout, tell)
    table: list[dict[str, Any]] = [{"plan": "intact", "removed": "none", "nats/byte": intact}]
    table += [
        {"plan": f"best of {len(pairs)} pairs", **_row(pairs, min(pairs, key=pairs.__getitem__))},
        {"plan": "worst", **_row(pairs, max(pairs, key=pairs.__getitem__))},
    ]
    random_mean = _random_mean(pairs, len(names))
    table.append({"plan": f"random, mean of {DRAWS}", "nats/byte": random_mean})
    chosen: dict[str, list[Pair]] = {criterion.name: [] for criterion in CRITERIA}
    for seed in range(seeds):
        data = byte_windows("calibration", tokenizer, 10, 64 if quick else 128, seed=seed, batch_size=10)
        subject = Subject(model, data, blocks=names)
        scores = {score: score(subject) for score in dict.fromkeys(criterion.score for criterion in CRITERIA)}
        for criterion in CRITERIA:
            removed = removed_by(criterion, scores[criterion.score])
            chosen[criterion.name].append(removed)
            table.append({"plan": criterion.name, "seed": seed, **_row(pairs, removed)})
        tell("ranking blocks", seed + 1, seeds)
    retrained = [
        _retrain(model, names, removed, tokenizer, heldout, seed, quick, tell)
        for seed, removed in enumerate(chosen["PPL"][: 1 if quick else None])
    ]
    for seed, losses in enumerate(retrained):
        table += [{"plan": f"PPL {how}", "seed": seed, "nats/byte": loss} for how, loss in losses.items()]
    short, _ = drop_blocks(model, [names[i] for i in chosen["PPL"][0]])
    prompt = next(iter(heldout))["input_ids"][:1, :16]
    ratio, ratios = decode_ratio(short, model, prompt, tokens=16 if quick else 64, pairs=3 if quick else 15)
    table.append({"plan": "decode time, 6 of 8 blocks", "ratio": ratio, "lowest": min(ratios), "highest": max(ratios)})
    ppl = statistics.fmean(pairs[removed] for removed in chosen["PPL"])
    mean = {how: statistics.fmean(losses[how] for losses in retrained) for how in retrained[0]}
    quartile = float(torch.quantile(torch.tensor(list(pairs.values()), dtype=torch.float64), 0.25))
    checks = (
        Check("PPL plan against the 25th percentile of all pairs (nats/byte)", ppl, quartile),
        Check("PPL plan against random - 0.05 (nats/byte)", ppl, random_mean - 0.05),
        Check("decode time at 6 of 8 blocks over the original's", ratio, 0.85),
        Check("CPT against LoRA + 0.01 (nats/byte)", mean["CPT"], mean["LoRA"] + 0.01),
        Check("LoRA + 0.01 against unretrained - 0.05 (nats/byte)", mean["LoRA"] + 0.01, mean["unretrained"] - 0.05),
    )
    notes = [
        "demo:lm, 8 blocks; the first and the last block are protected for Taylor+ and Mag+ (4 and 2 of 32 in the paper)",
        f"learning rates {LORA_RATE:g} (LoRA) and {FULL_RATE:g} (CPT), higher than the paper's 1e-4, for "
        f"{_steps(quick)} steps of {_batch(quick)} x 64 bytes on the training part",
        "decode times are ratios of runs that took turns; the machine's load spreads them",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("shortened-llama", CLAIM, table, checks, seconds, tuple(range(seeds)), notes)


LORA_RATE = 3e-3
FULL_RATE = 3e-4


def _steps(quick: bool) -> int:
    return 30 if quick else 100


def _batch(quick: bool) -> int:
    return 4 if quick else 8


def pair_losses(
    model: nn.Module, names: tuple[str, ...], data: Calibration, tell: Progress, count: int = REMOVED
) -> dict[Pair, float]:
    """Loss without each combination of `count` blocks, by their positions."""
    combinations = list(itertools.combinations(range(len(names)), count))
    losses: dict[Pair, float] = {}
    for number, removed in enumerate(combinations):
        with skip_blocks(model, [names[i] for i in removed]):
            losses[removed] = data.mean_loss(model)
        tell("all pairs", number + 1, len(combinations))
    return losses


def removed_by(criterion: Criterion, scores: Scores, count: int = REMOVED) -> Pair:
    """Positions of the `count` blocks that `criterion` ranks lowest by its `scores`."""
    kept = keep_blocks(scores, count, protect_first=criterion.first, protect_last=criterion.last)
    return tuple(i for i in range(len(scores.sensitivities)) if i not in kept)


def _random_mean(pairs: Mapping[Pair, float], depth: int) -> float:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(depth, generator=generator)[:REMOVED].sort().values.tolist() for _ in range(DRAWS)]
    return statistics.fmean(pairs[tuple(pair)] for pair in drawn)


def _row(pairs: Mapping[Pair, float], removed: Pair) -> dict[str, Any]:
    better = sum(loss < pairs[removed] for loss in pairs.values())
    return {"removed": ", ".join(map(str, removed)), "nats/byte": pairs[removed], "rank": better + 1}


def _retrain(
    model: nn.Module,
    names: tuple[str, ...],
    removed: Pair,
    tokenizer: Any,
    heldout: Calibration,
    seed: int,
    quick: bool,
    tell: Progress,
) -> dict[str, float]:
    """Held-out losses of the plan as it is, after LoRA and after continued pretraining."""
    steps = _steps(quick)
    batch = _batch(quick)
    data = byte_windows("train", tokenizer, batch * steps, 64, seed=seed, batch_size=batch)
    short, _ = drop_blocks(model, [names[i] for i in removed])
    recovered = lora(short, data, rank=8, steps=steps, learning_rate=LORA_RATE, seed=seed, progress=tell)
    pretrained = full(short, data, steps=steps, learning_rate=FULL_RATE, seed=seed, progress=tell)
    networks = {"unretrained": short, "LoRA": recovered, "CPT": pretrained}
    return {how: heldout.mean_loss(network) for how, network in networks.items()}
