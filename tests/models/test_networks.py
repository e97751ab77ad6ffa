"""Networks of words: there and back, parameters by formula, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models import (
    DenseNetBC,
    PlainCNN,
    deepen_dense_,
    from_spec,
    load_network,
    save_network,
    widen_dense_,
    widen_transitions_,
)

CONV = st.builds(lambda f, k: f"conv-{f}-{k}", st.integers(1, 9), st.sampled_from([1, 3, 5]))
UNITS = st.builds(lambda u: f"fc-{u}", st.integers(1, 9))


@st.composite
def plain_specs(draw: st.DrawFn) -> list[str]:
    body = draw(st.lists(CONV, max_size=4))
    for _ in range(draw(st.integers(0, 3))):
        body.insert(draw(st.integers(0, len(body))), "pool")
    return [*body, *draw(st.lists(UNITS, max_size=2))]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@given(plain_specs(), st.booleans(), st.sampled_from([1, 3]))
@settings(max_examples=30, deadline=None)
def test_plain_spec_round_trip_and_parameter_count(spec: list[str], batch_norm: bool, channels: int) -> None:
    model = PlainCNN(spec, classes=4, channels=channels, size=8, batch_norm=batch_norm)
    assert model.to_spec() == spec
    again = PlainCNN.from_spec(model.to_spec(), **model.settings())
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert parameters(model) == PlainCNN.count_parameters(spec, 4, channels, 8, batch_norm)
    assert model.eval()(torch.zeros(2, channels, 8, 8)).shape == (2, 4)
    assert [word for word, _ in model.places()] == spec


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_dense_spec_round_trip_and_parameter_count(growths: list[list[int]]) -> None:
    model = DenseNetBC(growths, bc_ratio=2, classes=3)
    assert model.growths == growths
    again = DenseNetBC.from_spec(model.to_spec(), **model.settings())
    assert again.to_spec() == model.to_spec() and again.growths == growths
    assert parameters(model) == parameters(again) == DenseNetBC.count_parameters(growths, bc_ratio=2, classes=3)
    assert model.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_published_parameter_count_of_densenet_bc() -> None:
    """DenseNet-BC of depth 100 and growth 12 on CIFAR-10 has 0.8 M parameters (Huang et al., 2017, table 2)."""
    assert DenseNetBC.count_parameters([[12] * 16] * 3, channels=3) == pytest.approx(0.8e6, rel=0.05)
    assert DenseNetBC.count_parameters([[24] * 41] * 3, channels=3) == pytest.approx(15.3e6, rel=0.02)


def test_first_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    one, two = PlainCNN(["conv-3-3", "fc-4"]), PlainCNN(["conv-3-3", "fc-4"])
    three = PlainCNN(["conv-3-3", "fc-4"], generator=torch.Generator().manual_seed(1))
    DenseNetBC([[2], [2]])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.layers[0].weight, three.layers[0].weight)
    assert all(bool(p.isfinite().all()) for p in three.parameters())


@pytest.mark.parametrize("word", ["conv-8", "conv-8-2", "conv-0-3", "fc-0", "fc", "dropout", "", "conv-8-3-1"])
def test_unknown_words(word: str) -> None:
    with pytest.raises(ValueError, match="spec: got"):
        PlainCNN([word])


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="behind a fully connected"):
        PlainCNN(["fc-4", "conv-3-3"])
    with pytest.raises(ValueError, match="more pools"):
        PlainCNN(["pool"] * 4)
    for growths in ([], [[]], [[0]], [[2], []]):
        with pytest.raises(ValueError, match="growths"):
            DenseNetBC(growths)
    with pytest.raises(ValueError, match="transitions"):
        DenseNetBC([[2], [2]], transitions=[3, 4])
    with pytest.raises(ValueError, match="spec: got 'x4'"):
        DenseNetBC.from_spec(["g4", "x4"])
    with pytest.raises(ValueError, match="no words"):
        from_spec([])
    with pytest.raises(ValueError, match="block 2, layer 0"):
        deepen_dense_(DenseNetBC([[2]]), 2, 0)
    with pytest.raises(ValueError, match="new_width"):
        widen_dense_(DenseNetBC([[2]]), 0, 0, 2)


def test_from_spec_takes_the_kind_from_the_words() -> None:
    assert isinstance(from_spec(["conv-2-3", "pool"], size=4), PlainCNN)
    assert isinstance(from_spec(["g2", "t", "g2"], size=4, classes=3), DenseNetBC)


def test_transitions_follow_the_ratios_and_never_shrink() -> None:
    model = DenseNetBC([[4, 4], [4]], bc_ratio=2)
    assert model.settings()["stem"] == 8 and model.settings()["transitions"] == [8]
    for layer in range(2):
        widen_dense_(model, 0, layer, 8)
    assert model.settings()["bottlenecks"] == [[16, 16], [8]]  # bc_ratio times the growth
    widen_transitions_(model)
    assert model.settings()["stem"] == 13  # int(2 * 20 / 3)
    assert model.settings()["transitions"] == [14]  # int((13 + 16) / 2)
    deepen_dense_(model, 1, 0)  # lowers the mean growth
    widen_transitions_(model)
    assert model.settings()["stem"] == 13 and model.to_spec() == ["g8", "g8", "t", "g4", "g4"]


def test_inserted_copy_begins_as_the_paper_says() -> None:
    model = DenseNetBC([[3, 2], [2]], bc_ratio=2)
    old = model.blocks[0][0]
    weight, outputs = old.conv1.weight.detach().clone(), old.conv2.weight.detach().clone()
    deepen_dense_(model, 0, 0, torch.Generator().manual_seed(1))
    new = model.blocks[0][1]
    assert model.growths == [[3, 3, 2], [2]]
    assert torch.equal(new.conv1.weight[:, :-3], weight) and not new.conv1.weight[:, -3:].any()
    drawn = [next(i for i in range(3) if torch.equal(outputs[i], row)) for row in new.conv2.weight]
    assert len(drawn) == 3
    norm = new.norm1
    assert norm.num_features == new.conv1.in_channels
    assert (norm.weight[-3:] == 1).all() and not norm.bias[-3:].any()
    assert not norm.running_mean[-3:].any() and (norm.running_var[-3:] == 1).all()


@pytest.mark.parametrize("words", [["conv-3-5", "pool", "fc-4"], ["g2", "g3", "t", "g2"]])
def test_saved_networks_load_with_grown_sizes(words: list[str], tmp_path: Path) -> None:
    model = from_spec(words, classes=4)
    if isinstance(model, DenseNetBC):
        widen_dense_(model, 0, 0, 4)  # bottlenecks and transitions are no longer those of the ratios
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    save_network(model.eval(), tmp_path / "net")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["architecture.json", "model.safetensors"]
    again = load_network(tmp_path / "net")
    assert type(again) is type(model) and again.to_spec() == model.to_spec() and not again.training
    assert torch.equal(model(x), again(x))


def test_damaged_networks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no network"):
        load_network(tmp_path)
    save_network(PlainCNN(["conv-2-3"]), tmp_path)
    weights, architecture = tmp_path / "model.safetensors", tmp_path / "architecture.json"
    good = load_file(weights)
    save_file({**good, "layers.0.weight": torch.full_like(good["layers.0.weight"], torch.nan)}, weights)
    with pytest.raises(CheckpointError, match="NaN"):
        load_network(tmp_path)
    weights.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="no readable network"):
        load_network(tmp_path)
    save_file(good, weights)
    data = json.loads(architecture.read_text())
    for wrong in ({**data, "spec": ["conv-3-3"]}, {**data, "kind": "other"}, {}, {**data, "settings": {"x": 1}}):
        architecture.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="no readable network"):
            load_network(tmp_path)
    assert issubclass(CheckpointError, InputError)
