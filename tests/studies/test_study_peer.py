"""The study of PEER in its quick form, and what it is made of."""

from __future__ import annotations

import torch

from layerwright.nn.peer import PEER, flops_per_token
from layerwright.studies.peer import FactModel, random_facts, run, text_model
from layerwright.studies.sequence import flops_per_token as model_flops
from layerwright.treat.swap_peer import find_peers


def test_facts_are_distinct_and_labels_know_nothing_of_them() -> None:
    facts = random_facts(4096, 3)
    codes = facts.symbols @ torch.tensor([1, 256, 65_536])
    assert len(codes.unique()) == 4096
    assert facts.symbols.min() == 0
    assert facts.symbols.max() == 255
    assert len(facts.labels.unique()) == 256
    assert torch.equal(random_facts(4096, 3).labels, facts.labels)
    assert not torch.equal(random_facts(4096, 4).labels, facts.labels)


def test_models_differ_in_the_layer_alone() -> None:
    first, second = FactModel(torch.nn.Identity(), 1), FactModel(torch.nn.Identity(), 1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    peer, dense = text_model(1, "batch"), text_model(1, None, 213)
    others = dict(dense.named_parameters())
    for name, value in peer.named_parameters():
        if "layers.1.mlp" not in name:
            assert torch.equal(value, others[name])


def test_the_dense_model_costs_as_many_operations() -> None:
    (layer,) = find_peers(text_model(0, "batch")).values()
    narrow, wide = text_model(0, None, 213), text_model(0, None, 214)
    each = model_flops(wide, 64) - model_flops(narrow, 64)
    assert each == 6 * 64
    assert abs(213 * each - flops_per_token(layer)) <= each / 2 + 1


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert evidence.slug == "peer"
    arms = ["dense, equal operations", "PEER", "PEER, no query norm"]
    assert [(row["part"], row["arm"]) for row in evidence.table] == [
        (part, arm) for part in ("facts", "text") for arm in arms
    ]
    facts = {row["arm"]: row for row in evidence.table if row["part"] == "facts"}
    assert facts["PEER"]["FLOPs of the layer"] == facts["dense, equal operations"]["FLOPs of the layer"] == 40_960
    assert facts["PEER"]["accuracy"] > facts["dense, equal operations"]["accuracy"] + 0.05
    assert facts["PEER"]["parameters"] > 20 * facts["dense, equal operations"]["parameters"]
    assert facts["PEER"]["usage"] > 0.9
    text = {row["arm"]: row for row in evidence.table if row["part"] == "text"}
    assert text["PEER"]["usage"] > text["PEER, no query norm"]["usage"]
    assert all(row["bits/byte"] < 7.5 for row in text.values())
    assert len(evidence.checks) == 6
    assert not evidence.checks[0].holds  # a few steps are not enough for 0.8


def test_peer_layers_of_the_study_have_dense_gradients() -> None:
    layers = [module for module in text_model(0, "none").modules() if isinstance(module, PEER)]
    assert [layer.gradients for layer in layers] == ["dense"]
