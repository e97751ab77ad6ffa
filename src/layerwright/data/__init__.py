"""Data: the demo models and their data, the standard library's text, and loading of models by name."""

from layerwright.data.byte_codec import ByteCodec
from layerwright.data.demo_data import demo_data, digits
from layerwright.data.folds import stratified_folds
from layerwright.data.image_folder import image_folder
from layerwright.data.loading import DEMOS, Source, load, locate
from layerwright.data.speech import generated_speech, small_speech
from layerwright.data.stdlib import stdlib_text

__all__ = [
    "DEMOS",
    "ByteCodec",
    "Source",
    "demo_data",
    "digits",
    "generated_speech",
    "image_folder",
    "load",
    "locate",
    "small_speech",
    "stdlib_text",
    "stratified_folds",
]
