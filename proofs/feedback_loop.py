"""The closed loop: 200 noisy judgements, a reward model, DPO, PPO, and blind comparisons.

    python proofs/feedback_loop.py [--seeds 5] [--first 0]

Three simulated labelers of known taste judge 200 pairs of replies of a parent model; each of their
judgements names the wrong side with a chance of 15 %. From these records alone `openpalm reward`,
`dpo` and `ppo` train. Each new model is compared blind with its parent on 200 held-out prompts by
labelers of the same tastes and noise, and the rule of promotion decides. As a control, DPO
also trains on the same records with shuffled verdicts: it must not be promoted.

The truth is the labelers' mean utility without noise. It enters neither training nor promotion; it
is computed afterwards, for the report.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import replies
import torch
from labelers import Judgement, Labeler, labelers, truth
from served import served
from tasks import OUT, cpu_seconds, openpalm, write_rows

import openpalm as package
from openpalm.align.pairs.examples import render_completion
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.feedback.statistics.intervals import Estimate, wilson_of_means
from openpalm.feedback.statistics.promotion import Decision, Outcome, Vote, decide
from openpalm.feedback.statistics.style import style_difference, style_of
from openpalm.model.reward import RewardModel

READ, TUNING, JUDGED, TOKENS = 12_000, 8_000, 200, 64
PAIRS = ("--batch-tokens", 1536, "--sequence-length", 96, "--epochs", 4, "--dtype", "float32")
REWARD = ("--pooling", "mean", "--optim.lr", 3e-4, "--ensemble-size", 4)
DPO = ("--optim.lr", 2e-4)
PPO = ("--steps", 80, "--kl-coef", 0.1, "--max-new-tokens", TOKENS)
LEAST_RATE, LEAST_SEEDS, LONGEST_S = 0.6, 0.8, 15 * 60
TRAINED, CONTROL = ("dpo", "ppo"), "shuffled"


@dataclass(frozen=True)
class Item:
    """Two replies to a question; labelers see nothing else."""

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Seed:
    """One run of the loop, in a folder."""

    folder: Path
    seed: int

    def questions(self, held_out: bool) -> list[str]:
        """Those judged for training, or those of the comparisons; no question is among both."""
        asked = replies.questions()
        random.Random(self.seed).shuffle(asked)
        return asked[JUDGED:] if held_out else asked[:JUDGED]

    def verb(self, verb: str, name: str, *words: object) -> Path:
        out = self.folder / name
        openpalm(verb, "--out", out, "--seed", self.seed, *words)
        return out


def make_parent(run: Seed) -> Path:
    """A writer of replies of mixed quality, made by pretraining and fine-tuning."""
    drawn, asked = random.Random(run.seed), replies.questions()
    questions = [drawn.choice(asked) for _ in range(READ)]
    rows = [{"prompt": q, "completion": replies.reply(drawn, q)} for q in questions]
    texts = ({"text": f"{row['prompt']}\n{row['completion']}"} for row in rows)
    read = write_rows(run.folder / "read.jsonl", texts)
    tuning = write_rows(run.folder / "tuning.jsonl", rows[:TUNING])
    data = run.folder / "data"
    openpalm("data", "prepare", read, "--out", data, "--tokenizer", "bpe:512")
    base = run.verb(
        *("train", "base", "--model", "palm-tiny", "--data", data, "--steps", 150),
        *("--sequence-length", 128, "--batch-tokens", 4096, "--optim.name", "muon"),
        *("--dtype", "float32"),
    )
    return run.verb(
        *("sft", "parent", "--init", base, "--data", tuning, "--steps", 150),
        *("--sequence-length", 96, "--batch-tokens", 3072, "--dtype", "float32"),
    )


def two_replies(model: Path, questions: Sequence[str], seed: int) -> list[Item]:
    """Two samples of one model for each question."""
    with served(model) as client:
        ask = partial(client.replies, questions, max_tokens=TOKENS)
        pairs = zip(questions, ask(seed=seed), ask(seed=seed + 1), strict=True)
    return [Item(*pair) for pair in pairs]


def judge(items: Sequence[Item], judges: Sequence[Labeler]) -> list[Judgement]:
    """Each item by one labeler, in turn."""
    return [
        judges[i % len(judges)].judge(item.question, item.first, item.second)
        for i, item in enumerate(items)
    ]


def record(number: int, item: Item, judgement: Judgement, author: str) -> dict[str, Any]:
    """A preference record."""
    return {
        "id": f"judgement-{number}",
        "prompt": [{"role": "user", "content": item.question}],
        "candidates": [{"text": item.first}, {"text": item.second}],
        "kind": "compare",
        "payload": judgement.payload(),
        "author": author,
        "author_kind": "simulated",
        "created": "2026-01-01T00:00:00Z",
    }


def write_records(path: Path, items: Sequence[Item], judgements: Sequence[Judgement]) -> Path:
    names = [labeler.taste.name for labeler in labelers(0)]
    rows = enumerate(zip(items, judgements, strict=True))
    return write_rows(path, (record(i, *row, names[i % len(names)]) for i, row in rows))


def train(run: Seed, parent: Path, records: Path, shuffled: Path) -> dict[str, Path]:
    """The reward model, the models trained with DPO and PPO, and the control."""
    prompts = write_rows(
        run.folder / "prompts.jsonl", ({"prompt": q} for q in run.questions(held_out=False))
    )
    begin = ("--init", parent, "--data")
    reward = run.verb("reward", "reward", *begin, records, *PAIRS, *REWARD)
    return {
        "reward": reward,
        "dpo": run.verb("dpo", "dpo", *begin, records, *PAIRS, *DPO),
        "ppo": run.verb("ppo", "ppo", *begin, prompts, "--reward", reward, *PPO),
        CONTROL: run.verb("dpo", CONTROL, *begin, shuffled, *PAIRS, *DPO),
    }


@dataclass(frozen=True)
class Compared:
    """A challenger's replies to the held-out questions beside its parent's, and the votes."""

    questions: list[str]
    served: list[str]
    challenger: list[str]
    votes: list[Vote]

    def decision(self) -> Decision:
        return decide(self.votes, style_features=["length"])

    def figures(self) -> dict[str, Any]:
        """For the report; the truth is read here for the first time."""
        decided = self.decision()
        pairs = list(zip(self.questions, self.challenger, self.served, strict=True))
        gaps = [truth(q, new) - truth(q, old) for q, new, old in pairs]
        words = [
            mean(len(text.split()) for text in texts) for texts in (self.served, self.challenger)
        ]
        assert decided.win_rate is not None
        return {
            "win_rate": [round(value, 4) for value in decided.win_rate],
            "at_equal_length": decided.at_equal_style
            and [round(value, 4) for value in decided.at_equal_style],
            "verdict": decided.verdict,
            "outcomes": decided.outcomes,
            "true_win_rate": round(mean((gap > 0) + (gap == 0) / 2 for gap in gaps), 4),
            "true_utility_gain": round(mean(gaps), 4),
            "words": [round(value, 1) for value in words],
        }


def compare(
    run: Seed, challenger: Path, questions: list[str], old: list[str], number: int
) -> Compared:
    """Blind: the labelers see two texts, in an order drawn for each question."""
    with served(challenger) as client:
        new = client.replies(questions, seed=10 + number, max_tokens=TOKENS)
    drawn = random.Random(f"sides {run.seed} {number}")
    left = [drawn.random() < 0.5 for _ in questions]
    items = [
        Item(q, n, o) if first else Item(q, o, n)
        for q, n, o, first in zip(questions, new, old, left, strict=True)
    ]
    judgements = judge(items, labelers(100 * run.seed + number))
    votes = [
        Vote(
            q,
            outcome(judgement, first),
            first,
            "simulated",
            (style_difference(style_of(n), style_of(o))[0],),
        )
        for q, n, o, first, judgement in zip(questions, new, old, left, judgements, strict=True)
    ]
    return Compared(questions, old, new, votes)


def longer(challenger: str, served: str) -> tuple[float]:
    """The length difference, which the win rate at equal length takes out."""
    return (style_difference(style_of(challenger), style_of(served))[0],)


def outcome(judgement: Judgement, challenger_first: bool) -> Outcome:
    match judgement.side:
        case "tie":
            return "tie"
        case "both bad":
            return "both_bad"
        case side:
            return "win" if (side == "first") == challenger_first else "loss"


@torch.no_grad()
def rewards(run: Path, rows: Sequence[tuple[str, str]]) -> list[float]:
    """The reward model's, of (question, reply)."""
    tokenizer = Tokenizer.load(checkpoint.resolve(run) / "tokenizer.json")
    model = package.load(run)
    assert isinstance(model, RewardModel)

    def score(question: str, reply: str) -> float:
        asked, given = Message("user", question), Message("assistant", reply)
        ids = render_completion(tokenizer, [asked], [given]).ids
        return model.value(torch.tensor([ids])).item()

    return [score(*row) for row in rows]


