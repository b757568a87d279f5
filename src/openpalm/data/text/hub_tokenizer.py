"""Finds the tokenizer of a model on the Hugging Face Hub by the model's name."""

import re
from pathlib import Path

from openpalm.errors import DataError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_tokenizer(spec: str) -> str:
    """A tokenizer as `Tokenizer.from_spec` reads it: ACCOUNT/NAME as the folder downloaded.

    Everything else stays as it is. Raises DataError where the model has no tokenizer.json, or the
    Hub cannot be reached.
    """
    if not _NAME.fullmatch(spec) or spec.endswith(".json") or Path(spec).exists():
        return spec
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(spec, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"--tokenizer {spec}: no such file, and cannot be downloaded from the Hub ({reason}); "
            "give the path of a tokenizer.json"
        ) from None
    if not (folder / FILES[0]).is_file():
        raise DataError(f"--tokenizer {spec}: this model has no {FILES[0]}; give another one")
    return str(folder)
