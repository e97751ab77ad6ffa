"""Adaptive token sampling in a DeiT-S beside the untouched model: share of operations saved against share of time saved.

    python -m benchmarks.ats [--batch 32] [--rounds 5] [--caps 1.0 120 90 60] [--device cpu] [--dtype float32] [--peak 6]

Weights are random, and queries and keys are multiplied by ``--peak``, so that attention differs from image to image, as it
does after training; with even attention every image would keep as many tokens as there are points. The models take turns, and a
ratio compares two times of one round; the median over rounds is printed. On the CPU the clock is that of the process, on
one thread; on a GPU that of the wall, after synchronising. Operations are those of the blocks, from the counts of tokens of the
same pictures.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.treat.ats import apply_ats, tokens_to_flops

DIM, DEPTH, FROM, TOKENS = 384, 12, 3, 196


def deit_small(peak: float, seed: int = 0) -> nn.Module:
    """A ViT of the size of DeiT-S, with random weights."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=6, intermediate_size=4 * DIM
    )
    model: Any = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(peak)
    whole: nn.Module = model
    return whole


def operations(counts: list[Tensor]) -> float:
    """Multiply-adds of the blocks, mean over the images."""
    columns = [torch.full_like(counts[0], TOKENS)] * (FROM + 1) + counts if counts else []
    images = (
        [[1 + int(column[n]) for column in columns] for n in range(len(counts[0]))]
        if counts
        else [[TOKENS + 1] * (DEPTH + 1)]
    )
    sampled = list(range(FROM, DEPTH)) if counts else []
    return statistics.fmean(tokens_to_flops(image, DIM, dropped_at=sampled) for image in images)


def seconds(model: Any, images: Tensor) -> float:
    """One forward pass."""
    cuda = images.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    begun = clock()
    with torch.no_grad():
        model(pixel_values=images)
    if cuda:
        torch.cuda.synchronize()
    return clock() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--caps", nargs="+", default=["1.0", "120", "90", "60"], help="points: a share with a dot, or a number"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peak", type=float, default=6.0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, a.dtype)
    plain = deit_small(a.peak).to(a.device, dtype)
    images = torch.randn(a.batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)).to(a.device, dtype)
    models: dict[str, Any] = {"none": plain}
    for cap in a.caps:
        models[cap] = apply_ats(plain, range(FROM, DEPTH), float(cap) if "." in cap else int(cap))
    for model in models.values():
        seconds(model, images)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(a.rounds):
        for name, model in models.items():
            times[name].append(seconds(model, images))
    dense = operations([])
    print(
        f"DeiT-S, batch {a.batch}, {a.device}, {a.dtype}, q and k x {a.peak:g}; blocks {dense / 1e9:.2f} GMAC an image"
    )
    print("cap    kept: first block, last block (range)   GMAC   operations saved   time saved   time over operations")
    for cap in a.caps:
        counts = [each.cpu() for each in models[cap].last_token_counts]
        macs = operations(counts)
        saved = 1 - macs / dense
        spared = 1 - statistics.median(mine / whole for mine, whole in zip(times[cap], times["none"], strict=True))
        first, last = float(counts[0].float().mean()), float(counts[-1].float().mean())
        reach = f"{int(counts[-1].min())}-{int(counts[-1].max())}"
        print(
            f"{cap:6} {first:6.1f} {last:6.1f} ({reach})   {macs / 1e9:.2f}   {saved:.3f}   {spared:.3f}   {spared / saved:.2f}"
        )


if __name__ == "__main__":
    main()
