from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.nn.spiral import SpiralBlock, SpiralFC, SpiralMixing, shift_channels, spiral_offsets


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(inputs: int = 16, outputs: int = 5, **settings: Any) -> SpiralFC:
    torch.manual_seed(0)
    made = SpiralFC(inputs, outputs, **settings).double()
    nn.init.normal_(made.weight)
    if made.bias is not None:
        nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize(("channels", "distinct"), [(64, 25), (128, 44), (320, 92), (512, 123)])
def test_offsets_of_the_published_widths(channels: int, distinct: int) -> None:
    offsets = spiral_offsets(channels)
    size = channels // 2
    assert torch.equal(offsets[:size], offsets[size:]) and offsets.abs().max() == 7
    assert len({tuple(place) for place in offsets[:size].tolist()}) == distinct
    length = offsets[:size].double().norm(dim=1)
    assert bool((length <= 7 + 0.5**0.5).all())
    number = torch.arange(size, dtype=torch.float64)
    triangle = 14 / size * torch.minimum(number, size - number)
    assert bool(((length - triangle).abs() <= 0.5**0.5 + 1e-9).all()), "the radius up to rounding of both coordinates"
    assert offsets[0].tolist() == [0, 0] and offsets[size // 2].abs().max() == 7


def test_partitions_and_other_radii() -> None:
    assert spiral_offsets(12, partitions=3).view(3, 4, 2).unique(dim=0).shape[0] == 1
    assert not spiral_offsets(8, a_max=0).any()
    assert spiral_offsets(40, 1, a_max=3).abs().max() == 3
    # By hand: radius 2 * 2 / 4 = 1, 2, 1 at the angles of 1, 2, 3 quarter turns.
    assert spiral_offsets(4, 1, a_max=2, period=4).tolist() == [[0, 0], [0, 1], [-2, 0], [0, -1]]


@pytest.mark.parametrize("size", [(9, 12), (3, 5), (1, 1), (20, 17)])
def test_three_forms_agree(size: tuple[int, int]) -> None:
    """The gather, four plain loops, and depth-wise one-hot convolutions; maps smaller than the radius too."""
    fc, x = layer(), maps(2, *size, 16)
    expected = torch.zeros(2, *size, 5, dtype=torch.float64) + fc.bias
    for i in range(size[0]):
        for j in range(size[1]):
            for channel, (down, right) in enumerate(fc.offsets.tolist()):
                if 0 <= i + down < size[0] and 0 <= j + right < size[1]:
                    expected[:, i, j] += x[:, i + down, j + right, channel, None] * fc.weight[:, channel]
    torch.testing.assert_close(fc(x), expected, atol=1e-10, rtol=0)
    by_convolution = fc.as_convolutions()(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(by_convolution, expected, atol=1e-10, rtol=0)


def test_radius_zero_is_a_linear_layer() -> None:
    fc, x = layer(a_max=0), maps(2, 4, 6, 16)
    assert torch.equal(fc(x), nn.functional.linear(x, fc.weight, fc.bias))


def test_a_channel_reaches_only_its_own_place() -> None:
    fc, x = layer(), maps(1, 11, 11, 16).requires_grad_()
    (grad,) = torch.autograd.grad(fc(x)[0, 5, 5].sum(), x)
    for channel, (down, right) in enumerate(fc.offsets.tolist()):
        reached = grad[0, :, :, channel].nonzero().tolist()
        there = 0 <= 5 + down < 11 and 0 <= 5 + right < 11
        assert reached == ([[5 + down, 5 + right]] if there else [])


def test_a_moved_map_gives_a_moved_output_away_from_the_rim() -> None:
    fc, x = layer(), maps(1, 24, 24, 16)
    moved = fc(x.roll((1, 1), (1, 2)))
    torch.testing.assert_close(moved[:, 8:-8, 8:-8], fc(x).roll((1, 1), (1, 2))[:, 8:-8, 8:-8])


def test_gradients() -> None:
    fc, x = layer(6, 2, a_max=2, period=5), maps(1, 3, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(fc, (x,))


def test_shares_sum_to_one_and_weigh_both_parts() -> None:
    torch.manual_seed(0)
    mixing, x = SpiralMixing(16).double(), maps(2, 5, 6, 16)
    cross, local = mixing.cross(x), mixing.local(x)
    shares = mixing.shares(cross, local)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 16, dtype=torch.float64))
    mixed = torch.einsum("bhwcs,bcs->bhwc", torch.stack([cross, local], -1), shares)
    torch.testing.assert_close(mixing(x), mixing.proj(mixed))


def test_inner_residual() -> None:
    torch.manual_seed(0)
    plain = SpiralBlock(16).double()
    inner = SpiralBlock(16, inner_residual=True).double()
    inner.load_state_dict(plain.state_dict())
    x = maps(1, 4, 4, 16)
    middle = x + plain.mixing(plain.norm1(x))
    torch.testing.assert_close(inner(x) - plain(x), plain.norm2(middle))


def test_bfloat16_and_one_graph() -> None:
    block = SpiralBlock(16).bfloat16().eval()
    x = maps(2, 6, 7, 16).bfloat16()
    out = block(x)
    assert out.dtype == torch.bfloat16 and out.shape == x.shape
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), out)


def test_other_offsets_are_kept_with_the_weights() -> None:
    places = torch.zeros(16, 2)
    places[3] = torch.tensor([2, -1])
    fc = layer(offsets=places, a_max=2)
    other = layer(a_max=2)
    other.load_state_dict(fc.state_dict())
    x = maps(1, 5, 5, 16)
    assert torch.equal(other(x), fc(x))
    assert torch.equal(shift_channels(x, fc.offsets, 2)[..., :3], x[..., :3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partitions": 3}, "partitions"),
        ({"partitions": 0}, "partitions"),
        ({"a_max": -1}, "a_max"),
        ({"a_max": 1.5}, "a_max"),
        ({"period": 0}, "period"),
        ({"outputs": 0}, "out_channels"),
        ({"offsets": torch.zeros(4, 2)}, "offsets"),
        ({"offsets": torch.full((16, 2), 8)}, "offsets"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer(**settings)


def test_bad_maps_and_widths_are_named() -> None:
    fc = layer()
    for x in (maps(2, 16, 5, 5), maps(4, 4, 16), maps(0, 4, 4, 16)):
        with pytest.raises(InputError, match="channels last"):
            fc(x)
    for settings, message in (({"reduction": 0}, "reduction"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(InputError, match=message):
            SpiralMixing(16, **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mlp_ratio"):
        SpiralBlock(16, mlp_ratio=0)
