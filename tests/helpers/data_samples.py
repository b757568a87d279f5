"""What the data tests share: sample texts, real files where the checkout has them, vocabularies."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n" * 3,
    "def f(x):\n    if x > 10:\n        return x ** 2\n",
    "naïve café, 日本語, emoji 😀 and don't stop\n\n\n  1234",
]


def shared_file(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


def definition(model, *, decoder, pre_tokenizer=None, normalizer=None, special=()):
    """The JSON of a tokenizer; the ids of `special` follow the vocabulary's or are in it."""
    vocab = model["vocab"]
    known = vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": known.get(t, len(known) + i), "content": t, "special": True, **flags}
        for i, t in enumerate(special)
    ]
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    content |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    content |= {"post_processor": None, "decoder": decoder, "model": model}
    return json.dumps(content).encode()
