"""Tokenizer: text to token ids and back, for bytes, a trained BPE or any tokenizer.json.

A class around the `tokenizers` library. Text never becomes a special token, even if it spells
one; only our own code places special ids. `encode` adds no token of its own.
"""

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

from openpalm.data.text import end_of_text, gpt2_files
from openpalm.data.text.byte_level import (
    byte_characters,
    component_types,
    encodes_in_pieces,
    is_lossless,
    max_expansion,
    new_bpe_tokenizer,
    new_byte_tokenizer,
    split_at_safe_points,
)
from openpalm.data.text.hub_tokenizer import find_tokenizer
from openpalm.errors import DataError, one_line

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# The reserved tokens allow new roles later without a change of the vocabulary size.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    *(f"<|reserved_{i}|>" for i in range(4)),
)
MAX_FILE_BYTES = 64 << 20
MAX_VOCABULARY = 1 << 24
# Each replacement a -> aa in a chain doubles the text, so a small file could fill the memory.
# Published tokenizers stay below 10.
MAX_EXPANSION = 256
MINIMUM_BPE = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """Ids are below `vocab_size`; equal vocabularies and rules have equal `digest`s.

    Use the constructors `byte`, `train_bpe`, `load` and `from_spec`.
    """

    def __init__(self, definition: bytes, name: str):
        """Builds it from the text of a tokenizer.json. A DataError begins with `name`."""
        self._content = _parse_definition(definition, name)
        self._canonical = _canonical(self._content)
        self._inner = _build(self._canonical.decode(), name)
        # Text that spells a special token is encoded as text.
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
        # Text may become the id for unknown characters, which has no function in a template.
        model = self._content["model"]
        unknown = model.get("unk_id", self._inner.token_to_id(str(model.get("unk_token"))))
        self._in_pieces = self.is_byte_level and encodes_in_pieces(self._content)
        self._unknown = unknown
        self._forgeable = frozenset(self._special.values()) - {unknown}

    @classmethod
    def byte(cls) -> "Tokenizer":
        """256 tokens, the id is the byte's value; then SPECIAL_TOKENS."""
        return cls._with_special_tokens(new_byte_tokenizer())

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of `vocab_size` ids (fewer for too little text), SPECIAL_TOKENS last.

        Deterministic: the same texts give the same digest. Raises DataError below MINIMUM_BPE.
        """
        check_bpe_size(vocab_size)
        return cls._with_special_tokens(new_bpe_tokenizer(texts, vocab_size - len(SPECIAL_TOKENS)))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a folder, or GPT-2's files. Raises DataError."""
        path = Path(path)
        if path.is_dir():
            folder, path = path, path / "tokenizer.json"
            if not path.exists() and gpt2_files.are_in(folder):
                return cls(gpt2_files.definition(folder), str(folder))
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise DataError(
                    f"{path}: {size} bytes, a tokenizer.json has at most {MAX_FILE_BYTES}"
                )
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such tokenizer; use byte, bpe:VOCAB, the path of a tokenizer.json or "
                "hub:NAME"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    @classmethod
    def from_spec(
        cls, spec: str, texts: Iterable[str], end_token: str | None = None
    ) -> "Tokenizer":
        """`byte`, `bpe:VOCAB` (trained on `texts`, read for this only), a path or a hub name.

        For a path or a name, the end-of-text token is `end_token`, or else the one that the
        configuration files in its folder name, or else the one with a usual name.
        """
        if spec == "byte" or is_bpe(spec):
            if end_token not in (None, END_OF_TEXT):
                raise DataError(
                    f"--end-of-text {end_token}: {spec} ends texts with {END_OF_TEXT}; leave it out"
                )
            return cls.byte() if spec == "byte" else cls.train_bpe(texts, bpe_size(spec))
        spec = find_tokenizer(spec)
        return cls.load(spec)._with_end_of_text(Path(spec), end_token)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json; `digest` is the SHA-256 of the file."""
        Path(path).write_bytes(self._canonical)

    @property
    def definition(self) -> str:
        """The text of tokenizer.json, as `save` writes it."""
        return self._canonical.decode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._canonical).hexdigest()

    @cached_property
    def end_of_text(self) -> int | None:
        """The id of the end-of-text token, if this vocabulary has one."""
        names = (end_of_text.find_mark(self._content), *end_of_text.NAMES)
        ids = (self.special_id(name) for name in names if name is not None)
        return next((i for i in ids if i is not None), None)

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens as text, ordered by id."""
        return sorted(self._special, key=self._special.__getitem__)

    def special_id(self, marker: str) -> int | None:
        """The id of a special token; None for an ordinary token, which text can produce."""
        return self._special.get(marker)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores; a long text is split and encoded in parallel.

        Raises DataError for a string that is not Unicode text (half a surrogate pair), or if the
        rules of the vocabulary fail on it.
        """
        pieces = [self.cut(text) for text in texts]
        flat = [piece for group in pieces for piece in group]
        with _library_errors():
            encoded = iter(self._inner.encode_batch_fast(flat, add_special_tokens=False))
        rows = [
            next(encoded).ids if len(group) == 1 else [i for _ in group for i in next(encoded).ids]
            for group in pieces
        ]
        return [
            row if self._forgeable.isdisjoint(row) else self._encode_hostile(text)
            for text, row in zip(texts, rows, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD, unknown ids give no text."""
        with _library_errors():
            return self._inner.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def is_lossless(self) -> bool:
        """Whether decoding gives back every text, up to Unicode normalization; False if unsure."""
        return is_lossless(self._content)

    def lost_bytes(self, text: str, ids: Sequence[int]) -> int:
        """The UTF-8 bytes of characters of `text` that are missing after decoding its `ids`."""
        if self.is_lossless:
            return 0
        decoded = self.decode([i for i in ids if i != self._unknown])
        before, after = (Counter(unicodedata.normalize("NFC", t)) for t in (text, decoded))
        return sum(len(char.encode()) * count for char, count in (before - after).items())

    @property
    def in_pieces(self) -> bool:
        """Whether the ids of a text are the joined ids of its pieces (see `cut`)."""
        return self._in_pieces

    def cut(self, text: str) -> list[str]:
        """Splits a text so that the joined ids of the pieces are its ids; one piece if unsure."""
        return split_at_safe_points(text) if self._in_pieces else [text]

    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size]: UTF-8 bytes of text for each id; 0 for special tokens.

        Exact for byte-level vocabularies; for others, the bytes that the id adds to a decoded text.
        """
        if self.is_byte_level:
            return np.array([len(piece) for piece in self.token_bytes], dtype=np.int64)
        lengths = np.array(self._decoded_lengths(), dtype=np.int64)
        lengths[list(self._special.values())] = 0
        return lengths

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether decoding only joins the bytes of the tokens, independent of their neighbours."""
        return component_types(self._content.get("decoder"), "decoders") == ["ByteLevel"]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id of a byte-level vocabulary; empty for special tokens."""
        value = {char: byte for byte, char in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, i in self._inner.get_vocab(with_added_tokens=True).items():
            # Like the library's decoder: a token with other than byte characters is plain text.
            known = all(char in value for char in token)
            table[i] = bytes(value[char] for char in token) if known else token.encode()
        for i in self._special.values():
            table[i] = b""
        return table

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that an id adds to a text; empty for special tokens."""
        if token_id in self.special_ids:
            return b""
        if self.is_byte_level:
            table = self.token_bytes
            return table[token_id] if token_id < len(table) else b""
        token = self._inner.id_to_token(token_id) or ""
        if token_id in self.byte_fallback_ids:
            return bytes([int(token[3:5], 16)])  # "<0xE2>"
        before = self.decode([self._ordinary])
        return self.decode([self._ordinary, token_id]).removeprefix(before).encode()

    @cached_property
    def _ordinary(self) -> int:
        """The id of a token of letters. Decoders drop the space of the first word of a text, so
        lengths are measured after this token."""
        ids = range(self.vocab_size)
        return next((i for i in ids if self.decode([i]).isalpha()), 0)

    @cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        """The ids of <0x00> to <0xFF>: a run of them is decoded together, as UTF-8."""
        names = (f"<0x{value:02X}>" for value in range(256))
        ids = (self._inner.token_to_id(name) for name in names)
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    def _encode_hostile(self, text: str) -> list[int]:
        """Encodes a text that the model would turn into a special token.

        Some vocabularies have "</s>" among their ordinary tokens. The text is halved until no part
        spells one; this is slow, but only hostile texts need it.
        """
        with _library_errors():
            ids = self._inner.encode(text, add_special_tokens=False).ids
        if self._forgeable.isdisjoint(ids):
            return ids
        if len(text) == 1:
            return [i for i in ids if i not in self._forgeable]
        middle = len(text) // 2
        return self._encode_hostile(text[:middle]) + self._encode_hostile(text[middle:])

    def _decoded_lengths(self) -> list[int]:
        """The bytes that each id adds after an ordinary token (see `_ordinary`)."""
        before = len(self.decode([self._ordinary]).encode())
        pairs = [[self._ordinary, i] for i in range(self.vocab_size)]
        with _library_errors():
            texts = self._inner.decode_batch(pairs, skip_special_tokens=True)
        fallback = self.byte_fallback_ids
        return [
            1 if i in fallback else max(0, len(text.encode()) - before)
            for i, text in enumerate(texts)
        ]

    def _with_end_of_text(self, path: Path, token: str | None) -> "Tokenizer":
        """This vocabulary with the end-of-text token `token`, or the one of the files at `path`."""
        own, number = self.end_of_text, None
        if token is None:
            folder = path if path.is_dir() else path.parent
            token = end_of_text.find_in_config_files(folder, self._inner.id_to_token)
            number = None if token is None else self._inner.token_to_id(token)
            # A chat model's eos_token ends turns; a token for documents takes precedence.
            if number is None or (own is not None and token in end_of_text.TURN_ENDS):
                return self
        assert token is not None
        if number is None:
            number = self._inner.token_to_id(token)
        if number is None:  # a new token at the end of the vocabulary
            number = self.vocab_size
        if number == own:
            return self
        ended = Tokenizer(end_of_text.mark(self._content, token, number), str(path))
        if ended.end_of_text != number:
            raise DataError(f"{path}: {token!r} cannot be its end of text; name another token")
        return ended

    @classmethod
    def _with_special_tokens(cls, inner: "tokenizers.Tokenizer") -> "Tokenizer":
        from tokenizers import AddedToken

        inner.add_special_tokens(
            [AddedToken(m, special=True, normalized=False) for m in SPECIAL_TOKENS]
        )
        return cls(inner.to_str().encode(), "our own tokenizer")


