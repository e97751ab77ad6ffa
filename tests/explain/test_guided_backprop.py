from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.explain.guided_backprop import MODES, GuidedBackprop, Mode, randomization_check


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6),
        nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def pictures(samples: int = 3) -> Tensor:
    return torch.randn(samples, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", MODES)
def test_three_layers_follow_the_rules_by_hand(mode: Mode) -> None:
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=shape) for shape in ((7, 6), (5, 7), (4, 5))]
    x = generator.normal(size=6)
    inputs, value = [], x
    for weight in weights[:-1]:
        inputs.append(weight @ value)
        value = np.maximum(inputs[-1], 0)
    signal = weights[-1][2]
    for weight, before in zip(reversed(weights[:-1]), reversed(inputs), strict=True):
        if mode in ("grad", "guided"):
            signal = signal * (before > 0)
        if mode in ("deconv", "guided"):
            signal = signal * (signal > 0)
        signal = weight.T @ signal
    layers: list[nn.Module] = [nn.Flatten()]
    for place, weight in enumerate(weights):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        linear.weight.data = torch.from_numpy(weight)
        layers += [linear, nn.ReLU()] if place < 2 else [linear]
    found = GuidedBackprop(nn.Sequential(*layers), mode)(torch.from_numpy(x).reshape(1, 1, 2, 3), 2)
    np.testing.assert_allclose(found.flatten().numpy(), signal, rtol=0, atol=1e-10)


def test_grad_is_autograd_and_the_model_is_left_alone() -> None:
    model, x = plain().train(), pictures()
    model(x).sum().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    pixels = x.clone().requires_grad_()
    model(pixels)[:, 1].sum().backward()
    grad = pixels.grad
    model.zero_grad()
    model(x).sum().backward()
    first = [GuidedBackprop(model, mode)(x, 1) for mode in MODES]
    again = [GuidedBackprop(model, mode)(x, 1) for mode in MODES]
    assert grad is not None and torch.equal(first[2], grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert model.training and not x.requires_grad
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)
    assert not torch.allclose(first[0], first[2]) and not torch.allclose(first[0], first[1])


def test_guided_is_the_gradient_where_all_signals_are_positive() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    nn.init.uniform_(model[3].weight, 0, 1)
    torch.testing.assert_close(GuidedBackprop(model)(pictures(), 0), GuidedBackprop(model, "grad")(pictures(), 0))


class Written(nn.Module):
    """The network of `plain`, with its rectifications written in another way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind, self.shared = plain(), kind, nn.ReLU()

    def relu(self, x: Tensor) -> Tensor:
        forms: dict[str, Callable[[Tensor], Tensor]] = {
            "functional": functional.relu, "torch": torch.relu, "method": lambda t: t.relu(), "shared": self.shared,
            "in place": lambda t: functional.relu(t, inplace=True), "method in place": lambda t: t.relu_(),
            "module in place": nn.ReLU(inplace=True), "hardtanh": nn.Hardtanh(0, 1e9),
        }  # fmt: skip
        return forms[self.kind](x)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.inner
        hidden = self.relu(layers[2](self.relu(layers[0](x))))
        return layers[7](self.relu(layers[5](hidden.flatten(1))))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind",
    ["functional", "torch", "method", "shared", "in place", "method in place", "module in place", "hardtanh"],
)
def test_every_way_to_write_a_relu_is_found(kind: str, mode: Mode) -> None:
    expected = GuidedBackprop(plain(), mode)(pictures(), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(GuidedBackprop(Written(kind), mode)(pictures(), torch.tensor([0, 1, 2])), expected)


def test_relu6_is_shut_above_six() -> None:
    model = nn.Sequential(nn.ReLU6(), nn.Flatten(), nn.Linear(3, 1, bias=False))
    nn.init.constant_(model[2].weight, 2.0)
    x = torch.tensor([-1.0, 3.0, 7.0]).reshape(1, 1, 1, 3)
    assert GuidedBackprop(model)(x, 0).flatten().tolist() == [0, 2, 0]
    assert GuidedBackprop(model, "deconv")(x, 0).flatten().tolist() == [2, 2, 2]


def test_units_of_inner_layers_and_their_own_value() -> None:
    model, x = plain(), pictures()
    found = GuidedBackprop(model)(x, ("2", 3, (1, 2)))
    assert found[:, :, [0, 6, 7]].abs().sum() == 0 and found[:, :, 1:6].abs().sum() > 0, (
        "rows 2 to 4, and one around, are seen"
    )
    values = model[:3](x)[:, 3, 1, 2].detach()
    weighed = GuidedBackprop(model, "grad")(x, ("2", 3, (1, 2)), start="activation")
    torch.testing.assert_close(
        weighed, values[:, None, None, None] * GuidedBackprop(model, "grad")(x, ("2", 3, (1, 2)))
    )
    assert GuidedBackprop(model)(x, ("7", 1, ())).shape == x.shape


def test_other_activations_are_refused_unless_asked_for() -> None:
    gelu = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(108, 2))
    with pytest.raises(InputError, match="1 runs gelu"):
        GuidedBackprop(gelu)(pictures(), 0)
    opened = GuidedBackprop(gelu, generalised=True)(pictures(), 0)
    relu = nn.Sequential(gelu[0], nn.ReLU(), *gelu[2:])
    torch.testing.assert_close(opened, GuidedBackprop(relu)(pictures(), 0))


@pytest.mark.parametrize(
    ("target", "images", "message"),
    [
        (3, pictures(), "target"),
        (torch.tensor([0, 1, -1]), pictures(), "target"),
        (("9", 0, ()), pictures(), "9"),
        (("2", 4, (0, 0)), pictures(), "target"),
        (("2", 0, (0,)), pictures(), "target"),
        (0, pictures()[0], "batch"),
    ],
)
def test_bad_targets_are_named(target: object, images: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GuidedBackprop(plain())(images, target)  # type: ignore[arg-type]


def test_a_model_without_relu_has_no_such_maps() -> None:
    with pytest.raises(InputError, match="no ReLU"):
        GuidedBackprop(nn.Sequential(nn.Flatten(), nn.Linear(128, 2)))(pictures(), 0)
    with pytest.raises(InputError, match="mode"):
        GuidedBackprop(plain(), "guide")  # type: ignore[arg-type]


def test_shuffled_layers_change_gradients_from_the_last_on() -> None:
    model, x = plain(), pictures()

    def explain(network: nn.Module, images: Tensor) -> Tensor:
        return GuidedBackprop(network, "grad")(images, 0)

    found = randomization_check(model, explain, x)
    assert [name for name, _ in found] == ["7", "5", "2", "0"]
    assert all(-1 <= value < 0.95 for _, value in found)
    same = randomization_check(model, lambda _network, images: images, x)
    assert all(value == pytest.approx(1) for _, value in same)
    assert torch.equal(plain()[7].weight, model[7].weight)
    with pytest.raises(InputError, match="shuffle"):
        randomization_check(nn.ReLU(), explain, x)


def test_captum_gives_the_same_maps() -> None:
    attr = pytest.importorskip("captum.attr")
    model, x = plain(), pictures()
    for ours, theirs in (("guided", attr.GuidedBackprop), ("deconv", attr.Deconvolution)):
        torch.testing.assert_close(GuidedBackprop(model, ours)(x, 1), theirs(model).attribute(x, target=1))  # type: ignore[arg-type]
