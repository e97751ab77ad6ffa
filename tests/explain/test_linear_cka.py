from __future__ import annotations

import pytest
import torch

from layerwright.core.errors import InputError
from layerwright.explain.linear_cka import linear_cka


def test_alike_up_to_rotation_and_scale_and_both_ways_agree() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=draw), torch.randn(50, 6, generator=draw)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)
    wide = torch.randn(50, 400, generator=draw)
    centred = wide - wide.mean(0)
    direct = (centred.mT @ (y - y.mean(0))).square().sum() / (
        torch.linalg.norm(centred.mT @ centred) * torch.linalg.norm((y - y.mean(0)).mT @ (y - y.mean(0)))
    )
    assert linear_cka(wide, y) == pytest.approx(float(direct), rel=1e-4)
    assert 0 <= linear_cka(x, y) < 0.5
    for bad in ((x, y[:5]), (x[:1], y[:1]), (x.flatten(), y), (torch.ones(50, 2), y)):
        with pytest.raises(InputError, match="features"):
            linear_cka(*bad)
