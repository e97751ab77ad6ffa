"""Search by growth: candidates inherit, known networks are looked up, a stopped search goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from layerwright.allocate.controller import Candidate, DenseSpace, Insertion, MetaController, PlainSpace, Widening
from layerwright.core.errors import CheckError, CheckpointError, InputError
from layerwright.models import DenseNetBC, PlainCNN, from_spec, load_network
from layerwright.recipes._classifier import Images, accuracy, digits_images, read_images, train_network_
from layerwright.recipes._grow_state import NetPool
from layerwright.recipes.grow import grow_search, grown_network, space_for
from layerwright.recipes.grow_job import grow_job, parse_spec

SPACE = PlainSpace((2, 3, 4), (3, 4), (1, 3), max_blocks=2, max_layers=4)
SPEC = ("conv-2-3", "pool", "conv-2-3", "fc-3")


def images(samples: int = 60, classes: int = 3, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    x = torch.randn(samples, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    third = samples // 3
    parts = [(x[i : i + third], labels[i : i + third]) for i in (0, third, 2 * third)]
    return Images(*parts, name="made")


def start(spec: tuple[str, ...] = SPEC) -> PlainCNN:
    network = from_spec(spec, classes=3, size=4)
    train_network_(network, images().train, epochs=2)
    assert isinstance(network, PlainCNN)
    return network


@torch.no_grad()
def test_grown_network_keeps_the_function_and_takes_the_words() -> None:
    network = start().double()
    x = images().train[0].double()
    candidate = Candidate(
        ("conv-3-3", "conv-3-1", "pool", "conv-3-3", "fc-3", "fc-3"),
        (Widening((0, 2)), Insertion(0, 1), Insertion(4)),
    )
    grown = grown_network(network, candidate, SPACE, x[:8], wider_noise=0, deeper_noise=0)
    assert tuple(grown.to_spec()) == candidate.spec
    assert float((grown(x) - network(x)).abs().max()) <= 1e-8
    noisy = grown_network(network, candidate, SPACE, x[:8], seed=3)
    assert 0 < float((noisy(x) - network(x)).abs().max()) < 1
    assert network.to_spec() == list(SPEC)
    with pytest.raises(InputError, match="its actions lead to"):
        grown_network(network, Candidate(SPEC, candidate.actions), SPACE, x[:8])


@torch.no_grad()
def test_grown_dense_network() -> None:
    space = DenseSpace((2, 4), max_blocks=2, max_layers=4)
    network = DenseNetBC([[2, 2], [2]], classes=3, bc_ratio=2).double().eval()
    x = images().train[0].double()
    candidate = Candidate(("g4", "g2", "g2", "t", "g2", "g2"), (Widening((0,)), Insertion(1), Insertion(4)))
    grown = grown_network(network, candidate, space, x, wider_noise=0, deeper_noise=0)
    assert tuple(grown.to_spec()) == candidate.spec and isinstance(grown, DenseNetBC)
    assert grown.settings()["transitions"][0] > network.settings()["transitions"][0]  # widened at the end
    assert float((grown(x) - network(x)).abs().max()) <= 1e-8


def test_spaces_hold_their_start() -> None:
    space = space_for(start())
    assert isinstance(space, PlainSpace)
    assert space.filters == (2, 3, 4, 6, 8) and space.units == (3, 4, 6, 9, 12) and space.kernels == (1, 3, 5)
    MetaController(space, hidden=2, embed=2).encode([SPEC])
    dense = space_for(DenseNetBC([[4, 6], [4]]))
    assert isinstance(dense, DenseSpace) and dense.growths == tuple(range(4, 25, 2)) and dense.max_blocks == 2
    with pytest.raises(InputError, match="largest"):
        space_for(start(), 0.5)


class Counting:
    """Training that counts, and may be stopped."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, model: nn.Module, data: Images, seed: int) -> None:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        train_network_(model, data.train, epochs=1, seed=seed)


def small_search(folder: Path | None = None, train: Counting | None = None, **settings: Any) -> Any:
    known = {"episodes": 3, "batch": 3, "wider": 1, "deeper": 1, "space": SPACE, "seed": 2}
    return grow_search(start(), images(), folder=folder, train_fn=train or Counting(), **(known | settings))


