from __future__ import annotations

import dataclasses

import pytest

from layerwright.core.errors import InputError
from layerwright.score.device import LMShape, preset_shape, preset_shapes

PUBLISHED = {"mixtral": 46.7e9, "glam": 143e9, "grok1": 314e9, "opt-66b": 66e9, "llama3-70b": 70.6e9}


def test_parameters_are_the_published_ones() -> None:
    assert {name: shape.params for name, shape in preset_shapes().items()} == {
        name: pytest.approx(params, rel=0.01) for name, params in PUBLISHED.items()
    }


def test_presets() -> None:
    glam = preset_shape("glam")
    assert glam.moe_layers == tuple(range(1, 32, 2))
    assert [preset_shape(name).group for name in PUBLISHED] == [4, 1, 6, 1, 8]
    assert (preset_shape("grok1").devices, preset_shape("grok1").nodes) == (16, 2)
    with pytest.raises(InputError, match="unknown model shape 'mixtrl'; did you mean mixtral"):
        preset_shape("mixtrl")


def test_cache_of_a_sequence() -> None:
    assert preset_shape("mixtral").kv_bytes(1) == 2 * 8 * 128 * 2 * 32
    windowed = dataclasses.replace(preset_shape("mixtral"), window=100, windowed_layers=(0, 1))
    assert windowed.kv_bytes(1000) == 2 * 1024 * 2 * (30 * 1000 + 2 * 100)


def make(**settings) -> LMShape:
    plain = {"name": "m", "layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_heads": 4, "num_kv_heads": 2}
    return LMShape(**{**plain, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k 5 is more than num_experts 4"),
        ({"top_k": 1}, "top_k 1 is more than num_experts 0"),
        ({"num_experts": 4}, "top_k: got 0"),
        ({"num_kv_heads": 3}, "num_heads 4 is no multiple of num_kv_heads 3"),
        ({"layers": 0}, "layers: got 0"),
        ({"hidden_size": -8}, "hidden_size: got -8"),
        ({"hidden_size": 9}, "give head_dim"),
        ({"vocab_size": -1}, "vocab_size: got -1"),
        ({"num_experts": 4, "top_k": 1, "moe_layers": (2,)}, "moe_layers: got"),
        ({"windowed_layers": (0,)}, "window: got 0"),
    ],
)
def test_shapes_that_cannot_be(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        make(**settings)
