"""Texts in which something must be found again: a pass key among filler, and records of a dictionary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["DEFINE", "QUERY", "RECORD", "VALUE", "VOCABULARY", "Records", "dictionary", "passkey_prompt"]

SYMBOLS = 32
DEFINE, QUERY, VALUE = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2
VOCABULARY = SYMBOLS + 3
KEY = 3
RECORD = KEY + 3
"""Tokens of a record: a marker, three symbols, a marker, the value."""
_FILLER = "the grass is green. the sky is blue. the sun is yellow. here we go. there and back again. "


@dataclass(frozen=True)
class Records:
    """Documents of definitions, and queries of their keys.

    Attributes:
        definitions: ``(documents, records * 6)``: ``<k> a b c <v> x`` one after the other.
        queries: as many tokens: ``<q> a b c <v> x`` of the same keys in another order.
    """

    definitions: Tensor
    queries: Tensor

    @property
    def answers(self) -> Tensor:
        """Booleans ``(tokens,)``: where the values stand."""
        return torch.arange(self.queries.shape[1]) % RECORD == RECORD - 1


def dictionary(documents: int, records: int, seed: int) -> Records:
    """`documents` of `records` definitions; no key appears in two of them.

    Raises:
        InputError: more records than there are keys (32,768).
    """
    count = documents * records
    if not 1 <= count <= SYMBOLS**KEY:
        raise InputError(f"records: got {count} in all, expected 1 to {SYMBOLS**KEY}, as many as there are keys")
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randperm(SYMBOLS**KEY, generator=draw)[:count]
    keys = torch.stack([codes // SYMBOLS**place % SYMBOLS for place in range(KEY)], 1)
    values = torch.randint(SYMBOLS, (count, 1), generator=draw)
    marker = torch.ones(count, 1, dtype=torch.long)
    written = torch.cat([DEFINE * marker, keys, VALUE * marker, values], 1).view(documents, records, RECORD)
    order = torch.stack([torch.randperm(records, generator=draw) for _ in range(documents)])
    asked = written.gather(1, order[..., None].expand(-1, -1, RECORD)).clone()
    asked[..., 0] = QUERY
    return Records(written.flatten(1), asked.flatten(1))


def passkey_prompt(length: int, passkey: int, position: float, seed: int = 0) -> tuple[bytes, bytes]:
    """A text of `length` bytes that says the pass key once and asks for it at its end, and the answer.

    Args:
        length: bytes of the prompt.
        passkey: a number.
        position: where in the filler the key stands, 0 for its beginning to 1 for its end.
        seed: of where the filler begins.

    Raises:
        InputError: too short a text, or a place outside it.
    """
    told = f" the pass key is {passkey}. remember it: {passkey}. ".encode()
    asked = b" what is the pass key? the pass key is "
    room = length - len(told) - len(asked)
    if room < 0:
        raise InputError(f"length: got {length}, expected at least {len(told) + len(asked)} bytes")
    if not 0 <= position <= 1:
        raise InputError(f"position: got {position}, expected 0 to 1")
    text = _FILLER.encode()
    start = int(torch.randint(len(text), (1,), generator=torch.Generator().manual_seed(seed)))
    filler = (text * (room // len(text) + 2))[start : start + room]
    place = round(position * room)
    return filler[:place] + told + filler[place:] + asked, str(passkey).encode()
