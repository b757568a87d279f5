"""Text to token ids and back: bytes, a trained BPE, or anybody's tokenizer.json.

One class over the `tokenizers` library. Text never becomes a special token, whatever it spells;
special ids are only ever placed by our own code. No token is added that the text does not have.
"""

import codecs
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpalm.data.text import end_of_text
from openpalm.data.text.byte_level import (
    byte_characters,
    component_types,
    encodes_in_pieces,
    growth,
    new_bpe_tokenizer,
    new_byte_tokenizer,
    spells_everything,
    split_at_safe_points,
)
from openpalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# The last ones are for whoever needs a marker later without changing the vocabulary.
MARKERS = (
    END_OF_TEXT,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    *(f"<|reserved_{i}|>" for i in range(4)),
)
MAX_FILE_BYTES = 64 << 20
MAX_VOCABULARY = 1 << 24
# A chain of replacements a -> aa doubles the text at each; published ones stay below 10.
MAX_GROWTH = 256
MINIMUM_BPE = 256 + len(MARKERS)


class Tokenizer:
    """Ids are below `vocab_size`; `digest` is the same for the same vocabulary and rules.

    Use the constructors `byte`, `train_bpe`, `load` and `from_spec`.
    """

    def __init__(self, definition: bytes, name: str):
        """From the JSON text of a tokenizer.json; raises DataError calling it `name`."""
        self._content = _validated(definition, name)
        self._canonical = _canonical(self._content)
        self._inner = _built(self._canonical.decode(), name)
        # Text that spells a special token is text.
        self._inner.encode_special_tokens = True
        self._inner.no_padding()
        self._inner.no_truncation()
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_VOCABULARY:
            raise DataError(
                f"{name}: ids up to {self.vocab_size - 1}, must be 0 to {MAX_VOCABULARY - 1}; "
                "use another tokenizer"
            )
        added = self._inner.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        # The mark of an unknown character is what such text means, and ends or opens nothing.
        model = self._content["model"]
        unknown = model.get("unk_id", self._inner.token_to_id(str(model.get("unk_token"))))
        self._in_pieces = self.is_byte_level and encodes_in_pieces(self._content)
        self._unknown = unknown
        self._forgeable = frozenset(self._special.values()) - {unknown}

    @classmethod
    def byte(cls) -> "Tokenizer":
        """256 tokens whose id is the byte's value, then MARKERS."""
        return cls._with_markers(new_byte_tokenizer())

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of `vocab_size` ids (fewer where the text is too small), MARKERS last.

        Deterministic: the same texts give the same digest. Raises DataError below MINIMUM_BPE.
        """
        check_bpe_size(vocab_size)
        return cls._with_markers(new_bpe_tokenizer(texts, vocab_size - len(MARKERS)))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a tokenizer.json, or a folder that holds one. Raises DataError."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(
                    f"{path}: {size} bytes, a tokenizer.json has at most {MAX_FILE_BYTES}"
                )
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such tokenizer; use byte, bpe:VOCAB or the path of a tokenizer.json"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    @classmethod
    def from_spec(
        cls, spec: str, texts: Iterable[str], end_token: str | None = None
    ) -> "Tokenizer":
        """`byte`, `bpe:VOCAB` (trained on `texts`, which nothing else reads) or a path.

        With a path the end of a text is `end_token`, else what the configuration files beside it
        name, else what its own name tells.
        """
        if spec == "byte" or is_bpe(spec):
            if end_token not in (None, END_OF_TEXT):
                raise DataError(
                    f"--end-of-text {end_token}: {spec} ends texts with {END_OF_TEXT}; leave it out"
                )
            return cls.byte() if spec == "byte" else cls.train_bpe(texts, bpe_size(spec))
        return cls.load(spec)._ending(Path(spec), end_token)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, byte for byte what `digest` is the SHA-256 of."""
        Path(path).write_bytes(self._canonical)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._canonical).hexdigest()

    @cached_property
    def end_of_text(self) -> int | None:
        """The id that ends a document, if this vocabulary has one."""
        names = (end_of_text.marked_in(self._content), *end_of_text.NAMES)
        ids = (self.special_id(name) for name in names if name is not None)
        return next((i for i in ids if i is not None), None)

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens as they are spelt, by id."""
        return sorted(self._special, key=self._special.__getitem__)

    def special_id(self, marker: str) -> int | None:
        """The id of a special token; None for what text could spell as well."""
        return self._special.get(marker)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores; long texts in parallel too.

        Raises DataError for a string that is no Unicode text (half a surrogate pair), or that
        the vocabulary's own rules fail on.
        """
        pieces = [self.cut(text) for text in texts]
        flat = [piece for group in pieces for piece in group]
        with _library():
            encoded = iter(self._inner.encode_batch_fast(flat, add_special_tokens=False))
        rows = [
            next(encoded).ids if len(group) == 1 else [i for _ in group for i in next(encoded).ids]
            for group in pieces
        ]
        return [
            row if self._forgeable.isdisjoint(row) else self._defused(text)
            for text, row in zip(texts, rows, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        with _library():
            return self._inner.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def is_lossless(self) -> bool:
        """Whether every text surely comes back from its ids (composed characters apart)."""
        return spells_everything(self._content)

    def lost_bytes(self, text: str, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the characters of `text` that decoding its `ids` does not give back."""
        if self.is_lossless:
            return 0
        decoded = self.decode([i for i in ids if i != self._unknown])
        before, after = (Counter(unicodedata.normalize("NFC", t)) for t in (text, decoded))
        return sum(len(char.encode()) * count for char, count in (before - after).items())

    @property
    def in_pieces(self) -> bool:
        """Whether the ids of a text are those of its pieces, cut at seams, one after another."""
        return self._in_pieces

    def cut(self, text: str) -> list[str]:
        """`text` in pieces whose ids, joined, are the ids of the whole; one where unsure."""
        return split_at_safe_points(text) if self._in_pieces else [text]

    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of text each id stands for; 0 for special tokens.

        Exact for byte-level vocabularies; for others, what the id adds to a decoded text.
        """
        if self.is_byte_level:
            return np.array([len(piece) for piece in self.token_bytes], dtype=np.int64)
        lengths = np.array(self._decoded_lengths(), dtype=np.int64)
        lengths[list(self._special.values())] = 0
        return lengths

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether decoding joins the bytes of each token, whatever its neighbours are."""
        return component_types(self._content.get("decoder"), "decoders") == ["ByteLevel"]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id of a byte-level vocabulary; none for special tokens."""
        value = {char: byte for byte, char in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            # As the library's decoder: what is not spelt in byte characters stands for itself.
            known = all(char in value for char in token)
            table[i] = bytes(value[char] for char in token) if known else token.encode()
        for i in self._special.values():
            table[i] = b""
        return table

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes an id adds to a text; none for special tokens."""
        if token_id in self.special_ids:
            return b""
        if self.is_byte_level:
            table = self.token_bytes
            return table[token_id] if token_id < len(table) else b""
        spelt = self._inner.id_to_token(token_id) or ""
        if token_id in self.byte_fallback_ids:
            return bytes([int(spelt[3:5], 16)])
        before = self.decode([self._ordinary])
        return self.decode([self._ordinary, token_id]).removeprefix(before).encode()

    @cached_property
    def _ordinary(self) -> int:
        """An id of letters: the next one keeps the space that a word begins with."""
        ids = range(self.vocab_size)
        return next((i for i in ids if self.decode([i]).isalpha()), 0)

    @cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        """The ids spelt <0x00> to <0xFF>, whose meaning depends on the run they stand in."""
        names = (f"<0x{value:02X}>" for value in range(256))
        ids = (self._inner.token_to_id(name) for name in names)
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    def _defused(self, text: str) -> list[int]:
        """Encodes text out of which the model itself made a special token.

        Some vocabularies hold "</s>" among their ordinary pieces. Halving the text until no part
        spells one is slow, and only hostile text pays for it.
        """
        with _library():
            ids = self._inner.encode(text, add_special_tokens=False).ids
        if self._forgeable.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return [i for i in ids if i not in self._forgeable]
        middle = len(text) // 2
        return self._defused(text[:middle]) + self._defused(text[middle:])

    def _decoded_lengths(self) -> list[int]:
        """Bytes each id adds after an ordinary token, which keeps the space that a word begins."""
        before = len(self.decode([self._ordinary]).encode())
        pairs = [[self._ordinary, i] for i in range(self.vocab_size)]
        with _library():
            texts = self._inner.decode_batch(pairs, skip_special_tokens=True)
        fallback = self.byte_fallback_ids
        return [
            1 if i in fallback else max(0, len(text.encode()) - before)
            for i, text in enumerate(texts)
        ]

    def _ending(self, path: Path, token: str | None) -> "Tokenizer":
        """This vocabulary, its end of text the one that `token` or the files at `path` name."""
        own, number = self.end_of_text, None
        if token is None:
            folder = path if path.is_dir() else path.parent
            token = end_of_text.named_beside(folder, self._inner.id_to_token)
            number = None if token is None else self._inner.token_to_id(token)
            if number is None or (own is not None and token in end_of_text.TURN_ENDS):
                return self
        assert token is not None
        if number is None:
            number = self._inner.token_to_id(token)
        if number is None:
            number = self.vocab_size
        if number == own:
            return self
        ended = Tokenizer(end_of_text.marked(self._content, token, number), str(path))
        if ended.end_of_text != number:
            raise DataError(f"{path}: {token!r} cannot be its end of text; name another token")
        return ended

    @classmethod
    def _with_markers(cls, inner: "tokenizers.Tokenizer") -> "Tokenizer":
        from tokenizers import AddedToken

        inner.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS])
        return cls(inner.to_str().encode(), "our own tokenizer")


class StreamDecoder:
    """Text of ids that come one by one: the pieces joined are `decode` of all of them.

    `push` gives what is certain so far, holding back the bytes of a character not yet complete.
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
        """The text that became certain with this id; often "" inside a character."""
        special = token_id in self._tokenizer.special_ids
        if self._tokenizer.is_byte_level:
            return self._bytes.decode(self._token_bytes(token_id, special))
        if special and self._skip_special:
            return ""
        self._window.append(token_id)
        # A run of byte tokens is decoded as a whole, valid or not, when it is over.
        if token_id in self._tokenizer.byte_fallback_ids:
            return ""
        text = self._decoded(self._window)
        piece = text.removesuffix("\ufffd")[self._emitted :]
        self._emitted += len(piece)
        if len(self._window) > self.WINDOW:
            held = len(text) - self._emitted
            self._window = self._window[-self.KEPT :]
            self._emitted = len(self._decoded(self._window)) - held
        return piece

    def flush(self) -> str:
        """What was still held back; the decoder is then as new."""
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


def is_bpe(spec: str) -> bool:
    return spec.startswith("bpe:")


def bpe_size(spec: str) -> int:
    """VOCAB of `bpe:VOCAB`. Raises DataError where it is no number, too small or too large."""
    number = spec.removeprefix("bpe:")
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise DataError(f"tokenizer {spec}: VOCAB must be a whole number; try bpe:4096")
    check_bpe_size(int(number))
    return int(number)


def check_bpe_size(vocab_size: int) -> None:
    if not MINIMUM_BPE <= vocab_size <= MAX_VOCABULARY:
        raise DataError(
            f"tokenizer bpe:{vocab_size}: VOCAB must be {MINIMUM_BPE} (256 bytes and "
            f"{len(MARKERS)} markers) to {MAX_VOCABULARY}; try bpe:4096"
        )


@contextmanager
def _library() -> Iterator[None]:
    """What the `tokenizers` library raises for a text, as a DataError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except TypeError:
        raise DataError("text with half a surrogate pair in it; give valid UTF-8") from None
    except BaseException as error:  # a panic in the library is no Exception
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the rules of this tokenizer.json fail on this text ({reason}); "
            "shorten the text or use another tokenizer"
        ) from None


def _validated(definition: bytes, name: str) -> dict[str, Any]:
    remedy = "give a Hugging Face tokenizer.json"
    try:
        content = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: is not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"{name}: has no `model`; {remedy}")
    for part, inside in (("normalizer", "normalizers"), ("decoder", "decoders")):
        if growth(content.get(part), inside) > MAX_GROWTH:
            raise DataError(
                f"{name}: its {part} can make a text more than {MAX_GROWTH} times as long; "
                "use another tokenizer"
            )
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    """One spelling for one content, whichever library version or editor wrote it."""
    return json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()


def _built(definition: str, name: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Inner

    try:
        return Inner.from_str(definition)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library is no Exception
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name}: not a tokenizer this version of `tokenizers` reads ({reason})"
        ) from None
