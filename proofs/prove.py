"""Proves, on a task whose optimum is known, what every alignment algorithm here reaches.

    python proofs/prove.py [--only 'ppo;dpo'] [--seeds 5] [--steps 1500]

Each algorithm is run as its verb runs it: the same loader, objective, trainer and engine. Writes
runs/prove/proofs.json, one object a run, and prints a table; ends with status 1 where a minimum
over the seeds is below its floor. The task is in enumerable.py.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import enumerable
import torch
from enumerable import ANSWERS, BETA, END, LONGEST, PROMPTS, Task
from rich.progress import Progress
from torch import Tensor

from openpalm.align.config import DpoSettings, GrpoSettings, PpoSettings, RewardSettings
from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs import kto
from openpalm.align.pairs.dpo import PairObjective
from openpalm.align.pairs.examples import (
    PreferenceExample,
    collate,
    preference_loader,
    with_reference,
)
from openpalm.align.pairs.reward_model import RewardObjective
from openpalm.align.pairs.reward_model import collate as reward_collate
from openpalm.align.rollouts import grpo, ppo
from openpalm.align.rollouts.rollout import RolloutLoader
from openpalm.align.rollouts.rollout_batch import Completion, to_example
from openpalm.align.rollouts.sampler import Sampler
from openpalm.evaluate.agreement import spearman
from openpalm.model.config import RewardConfig
from openpalm.model.critic import ActorCritic, Bins
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import Transformer
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer

OUT = Path("runs/prove/proofs.json")
PAIRS, HELD_OUT = 20_000, 4_000
STEPLESS = "best of 4"

Figures = dict[str, float]


@dataclass(frozen=True)
class Row:
    """An algorithm, how it is run, and the floors that its minimum over seeds must reach."""

    run: Callable[..., Figures]
    """takes a task, a seed and, where it has steps, `steps`"""
    floors: dict[str, float]
    """figure -> least value; -figure -> the negative of its greatest"""


def settings(kind: type, lr: float, seed: int, **changes: Any) -> Any:
    optim = OptimSettings(lr=lr, weight_decay=0.0, beta2=0.99, warmup=0.02, final_lr=0.0)
    if kind is not RewardSettings:
        changes = {"beta" if kind is DpoSettings else "kl_coef": BETA} | changes
    return kind(data=Path("-"), out=Path("-"), init="-", seed=seed, optim=optim, **changes)


def start_of(task: Task) -> Transformer:
    return copy.deepcopy(task.reference).requires_grad_(True)


def stepped(model: Transformer, objective: Any, loader: Any, how: Any) -> None:
    """Through all of the run's steps."""
    trainer = Trainer(
        model, objective, Optimizer(model, how.optim, how.optim.lr), loader, steps=how.steps
    )
    for _ in range(how.steps):
        trainer.train_step()


def judged(task: Task, model: Transformer) -> Figures:
    log_policy = enumerable.log_probs(model)
    return {"gain": task.gain(log_policy), "total_variation": task.total_variation(log_policy)}


def rolled_out(task: Task, model: Transformer, objective: Any, estimate: Any, how: Any) -> Figures:
    sampler = Sampler(
        model, PROMPTS, frozenset({END}), how, slots=how.prompts_per_rollout * how.num_completions
    )
    reference = partial(token_log_probs, task.reference)
    rows = how.prompts_per_rollout * how.num_completions // how.minibatches
    loader = RolloutLoader(sampler, task.reward, estimate, reference, rows=rows)
    stepped(model, objective, loader, how)
    return judged(task, model)


def by_ppo(task: Task, seed: int, **changes: Any) -> Figures:
    options = {"steps": 2400, "num_completions": 32, "minibatches": 2} | changes
    how = settings(
        PpoSettings, 2e-3, seed, prompts_per_rollout=4, max_new_tokens=LONGEST, **options
    )
    bins = Bins(how.value_bins, -how.value_range, how.value_range) if how.value_bins else None
    model = ActorCritic(enumerable.CONFIG, how.critic, bins)
    model.load_state_dict(task.reference.state_dict(), strict=False)
    model.reset_critic()
    return rolled_out(task, model, ppo.PpoObjective(how), ppo.estimate, how)


def by_group(task: Task, seed: int, **changes: Any) -> Figures:
    options = {"steps": 600, "num_completions": 32} | changes
    how = settings(
        GrpoSettings, 3e-3, seed, prompts_per_rollout=4, max_new_tokens=LONGEST, **options
    )
    return rolled_out(task, start_of(task), grpo.GroupObjective(how), grpo.estimate, how)


