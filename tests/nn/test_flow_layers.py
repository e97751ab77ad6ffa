from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwright.core.errors import InputError
from layerwright.nn.flow_layers import ActNorm2d, AffineCoupling, InvertibleConv1x1, SplitPrior, Squeeze2d
from oracles.finc import jacobian_logdet


def _coupling(channels: int = 4) -> AffineCoupling:
    coupling = AffineCoupling(channels, 8)
    with torch.no_grad():
        for p in (coupling.last.weight, coupling.last.bias, coupling.logs):
            p.normal_(0, 0.3)  # type: ignore[union-attr]
    return coupling


def _actnorm(channels: int = 4) -> ActNorm2d:
    norm = ActNorm2d(channels)
    norm.initialize_(3 + 2 * torch.randn(8, channels, 4, 4))
    return norm


@pytest.mark.parametrize(
    "make", [_coupling, _actnorm, lambda: InvertibleConv1x1(4), lambda: InvertibleConv1x1(4, lu=True)]
)
def test_inverses_and_determinants(make: Any) -> None:
    torch.manual_seed(0)
    layer = make().double()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    if isinstance(layer, InvertibleConv1x1):
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.2 * torch.randn(p.shape))
    y, logdet = layer(x)
    torch.testing.assert_close(layer.inverse(y), x)
    found = jacobian_logdet(lambda flat: layer(flat.view(1, 4, 3, 2))[0].flatten(), x.flatten())
    assert logdet.shape == (1,) and abs(found) > 1e-3
    assert found == pytest.approx(float(logdet.detach()), abs=1e-10)


def test_actnorm_takes_the_first_batch_and_no_other() -> None:
    torch.manual_seed(0)
    norm, x = ActNorm2d(3), 5 + torch.tensor([0.5, 2, 9]).view(1, -1, 1, 1) * torch.randn(64, 3, 5, 5)
    with pytest.raises(RuntimeError, match="no batch"):
        norm.inverse(x)
    with pytest.raises(RuntimeError, match="no batch"):
        norm.eval()(x)
    y = norm.train()(x)[0]
    assert y.mean((0, 2, 3)).abs().max() < 1e-4 and (y.std((0, 2, 3)) - 1).abs().max() < 1e-3
    before = norm.mean.clone()
    norm(x + 7)
    torch.testing.assert_close(norm.mean, before)


def test_a_loaded_actnorm_is_initialised(tmp_path: Any) -> None:
    norm = _actnorm()
    save_file(norm.state_dict(), tmp_path / "norm.safetensors")
    other = ActNorm2d(4).eval()
    other.load_state_dict(load_file(tmp_path / "norm.safetensors"))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(other(x)[0], norm(x)[0])
    fresh = ActNorm2d(4).eval()
    fresh.load_state_dict(ActNorm2d(4).state_dict())
    with pytest.raises(RuntimeError, match="no batch"):
        fresh(x)


def test_one_by_one_starts_orthogonal_in_both_forms() -> None:
    plain, split = (InvertibleConv1x1(6, lu, generator=torch.Generator().manual_seed(3)) for lu in (False, True))
    torch.testing.assert_close(plain.matrix() @ plain.matrix().T, torch.eye(6))
    torch.testing.assert_close(split.matrix(), plain.matrix())
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(split(x)[0], plain(x)[0])
    assert split(x)[1].abs().max() < 1e-4


def test_the_coupling_starts_as_the_identity_and_reads_the_first_half() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 3)
    fresh = AffineCoupling(4, 8)
    torch.testing.assert_close(fresh(x)[0], x)
    coupling = _coupling()
    y, logdet = coupling(x)
    hidden = coupling.last(coupling.net(x[:, :2])) * torch.exp(3 * coupling.logs).view(1, -1, 1, 1)
    scale = 2 * torch.tanh(hidden[:, [0, 2]] / 2)
    torch.testing.assert_close(y, torch.cat([x[:, :2], x[:, 2:] * scale.exp() + hidden[:, [1, 3]]], 1))
    torch.testing.assert_close(logdet, scale.sum((1, 2, 3)))
    assert [m.kernel_size for m in coupling.net if isinstance(m, torch.nn.Conv2d)] == [(3, 3), (1, 1)]


def test_squeeze_is_a_bijection_and_split_comes_back() -> None:
    x, squeeze = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6), Squeeze2d()
    y = squeeze(x)
    assert y.shape == (2, 12, 2, 3) and y[0, :4, 0, 0].tolist() == [0, 1, 6, 7]
    assert torch.equal(squeeze.inverse(y), x)
    split = SplitPrior(4, 8)
    split.coupling = _coupling()
    z = torch.randn(2, 4, 3, 3)
    kept, left, logdet = split(z)
    assert kept.shape == left.shape == (2, 2, 3, 3) and torch.equal(kept, z[:, :2]) and logdet.shape == (2,)
    torch.testing.assert_close(split.inverse(kept, left), z)


@pytest.mark.parametrize(
    "layer", [_actnorm(), InvertibleConv1x1(4), InvertibleConv1x1(4, lu=True), _coupling()], ids=lambda m: type(m).__name__
)  # fmt: skip
def test_compiles_whole_and_runs_in_bfloat16(layer: Any) -> None:
    x = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    y, logdet = layer.bfloat16()(x.bfloat16())
    assert y.dtype == logdet.dtype == torch.bfloat16
    assert (layer.inverse(y).float() - x).abs().max() < 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActNorm2d(0), "channels"),
        (lambda: InvertibleConv1x1(0), "channels"),
        (lambda: AffineCoupling(3), "channels"),
        (lambda: AffineCoupling(4, 0), "width"),
        (lambda: Squeeze2d()(torch.zeros(1, 1, 3, 4)), "both sides even"),
        (lambda: Squeeze2d().inverse(torch.zeros(1, 3, 3, 4)), "multiple of 4"),
        (lambda: _coupling()(torch.zeros(1, 6, 2, 2)), "x: got shape"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
