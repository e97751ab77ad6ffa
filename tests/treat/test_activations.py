"""Rounded activations: grids, ranges, and models that carry them through copies and files."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError, PlanError
from layerwright.core.layers import list_layers, parameter_bytes, treatable
from layerwright.core.storage import activation_bytes, stored_bytes
from layerwright.core.treatment import (
    Quantize,
    RoundActivations,
    RoundAttention,
    treatments_from_data,
    treatments_to_data,
)
from layerwright.nn.activation import ActivationQuantizer, round_log2, round_log_sqrt2, round_two_regions
from layerwright.nn.attached import attached
from layerwright.nn.attention_products import OPERANDS
from layerwright.nn.replace import rebuild_, structure_of
from layerwright.treat.activations import Samples, fit_quantizer, search_region_ratio
from layerwright.treat.apply import apply_plan
from zoo import ZOO


def sampled(x: Tensor) -> Samples:
    samples = Samples()
    samples.update(x)
    return samples


def test_log_grids_are_exact_at_their_own_values_and_monotone() -> None:
    scale = torch.tensor([0.8])
    for bits in (2, 3, 4):
        codes = torch.arange(1 << bits).float()
        two, root = scale * 2**-codes, scale * 2 ** (-codes / 2)
        torch.testing.assert_close(round_log2(two, scale, bits), two)
        torch.testing.assert_close(round_log_sqrt2(root, scale, bits), root)
        x = torch.linspace(0, 0.8, 999)
        for rounded in (round_log2(x, scale, bits), round_log_sqrt2(x, scale, bits)):
            assert (rounded.diff() >= -1e-7).all()
            assert len(rounded.unique()) <= (1 << bits) + 1
            assert rounded[0] == 0


@pytest.mark.parametrize("signed", [True, False])
def test_two_regions_use_half_the_codes_each(signed: bool) -> None:
    x = torch.linspace(-0.2 if signed else 0, 6, 20001)
    rounded = round_two_regions(x, torch.tensor([0.05]), 4, 3, signed=signed)
    codes = rounded.unique()
    assert len(codes) <= 16
    assert (codes <= 0.05 * (3 if signed else 7) + 1e-6).sum() == 8  # of the fine region
    assert math.isclose(float(codes.max()), 0.05 * 8 * 7, rel_tol=1e-6)
    assert (rounded.diff() >= -1e-6).all()


def test_search_of_the_ratio_is_brute_force() -> None:
    # Long-tailed, as behind GELU: most values within 1 of zero, one in two hundred ten times as large.
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    x = torch.nn.functional.gelu(torch.where(torch.arange(400)[:, None] % 200 == 0, x.abs() * 20, x))
    ratio, scale, losses = search_region_ratio(x, 4, signed=True)
    found = float((x - round_two_regions(x, scale, 4, ratio, signed=True)).square().mean())
    assert losses.shape == (7, 11)
    assert math.isclose(found, float(losses.min()), rel_tol=1e-5)
    uniform = fit_quantizer(sampled(x), 4, "x")(x)
    assert found < float((x - uniform).square().mean())


def test_samples_are_bounded_and_extremes_exact() -> None:
    samples = Samples(rows=32)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 4, generator=generator)
    for part in rows.split(77):
        samples.update(part)
    kept = samples.values("x")
    assert kept.shape == (32, 4) and samples.tokens == 1000
    assert samples.low is not None and samples.high is not None
    torch.testing.assert_close(samples.low, rows.amin(0))
    torch.testing.assert_close(samples.high, rows.amax(0))
    assert all((rows == row).all(1).any() for row in kept)
    with pytest.raises(InputError, match=r"layer\.3: the calibration data never reached it"):
        Samples().values("layer.3")
    bad = sampled(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(InputError, match=r"layer\.3: its calibration activations hold NaN"):
        bad.values("layer.3")


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile", "output"])
def test_observers_keep_to_the_grid_and_mse_is_no_worse(observer: str) -> None:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0] * 7 + [20.0])
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    quantizer = fit_quantizer(sampled(x), 4, "x", observer=observer, weight=weight)  # type: ignore[arg-type]
    assert len(quantizer(x).unique()) <= 16
    # The percentiles cut the two ends apart and may do better than one share for both.
    other = fit_quantizer(sampled(x), 4, "x", observer="minmax" if observer == "percentile" else "mse")
    better, worse = (quantizer, other) if observer == "percentile" else (other, quantizer)
    assert (better(x) - x).square().mean() <= (worse(x) - x).square().mean() * 1.0001
    channel = fit_quantizer(sampled(x), 4, "x", share="channel", observer=observer, weight=weight)  # type: ignore[arg-type]
    assert (channel(x) - x).square().mean() < (quantizer(x) - x).square().mean()


def test_tokens_are_rounded_on_their_own() -> None:
    quantizer = ActivationQuantizer(4, share="token")
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 4, 8, 16, 300.0])[:, None]
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(quantizer(x)[order], quantizer(x[order]))
    assert quantizer.stored_bytes == 0


def test_gradients_pass_inside_the_range_only() -> None:
    x = torch.tensor([[-5.0, -0.4, 0.3, 5.0]], requires_grad=True)
    quantizer = ActivationQuantizer(4, symmetric=True).set_(torch.tensor([0.1]))
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    p = torch.tensor([0.1, 0.5, 2.0], requires_grad=True)
    ActivationQuantizer(4, "log_sqrt2").set_(torch.tensor([1.0]))(p).sum().backward()
    assert p.grad is not None and p.grad.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["vit", "deit", "swin", "llama", "gpt2", "bloom", "bert"])
def test_models_carry_rounded_activations(name: str) -> None:
    model, batches = ZOO[name]()
    model.eval()
    calibration = as_calibration(batches)
    refs = list_layers(model)
    plan = {
        ref.path: (Quantize(8, method="rtn"), RoundActivations(8))
        for ref in treatable(model, refs)
        if ref.layout in ("linear", "conv1d")
    }
    attention = [ref.path for ref in refs if ref.kind == "attention"]
    plan |= {path: (RoundAttention(8),) for path in attention}  # type: ignore[misc]
    assert attention
    before = {key: value.clone() for key, value in model.state_dict().items()}
    treated, _ = apply_plan(model, plan, batches)
    for path in attention:
        owner = attached(treated.get_submodule(path), "products")
        assert owner is not None and set(owner.quantizers) == set(OPERANDS)  # type: ignore[arg-type]
    # Few bits were lost, some were, and the model that was given is what it was.
    loss, rounded = calibration.mean_loss(model), calibration.mean_loss(treated)
    assert rounded == pytest.approx(loss, abs=0.05) and rounded != loss
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("products" in key or "input_quantizer" in key for key in model.state_dict())
    # Copies work alone; the same form built anew from plain data computes the same.
    assert calibration.mean_loss(copy.deepcopy(treated)) == rounded
    again, _ = ZOO[name]()
    rebuild_(again, structure_of(treated))
    again.load_state_dict(treated.state_dict())
    assert calibration.mean_loss(again.eval()) == rounded


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_four_operands_are_seen_in_every_dtype(attention: str, dtype: torch.dtype) -> None:
    model, batches = ZOO["llama"]()
    model.set_attn_implementation(attention)
    model.to(dtype).eval()
    path = next(ref.path for ref in list_layers(model) if ref.kind == "attention")
    treated, _ = apply_plan(model, {path: (RoundAttention(4),)}, batches)
    products = attached(treated.get_submodule(path), "products")
    assert products is not None
    scale = products.quantizers["probabilities"].scale  # type: ignore[union-attr, index]
    assert 0 < float(scale) <= 1 / 15 + 1e-6  # of values from 0 to 1


@torch.no_grad()
def test_fewer_bits_in_attention_do_more_damage() -> None:
    model, batches = ZOO["vit"]()
    path = next(ref.path for ref in list_layers(model) if ref.kind == "attention")
    calibration, losses = as_calibration(batches), []
    logits = [calibration.forward(model.eval(), batch) for batch in batches]
    for bits in (8, 4, 2):
        treated, _ = apply_plan(model, {path: (RoundAttention(bits, "log_sqrt2"),)}, batches)
        outs = [calibration.forward(treated, batch) for batch in batches]
        losses.append(sum(float((a.logits - b.logits).square().sum()) for a, b in zip(outs, logits, strict=True)))
    assert 0 < losses[0] < losses[1] < losses[2]


def test_stored_bytes_are_the_plan_s() -> None:
    model, batches = ZOO["llama"]()
    ref = treatable(model)[0]
    attention = next(r.path for r in list_layers(model) if r.kind == "attention")
    size = parameter_bytes(model)
    for rounding in (RoundActivations(8), RoundActivations(4, symmetric=True), RoundActivations(4, share="channel")):
        treated, _ = apply_plan(model, {ref.path: (Quantize(4, method="rtn"), rounding)}, batches)
        element = model.get_submodule(ref.path).weight.element_size()
        planned = stored_bytes((Quantize(4, method="rtn"), rounding), *ref.shape, 1, element)
        assert parameter_bytes(treated) - size == planned - ref.numel * element
    treated, _ = apply_plan(model, {attention: (RoundAttention(4),)}, batches)
    assert parameter_bytes(treated) - size == activation_bytes((RoundAttention(4),))


def test_bad_input() -> None:
    model, batches = ZOO["llama"]()
    attention = next(r.path for r in list_layers(model) if r.kind == "attention")
    with pytest.raises(InputError, match="is for attention modules"):
        apply_plan(model, {treatable(model)[0].path: (RoundAttention(4),)}, batches)
    with pytest.raises(InputError, match="activations of a attention cannot be rounded"):
        apply_plan(model, {attention: (RoundActivations(4),)}, batches)
    with pytest.raises(PlanError, match="pass calibration data"):
        apply_plan(model, {attention: (RoundAttention(4),)})
    with pytest.raises(InputError, match="at least 3"):
        RoundActivations(2, grid="two_region")
    with pytest.raises(InputError, match="expected a whole number from 2 to 8"):
        RoundAttention(4, key_bits=1)
    with pytest.raises(InputError, match="some are negative"):
        fit_quantizer(sampled(torch.tensor([[-1.0, 1.0]])), 4, "x", kind="log2")
    both = (Quantize(4), RoundActivations(4))
    assert treatments_from_data(treatments_to_data(both)) == both


def test_saved_and_loaded(tmp_path: Path) -> None:
    from layerwright.data.loading import load
    from layerwright.treat.writer import save_model

    model, batches = ZOO["vit"]()
    refs = list_layers(model)
    plan = {ref.path: (Quantize(4), RoundActivations(4)) for ref in treatable(model, refs)}
    plan |= {ref.path: (RoundAttention(4, "log_sqrt2"),) for ref in refs if ref.kind == "attention"}  # type: ignore[misc]
    treated, _ = apply_plan(model, plan, batches)
    save_model(treated, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    calibration = as_calibration(batches)
    for batch in batches:
        torch.testing.assert_close(
            calibration.forward(again, batch).logits, calibration.forward(treated, batch).logits, rtol=0, atol=0
        )
    assert isinstance(again, nn.Module)
