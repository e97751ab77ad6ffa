"""Drop-in layers: plain `torch.nn.Module` that hold treated weights in fewer bytes.

- `QuantLinear`, `QuantConv`, `QuantEmbedding`: packed integers of 2 to 8 bits.
- `SparseLinear`, `SparseConv`: a bit mask and the kept weights.
- `LowRankLinear`, `LowRankConv`: two thin factors.
- `PackedStack`, `SparseStack`, `LowRankStack`: experts that a model keeps in one three-dimensional parameter.
- `MixedRowLinear`: some output rows in 8 bits, the others in 4, multiplied with 8-bit activations (MixLLM).
- `W4A8Linear`: 4-bit weights times 8-bit activations in integers (FPTQ).
- `FactorizedConv`: a convolution as a chain of smaller ones (Mixed-TD).
- `ActivationQuantizer`, `InputQuantizer`, `AttentionProducts`: rounded activations, beside the layer that reads them.
- `LoRAMixture`: low-rank experts beside a linear layer, chosen by token (AdaMoLE).
- `Stored`: a treated weight as tensors, from which they are made.
- `replace_`, `structure_of`, `rebuild_`, `module_from_spec`: put them into a model, list them, build them again.
- `MultiExit`, `ExitHead`: an encoder that classifies after each of its blocks (COST-EFF).
- `FactorizedEmbedding`: a table of low rank.
- `slice_linear`: parts of a linear layer as views.
- `NormScale`, `ResidualBlock`: norms scaled by depth, and where norms stand (LayerNorm Scaling).
- `ElasticLinear`, `ElasticFFN`, `ElasticStack`: layers that can run narrower or shorter; `MultiHeadSSM`: state spaces; `transducer_loss` (TODM).
- `AdaptiveComputationModule`: learners that a gate adds up, token by token (ACM).
- `PEER`, `ProductKeyRouter`: up to a million one-neuron experts, retrieved exactly by product keys.
- `WideAttention`: heads of a width of their own, however many; six kinds of attention.
- `NGramHashEmbedding`, `ngram_signatures`: token vectors computed from spelling, no table; `vocabulary_of` a tokenizer.
- `OneHotEmbedding`, `OneHotHead`, `TokenDropout`: bytes without embedding matrices; dropout of whole tokens.
- `AllAttention`, `PersistentMemory`, `AdaptiveSpan`: learned keys and values beside the context, under one softmax.
- `MemoryAttention`, `KVMemory`, `cross_batch_attention`: attention to a store of earlier keys and values (Focused Transformer).
- `DropPath`, `ChannelNorm`, `SqueezeExcite`, `GlobalAvgHead`, `DistilledHead`, `CosineHead`: parts of vision networks; `p_norm_pool` (All-CNN).
- `SequenceCore`: an LSTM, GRU or causal transformer behind one step interface (SADPGAN).
- `ConditionalGradientReversal`, `SelfInterestedClassifier`, `gradient_scale`: gradients with a factor for each sample (TDASS).
- `random_mask`, `RandomMask`, `keep_tokens`, `restore_tokens`, `mask_of`: tokens left out at random, and put back in order (Bamboo).
- `EBVHead`, `generate_ebv`, `welch_bound`, `cached_ebv`: classes as fixed, nearly orthogonal vectors (EBV).
- `QuantumLayer`, `Circuit`, `named_circuit`, `meyer_wallach`: small quantum circuits as layers, simulated in batches (hybrid QCNN).
- `EBVHead`, `generate_ebv`, `welch_bound`, `cached_ebv`: classes as fixed, nearly orthogonal vectors (EBV).
- `QuantumLayer`, `Circuit`, `named_circuit`, `meyer_wallach`: small quantum circuits as layers, simulated in batches (hybrid QCNN).
- `LinearBottleneck`: an inverted bottleneck with a partial shortcut (ReXNet).
- `token_significance`, `inverse_transform_sample`: what tokens count, and which are kept (ATS).
- `EBVHead`, `generate_ebv`, `welch_bound`, `cached_ebv`: classes as fixed, nearly orthogonal vectors (EBV).
- `QuantumLayer`, `Circuit`, `named_circuit`, `meyer_wallach`: small quantum circuits as layers, simulated in batches (hybrid QCNN).
- `PaddedInvertibleConv2d`, `FInCConv`: k x k convolutions of determinant 1, inverted by anti-diagonals; `ActNorm2d`, `AffineCoupling` and the like: layers of a flow (FInC Flow).
- `EfficientAdditiveAttention`, `ConvEncoder`, `SwiftFormerEncoder`: global context at a cost linear in the tokens (SwiftFormer).
- `EBVHead`, `generate_ebv`, `welch_bound`, `cached_ebv`: classes as fixed, nearly orthogonal vectors (EBV).
- `QuantumLayer`, `Circuit`, `named_circuit`, `meyer_wallach`: small quantum circuits as layers, simulated in batches (hybrid QCNN).
- `PKLayer`, `ShallowMixer`, `SparseWeightMLP`, `MixerBlock`: one small matrix for many blocks of features, between permutations (PK mixer).
- `CrossShapedWindowAttention`, `LePE`, `CSWinBlock`: attention in vertical and horizontal stripes side by side.
- `LearnedAggregation`, `ClassAttentionHead`: pooling by attention; `PatchConvBlock`: the block of PatchConvNet.
- `AdaptiveTokenSampler`, `ATSBlock`: attention and block that hand on the tokens that count; `TokenSampling`: how they choose.
- `SpiralFC`, `SpiralMixing`, `SpiralBlock`: a linear layer that reads every channel at its own place on a spiral.
- `RelPosPatchAttention`, `conv_to_attention`: attention over patches that is a given convolution; `to_patches`, `from_patches`, `PatchConv`.
- `CHM4d`, `CHM6d`, `CenterPivotConv4d`: votes among the matches of two maps; `chm_groups`: which kernel entries are one weight.
- `correlation_4d`, `correlation_6d`, `interpolate_4d`, `mutual_nn_filter`: matches of two maps; `GradientHistograms`: features without training.
"""

