"""Finds the end-of-text token of a tokenizer.json: by its name, or in its configuration files.

A tokenizer.json has no field for this token. If the name is not a usual one, we mark the token's
entry in `added_tokens` with a field that the `tokenizers` library ignores.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openpalm.errors import DataError

MARK = "end_of_text"
# In order of preference: the first that a vocabulary has ends its documents.
NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "[eos]",
    "<|EOS|>",
    "<|endofdocument|>",
    "<|end_of_document|>",
    "<eod>",
    "<|eod|>",
    "<EOD>",
    "<EOT>",
    "<|end_of_sentence|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek: full-width bars, U+2581 for spaces
)
# Chat models name one of these as eos_token. They end turns; they end documents only if the
# vocabulary has no other token for it.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<|end|>")
MAX_CONFIG_BYTES = 64 << 20


def find_in_config_files(folder: Path, token_of: Callable[[int], str | None]) -> str | None:
    """The eos_token in the first configuration file of `folder` that names one.

    `token_of` is id -> token. Raises DataError for a file that cannot be read.
    """
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_object(folder / file).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    for number in _ids(_read_object(folder / "generation_config.json").get("eos_token_id")):
        if token := token_of(number):
            return token
    return None


def mark(content: Mapping[str, Any], token: str, number: int) -> bytes:
    """The tokenizer.json `content` with `token` marked as the special token for end of text."""
    others = [dict(entry) for entry in content.get("added_tokens") or []]
    found = next((entry for entry in others if entry.get("content") == token), None)
    if found is None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        found = {"id": number, "content": token, **flags}
        others.append(found)
    for entry in others:
        entry.pop(MARK, None)
    found |= {"special": True, MARK: True}
    others.sort(key=lambda entry: entry["id"])
    return json.dumps({**content, "added_tokens": others}).encode()


def find_mark(content: Mapping[str, Any]) -> str | None:
    """The token that `mark` marked."""
    tokens = content.get("added_tokens") or []
    found = (t.get("content") for t in tokens if isinstance(t, dict) and t.get(MARK) is True)
    return next((token for token in found if isinstance(token, str)), None)


def _ids(value: object) -> Iterator[int]:
    """The ids of a field that is an id or a list of ids."""
    for number in value if isinstance(value, list) else [value]:
        if type(number) is int and number >= 0:
            yield number


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if there is no file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise DataError(f"{path}: has more than {MAX_CONFIG_BYTES} bytes; fetch it again")
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: is not JSON ({str(error)[:100]}); fetch it again, or remove it and name the "
            "end of a text with --end-of-text"
        ) from None
    return content if isinstance(content, dict) else {}
