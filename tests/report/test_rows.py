"""Rows of the job's table: blocks, containers and dropped blocks."""

from __future__ import annotations

import json
from pathlib import Path

from layerwright.report.rows import layers_of, visible

ROWS = json.loads((Path(__file__).parent / "report.json").read_text())["layers"]


def _dropped() -> list[dict]:
    """Block 7 as a plan that drops it leaves it: its linear layers are covered, its norms are not."""
    rows = [dict(row) for row in ROWS]
    for row in rows:
        if row["block"] == 7:
            row["reason"] = "drop: cheapest block" if row["kind"] == "block" else ""
            if row["kind"] == "linear":
                row |= {"treatments": {"drop": {}}, "label": "drop", "bytes_after": 0.0, "planned": True}
    return rows


def test_order_is_the_models():
    assert [layer.path for layer in layers_of(ROWS)] == [row["path"] for row in ROWS]


def test_bytes_of_leaves_are_the_whole_model():
    """Containers repeat the bytes of what they hold: without them the sums are right."""
    layers = layers_of(ROWS)
    leaves = sum(layer.before for layer in layers if not layer.container)
    blocks = sum(row["bytes_before"] for row in ROWS if row["kind"] == "block")
    outside = sum(row["bytes_before"] for row in ROWS if row["block"] is None)
    assert leaves == blocks + outside
    assert {layer.kind for layer in layers if layer.container} == {"block", "attention", "mlp"}


def test_names_are_short_inside_blocks():
    layer = next(layer for layer in layers_of(ROWS) if layer.path == "model.layers.7.mlp.up_proj")
    assert (layer.group, layer.name, layer.shape) == ("model.layers 7", "mlp.up_proj", "512 × 128")


def test_a_dropped_block_is_gone_altogether():
    layers = {layer.path: layer for layer in layers_of(_dropped())}
    inside = [layer for path, layer in layers.items() if path.startswith("model.layers.7")]
    assert all(layer.dropped and layer.after == 0 and layer.label == "drop" for layer in inside)
    assert all(layer.before > 0 for layer in inside)
    assert all(layer.reason == "drop: cheapest block" for layer in inside)
    assert not any(layer.dropped for layer in layers.values() if layer not in inside)


def test_small_layers_outside_the_plan_are_left_out():
    shown, hidden = visible(layers_of(ROWS))
    assert [layer.path for layer in shown if not layer.planned] == ["model.embed_tokens"]
    assert hidden == 5  # four norms of two blocks and the last one; the tied head has no bytes of its own
    assert len(shown) == 15


def test_dropped_norms_get_no_bar():
    shown, hidden = visible(layers_of(_dropped()))
    assert [layer.name for layer in shown if layer.dropped][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert (len(shown), hidden) == (15, 5)


def test_rows_with_hardly_anything():
    (layer,) = layers_of([{"path": "x"}])
    assert (layer.before, layer.after, layer.label, layer.damage) == (0.0, 0.0, "not planned", None)
    assert visible([layer]) == ((), 0)
    assert layers_of([]) == ()
