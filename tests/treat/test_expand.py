"""New blocks change nothing at first, or begin as they are said to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwright.core.blocks import find_blocks
from layerwright.core.errors import InputError
from layerwright.treat.expand import expand_blocks, expansion_order, slerp
from zoo import EXPECTED, ZOO, causal, logits

POST_NORM = {"albert", "bart", "bert", "distilbert", "roberta"}
WITHOUT_PROJECTION = {"resnet"}
PRE_NORM = [(n, p) for n, stacks in EXPECTED.items() if n not in POST_NORM | WITHOUT_PROJECTION for p in stacks]


@pytest.mark.filterwarnings("ignore:Swin.*right in memory")
@pytest.mark.parametrize(("name", "path"), PRE_NORM)
def test_identity_on_every_architecture(name: str, path: str, tmp_path: object) -> None:
    model, batches = ZOO[name]()
    depth = EXPECTED[name][path]
    deeper, block_map = expand_blocks(model, depth, stack=path, sample=batches[0])
    assert len(block_map.copies) == depth
    before, after = logits(model, batches[0]), logits(deeper, batches[0])
    assert (before - after).abs().max() <= 1e-5
    assert next(len(s) for s in find_blocks(deeper) if s.path == path) == 2 * depth
    deeper.save_pretrained(tmp_path)
    if name != "swin":
        assert torch.equal(logits(type(deeper).from_pretrained(tmp_path).eval(), batches[0]), after)


@pytest.mark.parametrize("name", [n for n in [*causal(), "t5", "whisper"] if n not in POST_NORM])
def test_generation_is_what_it_was(name: str) -> None:
    model, batches = ZOO[name]()
    deeper, _ = expand_blocks(model, where=[0], stack=find_blocks(model)[-1].path, sample=batches[0])
    inputs = {k: batches[0][k] for k in (model.main_input_name, "attention_mask") if k in batches[0]}
    limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **limits)
    for cache in (True, False):
        assert torch.equal(deeper.generate(**inputs, **limits, use_cache=cache), expected)


@pytest.mark.parametrize("name", sorted(POST_NORM - {"albert"}))
@pytest.mark.parametrize("copy", [True, False])
def test_post_norm_blocks_are_no_identities(name: str, copy: bool) -> None:
    model, batches = ZOO[name]()
    before = logits(model, batches[0])
    with pytest.raises(InputError, match=r"init: .* is no identity .*post-norm"):
        expand_blocks(model, where=[0], stack=find_blocks(model)[0].path, sample=batches[0], copy=copy)
    assert torch.equal(logits(model, batches[0]), before)


def test_gradients_reach_the_silent_projections_and_no_others() -> None:
    model, batches = ZOO["llama"]()
    deeper, block_map = expand_blocks(model, where=[1])
    deeper(**batches[0]).loss.backward()
    (new,) = block_map.copies
    found = {n: float(p.grad.abs().max()) > 0 for n, p in deeper.get_submodule(new).named_parameters()}
    assert {name for name, moved in found.items() if moved} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_starts() -> None:
    model, _ = ZOO["qwen2"]()

    def weight(init: Any, where: int = 2, **settings: Any) -> torch.Tensor:
        deeper, block_map = expand_blocks(model, where=[where], init=init, **settings)
        assert list(block_map.copies) == [f"model.layers.{where + 1}"]
        return deeper.get_submodule(f"model.layers.{where + 1}.mlp.up_proj").weight.detach()

    own = [layer.mlp.up_proj.weight.detach() for layer in model.model.layers]
    assert torch.equal(weight("copy"), own[2])
    assert torch.allclose(weight("linear"), (own[2] + own[1]) / 2)
    assert torch.allclose(weight("slerp"), slerp(own[2], own[1], 0.5))
    assert torch.equal(weight("linear", where=0), own[0])
    drawn = weight("random", seed=3)
    assert torch.equal(drawn, weight("random", seed=3))
    assert not torch.equal(drawn, weight("random", seed=4))
    assert not torch.equal(drawn, own[2])
    assert 0.5 < float(drawn.std() / model.config.initializer_range) < 1.5
    state = torch.random.get_rng_state()
    weight("random")
    assert torch.equal(state, torch.random.get_rng_state())


def test_slerp() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([2**-0.5, 2**-0.5]))
    assert torch.allclose(slerp(a, b, 0.0), a)
    assert torch.allclose(slerp(2 * a, b, 1 / 3), torch.tensor([3**0.5, 0.5]))
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)
    assert torch.equal(slerp(a, torch.zeros(2), 0.5), a / 2)


def test_orders() -> None:
    assert expansion_order(4, 2) == (0, 1, 1, 2, 3, 3)
    assert expansion_order(32, 8)[:6] == (0, 1, 2, 3, 3, 4)
    assert expansion_order(32, 16, layout="stack") == (*range(24), *range(8, 32))
    assert expansion_order(4, where=[1, 1]) == (0, 1, 1, 1, 2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_new": 0}, "num_new: got 0"),
        ({"num_new": -1}, "num_new: got -1"),
        ({"num_new": 3}, r"does not divide the 4 blocks; choose one of \[1, 2, 4\]"),
        ({}, "num_new: got None"),
        ({"num_new": 5, "layout": "stack"}, "can be run twice at most"),
        ({"num_new": 2, "init": "zeros"}, "unknown init 'zeros'"),
        ({"num_new": 2, "layout": "tower"}, "unknown layout 'tower'"),
        ({"where": [4]}, "where: got"),
        ({"where": []}, "where: got"),
        ({"where": [1], "num_new": 2}, "give one of the two"),
        ({"num_new": 2, "stack": "encoder"}, "unknown stack 'encoder'"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    model, _ = ZOO["llama"]()
    with pytest.raises(InputError, match=message):
        expand_blocks(model, **settings)


def test_images_need_a_sample() -> None:
    model, _ = ZOO["vit"]()
    with pytest.raises(InputError, match=r"sample: ViT.* does not read token ids; pass a batch"):
        expand_blocks(model, 3)
