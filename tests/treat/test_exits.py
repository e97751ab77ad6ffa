from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.nn.exits import ExitModel
from layerwright.treat.exits import add_exits
from layerwright.tune.vote import generate_voted, vote
from zoo import ZOO

DECODERS = ("llama", "gpt2", "opt", "gemma2", "bloom", "qwen2", "mixtral")


def tiny(name: str = "llama") -> tuple[nn.Module, torch.Tensor]:
    model, batches = ZOO[name]()
    return model.eval(), batches[0]["input_ids"]


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_the_last_exit_gives_the_models_own_logits(name: str) -> None:
    model, ids = tiny(name)
    exits = add_exits(model, 1)
    assert torch.equal(exits(ids), model(input_ids=ids).logits)
    together = exits.all_exits(ids)
    assert together.shape == (len(exits.positions), *ids.shape, together.shape[-1])
    for place, logits in zip(exits.positions, together, strict=True):
        assert torch.equal(logits, exits(ids, place))


@torch.no_grad()
def test_an_early_exit_is_the_models_norm_and_head_on_what_the_block_returns() -> None:
    model, ids = tiny()
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    exits = add_exits(model, positions=[1, 3, 4])
    for place in (1, 3):
        expected = model.lm_head(model.model.norm(states[place]))
        assert torch.equal(exits(ids, place), expected)
    bare = add_exits(model, positions=[1, 4], norm="none")
    assert torch.equal(bare(ids, 1), model.lm_head(states[1]))
    assert torch.equal(bare(ids), model(input_ids=ids).logits)


@torch.no_grad()
def test_blocks_above_an_exit_do_not_run() -> None:
    model, ids = tiny()
    exits = add_exits(model, 1)
    before = exits(ids, 2)
    with torch.no_grad():
        for parameter in [p for block in exits.blocks[2:] for p in block.parameters()]:
            parameter.fill_(float("nan"))
    assert torch.equal(exits(ids, 2), before)
    real = [type(block).forward for block in exits.blocks]
    calls: list[int] = []
    for number, block in enumerate(exits.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))
    exits(ids, 2)
    assert calls == [0, 1] and [type(block).forward for block in exits.blocks] == real
    assert all("forward" not in block.__dict__ for block in exits.blocks)


def test_a_tied_head_is_copied() -> None:
    model, _ = tiny("qwen3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exits = add_exits(model, 1)
    pointers = {exits.head(place).weight.data_ptr() for place in exits.positions}
    assert len(pointers) == len(exits.positions) and model.lm_head.weight.data_ptr() not in pointers
    assert all(torch.equal(exits.head(p).weight, model.lm_head.weight) for p in exits.positions)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    model, ids = tiny(name)
    exits = add_exits(model, 1)
    for place in exits.positions:
        assert torch.equal(exits.generate(ids, 5, exit=place), exits.generate(ids, 5, exit=place, cached=False))
    voted = generate_voted(exits, ids, 5)
    slow = exits.generate(ids, 5, combine=vote, cached=False)
    assert torch.equal(voted, slow) and voted.shape[1] == ids.shape[1] + 5
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(exits.generate(ids, 5), plain)


def test_only_the_window_records_gradients() -> None:
    model, ids = tiny()
    exits = add_exits(model, positions=[2, 4])
    exits(ids, 4, window=2).sum().backward()
    for number, block in enumerate(exits.blocks, 1):
        found = [p.grad is not None for p in block.parameters()]
        assert all(found) if number > 2 else not any(found)
    assert exits.head(4).weight.grad is not None and exits.head(2).weight.grad is None
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert not exits(ids, 4, window=2).requires_grad


def test_padding_passes_through() -> None:
    model, ids = tiny()
    exits = add_exits(model, 2)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(exits(ids, attention_mask=mask), expected)


def test_the_model_is_left_as_it_is() -> None:
    model, _ids = tiny()
    names = set(model.state_dict())
    exits = add_exits(model, 2)
    with torch.no_grad():
        exits.head(2).weight.zero_()
    assert set(model.state_dict()) == names and float(model.lm_head.weight.detach().abs().sum()) > 0
    assert isinstance(exits, ExitModel) and "exits after 2, 4 of 4" in repr(exits)


def test_a_stride_that_does_not_divide_warns() -> None:
    model, _ = tiny()
    with pytest.warns(UserWarning, match="does not divide the 4 blocks"):
        exits = add_exits(model, 3)
    assert exits.positions == (3, 4)


@pytest.mark.parametrize("positions", [[0, 4], [5], [], [-1], [True]])
def test_exits_outside_the_blocks_are_refused(positions: list[int]) -> None:
    with pytest.raises(InputError, match="from 1 to 4"):
        add_exits(tiny()[0], positions=positions)


def test_what_has_no_exits_is_refused() -> None:
    for name, words in (("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("vit", "language model")):
        with pytest.raises(ValueError, match=words):
            add_exits(ZOO[name]()[0], 1)
    with pytest.raises(ValueError, match="blocks"):
        add_exits(nn.Linear(4, 4), 1)
    model, ids = tiny()
    for every in (0, 5):
        with pytest.raises(InputError, match="1 to the 4 blocks"):
            add_exits(model, every)
    with pytest.raises(InputError, match="either"):
        add_exits(model)
    with pytest.raises(InputError, match="norm"):
        add_exits(model, 1, norm="own")  # type: ignore[arg-type]
    exits = add_exits(model, 2)
    for wrong in (0, 1, 3, 5):
        with pytest.raises(InputError, match="exits after 2, 4"):
            exits(ids, wrong)
    with pytest.raises(InputError, match="window"):
        exits(ids, 2, window=3)
