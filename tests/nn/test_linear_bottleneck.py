from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from layerwright.core.errors import InputError
from layerwright.nn.linear_bottleneck import LinearBottleneck


def without_branch(block: LinearBottleneck) -> LinearBottleneck:
    with torch.no_grad():
        norm = block.project.norm
        norm.weight.zero_()  # type: ignore[union-attr, operator]
        norm.bias.zero_()  # type: ignore[union-attr, operator]
    return block


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 5), (5, 9)])
@pytest.mark.parametrize("training", [True, False])
def test_shortcut_reaches_the_first_channels_alone(inputs: int, outputs: int, training: bool) -> None:
    block = without_branch(LinearBottleneck(inputs, outputs)).train(training)
    x = torch.randn(2, inputs, 6, 7)
    out = block(x)
    assert block.shortcut
    assert torch.equal(out[:, :inputs], x)
    assert out.shape == (2, outputs, 6, 7) and not out[:, inputs:].any()


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "size"), [(5, 9, 2, (3, 4)), (5, 4, 1, (6, 7)), (5, 5, 2, (3, 4))]
)
def test_no_shortcut_where_the_map_or_the_width_shrinks(
    inputs: int, outputs: int, stride: int, size: tuple[int, int]
) -> None:
    block = without_branch(LinearBottleneck(inputs, outputs, stride=stride)).eval()
    out = block(torch.randn(2, inputs, 6, 7))
    assert not block.shortcut and out.shape == (2, outputs, *size) and not out.any()


@pytest.mark.parametrize(
    ("expand", "use_se", "activation"), [(6, True, "silu"), (6, False, "relu6"), (1, False, "silu")]
)
def test_the_formula(expand: int, use_se: bool, activation: str) -> None:
    torch.manual_seed(0)
    block = LinearBottleneck(4, 6, expand, use_se=use_se, activation=activation).double()  # type: ignore[arg-type]
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    block(4 * x)
    block.eval()
    state = block.state_dict()

    def norm(y: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        y = (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    inner = x
    if expand > 1:
        inner = norm(torch.einsum("oi,bihw->bohw", state["expand.conv.weight"][:, :, 0, 0], x), "expand.norm")
        inner = inner * inner.sigmoid() if activation == "silu" else inner.clamp(0, 6)
    inner = norm(
        functional.conv2d(inner, state["depthwise.conv.weight"], padding=1, groups=4 * expand), "depthwise.norm"
    )
    if use_se:
        assert state["se.reduce.weight"].shape[0] == 4 * expand // 12
        squeezed = functional.conv2d(
            inner.mean((2, 3), keepdim=True), state["se.reduce.weight"], state["se.reduce.bias"]
        )
        squeezed = norm(squeezed, "se.norm").relu()
        inner = inner * functional.conv2d(squeezed, state["se.expand.weight"], state["se.expand.bias"]).sigmoid()
    out = norm(functional.conv2d(inner.clamp(0, 6), state["project.conv.weight"]), "project.norm")
    out[:, :4] += x
    torch.testing.assert_close(block(x), out)


def test_compiles_runs_in_bfloat16_and_leaves_its_input_alone() -> None:
    torch.manual_seed(0)
    block = LinearBottleneck(4, 6).eval()
    x = torch.randn(2, 4, 8, 8)
    kept = x.clone()
    out = block(x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), out)
    half = block.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), out, atol=0.05, rtol=0.05)
    assert "shortcut=True" in repr(block)


def test_backward_hooks_may_watch_every_part() -> None:
    """A shortcut that is added in place is refused by torch where a backward hook stands on the last norm."""
    block = LinearBottleneck(4, 6)
    seen: list[str] = []
    for name, module in block.named_modules():
        module.register_full_backward_hook(lambda _m, _i, _o, name=name: seen.append(name))
    block(torch.randn(2, 4, 6, 6, requires_grad=True)).sum().backward()
    assert "project.norm" in seen and "expand.act" in seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 2.5}, "out_channels"),
        ({"expand": 0}, "expand"),
        ({"stride": 0}, "stride"),
        ({"kernel_size": 4}, "odd"),
        ({"activation": "gelu"}, "silu, relu6"),
        ({"in_channels": 1}, "expected at most 6"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearBottleneck(**{"in_channels": 4, "out_channels": 4, **settings})  # type: ignore[arg-type]
