"""`openpalm train` on several datasets: what is told, resumed and refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from train_samples import write_dataset

from openpalm.base.yaml_file import read_yaml
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.dataset.shards import open_dataset
from openpalm.evaluate.perplexity import dataset_loss
from openpalm.train.logging.metrics import read_rows

Train = Callable[..., int]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for seed, name in enumerate(("docs", "code")):
        write_dataset(folder / f"made-{name}", seed=seed).rename(folder / name)
    path = folder / "mix.yaml"
    path.write_text("tasks: [{data: docs, weight: 3}, {data: code, weight: 1}]")
    return path


def measured(out: Path) -> list[dict]:
    return [row for row in read_rows(out / "metrics.jsonl") if "val_loss" in row]


def test_each_set_is_validated_and_their_mean(train: Train, mixture: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert train(out, data=mixture, document_mask="true", steps=4) == 0
    row = measured(out)[-1]
    model = checkpoint.load(checkpoint.steps(out)[-1])
    nats, of_bytes = 0.0, 0.0
    for name, share in (("docs", 0.75), ("code", 0.25)):
        dataset = open_dataset(mixture.parent / name)
        alone = dataset_loss(model, dataset, "val", 16, model.embedding.dtype, document_mask=True)
        assert row[f"val_loss/{name}"] == pytest.approx(alone.nats_per_token)
        assert row[f"val_bits_per_byte/{name}"] == pytest.approx(alone.bits_per_byte)
        nats += share * alone.nats / alone.tokens
        of_bytes += share * alone.bytes / alone.tokens
    assert row["val_loss"] == pytest.approx(nats, rel=1e-3)  # shares are of whole windows
    assert row["val_bits_per_byte"] == pytest.approx(nats / of_bytes / 0.6931472, rel=1e-3)


def test_a_run_is_resumed_and_repeated(
    train: Train, mixture: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    whole, halves, again = tmp_path / "whole", tmp_path / "halves", tmp_path / "again"
    ask = {"data": mixture, "document_mask": "true"}
    assert train(whole, **ask) == 0
    assert "train: docs: " in capfd.readouterr().err
    assert train(halves, **ask) == 0
    for later in checkpoint.steps(halves)[1:]:
        (later / "model.safetensors").write_bytes(b"torn")
    assert train(halves, **ask) == 0
    assert measured(halves) == measured(whole)
    assert read_yaml(whole / "config.yaml")["document_mask"] is True
    assert train(again, config=whole / "config.yaml", data=None) == 0
    assert measured(again) == measured(whole)
    assert train(whole, **ask | {"document_mask": "false"}) == 2
    assert "another --document-mask (True, now False)" in capfd.readouterr().err


def test_other_weights_are_another_run(
    train: Train, mixture: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert train(tmp_path / "run", data=mixture, steps=2) == 0
    other = mixture.with_name("other.yaml")
    other.write_text(mixture.read_text().replace("3", "2"))
    assert train(tmp_path / "run", data=other, steps=2) == 2
    assert "that run was made with another --data" in capfd.readouterr().err


def test_an_epoch_is_as_many_tokens_as_all_sets_have(train: Train, mixture: Path, tmp_path: Path):
    assert train(tmp_path / "run", data=mixture, steps=None, epochs=0.5, batch_tokens=1024) == 0
    sizes = [len(open_dataset(mixture.parent / n).tokens("train")) for n in ("docs", "code")]
    trained = [r["tokens"] for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert trained[-1] == pytest.approx(sum(sizes) / 2, abs=1024)