def agreement(items: Sequence[Item], prefers: Callable[[Item], float]) -> Estimate | None:
    """How often the sign of `prefers` is that of the truth, where the truth tells two apart."""
    shares = []
    for item in items:
        gap = truth(item.question, item.first) - truth(item.question, item.second)
        if gap:
            preferred = prefers(item)
            shares.append(0.5 if preferred == 0 else float((preferred > 0) == (gap > 0)))
    return wilson_of_means(shares)


def judged_by_reward(run: Path, items: Sequence[Item]) -> Estimate | None:
    """Agreement of the reward model with the truth on held-out pairs of the parent."""
    first = rewards(run, [(item.question, item.first) for item in items])
    second = rewards(run, [(item.question, item.second) for item in items])
    gaps = {item: a - b for item, a, b in zip(items, first, second, strict=True)}
    return agreement(items, gaps.__getitem__)


def judged_by_labelers(seed: int, items: Sequence[Item]) -> Estimate | None:
    """Agreement of single noisy judgements with the truth: what the reward model learns from."""
    made = dict(zip(items, judge(items, labelers(seed)), strict=True))
    return agreement(items, lambda item: made[item].share - 0.5)


def close_loop(run: Seed) -> dict[str, Any]:
    """Everything of one seed, from the text on."""
    parent = make_parent(run)
    items = two_replies(parent, run.questions(held_out=False), seed=1)
    judgements = judge(items, labelers(run.seed))
    records = write_records(run.folder / "judgements.jsonl", items, judgements)
    random.Random(f"shuffle {run.seed}").shuffle(judgements)
    shuffled = write_records(run.folder / "shuffled.jsonl", items, judgements)
    models = train(run, parent, records, shuffled)
    held_out = two_replies(parent, run.questions(held_out=True), seed=3)
    questions, old = [i.question for i in held_out], [i.first for i in held_out]
    figures: dict[str, Any] = {"seed": run.seed}
    figures["decided_judgements"] = sum(j.side in ("first", "second") for j in judgements)
    for number, name in enumerate((*TRAINED, CONTROL)):
        compared = compare(run, models[name], questions, old, number)
        figures[name] = compared.figures() | {"votes": [v.outcome for v in compared.votes]}
    figures["reward_agreement"] = judged_by_reward(models["reward"], held_out)
    figures["labelers_agreement"] = judged_by_labelers(100 * run.seed + 50, held_out)
    return figures


