from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layerwright.allocate import integer
from layerwright.core.calibration import Calibration
from layerwright.core.errors import BudgetError
from layerwright.tune import TUNERS, AdaQuant, bias_tune, renormalize
from layerwright.tune._affine import affine_quantize, mse_range, nelder_mead_range
from layerwright.tune._fake_layers import full_precision, quantize_layers
from layerwright.tune.bias_tune import bias_tune_
from layerwright.tune.layer_swap import assemble_, layer_swap, option_bits


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 8, 1, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    ).eval()


LAYERS = ("0", "2", "3", "6")


def images(count: int = 24, seed: int = 1) -> list[torch.Tensor]:
    """Smooth ones: inputs that say nothing of each other leave little to gain over rounding to nearest."""
    noise = torch.randn(count, 2, 10, 10, generator=torch.Generator().manual_seed(seed))
    return list((4 * F.avg_pool2d(noise, 5, stride=1) + 0.5).split(8))


# -- the quantizer ---------------------------------------------------------------------------------------------------


def reference_quantize(x: float, span: float, low: float, bits: int) -> float:
    """The definition, one number at a time."""
    levels = 2**bits - 1
    scale = min(max(span, 1e-6), 1e5) / levels
    zero = min(max(round(-low / scale), 0), levels)
    return (min(max(round(x / scale) + zero, 0), levels) - zero) * scale


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantizer_is_the_definition(bits):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(200, generator=generator, dtype=torch.float64)
    got = affine_quantize(x, torch.tensor(2.3).double(), torch.tensor(-0.7).double(), bits)
    ends = torch.tensor(2.3).item(), torch.tensor(-0.7).item()
    want = [reference_quantize(v, *ends, bits) for v in x.tolist()]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)
    assert affine_quantize(torch.zeros(1), torch.tensor(2.3), torch.tensor(-0.7), bits).item() == 0


def test_gradients_of_range_and_minimum_against_finite_differences_of_the_surrogate():
    """The surrogate: what rounding added stays as it was, everything else follows."""
    bits, levels = 3, 7
    x = 1.5 * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    span0, low0 = 2.3, -0.9
    scale0 = span0 / levels
    zero_residue = round(-low0 / scale0) - (-low0 / scale0)
    codes = (x / scale0).round() + round(-low0 / scale0)
    x = x[(codes != 0) & (codes != levels)]  # a code that is just not clamped is a kink
    assert (codes < 0).sum() > 3 and (codes > levels).sum() > 3 and ((codes > 0) & (codes < levels)).sum() > 3
    residue = (x / scale0).round() - x / scale0
    weight = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def surrogate(span: float, low: float) -> float:
        scale = span / levels
        zero = -low / scale + zero_residue
        return float((weight * ((x / scale + residue + zero).clamp(0, levels) - zero) * scale).sum())

    span, low = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (span0, low0))
    (weight * affine_quantize(x, span, low, bits)).sum().backward()
    step = 1e-6
    by_span = (surrogate(span0 + step, low0) - surrogate(span0 - step, low0)) / (2 * step)
    by_low = (surrogate(span0, low0 + step) - surrogate(span0, low0 - step)) / (2 * step)
    assert span.grad.item() == pytest.approx(by_span, rel=1e-5)
    assert low.grad.item() == pytest.approx(by_low, rel=1e-5)
    assert abs(by_low) > 1e-3


def test_mse_range_beats_the_ends_and_nelder_mead_is_no_worse():
    values = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))

    def error(span, low):
        return (affine_quantize(values, span, low, 3) - values).square().mean().item()

    low, high = values.min(), values.max()
    span, start = mse_range(values, 3)
    assert error(span, start) < 0.7 * error(high - low, low)
    best_span, best_low = nelder_mead_range(values, 3)
    assert error(best_span, best_low) <= error(span, start) * (1 + 1e-6)


# -- fitting ---------------------------------------------------------------------------------------------------------


def test_sixteen_bits_leave_outputs_as_they_are():
    model, data = net(), images()
    fake = quantize_layers(model, data, dict.fromkeys(LAYERS, (16, 16)), "minmax")
    AdaQuant(iters=30).fit(fake, data)
    x = torch.cat(data)
    with torch.no_grad():
        torch.testing.assert_close(fake(x), model(x), atol=1e-3, rtol=0)


