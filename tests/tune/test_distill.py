from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.calibration import logits_of
from layerwright.core.errors import InputError
from layerwright.core.layers import list_layers
from layerwright.core.treatment import Drop, Quantize
from layerwright.treat.apply import apply_plan
from layerwright.tune import distill, distill_layers
from layerwright.tune.distill import logit_divergence
from zoo import ZOO


def rounded(simulate: bool = True) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
    teacher, batches = ZOO["llama"]()
    plan = {
        r.path: (Quantize(3, method="rtn"),) for r in list_layers(teacher) if r.kind == "linear" and r.block is not None
    }
    return teacher, apply_plan(teacher, plan, simulate=simulate)[0], batches


@torch.no_grad()
def distance(teacher: nn.Module, student: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    pairs = [(logits_of(teacher(**b)), logits_of(student(**b))) for b in batches]
    return sum(float(logit_divergence(a, b)) for a, b in pairs) / len(pairs)


def unlabelled(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{k: v for k, v in b.items() if k != "labels"} for b in batches]


@pytest.mark.parametrize(("parameters", "rate"), [("lora", 3e-3), ("norms", 2e-2), ("all", 3e-3)])
@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_it_comes_closer_to_its_teacher_and_both_stay_as_they_were(
    parameters: str, rate: float, hidden_weight: float
) -> None:
    teacher, student, batches = rounded()
    before = [t.clone() for m in (teacher, student) for t in m.state_dict().values()]
    tuned = distill(
        student,
        unlabelled(batches),
        teacher=teacher,
        parameters=parameters,
        hidden_weight=hidden_weight,
        steps=25,
        learning_rate=rate,
    )
    assert distance(teacher, tuned, batches) < 0.8 * distance(teacher, student, batches)
    after = [t for m in (teacher, student) for t in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(m._forward_hooks for m in (*teacher.modules(), *tuned.modules()))
    if parameters == "norms":
        changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, student.get_parameter(n))}
        assert changed
        assert all("norm" in n for n in changed)


def test_packed_layers_are_distilled_through_their_adapters() -> None:
    teacher, student, batches = rounded(simulate=False)
    tuned = distill(student, batches, teacher=teacher, merge=False, steps=25, learning_rate=3e-3)
    assert distance(teacher, tuned, batches) < 0.8 * distance(teacher, student, batches)


@pytest.mark.parametrize(("parameters", "rate"), [("norms", 2e-2), ("lora", 3e-3), ("all", 3e-3)])
def test_block_by_block(parameters: str, rate: float) -> None:
    teacher, student, batches = rounded()
    before = [t.clone() for t in student.state_dict().values()]
    tuned = distill_layers(
        student, unlabelled(batches), teacher=teacher, parameters=parameters, steps=15, learning_rate=rate
    )
    assert distance(teacher, tuned, batches) < 0.9 * distance(teacher, student, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, student.state_dict().values(), strict=True))
    assert type(tuned) is type(student)


def test_block_by_block_trains_only_the_blocks_that_were_named() -> None:
    teacher, student, batches = rounded()
    tuned = distill_layers(student, batches, teacher=teacher, blocks=["model.layers.2"], parameters="all", steps=3)
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, student.get_parameter(n))}
    assert changed
    assert all(n.startswith("model.layers.2.") for n in changed)


def test_a_teacher_is_its_own_best_student() -> None:
    teacher, _, batches = rounded()
    tuned = distill_layers(teacher, batches, teacher=teacher, parameters="all", steps=2)
    assert distance(teacher, tuned, batches) < 1e-6


def test_dropped_blocks_are_paired_by_hand() -> None:
    teacher, batches = ZOO["llama"]()
    student, _ = apply_plan(teacher, {"model.layers.1": (Drop(),)})
    with pytest.raises(InputError, match="pairs="):
        distill_layers(student, batches, teacher=teacher)
    pairs = {"model.layers.1": "model.layers.2"}
    assert distill_layers(student, batches, teacher=teacher, pairs=pairs, steps=1) is not student
    tuned = distill(student, batches, teacher=teacher, hidden_weight=0.5, steps=25, learning_rate=3e-3)
    assert distance(teacher, tuned, batches) < distance(teacher, student, batches)


def test_divergence_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    goal, given = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    p, q = (goal / 2).softmax(-1), (given / 2).softmax(-1)
    expected = 4 * (p * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(logit_divergence(goal, given, 2.0), expected.mean())
    kept = torch.tensor([[True, False, True], [False, False, True]])
    torch.testing.assert_close(logit_divergence(goal, given, 2.0, kept), expected[kept].mean())
    assert float(logit_divergence(goal, goal)) == pytest.approx(0, abs=1e-7)


def test_bad_input() -> None:
    teacher, student, batches = rounded()
    with pytest.raises(InputError, match="teacher"):
        distill(student, batches)
    with pytest.raises(InputError, match="norms"):
        distill(student, batches, teacher=teacher, parameters="norm")
    with pytest.raises(InputError, match="temperature"):
        distill(student, batches, teacher=teacher, temperature=0.0)
    with pytest.raises(InputError, match="unknown block"):
        distill_layers(student, batches, teacher=teacher, blocks=["model.layers.9"])
    with pytest.raises(InputError, match="must agree"):
        logit_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
