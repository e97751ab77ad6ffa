"""The work of a block-by-block recipe for each block does not grow with the number of blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from layerwright.core.calibration import Calibration
from layerwright.recipes.bench import Bench
from layerwright.recipes.book import recipe
from layerwright.recipes.job import decide
from layerwright.treat.apply import apply_plan

BUDGETS = {"mixed": "bits=3", "mixllm": "bits=5", "fptq": "bits=4.5", "rtn": "bits=3"}


def block_calls(name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a block's forward runs, all blocks together, from the bench to the treated model."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=blocks, **sizes)).eval()
    ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(1))
    data = Calibration([{"input_ids": part, "labels": part.clone()} for part in ids.split(2)])
    count = 0
    plain = LlamaDecoderLayer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    chosen = recipe(name)
    settings = dict(chosen.decider_settings)
    if "group_size" in settings:
        settings["group_size"] = 16
    chosen = dataclasses.replace(
        chosen, decider_settings=settings, group_size=-1, score_samples=4, candidates=chosen.candidates[1:4:2]
    )
    with monkeypatch.context() as patch:
        patch.setattr(LlamaDecoderLayer, "forward", counted)
        decision = decide(Bench(model, None, data, data, "llama"), BUDGETS[name], chosen)
        treated, _ = apply_plan(model, decision.plan, data)
    assert decision.plan.layers
    assert treated is not model
    return count


@pytest.mark.parametrize("name", BUDGETS)
def test_forwards_of_blocks_grow_with_depth_and_no_faster(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more block always costs the same number of forwards, those of the other blocks included."""
    torch.set_num_threads(1)
    two, three, five = (block_calls(name, blocks, monkeypatch) for blocks in (2, 3, 5))
    assert three > two > 0
    assert five - three == 2 * (three - two)
