"""GPT-2's vocab.json and merges.txt against the tokenizers library, from a folder and a hub."""

import hashlib
import importlib
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from data_samples import TEXTS
from tokenizers import ByteLevelBPETokenizer

from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.preparation import PrepareRequest, prepare
from openpalm.data.text import gpt2_files
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError

END = "<|endoftext|>"
CORPUS = [*TEXTS * 3, " ".join(f"{word} the then other" for word in ("lower", "newest", "it's"))]


def make_files(folder):
    """A small vocabulary of the library's own trainer, in its order: the marker first, or last."""
    folder.mkdir(exist_ok=True)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=320, min_frequency=1, show_progress=False)
    trained.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary[END] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_files(tmp_path / "gpt2")


def random_texts(count=300):
    draw = random.Random(0)
    alphabet = "abc the lower'sé日😀 \n\t 019.,!?<|endoftext|>"
    return ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(count)]


def test_the_ids_are_the_librarys(folder):
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    reference = ByteLevelBPETokenizer(*files, add_prefix_space=False)
    ours = Tokenizer.load(folder)
    for text in [*CORPUS, *random_texts(), f"spelled {END} out"]:
        ids = ours.encode(text)
        assert ids == reference.encode(text).ids
        assert ours.decode(ids) == text
    assert ours.vocab_size == reference.get_vocab_size()
    assert ours.is_byte_level
    assert ours.is_lossless


def test_the_end_of_text_is_found(folder):
    ours = Tokenizer.from_spec(str(folder), ())
    assert ours.end_of_text == json.loads((folder / "vocab.json").read_text())[END]
    assert ours.special_tokens == [END]
    # As the text of a document it is text.
    assert ours.end_of_text not in ours.encode(END)


def test_added_tokens_continue_the_vocabulary(folder):
    size = Tokenizer.load(folder).vocab_size
    added = {f"<|extratoken_{i}|>": size + i for i in range(3)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    ours = Tokenizer.load(folder)
    assert ours.vocab_size == size + 3
    assert ours.special_tokens == [END, *added]


def test_a_dataset_is_made_with_a_folder(folder, tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{t} {i}"}) + "\n" for i, t in enumerate(CORPUS)))
    prepare(PrepareRequest(inputs=[str(rows)], out=tmp_path / "out", tokenizer=str(folder)))
    dataset = open_dataset(tmp_path / "out")
    assert dataset.tokenizer().digest == Tokenizer.load(folder).digest
    assert dataset.tokenizer().end_of_text in dataset.tokens("val")[:].tolist()


def test_a_tokenizer_json_takes_precedence(folder):
    Tokenizer.byte().save(folder / "tokenizer.json")
    assert Tokenizer.load(folder).digest == Tokenizer.byte().digest


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("vocab.json", b"{", r"vocab\.json: is not JSON"),
        ("vocab.json", b"[" * 100000, r"vocab\.json: is not JSON"),
        ("vocab.json", b'["a"]', r"vocab\.json: must map tokens to ids"),
        ("vocab.json", b'{"a": -1}', r"vocab\.json: must map tokens to ids"),
        ("vocab.json", b'{"a": 99999999999}', "ids up to|not a tokenizer"),
        ("vocab.json", b"{}", "merges.txt:2: not two tokens of vocab.json that make a third"),
        ("merges.txt", b"#version: 0.2\na b c\n", r"merges\.txt:2: not two tokens"),
        ("merges.txt", b"zz yy\n", r"merges\.txt:1: not two tokens"),
        ("merges.txt", b"\xff", r"merges\.txt: is not UTF-8"),
        ("added_tokens.json", b"3", r"added_tokens\.json: must map tokens to ids"),
    ],
)
def test_damaged_files_are_refused_in_a_line(file, content, says, folder):
    if content == b'{"a": 99999999999}':
        (folder / "merges.txt").write_text("")
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        Tokenizer.load(folder)
    assert "\n" not in str(error.value)


def test_a_large_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(gpt2_files, "MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match=r"vocab\.json: more than 100 bytes"):
        Tokenizer.load(folder)


class _Hub(BaseHTTPRequestHandler):
    """The addresses of a model repository that huggingface_hub reads."""

    protocol_version = "HTTP/1.1"
    models: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - of the one stand-in

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def _answer(self, *, body):
        for name, files in self.models.items():
            if self.path.startswith(f"/api/models/{name}/revision/"):
                listing = [{"rfilename": file} for file in files]
                content = {"id": name, "sha": "0" * 40, "siblings": listing}
                return self._send(200, json.dumps(content).encode(), body=body)
            if self.path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": "1"}
                    for file, data in files.items()
                ]
                return self._send(200, json.dumps(tree).encode(), body=body)
            for file, data in files.items():
                if self.path == f"/{name}/resolve/{'0' * 40}/{file}":
                    return self._send(200, data, body=body)
        return self._send(404, b"{}", body=body)

    def _send(self, status, content, *, body):
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub, and the dictionary of its models."""
    models = {}
    handler = type("Handler", (_Hub,), {"models": models})
    constants = importlib.import_module("huggingface_hub.constants")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield models
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("spec", ["gpt2", "hub:gpt2"])
def test_a_name_on_the_hub(spec, hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "gpt2")
    hub["gpt2"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub["gpt2"] |= {"config.json": b"not fetched", "model.safetensors": b"not fetched"}
    found = Tokenizer.from_spec(spec, ())
    assert found.digest == Tokenizer.load(folder).digest
    assert found.end_of_text is not None
    assert not [*(tmp_path / "cache").rglob("model.safetensors")]


def test_a_name_with_an_account_and_a_named_end(hub):
    byte = Tokenizer.byte()
    hub["me/model"] = {
        "tokenizer.json": byte._canonical,
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>"}).encode(),
    }
    for spec in ("me/model", "hub:me/model"):
        assert Tokenizer.from_spec(spec, (), "<|user|>").end_of_text == byte.special_id("<|user|>")


def test_a_model_without_a_tokenizer_and_an_unknown_one(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub["me/none"] = {"config.json": b"{}"}
    for spec, says in (
        ("me/none", "me/none: this model has no tokenizer.json"),
        ("hub:me/typo", "hub:me/typo: no such file, and cannot be downloaded from the Hub"),
        ("hub:a b", "hub:a b: no such file, and cannot be downloaded from the Hub"),
        ("gpt3", "gpt3: no such tokenizer; use byte, bpe:VOCAB"),
        ("me/x.json", r"me/x\.json: no such tokenizer"),
    ):
        with pytest.raises(DataError, match=says) as error:
            Tokenizer.from_spec(spec, ())
        assert "\n" not in str(error.value)
