from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import CheckError
from layerwright.data.loading import load
from layerwright.recipes.tune import tune_job
from layerwright.tune.mixture import find_mixture
from layerwright.tune.mixture_files import load_adapter

SMALL = {"steps": 2, "rank": 8, "samples": 2, "length": 16, "seconds": 0.01, "settings": {"targets": ["q_proj"]}}


def test_model_and_adapter_are_written_and_read(tmp_path) -> None:
    measured = tune_job("demo:lm", "adamole", tmp_path / "model", dtype="float32", **SMALL)
    assert set(measured) == {"before", "after"}
    tune_job("demo:lm", "adamole", tmp_path / "adapter", dtype="float32", keep_adapter=True, **SMALL)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    ids = torch.arange(40, 60)[None]
    whole = load(str(tmp_path / "model"), dtype="float32")[0].eval()
    plain = load("demo:lm", dtype="float32")[0].eval()
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        adapted = load_adapter(plain, tmp_path / "adapter")
        found = adapted.model(input_ids=ids).logits
        torch.testing.assert_close(whole(input_ids=ids).logits, found)
        assert not torch.equal(found, expected)
    assert len(find_mixture(whole).layers) == 8


def test_an_adapter_of_a_tuner_without(tmp_path) -> None:
    with pytest.raises(CheckError, match="adamole"):
        tune_job("demo:lm", "full", tmp_path / "out", keep_adapter=True)