def test_every_network_is_trained_once() -> None:
    pool, train = NetPool(), Counting()
    result = small_search(train=train, pool=pool)
    tried = {c.key for e in result.episodes for c in e.candidates} | {"_".join(SPEC)}
    assert set(pool) == tried and train.calls == len(tried) - 1  # the start is known already
    again = Counting()
    repeated = small_search(train=again, pool=pool)
    order = [s for e in result.episodes for s in e.scores]
    best, records = result.start_validation, 0
    for score in order:
        best, records = max(best, score), records + (score > best)
    assert again.calls == records  # only those whose weights a new search may have to give back
    assert repeated.best == result.best and repeated.validation == result.validation
    assert [e.scores for e in repeated.episodes] == [e.scores for e in result.episodes]
    assert all(pool[c.key] == s for e in result.episodes for c, s in zip(e.candidates, e.scores, strict=True))


def test_best_is_the_highest_of_all_and_same_seed_same_search() -> None:
    one, two = small_search(), small_search()
    assert one.best == two.best and one.validation == max(one.pool.values.values())
    assert accuracy(one.network, images().validation) == one.validation
    assert tuple(one.network.to_spec()) == one.best.spec
    assert [e.candidates for e in one.episodes] == [e.candidates for e in two.episodes]
    assert [e.candidates for e in small_search(seed=3).episodes] != [e.candidates for e in one.episodes]
    chance = small_search(learn=False)
    assert [e.candidates for e in chance.episodes] != [e.candidates for e in one.episodes]
    json.dumps(one.to_data())


@pytest.mark.parametrize("stop_at", [0, 2, 5])
def test_a_stopped_search_goes_on(stop_at: int, tmp_path: Path) -> None:
    whole = small_search(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        small_search(stopped, Counting(stop_at=stop_at))
    rest = Counting()
    result = small_search(stopped, rest)
    assert result.episodes == whole.episodes and result.best == whole.best
    assert result.validation == whole.validation and rest.calls <= len(whole.pool) - 1
    state = [t for _, t in sorted(result.network.state_dict().items())]
    other = [t for _, t in sorted(whole.network.state_dict().items())]
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))
    names = sorted(p.name for p in stopped.iterdir())
    assert names == ["best-3", "controller-3.safetensors", "pool.json", "search.json"]
    finished = Counting()
    assert small_search(stopped, finished).episodes == whole.episodes and finished.calls == 0
    more = small_search(stopped, episodes=4)
    assert more.episodes[:3] == whole.episodes and len(more.episodes) == 4


