from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.studies.lsuv import ACTIVATIONS, DEPTH, RATES, STARTS, WIDTH, _network, run, train_stack


def test_a_stack_trains_as_its_networks_would_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(150, WIDTH, generator=draw), torch.randint(10, (150,), generator=draw)
    networks = [_network("he", "elu", images, seed) for seed in (0, 1)]
    rates, seeds, epochs = (0.003, 0.01), (0, 1), 2
    found = train_stack(networks, rates, "elu", (images, labels), seeds, epochs)(images)
    for network, rate, seed, expected in zip(networks, rates, seeds, found, strict=True):
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
        for _ in range(epochs):
            for chosen in torch.randperm(150, generator=order).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
                optimizer.step()
        torch.testing.assert_close(network(images), expected, rtol=1e-2, atol=1e-3)


def test_quick_form() -> None:
    evidence = run(quick=True)
    assert evidence.slug == "lsuv"
    rows = [row for row in evidence.table if "accuracy" in row]
    assert len(rows) == len(ACTIVATIONS) * len(STARTS) * len(RATES)
    best = {
        (a, s): max(row["accuracy"] for row in rows if (row["activation"], row["arm"]) == (a, s))
        for a in ACTIVATIONS
        for s in STARTS
    }
    for place, activation in enumerate(ACTIVATIONS):
        check = evidence.checks[place]
        assert check.measured == best[activation, "lsuv"]
        assert check.bound == pytest.approx(max(best[activation, s] for s in STARTS[:-1]) - 0.01)
    assert best["relu", "lsuv"] > 0.6 > best["relu", "xavier"]
    assert DEPTH == 20
