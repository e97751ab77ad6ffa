from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.backbone import Backbone, count_macs
from layerwright.models.spiralmlp import SpiralMLP, load_spiralmlp_
from layerwright.nn.spiral import SpiralFC


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("b1", 13_934_152, 1.964),
        ("b2", 24_462_536, 3.572),
        ("b3", 34_367_992, 5.621),
        ("b4", 46_015_176, 8.174),
        ("b5", 68_880_304, 11.248),
    ],
)
def test_published_sizes(name: str, parameters: int, macs: float) -> None:
    with torch.device("meta"):
        model = SpiralMLP.from_config(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert isinstance(model, Backbone)
    assert count_macs(model) / 1e9 == pytest.approx(macs, rel=5e-3)


def test_outputs_and_any_size() -> None:
    torch.manual_seed(0)
    model = SpiralMLP.from_config("test").eval()
    assert sum(p.numel() for p in model.parameters()) < 200_000
    images = torch.randn(2, 3, 64, 96)
    maps = model.forward_features(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (24, 8, 12), (32, 4, 6), (48, 2, 3)]
    pooled = model.norm(maps[-1].permute(0, 2, 3, 1)).mean((1, 2))
    torch.testing.assert_close(model(images), model.head(pooled))
    assert model(torch.randn(1, 3, 37, 53)).shape == (1, 10)
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    for parameter in (model.stages[0][0].mixing.cross.weight, model.head.fc.weight):  # type: ignore[index,union-attr]
        assert 0.01 < float(parameter.detach().std()) < 0.03  # type: ignore[union-attr]


def official(model: SpiralMLP) -> dict[str, Tensor]:
    """Names and shapes as in the authors' checkpoints."""
    names = (
        ("patch_embed.", "patch_embed.proj."), (".norm1.", ".norm_1."), (".norm2.", ".norm_2."),
        (".mixing.cross.offsets", ".attn.fc_cross.offset"), (".mixing.cross.", ".attn.fc_cross."),
        (".mixing.local.", ".attn.fc_self."), (".mixing.reweight.0.", ".attn.reweight.fc1."),
        (".mixing.reweight.2.", ".attn.reweight.fc2."), (".mixing.proj.", ".attn.proj."), (".mlp.0.", ".mlp.fc1."),
        (".mlp.2.", ".mlp.fc2."), ("head.fc.", "classifier_head."),
    )  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        if name.startswith("downsamples."):
            stage, _, rest = name.removeprefix("downsamples.").partition(".")
            name = f"stages.{stage}.{len(model.stages[int(stage)])}.proj.{rest}"  # type: ignore[arg-type]
        if name.endswith("fc_cross.weight"):
            tensor = tensor[:, :, None, None]
        state[name] = tensor.float().reshape(1, -1, 1, 1) if name.endswith("offset") else tensor
    return state


def test_official_checkpoints_keep_their_offsets() -> None:
    torch.manual_seed(1)
    theirs, ours = (SpiralMLP.from_config("test").eval() for _ in range(2))
    for layer in theirs.modules():
        if isinstance(layer, SpiralFC):
            layer.offsets[len(layer.offsets) // 2 :] = torch.randint(-7, 8, (len(layer.offsets) // 2, 2))
    state = official(theirs)
    assert "stages.0.0.attn.fc_cross.offset" in state and "stages.0.1.proj.weight" in state
    load_spiralmlp_(ours, state)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))
    for value in (8.0, 0.5, float("nan")):
        state["stages.0.0.attn.fc_cross.offset"] = torch.full((1, 32, 1, 1), value)
        with pytest.raises(CheckpointError, match=r"stages.0.0.mixing.cross.offsets"):
            load_spiralmlp_(ours, state)
    assert torch.equal(ours(images), theirs(images)), "nothing was loaded"


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="b1, b2"):
        SpiralMLP.from_config("b9")
    with pytest.raises(InputError, match="widths, depths"):
        SpiralMLP((8, 16), (1,))
    model = SpiralMLP.from_config("test").eval()
    with pytest.raises(TypeError, match="images"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    for shape in ((1, 4, 64, 64), (1, 3, 20, 64), (0, 3, 64, 64)):
        with pytest.raises(InputError, match="images"):
            model(torch.zeros(shape))
    with pytest.raises(InputError, match="num_classes"):
        model.reset_classifier(0)
