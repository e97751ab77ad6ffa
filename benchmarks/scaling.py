"""How time and memory of whole recipes grow with depth: ``python -m benchmarks.scaling [--blocks 6 12 24]``.

A random Llama of each depth, planned and carried out by each recipe in a process of its own. Time should grow with the
number of blocks (exponent 1 of a fit through the logarithms), and peak memory by what the model itself grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

RECIPES = {"mixed": "bits=3", "mixllm": "bits=4.4", "fptq": "bits=4.5"}
"""Recipe to budget."""


def random_llama(blocks: int, hidden: int) -> nn.Module:
    """A Llama with random weights and a small vocabulary."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


def run(name: str, blocks: int, hidden: int, samples: int, tokens: int) -> dict[str, float]:
    """Plan and apply one recipe in this process: CPU seconds, bytes of the model, growth of the resident size."""
    from layerwright.core.calibration import Calibration
    from layerwright.core.layers import parameter_bytes
    from layerwright.core.memory import peak_memory_bytes
    from layerwright.recipes.bench import Bench
    from layerwright.recipes.book import recipe
    from layerwright.recipes.job import decide
    from layerwright.treat.apply import apply_plan

    chosen = dataclasses.replace(recipe(name), score_samples=samples)
    if "group_size" in chosen.decider_settings:  # one that divides the inputs of all layers
        settings = {**chosen.decider_settings, "group_size": math.gcd(128, hidden)}
        chosen = dataclasses.replace(chosen, decider_settings=settings, group_size=math.gcd(128, hidden))
    ids = torch.randint(256, (samples, tokens), generator=torch.Generator().manual_seed(0))
    data = Calibration([{"input_ids": part, "labels": part.clone()} for part in ids.split(4)])
    warm, model = random_llama(2, hidden), random_llama(blocks, hidden)
    for network in (warm, model):
        bench = Bench(network, None, data, data, "random")
        before, begun = peak_memory_bytes(), time.process_time()
        decision = decide(bench, RECIPES[name], chosen)
        apply_plan(network, decision.plan, data)
        seconds = time.process_time() - begun
    grown = peak_memory_bytes() - before
    return {"seconds": seconds, "model": float(parameter_bytes(model)), "grown": float(grown)}


def exponent(blocks: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line through ``(log blocks, log values)``."""
    return statistics.linear_regression([math.log(n) for n in blocks], [math.log(v) for v in values]).slope


def main() -> int:
    """Print a line per recipe and depth, and the fitted exponents; 1 if a recipe grows faster than depth to the 1.3."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(run(a.one, a.blocks[0], a.hidden, a.samples, a.tokens)))
        return 0
    print(f"{'recipe':10s}{'blocks':>8s}{'seconds':>10s}{'per block':>11s}{'model MB':>10s}{'peak grew MB':>14s}")
    steep = False
    for name in a.recipes:
        rows = []
        for blocks in a.blocks:
            command = [sys.executable, "-m", "benchmarks.scaling", "--one", name, "--blocks", str(blocks)]
            command += ["--hidden", str(a.hidden), "--samples", str(a.samples), "--tokens", str(a.tokens)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            rows.append(found)
            print(
                f"{name:10s}{blocks:8d}{found['seconds']:10.2f}{found['seconds'] / blocks:11.3f}"
                f"{found['model'] / 1e6:10.1f}{found['grown'] / 1e6:14.1f}",
                flush=True,
            )
        if len(rows) > 1:
            slope = exponent(a.blocks, [row["seconds"] for row in rows])
            span = rows[-1]["model"] - rows[0]["model"]
            memory = (rows[-1]["grown"] - rows[0]["grown"]) / span
            print(f"{name:10s} seconds ~ blocks^{slope:.2f}; peak memory grows {memory:.2f} bytes per byte of model")
            steep |= slope > 1.3
    return int(steep)


if __name__ == "__main__":
    sys.exit(main())
