"""The program as a user runs it, and a tiny run to point it at."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from openpalm.cli.main import main
from openpalm.model.config import ModelConfig

TEXT = "".join(
    f"Chapter {i}. The quick brown fox number {i} jumps over {i * i} lazy dogs.\n"
    for i in range(300)
)
TINY = ModelConfig(
    vocab_size=265, dim=32, depth=2, heads=4, head_dim=8, ff_dim=64, kv_heads=2, context=48
)


def ok(*words: object) -> None:
    """Runs a verb in this process; it must succeed."""
    status = main([str(word) for word in words])
    assert status == 0, words


def program(*words: object, **how) -> subprocess.CompletedProcess[str]:
    """Runs the program in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "openpalm", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        **how,
    )


def write_base(path: Path, *, context: int = TINY.context, clear: bool = False) -> Path:
    """A checkpoint of a model much smaller than any preset, with the byte tokenizer.

    A `clear` one has logits far apart, so that what is greedy does not hang on rounding.
    """
    import torch

    from openpalm.checkpoint import directory as checkpoint
    from openpalm.data.text.tokenizer import Tokenizer
    from openpalm.model.transformer import Transformer, initialise

    model = Transformer(replace(TINY, context=context))
    initialise(model, seed=0)
    if clear:
        with torch.no_grad():
            model.embedding *= 20
    tokenizer = path.with_name(f"{path.name}-tokenizer.json")
    Tokenizer.byte().save(tokenizer)
    checkpoint.save(path, model, tokenizer_json=tokenizer.read_text(encoding="utf-8"))
    return path


def make_run(folder: Path) -> Path:
    """base, data and run: a checkpoint, a prepared dataset, eight steps of training on it."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    ok("data", "prepare", folder / "text.txt", "--out", folder / "data", "--tokenizer", "byte")
    base = write_base(folder / "base")
    words = ["--init", base, "--data", folder / "data", "--out", folder / "run"]
    words += ["--steps", 8, "--batch-tokens", 192, "--dtype", "float32"]
    words += ["--eval-every", 4, "--save-every", 4]
    ok("train", *words)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def talk(path: Path, *conversations: list[tuple[str, str]]) -> Path:
    """Conversations of (role, content) as a .jsonl."""
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
        for turns in conversations
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
