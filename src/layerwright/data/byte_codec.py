"""Text as bytes and a few special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from layerwright.core.errors import InputError

__all__ = ["ByteCodec"]


class ByteCodec:
    """UTF-8 bytes are the tokens 0 to 255; special tokens follow.

    Args:
        specials: their names, in order; ``pad``, ``bos`` and ``eos`` are what `pad`, `encode` and `decode` ask for.

    Raises:
        InputError: a name twice.
    """

    def __init__(self, specials: Sequence[str] = ("pad", "bos", "eos")) -> None:
        if len(set(specials)) != len(specials):
            raise InputError(f"specials: got {list(specials)}, expected each name once")
        self.specials = {name: 256 + number for number, name in enumerate(specials)}

    def __len__(self) -> int:
        """Tokens in all: 256 and the specials."""
        return 256 + len(self.specials)

    def special(self, name: str) -> int:
        """The token called `name`.

        Raises:
            InputError: there is none.
        """
        if name not in self.specials:
            raise InputError(f"special: no {name!r}, expected one of {', '.join(self.specials)}")
        return self.specials[name]

    def encode(self, text: str | bytes, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Tokens of `text`, between ``bos`` and ``eos`` where they are wanted.

        Raises:
            TypeError: neither a string nor bytes.
            InputError: a special token that this codec lacks.
        """
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"text: got {type(text).__name__}, expected a string or bytes")
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return [*self._if("bos", bos), *data, *self._if("eos", eos)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Tokens of bytes that need not be text.

        Raises:
            TypeError: anything else; a string has to be encoded first.
        """
        if not isinstance(data, (bytes, bytearray)):
            raise TypeError(f"data: got {type(data).__name__}, expected bytes; use encode for strings")
        return list(data)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of tokens; specials are left out.

        Raises:
            InputError: a token that there is not.
        """
        numbers = [int(number) for number in ids]
        wrong = [number for number in numbers if not 0 <= number < len(self)]
        if wrong:
            raise InputError(f"ids: got {wrong[0]}, expected 0 to {len(self) - 1}")
        return bytes(number for number in numbers if number < 256)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of tokens; specials are left out, and bytes that are no UTF-8 go by `errors` (see ``bytes.decode``).

        Raises:
            InputError: a token that there is not.
            UnicodeDecodeError: bytes that are no UTF-8, with ``strict``.
        """
        return self.decode_bytes(ids).decode("utf-8", errors)

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of tokens as one tensor ``(rows, longest)``, filled up with ``pad`` behind.

        Raises:
            InputError: no rows, or no such special token.
        """
        if not rows:
            raise InputError("rows: got none, expected at least one")
        parts = [torch.tensor(row, dtype=torch.long) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=self.special("pad"))

    def _if(self, name: str, wanted: bool) -> list[int]:
        return [self.special(name)] if wanted else []
