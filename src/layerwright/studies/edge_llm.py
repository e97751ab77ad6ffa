"""EDGE-LLM (Yu et al., 2024, arXiv 2406.15758): unequal compression, tuning a window at a time, and voting.

The demo language model is compressed by the two rules and adapted to another kind of text, window by window and as a
whole.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.allocate.luc import LayerCompression, luc
from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.core.layers import treatable
from layerwright.nn.exits import ExitModel
from layerwright.nn.rounded_cache import round_cache_
from layerwright.recipes.luc import luc_layers
from layerwright.score.compression_probes import compression_sensitivity
from layerwright.studies._fixtures import byte_windows, demo_language_model
from layerwright.treat.apply import apply_plan
from layerwright.treat.exits import add_exits
from layerwright.treat.probe import treat_weights
from layerwright.tune.vote import vote
from layerwright.tune.window import WindowTuner

__all__ = ["CLAIM", "compress", "exit_losses", "run", "topic_windows", "uniform_compression"]

CLAIM = (
    "A model whose layers are compressed by their sensitivity adapts with the activations of two blocks at a time in "
    "less time and nearly as well as when all of it is tuned, and its exits vote at least as well as they answer alone."
)
WINDOW = 2
EXITS = (4, 6, 8)
SPARSITY = 0.5
RATE = 1e-2
LENGTH = 64
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Outcome:
    """What one seed gave."""

    losses: Mapping[str, float]
    rows: list[dict[str, Any]]
    saved_ratio: float
    time_ratio: float
    luc: float
    uniform: float


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    model, tokenizer = demo_language_model()
    found = [_one_seed(model, tokenizer, seed, quick, tell) for seed in range(seeds)]

    def mean(of: Callable[[_Outcome], float]) -> float:
        return statistics.fmean(of(outcome) for outcome in found)

    def perplexity(name: str) -> float:
        return math.exp(mean(lambda outcome: outcome.losses[name]))

    exits = [name for name in found[0].losses if name.startswith("exit ")]
    best = min(perplexity(name) for name in exits)
    checks = (
        Check("saved bytes of a window step over full tuning", max(o.saved_ratio for o in found), 0.45),
        Check("time of a window step over full tuning", mean(lambda o: o.time_ratio), 0.7),
        Check("perplexity adapted over compressed", perplexity(exits[-1]) / perplexity("compressed"), 0.9),
        Check("perplexity by windows over full tuning", perplexity(exits[-1]) / perplexity("full"), 1.15),
        Check("perplexity of the vote over the best exit", perplexity("vote") / best, 1.02),
        Check("perplexity of the vote over the last exit", perplexity("vote") / perplexity(exits[-1]), 1.0),
        Check("calibration loss, by the rules against uniform", mean(lambda o: o.luc), mean(lambda o: o.uniform)),
    )
    notes = [
        f"demo:lm, 8 blocks, exits after 4, 6 and 8, window {WINDOW}; adapted to the reference text that ships with "
        f"pydoc for {_steps(quick)} steps of 8 x {LENGTH} bytes, LoRA of rank 8 and heads, learning rate {RATE:g}",
        "4 or 8 bits for weights, activations, keys and values of a block, SparseGPT at half zeros on average",
        "uniform: half zeros everywhere, and widths between 4 and 8 bits, spread over the blocks, of the same mean",
        "adapted: the last exit after phases; the vote is the largest probability of all exits, renormalised",
        "times are of steps that took turns with full tuning, over a round of all exits",
    ]
    table = [row for outcome in found for row in outcome.rows]
    return Evidence("edge-llm", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(seeds)), notes)


def _steps(quick: bool) -> int:
    return 6 if quick else 200


def _one_seed(model: nn.Module, tokenizer: Any, seed: int, quick: bool, tell: Progress) -> _Outcome:
    samples = 8 if quick else 16
    data = byte_windows("calibration", tokenizer, samples, 64 if quick else 128, seed=seed)
    shares = (0.5,) if quick else (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    table = compression_sensitivity(
        model, data.head(4 if quick else 8), treat_weights, probes={"prune": shares, "bits": (4, 8)}
    )
    chosen = luc(table.prune_sensitivity, table.bits_sensitivity, sparsity=SPARSITY)
    compressed = compress(model, chosen, data)
    uniform = compress(model, uniform_compression(chosen), data)
    by_rules, by_uniform = data.mean_loss(compressed), data.mean_loss(uniform)
    tell("compressing", seed + 1, seed + 1)
    steps = _steps(quick)
    batches = topic_windows("train", tokenizer, 8 * steps, seed)
    heldout = topic_windows("heldout", tokenizer, 8 if quick else 64, 1000 + seed)
    windows = WindowTuner(add_exits(compressed, positions=EXITS), window=WINDOW, learning_rate=RATE, seed=seed)
    whole = WindowTuner(add_exits(compressed, positions=[len(table.prune)]), learning_rate=RATE, seed=seed)
    tuned = windows.fit(batches, steps, progress=tell)
    full = whole.fit(batches, steps, progress=tell)
    losses = {
        "compressed": heldout.mean_loss(compressed),
        "full": exit_losses(full.model, heldout)["vote"],
        **exit_losses(tuned.model, heldout),
    }
    rows: list[dict[str, Any]] = [
        {"seed": seed, "model": name, "perplexity": math.exp(loss)} for name, loss in losses.items()
    ]
    bits = statistics.fmean(own.bits for own in chosen.values())
    rows += [
        {"seed": seed, "model": "calibration, by the rules", "nats/byte": by_rules, "bits": bits},
        {"seed": seed, "model": "calibration, uniform", "nats/byte": by_uniform, "bits": bits},
    ]
    saved = tuned.peak_saved_bytes / full.peak_saved_bytes
    ratio = _time_ratio(windows, whole, batches, 1 if quick else 3)
    rows.append({"seed": seed, "model": "window step over full step", "saved bytes": saved, "time": ratio})
    return _Outcome(losses, rows, saved, ratio, by_rules, by_uniform)


def compress(model: nn.Module, chosen: Mapping[str, LayerCompression], data: Calibration) -> nn.Module:
    """A copy of `model` with weights, activations, keys and values as `chosen` says, computed in floating point."""
    layers = luc_layers(chosen, treatable(model))
    result, _ = apply_plan(model, layers, data, simulate=True)
    round_cache_(result, {path: own.bits for path, own in chosen.items()})
    return result


def uniform_compression(chosen: Mapping[str, LayerCompression]) -> dict[str, LayerCompression]:
    """The same mean sparsity in every block, and the two widths next to the mean, spread evenly over the blocks."""
    total, count = sum(own.bits for own in chosen.values()), len(chosen)
    mean = math.fsum(own.sparsity for own in chosen.values()) / count
    ends = [total * place // count for place in range(count + 1)]
    return {path: LayerCompression(ends[i + 1] - ends[i], mean) for i, path in enumerate(chosen)}


@torch.no_grad()
def exit_losses(model: ExitModel, data: Calibration) -> dict[str, float]:
    """Mean next-token cross entropy in nats of every exit (``exit 2``, ...) and of their vote."""
    sums: dict[str, float] = dict.fromkeys((*(f"exit {place}" for place in model.positions), "vote"), 0.0)
    count = 0
    for batch in data:
        ids: Tensor = batch["input_ids"]
        answers = ids[:, 1:].flatten()
        logits = model.all_exits(ids)[:, :, :-1].flatten(1, 2).float()
        for place, own in zip(model.positions, logits, strict=True):
            sums[f"exit {place}"] += float(F.cross_entropy(own, answers, reduction="sum"))
        sums["vote"] += float(F.nll_loss(vote(logits).log(), answers, reduction="sum"))
        count += answers.numel()
    return {name: total / count for name, total in sums.items()}


def topic_windows(part: str, tokenizer: Any, samples: int, seed: int) -> Calibration:
    """Windows of the reference text that Python ships for pydoc; every tenth topic is held out."""
    from pydoc_data.topics import topics

    chosen = [topics[name] for i, name in enumerate(sorted(topics)) if (i % 10 == 0) == (part == "heldout")]
    ids = torch.tensor(tokenizer("\n".join(chosen), add_special_tokens=False, verbose=False)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - LENGTH + 1, (samples,), generator=generator)
    rows = ids[starts[:, None] + torch.arange(LENGTH)]
    return Calibration([{"input_ids": r, "labels": r} for r in rows.split(8)], name=f"topics {part}", unit="nats/token")


def _time_ratio(windows: WindowTuner, whole: WindowTuner, batches: Calibration, rounds: int) -> float:
    """Time of a step, averaged over the exits, against one of full tuning: the median of rounds that take turns."""
    few: Sequence[Any] = list(batches)[:2]
    ratios = []
    for _ in range(rounds):
        mine, all_of_it = windows.fit(few, 2 * len(windows.exits)), whole.fit(few, 3)
        # The first step at an exit also makes its optimizer.
        parts = [min(s for s, e in zip(mine.seconds, mine.exits, strict=True) if e == x) for x in windows.exits]
        ratios.append(statistics.fmean(parts) / min(all_of_it.seconds))
    return statistics.median(ratios)
