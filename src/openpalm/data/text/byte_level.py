"""The byte alphabet and the words of our own vocabularies, and where a text may be cut in two.

A byte-level vocabulary spells each byte as one printable character, so any text has an encoding.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# After GPT-2's pattern (Radford et al. 2019, encoder.py): a word keeps the space before it, and of
# a run of white space all but the last stay together, so that an indent is one token. Unlike
# GPT-2, digits stand alone and marks stay with their letters.
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)(?!\p{L})| ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
)
# Longer ones are rulers ("=====") and other oddities that crowd out words.
MAX_TOKEN_CHARACTERS = 24
PIECE_CHARACTERS = 1 << 16

# After a lone line break, or before a lone space between words. No byte-level pattern in use joins
# what stands on both sides, and the runs of white space that their lookaheads see stay whole.
_SEAM = re.compile(r"(?<=\S)\n(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")
# Pre-tokenisers that cut a text and drop none of it, unless their behaviour is "Removed".
_KEEPING = {"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"}
# Normalisers that treat a text the same in two pieces cut at a seam.
_LOCAL_NORMALISERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}


def byte_characters() -> list[str]:
    """The printable character that stands for each byte value (GPT-2's bytes_to_unicode)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def new_byte_tokenizer() -> "tokenizers.Tokenizer":
    """256 tokens whose id is the byte's value; no markers yet."""
    from tokenizers import Tokenizer, models

    vocabulary = {char: value for value, char in enumerate(byte_characters())}
    return _with_words(Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


def new_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """At most `vocab_size` byte-pair tokens learnt from `texts`; no markers yet."""
    from tokenizers import Tokenizer, models, trainers

    inner = _with_words(Tokenizer(models.BPE()))
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
    """`text` in pieces of PIECE_CHARACTERS or a little more, cut where no token can lie."""
    pieces, start = [], 0
    while found := _SEAM.search(text, start + PIECE_CHARACTERS):
        pieces.append(text[start : found.end()])
        start = found.end()
    return [*pieces, text[start:]]


def encodes_in_pieces(content: dict[str, Any]) -> bool:
    """Whether the tokenizer.json `content` gives a text the ids of its pieces, one after another.

    Only byte-level vocabularies that cut words by a pattern surely do; others mark where a text
    begins, or join across lines.
    """
    parts = _parts(content.get("pre_tokenizer"), "pretokenizers")
    by_pattern = any(
        part.get("pattern") == {"Regex": PATTERN}
        or (part.get("type") == "ByteLevel" and part.get("use_regex", True))
        for part in parts
    )
    prefixed = any(part.get("add_prefix_space") for part in parts)
    normalisers = set(component_types(content.get("normalizer"), "normalizers"))
    greedy = any(
        token.get("lstrip") or "\n" in token.get("content", "")
        for token in content.get("added_tokens") or []
        if not token.get("special")
    )
    return by_pattern and not prefixed and not greedy and normalisers <= _LOCAL_NORMALISERS


UTF8_BYTES = [value for value in range(0xF5) if value not in (0xC0, 0xC1)]
"""The bytes that UTF-8 uses; vocabularies may lack the others."""


def spells_everything(content: dict[str, Any]) -> bool:
    """Whether the tokenizer.json `content` surely has ids for every text and loses none of it.

    True for vocabularies with a token for each byte, unless a rule changes or drops characters.
    """
    model = content["model"]
    vocabulary = model.get("vocab") or {}
    pieces = set(vocabulary if isinstance(vocabulary, dict) else (p[0] for p in vocabulary))
    splits = _parts(content.get("pre_tokenizer"), "pretokenizers")
    if any(p.get("type") not in _KEEPING or p.get("behavior") == "Removed" for p in splits):
        return False
    if not all(map(_keeps, _parts(content.get("normalizer"), "normalizers"))):
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


def _keeps(normaliser: dict[str, Any]) -> bool:
    """Whether a normaliser loses nothing; NFC and NFD spell the same characters differently."""
    spaces = normaliser.get("pattern") == {"String": " "} and normaliser.get("content") == "\u2581"
    kind = normaliser.get("type")
    return kind in ("NFC", "NFD", "Prepend") or (kind == "Replace" and spaces)


def growth(part: Any, inside: str) -> int:
    """How many times longer the replacements of a component, one after another, make a text."""
    factor = 1
    for step in _parts(part, inside):
        nested = growth(step, inside) if isinstance(step.get(inside), list) else 1
        content = step.get("content") if step.get("type") == "Replace" else ""
        factor *= nested * max(1, len(content) if isinstance(content, str) else 1)
    return factor


def component_types(part: Any, inside: str) -> list[str]:
    """The types of a tokenizer.json component, those of a sequence in order."""
    return [str(p.get("type")) for p in _parts(part, inside)]


def _parts(part: Any, inside: str) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    steps = part.get(inside)
    return [p for p in (steps if isinstance(steps, list) else [part]) if isinstance(p, dict)]


def _with_words(inner: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    from tokenizers import Regex, decoders, pre_tokenizers

    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return inner
