"""SwiftFormer: convolutions with one additive attention at the end of each of four stages."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwright.core.calibration import evaluating
from layerwright.core.errors import InputError
from layerwright.models.backbone import Rule, check_images, named_config, start_
from layerwright.nn.additive_attention import QueryWeights
from layerwright.nn.classifier_heads import DistilledHead, GlobalAvgHead
from layerwright.nn.drop_path import drop_path_rates
from layerwright.nn.swiftformer_blocks import ConvEncoder, SwiftFormerEncoder

__all__ = ["OFFICIAL_RULES", "TRANSFORMERS_RULES", "SwiftFormer", "fuse_for_inference"]

_CONFIGS: dict[str, dict[str, Any]] = {
    "xs": {"widths": (48, 56, 112, 220), "depths": (3, 3, 6, 4)},
    "s": {"widths": (48, 64, 168, 224), "depths": (3, 3, 9, 6)},
    "l1": {"widths": (48, 96, 192, 384), "depths": (4, 3, 10, 5)},
    "l3": {"widths": (64, 128, 320, 512), "depths": (4, 4, 12, 6)},
    "test": {"widths": (16, 24, 32, 48), "depths": (2, 2, 2, 2), "num_classes": 10},
}
_COMMON_RULES: tuple[Rule, ...] = (
    (r"^(network\.\d+)\.proj\.", r"\1.0."),
    (r"^(network\.\d+)\.norm\.", r"\1.1."),
    (r"\.linear\.norm1\.", ".norm."),
    (r"\.linear\.(fc[12])\.", r".\1."),
    (r"(layer_scale(_[12])?)$", r"\1.weight"),
    (r"^(dist_)?head\.", r"head.\1head."),
)
OFFICIAL_RULES: tuple[Rule, ...] = ((r"\.attn\.Proj\.", ".attn.proj."), *_COMMON_RULES)
"""From the names of the authors' checkpoints, which have two classifiers, to those of `SwiftFormer`."""
TRANSFORMERS_RULES: tuple[Rule, ...] = (
    (r"^swiftformer\.(encoder\.)?", ""),
    (r"^patch_embed\.patch_embedding\.", "patch_embed."),
    (r"\.blocks\.", "."),
    (r"\.depth_wise_conv\.", ".dwconv."),
    (r"\.point_wise_conv", ".pwconv"),
    *_COMMON_RULES,
)
"""From the names of ``SwiftFormerForImageClassification`` of the package transformers."""


