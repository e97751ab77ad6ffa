"""The testbed itself: bytes, budgets, costs, arms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.studies.sequence import (
    Arm,
    bits_per_byte,
    byte_stream,
    compare,
    corpus_hash,
    documents,
    flops_per_token,
    loss_by_position,
    match_width,
    mean_of,
    paired,
    parameter_counts,
    tiny_bert,
    tiny_llama,
    train_bytes,
    train_windows,
)


class Fixed(nn.Module):
    """Logits from a function of the ids."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.make(ids)
        return logits


def small_corpus(root: Path) -> Path:
    for number in range(60):
        (root / f"part{number:02}.py").write_bytes(bytes([65 + number % 26]) * (number + 1))
    return root


def test_parts_share_no_file_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    root = small_corpus(tmp_path)
    parts = {split: documents(split, root) for split in ("train", "calibration", "heldout")}
    assert sum(len(part) for part in parts.values()) == 60 and min(map(len, parts.values())) > 0
    assert len(byte_stream("heldout", root)) == sum(len(text) + 1 for text in parts["heldout"])
    assert byte_stream("heldout", root)[-1] == 0
    before = corpus_hash(root)
    (root / "part60.py").write_bytes(b"x")
    byte_stream.cache_clear()
    documents.cache_clear()
    assert corpus_hash(root) != before


def test_a_library_without_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data"):
        documents("train", tmp_path)


def test_a_uniform_model_needs_eight_bits_and_one_that_knows_none() -> None:
    assert bits_per_byte(Fixed(lambda ids: torch.zeros(*ids.shape, 256)), windows=8, context=32) == pytest.approx(8)
    peek = Fixed(lambda ids: 50.0 * nn.functional.one_hot(ids.roll(-1, 1), 256).float())
    assert bits_per_byte(peek, windows=8, context=32) < 0.01
    late = Fixed(
        lambda ids: (
            50.0 * nn.functional.one_hot(ids.roll(-1, 1), 256).float() * (torch.arange(ids.shape[1]) >= 15)[:, None]
        )
    )
    assert bits_per_byte(late, windows=8, context=32) > 3
    assert bits_per_byte(late, windows=8, context=32, sliding=True) < 0.01
    assert loss_by_position(late, windows=8, context=32)[0] == pytest.approx(math.log(256))


def test_windows_depend_on_the_seed_alone() -> None:
    first, again, other = (train_windows(3, 20, seed=seed, batch=4) for seed in (1, 1, 2))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    with pytest.raises(InputError, match="length: got 0"):
        train_windows(1, 0)


def test_arms_see_the_same_and_runs_repeat() -> None:
    seen: dict[str, list[Tensor]] = {"a": [], "b": []}

    def build(name: str) -> Any:
        def make(seed: int) -> nn.Module:
            model = tiny_llama(16, 1, 2, seed=seed)
            model.register_forward_pre_hook(
                lambda _m, _a, given: seen[name].append(given["input_ids"]), with_kwargs=True
            )
            return model

        return make

    arms = [Arm("a", build("a")), Arm("b", build("b"), {"learning_rate": 1e-4}, {"matched": 1})]
    rows = compare(arms, steps=3, seeds=(0, 1), batch=4, context=16, windows=4, measure=lambda name, _m: {"name": name})
    again = compare([Arm("a", arms[0].build)], steps=3, seeds=(0,), batch=4, context=16, windows=4)
    assert rows[0]["bits/byte"] == again[0]["bits/byte"]
    assert all(torch.equal(a, b) for a, b in zip(seen["a"], seen["b"], strict=False))
    assert [row["name"] for row in rows] == ["a", "b", "a", "b"] and rows[1]["matched"] == 1
    gap = paired(rows, "a", "b")
    assert len(gap) == 2 and gap[0] == rows[0]["bits/byte"] - rows[1]["bits/byte"]
    assert mean_of(rows, "a") == pytest.approx((rows[0]["bits/byte"] + rows[2]["bits/byte"]) / 2)
    with pytest.raises(InputError, match="no seed has both"):
        paired(rows, "a", "c")


def test_an_arm_that_diverges_is_marked_and_stays() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(256))

        def forward(self, ids: Tensor) -> Tensor:
            return self.weight.expand(*ids.shape, 256) * float("nan")

    rows = compare([Arm("broken", lambda _seed: Broken())], steps=2, seeds=(0,), batch=2, context=8, windows=2)
    assert rows[0]["failed"] and math.isnan(rows[0]["bits/byte"])


def test_training_runs_in_training_mode_and_learns() -> None:
    modes = []
    model = tiny_llama(32, 1, 2)
    model.register_forward_pre_hook(lambda module, _a: modes.append(module.training))
    before = bits_per_byte(model, windows=8, context=32)
    modes.clear()
    train_bytes(model, steps=30, batch=8, context=32, learning_rate=1e-2)
    assert all(modes) and len(modes) == 30 and not model.training
    assert bits_per_byte(model, windows=8, context=32) < before - 1.5


def test_costs_are_those_that_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llama(64, 3, 4, kv_heads=2, attn_implementation="eager")
    counts = parameter_counts(model)
    assert counts["embedding"] == 256 * 64 and counts["total"] == counts["embedding"] + counts["other"]
    ids = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    # The counter does not know that attention is causal: its products count whole.
    whole = flops_per_token(model, 64) + 2 * 3 * 64 * 64
    assert counter.get_total_flops() / 64 == pytest.approx(whole, rel=0.02)


def test_no_byte_is_seen_before_its_turn() -> None:
    model = tiny_llama(32, 2, 2).eval()
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 8] = (other[0, 8] + 1) % 256
    with torch.no_grad():
        first, second = model(ids).logits, model(other).logits
    assert torch.allclose(first[:, :8], second[:, :8], atol=1e-6) and not torch.allclose(first[:, 8:], second[:, 8:])


def test_encoders_and_seeds() -> None:
    state = torch.random.get_rng_state()
    first, second = tiny_bert(seed=1, labels=3), tiny_bert(seed=1, labels=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert tiny_bert()(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 256)
    with pytest.raises(InputError, match="heads: got 3"):
        tiny_llama(64, 1, 3)


def test_widths_are_matched_or_refused() -> None:
    assert match_width(lambda width: 10 * width, 1000) == 100
    assert match_width(lambda width: 3 * width + 1, 3000, tolerance=0.01) == 1000
    with pytest.raises(InputError, match="closest"):
        match_width(lambda width: 100 * width, 250)
