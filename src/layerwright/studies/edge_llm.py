"""EDGE-LLM (Yu et al., 2024, arXiv 2406.15758): unequal compression, tuning a window at a time, and voting.

A byte-level language model of six blocks learns Python's standard library for a minute, is compressed by the two rules
and adapted to another kind of text, window by window and as a whole.
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
from layerwright.data.demo.train_lm import byte_stream
from layerwright.nn.exits import ExitModel
from layerwright.recipes.luc import caching_attention, luc_layers
from layerwright.score.compression_probes import PROBES, ProbeTable, compression_sensitivity
from layerwright.studies._byte_lm import byte_data, small_byte_model
from layerwright.treat.apply import apply_plan
from layerwright.treat.exits import add_exits
from layerwright.treat.probe import treat_weights
from layerwright.tune.vote import fit_temperatures, vote
from layerwright.tune.window import WindowTuner

__all__ = ["CLAIM", "compress", "exit_losses", "run", "spread_compression", "topic_windows", "uniform_compression"]

CLAIM = (
    "A model whose layers are compressed by their sensitivity adapts with the activations of two blocks at a time in "
    "less time and nearly as well as when all of it is tuned, and its exits vote at least as well as they answer alone."
)
WINDOW = 2
EXITS = (5, 6)
SPARSITY = 0.5
RATE = 1e-2
BATCH, LENGTH = 8, 64
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
    spread: float
    relative: float
    relative_uniform: float


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    model = small_byte_model(40 if quick else 600)
    found = [_one_seed(model, seed, quick, tell) for seed in range(seeds)]

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
        f"6 blocks of width 128, exits after 5 and 6, window {WINDOW}; adapted to the reference text that ships with "
        f"pydoc for {_steps(quick)} steps of {BATCH} x {LENGTH} bytes, LoRA of rank 8 and heads, learning rate {RATE:g}",
        "4 or 8 bits for weights, activations, keys and values of a block, SparseGPT at half zeros on average",
        "uniform: half zeros everywhere, and widths between 4 and 8 bits, spread over the blocks, of the same mean",
        "adapted: the last exit after phases; the vote is the largest probability of all exits, renormalised",
        "times are of steps that took turns with full tuning, over a round of all exits",
        f"widths of 4 and 8 bits only, spread over the blocks, instead of those between: calibration loss "
        f"{mean(lambda o: o.spread):.4g}",
        f"sensitivities relative to the energy of a block's output, instead of the paper's: calibration loss "
        f"{mean(lambda o: o.relative):.4g} against {mean(lambda o: o.relative_uniform):.4g} uniform at its mean width",
        f"the vote with a temperature for each exit, fitted on training text: perplexity {perplexity('vote, calibrated'):.4g}",
    ]
    table = [row for outcome in found for row in outcome.rows]
    return Evidence("edge-llm", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(seeds)), notes)


def _steps(quick: bool) -> int:
    return 12 if quick else 360


def _one_seed(model: nn.Module, seed: int, quick: bool, tell: Progress) -> _Outcome:
    data = byte_data("calibration", 8 if quick else 16, 64 if quick else 128, seed=seed)
    probes = {"prune": (0.5,) if quick else PROBES["prune"], "bits": (4, 8)}
    table = compression_sensitivity(model, data.head(4 if quick else 8), treat_weights, probes=probes)
    by_rules, by_uniform, by_spread, compressed, bits = _against_uniform(model, data, table)
    relative, relative_uniform, relative_spread, _, relative_bits = _against_uniform(model, data, table.relative())
    tell("compressing", seed + 1, seed + 1)
    steps = _steps(quick)
    batches = topic_windows("train", BATCH * steps, seed)
    heldout = topic_windows("heldout", 8 if quick else 64, 1000 + seed)
    windows = WindowTuner(add_exits(compressed, positions=EXITS), window=WINDOW, learning_rate=RATE, seed=seed)
    whole = WindowTuner(add_exits(compressed, positions=EXITS[-1:]), learning_rate=RATE, seed=seed)
    tuned = windows.fit(batches, steps, progress=tell)
    full = whole.fit(batches, steps, progress=tell)
    temperatures = _temperatures(tuned.model, topic_windows("train", 8 if quick else 32, 2000 + seed))
    losses = {
        "compressed": heldout.mean_loss(compressed),
        "full": exit_losses(full.model, heldout)["vote"],
        **exit_losses(tuned.model, heldout),
        "vote, calibrated": exit_losses(tuned.model, heldout, temperatures)["vote"],
    }
    rows: list[dict[str, Any]] = [
        {"seed": seed, "model": name, "perplexity": math.exp(loss)} for name, loss in losses.items()
    ]
    rows += [
        {"seed": seed, "model": f"calibration, {name}", "nats/byte": loss, "bits": width}
        for name, loss, width in (
            ("by the rules", by_rules, bits),
            ("uniform", by_uniform, bits),
            ("4 and 8 bits spread evenly", by_spread, bits),
            ("by the rules, relative", relative, relative_bits),
            ("uniform, relative", relative_uniform, relative_bits),
            ("4 and 8 bits spread evenly, relative", relative_spread, relative_bits),
        )
    ]
    saved = tuned.peak_saved_bytes / full.peak_saved_bytes
    ratio = _time_ratio(windows, whole, batches, 1 if quick else 3)
    rows.append({"seed": seed, "model": "window step over full step", "saved bytes": saved, "time": ratio})
    return _Outcome(losses, rows, saved, ratio, by_rules, by_uniform, by_spread, relative, relative_uniform)


def _against_uniform(
    model: nn.Module, data: Calibration, table: ProbeTable
) -> tuple[float, float, float, nn.Module, float]:
    """Calibration losses by the rules, uniform and spread, the model by the rules, and the mean width of all."""
    chosen = luc(table.prune_sensitivity, table.bits_sensitivity, sparsity=SPARSITY)
    compressed = compress(model, chosen, data)
    uniform = compress(model, uniform_compression(chosen), data)
    spread = compress(model, spread_compression(chosen), data)
    bits = statistics.fmean(own.bits for own in chosen.values())
    return data.mean_loss(compressed), data.mean_loss(uniform), data.mean_loss(spread), compressed, bits


def compress(model: nn.Module, chosen: Mapping[str, LayerCompression], data: Calibration) -> nn.Module:
    """A copy of `model` with weights, activations, keys and values as `chosen` says, computed in floating point."""
    layers = luc_layers(chosen, treatable(model), attention=caching_attention(model))
    result, _ = apply_plan(model, layers, data, simulate=True)
    return result


def spread_compression(chosen: Mapping[str, LayerCompression]) -> dict[str, LayerCompression]:
    """The same mean sparsity in every block, and the widths of `chosen` as often, but spread evenly over the blocks."""
    count, low = len(chosen), min(own.bits for own in chosen.values())
    high = max(own.bits for own in chosen.values())
    wide = sum(own.bits > low for own in chosen.values())
    mean = math.fsum(own.sparsity for own in chosen.values()) / count
    more = [wide * (place + 1) // count > wide * place // count for place in range(count)]
    return {path: LayerCompression(high if m else low, mean) for path, m in zip(chosen, more, strict=True)}


def uniform_compression(chosen: Mapping[str, LayerCompression]) -> dict[str, LayerCompression]:
    """The same mean sparsity in every block, and the two widths next to the mean, spread evenly over the blocks."""
    total, count = sum(own.bits for own in chosen.values()), len(chosen)
    mean = math.fsum(own.sparsity for own in chosen.values()) / count
    ends = [total * place // count for place in range(count + 1)]
    return {path: LayerCompression(ends[i + 1] - ends[i], mean) for i, path in enumerate(chosen)}


@torch.no_grad()
def exit_losses(model: ExitModel, data: Calibration, temperatures: Tensor | None = None) -> dict[str, float]:
    """Mean next-token cross entropy in nats of every exit (``exit 2``, ...) and of their vote at `temperatures`."""
    sums: dict[str, float] = dict.fromkeys((*(f"exit {place}" for place in model.positions), "vote"), 0.0)
    count = 0
    for batch in data:
        ids: Tensor = batch["input_ids"]
        answers = ids[:, 1:].flatten()
        logits = model.all_exits(ids)[:, :, :-1].flatten(1, 2).float()
        for place, own in zip(model.positions, logits, strict=True):
            sums[f"exit {place}"] += float(F.cross_entropy(own, answers, reduction="sum"))
        sums["vote"] += float(F.nll_loss(vote(logits, temperatures=temperatures).log(), answers, reduction="sum"))
        count += answers.numel()
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def _temperatures(model: ExitModel, data: Calibration) -> Tensor:
    logits = torch.cat([model.all_exits(batch["input_ids"])[:, :, :-1].flatten(1, 2) for batch in data], 1)
    return fit_temperatures(logits, torch.cat([batch["input_ids"][:, 1:].flatten() for batch in data]))


def topic_windows(part: str, samples: int, seed: int) -> Calibration:
    """Windows of the reference text that Python ships for pydoc; every tenth topic is held out."""
    from pydoc_data.topics import topics

    chosen = [topics[name] for i, name in enumerate(sorted(topics)) if (i % 10 == 0) == (part == "heldout")]
    ids = byte_stream(chosen)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - LENGTH + 1, (samples,), generator=generator)
    rows = ids[starts[:, None] + torch.arange(LENGTH)]
    batches = [{"input_ids": r, "labels": r} for r in rows.split(BATCH)]
    return Calibration(batches, name=f"topics {part}", unit="nats/token")


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
