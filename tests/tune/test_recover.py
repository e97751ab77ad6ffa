"""The repairs as tuners: what they must leave alone, and a whole recipe on a Hugging Face network trained here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import Calibration, logits_of
from layerwright.core.errors import InputError
from layerwright.core.treatment import Quantize
from layerwright.recipes.book import recipe
from layerwright.recipes.verbs import apply, plan, tune
from layerwright.studies._fixtures import digit_images, digits_resnet
from layerwright.treat.apply import apply_plan
from layerwright.treat.fold import fold_batchnorm
from layerwright.tune import TUNERS, bias_tune, renormalize
from layerwright.tune._absorb import absorb_biases_
from layerwright.tune._fake_layers import quantize_layers
from layerwright.tune.bias_tune import divergence

SETTINGS: dict[str, dict[str, Any]] = {
    "adaquant": {"iters": 3, "epochs": 1},
    "renormalize": {},
    "bias_tune": {"rate": 0.05, "epochs": 1},
}


@cache
def trained() -> nn.Module:
    """A Hugging Face ResNet whose BatchNorms are folded into its convolutions."""
    return fold_batchnorm(digits_resnet(1, batch_size=16))


def part(name: Any, count: int) -> Calibration:
    return digit_images(name, torch.arange(count), batch_size=32)


def convolutions(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)][1:]


def nearest(model: nn.Module, bits: int) -> nn.Module:
    """Uniform round-to-nearest."""
    treatment = (Quantize(bits=bits, symmetric=False, method="rtn"),)
    return apply_plan(model, dict.fromkeys(convolutions(model), treatment), part("calibration", 32))[0]


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not saved included, and what they hold."""
    return {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    now = everything(model)
    return before.keys() == now.keys() and all(torch.equal(value, now[name]) for name, value in before.items())


@pytest.mark.parametrize("name", SETTINGS)
def test_tune_leaves_the_model_and_its_teacher_untouched(name: str) -> None:
    teacher, data = trained(), part("calibration", 32)
    treated = nearest(teacher, 3)
    treated.train()
    before, above = everything(treated), everything(teacher)
    structure, flags = repr(treated), [p.requires_grad for p in treated.parameters()]
    tuned = tune(treated, data, name, teacher=teacher, **SETTINGS[name])
    assert same(before, treated) and same(above, teacher)
    assert repr(treated) == structure and [p.requires_grad for p in treated.parameters()] == flags
    assert treated.training and not teacher.training
    assert all(parameter.grad is None for parameter in treated.parameters())
    assert tuned is not treated and not same(before, tuned)
    for own, other in zip(tuned.parameters(), treated.parameters(), strict=False):
        assert own.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("repair", [renormalize, lambda m, data: bias_tune(m, trained(), data, rate=0.05)])
def test_repairs_of_fake_quantized_layers_work_on_a_copy(repair: Callable[[nn.Module, Calibration], nn.Module]) -> None:
    data = part("calibration", 32)
    fake = quantize_layers(trained(), data, dict.fromkeys(convolutions(trained()), (3, 4)))
    before = everything(fake)
    repaired = repair(fake, data)
    assert same(before, fake) and not same(before, repaired)
    assert not any(module._forward_hooks for model in (fake, repaired) for module in model.modules())


@pytest.mark.parametrize("name", SETTINGS)
def test_same_seed_same_bytes(name: str) -> None:
    treated, data = nearest(trained(), 3), part("calibration", 16)
    tuner = TUNERS.get(name)
    first, second = (tuner(treated, data, teacher=trained(), seed=3, **SETTINGS[name]) for _ in range(2))
    assert same(everything(first), second)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_statistics_are_only_brought_back_where_that_helps(bits: int) -> None:
    teacher, data = trained(), part("calibration", 64)
    treated = nearest(teacher, bits)
    before = divergence(treated, teacher, data)
    tuned = TUNERS.get("renormalize")(treated, data, teacher=teacher)
    after = divergence(tuned, teacher, data)
    if bits == 2:
        assert after < 0.5 * before
    plain = divergence(renormalize(treated, data, teacher), teacher, data)
    assert after == pytest.approx(min(before, plain), rel=1e-5)


def test_fitting_beats_rounding_to_nearest_on_held_out_data() -> None:
    teacher, heldout = trained(), part("heldout", 200)
    treated = nearest(teacher, 3)
    tuned = TUNERS.get("adaquant")(treated, part("calibration", 64), teacher=teacher, iters=30, epochs=2)
    assert divergence(tuned, teacher, heldout) < 0.7 * divergence(treated, teacher, heldout)


def test_bias_tuning_works_where_re_normalisation_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized layers without a bias get one to tune."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3, bias=False))
    data = Calibration(list(torch.randn(32, 1, 8, 8).split(16)))
    treated, _ = apply_plan(model, {"0": (Quantize(bits=8, group_size=3),)}, data)  # groups are not fitted
    monkeypatch.setattr("layerwright.tune.recover.renormalize", lambda model, *_: copy.deepcopy(model))
    tuned = TUNERS.get("adaquant")(treated, data, teacher=model)
    assert treated[0].bias is None and tuned[0].bias.shape == (4,)
    assert divergence(tuned, model, data) <= divergence(treated, model, data)


@pytest.mark.parametrize("name", ["adaquant", "adaquant_light"])
def test_the_recipes_beat_uniform_rounding_of_equal_bytes_on_a_trained_resnet(name: str) -> None:
    teacher, heldout, data = trained(), part("heldout", 359), part("calibration", 32)
    decided = plan(teacher, data, budget="bits=3", recipe=name)
    settings = {"iters": 20, "epochs": 2} if name == "adaquant" else {}
    result = tune(apply(teacher, decided, data), data, str(recipe(name).tuner), teacher=teacher, **settings)
    uniform, _ = apply_plan(
        teacher, dict.fromkeys(decided.layers, (Quantize(bits=3, symmetric=False, method="rtn"),)), data
    )
    bits = [t.bits for treatments in decided.layers.values() for t in treatments if isinstance(t, Quantize)]
    assert min(bits) < 3 < max(bits)
    assert divergence(result, teacher, heldout) < divergence(uniform, teacher, heldout)
    with torch.no_grad():
        wrong = [
            int((logits_of(heldout.forward(model, batch)).argmax(-1) != batch["labels"]).sum())
            for model in (result, uniform)
            for batch in heldout
        ]
    half = len(wrong) // 2
    assert sum(wrong[:half]) <= sum(wrong[half:])


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_input(name: str) -> None:
    treated, data = nearest(trained(), 3), part("calibration", 32)
    with pytest.raises(ValueError, match=r"teacher|reference"):
        TUNERS.get(name)(treated, data)
    with pytest.raises(ValueError, match="empty"):
        tune(treated, [], name, teacher=trained())
    if name != "bias_tune":
        with pytest.raises(ValueError, match="no quantized layers"):
            TUNERS.get(name)(trained(), data, teacher=trained())


@pytest.mark.parametrize("name", ["adaquant", "renormalize"])
def test_new_biases_go_into_the_batchnorms_behind(name: str) -> None:
    """The planned bytes hold, and the output is that of the biases where they were."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),  # nothing takes the bias of this one
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    data = Calibration(list(torch.randn(64, 1, 8, 8).split(16)))
    for batch in data:
        model(batch)
    model.eval()
    treatment = (Quantize(bits=2, symmetric=False, method="rtn"),)
    treated, _ = apply_plan(model, {"0": treatment, "3": treatment}, data)
    mean = treated[1].running_mean.clone()
    tuned = TUNERS.get(name)(treated, data, teacher=model, **({"iters": 30} if name == "adaquant" else {}))
    assert tuned[0].bias is None and tuned[3].bias is not None
    assert torch.equal(treated[1].running_mean, mean) and not torch.equal(tuned[1].running_mean, mean)
    assert divergence(tuned, model, data) < divergence(treated, model, data)
    with torch.no_grad():
        x, before = data.batches[0], copy.deepcopy(tuned)
        before[0].bias = torch.randn(8)
        want = before(x)
        assert absorb_biases_(before, ["0", "3", "5"], data) == ["0"]
        torch.testing.assert_close(before(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_bfloat16_models_stay_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    model = nn.Sequential(*layers).bfloat16().eval()
    data = Calibration(list(torch.randn(64, 1, 8, 8).bfloat16().split(16)))
    treatment = (Quantize(bits=2, symmetric=False, method="rtn"),)
    treated, _ = apply_plan(model, {"0": treatment, "2": treatment}, data)
    tuned = tune(
        treated, data, name, teacher=model, **(SETTINGS[name] | {"epochs": 3} if name != "renormalize" else {})
    )
    assert divergence(tuned, model, data) < divergence(treated, model, data)
    assert tuned(data.batches[0]).dtype == tuned[0].bias.dtype == tuned[0].weight_scale.dtype == torch.bfloat16


def by_gptq(bits: int) -> tuple[nn.Module, nn.Module, Calibration]:
    """(teacher, its GPTQ-rounded copy, data)."""
    teacher, data = trained(), part("calibration", 32)
    treatment = (Quantize(bits=bits, symmetric=False, method="gptq"),)
    return teacher, apply_plan(teacher, dict.fromkeys(convolutions(teacher), treatment), data)[0], data


@pytest.mark.parametrize("bits", [2, 4])
def test_a_fit_can_start_from_the_plans_codes(bits: int) -> None:
    """Without a step, what was read is what is written: the same dense weights, to the last bit."""
    teacher, treated, data = by_gptq(bits)
    settings: dict[str, Any] = {"iters": 0, "epochs": 0, "passes": 1}
    tuned = TUNERS.get("adaquant")(treated, data, teacher=teacher, start="plan", **settings)
    anew = TUNERS.get("adaquant")(treated, data, teacher=teacher, start="weights", **settings)
    moved = 0
    for path in convolutions(teacher):
        before, after, other = (model.get_submodule(path) for model in (treated, tuned, anew))
        assert torch.equal(before.weight_packed, after.weight_packed)
        assert torch.equal(before.weight_zero, after.weight_zero)
        moved += not torch.equal(before.weight_packed, other.weight_packed)
    assert moved > 0


def test_a_fit_from_the_plan_does_not_fall_behind_it() -> None:
    teacher, treated, data = by_gptq(2)
    settings: dict[str, Any] = {"iters": 40, "epochs": 1, "mode": "sequential"}
    tuned = TUNERS.get("adaquant")(treated, data, teacher=teacher, start="plan", **settings)
    assert divergence(tuned, teacher, data) < divergence(treated, teacher, data)


def test_an_unknown_start_is_refused() -> None:
    teacher, treated, data = by_gptq(2)
    with pytest.raises(InputError, match="unknown start 'codes' in adaquant; known: plan, weights"):
        TUNERS.get("adaquant")(treated, data, teacher=teacher, start="codes")
