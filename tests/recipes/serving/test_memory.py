from __future__ import annotations

import dataclasses

import pytest

from layerwright.core.errors import InputError
from layerwright.recipes.serving.memory import kv_budget
from layerwright.score.device import device, duplex, preset_shape

CAPACITY = 80 * 1024**3


def test_what_is_left_beside_the_weights() -> None:
    shape = preset_shape("mixtral")
    assert kv_budget(shape, duplex(), 4) == pytest.approx(4 * CAPACITY - shape.weight_bytes)
    # both halves hold a copy, one of them the cache
    assert kv_budget(shape, device("duplex_split"), 4) == pytest.approx(2 * CAPACITY - shape.weight_bytes)
    experts = shape.expert_params * 2
    assert kv_budget(shape, device("hetero"), 4) == pytest.approx(2 * CAPACITY - (shape.weight_bytes - experts))
    # each node has what is no expert
    assert kv_budget(shape, duplex(), 4, nodes=2) == pytest.approx(
        4 * CAPACITY - experts - 2 * (shape.weight_bytes - experts)
    )


@pytest.mark.parametrize(
    ("name", "devices", "message"),
    [
        ("duplex", 1, r"weights of 93.4 GB do not fit into 85.9 GB of the 1 x duplex"),
        (
            "duplex_split",
            2,
            r"weights of 93.4 GB do not fit into 85.9 GB of the 1 x duplex_split that hold a copy each",
        ),
        ("hetero", 2, r"weights of 90.2 GB do not fit into 85.9 GB of the 1 devices of hetero that hold the experts"),
    ],
)
def test_weights_that_do_not_fit_name_both_sizes(name, devices, message) -> None:
    with pytest.raises(InputError, match=message):
        kv_budget(preset_shape("mixtral"), device(name), devices)
    assert issubclass(InputError, ValueError)


def test_fewer_bytes_per_element_fit() -> None:
    small = dataclasses.replace(preset_shape("mixtral"), bytes_per_element=1)
    assert kv_budget(small, duplex(), 1) > 0
