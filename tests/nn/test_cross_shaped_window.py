from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.explain.receptive_field import receptive_field
from layerwright.nn import cross_shaped_window
from layerwright.nn.cross_shaped_window import CrossShapedWindowAttention, LePE, window_attention
from layerwright.nn.cswin_block import CSWinBlock
from layerwright.score.costs import count_flops


def _layer(dim: int = 8, heads: int = 4, stripe: int = 2, *, seed: int = 0, **more: Any) -> CrossShapedWindowAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CrossShapedWindowAttention(dim, heads, stripe, **more).double()


def _map(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _cuts(length: int, width: int) -> list[range]:
    """Stripes of a length that is padded on both sides, the padding left out."""
    missing = -length % min(width, length)
    width = min(width, length)
    starts = range(-(missing // 2), length, width)
    return [range(max(0, start), min(length, start + width)) for start in starts]


def _by_definition(layer: CrossShapedWindowAttention, x: Tensor) -> Tensor:
    """Each position attends to the positions of its stripe, one head and one position at a time, without padding."""
    batch, height, width, dim = x.shape
    each = dim // layer.num_heads
    qkv = x @ layer.qkv.weight.T + (layer.qkv.bias if layer.qkv.bias is not None else 0)
    joined = torch.zeros_like(x)
    whole_rows, whole_columns = [range(height)], [range(width)]
    for head in range(layer.num_heads):
        at = [slice(part * dim + head * each, part * dim + (head + 1) * each) for part in range(3)]
        branch = 0 if layer.full_window or head < layer.num_heads // 2 else 1
        rows, columns = (whole_rows, _cuts(width, layer.stripe_width))
        if branch:
            rows, columns = _cuts(height, layer.stripe_width), whole_columns
        if layer.full_window:
            rows, columns = whole_rows, whole_columns
        conv: Any = layer.lepe[branch].conv
        first = head * each - branch * dim // 2
        kernel, bias = conv.weight[first : first + each, 0], conv.bias[first : first + each]
        for sample in range(batch):
            for tall in rows:
                for wide in columns:
                    inside = [(i, j) for i in tall for j in wide]
                    keys = torch.stack([qkv[sample, i, j, at[1]] for i, j in inside])
                    values = torch.stack([qkv[sample, i, j, at[2]] for i, j in inside])
                    for i, j in inside:
                        shares = (keys @ qkv[sample, i, j, at[0]] / each**0.5).softmax(0)
                        local = bias.clone()
                        for di in (-1, 0, 1):
                            for dj in (-1, 0, 1):
                                if i + di in tall and j + dj in wide:
                                    local += kernel[:, di + 1, dj + 1] * qkv[sample, i + di, j + dj, at[2]]
                        joined[sample, i, j, head * each : (head + 1) * each] = shares @ values + local
    return layer.proj(joined)  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((2, 4, 6, 8), {}),
        ((1, 5, 7, 8), {"stripe": 3}),
        ((1, 3, 2, 8), {"stripe": 4}),
        ((2, 4, 5, 6), {"dim": 6, "heads": 2, "stripe": 1, "qkv_bias": False}),
        ((1, 3, 5, 9), {"dim": 9, "heads": 3, "full_window": True}),
    ],
)
def test_it_is_the_definition_position_by_position(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    layer, x = _layer(**settings), _map(*shape)
    torch.testing.assert_close(layer(x), _by_definition(layer, x), atol=1e-10, rtol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("stripe", [6, 9])
def test_stripes_as_wide_as_the_map_are_full_attention(stripe: int) -> None:
    layer, whole, x = _layer(stripe=stripe), _layer(full_window=True, seed=5), _map(2, 6, 4, 8)
    state = layer.state_dict()
    for part in ("weight", "bias"):
        state[f"lepe.0.conv.{part}"] = torch.cat([state.pop(f"lepe.{half}.conv.{part}") for half in (0, 1)])
    whole.load_state_dict(state)
    torch.testing.assert_close(layer(x), whole(x))


@torch.no_grad()
def test_a_transposed_map_with_exchanged_halves_gives_the_transposed_output() -> None:
    layer, other, x = _layer(stripe=2), _layer(stripe=2, seed=5), _map(2, 6, 5, 8)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name in ("qkv.weight", "qkv.bias"):
        state[name] = state[name].unflatten(0, (3, 2, 4)).flip(1).flatten(0, 2)
    state["proj.weight"] = state["proj.weight"].unflatten(1, (2, 4)).flip(1).flatten(1)
    for half in (0, 1):
        state[f"lepe.{half}.conv.weight"] = layer.get_parameter(f"lepe.{1 - half}.conv.weight").mT
        state[f"lepe.{half}.conv.bias"] = layer.get_parameter(f"lepe.{1 - half}.conv.bias")
    other.load_state_dict(state)
    torch.testing.assert_close(other(x.transpose(1, 2)), layer(x).transpose(1, 2))
    assert (layer(x.transpose(1, 2)) - layer(x).transpose(1, 2)).abs().max() > 1e-3


@torch.no_grad()
def test_without_queries_the_mean_of_the_stripe_and_the_encoding_are_left() -> None:
    layer, x = _layer(), _map(2, 4, 6, 8)
    layer.qkv.weight.zero_()
    layer.qkv.bias.zero_()
    layer.qkv.weight[16:] = torch.eye(8)
    layer.proj.weight.copy_(torch.eye(8))
    layer.proj.bias.zero_()
    down = x[..., :4].view(2, 4, 3, 2, 4)
    along = x[..., 4:].view(2, 2, 2, 6, 4)
    means = torch.cat(
        [
            down.mean((1, 3), keepdim=True).expand_as(down).reshape(2, 4, 6, 4),
            along.mean((2, 3), keepdim=True).expand_as(along).reshape(2, 4, 6, 4),
        ],
        -1,
    )
    vertical, horizontal = (layer.lepe[half] for half in (0, 1))
    encoded = [vertical(down[:, :, stripe].permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for stripe in range(3)]
    local = [horizontal(along[:, stripe].permute(0, 3, 1, 2)).permute(0, 2, 3, 1) for stripe in range(2)]
    expected = means + torch.cat([torch.cat(encoded, 2), torch.cat(local, 1)], -1)
    torch.testing.assert_close(layer(x), expected)


def test_a_block_sees_exactly_a_cross_and_two_blocks_the_whole_map() -> None:
    torch.manual_seed(0)
    block, second = CSWinBlock(8, 2, 2).double(), CSWinBlock(8, 2, 2).double()
    rows, columns = torch.arange(6)[:, None], torch.arange(8)
    for i, j in ((0, 0), (3, 5), (5, 2)):
        cross = (rows // 2 == i // 2) | (columns // 2 == j // 2)
        assert torch.equal(receptive_field(block, _map(1, 6, 8, 8), (i, j), channels_last=True) > 0, cross)
    both = receptive_field(nn.Sequential(block, second), _map(1, 6, 8, 8), (3, 5), channels_last=True)
    assert (both > 0).all()
    whole = CSWinBlock(8, 2, 2, full_window=True).double()
    assert (receptive_field(whole, _map(1, 6, 8, 8), (0, 0), channels_last=True) > 0).all()


@torch.no_grad()
def test_padding_gets_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, unmasked, x = _layer(stripe=7), _layer(stripe=7, mask_padding=False), _map(1, 15, 17, 8)
    before, loose = layer(x), unmasked(x)
    assert (before - loose).abs().max() > 1e-3, "zero keys take part of the attention"
    # What stands in the padding: first in queries and keys; in values too once there is no encoding, for which zeros are the rim.
    real, filled = functional.pad, [slice(0, 2)]

    def junk(tensor: Tensor, rim: tuple[int, ...], **more: Any) -> Tensor:
        out = real(tensor, rim, **more)
        if tensor.dim() == 5:
            out[..., filled[0], :] += real(torch.zeros_like(tensor[..., filled[0], :]), rim, value=7.0)
        return out

    monkeypatch.setattr(cross_shaped_window.functional, "pad", junk)
    torch.testing.assert_close(layer(x), before)
    assert (unmasked(x) - loose).abs().max() > 1e-3
    for encoding in layer.lepe:
        for parameter in encoding.parameters():
            parameter.zero_()
    monkeypatch.undo()
    bare = layer(x)
    filled[0] = slice(0, 3)
    monkeypatch.setattr(cross_shaped_window.functional, "pad", junk)
    torch.testing.assert_close(layer(x), bare)


@torch.no_grad()
def test_one_call_for_each_branch_and_no_mask_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    real = functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float) -> Tensor:
        masks.append(mask)
        return real(query, key, value, mask, dropout)

    monkeypatch.setattr(cross_shaped_window.functional, "scaled_dot_product_attention", watched)
    _layer(stripe=2)(_map(3, 4, 6, 8))
    assert masks == [None, None]
    masks.clear()
    _layer(stripe=2)(_map(3, 4, 7, 8))
    assert masks[0].shape == (3 * 4, 1, 1, 8) and masks[1] is None
    assert int((~masks[0]).sum()) == 3 * 4
    masks.clear()
    _layer(full_window=True)(_map(3, 5, 7, 8))
    assert masks == [None]


@torch.no_grad()
def test_operations_are_those_of_the_formula() -> None:
    height, width, dim, stripe = 6, 8, 16, 2
    layer = _layer(dim, 4, stripe).float()
    x = torch.randn(1, height, width, dim)
    products = height * width * dim * (4 * dim + stripe * (height + width))
    assert count_flops(layer, lambda: layer(x))[""] / 2 == products + 9 * height * width * dim
    assert sum(p.numel() for p in layer.parameters()) == 4 * dim * dim + 4 * dim + 10 * dim


def test_gradients_agree_with_differences() -> None:
    layer, x = _layer(4, 2, 2), _map(1, 3, 3, 4).requires_grad_()
    names = list(dict(layer.named_parameters()))

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


@torch.no_grad()
def test_a_block_is_two_residuals_and_drops_whole_paths() -> None:
    torch.manual_seed(0)
    block, x = CSWinBlock(8, 2, 2, drop_path=0.5), torch.randn(64, 4, 4, 8)
    mixed = x + block.attn(block.norm1(x))
    expected = mixed + block.mlp(block.norm2(mixed))
    changed = (block(x) - x).flatten(1).abs().amax(1) > 0
    assert 0.5 < changed.float().mean() < 0.95, "a quarter loses both branches"
    torch.testing.assert_close(block.eval()(x), expected)


def test_dropout_acts_in_training_alone() -> None:
    x = _map(1, 4, 4, 8)
    for settings in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        layer = _layer(**settings)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), _layer()(x))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 4, 6, 8), (2, 5, 7, 8)])
