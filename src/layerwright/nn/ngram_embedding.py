"""Embeddings that are computed from the spelling of a token; no table is stored (Cohn et al., 2023, EELBERT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError, unknown_name
from layerwright.nn._ngrams import (
    BASE,
    MODULUS,
    Grams,
    check_hash,
    check_strings,
    grams_of,
    hash_family,
    id_grams,
    ngram_signatures,
)
from layerwright.nn.treated import dtype_name, named_dtype

__all__ = ["Combine", "NGramHashEmbedding", "TokenHash", "ngram_signatures", "vocabulary_of"]

Combine = Literal["mean", "split"]
TokenHash = Literal["ngrams", "token", "random", "onehot"]
_CHUNK_BYTES = 32 << 20
"""Bound on the components of n-grams that are in memory at once."""


class NGramHashEmbedding(nn.Module):
    """A vector for each token: the mean of hashes of its character n-grams, in the place of an ``nn.Embedding``.

    The signature `s` of an n-gram (`ngram_signatures`) gives component `j` by ``(a_j s + b_j) mod P``, moved into a
    symmetric range; ``a_j, b_j`` come from the seed. The sums are whole numbers, so vectors are the same bits on every
    machine, computed one by one or all at once. The mean of `k` n-grams is multiplied by ``sqrt(k) std``, so that long
    and short tokens are of one size. Nothing is trained and nothing of the vocabulary's size is in the state dict; the
    strings travel in `spec`. Cohn et al., 2023, arXiv 2310.20144; the paper does not give the hash family, the share of
    each order or marks of word boundaries: these are choices of this class.

    Args:
        vocabulary: string of each id, or a tokenizer (see `vocabulary_of`).
        dim: components.
        orders: lengths of the n-grams. A token shorter than all of them is one n-gram.
        combine: ``mean`` over the n-grams of all orders together, or ``split``: ``dim / len(orders)`` components from
            each order.
        method: ``ngrams``; ``token``: the whole token is one n-gram; ``random``: a vector for each id, whatever its
            string; ``onehot``: an n-gram is plus or minus one in one component.
        seed: of the hashes.
        std: deviation of the components.
        materialize: True keeps the table in memory (not in the state dict), False computes the tokens of each call,
            ``auto`` keeps a table of up to `budget_bytes`. The vectors are the same.
        budget_bytes: for ``auto``.
        learn_scale: train one factor on all vectors.
        project_to: train an affine map to that many features (see `layerwright.tune.distill_embeddings`).
        base, modulus: of the signatures.

    Raises:
        TypeError: strings that are not strings.
        InputError: a setting outside its range, an empty string, ``split`` where orders do not divide `dim`.
    """

    like: Tensor
    table: Tensor | None
    factors: Tensor
    summands: Tensor

    def __init__(
        self,
        vocabulary: Sequence[str] | Any,
        dim: int,
        orders: Sequence[int] = (1, 2, 3),
        combine: Combine = "mean",
        *,
        method: TokenHash = "ngrams",
        seed: int = 0,
        std: float = 0.02,
        materialize: bool | Literal["auto"] = "auto",
        budget_bytes: int = 64 << 20,
        learn_scale: bool = False,
        project_to: int | None = None,
        base: int = BASE,
        modulus: int = MODULUS,
    ) -> None:
        super().__init__()
        _check(dim, orders, combine, method, std, materialize, project_to)
        check_hash(orders, base, modulus)
        self.vocabulary = vocabulary_of(vocabulary)
        check_strings(self.vocabulary)
        self.dim, self.orders, self.combine, self.method = dim, tuple(orders), combine, method
        self.seed, self.std, self.base, self.modulus = seed, std, base, modulus
        self.materialize, self.budget_bytes = materialize, budget_bytes
        factors, summands = hash_family(dim + 2, seed, modulus)
        self.register_buffer("factors", factors, persistent=False)
        self.register_buffer("summands", summands, persistent=False)
        self.register_buffer("like", torch.empty(0, dtype=torch.get_default_dtype(), device="cpu"), persistent=False)
        self.register_buffer("table", None, persistent=False)
        self.grams = nn.ModuleList(self._grams(self.vocabulary, ids=True))
        self.scale = nn.Parameter(torch.ones(())) if learn_scale else None
        self.projection = None if project_to is None else nn.Linear(dim, project_to)

    @property
    def num_embeddings(self) -> int:
        """Tokens."""
        return len(self.vocabulary)

    @property
    def embedding_dim(self) -> int:
        """Features of a token's vector."""
        return self.dim if self.projection is None else self.projection.out_features

    @property
    def weight(self) -> Tensor:
        """The vectors of all tokens ``(tokens, features)``, made anew each time."""
        return self._finish(self._rows(None).to(self.like.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., features)`` of whole numbers ``(...)``.

        Raises:
            TypeError: ids that are not whole numbers.
            InputError: ids outside the vocabulary (checked on the CPU).
        """
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids: got {ids.dtype}, expected whole numbers (torch.long)")
        if (
            ids.device.type == "cpu"
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.vocabulary)
        ):
            raise InputError(f"ids: got {int(ids.min())} to {int(ids.max())}, expected 0 to {len(self.vocabulary) - 1}")
        if self._keeps_table():
            if self.table is None:
                with torch.inference_mode(False):
                    self.table = self._rows(None).to(self.like.dtype)
            rows = nn.functional.embedding(ids, self.table)
        else:
            distinct, inverse = torch.unique(ids, return_inverse=True)
            rows = self._rows(distinct).to(self.like.dtype)[inverse]
        return self._finish(rows)

    def embed_strings(self, strings: Sequence[str]) -> Tensor:
        """Vectors ``(strings, features)`` of any strings, known or not.

        Raises:
            TypeError, InputError: not strings, an empty one, or vectors that do not come from strings (``random``).
        """
        if self.method == "random":
            raise InputError("method: random vectors belong to ids, not to strings; use ngrams, token or onehot")
        check_strings(strings)
        grams = [part.to(self.like.device) for part in self._grams(strings)]
        return self._finish(self._rows(None, grams).to(self.like.dtype))

    def with_vocabulary(self, vocabulary: Sequence[str] | Any) -> Self:
        """This embedding for other strings, such as more of them; what was trained is shared.

        Raises:
            TypeError, InputError: as the class.
        """
        other = self.empty(self.spec() | {"vocabulary": vocabulary_of(vocabulary)}).to(self.like.device)
        other.scale, other.projection = self.scale, self.projection
        return other.train(self.training)

    def collision_rate(self) -> float:
        """Share of the vocabulary's distinct n-grams (whole tokens for ``token``) that have another one's signature."""
        if self.method == "random":
            return 0.0
        distinct: set[str] = set()
        for token in self.vocabulary:
            fitting = [] if self.method == "token" else [n for n in self.orders if n <= len(token)]
            distinct |= {token[i : i + n] for n in fitting for i in range(len(token) - n + 1)} if fitting else {token}
        grams = grams_of(sorted(distinct), None, self.base, self.modulus)
        return 1 - len(grams.signatures) / len(distinct)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.table = None  # made again in the new dtype and on the new device
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def _keeps_table(self) -> bool:
        if self.materialize == "auto":
            return len(self.vocabulary) * self.dim * self.like.element_size() <= self.budget_bytes
        return self.materialize

    def _finish(self, rows: Tensor) -> Tensor:
        rows = rows if self.scale is None else rows * self.scale
        result: Tensor = rows if self.projection is None else self.projection(rows)
        return result

    def _grams(self, strings: Sequence[str], ids: bool = False) -> list[Grams]:
        """One set for each part of the components."""
        if ids and self.method == "random":
            return [id_grams(len(strings), self.modulus)]
        if self.method == "token":
            return [grams_of(strings, None, self.base, self.modulus)]
        parts = [self.orders] if self.combine == "mean" else [(order,) for order in self.orders]
        return [grams_of(strings, orders, self.base, self.modulus) for orders in parts]

    @torch.no_grad()
    def _rows(self, ids: Tensor | None, grams: Sequence[Any] | None = None) -> Tensor:
        """Vectors of distinct `ids` (None: of all), float32, before scale and projection."""
        grams = list(self.grams) if grams is None else grams
        width = self.dim // len(grams)
        parts = []
        for number, part in enumerate(grams):
            chosen = torch.arange(len(part.offsets) - 1, device=part.offsets.device) if ids is None else ids
            counts = part.offsets[chosen + 1] - part.offsets[chosen]
            step = max(1, _CHUNK_BYTES // (8 * width * max(1, int(counts.max()) if len(counts) else 1)))
            columns = slice(number * width, (number + 1) * width)
            rows = [self._pooled(part, some, columns) for some in chosen.split(step)]
            parts.append(torch.cat(rows) if rows else torch.zeros(0, width, device=self.like.device))
        return torch.cat(parts, dim=1)

    def _pooled(self, grams: Grams, ids: Tensor, columns: slice) -> Tensor:
        """Vectors ``(ids, width)`` from one set of n-grams."""
        first, counts = grams.offsets[ids], grams.offsets[ids + 1] - grams.offsets[ids]
        owner = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        within = torch.arange(len(owner), device=ids.device) - (counts.cumsum(0) - counts)[owner]
        distinct, inverse = torch.unique(grams.index[first[owner] + within], return_inverse=True)
        values, variance = self._components(grams.signatures[distinct], columns)
        sums = torch.zeros(len(ids), values.shape[1], dtype=torch.int64, device=ids.device)
        sums.index_add_(0, owner, values[inverse])
        size = torch.sqrt(counts.double() * variance)
        return (sums.double() / size[:, None] * self.std).float()

    def _components(self, signatures: Tensor, columns: slice) -> tuple[Tensor, float]:
        """Whole numbers ``(n-grams, width)`` around zero, and their variance."""
        prime = self.modulus
        if self.method != "onehot":
            hashed = (signatures[:, None] * self.factors[columns] + self.summands[columns]) % prime
            return 2 * hashed - (prime - 1), (prime**2 - 1) / 3
        width = columns.stop - columns.start
        place, sign = ((signatures * self.factors[-n] + self.summands[-n]) % prime for n in (1, 2))
        values = torch.zeros(len(signatures), width, dtype=torch.int64, device=signatures.device)
        values.scatter_(1, (place % width)[:, None], (2 * (sign % 2) - 1)[:, None])
        return values, 1 / width

    def spec(self) -> dict[str, Any]:
        """Plain data from which `empty` builds the same form; with the strings of the vocabulary."""
        return {
            "type": "ngram_hash_embedding",
            "vocabulary": list(self.vocabulary),
            "dim": self.dim,
            "orders": list(self.orders),
            "combine": self.combine,
            "method": self.method,
            "seed": self.seed,
            "std": self.std,
            "materialize": self.materialize,
            "budget_bytes": self.budget_bytes,
            "learn_scale": self.scale is not None,
            "project_to": None if self.projection is None else self.projection.out_features,
            "base": self.base,
            "modulus": self.modulus,
            "dtype": dtype_name(self.like.dtype),
        }

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """A module of that form; what is trained is uninitialised."""
        settings = {name: value for name, value in spec.items() if name not in ("type", "dtype")}
        return cls(**settings).to(named_dtype(spec["dtype"]))

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.num_embeddings}, {self.dim}, orders={self.orders}, method={self.method!r}, seed={self.seed}"


def vocabulary_of(tokenizer: Sequence[str] | Any) -> tuple[str, ...]:
    """The string of each id, from a list of strings or a tokenizer with ``get_vocab()``.

    Raises:
        TypeError: neither.
        InputError: no strings, or an id without one.
    """
    if isinstance(tokenizer, str) or not (hasattr(tokenizer, "get_vocab") or isinstance(tokenizer, Sequence)):
        raise TypeError(
            f"vocabulary: got {type(tokenizer).__name__}, expected a list of strings or a tokenizer with get_vocab()"
        )
    if not hasattr(tokenizer, "get_vocab"):
        found = tuple(tokenizer)
        if not found:
            raise InputError("vocabulary: got no strings, expected one for each id")
        return found
    owner: Any = tokenizer
    names = {number: token for token, number in owner.get_vocab().items()}
    missing = sorted(set(range(max(names, default=0) + 1)) - set(names))
    if missing:
        raise InputError(
            f"vocabulary: the tokenizer has no string for id {missing[0]} ({len(missing)} missing); give a list of strings"
        )
    return tuple(names[number] for number in range(len(names)))


def _check(
    dim: int, orders: Sequence[int], combine: str, method: str, std: float, materialize: Any, project_to: int | None
) -> None:
    for name, given, known in (("combine", combine, get_args(Combine)), ("method", method, get_args(TokenHash))):
        if given not in known:
            raise unknown_name(name, str(given), known)
    if dim < 1 or (project_to is not None and project_to < 1):
        raise InputError(f"dim: got {dim} and project_to {project_to}, expected at least 1")
    if combine == "split" and (method in ("token", "random") or (len(orders) and dim % len(orders))):
        raise InputError(
            f"combine: split needs a method that uses the orders, and dim {dim} divisible by their number {len(orders)}"
        )
    if not (math.isfinite(std) and std > 0):
        raise InputError(f"std: got {std}, expected a positive number")
    if materialize not in (True, False, "auto"):
        raise InputError(f"materialize: got {materialize!r}, expected True, False or 'auto'")
