"""A run logged by the real wandb package, offline: what its file holds is metrics.jsonl."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import make_run, program, rows

pytest.importorskip("wandb")
BLOCK = 32768


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps, and what the program said on the way."""
    folder = make_run(tmp_path_factory.mktemp("work"))
    words = ["--init", folder / "base", "--data", folder / "data", "--out", folder / "logged"]
    words += ["--steps", 8, "--batch-tokens", 192, "--dtype", "float32", "--eval-every", 4]
    done = program("train", *words, "--loggers", "wandb", env={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb") == 2, done.stderr  # our line, and the folder in it
    return folder / "logged"


def records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind seven bytes that name it."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # no header fits: padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(run: Path) -> list[dict]:
    """The rows in the file that `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return found


def test_the_board_has_the_rows_under_their_names(logged: Path):
    kept: dict[int, dict] = {}
    for row in rows(logged / "metrics.jsonl"):
        known = {name: value for name, value in row.items() if value is not None}
        kept.setdefault(row["step"], {}).update(known)
    shown = {row["step"]: row for row in history(logged)}
    assert shown.keys() == kept.keys()
    for step, row in kept.items():
        assert {name: shown[step].get(name) for name in row} == row
        assert shown[step]["_step"] == step
    assert shown[8]["samples/_type"] == "table-file"


def test_the_runs_id_is_kept_beside_it(logged: Path):
    name = (logged / "wandb" / "run-id").read_text(encoding="utf-8").strip()
    assert list(logged.glob(f"wandb/offline-run-*-{name}"))
