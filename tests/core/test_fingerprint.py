"""Fingerprints name a model and its data: equal for equals, different after any change that matters."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerwright.core.errors import InputError
from layerwright.core.fingerprint import fingerprint_batches, fingerprint_model, fingerprint_structure
from layerwright.core.layers import structure_copy
from zoo import ZOO, on_meta


@pytest.mark.parametrize("name", ["llama", "t5", "resnet", "gpt_oss"])
def test_same_after_saving_and_loading(name: str, tmp_path: object) -> None:
    model, _ = ZOO[name]()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint_model(loaded) == fingerprint_model(model) == fingerprint_model(ZOO[name]()[0])
    assert len(fingerprint_model(model)) == 64


@pytest.mark.parametrize("name", ["llama", "t5", "resnet"])
def test_structure_needs_no_values(name: str) -> None:
    model, _ = ZOO[name]()
    assert fingerprint_structure(on_meta(name)) == fingerprint_structure(model)
    with pytest.raises(InputError, match="fingerprint_structure"):
        fingerprint_model(on_meta(name))


def test_changes_are_seen() -> None:
    model, _ = ZOO["llama"]()
    before, shape = fingerprint_model(model), fingerprint_structure(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.001)
    assert fingerprint_model(model) != before
    assert fingerprint_structure(model) == shape
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 65, bias=False)
    assert fingerprint_structure(model) != shape


def test_reads_only() -> None:
    model, _ = ZOO["resnet"]()
    state = copy.deepcopy(model.state_dict())
    fingerprint_model(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert fingerprint_model(structure_copy(model)) == fingerprint_model(model)


def test_saved_buffers_count_and_temporary_ones_do_not() -> None:
    model = nn.BatchNorm1d(4)
    before = fingerprint_model(model)
    model.register_buffer("scratch", torch.ones(2), persistent=False)
    assert fingerprint_model(model) == before
    model(torch.randn(8, 4))
    assert fingerprint_model(model) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_every_dtype(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("packed", torch.arange(20).reshape(4, 5).to(dtype))
    model.register_buffer("view", torch.arange(20).reshape(4, 5).to(dtype).t())
    model.register_buffer("empty", torch.zeros(0, 3, dtype=dtype))
    model.register_buffer("scalar", torch.tensor(2).to(dtype))
    assert fingerprint_model(model) == fingerprint_model(copy.deepcopy(model))


def test_transposed_storage_is_the_same_tensor() -> None:
    straight, turned = nn.Linear(5, 3), nn.Linear(5, 3)
    turned.weight = nn.Parameter(straight.weight.detach().t().contiguous().t())
    turned.bias = straight.bias
    assert fingerprint_model(straight) == fingerprint_model(turned)


def test_batches() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    base = [{"input_ids": x, "labels": x}]
    assert fingerprint_batches(base) == fingerprint_batches(
        [{"labels": x.clone(), "input_ids": x.t().contiguous().t()}]
    )
    different = [
        [{"input_ids": x}],
        [{"input_ids": x, "labels": x}, {}],
        [{"input_ids": x, "labels": x.double()}],
        [{"input_ids": x, "labels": x.reshape(3, 2)}],
        [{"input_ids": x, "labels": x + 1e-6}],
        [{"input_ids": x, "labels": None}],
        [(x, x)],
        [x, x],
        [x.bool()],
        [[x], [x]],
        [["ab", "c"]],
        [["a", "bc"]],
        [[True]],
        [[1]],
        [[1.0]],
    ]
    names = [fingerprint_batches(batches) for batches in [base, *different]]
    assert len(set(names)) == len(names)
    with pytest.raises(InputError, match="set"):
        fingerprint_batches([{1, 2}])


@given(
    st.lists(st.lists(st.integers(-3, 3), max_size=4), max_size=4), st.lists(st.lists(st.integers(-3, 3), max_size=4))
)
@settings(max_examples=60, deadline=None)
def test_equal_exactly_for_equal_batches(a: list[list[int]], b: list[list[int]]) -> None:
    first, second = ([torch.tensor(row) for row in rows] for rows in (a, b))
    assert (fingerprint_batches(first) == fingerprint_batches(second)) == (a == b)
