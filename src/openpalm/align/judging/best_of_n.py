"""Best-of-n sampling: sample n completions, keep the one with the highest reward.

Stiennon et al. 2020; Nakano et al. 2021, "WebGPT", section 3.2. No weight changes, so nothing can
diverge, and the best completions are demonstrations for supervised fine-tuning (rejection sampling;
Touvron et al. 2023, "Llama 2", section 3.2.3). The KL divergence from the policy is bounded before
anything is sampled:

    KL(best of n || policy) <= log n - (n - 1) / n        Stiennon et al. 2020, appendix G.3

It is always an upper bound, and an equality where rewards differ and each completion is improbable
(Beirami et al. 2024, "Theoretical guarantees on the alignment of best-of-n policies"). The same
samples also estimate the reward of a smaller n: with N rewards r_1 <= ... <= r_N,

    sum_i  C(i - 1, n - 1) / C(N, n)  r_i

is the mean of the maximum over all subsets of n of them, an unbiased estimate of the expected
best of n (Nakano et al. 2021, appendix I). Averaging over all subsets has less variance than
splitting the samples into groups of n.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.align.rollouts.sampler import sample_completions
from openpalm.generate.engine import Engine


class SamplingPlan(NamedTuple):
    """How completions are sampled; equal plans and models give equal completions."""

    per_prompt: int
    """completions per prompt"""
    max_new_tokens: int
    temperature: float
    seed: int

    def sample(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        chosen: Sequence[int],
        stop_ids: frozenset[int],
    ) -> list[Completion]:
        """`per_prompt` completions of every prompt of `chosen`.

        Seeds depend on the number of prompt and completion only, so the completions are the same
        with any other prompts in `chosen`.
        """
        draws = [(p, p * self.per_prompt + i) for p in chosen for i in range(self.per_prompt)]
        return sample_completions(engine, prompts, draws, stop_ids, self)


def best_and_worst(rewards: Sequence[float]) -> tuple[int, int]:
    """Places of the highest and the lowest reward; among equals the first."""
    places = range(len(rewards))
    return max(places, key=rewards.__getitem__), min(places, key=rewards.__getitem__)


def expected_maximum(rewards: Sequence[float], n: int) -> float:
    """Unbiased estimate of the expected best of n, from at least n independent samples."""
    assert 1 <= n <= len(rewards), "needs at least n samples"
    subsets = math.comb(len(rewards), n)
    return math.fsum(
        math.comb(i, n - 1) / subsets * reward for i, reward in enumerate(sorted(rewards))
    )


def kl_bound(n: int) -> float:
    """Upper bound of KL(best of n || policy), in nats."""
    return math.log(n) - (n - 1) / n


def summary(rows: Sequence[dict[str, Any]], n: int) -> dict[str, Any]:
    """Means over prompts; each row has the `rewards` of its n completions."""

    def mean(k: int) -> float:
        return math.fsum(expected_maximum(row["rewards"], k) for row in rows) / len(rows)

    counts = sorted({*(1 << power for power in range(n.bit_length())), n})
    return {
        "prompts": len(rows),
        "n": n,
        "reward": mean(1),
        "reward_best": mean(n),
        "reward_by_n": {str(k): mean(k) for k in counts},
        "kl_bound": kl_bound(n),
    }


def best_worst_pairs(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The best as chosen, the worst as rejected; rows without a difference give no pair.

    The margin is the difference of the rewards.
    """
    for row in rows:
        best, worst = row["completion"], row["worst"]
        margin = max(row["rewards"]) - min(row["rewards"])
        if margin > 0 and best.strip() and worst.strip() and best.strip() != worst.strip():
            yield {"prompt": row["prompt"], "chosen": best, "rejected": worst, "margin": margin}
