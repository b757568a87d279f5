"""How many judgements a gain of 0.9 needs on the enumerable task: active choice against random.

    python proofs/judgement_curve.py [--reward known-form] [--seeds 10]

A reward is fitted to the judgements so far; the policy is the exact optimum for that reward, so the
gain (see enumerable.py) shows what the judgements taught and nothing else. Judges follow the
Bradley-Terry model of the true reward. Each batch is drawn from a pool of pairs of the
reference: at random, or chosen as `feedback` chooses, with a random share of 30 %.

Rewards: known-form is a logistic regression on tokens by place and on neighbours, the form that the
true reward has, with an ensemble drawn from its posterior (Laplace); transformer is what
`openpalm reward --ensemble-size 8` trains. Writes runs/prove/judgements-REWARD.json and .png.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import enumerable
import torch
from enumerable import ANSWERS, BETA, END, LONGEST, PROMPTS, Task
from prove import drawn_pairs, example_of, settings, stepped
from tasks import OUT
from torch import Tensor

from openpalm.align.config import RewardSettings
from openpalm.align.pairs.examples import preference_loader
from openpalm.align.pairs.reward_model import RewardObjective
from openpalm.align.pairs.reward_model import collate as reward_collate
from openpalm.feedback.statistics.selection import choose_batch, selection_scores
from openpalm.model.config import RewardConfig
from openpalm.model.reward import RewardModel, initialise_heads

POOL, GOAL, MEMBERS, PRIOR_PRECISION = 20_000, 0.9, 8, 1.0
SIZES = {
    "known-form": (50, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200, 4800),
    "transformer": (200, 400, 800, 1600, 3200, 6400, 12_800),
}
ARMS = {"random": "#6b7280", "ensemble": "#2563eb", "ensemble and policy": "#d97706"}
"""How the next pairs are chosen -> colour in the plot: by chance, by disagreement of the reward
ensemble, or by that and closeness of the policy's two implicit rewards; the last is what the loop
page does."""

Pair = tuple[int, int, int]
"""prompt, preferred completion, other completion"""
Fit = Callable[[Task, Sequence[Pair], int], Tensor]
"""rewards of an ensemble from judged pairs and a seed, [members, prompts, completions]"""


@cache
def features() -> Tensor:
    """Tokens by place of each prompt, and neighbours: [prompts, completions, features]."""
    places, tokens = LONGEST * (END + 1), END + 1
    made = torch.zeros(len(PROMPTS), len(ANSWERS), len(PROMPTS) * places + tokens**2)
    for i, answer in enumerate(ANSWERS):
        for t, token in enumerate(answer):
            for prompt in range(len(PROMPTS)):
                made[prompt, i, prompt * places + t * tokens + token] += 1
            if t:
                made[:, i, len(PROMPTS) * places + answer[t - 1] * tokens + token] += 1
    return made.double()


def known_form(task: Task, pairs: Sequence[Pair], seed: int) -> Tensor:
    """Logistic regression by Newton's method, and draws from its Laplace approximation.

    The draws come in pairs mirrored at the most probable reward, which is therefore their mean.
    """
    prompts, better, worse = torch.tensor(pairs).T
    x = features()
    rows = x[prompts, better] - x[prompts, worse]
    weights, prior = rows.new_zeros(rows.shape[1]), torch.eye(rows.shape[1]).double()
    curvature = prior * PRIOR_PRECISION
    for _ in range(30):
        wrong = torch.sigmoid(-(rows @ weights))
        slope = rows.T @ wrong - PRIOR_PRECISION * weights
        curvature = (rows * (wrong * (1 - wrong))[:, None]).T @ rows + PRIOR_PRECISION * prior
        weights = weights + torch.linalg.solve(curvature, slope)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(weights), MEMBERS // 2, generator=generator, dtype=torch.double)
    root = torch.linalg.cholesky(curvature)
    apart = torch.linalg.solve_triangular(root.T, drawn, upper=True).T
    return torch.einsum("paf,mf->mpa", x, weights + torch.cat([apart, -apart]))


def transformer(task: Task, pairs: Sequence[Pair], seed: int) -> Tensor:
    """The ensemble that `openpalm reward` trains, on the reference's trunk."""
    rows = min(64, len(pairs))
    steps = math.ceil(max(8.0, 24_000 / (len(pairs) + 800)) * len(pairs) / rows)
    how = settings(RewardSettings, 4e-3, seed, steps=steps, loss="bradley-terry")
    model = RewardModel(enumerable.CONFIG, RewardConfig(members=MEMBERS))
    model.load_state_dict(task.reference.state_dict(), strict=False)
    initialise_heads(model, seed)
    given = [example_of(*pair) for pair in pairs]
    loader = preference_loader(given, rows=rows, seed=seed, collate=reward_collate)
    stepped(model, RewardObjective(how), loader, how)
    return member_rewards(model)


