from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from layerwright.core.calibration import Calibration, as_calibration
from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_model
from layerwright.core.layer import LayerRef
from layerwright.core.layers import list_layers, treatable
from layerwright.score.hessian import hessian_diagonals, hessian_traces, top_eigenvalues
from layerwright.score.proxies import BIT_PROXIES, ProxyTree, layer_statistics
from layerwright.score.proxies.statistics import joined
from oracles.proxies import two_layers
from zoo import ZOO


def test_bit_snip_in_closed_form() -> None:
    """For ``y = W3 W2 W1 x``: the gradient of the mean squared output by hand."""
    model, _, refs = two_layers()
    first, second, third = (model[i].weight.detach() for i in range(3))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    data = Calibration([x], lambda network, batch: (network[:3](batch).square().sum(1) / 2).mean())
    y = x @ first.T @ second.T @ third.T
    by_hand = {
        "1": third.T @ y.T @ (x @ first.T) / 16,
        "2": y.T @ (x @ first.T @ second.T) / 16,
    }
    found = layer_statistics(model, data, [r for r in refs if r.path in by_hand], ("G", "W"))
    for path, gradient, weight in zip(found.paths, found.lists["G"], found.lists["W"], strict=True):
        torch.testing.assert_close(gradient, by_hand[path], rtol=1e-4, atol=1e-5)
        assert torch.equal(weight, model[int(path)].weight)
    gains = BIT_PROXIES.get("snip").gains(found, (2, 5))
    weights = [second, third]
    expected = [float((g * w).abs().mean()) for g, w in zip(by_hand.values(), weights, strict=True)]
    np.testing.assert_allclose(gains, np.outer(expected, [2, 5]), rtol=1e-4)


def test_the_virtual_gradient_in_closed_form() -> None:
    """With absolute weights and ones in, all paths are products of sums; one factor divides all layers."""
    model, data, refs = two_layers()
    a, b, c, d = (model[i].weight.detach().double().abs() for i in range(4))
    bias = model[3].bias.detach().double().abs()
    ones = torch.ones(8, dtype=torch.float64)
    total = (d @ c @ b @ a @ ones + bias).sum()
    expected = torch.outer((d @ c).sum(0), a @ ones) / total
    found = layer_statistics(model, data, [r for r in refs if r.path == "1"], ("V",))
    torch.testing.assert_close(found.lists["V"][0].double(), expected, rtol=1e-4, atol=1e-7)


def test_the_diagonal_of_the_hessian_and_the_top_eigenvalue() -> None:
    """A quadratic loss ``1/2 tr(W A W^T)`` has the Hessian ``A`` for every row."""
    layer = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 8, bias=False), nn.Linear(8, 2, bias=False))
    root = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    root = root @ torch.diag(torch.logspace(0, -1, 9))
    curvature = root @ root.T

    def loss(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        weight = network[1].weight
        return 0.5 * (weight @ curvature * weight).sum() + 0.0 * network(batch).sum()

    data = Calibration([torch.ones(4, 9)], loss)
    refs = [r for r in treatable(layer, list_layers(layer)) if r.path == "1"]
    diagonal = hessian_diagonals(layer, data, refs, samples=400)["1"][0]
    spread = 4 * float(curvature.norm()) / 400**0.5
    torch.testing.assert_close(diagonal, curvature.diagonal().expand(8, 9), rtol=0.0, atol=spread)
    trace = hessian_traces(layer, data, refs, samples=400)["1"]
    assert trace == pytest.approx(float(diagonal.sum()), rel=1e-3)
    top = float(torch.linalg.eigvalsh(curvature)[-1])
    assert top_eigenvalues(layer, data, refs, iterations=40)["1"] == pytest.approx(top, rel=1e-2)


def test_fisher_and_positions_of_a_convolution() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )
        x, y = torch.randn(6, 1, 9, 9), torch.randint(3, (6,))
    refs = [r for r in list_layers(model) if r.path == "1"]
    found = layer_statistics(model, as_calibration([(x, y)]), refs, ("A", "F"))
    assert found.positions == (25,) and tuple(found.lists["A"][0].shape) == (6, 8 * 25)
    effect = torch.zeros(6, 8)
    for n in range(6):  # one sample at a time
        output = model[:2](x[n : n + 1]).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model[2:](output), y[n : n + 1])
        (slope,) = torch.autograd.grad(loss, output)
        effect[n] = (output * slope).sum((0, 2, 3)).detach()
    torch.testing.assert_close(found.lists["F"][0][0], 0.5 * effect.square().mean(0), rtol=1e-4, atol=1e-7)
    assert BIT_PROXIES.get("bops").gains(found, (4,))[0, 0] == 25 * 8 * 72 * 8 * 4


