from __future__ import annotations

import torch

from layerwright.data.speech import generated_speech
from layerwright.studies._speech import Training, error_rate, train_alone_, train_supernet_
from layerwright.studies.todm import SIZES, SPACE, network, run
from layerwright.tune.supernet import Supernet

HOW = Training(epochs=2, batch_size=10, optimizer="scaled", rate=0.04, clip=5.0, seed=3)


def test_training_repeats_and_counts_its_passes() -> None:
    speech = generated_speech(20, 1)
    state = torch.random.get_rng_state()
    first, second = (network(speech, 0, SIZES["min"]) for _ in range(2))
    assert train_alone_(first, speech, HOW) == train_alone_(second, speech, HOW) == 4
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = network(speech, 0, SIZES["min"])
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    supernet = Supernet(network(speech, 0), SPACE)
    smallest = supernet.relative_cost(SPACE.min())
    passes = train_supernet_(supernet, speech, HOW)
    assert 4 * (1 + 2 * smallest) <= passes <= 4 * (2 + smallest)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 0 <= error_rate(first, speech) <= 3


def test_sizes_alone_are_those_of_the_supernet() -> None:
    speech = generated_speech(2, 1)
    whole = network(speech, 0)
    supernet = Supernet(whole, SPACE)
    for config in SIZES.values():
        alone = network(speech, 0, config)
        assert sum(p.numel() for p in alone.parameters()) == supernet.parameter_count(config)
        with supernet.active(config):
            rates = {supernet.stack.feed_forwards()[index].dropout_rate for index in config.keep}
        assert rates == {block.ffn.dropout_rate for block in alone.blocks}  # type: ignore[union-attr]


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "todm" and evidence.seeds == (0,)
    assert [row["arm"] for row in evidence.table] == [
        "alone",
        "sliced",
        "supernet",
        "labels for all",
        "plain Adam",
        "constant dropout",
        "searched",
        "searched",
    ]
    rows = {row["arm"]: row for row in evidence.table}
    assert all({"min", "middle", "max"} <= set(rows[arm]) for arm in list(rows)[:-1])
    assert 1 < rows["supernet"]["cost"] < 2.5
    assert rows["supernet"]["extracted"] < 1e-4
    assert rows["alone"]["max"] == rows["sliced"]["max"]  # the same network, whole
    for row in evidence.table[-2:]:
        assert row["validation loss"] <= row["validation loss, even"]
    assert [check.relation for check in evidence.checks] == ["<="] * 5 + [">=", "<="]
