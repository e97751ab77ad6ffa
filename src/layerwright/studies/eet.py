"""EET (Li et al., 2021, arXiv 2104.12470): the inference engine against ``transformers.generate``, on a CPU.

A byte-level Llama with random weights continues random prompts; both take turns.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwright.core.evidence import Check, Evidence
from layerwright.studies.sequence import tiny_llama
from layerwright.treat.engine import BufferPool, InferenceModel, compile_inference
from layerwright.treat.engine._counting import Allocations
from layerwright.treat.engine._program import block_trace

__all__ = ["CLAIM", "agreement", "run", "small_llama", "steady_allocations", "times"]

CLAIM = (
    "A decoder compiled for inference gives the tokens of transformers, decodes at least 1.3 times as fast at batch 1, "
    "reads prompts no slower, and keeps all results of a step in half of what those of one block would take apart, "
    "whatever the depth, without allocating any in a step."
)
PROMPT = 128
Progress = Callable[[str, int, int], None]


def small_llama(dim: int, layers: int, heads: int, kv_heads: int, length: int = 256, seed: int = 0) -> Any:
    """A Llama whose random weights make varied text: with a tied head or small ones it would repeat its last token."""
    settings: dict[str, Any] = {"tie_word_embeddings": False, "initializer_range": 0.1}
    return tiny_llama(dim, layers, heads, kv_heads=kv_heads, context=length, seed=seed, **settings).eval()


def _prompts(rows: int, tokens: int, seed: int, *, ragged: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 256, (rows, tokens), generator=generator)
    pads = torch.randint(0, tokens, (rows, 1), generator=generator) * int(ragged)
    mask = (torch.arange(tokens) >= pads).long()
    return ids * mask, mask


def _generated(model: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    found: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return found


def agreement(model: Any, engine: InferenceModel, prompts: int, new: int, seed: int) -> float:
    """Share of prompts whose greedy tokens are those of transformers; padded on the left in batches."""
    ids, mask = _prompts(prompts, 32, seed, ragged=True)
    equal = 0
    for part in torch.arange(prompts).split(engine.max_batch):
        expected = _generated(model, ids[part], mask[part], new)
        equal += int((engine.generate(ids[part], mask[part], new).tokens == expected).all(1).sum())
    return equal / prompts


def times(model: Any, engine: InferenceModel, rows: int, new: int, rounds: int, seed: int) -> dict[str, float]:
    """Milliseconds and ratios of prompt and step, each the median over rounds in which both take turns."""
    ids, mask = _prompts(rows, PROMPT, seed, ragged=False)
    found: dict[str, list[float]] = {name: [] for name in ("theirs", "ours", "prompt", "step")}

    def seconds(run: Callable[[int], object], count: int) -> float:
        begun = time.perf_counter()
        run(count)
        return time.perf_counter() - begun

    def theirs(count: int) -> object:
        return _generated(model, ids, mask, count)

    def ours(count: int) -> object:
        return engine.generate(ids, None, count)

    for number in range(rounds + 1):
        pairs = [(seconds(run, 1), seconds(run, new)) for run in (theirs, ours)]
        if number:  # the first round warms up
            steps = [(whole - prompt) / (new - 1) for prompt, whole in pairs]
            found["theirs"].append(1e3 * steps[0])
            found["ours"].append(1e3 * steps[1])
            found["step"].append(steps[0] / steps[1])
            found["prompt"].append(pairs[0][0] / pairs[1][0])
    return {name: statistics.median(values) for name, values in found.items()}


def steady_allocations(engine: InferenceModel, rows: int) -> tuple[int, int]:
    """Operations of a step, and results of more than 1 kB that it allocates, once it has run before."""
    ids, _ = _prompts(rows, 16, 0, ragged=False)
    engine.prefill(ids)
    for _ in range(2):
        engine.step(ids[:, 0])
    with Allocations(1024) as seen:
        engine.step(ids[:, 0])
    return seen.operations, len(seen.sizes)


def _operations_of(model: Any) -> int:
    """Operations of one step of transformers."""
    ids, _ = _prompts(1, 16, 0, ragged=False)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        with Allocations() as seen:
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    return seen.operations


def _memory(dim: int, heads: int, kv_heads: int, rows: int, length: int) -> dict[str, int]:
    """Bytes of the workspace at two depths, of the results apart, and of EET's pool."""
    engines = [
        compile_inference(small_llama(dim, layers, heads, kv_heads, length), rows, length, layout="plain")
        for layers in (1, 3)
    ]
    reports = [engine.memory_report() for engine in engines]
    trace = block_trace(engines[0].decoder, engines[0].decoder.blocks[0], engines[0].cache, rows)
    return {
        "workspace": reports[0]["workspace"],
        "deeper": reports[1]["workspace"],
        "apart": reports[0]["workspace_without_reuse"],
        "pool": BufferPool.size_for(trace),
        "floor": max(
            sum(i.size for i in trace if i.first <= t <= i.last) for t in range(max(i.last for i in trace) + 1)
        ),
    }


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    forms = [(256, 2, 8, 2)] if quick else [(256, 8, 8, 2), (768, 6, 12, 4)]
    prompts, new, rounds, length = (8, 12, 2, 160) if quick else (64, 24, 3, 256)
    table: list[dict[str, Any]] = []
    checks: list[Check] = []
    for dim, layers, heads, kv_heads in forms:
        model = small_llama(dim, layers, heads, kv_heads, length)
        memory = _memory(dim, heads, kv_heads, 8, length)
        for kind in (torch.float32, torch.bfloat16):
            ours = copy.deepcopy(model).to(kind)
            for rows in (1,) if quick else (1, 8):
                engine = compile_inference(ours, rows, length)
                speeds = [
                    times(ours, engine, rows, new, rounds, seed) for seed in range(1 if quick or dim > 256 else seeds)
                ]
                row = {name: statistics.median(speed[name] for speed in speeds) for name in speeds[0]}
                table.append(_row(dim, layers, kind, rows, row))
                tell(f"width {dim}", len(table), 4 * len(forms))
                if dim == 256 and kind == torch.float32 and rows == 1:
                    checks += [
                        Check(
                            "decoding at batch 1 against transformers, width 256, float32 (times as fast)",
                            row["step"],
                            1.3,
                            ">=",
                        ),
                        Check(
                            "reading a prompt of 128 tokens against transformers (times as fast)",
                            row["prompt"],
                            1.0,
                            ">=",
                        ),
                    ]
        if dim == 256:
            plain = compile_inference(model, 8, length, layout="plain")
            share = agreement(model, compile_inference(model, 8, length), prompts, new, seed=100)
            operations, allocations = steady_allocations(plain, 1)
            table.append({"model": f"width {dim}", "operations": operations, "theirs": _operations_of(model)})
            checks += [
                Check(
                    "prompts whose greedy tokens are those of transformers, float32, ragged batches", share, 1.0, ">="
                ),
                Check("results above 1 kB that a step allocates, plain layout, float32", allocations, 0),
                Check("workspace against all results of one block apart", memory["workspace"] / memory["apart"], 0.5),
                Check("workspace of three blocks less that of one (bytes)", memory["deeper"] - memory["workspace"], 0),
            ]
        table.append({"model": f"width {dim}", **{f"{name} bytes": size for name, size in memory.items()}})
    notes = [
        f"random weights, prompt {PROMPT}, {new} new tokens, {torch.get_num_threads()} thread(s), medians of {rounds} rounds in turn and of the seeds",
        "a seed draws prompts; the wider model has one seed, since time hangs on no values",
        "the workspace is that of 8 rows and room for "
        f"{length} keys; scores grow with the keys, so that with many more of them they are most of it",
        "the packed layout, which is faster in bfloat16 and for several rows, lets each product allocate its result",
        "in bfloat16 tokens may differ from transformers', whose rounding differs; tests hold both against float32",
    ]
    return Evidence(
        "eet", CLAIM, table, checks, time.perf_counter() - begun, tuple(range(1 if quick else seeds)), notes
    )


def _row(dim: int, layers: int, kind: torch.dtype, rows: int, row: dict[str, float]) -> dict[str, Any]:
    return {
        "model": f"width {dim}, {layers} blocks",
        "dtype": str(kind).removeprefix("torch."),
        "batch": rows,
        "transformers ms/step": row["theirs"],
        "engine ms/step": row["ours"],
        "step, times as fast": row["step"],
        "prompt, times as fast": row["prompt"],
        "engine tokens/s": 1e3 * rows / row["ours"],
    }