def test_every_kind_of_layer_gets_better_and_traces_never_rise():
    model, data = net(), images(160)
    fake = quantize_layers(model, data, dict.fromkeys(LAYERS, (3, 4)))
    before = copy.deepcopy(model.state_dict())
    report = AdaQuant(iters=100, batch_size=32).fit(fake, data)
    assert set(report) == set(LAYERS)
    for fit in report.values():
        assert list(fit.trace) == sorted(fit.trace, reverse=True)
        assert fit.trace[0] == fit.mse_before and fit.trace[-1] == fit.mse_after < fit.mse_before
    assert [report[path].relu for path in LAYERS] == [True, False, True, False]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    x = torch.cat(data)
    with torch.no_grad(), full_precision(fake):
        torch.testing.assert_close(fake(x), model(x), atol=1e-6, rtol=1e-5)


def test_report_is_the_error_of_the_layer_itself():
    """Against a computation by hand on the layer's own inputs, without the ReLU."""
    model, data = net(), images()
    fake = quantize_layers(model, data, {"2": (3, 4)})
    report = AdaQuant(iters=20, holdout=0, through_activation=False).fit(fake, data)["2"]
    with torch.no_grad():
        x = model[1](model[0](torch.cat(data)))
        want = (fake[2](x) - model[2](x)).square().mean().item()
    assert report.mse_after == pytest.approx(want, rel=1e-4)


def test_error_is_compared_after_the_relu():
    model, data = net(), images()
    fake = quantize_layers(model, data, {"0": (3, 4)})
    report = AdaQuant(iters=0, holdout=0).fit(fake, data)["0"]
    with torch.no_grad():
        x = torch.cat(data)
        want = (fake[0](x).relu() - model[0](x).relu()).square().mean().item()
    assert report.mse_after == pytest.approx(want, rel=1e-4)


def test_weights_may_move_by_more_than_one_level():
    """Inputs that are equal make only the sum of two weights count: one must go far to make up for the other."""
    torch.manual_seed(0)
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.5]])
    model = nn.Sequential(layer)
    data = [torch.randn(64, 1).expand(64, 2).contiguous()]
    fake = quantize_layers(model, data, {"0": (2, None)}, "minmax")
    AdaQuant(iters=300, holdout=0, lr={"weight": 5e-2}).fit(fake, data)
    with torch.no_grad():
        assert (fake(data[0]) - model(data[0])).square().mean() < 1e-3
    assert fake[0].change.abs().max() > 0


def test_parallel_does_not_depend_on_the_order_of_layers():
    model, data = net(), images()
    forward = quantize_layers(model, data, dict.fromkeys(LAYERS, (3, 4)))
    backward = copy.deepcopy(forward)
    tuner = AdaQuant(iters=15, batch_size=8)
    first = tuner.fit(forward, data, list(LAYERS))
    second = tuner.fit(backward, data, list(reversed(LAYERS)))
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(forward.parameters(), backward.parameters()))


def test_sequential_sees_quantized_inputs_and_full_precision_targets():
    model, data = net(), images()
    fake = quantize_layers(model, data, dict.fromkeys(LAYERS, (3, 4)))
    report = AdaQuant(iters=0, holdout=0, mode="sequential").fit(fake, data, ["6", "0"])
    with torch.no_grad():
        x = torch.cat(data)
        want = (fake(x) - model(x)).square().mean().item()
    assert report["6"].mse_before == pytest.approx(want, rel=1e-4)
    assert list(report) == ["6", "0"]


def test_identity_inputs_and_wide_ranges_reach_round_to_nearest_or_less():
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    model, data = nn.Sequential(layer), [torch.eye(16)]
    fake = quantize_layers(model, data, {"0": (4, None)}, "minmax")
    with torch.no_grad():
        fake[0].weight_range.mul_(2)
        fake[0].weight_low.mul_(2)
    span = 2 * (layer.weight.amax(1) - layer.weight.amin(1))
    scale = (span / 15)[:, None]
    zero = (-2 * layer.weight.amin(1)[:, None] / scale).round()
    nearest = (((layer.weight / scale).round() + zero).clamp(0, 15) - zero) * scale
    bound = (nearest - layer.weight).square().mean().item()
    rates = {"weight_range": 2e-2, "weight": 1e-3}
    fit = AdaQuant(iters=300, holdout=0, lr=rates).fit(fake, data)["0"]
    assert fit.mse_before == pytest.approx(bound, rel=1e-4)
    assert fit.mse_after <= 0.5 * bound


