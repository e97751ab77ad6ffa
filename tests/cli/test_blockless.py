"""A model that has layers and no repeated blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwright.cli import main

SMALL = ["--samples", "4", "--length", "32"]
Said = Callable[..., str]


def parsed(text: str) -> Any:
    """`text` as JSON, and nothing around it."""
    return json.loads(text)


@pytest.fixture(scope="module")
def blockless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the hub's layout that has layers and no repeated blocks."""
    import transformers

    from layerwright.data.demo.train_lm import byte_tokenizer

    folder = tmp_path_factory.mktemp("models") / "blockless"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=272,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=0,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
        transformers.BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_without_blocks_is_treated_whole(blockless: Path, tmp_path: Path, said: Said) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    said("check", blockless, "-b", "bits=4", "-r", "rtn", *SMALL)
    assert parsed(said("inspect", blockless, "--json", *SMALL))["total"]["params"] > 0
    decided = parsed(said("plan", blockless, "-b", "bits=4", "-r", "rtn", "-o", plan, "--json", *SMALL))
    assert list(decided["layers"]) == ["cls.predictions.transform.dense"]
    text = said("apply", blockless, plan, "-o", out, *SMALL)
    assert "whole (it has no repeated blocks)" in text
    measured = parsed(said("measure", blockless, out, "--seconds", "0.05", "--json", *SMALL))
    first, second = measured.values()
    assert second["bytes"] == decided["predicted"]["bytes"] < first["bytes"]
    assert second["params"] == first["params"]


@pytest.mark.parametrize("recipe", ["shortened-llama", "shortened-llama-taylor"])
def test_dropping_blocks_of_a_model_without_any_is_refused(
    recipe: str, blockless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["check"], ["plan", "-o", str(tmp_path / "plan.yaml")], ["optimize", "-o", str(tmp_path / "o")]):
        assert main([command[0], str(blockless), "-b", "size=0.9x", "-r", recipe, *command[1:], *SMALL]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert f"layerwright: recipe {recipe} drops blocks, and the model has no repeated blocks" in lines
        # Whatever else stands in the way is said along with it.
        need = {"shortened-llama": "decoder"}.get(recipe, "linear layers in repeated blocks")
        words = (
            f"layerwright: recipe {recipe} needs a model with {need}, and BertForMaskedLM has none; recipes for it: "
        )
        assert len(lines) == 2 and any(line.startswith(words) for line in lines)
    assert not list(tmp_path.iterdir())
