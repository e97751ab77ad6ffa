"""Character n-grams of strings and their hashes: whole numbers alone, so that every machine finds the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from layerwright.core.errors import InputError

__all__ = ["Grams", "check_hash", "check_strings", "grams_of", "hash_family", "id_grams", "ngram_signatures"]

BASE, MODULUS = 257, 2**31 - 1


def check_hash(orders: Sequence[int], base: int, modulus: int) -> None:
    """Refuse settings of the hash that would overflow 64 bits or collide without need.

    Raises:
        InputError: no orders, one below 1 or given twice, a modulus that is no prime below 2^31, a base outside it.
    """
    if not orders or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in orders):
        raise InputError(f"orders: got {tuple(orders)}, expected lengths of n-grams, each at least 1")
    if len(set(orders)) != len(orders):
        raise InputError(f"orders: got {tuple(orders)}, expected each length once")
    if not 2 <= modulus < 2**31:
        raise InputError(f"modulus: got {modulus}, expected a prime below 2^31 (products must fit 63 bits)")
    if any(modulus % divisor == 0 for divisor in range(2, math.isqrt(modulus) + 1)):
        raise InputError(f"modulus: got {modulus}, which is not prime; expected one such as {MODULUS}")
    if not 2 <= base < modulus:
        raise InputError(f"base: got {base}, expected 2 to {modulus - 1} (base * modulus must fit 63 bits)")


def check_strings(strings: Sequence[str]) -> None:
    """Refuse what has no spelling.

    Raises:
        TypeError: not strings.
        InputError: an empty one.
    """
    if isinstance(strings, str):
        raise TypeError("strings: got one string, expected a list of them")
    for number, token in enumerate(strings):
        if not isinstance(token, str):
            raise TypeError(f"strings: number {number} is a {type(token).__name__}, expected a string")
        if not token:
            raise InputError(f"strings: number {number} is empty and has no n-grams; give it a name such as [EMPTY]")


def ngram_signatures(
    token: str, orders: Sequence[int] = (1, 2, 3), base: int = BASE, modulus: int = MODULUS
) -> list[list[int]]:
    """Signatures of the n-grams of `token`, for each of `orders`: ``sum_i ord(c_i) base^(n-1-i) mod modulus``.

    A rolling hash: each n-gram's comes from that of the one before. An order longer than the token has none.

    Raises:
        TypeError, InputError: an empty token, or see `check_hash`.
    """
    check_strings([token])
    check_hash(orders, base, modulus)
    characters = [ord(character) for character in token]
    found = []
    for order in orders:
        oldest = pow(base, order - 1, modulus)
        signatures: list[int] = []
        signature = 0
        for place, character in enumerate(characters):
            if place >= order:
                signature -= characters[place - order] * oldest
            signature = (signature * base + character) % modulus
            if place >= order - 1:
                signatures.append(signature)
        found.append(signatures)
    return found


class Grams(nn.Module):
    """Which n-grams each string has: buffers that are not saved.

    Attributes:
        signatures: of the distinct n-grams, ``(distinct,)``.
        index: the n-grams of all strings, one string after the other, as places in `signatures`, ``(n-grams,)``.
        offsets: where each string's begin, and the end, ``(strings + 1,)``.
    """

    signatures: Tensor
    index: Tensor
    offsets: Tensor

    def __init__(self, signatures: Tensor, index: Tensor, offsets: Tensor) -> None:
        super().__init__()
        self.register_buffer("signatures", signatures, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)


def id_grams(count: int, modulus: int) -> Grams:
    """As if string `i` had the one signature `i`."""
    whole = np.arange(count, dtype=np.int64)
    return _grams(whole % modulus, whole, count)


def grams_of(strings: Sequence[str], orders: Sequence[int] | None, base: int, modulus: int) -> Grams:
    """The n-grams of all `orders` together of each string; with None each string is one n-gram.

    A string that is shorter than all orders is one n-gram too. No loop over strings or characters.
    """
    # The n-grams of a string of text are what matters; surrogates that a broken decoder left behind have numbers too.
    text = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)
    lengths = np.fromiter((len(token) for token in strings), dtype=np.int64, count=len(strings))
    starts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(strings)), lengths)
    signatures, owners = [], []
    for order in orders or ():
        if len(text) < order:
            continue
        places = np.arange(len(text) - order + 1)
        places = places[places + order <= (starts + lengths)[owner[places]]]
        signature = np.zeros(len(places), dtype=np.int64)
        for step in range(order):
            signature = (signature * base + text[places + step]) % modulus
        signatures.append(signature)
        owners.append(owner[places])
    whole = np.flatnonzero(lengths < min(orders)) if orders else np.arange(len(strings))
    signatures.append(_whole(text, starts[whole], lengths[whole], base, modulus))
    owners.append(whole)
    return _grams(np.concatenate(signatures), np.concatenate(owners), len(strings))


def _whole(text: np.ndarray, starts: np.ndarray, lengths: np.ndarray, base: int, modulus: int) -> np.ndarray:
    """Signatures of whole strings; one step for each place of the longest."""
    signature = np.zeros(len(starts), dtype=np.int64)
    for step in range(int(lengths.max(initial=0))):
        inside = lengths > step
        signature[inside] = (signature[inside] * base + text[starts[inside] + step]) % modulus
    return signature


def _grams(signatures: np.ndarray, owners: np.ndarray, count: int) -> Grams:
    order = np.argsort(owners, kind="stable")
    distinct, index = np.unique(signatures[order], return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=count))])
    parts = (distinct, index.reshape(-1), offsets.astype(np.int64))
    return Grams(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def hash_family(count: int, seed: int, modulus: int) -> tuple[Tensor, Tensor]:
    """Factors ``(count,)`` from 1 and summands ``(count,)`` from 0, both below `modulus`, by SHA-256 of the seed."""
    numbers = []
    for component in range(count):
        digest = hashlib.sha256(f"{seed}:{component}".encode()).digest()
        factor, summand = int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:], "big")
        numbers.append((1 + factor % (modulus - 1), summand % modulus))
    table = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return table[:, 0].contiguous(), table[:, 1].contiguous()
