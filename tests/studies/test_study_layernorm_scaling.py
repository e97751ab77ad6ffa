from __future__ import annotations

import torch

from layerwright.nn.residual_block import ResidualBlock
from layerwright.studies.layernorm_scaling import deep_llama, run
from layerwright.treat.layernorm_scaling import find_layernorm_scaling


def test_arms_begin_alike() -> None:
    pre, lns, mix, scaled = (deep_llama(kind, 4, seed=3) for kind in ("pre", "lns", "mix", "lns, scaled init"))
    weight = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(pre.get_parameter(weight), lns.get_parameter(weight))
    assert torch.equal(pre.get_parameter(weight), mix.get_parameter(weight))
    torch.testing.assert_close(scaled.get_parameter(weight), pre.get_parameter(weight) / 8**0.5)
    assert find_layernorm_scaling(pre) is None and find_layernorm_scaling(lns) is not None
    assert [block.form for block in mix.model.layers if isinstance(block, ResidualBlock)] == [
        "post",
        "pre",
        "pre",
        "pre",
    ]


def test_quick_form() -> None:
    evidence = run(quick=True, seeds=1)
    assert [row["arm"] for row in evidence.table] == ["pre", "lns", "mix", "lns, scaled init"]
    assert all(0 < row["bits/byte"] <= 8.1 and not row["failed"] for row in evidence.table)
    assert len({row["parameters"] for row in evidence.table}) == 1
    assert evidence.checks[0].measured < 1
