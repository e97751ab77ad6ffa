from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.score.depth_effect import angular_distance, drop_impact, identity_gap, residual_variance
from layerwright.studies.sequence import tiny_llama
from layerwright.treat.layernorm_scaling import apply_layernorm_scaling


class Flip(nn.Module):
    """``sign * x`` with parameters, so that it is a block."""

    def __init__(self, sign: float, dim: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * x


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Random(nn.Module):
    """``x + Q norm(x)`` twice, with orthogonal matrices: each adds a variance of 1."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(2))
        for linear in self.linears:
            q, r = torch.linalg.qr(torch.randn(dim, dim, generator=draw))
            linear.weight.data = q * r.diagonal().sign()  # so that Q is uniform over all rotations

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return x


def data(dim: int = 8, tokens: int = 5) -> list[Tensor]:
    return [torch.randn(3, tokens, dim, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def test_identities_and_reversals() -> None:
    model = Stack(Flip(1.0), Flip(-1.0), Flip(1.0))
    angles = angular_distance(model, data())
    assert list(angles.values()) == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    assert list(angular_distance(model, data(), 2, tokens="all").values()) == pytest.approx([1.0, 1.0], abs=1e-6)
    gaps = identity_gap(model, data())
    assert list(gaps.values()) == pytest.approx([0.0, 2.0, 0.0], abs=1e-5)


def test_variance_grows_with_depth_as_it_should() -> None:
    """Norms before their parts: ``Var0 + 2 L``; scaled: ``Var0 + 2 H_L``."""
    depth, dim = 16, 512
    model = Stack(*(Random(dim, seed) for seed in range(depth)))
    x = [torch.randn(2, 16, dim, generator=torch.Generator().manual_seed(9))]
    plain = list(residual_variance(model, x).values())
    scaled = list(residual_variance(apply_layernorm_scaling(model, calibration=x).model, x).values())
    assert plain[-1] == pytest.approx(1 + 2 * depth, rel=0.05)
    assert scaled[-1] == pytest.approx(1 + 2 * sum(1 / n for n in range(1, depth + 1)), rel=0.05)
    assert plain == sorted(plain)


def test_what_is_lost_without_a_block() -> None:
    model = tiny_llama(32, 3, 2)
    ids = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "labels": ids}]
    with torch.no_grad():
        for projection in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            projection.weight.zero_()
    lost = list(drop_impact(model, batches).values())
    assert lost[1] == 0 and lost[0] != 0
    values = iter((1.0, 5.0, 4.0, 3.0))
    assert list(drop_impact(model, batches, lambda _model: next(values)).values()) == [4.0, 3.0, 2.0]


def test_padding_does_not_count() -> None:
    model = tiny_llama(32, 3, 2)
    ids = torch.randint(256, (1, 6), generator=torch.Generator().manual_seed(0))
    padded = nn.functional.pad(ids, (0, 4), value=7)
    mask = (torch.arange(10) < 6).long()[None]
    plain, masked = [{"input_ids": ids}], [{"input_ids": padded, "attention_mask": mask}]
    for measure in (residual_variance, angular_distance):
        first: Any = measure(model, plain)
        second: Any = measure(model, masked)
        assert list(first.values()) == pytest.approx(list(second.values()), abs=1e-5)


def test_jacobians_of_a_model() -> None:
    model = tiny_llama(32, 3, 2, seed=1)
    ids = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(0))
    gaps = identity_gap(model, [{"input_ids": ids}], 2)
    assert all(0 < gap < 2 and math.isfinite(gap) for gap in gaps.values())
    assert gaps == identity_gap(model, [{"input_ids": ids}], 2)
    grown = tiny_llama(32, 3, 2, seed=1)
    with torch.no_grad():
        grown.model.layers[1].mlp.down_proj.weight *= 20
    more = identity_gap(grown, [{"input_ids": ids}], 2)
    names = list(gaps)
    assert more[names[1]] > gaps[names[1]] and more[names[0]] == pytest.approx(gaps[names[0]], rel=1e-5)


def test_bad_input() -> None:
    model = Stack(Flip(1.0), Flip(-1.0))
    with pytest.raises(InputError, match="n: got 2, expected 1 to 1"):
        angular_distance(model, data(), 2)
    with pytest.raises(InputError, match="num_probes: got 0"):
        identity_gap(model, data(), 0)
