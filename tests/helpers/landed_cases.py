"""The commands that made the files of tests/landed, and what is computed from those files.

tests/landed/make.py stores the results and tests/landed/test_landed.py computes them again. When a
module, an option or a field gets a new name, change this file; the stored files never change.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs.examples import render_completion
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.batches.loader import IGNORE
from openpalm.data.rows.readers.demonstrations import read_demonstrations
from openpalm.data.rows.readers.labelled_completions import read_labelled_completions
from openpalm.data.rows.readers.pairs import read_pairs, read_ties
from openpalm.data.rows.readers.ratings import read_ratings
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model.critic import ActorCritic, Bins, CriticKind
from openpalm.model.reward import RewardModel
from openpalm.model.transformer import Transformer

DATA = Path(__file__).parents[1] / "landed" / "data"
_ALIKE = ("--steps", 3, "--dtype", "float32", "--device", "cpu")
_SMALL = ("--batch-tokens", 256, *_ALIKE)
_TALK, _RECORDS = "conversations/rows.jsonl", "preferences/records.jsonl"
_FRESH = (
    *("--model", "palm-tiny", "--arch.dim", 8, "--arch.depth", 2, "--arch.heads", 2),
    *(
        "--arch.head-dim",
        4,
        "--arch.ff-dim",
        16,
        "--sequence-length",
        64,
        "--sample-prompts",
        "Chapter",
    ),
)

PREPARE = {
    "tokens": ("tokens/text.txt", "--out", "tokens/dataset", "--tokenizer", "byte"),
    "tokens-bpe": ("tokens/text.txt", "--out", "tokens-bpe/dataset", "--tokenizer", "bpe:300"),
}
"""`openpalm data prepare`, by folder."""

RUNS: dict[str, tuple[object, ...]] = {
    "train": ("train", "--data", "tokens/dataset", *_FRESH, "--seed", 5, *_SMALL),
    "muon": ("train", "--data", "tokens/dataset", *_FRESH, "--optim.name", "muon", *_SMALL),
    "lora": (
        *(
            "train",
            "--data",
            "tokens/dataset",
            "--init",
            "train/run",
            "--sample-prompts",
            "Chapter",
        ),
        *("--lora.rank", 2, "--lora.targets", "q,v,out,down", *_SMALL),
    ),
    "sft": (
        "sft",
        "--data",
        _TALK,
        "--init",
        "train/run",
        "--seed",
        6,
        *_SMALL,
    ),
    "dpo": (
        "dpo",
        "--data",
        _RECORDS,
        "--init",
        "sft/run",
        "--seed",
        7,
        *_SMALL,
    ),
    "reward": ("reward", "--data", _RECORDS, "--init", "sft/run", *_SMALL),
    "reward-binned": (
        *("reward", "--data", _RECORDS, "--init", "sft/run", "--loss", "binned"),
        *(
            "--axis",
            "helpful",
            "--ensemble-size",
            2,
            "--pooling",
            "mean",
            "--segment-embeddings",
            *_SMALL,
        ),
    ),
    "reward-ordinal": (
        *(
            "reward",
            "--data",
            _RECORDS,
            "--init",
            "sft/run",
            "--loss",
            "ordinal",
        ),
        *("--axis", "helpful", *_SMALL),
    ),
    "critic": (
        *(
            "ppo",
            "--data",
            _TALK,
            "--init",
            "sft/run",
            "--reward",
            "reward/run",
        ),
        *(
            "--prompts-per-rollout",
            4,
            "--max-new-tokens",
            8,
            "--optim.name",
            "lion",
            "--optim.lr",
            0.01,
        ),
        *_ALIKE,
    ),
    "critic-separate": (
        *(
            "ppo",
            "--data",
            _TALK,
            "--init",
            "sft/run",
            "--reward",
            "reward/run",
        ),
        *(
            "--prompts-per-rollout",
            4,
            "--max-new-tokens",
            8,
            "--critic",
            "separate",
            "--value-bins",
            5,
        ),
        *("--last-layers", 1, "--optim.name", "lion", "--optim.lr", 0.01, *_ALIKE),
    ),
}
"""Commands, by the folder of their run; `--out FOLDER/run` is added to each."""

RENAMED_FIELDS: dict[str, str] = {}
"""Fields of config.json that were renamed since: old name to new name."""
RENAMED_TENSORS: dict[str, str] = {}
"""Tensors of model.safetensors that were renamed since: old name to new name."""

REPEATED = ("train", "sft", "dpo")
"""Runs that the tests repeat."""
RESUMABLE = ("train", "muon", "critic", "critic-separate")
"""Runs stored with train/, the optimizer's state; the others are stored without it."""
CRITICS: dict[str, tuple[CriticKind, Bins | None]] = {
    "critic": ("shared", None),
    "critic-separate": ("separate", Bins(5, -5.0, 5.0)),
}

