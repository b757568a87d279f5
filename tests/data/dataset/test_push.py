"""Pushes to a stand-in of the Hub: what arrives is what was made, and reads back the same."""

import json
import os
import subprocess
import sys

import huggingface_hub.constants
import pytest
import yaml
from hub_server import TOKEN, hub_server

from openpalm.data.dataset import push
from openpalm.data.dataset.push import push_dataset
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.blocks import BlocksRequest, write_blocks
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.errors import DataError, SettingsError, WorkError

pytest.importorskip("pyarrow")
# huggingface_hub uploads in a way that its own HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
REPO = "datasets/me/set"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    path = folder / "a.jsonl"
    rows = [json.dumps({"text": f"document {i} has words"}) + "\n" for i in range(300)]
    path.write_text("".join(rows))
    prepare(PrepareRequest(inputs=[str(path)], out=folder / "p", tokenizer="byte"))
    for name, length in (("b", 32), ("c", 64)):
        given = PrepareRequest(inputs=[str(folder / "p")], out=folder / name, tokenizer="byte")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("openpalm.data.dataset.blocks.GROUP_TOKENS", 640)
            patch.setattr("openpalm.data.dataset.blocks.FILE_GROUPS", 1 if name == "b" else 8)
            write_blocks(BlocksRequest(prepare=given, sequence_length=length))
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server(monkeypatch, tmp_path / "cache") as server:
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setattr(push, "COMMIT_FILES", 4)
        yield server


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sent(server):
    return sum(request.startswith("PUT /lfs/") for request in server.requests)


@pytest.mark.parametrize("name", ["b", "p"])
def test_all_files_arrive_and_the_manifest_last(name, folder, server):
    url = push_dataset(folder / name, "me/set", private=True)
    assert url == f"{server.address}/{REPO}"
    repository = server.repositories[REPO]
    arrived = dict(repository.files)
    card = arrived.pop("README.md").decode()
    assert arrived == contents(folder / name)
    assert repository.private
    assert repository.messages[-1] == "Manifest and dataset card"
    assert len(repository.messages) == 1 + -(-(len(arrived) - 2) // 4)
    header = yaml.safe_load(card.split("---")[1])
    manifest = json.loads(arrived["manifest.json"])
    assert manifest["tokenizer"] in card
    assert all(entry["sha256"] in card for entry in manifest["inputs"])
    assert all(file["sha256"] in card for file in manifest["splits"]["train"]["files"])
    assert f"{manifest['splits']['train']['tokens']:,}" in card
    assert "`a.jsonl`" in card
    assert str(folder) not in card
    splits = [one["split"] for one in header.get("configs", [{"data_files": []}])[0]["data_files"]]
    assert splits == (["train", "validation"] if name == "b" else [])


def test_what_the_hub_has_is_not_sent_again(folder, server):
    push_dataset(folder / "b", "me/set")
    push_dataset(folder / "b", "me/set")
    assert sent(server) == len(server.objects) == len(list((folder / "b").glob("*.parquet")))


def test_files_of_an_earlier_dataset_are_removed(folder, server):
    push_dataset(folder / "b", "me/set")
    push_dataset(folder / "c", "me/set")
    arrived = dict(server.repositories[REPO].files)
    del arrived["README.md"]
    assert arrived == contents(folder / "c")


@pytest.mark.filterwarnings("ignore")
def test_an_upload_that_is_cut_off_has_no_manifest_and_continues(folder, server):
    server.cut_after = 5
    with pytest.raises(WorkError, match=r"me/set: .*run the command again") as error:
        push_dataset(folder / "b", "me/set")
    assert "\n" not in str(error.value)
    assert "manifest.json" not in server.repositories[REPO].files
    refused = sent(server) - len(server.objects)
    server.cut_after = None
    push_dataset(folder / "b", "me/set")
    assert sent(server) - refused == len(list((folder / "b").glob("*.parquet")))
    assert contents(folder / "b").items() <= server.repositories[REPO].files.items()


def test_requests_that_cannot_be_met_are_one_line(folder, server, monkeypatch):
    with pytest.raises(SettingsError, match="--repo 'set': must be ACCOUNT/NAME"):
        push_dataset(folder / "b", "set")
    with pytest.raises(DataError, match="no prepared dataset here"):
        push_dataset(folder, "me/set")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(WorkError, match=r"cannot be uploaded \(.*; log in with `hf auth login`"):
        push_dataset(folder / "b", "me/set")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WorkError, match="me/set: cannot be uploaded"):
        push_dataset(folder / "b", "me/set")
    assert server.repositories == {}


def test_an_altered_file_is_not_pushed(folder, server, tmp_path):
    import shutil

    shutil.copytree(folder / "c", tmp_path / "c")
    path = tmp_path / "c" / "train-00000.parquet"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="was altered"):
        push_dataset(tmp_path / "c", "me/set")
    assert server.repositories == {}


COPY = """
import sys
from openpalm.cli.main import main
words = ["data", "blocks", sys.argv[1], "--tokenizer", "byte", "--seq_len", "32",
         "--hf_account", "me/set", "--out", sys.argv[2]]
assert main(words) == 0
assert main(["copy", "hf://datasets/me/set", sys.argv[3]]) == 0
options = ["--tokenizer", "byte", "--dedup", "none", "--val", "tail:0.1"]
files = "hf://datasets/me/set/train-*.parquet"
assert main(["data", "prepare", files, "--out", sys.argv[3] + "-url", *options]) == 0
assert main(["data", "prepare", "hub:me/set", "--out", sys.argv[3] + "-hub", *options]) == 0
"""


def test_built_pushed_and_read_back_as_the_original_did_it(folder, tmp_path, monkeypatch):
    """In another process: HF_ENDPOINT is read when huggingface_hub is imported."""
    with hub_server(monkeypatch, tmp_path / "cache") as server:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        env = os.environ | home | {"HF_ENDPOINT": server.address, "HF_TOKEN": TOKEN}
        words = [sys.executable, "-c", COPY, folder / "a.jsonl", tmp_path / "b", tmp_path / "back"]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    back = contents(tmp_path / "back")
    del back["README.md"]
    assert back == contents(tmp_path / "b")
    # The rows of the training files, through the Hub's file system and through `datasets`.
    trained = open_dataset(tmp_path / "b").tokens("train")[:].tolist()
    for way in ("url", "hub"):
        dataset = open_dataset(tmp_path / f"back-{way}")
        found = [dataset.tokens(split)[:].tolist() for split in ("train", "val")]
        assert found[0] + found[1] == trained
