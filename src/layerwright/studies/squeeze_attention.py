"""SqueezeAttention (Wang et al., 2024, arXiv 2404.04793): cache tokens by how much each layer's attention does.

The demo language model learns for a minute to look up values in a list. Prompts are read with a full cache, which is then
compressed by three policies, with one budget for all layers, with the paper's, and with the groups exchanged.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwright.allocate.kv_budgets import kv_budgets
from layerwright.core.calibration import Calibration
from layerwright.core.evidence import Check, Evidence
from layerwright.nn.kv.keep import POLICIES
from layerwright.score.attention_prompt import PromptSimilarity
from layerwright.studies._fixtures import demo_language_model
from layerwright.tune.full import full

__all__ = ["ARMS", "CLAIM", "arm_budgets", "lookups", "run"]

CLAIM = (
    "At the same number of cached tokens, layers whose attention changes the residual stream little can give most of theirs "
    "to the others without loss, whichever tokens a policy keeps; taking them from the other layers instead does harm."
)
PROMPT, CONTINUATION = 96, 48
BUDGETS = (16, 24, 32)
P = 0.35
PAIR = 6
ARMS = ("uniform", "squeeze", "inverted")
Progress = Callable[[str, int, int], None]


def run(quick: bool = False, seeds: int = 3, progress: Progress | None = None) -> Evidence:
    """Measure the claims; see `layerwright.studies.run_study`."""
    begun = time.perf_counter()
    tell = progress or (lambda _what, _done, _total: None)
    steps, prompts = (4, 4) if quick else (200, 64)
    budgets = BUDGETS[:1] if quick else BUDGETS
    model = retrieval_model(steps, 4 if quick else 16, tell)
    table: list[dict[str, Any]] = []
    for seed in range(seeds):
        table += measure_seed(model, seed, prompts, budgets, 12 if quick else CONTINUATION, tell)
    checks = []
    for policy in POLICIES:
        loss = {arm: _mean(table, "nats/byte", policy, arm) for arm in ARMS}
        checks.append(
            Check(f"{policy}: squeeze against uniform + 0.01 (nats/byte)", loss["squeeze"], loss["uniform"] + 0.01)
        )
        checks.append(
            Check(
                f"{policy}: inverted against squeeze + 0.03 (nats/byte)", loss["inverted"], loss["squeeze"] + 0.03, ">="
            )
        )
    spread = max(
        abs(row["KV bytes"] - other["KV bytes"])
        for row in table
        for other in table
        if "budget" in row and (row["seed"], row["budget"]) == (other.get("seed"), other.get("budget"))
    )
    token = _token_bytes(model) * prompts
    checks.append(Check("bytes held by the three at one budget, difference in tokens", spread / token, 8.0))
    seconds = time.perf_counter() - begun
    notes = [
        f"demo:lm, 8 blocks, trained {steps} steps of {4 if quick else 16} lists whose four to eight pairs come round again; "
        f"{prompts} prompts of {PROMPT} bytes with {12 if quick else CONTINUATION} bytes to decode, teacher-forced through the cache",
        f"squeeze: k-means with 3 groups, p = {P}; inverted: the group of lowest similarity gives instead of the highest",
        "copied: share of the values' letters that are the most likely bytes when their key came round again",
        f"full cache: {_mean(table, 'nats/byte', 'full', 'full'):.4f} nats/byte, {_mean(table, 'copied', 'full', 'full'):.1%} copied",
        *(f"{policy}: {_copied(table, policy)}" for policy in POLICIES),
    ]
    return Evidence("squeeze-attention", CLAIM, table, tuple(checks), seconds, tuple(range(seeds)), notes)


def lookups(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Lists of keys and values that come round again: ids ``(samples, 144)`` and bool of the values, but for the first round.

    ``ab=xy;`` takes six bytes. A sample has four to eight pairs, drawn for it, so that what must be remembered lies 24 to
    48 bytes back: around the budgets.
    """
    generator = torch.Generator().manual_seed(seed)
    total = (PROMPT + CONTINUATION) // PAIR
    count = torch.randint(4, 9, (samples, 1), generator=generator)
    letters = torch.randint(26, (samples, 8, 4), generator=generator) + ord("a")
    place = torch.arange(total).expand(samples, -1) % count
    chosen = letters.gather(1, place[..., None].expand(-1, -1, 4))
    ids = torch.full((samples, total, PAIR), ord("="))
    ids[..., 0:2], ids[..., 3:5], ids[..., 5] = chosen[..., :2], chosen[..., 2:], ord(";")
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[..., 3:5] = (torch.arange(total) >= count)[..., None]
    return ids.flatten(1), where.flatten(1)


