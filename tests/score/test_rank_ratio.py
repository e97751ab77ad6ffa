from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import rexnet as oracle
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.score.rank_ratio import RankReport, rank_ratio, score_layers_rank


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spectrum(width: int, samples: int, values: list[float], seed: int) -> Tensor:
    left = torch.linalg.qr(normal(width, len(values), seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(normal(samples, len(values), seed=seed + 1, dtype=torch.float64)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(2, 12),
    extra=st.integers(0, 40),
    rank=st.integers(1, 12),
    tol=st.sampled_from([1e-1, 1e-2, 1e-4, 1e-8]),
    seed=st.integers(0, 999),
)
def test_ranks_are_those_of_numpy(width: int, extra: int, rank: int, tol: float, seed: int) -> None:
    samples = width + extra
    values = [10 ** (-0.61 * place) for place in range(min(rank, width))]
    features = spectrum(width, samples, values, seed)
    assert rank_ratio(features, tol) == oracle.rank(features.numpy(), tol) / width
    assert rank_ratio(features, method="nuclear") == pytest.approx(oracle.nuclear(features.numpy()), abs=1e-6)
    centred = features.numpy() - features.numpy().mean(1, keepdims=True)
    assert rank_ratio(features, method="nuclear", centre=True) == pytest.approx(oracle.nuclear(centred), abs=1e-6)


def test_default_precision_and_known_spectra() -> None:
    features = normal(8, 300)
    features[4:] = features[:4] + 1e-9 * normal(4, 300, seed=1)
    assert rank_ratio(features, None) == np.linalg.matrix_rank(features.numpy()) / 8 == 0.5
    orthogonal = torch.linalg.qr(normal(16, 16)).Q
    assert rank_ratio(orthogonal) == 1
    assert rank_ratio(orthogonal, method="nuclear") == pytest.approx(1, abs=1e-6)
    assert rank_ratio(torch.ones(4, 9)) == 0.25
    assert rank_ratio(torch.ones(4, 9), method="nuclear") == pytest.approx(0.5)
    assert rank_ratio(torch.ones(4, 9), centre=True) == 0
    assert rank_ratio(torch.zeros(4, 9), method="nuclear") == 0
    assert rank_ratio(normal(6, 50).bfloat16()) == 1


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(3, 2, 1)
        self.wide = nn.Sequential(nn.Conv2d(2, 12, 1, bias=False), nn.ReLU())
        self.head = nn.Linear(12, 5)
        self.idle = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.narrow(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_layers_of_a_model() -> None:
    torch.manual_seed(0)
    model = Bottleneck()
    batches = [normal(20, 3, 4, 4, seed=seed) for seed in range(2)]
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: seen.setdefault(name, []).append(out.detach())
        )
        for name in ("wide.0", "wide", "head")
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    found = score_layers_rank(model, batches, ["wide.0", "wide", "head"])
    assert list(found) == ["wide.0", "wide", "head"]
    assert found["wide.0"].rank == 2 and found["wide.0"].d_in == 2 and found["wide.0"].width == 12
    assert found["wide"].rank > 2
    assert model.training
    for name, report in found.items():
        outputs = torch.cat(seen[name]).movedim(1, 0).flatten(1).double()
        assert isinstance(report, RankReport)
        assert report.rank == oracle.rank(outputs.numpy(), 1e-2)
        assert report.ratio == report.rank / report.width
        centred = (outputs - outputs.mean(1, keepdim=True)).numpy()
        assert report.nuclear == pytest.approx(oracle.nuclear(centred), abs=1e-6)


def test_all_layers_and_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 9, bias=False))
    found = score_layers_rank(model.bfloat16(), [normal(3, 30, 4).bfloat16()])
    assert list(found) == ["0", "2"]
    assert (found["0"].width, found["0"].d_in, found["2"].d_in) == (9, 4, 9)
    conv = score_layers_rank(nn.Conv1d(2, 3, 1), [normal(4, 2, 7)])
    assert (conv[""].width, conv[""].d_in) == (3, 2)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.ones(3), {}, r"\(width, samples\)"),
        (torch.ones(5, 4), {}, "at least 5 samples"),
        (torch.full((2, 4), float("nan")), {}, "NaN"),
        (torch.ones(2, 4), {"tol": 0.0}, r"\(0, 1\)"),
        (torch.ones(2, 4), {"tol": 1.0}, r"\(0, 1\)"),
        (torch.ones(2, 4), {"method": "qr"}, "method"),
    ],
)
def test_bad_features_are_named(features: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rank_ratio(features, **options)  # type: ignore[arg-type]


def test_bad_layers_are_named() -> None:
    model, batch = Bottleneck(), normal(8, 3, 4, 4)
    with pytest.raises(InputError, match=r"got tail, expected some of narrow, wide"):
        score_layers_rank(model, [batch], ["tail"])
    with pytest.raises(InputError, match="idle did not run"):
        score_layers_rank(model, [batch])
    with pytest.raises(InputError, match=r"head: got 3 samples of 5 features"):
        score_layers_rank(model, [batch[:3]], ["head"])
    with pytest.raises(InputError, match="at least 1e-06"):
        score_layers_rank(model, [batch], tol=1e-9)
    torch.nn.init.constant_(model.narrow.weight, torch.nan)
    with pytest.raises(InputError, match=r"wide\.0: its outputs hold NaN"):
        score_layers_rank(model, [batch], ["wide.0"])
    with pytest.raises(InputError, match="layers: got none"):
        score_layers_rank(nn.ReLU(), [batch])
