"""Data: the demo models and their data, the standard library's text, and loading of models by name.

- `warp_pairs`: pairs of pictures under a known map, with points and where they go.
"""

from layerwright.data.byte_codec import ByteCodec
from layerwright.data.byte_windows import byte_parts, even_windows, random_windows
from layerwright.data.demo_data import demo_data, digits
from layerwright.data.espeak import EspeakVoice, espeak_corpus
from layerwright.data.folds import stratified_folds
from layerwright.data.grammar import SentenceGrammar
from layerwright.data.image_folder import image_folder
from layerwright.data.land_use import LAND_GROUPS, LAND_USE, land_use
from layerwright.data.library_groups import library_pieces
from layerwright.data.loading import DEMOS, Source, load, locate
from layerwright.data.mel import MelSettings, griffin_lim, mel_spectrogram, mel_to_magnitude
from layerwright.data.shape_grey import grey_scenes
from layerwright.data.shape_scenes import Scenes, needle_scenes, shape_scenes, single_scenes
from layerwright.data.source_filter import SourceFilterVoice, source_filter_corpus
from layerwright.data.speech import generated_speech, small_speech
from layerwright.data.spoken import SpeechBatch, Utterance, speech_batches, text_ids
from layerwright.data.stdlib import stdlib_text
from layerwright.data.warp_pairs import Warp, WarpPairs, warp_pairs, warp_sources
from layerwright.data.word_vocabulary import WordVocabulary, split_sentences

__all__ = [
    "DEMOS",
    "LAND_GROUPS",
    "LAND_USE",
    "ByteCodec",
    "EspeakVoice",
    "MelSettings",
    "Scenes",
    "SentenceGrammar",
    "Source",
    "SourceFilterVoice",
    "SpeechBatch",
    "Utterance",
    "Warp",
    "WarpPairs",
    "WordVocabulary",
    "byte_parts",
    "demo_data",
    "digits",
    "espeak_corpus",
    "even_windows",
    "generated_speech",
    "grey_scenes",
    "griffin_lim",
    "image_folder",
    "land_use",
    "library_pieces",
    "load",
    "locate",
    "mel_spectrogram",
    "mel_to_magnitude",
    "needle_scenes",
    "random_windows",
    "shape_scenes",
    "single_scenes",
    "small_speech",
    "source_filter_corpus",
    "speech_batches",
    "split_sentences",
    "stdlib_text",
    "stratified_folds",
    "text_ids",
    "warp_pairs",
    "warp_sources",
]