def retrieval_model(steps: int, batch: int, tell: Progress) -> nn.Module:
    """The demo model, tuned on lists whose pairs come round again."""
    model, _ = demo_language_model()
    rows, _ = lookups(steps * batch, seed=1000)
    batches = [{"input_ids": part, "labels": part} for part in rows.split(batch)]
    data = Calibration(batches, name="lookups", unit="nats/token")
    return full(model, data, steps=steps, learning_rate=1e-3, seed=0, progress=tell).eval()


def arm_budgets(similarity: Sequence[float], mean: int, arm: str, sinks: int) -> tuple[int, ...]:
    """Tokens of each layer for one of `ARMS`; all have the same total."""
    signed = [-value for value in similarity] if arm == "inverted" else list(similarity)
    return kv_budgets(signed, mean, 1.0 if arm == "uniform" else P, 3, sinks + 1, PROMPT)


@torch.no_grad()
def measure_seed(
    model: Any, seed: int, prompts: int, budgets: Sequence[int], decoded: int, tell: Progress
) -> list[dict[str, Any]]:
    """Rows of one draw of prompts: every policy, arm and budget, and the full cache."""
    from layerwright.nn.kv.attention import budgeted_attention
    from layerwright.nn.kv.cache import BudgetedCache

    ids, where = lookups(prompts, seed)
    ids, where = ids[:, : PROMPT + decoded], where[:, : PROMPT + decoded]
    rows: list[dict[str, Any]] = []
    sinks = 4
    with budgeted_attention(model):
        for number, policy in enumerate(POLICIES):
            cache = BudgetedCache(model.config, None, policy, sinks)
            found = PromptSimilarity(model)
            with found.watch():
                last = model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True).logits[:, -1:]
            if not number:
                loss, copied = _continuation(model, copy.deepcopy(cache), last, ids, where)
                rows.append({"seed": seed, "policy": "full", "arm": "full", "nats/byte": loss, "copied": copied})
            for mean in budgets:
                for arm in ARMS:
                    own = copy.deepcopy(cache)
                    own.squeeze(arm_budgets(found.values().tolist(), mean, arm, sinks))
                    loss, copied = _continuation(model, own, last, ids, where)
                    tokens = " ".join(map(str, own.budgets))
                    rows.append(
                        {
                            "seed": seed,
                            "policy": policy,
                            "budget": mean,
                            "arm": arm,
                            "nats/byte": loss,
                            "copied": copied,
                            "KV bytes": own.held_bytes(),
                            "tokens": tokens,
                        }
                    )
            tell(f"seed {seed}, policies", number + 1, len(POLICIES))
    return rows


def _continuation(model: Any, cache: Any, last: Tensor, ids: Tensor, where: Tensor) -> tuple[float, float]:
    """Mean loss of the bytes after the prompt, and the share of values that are the most likely bytes."""
    logits = [last]
    for t in range(PROMPT, ids.shape[1] - 1):
        logits.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    found, truth = torch.cat(logits, 1).float(), ids[:, PROMPT:]
    loss = nn.functional.cross_entropy(found.transpose(1, 2), truth)
    right = (found.argmax(-1) == truth)[where[:, PROMPT:]]
    return float(loss), float(right.double().mean())


def _token_bytes(model: Any) -> int:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_key_value_heads * width * next(model.parameters()).element_size())


def _mean(table: Sequence[Mapping[str, Any]], column: str, policy: str, arm: str) -> float:
    return statistics.fmean(row[column] for row in table if row["policy"] == policy and row["arm"] == arm)


def _copied(table: Sequence[Mapping[str, Any]], policy: str) -> str:
    return "copied " + ", ".join(f"{arm} {_mean(table, 'copied', policy, arm):.1%}" for arm in ARMS)
