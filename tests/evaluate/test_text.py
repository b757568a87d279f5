"""Bits per byte of a text, compared with a computation from the logits."""

import math

import pytest
import torch
from command_line import write_base

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, SettingsError
from openpalm.evaluate.text import text_loss, text_windows
from openpalm.generate.engine import Engine

TEXTS = ["The quick brown fox. " * 7, "né", "a"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("text") / "base")


def direct_bits(model, tokenizer, length, overlap):
    """Cuts the windows by their definition, a token at a time."""
    nats = 0.0
    for text in TEXTS:
        tokens = [tokenizer.end_of_text, *tokenizer.encode(text)]
        ends = [min(length, len(tokens) - 1)]
        while ends[-1] < len(tokens) - 1:
            ends.append(min(ends[-1] + length - overlap, len(tokens) - 1))
        for target in range(1, len(tokens)):
            end = next(end for end in ends if target <= end)
            window = tokens[max(0, end - length) : target]
            logits = model.logits(torch.tensor([window]))[0, -1].double()
            nats -= logits.log_softmax(-1)[tokens[target]].item()
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize(("length", "overlap"), [(48, 0), (48, 20), (7, 3), (1, 0)])
def test_bits_per_byte_are_those_of_the_logits(base, length, overlap):
    model, tokenizer = checkpoint.load(base), Tokenizer.load(base)
    windows = text_windows(tokenizer, TEXTS, length, overlap)
    size = sum(len(text.encode()) for text in TEXTS)
    found = text_loss(Engine(model, slots=3), windows, size)
    with torch.no_grad():
        expected = direct_bits(model, tokenizer, length, overlap)
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert (found.tokens, found.bytes) == (size, size)  # the tokens are bytes


def words(*, unknown):
    """A tokenizer of whole words, without an end of text if `unknown` is None."""
    from tokenizers import Tokenizer as Inner
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    inner = Inner(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    if unknown is not None:
        inner.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(inner.to_str().encode(), "words")


def test_a_text_that_the_tokenizer_loses_is_refused():
    with pytest.raises(DataError, match="cannot represent 2 bytes of the text"):
        text_windows(words(unknown=True), ["a b z"], 8, 0)


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(SettingsError, match="has no end-of-text token"):
        text_windows(words(unknown=None), ["a b"], 8, 0)
