"""Streaming decode: turns token ids into text one by one, never half a character."""

import codecs

from openpalm.data.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids one by one; the joined pieces of text equal `decode` of all ids.

    `push` returns the text that is certain, and holds back the bytes of an incomplete character.
    The cost of a push does not grow with the text.
    """

    WINDOW = 32
    KEPT = 8

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text already given out

    def push(self, token_id: int) -> str:
        """The text that this id made certain; often "" inside a character."""
        special = token_id in self._tokenizer.special_ids
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(self._token_bytes(token_id, special))
        if special and self._skip_special:
            return ""
        self._window.append(token_id)
        # A run of byte tokens is decoded together, and each byte of an invalid run is a U+FFFD:
        # its text is certain only after the run.
        if token_id in self._tokenizer.byte_fallback_ids:
            return ""
        # Decoders of other vocabularies look at neighbours (spaces between words), so the recent
        # ids are decoded together and the new end of their text is returned.
        text = self._decoded(self._window)
        # U+FFFD at the end may be the first bytes of a character: wait for the next id.
        piece = text.removesuffix("\ufffd")[self._emitted :]
        self._emitted += len(piece)
        # Bounded cost: keep a few ids as context, and count their text as returned already.
        if len(self._window) > self.WINDOW:
            held = len(text) - self._emitted
            self._window = self._window[-self.KEPT :]
            self._emitted = len(self._decoded(self._window)) - held
        return piece

    def flush(self) -> str:
        """The text that was held back; resets the decoder."""
        piece = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        if self._window:
            piece += self._decoded(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return piece

    def _token_bytes(self, token_id: int, special: bool) -> bytes:
        if special and not self._skip_special:
            return self._tokenizer.decode([token_id], skip_special=False).encode()
        table = self._tokenizer.token_bytes
        return table[token_id] if token_id < len(table) else b""

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)
