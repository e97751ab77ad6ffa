from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.patches import PatchConv, from_patches, grid_of, to_patches
from layerwright.nn.rel_pos_patch_attention import RelPosPatchAttention


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draw(seed))


def attention(heads: int = 3, widths: Any = (4, 1, 2), **settings: Any) -> RelPosPatchAttention:
    """Weights large enough that every part matters."""
    layer = RelPosPatchAttention(6, 5, heads, widths, generator=draw(), **settings).double()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number + 1))
    return layer


def by_hand(layer: RelPosPatchAttention, tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Head by head, query by query, key by key."""
    out = tokens.new_zeros(len(tokens), rows * columns, layer.dim_out)
    reach = layer.radius
    for sample, x in enumerate(tokens):
        start = 0
        for head, width in enumerate(layer.head_dims):
            values = x @ layer.value.weight[start : start + width].mT
            for t in range(rows * columns):
                logits, sources = [], []
                for a in range(-reach, rows + reach):
                    for b in range(-reach, columns + reach):
                        offset = (a - t // columns, b - t % columns)
                        inside = 0 <= a < rows and 0 <= b < columns
                        near = max(map(abs, offset)) <= reach
                        if layer.border == "circular" and inside:
                            sizes = (rows, columns)
                            wrapped = [(o + n // 2) % n - n // 2 for o, n in zip(offset, sizes, strict=True)]
                            offset, near = (wrapped[0], wrapped[1]), max(map(abs, wrapped)) <= reach
                        seen_outside = layer.border == "zero_token" or (layer.border == "null_token" and near)
                        if not inside and not seen_outside:
                            continue
                        if layer.bias_table is None:
                            away = torch.tensor(offset).double() - layer.centre[head]
                            logit = -layer.sharpness[head] * away.square().sum()
                        else:
                            side = 2 * reach + 1
                            place = (offset[0] + reach) * side + offset[1] + reach if near else side**2
                            logit = layer.bias_table[head, place]
                        if inside and layer.query is not None and layer.key is not None:
                            rows_of = slice(head * layer.key_dim, (head + 1) * layer.key_dim)
                            query, key = (
                                layer.query.weight[rows_of] @ x[t],
                                layer.key.weight[rows_of] @ x[a * columns + b],
                            )
                            logit = logit + query @ key / math.sqrt(layer.key_dim)
                        logits.append(logit)
                        sources.append(values[a * columns + b] if inside else values.new_zeros(width))
                mixed = torch.stack(logits).softmax(0) @ torch.stack(sources)
                out[sample, t] += layer.out.weight[:, start : start + width] @ mixed
            start += width
    return out + layer.out.bias


def test_features_are_ordered_as_unfold_and_patch_embeddings_order_them() -> None:
    images = random(2, 3, 8, 12)
    tokens = to_patches(images, 4)
    torch.testing.assert_close(tokens, functional.unfold(images, 4, stride=4).mT)
    assert tokens[1, 4, 2 * 16 + 3 * 4 + 1] == images[1, 2, 4 + 3, 4 + 1], "patch (1, 1), channel 2, pixel (3, 1)"
    embed = nn.Conv2d(3, 7, 4, 4).double()
    flat = functional.linear(tokens, embed.weight.flatten(1), embed.bias)
    torch.testing.assert_close(flat, embed(images).flatten(2).mT)
    assert torch.equal(from_patches(tokens, 4, (2, 3)), images)
    assert torch.equal(from_patches(to_patches(images[..., :8], 2), 2), images[..., :8])


def test_a_convolution_of_tokens_is_that_of_the_map() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    images = random(2, 2, 8, 12)
    out = PatchConv(conv, 4)(to_patches(images, 4), (2, 3))
    torch.testing.assert_close(from_patches(out, 4, (2, 3)), conv(images))


@torch.no_grad()
@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize(
    ("border", "encoding"),
    [
        ("zero_token", "relative_bias"), ("null_token", "relative_bias"), ("circular", "relative_bias"),
        ("interior", "relative_bias"), ("zero_token", "quadratic"), ("null_token", "quadratic"),
    ],
)  # fmt: skip
def test_every_border_is_its_definition(border: Any, encoding: Any, content: bool) -> None:
    layer = attention(border=border, encoding=encoding, content=content)
    tokens = random(2, 12, 6)
    torch.testing.assert_close(layer(tokens, (3, 4)), by_hand(layer, tokens, 3, 4), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_wider_table_and_equal_heads() -> None:
    for widths in ((3, 3), (5, 2)):
        layer = attention(2, widths, radius=2, key_dim=2)
        tokens = random(1, 8, 6)
        torch.testing.assert_close(layer(tokens, (2, 4)), by_hand(layer, tokens, 2, 4), atol=1e-10, rtol=1e-10)
        assert layer.query is not None and layer.query.out_features == 4


@torch.no_grad()
@pytest.mark.parametrize("border", ["zero_token", "null_token"])
@pytest.mark.parametrize("encoding", ["relative_bias", "quadratic"])
@pytest.mark.parametrize("sharpness", [1.0, 6.0, 40.0])
def test_what_a_head_gives_elsewhere_is_bounded(border: Any, encoding: Any, sharpness: float) -> None:
    layer = RelPosPatchAttention(4, 4, 9, 1, content=False, border=border, encoding=encoding).double()
    offsets = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    layer.look_at_(offsets, sharpness)
    rows, columns = 5, 6
    weights = layer.weights(random(1, 30, 4), (rows, columns))[0]
    bound = ((rows + 2) * (columns + 2) - 1) * math.exp(-sharpness)
    for head, (down, right) in enumerate(offsets):
        for t in range(30):
            a, b = t // columns + down, t % columns + right
            expected = torch.zeros(30, dtype=torch.float64)
            if 0 <= a < rows and 0 <= b < columns:
                expected[a * columns + b] = 1
            assert (weights[head, t] - expected).abs().max() <= bound + 1e-15
    assert sharpness == 1 or (weights.sum(-1) < 0.5).any(), "looking outside takes the weight away"


@torch.no_grad()
@pytest.mark.parametrize("border", ["zero_token", "null_token", "circular"])
def test_shifted_products_are_equal(border: Any) -> None:
    layer = attention(border=border, content=False)
    layer.look_at_([(0, 1), (-1, -1), (0, 0)], 40)
    tokens = random(2, 12, 6)
    fast = layer.shifted((3, 4))
    torch.testing.assert_close(fast(tokens, (3, 4)), layer(tokens, (3, 4)), atol=1e-12, rtol=1e-10)
    assert fast.shifts == ((0, 1), (-1, -1), (0, 0)) and fast.value is layer.value
    layer.look_at_([(0, 1), (-1, -1), (0, 0)], 6)
    with pytest.raises(InputError, match="raise the sharpness"):
        layer.shifted((3, 4))
    assert (layer.shifted((3, 4), tolerance=0.1)(tokens, (3, 4)) - layer(tokens, (3, 4))).abs().max() > 1e-4


def test_shifts_need_one_patch_a_head() -> None:
    quadratic = attention(encoding="quadratic", content=False)
    with pytest.raises(InputError, match="between patches"):
        quadratic.shifted((3, 4))
    quadratic.look_at_([(0, 2), (-3, 0), (0, 0)], 40)
    tokens = random(2, 12, 6)
    torch.testing.assert_close(quadratic.shifted((3, 4))(tokens, (3, 4)), quadratic(tokens, (3, 4)))
    far = attention(content=False)
    with torch.no_grad():
        far.bias_table[:, -1] = 90  # type: ignore[index]
    with pytest.raises(InputError, match="far patches"):
        far.shifted((3, 4))
    with pytest.raises(InputError, match="content"):
        attention().shifted((3, 4))
    with pytest.raises(InputError, match="interior"):
        attention(border="interior", content=False).shifted((3, 4))


@torch.no_grad()
def test_permuting_heads_changes_nothing() -> None:
    layer, tokens = attention(widths=(2, 2, 2)), random(2, 12, 6)
    before = layer(tokens, (3, 4))
    order = [2, 0, 1]

    def moved(tensor: Tensor, axis: int) -> Tensor:
        return torch.cat([tensor.chunk(3, axis)[n] for n in order], axis)

    for linear in (layer.query, layer.key, layer.value):
        linear.weight.copy_(moved(linear.weight, 0))  # type: ignore[union-attr]
    layer.bias_table.copy_(moved(layer.bias_table, 0))  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(layer.out(torch.zeros(6).double()), layer.out.bias)
    assert (layer(tokens, (3, 4)) - before).abs().max() > 0.1, "the outputs' matrix still has the old order"
    layer.out.weight.copy_(moved(layer.out.weight, 1))
    torch.testing.assert_close(layer(tokens, (3, 4)), before)


@pytest.mark.parametrize(("border", "dtype"), [("zero_token", torch.float32), ("null_token", torch.bfloat16)])
def test_it_compiles_in_both_precisions(border: Any, dtype: torch.dtype) -> None:
    layer = RelPosPatchAttention(6, 5, 3, (4, 1, 2), border=border).to(dtype)
    tokens = torch.randn(2, 9, 6, generator=draw()).to(dtype)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), layer(tokens))
    compiled(tokens).float().sum().backward()
    assert layer.bias_table is not None and layer.bias_table.grad is not None and layer.bias_table.grad.isfinite().all()
    layer.look_at_([(0, 1), (-1, -1), (0, 0)], 40)
    fast = RelPosPatchAttention(6, 5, 3, (4, 1, 2), border=border, content=False).to(dtype)
    fast.look_at_([(0, 1), (-1, -1), (0, 0)], 40)
    shifted = torch.compile(fast.shifted((3, 3)), backend="eager", fullgraph=True)
    torch.testing.assert_close(shifted(tokens), fast(tokens))
    assert fast(tokens).dtype == dtype


def test_gradients_reach_every_part() -> None:
    for encoding in ("relative_bias", "quadratic"):
        layer = attention(encoding=encoding)
        layer(random(2, 12, 6), (3, 4)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_grids() -> None:
    layer = RelPosPatchAttention(6, 5, 1, 2, grid=(2, 3))
    assert layer(torch.zeros(1, 6, 6)).shape == (1, 6, 5) and layer(torch.zeros(0, 4, 6), (2, 2)).shape == (0, 4, 5)
    assert grid_of(9) == (3, 3)
    with pytest.raises(InputError, match="got 2 x 2 for 6 tokens"):
        grid_of(6)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="patch: got 4 for maps of 8 x 6"):
        to_patches(torch.zeros(1, 3, 8, 6), 4)
    with pytest.raises(InputError, match="images"):
        to_patches(torch.zeros(3, 8, 8), 4)
    with pytest.raises(InputError, match="multiple of patch"):
        from_patches(torch.zeros(1, 4, 7), 2)
    for settings, message in (
        ({"num_heads": 0}, "num_heads"), ({"head_dim": (1, 2)}, "head_dim"), ({"head_dim": 0}, "head_dim"),
        ({"border": "wrap"}, "border"), ({"encoding": "absolute"}, "encoding"), ({"radius": -1}, "radius"),
        ({"border": "circular", "encoding": "quadratic"}, "wrap"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            RelPosPatchAttention(**{"dim_in": 4, "dim_out": 4, "num_heads": 3, "head_dim": 2, **settings})  # type: ignore[arg-type]
    layer = attention()
    with pytest.raises(InputError, match="expected \\(batch, tokens, 6\\)"):
        layer(random(1, 9, 5))
    with pytest.raises(InputError, match="at least 3 patches"):
        attention(border="circular")(random(1, 6, 6), (2, 3))
    with pytest.raises(InputError, match="offsets: got shape"):
        layer.look_at_([(0, 0)], 5)
    with pytest.raises(InputError, match="radius 1"):
        layer.look_at_([(0, 2)] * 3, 5)
    with pytest.raises(InputError, match="sharpness"):
        layer.look_at_([(0, 1)] * 3, 0)