def drawn_pairs(task: Task, seed: int, count: int) -> list[tuple[int, int, int]]:
    """(prompt, preferred, other): two answers of the reference, by a judge of Bradley-Terry."""
    generator = torch.Generator().manual_seed(seed + 1000)
    prompts = torch.randint(len(PROMPTS), (count,), generator=generator)
    chances = task.log_reference.exp()[prompts].float()
    two = torch.multinomial(chances, 2, replacement=True, generator=generator)
    rewards = task.rewards[prompts[:, None], two]
    first = torch.rand(count, generator=generator) < (rewards[:, 0] - rewards[:, 1]).sigmoid()
    better = torch.where(first, two[:, 0], two[:, 1])
    worse = torch.where(first, two[:, 1], two[:, 0])
    kept = better != worse
    return list(
        zip(prompts[kept].tolist(), better[kept].tolist(), worse[kept].tolist(), strict=True)
    )


def example_of(prompt: int, *answers: int, label: float = 0.0) -> PreferenceExample:
    given = (Completion(prompt, PROMPTS[prompt], ANSWERS[i], [], True) for i in answers)
    return PreferenceExample(tuple(map(to_example, given)), label)


def accuracy(scores: Tensor, pairs: list[tuple[int, int, int]]) -> float:
    """How often the preferred answer scores higher; half where they are equal."""
    p, better, worse = torch.tensor(pairs).T
    difference = scores[p, better] - scores[p, worse]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


def by_pairs(task: Task, seed: int, loss: str, lr: float = 3e-3, **changes: Any) -> Figures:
    how = settings(DpoSettings, lr, seed, loss=loss, **({"steps": 1800} | changes))
    given, held_out = drawn_pairs(task, seed, PAIRS), drawn_pairs(task, seed + 1, HELD_OUT)
    known = with_reference(task.reference, [example_of(*pair) for pair in given], rows=512)
    model = start_of(task)
    loader = preference_loader(known, rows=128, seed=seed, collate=collate)
    stepped(model, PairObjective(how), loader, how)
    implied = enumerable.log_probs(model) - task.log_reference
    accurate = accuracy(implied, held_out) - accuracy(task.rewards.double(), held_out)
    return judged(task, model) | {"accuracy_over_true": accurate}


def by_reward_model(task: Task, seed: int, steps: int = 800) -> Figures:
    how = settings(RewardSettings, 4e-3, seed, steps=steps, loss="bradley-terry")
    given, held_out = drawn_pairs(task, seed, PAIRS), drawn_pairs(task, seed + 1, HELD_OUT)
    model = RewardModel(enumerable.CONFIG, RewardConfig())
    model.load_state_dict(task.reference.state_dict(), strict=False)
    initialise_heads(model, seed)
    loader = preference_loader(
        [example_of(*pair) for pair in given], rows=128, seed=seed, collate=reward_collate
    )
    stepped(model, RewardObjective(how), loader, how)
    scores = scored(model)
    accurate = accuracy(scores, held_out) - accuracy(task.rewards.double(), held_out)
    rhos = [spearman(a.tolist(), b.tolist()) for a, b in zip(scores, task.rewards, strict=True)]
    return {"accuracy_over_true": accurate, "spearman": sum(rhos) / len(rhos)}


@torch.no_grad()
def scored(model: RewardModel) -> Tensor:
    """The reward model's value of every answer, [prompts, answers]."""
    rows = []
    for i in range(len(PROMPTS)):
        batch = reward_collate([example_of(i, answer) for answer in range(len(ANSWERS))])
        rows.append(model.value(batch.ids, batch.mask, batch.prompt_lengths))
    return torch.stack(rows).double()


def by_labelled_completions(task: Task, seed: int, steps: int = 1800) -> Figures:
    """KTO on the same pairs: the chosen completion is desirable, the rejected one undesirable."""
    how = settings(DpoSettings, 3e-3, seed, loss="kto", steps=steps)
    labelled = [
        example_of(prompt, answer, label=label)
        for prompt, *both in drawn_pairs(task, seed, PAIRS)
        for answer, label in zip(both, (1.0, 0.0), strict=True)
    ]
    context = enumerable.CONFIG.context
    known = with_reference(task.reference, kto.with_mismatched(labelled, context))
    model = start_of(task)
    loader = preference_loader(known, rows=128, seed=seed, collate=collate)
    stepped(model, kto.KtoObjective(how), loader, how)
    return judged(task, model)


def by_best_of(task: Task, seed: int, n: int = 4) -> Figures:
    """Best of n, against enumeration: its mean reward, and its distance from the reference."""
    generator = torch.Generator().manual_seed(seed)
    draws = 20_000
    p, rewards = task.log_reference[0].exp(), task.rewards[0].double()
    chosen = torch.multinomial(p, draws * n, replacement=True, generator=generator).view(draws, n)
    best = rewards[chosen].amax(dim=1)
    order = rewards.argsort()
    below = p[order].cumsum(0).clamp_max(1.0) ** n
    exact = below.diff(prepend=below.new_zeros(1))
    wanted = (exact * rewards[order]).sum().item()
    error = (best.mean().item() - wanted) / (best.std().item() / math.sqrt(draws))
    kl = torch.special.xlogy(exact, exact / p[order]).sum().item()
    bound = math.log(n) - (n - 1) / n
    return {"standard_errors": abs(error), "kl_under_bound": bound - kl}