def test_a_start_that_cannot_be_bettered_is_kept():
    model, data = net(), images()
    fake = quantize_layers(model, data, {"6": (3, 4)})
    before = [p.clone() for p in fake[6].parameters()]
    wild = dict.fromkeys(("weight", "bias", "weight_range", "input_range"), 50.0)
    fit = AdaQuant(iters=10, lr=wild).fit(fake, data)["6"]
    assert fit.mse_after == fit.mse_before
    assert all(torch.equal(a, b) for a, b in zip(before, fake[6].parameters()))


def test_paper_rates_are_absolute_and_early_stop_ends():
    model, data = net(), images()
    fake = quantize_layers(model, data, {"6": (4, 4)})
    start = fake[6].weight.detach().clone()
    AdaQuant(iters=10, lr="paper", holdout=0).fit(fake, data)
    assert (fake[6].weight - start).abs().max() <= 10 * 1.01e-5 + 1e-7
    wild = dict.fromkeys(("weight", "bias", "weight_range", "input_range"), 50.0)
    assert AdaQuant(iters=100, lr=wild, early_stop=2).fit(fake, data)["6"].steps == 10


def test_a_layer_used_twice_is_fitted_to_both_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pool = nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(2)

        def forward(self, x):
            return self.body(self.pool(self.body(x)))

    torch.manual_seed(0)
    model, data = Twice().eval(), images()
    fake = quantize_layers(model, data, {"body": (3, 4)})
    fit = AdaQuant(iters=200, batch_size=16, holdout=0).fit(fake, data)["body"]
    with torch.no_grad():
        x = torch.cat(data)
        error = count = 0.0
        for z in (x, model.pool(model.body(x))):
            difference = fake.body(z) - model.body(z)
            error, count = error + difference.square().sum().item(), count + difference.numel()
    assert fit.mse_after == pytest.approx(error / count, rel=1e-4)
    assert fit.mse_after < fit.mse_before


@pytest.mark.parametrize("kind", ["conv1d", "transposed", "channels_last", "tokens"])
@torch.no_grad()
def test_shapes_of_every_kind_compute_what_the_layer_did(kind):
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6, 6)
    if kind == "conv1d":
        layer, x = nn.Conv1d(4, 6, 3, groups=2, padding="same"), torch.randn(4, 4, 9)
    elif kind == "transposed":
        layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    elif kind == "channels_last":
        layer, x = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), x.to(memory_format=torch.channels_last)
    else:
        layer, x = nn.Linear(6, 3), torch.randn(4, 5, 6)
    model = nn.Sequential(layer)
    fake = quantize_layers(model, [x], {"0": (12, 12)}, "minmax")
    assert fake[0].weight.shape[0] == fake[0].bias.shape[0] == fake[0].weight_range.shape[0]
    torch.testing.assert_close(fake(x), model(x), atol=1e-2, rtol=0)
    assert not torch.equal(fake(x), model(x))
    with full_precision(fake):
        torch.testing.assert_close(fake(x), model(x))


def test_bfloat16_models_are_fitted():
    model = net().bfloat16()
    data = [x.bfloat16() for x in images()]
    fake = quantize_layers(model, data, dict.fromkeys(LAYERS, (3, 4)))
    report = AdaQuant(iters=40, batch_size=8).fit(fake, data)
    assert fake(data[0]).dtype == torch.bfloat16
    assert sum(f.mse_after for f in report.values()) < sum(f.mse_before for f in report.values())


# -- sensitivities and the program -----------------------------------------------------------------------------------


def labelled() -> Calibration:
    return Calibration([(x, torch.arange(len(x)) % 5) for x in images()])


