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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import replies
import torch
from served import served
from simulated_judging import Item, Judged, Judging, WithoutSite, site
from tasks import OUT, cpu_seconds, openpalm, write_rows

import openpalm as package
from openpalm.align.pairs.examples import render_completion
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.feedback.simulation.tastes import mean_utility as truth
from openpalm.feedback.statistics.intervals import Estimate, wilson_of_means
from openpalm.feedback.statistics.promotion import Outcome, Vote, decide
from openpalm.feedback.statistics.style import style_difference, style_of
from openpalm.model.reward import RewardModel

READ, TUNING, JUDGED, TOKENS = 12_000, 8_000, 200, 64
TEMPERATURE = 0.7
"""of both sides of a comparison; the pairs that train are sampled at 1, for variety"""
PAIRS = ("--batch-tokens", 1536, "--sequence-length", 96, "--epochs", 4, "--dtype", "float32")
REWARD = ("--pooling", "mean", "--optim.lr", 3e-4, "--ensemble-size", 4)
REWARD_MODELS = 3
"""trained alike but for their seeds; the reward of PPO is their mean"""
DPO = ("--optim.lr", 2e-4)
PPO = ("--steps", 80, "--kl-coef", 0.1, "--max-new-tokens", TOKENS)
LEAST_RATE, LEAST_SEEDS, LONGEST_S = 0.6, 0.8, 15 * 60
TRAINED, CONTROL = ("dpo", "ppo"), "shuffled"


@dataclass(frozen=True)
class Seed:
    """One run of the loop, in a folder."""

    folder: Path
    seed: int
    spent: dict[str, tuple[float, float]] = field(default_factory=dict)
    """of each stage: seconds of the processors, and of the clock"""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, used = time.perf_counter(), cpu_seconds()
        yield
        self.spent[name] = (
            round(cpu_seconds() - used, 1),
            round(time.perf_counter() - began, 1),
        )

    def questions(self, held_out: bool) -> list[str]:
        """Those judged for training, or those of the comparisons; no question is among both."""
        asked = replies.questions()
        random.Random(self.seed).shuffle(asked)
        return asked[JUDGED:] if held_out else asked[:JUDGED]

    def verb(self, verb: str, name: str, *words: object, member: int = 0) -> Path:
        out = self.folder / name
        with self.stage(name):
            openpalm(verb, "--out", out, "--seed", self.seed + 1000 * member, *words)
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
        *("train", "base", "--model", "palm-tiny", "--data", data, "--steps", 250),
        *("--sequence-length", 128, "--batch-tokens", 4096, "--optim.name", "muon"),
        *("--dtype", "float32"),
    )
    return run.verb(
        *("sft", "parent", "--init", base, "--data", tuning, "--steps", 150),
        *("--sequence-length", 96, "--batch-tokens", 3072, "--dtype", "float32"),
    )


def two_replies(
    model: Path, questions: Sequence[str], seed: int, temperature: float = 1.0
) -> list[Item]:
    """Two samples of one model for each question."""
    with served(model) as client:
        ask = partial(client.replies, questions, max_tokens=TOKENS, temperature=temperature)
        pairs = zip(questions, ask(seed=seed), ask(seed=seed + 1), strict=True)
    return [Item(*pair) for pair in pairs]


def write_records(path: Path, judged: Sequence[Judged]) -> Path:
    return write_rows(path, (one.record for one in judged))


def with_shuffled_verdicts(judged: Sequence[Judged], seed: int) -> list[Judged]:
    """The control's records: each item has the verdict of another, drawn by chance."""
    payloads = [one.record["payload"] for one in judged]
    random.Random(f"shuffle {seed}").shuffle(payloads)
    return [
        replace(one, record=one.record | {"payload": payload})
        for one, payload in zip(judged, payloads, strict=True)
    ]


def train_rewards(run: Seed, parent: Path, records: Path) -> list[Path]:
    words = ("--init", parent, "--data", records, *PAIRS, *REWARD)
    return [
        run.verb("reward", f"reward-{member}", *words, member=member)
        for member in range(REWARD_MODELS)
    ]


