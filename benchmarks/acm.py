"""What adaptive width saves: measured time against the time that the executed multiplications would take.

    python -m benchmarks.acm [--hidden 512] [--intermediate 2048] [--blocks 4] [--batch 8] [--tokens 256] [--threads 1]

A random ViT-like feed-forward part, and a whole BERT of several blocks, run dense and with adaptive modules of four
learners, whose gates choose by given shares. Both take turns; a ratio compares two times of one round, and the median
over rounds is printed. The theoretical speed-up counts multiplications of linear layers, attention and gates.
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

from layerwright.nn._adaptive_gate import ChoiceGate
from layerwright.nn.adaptive import AdaptiveComputationModule
from layerwright.score.costs import count_flops
from layerwright.treat.acmize import acmize, find_acm

LEARNERS = 4
SHARES = {
    "all learners": (0.0, 0.0, 0.0, 0.0, 1.0),
    "uniform": (0.2, 0.2, 0.2, 0.2, 0.2),
    "all or none": (0.5, 0.0, 0.0, 0.0, 0.5),
    "few, long tail": (0.05, 0.4, 0.25, 0.1, 0.2),
    "quarter": (0.4, 0.35, 0.15, 0.05, 0.05),
    "none": (1.0, 0.0, 0.0, 0.0, 0.0),
}


class _Chosen(nn.Module):
    """A gate that costs what a gate costs, and then chooses by shares."""

    def __init__(self, dim: int, shares: tuple[float, ...], tokens: int, seed: int) -> None:
        super().__init__()
        self.gate = ChoiceGate(dim, LEARNERS + 1)
        counts = [round(share * tokens) for share in shares]
        counts[-1] += tokens - sum(counts)
        choice = torch.repeat_interleave(torch.arange(LEARNERS + 1), torch.tensor(counts).clamp(min=0))[:tokens]
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        self.scores = 1e6 * nn.functional.one_hot(choice[order], LEARNERS + 1).float()

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(..., learners + 1)``."""
        logits: Tensor = self.gate(x)
        return logits + self.scores.reshape(logits.shape)


class FeedForward(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, hidden)``."""
        result: Tensor = self.down(nn.functional.gelu(self.up(x)))
        return result


def encoder(hidden: int, intermediate: int, blocks: int) -> nn.Module:
    """A random BERT in float32."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        vocab_size=256,
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def compare(dense: Callable[[], object], adaptive: Callable[[], object], rounds: int) -> list[float]:
    """Time of the first over that of the second, once a round."""
    ratios = []
    for number in range(rounds + 1):
        times = []
        for run in (dense, adaptive):
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
        if number:  # the first round warms up
            ratios.append(times[0] / times[1])
    return ratios


@torch.inference_mode()
def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each subject and way to choose."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    tokens = a.batch * a.tokens
    part, model = FeedForward(a.hidden, a.intermediate).eval(), encoder(a.hidden, a.intermediate, a.blocks)
    x = torch.randn(a.batch, a.tokens, a.hidden)
    ids = torch.randint(0, 256, (a.batch, a.tokens))
    rows = []
    for name, shares in SHARES.items():
        single = AdaptiveComputationModule(a.hidden, a.intermediate // LEARNERS, LEARNERS).eval()
        whole, _ = acmize(model, "mlp", LEARNERS)
        handle = find_acm(whole)
        assert handle is not None
        for number, module in enumerate((single, *handle.modules.values())):
            module.gate = _Chosen(a.hidden, shares, tokens, number)
        subjects: tuple[tuple[str, nn.Module, nn.Module, Any], ...] = (
            ("feed-forward part", part, single, x),
            (f"BERT, {a.blocks} blocks", model, whole, ids),
        )
        for subject, dense, adaptive, given in subjects:
            before = count_flops(dense, lambda dense=dense, given=given: dense(given))[""]
            after = count_flops(adaptive, lambda adaptive=adaptive, given=given: adaptive(given))[""]
            ratios = compare(
                lambda dense=dense, given=given: dense(given), lambda ad=adaptive, given=given: ad(given), a.rounds
            )
            rows.append(
                {
                    "subject": subject,
                    "choices": name,
                    "share": sum(k * share for k, share in enumerate(shares)) / LEARNERS,
                    "speed_up": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "theory": before / after,
                }
            )
    return rows


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    defaults = {"hidden": 512, "intermediate": 2048, "blocks": 4, "batch": 8, "tokens": 256, "rounds": 7, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measure(arguments)
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{'subject':18} {'choices':15} {'share':>5} {'speed-up':>9} {'theory':>8}  range")
    for row in rows:
        print(
            f"{row['subject']:18} {row['choices']:15} {row['share']:5.2f} {row['speed_up']:8.2f}x {row['theory']:7.2f}x"
            f"  {row['lowest']:.2f}..{row['highest']:.2f}"
        )


if __name__ == "__main__":
    main()
