"""CPU seconds of the mathematics of GPTQ for one block of a random Llama, next to the floor.

The floor is what any streaming GPTQ must spend on a block: two forward passes (one to see the inputs of its layers, one
to hand the treated block's outputs on) and one product ``X^T X`` for each distinct input. Nothing here is trained, and
nothing is read or written.

    python benchmarks/gptq.py [--dtype bfloat16] [--bits 4] [--group-size 128] [--threads 1] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.treatment import Quantize, Treatments
from layerwright.score.statistics import InputStatistics
from layerwright.treat.compute import relative_error, treated_group
from layerwright.treat.quantize import prepare

INPUTS = {
    "q k v": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class Clock:
    """CPU seconds of this process, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - begun
        return result


def build_block(hidden: int, intermediate: int, tokens: int, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    block = LlamaDecoderLayer(config, 0).to(dtype).eval().requires_grad_(False)
    positions = torch.arange(tokens)[None]
    rotary = LlamaRotaryEmbedding(config)(torch.zeros(1, tokens, hidden, dtype=dtype), positions)
    return block, {"position_embeddings": rotary, "position_ids": positions}


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    block, settings = build_block(options.hidden, options.intermediate, options.tokens, dtype)
    modules = {name: block.get_submodule(name) for names in INPUTS.values() for name in names}
    clock, seen = Clock(), dict[str, Tensor]()
    handles = [
        modules[names[0]].register_forward_pre_hook(lambda _m, args, key=key: seen.__setitem__(key, args[0]))
        for key, names in INPUTS.items()
    ]
    stats = {key: InputStatistics(modules[names[0]].in_features) for key, names in INPUTS.items()}  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(options.hidden, options.hidden, generator=generator) / options.hidden**0.5
    done = 0
    while done < options.sequences:
        batch = min(options.batch, options.sequences - done)
        x = torch.randn(batch, options.tokens, options.hidden, generator=generator)
        x = (x + 2 * x @ mixing).to(dtype)
        clock.run("forward", lambda x=x: block(x, **settings))
        for key in INPUTS:
            rows = seen[key].reshape(-1, seen[key].shape[-1])
            clock.run("plain product", lambda rows=rows: rows.T @ rows)
            clock.run("gram", lambda rows=rows, key=key: stats[key].update(rows))
        done += batch
    for handle in handles:
        handle.remove()

    treatments: Treatments = (Quantize(options.bits, options.group_size),)
    errors: dict[str, float] = {}
    for key, names in INPUTS.items():
        weights = [modules[name].weight.detach()[None] for name in names]  # type: ignore[union-attr,operator]
        clock.run("factor", lambda key=key: prepare(stats[key].gram, stats[key].tokens))
        results = clock.run(
            "factor and gptq",
            lambda key=key, weights=weights, names=names: treated_group(
                weights, [treatments] * len(names), stats[key], scale_dtype=dtype, names=names
            ),
        )
        for name, weight, (stored, _) in zip(names, weights, results, strict=True):
            clock.run(
                "relative error",
                lambda name=name, weight=weight, stored=stored, key=key: errors.__setitem__(
                    name, relative_error(weight, stored, stats[key])
                ),
            )
    s = clock.seconds
    maths = s["gram"] + s["factor and gptq"]
    floor = 2 * s["forward"] + s["plain product"]
    return {
        "settings": vars(options),
        "torch": torch.__version__,
        "cpu_seconds_per_block": {name: round(value, 4) for name, value in s.items()},
        "maths": round(maths, 4),
        "floor": round(floor, 4),
        "maths_and_two_forwards": round(maths + 2 * s["forward"], 4),
        "ratio_to_floor": round((maths + 2 * s["forward"]) / floor, 4),
        "relative_errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, value in {
        "hidden": 512,
        "intermediate": 1408,
        "sequences": 64,
        "tokens": 512,
        "batch": 8,
        "bits": 4,
        "group-size": 128,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"CPU seconds for one block, {options.sequences} x {options.tokens} tokens, {options.dtype}")
    for name, value in result["cpu_seconds_per_block"].items():
        print(f"  {name:<28}{value:8.3f}")
    print(f"  {'maths (gram, factor, gptq)':<28}{result['maths']:8.3f}")
    print(f"  {'floor (2 forwards, X^T X)':<28}{result['floor']:8.3f}")
    print(
        f"  {'maths + 2 forwards':<28}{result['maths_and_two_forwards']:8.3f}  = {result['ratio_to_floor']:.3f} x floor"
    )
    print(
        "  relative errors: " + ", ".join(f"{k.split('.')[-1]} {v:.5f}" for k, v in result["relative_errors"].items())
    )


if __name__ == "__main__":
    main()
