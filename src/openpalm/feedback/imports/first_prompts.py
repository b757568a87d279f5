"""Prompts of a new project, so that its first visitor can judge at once.

They come from the data that the served model was fine-tuned or aligned on: what it can answer.
"""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from openpalm.base.yaml_file import read_yaml
from openpalm.errors import DataError, OpenPalmError
from openpalm.feedback.imports.upload_rows import UploadedItem, read_prompts
from openpalm.feedback.items.new_items import Messages, add_split_prompts, prompt_digest
from openpalm.feedback.models import ModelVersion, Project, Prompt
from openpalm.feedback.training import generation

MOST = 600
HELD_OUT, MOST_HELD_OUT = 0.5, 0.7
ENOUGH = 240
"""held-out prompts: a promotion compares answers to 200 that no training has read"""
MOST_ROWS = 20_000
MOST_RUNS = 4
FIRST_ITEMS = 100
SAMPLING = {"temperature": 1.0, "max_tokens": 128}


def data_of(path: Path) -> list[Path]:
    """The files of rows that this checkpoint's run, and the runs it began from, were trained on."""
    found: list[Path] = []
    for _ in range(MOST_RUNS):
        settings = _settings_of(path)
        data, init = settings.get("data"), settings.get("init")
        if isinstance(data, str) and Path(data).is_file() and ".jsonl" in Path(data).name:
            found.append(Path(data))
        if not isinstance(init, str) or not Path(init).is_dir():
            break
        path = Path(init)
    return found


def _settings_of(path: Path) -> dict[str, Any]:
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / "config.yaml").is_file():
            try:
                return read_yaml(folder / "config.yaml")
            except OpenPalmError:
                break
    return {}


def add(project: Project, model: ModelVersion, data: Iterable[Path]) -> int:
    """Adds up to MOST prompts and queues answers to the first; returns the number of prompts."""
    chosen: dict[str, Messages] = {}
    for messages in chain.from_iterable(map(_prompts, data)):
        chosen.setdefault(prompt_digest(messages), messages)
        if len(chosen) == MOST:
            break
    share = min(max(HELD_OUT, ENOUGH / max(len(chosen), 1)), MOST_HELD_OUT)
    add_split_prompts(project, chosen, "file", share)
    first = Prompt.objects.filter(project=project, held_out=False).order_by("id")
    ids = list(first.values_list("id", flat=True)[:FIRST_ITEMS])
    if ids:
        generation.start(project, None, [{"model": model.pk, "n": 2, **SAMPLING}], prompts=ids)
    return len(chosen)


def _prompts(data: Path) -> Iterator[Messages]:
    try:
        for _, row in islice(read_prompts(data, data.name), MOST_ROWS):
            if isinstance(row, UploadedItem):
                yield [{"role": m.role, "content": m.content} for m in row.prompt]
    except DataError:
        pass  # without prompts: the page asks for some
