from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models.finc_flow import FInCFlow, FlowStep
from layerwright.nn.flow_layers import ActNorm2d, AffineCoupling, InvertibleConv1x1, log_normal
from layerwright.nn.invertible_conv import FInCConv
from oracles.finc import jacobian_logdet


def _flow(shape: tuple[int, int, int], levels: int = 1, seed: int = 0, **settings: Any) -> FInCFlow:
    """A flow with random weights everywhere, that has seen a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = FInCFlow(shape, levels, steps=2, width=8, **settings).double()
        flow.log_prob(torch.rand(32, *shape, dtype=torch.float64))
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.03 * torch.randn(p.shape, dtype=torch.float64))
    return flow.eval()


@pytest.mark.parametrize(("shape", "levels"), [((4, 2, 2), 1), ((1, 4, 8), 2)])
def test_the_density_is_that_of_the_whole_map(shape: tuple[int, int, int], levels: int) -> None:
    flow = _flow(shape, levels)
    x = torch.rand(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def latent(flat: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in flow.encode(flat.view(1, *shape))[0]])

    with torch.no_grad():
        base = float(log_normal(latent(x.flatten())[None])[0])
        found = float(flow.log_prob(x)[0])
    assert found == pytest.approx(base + jacobian_logdet(latent, x.flatten()), abs=1e-8)


@torch.no_grad()
def test_samples_and_latents_come_back() -> None:
    flow, draw = _flow((3, 8, 8), 3), torch.Generator().manual_seed(0)
    parts = [torch.randn(2, *shape, dtype=torch.float64, generator=draw) for shape in flow.latent_shapes()]
    assert [tuple(part.shape[1:]) for part in parts] == [(6, 4, 4), (12, 2, 2), (48, 1, 1)]
    pictures = flow.decode(parts)
    assert pictures.shape == (2, 3, 8, 8) and pictures.min() >= 0 and pictures.max() < 1
    for part, again in zip(parts, flow.encode(pictures)[0], strict=True):
        torch.testing.assert_close(again, part, atol=1e-7, rtol=1e-7)
    samples = flow.sample(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(samples, flow.sample(3, generator=torch.Generator().manual_seed(5)))
    assert torch.isfinite(flow.log_prob(samples)).all()
    still = flow.sample(2, temperature=0)
    torch.testing.assert_close(still[0], still[1])


def test_a_step_is_finc_actnorm_one_by_one_and_coupling() -> None:
    assert [type(layer) for layer in FlowStep(8, 8)] == [FInCConv, ActNorm2d, InvertibleConv1x1, AffineCoupling]
    assert [type(layer) for layer in FlowStep(8, 8, spatial=False)] == [ActNorm2d, InvertibleConv1x1, AffineCoupling]
    flow = FInCFlow.from_config("cifar10", width=4)
    units = [module for module in flow.modules() if isinstance(module, FInCConv)]
    assert [len(stage) for stage in flow.stages] == [32, 32, 32]  # type: ignore[arg-type]
    assert sorted({unit.channels for unit in units}) == [12, 24, 48]
    assert len(flow.splits) == 2


def test_whole_numbers_are_dequantised_and_bits_counted() -> None:
    flow = _flow((1, 4, 4), num_bins=17)
    whole = torch.randint(17, (5, 1, 4, 4), generator=torch.Generator().manual_seed(2))
    noisy = flow.dequantize(whole, torch.Generator().manual_seed(3))
    assert torch.equal((noisy * 17).floor().long(), whole) and noisy.dtype == torch.float64
    with torch.no_grad():
        log_prob = flow.log_prob(whole, torch.Generator().manual_seed(3))
        torch.testing.assert_close(log_prob, flow.log_prob(noisy))
        bits = flow.bits_per_dim(whole, torch.Generator().manual_seed(3))
    torch.testing.assert_close(bits, -log_prob / 16 / math.log(2) + math.log2(17))
    assert flow.float().dequantize(torch.full((1, 1, 4, 4), 16)).max() < 1


@torch.no_grad()
def test_the_density_sums_to_one() -> None:
    flow = _flow((1, 2, 2), seed=3)
    # Importance sampling of the integral over the unit cube.
    x = torch.rand(200_000, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(flow.log_prob(x).exp().mean()) == pytest.approx(1, abs=0.05)


def test_a_few_steps_of_training_raise_the_density() -> None:
    torch.manual_seed(0)
    flow = FInCFlow((1, 4, 4), 1, 2, 8)
    x = (torch.rand(64, 1, 1, 1) * 0.5 + 0.4 * torch.rand(64, 1, 4, 4)).clamp(0, 0.99)
    optimizer, losses = torch.optim.Adam(flow.parameters(), 5e-3), []
    for _ in range(20):
        loss = flow.bits_per_dim(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is not None for p in flow.parameters())
    torch.testing.assert_close(flow(x), flow.log_prob(x))


def test_a_saved_flow_samples_the_same() -> None:
    flow, other = _flow((1, 4, 4)), FInCFlow((1, 4, 4), 1, 2, 8).double().eval()
    with pytest.raises(RuntimeError, match="no batch"):
        other.sample(1)
    other.load_state_dict(flow.state_dict())
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(flow.sample(2, generator=draws[0]), other.sample(2, generator=draws[1]))
    with torch.device("meta"):
        model: nn.Module = FInCFlow.from_config("imagenet64", lu=True)
    assert all(p.is_meta for p in model.parameters())


@torch.no_grad()
def test_compiles_whole_and_runs_in_bfloat16() -> None:
    flow = _flow((1, 4, 4)).float()
    x = torch.rand(2, 1, 4, 4)
    compiled = torch.compile(flow.encode, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled[1], flow.encode(x)[1])
    half = flow.bfloat16()
    sample = half.sample(2)
    assert sample.dtype == torch.bfloat16 and sample.max() < 1
    assert torch.isfinite(half.log_prob((x * 0.9).bfloat16())).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FInCFlow((1, 6, 8), 2), "in_shape"),
        (lambda: FInCFlow((1, 8, 8), 0), "levels"),
        (lambda: FInCFlow((1, 8, 8), 1, 0), "steps"),
        (lambda: FInCFlow((1, 8, 8), 1, 1, num_bins=1), "num_bins"),
        (lambda: FInCFlow.from_config("svhn"), "config"),
        (lambda: FInCFlow.from_config("test").log_prob(torch.rand(1, 1, 4, 4)), "x: got shape"),
        (lambda: FInCFlow.from_config("test").log_prob(torch.ones(1, 1, 8, 8)), r"\[0, 1\)"),
        (lambda: FInCFlow.from_config("test").log_prob(torch.full((1, 1, 8, 8), torch.nan)), r"\[0, 1\)"),
        (lambda: FInCFlow.from_config("test").log_prob(torch.full((1, 1, 8, 8), 256)), "0 to 255"),
        (lambda: FInCFlow.from_config("test").sample(0), "count"),
        (lambda: FInCFlow.from_config("test").decode([]), "parts"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
