from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwright.core.errors import InputError
from layerwright.core.layer import LayerRef
from layerwright.nn.conv_settings import ConvSettings
from layerwright.score.statistics import InputStatistics, unfold

CONVS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "1d": (nn.Conv1d, (11,), {"kernel_size": 3}),
    "1d same dilated": (nn.Conv1d, (11,), {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "2d": (nn.Conv2d, (7, 9), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    "2d reflect": (nn.Conv2d, (7, 9), {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}),
    "2d circular": (nn.Conv2d, (7, 9), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "2d patches": (nn.Conv2d, (8, 8), {"kernel_size": 4, "stride": 4}),
    "2d grouped": (nn.Conv2d, (7, 9), {"kernel_size": 3, "padding": 1, "groups": 2}),
    "2d depthwise": (nn.Conv2d, (7, 9), {"kernel_size": 3, "dilation": 2, "groups": 4}),
    "3d valid": (nn.Conv3d, (4, 5, 6), {"kernel_size": 2, "stride": (1, 2, 1), "padding": "valid"}),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 5, 300])
def test_gram_ranges_and_tokens(dtype: torch.dtype, features: int) -> None:
    stats = InputStatistics(features)
    batches = [normal(2, 5, features, seed=1).to(dtype), normal(7, features, seed=2).to(dtype)]
    for batch in batches:
        stats.update(batch)
    rows = torch.cat([batch.reshape(-1, features) for batch in batches]).double()
    assert stats.gram.dtype == torch.float32
    assert torch.allclose(stats.gram[0].double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.gram, stats.gram.transpose(1, 2))
    assert torch.allclose(stats.square_sum[0].double(), rows.square().sum(0), rtol=1e-5)
    assert stats.tokens.tolist() == [17]
    assert stats.total_tokens == 17
    assert torch.equal(stats.low[0].double(), rows.amin(0))
    assert torch.equal(stats.high[0].double(), rows.amax(0))


def test_reading_the_gram_between_updates_changes_nothing() -> None:
    a, b = InputStatistics(200), InputStatistics(200)
    for seed in range(3):
        x = normal(10, 200, seed=seed)
        a.update(x)
        b.update(x)
        assert b.gram.shape == (1, 200, 200)
    assert torch.equal(a.gram, b.gram)


def test_pieces_and_strided_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(40, 3, 6).transpose(0, 1)[..., ::2]
    whole = InputStatistics(3)
    whole.update(x)
    monkeypatch.setattr("layerwright.score.statistics.CHUNK_NUMEL", 10)
    pieces = InputStatistics(3)
    pieces.update(x)
    assert torch.allclose(whole.gram, pieces.gram, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.tokens, pieces.tokens)


def test_many_bfloat16_tokens_do_not_drift() -> None:
    stats = InputStatistics(16)
    rows = (normal(20_000, 16) + 1).bfloat16()
    for part in rows.split(500):
        stats.update(part)
    exact = rows.double().T @ rows.double()
    assert float((stats.gram[0].double() - exact).norm() / exact.norm()) < 1e-6


def test_diagonal_only() -> None:
    x = normal(9, 12)
    stats = InputStatistics(12, only_diagonal=True)
    stats.update(x)
    assert torch.allclose(stats.square_sum[0], x.square().sum(0))
    with pytest.raises(InputError, match="only_diagonal=False"):
        _ = stats.gram
    weight = normal(1, 4, 12, seed=5)
    assert float(stats.energy(weight)) == pytest.approx(float((weight[0].square() @ x.square().sum(0)).sum()), rel=1e-5)


def test_energy_is_the_squared_output() -> None:
    x, weight = normal(9, 12), normal(1, 4, 12, seed=5)
    stats = InputStatistics(12)
    stats.update(x)
    assert float(stats.energy(weight)) == pytest.approx(float((x @ weight[0].T).square().sum()), rel=1e-5)


def test_experts_keep_their_own_sums() -> None:
    stats = InputStatistics(6, 3)
    first, second = normal(5, 6, seed=1), normal(2, 6, seed=2)
    stats.update(first, expert=0)
    stats.update(second, expert=2)
    stats.update(first, expert=2)
    stats.update(normal(0, 6), expert=1)
    assert stats.tokens.tolist() == [5, 0, 7]
    assert stats.total_tokens == 12
    assert torch.allclose(stats.gram[0], first.T @ first, atol=1e-5)
    assert torch.allclose(stats.gram[2], first.T @ first + second.T @ second, atol=1e-5)
    assert bool((stats.gram[1] == 0).all())
    with pytest.raises(InputError, match="say which"):
        stats.update(first)


@pytest.mark.parametrize("name", CONVS)
def test_windows_give_the_convolution(name: str) -> None:
    kind, size, settings = CONVS[name]
    module = kind(4, 8, bias=False, **settings)
    conv = ConvSettings.of(module)
    x = normal(2, 4, *size)
    windows = unfold(x, conv)
    positions = windows.reshape(-1, conv.groups, conv.columns)
    weight = module.weight.detach().reshape(conv.groups, 8 // conv.groups, conv.columns)  # type: ignore[union-attr]
    result = torch.einsum("pgi,goi->pgo", positions, weight).reshape(*windows.shape[: len(size) + 1], 8)
    assert torch.allclose(result.movedim(-1, 1), module(x).detach(), atol=1e-5)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_convolution_statistics(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwright.score.statistics.CHUNK_NUMEL", chunk)
    kind, size, settings = CONVS[name]
    module = kind(4, 8, bias=False, **settings)
    conv = ConvSettings.of(module)
    ref = LayerRef("conv", "conv", "conv.weight", (conv.out_channels, conv.columns), layout="conv")
    model = nn.ModuleDict({"conv": module})
    for diagonal in (False, True):
        stats = InputStatistics.for_layer(model, ref, only_diagonal=diagonal)
        assert stats.count == conv.groups
        total = 0.0
        seen = []
        for seed in range(2):
            x = normal(3, 4, *size, seed=seed)
            stats.update(x)
            seen.append(unfold(x, conv).reshape(-1, conv.groups, conv.columns))
            total += float(module(x).detach().square().sum())
        rows = torch.cat(seen).double().transpose(0, 1)
        squares = rows.square().sum(1)
        assert torch.allclose(stats.square_sum.double(), squares, rtol=1e-4, atol=1e-5)
        assert stats.total_tokens == rows.shape[1]
        assert torch.equal(stats.low.double(), rows.amin(1))
        assert torch.equal(stats.high.double(), rows.amax(1))
        if not diagonal:
            assert torch.allclose(stats.gram.double(), rows.transpose(1, 2) @ rows, rtol=1e-4, atol=1e-4)
            weight = module.weight.detach().reshape(conv.groups, -1, conv.columns)  # type: ignore[union-attr]
            assert float(stats.energy(weight).sum()) == pytest.approx(total, rel=1e-4)


def test_one_sample_without_batch() -> None:
    conv = ConvSettings.of(nn.Conv1d(2, 3, 3))
    stats = InputStatistics(6, conv=conv)
    stats.update(normal(2, 8))
    assert stats.total_tokens == 6


def test_for_layers_of_other_kinds() -> None:
    model = nn.Linear(5, 7)
    assert InputStatistics.for_layer(model, LayerRef("", "linear", "weight", (7, 5), layout="linear")).in_features == 5
    experts = LayerRef("e", "experts", "e", (7, 5), 4, "experts")
    mixture = nn.ParameterDict({"e": torch.zeros(4, 7, 5)})
    assert InputStatistics.for_layer(mixture, experts).gram.shape == (4, 5, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_unusable_numbers_are_found_and_named(value: float) -> None:
    for diagonal in (True, False):
        stats = InputStatistics(5, only_diagonal=diagonal)
        x = normal(4, 5)
        stats.update(x)
        stats.check("layers.3.q_proj")
        assert stats.finite()
        x[2, 3] = value
        stats.update(x)
        assert not stats.finite()
        with pytest.raises(InputError, match=r"layers\.3\.q_proj.* 3"):
            stats.check("layers.3.q_proj")


def test_wrong_inputs() -> None:
    with pytest.raises(InputError, match="has 4 features, expected 5"):
        InputStatistics(5).update(normal(3, 4))
    conv = ConvSettings.of(nn.Conv2d(2, 3, 3))
    with pytest.raises(InputError, match="expected"):
        InputStatistics(18, conv=conv).update(normal(1, 3, 8, 8))


def test_memory_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing larger than a piece is made, whatever the number of tokens.
    monkeypatch.setattr("layerwright.score.statistics.CHUNK_NUMEL", 64 * 32)
    largest = 0
    original = Tensor.addmm_

    def watched(self: Tensor, a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, a.numel(), b.numel())
        return original(self, a, b)

    monkeypatch.setattr(Tensor, "addmm_", watched)
    InputStatistics(32).update(normal(5000, 32).bfloat16())
    assert largest == 64 * 32


def test_patch_embedding_matches_unfold() -> None:
    conv = ConvSettings.of(nn.Conv2d(3, 4, 3, padding=1, stride=2, dilation=2))
    x = normal(2, 3, 9, 9)
    ours = unfold(x, conv).flatten(1, 2).flatten(2)
    theirs = F.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2)
    assert torch.equal(ours, theirs)
