"""Which token ends a document, and what a vocabulary cannot spell."""

import json

import pytest
from data_samples import TEXTS, definition, shared_file

from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text.byte_level import byte_characters
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError

BYTES = {char: i for i, char in enumerate(byte_characters())}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def vocabulary(folder, special, *, missing="", normalizer=None):
    """A byte-level tokenizer.json without the bytes of `missing`."""
    model = {"type": "BPE", "merges": []}
    model["vocab"] = {char: i for char, i in BYTES.items() if char not in missing}
    path = folder / "tokenizer.json"
    path.write_bytes(
        definition(
            model, decoder=LEVEL, pre_tokenizer=LEVEL, special=special, normalizer=normalizer
        )
    )
    return path


def end_of(path, token=None):
    tokenizer = Tokenizer.from_spec(str(path), (), token)
    return {i: t for t, i in tokenizer._special.items()}.get(tokenizer.end_of_text)


def prepared(tmp_path, tokenizer, texts, **options):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    request = PrepareRequest(
        inputs=[str(tmp_path / "a.jsonl")],
        out=tmp_path / "out",
        tokenizer=str(tokenizer),
        **options,
    )
    return prepare(request)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|im_end|>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}}),
        ("generation_config.json", {"eos_token_id": 257}),
        ("generation_config.json", {"eos_token_id": [257, 256]}),
    ],
)
def test_configuration_files_name_the_end_of_text(file, content, tmp_path):
    path = vocabulary(tmp_path, ["<|im_start|>", "<|im_end|>"])
    assert end_of(path) is None
    (tmp_path / file).write_text(json.dumps(content))
    assert end_of(path) == "<|im_end|>"
    assert end_of(tmp_path) == "<|im_end|>"


