from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.core.storage import stored_bytes
from layerwright.core.treatment import LowRank, Quantize, Sparsify, Treatments
from layerwright.nn import LowRankStack, PackedStack, SparseStack, module_from_spec, replace_parameter_
from layerwright.nn.experts import ExpertStack
from layerwright.nn.stored import Stored
from stored_samples import low_rank, normal, quantized, random_mask, relative, sparse, state_bytes

FORMS = ["packed", "sparse", "sparse packed", "low rank", "low rank packed"]
INT = Quantize(4, 8, False, "rtn")


def stack_of(
    form: str, shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool
) -> tuple[ExpertStack, Stored]:
    if form == "packed":
        stored = quantized(shape, 4, 8, False, dtype)
        return PackedStack.from_stored(stored, dtype, transposed=transposed), stored
    if form.startswith("sparse"):
        mask = random_mask(shape, 0.5)
        stored = sparse(shape, 0.5, dtype) if form == "sparse" else quantized(shape, 4, 8, False, dtype, mask=mask)
        return SparseStack.from_stored(stored, dtype, transposed=transposed), stored
    stored = low_rank(shape, 3, dtype, 5 if form.endswith("packed") else None)
    return LowRankStack.from_stored(stored, dtype, transposed=transposed), stored


def plan_of(form: str) -> Treatments:
    plans: dict[str, Treatments] = {
        "packed": (INT,),
        "sparse": (Sparsify(0.5),),
        "sparse packed": (Sparsify(0.5), INT),
        "low rank": (LowRank(3),),
        "low rank packed": (LowRank(3), Quantize(5, method="rtn")),
    }
    return plans[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
def test_it_indexes_like_the_parameter(form: str, transposed: bool) -> None:
    stack, stored = stack_of(form, (4, 8, 16), torch.float32, transposed)
    parameter = stored.to_dense().transpose(1, 2) if transposed else stored.to_dense()
    assert (stack.shape, stack.ndim, stack.dim(), len(stack)) == (parameter.shape, 3, 3, 4)
    assert (stack.dtype, stack.device, stack.size(1)) == (torch.float32, parameter.device, parameter.shape[1])
    for index in (0, 3, -1, torch.tensor(2), torch.tensor(1, dtype=torch.int32)):
        assert stack[index].shape == parameter[index].shape
        assert torch.allclose(stack[index] + 0, parameter[index], atol=1e-6)
    for index in (
        slice(1, 3),
        torch.tensor([3, 0, 3]),
        torch.tensor([[1], [1]]),
        [2],
        torch.empty(0, dtype=torch.long),
    ):
        assert torch.allclose(stack[index], parameter[index], atol=1e-6)
    for index in (4, -5, torch.tensor(9)):
        with pytest.raises(IndexError):
            stack[index]
    assert torch.allclose(stack.dense(), parameter, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_one_expert(form: str, transposed: bool, dtype: torch.dtype) -> None:
    stack, stored = stack_of(form, (3, 16, 64), dtype, transposed)
    x, bias = normal(5, 64, dtype=dtype), normal(16, dtype=dtype)
    for expert in range(3):
        product = x.double() @ stored.to_dense(torch.float64)[expert].T
        if transposed:
            got = [x @ stack[expert], torch.matmul(x, stack[expert])]
        else:
            got = [F.linear(x, stack[expert]), F.linear(x, stack[expert], bias) - bias, x @ stack[expert].t()]
        assert all(relative(y, product) < (1e-5 if dtype == torch.float32 else 2e-2) for y in got)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_all_experts(transposed: bool) -> None:
    stack, stored = stack_of("packed", (3, 16, 8), torch.float32, transposed)
    x = normal(3, 5, 16 if not transposed else 8).requires_grad_()
    dense = stored.to_dense().transpose(1, 2) if transposed else stored.to_dense()
    y = torch.bmm(x, stack)  # type: ignore[arg-type]
    assert torch.allclose(y, torch.bmm(x, dense), atol=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, dense.sum(2).unsqueeze(1).expand_as(gradient), atol=1e-5)


def test_one_expert_s_product_reads_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no fast integer products here")
    stored = quantized((3, 16, 64), 4, 32, dtype=torch.bfloat16)
    stack = PackedStack.from_stored(stored, torch.bfloat16)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a dense row was read")

    monkeypatch.setattr(PackedStack, "read_rows", refuse)
    x = normal(2, 64, dtype=torch.bfloat16)
    assert relative(F.linear(x, stack[1]), x.double() @ stored.to_dense(torch.float64)[1].T) < 5e-3
    assert set(stack._kernels) == {1}


@settings(deadline=None, max_examples=40)
@given(form=st.sampled_from(FORMS), count=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_bytes_are_those_that_were_planned(form: str, count: int, dtype: torch.dtype) -> None:
    stack, _ = stack_of(form, (count, 12, 24), dtype, False)
    assert state_bytes(stack) == stored_bytes(plan_of(form), 12, 24, count, dtype.itemsize)


@pytest.mark.parametrize("form", FORMS)
def test_round_trips(form: str) -> None:
    stack, _ = stack_of(form, (3, 8, 16), torch.float32, True)
    empty = module_from_spec(json.loads(json.dumps(stack.spec())))
    empty.load_state_dict(stack.state_dict())
    assert isinstance(empty, ExpertStack)
    assert torch.equal(empty.dense(), stack.dense())
    assert torch.equal(copy.deepcopy(stack).dense(), stack.dense())
    assert copy.deepcopy(stack).to(torch.bfloat16).dense().dtype == torch.bfloat16


def test_dense_factors_train() -> None:
    stack, _ = stack_of("low rank", (3, 8, 16), torch.float32, False)
    F.linear(normal(2, 16), stack[1]).sum().backward()
    gradients = [parameter.grad for parameter in stack.parameters()]
    assert len(gradients) == 2
    assert all(g is not None and g[1].abs().sum() > 0 and g[0].abs().sum() == 0 for g in gradients)


def test_the_parameter_s_place_and_the_loop_over_experts() -> None:
    stack, _ = stack_of("packed", (3, 8, 16), torch.float32, False)
    config = SimpleNamespace(_experts_implementation="grouped_mm")
    owner = nn.Module()
    owner.config = config  # type: ignore[assignment]
    owner.gate = nn.Parameter(torch.zeros(3, 8, 16))
    replace_parameter_(owner, "gate", stack)
    assert owner.gate is stack
    assert "gate" not in owner._parameters
    assert owner.config._experts_implementation == "eager"
    assert config._experts_implementation == "grouped_mm"
    owner.other = nn.Parameter(torch.zeros(3, 16, 8))
    with pytest.raises(InputError, match="expected shape"):
        replace_parameter_(owner, "other", stack)
    with pytest.raises(InputError, match="found nothing"):
        replace_parameter_(owner, "absent", stack)
