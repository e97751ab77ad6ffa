"""The sandwich rule: gradients that add up, a teacher that learns nothing, sub-networks that come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.data.speech import generated_speech
from layerwright.models.rnnt import RNNT
from layerwright.nn.elastic import ElasticFFN, ElasticStack, active_parameters, running_blocks
from layerwright.nn.subnet import SubnetConfig, SubnetSpace
from layerwright.nn.transducer_loss import transducer_loss
from layerwright.tune.alpha_divergence import lattice_divergence
from layerwright.tune.supernet import Supernet, sandwich_step


def network(**options: Any) -> RNNT:
    return RNNT(12, 9, 3, (4, 8), dim=8, heads=2, state_size=4, predictor_dim=8, joiner_dim=8, **options)


def batch() -> dict[str, Tensor]:
    return next(generated_speech(6, 3).batches(6))


def labels(outputs: Any, data: Any) -> Tensor:
    return transducer_loss(outputs.logits, data["targets"], outputs.frame_lengths, data["target_lengths"])


def kd(student: Any, teacher: Any, data: Any) -> Tensor:
    assert not teacher.logits.requires_grad
    lengths = student.frame_lengths, data["target_lengths"]
    return lattice_divergence(student.logits, teacher.logits, data["targets"], *lengths)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("label_weight", [0.0, 0.3])
@pytest.mark.parametrize("distil", [False, True])
def test_gradients_add_up(distil: bool, label_weight: float) -> None:
    model, data = network(), batch()
    supernet = Supernet(model)
    step = sandwich_step(
        supernet,
        data,
        labels,
        kd if distil else None,
        n_random=2,
        label_weight=label_weight,
        generator=torch.Generator().manual_seed(1),
    )
    found = gradients(model)
    assert step.configs[:2] == (supernet.max(), supernet.min()) and len(step.configs) == len(step.losses) == 4
    model.zero_grad()
    total: dict[str, Tensor] = {}
    teacher = None
    for config, value in zip(step.configs, step.losses, strict=True):
        with supernet.active(config):
            outputs = model(**data)
        if teacher is None:
            teacher = type(outputs)(outputs.logits.detach(), outputs.frame_lengths)
            loss = labels(outputs, data)
        elif distil:
            loss = kd(outputs, teacher, data) + label_weight * labels(outputs, data)
        else:
            loss = labels(outputs, data)
        assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
        loss.backward()
        for name, gradient in gradients(model).items():
            total[name] = total.get(name, torch.zeros(())) + gradient
        model.zero_grad()
    assert set(total) == set(found)
    assert all(torch.allclose(found[name], total[name], atol=1e-5) for name in found)


def test_the_teacher_learns_nothing_from_its_pupils() -> None:
    model, data = network(), batch()
    supernet = Supernet(model)
    seen: list[Tensor] = []

    def only_kd(student: Any, teacher: Any, data: Any) -> Tensor:
        seen.append(teacher.logits)
        return kd(student, teacher, data)

    sandwich_step(supernet, data, lambda outputs, data: 0 * labels(outputs, data), only_kd, n_random=0)
    assert seen[0].grad_fn is None
    wide = model.blocks[0].ffn.inner.weight.grad  # type: ignore[union-attr]
    assert wide is not None
    assert wide[:4].any() and not wide[4:].any()  # what the smallest network lacks, the largest alone could move


def test_any_optimizer_makes_one_step_and_losses_fall() -> None:
    model, data = network(), batch()
    supernet = Supernet(model, SubnetSpace(3, (2, 3), (4, 8)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)  # left over: must not count
    steps = [sandwich_step(supernet, data, labels, kd, optimizer=optimizer, generator=generator) for _ in range(30)]
    assert steps[-1].losses[0] < 0.8 * steps[0].losses[0]
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) <= 1 + 1e-4  # clipped
    small = supernet.relative_cost(supernet.min())
    assert all(1 + 2 * small - 1e-9 <= step.passes <= 2 + small + 1e-9 for step in steps)
    again = network()
    repeated = sandwich_step(
        Supernet(again, supernet.space), data, labels, kd, generator=torch.Generator().manual_seed(0)
    )
    assert repeated.configs == steps[0].configs and repeated.losses == pytest.approx(steps[0].losses)


def test_active_comes_and_goes() -> None:
    model, data = network().eval(), batch()
    supernet = Supernet(model)
    before = model(**data).logits
    config = SubnetConfig((1,), (4,))
    with supernet.active(config) as inside:
        assert inside is model
        assert supernet.stack.config == config
        assert list(running_blocks(supernet.stack)) == [model.blocks[1]]
        assert not torch.equal(model(**data).logits, before)
    assert torch.equal(model(**data).logits, before)
    with pytest.raises(RuntimeError), supernet.active(config):
        raise RuntimeError
    assert supernet.stack.config == supernet.max()
    count = supernet.parameter_count(supernet.max())
    assert count == sum(p.numel() for p in model.parameters()) == active_parameters(model)
    block = active_parameters(model.blocks[0])
    assert supernet.parameter_count(config) == count - 3 * block + (block - 4 * (8 + 1 + 8))
    assert supernet.relative_cost(supernet.max()) == 1


@pytest.mark.parametrize(
    ("config", "axis"),
    [
        (SubnetConfig((0,), (5,)), "widths"),
        (SubnetConfig((0,), (16,)), "widths"),
        (SubnetConfig((3,), (4,)), "keep"),
        (SubnetConfig((0, 1, 2), (4, 4, 4)), "depth"),
    ],
)
def test_configurations_outside_the_space(config: SubnetConfig, axis: str) -> None:
    supernet = Supernet(network(), SubnetSpace(3, (1, 2), (4, 8)))
    with pytest.raises(ValueError, match=axis), supernet.active(config):
        pass
    assert supernet.stack.config == SubnetConfig((0, 1, 2), (8, 8, 8))


class _Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.ffn, self.norm = ElasticFFN(4, (2, 4)), norm


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)])
def test_batch_norm_is_refused(norm: nn.Module) -> None:
    model = nn.Module()
    model.blocks = ElasticStack([_Normed(norm), _Normed(nn.LayerNorm(4))])
    with pytest.raises(TypeError, match=r"blocks\.0\.norm is a .*BatchNorm.*use LayerNorm or RMSNorm"):
        Supernet(model)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="holds 0 ElasticStack"):
        Supernet(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="space: got 2 blocks"):
        Supernet(network(), SubnetSpace(2, (1,), (4,)))
    with pytest.raises(ValueError, match=r"widths: got \[5\]"):
        Supernet(network(), SubnetSpace(3, (1,), (4, 5)))
    supernet, data = Supernet(network()), batch()
    for options in ({"n_random": -1}, {"n_random": 0, "label_weight": -1.0}, {"n_random": 0, "clip": 0.0}, {}):
        with pytest.raises(ValueError, match=r"sandwich_step|generator"):
            sandwich_step(supernet, data, labels, kd, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: nan"):
        sandwich_step(supernet, data, lambda outputs, data: labels(outputs, data) * float("nan"), kd, n_random=0)
