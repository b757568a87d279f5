"""Byte-level tokenizers: new ones (bytes, BPE), and properties of any tokenizer.json.

A byte-level vocabulary has one printable character for each byte, so it can encode any text.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# GPT-2's pattern (Radford et al. 2019, encoder.py): a word includes the space before it; a run of
# white space without its last character is one piece, so that an indent is one token. Unlike in
# GPT-2, each digit is a piece, and combining marks stay with their letters.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)(?!\p{L})| ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
)
# Longer tokens would be rulers ("=====") and the like, at the expense of words.
MAX_TOKEN_CHARACTERS = 24
PIECE_CHARACTERS = 1 << 16

# Safe split points: after a single line break, or before a single space between two words. No
# byte-level pattern in use has a piece across such a point, and no run of white space is cut, which
# the patterns' lookaheads (\s+(?!\S)) would notice.
_SAFE_POINT = re.compile(r"(?<=\S)\n(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")
# Pre-tokenizers that split a text without dropping any of it, unless their behavior is "Removed".
_LOSSLESS_SPLITS = {"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"}
# Normalizers with the same result on a whole text and on its pieces, split at safe points.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


def byte_characters() -> list[str]:
    """The printable character that stands for each byte value (GPT-2's bytes_to_unicode)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def new_byte_tokenizer() -> "tokenizers.Tokenizer":
    """256 tokens, the id is the byte's value; without special tokens."""
    from tokenizers import Tokenizer, models

    vocabulary = {char: value for value, char in enumerate(byte_characters())}
    return _with_pattern(Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def new_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """A BPE of at most `vocab_size` tokens, trained on `texts`; without special tokens."""
    from tokenizers import Tokenizer, models, trainers

    inner = _with_pattern(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=byte_characters(),
        max_token_length=MAX_TOKEN_CHARACTERS,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return inner


def split_at_safe_points(text: str) -> list[str]:
    """Splits a text into pieces of PIECE_CHARACTERS or a little more, between tokens.

    The pieces can be encoded in parallel; their ids, joined, are the ids of the text.
    """
    pieces, start = [], 0
    while found := _SAFE_POINT.search(text, start + PIECE_CHARACTERS):
        pieces.append(text[start : found.end()])
        start = found.end()
    return [*pieces, text[start:]]


def encodes_in_pieces(content: dict[str, Any]) -> bool:
    """Whether the ids of a text are the joined ids of its pieces, for the tokenizer.json `content`.

    True for byte-level vocabularies that split words by a pattern. Others may mark the beginning
    of a text (SentencePiece's prefix space), or have tokens across lines.
    """
    parts = _steps(content.get("pre_tokenizer"), "pretokenizers")
    by_pattern = any(
        part.get("pattern") == {"Regex": PATTERN}
        or (part.get("type") == "ByteLevel" and part.get("use_regex", True))
        for part in parts
    )
    prefixed = any(part.get("add_prefix_space") for part in parts)
    normalizers = set(component_types(content.get("normalizer"), "normalizers"))
    # An added token with a line break, or one that takes the space before it, can span a split.
    spanning = any(
        token.get("lstrip") or "\n" in token.get("content", "")
        for token in content.get("added_tokens") or []
        if not token.get("special")
    )
    return by_pattern and not prefixed and not spanning and normalizers <= _LOCAL_NORMALIZERS


UTF8_BYTES = [value for value in range(0xF5) if value not in (0xC0, 0xC1)]
"""The byte values that occur in UTF-8; a vocabulary may lack the others."""


def is_lossless(content: dict[str, Any]) -> bool:
    """Whether every text survives encoding and decoding, for the tokenizer.json `content`.

    True for vocabularies with a token for each byte, unless a rule changes or drops characters.
    False if unsure.
    """
    model = content["model"]
    vocabulary = model.get("vocab") or {}
    pieces = set(vocabulary if isinstance(vocabulary, dict) else (p[0] for p in vocabulary))
    splits = _steps(content.get("pre_tokenizer"), "pretokenizers")
    if any(p.get("type") not in _LOSSLESS_SPLITS or p.get("behavior") == "Removed" for p in splits):
        return False
    if not all(map(_is_lossless_normalizer, _steps(content.get("normalizer"), "normalizers"))):
        return False
    decoders = component_types(content.get("decoder"), "decoders")
    if any(p.get("type") == "ByteLevel" for p in splits):
        characters = byte_characters()
        return decoders == ["ByteLevel"] and pieces >= {characters[b] for b in UTF8_BYTES}
    return (
        bool(model.get("byte_fallback"))
        and "ByteFallback" in decoders
        and pieces >= {f"<0x{value:02X}>" for value in UTF8_BYTES}
    )


def _is_lossless_normalizer(normalizer: dict[str, Any]) -> bool:
    # NFC and NFD change the code points of a character, but not the character.
    spaces = normalizer.get("pattern") == {"String": " "} and normalizer.get("content") == "\u2581"
    kind = normalizer.get("type")
    return kind in ("NFC", "NFD", "Prepend") or (kind == "Replace" and spaces)


def max_expansion(part: Any, inside: str) -> int:
    """The factor by which a component's replacements, applied in sequence, can lengthen a text."""
    factor = 1
    for step in _steps(part, inside):
        nested = max_expansion(step, inside) if isinstance(step.get(inside), list) else 1
        content = step.get("content") if step.get("type") == "Replace" else ""
        factor *= nested * max(1, len(content) if isinstance(content, str) else 1)
    return factor


def component_types(part: Any, inside: str) -> list[str]:
    """The type of a tokenizer.json component, or the types of its sequence."""
    return [str(p.get("type")) for p in _steps(part, inside)]


def _steps(part: Any, inside: str) -> list[dict[str, Any]]:
    """The steps of a component: itself, or the list in its field `inside` if it is a sequence."""
    if not isinstance(part, dict):
        return []
    steps = part.get(inside)
    return [p for p in (steps if isinstance(steps, list) else [part]) if isinstance(p, dict)]


def _with_pattern(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    from tokenizers import Regex, decoders, pre_tokenizers

    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return inner