from __future__ import annotations

from layerwright.nn.activation import ActivationQuantizer, InputQuantizer
from layerwright.nn.adaptive import AdaptiveComputationModule
from layerwright.nn.adaptive_span import AdaptiveSpan
from layerwright.nn.adaptive_token_attention import AdaptiveTokenSampler, ATSBlock, TokenSampling
from layerwright.nn.additive_attention import EfficientAdditiveAttention
from layerwright.nn.all_attention import AllAttention, PersistentMemory
from layerwright.nn.attention_products import AttentionProducts
from layerwright.nn.channel_norm import ChannelNorm
from layerwright.nn.classifier_heads import CosineHead, DistilledHead, GlobalAvgHead
from layerwright.nn.conv_as_attention import conv_to_attention, patch_conv_blocks
from layerwright.nn.correlation import correlation_4d, correlation_6d, interpolate_4d, mutual_nn_filter
from layerwright.nn.cross_batch import cross_batch_attention
from layerwright.nn.cross_shaped_window import CrossShapedWindowAttention, LePE, window_attention
from layerwright.nn.cswin_block import CSWinBlock
from layerwright.nn.drop_path import DropPath
from layerwright.nn.ebv_head import EBVHead, ebv_logits, ebv_loss
from layerwright.nn.elastic import ElasticFFN, ElasticLinear, ElasticStack
from layerwright.nn.encoder_exits import MultiExit
from layerwright.nn.equiangular import EBVResult, generate_ebv, measure_cosines, pair_hinge, welch_bound
from layerwright.nn.equiangular_cache import cached_ebv
from layerwright.nn.exit_head import ExitHead
from layerwright.nn.experts import LowRankStack, PackedStack, SparseStack, replace_parameter_
from layerwright.nn.factorized import FactorizedConv
from layerwright.nn.factorized_embedding import FactorizedEmbedding
from layerwright.nn.flow_layers import (
    ActNorm2d,
    AffineCoupling,
    InvertibleConv1x1,
    NotInitialisedError,
    SplitPrior,
    Squeeze2d,
)
from layerwright.nn.gradient_histograms import GradientHistograms
from layerwright.nn.gradient_scale import ConditionalGradientReversal, SelfInterestedClassifier, gradient_scale
from layerwright.nn.hough_groups import chm_groups
from layerwright.nn.hough_matching import CenterPivotConv4d, CHM4d, CHM6d
from layerwright.nn.invertible_conv import FInCConv, PaddedInvertibleConv2d, ResidualError
from layerwright.nn.kv_memory import KVMemory
from layerwright.nn.learned_aggregation import ClassAttentionHead, LearnedAggregation
from layerwright.nn.linear_bottleneck import LinearBottleneck, conv_norm
from layerwright.nn.lora_experts import LoRAExperts
from layerwright.nn.lora_mixture import ExpertUsage, LoRAMixture
from layerwright.nn.low_rank import LowRankConv, LowRankLinear
from layerwright.nn.memory_attention import MemoryAttention
from layerwright.nn.mixed_rows import MixedRowLinear
from layerwright.nn.mixer_block import MixerBlock
from layerwright.nn.ngram_embedding import NGramHashEmbedding, ngram_signatures, vocabulary_of
from layerwright.nn.norm_scale import NormScale
from layerwright.nn.one_hot import OneHotEmbedding, OneHotHead, TokenDropout
from layerwright.nn.p_norm_pool import p_norm_pool
from layerwright.nn.patch_conv_block import PatchConvBlock
from layerwright.nn.patches import PatchConv, from_patches, to_patches
from layerwright.nn.peer import PEER
from layerwright.nn.pk_layer import PKLayer, ShallowMixer, SparseWeightMLP
from layerwright.nn.product_keys import ProductKeyRouter
from layerwright.nn.quantized import QuantConv, QuantEmbedding, QuantLinear
from layerwright.nn.quantum_circuit import (
    CIRCUITS,
    Circuit,
    bell_circuit,
    named_circuit,
    real_amplitudes_circuit,
    ry_circuit,
)
from layerwright.nn.quantum_gates import (
    apply_cx,
    apply_h,
    apply_ry,
    expval_z,
    ground_state,
    meyer_wallach,
    probabilities,
)
from layerwright.nn.quantum_layer import QuantumLayer
from layerwright.nn.quantum_state import circuit_state
from layerwright.nn.random_mask import RandomMask, keep_tokens, mask_of, random_mask, restore_tokens
from layerwright.nn.rel_pos_patch_attention import RelPosPatchAttention
from layerwright.nn.replace import module_from_spec, rebuild_, replace_, structure_of
from layerwright.nn.residual_block import ResidualBlock
from layerwright.nn.scaled_gradient import scale_gradient
from layerwright.nn.sequence_core import SequenceCore
from layerwright.nn.slices import slice_linear
from layerwright.nn.sparse import SparseConv, SparseLinear
from layerwright.nn.spiral import SpiralBlock, SpiralFC, SpiralMixing, spiral_offsets
from layerwright.nn.squeeze_excite import SqueezeExcite
from layerwright.nn.state_space import DiagonalSSM, MultiHeadSSM
from layerwright.nn.stored import Stored
from layerwright.nn.subnet import SubnetConfig, SubnetSpace
from layerwright.nn.swiftformer_blocks import ChannelScale, ConvEncoder, SwiftFormerEncoder
from layerwright.nn.token_sampler import inverse_transform_sample, token_significance
from layerwright.nn.transducer import TransducerJoiner
from layerwright.nn.transducer_loss import transducer_loss
from layerwright.nn.w4a8 import W4A8Linear
from layerwright.nn.wide_attention import WideAttention