class SwiftFormer(nn.Module):
    """A stem of two 3 x 3 convolutions with stride 2, four stages, and a classifier of the mean.

    Stage i has ``depths[i] - vit_num`` `ConvEncoder` and then `vit_num` `SwiftFormerEncoder`. Any height and width.

    Source: Shaker et al., "SwiftFormer" (2023, arXiv 2303.15446). Training there: 300 epochs of AdamW at 2e-3 for batches of
    1024, weight decay 0.025, distillation from RegNetY-16GF.

    Args:
        widths: channels of the four stages.
        depths: blocks of each.
        num_classes: at least 1.
        in_channels: of the pictures.
        vit_num: encoders with attention at the end of each stage, of 0 to ``min(depths)``.
        distillation: two classifiers, whose logits come back both in training mode and as their mean in evaluation.
        mlp_ratio: hidden channels over channels.
        layer_scale: first values of the scales of attention and MLP.
        drop_path_rate: of the last block; it grows linearly, in attention and MLP alone.
        features_only: no classifier; `forward` gives the maps of the four stages, each behind a batch norm.
        query_weights: see `EfficientAdditiveAttention`; ``ones`` for weights that were trained with the package
            transformers.

    Raises:
        InputError: a number outside its range, or widths and depths of different lengths.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        vit_num: int = 1,
        distillation: bool = True,
        mlp_ratio: float = 4,
        layer_scale: float = 1e-5,
        drop_path_rate: float = 0.0,
        features_only: bool = False,
        query_weights: QueryWeights = "l2",
    ) -> None:
        super().__init__()
        if len(widths) != len(depths) or not widths or min((*widths, *depths)) < 1 or widths[0] < 2:
            raise InputError(
                f"widths, depths: got {tuple(widths)} and {tuple(depths)}, expected as many positive numbers"
            )
        if not 0 <= vit_num <= min(depths):
            raise InputError(f"vit_num: got {vit_num}, expected 0 to {min(depths)}, the blocks of the shortest stage")
        self.in_channels, self.features_only = in_channels, features_only
        self.num_features, self.feature_channels = widths[-1], tuple(widths)
        self.feature_strides = tuple(4 * 2**stage for stage in range(len(widths)))
        half = widths[0] // 2
        self.patch_embed = nn.Sequential(*_down(in_channels, half), nn.ReLU(), *_down(half, widths[0]), nn.ReLU())
        rates, network, number = drop_path_rates(drop_path_rate, sum(depths)), list[nn.Module](), 0
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                network.append(nn.Sequential(*_down(widths[stage - 1], width)))
            blocks: list[nn.Module] = []
            for place in range(depth):
                if depth - place <= vit_num:
                    blocks.append(SwiftFormerEncoder(width, mlp_ratio, layer_scale, rates[number], query_weights))
                else:
                    blocks.append(ConvEncoder(width, int(mlp_ratio * width)))
                number += 1
            network.append(nn.Sequential(*blocks))
        self.network = nn.ModuleList(network)
        if features_only:
            self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        else:
            self.norm: nn.Module = nn.BatchNorm2d(widths[-1])
            self.head = (DistilledHead if distillation else GlobalAvgHead)(widths[-1], num_classes)
        start_(self, convolutions=True)

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """A published network: ``xs``, ``s``, ``l1``, ``l3``; or ``test``.

        Raises:
            InputError: no such network.
        """
        return cls(**named_config(name, _CONFIGS, changes))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Maps ``(batch, channels, height, width)`` at strides 4, 8, 16 and 32; normalised with `features_only`.

        Raises:
            TypeError, InputError: see `check_images`; a single picture of one position in training mode.
        """
        check_images(images, self.in_channels)
        stride = self.feature_strides[-1]
        if self.training and images.shape[0] == 1 and max(images.shape[2:]) <= stride:
            raise InputError(
                f"images: got one picture of at most {stride} pixels a side in training mode, from which batch norms have no "
                "statistics; give at least two, a larger one, or call eval()"
            )
        x, maps = self.patch_embed(images), []
        for place, part in enumerate(self.network):
            x = part(x)
            if place % 2 == 0:
                maps.append(self.norms[place // 2](x) if self.features_only else x)
        return maps

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor] | list[Tensor]:
        """Logits ``(batch, num_classes)`` of ``(batch, in_channels, height, width)``.

        Twice in training mode with distillation; the maps of the stages with `features_only`.
        """
        maps = self.forward_features(images)
        if self.features_only:
            return maps
        logits: Tensor | tuple[Tensor, Tensor] = self.head(self.norm(maps[-1]))
        return logits

    def reset_classifier(self, num_classes: int) -> None:
        """Put new classifiers of `num_classes` classes.

        Raises:
            InputError: fewer than one, or `features_only`.
        """
        if self.features_only:
            raise InputError("num_classes: this network has no classifier; build it with features_only=False")
        like = next(self.head.parameters())
        self.head = type(self.head)(self.num_features, num_classes)
        start_(self.head)
        self.head.to(like).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Scales of channels and the vectors that weigh the queries."""
        return {name for name, _ in self.named_parameters() if "layer_scale" in name or name.endswith("w_g")}


def _down(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs)]


@torch.no_grad()
def fuse_for_inference(model: SwiftFormer, tolerance: float = 1e-4) -> SwiftFormer:
    """A copy in evaluation mode whose batch norms and scales are part of the layers beside them.

    Norms behind convolutions and before 1 x 1 convolutions and classifiers, and the scales behind the last product of
    each branch. Norms of `features_only` have nothing behind them and stay.

    Args:
        tolerance: largest difference of outputs allowed, over the largest output, on one picture of random numbers.

    Raises:
        InputError: the outputs differ by more, as with norms in half precision.
    """
    fused = copy.deepcopy(model).eval()
    for module in list(fused.modules()):
        if isinstance(module, nn.Sequential):
            _fold_pairs_(module)
        elif isinstance(module, ConvEncoder):
            _fold_behind_(module.dwconv, module.norm)
            _scale_(module.pwconv2, module.layer_scale)
            module.norm, module.layer_scale = nn.Identity(), nn.Identity()
        elif isinstance(module, SwiftFormerEncoder):
            _fold_before_(module.norm, module.fc1)
            _scale_(module.fc2, module.layer_scale_2)
            module.norm, module.layer_scale_2 = nn.Identity(), nn.Identity()
            if isinstance(last := getattr(module.attn, "final", None), nn.Linear):
                _scale_(last, module.layer_scale_1)
                module.layer_scale_1 = nn.Identity()
    if not fused.features_only:
        for classifier in fused.head.children():
            _fold_before_(fused.norm, classifier)
        fused.norm = nn.Identity()
    like, size = next(model.parameters()), 2 * model.feature_strides[-1]
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(1, model.in_channels, size, size, generator=draw).to(like)
    with evaluating(model):
        before, after = (torch.cat([m.flatten() for m in _outputs(net, images)]) for net in (model, fused))
    apart = float((before - after).abs().max() / before.abs().max().clamp_min(1e-30))
    if not apart <= tolerance:
        raise InputError(
            f"model: outputs differ by {apart:.3g} after fusion, allowed are {tolerance:g}; fuse in float32"
        )
    return fused


def _outputs(model: SwiftFormer, images: Tensor) -> list[Tensor]:
    out = model(images)
    return list(out) if isinstance(out, list | tuple) else [out]


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Factor and shift of a batch norm in evaluation mode, in float64."""
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return factor, norm.bias.double() - norm.running_mean.double() * factor


def _fold_pairs_(layers: nn.Sequential) -> None:
    for place in range(len(layers) - 1):
        if isinstance(layers[place], nn.Conv2d) and isinstance(layers[place + 1], nn.BatchNorm2d):
            _fold_behind_(layers[place], layers[place + 1])
            layers[place + 1] = nn.Identity()


def _fold_behind_(layer: Any, norm: nn.Module) -> None:
    factor, shift = _affine(norm)
    layer.weight.copy_(layer.weight.double() * factor.view(-1, 1, 1, 1))
    layer.bias.copy_(layer.bias.double() * factor + shift)


def _fold_before_(norm: nn.Module, layer: Any) -> None:
    factor, shift = _affine(norm)
    matrix = layer.weight.double().flatten(1)
    layer.bias.copy_(layer.bias.double() + matrix @ shift)
    layer.weight.copy_((matrix * factor).view_as(layer.weight))


def _scale_(layer: Any, scale: Any) -> None:
    factor = scale.weight.flatten()
    layer.weight.mul_(factor.view(-1, *(1,) * (layer.weight.dim() - 1)))
    layer.bias.mul_(factor)
