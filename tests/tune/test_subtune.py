from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.calibration import as_calibration
from layerwright.core.errors import InputError
from layerwright.core.readout import find_readout, new_readout
from layerwright.tune._loop import Schedule
from layerwright.tune._samples import Samples, index_batches
from layerwright.tune.subset_trainer import SubsetTrainer
from layerwright.tune.subtune import subset_copy, subtune, train_subset_
from layerwright.tune.subtuning import choose_and_train, subtuning
from subtuning_models import bert, images, mlp, resnet, vit

FAST: dict[str, Any] = {"steps": 3, "folds": 2, "batch_size": 8}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trainer(model: nn.Module, **settings: Any) -> SubsetTrainer:
    data = as_calibration(images())
    samples = Samples.of(data)
    both = (torch.arange(0, 12), torch.arange(12, 24))
    return SubsetTrainer(model, data, samples, "head", 3, [both, both[::-1]], Schedule(4, 1e-2), 8, **settings)


def test_only_the_chosen_parts_change_and_statistics_of_the_frozen_ones_stay() -> None:
    model = resnet()
    before = state(model)
    copy = subset_copy(model, ["blocks.1"])
    loss = lambda network, batch: nn.functional.cross_entropy(network(batch[0]), batch[1])  # noqa: E731
    copy.head = new_readout(copy.head, 3)
    train_subset_(copy, ["blocks.1"], "head", images(), loss, Schedule(5, 1e-2))
    after = state(copy)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {name for name in before if name.startswith(("blocks.1.", "head."))}
    assert changed == inside, "the batch norm of the tuned block learns statistics, all else is the same bit by bit"
    assert "blocks.1.norm.running_mean" in changed
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_modes_and_flags_come_back_even_after_an_exception() -> None:
    model = resnet()
    model.blocks[2].train()
    model.stem[0].weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), subtune(model, ["blocks.0"], "head") as subset:
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if n.startswith(("blocks.0.", "head."))
        }
        assert sum(p.numel() for p in subset.parameters()) == sum(
            p.numel() for part in (model.blocks[0], model.head) for p in part.parameters()
        )
        training = {name for name, module in model.named_modules() if module.training}
        assert training == {"blocks.0", *(f"blocks.0.{n}" for n in ("first", "norm", "dropout", "second")), "head"}
        raise RuntimeError("stop")
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_the_readout_has_its_own_rate() -> None:
    moved = []
    for rate in (1.0, 4.0):
        one = trainer(resnet(), head_rate=rate, cache=False)
        tuned, start = one.train(["blocks.0"], steps=1), one.start(["blocks.0"])
        block = float((tuned.blocks[0].first.weight - start.blocks[0].first.weight).detach().abs().max())
        moved.append((float((tuned.head.weight - start.head.weight).detach().abs().max()), block))
    assert moved[1][0] == pytest.approx(4 * moved[0][0], rel=1e-4)
    assert moved[1][1] == pytest.approx(moved[0][1], rel=1e-4)


def test_norms_outside_the_blocks_can_be_trained() -> None:
    model = resnet()
    with subtune(model, ["blocks.0"], "head", freeze_norm=False) as subset:
        assert set(subset.norms) == {"stem.1", "norm", *(f"blocks.{n}.norm" for n in (1, 2, 3))}
        assert model.norm.training and model.norm.weight.requires_grad
        assert not model.blocks[1].training and model.blocks[1].norm.training


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["blocks.9"], "blocks"),
        (["blocks.1", "blocks.1.first"], "overlap"),
        (["blocks.1", "blocks.1"], "twice"),
        ("blocks.1", "expected a list"),
        ([""], "inside the model"),
    ],
)
def test_wrong_blocks_are_refused(blocks: Any, message: str) -> None:
    model = resnet()
    with pytest.raises(InputError, match=message), subtune(model, blocks, "head"):
        pass
    if not isinstance(blocks, str):
        with pytest.raises(InputError, match=message):
            choose_and_train(model, images(), blocks=blocks)


def test_a_block_that_shares_its_weight_is_no_unit() -> None:
    model = mlp()
    model[0][1][0].weight = model[0][0][0].weight
    with pytest.raises(InputError, match="one weight"), subtune(model, ["0.0"], "2"):
        pass
    with subtune(model, ["0"], "2"):  # both of them are trained
        pass


