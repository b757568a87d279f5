"""`openpalm convert` from the command line: output, files and exit status."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import openpalm
from openpalm.checkpoint.manifest import read_manifest
from openpalm.cli.main import main
from openpalm.convert import export
from openpalm.errors import WorkError


def converted(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["convert", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2) -> str:
    assert main(["convert", *map(str, words)]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def difference(checkpoint_path: Path, folder: Path) -> float:
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    with torch.no_grad():
        logits = openpalm.load(checkpoint_path).logits(tokens)
    return (logits - torch.from_numpy(np.load(folder / "logits.npy"))).abs().max().item()


def test_there_and_back(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path):
    source = data / "palm-rlhf-pytorch/v0.2.1/palm_qk_rmsnorm"
    out = converted(capsys, source, tmp_path / "ours", "--era", "0.2.1")
    assert "era: 0.2.1 to 0.2.3 (--era 0.2.1)" in out
    assert "folded:" in out
    assert "reloaded: logits within" in out
    assert difference(tmp_path / "ours", source) < 1e-4
    lineage = read_manifest(tmp_path / "ours")["lineage"]
    assert (lineage["source_file"], lineage["source"]) == ("palm.pt", "palm-rlhf-pytorch")
    assert (tmp_path / "ours" / "fingerprint.safetensors").is_file()

    out = converted(capsys, tmp_path / "ours", tmp_path / "new", "--to", "palm-rlhf-pytorch")
    assert "era 0.2.4 to 0.8.0" in out
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"palm.pt", "config.json"}
    out = converted(capsys, tmp_path / "new", tmp_path / "again", "--from=palm-rlhf-pytorch")
    assert "a guess" in out
    assert difference(tmp_path / "again", source) < 1e-4


@pytest.mark.parametrize("file", ["PaLM-pytorch/palm/palm.pt", "nanoPALM/palm/ckpt.pt"])
def test_the_other_projects(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, file: str
):
    source = data / file
    config = source.parent / "config.json"
    out = converted(capsys, source, tmp_path / "ours", "--config", config)
    assert file.split("/")[0].lower() in out.lower()
    assert difference(tmp_path / "ours", source.parent) < 1e-4


def test_foreign_to_foreign_in_one_step(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
):
    out = converted(
        capsys, data / "PaLM-pytorch/palm", tmp_path / "new", "--to", "palm-rlhf-pytorch"
    )
    assert "no xPos: written as" in out


def test_wrong_requests(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path):
    palm = data / "palm-rlhf-pytorch/v0.8.0/palm"
    out = tmp_path / "out"
    assert "0.2.4 to 0.8.0" in refused(capsys, palm, out, "--era", "9.9.9")
    assert "must be one of" in refused(capsys, palm, out, "--from", "gpt")
    assert "no such file or folder; check the path\n" in refused(capsys, tmp_path / "none.pt", out)
    assert "hf download ACCOUNT/NAME" in refused(capsys, "EleutherAI/gpt-j-6b", out)
    missing = "none.json: is missing; check the path that --config gives"
    assert missing in refused(capsys, palm, out, "--config", tmp_path / "none.json")
    assert "missing" in refused(capsys, palm)
    assert "did you mean --era" in refused(capsys, palm, out, "--eras", "0.2.1")
    assert "cannot express rotary nanopalm" in refused(
        capsys, data / "nanoPALM/palm/ckpt.pt", out, "--to", "palm-rlhf-pytorch"
    )
    assert not list(tmp_path.iterdir())


def test_a_place_inside_the_source_is_refused(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
):
    converted(capsys, data / "palm-rlhf-pytorch/v0.2.1/palm_qk_rmsnorm", tmp_path / "ours")
    line = refused(capsys, tmp_path / "ours", tmp_path / "ours" / "copy", "--dtype", "bfloat16")
    assert "is inside" in line
    assert not (tmp_path / "ours" / "copy").exists()


def test_our_own_checkpoints(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path):
    converted(capsys, data / "palm-rlhf-pytorch/v0.8.0/palm", tmp_path / "ours")
    assert "an OpenPaLM checkpoint already" in refused(capsys, tmp_path / "ours", tmp_path / "b")
    words = (tmp_path / "ours", tmp_path / "b", "--to", "palm-rlhf-pytorch", "--era", "0.8.0")
    assert "--era 0.8.0: is for checkpoints of palm-rlhf-pytorch" in refused(capsys, *words)
    assert "exists already" in refused(
        capsys, data / "palm-rlhf-pytorch/v0.8.0/palm", tmp_path / "ours"
    )
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"torn")
    assert "torn" in refused(capsys, tmp_path / "ours", tmp_path / "b", "--to", "palm-rlhf-pytorch")


def test_a_pickle_bomb(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"token_emb.weight": Bomb()}, tmp_path / "bomb.pt")
    said = refused(capsys, tmp_path / "bomb.pt", tmp_path / "out")
    assert "bomb.pt: asks for posix.mkdir" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bomb.pt"]


def test_a_failed_check_exits_1_and_removes_the_output(
    capsys: pytest.CaptureFixture[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    said = refused(
        capsys,
        data / "palm-rlhf-pytorch/v0.8.0/palm",
        tmp_path / "out",
        status=WorkError.exit_status,
    )
    assert "differ by 0.0e+00; removed it" in said
    assert not list(tmp_path.iterdir())


def test_help_shows_from(capsys: pytest.CaptureFixture[str]):
    out = converted(capsys, "--help")
    assert "palm-rlhf-pytorch|palm-pytorch|nanopalm" in out
    assert "--config PATH" in out
    assert "JSON file of hyperparameters" in out
