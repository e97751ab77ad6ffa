"""Compress by edge_llm, then tune window by window, as commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerwright.cli import main
from layerwright.core.plan import Plan
from layerwright.core.treatment import Quantize, RoundCache
from layerwright.data.loading import load
from layerwright.nn.lora import LoraLinear
from layerwright.nn.rounded_cache import KeyValueRounding
from layerwright.nn.treated import TreatedLinear

SMALL = ["--samples", "4", "--length", "32"]
Said = Callable[..., str]


@pytest.fixture(scope="module")
def compressed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What edge_llm makes of the tiny model."""
    folder = tmp_path_factory.mktemp("edge")
    plan = folder / "made.yaml"
    for arguments in (
        ["plan", tiny, "-b", "size=0.65x", "--recipe", "edge_llm", "-o", plan, *SMALL],
        ["apply", tiny, plan, "-o", folder / "out", *SMALL],
    ):
        assert main([str(argument) for argument in arguments]) == 0
    return folder / "out"


def test_the_recipe_rounds_weights_inputs_and_caches_of_a_block_alike(compressed: Path) -> None:
    plan = Plan.load(compressed / "plan.yaml")
    model, _ = load(compressed)
    caches = {path: m.bits for path, m in model.named_modules() if isinstance(m, KeyValueRounding)}
    assert len(caches) == 3
    for path, bits in caches.items():
        attention = path.removesuffix(".key_value_rounding")
        assert plan.layers[attention] == (RoundCache(bits),)
        widths = {
            t.bits for p, own in plan.layers.items() if p.startswith(attention) for t in own if hasattr(t, "bits")
        }
        assert widths == {bits}
    assert any(isinstance(t, Quantize) for own in plan.layers.values() for t in own)


def test_tune_window_leaves_the_packed_weights_and_loads_again(compressed: Path, tmp_path: Path, said: Said) -> None:
    out = tmp_path / "adapted"
    arguments = ("-m", "window", "--steps", "30", "--rank", "2", "-o", out, "--json", *SMALL)
    data = json.loads(said("tune", compressed, *arguments))
    assert data["checkpoint"] == str(out)
    before, after = load(compressed)[0], load(out)[0]
    adapters = [m for m in after.modules() if isinstance(m, LoraLinear)]
    assert len(adapters) == 21 and any(bool(a.lora_B.any()) for a in adapters)
    packed = [m for m in before.modules() if isinstance(m, TreatedLinear)]
    kept = [a.base for a in adapters]
    for one, other in zip(packed, kept, strict=True):
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())
    assert {m.bits for m in after.modules() if isinstance(m, KeyValueRounding)} == {
        m.bits for m in before.modules() if isinstance(m, KeyValueRounding)
    }
    assert data["after"]["loss"] < data["before"]["loss"]


def test_tune_window_merges_where_weights_are_dense(tiny: Path, tmp_path: Path, said: Said) -> None:
    out = tmp_path / "merged"
    said("tune", tiny, "-m", "window", "--steps", "4", "--rank", "2", "-o", out, "--json", *SMALL)
    one, other = load(tiny)[0].state_dict(), load(out)[0].state_dict()
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one if "q_proj" in name)
    assert torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "1"], "at least 3"),
        (["--method", "windows"], "window"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(
    tiny: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["tune", str(tiny), "-m", "window", "-o", out, *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not Path(out).exists()


def test_exits_need_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "demo:vit", "-m", "window", "-o", str(tmp_path / "out"), "--samples", "8"]) == 2
    assert "causal language model" in capsys.readouterr().err
