"""GPT-2's tokenizer files, vocab.json and merges.txt, as the definition of a tokenizer.json."""

import json
from pathlib import Path
from typing import Any

from openpalm.errors import DataError

VOCABULARY, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
NAMES = (VOCABULARY, MERGES, ADDED)
END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 64 << 20


def are_in(folder: Path) -> bool:
    return (folder / VOCABULARY).is_file() and (folder / MERGES).is_file()


def definition(folder: Path) -> bytes:
    """The text of a tokenizer.json with the same ids. Raises DataError for damaged files.

    It is a byte-level BPE that adds no space in front of a text. <|endoftext|> and the tokens of
    added_tokens.json (GPT-J's vocabulary has 143) are special.
    """
    vocabulary = _ids(folder / VOCABULARY)
    special = _ids(folder / ADDED) if (folder / ADDED).exists() else {}
    if END_OF_TEXT in vocabulary:
        special[END_OF_TEXT] = vocabulary[END_OF_TEXT]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_id = sorted(special.items(), key=lambda item: item[1])
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, "special": True, **flags} for t, i in by_id],
        "normalizer": None,
        "pre_tokenizer": _byte_level(add_prefix_space=False),
        "post_processor": _byte_level(add_prefix_space=True, trim_offsets=False),
        "decoder": _byte_level(add_prefix_space=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(folder / MERGES, vocabulary),
        },
    }
    return json.dumps(content).encode()


def _byte_level(*, add_prefix_space: bool, trim_offsets: bool = True) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": True,
    }


def _ids(path: Path) -> dict[str, int]:
    """token -> id of a JSON file."""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({str(error)[:100]}); fetch it again") from None
    if not isinstance(content, dict) or any(type(i) is not int or i < 0 for i in content.values()):
        raise DataError(f"{path}: must map tokens to ids; fetch it again")
    return content


def _merges(path: Path, vocabulary: dict[str, int]) -> list[list[str]]:
    """The pairs of a merges.txt in order; its first line may be `#version: 0.2`."""
    merges = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or any(token not in vocabulary for token in (*pair, "".join(pair))):
            raise DataError(
                f"{path}:{number}: not two tokens of {VOCABULARY} that make a third; fetch both "
                "files again"
            )
        merges.append(pair)
    return merges


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: more than {MAX_FILE_BYTES} bytes; fetch it again")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; fetch it again") from None
