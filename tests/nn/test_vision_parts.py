from __future__ import annotations

import pytest
import torch
from torch import nn

from layerwright.core.errors import InputError
from layerwright.nn.channel_norm import ChannelNorm
from layerwright.nn.classifier_heads import CosineHead, DistilledHead, GlobalAvgHead
from layerwright.nn.drop_path import DropPath, drop_path_rates
from layerwright.nn.squeeze_excite import SqueezeExcite


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    out = layer(x)
    per_sample = out.flatten(1)
    assert ((per_sample == 0).all(1) | torch.isclose(per_sample, torch.tensor(4 / 3)).all(1)).all()
    assert float(out.mean()) == pytest.approx(1, abs=0.05)
    assert layer.eval()(x) is x and DropPath(0.0)(x) is x
    assert "0.25" in repr(layer)
    assert drop_path_rates(0.2, 3) == [0.0, 0.1, 0.2] and drop_path_rates(0.2, 1) == [0.0]
    with pytest.raises(InputError, match="drop_path"):
        DropPath(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_norm_normalises_each_position(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = ChannelNorm(6).to(dtype), torch.randn(2, 6, 3, 5).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (6,), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(norm(x), expected)


def test_squeeze_excite_is_its_formula() -> None:
    torch.manual_seed(0)
    for batch_norm in (False, True):
        layer, x = SqueezeExcite(8, 2, batch_norm).eval(), torch.randn(3, 8, 4, 5)
        mean = x.mean((2, 3))
        inner = mean @ layer.reduce.weight[:, :, 0, 0].T + layer.reduce.bias
        if batch_norm:
            inner = inner / (1 + layer.norm.eps) ** 0.5
        weights = torch.sigmoid(inner.relu() @ layer.expand.weight[:, :, 0, 0].T + layer.expand.bias)
        torch.testing.assert_close(layer(x), x * weights[:, :, None, None])
    with pytest.raises(InputError, match="reduced"):
        SqueezeExcite(8, 0)


def test_heads_pool_maps_and_take_pooled_features() -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 6, 2, 4)
    pooled = maps.mean((2, 3))
    for head in (GlobalAvgHead(6, 5), CosineHead(6, 5), DistilledHead(6, 5).eval()):
        torch.testing.assert_close(head(maps), head(pooled))
        assert head(maps).shape == (3, 5)
    both = DistilledHead(6, 5)
    own, taught = both(maps)
    torch.testing.assert_close(both.eval()(maps), (own + taught) / 2)
    cosine = CosineHead(6, 5, temperature=0.5)
    torch.testing.assert_close(cosine(pooled), cosine(7 * pooled))
    assert cosine(pooled).abs().max() <= 2
    for bad in (lambda: GlobalAvgHead(6, 0), lambda: DistilledHead(0, 2), lambda: CosineHead(6, 5, temperature=0)):
        with pytest.raises(InputError):
            bad()