ROWS: dict[str, Row] = {
    "ppo": Row(by_ppo, {"gain": 0.97, "-total_variation": -0.08}),
    "ppo, critic of its own": Row(partial(by_ppo, critic="separate", steps=1600), {"gain": 0.97}),
    "ppo, HL-Gauss critic": Row(
        partial(by_ppo, critic="separate", value_bins=51, steps=1600), {"gain": 0.97}
    ),
    "rloo": Row(partial(by_group, advantage="rloo"), {"gain": 0.97}),
    "dr-grpo": Row(partial(by_group, advantage="dr-grpo"), {"gain": 0.95}),
    "dr-grpo, k2": Row(partial(by_group, advantage="dr-grpo", kl="k2"), {"gain": 0.95}),
    "dr-grpo, k3": Row(partial(by_group, advantage="dr-grpo", kl="k3"), {"gain": 0.85}),
    "grpo, mean over tokens, k3": Row(
        partial(by_group, advantage="dapo", kl="k3", clip_high=0.2, max_resamples=0), {"gain": 0.85}
    ),
    "grpo, mean over each answer, k3": Row(partial(by_group, advantage="grpo", kl="k3"), {}),
    "dapo": Row(partial(by_group, advantage="dapo"), {"gain": 0.95}),
    "dpo": Row(partial(by_pairs, loss="dpo"), {"gain": 0.80, "accuracy_over_true": -0.02}),
    "cdpo": Row(partial(by_pairs, loss="cdpo"), {}),
    "ipo": Row(partial(by_pairs, loss="ipo"), {}),
    "simpo": Row(partial(by_pairs, loss="simpo"), {}),
    "orpo": Row(partial(by_pairs, loss="orpo"), {}),
    "kto": Row(by_labelled_completions, {}),
    "reward model": Row(by_reward_model, {"accuracy_over_true": -0.06, "spearman": 0.82}),
    STEPLESS: Row(by_best_of, {"-standard_errors": -3.0, "kl_under_bound": 0.0}),
}


def one(name: str, seed: int, changes: dict[str, int]) -> dict[str, Any]:
    """One run, in a process of one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task, began = enumerable.make(seed), time.perf_counter()
    figures = ROWS[name].run(task, seed, **changes)
    rounded = {figure: round(value, 4) for figure, value in figures.items()}
    return {"algorithm": name, "seed": seed, **rounded} | {
        "seconds": round(time.perf_counter() - began, 1)
    }


def missed(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """The floors that the worst seed does not reach."""
    told = []
    for figure, floor in ROWS[name].floors.items():
        sign = -1 if figure.startswith("-") else 1
        column = figure.removeprefix("-")
        worst = min(sign * run[column] for run in runs)
        if not worst >= floor:
            told.append(f"{name}: {column} {sign * worst:.4f}, must be {sign * floor:g}")
    return told


def table(results: list[dict[str, Any]]) -> str:
    """Worst to best over the seeds, in Markdown."""
    figures = ["gain", "total_variation", "accuracy_over_true", "spearman", "seconds"]
    lines = [f"| algorithm | {' | '.join(f.replace('_', ' ') for f in figures)} |"]
    lines.append("|---|" + "---|" * len(figures))
    for name in dict.fromkeys(run["algorithm"] for run in results):
        cells = []
        for figure in figures:
            values = [r[figure] for r in results if r["algorithm"] == name and figure in r]
            digits = 0 if figure == "seconds" else 3
            span = f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else ""
            cells.append(span)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="algorithms, with semicolons; all of them if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="instead of each algorithm's own")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    names = asked.only.split(";") if asked.only else list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"--only {unknown[0]}: must be of {'; '.join(ROWS)}", file=sys.stderr)
        return 2
    if asked.steps is not None and STEPLESS in names:
        print(f"--steps {asked.steps}: {STEPLESS} has none; name others by --only", file=sys.stderr)
        return 2
    changes = {} if asked.steps is None else {"steps": asked.steps}
    results = []
    with ProcessPoolExecutor(asked.processes) as pool, Progress() as progress:
        jobs = [
            pool.submit(one, name, seed, changes) for name in names for seed in range(asked.seeds)
        ]
        bar = progress.add_task("proving", total=len(jobs))
        for job in as_completed(jobs):
            results.append(job.result())
            progress.console.print(json.dumps(results[-1]), markup=False, highlight=False)
            progress.advance(bar)
    results.sort(key=lambda run: (names.index(run["algorithm"]), run["seed"]))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    floors = [
        told
        for name in names
        for told in missed(name, [run for run in results if run["algorithm"] == name])
    ]
    for told in floors:
        print(f"below its floor: {told}", file=sys.stderr)
    return 1 if floors else 0


if __name__ == "__main__":
    sys.exit(main())
