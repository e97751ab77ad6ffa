"""An encoder-decoder over bytes, with embedding matrices or without (Shaham & Levy, 2021)."""

from __future__ import annotations

import math
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.core.layers import structure_copy
from layerwright.models._beam import beam_search
from layerwright.models._byte_layers import ByteInput, DecoderCache, DecoderLayer, EncoderLayer
from layerwright.nn.one_hot import OneHotEmbedding, TokenDropout

__all__ = ["ByteSeq2Seq", "Embed"]

Embed = Literal["onehot", "learned"]
MAX_POSITIONS = 4096


class ByteSeq2Seq(nn.Module):
    """A post-norm Transformer from bytes to bytes (Shaham & Levy, 2021, NAACL, arXiv 2008.09396).

    Without embeddings (``onehot``) a token's vector is one-hot, times a learned scale of each side; logits are the first
    features of the last layer, times a third one. There is then no dropout on the encoder's input, where it would erase
    bytes of the source, and none on the residual branches of the last decoder layer, whose features are logits. Dropout
    on the decoder's input stays: it erases whole tokens, and that is what helps. With embeddings (``learned``) the
    decoder's table is tied to the output.

    Args:
        dim: features; without embeddings at least `vocabulary`.
        enc_layers, dec_layers: how many.
        heads, ffn: attention heads (of width ``dim / heads``), inner width.
        dropout: on inputs and residual branches.
        embed: with embeddings or without.
        token_dropout: probability that a token of the decoder's input is erased in training, see `TokenDropout`.
        drop_bos: False spares the first token of the target.
        decoder_input_dropout: None for `dropout`.
        vocabulary, padding, bos, eos: tokens, by default those of `layerwright.data.ByteCodec`.
        seed: of the first weights; the global generator is left alone.

    Raises:
        InputError: a setting out of its range; `dim` below `vocabulary` without embeddings.
    """

    def __init__(
        self,
        dim: int = 512,
        enc_layers: int = 6,
        dec_layers: int = 6,
        heads: int = 4,
        ffn: int = 1024,
        dropout: float = 0.2,
        embed: Embed = "onehot",
        token_dropout: float = 0.0,
        *,
        drop_bos: bool = True,
        decoder_input_dropout: float | None = None,
        vocabulary: int = 259,
        padding: int = 256,
        bos: int = 257,
        eos: int = 258,
        seed: int = 0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        _check(given)
        self._settings: dict[str, Any] = given
        self.vocabulary, self.padding, self.bos, self.eos = vocabulary, padding, bos, eos
        onehot = embed == "onehot"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            source = self._embedding(dim, onehot, None)
            target = self._embedding(dim, onehot, "learned")
            self.encoder_layers = nn.ModuleList(EncoderLayer(dim, heads, ffn, dropout) for _ in range(enc_layers))
            self.decoder_layers = nn.ModuleList(DecoderLayer(dim, heads, ffn, dropout) for _ in range(dec_layers))
        erased = TokenDropout(token_dropout, protect=() if drop_bos else (bos,))
        target_dropout = dropout if decoder_input_dropout is None else decoder_input_dropout
        self.source_input = ByteInput(source, TokenDropout(0.0), 0.0 if onehot else dropout)
        self.target_input = ByteInput(target, erased, target_dropout)
        if onehot:
            _last(self.decoder_layers).dropout.p = 0.0

    def _embedding(self, dim: int, onehot: bool, output_scale: Any) -> nn.Embedding | OneHotEmbedding:
        if onehot:
            return OneHotEmbedding(self.vocabulary, dim, self.padding, output_scale=output_scale)
        table = nn.Embedding(self.vocabulary, dim, padding_idx=self.padding)
        nn.init.normal_(table.weight, std=1 / math.sqrt(dim))
        with torch.no_grad():
            table.weight[self.padding] = 0
        return table

    def encode(self, src: Tensor, src_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features ``(batch, tokens, dim)`` of the source, and which tokens count ``(batch, 1, 1, tokens)``.

        Raises:
            InputError: more than 4096 tokens, another shape, or a source in which no token counts.
        """
        _check_tokens("src", src)
        counts = src != self.padding if src_mask is None else src_mask.bool()
        if counts.shape != src.shape:
            raise InputError(f"src_mask: got shape {tuple(counts.shape)}, expected {tuple(src.shape)}")
        if src.device.type == "cpu" and not bool(counts.any(1).all()):
            raise InputError("src: a source without tokens; give it at least the end of the text")
        mask = counts[:, None, None, :]
        x = self.source_input(src)
        for layer in self.encoder_layers:
            x = layer(x, mask)
        return x, mask

    def forward(
        self, src: Tensor, tgt_in: Tensor, src_mask: Tensor | None = None, tgt_mask: Tensor | None = None
    ) -> Tensor:
        """Logits ``(batch, target tokens, vocabulary)`` of the token after each of `tgt_in`.

        Args:
            src: ``(batch, source tokens)``.
            tgt_in: ``(batch, target tokens)``, which begins with `bos`.
            src_mask, tgt_mask: of the same shapes, True for tokens that count. None: padding does not count in the
                source; the target's is behind, where it changes nothing.

        Raises:
            TypeError, InputError: tokens that there are not, more than 4096 of them, another shape.
        """
        _check_tokens("tgt_in", tgt_in)
        if len(src) != len(tgt_in):
            raise InputError(f"tgt_in: got {len(tgt_in)} rows, expected {len(src)} as in src")
        encoded, mask = self.encode(src, src_mask)
        own = None if tgt_mask is None else _own_mask(tgt_mask, tgt_in)
        x = self.target_input(tgt_in)
        for layer in self._decoder():
            x = layer(x, layer.cross.pair(encoded), mask, own)
        return self._logits(x)

    def step(self, token: Tensor, encoded: Tensor, mask: Tensor, cache: DecoderCache) -> Tensor:
        """Logits ``(rows, vocabulary)`` after one more `token` ``(rows, 1)``; `cache` takes up its keys and values.

        `encoded` and `mask` are what `encode` gave.
        """
        if not cache.cross:
            cache.cross = [layer.cross.pair(encoded) for layer in self._decoder()]
        first = cache.own[0][0].shape[2] if cache.own else 0
        x = self.target_input(token, first)
        kept = []
        for number, layer in enumerate(self._decoder()):
            own = cache.own[number] if cache.own else None
            x, pair = layer.step(x, own, cache.cross[number], mask)
            kept.append(pair)
        cache.own = kept
        return self._logits(x)[:, -1]

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        *,
        beam: int = 5,
        length_penalty: float = 1.0,
        max_length: int = 256,
        cache: bool = True,
    ) -> list[list[int]]:
        """The tokens that beam search finds for each source, without `bos` and `eos`; 1 beam is the greedy choice.

        Runs in evaluation mode.

        Args:
            src, src_mask: as in the forward pass.
            beam: hypotheses of each source.
            length_penalty: hypotheses rank by log-probability over ``length ** length_penalty``.
            max_length: tokens at most, up to 4095.
            cache: False computes all tokens again for each new one: the same tokens, slower.

        Raises:
            InputError: a number out of its range, or see `encode`.
        """
        if not 1 <= beam <= self.vocabulary - 2 or not 1 <= max_length < MAX_POSITIONS:
            raise InputError(
                f"beam: got {beam}, expected 1 to {self.vocabulary - 2}; max_length: got {max_length}, expected 1 to "
                f"{MAX_POSITIONS - 1}"
            )
        was = self.training
        self.eval()
        try:
            encoded, mask = self.encode(src, src_mask)
            encoded, mask = encoded.repeat_interleave(beam, 0), mask.repeat_interleave(beam, 0)
            kept = DecoderCache()

            def with_cache(prefixes: Tensor, rows: Tensor) -> Tensor:
                kept.reorder_(rows)
                return self.step(prefixes[:, -1:], encoded, mask, kept).log_softmax(-1)

            def without_cache(prefixes: Tensor, _rows: Tensor) -> Tensor:
                x = self.target_input(prefixes)
                for layer in self._decoder():
                    x = layer(x, layer.cross.pair(encoded), mask, None)
                return self._logits(x)[:, -1].log_softmax(-1)

            return beam_search(
                with_cache if cache else without_cache,
                len(src),
                beam=beam,
                bos=self.bos,
                eos=self.eos,
                padding=self.padding,
                max_length=max_length,
                length_penalty=length_penalty,
                device=src.device,
            )
        finally:
            self.train(was)

    def without_embeddings(self) -> Self:
        """This model without embedding matrices: all else is shared with it, and has to be trained further.

        Raises:
            InputError: it has none, or fewer features than tokens.
        """
        if self._settings["embed"] == "onehot":
            raise InputError("embed: this model has no embedding matrices already")
        other = type(self)(**self._settings | {"embed": "onehot"})
        other.encoder_layers = structure_copy(self.encoder_layers)
        other.decoder_layers = structure_copy(self.decoder_layers)
        _last(other.decoder_layers).dropout.p = 0.0
        like = next(self.parameters())
        return other.to(like.device, like.dtype).train(self.training)

    def settings(self) -> dict[str, Any]:
        """What it takes to build the same form."""
        return dict(self._settings)

    def _decoder(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.decoder_layers))

    def _logits(self, x: Tensor) -> Tensor:
        embedding = self.target_input.embedding
        if isinstance(embedding, OneHotEmbedding):
            return embedding.project(x)
        return nn.functional.linear(x, embedding.weight)


def _last(layers: nn.ModuleList) -> DecoderLayer:
    layer = layers[-1]
    assert isinstance(layer, DecoderLayer)
    return layer


def _own_mask(tgt_mask: Tensor, tgt_in: Tensor) -> Tensor:
    """Which tokens of the target each one attends to: those before it that count, and itself."""
    if tgt_mask.shape != tgt_in.shape:
        raise InputError(f"tgt_mask: got shape {tuple(tgt_mask.shape)}, expected {tuple(tgt_in.shape)}")
    tokens = tgt_in.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=tgt_in.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=tgt_in.device)
    return ((causal & tgt_mask.bool()[:, None, :]) | itself)[:, None]


def _check_tokens(name: str, tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise InputError(f"{name}: got shape {tuple(tokens.shape)}, expected (batch, tokens)")
    if tokens.shape[1] > MAX_POSITIONS:
        raise InputError(f"{name}: got {tokens.shape[1]} tokens, expected at most {MAX_POSITIONS}; cut the text")


def _check(given: dict[str, Any]) -> None:
    if given["embed"] not in get_args(Embed):
        raise unknown_name("embed", str(given["embed"]), get_args(Embed))
    for name in ("dim", "enc_layers", "dec_layers", "heads", "ffn"):
        if given[name] < 1:
            raise InputError(f"{name}: got {given[name]}, expected at least 1")
    if given["dim"] % given["heads"]:
        raise InputError(f"heads: got {given['heads']} for a width of {given['dim']}, expected a divisor")
    for name in ("dropout", "decoder_input_dropout"):
        if given[name] is not None and not 0 <= given[name] < 1:
            raise InputError(f"{name}: got {given[name]}, expected at least 0 and below 1")
    special = [given[name] for name in ("padding", "bos", "eos")]
    if len(set(special)) < 3 or not all(0 <= token < given["vocabulary"] for token in special):
        raise InputError(f"padding, bos, eos: got {special}, expected three tokens below {given['vocabulary']}")
