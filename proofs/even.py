"""The even-token task: GRPO on the share of even token ids among the 12 of an answer.

    python proofs/even.py [--seeds 1] [--first 0]

The base model has learnt to write random letters, half of whose bytes are even, and nothing else.
"""

import random
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks import Figures, Speaker, openpalm, prove, write_rows

from openpalm.align.rollouts.rollout_batch import Completion

TOKENS, QUESTIONS, STEPS, EARLY = 12, 64, 60, 25
BOUNDS = {"share_at_25": 0.85, "share_at_60": 0.98}


def run(folder: Path, seed: int) -> Figures:
    drawn = random.Random(seed)
    letters = ({"text": "".join(drawn.choices(string.ascii_lowercase, k=40))} for _ in range(2000))
    text = write_rows(folder / "letters.jsonl", letters)
    questions = [f"Write letters, {i}." for i in range(QUESTIONS)]
    prompts = write_rows(folder / "prompts.jsonl", ({"prompt": q} for q in questions))
    data, base, aligned = folder / "data", folder / "base", folder / "grpo"
    openpalm("data", "prepare", text, "--out", data, "--tokenizer", "byte")
    openpalm(
        *("train", "--model", "palm-tiny", "--data", data, "--out", base, "--steps", 60),
        *("--sequence-length", 64, "--batch-tokens", 1024, "--seed", seed, "--dtype", "float32"),
    )
    openpalm(
        *("grpo", "--init", base, "--data", prompts, "--out", aligned, "--steps", STEPS),
        *("--reward", "examples/rewards.py:even_bytes", "--max-new-tokens", TOKENS),
        *("--kl-coef", 0, "--optim.lr", 2e-3, "--save-every", EARLY, "--seed", seed),
        *("--keep-checkpoints", 0),
    )
    return {
        "share_before": share(base, None, questions),
        "share_at_25": share(aligned, EARLY, questions),
        "share_at_60": share(aligned, STEPS, questions),
    }


def share(run: Path, step: int | None, questions: Sequence[str]) -> float:
    """Of even ids among the tokens of 512 answers at temperature 1; one that is missing is odd."""
    speaker = Speaker(run, step)
    answers = speaker.answers([*questions] * 8, max_new_tokens=TOKENS, seed=1)
    return sum(evens(answer) for answer in answers) / (TOKENS * len(answers))


def evens(answer: Completion) -> int:
    return sum(i % 2 == 0 for i in answer.ids[: len(answer.ids) - answer.ended])


if __name__ == "__main__":
    sys.exit(prove("even", run, BOUNDS, __doc__ or ""))
