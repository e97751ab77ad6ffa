from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.conv_as_attention import conv_anchor, patch_radius
from layerwright.nn.patches import from_patches, to_patches
from layerwright.nn.rel_pos_patch_attention import RelPosPatchAttention
from layerwright.theory.conv_attention import (
    conv_to_attention,
    head_dims,
    heads_necessary,
    heads_sufficient,
    patch_conv_blocks,
    quadratic_codes,
    span_residual,
)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draw(seed))


def convolution(channels: int, outputs: int, kernel: Any, **more: Any) -> nn.Conv2d:
    conv = nn.Conv2d(channels, outputs, kernel, padding=more.pop("padding", "same"), **more).double()
    with torch.no_grad():
        conv.weight.copy_(random(*conv.weight.shape, seed=5))
        if conv.bias is not None:
            conv.bias.copy_(random(outputs, seed=6))
    return conv


def error(conv: nn.Conv2d, patch: int, height: int, width: int, images: Tensor | None = None, **more: Any) -> float:
    """Largest difference between a convolution and the attention made of it, on the map."""
    layer = conv_to_attention(conv, patch, **more)
    images = random(2, conv.in_channels, height, width, seed=9).to(conv.weight) if images is None else images
    grid = (height // patch, width // patch)
    with torch.no_grad():
        out = from_patches(layer(to_patches(images, patch), grid), patch, grid)
        return float((out - conv(images)).abs().max())


@settings(max_examples=25, deadline=None)
@given(
    patch=st.integers(1, 4), kernel=st.sampled_from([1, 3, 5, 7]), rows=st.integers(1, 4), columns=st.integers(1, 4),
    channels=st.integers(1, 3), outputs=st.integers(1, 3), bias=st.booleans(),
    border=st.sampled_from(["zero_token", "null_token"]), dilation=st.sampled_from([1, 2]),
)  # fmt: skip
def test_attention_is_the_convolution(
    patch: int,
    kernel: int,
    rows: int,
    columns: int,
    channels: int,
    outputs: int,
    bias: bool,
    border: Any,
    dilation: int,
) -> None:
    conv = convolution(channels, outputs, kernel, bias=bias, dilation=dilation)
    assert error(conv, patch, rows * patch, columns * patch, border=border) < 1e-11


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("conv", "patch"),
    [
        (convolution(4, 6, 3, groups=2), 2),
        (convolution(4, 4, 3, groups=4), 4),
        (convolution(2, 3, (3, 5)), 2),
        (convolution(2, 3, (1, 7)), 4),
        (convolution(2, 3, 4), 2),
        (convolution(2, 2, 2, dilation=3), 4),
        (convolution(3, 2, 3, padding=1), 4),
    ],
)
def test_groups_oblong_and_even_kernels(conv: nn.Conv2d, patch: int) -> None:
    assert error(conv, patch, 3 * patch, 4 * patch) < 1e-11


def test_single_precision_is_exact_to_rounding() -> None:
    assert error(convolution(3, 5, 3).float(), 4, 16, 24) < 1e-5
    assert error(convolution(3, 5, 3).float(), 4, 16, 24, encoding="quadratic") < 1e-5
    layer = conv_to_attention(convolution(3, 5, 3).bfloat16(), 2)
    assert layer.value.weight.dtype == torch.bfloat16 and layer(torch.zeros(1, 9, 12).bfloat16()).isfinite().all()


def test_quadratic_positions_on_pixels_and_patches() -> None:
    for patch, kernel in ((1, 3), (1, 5), (2, 3), (4, 9)):
        for border in ("zero_token", "null_token"):
            conv = convolution(2, 3, kernel)
            assert error(conv, patch, 4 * patch, 5 * patch, encoding="quadratic", border=border) < 1e-11


def test_a_circular_border_is_circular_padding() -> None:
    conv = convolution(2, 3, 3, padding=1, padding_mode="circular")
    assert conv_to_attention(conv, 2).border == "circular"
    assert error(conv, 2, 6, 10) < 1e-11
    wider = convolution(2, 3, 5, padding=2, padding_mode="circular")
    assert error(wider, 1, 5, 7) < 1e-11
    plain = convolution(2, 3, 3)
    images = random(1, 2, 6, 6)
    layer = conv_to_attention(plain, 2, border="circular")
    wrapped = functional.conv2d(functional.pad(images, (1,) * 4, mode="circular"), plain.weight, plain.bias)
    torch.testing.assert_close(from_patches(layer(to_patches(images, 2)), 2), wrapped)


