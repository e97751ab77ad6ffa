from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles.conv_factors import impulse_kernel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerwright.core.conv_factors import largest_rank
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.core.plan import Plan
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import FactorConv, Quantize, treatments_from_data, treatments_to_data
from layerwright.nn.replace import rebuild_, structure_of
from layerwright.treat.apply import apply_plan
from layerwright.treat.factorize import composed_kernel, conv_kernels, cp_factors, factor_cost, factorize_conv

FORMS: list[tuple[Any, Any, int]] = [
    ("svd", 2, 1),
    ("svd", 4, 1),
    ("svd", 4, 2),
    ("svd", 4, 6),
    ("svd", 5, 1),
    ("svd", 5, 4),
    ("svd", 5, 8),
    ("cp", 4, 1),
]
CONVS: list[tuple[Any, Any, Any, Any]] = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (0, 0), (1, 1)),
    ((3, 5), (2, 1), (1, 2), (1, 1)),
    ((1, 3), (1, 2), (0, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
]


def conv(kernel: Any = (3, 3), stride: Any = 1, padding: Any = 1, dilation: Any = 1, **more: Any) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(6, 8, kernel, stride, padding, dilation, **more)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", CONVS)
def test_full_rank_gives_the_convolution_and_costs_what_is_counted(form: Any, shape: Any) -> None:
    method, scheme, groups = form
    whole = conv(*shape)
    most = largest_rank(FactorConv(1, method, scheme, groups, *shape[0]), 8, 6)
    chain = factorize_conv(whole, method, scheme, groups, most, sweeps=300)
    x = torch.randn(2, 6, 11, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        given_ = chain(x)
    expected = whole(x)
    assert torch.allclose(given_, expected, atol=1e-4)
    assert chain.bias is not None and all(stage.bias is None for stage in list(chain)[:-1])
    params, macs = factor_cost(
        (8, 6, *shape[0]), tuple(expected.shape[2:]), method, scheme, groups, most, stride=shape[1], in_size=(11, 10)
    )  # type: ignore[arg-type]
    assert counter.get_total_flops() == 2 * 2 * macs
    assert sum(stage.weight.numel() for stage in chain) == params  # type: ignore[union-attr, operator, misc]
    treatment = FactorConv(most, method, scheme, groups, *shape[0])
    assert stored_bytes((treatment,), 8, 6 * shape[0][0] * shape[0][1], 1, 4) == 4 * params


def test_the_published_formulas() -> None:
    out, in_, k, h, r, s = 12, 8, 3, 10, 4, 2
    area = h * h
    assert factor_cost((out, in_, k, k), (h, h), "svd", 2, 1, r, stride=(s, s)) == (
        r * (out * k + in_ * k),
        area * r * (out * k + in_ * k * s),
    )
    g = 4
    assert factor_cost((out, in_, k, k), (h, h), "svd", 4, g, r, stride=(s, s)) == (
        g * r * (out + in_ // g * k * k),
        area * g * r * (out + in_ // g * k * k),
    )
    assert factor_cost((out, in_, k, k), (h, h), "svd", 5, g, r, stride=(s, s)) == (
        g * r * (in_ + out // g * k * k),
        area * g * r * (in_ * s * s + out // g * k * k),
    )
    assert factor_cost((out, in_, k, k), (h, h), "cp", rank=r, stride=(s, s)) == (
        r * (in_ + 2 * k + out),
        area * r * (out + k + k * s + in_ * s * s),
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form[0] == "svd"])
def test_the_error_is_the_tail_of_the_singular_values_of_every_group(form: Any) -> None:
    _, scheme, groups = form
    weight = conv().weight.detach()
    factor = FactorConv(2, "svd", scheme, groups)
    error = (weight - composed_kernel(conv_kernels(weight, factor), factor)).double().square().sum()
    tail = 0.0
    if scheme == 2:
        tail += float(torch.linalg.svdvals(weight.double().permute(0, 2, 1, 3).reshape(24, 18))[2:].square().sum())
    for part in weight.double().chunk(groups, 1 if scheme == 4 else 0) if scheme != 2 else ():
        matrix = part.reshape(8, -1) if scheme == 4 else part.transpose(0, 1).reshape(6, -1)
        tail += float(torch.linalg.svdvals(matrix)[2:].square().sum())
    assert float(error) == pytest.approx(tail, rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_composed_kernel_is_what_the_chain_computes(form: Any) -> None:
    method, scheme, groups = form
    whole = conv(bias=False)
    factor = FactorConv(2, method, scheme, groups)
    kernel = composed_kernel(conv_kernels(whole.weight, factor), factor)
    chain = factorize_conv(whole, method, scheme, groups, 2)
    assert torch.allclose(impulse_kernel(chain, 6, (3, 3)), kernel, atol=1e-5)


def test_factors_have_alike_scales() -> None:
    whole = conv()
    first, last = conv_kernels(whole.weight, FactorConv(3, "svd", 4))
    assert torch.allclose(first.flatten(1).norm(dim=1), last.flatten(1).norm(dim=0), rtol=1e-4)
    norms = [k.transpose(0, 1).flatten(1).norm(dim=1) if i == 3 else k.flatten(1).norm(dim=1) for i, k in
             enumerate(conv_kernels(whole.weight, FactorConv(3, "cp")))]  # fmt: skip
    assert all(torch.allclose(norms[0], other, rtol=1e-4) for other in norms[1:])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_cp_recovers_an_exact_sum_of_two(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, 2, generator=generator) for size in (8, 6, 3, 3)]
    kernel = torch.einsum("fr,cr,ir,jr->fcij", *parts)
    found = cp_factors(kernel, 2, sweeps=1000)
    error = (kernel - torch.einsum("fr,cr,ir,jr->fcij", *found)).norm() / kernel.norm()
    components = torch.stack([torch.einsum("f,c,i,j->fcij", *(p[:, r] for p in parts)).flatten() for r in range(2)])
    alike = torch.nn.functional.cosine_similarity(components[0], components[1], dim=0).abs()
    # Components that nearly coincide make least squares crawl, whoever does it.
    assert float(error) < 1e-3 or float(alike) > 0.3


def test_cp_is_repeatable_and_never_gets_worse_with_sweeps() -> None:
    weight = conv().weight.detach()
    errors = []
    for sweeps in (1, 3, 10, 40):
        one, two = (cp_factors(weight, 12, seed=3, sweeps=sweeps) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        errors.append(float((weight - torch.einsum("fr,cr,ir,jr->fcij", *one)).square().sum()))
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(errors))
    zero = cp_factors(torch.zeros(4, 3, 3, 3), 2)
    assert all(float(part.abs().sum()) == 0 for part in zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_dtype_padding_mode_and_training_flag_stay(dtype: torch.dtype, mode: str) -> None:
    whole = conv(padding_mode=mode).to(dtype).eval()
    before = whole.weight.detach().clone()
    chain = factorize_conv(whole, "svd", 2, 1, 18)
    x = torch.randn(1, 6, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert torch.allclose(chain(x).float(), whole(x).float(), atol=tolerance)
    assert {p.dtype for p in chain.parameters()} == {dtype}
    assert not chain.training
    assert torch.equal(whole.weight, before)


def test_same_padding_by_name() -> None:
    whole = conv((3, 5), 1, "same")
    x = torch.randn(1, 6, 9, 8)
    for form in FORMS:
        factor = FactorConv(1, *form, 3, 5)
        chain = factorize_conv(whole, *form, largest_rank(factor, 8, 6), sweeps=300)
        assert torch.allclose(chain(x), whole(x), atol=1e-4)


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (lambda: nn.Conv2d(6, 8, 3, groups=2), {}, "groups"),
        (lambda: nn.ConvTranspose2d(6, 8, 3), {}, "ConvTranspose2d"),
        (lambda: nn.Conv1d(6, 8, 3), {}, "Conv1d"),
        (lambda: nn.Conv2d(6, 8, 3), {"rank": 0}, "at least 1"),
        (lambda: nn.Conv2d(6, 8, 3), {"rank": 9}, "above 8"),
        (lambda: nn.Conv2d(6, 8, 3), {"groups": 4}, "does not divide"),
        (lambda: nn.Conv2d(6, 8, 3), {"scheme": 5, "groups": 3}, "does not divide"),
        (lambda: nn.Conv2d(6, 8, 3), {"scheme": 3}, "scheme"),
        (lambda: nn.Conv2d(6, 8, 3), {"method": "cp", "groups": 2}, "groups"),
        (lambda: nn.Conv2d(6, 8, 1), {"method": "cp", "rank": 1}, "1 x 1"),
    ],
)
def test_bad_input_names_the_layer(module: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        factorize_conv(module(), **{"rank": 2, **arguments}, name="features.3")
    assert "features.3" in str(caught.value)


def test_weights_that_are_not_finite_are_refused() -> None:
    whole = conv()
    with torch.no_grad():
        whole.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"block\.conv"):
        factorize_conv(whole, rank=2, name="block.conv")


# -- as a treatment -------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1)
        ).eval()


PLAN = {"2": (FactorConv(4, "svd", 5, 2),), "3": (FactorConv(9, "cp"),)}


def test_a_plan_puts_chains_in_place_and_they_are_saved_and_built_again() -> None:
    model, x = network(), torch.randn(2, 1, 16, 16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, report = apply_plan(model, PLAN)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [len(small.get_submodule(path)) for path in "23"] == [2, 4]  # type: ignore[arg-type]
    simulated, _ = apply_plan(model, PLAN, simulate=True)
    assert torch.allclose(small(x), simulated(x), atol=1e-5)
    predicted = {record.layer: record.bytes for record in report}
    for path in "23":
        kernels = [p for name, p in small.get_submodule(path).named_parameters() if name.endswith("weight")]
        assert predicted[path] == sum(p.numel() * p.element_size() for p in kernels)
    assert all(0 < (record.error or 0) < 1 for record in report)
    again = network()
    structure = structure_of(small)
    assert {spec["type"] for spec in structure.values()} == {"factorized_conv"}
    rebuild_(again, structure)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


def test_stages_can_be_treated_again() -> None:
    small, _ = apply_plan(network(), PLAN)
    paths = [ref.path for ref in list_layers(small) if ref.path.startswith("2.")]
    assert paths == ["2.0", "2.1"]
    rounded, _ = apply_plan(small, {"2.1": (Quantize(8, method="rtn"),)})
    again = network()
    rebuild_(again, structure_of(rounded))
    again.load_state_dict(rounded.state_dict())
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(again(x), rounded(x))


def test_there_and_back_in_a_plan_file(tmp_path: Any) -> None:
    for treatments in PLAN.values():
        assert treatments_from_data(treatments_to_data(treatments)) == treatments
    plan = Plan(PLAN)
    path = tmp_path / "plan.yaml"
    plan.save(path)
    assert Plan.load(path).layers == plan.layers
    shapes = {ref.path: ref.shape for ref in list_layers(network())}
    assert plan.check(shapes, shapes=shapes) == []
    wrong = Plan({"2": (FactorConv(200),), "3": (FactorConv(2, kernel_height=5),)})
    problems = wrong.check(shapes, shapes=shapes)
    assert len(problems) == 2 and "rank 200" in problems[0] and "kernel" in problems[1]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"0": (FactorConv(2, kernel_width=1),)}, "0: got a weight"),
        ({"3": (FactorConv(2), Quantize(4))}, "3: .*combined"),
        ({"3": (FactorConv(17),)}, "3: .*rank 17"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_layer(plan: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        apply_plan(network(), plan, [torch.randn(2, 1, 16, 16)])


def test_only_plain_convolutions() -> None:
    model = nn.Sequential(nn.Linear(9, 16), nn.Linear(16, 9))
    with pytest.raises(InputError, match=r"nn\.Conv2d"):
        apply_plan(model, {"1": (FactorConv(2),)})
    grouped = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=2))
    with pytest.raises(InputError, match=r"1: .*groups"):
        apply_plan(grouped, {"1": (FactorConv(2),)})
