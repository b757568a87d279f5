"""examples/datatrove_blocks.py: planted near-duplicates go, the rest is what one process writes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from openpalm.data.dataset.shards import open_dataset
from openpalm.data.prepare.blocks import BlocksRequest, write_blocks
from openpalm.data.prepare.preparation import PrepareRequest
from openpalm.data.text.tokenizer import Tokenizer

pytest.importorskip("datatrove")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "datatrove_blocks.py"
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("", "n", "r", "st", "lm")]
ORIGINALS, COPIES = 240, 40


def texts() -> tuple[list[str], list[str]]:
    """Unrelated documents, and near copies of some: three words of about 200 are exchanged."""
    draw = random.Random(0)
    originals = [
        f"document {i} " + " ".join(draw.choices(WORDS, k=draw.randrange(150, 250)))
        for i in range(ORIGINALS)
    ]
    copies = []
    for text in draw.sample(originals, COPIES):
        words = text.split(" ")
        for _ in range(3):
            words[draw.randrange(2, len(words))] = "changed"
        copies.append(" ".join(words))
    return originals, copies


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datatrove")
    originals, copies = texts()
    mixed = [*originals, *copies]
    random.Random(1).shuffle(mixed)
    (folder / "texts").mkdir()
    for i in range(6):
        rows = (json.dumps({"text": text}) + "\n" for text in mixed[i::6])
        (folder / "texts" / f"{i}.jsonl").write_text("".join(rows), encoding="utf-8")
    words = [sys.executable, SCRIPT, folder / "texts", "--work", folder / "work", "--seq-len", "64"]
    words += ["--out", folder / "blocks", "--tokenizer", "byte", "--tasks", "4"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    again = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout == done.stdout
    return folder


def kept_texts(folder: Path) -> list[str]:
    files = sorted((folder / "work" / "kept").glob("*.jsonl"))
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return [json.loads(line)["text"] for line in lines]


def test_one_of_each_pair_is_removed_and_nothing_else(made):
    originals, copies = texts()
    kept = kept_texts(made)
    assert set(kept) < {*originals, *copies}
    assert len(kept) == ORIGINALS
    # Either of a pair may go; both begin with the same two words.
    numbers = [" ".join(text.split(" ")[:2]) for text in kept]
    assert sorted(numbers) == sorted(f"document {i}" for i in range(ORIGINALS))
    assert len(list((made / "work" / "kept").glob("*.jsonl"))) == 4


def test_the_blocks_are_those_of_one_process(made, tmp_path):
    given = PrepareRequest(
        inputs=[str(made / "work" / "kept")], out=tmp_path / "alone", tokenizer="byte", workers=1
    )
    write_blocks(BlocksRequest(prepare=given, sequence_length=64))
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (made / "blocks").iterdir())
    for name in names:
        assert (made / "blocks" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_the_tokens_spell_the_documents_that_were_kept(made):
    dataset, tokenizer = open_dataset(made / "blocks"), Tokenizer.byte()
    kept = {text.encode() for text in kept_texts(made)}
    for split in ("train", "val"):
        ids = dataset.tokens(split)[:].tolist()
        ended = bytes(i if i < 256 else 0 for i in ids).split(b"\0")
        assert set(ended[:-1]) <= kept
        assert any(text.startswith(ended[-1]) for text in kept)
        assert tokenizer.end_of_text in ids
