from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.treat.fold import FOLDED_MEAN, FOLDED_STD, fold_batchnorm


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics, gains of both signs and shifts of its own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.1)
            if module.affine:
                module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
                module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    return model.eval()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.stem(self.stem(x)))


class Leaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.stem(x)
        return self.norm(y) + y


class OutOfOrder(nn.Module):
    """Registration order is not the order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.second_norm, self.first_norm = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 1)
        self.first = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return self.second_norm(self.second(torch.relu_(self.first_norm(self.first(x)))))


CASES = {
    "plain": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 64, 64)),
    "no bias, grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)),
        (2, 4, 9, 9),
    ),
    "depthwise 1d": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.BatchNorm1d(4)), (2, 4, 9)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)), (3, 5)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "order": (OutOfOrder, (2, 3, 9, 9)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_output_is_the_same_and_the_model_untouched(name):
    build, shape = CASES[name]
    torch.manual_seed(0)
    model = settle(build())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batchnorm(model)
    x = torch.randn(shape)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_statistics_are_those_of_the_norm_without_its_sign():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    folded = fold_batchnorm(model)
    torch.testing.assert_close(getattr(folded[0], FOLDED_MEAN), model[1].bias)
    torch.testing.assert_close(getattr(folded[0], FOLDED_STD), model[1].weight.abs())
    assert (model[1].weight < 0).any()
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert not hasattr(fold_batchnorm(model, keep_statistics=False)[0], FOLDED_MEAN)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), "0"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "2"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "1"),
        (Shared(), "stem"),
        (Leaking(), "stem"),
    ],
)
def test_what_does_not_fold_is_named(model, named):
    with pytest.raises(ValueError, match=rf"^{named}: "):
        fold_batchnorm(model)


def test_training_mode_is_put_back():
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())).train()
    folded = fold_batchnorm(model)
    assert model.training and model[1].training
    assert folded.training and folded[0].training and folded[1].training


def test_data_feeds_a_model_that_a_random_image_does_not_fit():
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 6 * 6, 2)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).flatten(1))

    model = settle(Picky())
    with pytest.raises(ValueError, match="give data="):
        fold_batchnorm(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fold_batchnorm(model, data=[x])(x), model(x), atol=1e-5, rtol=1e-5)