def train(
    run: Seed, parent: Path, records: Path, shuffled: Path, rewards: Sequence[Path]
) -> dict[str, Path]:
    """The models trained with DPO and PPO, and the control."""
    prompts = write_rows(
        run.folder / "prompts.jsonl", ({"prompt": q} for q in run.questions(held_out=False))
    )
    begin = ("--init", parent, "--data")
    reward = json.dumps([f"{1 / len(rewards):.6f}*{path}" for path in rewards])
    return {
        "dpo": run.verb("dpo", "dpo", *begin, records, *PAIRS, *DPO),
        "ppo": run.verb("ppo", "ppo", *begin, prompts, "--reward", reward, *PPO),
        CONTROL: run.verb("dpo", CONTROL, *begin, shuffled, *PAIRS, *DPO),
    }


@dataclass(frozen=True)
class Compared:
    """The votes on a challenger, and the items that were judged: its reply, its parent's reply."""

    votes: list[Vote]
    items: list[Item]

    def figures(self) -> dict[str, Any]:
        """For the report; the truth is read here for the first time."""
        decided = decide(self.votes, style_features=["length"])
        gaps = [gap_of(item) for item in self.items]
        words = [[len(text.split()) for text in (i.second, i.first)] for i in self.items]
        assert decided.win_rate is not None
        return {
            "win_rate": rounded(decided.win_rate),
            "at_equal_length": rounded(decided.at_equal_style),
            "verdict": decided.verdict,
            "outcomes": decided.outcomes,
            "left_share": rounded(decided.left_share),
            "true_win_rate": round(mean((gap > 0) + (gap == 0) / 2 for gap in gaps), 4),
            "true_utility_gain": round(mean(gaps), 4),
            "words": [round(mean(column), 1) for column in zip(*words, strict=True)],
            "votes": [vote.outcome for vote in self.votes],
        }


def rounded(estimate: Estimate | None) -> list[float] | None:
    return None if estimate is None else [round(value, 4) for value in estimate]


def gap_of(item: Item) -> float:
    """How much better the first reply is in truth."""
    return truth(item.question, item.first) - truth(item.question, item.second)


def compare(
    run: Seed, name: str, challenger: Path, held_out: Sequence[Item], judging: Judging
) -> Compared:
    """Blind: the labelers see two texts, in an order drawn for each question."""
    questions, number = [item.question for item in held_out], [*TRAINED, CONTROL].index(name)
    with served(challenger) as client:
        new = client.replies(
            questions, seed=10 + number, max_tokens=TOKENS, temperature=TEMPERATURE
        )
    items = [Item(old.question, text, old.first) for old, text in zip(held_out, new, strict=True)]
    judged = judging.collect(f"{name}-{run.seed}", items, 100 * run.seed + number)
    return Compared([vote_of(one) for one in judged], items)


def vote_of(judged: Judged) -> Vote:
    """The challenger's reply is the first candidate."""
    record = judged.record
    texts = [candidate["text"] for candidate in record["candidates"]]
    outcome = outcome_of(record["payload"])
    question = record["prompt"][0]["content"]
    return Vote(question, outcome, judged.first_left, record["author_kind"], longer(*texts))


def longer(challenger: str, served: str) -> tuple[float]:
    """The length difference, which the win rate at equal length takes out."""
    return (style_difference(style_of(challenger), style_of(served))[0],)


def outcome_of(payload: dict[str, Any]) -> Outcome:
    """Of the first candidate."""
    match payload:
        case {"better": better}:
            return "win" if better == 0 else "loss"
        case {"tie": _}:
            return "tie"
    return "both_bad"


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


def agreement(items: Sequence[Item], preferred: Sequence[float]) -> list[float] | None:
    """How often the sign of `preferred` is that of the truth, where the truth tells two apart."""
    gaps = [(gap_of(item), sign) for item, sign in zip(items, preferred, strict=True)]
    told_apart = [(gap, sign) for gap, sign in gaps if gap]
    shares = [float((sign > 0) == (gap > 0)) if sign else 0.5 for gap, sign in told_apart]
    return rounded(wilson_of_means(shares))


