"""Small vocabularies of every kind."""

import pytest
from data_samples import TEXTS, definition

from openpalm.data.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte():
    return Tokenizer.byte()


@pytest.fixture(scope="session")
def bpe():
    return Tokenizer.train_bpe(TEXTS * 5, 400)


@pytest.fixture(scope="session")
def unigram():
    """As sentencepiece: a space begins a word, unknown characters fall back to bytes, and the
    end marker stands among the ordinary pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "▁the", "▁cat", "s", "a", "t", "▁a", "ing", "e", "h", "\ufffd"]
    model = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [[piece, -1.0] for piece in pieces],
        "byte_fallback": True,
    }
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    steps = [space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    return Tokenizer(
        definition(
            model,
            decoder={"type": "Sequence", "decoders": steps},
            pre_tokenizer={**metaspace, "split": False},
            special=["<unk>", "<s>", "</s>"],
        ),
        "unigram",
    )


@pytest.fixture(scope="session")
def wordpiece():
    pieces = ["[UNK]", "[SEP]", "cat", "##s", "the", ".", "don", "'", "t", "##ing"]
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {piece: i for i, piece in enumerate(pieces)},
    }
    return Tokenizer(
        definition(
            model,
            decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
            pre_tokenizer={"type": "BertPreTokenizer"},
            special=["[UNK]", "[SEP]"],
        ),
        "wordpiece",
    )


@pytest.fixture(params=["byte", "bpe", "unigram", "wordpiece"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)
