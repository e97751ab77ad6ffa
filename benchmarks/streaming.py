"""Streaming apply of a 24-block model against loading it whole: ``python -m benchmarks.streaming``.

Each way runs in a process of its own, in turn; peak resident memory and wall time are compared. Floor of the memory:
the layers outside blocks, one block, one set of activations.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def write_model(folder: Path, hidden: int, blocks: int) -> int:
    """Write a random Llama in bfloat16, in shards; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(p.numel() * 2 for p in model.parameters())


def run(kind: str, folder: Path, out: Path) -> dict[str, float]:
    """One run in this process: ``stream`` or ``whole``."""
    from layerwright.core.calibration import Calibration
    from layerwright.core.layers import treatable
    from layerwright.core.memory import peak_memory_bytes
    from layerwright.core.plan import Plan
    from layerwright.core.treatment import Quantize
    from layerwright.data.loading import load
    from layerwright.treat.apply import apply_plan
    from layerwright.treat.stream import apply_checkpoint, empty_model
    from layerwright.treat.writer import save_model

    ids = torch.randint(2048, (8, 128), generator=torch.Generator().manual_seed(0))
    data = Calibration([{"input_ids": part} for part in ids.split(2)])
    treatment = Quantize(8, method="rtn", act_bits=8, act_mode="static")
    plan = Plan(layers={ref.path: (treatment,) for ref in treatable(empty_model(folder))})
    begun = time.perf_counter()
    if kind == "stream":
        apply_checkpoint(folder, plan, data, out)
    else:
        model, _ = load(folder)
        treated, _ = apply_plan(model, plan, data)
        save_model(treated, out)
    # The high-water mark of this program alone: getrusage would carry over the parent's.
    return {"seconds": time.perf_counter() - begun, "peak": peak_memory_bytes()}


def main() -> None:
    """Measure both ways and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1440)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--run", nargs=3, metavar=("KIND", "MODEL", "OUT"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.run:
        print(json.dumps(run(a.run[0], Path(a.run[1]), Path(a.run[2]))))
        return
    root = Path(tempfile.mkdtemp())
    try:
        size = write_model(root / "model", a.hidden, a.blocks)
        found = {}
        for kind in ("stream", "whole"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.streaming",
                "--run",
                kind,
                str(root / "model"),
                str(root / kind),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found[kind] = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{kind:7s} {found[kind]['seconds']:.1f} s, peak {found[kind]['peak'] / 1e9:.2f} GB", flush=True)
        same = all(
            (root / "stream" / name).exists()
            for name in ("config.json", "layerwright.json", "model.safetensors.index.json")
        )
        print(
            f"model {size / 1e9:.2f} GB; memory {found['stream']['peak'] / found['whole']['peak']:.2f}x, "
            f"time {found['stream']['seconds'] / found['whole']['seconds']:.2f}x, complete: {same}"
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
