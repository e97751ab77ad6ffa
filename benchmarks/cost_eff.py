"""What a narrow encoder and its exits save: measured time against the time that the executed operations would take.

    python -m benchmarks.cost_eff [--hidden 256] [--blocks 6] [--heads 8] [--tokens 128] [--batch 16] [--threads 1] [--json]

A random BERT classifies a batch: whole, pruned to a half and a quarter of its heads and neurons (and embedding rank), and
pruned to a quarter with samples that leave early. All take turns; a ratio compares two times of one round, and the median
over rounds is printed. The heads are made so that an even share of the samples leaves at each exit below a given one. The
theoretical speed-up counts multiplications of linear layers, attention and exits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.allocate.width_schedule import Widths, proportional_widths
from layerwright.core.layers import structure_copy
from layerwright.nn.encoder_exits import MultiExit
from layerwright.score.exit_taylor import UnitScores
from layerwright.treat.encoder_exits import add_encoder_exits
from layerwright.treat.prune_heads import encoder_widths
from layerwright.tune.cost_eff import present_widths, slenderize_

CLASSES, VOCABULARY = 4, 8000


class Timetable(nn.Module):
    """A classifier that is sure of the samples whose turn it is, and of no others.

    Args:
        shares: of the samples that came in, those that leave at each exit.
        place: of this exit.
    """

    def __init__(self, shares: tuple[float, ...], place: int) -> None:
        super().__init__()
        left = 1 - sum(shares[:place])
        self.share = shares[place] / left if left > 1e-9 else 0.0

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        logits = torch.zeros(len(pooled), CLASSES, device=pooled.device)
        logits[: round(self.share * len(pooled)), 0] = 50.0
        return logits


def build(arguments: argparse.Namespace) -> nn.Module:
    """A random BERT classifier in float32."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.heads,
        max_position_embeddings=arguments.tokens,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def narrowed(model: nn.Module, widths: Widths) -> nn.Module:
    """A copy with the first heads and neurons."""
    copy = structure_copy(model)
    heads, parts = encoder_widths(copy)
    scores = {path: UnitScores(-torch.arange(heads[path].heads), -torch.arange(parts[path].neurons)) for path in parts}
    slenderize_(copy, scores, widths)
    return copy


def leaving(model: nn.Module, blocks: int) -> MultiExit:
    """Exits at which as many samples leave after each of the first ``2 * blocks - 1`` blocks: on average `blocks` run."""
    exits = add_encoder_exits(model)
    last = min(2 * blocks - 1, exits.depth)
    shares = tuple(1 / last if number < last else 0.0 for number in range(exits.depth))
    for position in exits.positions[:-1]:
        head = exits.head(position)
        assert head is not None
        head.classifier = Timetable(shares, position - 1)  # type: ignore[assignment]
    return exits.eval()


def operations(arguments: argparse.Namespace, widths: Widths, blocks: float, exits: bool) -> float:
    """Multiplications for one sample."""
    d, size = arguments.hidden, arguments.hidden // arguments.heads
    inner = widths.heads * size
    attention = arguments.tokens * (4 * d * inner + 2 * inner * arguments.tokens)
    mlp = arguments.tokens * 2 * d * widths.neurons
    embedding = arguments.tokens * (widths.rank or 0) * d if widths.rank and widths.rank < d else 0
    return embedding + blocks * (attention + mlp + (CLASSES * d if exits else 0)) + d * d


def rows_of(
    arguments: argparse.Namespace,
) -> list[tuple[str, Callable[[Tensor], Any], Callable[[Tensor], float], Widths]]:
    """Name, call, mean blocks and widths of each variant; the whole model comes first."""
    whole = build(arguments)
    full = present_widths(whole)
    found: list[tuple[str, Any, Any, Widths]] = []

    def add(name: str, model: nn.Module, widths: Widths, blocks: int | None = None) -> None:
        if blocks is None:
            found.append((name, model, lambda _ids: float(arguments.blocks), widths))
            return
        exits = leaving(model, blocks)
        found.append(
            (
                f"{name}, {blocks} blocks",
                lambda ids: exits.predict(ids, 0.5),
                lambda ids: float(exits.predict(ids, 0.5).exits.double().mean()),
                widths,
            )
        )

    add("whole", whole, full)
    for share in (2, 4):
        widths = proportional_widths(full, full.heads // share)
        add(f"1/{share} of the width", narrowed(whole, widths), widths)
    add("whole", whole, full, arguments.blocks // 2)
    for blocks in range(arguments.blocks // 2, 0, -1):
        add("1/4 of the width", narrowed(whole, widths), widths, blocks)
    return found


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each variant."""
    torch.set_num_threads(arguments.threads)
    variants = rows_of(arguments)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (arguments.batch, arguments.tokens), generator=generator)
    times: list[list[float]] = [[] for _ in variants]
    for number in range(arguments.rounds + 1):
        for own, (_, call, _, _) in zip(times, variants, strict=True):
            begun = time.perf_counter()
            call(ids)
            if number:  # the first round warms up
                own.append(time.perf_counter() - begun)
    base = operations(arguments, variants[0][3], arguments.blocks, False)
    table = []
    for (name, _, blocks_of, widths), own in zip(variants, times, strict=True):
        ratios = [whole / part for whole, part in zip(times[0], own, strict=True)]
        blocks = blocks_of(ids)
        table.append(
            {
                "variant": name,
                "heads": widths.heads,
                "neurons": widths.neurons,
                "blocks": blocks,
                "ms_per_sample": 1000 * statistics.median(own) / arguments.batch,
                "speed_up": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "theory": base / operations(arguments, widths, blocks, "blocks" in name),
            }
        )
    return table


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = {"hidden": 256, "blocks": 6, "heads": 8, "tokens": 128, "batch": 16, "rounds": 7, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'variant':30} {'blocks':>6} {'ms':>7} {'speed-up':>9} {'theory':>7}  range")
    for row in rows:
        print(
            f"{row['variant']:30} {row['blocks']:6.2f} {row['ms_per_sample']:7.2f} {row['speed_up']:8.2f}x "
            f"{row['theory']:6.2f}x  {row['lowest']:.2f}..{row['highest']:.2f}"
        )


if __name__ == "__main__":
    main()
