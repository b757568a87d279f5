import json
import random

import numpy as np
import pytest
from data_samples import TEXTS, definition, shared_file

from openpalm.data.text import byte_level
from openpalm.data.text.tokenizer import MINIMUM_BPE, SPECIAL_TOKENS, Tokenizer
from openpalm.errors import DataError

NASTY = [
    "",
    " ",
    "\n\n \t\r\n",
    "a\x00b",
    "<|endoftext|>",
    "x<|user|>y<|end|>",
    "\ufeffbom",
    "e\u0301 vs é",
    "👩‍👩‍👧 🇩🇪",
    "\u2028\u200b",
    "12345 ٣٤",
    "    indented\n        more",
]


def random_texts(count):
    draw = random.Random(7)
    alphabets = ["ab \n", "é日😀 \t", "<|>endoftx/s", "".join(map(chr, range(32, 500)))]
    return [
        "".join(draw.choices(draw.choice(alphabets), k=draw.randrange(80))) for _ in range(count)
    ]


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_decoding_gives_the_text_back(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in NASTY + TEXTS + random_texts(200):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_ids_are_byte_values(byte):
    text = "aé😀\x00\n"
    assert byte.encode(text) == list(text.encode())
    assert byte.vocab_size == 256 + len(SPECIAL_TOKENS)
    assert [byte.special_id(token) for token in SPECIAL_TOKENS] == list(range(256, byte.vocab_size))


def test_every_byte_has_a_token_in_a_bpe_vocabulary(bpe):
    for text in ("ÿ", "\U0010ffff", "\x01"):
        assert bpe.decode(bpe.encode(text)) == text
    assert set(bpe.token_bytes) >= {bytes([value]) for value in range(256)}


def test_text_never_becomes_a_special_token(any_tokenizer):
    specials = any_tokenizer.special_ids
    unknown = {any_tokenizer.special_id("[UNK]"), any_tokenizer.special_id("<unk>")}
    names = [*SPECIAL_TOKENS, "</s>", "<s>", "[SEP]"]
    texts = [f"a {name}{name} b" for name in names] + names + random_texts(100)
    for text, ids in zip(texts, any_tokenizer.encode_batch(texts), strict=True):
        assert not (specials - unknown) & set(ids), text


def test_a_vocabulary_with_its_special_token_as_a_word_loses_no_text(unigram):
    end = unigram.special_id("</s>")
    raw = unigram._inner.encode("cats</s>", add_special_tokens=False).ids
    assert end in raw  # the library alone would have ended the document here
    assert unigram.decode(unigram.encode("cats</s>")).replace(" ", "") == "cats</s>"


def test_unknown_characters_stay_unknown(wordpiece):
    assert wordpiece.encode("the 日") == [4, 0]
    model = {"type": "Unigram", "unk_id": 1, "vocab": [["a", -1.0], ["<unk>", -1.0]]}
    unigram = Tokenizer(definition(model, decoder=None, special=["<unk>"]), "t")
    assert unigram.encode("a日a") == [0, 1, 0]


def test_a_special_token_of_one_character_is_left_out():
    model = {"type": "WordLevel", "vocab": {"a": 0, "¤": 1, "?": 2}, "unk_token": "?"}
    tokenizer = Tokenizer(definition(model, decoder=None, special=["¤"]), "t")
    assert tokenizer.encode("¤") == []
    assert tokenizer.encode("a") == [0]


def test_a_batch_is_encoded_as_each_text_alone(any_tokenizer):
    texts = NASTY + TEXTS + random_texts(50)
    assert any_tokenizer.encode_batch(texts) == [any_tokenizer.encode(text) for text in texts]


def test_nothing_is_added_padded_or_truncated():
    content = json.loads(Tokenizer.byte()._canonical)
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"}
    content["truncation"]["stride"] = 0
    content["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0}
    content["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<|end|>"}
    before = [
        {"SpecialToken": {"id": "<|user|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    special = {"id": "<|user|>", "ids": [258], "tokens": ["<|user|>"]}
    content["post_processor"] = {"type": "TemplateProcessing", "single": before, "pair": before}
    content["post_processor"]["special_tokens"] = {"<|user|>": special}
    tokenizer = Tokenizer(json.dumps(content).encode(), "t")
    assert tokenizer.encode("abcd") == [97, 98, 99, 100]


def test_pieces_give_the_ids_of_the_whole(bpe, byte, monkeypatch):
    monkeypatch.setattr(byte_level, "PIECE_CHARACTERS", 7)
    texts = ["\n".join(random_texts(60)), " ".join(TEXTS * 3), "a\n b \n\nc  d\re\n\u0301f" * 9]
    for tokenizer in (bpe, byte):
        for text in texts:
            pieces = tokenizer.cut(text)
            assert len(pieces) > 5
            assert "".join(pieces) == text
            whole = tokenizer._inner.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text) == whole


def test_pieces_give_the_ids_of_the_whole_for_a_foreign_vocabulary(monkeypatch):
    tokenizer = Tokenizer.load(shared_file("gpt-neox-20b-tokenizer.json"))
    monkeypatch.setattr(byte_level, "PIECE_CHARACTERS", 50)
    text = "".join(TEXTS * 5) + "\n".join(random_texts(100))
    assert len(tokenizer.cut(text)) > 10
    assert tokenizer.encode(text) == tokenizer._inner.encode(text, add_special_tokens=False).ids


def test_vocabularies_that_mark_a_texts_beginning_are_not_cut(unigram, wordpiece):
    text = "the cat\n" * 20_000
    assert unigram.cut(text) == [text] == wordpiece.cut(text)


def test_training_is_deterministic_and_as_large_as_asked():
    one, two = (Tokenizer.train_bpe(iter(TEXTS * 5), 320) for _ in range(2))
    assert one.digest == two.digest
    assert one.vocab_size == 320
    assert Tokenizer.train_bpe(TEXTS * 5, 321).digest != one.digest
    assert Tokenizer.train_bpe(["ab"], 1000).vocab_size == MINIMUM_BPE


def test_words_digits_and_indents():
    trained = Tokenizer.train_bpe(["        return value 12345 12345\n" * 50], 600)
    shown = [trained.decode([i]) for i in trained.encode("        return value 12345")]
    assert shown[:3] == [" " * 7, " return", " value"]
    assert "".join(shown[3:]) == " 12345"
    assert all(len(piece.strip()) == 1 for piece in shown[3:])


def test_saved_and_loaded_are_equal(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(path)
        assert loaded.digest == any_tokenizer.digest
        assert loaded.encode_batch(TEXTS) == any_tokenizer.encode_batch(TEXTS)
        assert loaded.end_of_text == any_tokenizer.end_of_text


def test_the_digest_is_of_the_content_not_its_spelling(bpe, tmp_path):
    content = json.loads(bpe._canonical)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=3, ensure_ascii=False))
    assert Tokenizer.load(tmp_path).digest == bpe.digest


def test_end_of_text_is_found_among_special_tokens_only(byte, unigram, wordpiece):
    assert byte.end_of_text == 256
    assert unigram.end_of_text == 2
    assert wordpiece.end_of_text is None
    assert byte.special_id("a") is None


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_byte_lengths_add_up_to_the_text(name, request):
    tokenizer = request.getfixturevalue(name)
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths.dtype == np.int64
    for text in NASTY + TEXTS:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[list(tokenizer.special_ids)].sum() == 0


def test_byte_lengths_of_a_foreign_byte_level_vocabulary():
    tokenizer = Tokenizer.load(shared_file("gpt-neox-20b-tokenizer.json"))
    text = shared_file("tinyshakespeare.txt").read_text()[:50_000] + "".join(TEXTS)
    ids = tokenizer.encode(text)
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_byte_lengths_by_decoding(unigram):
    lengths = unigram.byte_lengths()
    ids = unigram.encode("the cats é")
    # The library writes a space before the first word; it is no part of the text.
    assert lengths[ids].sum() == len(" the cats é".encode())


def test_strings_that_are_not_unicode_text(byte, unigram):
    for tokenizer in (byte, unigram):
        with pytest.raises(DataError, match="half a surrogate pair"):
            tokenizer.encode("a\ud800")


def test_ids_beyond_the_vocabulary_have_no_text(byte):
    assert byte.decode([97, 300]) == "a"


def test_specs(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")

    def nothing():
        raise AssertionError("the texts must not be read")
        yield ""

    assert Tokenizer.from_spec("byte", nothing()).digest == Tokenizer.byte().digest
    assert Tokenizer.from_spec(str(tmp_path), nothing()).digest == bpe.digest
    assert Tokenizer.from_spec("bpe:400", TEXTS * 5).digest == bpe.digest


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("bpe:many", "VOCAB must be a whole number"),
        ("bpe:", "try bpe:4096"),
        ("bpe:-5", "VOCAB must be a whole number"),
        ("bpe:100", f"VOCAB must be {MINIMUM_BPE}"),
        ("bpe:99999999", "to 16777216"),
        ("gpt3", "no such tokenizer; use byte, bpe:VOCAB, the path"),
    ],
)
def test_wrong_specs(spec, says):
    with pytest.raises(DataError, match=says) as error:
        Tokenizer.from_spec(spec, TEXTS)
    assert spec in str(error.value)


def vocabulary(ids):
    return {"type": "WordLevel", "unk_token": "a", "vocab": ids}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "has no `model`"),
        (b'{"model": 3}', "has no `model`"),
        (b'{"model": {"type": "Nothing"}}', "not a tokenizer this version"),
        (definition(vocabulary({}), decoder=None), "ids up to -1"),
        (definition(vocabulary({"a": 4_000_000_000}), decoder=None), "ids up to 4000000000"),
        (definition(vocabulary({"\ud800": 0}), decoder=None), "not a tokenizer"),
    ],
)
def test_hostile_files(content, says, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="has at most 67108864"):
        Tokenizer.load(path)
