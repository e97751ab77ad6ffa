"""Blocks that cannot go are no candidates, and no choice empties a stack."""

from __future__ import annotations

import pytest

from layerwright.core.blocks import find_blocks
from layerwright.core.option import Scores
from layerwright.recipes.removable import leave_one, removable
from zoo import ZOO, on_meta


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5", "bart", "resnet", "swin"])
def test_the_shapes_tell_which_blocks_may_go(name: str) -> None:
    model, _ = ZOO[name]()
    blocks = find_blocks(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = removable(model, blocks)
    assert found == removable(on_meta(name), blocks)
    whole = {"llama", "bert", "vit", "bart", "swin"}
    assert (set(found) == {path for stack in blocks for path in stack}) == (name in whole)
    assert all((value == before[key]).all() for key, value in model.state_dict().items())


def test_a_block_whose_table_the_others_read_stays() -> None:
    model, _ = ZOO["t5"]()
    found = removable(model, find_blocks(model))
    assert "encoder.block.0" not in found and "decoder.block.0" not in found
    assert "encoder.block.1" in found and "decoder.block.1" in found


def test_a_block_that_halves_the_image_stays() -> None:
    model, _ = ZOO["resnet"]()
    found = removable(model, find_blocks(model))
    assert "resnet.encoder.stages.1.layers.0" not in found
    assert "resnet.encoder.stages.1.layers.1" in found


def test_one_block_of_each_stack_is_left() -> None:
    blocks = find_blocks(ZOO["resnet"]()[0])
    names = [path for stack in blocks for path in stack]
    scores = Scores("block_removal", sensitivities={path: float(i) for i, path in enumerate(names)})
    left = leave_one(scores, blocks).sensitivities
    assert [path for path in names if path not in left] == [stack.names[-1] for stack in blocks]
    some = Scores("block_removal", sensitivities=dict.fromkeys(blocks[1].names[1:], 1.0))
    assert leave_one(some, blocks).sensitivities == some.sensitivities
