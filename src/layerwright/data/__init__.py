"""Data: the demo models and their data, the standard library's text, and loading of models by name."""

from layerwright.data.demo_data import demo_data, digits
from layerwright.data.folds import stratified_folds
from layerwright.data.image_folder import image_folder
from layerwright.data.loading import DEMOS, Source, load, locate
from layerwright.data.stdlib import stdlib_text

__all__ = [
    "DEMOS",
    "Source",
    "demo_data",
    "digits",
    "image_folder",
    "load",
    "locate",
    "stdlib_text",
    "stratified_folds",
]
