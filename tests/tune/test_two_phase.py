from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.conv_as_attention import conv_to_attention
from layerwright.nn.patches import PatchConv, to_patches
from layerwright.nn.rel_pos_patch_attention import RelPosPatchAttention
from layerwright.treat.swap_convolution import SwappedConvolution
from layerwright.tune.two_phase import two_phase


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(8), PatchConv(nn.Conv2d(2, 2, 3, padding=1), 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x + self.mixer(self.norm(x))
        return mixed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(to_patches(images, 2)).mean(1))
        return logits


def net() -> Net:
    torch.manual_seed(0)
    return Net()


IMAGES = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 3


class Steps:
    """A few steps of gradient descent; keeps the losses, the kinds of mixers and the outputs before them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []
        self.kinds: list[str] = []
        self.before = torch.empty(0)

    def __call__(self, model: nn.Module) -> None:
        self.kinds = [type(block.mixer).__name__ for block in model.blocks]  # type: ignore[union-attr]
        self.before = model(IMAGES).detach()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(self.steps):
            loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.losses.append(float(loss.detach()))


def test_attention_starts_where_the_convolutions_end() -> None:
    model = net()
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = Steps(20), Steps(20)
    after_first: list[Tensor] = []

    def phase1(running: nn.Module) -> None:
        first(running)
        after_first.append(running(IMAGES).detach())

    trained = two_phase(model, phase1, second, sharpness=40)
    assert first.kinds == ["PatchConv"] * 2 and second.kinds == ["RelPosPatchAttention"] * 2
    torch.testing.assert_close(second.before, after_first[0], atol=1e-4, rtol=1e-4)
    assert second.losses[0] == pytest.approx(first.losses[-1], abs=0.05) and second.losses[-1] < second.losses[0]
    mixer = trained.blocks[0].mixer
    assert isinstance(mixer, RelPosPatchAttention) and mixer.query is not None and mixer.query.weight.abs().max() > 0
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    assert isinstance(model.blocks[0].mixer, PatchConv)


def test_sharpness_and_content_of_what_is_made() -> None:
    made = two_phase(net(), lambda _: None, lambda _: None)
    mixer: Any = made.blocks[1].mixer
    assert float(mixer.bias_table.detach().max()) == 6 and mixer.num_heads == 9 and not mixer.query.weight.any()
    some = two_phase(net(), lambda _: None, lambda _: None, names="blocks.1.mixer", sharpness=4.0)
    assert isinstance(some.blocks[0].mixer, PatchConv) and float(some.blocks[1].mixer.bias_table.detach().max()) == 4  # type: ignore[union-attr, arg-type]


def test_another_conversion() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
    outputs: list[Tensor] = []

    def convert(conv: nn.Module) -> nn.Module:
        assert isinstance(conv, nn.Conv2d)
        return SwappedConvolution(conv_to_attention(conv, 3), 3)

    def see(running: nn.Module) -> None:
        outputs.append(running(IMAGES).detach())

    made = two_phase(model, see, see, convert, names=["0"])
    assert isinstance(made[0], SwappedConvolution)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_bad_arguments_are_found_before_any_training() -> None:
    def never(_model: nn.Module) -> None:
        raise AssertionError("trained")

    with pytest.raises(InputError, match="has no PatchConv"):
        two_phase(nn.Sequential(nn.Conv2d(1, 1, 3)), never, never)
    with pytest.raises(InputError, match=r"did you mean .*blocks\.1\.mixer"):
        two_phase(net(), never, never, names="blocks.1.mixers")
    with pytest.raises(TypeError, match="head is Linear"):
        two_phase(net(), never, never, names="head")
    with pytest.raises(InputError, match="sharpness"):
        two_phase(net(), never, never, sharpness=-1)
    strided = net()
    strided.blocks[0].mixer.conv.stride = (2, 2)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="stride"):
        two_phase(strided, never, never)
