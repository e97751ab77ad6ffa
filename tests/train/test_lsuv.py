from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.oracles.lsuv import lsuv_by_passes
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from layerwright.core.errors import InputError
from layerwright.score.variance_profile import variance_profile
from layerwright.train.lsuv import LSUVReport, lsuv_, orthonormal_


def mlp(depth: int = 5, width: int = 16, activation: type[nn.Module] = nn.ReLU, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [module for _ in range(depth) for module in (nn.Linear(width, width, bias=bias), activation())]
    return nn.Sequential(*layers, nn.Linear(width, 4, bias=bias))


def batch(samples: int = 256, width: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed))


def start(model: nn.Module, data: Any, **settings: Any) -> LSUVReport:
    return lsuv_(model, data, generator=torch.Generator().manual_seed(2), **settings)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 81, 3)  # registered before what runs before it
        self.up = nn.ConvTranspose2d(8, 4, 3, padding=1)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, padding=1)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x).relu()
        hidden = self.drop(self.grouped(hidden).relu())
        return self.head(self.up(hidden).relu().flatten(1))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_output_has_unit_variance(streaming: bool, bias: bool) -> None:
    model, data = mlp(bias=bias), batch()
    report = start(model, data, streaming=streaming, tol=1e-4)
    assert report.converged and [row.name for row in report.rows] == ["0", "2", "4", "6", "8", "10"]
    for _, variance in variance_profile(model, [data]).values():
        assert variance == pytest.approx(1, abs=1e-4)
    for layer in model:
        if isinstance(layer, nn.Linear):
            square = layer.weight @ layer.weight.T
            torch.testing.assert_close(square, square[0, 0] * torch.eye(len(square)), atol=1e-5, rtol=1e-5)
            assert layer.bias is None or not layer.bias.any()


def test_convolutions_run_in_their_own_order() -> None:
    torch.manual_seed(0)
    model, data = Convolutions(), torch.randn(64, 3, 9, 9)
    model.train()
    state = torch.get_rng_state()
    report = start(model, data, tol=1e-4)
    assert [row.name for row in report.rows] == ["stem", "grouped", "up", "head"]
    assert [row.order for row in report.rows] == [0, 1, 2, 3]
    assert model.training and model.drop.training and torch.equal(state, torch.get_rng_state())
    assert list(variance_profile(model, [data])) == ["stem", "grouped", "up", "head"]
    for _, variance in variance_profile(model, [data]).values():
        assert variance == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("tol", [1e-5, 0.1])
def test_one_pass_equals_many(tol: float) -> None:
    torch.manual_seed(0)
    first, data = Convolutions().eval(), torch.randn(64, 3, 9, 9)
    second = copy.deepcopy(first)
    start(first, data, tol=tol)
    generator = torch.Generator().manual_seed(2)
    for layer in (second.head, second.up, second.grouped, second.stem):
        orthonormal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    lsuv_by_passes([second.stem, second.grouped, second.up, second.head], second, data, tol, 10)
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_other_memory_formats_are_kept() -> None:
    weight = torch.empty(8, 4, 3, 3).to(memory_format=torch.channels_last)
    orthonormal_(weight, generator=torch.Generator().manual_seed(0))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight.flatten(1) @ weight.flatten(1).T, torch.eye(8))


def test_orthonormal_rows_or_columns() -> None:
    for shape in ((4, 9), (9, 4), (6, 3, 3, 3)):
        for dtype, exact in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            weight = orthonormal_(torch.empty(shape, dtype=dtype), gain=2.0, generator=torch.Generator().manual_seed(0))
            flat = weight.float().flatten(1)
            square = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
            torch.testing.assert_close(square, 4 * torch.eye(len(square)), atol=4 * exact, rtol=0)


def test_a_second_call_changes_nothing() -> None:
    model, data = mlp(), batch()
    start(model, data)
    before = copy.deepcopy(model.state_dict())
    report = start(model, data, orthonormal=False)
    assert all(row.tries == 0 and row.scale == 1 for row in report.rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_larger_input_changes_the_first_layer_alone() -> None:
    first, second, data = mlp(), mlp(), batch()
    start(first, data, tol=1e-7)
    start(second, 10 * data, tol=1e-7)
    torch.testing.assert_close(second[0].weight, first[0].weight / 10)
    for place in range(2, 11, 2):
        torch.testing.assert_close(second[place].weight, first[place].weight, rtol=1e-4, atol=1e-6)


def test_fifty_relu_layers_keep_their_size() -> None:
    model, data = mlp(depth=50, width=64), batch(512, 64)
    start(model, data)
    x = data
    for layer in model[:-1]:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            assert 0.2 <= float(x.detach().square().mean()) <= 5


def test_biases_that_are_kept_are_settled_on_the_layer() -> None:
    model, data = mlp(bias=True), batch()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, std=0.5)
    biases = [layer.bias.detach().clone() for layer in model if isinstance(layer, nn.Linear)]
    report = start(model, data, orthonormal=False, tol=1e-3, max_iter=200)
    assert report.converged and max(row.tries for row in report.rows) > 1
    kept = [layer.bias for layer in model if isinstance(layer, nn.Linear)]
    assert all(torch.equal(a, b) for a, b in zip(biases, kept, strict=True))
    for _, variance in variance_profile(model, [data]).values():
        assert variance == pytest.approx(1, abs=2e-3)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layer = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.layer(self.layer(hidden).tanh())
        return self.out(hidden + self.frozen(hidden))


