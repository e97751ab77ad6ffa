"""Fewer blocks and adapters for a sequence-to-sequence model (Zhu et al., 2023, arXiv 2305.08285).

A small BART-like model learns generated reports by denoising, and is then adapted in several ways to write summaries.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from layerwright.allocate.interleaved import interleaved_keep
from layerwright.core.evidence import Check, Evidence
from layerwright.studies._reports import VOCABULARY, denoising, summaries, summary_f1
from layerwright.treat.drop import keep_blocks
from layerwright.tune.full import full
from layerwright.tune.lora import attach_lora, lora
from layerwright.tune.prune_then_lora import StepCost, step_cost

__all__ = ["CLAIM", "report_model", "run"]

CLAIM = (
    "Removing every second middle block of both stacks before adapters on the feed-forward layers are trained keeps nine "
    "tenths of the quality of adapters on all blocks, and takes less time and memory."
)
LAYERS = 6
RANK = 4
"""16 in the paper, at widths 16 times as large: more than 4 would be more than a twentieth of this model."""
ALPHA = 8.0
RATE = 3e-3
FULL_RATE = 1e-3
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    model = report_model(30 if quick else 900)
    kept = interleaved_keep(LAYERS)
    first = list(range(len(kept)))
    shorter, _ = keep_blocks(model, {"encoder": kept, "decoder": kept})
    headless, _ = keep_blocks(model, {"encoder": first, "decoder": first})
    arms: dict[str, tuple[nn.Module, str]] = {
        "all blocks, LoRA on feed-forward": (model, "ff"),
        "every second kept, LoRA on feed-forward": (shorter, "ff"),
        "last ones dropped, LoRA on feed-forward": (headless, "ff"),
        "every second kept, LoRA on query and value": (shorter, "attention"),
    }
    steps = 6 if quick else 200
    scores: dict[str, list[float]] = {name: [] for name in (*arms, "full fine-tuning", "every second kept, not tuned")}
    table: list[dict[str, Any]] = []
    for seed in range(seeds):
        data = summaries(16 * steps, seed=100 + seed)
        tuned = {
            name: lora(start, data, rank=RANK, alpha=ALPHA, dropout=0.1, targets=targets, **_settings(steps, seed))
            for name, (start, targets) in arms.items()
        }
        tuned["full fine-tuning"] = full(model, data, steps=steps, learning_rate=FULL_RATE, seed=seed)
        tuned["every second kept, not tuned"] = shorter
        for name, network in tuned.items():
            scores[name].append(summary_f1(network.eval(), 20 if quick else 200, seed=10_000 + seed))
            table.append({"seed": seed, "model": name, "token F1": scores[name][-1]})
        tell("adapting", seed + 1, seeds)
    whole, short, ratio = _costs(model, shorter, repeats=2 if quick else 8)
    for name, cost in (("all blocks", whole), ("every second kept", short)):
        row = {"model": f"a step of LoRA, {name}", "saved MB": cost.saved_bytes / 1e6, "trained share": cost.share}
        table.append({**row, "ms": cost.seconds * 1e3})
    mean = {name: statistics.fmean(values) for name, values in scores.items()}
    everything, pruned, last, _ = (mean[name] for name in arms)
    formula = sum(
        RANK * sum(module.weight.shape) for path, module in shorter.named_modules() if path.endswith((".fc1", ".fc2"))
    )
    checks = (
        Check("trained share of the parameters", short.share, 0.05),
        Check(
            "trained parameters less (in + out) x rank of the feed-forward layers", abs(short.trainable - formula), 0.0
        ),
        Check("F1, every second kept over all blocks", pruned / max(everything, 1e-9), 0.9, ">="),
        Check("F1, every second kept less the last ones dropped", pruned - last, -0.01, ">="),
        Check("F1, tuned less not tuned", pruned - mean["every second kept, not tuned"], 0.2, ">="),
        Check("time of a step over that with all blocks", ratio, 0.85),
        Check("saved activations over those with all blocks", short.saved_bytes / whole.saved_bytes, 0.87),
    )
    notes = [
        f"6 + 6 blocks of width 64 with norms before their parts, denoised generated reports first; {steps} steps of 16",
        f"blocks {kept} of each stack are kept; LoRA of rank {RANK}, alpha {ALPHA:g}, dropout 0.1, rate {RATE:g} (1e-4 in the "
        f"paper, for ten epochs); full fine-tuning at {FULL_RATE:g}",
        "times are medians of steps that took turns",
    ]
    return Evidence("lora-layer-pruning", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(seeds)), notes)


def _settings(steps: int, seed: int) -> dict[str, Any]:
    return {"steps": steps, "learning_rate": RATE, "weight_decay": 0.01, "seed": seed}


@cache
def report_model(steps: int, seed: int = 0) -> nn.Module:
    """A small BART with norms before its parts (mBART) that learned to denoise reports, in evaluation mode."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    config = MBartConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MBartForConditionalGeneration(config)
    data = denoising(16 * steps, seed=seed)
    return full(model, data, steps=steps, learning_rate=1.5e-3, weight_decay=0.01, warmup=0.1, seed=seed).eval()


def _costs(model: nn.Module, shorter: nn.Module, repeats: int) -> tuple[StepCost, StepCost, float]:
    """Cost of a step of both, and the ratio of their times: the median over rounds in which they take turns."""
    data = summaries(16, seed=1)
    settings: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "targets": "ff"}
    adapted = [attach_lora(copy.deepcopy(network), **settings).model for network in (model, shorter)]
    rounds = [[step_cost(network, data, repeats=1) for network in adapted] for _ in range(repeats)]
    ratio = statistics.median(short.seconds / whole.seconds for whole, short in rounds)
    return rounds[-1][0], rounds[-1][1], ratio
