"""Forward passes in lockstep against plain ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.blocks import find_blocks
from layerwright.core.lockstep import Lockstep, LockstepState, NotResumableError, Stop
from zoo import ZOO, logits

CASES = {"llama": "lm_head", "t5": "lm_head", "swin": "classifier"}


class Passes:
    """Forwards that keep the logits of a zoo model."""

    def __init__(self, name: str) -> None:
        self.model, self.batches = ZOO[name]()
        # Ends the passes only after the last layer: it is never reached.
        self.model.add_module("nothing", nn.Linear(1, 1))
        self.units = [path for stack in find_blocks(self.model) for path in stack.names]
        self.found: list[Tensor | None] = [None] * len(self.batches)

    def forwards(self) -> list[Callable[[], None]]:
        def forward(number: int) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    self.found[number] = logits(self.model, self.batches[number])

            return run

        self.found = [None] * len(self.batches)
        return [forward(number) for number in range(len(self.batches))]

    def walk(self, **settings: Any) -> Lockstep:
        return Lockstep(self.model, [*self.units, "nothing"], self.forwards(), **settings)

    def plain(self) -> list[Tensor]:
        return [logits(self.model, batch) for batch in self.batches]

    def equal(self) -> bool:
        return all(a is not None and torch.equal(a, b) for a, b in zip(self.found, self.plain(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_lockstep_equals_plain_forwards(name: str) -> None:
    passes = Passes(name)
    stops = [(stop.path, stop.visit, len(stop.calls)) for stop in passes.walk()]
    assert stops == [(path, 0, len(passes.batches)) for path in passes.units]
    assert passes.equal()


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_walk_does_not_run_what_was_done_and_ends_the_same(name: str) -> None:
    passes = Passes(name)
    for number in range(1, len(passes.units)):
        for stop in (walk := passes.walk(keep_history=True)):
            if stop.path == passes.units[number]:
                state = walk.state()
                break
        # As a later process would find it: through files.
        state = LockstepState(json.loads(json.dumps(state.passes)), {k: v.clone() for k, v in state.tensors.items()})
        stops = []
        for stop in passes.walk(keep_history=True, resume=state):
            stops.append((stop.path, stop.visit))
        assert stops == [(path, 0) for path in passes.units[number:]]
        assert passes.equal()


def test_the_done_part_is_not_looked_at_again() -> None:
    passes = Passes("llama")
    expected = passes.plain()
    for stop in (walk := passes.walk(keep_history=True)):
        if stop.path == passes.units[2]:
            state = walk.state()
            break
    with torch.no_grad():
        for parameter in passes.model.get_submodule(passes.units[0]).parameters():
            parameter.fill_(float("nan"))
    for _ in passes.walk(resume=state):
        pass
    assert all(a is not None and torch.equal(a, b) for a, b in zip(passes.found, expected, strict=True))


def test_a_changed_block_feeds_the_later_ones_of_all_passes() -> None:
    passes = Passes("llama")
    for stop in passes.walk():
        if stop.path == passes.units[1]:
            before = [stop.run(call)[0] if isinstance(stop.run(call), tuple) else stop.run(call) for call in stop.calls]
            with torch.no_grad():
                passes.model.get_submodule(f"{stop.path}.mlp.down_proj").weight.zero_()
            after = [stop.run(call)[0] if isinstance(stop.run(call), tuple) else stop.run(call) for call in stop.calls]
            assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert passes.equal()  # the plain forwards see the changed block too


def test_a_replaced_module_runs_in_place_of_the_old_one() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    out: list[Tensor] = []
    for stop in Lockstep(model, ["1", "2"], [lambda: out.append(model(x))]):
        if stop.path == "1":
            model[1] = nn.Identity()
    # The passes end before the last unit has run.
    assert out == []
    assert torch.equal(model(x), model[2](model[0](x)))


def test_a_shared_block_stops_once_a_visit() -> None:
    passes = Passes("albert")
    stops = [(stop.path, stop.visit) for stop in passes.walk()]
    assert len(passes.units) == 1
    assert stops == [(passes.units[0], visit) for visit in range(passes.model.config.num_hidden_layers)]
    assert passes.equal()


def forwards_are_own(model: nn.Module) -> bool:
    return not any("forward" in module.__dict__ for module in model.modules())


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("where", ["the loop", "a pass", "a break", "the end"])
def test_forwards_are_put_back(where: str) -> None:
    passes = Passes("llama")

    def explode(*_: Any) -> None:
        raise BrokenError

    handle = None
    if where == "a pass":
        handle = passes.model.get_submodule(passes.units[1]).register_forward_pre_hook(explode)

    def look(stop: Stop) -> bool:
        if stop.path == passes.units[1] and where == "the loop":
            raise BrokenError
        return where == "a break"

    try:
        for stop in passes.walk():
            if look(stop):
                break
        assert where in ("a break", "the end")
    except BrokenError:
        assert where in ("the loop", "a pass")
    if handle is not None:
        handle.remove()
    assert forwards_are_own(passes.model)
    assert all(torch.isfinite(value).all() for value in passes.plain())


def test_an_own_forward_of_an_instance_comes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = model[0].forward = lambda x: x * 3  # type: ignore[method-assign]
    x = torch.ones(1, 2)
    expected = model(x)
    for _ in Lockstep(model, ["0", "1"], [lambda: model(x)]):
        pass
    assert model[0].__dict__["forward"] is own
    assert torch.equal(model(x), expected)


def test_values_without_a_file_form_are_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Any) -> Any:
            return {1, 2}

    model = nn.Sequential(Odd(), nn.Identity(), nn.Identity())
    walk = Lockstep(model, ["0", "1", "2"], [lambda: model(torch.ones(1))], keep_history=True)
    with pytest.raises(NotResumableError, match="returns a set"):
        for stop in walk:
            if stop.path == "1":
                walk.state()


def test_the_gradient_mode_of_the_driver_survives_forwards_that_change_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return model(torch.ones(1, 2))

    for _ in Lockstep(model, ["0", "1", "2"], [forward, forward, forward]):
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    for _ in Lockstep(model, ["0", "1"], [forward, forward]):
        break
    assert torch.is_grad_enabled()
