from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from layerwright.core.errors import CheckpointError, InputError
from layerwright.data.land_use import LAND_GROUPS, LAND_USE
from layerwright.models.backbone import Backbone, load_official_
from layerwright.models.hybrid_qcnn import (
    OFFICIAL_IGNORED,
    OFFICIAL_RULES,
    HierarchicalClassifier,
    HybridQCNN,
    LandUseCNN,
    reshape_official,
)
from oracles import quantum as oracle


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def released(angles: int, classes: int = 10) -> dict[str, torch.Tensor]:
    """Names and shapes of the released checkpoints, with random numbers."""
    shapes = {
        "conv1": (16, 3, 3, 3),
        "conv2": (32, 16, 3, 3),
        "conv3": (64, 32, 3, 3),
        "fc1": (120, 2304),
        "fc2": (84, 120),
        "fc3": (42, 84),
        "fc4": (angles, 2304),
        "fc5": (classes, 16),
    }
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0])
    return state


@pytest.mark.parametrize(("name", "angles"), [("real_amplitudes", 8), ("bell", 4), ("ry", 4)])
def test_released_weights_give_the_released_network(name: str, angles: int) -> None:
    state, images = released(angles), torch.rand(2, 3, 64, 64)
    model = HybridQCNN.from_config(name)
    load_official_(model, state, OFFICIAL_RULES, ignored=OFFICIAL_IGNORED, reshape=reshape_official)
    # The network as released: Qiskit's words have qubit 0 on the right, and are read in the order of the words.
    x = images
    for layer in ("conv1", "conv2", "conv3"):
        x = functional.relu(
            functional.max_pool2d(functional.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"]), 2)
        )
    theta = math.pi * torch.tanh(functional.linear(x.flatten(1), state["fc4.weight"], state["fc4.bias"]))
    p = oracle.states(4, model.quantum.circuit.gates, theta).square()
    words = ["".join(word) for word in itertools.product("01", repeat=4)]
    measured = torch.stack([p[:, int(word[::-1], 2)] for word in words], 1).float()
    logits = functional.linear(measured, state["fc5.weight"], state["fc5.bias"])
    torch.testing.assert_close(model(images), logits, atol=1e-5, rtol=1e-4)
    model.double_softmax = True
    torch.testing.assert_close(model(images), logits.softmax(1), atol=1e-5, rtol=1e-4)


def test_other_checkpoints_are_refused() -> None:
    with pytest.raises(CheckpointError, match="another shape"):
        load_official_(
            HybridQCNN("ry"), released(8), OFFICIAL_RULES, ignored=OFFICIAL_IGNORED, reshape=reshape_official
        )


def test_sizes_are_those_of_the_paper() -> None:
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in (
        ("wide", LandUseCNN.from_config("wide")), ("equal", LandUseCNN.from_config("equal")), ("hybrid", HybridQCNN()),
    )}  # fmt: skip
    assert count["wide"] == 329_290
    trunk = 448 + 4640 + 18_496
    assert count["hybrid"] == trunk + 2304 * 8 + 8 + 16 * 10 + 10
    assert count["equal"] == count["hybrid"] + 8 * 16 + 16
    assert HybridQCNN("bell").angles.out_features == 4 and HybridQCNN(n_qubits=5).classifier.in_features == 32


@pytest.mark.parametrize("kind", [HybridQCNN, LandUseCNN])
def test_the_contract_of_backbones(kind: type[HybridQCNN] | type[LandUseCNN]) -> None:
    model = kind.from_config("test")
    assert isinstance(model, Backbone)
    images = torch.rand(3, 3, 32, 32)
    assert model(images).shape == (3, 10)
    (features,) = model.forward_features(images)
    assert features.shape == (3, 8, 2, 2) and model.feature_channels == (8,) and model.num_features == 32
    model.reset_classifier(4)
    assert model(images).shape == (3, 4)
    model(images).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert not model.no_weight_decay()
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    assert kind(image_size=22)(torch.rand(1, 3, 22, 22)).shape == (1, 10)
    with torch.device("meta"):
        assert kind()(torch.empty(2, 3, 64, 64)).shape == (2, 10)


def test_compiles_whole() -> None:
    model, images = HybridQCNN.from_config("test"), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_angles_are_within_half_a_turn_and_settings_pass_on() -> None:
    model = HybridQCNN.from_config("test", shots=100, grad="released", seed=0)
    with torch.no_grad():
        model.angles.weight.mul_(1e4)
    angles = model.turns(torch.rand(4, 3, 32, 32)).detach()
    assert float(angles.abs().max()) <= math.pi + 1e-6 and angles.shape == (4, 8)
    assert model.quantum.shots == 100
    model(torch.rand(4, 3, 32, 32)).sum().backward()


class _Fixed(nn.Module):
    """Logits that are a linear function of the first pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 6))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.flatten(1)[:, :6] @ self.weight.T


def test_hierarchy_routes_and_sums_to_one() -> None:
    fine = {name: _Fixed(len(classes)) for name, classes in LAND_GROUPS.items()}
    model = HierarchicalClassifier(_Fixed(3), fine, LAND_GROUPS)
    images = torch.randn(50, 1, 3, 3)
    logs = model(images)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(50))
    shares = torch.zeros(50, 10)
    groups = model.coarse(images).softmax(1)
    for number, (name, classes) in enumerate(LAND_GROUPS.items()):
        shares[:, list(classes)] = groups[:, number, None] * fine[name](images).softmax(1)
    torch.testing.assert_close(logs.exp(), shares)
    for part in fine.values():
        part.seen = 0
    found = model.predict(images)
    assert sum(part.seen for part in fine.values()) == 50
    names = list(LAND_GROUPS)
    for sample in range(50):
        name = names[int(groups[sample].argmax())]
        own = LAND_GROUPS[name][int(fine[name](images[sample : sample + 1]).argmax())]
        assert int(found[sample]) == own
    assert sorted(c for classes in LAND_GROUPS.values() for c in classes) == list(range(len(LAND_USE)))


def test_bad_input() -> None:
    for build, message in (
        (lambda: HybridQCNN(image_size=21), "image_size: got 21, expected at least 22"),
        (lambda: HybridQCNN("ring"), "unknown circuit"),
        (lambda: HybridQCNN(n_qubits=17), "n_qubits: got 17"),
        (lambda: HybridQCNN(num_classes=0), "num_classes"),
        (lambda: HybridQCNN(widths=(4, 4)), "widths"),
        (lambda: LandUseCNN(hidden=(0,)), "hidden"),
        (lambda: HybridQCNN.from_config("x"), "config"),
        (lambda: HierarchicalClassifier(_Fixed(1), {"a": _Fixed(2)}, {"b": (0, 1)}), "groups: got b, expected"),
        (lambda: HierarchicalClassifier(_Fixed(1), {"a": _Fixed(2)}, {"a": (0, 2)}), "each of 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            build()
    model = HybridQCNN.from_config("test")
    for images, message in (
        (torch.rand(1, 3, 21, 32), "at least 22"),
        (torch.rand(1, 1, 32, 32), "3 channels"),
        (torch.rand(1, 3, 64, 64), "64 x 64 pixels, expected 32 a side"),
    ):
        with pytest.raises(InputError, match=message):
            model(images)
    with pytest.raises(TypeError, match="images"):
        model(torch.ones(1, 3, 32, 32, dtype=torch.uint8))