def is_bpe(spec: str) -> bool:
    return spec.startswith("bpe:")


def bpe_size(spec: str) -> int:
    """VOCAB of `bpe:VOCAB`. Raises DataError unless it is a number within the limits."""
    number = spec.removeprefix("bpe:")
    if not re.fullmatch(r"[0-9]{1,9}", number):
        raise DataError(f"tokenizer {spec}: VOCAB must be a whole number; try bpe:4096")
    check_bpe_size(int(number))
    return int(number)


def check_bpe_size(vocab_size: int) -> None:
    if not MINIMUM_BPE <= vocab_size <= MAX_VOCABULARY:
        raise DataError(
            f"tokenizer bpe:{vocab_size}: VOCAB must be {MINIMUM_BPE} (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens) to {MAX_VOCABULARY}; try bpe:4096"
        )


@contextmanager
def _library_errors() -> Iterator[None]:
    """Turns the errors of the `tokenizers` library on a text into DataError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except TypeError:
        raise DataError("text with half a surrogate pair in it; give valid UTF-8") from None
    except BaseException as error:  # a Rust panic in the library is not an Exception
        reason = one_line(error, 200)
        raise DataError(
            f"the rules of this tokenizer.json fail on this text ({reason}); "
            "shorten the text or use another tokenizer"
        ) from None


def _parse_definition(definition: bytes, name: str) -> dict[str, Any]:
    remedy = "give a Hugging Face tokenizer.json"
    try:
        content = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: is not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"{name}: has no `model`; {remedy}")
    for part, inside in (("normalizer", "normalizers"), ("decoder", "decoders")):
        if max_expansion(content.get(part), inside) > MAX_EXPANSION:
            raise DataError(
                f"{name}: its {part} can make a text more than {MAX_EXPANSION} times as long; "
                "use another tokenizer"
            )
    return content


def _canonical(content: dict[str, Any]) -> bytes:
    """The same bytes for the same content, independent of library version and formatting."""
    return json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()


def _build(definition: str, name: str) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Inner

    try:
        return Inner.from_str(definition)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic in the library is not an Exception
        reason = one_line(error, 200)
        raise DataError(
            f"{name}: not a tokenizer this version of `tokenizers` reads ({reason})"
        ) from None