def test_evaluations_do_not_depend_on_each_other_nor_on_kept_features() -> None:
    model = resnet()
    before = state(model)
    one, two, plain = trainer(model), trainer(model), trainer(model, cache=False)
    sets = [(), ("blocks.2",), ("blocks.0", "blocks.3")]
    first = [one(chosen) for chosen in sets]
    assert first == [two(chosen) for chosen in reversed(sets)][::-1]
    for chosen in sets:
        a, b = one.train(chosen), plain.train(chosen)
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(tensor, b.state_dict()[name], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_readout_is_the_same_for_all_sets_and_seeds_differ() -> None:
    one = trainer(resnet())
    assert torch.equal(one.start([]).head.weight, one.start(["blocks.1"]).head.weight)
    assert not torch.equal(one.start([], 0).head.weight, one.start([], 1).head.weight)
    assert len(trainer(resnet(), seeds=(0, 1))([])) == 4


def test_the_whole_job_learns_and_is_repeatable(tmp_path: Path) -> None:
    model = resnet()
    before = state(model)
    told: list[str] = []
    settings: dict[str, Any] = {
        "steps": 25,
        "folds": 2,
        "batch_size": 12,
        "learning_rate": 0.02,
        "max_blocks": 2,
        "progress": lambda name, _done, _total: told.append(name),
    }
    found = choose_and_train(model, images(), record=tmp_path / "subtuning.json", **settings)
    assert found.choice.accuracy >= found.choice.baseline
    assert 0 < len(found.choice.keep) <= 2 and len(found.profile) == 4
    assert found.trained < sum(p.numel() for p in model.parameters())
    assert any(name.startswith("profile, blocks.0: ") and name.endswith("%") for name in told)
    changed = {name for name, value in found.model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed and all(name.startswith((*(f"{b}." for b in found.choice.keep), "head.")) for name in changed)
    again = subtuning(model, images(), **settings)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), found.model.parameters(), strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_text_and_vision_classifiers_get_as_many_classes_as_the_data_has() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    ids = torch.randint(1, 32, (16, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    batches = [
        {"input_ids": ids[:8, :6], "attention_mask": mask[:8, :6], "labels": labels[:8]},
        {"input_ids": ids[8:], "attention_mask": mask[8:], "labels": labels[8:]},
    ]
    text = choose_and_train(bert(), batches, max_blocks=1, classes=["a", "b", "c", "d"], **FAST)
    assert text.model(**batches[0]).logits.shape == (8, 4)
    assert text.model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"} and text.head == "classifier"
    assert text.model(**batches[0]).loss.isfinite()
    network = vit()
    pictures = choose_and_train(network, images(mapping=True), max_blocks=1, **FAST)
    assert pictures.model.config.num_labels == 3 and network.config.num_labels == 10
    assert set(pictures.profile.names) == {("vit.layers.0",), ("vit.layers.1",), ("vit.layers.2",)}


def test_works_in_bfloat16() -> None:
    model = mlp().to(torch.bfloat16)
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = choose_and_train(model, [(x, torch.arange(12) % 3)], max_blocks=1, **FAST)
    assert next(found.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 1}, "folds"),
        ({"folds": 9}, "folds: got 9, and class 0 has 8"),
        ({"eps": -0.1}, "eps"),
        ({"max_blocks": 0}, "max_blocks"),
        ({"parallel": 0}, "parallel"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"window": 9}, "window"),
        ({"classes": 2}, "classes: got 2, and labels reach up to 2"),
        ({"classes": 1}, "classes"),
        ({"head": "norm"}, "head: norm is a BatchNorm2d"),
        ({"head": "none"}, "unknown path"),
        ({"repeats": 0}, "repeats"),
        ({"head_rate": 0.0}, "head_rate"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_and_train(resnet(), images(), **FAST | settings)


@pytest.mark.parametrize(
    "batches",
    [
        [torch.zeros(4, 1, 8, 8)],
        [(torch.zeros(4, 1, 8, 8), torch.zeros(4))],
        [(torch.zeros(4, 1, 8, 8), torch.zeros(4, 5, dtype=torch.long))],
        [(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, -1, 0]))],
        [(torch.zeros(4, 1, 8, 8), torch.arange(4)), (torch.zeros(4, 1, 6, 6), torch.arange(4))],
    ],
)
def test_data_that_is_no_classification_is_refused(batches: list[Any]) -> None:
    with pytest.raises(InputError, match="data"):
        choose_and_train(resnet(), batches, **FAST)


def test_batches_are_full_and_visit_all() -> None:
    places = torch.tensor([3, 5, 7, 9, 11])
    batches = index_batches(places, 2, 10, seed=0)
    assert len(batches) == 10 and all(len(batch) == 2 for batch in batches)
    counts = torch.cat(batches).bincount(minlength=12)
    assert set(counts[places].tolist()) == {4}
    assert all(sorted(batch.tolist()) == places.tolist() for batch in index_batches(places, 99, 3, seed=0))


def test_readouts_are_found() -> None:
    assert find_readout(resnet()) == "head"
    assert find_readout(mlp()) == "2"
    with pytest.raises(InputError, match="head"):
        find_readout(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)))