__all__ = [
    "CIRCUITS",
    "PEER",
    "ATSBlock",
    "ActNorm2d",
    "ActivationQuantizer",
    "AdaptiveComputationModule",
    "AdaptiveSpan",
    "AdaptiveTokenSampler",
    "AffineCoupling",
    "AllAttention",
    "AttentionProducts",
    "CHM4d",
    "CHM6d",
    "CSWinBlock",
    "CenterPivotConv4d",
    "ChannelNorm",
    "ChannelScale",
    "Circuit",
    "ClassAttentionHead",
    "ConditionalGradientReversal",
    "ConvEncoder",
    "CosineHead",
    "CrossShapedWindowAttention",
    "DiagonalSSM",
    "DistilledHead",
    "DropPath",
    "EBVHead",
    "EBVResult",
    "EfficientAdditiveAttention",
    "ElasticFFN",
    "ElasticLinear",
    "ElasticStack",
    "ExitHead",
    "ExpertUsage",
    "FInCConv",
    "FactorizedConv",
    "FactorizedEmbedding",
    "GlobalAvgHead",
    "GradientHistograms",
    "InputQuantizer",
    "InvertibleConv1x1",
    "KVMemory",
    "LePE",
    "LearnedAggregation",
    "LinearBottleneck",
    "LoRAExperts",
    "LoRAMixture",
    "LowRankConv",
    "LowRankLinear",
    "LowRankStack",
    "MemoryAttention",
    "MixedRowLinear",
    "MixerBlock",
    "MultiExit",
    "MultiHeadSSM",
    "NGramHashEmbedding",
    "NormScale",
    "NotInitialisedError",
    "OneHotEmbedding",
    "OneHotHead",
    "PKLayer",
    "PackedStack",
    "PaddedInvertibleConv2d",
    "PatchConv",
    "PatchConvBlock",
    "PersistentMemory",
    "ProductKeyRouter",
    "QuantConv",
    "QuantEmbedding",
    "QuantLinear",
    "QuantumLayer",
    "RandomMask",
    "RelPosPatchAttention",
    "ResidualBlock",
    "ResidualError",
    "SelfInterestedClassifier",
    "SequenceCore",
    "ShallowMixer",
    "SparseConv",
    "SparseLinear",
    "SparseStack",
    "SparseWeightMLP",
    "SpiralBlock",
    "SpiralFC",
    "SpiralMixing",
    "SplitPrior",
    "Squeeze2d",
    "SqueezeExcite",
    "Stored",
    "SubnetConfig",
    "SubnetSpace",
    "SwiftFormerEncoder",
    "TokenDropout",
    "TokenSampling",
    "TransducerJoiner",
    "W4A8Linear",
    "WideAttention",
    "apply_cx",
    "apply_h",
    "apply_ry",
    "bell_circuit",
    "cached_ebv",
    "chm_groups",
    "circuit_state",
    "conv_norm",
    "conv_to_attention",
    "correlation_4d",
    "correlation_6d",
    "cross_batch_attention",
    "ebv_logits",
    "ebv_loss",
    "expval_z",
    "from_patches",
    "generate_ebv",
    "gradient_scale",
    "ground_state",
    "interpolate_4d",
    "inverse_transform_sample",
    "keep_tokens",
    "mask_of",
    "measure_cosines",
    "meyer_wallach",
    "module_from_spec",
    "mutual_nn_filter",
    "named_circuit",
    "ngram_signatures",
    "p_norm_pool",
    "pair_hinge",
    "patch_conv_blocks",
    "probabilities",
    "random_mask",
    "real_amplitudes_circuit",
    "rebuild_",
    "replace_",
    "replace_parameter_",
    "restore_tokens",
    "ry_circuit",
    "scale_gradient",
    "slice_linear",
    "spiral_offsets",
    "structure_of",
    "to_patches",
    "token_significance",
    "transducer_loss",
    "vocabulary_of",
    "welch_bound",
    "window_attention",
]