def test_a_folder_of_another_or_a_damaged_search(tmp_path: Path) -> None:
    small_search(tmp_path, episodes=1)
    with pytest.raises(InputError, match="another batch, seed"):
        small_search(tmp_path, batch=2, seed=9)
    with pytest.raises(InputError, match="another data"):
        grow_search(
            start(), images(seed=1), folder=tmp_path, episodes=1, batch=3, wider=1, deeper=1, space=SPACE, seed=2
        )
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no readable search"):
        small_search(tmp_path)
    (tmp_path / "pool.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="no pool"):
        small_search(tmp_path)


def test_search_bad_input() -> None:
    with pytest.raises(InputError, match="epochs"):
        small_search(epochs=-1)
    with pytest.raises(InputError, match="episodes"):
        small_search(episodes=0)
    with pytest.raises(InputError, match="unknown word"):
        small_search(space=PlainSpace((5, 7), (3,), (3,)))


# -- data and training ------------------------------------------------------------------------------------------------


def test_digits_parts() -> None:
    data = digits_images(1)
    assert [len(y) for _, y in (data.train, data.validation, data.test)] == [1200, 300, 297]
    assert (data.classes, data.channels, data.size) == (10, 1, 8)
    every = torch.cat([x.flatten(1) for x, _ in (data.train, data.validation, data.test)])
    assert len(torch.unique(every, dim=0)) > 1790
    assert not torch.equal(data.train[1], digits_images(2).train[1])


def test_own_images(tmp_path: Path) -> None:
    generator = numpy.random.default_rng(0)
    path = tmp_path / "mine.npz"
    numpy.savez(path, x=generator.normal(5, 3, (60, 3, 4, 4)), y=numpy.arange(60) % 4)
    data = read_images(path)
    assert [len(y) for _, y in (data.train, data.validation, data.test)] == [40, 10, 10]
    assert data.train[0].mean().abs() < 1e-5 and len(data.mean) == 3 and data.classes == 4
    for x, y, message in (
        (generator.normal(size=(60, 3, 4, 5)), numpy.arange(60) % 4, "square"),
        (generator.normal(size=(6, 4, 4)), numpy.arange(6) % 2, "at least 24"),
        (generator.normal(size=(60, 4, 4)), numpy.zeros(60, int), "at least 24 of at least 2"),
        (numpy.full((60, 4, 4), numpy.nan), numpy.arange(60) % 4, "NaN"),
    ):
        numpy.savez(path, x=x, y=y)
        with pytest.raises(InputError, match=message):
            read_images(path)


def test_training_learns_and_refuses() -> None:
    data, network = images(90), from_spec(SPEC, classes=3, size=4)
    before = accuracy(network, data.train)
    train_network_(network, data.train, epochs=15, batch_size=29)  # 30 samples: the last batch would be one
    assert accuracy(network, data.train) > before + 0.2 and not network.training
    for wrong in ({"epochs": -1}, {"batch_size": 1}, {"learning_rate": 0.0}):
        with pytest.raises(InputError, match="epochs must be"):
            train_network_(network, data.train, **({"epochs": 1} | wrong))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not finite"):
        train_network_(network, data.train, epochs=9, learning_rate=1e30)


# -- the command's job ------------------------------------------------------------------------------------------------


def test_words_of_a_person() -> None:
    assert parse_spec("conv8, conv8-5 pool_fc16") == ["conv-8-3", "conv-8-5", "pool", "fc-16"]
    assert parse_spec("conv-8-1,fc-4") == ["conv-8-1", "fc-4"] and parse_spec("g4,t,g6") == ["g4", "t", "g6"]
    for wrong in ("conv", "fc16-3", "demo:cnn", "", "conv8,,"):
        with pytest.raises(InputError, match="spec: got"):
            parse_spec(wrong)


def write_images(path: Path) -> Path:
    data = images(72)
    x, y = (torch.cat([part[i] for part in (data.train, data.validation, data.test)]).numpy() for i in (0, 1))
    numpy.savez(path, x=x, y=y)
    return path


QUICK: dict[str, Any] = {"episodes": 1, "batch": 2, "wider": 1, "deeper": 1, "epochs": 1, "start_epochs": 1}


def test_job_writes_a_network_that_loads_and_serves_as_a_start(tmp_path: Path) -> None:
    data = write_images(tmp_path / "x.npz")
    job = grow_job("conv2,pool,fc3", data, tmp_path / "a", final_epochs=1, **QUICK)
    network = load_network(tmp_path / "a")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [row["network"] for row in results["networks"]] == ["start", "found"]
    assert results["networks"][1]["spec"] == network.to_spec() == job.network.to_spec()
    test = read_images(data, 0)
    assert accuracy(network, test.test) == results["networks"][1]["test"]
    assert len(results["settings"]["normalised_by"]["mean"]) == 1
    again = grow_job("conv2,pool,fc3", data, tmp_path / "a", final_epochs=1, **QUICK)
    assert again.result.episodes == job.result.episodes
    with pytest.raises(InputError, match="holds a search from"):
        grow_job("conv3,pool,fc3", data, tmp_path / "a", **QUICK)
    fresh = grow_job("conv3,pool,fc3", data, tmp_path / "a", force=True, **QUICK)
    assert fresh.rows[0]["spec"] == ["conv-3-3", "pool", "fc-3"]
    second = grow_job(str(tmp_path / "a"), data, tmp_path / "b", random=True, **QUICK)
    assert second.rows[0]["spec"] == fresh.rows[1]["spec"]


def test_job_reports_every_problem_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckError) as caught:
        grow_job("conv,pool", tmp_path / "none.npz", tmp_path / "o", episodes=0, epochs=-1, wider=0, deeper=0)
    problems = " | ".join(caught.value.problems)
    assert len(caught.value.problems) == 5 and not (tmp_path / "o").exists()
    for part in ("episodes, batch", "wider, deeper", "epochs: got -1", "no data at", "spec: got 'conv'"):
        assert part in problems


def test_job_refuses_a_start_for_other_images(tmp_path: Path) -> None:
    data = write_images(tmp_path / "x.npz")
    grow_job("conv2,pool,fc3", data, tmp_path / "a", final_epochs=0, **QUICK)
    with pytest.raises(CheckError, match="takes 3 classes, 1 channels and images of 4; the data has 10, 1 and 8"):
        grow_job(str(tmp_path / "a"), None, tmp_path / "b", **QUICK)
