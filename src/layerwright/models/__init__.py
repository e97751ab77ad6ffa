"""Networks assembled from layers, whose shape is a list of words.

- `PlainCNN`: convolutions, pools and fully connected layers in a row.
- `DenseNetBC`: dense blocks with bottlenecks, and compressing transitions.
- `deepen_dense_`, `widen_dense_`, `widen_transitions_`: growth of a `DenseNetBC` that keeps its function.
- `from_spec`: the network of a list of words; `save_network`, `load_network`: with its weights.
- `TinyVLM`: a vision encoder, a projector and a language model that reads images in the place of tokens.
- `RNNT`: a speech transducer with an elastic encoder.
- `AspectEncoder`, `llama_family`: encoders of one number of heads, deep or wide; `aspect_report`, `aspect_flops`: what they cost.
- `ByteSeq2Seq`: an encoder-decoder over bytes, with embeddings or without; greedy and beam search.
- `AllAttentionLM`: a language model of all-attention layers alone.
- `AllCNN`: convolutions alone, down to the classifier.
- `Backbone`: what all vision networks offer; `count_macs`; `load_official_`: weights of the authors' checkpoints.
- `TextGenerator`, `SurpriseDiscriminator`: the two sides of a text GAN, both language models (SADPGAN).
- `Tacotron2`: text and speaker to a mel spectrum; `SpeakerClassifier`: who speaks (TDASS).
- `MaskedAutoencoder`, `ImageEncoder`, `ImageClassifier`: masked image models of any shape; `masked_lm`, `bert_mask`: BERT of any shape (Bamboo).
- `HybridQCNN`, `LandUseCNN`, `HierarchicalClassifier`: a quantum layer between convolutions and classifier.
- `ReXNet`, `ReXNetLite`, `BottleneckNet`: inverted bottlenecks whose widths grow by equal steps.
- `FInCFlow`: a Glow-like flow with invertible k x k convolutions.
- `SwiftFormer`: additive attention in every stage; `fuse_for_inference` folds norms and scales.
- `MLPMixer`: patches mixed along tokens and channels.
- `CSWinTransformer`: cross-shaped windows whose stripes widen with depth.
- `PatchConvNet`: convolutions at one size and width, gathered by attention.
- `SpiralMLP`: mixing of positions along a spiral; `load_spiralmlp_`: the authors' weights with their offsets.
- `CHMNet`: matches of two pictures by voting; `transfer_keypoints`, `pck`: points carried over, and how many arrive.
"""

from __future__ import annotations

from layerwright.models.all_attention_lm import AllAttentionLM
from layerwright.models.all_cnn import AllCNN
from layerwright.models.aspect_encoder import AspectEncoder, llama_family
from layerwright.models.aspect_report import aspect_flops, aspect_report
from layerwright.models.backbone import Backbone, count_macs, load_official_
from layerwright.models.bottleneck_net import BottleneckNet
from layerwright.models.byte_seq2seq import ByteSeq2Seq
from layerwright.models.chmnet import CHMNet
from layerwright.models.cswin import CSWinTransformer
from layerwright.models.densenet import DenseNetBC, deepen_dense_, widen_dense_, widen_transitions_
from layerwright.models.finc_flow import FInCFlow, FlowStep
from layerwright.models.hybrid_qcnn import HierarchicalClassifier, HybridQCNN, LandUseCNN
from layerwright.models.keypoint_transfer import normalize_points, pck, pixel_points, transfer_keypoints, transfer_loss
from layerwright.models.masked_autoencoder import ImageClassifier, ImageEncoder, MaskedAutoencoder
from layerwright.models.masked_lm import bert_mask, masked_lm, masked_lm_loss
from layerwright.models.mlp_mixer import MLPMixer
from layerwright.models.patchconvnet import PatchConvNet
from layerwright.models.plain_cnn import PlainCNN
from layerwright.models.rexnet import ReXNet, ReXNetLite
from layerwright.models.rnnt import RNNT
from layerwright.models.saved import from_spec, load_network, save_network
from layerwright.models.speaker_classifier import SpeakerClassifier
from layerwright.models.spiralmlp import SpiralMLP, load_spiralmlp_
from layerwright.models.swiftformer import SwiftFormer, fuse_for_inference
from layerwright.models.tacotron2 import Tacotron2, TacotronConfig, TacotronOutput, TacotronSpeech
from layerwright.models.text_gan import SurpriseDiscriminator, TextGenerator
from layerwright.models.tiny_vlm import TinyVLM, image_projector, merge_image_features

__all__ = [
    "RNNT",
    "AllAttentionLM",
    "AllCNN",
    "AspectEncoder",
    "Backbone",
    "BottleneckNet",
    "ByteSeq2Seq",
    "CHMNet",
    "CSWinTransformer",
    "DenseNetBC",
    "FInCFlow",
    "FlowStep",
    "HierarchicalClassifier",
    "HybridQCNN",
    "ImageClassifier",
    "ImageEncoder",
    "LandUseCNN",
    "MLPMixer",
    "MaskedAutoencoder",
    "PatchConvNet",
    "PlainCNN",
    "ReXNet",
    "ReXNetLite",
    "SpeakerClassifier",
    "SpiralMLP",
    "SurpriseDiscriminator",
    "SwiftFormer",
    "Tacotron2",
    "TacotronConfig",
    "TacotronOutput",
    "TacotronSpeech",
    "TextGenerator",
    "TinyVLM",
    "aspect_flops",
    "aspect_report",
    "bert_mask",
    "count_macs",
    "deepen_dense_",
    "from_spec",
    "fuse_for_inference",
    "image_projector",
    "llama_family",
    "load_network",
    "load_official_",
    "load_spiralmlp_",
    "masked_lm",
    "masked_lm_loss",
    "merge_image_features",
    "normalize_points",
    "pck",
    "pixel_points",
    "save_network",
    "transfer_keypoints",
    "transfer_loss",
    "widen_dense_",
    "widen_transitions_",
]