def test_layer_swap_is_the_measured_difference_and_leaves_the_base():
    model, data = net(), labelled()
    base = quantize_layers(model, data, dict.fromkeys(LAYERS, (8, 8)))
    low = quantize_layers(model, data, dict.fromkeys(LAYERS, (2, 2)))
    x = torch.cat(images())
    with torch.no_grad():
        before = base(x)
    table = layer_swap(base, [low], data)
    with torch.no_grad():
        assert torch.equal(base(x), before)
    assert table.layers == LAYERS
    mixed = copy.deepcopy(base)
    assemble_(mixed, [low], {"3": 2})
    want = data.mean_loss(mixed) - data.mean_loss(base)
    got = {(o.layer, o.treatments[0].bits): o.damage for o in table.options}
    assert got[("3", 2)] == pytest.approx(max(want, 1e-6), abs=1e-6)
    assert got[("3", 8)] == 0 and min(v for (_, b), v in got.items() if b == 2) >= 1e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_bit_operations_are_counted_and_can_be_the_budget(transposed: bool) -> None:
    torch.manual_seed(0)
    first = nn.ConvTranspose2d(2, 6, 3, stride=2, groups=2) if transposed else nn.Conv2d(2, 6, 3, stride=2, groups=2)
    model = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    data = labelled()
    base, low = (quantize_layers(model, data, {"0": (bits, bits), "3": (bits, None)}) for bits in (8, 4))
    table = layer_swap(base, [low], data)
    # One output value of a convolution, or one input value of a transposed one, meets 9 weights of 1 or 3 channels.
    macs = 8 * 2 * 6 * 6 * 3 * 9 if transposed else 8 * 6 * 2 * 2 * 1 * 9
    want = {("0", 8): 2 * macs * 64 / 1024, ("0", 4): 2 * macs * 16 / 1024}
    want |= {("3", bits): 2 * 8 * 30 * bits * 32 / 1024 for bits in (8, 4)}
    assert {(o.layer, o.treatments[0].bits): o.cost.flops for o in table.options} == pytest.approx(want)
    assert table.original.flops == 2 * (macs + 8 * 30)
    limit = want[("0", 4)] + want[("3", 8)]
    assert option_bits(integer(table, {"flops": limit}).chosen) == {"0": 4, "3": 8}


def test_program_is_the_brute_force_optimum():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for i in range(5) for m in (nn.Linear(4 + i, 5 + i), nn.ReLU())])
    data = Calibration([(torch.randn(16, 4), torch.arange(16) % 9)])
    paths = [str(2 * i) for i in range(5)]
    base, *variants = (quantize_layers(model, data, dict.fromkeys(paths, (b, b))) for b in (8, 4, 2))
    table = layer_swap(base, variants, data)
    rows = [[o for o in table.options if o.layer == path] for path in paths]
    assert [len(row) for row in rows] == [3] * 5
    for share in (0.3, 0.5, 0.8):
        limit = share * sum(row[0].cost.bytes for row in rows)
        want = min(
            sum(o.damage for o in choice)
            for choice in itertools.product(*rows)
            if sum(o.cost.bytes for o in choice) <= limit + 1e-9
        )
        found = integer(table, {"bytes": limit})
        assert found.damage == pytest.approx(want, abs=1e-9)
        assert set(option_bits(found.chosen)) == set(paths)
    with pytest.raises(BudgetError, match="reachable minimum"):
        integer(table, {"bytes": 1.0})


# -- bias tuning -----------------------------------------------------------------------------------------------------


def test_bias_tuning_moves_biases_alone_and_lowers_the_divergence():
    model, data = net(), images()
    fake = quantize_layers(model, data, dict.fromkeys(LAYERS, (3, 4)))
    before = {key: value.clone() for key, value in fake.named_parameters()}
    fit = bias_tune_(fake, model, data, epochs=6, rate=0.05)
    assert fit.after < fit.before
    assert fit.layers == ("0", "2", "3")
    moved = {key for key, value in fake.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {"0.bias", "2.bias", "3.bias"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in fake.parameters())


def test_bias_tuning_that_does_harm_is_undone():
    model, data = net(), images()
    fake = quantize_layers(model, data, dict.fromkeys(LAYERS, (3, 4)))
    before = [p.clone() for p in fake.parameters()]
    fit = bias_tune_(fake, model, data, epochs=2, rate=1e4)
    assert fit.after == fit.before
    assert all(torch.equal(a, b) for a, b in zip(before, fake.parameters()))


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_by_name():
    model, data = net(), images()
    with pytest.raises(ValueError, match="empty"):
        quantize_layers(model, [], {"0": (4, 4)})
    with pytest.raises(ValueError, match="bits"):
        quantize_layers(model, data, {"0": (1, 4)})
    with pytest.raises(ValueError, match="nowhere"):
        quantize_layers(model, data, {"nowhere": (4, 4)})
    with pytest.raises(TypeError, match="ReLU"):
        quantize_layers(model, data, {"1": (4, 4)})
    with pytest.raises(ValueError, match="no fake-quantized layers"):
        AdaQuant().fit(model, data)
    fake = quantize_layers(model, data, {"0": (4, 4)})
    with pytest.raises(ValueError, match="nowhere"):
        AdaQuant().fit(fake, data, ["nowhere"])
    with pytest.raises(ValueError, match="empty"):
        AdaQuant().fit(fake, [])
    for settings in ({"mode": "both"}, {"lr": "none"}, {"lr": {"weights": 1.0}}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            AdaQuant(**settings)
    with pytest.raises(ValueError, match="labels"):
        layer_swap(fake, [], [(data[0], torch.zeros(3, dtype=torch.long))])
    broken = copy.deepcopy(fake)
    broken[0].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^0: "):
        layer_swap(fake, [broken], labelled())


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_layer_that_never_runs_is_named(mode):
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    data = [torch.randn(4, 3)]
    fake = quantize_layers(Idle(), data, {"used": (4, 4), "idle": (4, None)})
    with pytest.raises(ValueError, match=r"^idle: .*zero times"):
        AdaQuant(iters=1, mode=mode).fit(fake, data)
    with pytest.raises(ValueError, match=r"^idle: "):
        quantize_layers(Idle(), data, {"idle": (4, 4)})


def test_mode_is_put_back_and_dropout_is_off():
    model, data = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)), [torch.randn(16, 4)]
    model.train()
    fake = quantize_layers(model, data, {"2": (3, 4)})
    first = AdaQuant(iters=0).fit(fake, data)
    assert first == AdaQuant(iters=0).fit(fake, data)
    assert fake.training and model.training and fake[1].training


