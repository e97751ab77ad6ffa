"""An RNN transducer whose encoder's blocks and widths can be chosen while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError
from layerwright.models._rnnt_greedy import greedy_search
from layerwright.models._rnnt_parts import Predictor, RNNTBlock, RNNTOutput, check_features, stack_frames, start_linear_
from layerwright.nn.elastic import ElasticFFN, ElasticStack, FeedForward, running_blocks
from layerwright.nn.transducer import TransducerJoiner

__all__ = ["RNNT", "RNNTOutput"]

_WORD = re.compile(r"(ffn|elastic)((?:-[1-9]\d*)+)")


class RNNT(nn.Module):
    """Encoder, predictor and joiner (Graves, 2012, arXiv 1211.3711), with blocks of a multi-head state space part and a
    feed-forward part in the encoder (Shangguan et al., 2023, TODM, arXiv 2309.01947).

    All norms are RMSNorm, which hold for every sub-network. Symbols are `blank` and the labels.

    Args:
        channels: features of a frame.
        symbols: labels and blank.
        blocks: of the encoder.
        widths: inner widths of the feed-forward parts. Several make the encoder elastic (an `ElasticStack`), one makes
            it plain, as `elastic` says otherwise.
        dim: features inside the encoder.
        heads, state_size: of the state space parts.
        stack: frames that are put beside each other as one.
        predictor_dim, joiner_dim: widths of these.
        dropout: of the feed-forward parts' inner neurons at the largest width.
        adaptive_dropout: False uses that rate at every width.
        bidirectional: state space parts that see all frames.
        elastic: None goes by the number of widths.
        blank: index of blank.
        generator: of the first weights; seed 0 if left out.

    Raises:
        InputError: a number out of its range, or several widths of a plain encoder.
    """

    blocks: nn.ModuleList

    def __init__(
        self,
        channels: int,
        symbols: int,
        blocks: int = 4,
        widths: Sequence[int] = (16, 32, 64, 128),
        *,
        dim: int = 32,
        heads: int = 4,
        state_size: int = 16,
        stack: int = 1,
        predictor_dim: int = 32,
        joiner_dim: int = 32,
        dropout: float = 0.0,
        adaptive_dropout: bool = True,
        bidirectional: bool = False,
        elastic: bool | None = None,
        blank: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        if blocks < 1:
            raise InputError(f"blocks: got {blocks}, expected at least 1")
        elastic = len(widths) > 1 if elastic is None else elastic
        self._build([tuple(widths)] * blocks, elastic, locals())

    def _build(self, widths: Sequence[tuple[int, ...]], elastic: bool, given: dict[str, Any]) -> None:
        super().__init__()
        names = "channels symbols dim heads state_size stack predictor_dim joiner_dim dropout adaptive_dropout"
        self._settings = {name: given[name] for name in (*names.split(), "bidirectional", "blank")}
        low = ("channels", "symbols", "dim", "state_size", "stack", "predictor_dim", "joiner_dim")
        for name in low:
            if self._settings[name] < (2 if name == "symbols" else 1):
                raise InputError(f"{name}: got {self._settings[name]}, expected at least {1 + (name == 'symbols')}")
        if not 0 <= given["blank"] < given["symbols"]:
            raise InputError(f"blank: got {given['blank']}, expected 0 to {given['symbols'] - 1}")
        if not elastic and any(len(own) != 1 for own in widths):
            raise InputError(f"widths: got {list(widths[0])} for a plain encoder, expected one; or pass elastic=True")
        generator = given.get("generator") or torch.Generator().manual_seed(0)
        dim, blank, symbols = given["dim"], given["blank"], given["symbols"]
        with torch.random.fork_rng(devices=[]):  # all weights are drawn again below, from `generator`
            self.frontend = nn.Linear(given["channels"] * given["stack"], dim)
            start_linear_(self.frontend, generator)
            shared = given["heads"], given["state_size"], given["bidirectional"]
            dropouts = given["dropout"], given["adaptive_dropout"]
            made = [RNNTBlock(dim, *shared, own, elastic, *dropouts, generator) for own in widths]
            self.blocks = ElasticStack(made) if elastic else nn.ModuleList(made)
            self.norm = nn.RMSNorm(dim)
            self.predictor = Predictor(symbols, given["predictor_dim"], blank, generator)
            self.joiner = TransducerJoiner(dim, given["predictor_dim"], given["joiner_dim"], symbols)
            start_linear_(self.joiner, generator, 3**0.5)  # what frames say must reach the output from the start

    @property
    def blank(self) -> int:
        """Index of blank."""
        return self.predictor.blank

    def encode(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Frames ``(batch, frames, dim)`` of ``(batch, frames, channels)``, and how many are real.

        Raises:
            InputError: another shape, or a length out of range.
        """
        check_features(features, feature_lengths, self._settings["channels"])
        stacked, lengths = stack_frames(features, feature_lengths.to(features.device), self._settings["stack"])
        mask = torch.arange(stacked.shape[1], device=features.device) < lengths[:, None]
        x = self.frontend(stacked)
        for block in running_blocks(self.blocks):
            x = block(x, mask)
        return self.norm(x), lengths

    def predict(self, targets: Tensor) -> Tensor:
        """Features ``(batch, labels + 1, predictor_dim)`` of all prefixes of ``(batch, labels)``."""
        output: Tensor = self.predictor(targets)
        return output

    def join(self, frames: Tensor, prefixes: Tensor) -> Tensor:
        """Logits ``(batch, frames, prefixes, symbols)``."""
        output: Tensor = self.joiner(frames, prefixes)
        return output

    def forward(
        self, features: Tensor, feature_lengths: Tensor, targets: Tensor, target_lengths: Tensor | None = None
    ) -> RNNTOutput:
        """Logits of the whole lattice; `target_lengths` is not looked at, and taken so that a batch can be passed on."""
        frames, lengths = self.encode(features, feature_lengths)
        return RNNTOutput(self.join(frames, self.predict(targets)), lengths)

    @torch.no_grad()
    def greedy(self, features: Tensor, feature_lengths: Tensor | None = None, max_symbols: int = 5) -> list[list[int]]:
        """The labels that the most probable symbol of each node leads to.

        Args:
            features: ``(batch, frames, channels)``.
            feature_lengths: ``(batch,)``; all frames if left out.
            max_symbols: labels of one frame at most.

        Raises:
            InputError: `max_symbols` below 1, or see `encode`.
        """
        if feature_lengths is None:
            feature_lengths = torch.full((len(features),), features.shape[1], device=features.device)
        frames, lengths = self.encode(features, feature_lengths)
        return greedy_search(frames, lengths, self.predictor, self.joiner, max_symbols)

    def to_spec(self) -> list[str]:
        """A word for each block, read from the layers as they are now: ``ffn-64``, or ``elastic-16-32-64``."""
        words = []
        for block in self.blocks:
            assert isinstance(block, RNNTBlock)
            elastic = isinstance(block.ffn, ElasticFFN)
            widths = block.ffn.widths if isinstance(block.ffn, ElasticFFN) else (block.ffn.active_width,)
            words.append("-".join(("elastic" if elastic else "ffn", *map(str, widths))))
        return words

    def settings(self) -> dict[str, Any]:
        """What else it takes to build the same form."""
        rates = {block.ffn.dropout for block in self.blocks if isinstance(block.ffn, FeedForward)}
        return self._settings | ({"dropout": rates.pop()} if len(rates) == 1 else {})

    @classmethod
    def from_spec(cls, spec: Sequence[str], **settings: Any) -> Self:
        """The network of these words; `settings` as for the class.

        Raises:
            InputError: a word of another form, or elastic blocks beside plain ones.
        """
        found = [_WORD.fullmatch(word) for word in spec]
        kinds = {match[1] for match in found if match}
        if not spec or None in found or len(kinds) != 1:
            raise InputError(f"spec: got {list(spec)}, expected words such as ffn-64, or all such as elastic-16-32")
        widths = [tuple(int(size) for size in match[2].split("-")[1:]) for match in found if match]
        model = cls.__new__(cls)
        plain = {"dim": 32, "heads": 4, "state_size": 16, "stack": 1, "predictor_dim": 32, "joiner_dim": 32}
        rest = {"dropout": 0.0, "adaptive_dropout": True, "bidirectional": False, "blank": 0}
        model._build(widths, kinds == {"elastic"}, plain | rest | settings)
        return model
