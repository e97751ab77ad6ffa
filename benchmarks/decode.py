"""Decoding at batch 1: packed int4 and int8 weights against bfloat16, in one process and in turn.

    python -m benchmarks.decode [--blocks 3] [--threads 1] [--rounds 9] [--json]

A Llama with random weights (hidden 2048, intermediate 5632) decodes token by token with a key-value cache. Each round
times the same number of tokens for every model, one after the other; a ratio compares two times of the same round, and
the median over rounds is printed with the quartiles. The output head stays in bfloat16 and its vocabulary is scaled so
that it weighs in a model of few blocks what it does in one of 22 blocks with 32000 tokens.

The floor is what reading the weights once per token takes at the memory bandwidth that a sum over as many bytes
reaches on the spot. No way of computing with these weights can be faster unless they stay in a cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from layerwright.core.layer import read_matrix
from layerwright.core.layers import treatable
from layerwright.core.treatment import Quantize
from layerwright.nn import Stored, replace_
from layerwright.nn.quantizer import find_scale, quantize

TARGET = 1.5
FULL_BLOCKS, FULL_VOCABULARY = 22, 32000


def build(blocks: int, hidden: int, intermediate: int) -> nn.Module:
    """A random bfloat16 Llama."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=max(256, FULL_VOCABULARY * blocks // FULL_BLOCKS),
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def packed(model: nn.Module, settings: Quantize) -> nn.Module:
    """A copy of `model` whose linear layers in blocks are rounded and packed."""
    copied = copy.deepcopy(model)
    for ref in treatable(copied):
        weight = read_matrix(copied, ref)
        scale, zero = find_scale(
            weight, settings.bits, settings.group_size, settings.symmetric, scale_dtype=weight.dtype
        )
        codes = quantize(weight, scale.float(), zero, settings.bits)
        replace_(copied, ref, Stored((1, *ref.shape), codes=codes, scale=scale, zero=zero, quantize=settings))
    return copied


def weight_bytes(model: nn.Module) -> int:
    """Bytes that one token reads: everything stored but the input embedding."""
    table = model.get_parameter("model.embed_tokens.weight")
    stored: int = sum(tensor.nbytes for tensor in model.state_dict().values())
    return stored - table.nbytes


def decoder(model: nn.Module, prompt: torch.Tensor, tokens: int) -> Callable[[], float]:
    """A function that decodes `tokens` tokens after the prompt and returns milliseconds per token."""

    @torch.inference_mode()
    def run() -> float:
        out = model(prompt, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        begun = time.perf_counter()
        for _ in range(tokens):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - begun) / tokens * 1e3

    return run


def bandwidth(size: int) -> float:
    """Bytes per second at which `size` bytes are summed: the best of five."""
    block = torch.ones(size // 4, dtype=torch.float32)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - begun)
    return block.nbytes / min(times)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    torch.set_num_threads(arguments.threads)
    base = build(arguments.blocks, arguments.hidden, arguments.intermediate)
    models = {
        "bfloat16": base,
        "int4 g128": packed(base, Quantize(4, 128, True, "rtn")),
        "int8": packed(base, Quantize(8, -1, True, "rtn")),
        "int8 g128": packed(base, Quantize(8, 128, True, "rtn")),
        "int8 a8": packed(base, Quantize(8, -1, True, "rtn", act_bits=8)),
    }
    prompt = torch.arange(16).unsqueeze(0)
    runs = {name: decoder(model, prompt, arguments.tokens) for name, model in models.items()}
    for run in runs.values():  # builds the processor's own forms
        run()
    rounds = [{name: run() for name, run in runs.items()} for _ in range(arguments.rounds)]
    speed = bandwidth(weight_bytes(base))
    rows = {}
    for name, model in models.items():
        ratios = [row["bfloat16"] / row[name] for row in rounds]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "ms_per_token": statistics.median(row[name] for row in rounds),
            "ratio": statistics.median(ratios),
            "quartiles": [low, high],
            "weight_bytes": weight_bytes(model),
            "floor_ms": weight_bytes(model) / speed * 1e3,
        }
    return {"bandwidth": speed, "rows": rows, "settings": vars(arguments)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"memory bandwidth {result['bandwidth'] / 1e9:.1f} GB/s, {arguments.threads} threads, {arguments.blocks} blocks"
    )
    print(f"{'weights':<10} {'ms/token':>9} {'MB read':>8} {'floor ms':>9} {'speed-up':>9}  quartiles")
    for name, row in result["rows"].items():
        low, high = row["quartiles"]
        print(
            f"{name:<10} {row['ms_per_token']:9.2f} {row['weight_bytes'] / 1e6:8.1f} {row['floor_ms']:9.2f} "
            f"{row['ratio']:8.2f}x  {low:.2f}..{high:.2f}"
        )
    for name in ("int4 g128", "int8"):
        ratio = result["rows"][name]["ratio"]
        print(f"{name}: {ratio:.2f}x, target {TARGET}x, {'holds' if ratio >= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