def pooled(results: Sequence[dict[str, Any]], name: str) -> Estimate:
    """Over all comparisons of all seeds."""
    scores = {"win": 1.0, "loss": 0.0}
    votes = [scores.get(vote, 0.5) for result in results for vote in result[name]["votes"]]
    found = wilson_of_means(votes)
    assert found is not None
    return found


def misses(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the loop should have shown and did not."""
    found = []
    for name in TRAINED:
        reached = sum(result[name]["win_rate"][0] >= LEAST_RATE for result in results)
        if reached < LEAST_SEEDS * len(results):
            found.append(f"{name}: {reached} of {len(results)} seeds reach {LEAST_RATE:.0%}")
        whole = pooled(results, name)
        if whole.value < LEAST_RATE or whole.low <= 0.5:
            found.append(f"{name}: pooled win rate {shown(whole)}")
    for result in results:
        if result[CONTROL]["verdict"] == "promote":
            found.append(f"seed {result['seed']}: the control is promoted")
        if result["cpu_seconds"] > LONGEST_S:
            found.append(f"seed {result['seed']}: {result['cpu_seconds']} CPU seconds")
    return found


def shown(rate: Sequence[float] | None) -> str:
    return "" if rate is None else f"{rate[0]:.3f} ({rate[1]:.3f} to {rate[2]:.3f})"


def table(results: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    names = (*TRAINED, CONTROL)
    columns = ["seed", "reward model", "one judgement", *names, "seconds (CPU)"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        rates = [f"{shown(result[name]['win_rate'])} {result[name]['verdict']}" for name in names]
        right = [shown(result["reward_agreement"]), shown(result["labelers_agreement"])]
        spent = f"{result['seconds']} ({result['cpu_seconds']})"
        lines.append(f"| {' | '.join([str(result['seed']), *right, *rates, spent])} |")
    whole = [shown(pooled(results, name)) for name in names]
    lines.append(f"| {' | '.join(['all', '', '', *whole, ''])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--out", type=Path, default=OUT / "feedback_loop.json")
    asked = parser.parse_args()
    results: list[dict[str, Any]] = []
    for seed in range(asked.first, asked.first + asked.seeds):
        folder = asked.out.with_suffix("") / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # runs of an earlier proof would be resumed
        folder.mkdir(parents=True)
        began, used = time.perf_counter(), cpu_seconds()
        result = close_loop(Seed(folder, seed))
        result["seconds"] = round(time.perf_counter() - began)
        result["cpu_seconds"] = round(cpu_seconds() - used)
        results.append(result)
        asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(table(results), flush=True)
    missed = misses(results)
    for miss in missed:
        print(f"feedback_loop: {miss}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
