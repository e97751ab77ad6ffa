from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.train import Eden
from layerwright.train.eden import eden_factor


def optimizer() -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}], lr=1.0)


def test_values() -> None:
    assert eden_factor(0, 0) == 0.5
    assert eden_factor(250, 0) == pytest.approx(0.75 * (1 + 0.05**2) ** -0.25)
    assert eden_factor(5000, 0) == pytest.approx(2**-0.25)
    assert eden_factor(5000, 6) == pytest.approx(2**-0.5)
    # Far out: the root of the number of batches times the root of that of epochs.
    assert eden_factor(10**8, 6000) == pytest.approx((5000 / 1e8) ** 0.5 * 1e-3**0.5, rel=1e-3)
    assert eden_factor(3, 0, warmup_batches=0) > 0.999


def test_it_sets_the_rates_of_all_groups() -> None:
    own = optimizer()
    schedule = Eden(own, batches=10, epochs=2, warmup_batches=4, warmup_start=0.25)
    assert [group["lr"] for group in own.param_groups] == [0.25, 0.125]
    for number in range(1, 9):
        schedule.step_batch()
        expected = eden_factor(number, 0, 10, 2, 4, 0.25)
        assert [group["lr"] for group in own.param_groups] == pytest.approx([expected, 0.5 * expected])
    before = own.param_groups[0]["lr"]
    schedule.step_epoch()
    assert own.param_groups[0]["lr"] == pytest.approx(before * (1 + 0.25) ** -0.25)
    other = Eden(optimizer(), batches=10, epochs=2, warmup_batches=4, warmup_start=0.25)
    other.load_state_dict(schedule.state_dict())
    assert other.rates() == schedule.rates()
    assert other.optimizer.param_groups[1]["lr"] == own.param_groups[1]["lr"]


@pytest.mark.parametrize(
    "options", [{"batches": 0}, {"epochs": -1}, {"epochs": float("inf")}, {"warmup_batches": -1}, {"warmup_start": 1.5}]
)
def test_bad_input(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Eden(optimizer(), **options)