def test_copies_and_state_dicts_hold_everything():
    model, data = net(), images()
    fake = quantize_layers(model, data, {"0": (3, 4)})
    AdaQuant(iters=5).fit(fake, data)
    other = quantize_layers(model, data, {"0": (3, 4)}, "minmax")
    other.load_state_dict(fake.state_dict())
    x = torch.cat(data)
    with torch.no_grad():
        assert torch.equal(other(x), fake(x)) and torch.equal(copy.deepcopy(fake)(x), fake(x))
    codes, scale, zero = fake[0].codes()
    assert codes.min() >= 0 and codes.max() <= 7
    values = (codes - zero.reshape(-1, 1, 1, 1)) * scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(values, fake[0].quantized_weight().detach())


# -- tuners of a carried-out plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adaquant", "renormalize", "bias_tune"])
def test_tuners_bring_a_treated_model_closer_to_its_teacher(name):
    from layerwright.core.treatment import Quantize
    from layerwright.treat.apply import apply_plan

    model, data = net(), Calibration(images())
    treatment = (Quantize(bits=3, symmetric=False, method="rtn"),)
    treated, _ = apply_plan(model, dict.fromkeys(LAYERS, treatment), data)
    x = torch.cat(images(40, seed=2))
    with torch.no_grad():
        want = model(x)
        before = (F.softmax(treated(x), -1) - F.softmax(want, -1)).square().mean()
        settings = {"adaquant": {"iters": 60}, "bias_tune": {"rate": 0.05}}.get(name, {})
        tuned = TUNERS.get(name)(treated, data, teacher=model, seed=0, **settings)
        after = (F.softmax(tuned(x), -1) - F.softmax(want, -1)).square().mean()
    assert after < before
    with pytest.raises(ValueError, match=r"teacher|reference"):
        TUNERS.get(name)(treated, data)


def test_every_step_refuses_an_empty_calibration_and_puts_the_mode_back():
    model, data = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)), [torch.randn(16, 4)]
    labelled_data = Calibration([(data[0], torch.arange(16) % 3)])
    base, low = (quantize_layers(model, data, {"0": (bits, bits)}) for bits in (8, 2))
    steps = {
        "swap": lambda calibration: layer_swap(base, [low], calibration),
        "bias": lambda calibration: bias_tune(low, model, calibration, epochs=1),
        "renormalize": lambda calibration: renormalize(low, calibration),
    }
    for module in (model, base, low):
        module.train()
    for step in steps.values():
        with pytest.raises(ValueError, match="empty"):
            step([])
        first, second = (step(labelled_data) for _ in range(2))
        if isinstance(first, nn.Module):
            assert first.training and first[1].training
            assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
        else:
            assert first == second  # no dropout while measuring
        assert model.training and base.training and low.training and low[1].training
    table = layer_swap(base, [low], labelled_data)
    least = min(option.cost.bytes for option in table.options)
    with pytest.raises(ValueError, match="reachable minimum") as caught:
        integer(table, {"bytes": 0.5 * least})
    assert f"{least:g}" in str(caught.value)
