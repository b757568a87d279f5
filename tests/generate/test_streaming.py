"""Text around the engine: streamed pieces, characters of many bytes, stop strings."""

import random

import pytest
import torch
from tiny_models import tiny

from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request, Token
from openpalm.generate.sampling import Sampling
from openpalm.generate.streaming import Completion, StopStrings, complete, prompt_ids, stream

TEXT = "naïve café, 日本語 and 😀😀; don't stop\n\nUser: no"


class Scripted:
    """An engine that says what it is told, a token of the tokenizer at a time."""

    def __init__(self, ids, finish="length"):
        self.ids = ids
        self.finish = finish
        self.given = 0

    def generate(self, requests):
        for i, token in enumerate(self.ids):
            self.given += 1
            yield Token(0, token, -1.0, self.finish if i == len(self.ids) - 1 else None)


@pytest.fixture(scope="module")
def byte():
    return Tokenizer.byte()


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train_bpe([TEXT * 20, "the quick brown fox " * 20], 330)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def streamed(tokenizer, text, stops=(), stop_ids=frozenset(), ids=None):
    engine = Scripted(tokenizer.encode(text) if ids is None else ids)
    answer = Completion("", [], "")
    request = Request([0], 10**6, stop_ids=stop_ids)
    pieces = list(stream(engine, tokenizer, request, stops, answer))
    assert "".join(pieces) == answer.text
    assert "" not in pieces
    return pieces, answer, engine


def test_joined_deltas_are_the_text(tokenizer):
    pieces, answer, _ = streamed(tokenizer, TEXT)
    assert answer.text == TEXT
    assert answer.tokens == tokenizer.encode(TEXT)
    assert answer.finish == "length"
    assert len(pieces) > 10


def test_no_delta_ends_inside_a_character(tokenizer):
    pieces, _, _ = streamed(tokenizer, "日本語😀é" * 5)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_shows_as_one(byte):
    _, answer, _ = streamed(byte, "", ids=list("a😀".encode())[:-1])
    assert answer.text == byte.decode(list("a😀".encode())[:-1])


def test_streamed_text_is_the_decoded_text(tokenizer):
    engine = Engine(tiny(vocab_size=tokenizer.vocab_size))
    for seed in range(4):
        request = Request([1], 60, Sampling(temperature=100.0, seed=seed))
        answer = Completion("", [], "")
        pieces = list(stream(engine, tokenizer, request, (), answer))
        assert answer.tokens == engine.completions([request])[0]
        assert "".join(pieces) == tokenizer.decode(answer.tokens)


def test_the_end_marker_is_a_token_and_no_text(byte):
    end = byte.end_of_text
    _, answer, _ = streamed(byte, "", stop_ids=frozenset({end}), ids=[*b"hi", end])
    assert (answer.text, answer.tokens) == ("hi", [*b"hi", end])


# --- stop strings


@pytest.mark.parametrize("stop", ["and", "日本", "😀", "\n\n", "User:", "stop\n\nUser: no", "n"])
def test_text_ends_before_the_stop_string(tokenizer, stop):
    _, answer, _ = streamed(tokenizer, TEXT, [stop])
    assert answer.text == TEXT[: TEXT.index(stop)]
    assert answer.finish == "stop"


def test_nothing_is_generated_after_a_stop(byte):
    text = "abcSTOPdefghi"
    _, answer, engine = streamed(byte, text, ["STOP"])
    assert answer.text == "abc"
    assert engine.given == len("abcSTOP")


def test_a_stop_at_the_very_start_gives_no_text(tokenizer):
    pieces, answer, _ = streamed(tokenizer, TEXT, ["naï"])
    assert (pieces, answer.text, answer.finish) == ([], "", "stop")


def test_an_incomplete_stop_string_is_returned(tokenizer):
    _, answer, _ = streamed(tokenizer, "the answer is STO", ["STOP"])
    assert (answer.text, answer.finish) == ("the answer is STO", "length")


def test_several_stops_end_at_the_first(tokenizer):
    _, answer, _ = streamed(tokenizer, TEXT, ["nowhere", "User:", "and", ""])
    assert answer.text == TEXT[: TEXT.index("and")]


def test_a_stop_inside_held_back_bytes_is_found(byte):
    """The text of a last, incomplete character appears only when the decoder is flushed."""
    cut = list("a😀".encode())[:-1]
    _, answer, _ = streamed(byte, "", ["\ufffd"], ids=cut)
    assert (answer.text, answer.finish) == ("a", "stop")


def until_a_stop(text, stops):
    """Up to the stop that is complete first, by str.find alone."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s and s in text]
    return text[: min(ends)[1]] if ends else text


def test_stop_strings_are_find_however_the_text_is_cut():
    rng = random.Random(0)

    def words(most):
        return "".join(rng.choices("abc", weights=(5, 3, 1), k=rng.randint(0, most)))

    stopped = 0
    for _ in range(4000):
        text, stops = words(20), [words(5) for _ in range(rng.randint(0, 3))]
        gate, passed, rest = StopStrings(stops), "", text
        while rest and not gate.stopped:
            size = rng.randint(1, 4)
            piece, rest = rest[:size], rest[size:]
            passed += gate.push(piece)
            held = passed + gate.held
            assert gate.stopped or text.startswith(held)
        passed += gate.flush()
        assert passed == until_a_stop(text, stops), (text, stops)
        assert gate.stopped == (passed != text)
        assert not any(stop in passed for stop in stops if stop)
        stopped += gate.stopped
    assert 500 < stopped < 3500


def test_only_text_that_may_begin_a_stop_string_is_held_back():
    gate = StopStrings(["abcd"])
    assert gate.push("xxab") == "xx"
    assert gate.push("c") == ""
    assert gate.push("x") == "abcx"


# --- prompts


def test_complete_equals_each_prompt_alone(byte):
    engine = Engine(tiny())
    how = Sampling(temperature=0.8, seed=2)
    prompts = ["a", "The quick brown fox", ""]
    together = complete(engine, byte, prompts, max_new_tokens=12, sampling=how)
    alone = [complete(engine, byte, [p], max_new_tokens=12, sampling=how)[0] for p in prompts]
    assert together == alone


def test_complete_ends_at_end_of_text(byte):
    model = tiny(tied=False)
    with torch.no_grad():
        model.unembedding[byte.end_of_text] = 100 * model.unembedding[ord("a")]
    texts = complete(Engine(model), byte, ["a", "b"], max_new_tokens=40, sampling=Sampling())
    free = Engine(model).completions([Request([97], 40, Sampling())])[0]
    assert byte.end_of_text in free
    assert texts[0] == byte.decode(free[: free.index(byte.end_of_text)])


def test_an_empty_prompt_begins_a_document(byte):
    assert prompt_ids(byte, "") == [byte.end_of_text]
    assert prompt_ids(byte, "hi") == [*b"hi"]