QUESTION = [Message("system", "Be brief."), Message("user", "Who jumps over 4 dogs?")]
ANSWER = [Message("assistant", "Fox number 2.")]


def arithmetic() -> str:
    """What the last bits of a result depend on: processor, instructions that may be used, torch."""
    wanted = ("vendor_id", "cpu family", "model", "model name")
    found = [platform.machine()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines()]
        found += [pair[1].strip() for pair in lines if pair[0].strip() in wanted]
    except OSError:
        pass
    limits = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
    found += [f"{name}={os.environ[name]}" for name in limits if name in os.environ]
    return ", ".join(
        [*found, torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"]
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread: the order of sums is then fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def some_ids(vocab_size: int, rows: int = 2, time: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(vocab_size, (rows, time), generator=generator)


@torch.no_grad()
def outputs(model: Transformer, ids: Tensor) -> dict[str, Tensor]:
    """What a model computes of ids [rows, time], by name."""
    if isinstance(model, RewardModel):
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, -3:] = False
        given = {"mask": mask, "prompt_lengths": torch.tensor([6, 3])}
        return {
            "score": model.score(ids, **given),
            "value": model.value(ids, **given),
            "spread": model.spread(ids, **given),
            "value_plain": model.value(ids),
        }
    found = {"logits": model.logits(ids), "hidden": model.hidden(ids)}
    if not model.config.causal:
        padded = ids.clone()
        padded[1, -3:] = -1
        found["logits_padded"] = model.logits(padded)
    return found


def conversation(directory: Path) -> tuple[Tensor, Tensor]:
    """A question with its answer by the checkpoint's tokenizer: inputs and targets, [1, time]."""
    record = render_completion(Tokenizer.load(directory / "tokenizer.json"), QUESTION, ANSWER)
    ids, counts = torch.tensor([record.ids]), torch.tensor([record.loss_mask])
    return ids[:, :-1], torch.where(counts, ids, IGNORE)[:, 1:].contiguous()


@torch.no_grad()
def log_probs(model: Transformer, directory: Path) -> dict[str, Tensor]:
    """The log-probability of each token of the answer, and the ids that the template gives."""
    inputs, targets = conversation(directory)
    found = token_log_probs(model, inputs, targets)
    return {"chat_inputs": inputs, "chat_targets": targets, "log_probs": found}


@torch.no_grad()
def critic_values(name: str, directory: Path, ids: Tensor) -> dict[str, Tensor]:
    """What the critic of a run reads at every token, and the values that this stands for."""
    model = ActorCritic(checkpoint.load_config(directory), *CRITICS[name])
    checkpoint.load_weights(model, directory)
    own = training_tensors(directory / "train")
    for name, parameter in model.named_parameters():
        if name.startswith("critic."):
            parameter.copy_(own[f"model/{name}"])
    model.eval()
    read = model.values(ids, model.residual(ids).flatten(0, 1), torch.ones_like(ids) > 0)
    return {"critic_read": read, "critic_values": model.as_value(read).clone()}


def training_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in train/; 0.1.0 wrote them in torch.distributed.checkpoint's own form."""
    if not (folder / ".metadata").exists():
        return checkpoint.load_train_state(folder.parent).tensors
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    state_dict_loader.load(found, storage_reader=reader, no_dist=True)
    return found


def train_digest(directory: Path) -> str:
    """SHA-256 of the tensors and values in train/, as they are read."""
    state = checkpoint.load_train_state(directory)
    digest = hashlib.sha256(json.dumps(state.values, sort_keys=True).encode())
    for name, tensor in sorted(state.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def judged(path: Path) -> dict[str, Any]:
    """The training rows that each algorithm makes of a file of preference records, as JSON."""
    return {
        "pairs": [
            [*map(_turns, (p.prompt, p.chosen, p.rejected)), p.margin and float(p.margin)]
            for p in read_pairs(path).items
        ],
        "ties": [[*map(_turns, (t.prompt, t.first, t.second))] for t in read_ties(path)],
        "ratings": [
            [_turns(r.prompt), _turns(r.completion), r.value]
            for r in read_ratings(path, "helpful").items
        ],
        "verdicts": [
            [_turns(v.prompt), _turns(v.completion), v.good]
            for v in read_labelled_completions(path).items
        ],
        "demonstrations": [_turns(messages) for messages in read_demonstrations(path).items],
        "unused_by_pairs": read_pairs(path).unused,
    }


def _turns(messages: tuple[Message, ...]) -> list[Any]:
    return [message.to_json() for message in messages]
