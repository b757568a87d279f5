"""Decoding ids one by one gives the text of all of them, with a bounded cost."""

import random

import pytest

from openpalm.data.text.stream_decoder import StreamDecoder
from openpalm.data.text.tokenizer import Tokenizer


def streamed(tokenizer, ids, **options):
    decoder = StreamDecoder(tokenizer, **options)
    return "".join([decoder.push(i) for i in ids] + [decoder.flush()])


@pytest.mark.parametrize("skip_special", [True, False])
def test_streaming_equals_the_whole_for_any_ids(any_tokenizer, skip_special):
    draw = random.Random(3)
    for length in (*range(1, 30), *[200] * 30):
        ids = [draw.randrange(any_tokenizer.vocab_size) for _ in range(length)]
        whole = any_tokenizer.decode(ids, skip_special=skip_special)
        assert streamed(any_tokenizer, ids, skip_special=skip_special) == whole


def test_streaming_equals_the_whole_for_byte_runs(unigram):
    bytes_of = [unigram._inner.token_to_id(f"<0x{b:02X}>") for b in range(256)]
    word = unigram._inner.token_to_id("▁cat")
    draw = random.Random(5)
    for _ in range(60):
        data = [bytes_of[b] for b in "é😀".encode()] + [draw.choice(bytes_of)] * draw.randrange(2)
        ids = ([word] * draw.randrange(3) + data) * 15 + [unigram.special_id("</s>")] + data
        assert streamed(unigram, ids) == unigram.decode(ids)


def test_streaming_holds_back_only_an_unfinished_character(byte):
    decoder = StreamDecoder(byte)
    assert [decoder.push(i) for i in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    decoder.push(0xF0)
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_the_cost_of_streaming_does_not_grow(wordpiece, monkeypatch):
    longest = 0
    decode = Tokenizer.decode

    def counting(self, ids, **options):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    streamed(wordpiece, [2, 3, 4] * 300)
    assert 0 < longest <= StreamDecoder.WINDOW + 1


def test_ids_beyond_the_vocabulary_have_no_text(byte):
    assert streamed(byte, [97, 300]) == "a"
