"""Token ids become text, a few at a time, such that the pieces joined equal the decoding of all at once.

Two ways, by what the tokenizer's decoder is:

- byte-level BPE: a token is bytes, text is their UTF-8; Python's incremental decoder replaces broken bytes as
  the library does. Cost: a table look-up per token.
- any other: decode a window of tokens and emit what is new in it. A token's text may depend on its neighbour
  before it, so the window keeps some that are done; SentencePiece's byte tokens (`<0x41>`) depend on all of
  the run they stand in, so a run is kept back until a token of another kind ends it.

`tokenizers`' own `DecodeStream` is not used: it drops an unfinished tail, takes quadratic time on a run of
them, and in byte runs it can emit what decoding the whole would not.
"""

import json
from collections.abc import Sequence
from encodings.utf_8 import IncrementalDecoder as _Utf8
from typing import Protocol

from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what broken bytes decode to; an unfinished character to one
_MAX_WINDOW = 16  # tokens
_CONTEXT = 4  # tokens that stay: as many as a character has bytes


class Detokenizer(Protocol):
    """Of one sequence."""

    def push(self, ids: Sequence[int]) -> str:
        """Text that these further tokens complete; never a part of a character."""

    def finish(self) -> str:
        """The rest, now that no token follows: what is unfinished becomes U+FFFD."""


class Detokenization:
    """What the detokenizers of one tokenizer share: tables, filled as tokens are met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        self._tokenizer = tokenizer
        self._texts = _Texts(_Pieces(tokenizer)) if decoder.get("type") == "ByteLevel" else None
        self._kinds = _Kinds(tokenizer, byte_fallback=_uses_byte_fallback(decoder))

    def new(self) -> Detokenizer:
        """A detokenizer for a new sequence."""
        if self._texts is not None:
            return _ByteLevel(self._texts)
        return _Windowed(self._tokenizer, self._kinds)


def _uses_byte_fallback(decoder: dict) -> bool:  # type: ignore[type-arg]
    return any(part.get("type") == "ByteFallback" for part in decoder.get("decoders", [decoder]))


def _special_contents(tokenizer: Tokenizer) -> frozenset[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    return frozenset(token.content for token in added if token.special)


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 bytes stand for themselves, others are moved up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return alphabet


class _Pieces(dict[int, bytes]):
    """Bytes of a byte-level token by id; none for special and unknown ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = _special_contents(tokenizer)
        self._alphabet = _byte_of_char()

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special:
            piece = b""
        else:
            try:
                piece = bytes(self._alphabet[char] for char in token)
            except KeyError:  # an added token, written as it reads
                piece = token.encode()
        self[token_id] = piece
        return piece


class _Texts(dict[int, str | None]):
    """Text of a byte-level token that stands alone, by id; None where its bytes are no whole characters."""

    def __init__(self, pieces: _Pieces) -> None:
        self.pieces = pieces

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self.pieces[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class _ByteLevel:
    """Of one sequence of a byte-level tokenizer. A token at a time, the usual case, is two look-ups."""

    __slots__ = ("_decoder", "_texts")

    def __init__(self, texts: _Texts) -> None:
        self._texts = texts
        self._decoder = _Utf8("replace")

    def push(self, ids: Sequence[int]) -> str:
        if len(ids) == 1 and not self._decoder.buffer:
            text = self._texts[ids[0]]
            if text is not None:
                return text
        pieces = self._texts.pieces
        return self._decoder.decode(b"".join([pieces[i] for i in ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class _Kinds(dict[int, int]):
    """What a token is, by id: SKIPPED in text, PLAIN, or the BYTE of a run."""

    SKIPPED, PLAIN, BYTE = range(3)

    def __init__(self, tokenizer: Tokenizer, *, byte_fallback: bool) -> None:
        self._tokenizer = tokenizer
        self._special = _special_contents(tokenizer)
        self._byte_fallback = byte_fallback

    def __missing__(self, token_id: int) -> int:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._special:
            kind = self.SKIPPED
        elif self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = self.BYTE
        else:
            kind = self.PLAIN
        self[token_id] = kind
        return kind


class _Windowed:
    """Of one sequence of any other tokenizer: characters [0, _done) of the window's text were emitted."""

    __slots__ = ("_done", "_kinds", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, kinds: _Kinds) -> None:
        self._tokenizer = tokenizer
        self._kinds = kinds
        self._window: list[int] = []
        self._done = 0

    def push(self, ids: Sequence[int]) -> str:
        kinds = self._kinds
        window = self._window
        before = len(window)
        window += [i for i in ids if kinds[i] != kinds.SKIPPED]
        if len(window) == before or kinds[window[-1]] == kinds.BYTE:
            return ""
        text, end = self._decode()
        fresh = text[self._done : end]
        self._done = max(self._done, end)
        if len(window) > _MAX_WINDOW:
            del window[:-_CONTEXT]
            self._done = self._decode()[1]
        return fresh

    def finish(self) -> str:
        return self._decode()[0][self._done :]

    def _decode(self) -> tuple[str, int]:
        """The window's text, and the end of what no further token can change."""
        text = self._tokenizer.decode(self._window)
        return text, len(text) - text.endswith(_REPLACEMENT)
