"""What dropped blocks save: measured time against the share of blocks that are gone.

    python -m benchmarks.depth [--hidden 512] [--blocks 12] [--dropped 3 6] [--tokens 512] [--threads 1] [--json]

A random Llama and a random BART read a prompt and decode, whole and with blocks dropped. All take turns; a ratio compares
two times of one round, and the median over rounds is printed. In theory time falls by the dropped blocks' share of all
operations; embeddings, the output layer and the cost of a call stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from layerwright.treat.drop import keep_blocks


def llama(hidden: int, blocks: int) -> Any:
    """A random Llama in float32."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=256,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def bart(hidden: int, blocks: int) -> Any:
    """A random BART with as many blocks in its encoder as in its decoder, half of `blocks`."""
    import transformers

    config = transformers.BartConfig(
        d_model=hidden,
        encoder_layers=blocks // 2,
        decoder_layers=blocks // 2,
        encoder_attention_heads=hidden // 64,
        decoder_attention_heads=hidden // 64,
        encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden,
        vocab_size=256,
        max_position_embeddings=1024,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).eval()


def shorter(model: Any, dropped: int) -> Any:
    """The model without `dropped` of its blocks, from the middle; of two stacks each gives half."""
    if model.config.is_encoder_decoder:
        return keep_blocks(
            model,
            {
                "encoder": _kept(model.config.encoder_layers, dropped // 2),
                "decoder": _kept(model.config.decoder_layers, dropped // 2),
            },
        )[0]
    return keep_blocks(model, _kept(model.config.num_hidden_layers, dropped))[0]


def _kept(depth: int, dropped: int) -> list[int]:
    first = (depth - dropped) // 2
    return [*range(first), *range(first + dropped, depth)]


@torch.inference_mode()
def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model, number of dropped blocks and kind of work."""
    torch.set_num_threads(a.threads)
    ids = torch.randint(3, 256, (1, a.tokens), generator=torch.Generator().manual_seed(0))
    works: dict[str, Callable[[Any], Any]] = {
        "prompt": lambda model: model(input_ids=ids, use_cache=False),
        "decoding": lambda model: model.generate(
            ids[:, :16], max_new_tokens=a.new, min_new_tokens=a.new, do_sample=False, num_beams=1, pad_token_id=1
        ),
    }
    rows = []
    for name, build in (("Llama", llama), ("BART", bart)):
        whole = build(a.hidden, a.blocks)
        for dropped in a.dropped:
            short = shorter(whole, dropped)
            for work, run in works.items():
                ratios = []
                for _ in range(a.rounds + 1):
                    times = []
                    for model in (whole, short):
                        begun = time.perf_counter()
                        run(model)
                        times.append(time.perf_counter() - begun)
                    ratios.append(times[1] / times[0])
                saved = 1 - statistics.median(ratios[1:])  # the first round warms up
                row = {"model": name, "work": work, "dropped": dropped / a.blocks, "time saved": saved}
                rows.append(row | {"saved over dropped": saved * a.blocks / dropped})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--dropped", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    rows = measure(a)
    if a.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['model']:6s} {row['work']:9s} {row['dropped']:4.0%} of blocks dropped: time falls by "
            f"{row['time saved']:.1%}, {row['saved over dropped']:.2f} of that"
        )


if __name__ == "__main__":
    main()
