from __future__ import annotations

import json

import pytest

from layerwright.core.errors import CheckpointError, InputError
from layerwright.explain.expert_usage import UsageTable, expert_usage
from layerwright.report.experts import active_chart, render_expert_usage, usage_chart, write_expert_usage
from layerwright.tune.mixture import attach_lora_mixture
from zoo import ZOO


def counted() -> UsageTable:
    model, batches = ZOO["llama"]()
    handle = attach_lora_mixture(model, ["q_proj"], total_rank=8, num_experts=4)
    handle.model.train()
    found = expert_usage(handle.model, batches)
    assert handle.model.training
    assert handle.expert_usage() == {}
    by_hand = 0.0
    for batch in batches:
        handle.model.eval()(input_ids=batch["input_ids"])
        by_hand += float(handle.layers["model.layers.2.self_attn.q_proj"].last_selected.float().sum())
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    usage = found.layers["model.layers.2.self_attn.q_proj"]
    assert usage.tokens == tokens
    assert usage.mean_active == pytest.approx(by_hand / tokens)
    return found


def test_table_and_page(tmp_path) -> None:
    usage = counted()
    rows = usage.rows()
    assert [row["layer"] for row in rows] == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    for row in rows:
        assert sum(row[f"expert {i}"] for i in range(4)) == pytest.approx(row["mean active"])
        assert row["no expert"] == 0
    assert len(str(usage).splitlines()) == 5
    page = write_expert_usage(usage, tmp_path / "experts.html")
    text = page.read_text()
    assert text == render_expert_usage(usage)
    assert "model.layers.3.self_attn.q_proj" in text
    for chart in (usage_chart(usage), active_chart(usage)):
        json.dumps([chart.traces, chart.layout], allow_nan=False)
        assert len(chart.rows) == 4
        assert all(len(row) == len(chart.columns) for row in chart.rows)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError):
        write_expert_usage(usage, tmp_path / "file" / "page.html")


def test_a_model_without_a_mixture() -> None:
    model, batches = ZOO["llama"]()
    with pytest.raises(InputError, match="no mixture"):
        expert_usage(model, batches)
    with pytest.raises(InputError, match="no layers"):
        render_expert_usage(UsageTable("default", {}))