def test_the_interior_is_right_without_a_border() -> None:
    conv, images = convolution(2, 3, 5), random(1, 2, 16, 16)
    layer = conv_to_attention(conv, 4, border="interior")
    out = from_patches(layer(to_patches(images, 4)), 4)
    torch.testing.assert_close(out[..., 4:-4, 4:-4], conv(images)[..., 4:-4, 4:-4])
    assert (out - conv(images))[..., 0, :].abs().max() > 0.1


def test_an_anchor_moves_even_kernels() -> None:
    conv, images = convolution(2, 3, 4, padding=0), random(1, 2, 8, 8)
    for up, left in ((0, 3), (1, 2), (3, 0)):
        layer = conv_to_attention(conv, 4, anchor=(up, left))
        padded = functional.pad(images, (left, 3 - left, up, 3 - up))
        torch.testing.assert_close(from_patches(layer(to_patches(images, 4)), 4), conv(padded))
    assert conv_anchor(convolution(1, 1, 4)) == (1, 1)
    assert patch_radius(4, 1, anchor=0) == 3


def test_heads_and_widths() -> None:
    conv = convolution(2, 3, 3)
    layer = conv_to_attention(conv, 4)
    assert layer.num_heads == 9 and sorted(layer.head_dims) == [2] * 4 + [8] * 4 + [32]
    assert sum(layer.head_dims) == (4 + 2 * 1) ** 2 * 2
    equal = conv_to_attention(conv, 4, head_dim=40)
    assert set(equal.head_dims) == {40} and error(conv, 4, 8, 12, head_dim=40) < 1e-11
    assert error(conv, 4, 8, 12, num_heads=12) < 1e-11
    assert conv_to_attention(convolution(2, 3, 1), 4, num_heads=3).num_heads == 3
    assert conv_to_attention(convolution(2, 3, 7), 2).num_heads == 25 == heads_sufficient(7, 2)
    assert error(convolution(2, 3, 7), 2, 8, 10) < 1e-11
    sparse = convolution(2, 3, 3)
    with torch.no_grad():
        sparse.weight[..., 0] = 0
    assert conv_to_attention(sparse, 4).num_heads == 6 and error(sparse, 4, 8, 8) < 1e-11
    assert conv_to_attention(sparse, 4, prune_zero=False).num_heads == 9
    with torch.no_grad():
        sparse.weight.zero_()
    assert conv_to_attention(sparse, 4).num_heads == 1 and error(sparse, 4, 8, 8) < 1e-11


def test_a_skip_connection_is_taken_off() -> None:
    conv, images = convolution(3, 3, 3), random(2, 3, 8, 8)
    layer = conv_to_attention(conv, 4, subtract_identity=True)
    tokens = to_patches(images, 4)
    torch.testing.assert_close(from_patches(tokens + layer(tokens), 4), conv(images))


def test_content_waits_until_it_is_trained() -> None:
    conv = convolution(2, 3, 3)
    assert error(conv, 4, 8, 8, content=True) < 1e-11
    layer = conv_to_attention(conv, 4, content=True, sharpness=5)
    layer(random(2, 9, 32)).square().sum().backward()
    assert layer.query is not None and layer.query.weight.grad is not None
    assert layer.query.weight.grad.abs().max() > 0, "queries at zero, keys not, so that they can learn"


def test_gradients_at_large_sharpness_vanish() -> None:
    found = []
    for sharpness in (4.0, 8.0, 40.0):
        layer = conv_to_attention(convolution(2, 3, 3), 4, sharpness=sharpness)
        layer(random(2, 16, 32)).square().sum().backward()
        assert layer.bias_table is not None and layer.bias_table.grad is not None
        found.append(float(layer.bias_table.grad.abs().max()))
    assert found[0] > 10 * found[1] > 1e10 * found[2]


