"""Two-digit addition: GRPO after fine-tuning on answers half of which are wrong.

    python proofs/addition.py [--seeds 1] [--first 0]

The fine-tuned model has seen the right answer to a problem as often as a random wrong one, and says
either. GRPO with --reward exact makes it say the one it already thinks likeliest: its accuracy at
temperature 1 rises towards its greedy accuracy, which stays. It is sharpening, not new knowledge.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import Figures, Speaker, openpalm, prove, write_rows

TOKENS, HELD_OUT, COPIES = 6, 300, 12
BOUNDS = {"gain": 0.25, "-greedy_drop": -0.06}

Sums = Sequence[tuple[int, int]]


def run(folder: Path, seed: int) -> Figures:
    drawn = random.Random(seed)
    sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    drawn.shuffle(sums)
    held_out, trained = sums[:HELD_OUT], sums[HELD_OUT:]
    given = [row(a, b, noisy(drawn, a + b)) for _ in range(COPIES) for a, b in trained]
    text = write_rows(
        folder / "text.jsonl", ({"text": f"{r['prompt']}{r['completion']}"} for r in given)
    )
    answered = write_rows(folder / "half-wrong.jsonl", given)
    known = ({"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in trained)
    asked = write_rows(folder / "prompts.jsonl", known)
    data, base, tuned, aligned = (folder / name for name in ("data", "base", "sft", "grpo"))
    common = ("--seed", seed, "--dtype", "float32", "--sequence-length")
    openpalm("data", "prepare", text, "--out", data, "--tokenizer", "byte", "--dedup", "none")
    openpalm(
        *("train", "--model", "palm-tiny", "--data", data, "--out", base, "--steps", 100),
        *("--batch-tokens", 2048, *common, 64),
    )
    openpalm(
        *("sft", "--init", base, "--data", answered, "--out", tuned, "--steps", 1500),
        *("--batch-tokens", 2048, *common, 16, "--optim.name", "muon"),
    )
    openpalm(
        *("grpo", "--init", tuned, "--data", asked, "--out", aligned, "--steps", 80),
        *("--reward", "exact", "--max-new-tokens", TOKENS, "--seed", seed),
    )
    before, after = accuracies(tuned, held_out), accuracies(aligned, held_out)
    return {
        "before": before[0],
        "after": after[0],
        "gain": after[0] - before[0],
        "greedy_before": before[1],
        "greedy_after": after[1],
        "greedy_drop": before[1] - after[1],
    }


def row(a: int, b: int, answer: int) -> dict[str, Any]:
    return {"prompt": f"{a}+{b}=", "completion": str(answer)}


def noisy(drawn: random.Random, right: int) -> int:
    """The right sum, or as often another that two-digit numbers can have."""
    wrong = drawn.choice([n for n in range(20, 199) if n != right])
    return drawn.choice((right, wrong))


def accuracies(run: Path, sums: Sums) -> tuple[float, float]:
    """At temperature 1, over four answers to each, and greedily."""
    speaker = Speaker(run)

    def share(sums: Sums, temperature: float) -> float:
        questions = [f"{a}+{b}=" for a, b in sums]
        answers = speaker.answers(questions, max_new_tokens=TOKENS, temperature=temperature, seed=1)
        said = [speaker.text(answer) for answer in answers]
        return sum(s == str(a + b) for s, (a, b) in zip(said, sums, strict=True)) / len(sums)

    return share([*sums] * 4, 1.0), share(sums, 0.0)


if __name__ == "__main__":
    sys.exit(prove("addition", run, BOUNDS, __doc__ or ""))
