"""The larger ViT is trained once and kept by its settings; rows compare methods on images of each model's own size."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.studies import _vit_table
from layerwright.studies._vit import accuracy, build_vit, calibration_digits
from layerwright.studies._vit_table import LargeVit, compare_methods, enlarged, large_vit

SMALL = LargeVit(width=16, depth=2, heads=2, image_size=16, patch_size=4, epochs=1, batch_size=64)


def test_a_network_is_trained_once_and_kept_by_its_settings(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    state = torch.get_rng_state()
    said: list[tuple[str, int, int]] = []
    trained = large_vit(SMALL, tmp_path, lambda *line: said.append(line))
    assert said == [("training ViT 16 x 2", 1, 1)] and not trained.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(trained.classifier.weight, SMALL.build().classifier.weight)
    monkeypatch.setattr(_vit_table, "_train_", lambda *_: pytest.fail("it was kept"))
    kept = large_vit(SMALL, tmp_path)
    for name, value in trained.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    assert dataclasses.replace(SMALL, epochs=2).key != SMALL.key == LargeVit(**dataclasses.asdict(SMALL)).key
    assert LargeVit().width >= 128 and LargeVit().depth == 8


def test_rows_hold_every_method_at_every_precision() -> None:
    models = {"a": build_vit(hidden_size=16, depth=2, num_heads=2), "b": SMALL.build()}
    rows = compare_methods(models, (4,), samples=8, tested=16, methods=("minmax", "mptq_chosen"))
    assert [(row["model"], row["precision"]) for row in rows] == [("a", "W4A4"), ("b", "W4A4")]
    assert all(0 <= row[m] <= 100 for row in rows for m in ("full", "minmax", "mptq_chosen"))
    with pytest.raises(InputError, match="methods: got 'gptq'"):
        compare_methods(models, methods=("gptq",))


def test_images_take_the_size_of_the_model() -> None:
    model, data = SMALL.build(), calibration_digits(8)
    larger = enlarged(data, model)
    assert next(iter(larger))["pixel_values"].shape == (8, 1, 16, 16)
    assert 0 <= accuracy(model, larger) <= 100
    small = build_vit(hidden_size=16, depth=2)
    assert torch.equal(next(iter(enlarged(data, small)))["pixel_values"], next(iter(data))["pixel_values"])
