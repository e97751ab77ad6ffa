from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.nn.norm_scale import NormScale
from layerwright.nn.residual_block import ResidualBlock
from layerwright.studies.sequence import tiny_llama
from layerwright.treat.layernorm_scaling import apply_layernorm_scaling


def block(placement: Any, index: int = 3, layers: int = 4, **settings: Any) -> ResidualBlock:
    torch.manual_seed(0)
    made = ResidualBlock(8, nn.Linear(8, 8), nn.Linear(8, 8), placement, index, layers, **settings)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data += torch.rand(parameter.shape)
    return made


def test_placements_against_their_formulas() -> None:
    x = torch.randn(2, 5, 8)
    for placement in ("pre", "post", "sandwich", "lns", "deepnorm"):
        made: Any = block(placement)
        y = x
        for part, norm, after in (
            (made.self_attn, made.input_layernorm, made.attention_output_norm),
            (made.mlp, made.post_attention_layernorm, made.ffn_output_norm),
        ):
            if placement == "pre":
                y = y + part(norm(y))
            elif placement == "lns":
                y = y + part(norm(y) / 3**0.5)
            elif placement == "post":
                y = norm(y + part(y))
            elif placement == "deepnorm":
                y = norm(8**0.25 * y + part(y))
            else:
                y = y + after(part(norm(y)))
        torch.testing.assert_close(made(x), y)


def test_mix_is_post_in_its_first_share() -> None:
    forms = [ResidualBlock(8, nn.Linear(8, 8), nn.Linear(8, 8), "mix", n, 12).form for n in range(1, 13)]
    assert forms == ["post"] * 3 + ["pre"] * 9


@pytest.mark.parametrize("placement", ["pre", "lns"])
def test_blocks_of_a_llama_in_it_compute_the_same(placement: Any) -> None:
    model = tiny_llama(32, 3, 2)
    expected = model if placement == "pre" else apply_layernorm_scaling(model).model
    ids = torch.randint(256, (2, 7))
    with torch.no_grad():
        wanted = expected(ids).logits
        for number, old in enumerate(list(model.model.layers)):
            model.model.layers[number] = ResidualBlock(32, old.self_attn, old.mlp, placement, number + 1, 3)
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="norm_placement"):
        block("befor")
    with pytest.raises(InputError, match="layer_index: got 0"):
        block("pre", 0)
    with pytest.raises(InputError, match="mix: got 2"):
        block("mix", mix=2)
    with pytest.raises(InputError, match="factor: got 0"):
        NormScale(0)
