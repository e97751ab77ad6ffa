from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import logits_of
from layerwright.core.errors import InputError
from layerwright.core.layers import parameter_bytes
from layerwright.treat.multi_task import MultiTaskModel, TaskBranch, task_branch
from subtuning_models import bert, mlp, resnet, vit

CASES: dict[str, tuple[Callable[[], nn.Module], list[str], str]] = {
    "resnet": (resnet, [f"blocks.{n}" for n in range(4)], "head"),
    "mlp": (mlp, [f"0.{n}" for n in range(4)], "2"),
    "vit": (vit, [f"vit.layers.{n}" for n in range(3)], "classifier"),
    "bert": (bert, [f"bert.encoder.layer.{n}" for n in range(3)], "classifier"),
}


def inputs(kind: str, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if kind == "bert":
        ids = torch.randint(1, 32, (rows, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 4:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "mlp":
        return {"input": torch.randn(rows, 8, generator=generator)}
    return {"pixel_values" if kind == "vit" else "x": torch.randn(rows, 1, 8, 8, generator=generator)}


def tuned(base: nn.Module, chosen: list[str], head: str, classes: int, seed: int) -> nn.Module:
    """A copy whose blocks and readout moved, statistics of batch norms included."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for path in chosen:
        for tensor in model.get_submodule(path).state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    width = model.get_submodule(head).in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.set_submodule(head, nn.Linear(width, classes))
    return model.eval()


def assembled(kind: str, sets: dict[str, list[int]]) -> tuple[nn.Module, dict[str, nn.Module], MultiTaskModel]:
    build, units, head = CASES[kind]
    base = build()
    models = {
        name: tuned(base, [units[i] for i in chosen], head, 2 + number, number)
        for number, (name, chosen) in enumerate(sets.items())
    }
    together = MultiTaskModel(base, {name: task_branch(base, model) for name, model in models.items()})
    return base, models | {"base": base}, together


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "sets",
    [
        {"a": []},
        {"a": [0, 1, 2]},
        {"a": [1]},
        {"a": [0, 2], "b": [1], "c": []},
        {"a": [1, 2], "b": [1], "c": [2]},
    ],
    ids=str,
)
def test_logits_are_those_of_separate_models(kind: str, rows: int, sets: dict[str, list[int]]) -> None:
    base, models, together = assembled(kind, sets)
    x = inputs(kind, rows)
    with torch.no_grad():
        found = together(x)
        assert list(found) == ["base", *sets]
        for name, model in models.items():
            torch.testing.assert_close(found[name], logits_of(model(**x)), atol=2e-6, rtol=1e-5)
        last = list(sets)[-1]
        alone = together(x, [last])
        torch.testing.assert_close(alone[last], found[last], atol=2e-6, rtol=1e-5)
        assert list(alone) == [last]
    assert "forward" not in base.get_submodule(CASES[kind][1][0]).__dict__


def test_all_blocks_of_a_task_may_be_its_own() -> None:
    _, models, together = assembled("resnet", {"a": [0, 1, 2, 3]})
    x = inputs("resnet", 2)["x"]
    with torch.no_grad():
        torch.testing.assert_close(together(x)["a"], models["a"](x), atol=1e-6, rtol=1e-5)


def calls(together: MultiTaskModel, run: Callable[[], Any]) -> Counter[str]:
    """How often each layer that holds weights runs."""
    counted: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: counted.update([name]))
        for name, module in together.named_modules()
        if list(module.parameters(recurse=False))
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return counted


def test_each_shared_block_runs_once_with_the_activations_that_the_plan_says() -> None:
    _, _, together = assembled("resnet", {"a": [1], "b": [2], "c": [1, 2]})
    x = inputs("resnet", 5)["x"]
    sizes: dict[str, int] = {}
    for name in ("blocks.0", "blocks.1", "blocks.2", "blocks.3"):
        module = together.base.get_submodule(f"{name}.first")
        module.register_forward_hook(lambda _m, args, _o, name=name: sizes.__setitem__(name, len(args[0])))
    counted = calls(together, lambda: together(x))
    base = {name: number for name, number in counted.items() if name.startswith("base.")}
    assert set(base.values()) == {1}, "stem, blocks, norm: once each"
    assert set(counted.values()) == {1}, "each block of a task's own: once"
    assert sizes == {"blocks.0": 5, "blocks.1": 5, "blocks.2": 10, "blocks.3": 20}
    kinds = {row.block: row.kind for row in together.plan()}
    assert kinds == {"blocks.0": "shared", "blocks.1": "branched", "blocks.2": "branched", "blocks.3": "stacked"}
    plan = {row.block: row for row in together.plan()}
    assert plan["blocks.1"].weights == (("base", "b"), ("a",), ("c",))
    assert plan["blocks.2"].weights == (("base", "a"), ("b",), ("c",))
    assert plan["blocks.3"].inputs == (("base",), ("b",), ("a",), ("c",))
    assert [row.kind for row in together.plan(["base"])] == ["shared"] * 4
    assert calls(together, lambda: together(x, ["base"]))["base.blocks.1.first"] == 1


def test_costs() -> None:
    base, models, together = assembled("resnet", {"a": [2]})
    x = inputs("resnet", 1)["x"]
    one = together.flops(x, ["base"])
    both = together.flops(x)
    block = together.flops(x, ["base"]) - _without_block(base, x)
    assert one < both < 2 * one
    assert abs(both - one - 2 * block) <= 0.02 * one, "the branched block and the one behind it run for two"
    own = parameter_bytes(base.blocks[2]) + parameter_bytes(models["a"].head)
    assert together.weight_bytes() == parameter_bytes(base) + own


def _without_block(base: nn.Module, x: Tensor) -> int:
    shorter = copy.deepcopy(base)
    del shorter.blocks[3]
    return MultiTaskModel(shorter, {}).flops(x)


def test_stays_in_evaluation_mode_and_can_be_copied() -> None:
    base, _, together = assembled("resnet", {"a": [1]})
    x = inputs("resnet", 3)["x"]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    together.train()
    with torch.no_grad():
        expected = together(x)
        twin = copy.deepcopy(together)
        twin.own[0].first.weight.zero_()
        again, other = together(x), twin(x)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert not torch.equal(other["a"], again["a"]) and torch.equal(other["base"], again["base"])
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_bfloat16() -> None:
    base = vit().to(torch.bfloat16)
    units = CASES["vit"][1]
    model = tuned(base, units[1:2], "classifier", 2, 0).to(torch.bfloat16)
    together = MultiTaskModel(base, {"a": task_branch(base, model)})
    x = inputs("vit", 3)["pixel_values"].to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(together(x)["a"], model(x).logits, atol=3e-2, rtol=3e-2)


class _Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).softmax(-1)


def test_bad_tasks_are_refused() -> None:
    base = resnet()
    state = dict(base.blocks[1].state_dict())
    head = nn.Linear(6, 2)
    with pytest.raises(InputError, match=r"tasks: blocks\.9 is no block"):
        MultiTaskModel(base, {"a": ({"blocks.9": state}, head)})
    with pytest.raises(InputError, match=r"tasks: a, blocks\.1: first\.bias has shape"):
        MultiTaskModel(base, {"a": ({"blocks.1": state | {"first.bias": torch.zeros(7)}}, head)})
    with pytest.raises(InputError, match=r"tasks: a, blocks\.1: the tensor first\.bias"):
        MultiTaskModel(base, {"a": ({"blocks.1": {k: v for k, v in state.items() if k != "first.bias"}}, head)})
    with pytest.raises(InputError, match="tasks: the readout of a"):
        MultiTaskModel(base, {"a": TaskBranch({}, nn.Linear(5, 2))})
    with pytest.raises(InputError, match="another one than 'base'"):
        MultiTaskModel(base, {"base": ({}, head)})
    with pytest.raises(InputError, match="add it to blocks="):
        MultiTaskModel(base, {"a": ({"blocks.1": state}, head)}, blocks=["blocks.2"])
    together = MultiTaskModel(base, {"a": ({"blocks.1": state}, head)})
    for tasks, message in ((["b"], "unknown task"), ("a", "expected a list"), ([], "got none")):
        with pytest.raises(InputError, match=message):
            together(torch.zeros(1, 1, 8, 8), tasks)
    with pytest.raises(InputError, match="does more with its readout"):
        MultiTaskModel(_Softmax(), {})(torch.zeros(1, 4))
    changed = copy.deepcopy(base)
    changed.stem[0].weight.data += 1
    with pytest.raises(InputError, match=r"tasks: stem\.0\.weight differs"):
        task_branch(base, changed)


def test_parts_of_blocks_can_be_units() -> None:
    base = vit()
    unit = "vit.layers.1.mlp"
    model = tuned(base, [unit], "classifier", 2, 0)
    branch = task_branch(base, model, blocks=[unit])
    assert set(branch.blocks) == {unit}
    together = MultiTaskModel(base, {"a": branch})
    assert [row.kind for row in together.plan()] == ["shared", "branched", "stacked"]
    assert together.weight_bytes() == parameter_bytes(base) + sum(
        parameter_bytes(module) for module in (base.get_submodule(unit), model.classifier)
    )
    x = inputs("vit", 2)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(together(x)["a"], model(x).logits, atol=2e-6, rtol=1e-5)
