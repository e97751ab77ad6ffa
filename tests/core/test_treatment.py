from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from layerwright.core.errors import InputError, PlanError
from layerwright.core.treatment import (
    TREATMENTS,
    Drop,
    LowRank,
    Quantize,
    Sparsify,
    describe,
    treatments_from_data,
    treatments_to_data,
)

groups = st.sampled_from([-1, 32, 64, 128])
quantizers = st.one_of(
    st.builds(Quantize, st.integers(2, 8), groups, st.booleans(), st.sampled_from(["rtn", "mse", "gptq"]), st.none()),
    st.builds(Quantize, st.just(8), act_bits=st.just(8), act_mode=st.sampled_from(["dynamic", "static"])),
)
sparsifiers = st.one_of(
    st.builds(Sparsify, st.floats(0.01, 0.99), method=st.sampled_from(["magnitude", "wanda", "sparsegpt"])),
    st.just(Sparsify(pattern="2:4")),
)
ranks = st.builds(LowRank, st.integers(1, 4096), st.sampled_from(["svd", "activation"]))
sets = st.one_of(
    st.just(()),
    st.tuples(st.just(Drop())),
    st.tuples(quantizers),
    st.tuples(sparsifiers),
    st.tuples(ranks),
    st.tuples(sparsifiers, quantizers),
    st.tuples(ranks, quantizers),
)


@given(sets)
def test_yaml_and_json_round_trips(treatments):
    data = treatments_to_data(treatments)
    assert treatments_from_data(yaml.safe_load(yaml.safe_dump(data))) == treatments
    assert treatments_from_data(json.loads(json.dumps(data))) == treatments


@given(sets)
def test_treatments_are_keys_and_have_a_label(treatments):
    assert {treatments: 1}[tuple(treatments)] == 1
    assert describe(treatments) == (" + ".join(t.label() for t in treatments) or "kept")


@pytest.mark.parametrize(
    ("data", "treatments"),
    [
        (None, ()),
        ({}, ()),
        ("keep", ()),
        ("drop", (Drop(),)),
        ("quantize", (Quantize(),)),
        ({"quantize": None}, (Quantize(),)),
        ({"quantize": {"bits": 3}}, (Quantize(3),)),
        ({"sparsify": {"sparsity": 0.5}, "quantize": {}}, (Sparsify(), Quantize())),
        ({"quantize": {}, "low_rank": {"inner": 4}}, (LowRank(4), Quantize())),
    ],
)
def test_short_forms_and_the_order_of_application(data, treatments):
    assert treatments_from_data(data) == treatments


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "got 3, expected a mapping"),
        (["quantize"], "expected a mapping"),
        ("quantise", "unknown treatment 'quantise' in here; did you mean quantize"),
        ({"quantize": {"bit": 4}}, "unknown setting of quantize 'bit' in here; did you mean bits"),
        ({"quantize": 4}, "here: quantize got 4, expected a mapping of its settings"),
        ({"quantize": {"bits": "4"}}, "here: quantize.bits: got '4', expected int"),
        ({"quantize": {"bits": 4.0}}, "here: quantize.bits: got 4.0, expected int"),
        ({"quantize": {"bits": True}}, "here: quantize.bits: got True, expected int"),
        ({"quantize": {"bits": None}}, "here: quantize.bits: got None, expected int"),
        ({"quantize": {"symmetric": 1}}, "here: quantize.symmetric: got 1, expected bool"),
        ({"quantize": {"method": "gptp"}}, "unknown value 'gptp' in here: quantize.method; did you mean gptq"),
        ({"quantize": {"act_bits": "8"}}, "here: quantize.act_bits: got '8', expected int or none"),
        ({"quantize": {"bits": 9}}, "here: bits: got 9, expected a whole number from 2 to 8"),
        ({"quantize": {"group_size": 0}}, "here: group_size: got 0"),
        ({"quantize": {"bits": 4, "act_bits": 8}}, "here: act_bits: 8 needs bits: 8"),
        ({"sparsify": {"sparsity": 1}}, "here: sparsity: got 1, expected a share between 0 and 1"),
        ({"sparsify": {"sparsity": 0.6, "pattern": "2:4"}}, "here: sparsity: got 0.6, the pattern 2:4 is always 0.5"),
        ({"low_rank": {"inner": 0}}, "here: inner: got 0, expected a rank of at least 1"),
        ({"drop": {"now": True}}, "unknown setting of drop 'now' in here"),
        ({"drop": None, "quantize": {}}, "contradict each other: a dropped block takes nothing else"),
    ],
)
def test_what_is_refused(data, message):
    with pytest.raises(InputError) as error:
        treatments_from_data(data, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, True, 4.0])
def test_bits_out_of_range(bits):
    with pytest.raises(InputError, match="bits: got"):
        Quantize(bits)


def test_other_settings_out_of_range():
    with pytest.raises(InputError, match="act_bits: got 4"):
        Quantize(4, act_bits=4)
    with pytest.raises(InputError, match="integer products"):
        Quantize(8, 32, act_bits=8)
    with pytest.raises(InputError, match="integer products"):
        Quantize(8, symmetric=False, act_bits=8)
    for sparsity in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="sparsity: got"):
            Sparsify(sparsity)
    assert isinstance(PlanError(""), InputError)


def test_labels_tell_treatments_apart():
    assert Quantize(4, 32, False).label() == "int4 g32 asym gptq"
    assert Quantize(8, act_bits=8).label() == "int8 a8 gptq"
    assert Sparsify(0.25, method="wanda").label() == "sparse 25% wanda"
    assert describe((LowRank(24), Quantize(8, method="rtn"))) == "rank 24 + int8 rtn"
    assert set(TREATMENTS) >= {"quantize", "sparsify", "low_rank", "drop"}