def reward_agreement(models: Sequence[Path], items: Sequence[Item]) -> list[float] | None:
    """Of the mean of the reward models on held-out pairs of the parent."""
    margins = [0.0] * len(items)
    for model in models:
        first = rewards(model, [(item.question, item.first) for item in items])
        second = rewards(model, [(item.question, item.second) for item in items])
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            margins[number] += a - b
    return agreement(items, margins)


def judgements_agreement(judged: Sequence[Judged], items: Sequence[Item]) -> list[float] | None:
    """Of the judgements that the models learn from."""
    signs = {"win": 1.0, "loss": -1.0}
    sign_of = {
        one.record["prompt"][0]["content"]: signs.get(outcome_of(one.record["payload"]), 0.0)
        for one in judged
    }
    return agreement(items, [sign_of[item.question] for item in items])


def close_loop(run: Seed, judging: Judging) -> dict[str, Any]:
    """Everything of one seed, from the text on."""
    parent = make_parent(run)
    with run.stage("judging"):
        items = two_replies(parent, run.questions(held_out=False), seed=1)
        judged = judging.collect(f"training-{run.seed}", items, run.seed)
    records = write_records(run.folder / "judgements.jsonl", judged)
    control = with_shuffled_verdicts(judged, run.seed)
    rewarding = train_rewards(run, parent, records)
    shuffled = write_records(run.folder / "shuffled.jsonl", control)
    models = train(run, parent, records, shuffled, rewarding)
    with run.stage("comparing"):
        held_out = two_replies(parent, run.questions(held_out=True), 3, TEMPERATURE)
        compared = {
            name: compare(run, name, models[name], held_out, judging)
            for name in (*TRAINED, CONTROL)
        }
    return {
        "seed": run.seed,
        "judgements": len(judged),
        "decided": sum("better" in one.record["payload"] for one in judged),
        "judgements_agreement": judgements_agreement(judged, items),
        "reward_agreement": reward_agreement(rewarding, held_out),
        "stages": run.spent,
    } | {name: one.figures() for name, one in compared.items()}


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
    columns = ["seed", "reward model", "judgements", *names, "seconds (CPU)"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        rates = [f"{shown(result[name]['win_rate'])} {result[name]['verdict']}" for name in names]
        right = [shown(result["reward_agreement"]), shown(result["judgements_agreement"])]
        spent = f"{result['seconds']} ({result['cpu_seconds']})"
        lines.append(f"| {' | '.join([str(result['seed']), *right, *rates, spent])} |")
    whole = [shown(pooled(results, name)) for name in names]
    lines.append(f"| {' | '.join(['all', '', '', *whole, ''])} |")
    return "\n".join(lines)


def stage_table(results: Sequence[dict[str, Any]]) -> str:
    """Seconds of the processors (and of the clock) for each stage, in Markdown."""
    names = [*results[0]["stages"]]
    lines = [f"| {' | '.join(['seed', *names])} |", "|---" * (1 + len(names)) + "|"]
    for result in results:
        spent = [f"{used:.0f} ({lasted:.0f})" for used, lasted in result["stages"].values()]
        lines.append(f"| {' | '.join([str(result['seed']), *spent])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--out", type=Path, default=OUT / "feedback_loop.json")
    parser.add_argument(
        "--without-site", action="store_true", help="the labelers judge in this process"
    )
    asked = parser.parse_args()
    results: list[dict[str, Any]] = []
    for seed in range(asked.first, asked.first + asked.seeds):
        folder = asked.out.with_suffix("") / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # runs of an earlier proof would be resumed
        folder.mkdir(parents=True)
        began, used = time.perf_counter(), cpu_seconds()
        place = nullcontext(WithoutSite()) if asked.without_site else site(folder / "site")
        with place as judging:
            result = close_loop(Seed(folder, seed), judging)
        result["seconds"] = round(time.perf_counter() - began)
        result["cpu_seconds"] = round(cpu_seconds() - used)
        results.append(result)
        asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(table(results), stage_table(results), sep="\n\n", flush=True)
    missed = misses(results)
    for miss in missed:
        print(f"feedback_loop: {miss}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
