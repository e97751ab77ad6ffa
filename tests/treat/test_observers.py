"""Observers that look further than the values: power-of-two factors by channel, and the second-order rise of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from torch import nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError, PlanError
from layerwright.core.layers import list_layers, parameter_bytes
from layerwright.core.plan import Plan
from layerwright.core.storage import activation_bytes
from layerwright.core.treatment import RoundActivations, treatments_from_data, treatments_to_data
from layerwright.nn.activation import InputQuantizer
from layerwright.nn.attached import attached
from layerwright.nn.quantizer import fake_quantize
from layerwright.score.gradients import output_gradients
from layerwright.treat.activations import Samples, fit_power_of_two, fit_quantizer, hessian_error, norm_channels
from layerwright.treat.apply import apply_plan
from zoo import ZOO, logits


def rounding(bits: int, observer: str, share: str = "tensor") -> RoundActivations:
    return RoundActivations(bits, share=cast(Any, share), observer=cast(Any, observer))


def wide(tokens: int = 200, channels: int = 12) -> tuple[torch.Tensor, Samples]:
    generator = torch.Generator().manual_seed(0)
    size = 2 ** torch.arange(channels).remainder(5).float()
    x = torch.randn(tokens, channels, generator=generator) * size + 0.3
    samples = Samples()
    samples.update(x)
    return x, samples


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_power_of_two_factors_are_the_best_of_four(bits: int) -> None:
    x, samples = wide()
    scale, zero = fit_power_of_two(samples, bits, "norm")
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = (float(x.max()) - float(x.min())) / (2**bits - 1)
    assert len(set(zero.tolist())) == 1
    for channel in range(x.shape[1]):
        errors = []
        for factor in (8, 4, 2, 1):
            step = largest * factor / 8
            codes = (x[:, channel] / step).round().add(int(zero[channel])).clamp(qmin, qmax)
            errors.append(float(((codes - int(zero[channel])) * step - x[:, channel]).square().mean()))
        factor = 2 ** (3 - errors.index(min(errors)))
        assert float(scale[channel]) == pytest.approx(largest * factor / 8, rel=1e-5)
    assert len(set(scale.tolist())) > 1
    quantizer = fit_quantizer(samples, bits, "norm", share="channel", observer="power_of_two")
    whole = fit_quantizer(samples, bits, "norm", observer="minmax")
    torch.testing.assert_close(quantizer(x), fake_quantize(x, scale, zero, bits))
    assert (quantizer(x) - x).square().mean() < (whole(x) - x).square().mean()


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_inputs_of_norms_are_rounded(name: str) -> None:
    model, batches = ZOO[name]()
    norms = [ref.path for ref in list_layers(model) if ref.kind == "norm"]
    treatment = rounding(8, "power_of_two", "channel")
    treated, _ = apply_plan(model, dict.fromkeys(norms, (treatment,)), batches)
    bytes_ = 0
    for path in norms:
        module: Any = treated.get_submodule(path)
        beside = attached(module, "input_quantizer")
        assert isinstance(beside, InputQuantizer) and beside.quantizer.scale is not None
        steps = beside.quantizer.scale / beside.quantizer.scale.min()
        assert set(steps.tolist()) <= {1.0, 2.0, 4.0, 8.0}
        bytes_ += activation_bytes((treatment,), len(module.weight))
    assert parameter_bytes(treated) == parameter_bytes(model) + bytes_
    got, wanted = logits(treated, batches[0]), logits(model, batches[0])
    assert not torch.equal(got, wanted)
    assert float((got - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("grid", ["uniform", "two_region"])
def test_hessian_takes_the_range_of_least_second_order_loss(grid: str) -> None:
    x, samples = wide()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 12, generator=generator)
    moment = torch.diag(torch.tensor([100.0, 1, 0, 0, 0, 0]))
    guided, plain = (
        fit_quantizer(samples, 4, "layer", kind=cast(Any, grid), observer=cast(Any, o), weight=weight, moment=moment)
        for o in ("hessian", "output")
    )
    error = hessian_error(weight, moment)
    assert float(error(x, guided(x))) <= float(error(x, plain(x)))
    if grid == "uniform":
        assert not torch.equal(guided(x), plain(x))


@pytest.mark.parametrize("name", ["deit", "swin"])
def test_hessian_is_carried_out_with_the_loss_of_the_calibration(name: str) -> None:
    model, batches = ZOO[name]()
    down = [ref for ref in list_layers(model) if ref.role == "down"]
    plan = {ref.path: (rounding(4, "hessian"),) for ref in down}
    treated, _ = apply_plan(model, plan, batches)
    assert not any(p.grad is not None for p in (*model.parameters(), *treated.parameters()))
    data = as_calibration(batches)
    first = down[0]
    seen = Samples()
    handle = model.get_submodule(first.path).register_forward_pre_hook(lambda _m, args: seen.update(args[0]))
    for batch in data:
        data.forward(model, batch)
    handle.remove()
    moment = output_gradients(model, data, [first])[first.path].moment
    wanted = fit_quantizer(
        seen, 4, "", observer="hessian", weight=model.get_submodule(first.path).weight.detach(), moment=moment
    )
    beside = attached(treated.get_submodule(first.path), "input_quantizer")
    assert isinstance(beside, InputQuantizer) and wanted.scale is not None
    torch.testing.assert_close(beside.quantizer.scale, wanted.scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "treatment",
    [rounding(4, "hessian"), rounding(8, "power_of_two", "channel"), rounding(3, "power_of_two", "channel")],
)
def test_a_plan_s_file_carries_them(treatment: RoundActivations, tmp_path: Path) -> None:
    data = yaml.safe_load(yaml.safe_dump(treatments_to_data((treatment,))))
    assert treatments_from_data(data) == (treatment,)
    plan = Plan(layers={"a.b": (treatment,)})
    assert Plan.load(plan.save(tmp_path / "plan.yaml")).layers == plan.layers
    assert (
        rounding(8, "power_of_two", "channel").label() == "a8 power-of-two" and rounding(4, "hessian").label() == "a4"
    )
    assert activation_bytes((treatment,), 7) == (35 if treatment.share == "channel" else 5)


def test_channels_of_norms_are_their_last_dimension() -> None:
    llama, _ = ZOO["llama"]()
    assert norm_channels(llama.model.norm) == llama.config.hidden_size
    assert norm_channels(nn.LayerNorm((3, 6))) == 6
    for module in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.Linear(4, 4)):
        assert norm_channels(module) == 0
    convnext, batches = ZOO["convnext"]()
    norms = {
        ref.path: norm_channels(convnext.get_submodule(ref.path)) for ref in list_layers(convnext) if ref.kind == "norm"
    }
    assert 0 in norms.values() and any(norms.values())
    treatment = rounding(8, "power_of_two", "channel")
    treated, _ = apply_plan(convnext, {path: (treatment,) for path, count in norms.items() if count}, batches)
    assert parameter_bytes(treated) == parameter_bytes(convnext) + 5 * sum(norms.values())
    with pytest.raises(InputError, match="its channels are not the last dimension"):
        apply_plan(convnext, {next(path for path, count in norms.items() if not count): (treatment,)}, batches)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="1: its channels are not the last dimension"):
        apply_plan(net, {"1": (rounding(8, "power_of_two", "channel"),)}, [torch.randn(2, 3, 5, 5)])


def test_bad_input() -> None:
    _, samples = wide()
    for settings in ({"share": "tensor"}, {"share": "token"}, {"symmetric": True}):
        with pytest.raises(InputError, match="power_of_two needs grid: uniform, share: channel and symmetric: false"):
            RoundActivations(8, **{"share": "channel", "observer": "power_of_two", **settings})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="two_region needs share: tensor"):
        RoundActivations(8, "two_region", "channel", observer="power_of_two")
    with pytest.raises(PlanError, match="here: observer: power_of_two needs"):
        treatments_from_data({"activations": {"observer": "power_of_two"}}, "here")
    with pytest.raises(InputError, match="unknown value 'hesian'"):
        treatments_from_data({"activations": {"observer": "hesian"}}, "here")
    model, batches = ZOO["deit"]()
    norm = next(ref.path for ref in list_layers(model) if ref.kind == "norm")
    with pytest.raises(InputError, match="observer hessian needs the weight that reads"):
        apply_plan(model, {norm: (rounding(8, "hessian"),)}, batches)
    with pytest.raises(InputError, match="layer: observer hessian needs the weight"):
        fit_quantizer(samples, 4, "layer", observer="hessian", weight=torch.ones(2, 12))
    with pytest.raises(InputError, match="share: channel"):
        fit_quantizer(samples, 4, "layer", observer="power_of_two")
    with pytest.raises(InputError, match="never reached"):
        fit_power_of_two(Samples(), 4, "layer")