def test_every_document_ends_with_it_wherever_the_tokenizer_goes(tmp_path):
    path = vocabulary(tmp_path, ["<|im_start|>", "<|im_end|>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    prepared(tmp_path, path, [f"document {i}" for i in range(300)])
    dataset = open_dataset(tmp_path / "out")
    for split in ("train", "val"):
        tokens = dataset.tokens(split)[:]
        assert (tokens == 257).sum() == dataset.manifest.splits[split].documents
    saved = Tokenizer.load(tmp_path / "out")  # no other file is beside it
    assert saved.end_of_text == 257
    # The library still reads it, and the text itself can never spell it.
    assert 257 not in saved.encode("a<|im_end|>b")


@pytest.mark.parametrize(
    ("special", "eos", "right"),
    [
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),  # Qwen, instructed
        (["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),  # Llama 3, instructed
        (["</s>", "<|my_end|>"], "<|my_end|>", "<|my_end|>"),
        (["</s>"], "<not there>", "</s>"),
        (["<eos>", "<bos>"], None, "<eos>"),
        (["<|begin|>"], None, None),
    ],
)
def test_the_end_of_a_turn_ends_documents_if_there_is_no_other(special, eos, right, tmp_path):
    path = vocabulary(tmp_path, special)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert end_of(path) == right


def test_a_known_name_leaves_the_digest_alone(tmp_path):
    path = vocabulary(tmp_path, ["<|endoftext|>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert Tokenizer.from_spec(str(path), ()).digest == Tokenizer.load(path).digest


def test_an_unknown_end_of_text_is_asked_for(tmp_path):
    path = vocabulary(tmp_path, ["<|a|>", "<|b|>"])
    with pytest.raises(DataError, match=r"--end-of-text TOKEN \(special tokens: <\|a\|>, <\|b\|>"):
        prepared(tmp_path, path, ["one", "two"])
    assert not (tmp_path / "out").exists()
    prepared(tmp_path, path, [f"text {i}" for i in range(9)], end_of_text="<|b|>")
    assert open_dataset(tmp_path / "out").tokenizer().end_of_text == 257


def test_a_missing_end_token_is_added(tmp_path):
    path = vocabulary(tmp_path, ["<|a|>"])
    tokenizer = Tokenizer.from_spec(str(path), (), "<|mine|>")
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (257, 258)


@pytest.mark.parametrize("spec", ["byte", "bpe:400"])
def test_our_own_vocabularies_have_their_end(spec, tmp_path):
    with pytest.raises(DataError, match=r"--end-of-text </s>: .* leave it out"):
        prepared(tmp_path, spec, ["one", "two"], end_of_text="</s>")


def test_a_configuration_that_is_damaged_is_named(tmp_path):
    path = vocabulary(tmp_path, ["<|a|>"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: is not JSON"):
        Tokenizer.from_spec(str(path), ())


def test_another_tokenizer_under_the_same_path_is_another_dataset(tmp_path):
    texts = [f"text {i}" for i in range(9)]
    prepared(tmp_path, vocabulary(tmp_path, ["</s>"]), texts)
    assert prepared(tmp_path, tmp_path / "tokenizer.json", texts).unchanged
    with pytest.raises(DataError, match="other tokenizer"):
        prepared(tmp_path, vocabulary(tmp_path, ["</s>", "<|a|>"]), texts)


def test_bytes_that_a_vocabulary_lacks_are_counted_and_not_in_the_text(tmp_path):
    """Without the byte 0xC3, no e with an accent can be spelt: two bytes each."""
    path = vocabulary(tmp_path, ["</s>"], missing=byte_characters()[0xC3])
    texts = [f"caf\u00e9 number {i}" for i in range(300)]
    found = prepared(tmp_path, path, texts)
    total = sum(len(text.encode()) for text in texts)
    assert sum(split.lost for split in found.splits.values()) == 2 * 300
    assert sum(split.bytes for split in found.splits.values()) == total - 2 * 300
    assert open_dataset(tmp_path / "out").manifest == found


def test_a_text_that_is_mostly_lost_is_refused(tmp_path):
    path = vocabulary(tmp_path, ["</s>"], missing=[byte_characters()[b] for b in range(0xC0, 0xF0)])
    with pytest.raises(DataError, match=r"cannot spell .* bytes of the train split; use byte"):
        prepared(tmp_path, path, [f"\u65e5\u672c\u8a9e\u65e5\u672c {i}" for i in range(30)])


def test_lossless_vocabularies_lose_no_bytes(byte, bpe, unigram, tmp_path):
    complete = Tokenizer.load(vocabulary(tmp_path, [], normalizer={"type": "NFC"}))
    for tokenizer in (byte, bpe, unigram, complete):
        assert tokenizer.is_lossless
    neox = Tokenizer.load(shared_file("gpt-neox-20b-tokenizer.json"))
    assert neox.is_lossless
    assert '"lost"' not in prepared(tmp_path, "byte", TEXTS).to_json().decode()


def test_bytes_lost_by_other_rules(wordpiece, tmp_path):
    lower = Tokenizer.load(vocabulary(tmp_path, [], normalizer={"type": "Lowercase"}))
    assert lower.lost_bytes("A bC", lower.encode("A bC")) == 2
    text = "the cats\n\u65e5"
    assert wordpiece.lost_bytes(text, wordpiece.encode(text)) == 1 + 3
    with_unknown = {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}
    words = Tokenizer(definition(with_unknown, decoder=None), "t")
    assert words.lost_bytes("zzz", words.encode("zzz")) == 3


def test_rules_that_fail_or_grow_without_end_are_errors(tmp_path):
    content = json.loads(vocabulary(tmp_path, ["</s>"]).read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    split["invert"] = False
    steps = {"type": "Sequence", "pretokenizers": [split, LEVEL]}
    panics = Tokenizer(json.dumps({**content, "pre_tokenizer": steps}).encode(), "t")
    for encode in (panics.encode, panics._encode_hostile):
        with pytest.raises(DataError, match="the rules of this tokenizer"):
            encode("a" * 40 + "b")
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for part, inside in (("normalizer", "normalizers"), ("decoder", "decoders")):
        nested = {"type": "Sequence", inside: [double] * 20}
        grows = {**content, part: {"type": "Sequence", inside: [nested, nested]}}
        with pytest.raises(DataError, match=f"its {part} can make a text more than 256 times"):
            Tokenizer(json.dumps(grows).encode(), "t")
