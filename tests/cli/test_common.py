"""What verbs compose alike."""

import json
from pathlib import Path

import pytest
from data_samples import definition

from openpalm.cli import common
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text.byte_level import byte_characters
from openpalm.errors import SettingsError


def test_a_given_tokenizer_ends_texts_as_it_does_for_data_prepare(tmp_path):
    """Hugging Face's folder: the end of a text is named beside tokenizer.json, not in it."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = True
    vocabulary = {char: i for i, char in enumerate(byte_characters())}
    model = {"type": "BPE", "merges": [], "vocab": vocabulary}
    special = ["<|im_start|>", "<|im_end|>"]
    hub = tmp_path / "hf"
    hub.mkdir()
    content = definition(model, decoder=level, pre_tokenizer=level, special=special)
    (hub / "tokenizer.json").write_bytes(content)
    (hub / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}', encoding="utf-8")
    texts = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9))
    (tmp_path / "a.jsonl").write_text(texts, encoding="utf-8")
    file = str(hub / "tokenizer.json")
    request = PrepareRequest(
        inputs=[str(tmp_path / "a.jsonl")], out=tmp_path / "out", tokenizer=file
    )
    models_own = prepare(request).tokenizer
    for given in (hub / "tokenizer.json", hub):
        tokenizer = common.tokenizer_of(tmp_path, given)
        assert tokenizer is not None
        assert (tokenizer.digest, tokenizer.end_of_text) == (models_own, 257)


def test_a_tokenizer_to_train_is_refused_where_there_is_no_text(tmp_path):
    with pytest.raises(SettingsError, match="--tokenizer bpe:400: there is no text to train it"):
        common.tokenizer_of(tmp_path, Path("bpe:400"))
