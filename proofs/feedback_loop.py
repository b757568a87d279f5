"""The closed loop: 200 noisy judgements, a reward model, DPO, PPO, and blind comparisons.

    python proofs/feedback_loop.py [--seeds 5] [--first 0]

Three simulated labelers of known taste judge 200 pairs of the parent's replies and name the wrong
side in 15 % of them. From these judgements alone `openpalm reward`, `dpo` and `ppo` train; each
new model is compared blind with its parent on 200 held-out prompts, by the same noisy labelers. As
a control, DPO also trains on shuffled labels. The truth, the labelers' mean utility without noise,
is computed only afterwards, for the report.
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import labelers
import replies
import torch
from labelers import Judgement, Labeler
from served import served
from tasks import Figures, openpalm, prove, write_rows

import openpalm as package
from openpalm.align.pairs.examples import render_completion
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer

READ, TUNING, JUDGED, COMPARED, TOKENS = 12_000, 8_000, 200, 200, 64
COMMON = ("--dtype", "float32")
REWARD = ("--epochs", 4, "--batch-tokens", 1536, "--sequence-length", 96, "--ensemble-size", 4)
DPO = ("--epochs", 4, "--batch-tokens", 1536, "--sequence-length", 96)
PPO = ("--steps", 120, "--max-new-tokens", TOKENS)


@dataclass(frozen=True)
class Item:
    """Two replies to a question; which model wrote the first one is not shown to labelers."""

    question: str
    first: str
    second: str
    swapped: bool = False
    """whether the second reply is the parent's"""


def parent(folder: Path, seed: int) -> Path:
    """A writer of replies whose qualities vary, made by train and sft."""
    drawn, asked = random.Random(seed), replies.questions()
    rows = [{"prompt": (q := drawn.choice(asked)), "completion": replies.reply(drawn, q)}
            for _ in range(READ)]
    read = write_rows(
        folder / "read.jsonl", ({"text": f"{r['prompt']}\n{r['completion']}"} for r in rows)
    )
    tuning = write_rows(folder / "tuning.jsonl", rows[:TUNING])
    data, base, tuned = folder / "data", folder / "base", folder / "parent"
    openpalm("data", "prepare", read, "--out", data, "--tokenizer", "bpe:512")
    openpalm(
        *("train", "--model", "palm-tiny", "--data", data, "--out", base, "--steps", 150),
        *("--sequence-length", 128, "--batch-tokens", 4096, "--optim.name", "muon"),
        *("--seed", seed, *COMMON),
    )
    openpalm(
        *("sft", "--init", base, "--data", tuning, "--out", tuned, "--steps", 150),
        *("--sequence-length", 96, "--batch-tokens", 3072, "--seed", seed, *COMMON),
    )
    return tuned
