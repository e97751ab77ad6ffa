"""MixLLM (Zheng et al., 2024, arXiv 2412.14590): more bits for the output rows, over all layers, that the loss needs.

3-bit rows with a tenth at 8 bits, and 4-bit rows likewise, in a small byte language model with int8 activations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.allocate.global_rows import RowPlan, global_rows
from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.core.layer import LayerRef, read_matrix
from layerwright.core.layers import structure_copy, treatable
from layerwright.recipes.mixllm import mixed_layers
from layerwright.score.output_rows import output_row_loss, round_rows, weight_row_error
from layerwright.studies._byte_lm import byte_data, perplexity, train_byte_lm
from layerwright.studies._fixtures import demo_language_model
from layerwright.treat.apply import apply_plan

__all__ = ["CLAIM", "run"]

CLAIM = (
    "Choosing the rows that get 8 bits over all layers, by their effect on the loss, brings a low-bit model much closer "
    "to the original than uniform bits, rows chosen layer by layer, by weight error or at random."
)
GROUP = 32
SHARE = 0.1
STEPS = 900
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    if quick:
        model, _ = demo_language_model()
    else:
        model = train_byte_lm(STEPS, progress=lambda a, b: tell("training", a, b))
    refs = [ref for ref in treatable(model) if ref.layout == "linear" and ref.block is not None]
    heldout = byte_data("heldout", 8 if quick else 96, 96 if quick else 128, seed=101)
    base = perplexity(model, heldout)
    widths = (2,) if quick else (3, 4)
    table: list[dict[str, Any]] = [{"rows": "original", "perplexity": base}]
    uniform = {low: _increase(model, refs, {}, low, "rtn", heldout, base) for low in widths}
    table += [{"rows": f"all int{low}", "perplexity": base + found} for low, found in uniform.items()]
    found: dict[str, list[float]] = {}
    ranks: list[float] = []
    plain: list[float] = []
    for seed in range(seeds):
        data = byte_data("calibration", 12 if quick else 48, 96 if quick else 128, seed=seed)
        for low in widths:
            plans = _plans(model, refs, data, low, seed)
            for name, rows in plans.items():
                for method in ("rtn", "gptq") if name == "global" else ("rtn",):
                    key = f"{name} int{low} {method}"
                    more = _increase(model, refs, rows, low, method, heldout, base, data)
                    found.setdefault(key, []).append(more)
                    table.append({"rows": key, "seed": seed, "perplexity": base + more})
                    tell(key, seed + 1, seeds)
        a, b = _rank_correlation(model, refs, data.head(8 if quick else 24), 12 if quick else 100, seed)
        ranks.append(a)
        plain.append(b)
        table.append(
            {"rows": "Spearman of score and loss change of one row", "seed": seed, "each sample": a, "mean": b}
        )
    mean = {key: statistics.fmean(values) for key, values in found.items()}
    low = widths[0]
    best, layered = found[f"global int{low} rtn"], found[f"layer int{low} rtn"]
    wins = sum(a < b for a, b in zip(best, layered, strict=True)) / len(best)
    gain = uniform[low] - mean[f"global int{low} rtn"]
    chance = uniform[low] - mean[f"random int{low} rtn"]
    name = f"perplexity increase, int{low}/int8"
    checks = [
        Check(f"{name}: global tenth against 0.8 x uniform", mean[f"global int{low} rtn"], 0.8 * uniform[low]),
        Check(
            f"{name}: global against layer by layer x 1.02", statistics.fmean(best), 1.02 * statistics.fmean(layered)
        ),
        Check(f"{name}: share of seeds where global is below layer by layer", wins, 2 / 3, ">="),
        Check(
            f"{name}: by loss against by weight error x 0.97",
            statistics.fmean(best),
            0.97 * mean[f"weight int{low} rtn"],
        ),
        Check(f"{name}: gain of random rows against half of that of the chosen", chance, 0.5 * gain),
        Check(f"{name}: GPTQ with clipping against rounding", mean[f"global int{low} gptq"], statistics.fmean(best)),
        Check("Spearman of score and loss change of single rows", statistics.fmean(ranks), 0.5, ">="),
    ]
    if 4 in widths:
        text = "perplexity increase, int4/int8: global tenth against 0.8 x uniform"
        checks.insert(1, Check(text, mean["global int4 rtn"], 0.8 * uniform[4]))
    notes = [
        f"{'demo:lm, 8 blocks' if quick else f'a byte model of 4 blocks trained for {STEPS} steps'}; groups of {GROUP}, "
        f"{'2-bit rows, since demo:lm hardly loses at 3; ' if quick else ''}8-bit activations for each token and group throughout; the rows are chosen on calibration text, perplexity is "
        "of held-out text",
        "the loss change of one row is the sum over samples of its size, which is what the score adds up; `mean` in the "
        "table is the size of the mean change",
    ]
    return Evidence("mixllm", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(seeds)), notes)


def _plans(model: nn.Module, refs: Sequence[LayerRef], data: Calibration, low: int, seed: int) -> dict[str, RowPlan]:
    """The rows that each criterion gives 8 bits."""
    rounding = round_rows(low, GROUP)
    losses = output_row_loss(model, data, refs, rounding).losses
    errors = weight_row_error(model, refs, rounding)
    generator = torch.Generator().manual_seed(seed)
    random = {path: torch.rand(len(loss), generator=generator) for path, loss in losses.items()}
    shares = {8: SHARE, low: 1 - SHARE}
    return {
        "global": global_rows(losses, shares),
        "layer": global_rows(losses, shares, scope="layer"),
        "weight": global_rows(errors, shares),
        "random": global_rows(random, shares),
    }


def _increase(
    model: nn.Module,
    refs: Sequence[LayerRef],
    rows: RowPlan,
    low: int,
    method: str,
    heldout: Calibration,
    base: float,
    data: Calibration | None = None,
) -> float:
    """How much perplexity rises with these rows at 8 bits and the others at `low`."""
    everything = {ref.path: {low: torch.arange(ref.shape[0])} for ref in refs}
    plan = mixed_layers({**everything, **rows}, group_size=GROUP, method=method)
    small, _ = apply_plan(model, plan, data)
    return perplexity(small, heldout) - base


def _rank_correlation(
    model: nn.Module, refs: Sequence[LayerRef], data: Calibration, count: int, seed: int
) -> tuple[float, float]:
    """Spearman's correlation of the score of rows with the loss change of rounding one: by sample, and of the mean."""
    rounding = round_rows(3, GROUP)
    losses = output_row_loss(model, data, refs, rounding).losses
    generator = torch.Generator().manual_seed(seed)
    places = [(ref, row) for ref in refs for row in range(ref.shape[0])]
    chosen = [places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()]
    before = _sample_losses(model, data)
    scores, changes, means = [], [], []
    for ref, row in chosen:
        weight = read_matrix(model, ref)[0]
        changed = weight.clone()
        changed[row] = rounding(weight[row : row + 1])[0]
        copy = structure_copy(model)
        owner: Any = copy.get_submodule(ref.path)
        owner.weight = nn.Parameter(changed, requires_grad=False)
        change = _sample_losses(copy, data) - before
        scores.append(float(losses[ref.path][row]))
        changes.append(float(change.abs().sum()))
        means.append(float(change.mean().abs()))
    return _spearman(scores, changes), _spearman(scores, means)


@torch.no_grad()
def _sample_losses(model: nn.Module, data: Calibration) -> Tensor:
    """Mean next-byte loss of every sample, float64."""
    found = []
    for batch in data:
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
        found.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1))
    return torch.cat(found)


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    result: Any = spearmanr(a, b)
    return float(result.statistic)
