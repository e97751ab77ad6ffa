"""Models whose feed-forward parts became PEER layers: where, on disk, with padding, with a cache, and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import layerwright as lw
from layerwright.core.errors import InputError
from layerwright.nn.adaptive import PassOn
from layerwright.nn.peer import PEER
from layerwright.treat.swap_peer import find_peers, swap_peer
from layerwright.tune.peer import peer
from zoo import ZOO

SMALL: dict[str, Any] = {"num_experts": 64, "heads": 2, "top_k": 4, "query_dim": 8}
MODELS = ["bart", "bert", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "opt", "phi3", "t5", "vit"]


def loss(model: Any, batches: Any) -> float:
    return lw.Calibration(batches).mean_loss(model)


@pytest.mark.parametrize("name", MODELS)
def test_models_run_and_learn_and_the_original_stays(name: str) -> None:
    model, batches = ZOO[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    swapped, names = swap_peer(model, "all", seed=3, **SMALL)
    layers = find_peers(swapped)
    assert tuple(layers) == names
    assert len(names) > 1
    lw.Calibration(batches).loss(swapped.train(), batches[0]).backward()
    for layer in layers.values():
        assert layer.down.grad is not None
        assert layer.down.grad.is_sparse
        assert bool(layer.router.query.grad.any())
        assert bool(layer.router.keys.grad.any())
        assert bool(layer.router.norm.running_mean.any())
    assert torch.isfinite(torch.tensor(loss(swapped, batches)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not find_peers(model)


def test_the_middle_block_is_taken_and_names_elsewhere_stay() -> None:
    model, _ = ZOO["llama"]()
    swapped, names = swap_peer(model, **SMALL)
    middle = len(model.model.layers) // 2
    assert names == (f"model.layers.{middle}.mlp",)
    outside = {key for key in model.state_dict() if not key.startswith(names[0])}
    assert outside == {key for key in swapped.state_dict() if not key.startswith(names[0])}
    shared = dict(swapped.named_parameters())
    assert all(shared[key] is p for key, p in model.named_parameters() if key in shared)
    assert swap_peer(model, [0], copy=False, **SMALL)[0] is model
    assert list(find_peers(model)) == ["model.layers.0.mlp"]


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, batches = ZOO[name]()
    swapped, names = swap_peer(model, "all", seed=1, share_keys=False, gate="sigmoid", **SMALL)
    for layer in find_peers(swapped).values():
        layer.router.norm.running_mean += 0.1
    lw.save(swapped, tmp_path / "out")
    loaded, _ = lw.load(tmp_path / "out")
    found = find_peers(loaded)
    assert tuple(found) == names
    assert loss(loaded, batches) == pytest.approx(loss(swapped, batches), abs=1e-6)
    for path, layer in find_peers(swapped).items():
        assert found[path].spec() == layer.spec()
    passing = [path for path, module in swapped.named_modules() if isinstance(module, PassOn)]
    assert passing == [path for path, module in loaded.named_modules() if isinstance(module, PassOn)]


def test_a_cache_gives_what_a_full_pass_gives() -> None:
    model, _ = ZOO["llama"]()
    swapped, _ = swap_peer(model, "all", seed=2, **SMALL)
    ids = torch.randint(1, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    swapped.train()(ids)  # statistics of some tokens
    swapped.eval()
    with torch.no_grad():
        whole = swapped(ids).logits
        first = swapped(ids[:, :5], use_cache=True)
        rest = [first.logits]
        cache = first.past_key_values
        for place in range(5, 9):
            out = swapped(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            rest.append(out.logits)
    assert torch.allclose(torch.cat(rest, 1), whole, atol=1e-5)


def test_padding_stays_out_of_the_statistics() -> None:
    model, _ = ZOO["llama"]()
    ids = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    means = []
    for filler in (3, 7):
        swapped, (path,) = swap_peer(model, [0], seed=2, **SMALL)
        swapped.train()(torch.where(mask.bool(), ids, filler), attention_mask=mask)
        means.append(find_peers(swapped)[path].router.norm.running_mean)
    assert torch.equal(*means)
    swapped, (path,) = swap_peer(model, [0], seed=2, **SMALL)
    swapped.train()(ids)
    assert not torch.allclose(find_peers(swapped)[path].router.norm.running_mean, means[0])


def test_same_seed_same_layers_and_blocks_differ() -> None:
    model, _ = ZOO["llama"]()
    first, names = swap_peer(model, "all", seed=5, **SMALL)
    second, _ = swap_peer(model, "all", seed=5, **SMALL)
    other, _ = swap_peer(model, "all", seed=6, **SMALL)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    a, b = (first.get_submodule(name) for name in names[:2])
    assert not torch.equal(a.down, b.down)
    assert not torch.equal(a.down, other.get_submodule(names[0]).down)


def test_training_lowers_the_loss_and_leaves_the_original_alone() -> None:
    model, batches = ZOO["llama"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings: dict[str, Any] = {"steps": 15, "learning_rate": 3e-3, **SMALL}
    tuned = peer(model, batches, **settings)
    again = peer(model, batches, **settings)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (layer,) = find_peers(tuned).values()
    assert layer.gradients == "sparse"
    assert bool(layer.router.norm.running_mean.any())
    fresh, _ = swap_peer(model, **SMALL)
    assert loss(tuned, batches) < loss(fresh, batches)
    for key, value in tuned.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_training_goes_on_from_a_swapped_model_and_its_statistics_stay() -> None:
    model, batches = ZOO["llama"]()
    swapped, _ = swap_peer(model, **SMALL)
    before = {key: value.clone() for key, value in swapped.state_dict().items()}
    tuned = peer(swapped, batches, steps=2, **SMALL)
    assert all(torch.equal(value, before[key]) for key, value in swapped.state_dict().items())
    (old,), (new,) = find_peers(swapped).values(), find_peers(tuned).values()
    assert new.spec() == old.spec()
    assert not torch.equal(new.router.norm.running_mean, old.router.norm.running_mean)
    assert not torch.equal(new.down, old.down)


def test_wrong_settings() -> None:
    model, batches = ZOO["llama"]()
    with pytest.raises(InputError, match="num_experts: got 60"):
        swap_peer(model, **(SMALL | {"num_experts": 60}))
    with pytest.raises(InputError, match="unknown block"):
        swap_peer(model, [99], **SMALL)
    swapped, _ = swap_peer(model, [0], **SMALL)
    with pytest.raises(InputError, match="has a PEER layer already"):
        swap_peer(swapped, [0], **SMALL)
    assert len(swap_peer(swapped, [1], **SMALL)[1]) == 1
    with pytest.raises(TypeError, match="model"):
        swap_peer(torch.nn.Linear(3, 3), **SMALL)
    blocks = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)) for _ in range(3)))
    with pytest.raises(TypeError, match="0 feed-forward parts"):
        swap_peer(blocks, **SMALL)
    with pytest.raises(InputError, match="expert_rate: got 0"):
        peer(model, batches, expert_rate=0)


def test_two_layers_share_what_is_known_of_a_call() -> None:
    model, _ = ZOO["llama"]()
    swapped, names = swap_peer(model, [0], **SMALL)
    both, more = swap_peer(swapped, [1], **SMALL)
    layers = find_peers(both)
    assert set(layers) == {*names, *more}
    assert len({id(layer.calls) for layer in layers.values()}) == 1
    assert all(isinstance(layer, PEER) for layer in layers.values())