@torch.no_grad()
def member_rewards(model: RewardModel) -> Tensor:
    """Of every completion: [members, prompts, completions]."""
    made = []
    for prompt in range(len(PROMPTS)):
        batch = reward_collate([example_of(prompt, i) for i in range(len(ANSWERS))])
        scores = model.member_scores(batch.ids, batch.mask, batch.prompt_lengths)
        made.append(model.expected(scores).double())
    return torch.stack(made, dim=1)


FITS: dict[str, Fit] = {"known-form": known_form, "transformer": transformer}


def gain(task: Task, members: Tensor) -> float:
    """Of the optimal policy for the ensemble's mean reward."""
    tilted = task.log_reference + members.mean(dim=0) / BETA
    return task.gain(tilted.log_softmax(dim=-1))


def grow(reward: str, arm: str, seed: int) -> list[float]:
    """The gain at each of SIZES."""
    torch.set_num_threads(1)
    task, fit = enumerable.make(seed), FITS[reward]
    pool = drawn_pairs(task, seed, POOL)
    taken = list(range(SIZES[reward][0]))  # the pool is in random order
    gains = []
    for batch, size in enumerate(SIZES[reward], start=1):
        members = fit(task, [pool[i] for i in taken], seed)
        gains.append(gain(task, members))
        if size == SIZES[reward][-1]:
            break
        more = SIZES[reward][batch] - size
        if arm == "random":
            taken += range(size, size + more)
        else:
            taken += chosen(pool, taken, members, arm, more, seed * 100 + batch)
    return gains


def chosen(
    pool: Sequence[Pair], taken: Sequence[int], members: Tensor, arm: str, count: int, seed: int
) -> list[int]:
    """The next pairs, chosen as the loop page chooses them."""
    left = sorted({*range(len(pool))} - {*taken})
    prompts, better, worse = torch.tensor([pool[i] for i in left]).T
    # In the order of the ids, so that the margins do not give the verdicts away.
    first, second = torch.minimum(better, worse), torch.maximum(better, worse)
    margins = members[:, prompts, first] - members[:, prompts, second]
    # The policy is the optimum for the mean reward, so that is its implicit reward.
    policy = margins.mean(dim=0).numpy() if arm == "ensemble and policy" else None
    scores = selection_scores(margins.numpy(), policy)
    # A prompt here stands for thousands of pairs, so each pair counts as a prompt of its own.
    return [left[choice.pair] for choice in choose_batch(left, scores, count, seed=seed).choices]


def reached(sizes: Sequence[int], gains: Sequence[float]) -> float:
    """Judgements at which the gain first is GOAL, between sizes by straight lines in the logarithm;
    infinite where it never is."""
    before = None
    for size, value in zip(sizes, gains, strict=True):
        if value >= GOAL:
            if before is None:
                return size
            share = (GOAL - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * math.log(size / before[0]))
        before = size, value
    return math.inf


def plot(result: dict[str, Any], path: Path) -> None:
    """Mean gain against judgements, with the range over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for arm, colour in ARMS.items():
        runs = list(zip(*result["gains"][arm], strict=True))
        axes.plot(result["sizes"], [mean(run) for run in runs], "o-", color=colour, label=arm)
        low, high = [min(run) for run in runs], [max(run) for run in runs]
        axes.fill_between(result["sizes"], low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(GOAL, color="black", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlabel="judgements", ylabel="gain", ylim=(-0.3, 1))
    axes.set_xticks(result["sizes"][::2], [f"{size:,}" for size in result["sizes"][::2]])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def table(result: dict[str, Any]) -> str:
    """Mean gains, median of the judgements to GOAL and of their share of random's, in Markdown."""
    columns = ["judgements", *(f"{n:,}" for n in result["sizes"]), f"to {GOAL}", "of random"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    by_chance = [reached(result["sizes"], run) for run in result["gains"]["random"]]
    for arm in ARMS:
        runs = result["gains"][arm]
        needed = [reached(result["sizes"], run) for run in runs]
        cells = [f"{mean(values):.3f}" for values in zip(*runs, strict=True)]
        spread = f"{median(needed):.0f} ({min(needed):.0f} to {max(needed):.0f})"
        ratio = median(map(lambda own, other: own / other, needed, by_chance))
        lines.append(f"| {' | '.join([arm, *cells, spread, f'{ratio:.2f}'])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reward", choices=[*FITS], default="known-form")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    began, seeds = time.perf_counter(), range(asked.seeds)
    with ProcessPoolExecutor(asked.processes) as pool:
        jobs = {arm: [pool.submit(grow, asked.reward, arm, seed) for seed in seeds] for arm in ARMS}
        gains = {arm: [job.result() for job in of_arm] for arm, of_arm in jobs.items()}
    result = {"reward": asked.reward, "sizes": SIZES[asked.reward], "gains": gains}
    result["seconds"] = round(time.perf_counter() - began)
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"judgements-{asked.reward}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, path.with_suffix(".png"))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
