"""Prompts of a new project, so that its first visitor can judge at once.

They come from the data that the served model was fine-tuned or aligned on: what it can answer.
"""

from collections.abc import Iterator
from pathlib import Path

from openpalm.base.yaml_file import read_yaml
from openpalm.errors import DataError, OpenPalmError
from openpalm.feedback.labeling.new_items import Messages, add_prompts, prompt_digest
from openpalm.feedback.manage.imports import is_held_out
from openpalm.feedback.manage.upload_rows import UploadedItem, read_prompts
from openpalm.feedback.models import ModelVersion, Project, Prompt
from openpalm.feedback.training import generation

MOST = 600
HELD_OUT, MOST_HELD_OUT = 0.5, 0.7
ENOUGH = 240
"""held-out prompts: a promotion compares answers to 200 that no training has read"""
MOST_ROWS = 20_000
FIRST_ITEMS = 100
SAMPLING = {"temperature": 1.0, "max_tokens": 128}


def data_of(path: Path) -> Path | None:
    """The rows that the run of this checkpoint was trained on; None if there are none here."""
    for folder in (path, *path.absolute().parents[:3]):
        if not (folder / "config.yaml").is_file():
            continue
        try:
            given = read_yaml(folder / "config.yaml").get("data")
        except (OpenPalmError, AttributeError):
            return None
        data = Path(given) if isinstance(given, str) else None
        return data if data and data.is_file() and ".jsonl" in data.name else None
    return None


def add(project: Project, model: ModelVersion, data: Path) -> int:
    """Adds up to MOST prompts and queues answers to the first; returns the number of prompts."""
    chosen: dict[str, Messages] = {}
    try:
        for messages in _prompts(data):
            chosen.setdefault(prompt_digest(messages), messages)
            if len(chosen) == MOST:
                break
    except DataError:
        pass  # its rows have no prompts: the page asks for some
    share = min(max(HELD_OUT, ENOUGH / max(len(chosen), 1)), MOST_HELD_OUT)
    for held_out in (True, False):
        part = [m for digest, m in chosen.items() if is_held_out(digest, share) == held_out]
        add_prompts(project, [(messages, "file") for messages in part], held_out=held_out)
    first = Prompt.objects.filter(project=project, held_out=False).order_by("id")
    ids = list(first.values_list("id", flat=True)[:FIRST_ITEMS])
    if ids:
        generation.start(project, None, [{"model": model.pk, "n": 2, **SAMPLING}], prompts=ids)
    return len(chosen)


def _prompts(data: Path) -> Iterator[Messages]:
    for count, (_, row) in enumerate(read_prompts(data, data.name)):
        if count == MOST_ROWS:
            return
        if isinstance(row, UploadedItem):
            yield [{"role": m.role, "content": m.content} for m in row.prompt]
