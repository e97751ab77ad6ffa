"""State space layers: convolution, scan and step agree; both directions mirror each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.nn.state_space import DiagonalSSM, MultiHeadSSM


def layer(**options: object) -> MultiHeadSSM:
    return MultiHeadSSM(8, 4, 5, generator=torch.Generator().manual_seed(3), **options)  # type: ignore[arg-type]


def test_one_system_by_its_equations() -> None:
    system = DiagonalSSM(torch.tensor([0.05, 0.2]), 3, torch.Generator().manual_seed(0))
    x = torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(1))
    a = (-system.log_decay.double().exp() + 1j * system.frequency.double()).detach()
    dt = system.dt.double()[:, None].detach()
    b = torch.view_as_complex(system.input_weight.double().detach())
    c = torch.view_as_complex(system.output_weight.double().detach())
    state = torch.zeros(2, 2, 3, dtype=torch.complex128)
    for frame, found in zip(x.unbind(1), system(x).unbind(1), strict=True):
        state = (dt * a).exp() * state + ((dt * a).exp() - 1) / a * b * frame[..., None]
        y = (c * state).sum(-1).real + system.skip.detach() * frame
        assert torch.allclose(found.double(), y, atol=1e-5)
    assert bool((system.discrete()[0].abs() < 1).all())


@pytest.mark.parametrize("frames", [1, 2, 7, 40])
@pytest.mark.parametrize("layers", [1, 2])
def test_convolution_is_scan_is_step(frames: int, layers: int) -> None:
    ssm = layer(layers=layers)
    x = torch.randn(3, frames, 8, generator=torch.Generator().manual_seed(1))
    whole = ssm(x)
    scanned, _ = ssm.scan(x)
    assert torch.allclose(whole, scanned, atol=1e-5)
    state, stepped = None, []
    for frame in x.unbind(1):
        output, state = ssm.step(frame, state)
        stepped.append(output)
    assert torch.allclose(whole, torch.stack(stepped, 1), atol=1e-5)
    half = frames // 2
    first, state = ssm.scan(x[:, :half]) if half else (x[:, :0], None)
    second, _ = ssm.scan(x[:, half:], state)
    assert torch.allclose(whole, torch.cat([first, second], 1), atol=1e-5)


def test_no_frame_sees_a_later_one() -> None:
    ssm = layer()
    x = torch.randn(1, 10, 8, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[:, 6:] += 1
    assert torch.allclose(ssm(x)[:, :6], ssm(other)[:, :6], atol=1e-5)
    assert not torch.allclose(ssm(x)[:, 6:], ssm(other)[:, 6:], atol=1e-2)
    both = layer(bidirectional=True)
    assert not torch.allclose(both(x)[:, :6], both(other)[:, :6], atol=1e-3)


def test_directions_mirror_each_other() -> None:
    ssm = layer(bidirectional=True)
    x = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(1))
    before = ssm(x)
    ssm.forwards, ssm.backwards = ssm.backwards, ssm.forwards
    assert not torch.allclose(ssm(x), before, atol=1e-3)
    assert torch.allclose(ssm(x.flip(1)).flip(1), before, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing(bidirectional: bool) -> None:
    ssm = layer(bidirectional=bidirectional)
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([x, torch.full((1, 5, 8), 7.0)], 1)
    mask = torch.arange(11)[None] < 6
    assert torch.allclose(ssm(padded, mask)[:, :6], ssm(x), atol=1e-5)


def test_heads_gate_each_other_and_see_different_spans() -> None:
    ssm = layer(layers=1)
    assert torch.equal(ssm.forwards[0].first_log_dt.exp().round(decimals=6), torch.tensor([1e-3, 1e-3, 0.1, 0.1] * 2))
    assert bool((ssm.forwards[0].dt / ssm.forwards[0].first_log_dt.exp() - 1).abs().max() < 0.3)
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    values = ssm.forwards[0](ssm.project_in(x))
    expected = ssm.project_out(values[..., :4] * nn.functional.gelu(values[..., 4:]))
    assert torch.allclose(ssm(x), expected, atol=1e-6)


def test_always_stable_half_precision_and_seeds() -> None:
    ssm = layer()
    for system in ssm.forwards:
        system.log_decay.data.fill_(-8.0)
        system.frequency_shift.data.fill_(5.0)
        assert bool((system.discrete()[0].abs() < 1).all())
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    full, half = layer(), layer().bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(half(x.bfloat16()).float(), full(x), atol=0.1)
    full(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in full.parameters())
    assert torch.equal(layer()(x), layer()(x))


def test_bad_input() -> None:
    for heads in (0, 1, 3, 16):
        with pytest.raises(ValueError, match="heads"):
            MultiHeadSSM(8, heads)
    with pytest.raises(ValueError, match="state_size"):
        MultiHeadSSM(8, 4, 0)
    with pytest.raises(ValueError, match="bidirectional"):
        layer(bidirectional=True).step(torch.zeros(1, 8))
    with pytest.raises(ValueError, match="bidirectional"):
        layer(bidirectional=True).scan(torch.zeros(1, 3, 8))
