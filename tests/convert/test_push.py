"""`openpalm push` to a stand-in of the Hub, and models read from there by name."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, hub_server
from landed_cases import DATA

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.checkpoint.manifest import read_manifest
from openpalm.convert.cached import checkpoint_path
from openpalm.errors import CheckpointError, WorkError

RUN = DATA / "dpo" / "run"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("OPENPALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with hub_server(monkeypatch, tmp_path / "huggingface") as made:
        yield made


def quiet(_: str) -> None:
    pass


def test_a_pushed_model_is_loaded_by_name(said, server: HubServer):
    status, output, errors = said("push", RUN, "--repo", "me/tiny", "--private")
    assert (status, errors) == (0, []), (errors, server.requests)
    assert f"uploaded to {server.address}/me/tiny" in output
    repository = server.repositories["models/me/tiny"]
    assert repository.private
    assert {"config.json", "model.safetensors", "modeling_openpalm.py"} <= repository.files.keys()
    card = repository.files["README.md"].decode()
    manifest = read_manifest(checkpoint.resolve(RUN))
    for fact in (manifest["sha256"], manifest["lineage"]["parent"], manifest["lineage"]["data"]):
        assert fact in card

    expected = openpalm.load(RUN)
    for name in ("me/tiny", "hf://me/tiny", "me/tiny@main"):
        found = openpalm.load(name)
        assert torch.equal(found.embedding, expected.embedding)
    assert openpalm.generate("me/tiny", "a", temperature=0, max_new_tokens=8) == openpalm.generate(
        RUN, "a", temperature=0, max_new_tokens=8
    )
    read = [request for request in server.requests if request.startswith("GET /me/tiny/resolve")]
    assert not [request for request in read if request.endswith((".py", ".md", ".jinja"))]
    status, output, _ = said("sample", "me/tiny", "a", "--max-new-tokens", 2)
    assert status == 0


def test_pushed_again_the_old_files_are_gone(said, server: HubServer):
    assert said("push", RUN, "--repo", "me/tiny")[0] == 0
    repository = server.repositories["models/me/tiny"]
    assert not repository.private
    repository.files["model-00001-of-00002.safetensors"] = b"of an earlier upload"
    done = said("push", RUN, "--repo", "me/tiny", "--dtype", "bfloat16")
    assert done[0] == 0, done
    assert "model-00001-of-00002.safetensors" not in repository.files
    assert json.loads(repository.files["config.json"])["dtype"] == "bfloat16"
    assert len(repository.messages) == 2


def test_without_a_network_the_cache_serves(
    said, server: HubServer, monkeypatch: pytest.MonkeyPatch
):
    said("push", RUN, "--repo", "me/tiny")
    first = checkpoint_path("me/tiny", quiet)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    lines: list[str] = []
    assert checkpoint_path("me/tiny", lines.append) == first
    assert lines == ["me/tiny: reading it from the cache of the Hugging Face Hub"]
    with pytest.raises(WorkError, match="hf://me/other: cannot be downloaded"):
        checkpoint_path("hf://me/other", quiet)


def test_other_models_are_refused_before_their_weights(server: HubServer):
    from hub_server import Repository

    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"..."}
    server.repositories["models/meta/llama"] = Repository(files=files)
    with pytest.raises(CheckpointError, match=r"a 'llama' model; .* reads gptj .* and openpalm"):
        checkpoint_path("meta/llama", quiet)
    assert "GET /meta/llama/resolve/main/model.safetensors" not in server.requests


def test_a_mistyped_path_says_so(server: HubServer, tmp_path: Path):
    with pytest.raises(CheckpointError, match="run/tiny: no such checkpoint or run; check the pat"):
        checkpoint_path("run/tiny", quiet)
    before = list(server.requests)
    (tmp_path / "runs").mkdir()
    assert checkpoint_path("runs/tiny", quiet) == Path("runs/tiny")  # for `resolve` to refuse
    assert server.requests == before
    with pytest.raises(CheckpointError, match="must be hf://ACCOUNT/NAME"):
        checkpoint_path("hf://a/b/c", quiet)


def test_refused_uploads_are_one_line(said, server: HubServer):
    server.refused = True
    status, _, errors = said("push", RUN, "--repo", "me/tiny")
    assert status == 1
    assert errors[-1].startswith("openpalm: error: me/tiny: cannot be uploaded (")
    assert errors[-1].endswith(
        "; log in with `hf auth login` or set HF_TOKEN to a token that may write"
    )
    for name in ("tiny", "me/tiny/x", "me/ti ny", "../tiny", "me/tiny.git"):
        status, _, errors = said("push", RUN, "--repo", name)
        assert status == 2
        fault = "must be ACCOUNT/NAME, of letters, digits, -, _ and ."
        assert errors == [f"openpalm: error: --repo {name!r}: {fault}"]


def test_a_failed_upload_of_a_large_file_is_one_line(
    said, server: HubServer, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Error while uploading 'model.safetensors'\nto the Hub.")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fails)
    status, _, errors = said("push", DATA / "dpo" / "run", "--repo", "me/chat")
    assert status == 1
    assert "me/chat: cannot be uploaded (Error while uploading" in errors[-1]
    assert "Traceback" not in "".join(errors)
