"""Decoding after a long context: a full key-value cache against budgeted ones, in one process and in turn.

    python -m benchmarks.kv [--context 2048] [--budget 0.2] [--batch 4] [--rounds 5] [--threads 1] [--json]

A Llama with random weights (hidden 256, 8 query heads, 8 key-value heads) holds a context and decodes token by token.
Each round times the same tokens with every cache, one after the other; a ratio compares two times of the same round, and
the median over rounds is printed with the range. Bytes are those that the tensors of each cache hold. Squeezed budgets have
the same total as uniform ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch

from layerwright.allocate.kv_budgets import kv_budgets
from layerwright.nn.kv.attention import budgeted_attention
from layerwright.nn.kv.cache import BudgetedCache, held_bytes
from layerwright.nn.kv.keep import POLICIES


def build(layers: int = 8, hidden: int = 256) -> Any:
    """A random Llama."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=512,
        max_position_embeddings=1 << 16,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def decode(model: Any, cache: Any, batch: int, tokens: int) -> float:
    """Seconds to decode `tokens` tokens after what `cache` holds; the cache is a copy."""
    ids = torch.ones(batch, 1, dtype=torch.long)
    own = copy.deepcopy(cache)
    begun = time.perf_counter()
    for _ in range(tokens):
        model(input_ids=ids, past_key_values=own, use_cache=True)
    return time.perf_counter() - begun


@torch.no_grad()
def measure(context: int, share: float, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Bytes and tokens per second of every cache, and ratios of times to the full one."""
    from transformers import DynamicCache

    model = build()
    layers = model.config.num_hidden_layers
    mean = max(8, int(share * context))
    prompt = torch.randint(512, (batch, context), generator=torch.Generator().manual_seed(0))
    squeezed = kv_budgets([0.5, *(0.9 + 0.01 * i for i in range(layers - 1))], mean, prompt_length=context)
    caches: dict[str, Any] = {"full": DynamicCache(config=model.config)}
    for policy in POLICIES:
        caches[policy] = BudgetedCache(model.config, mean, policy)
    caches["window, squeezed"] = BudgetedCache(model.config, squeezed, "window")
    times: dict[str, list[float]] = {name: [] for name in caches}
    with budgeted_attention(model):
        for cache in caches.values():
            model(input_ids=prompt, past_key_values=cache, use_cache=True)
        for number in range(rounds + 1):
            for name, cache in caches.items():
                seconds = decode(model, cache, batch, tokens)
                if number:  # the first round warms up
                    times[name].append(seconds)
    rows = {}
    for name, cache in caches.items():
        ratios = [a / b for a, b in zip(times[name], times["full"], strict=True)]
        rows[name] = {
            "bytes": held_bytes(cache),
            "bytes ratio": held_bytes(cache) / held_bytes(caches["full"]),
            "tokens per second": batch * tokens / statistics.median(times[name]),
            "time ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return {"context": context, "mean tokens": mean, "batch": batch, "tokens": tokens, "rounds": rounds, "caches": rows}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=0.2, help="share of the context that is kept")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = measure(given.context, given.budget, given.batch, given.tokens, given.rounds)
    if given.json:
        print(json.dumps(found, indent=2))
        return
    print(f"context {found['context']}, {found['mean tokens']} tokens kept per layer, batch {found['batch']}")
    for name, row in found["caches"].items():
        print(
            f"{name:18} {row['bytes'] / 1e6:8.2f} MB ({row['bytes ratio']:.3f}x)  {row['tokens per second']:8.1f} tokens/s  "
            f"time {row['time ratio']:.3f}x [{row['lowest']:.3f}, {row['highest']:.3f}]"
        )


if __name__ == "__main__":
    main()
