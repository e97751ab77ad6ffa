from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerwright.core.errors import CheckpointError, InputError
from layerwright.models.backbone import Backbone, count_macs, load_official_
from layerwright.models.swiftformer import OFFICIAL_RULES, TRANSFORMERS_RULES, SwiftFormer, fuse_for_inference
from layerwright.nn.additive_attention import EfficientAdditiveAttention
from layerwright.nn.drop_path import DropPath
from layerwright.nn.swiftformer_blocks import ConvEncoder, SwiftFormerEncoder


def _unsettle_(model: nn.Module, seed: int = 0) -> None:
    """Scales near 1 and norms with statistics, so that every branch counts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "layer_scale" in name or name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=draw))


@pytest.mark.parametrize(
    ("name", "two", "one", "macs"),
    [
        ("xs", 3_475_360, 3_254_360, 0.602),
        ("s", 6_092_128, 5_867_128, 0.985),
        ("l1", 12_057_920, 11_672_920, 1.596),
        ("l3", 28_494_736, 27_981_736, 4.008),
    ],
)
def test_published_sizes(name: str, two: int, one: int, macs: float) -> None:
    with torch.device("meta"):
        models = [SwiftFormer.from_config(name, distillation=both).eval() for both in (True, False)]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [two, one]
    assert isinstance(models[0], Backbone)
    assert count_macs(models[0]) / 1e9 == pytest.approx(macs, rel=5e-3)


def test_attention_ends_every_stage_and_rates_grow_in_encoders_alone() -> None:
    model = SwiftFormer.from_config("xs", drop_path_rate=0.15)
    stages = [part for place, part in enumerate(model.network) if place % 2 == 0]
    for stage, depth in zip(stages, (3, 3, 6, 4), strict=True):
        assert [type(block) for block in stage.children()] == [ConvEncoder] * (depth - 1) + [SwiftFormerEncoder]
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.15 * number / 15 for number in (2, 5, 11, 15)])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None and (module.bias == 0).all() and module.weight.std() < 0.03
    scales = [tensor for name, tensor in model.state_dict().items() if "layer_scale_" in name]
    assert len(scales) == 8 and all(torch.equal(scale, torch.full_like(scale, 1e-5)) for scale in scales)


def test_outputs_and_any_size() -> None:
    model = SwiftFormer.from_config("test")
    images = torch.randn(2, 3, 64, 96)
    both = model(images)
    assert isinstance(both, tuple) and [logits.shape for logits in both] == [(2, 10)] * 2
    model.eval()
    maps = model.forward_features(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (24, 8, 12), (32, 4, 6), (48, 2, 3)]
    pooled = model.norm(maps[-1]).mean((2, 3))
    expected = (model.head.head(pooled) + model.head.dist_head(pooled)) / 2  # type: ignore[operator]
    torch.testing.assert_close(model(images), expected)
    assert model(torch.randn(1, 3, 37, 53)).shape == (1, 10)
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    dense = SwiftFormer.from_config("test", features_only=True)
    given = dense(images)
    assert [m.shape[1] for m in given] == list(dense.feature_channels)
    assert all(m.mean((0, 2, 3)).abs().max() < 1e-5 for m in given), "batch norm behind each stage"
    assert not hasattr(dense, "head")


@torch.no_grad()
def test_transformers_computes_the_same_where_queries_are_added() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwiftFormerConfig(
        depths=[2, 1, 2, 1], embed_dims=[16, 24, 32, 48], num_labels=7, drop_path_rate=0.1
    )
    theirs = transformers.SwiftFormerForImageClassification(config).eval()
    _unsettle_(theirs)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    logits = {}
    for weights in ("ones", "l2"):
        ours = SwiftFormer((16, 24, 32, 48), (2, 1, 2, 1), 7, query_weights=weights).eval()  # type: ignore[arg-type]
        load_official_(ours, theirs.state_dict(), TRANSFORMERS_RULES)
        logits[weights] = ours(images)
    expected = theirs(images).logits
    torch.testing.assert_close(logits["ones"], expected, atol=1e-4, rtol=1e-4)
    # Its softmax over an axis of one gives ones where the paper's code divides by the length over the tokens.
    assert (logits["l2"] - expected).abs().max() > 1e-3


def _official_shapes(widths: tuple[int, ...], depths: tuple[int, ...], classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' checkpoints, written from their model file."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    def local(name: str, width: int, hidden: int) -> None:
        layer(f"{name}.dwconv", width, 1, 3, 3)
        norm(f"{name}.norm", width)
        layer(f"{name}.pwconv1", hidden, width, 1, 1)
        layer(f"{name}.pwconv2", width, hidden, 1, 1)
        shapes[f"{name}.layer_scale"] = (width, 1, 1)

    for place, inputs, width in ((0, 3, widths[0] // 2), (3, widths[0] // 2, widths[0])):
        layer(f"patch_embed.{place}", width, inputs, 3, 3)
        norm(f"patch_embed.{place + 1}", width)
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            layer(f"network.{2 * stage - 1}.proj", width, widths[stage - 1], 3, 3)
            norm(f"network.{2 * stage - 1}.norm", width)
        for place in range(depth - 1):
            local(f"network.{2 * stage}.{place}", width, 4 * width)
        last = f"network.{2 * stage}.{depth - 1}"
        local(f"{last}.local_representation", width, width)
        shapes[f"{last}.attn.w_g"] = (width, 1)
        for name in ("to_query", "to_key", "Proj", "final"):
            layer(f"{last}.attn.{name}", width, width)
        norm(f"{last}.linear.norm1", width)
        layer(f"{last}.linear.fc1", 4 * width, width, 1, 1)
        layer(f"{last}.linear.fc2", width, 4 * width, 1, 1)
        shapes[f"{last}.layer_scale_1"] = shapes[f"{last}.layer_scale_2"] = (width, 1, 1)
    norm("norm", widths[-1])
    layer("head", classes, widths[-1])
    layer("dist_head", classes, widths[-1])
    return shapes


def test_official_names_translate_completely() -> None:
    shapes = _official_shapes((48, 56, 112, 220), (3, 3, 6, 4), 1000)
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    model = SwiftFormer.from_config("xs")
    load_official_(model, state, OFFICIAL_RULES)
    block: Any = model.network[4][5]  # type: ignore[index]
    assert torch.equal(block.attn.proj.weight, state["network.4.5.attn.Proj.weight"])
    assert torch.equal(block.layer_scale_2.weight, state["network.4.5.layer_scale_2"])
    assert torch.equal(model.get_parameter("head.dist_head.weight"), state["dist_head.weight"])
    assert torch.equal(model.get_parameter("network.1.0.weight"), state["network.1.proj.weight"])
    with pytest.raises(CheckpointError, match="another shape"):
        load_official_(SwiftFormer.from_config("xs", num_classes=10), state, OFFICIAL_RULES)


@pytest.mark.parametrize("settings", [{}, {"distillation": False}, {"features_only": True}])
def test_fused_networks_answer_the_same_without_norms(settings: dict[str, Any]) -> None:
    model = SwiftFormer.from_config("test", **settings)
    _unsettle_(model)
    images = torch.randn(2, 3, 64, 64)
    fused = fuse_for_inference(model)
    assert model.training and not fused.training
    norms = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms == ([f"norms.{i}" for i in range(4)] if settings.get("features_only") else [])
    assert not any("layer_scale" in name for name, _ in fused.named_parameters())
    ours, theirs = ([m(images)].pop() for m in (fused, model.eval()))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    assert (ours[0] - SwiftFormer.from_config("test", **settings).eval()(images)[0]).abs().max() > 1e-3
    with pytest.raises(InputError, match="after fusion"):
        fuse_for_inference(model, tolerance=0)


@torch.no_grad()
def test_compiles_whole_runs_in_bfloat16_and_learns_distilled() -> None:
    model, images = SwiftFormer((8, 16), (2, 1), 3).eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), model(images))
    assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16
    names = SwiftFormer.from_config("test").no_weight_decay()
    assert "network.0.1.attn.w_g" in names and "network.0.0.layer_scale.weight" in names and len(names) == 4 + 4 * 4
    assert sum(isinstance(m, EfficientAdditiveAttention) for m in model.modules()) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwiftFormer((16, 24), (2, 2, 2)), "widths, depths"),
        (lambda: SwiftFormer((16, 24), (2, 0)), "widths, depths"),
        (lambda: SwiftFormer((16, 24), (2, 1), vit_num=2), "vit_num"),
        (lambda: SwiftFormer.from_config("xl"), "expected one of xs"),
        (lambda: SwiftFormer.from_config("test")(torch.zeros(1, 3, 32, 32)), "batch norms"),
        (lambda: SwiftFormer.from_config("test")(torch.zeros(1, 1, 32, 32)), "3 channels"),
        (lambda: SwiftFormer.from_config("test", features_only=True).reset_classifier(2), "no classifier"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