def test_a_state_can_be_stored_and_loaded(tmp_path: Any) -> None:
    layer = conv_to_attention(convolution(2, 3, 3), 4)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh = RelPosPatchAttention(
        layer.dim_in, layer.dim_out, layer.num_heads, layer.head_dims, radius=layer.radius, content=False, border=layer.border
    )  # fmt: skip
    fresh.double().load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    tokens = random(2, 12, 32)
    torch.testing.assert_close(fresh(tokens, (3, 4)), layer(tokens, (3, 4)), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("patch", "kernel", "dilation", "groups"), [(1, 3, 1, 1), (3, 5, 1, 2), (2, 3, 2, 1), (2, 7, 1, 1)]
)
def test_blocks_are_their_formula_and_carry_gradients(patch: int, kernel: int, dilation: int, groups: int) -> None:
    weight = random(4, 4 // groups, kernel, kernel).requires_grad_()
    blocks = patch_conv_blocks(weight, patch, dilation, groups)
    p = dilation * (kernel - 1) // 2
    for (down, right), block in blocks.items():
        cells = block.view(4, patch, patch, 4, patch, patch)
        for _ in range(20):
            c, uy, ux, o, vy, vx = (
                int(torch.randint(n, (), generator=draw(_))) for n in (4, patch, patch, 4, patch, patch)
            )
            i, j = uy + patch * down - vy + p, ux + patch * right - vx + p
            there = all(x % dilation == 0 and 0 <= x // dilation < kernel for x in (i, j))
            there = there and c // (4 // groups) == o // (4 // groups)
            expected = weight[o, c % (4 // groups), i // dilation, j // dilation] if there else 0.0
            assert cells[c, uy, ux, o, vy, vx] == expected
    images, target = random(1, 4, 3 * patch, 3 * patch), random(1, 4, 3 * patch, 3 * patch, seed=1)
    tokens = to_patches(images, patch).unflatten(1, (3, 3))
    total: Any = 0.0
    for (down, right), block in blocks.items():
        moved = functional.pad(tokens, (0, 0, 3, 3, 3, 3))[:, 3 + down : 6 + down, 3 + right : 6 + right]
        total = total + (moved @ block * to_patches(target, patch).unflatten(1, (3, 3))).sum()
    ours = torch.autograd.grad(total, weight)[0]
    direct = functional.conv2d(images, weight, padding="same", dilation=dilation, groups=groups)
    torch.testing.assert_close(total, (direct * target).sum())
    torch.testing.assert_close(ours, torch.autograd.grad((direct * target).sum(), weight)[0])


def test_numbers_of_heads() -> None:
    for patch in (2, 4, 7):
        assert {heads_sufficient(k, patch) for k in range(3, 2 * patch + 2, 2)} == {9}
    assert [heads_sufficient(k, 1) for k in (1, 3, 5)] == [1, 9, 25]
    assert heads_sufficient(3, 4, dilation=4) == 9 and heads_sufficient(3, 4, dilation=5) == 25
    for patch in (2, 3, 4):
        for kernel in (k for k in (3, 5, 7) if k <= 2 * patch + 1):
            assert heads_necessary(random(1, 1, kernel, kernel), patch) == 9
    for (inputs, outputs), rank in (((1, 1), 1), ((2, 2), 4), ((3, 4), 9)):
        assert heads_necessary(random(outputs, inputs, 3, 3), 1) == rank


@pytest.mark.parametrize(
    ("patch", "kernel", "inputs", "outputs"), [(1, 5, 2, 3), (2, 9, 1, 1), (2, 9, 2, 1), (2, 9, 2, 2), (2, 13, 2, 2), (3, 13, 1, 1)]
)  # fmt: skip
def test_wide_kernels_need_no_more_heads_than_differences_of_pixels(
    patch: int, kernel: int, inputs: int, outputs: int
) -> None:
    needed = min(heads_sufficient(kernel, patch), (2 * patch - 1) ** 2 * inputs * outputs)
    assert heads_necessary(random(outputs, inputs, kernel, kernel), patch) == needed


def test_widths_of_heads() -> None:
    found = head_dims(3, 4, 2, 3)
    assert (found[0, 0], found[0, 1], found[-1, 0], found[1, 1]) == (32, 8, 8, 2)
    for patch, kernel, channels in ((4, 3, (2, 3)), (4, 9, (1, 2)), (3, 5, (2, 2)), (2, 3, (3, 1))):
        p = (kernel - 1) // 2
        widths = head_dims(kernel, patch, *channels)
        assert sum(widths.values()) == (patch + 2 * p) ** 2 * min(channels)
        blocks = patch_conv_blocks(random(channels[1], channels[0], kernel, kernel), patch)
        assert {offset: int(torch.linalg.matrix_rank(block)) for offset, block in blocks.items()} == widths
    dilated = patch_conv_blocks(random(2, 2, 3, 3), 3, dilation=2)
    assert {o: int(torch.linalg.matrix_rank(b)) for o, b in dilated.items()} == head_dims(3, 3, 2, 2, dilation=2)


def test_eight_heads_leave_what_no_search_can_remove() -> None:
    weight = random(3, 2, 3, 3)
    assert span_residual(weight, 4, 9) < 1e-14 < 0.02 < span_residual(weight, 4, 8) < span_residual(weight, 4, 7)
    stacked = torch.stack([block.flatten() for block in patch_conv_blocks(weight, 4).values()])
    for seed in range(5):
        looks = random(9, 8, seed=seed).softmax(0)
        best = looks @ torch.linalg.lstsq(looks, stacked).solution
        left = (best - stacked).norm() / stacked.norm()
        assert left >= span_residual(weight, 4, 8)
    left_vectors, _, _ = torch.linalg.svd(stacked, full_matrices=False)
    reached = (stacked - left_vectors[:, :8] @ left_vectors[:, :8].mT @ stacked).norm() / stacked.norm()
    assert float(reached) == pytest.approx(span_residual(weight, 4, 8))


def test_absolute_positions_can_express_an_offset() -> None:
    queries, keys = quadratic_codes((3, 4), (1, -1), 2.5)
    assert queries.shape == keys.shape == (12, 4)
    layer = RelPosPatchAttention(4, 4, 1, 1, content=False, encoding="quadratic", border="interior").double()
    layer.look_at_([(1, -1)], 2.5)
    torch.testing.assert_close(queries @ keys.mT, layer.position_logits((3, 4))[0][0])
    shorter = (queries[:, :3] @ keys[:, :3].mT).softmax(1)
    torch.testing.assert_close(shorter, (queries @ keys.mT).softmax(1))


class _Other(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize(
    ("conv", "more", "message"),
    [
        (nn.Conv2d(2, 2, 3, stride=2, padding=1), {}, "stride"),
        (nn.Conv2d(2, 2, 3), {}, "padding"),
        (nn.Conv2d(2, 2, 3, padding="valid"), {}, "padding"),
        (nn.Conv2d(2, 2, 4, padding=1), {}, "anchor: needed"),
        (nn.Conv2d(2, 2, 3, padding=1), {"anchor": (3, 0)}, "anchor: got"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), {}, "reflect"),
        (nn.Conv2d(2, 2, 3, padding=1), {"sharpness": 0.0}, "sharpness"),
        (nn.Conv2d(2, 2, 3, padding=1), {"head_dim": 31}, "need 32"),
        (nn.Conv2d(2, 2, 3, padding=1), {"num_heads": 8}, "needs 9 heads"),
        (nn.Conv2d(2, 3, 3, padding=1), {"subtract_identity": True}, "subtract_identity"),
    ],
)
def test_what_cannot_be_converted_is_named(conv: nn.Conv2d, more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        conv_to_attention(conv, 4, **more)


def test_other_modules_and_numbers_are_refused() -> None:
    for module in (nn.Linear(2, 2), nn.Conv1d(2, 2, 3, padding=1), _Other(2, 2, 3, padding=1)):
        with pytest.raises(TypeError, match="conv"):
            conv_to_attention(module, 4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="groups"):
        patch_conv_blocks(random(3, 1, 3, 3), 2, groups=2)
    with pytest.raises(InputError, match="weight"):
        patch_conv_blocks(random(3, 3), 2)
    with pytest.raises(InputError, match="anchor"):
        patch_conv_blocks(random(1, 1, 4, 4), 2)
    with pytest.raises(InputError, match="anchor"):
        heads_sufficient(4, 2)
    with pytest.raises(InputError, match="patch"):
        heads_sufficient(3, 0)
    with pytest.raises(InputError, match="channels"):
        head_dims(3, 4, 0, 2)
    with pytest.raises(InputError, match="heads"):
        span_residual(random(1, 1, 3, 3), 2, -1)
    with pytest.raises(InputError, match="all zero"):
        span_residual(torch.zeros(1, 1, 3, 3), 2, 1)
