"""Files of datasets on the Hub: found in huggingface_hub's cache, refused in one line."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from openpalm.base.hub import fetch_dataset_file
from openpalm.data.rows.tasks import read_mixture
from openpalm.errors import DataError, WorkError

ADDRESS = "hf://datasets/owner/things/train/rows.jsonl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub's cache with one revision of one file, and no network."""
    folder = tmp_path / "hub"
    repository = folder / "datasets--owner--things"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    file = repository / "snapshots" / commit / "train" / "rows.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"question": "1?", "answer": "2"}\n', encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return file


def test_a_file_is_found_once_it_was_downloaded(cache: Path):
    assert fetch_dataset_file(ADDRESS).resolve() == cache.resolve()
    assert fetch_dataset_file(ADDRESS.replace("things", "things@main")).resolve() == cache.resolve()


def test_a_task_names_the_file(cache: Path, tmp_path: Path):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"tasks:\n  - data: {ADDRESS}\n", encoding="utf-8")
    (task,) = read_mixture(mixture).tasks
    assert task.data.read_text(encoding="utf-8") == cache.read_text(encoding="utf-8")
    assert task.name == ADDRESS
    before = read_mixture(mixture).digest(mixture)
    cache.write_text('{"question": "1?", "answer": "3"}\n', encoding="utf-8")
    assert read_mixture(mixture).digest(mixture) != before


def test_a_file_that_was_not_downloaded(cache: Path):
    with pytest.raises(WorkError, match=f"^{ADDRESS}x: cannot be downloaded"):
        fetch_dataset_file(f"{ADDRESS}x")


@pytest.mark.parametrize(
    "address",
    [
        "hf://owner/things/rows.jsonl",
        "hf://datasets/things/rows.jsonl",
        "hf://datasets/owner/things",
        "hf://datasets/owner/things/",
        "hf://datasets/owner/things/a//b.jsonl",
        "hf://datasets/owner/things/../../rows.jsonl",
    ],
)
def test_an_address_that_names_no_file(address: str):
    with pytest.raises(DataError, match=r"write hf://datasets/OWNER/NAME/FILE\.jsonl"):
        fetch_dataset_file(address)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (EntryNotFoundError("404"), DataError, "the Hub has no such file"),
        (LocalEntryNotFoundError("no network"), WorkError, "cannot be downloaded"),
        (OSError("disk"), WorkError, "cannot be downloaded"),
    ],
)
def test_what_the_hub_answers(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], says: str
):
    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(kind, match=says):
        fetch_dataset_file(ADDRESS)
