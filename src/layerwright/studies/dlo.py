"""DLO (Tan et al., 2024, arXiv 2407.11030): a deeper model whose tokens skip feed-forward parts.

A small byte-level Llama of 8 blocks gets two new ones, and is fine-tuned dense and with routers, for as many steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.data.demo.train_lm import VOCABULARY
from layerwright.nn.gates import TokenRouter
from layerwright.studies._byte_lm import byte_data
from layerwright.treat.expand import expand_blocks
from layerwright.treat.route import find_routing, route_tokens, routed_blocks
from layerwright.tune.dlo import dlo
from layerwright.tune.full import full

__all__ = ["CLAIM", "CoinRouter", "run", "small_llama"]

CLAIM = (
    "A model made deeper by identity blocks and fine-tuned with token routers keeps to its budget at inference, loses "
    "little against the same depth run densely, and beats skipping the same share of tokens at random."
)
TARGET = 0.7
NEW = 2
RATE = 1e-3
ROUTER_RATE = 30.0
SPARE = 1
Progress = Callable[[str, int, int], None]


class CoinRouter(TokenRouter):
    """Runs each token with probability `share`, whatever it is: `share` of its scores exceed 1/2.

    Args:
        dim: features of a token; not looked at.
        share: above 0 and below 1.
        seed: of the draws.
    """

    def __init__(self, dim: int, share: float, seed: int) -> None:
        super().__init__(dim)
        self.share, self.seed, self.calls = share, seed, 0
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Random scores of tokens ``(..., dim)``."""
        self.calls += 1
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.calls)
        drawn, skipped = torch.rand(x.shape[:-1], generator=generator).to(x.device), 1 - self.share
        return torch.where(drawn < skipped, 0.5 * drawn / skipped, 0.5 + 0.5 * (drawn - skipped) / self.share)


@cache
def small_llama(steps: int, seed: int = 0) -> nn.Module:
    """A byte-level Llama of 8 blocks and width 64 that learned the standard library's text, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    data = byte_data("train", 8 * steps, 64, seed=seed)
    return full(model, data, steps=steps, learning_rate=3e-3, weight_decay=0.01, seed=seed).eval()


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    steps = 8 if quick else 150
    model = small_llama(30 if quick else 600)
    heldout = byte_data("heldout", 8 if quick else 192, 64, seed=101)
    deeper, block_map = expand_blocks(model, NEW)
    routed = routed_blocks(find_blocks(deeper)[0].names, tuple(block_map.copies), spare=SPARE)
    batch = next(iter(heldout))["input_ids"]
    with torch.no_grad():
        moved = float((deeper(batch).logits - model(batch).logits).abs().max())
    losses: dict[str, list[float]] = {}
    executed: dict[str, list[float]] = {}
    table: list[dict[str, Any]] = [{"arm": "before tuning", "blocks": 8, "nats/byte": heldout.mean_loss(model)}]
    for seed in range(1 if quick else seeds):
        data = byte_data("train", 8 * steps, 64, seed=1000 + seed)
        for arm, tuned in _arms(model, deeper, routed, data, steps, seed, tell):
            handle = find_routing(tuned)
            loss = heldout.mean_loss(tuned)
            share = 1.0 if handle is None else handle.executed_fraction()
            losses.setdefault(arm, []).append(loss)
            executed.setdefault(arm, []).append(share)
            row = {"arm": arm, "seed": seed, "nats/byte": loss, "executed": share}
            if handle is not None:
                by_block = dict(zip(handle.blocks, handle.executed_fractions().tolist(), strict=True))
                row["executed, new blocks"] = statistics.fmean(by_block[name] for name in block_map.copies)
            table.append(row)
    mean = {arm: statistics.fmean(values) for arm, values in losses.items()}
    off = max((abs(share - TARGET) for share in executed["DLO"]), default=float("nan"))
    checks = (
        Check("expanded against the original before training (largest difference of logits)", moved, 1e-4),
        Check(f"DLO: share of feed-forward parts run at inference, off {TARGET} by at most", off, 0.12),
        Check("DLO against 10 blocks dense + 0.05 (nats/byte)", mean["DLO"], mean["10 blocks, dense"] + 0.05),
        Check("DLO against random skipping - 0.02 (nats/byte)", mean["DLO"], mean["random skipping"] - 0.02),
    )
    notes = [
        f"width 64, {600 if not quick else 30} steps of pretraining; fine-tuning {steps} steps of 8 x 64 bytes at rate {RATE:g}",
        f"all arms see the same batches; routed arms anneal from 1 to {TARGET} over half of the steps",
        f"routers learn at {ROUTER_RATE:g} times the rate and the first and last old block have none: with {steps} steps at "
        "the common rate and all blocks routed (seed 0), the loss was 1.92 for the tokens chosen as in training and 2.61 "
        "at inference, where the first block skipped a seventh of the tokens, all of which it ought to run",
        "identity blocks turn no token, so that similarity leaves them little to run at first",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("dlo", CLAIM, table, checks, seconds, tuple(range(1 if quick else seeds)), notes)


def _arms(
    model: nn.Module,
    deeper: nn.Module,
    blocks: Sequence[str],
    data: Calibration,
    steps: int,
    seed: int,
    tell: Progress,
) -> list[tuple[str, nn.Module]]:
    """Each arm's name and tuned model."""
    dense: dict[str, Any] = {"steps": steps, "learning_rate": RATE, "weight_decay": 0.0, "warmup": 0.03, "seed": seed}
    routed = dense | {
        "target_capacity": TARGET,
        "num_new": 0,
        "router_rate": ROUTER_RATE,
        "progress": tell,
        "blocks": blocks,
    }
    coin = route_tokens(deeper, blocks, gap=0.0)
    for number, routing in enumerate(coin.routings):
        routing.router = CoinRouter(routing.router.dim, TARGET, 100 * seed + number)
    return [
        ("8 blocks, dense", full(model, data, progress=tell, **dense)),
        ("10 blocks, dense", full(deeper, data, progress=tell, **dense)),
        ("DLO", dlo(deeper, data, **routed)),
        ("random skipping", dlo(coin.model, data, coefficient=0.0, mode="self", **routed)),
        ("DLO, own labels", dlo(deeper, data, mode="self", **routed)),
    ]
