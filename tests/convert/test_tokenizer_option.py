"""`openpalm convert --tokenizer` writes a tokenizer with the model."""

from pathlib import Path

import pytest
from tiny_models import tiny

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main
from openpalm.data.text.tokenizer import Tokenizer

ROTO = Path(__file__).parent.parent / "parity/data/mesh-transformer-jax/roto"


def test_more_ids_than_the_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Tokenizer.byte().save(tmp_path / "byte.json")
    words = ["convert", str(ROTO / "slim"), str(tmp_path / "ours")]
    assert main([*words, "--tokenizer", str(tmp_path / "byte.json")]) == 2
    assert "more than the model's 128" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_without_one_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint.save(tmp_path / "without", tiny(0))
    words = ["convert", str(tmp_path / "without"), str(tmp_path / "with")]
    assert main(words) == 2
    assert "or --tokenizer" in capsys.readouterr().err
    assert main([*words, "--tokenizer", "byte"]) == 0
    assert checkpoint.tokenizer_json(tmp_path / "with") == Tokenizer.byte().definition
    sample = ["sample", str(tmp_path / "with"), "A", "--max-new-tokens", "2"]
    assert main(sample) == 0
