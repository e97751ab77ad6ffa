from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.explain.receptive_field import receptive_field
from layerwright.models.backbone import Backbone, count_macs, load_official_
from layerwright.models.cswin import OFFICIAL_RULES, CSWinTransformer
from layerwright.nn.cross_shaped_window import CrossShapedWindowAttention
from layerwright.nn.drop_path import DropPath


@pytest.mark.parametrize(
    ("name", "size", "parameters", "macs"),
    [
        ("tiny", 224, 22_320_552, 4.324),
        ("small", 224, 34_643_304, 6.801),
        ("base", 224, 77_382_184, 14.955),
        ("base_384", 384, 77_382_184, 46.964),
        ("large", 224, 173_262_664, 33.130),
        ("large_384", 384, 173_262_664, 101.882),
    ],
)
def test_published_sizes(name: str, size: int, parameters: int, macs: float) -> None:
    with torch.device("meta"):
        model = CSWinTransformer.from_config(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert isinstance(model, Backbone)
    assert count_macs(model, size) / 1e9 == pytest.approx(macs, rel=5e-3)


def test_stripes_widen_and_the_last_stage_sees_all() -> None:
    with torch.device("meta"):
        model = CSWinTransformer.from_config("tiny", drop_path_rate=0.2)
    layers = [[block.attn for block in stage] for stage in model.stages]  # type: ignore[union-attr]
    assert [len(stage) for stage in layers] == [1, 2, 21, 1]
    for stage, stripe, heads in zip(layers, (1, 2, 7, 7), (2, 4, 8, 16), strict=True):
        for layer in stage:
            assert isinstance(layer, CrossShapedWindowAttention)
            assert (layer.stripe_width, layer.num_heads) == (stripe, heads)
            assert layer.full_window == (stage is layers[-1]) and len(layer.lepe) == 2 - layer.full_window
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.2 * number / 24 for number in range(25)])
    assert all(module.eps == 1e-5 for module in model.modules() if isinstance(module, nn.LayerNorm))


def test_first_weights() -> None:
    model = CSWinTransformer.from_config("test")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all() and 0.01 < module.weight.std() < 0.03
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None and module.bias.abs().max() > 0, "convolutions start as PyTorch's"
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert model.no_weight_decay() == set()


