"""What skipping feed-forward parts saves: measured time against the time that the executed operations would take.

    python -m benchmarks.dlo [--hidden 512] [--intermediate 2048] [--blocks 4] [--tokens 512] [--threads 1] [--json]

A random Llama reads a prompt, dense and with routers that run a share of the tokens. Both take turns; a ratio compares
two times of one round, and the median over rounds is printed. The theoretical speed-up counts multiplications of
linear layers and attention; the routers and the gathering of tokens are what is above it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn

from layerwright.treat.route import route_tokens

SHARES = (1.0, 0.9, 0.7, 0.5, 0.3, 0.0)


class _Share(nn.Module):
    """Runs the first tokens of each window of a hundred: a fixed share."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores ``(batch, tokens)``."""
        places = torch.arange(x.shape[1], device=x.device) % 100
        return (places < round(100 * self.share)).float().expand(x.shape[:-1])


def build(hidden: int, intermediate: int, blocks: int) -> nn.Module:
    """A random Llama in float32."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=256,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def operations(arguments: argparse.Namespace, share: float) -> float:
    """Multiplications of one block for one token, with the mean context."""
    attention = 4 * arguments.hidden**2 + 2 * arguments.hidden * (arguments.tokens / 2)
    return float(attention + share * 3 * arguments.hidden * arguments.intermediate)


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each share of tokens."""
    torch.set_num_threads(arguments.threads)
    dense = build(arguments.hidden, arguments.intermediate, arguments.blocks)
    ids = torch.randint(0, 256, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    rows = []
    for share in SHARES:
        handle = route_tokens(dense)
        for routing in handle.routings:
            routing.router = _Share(share)  # type: ignore[assignment]
        ratios = []
        for number in range(arguments.rounds + 1):
            times = []
            for model in (dense, handle.model):
                begun = time.perf_counter()
                model(ids, use_cache=False)
                times.append(time.perf_counter() - begun)
            if number:  # the first round warms up
                ratios.append(times[0] / times[1])
        theory = operations(arguments, 1.0) / operations(arguments, share)
        rows.append(
            {
                "share": share,
                "executed": handle.executed_fraction(),
                "speed_up": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "theory": theory,
            }
        )
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("hidden", 512), ("intermediate", 2048), ("blocks", 4), ("tokens", 512), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'executed':>8} {'speed-up':>9} {'theory':>7}  range")
    for row in rows:
        print(
            f"{row['executed']:8.2f} {row['speed_up']:8.2f}x {row['theory']:6.2f}x  {row['lowest']:.2f}..{row['highest']:.2f}"
        )


if __name__ == "__main__":
    main()
