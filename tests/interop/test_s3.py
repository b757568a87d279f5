"""Inputs and copies at s3:// through s3fs, against moto's server of S3."""

import json
from urllib.request import Request, urlopen

import pytest
from command_line import write_base

from openpalm.cli.main import main

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket `texts` at a local server; every client reads the address from here."""
    import s3fs

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("texts")
    yield files
    # The buckets belong to the process, not to the server.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def run(capsys, *words):
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"row {i} " + "some words " * (i % 9)}) for i in range(400)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_text_from_a_bucket_to_blocks_and_back(bucket, rows, tmp_path, capsys):
    half = rows.read_bytes().splitlines(keepends=True)
    bucket.pipe_file("texts/in/a.jsonl", b"".join(half[:150]))
    bucket.pipe_file("texts/in/b.jsonl", b"".join(half[150:]))
    options = ["--tokenizer", "byte", "--seq-len", "32", "--val", "tail:0.1"]
    for given, out in (("s3://texts/in", "b"), ("s3://texts/in/*.jsonl", "g"), (rows, "local")):
        assert run(capsys, "data", "blocks", given, "--out", tmp_path / out, *options)[0] == 0
    parquet = ("train-00000.parquet", "val-00000.parquet")
    local = contents(tmp_path / "local")
    for out in ("b", "g"):
        found = contents(tmp_path / out)
        assert [found[name] for name in parquet] == [local[name] for name in parquet]
    status, said, _ = run(capsys, "copy", tmp_path / "b", "s3://texts/out/b")
    assert (status, said.startswith("s3://texts/out/b: 4 files, ")) == (0, True)
    assert run(capsys, "copy", "s3://texts/out/b", tmp_path / "back")[0] == 0
    assert contents(tmp_path / "back") == contents(tmp_path / "b")
    assert "nothing copied" in run(capsys, "copy", tmp_path / "b", "s3://texts/out/b")[1]
    # Parquet at a URL is read at many places of the file.
    file = "s3://texts/out/b/train-00000.parquet"
    again = ["data", "prepare", file, "--out", tmp_path / "p", "--tokenizer", "byte"]
    assert run(capsys, *again)[0] == 0


def test_a_checkpoint_goes_out_and_comes_back(bucket, tmp_path, capsys):
    folder = write_base(tmp_path / "base")
    assert run(capsys, "copy", folder, "s3://texts/c")[0] == 0
    assert run(capsys, "copy", "s3://texts/c", tmp_path / "back")[0] == 0
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    words = ["sample", tmp_path / "back", "The", "--max-new-tokens", "3", "--seed", "1"]
    assert run(capsys, *words)[0] == 0


def test_failures_are_one_line(bucket, rows, tmp_path, capsys, monkeypatch):
    out = ["--out", tmp_path / "o", "--tokenizer", "byte"]
    cases = [
        (["data", "prepare", "s3://none/a.jsonl", *out], 2, "s3://none/a.jsonl: no such file"),
        (["data", "prepare", "s3://texts/none.txt", *out], 2, "none.txt: no such file"),
        (["data", "prepare", "s3://texts/*.md", *out], 2, "no file of text here"),
        (["copy", "s3://none/x", tmp_path / "o"], 2, "s3://none/x: no such folder"),
        (["copy", rows.parent, "s3://none/x"], 1, "s3://none/x/rows.jsonl: no such file or"),
    ]
    for words, expected, says in cases:
        status, _, errors = run(capsys, *words)
        assert (status, errors.count("\n")) == (expected, 1), errors
        assert says in errors
        assert errors.startswith("openpalm: error: ")
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("missing", ["credentials", "server"])
def test_no_credentials_and_no_server_are_one_line(missing, bucket, tmp_path, capsys, monkeypatch):
    import s3fs

    if missing == "credentials":
        for name in KEYS:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    words = ["data", "prepare", "s3://texts/a.txt", "--out", tmp_path / "o", "--tokenizer", "byte"]
    status, _, errors = run(capsys, *words)
    assert (status, errors.count("\n")) == (2 if missing == "credentials" else 1, 1), errors
    assert ("check the credentials" if missing == "credentials" else "127.0.0.1:9") in errors
