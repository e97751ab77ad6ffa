"""Measured damage of one treated weight, against runs of the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration
from layerwright.core.layer import read_matrix
from layerwright.core.layers import list_layers, treatable
from layerwright.score.inputs import units_of
from layerwright.score.replay import Replay, divergence, model_damage, thin_batch, with_weight
from zoo import ZOO


def test_divergence_is_that_of_the_distributions() -> None:
    before, after = torch.randn(700, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(700, 5)
    p = torch.distributions.Categorical(logits=before)
    q = torch.distributions.Categorical(logits=after)
    assert divergence(before, after) == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-5)
    assert divergence(before, before) == 0.0


@pytest.mark.parametrize("name", ["llama", "vit", "bart", "convnext", "qwen3_moe", "gemma3"])
def test_a_replayed_run_equals_a_whole_one_and_leaves_no_trace(name: str) -> None:
    model, batches = ZOO[name]()
    data, refs = Calibration(batches), treatable(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    units = list(units_of(model, refs))
    replay = Replay(model, data, batches[0], units)
    for ref in refs[:: max(len(refs) // 4, 1)]:
        changed = read_matrix(model, ref) * 0.7
        with with_weight(model, ref, changed):
            whole = Replay(model, data, batches[0], units)
        expected = (
            float(whole._before - replay._before) if replay.by_loss else divergence(replay._before, whole._before)
        )
        assert replay.damage(ref, changed) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


def test_blocks_before_the_changed_one_are_not_run() -> None:
    model, batches = ZOO["llama"]()
    refs = treatable(model)
    blocks = sorted({ref.path.split(".self_attn")[0] for ref in refs if ".self_attn" in ref.path})
    replay = Replay(model, Calibration(batches), batches[0], blocks)
    runs: list[str] = []
    first = next(ref for ref in refs if ref.path.startswith(blocks[0]))
    handle = model.get_submodule(first.path).register_forward_hook(lambda *_: runs.append(first.path))
    last = next(ref for ref in refs if ref.path.startswith(blocks[-1]))
    replay.damage(last, read_matrix(model, last))
    assert runs == []
    replay.damage(first, read_matrix(model, first))
    assert runs == [first.path]
    handle.remove()


class _Writes(nn.Module):
    """Adds to its input in place, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            x += 1
        return x


def test_outputs_that_are_written_to_are_not_replayed() -> None:
    torch.manual_seed(0)
    model = _Writes()
    batch = (torch.randn(6, 4), torch.randint(4, (6,)))
    replay = Replay(model, Calibration([batch]), batch, ["blocks.0", "blocks.1", "blocks.2"])
    assert replay._blocks.position("blocks.1") == -1  # nothing is kept
    ref = next(ref for ref in list_layers(model) if ref.path == "blocks.2")
    assert replay.damage(ref, read_matrix(model, ref)) == 0.0


def test_without_classes_the_loss_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    x, y = torch.randn(6, 4), torch.randn(6, 1)

    def loss(model: nn.Module, batch: object) -> torch.Tensor:
        return (model(x) - y).square().mean()

    data = Calibration([(x, y)], loss)
    replay = Replay(model, data, data.batches[0], [])
    ref = next(ref for ref in list_layers(model) if ref.path == "0")
    changed = read_matrix(model, ref) * 0
    with torch.no_grad():
        before = loss(model, None)
        with with_weight(model, ref, changed):
            after = loss(model, None)
    assert replay.by_loss
    assert replay.damage(ref, changed) == pytest.approx(float(after - before))


def test_a_thinned_batch_holds_the_terms_asked_for() -> None:
    ids = torch.arange(80).reshape(8, 10)
    thin = thin_batch({"input_ids": ids, "labels": ids}, 20)
    assert len(thin["labels"]) == 3
    assert thin["labels"][0, 0] == 0
    assert thin["labels"][-1, 0] == 70
    assert thin_batch({"input_ids": ids, "labels": ids}, 1000)["labels"].shape == (8, 10)
    uneven = {"input_ids": ids, "patches": torch.zeros(3, 2)}
    assert thin_batch(uneven, 1) is uneven


def test_a_model_does_not_differ_from_itself() -> None:
    model, batches = ZOO["llama"]()
    data = Calibration(batches)
    assert model_damage(model, model, data) == 0.0
    other = ZOO["llama"]()[0]
    with torch.no_grad():
        next(other.parameters()).mul_(0.5)
    assert model_damage(model, other, data) > 0