def test_nothing_of_the_model_changes_and_large_layers_are_thinned() -> None:
    model, data, refs = two_layers()
    model.train()
    before, required = fingerprint_model(model), [p.requires_grad for p in model.parameters()]
    found = layer_statistics(model, data, refs, ("A", "G", "W", "H", "V", "F", "E"), limit=30)
    assert fingerprint_model(model) == before and model.training
    assert [p.requires_grad for p in model.parameters()] == required
    assert all(p.grad is None for p in model.parameters())
    for name in "GWHV":
        shapes = {tuple(x.shape) for x in found.lists[name][:1]}
        assert all(x.numel() <= 30 for x in found.lists[name])
        assert shapes == {tuple(found.lists["W"][0].shape)}
    assert {len(a) for a in found.lists["A"]} == {20}
    again = layer_statistics(model, data, refs, ("H",), limit=30)
    assert all(torch.equal(a, b) for a, b in zip(found.lists["H"], again.lists["H"], strict=True))


def test_bfloat16_gives_nearly_the_same() -> None:
    exact = layer_statistics(*two_layers(), ("A", "G", "W", "V"))
    rough = layer_statistics(*two_layers(torch.bfloat16), ("A", "G", "W", "V"))
    for name in "AGWV":
        for a, b in zip(exact.lists[name], rough.lists[name], strict=True):
            assert b.dtype == torch.float32
            assert float((a - b).norm()) < 0.1 * float(a.norm())


def test_statistics_of_two_networks_stand_side_by_side() -> None:
    one = layer_statistics(*two_layers(), ("G", "W", "V"))
    two = layer_statistics(*two_layers(), ("G", "W"))
    both = joined([one, two])
    assert len(both) == len(one) + len(two) and set(both.lists) == {"G", "W"} and both.inputs == ("G", "W", "GW")


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "resnet", "mixtral"])
def test_architectures_of_the_zoo(name: str) -> None:
    model, batches = ZOO[name]()
    refs = treatable(model, list_layers(model))
    found = layer_statistics(model, as_calibration(batches), refs, ("G", "W", "H", "V"), probes=1)
    proxy = ProxyTree.from_string("product(abs(GW), abs(V))")
    assert np.isfinite(proxy.layer_values(found)).all()
    assert len(found) == len(refs)


def test_bad_input_is_refused() -> None:
    model, data, refs = two_layers()
    with pytest.raises(InputError, match="unknown statistic 'Z'"):
        layer_statistics(model, data, refs, ("Z",))
    with pytest.raises(InputError, match=r"1: this layer has no weight"):
        layer_statistics(model, data, [LayerRef("1", "other")], ("W",))
    flat = Calibration([torch.ones(2, 8)], lambda network, x: network(x).argmax(-1).float().mean())
    with pytest.raises(InputError, match="statistics G, H need a loss with a gradient"):
        layer_statistics(model, flat, refs, ("G", "H", "W"))
    assert layer_statistics(model, flat, refs, ("W", "V")).inputs == ("W", "V")
    loose = LayerRef("0.weight", "experts", "0.weight", (10, 8), 1, "experts")
    with pytest.raises(InputError, match=r"0\.weight: has no output of its own"):
        layer_statistics(model, data, [loose], ("A",))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="statistic W is not finite"):
        layer_statistics(model, data, refs, ("W",))