def test_shared_layers_count_once_and_frozen_or_tied_ones_stay() -> None:
    torch.manual_seed(0)
    model, ids = Shared(), torch.randint(10, (64, 5))
    frozen, table = model.frozen.weight.clone(), model.embed.weight.clone()
    with pytest.warns(UserWarning, match="embed has the same weight"):
        report = start(model, ids, tol=1e-4)
    assert torch.equal(model.frozen.weight, frozen) and torch.equal(model.embed.weight, table)
    assert [(row.name, row.note) for row in report.rows] == [
        ("layer", ""),
        ("frozen", "frozen"),
        ("out", "shares the weight of embed"),
    ]
    assert report.converged and report.to_data()["layers"][0]["converged"]
    first = model.layer(model.embed(ids))
    assert float(first.detach().var(unbiased=False)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("streaming", [True, False])
def test_attention_layers_have_four_products(streaming: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    data = torch.randn(32, 6, 16)
    report = start(model, data, tol=1e-4, streaming=streaming)
    model.eval()
    names = [f"self_attn.{part}" for part in ("query", "key", "value", "output")]
    assert [row.name for row in report.rows] == [*names, "linear1", "linear2"]
    assert all(row.var_after == pytest.approx(1, abs=1e-3) for row in report.rows)
    normed = model.norm1(data)
    query, _, value = model.self_attn.in_proj_weight.chunk(3)
    for weight in (query, value):
        assert float((normed @ weight.T).detach().var()) == pytest.approx(1, abs=1e-3)
    attended = model.self_attn(normed, normed, normed, need_weights=False)[0]
    assert float(attended.detach().var()) == pytest.approx(1, abs=1e-3)


def test_models_of_transformers_and_own_arguments() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    data = {"input_ids": torch.randint(30, (16, 12)), "labels": torch.randint(30, (16, 12))}
    report = start(model, data, exclude=("lm_head",), tol=1e-3)
    assert len(report.rows) == 8 and report.rows[0].name == "transformer.h.0.attn.c_attn" and report.converged
    chosen = start(model, data, layers=("*.mlp.*",))
    assert len(chosen.rows) == 4
    picked = start(model, data, layers=lambda name, _: name.endswith("c_proj"))
    assert len(picked.rows) == 4

    network = mlp()
    own = start(network, {"x": batch()}, forward=lambda module, inputs: module(inputs["x"]), tol=1e-4)
    assert own.converged


def test_batches_that_are_drawn_anew() -> None:
    draws = iter(range(10_000))
    model = mlp()
    report = start(model, lambda: batch(1000, seed=next(draws)), streaming=False, tol=0.2)
    assert report.converged and next(draws) > 6


def test_half_precision_is_measured_in_float32() -> None:
    model = mlp().to(torch.bfloat16)
    report = start(model, batch().to(torch.bfloat16), tol=0.05)
    assert report.converged
    for _, variance in variance_profile(model, [batch().to(torch.bfloat16)]).values():
        assert variance == pytest.approx(1, abs=0.1)


def test_what_cannot_be_started_is_named_and_nothing_changes() -> None:
    dead = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 4))
    unused = mlp()
    unused.spare = nn.Linear(2, 2)  # type: ignore[assignment]
    unused.forward = lambda x: unused[:-1](x)  # type: ignore[method-assign, index]
    parametrized = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)))
    cases: list[tuple[nn.Module, Any, dict[str, Any], type[Exception], str]] = [
        (dead, torch.zeros(32, 16), {}, InputError, r"output of 0 \(number 1 to run\) has variance 0"),
        (mlp(), torch.full((8, 16), float("nan")), {}, InputError, "not finite"),
        (mlp(), torch.zeros(0, 16), {}, InputError, "no samples"),
        (mlp(), batch(), {"tol": 0.0}, InputError, "tol"),
        (mlp(), batch(), {"max_iter": 0}, InputError, "max_iter"),
        (mlp(), batch(), {"layers": ("nothing",)}, InputError, "nothing"),
        (mlp(), batch(), {"exclude": ("*",)}, InputError, "none is left"),
        (mlp(), batch, {}, InputError, "streaming=False"),
        (unused, batch(), {}, InputError, "does not run"),
        (parametrized, batch(), {}, InputError, "computed from other parameters"),
        (nn.Linear(16, 4, device="meta"), batch(), {}, TypeError, "meta"),
    ]
    for model, data, settings, error, message in cases:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}
        with pytest.raises(error, match=message):
            lsuv_(model, data, **settings)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), message
    nan_later = mlp()
    nn.init.constant_(nan_later[6].weight, float("inf"))
    kept = nan_later[0].weight.detach().clone()
    with pytest.raises(InputError, match=r"6 \(number 4 to run\)"):
        lsuv_(nan_later, batch(), orthonormal=False)
    assert torch.equal(nan_later[0].weight, kept)
    with pytest.warns(UserWarning, match="one sample only"):
        lsuv_(mlp(), batch(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsuv_(mlp(), batch(2))
