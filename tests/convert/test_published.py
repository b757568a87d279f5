"""Hub names from local files, folders and servers, with small models in place of the real ones."""

import hashlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import openpalm
from openpalm.checkpoint.manifest import read_manifest
from openpalm.convert import published
from openpalm.errors import CheckpointError, StorageError, WorkError
from openpalm.model.config import PRESETS, ModelConfig, Preset

NAME = "palm_150m_8k_v0"
READ_TOKENIZER = published._tokenizer
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(
    tmp_path: Path,
    palm: dict[str, Tensor],
    config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder as the publisher would hold it, its one file as of era 0.2.1, and an empty cache."""
    small = Preset(openpalm.ModelConfig(70, 8, 2, 2, 4, 16, context=8192), 1e-3, "a stand-in")
    monkeypatch.setitem(PRESETS, "palm-150m", small)
    monkeypatch.setenv("OPENPALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENPALM_HUB", raising=False)
    monkeypatch.setattr(published, "_tokenizer", lambda say: None)
    folder = tmp_path / "published"
    folder.mkdir()
    old = {n: t + 1 if n.endswith("gamma") else t for n, t in palm.items()}
    torch.save(old, folder / f"{NAME}.pt")
    return folder


class Server(ThreadingHTTPServer):
    folder: Path
    torn = False
    requests: int = 0


class _Handler(BaseHTTPRequestHandler):
    """Serves a folder at its root, and at the address of a Hugging Face repository."""

    server: Server

    def do_HEAD(self) -> None:
        self._content()

    def do_GET(self) -> None:
        self.server.requests += 1
        if content := self._content():
            self.wfile.write(content[:100] if self.server.torn else content)

    def _content(self) -> bytes | None:
        name = self.path.removeprefix("/conceptofmind/palm-150m/resolve/main/")
        file = self.server.folder / name.lstrip("/")
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")  # what Hugging Face says
            self.end_headers()
            return None
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        return content

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), _Handler) as made:
        made.folder = folder
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def quiet(_: str) -> None:
    pass


def test_the_presets_are_the_published_sizes():
    sizes = {name: published._expected(name) for name in published.NAMES}
    assert all((c.vocab_size, c.head_dim, c.heads) == (50304, 128, 8) for c in sizes.values())
    assert [(c.dim, c.depth) for c in sizes.values()] == [
        (768, 12),
        (1024, 24),
        (2048, 16),
        (2560, 24),
    ]


def test_a_local_file_is_converted_once(folder: Path, config: ModelConfig):
    lines: list[str] = []
    first = published.fetch(NAME, path=str(folder / f"{NAME}.pt"), say=lines.append)
    assert any("0.2.1" in line for line in lines)
    assert published.fetch(NAME, path=str(folder), say=quiet) != first  # a folder is another origin
    model = openpalm.load(first)
    assert not model.training
    assert (model.config.context, model.config.xpos_base) == (8192, 512.0)
    assert model.config.norm_before_head
    stamp = (first / "manifest.json").stat().st_mtime_ns
    assert published.fetch(NAME, path=str(folder / f"{NAME}.pt"), say=quiet) == first
    assert (first / "manifest.json").stat().st_mtime_ns == stamp
    lineage = read_manifest(first)["lineage"]
    assert lineage["source_file"] == f"{NAME}.pt"
    assert lineage["era"] == "0.2.1 to 0.2.3"
    digest = hashlib.sha256((folder / f"{NAME}.pt").read_bytes()).hexdigest()
    assert lineage["source_sha256"] == digest


def test_the_first_of_two_processes_wins(folder: Path, tmp_path: Path):
    file = folder / f"{NAME}.pt"
    kept = published.fetch(NAME, path=str(file), say=quiet)
    stamp = (kept / "manifest.json").stat().st_mtime_ns
    # As one that looked before the other was done.
    published._convert(NAME, file, tmp_path / "a", kept, quiet)
    assert (kept / "manifest.json").stat().st_mtime_ns == stamp
    assert [path.name for path in published.cache().iterdir()] == [kept.name]
    (kept / "manifest.json").unlink()
    with pytest.raises(OSError, match="not empty"):
        published._convert(NAME, file, tmp_path / "b", kept, quiet)


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_server_stands_in_for_the_publisher(
    server: Server, monkeypatch: pytest.MonkeyPatch, slash: str
):
    monkeypatch.setenv("OPENPALM_HUB", address(server) + slash)
    first = published.fetch(NAME, say=quiet)
    assert openpalm.load(first).config.dim == 8
    assert published.fetch(NAME, say=quiet) == first
    assert server.requests == 1
    assert [path.name for path in published.cache().iterdir()] == [first.name]


@pytest.fixture
def publisher(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Server:
    """The server as Hugging Face, with a cache of its own."""
    constants = importlib.import_module("huggingface_hub.constants")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address(server) + template)
    monkeypatch.setattr(constants, "ENDPOINT", address(server))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return server


def test_the_publisher_is_read_by_huggingface_hub(publisher: Server, tmp_path: Path):
    first = published.fetch(NAME, say=quiet)
    assert openpalm.load(first).config.dim == 8
    assert list((tmp_path / "huggingface").rglob(f"{NAME}.pt"))
    requests = publisher.requests
    assert published.fetch(NAME, say=quiet) == first
    assert publisher.requests == requests  # the conversion is kept


def test_a_larger_file_of_the_publisher_is_not_downloaded(
    publisher: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    size = (publisher.folder / f"{NAME}.pt").stat().st_size
    parameters = published._expected(NAME).parameters
    monkeypatch.setattr(published, "_BYTES_PER_PARAMETER", 0)
    monkeypatch.setattr(published, "_SLACK_BYTES", size - 1)
    with pytest.raises(CheckpointError, match=rf"{NAME}\.pt: has {size:,} bytes, at most"):
        published.fetch(NAME, say=quiet)
    assert publisher.requests == 0
    assert not list((tmp_path / "huggingface").rglob("*.pt"))
    monkeypatch.setattr(published, "_SLACK_BYTES", size)
    assert openpalm.load(published.fetch(NAME, say=quiet)).config.parameters == parameters


def test_a_larger_tokenizer_is_not_downloaded(publisher: Server, monkeypatch: pytest.MonkeyPatch):
    (publisher.folder / "tokenizer.json").write_text("{}" * 50, encoding="utf-8")
    monkeypatch.setattr(published, "TOKENIZER", ("conceptofmind/palm-150m", "tokenizer.json"))
    monkeypatch.setattr(published, "_TOKENIZER_BYTES", 99)
    lines: list[str] = []
    assert READ_TOKENIZER(lines.append) is None
    assert "tokenizer.json: has 100 bytes" in lines[0]
    assert publisher.requests == 0


def test_the_publisher_is_not_reached(publisher: Server, monkeypatch: pytest.MonkeyPatch):
    (publisher.folder / f"{NAME}.pt").rename(publisher.folder / "other.pt")
    with pytest.raises(
        WorkError, match=r"palm-150m/palm_150m_8k_v0\.pt: cannot be downloaded .*404"
    ):
        published.fetch(NAME, say=quiet)
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WorkError, match=r"cannot be downloaded .*; try again, or get the file"):
        published.fetch(NAME, say=quiet)


def test_a_folder_stands_in_for_the_publisher(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENPALM_HUB", str(folder))
    assert openpalm.load(published.fetch(NAME, say=quiet)).config.dim == 8
    with pytest.raises(CheckpointError, match=r"palm_1b_8k_v0\.pt: no such file"):
        published.fetch("palm_1b_8k_v0", say=quiet)


def test_a_torn_download_is_never_used(server: Server):
    server.torn = True
    with pytest.raises(
        WorkError, match=r"cannot be downloaded \(.*received 100 bytes, expected \d+"
    ):
        published.fetch(NAME, url=f"{address(server)}/{NAME}.pt", say=quiet)
    assert not list(published.cache().iterdir())


def test_more_bytes_than_the_model_can_have_are_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(published, "_SLACK_BYTES", 0)
    monkeypatch.setattr(published, "_BYTES_PER_PARAMETER", 1)
    with pytest.raises(CheckpointError, match="that is not this model"):
        published.fetch(NAME, url=f"{address(server)}/{NAME}.pt", say=quiet)
    assert not list(published.cache().iterdir())


def test_network_failures_are_one_line_with_a_remedy(server: Server):
    for url, reason in [
        (f"{address(server)}/none.pt", "404"),
        ("http://127.0.0.1:9/x.pt", "refused"),
        ("http://[bad/x.pt", ""),
    ]:
        with pytest.raises((WorkError, CheckpointError)) as caught:
            published.fetch(NAME, url=url, say=quiet)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_wrong_requests(folder: Path):
    with pytest.raises(CheckpointError, match="use one of palm_150m_8k_v0"):
        published.fetch("palm_9t_8k_v0", say=quiet)
    with pytest.raises(CheckpointError, match="not both"):
        published.fetch(NAME, path="a", url="http://b", say=quiet)
    with pytest.raises(CheckpointError, match="not an http"):
        published.fetch(NAME, url="file:///etc/passwd", say=quiet)


def test_another_size_is_refused(folder: Path):
    with pytest.raises(CheckpointError, match="not palm_410m_8k_v0: its vocab_size is 70"):
        published.fetch("palm_410m_8k_v0", path=str(folder), say=quiet)


def test_a_full_disk_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(published, "_download", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        published.fetch(NAME, url=f"{address(server)}/{NAME}.pt", say=quiet)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("OPENPALM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert published.cache() == tmp_path / "openpalm" / "hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published.cache() == tmp_path / ".cache" / "openpalm" / "hub"


def test_the_tokenizer_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub

    lines: list[str] = []

    def offline(*_: str) -> str:
        raise RuntimeError("no network")

    monkeypatch.setattr(published, "_refuse_larger", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert published._tokenizer(lines.append) is None
    assert "no network" in lines[0]
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_: str(tmp_path / "tokenizer.json")
    )
    assert published._tokenizer(lines.append) == "{}"


@pytest.fixture
def hubconf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hubconf_gives_the_four_models(folder: Path, hubconf: ModuleType):
    entries: dict[str, Callable[..., object]] = {n: getattr(hubconf, n) for n in published.NAMES}
    assert all(entry.__doc__ for entry in entries.values())
    model = entries[NAME](path=str(folder / f"{NAME}.pt"), dtype="bfloat16")
    assert isinstance(model, openpalm.Transformer)
    assert model.embedding.dtype == torch.bfloat16
    assert not model.training
    logits = model.logits(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 70)
    for name in list(entries)[1:]:
        with pytest.raises(CheckpointError, match=f"not {name}"):
            entries[name](path=str(folder / f"{NAME}.pt"))


def test_torch_hub_loads_it(folder: Path):
    model = torch.hub.load(str(ROOT), NAME, source="local", path=str(folder / f"{NAME}.pt"))
    assert isinstance(model, openpalm.Transformer)
