from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwright as lw
from layerwright.allocate.width_schedule import Widths
from layerwright.nn.encoder_exits import MultiExit
from layerwright.treat.encoder_exits import add_encoder_exits, find_exits
from layerwright.tune.cost_eff import cost_eff, present_widths
from layerwright.tune.multi_exit import MultiExitDistillation, hidden_loss, prediction_loss
from zoo import ZOO


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bert(blocks: int = 4, seed: int = 0, hidden: int = 32) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def marked(samples: int = 48, tokens: int = 10, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sentences whose class is a marker word somewhere in them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 96, (samples, tokens), generator=generator)
    labels = torch.randint(0, 3, (samples,), generator=generator)
    places = torch.randint(1, tokens, (samples, 1), generator=generator)
    ids = ids.scatter(1, places, 3 + labels[:, None])
    ids[:, 0] = 1
    mask = torch.ones_like(ids)
    return [
        {"input_ids": a, "attention_mask": b, "labels": c}
        for a, b, c in zip(ids.split(12), mask.split(12), labels.split(12), strict=True)
    ]


def test_hidden_loss_against_loops() -> None:
    states = [random(3, 5, 4, seed=seed) for seed in range(3)]
    goals = [random(3, 5, 4, seed=10 + seed) for seed in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    expected = 0.0
    for state, goal in zip(states, goals, strict=True):
        for row in range(3):
            length = int(mask[row].sum())
            distances = [float((state[row, t] - goal[row, t]).square().mean()) for t in range(length)]
            expected += sum(distances) / length / 3
    assert float(hidden_loss(states, goals, mask)) == pytest.approx(expected, rel=1e-5)
    whole = sum(float((a - b).square().mean()) for a, b in zip(states, goals, strict=True))
    assert float(hidden_loss(states, goals)) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("value", [100.0, math.nan])
def test_padded_states_change_nothing(value: float) -> None:
    state, goal = random(2, 4, 3).requires_grad_(), random(2, 4, 3, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    loss = hidden_loss([state], [goal], mask)
    loss.backward()
    other = state.detach().clone()
    other[1, 2:] = value
    other.requires_grad_()
    again = hidden_loss([other], [goal], mask)
    again.backward()
    assert torch.equal(loss, again)
    assert state.grad is not None and other.grad is not None
    assert not state.grad[1, 2:].any() and state.grad[1, :2].all()
    assert torch.equal(torch.nan_to_num(other.grad), state.grad)


def test_predictions_are_summed_over_exits() -> None:
    logits = [random(4, 3, seed=seed) for seed in range(3)]
    goals = [random(4, 3, seed=5 + seed) for seed in range(3)]
    labels = torch.tensor([0, 2, 1, 1])
    soft = hard = 0.0
    for own, goal in zip(logits, goals, strict=True):
        for row in range(4):
            logs = own[row].log_softmax(-1)
            soft -= float((goal[row].softmax(-1) * logs).sum()) / 4
            hard -= float(logs[labels[row]]) / 4
    for share in (0.0, 0.1, 0.5, 1.0):
        found = prediction_loss(logits, goals, labels, share)
        assert float(found) == pytest.approx((1 - share) * soft + share * hard, rel=1e-5)
    assert prediction_loss([own.bfloat16() for own in logits], goals).dtype == torch.float32


def test_distillation_pairs_exits() -> None:
    student, teacher = add_encoder_exits(bert(2, 1), seed=1), add_encoder_exits(bert(4), seed=2)
    data = marked(12)[0]
    inputs = {key: value for key, value in data.items() if key != "labels"}
    own, goal = student(**inputs), teacher(**inputs)
    final = MultiExitDistillation(teacher, "final").loss(student, data, hidden=0.0, hard=0.5)
    assert float(final.detach()) == pytest.approx(
        float(prediction_loss(own.exit_logits, [goal.logits] * 2, data["labels"], 0.5).detach()), rel=1e-5
    )
    paired = MultiExitDistillation(teacher, "exit").loss(student, data, hidden=0.0)
    expected = prediction_loss(own.exit_logits, [goal.exit_logits[1], goal.exit_logits[3]])
    assert float(paired.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    states = MultiExitDistillation(teacher).loss(student, data, prediction=0.0)
    wanted = hidden_loss(own.hidden_states, goal.hidden_states[::2], data["attention_mask"])
    assert float(states.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_a_teacher_is_not_trained() -> None:
    teacher, student = bert(4).train(), add_encoder_exits(bert(4, 3))
    loss = MultiExitDistillation(teacher).loss(student, marked(12)[0])
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if "exit_head" in name)
    assert teacher.training


def test_bad_distillation() -> None:
    student, data = add_encoder_exits(bert(3)), marked(12)[0]
    with pytest.raises(ValueError, match="teacher: its 4 blocks"):
        MultiExitDistillation(bert(4)).loss(student, data)
    with pytest.raises(ValueError, match="teacher: it has exits after blocks 3"):
        MultiExitDistillation(bert(3), "exit").loss(student, data)
    with pytest.raises(ValueError, match="pairing"):
        MultiExitDistillation(bert(3), "all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model"):
        MultiExitDistillation(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="labels"):
        MultiExitDistillation(bert(3)).loss(student, {"input_ids": data["input_ids"]}, hard=0.5)
    with pytest.raises(ValueError, match="hidden size"):
        MultiExitDistillation(bert(3, hidden=64)).loss(student, data)
    with pytest.raises(ValueError, match="hard"):
        prediction_loss([random(2, 3)], [random(2, 3)], None, 1.5)
    with pytest.raises(ValueError, match="logits"):
        prediction_loss([random(2, 3)], [random(2, 4)])
    with pytest.raises(ValueError, match="hidden states"):
        hidden_loss([random(1, 2, 3)], [])


def accuracies(model: MultiExit, data: list[dict[str, Tensor]]) -> list[float]:
    right = []
    for batch in data:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).exit_logits
        right.append(torch.stack([own.argmax(-1) == batch["labels"] for own in logits]))
    found: list[float] = torch.cat(right, 1).double().mean(1).tolist()
    return found


def test_the_tuner_makes_a_narrow_model_whose_exits_work(tmp_path: Path) -> None:
    from layerwright.tune.full import full

    data = marked(96)
    teacher = full(bert(3), data, steps=60, learning_rate=3e-3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    options: dict[str, Any] = {"steps": 120, "learning_rate": 3e-3, "heads": 2, "neurons": 20, "embedding_rank": 12}
    small = cost_eff(teacher, data, **options)
    assert present_widths(small) == Widths(2, 20, 12)
    assert sum(p.numel() for p in small.parameters()) < 0.62 * sum(p.numel() for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    exits = find_exits(small)
    assert exits is not None
    assert exits.positions == (1, 2, 3)
    assert min(accuracies(exits, data)) > 0.8
    assert all(parameter.requires_grad for parameter in small.parameters())
    again = cost_eff(teacher, data, **options)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    lw.save(small, tmp_path / "out")
    loaded = find_exits(lw.load(tmp_path / "out")[0])
    assert loaded is not None
    assert accuracies(loaded, data) == accuracies(exits, data)
    for threshold in (0.0, 0.5, math.inf):
        for a, b in zip(exits.predict(data[0], threshold), loaded.predict(data[0], threshold), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "vit"])
def test_other_encoders(name: str) -> None:
    model, batches = ZOO[name]()
    kept = copy.deepcopy(model.state_dict())
    small = cost_eff(model, batches, steps=8, heads=3, neurons=40, dense=True, pooling="mean", blocks=[1])
    widths = present_widths(small)
    assert (widths.heads, widths.neurons) == (3, 40)
    assert widths.rank == (None if name == "vit" else 24)
    exits = find_exits(small)
    assert exits is not None
    assert exits.positions == (1, 3)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_exits_that_are_there_are_kept_and_a_teacher_of_its_own_is_learned_from() -> None:
    model, batches = ZOO["bert"]()
    exits = add_encoder_exits(model, [2], pooling="mean")
    small = cost_eff(exits.model, batches, teacher=ZOO["bert"]()[0], steps=8, heads=4, neurons=32, pruning_steps=2)
    found = find_exits(small)
    assert found is not None
    assert found.positions == (2, 3)
    head = found.head(2)
    assert head is not None and head.pooling == "mean"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads: got 5"),
        ({"heads": 0}, "heads: got 0"),
        ({"neurons": 49}, "neurons: got 49"),
        ({"neurons": 0}, "neurons: got 0"),
        ({"embedding_rank": 33}, "rank: got 33"),
        ({"embedding_rank": 0}, "rank: got 0"),
        ({"steps": 7}, "steps: got 7"),
        ({"pruning_steps": 0}, "steps: got 0"),
        ({"teacher": 5}, "teacher: its 5 blocks"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_bad_settings_of_the_tuner(options: dict[str, Any], message: str) -> None:
    if "teacher" in options:
        options = {"teacher": bert(options["teacher"])}
    with pytest.raises(ValueError, match=message):
        cost_eff(bert(4), marked(12), **({"steps": 12} | options))


def test_models_and_data_that_cannot_be_tuned() -> None:
    with pytest.raises(ValueError, match="labels"):
        cost_eff(bert(2), [{"input_ids": torch.ones(2, 4, dtype=torch.long)}], steps=12)
    with pytest.raises(TypeError, match="model"):
        model, batches = ZOO["gpt2"]()
        cost_eff(model, batches, steps=12)
