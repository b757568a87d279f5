"""Makes the files that test_landed.py reads, with the version at hand.

`python tests/landed/make.py [FOLDER]` writes FOLDER, by default tests/landed/data. Run it by hand,
before a version changes; the files of an earlier version are never made again. In each folder
`expected.safetensors` holds what this version computes from the files next to it. Its metadata
names the processor, because the last bits of a result differ between processors.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import landed_cases as cases
import torch
from safetensors.torch import save_file
from torch import Tensor

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.main import main
from openpalm.data.dataset.shards import open_dataset
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.text.conversation import Message
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

PLAIN = ModelConfig(
    vocab_size=50, dim=24, depth=2, heads=4, head_dim=8, ff_dim=32, context=32, dropout=0.1
)
CONFIGS = {
    "palm": replace(PLAIN, logit_scale=24**-0.5),
    "grouped": replace(PLAIN, kv_heads=2, qk_norm=True, xpos_base=512.0, rotary_base=5000.0),
    "gpt-j": replace(
        PLAIN,
        kv_heads=4,
        feedforward="gelu",
        bias=True,
        tied=False,
        rotary="interleaved",
        rotary_dims=4,
        norm_eps=1e-6,
    ),
    "nanopalm": replace(PLAIN, rotary="nanopalm", ff_dim=48),
    "raw-head": replace(PLAIN, norm_before_head=False, xpos_base=16.0),
    "encoder": replace(PLAIN, causal=False, qk_norm=True),
}
TEXT = "".join(
    f"Chapter {i}. The quick brown fox number {i} jumps over {i * i} lazy dogs.\n"
    for i in range(40)
)


def made(config: ModelConfig) -> Transformer:
    """A model with every parameter moved, so that none is zero or one by chance."""
    model = Transformer(config)
    initialise(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def store(folder: Path, results: dict[str, Tensor], **more: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in results.items()}
    metadata = {"arithmetic": cases.arithmetic(), "openpalm": openpalm.__version__} | more
    save_file(tensors, folder / "expected.safetensors", metadata=metadata)
    (folder / "expected.safetensors").chmod(0o644)


def of_model(path: Path) -> dict[str, Tensor]:
    """Ids and what the checkpoint's model computes of them."""
    model = openpalm.load(path)
    ids = cases.some_ids(model.config.vocab_size)
    return {"ids": ids, **cases.outputs(model, ids)}


def make_configs() -> None:
    """A checkpoint of every kind of model, and one with weights in bfloat16."""
    for name, config in CONFIGS.items():
        checkpoint.save(Path(name) / "checkpoint", made(config), fingerprint=True)
        store(Path(name), of_model(Path(name) / "checkpoint"))
    half = made(CONFIGS["grouped"]).to(torch.bfloat16)
    checkpoint.save(Path("bfloat16/checkpoint"), half)
    store(Path("bfloat16"), of_model(Path("bfloat16/checkpoint")))


def make_tokens() -> None:
    Path("tokens").mkdir()
    Path("tokens/text.txt").write_text(TEXT, encoding="utf-8")
    for name, words in cases.PREPARE.items():
        _ok("data", "prepare", *words)
        dataset = open_dataset(Path(name) / "dataset")
        splits = {split: dataset.tokens(split)[:].astype("int32") for split in ("train", "val")}
        store(Path(name), {split: torch.from_numpy(ids) for split, ids in splits.items()})


def make_rows() -> None:
    """Conversations, and preference records of every kind."""
    turns = [
        [_turn("user", f"Who jumps over {i * i} dogs?"), _turn("assistant", f"Fox number {i}.")]
        for i in range(24)
    ]
    _write_rows(Path("conversations/rows.jsonl"), [{"messages": messages} for messages in turns])
    records = [record.to_json() for i in range(4) for record in _records(i)]
    _write_rows(Path("preferences/records.jsonl"), records)
    expected = json.dumps(cases.judged(Path("preferences/records.jsonl")), indent=1)
    Path("preferences/expected.json").write_text(expected + "\n", encoding="utf-8")


def _records(i: int) -> list[Preference]:
    """One of each kind."""
    texts = (f"Fox number {i}.", "No idea.", f"It is fox {i}, I think.")
    kinds: list[tuple[Any, dict[str, Any]]] = [
        ("compare", {"better": 0, "worse": 1, "strength": 1 + i % 3}),
        ("compare", {"tie": [0, 2]}),
        ("compare", {"both_bad": [1, 2]}),
        ("rank", {"order": [[0], [2], [1]]}),
        ("rate", {"ratings": {"helpful": 5 - i % 2, "honest": 5}, "candidate": 0}),
        ("rate", {"ratings": {"helpful": 1 + i, "honest": 3}, "candidate": 1}),
        ("thumb", {"up": True, "candidate": 2}),
        ("edit", {"candidate": 1, "text": f"That was fox number {i}."}),
        ("write", {"text": f"Fox {i} does."}),
        ("flag", {"candidate": None, "reason": "the question is unclear"}),
    ]
    return [
        Preference(
            id=f"{i}-{number}",
            prompt=(Message("user", f"Who jumps over {i * i} dogs?"),),
            candidates=tuple(Candidate(t, "c0ffee", {"temperature": 0.5}) for t in texts),
            kind=kind,
            payload=payload,
            author="ann" if i % 2 else "bob",
            author_kind="person",
            created=f"2026-01-0{1 + i}T12:00:00Z",
            elapsed_s=2.5,
            guideline_version="1",
            supersedes="0-0" if (i, number) == (1, 0) else None,
        )
        for number, (kind, payload) in enumerate(kinds)
    ]


def make_runs() -> None:
    for name, words in cases.RUNS.items():
        _ok(*words, "--out", f"{name}/run")
    for name in cases.RUNS:
        newest = checkpoint.latest(Path(name) / "run")
        assert newest is not None
        results = of_model(newest)
        if not name.startswith("reward"):
            results |= cases.log_probs(openpalm.load(newest), newest)
        if name in cases.CRITICS:
            results |= cases.critic_values(name, newest, results["ids"])
        if name in cases.RESUMABLE:
            store(Path(name), results, train_sha256=cases.train_digest(newest))
        else:
            shutil.rmtree(newest / "train")
            store(Path(name), results)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _ok(*words: object) -> None:
    status = main([str(word) for word in words])
    assert status == 0, words


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else cases.DATA)
    if folder.exists():
        sys.exit(f"{folder}: exists, and stored files are never made again; name another folder")
    folder.mkdir(parents=True)
    os.chdir(folder)  # so that no stored path leads out of it
    with cases.one_thread():
        make_configs()
        make_tokens()
        make_rows()
        make_runs()
