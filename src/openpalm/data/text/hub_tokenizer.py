"""Finds the tokenizer of a model on the Hugging Face Hub by the model's name."""

import re
from pathlib import Path

from openpalm.base.hub import hub_errors, reason_of
from openpalm.data.text import gpt2_files
from openpalm.errors import DataError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    *gpt2_files.NAMES,
)
HUB_PREFIX = "hub:"
PLAIN_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
"""names without an account that need no hub: in front"""
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_tokenizer(spec: str) -> str:
    """A tokenizer as `Tokenizer.from_spec` reads it: a name on the Hub as the folder downloaded.

    A name is hub:NAME, ACCOUNT/NAME or one of PLAIN_NAMES; everything else, and what exists as a
    path, stays as it is. Raises DataError where the model has no tokenizer, or the Hub cannot be
    reached.
    """
    name = spec.removeprefix(HUB_PREFIX)
    if name == spec:
        known = name in PLAIN_NAMES or _NAME.fullmatch(name)
        if not known or name.endswith(".json") or Path(name).exists():
            return spec
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (*hub_errors(), OSError) as error:
        raise DataError(
            f"--tokenizer {spec}: no such file, and cannot be downloaded from the Hub "
            f"({reason_of(error)}); give the path of a tokenizer.json"
        ) from None
    if not ((folder / FILES[0]).is_file() or gpt2_files.are_in(folder)):
        raise DataError(f"--tokenizer {spec}: this model has no {FILES[0]}; give another one")
    return str(folder)