def test_compiles_whole_and_runs_in_bfloat16(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    block, x = CSWinBlock(8, 2, 2).eval(), torch.randn(shape)
    expected = block(x)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, dynamic=False, backend="eager")(x), expected)
    half = block.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.06, rtol=0.06)


@torch.no_grad()
def test_windows_of_any_shape_tile_a_map() -> None:
    qkv = _map(2, 4, 6, 3, 4)
    out = window_attention(qkv, 2, (2, 3))
    corner = window_attention(qkv[:, 2:, 3:], 2, (2, 3))
    torch.testing.assert_close(out[:, 2:, 3:], corner)
    both = window_attention(qkv[:, :3, :5], 2, (2, 3))
    torch.testing.assert_close(both[:, :2, :3], out[:, :2, :3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossShapedWindowAttention(9, 3, 1), "num_heads: got 3"),
        (lambda: CrossShapedWindowAttention(10, 4, 1), "dim: got 10"),
        (lambda: CrossShapedWindowAttention(8, 2, 0), "stripe_width"),
        (lambda: CrossShapedWindowAttention(8, 2, 1, attn_drop=1.0), "attn_drop"),
        (lambda: CrossShapedWindowAttention(8, 2, 1)(torch.zeros(2, 16, 8)), "x: got shape"),
        (lambda: CrossShapedWindowAttention(8, 2, 1)(torch.zeros(2, 8, 4, 4)), "x: got shape"),
        (lambda: CrossShapedWindowAttention(8, 2, 1)(torch.zeros(2, 0, 4, 8)), "none empty"),
        (lambda: window_attention(torch.zeros(1, 4, 4, 12), 2, (2, 2)), "qkv: got shape"),
        (lambda: window_attention(torch.zeros(1, 4, 4, 3, 4), 3, (2, 2)), "num_heads: got 3"),
        (lambda: window_attention(torch.zeros(1, 4, 4, 3, 4), 2, (2, 0)), "window: got"),
        (lambda: LePE(0), "dim"),
        (lambda: LePE(4, 2), "kernel_size"),
        (lambda: CSWinBlock(8, 2, 1, mlp_ratio=0.0), "mlp_ratio"),
        (lambda: CSWinBlock(8, 2, 1, drop_path=1.0), "drop_path"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    with pytest.raises(TypeError, match="int64"):
        CrossShapedWindowAttention(8, 2, 1)(torch.zeros(1, 4, 4, 8, dtype=torch.long))
