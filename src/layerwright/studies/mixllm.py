"""MixLLM (Zheng et al., 2024, arXiv 2412.14590): more bits for the output rows, over all layers, that the loss needs.

3-bit rows with a tenth at 8 bits, and 4-bit rows likewise, in the demo language model with int8 activations.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.allocate.global_rows import RowPlan, global_rows
from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.core.layer import LayerRef, read_matrix
from layerwright.core.layers import structure_copy, treatable
from layerwright.recipes.measure import sample_losses
from layerwright.recipes.mixllm import mixed_layers
from layerwright.score.output_rows import output_row_loss, round_rows, weight_row_error
from layerwright.studies._byte_lm import byte_data, paired_interval
from layerwright.studies._fixtures import demo_language_model
from layerwright.treat.apply import apply_plan

__all__ = ["CLAIM", "run"]

CLAIM = (
    "Choosing the rows that get 8 bits over all layers, by their effect on the loss, brings a low-bit model much closer "
    "to the original than uniform bits, rows chosen layer by layer, by weight error or at random."
)
GROUP = 32
SHARE = 0.1
DRAWS = 2
"""Random choices of rows for each seed."""
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    model, _ = demo_language_model()
    refs = [ref for ref in treatable(model) if ref.layout == "linear" and ref.block is not None]
    length = 96 if quick else 128
    heldout = byte_data("heldout", 8 if quick else 64, length, seed=101)
    original = sample_losses(model, heldout)[0]
    base = math.exp(float(original.mean()))
    low, *others = (2,) if quick else (3, 4)
    table: list[dict[str, Any]] = [{"rows": "original", "perplexity": base}]
    found: dict[str, list[Tensor]] = {}

    def measure(key: str, rows: RowPlan, bits: int, seed: int | None, data: Calibration | None = None) -> None:
        losses = _losses(model, refs, rows, bits, "gptq" if data else "rtn", heldout, data)
        found.setdefault(key, []).append(losses)
        where = {} if seed is None else {"seed": seed}
        table.append({"rows": key, **where, "perplexity": math.exp(float(losses.mean()))})
        tell(key, 1 if seed is None else seed + 1, 1 if seed is None else seeds)

    for bits in (low, *others):
        measure(f"all int{bits}", {}, bits, None)
    shares = {8: SHARE, low: 1 - SHARE}
    measure(
        f"weight int{low} rtn", global_rows(weight_row_error(model, refs, round_rows(low, GROUP)), shares), low, None
    )
    ranks: list[float] = []
    for seed in range(seeds):
        data = byte_data("calibration", 12 if quick else 48, length, seed=seed)
        scores = output_row_loss(model, data, refs, round_rows(low, GROUP)).losses
        chosen = global_rows(scores, shares)
        measure(f"global int{low} rtn", chosen, low, seed)
        measure(f"global int{low} gptq", chosen, low, seed, data)
        measure(f"layer int{low} rtn", global_rows(scores, shares, scope="layer"), low, seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(1 if quick else DRAWS):
            random = {path: torch.rand(len(score), generator=generator) for path, score in scores.items()}
            measure(f"random int{low} rtn", global_rows(random, shares), low, seed)
        for bits in others:
            wider = output_row_loss(model, data, refs, round_rows(bits, GROUP)).losses
            measure(f"global int{bits} rtn", global_rows(wider, {8: SHARE, bits: 1 - SHARE}), bits, seed)
        rank, plain = _rank_correlation(model, refs, data.head(8), 12 if quick else 100, seed)
        ranks.append(rank)
        words = "Spearman of score and loss change of one row"
        table.append({"rows": words, "seed": seed, "each sample": rank, "mean": plain})
        tell(words, seed + 1, seeds)
    mean = {key: statistics.fmean(math.exp(float(a.mean())) - base for a in own) for key, own in found.items()}
    for other in ("layer", "weight", "random"):
        a, b = (torch.stack(found[f"{name} int{low} rtn"]).mean(0) for name in ("global", other))
        least, most = paired_interval(a, b)
        words = f"loss, global minus {other}, int{low} rtn: 95 % interval over windows"
        table.append({"rows": words, "least": least, "most": most})
    pairs = zip(found[f"global int{low} rtn"], found[f"layer int{low} rtn"], strict=True)
    wins = sum(float(a.mean()) < float(b.mean()) for a, b in pairs) / seeds
    best, uniform = mean[f"global int{low} rtn"], mean[f"all int{low}"]
    name = f"perplexity increase, int{low}/int8"
    checks = [
        Check(f"{name}: global tenth against 0.8 x uniform", best, 0.8 * uniform),
        Check(f"{name}: global against layer by layer x 1.02", best, 1.02 * mean[f"layer int{low} rtn"]),
        Check(f"{name}: share of seeds where global is below layer by layer", wins, 2 / 3, ">="),
        Check(f"{name}: by loss against by weight error x 0.97", best, 0.97 * mean[f"weight int{low} rtn"]),
        Check(
            f"{name}: gain of random rows against half of that of the chosen",
            uniform - mean[f"random int{low} rtn"],
            0.5 * (uniform - best),
        ),
        Check(f"{name}: GPTQ with clipping against rounding", mean[f"global int{low} gptq"], best),
        Check("Spearman of score and loss change of single rows", statistics.fmean(ranks), 0.5, ">="),
    ]
    for bits in others:
        text = f"perplexity increase, int{bits}/int8: global tenth against 0.8 x uniform"
        checks.insert(1, Check(text, mean[f"global int{bits} rtn"], 0.8 * mean[f"all int{bits}"]))
    notes = [
        f"demo:lm, 8 blocks; groups of {GROUP}, {'2-bit rows to show an effect on little text, ' if quick else ''}8-bit "
        "activations for each token and group throughout; the rows are chosen on calibration text, perplexity is of "
        f"{heldout.samples} held-out windows of {length} bytes; choosing by weight error needs no text and has one result",
        f"{1 if quick else DRAWS} random choices for each seed, averaged",
        "the loss change of one row is the sum over samples of its size, which is what the score adds up; `mean` in the "
        "table is the size of the mean change",
    ]
    return Evidence("mixllm", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(seeds)), notes)


def _losses(
    model: nn.Module,
    refs: Sequence[LayerRef],
    rows: RowPlan,
    low: int,
    method: str,
    heldout: Calibration,
    data: Calibration | None,
) -> Tensor:
    """Loss of each held-out window with these rows at 8 bits and the others at `low`."""
    everything = {ref.path: {low: torch.arange(ref.shape[0])} for ref in refs}
    plan = mixed_layers({**everything, **rows}, group_size=GROUP, method=method)
    small, _ = apply_plan(model, plan, data)
    return sample_losses(small, heldout)[0]


def _rank_correlation(
    model: nn.Module, refs: Sequence[LayerRef], data: Calibration, count: int, seed: int
) -> tuple[float, float]:
    """Spearman's correlation of the score of rows with the loss change of rounding one: by sample, and of the mean."""
    rounding = round_rows(3, GROUP)
    losses = output_row_loss(model, data, refs, rounding).losses
    generator = torch.Generator().manual_seed(seed)
    places = [(ref, row) for ref in refs for row in range(ref.shape[0])]
    chosen = [places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()]
    before = sample_losses(model, data)[0]
    scores, changes, means = [], [], []
    for ref, row in chosen:
        weight = read_matrix(model, ref)[0]
        changed = weight.clone()
        changed[row] = rounding(weight[row : row + 1])[0]
        copy = structure_copy(model)
        owner: Any = copy.get_submodule(ref.path)
        owner.weight = nn.Parameter(changed, requires_grad=False)
        change = sample_losses(copy, data)[0] - before
        scores.append(float(losses[ref.path][row]))
        changes.append(float(change.abs().sum()))
        means.append(float(change.mean().abs()))
    return _spearman(scores, changes), _spearman(scores, means)


def _spearman(a: Sequence[float], b: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    result: Any = spearmanr(a, b)
    return float(result.statistic)
