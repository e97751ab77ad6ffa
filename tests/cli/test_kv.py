from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import layerwright
from layerwright.cli import main
from layerwright.nn.kv import cache_budgets


def test_a_cache_budget_from_the_command_line(tiny: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"def name_{i}(x):\n    return x + {i}\n" for i in range(200)))
    settings = ("--data", corpus, "--samples", 6, "--length", 32)
    out = tmp_path / "out"
    found = json.loads(said("optimize", tiny, "--budget", "kv=0.4x", *settings, "-o", out, "--json"))
    assert found["after"]["kv_bytes_per_token"] <= 0.4 * found["before"]["kv_bytes_per_token"]
    assert found["uniform"]["kv_bytes_per_token"] == found["after"]["kv_bytes_per_token"]
    model, _ = layerwright.load(out)
    assert sum(budget.tokens for budget in cache_budgets(model).values()) == 3 * 12
    assert "kv: {tokens:" in (out / "plan.yaml").read_text()
    again = tmp_path / "again"
    said("apply", tiny, out / "plan.yaml", "--data", corpus, "--length", 32, "--samples", 6, "-o", again)
    assert cache_budgets(layerwright.load(again)[0]) == cache_budgets(model)


def test_a_budget_that_is_too_small(tiny: Path, tmp_path: Path, capsys: object) -> None:
    assert main(["optimize", str(tiny), "--budget", "kv=0.01x", "--length", "32", "-o", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
