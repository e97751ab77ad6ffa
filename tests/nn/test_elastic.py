"""Elastic layers: slices, widths, dropout that follows them, stacks of blocks, and the spaces of their sub-networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.nn.elastic import (
    ElasticFFN,
    ElasticLinear,
    ElasticStack,
    FeedForward,
    active_parameters,
    running_blocks,
)
from layerwright.nn.subnet import SubnetConfig, SubnetSpace

WIDTHS = (2, 3, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_slice_is_used_without_a_copy(dtype: torch.dtype, bias: bool) -> None:
    layer = ElasticLinear(5, 4, bias).to(dtype)
    x = torch.randn(3, 5, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.active_in, layer.active_out = 2, 3
    weight, own = layer.active_tensors()
    assert weight.data_ptr() == layer.weight.data_ptr()
    expected = x[:, :2] @ layer.weight[:3, :2].T + (own if own is not None else 0)
    assert torch.allclose(layer(x[:, :2]), expected, atol=1e-6 if dtype == torch.float32 else 2e-2)
    layer(x[:, :2]).float().square().sum().backward()
    assert layer.weight.grad is not None
    assert bool((layer.weight.grad[:3, :2] != 0).all())
    assert not layer.weight.grad[3:].any() and not layer.weight.grad[:, 2:].any()
    if bias:
        assert layer.bias.grad is not None and not layer.bias.grad[3:].any()


@pytest.mark.parametrize("size", [0, 6, -1, True, 2.0])
def test_sizes_out_of_range(size: Any) -> None:
    layer = ElasticLinear(5, 4)
    with pytest.raises(ValueError, match="active_in"):
        layer.active_in = size
    with pytest.raises(ValueError, match="active_out"):
        layer.active_out = size
    assert (layer.active_in, layer.active_out) == (5, 4)


@pytest.mark.parametrize("width", WIDTHS)
def test_dropout_follows_the_width(width: int) -> None:
    part = ElasticFFN(4, WIDTHS, dropout=0.3)
    part.active_width = width
    assert part.dropout_rate == pytest.approx(0.3 * width / 6)
    fixed = ElasticFFN(4, WIDTHS, dropout=0.3, adaptive_dropout=False)
    fixed.active_width = width
    assert fixed.dropout_rate == 0.3
    # The rate is the one that is used: the share of inner neurons that are zero.
    seen: list[Tensor] = []
    part.outer.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    torch.manual_seed(0)
    x = torch.randn(4000, 4)
    part(x)
    assert float((seen[0] == 0).float().mean()) == pytest.approx(part.dropout_rate, abs=0.02)
    part.eval()
    assert torch.equal(part(x), part(x))
    assert not bool((seen[1] == 0).any())


def test_an_elastic_part_is_the_plain_one_of_its_slice() -> None:
    part = ElasticFFN(4, WIDTHS).eval()
    x = torch.randn(2, 3, 4)
    for width in WIDTHS:
        part.active_width = width
        plain = FeedForward(4, width).eval()
        plain.inner.weight.data, plain.inner.bias.data = part.inner.weight[:width].data, part.inner.bias[:width].data
        plain.outer.weight.data, plain.outer.bias.data = part.outer.weight[:, :width].data, part.outer.bias.data
        assert torch.allclose(part(x), plain(x), atol=1e-6)
        part.zero_grad()
        part(x).square().sum().backward()
        for parameter, dim in ((part.inner.weight, 0), (part.inner.bias, 0), (part.outer.weight, 1)):
            assert parameter.grad is not None
            assert not parameter.grad.narrow(dim, width, 6 - width).any()
            assert parameter.grad.narrow(dim, 0, width).any()


class Block(nn.Module):
    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.ffn = ElasticFFN(4, widths)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


def test_blocks_are_left_out() -> None:
    stack = ElasticStack(Block() for _ in range(3))
    x = torch.randn(2, 4)
    assert stack.config == SubnetConfig((0, 1, 2), (6, 6, 6))
    stack.activate_(SubnetConfig((0, 2), (2, 3)))
    assert stack.config == SubnetConfig((0, 2), (2, 3))
    assert list(running_blocks(stack)) == [stack[0], stack[2]]
    assert list(running_blocks(nn.ModuleList(stack))) == list(stack)
    y = x
    for block in running_blocks(stack):
        y = block(y)
    assert torch.equal(y, stack[2](stack[0](x)))
    y.sum().backward()
    assert all(parameter.grad is None for parameter in stack[1].parameters())
    assert active_parameters(stack) == sum((4 + 1) * width + 4 * width + 4 for width in (2, 3))
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model.append(stack)
    assert active_parameters(model) == 20 + 8 + active_parameters(stack)


def test_configurations_that_a_stack_does_not_have() -> None:
    stack = ElasticStack(Block() for _ in range(2))
    with pytest.raises(ValueError, match=r"widths: got 4 for block 1"):
        stack.activate_(SubnetConfig((0, 1), (2, 4)))
    with pytest.raises(ValueError, match=r"keep: got block 2"):
        stack.activate_(SubnetConfig((0, 2), (2, 2)))
    assert stack.config == SubnetConfig((0, 1), (6, 6))  # nothing was changed
    with pytest.raises(TypeError, match="holds 0 ElasticFFN"):
        ElasticStack([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SubnetConfig((), ()), "depth of at least 1"),
        (lambda: SubnetConfig((1, 0), (2, 2)), "ascending"),
        (lambda: SubnetConfig((-1,), (2,)), "from 0"),
        (lambda: SubnetConfig((0, 1), (2,)), "widths"),
        (lambda: SubnetSpace(2, (0, 1), (2,)), "depths"),
        (lambda: SubnetSpace(2, (3,), (2,)), "depths"),
        (lambda: SubnetSpace(2, (), (2,)), "depths"),
        (lambda: SubnetSpace(2, (1, 1), (2,)), "each number once"),
        (lambda: SubnetSpace(2, (1,), (0, 2)), "widths"),
        (lambda: SubnetSpace(2, (1,), (2,)).check(SubnetConfig((0,), (3,))), "widths: got 3"),
        (lambda: SubnetSpace(2, (2,), (2,)).check(SubnetConfig((0,), (2,))), "depth: got 1"),
        (lambda: SubnetSpace(2, (1,), (2,)).check(SubnetConfig((5,), (2,))), "keep: got block 5"),
        (lambda: ElasticFFN(4, ()), "widths"),
        (lambda: ElasticFFN(4, (0, 3)), "widths"),
        (lambda: ElasticFFN(4, (2,), dropout=1.0), "dropout"),
        (lambda: FeedForward(4, 2, dropout=-0.1), "dropout"),
        (lambda: setattr(ElasticFFN(4, WIDTHS), "active_width", 4), "widths: got 4"),
        (lambda: setattr(ElasticFFN(4, WIDTHS), "active_width", 7), "widths: got 7"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@given(
    st.integers(1, 4).flatmap(
        lambda blocks: st.tuples(
            st.just(blocks),
            st.sets(st.integers(1, blocks), min_size=1),
            st.sets(st.integers(1, 5), min_size=1, max_size=3),
        )
    ),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_spaces(given_: tuple[int, set[int], set[int]], seed: int) -> None:
    blocks, depths, widths = given_
    space = SubnetSpace(blocks, tuple(depths), tuple(widths))
    everything = list(space)
    assert len(set(everything)) == len(space) == len(everything)
    for config in (space.max(), space.min(), space.sample(torch.Generator().manual_seed(seed)), *everything):
        space.check(config)
        assert config in everything
    assert space.max().depth == max(depths) and set(space.max().widths) == {max(widths)}
    assert space.min().depth == min(depths) and set(space.min().widths) == {min(widths)}
    again = [space.sample(torch.Generator().manual_seed(seed)) for _ in range(2)]
    assert again[0] == again[1]
