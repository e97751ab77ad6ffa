"""AdaMoLE (Liu and Luo, 2024, arXiv 2405.00361): experts of a low-rank adapter, as many for a token as it needs.

Four functions of strings are learned together by adapters on the frozen demo language model, all of the same total rank.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.nn.expert_routing import ExpertRouting
from layerwright.studies._fixtures import demo_language_model
from layerwright.tune._loop import Schedule
from layerwright.tune.adamole import train_mixture_
from layerwright.tune.mixture import MixtureHandle, attach_lora_mixture

__all__ = ["ARMS", "CLAIM", "TASKS", "Arm", "examples", "mutual_information", "run"]

CLAIM = (
    "At equal total rank a mixture of low-rank experts whose number is decided by a learned threshold for each token is "
    "at least as good as one low-rank adapter, and better than with a gate that does not learn."
)
TOTAL_RANK, EXPERTS = 16, 8
RATE = 3e-3
LENGTH = 4
LETTERS = "abcdefghijklmnop"
Progress = Callable[[str, int, int], None]

TASKS: dict[str, Callable[[str], str]] = {
    "r": lambda text: text[::-1],
    "e": lambda text: text[::2],
    "n": lambda text: "".join(chr(ord(letter) + 1) for letter in text),
    "s": lambda text: "".join(sorted(text)),
}
"""Tag of a prompt, and the function that it asks for: reverse, every second, next letter, sort digits."""


@dataclass(frozen=True)
class Arm:
    """One kind of adapter; `frozen_gate` leaves gate weights as they were drawn."""

    name: str
    routing: ExpertRouting
    experts: int = EXPERTS
    frozen_gate: bool = False


ARMS = (
    Arm("LoRA", "none", experts=1),
    Arm("top-2", "top-k"),
    Arm("fixed threshold", "threshold"),
    Arm("AdaMoLE", "adaptive"),
    Arm("AdaMoLE, random gate", "adaptive", frozen_gate=True),
)


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    model, _ = demo_language_model()
    steps, batch = (6, 8) if quick else (STEPS, 32)
    asked, tags = examples(40 if quick else 400, seed=10_000)
    table: list[dict[str, Any]] = []
    found: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    for seed in range(seeds):
        taught, _ = examples(steps * batch, seed=seed)
        data = Calibration([_as_batch(rows) for rows in taught.split(batch)], name="strings", unit="nats/byte")
        for number, arm in enumerate(ARMS):
            handle = attach_lora_mixture(
                model,
                total_rank=TOTAL_RANK,
                num_experts=arm.experts,
                routing=arm.routing,
                seed=seed,
            )
            gates = {id(made.lora_gate) for made in handle.experts().values()} if arm.frozen_gate else set()
            trained = [parameter for parameter in handle.parameters() if id(parameter) not in gates]
            schedule = Schedule(steps=steps, learning_rate=RATE, seed=seed)
            train_mixture_(handle, data, schedule, parameters=trained)
            row = measured(handle, asked, tags)
            found[arm.name].append(row)
            table.append({"arm": arm.name, "seed": seed, **row})
            tell("adapters", seed * len(ARMS) + number + 1, seeds * len(ARMS))
    mean = {name: {key: statistics.fmean(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}
    table += [{"arm": name, "seed": "mean", **row} for name, row in mean.items()]
    ours, chance = mean["AdaMoLE"], mean["AdaMoLE, random gate"]
    checks = (
        Check("exact match: AdaMoLE against LoRA - 0.01", ours["exact"], mean["LoRA"]["exact"] - 0.01, ">="),
        Check("exact match: AdaMoLE against random gate + 0.02", ours["exact"], chance["exact"] + 0.02, ">="),
        Check("spread over tokens of the number of experts", ours["std active"], 0.2, ">="),
        Check("mean number of experts, at least", ours["active"], 1.0, ">="),
        Check("mean number of experts, at most", ours["active"], EXPERTS - 0.5),
        Check("information of the top expert on the task against random gate", ours["nats"], chance["nats"], ">="),
    )
    notes = [
        f"demo:lm frozen; adapters on the attention projections, total rank {TOTAL_RANK}, {EXPERTS} experts; "
        f"{steps} steps of {batch} prompts, rate {RATE:g} with warm-up and decay (the paper: 1e-4, constant)",
        "one alpha and one rate for all arms: an expert of rank 2 is scaled by 8, the single adapter of rank 16 by 1, so that "
        "part of a difference to LoRA can be one of step size; of two rates tried the mixture did not learn with the higher, 1e-2",
        f"strings of {LENGTH} characters; exact match of {len(asked)} unseen prompts, every byte of the answer",
        "active: experts of a token, mean over tokens and layers; nats: mutual information of task and top expert, mean over "
        "layers",
    ]
    seconds = time.perf_counter() - begun
    return Evidence("adamole", CLAIM, table, checks, seconds, tuple(range(seeds)), notes)


STEPS = 200


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` prompts with answers as bytes ``(count, length)``, and the number of each one's task ``(count,)``.

    ``r:abcd>dcba``; shorter answers are filled with line ends. Tasks take turns; strings are drawn from `seed`.
    """
    drawn = random.Random(seed)
    rows, tags = [], []
    for number in range(count):
        tag = number % len(TASKS)
        name = list(TASKS)[tag]
        text = "".join(drawn.choices("0123456789" if name == "s" else LETTERS, k=LENGTH))
        rows.append(list(f"{name}:{text}>{TASKS[name](text):\n<{LENGTH}}".encode()))
        tags.append(tag)
    return torch.tensor(rows), torch.tensor(tags)


def _as_batch(rows: Tensor) -> dict[str, Tensor]:
    labels = rows.clone()
    labels[:, :-LENGTH] = -100
    return {"input_ids": rows, "labels": labels}


@torch.no_grad()
def measured(handle: MixtureHandle, asked: Tensor, tags: Tensor) -> dict[str, float]:
    """Share of prompts answered without a mistake, and how the experts were used."""
    handle.reset_usage()
    logits = handle.model.eval()(input_ids=asked, use_cache=False).logits
    right = (logits[:, -LENGTH - 1 : -1].argmax(-1) == asked[:, -LENGTH:]).all(-1)
    usage = list(handle.expert_usage().values())
    layers: Sequence[Any] = list(handle.layers.values())
    places = tags[:, None].expand(asked.shape).reshape(-1)
    information = [mutual_information(places, layer.last_weights.argmax(-1)) for layer in layers]
    return {
        "exact": float(right.float().mean()),
        **{f"exact {name}": float(right[tags == tag].float().mean()) for tag, name in enumerate(TASKS)},
        "active": statistics.fmean(item.mean_active for item in usage),
        "std active": statistics.fmean(item.std_active for item in usage),
        "nats": statistics.fmean(information),
    }


def mutual_information(first: Tensor, second: Tensor) -> float:
    """Of two integer variables ``(samples,)``, in nats, from their counts."""
    joint = nn.functional.one_hot(first).double().T @ nn.functional.one_hot(second).double()
    joint /= joint.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float(torch.where(joint > 0, joint * (joint / apart.clamp(min=1e-300)).log(), 0.0).sum())
