"""GPTQ W4 group 128 on a random 8-block Llama: CPU seconds of the whole run, ours beside llmcompressor's.

``python -m benchmarks.gptq_model`` times ours against the floor (two forwards per block plus one ``X^T X`` per distinct
input). With ``--peer PYTHON``, the interpreter of an environment that holds llmcompressor, each pair of runs takes turns
in processes of their own, and the ratio of CPU seconds, the layers' output error and the peak memory are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SAMPLES, TOKENS = 64, 512


def build(dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    """The random model and its calibration tokens ``(samples, tokens)``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, num_key_value_heads=8, max_position_embeddings=TOKENS, **SIZES)
    model = LlamaForCausalLM(config).to(dtype).eval()
    return model, torch.randint(1024, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))


def output_error(before: torch.nn.Module, after: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Relative squared error of the last hidden state over eight samples."""
    with torch.no_grad():
        a, b = (m.model(input_ids=tokens[:8]).last_hidden_state.float() for m in (before, after))
    return float((a - b).square().sum() / a.square().sum())


def run_ours(dtype: torch.dtype) -> dict[str, float]:
    """One run of ours."""
    from layerwright.core.layers import treatable
    from layerwright.core.treatment import Quantize
    from layerwright.treat.apply import apply_plan

    model, tokens = build(dtype)
    plan = {ref.path: (Quantize(4, 128),) for ref in treatable(model)}
    batches = [{"input_ids": part} for part in tokens.split(4)]
    begun, wall = time.process_time(), time.perf_counter()
    treated, _ = apply_plan(model, plan, batches)
    return {"cpu": time.process_time() - begun, "wall": time.perf_counter() - wall} | _rest(model, treated, tokens)


def run_peer(dtype: torch.dtype) -> dict[str, float]:
    """One run of llmcompressor's GPTQ on the same model and data."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    try:
        from llmcompressor.modifiers.gptq import GPTQModifier
    except ImportError:
        from llmcompressor.modifiers.quantization import GPTQModifier

    original, tokens = build(dtype)
    folder = tempfile.mkdtemp()  # it wants a model with a place on disk
    original.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    processor = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    begun, wall = time.process_time(), time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        processor=processor,
        max_seq_length=TOKENS,
        num_calibration_samples=SAMPLES,
    )
    return {"cpu": time.process_time() - begun, "wall": time.perf_counter() - wall} | _rest(original, model, tokens)


def _rest(before: torch.nn.Module, after: torch.nn.Module, tokens: torch.Tensor) -> dict[str, float]:
    return {"peak": _peak(), "error": output_error(before, after, tokens)}


def _peak() -> int:
    """High-water mark of this program's resident memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def floor_seconds(dtype: torch.dtype) -> float:
    """CPU seconds of two forwards of every block and one product ``X^T X`` per distinct input, measured here."""
    model, tokens = build(dtype)
    begun = time.process_time()
    with torch.no_grad():
        for part in tokens[:16].split(4):
            model.model(input_ids=part, use_cache=False)
    forward = (time.process_time() - begun) * len(tokens) / 16
    x = torch.randn(4 * TOKENS, 512)
    wide = torch.randn(4 * TOKENS, 1408)
    begun = time.process_time()
    for _ in range(4):
        for inputs in (x, x, x, wide):
            inputs.T @ inputs
    moments = (time.process_time() - begun) / 4 * (SAMPLES / 4) * SIZES["num_hidden_layers"]
    return 2 * forward + moments


def child(kind: str, dtype: str, interpreter: str) -> dict[str, float]:
    """One run in a process of its own."""
    done = subprocess.run(
        [interpreter, __file__, "--run", kind, "--dtype", dtype], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Time and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="python of an environment with llmcompressor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--run", choices=["ours", "peer"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.run:
        print(json.dumps((run_ours if a.run == "ours" else run_peer)(getattr(torch, a.dtype))))
        return
    for dtype in ("float32", "bfloat16") if a.dtype == "both" else (a.dtype,):
        pairs = []
        for _ in range(a.pairs):
            ours = child("ours", dtype, sys.executable)
            pairs.append((ours, child("peer", dtype, a.peer) if a.peer else None))
        for ours, peer in pairs:
            line = f"{dtype}: ours {ours['cpu']:.1f} CPU s (floor {floor_seconds(getattr(torch, dtype)):.1f})"
            line += f", error {ours['error']:.2e}, peak {ours['peak'] / 1e9:.2f} GB"
            if peer:
                line += (
                    f"; llmcompressor {peer['cpu']:.1f} CPU s, error {peer['error']:.2e}, {peer['peak'] / 1e9:.2f} GB"
                )
            print(line, flush=True)
        if a.peer:
            print(f"{dtype}: ratio {statistics.median(o['cpu'] / p['cpu'] for o, p in pairs if p):.2f}x")


if __name__ == "__main__":
    main()
