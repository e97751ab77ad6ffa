from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwright.core.errors import InputError, PlanError
from layerwright.core.plan import Plan
from layerwright.core.row_ranges import rows_from_text, rows_to_text
from layerwright.core.storage import packed_bytes, stored_bytes
from layerwright.core.target import target
from layerwright.core.treatment import MixRows, Quantize, treatments_from_data, treatments_to_data

WIDTHS = st.dictionaries(st.integers(5, 8), st.sets(st.integers(0, 60)), max_size=3)


@given(WIDTHS)
def test_text_there_and_back(rows: dict[int, set[int]]) -> None:
    apart: dict[int, set[int]] = {}
    taken: set[int] = set()
    for width, own in rows.items():
        apart[width] = own - taken
        taken |= own
    expected = {width: tuple(sorted(own)) for width, own in sorted(apart.items(), reverse=True) if own}
    text = rows_to_text(apart)
    assert rows_from_text(text) == expected
    treatment = MixRows(4, text)
    assert treatment.rows == text
    widths = treatment.widths(61)
    assert sorted(row for own in widths.values() for row in own) == list(range(61))
    assert treatments_from_data(treatments_to_data((treatment,))) == (treatment,)


def test_a_person_may_write_it_otherwise() -> None:
    assert MixRows(rows=" 8:3,0-1 , 2 17;").rows == "8: 0-3 17"
    assert rows_to_text({8: [], 6: [4]}) == "6: 4"
    assert MixRows(4, "8: 0-3 17").label() == "int4 a8 g128 + 5 rows int8 gptq"
    (read,) = treatments_from_data({"mix_rows": {"rows": "8: 5", "group_size": 32}})
    assert read == MixRows(4, "8: 5", 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8: 0-3 2", "row 2 is named twice"),
        ("8: 1; 6: 1", "row 1 is named twice"),
        ("8: 5-3", "expected a row or a range"),
        ("8: a", "expected a row or a range"),
        ("0-3", "expected a width and its rows"),
        ("8: 1; 8: 2", "expected a width and its rows once"),
        ("9: 1", "expected a whole number from 2 to 8"),
        ("4: 1", "leave them out"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MixRows(4, text)
    with pytest.raises(PlanError, match=message):
        treatments_from_data({"mix_rows": {"rows": text}})


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="bits: got 9"):
        MixRows(9)
    with pytest.raises(InputError, match="group_size"):
        MixRows(group_size=0)
    with pytest.raises(InputError, match="act_bits"):
        MixRows(act_bits=4)
    with pytest.raises(InputError, match="row 12 is listed, and the layer has rows 0 to 7"):
        MixRows(rows="8: 12").widths(8)


@given(st.sets(st.integers(0, 9)), st.sampled_from([2, 4]))
def test_bytes(high: set[int], element: int) -> None:
    treatment = MixRows(4, rows_to_text({8: high}), 16)
    low = 10 - len(high)
    words = len(high) * (packed_bytes(1, 48, 8) + 3 * element) + low * (packed_bytes(1, 48, 4) + 3 * (element + 1))
    place = 40 if 0 < len(high) < 10 else 0
    assert stored_bytes((treatment,), 10, 48, 1, element) == words + place


def test_what_it_cannot_be_joined_with_and_who_loads_it() -> None:
    with pytest.raises(InputError, match="choose one"):
        stored_bytes((MixRows(group_size=16), Quantize(4)), 8, 16)
    with pytest.raises(InputError, match="group_size: 16 does not divide"):
        stored_bytes((MixRows(group_size=16),), 8, 24)
    assert target("layerwright").refuses((MixRows(),)) == ""
    for name in ("hf", "vllm", "gguf", "onnx"):
        assert "cannot load" in target(name).refuses((MixRows(),))
    plan = Plan({"a": (MixRows(rows="8: 12", group_size=8),)})
    assert any("row 12 is listed" in problem for problem in plan.check(["a"], shapes={"a": (8, 16)}))