@torch.no_grad()
def test_outputs_and_any_size() -> None:
    torch.manual_seed(0)
    model = CSWinTransformer.from_config("test").eval()
    images = torch.randn(2, 3, 64, 96)
    maps = model.forward_features(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    assert [m.shape[1] for m in maps] == list(model.feature_channels) and model.num_features == 64
    pooled = model.norm(maps[-1].flatten(2).mT).mean(1)
    torch.testing.assert_close(model(images), model.head.fc(pooled))
    for size in ((32, 32), (37, 53), (131, 70)):
        found = model.forward_features(torch.randn(1, 3, *size))
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)
        assert tuple(found[0].shape[2:]) == tuple((side + 1) // 4 for side in size)
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    dense = CSWinTransformer.from_config("test", features_only=True)
    given = dense(images)
    assert [m.shape for m in given] == [m.shape for m in maps]
    assert all(m.mean(1).abs().max() < 1e-5 for m in given), "layer norm behind each stage"
    assert not hasattr(dense, "head")


def test_pictures_of_a_batch_do_not_mix_and_all_pixels_count() -> None:
    torch.manual_seed(0)
    model = CSWinTransformer.from_config("test").eval()
    images = torch.randn(3, 3, 75, 53)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-5, rtol=1e-4)

    class Coarsest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model.forward_features(x)[-1]

    field = receptive_field(Coarsest(), images[:1], (0, 0))
    # The last row and column are beyond the strided 7 x 7 kernels of the stem.
    used = 4 * (76 // 4 - 1) - 2 + 7, 4 * (54 // 4 - 1) - 2 + 7
    assert (field[: used[0], : used[1]] > 0).all()


@torch.no_grad()
def test_masked_padding_changes_sizes_that_stripes_do_not_tile_alone() -> None:
    torch.manual_seed(0)
    masked, loose = (CSWinTransformer.from_config("test", mask_padding=mask).eval() for mask in (True, False))
    loose.load_state_dict(masked.state_dict())
    for model in (masked, loose):
        for module in model.modules():
            if isinstance(module, CrossShapedWindowAttention):
                module.proj.weight.normal_(generator=torch.Generator().manual_seed(1))
    tiled, ragged = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(masked(tiled), loose(tiled))
    third = [model.forward_features(ragged)[2] for model in (masked, loose)]
    assert (third[0] - third[1]).abs().max() > 1e-3


def _official_shapes(
    width: int, depths: tuple[int, ...], norms: tuple[str, ...], classes: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints, written from their model files."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    layer("stage1_conv_embed.0", width, 3, 7, 7)
    layer("stage1_conv_embed.2", width)
    for stage, depth in enumerate(depths, 1):
        if stage > 1:
            layer(f"merge{stage - 1}.conv", width, width // 2, 3, 3)
            layer(f"merge{stage - 1}.norm", width)
        for block in range(depth):
            name, branches = f"stage{stage}.{block}", 1 if stage == 4 else 2
            layer(f"{name}.qkv", 3 * width, width)
            layer(f"{name}.proj", width, width)
            layer(f"{name}.norm1", width)
            layer(f"{name}.norm2", width)
            layer(f"{name}.mlp.fc1", 4 * width, width)
            layer(f"{name}.mlp.fc2", width, 4 * width)
            for branch in range(branches):
                layer(f"{name}.attns.{branch}.get_v", width // branches, 1, 3, 3)
        if len(norms) == 4:
            layer(norms[stage - 1], width)
        width *= 2
    if len(norms) == 1:
        layer(norms[0], width // 2)
    if classes:
        layer("head", classes, width // 2)
    return shapes


@pytest.mark.parametrize("dense", [False, True])
def test_official_names_translate_completely(dense: bool) -> None:
    norms = ("norm1", "norm2", "norm3", "norm4") if dense else ("norm",)
    shapes = _official_shapes(8, (1, 1, 2, 1), norms, 0 if dense else 10)
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    model = CSWinTransformer.from_config("test", features_only=dense)
    load_official_(model, state, OFFICIAL_RULES)
    own = model.state_dict()
    for ours, theirs in (
        ("embeddings.0.norm.weight", "stage1_conv_embed.2.weight"),
        ("embeddings.3.conv.bias", "merge3.conv.bias"),
        ("stages.2.1.attn.qkv.weight", "stage3.1.qkv.weight"),
        ("stages.1.0.attn.lepe.1.conv.weight", "stage2.0.attns.1.get_v.weight"),
        ("stages.0.0.mlp.2.weight", "stage1.0.mlp.fc2.weight"),
        ("stages.3.0.norm1.weight", "stage4.0.norm1.weight"),
        ("norms.1.bias", "norm2.bias") if dense else ("head.fc.weight", "head.weight"),
    ):
        assert torch.equal(own[ours], state[theirs]), ours
    with pytest.raises(CheckpointError, match=r"missing|another shape"):
        load_official_(CSWinTransformer.from_config("test", num_classes=4), state, OFFICIAL_RULES)


@torch.no_grad()
def test_compiles_whole_and_runs_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, images = CSWinTransformer(8, (1, 1, 1, 1), (2, 2, 2, 2), num_classes=3).eval(), torch.randn(2, 3, 40, 32)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(images), expected)
    half = model.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CSWinTransformer(16, (1, 2, 1), (2, 2, 2, 2)), "depths: got"),
        (lambda: CSWinTransformer(16, (1, 2, 1, 0), (2, 2, 2, 2)), "depths: got"),
        (lambda: CSWinTransformer(16, (1, 1, 1, 1), (2, 2, 2)), "num_heads: got"),
        (lambda: CSWinTransformer(16, (1, 1, 1, 1), (1, 2, 4, 8)), "num_heads: got 1"),
        (lambda: CSWinTransformer(16, (1, 1, 1, 1), (2, 2, 2, 2), (1, 2, 0, 7)), "stripe_widths: got"),
        (lambda: CSWinTransformer.from_config("huge"), "expected one of tiny"),
        (lambda: CSWinTransformer.from_config("test")(torch.zeros(1, 3, 31, 64)), "at least 32"),
        (lambda: CSWinTransformer.from_config("test")(torch.zeros(1, 1, 32, 32)), "3 channels"),
        (lambda: CSWinTransformer.from_config("test", features_only=True).reset_classifier(2), "no classifier"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
    with pytest.raises(TypeError, match="uint8"):
        CSWinTransformer.from_config("test")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
