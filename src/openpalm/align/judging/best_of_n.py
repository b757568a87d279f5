"""Best of n: draw n answers, keep the one that the reward likes most (Stiennon et al. 2020; Nakano
et al. 2021, "WebGPT", section 3.2).

No weight changes, so nothing can diverge, and the best answers are demonstrations for supervised
fine-tuning (rejection sampling; Touvron et al. 2023, "Llama 2", section 3.2.3). How far the best of
n can be from the policy that drew them is known beforehand:

    KL(best of n || policy) <= log n - (n - 1) / n        Stiennon et al. 2020, appendix G.3

an equality where no two answers have the same reward and each is improbable, an upper bound always
(Beirami et al. 2024, "Theoretical guarantees on the alignment of best-of-n policies"). What a
smaller n would have reached is told by the same draws: with r_1 <= ... <= r_N the mean of the
maximum over all their subsets of n,

    sum_i  C(i - 1, n - 1) / C(N, n)  r_i

is an unbiased estimate of the expected best of n (Nakano et al. 2021, appendix I).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from openpalm.align.rollouts.rollout import derive_seed, generate_completions
from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.generate.engine import Engine, Request
from openpalm.generate.sampling import Sampling


class SamplingPlan(NamedTuple):
    """How answers are drawn; the same draw of the same model gives the same answers."""

    each: int
    """answers to a prompt"""
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
        """`each` answers to every prompt of `chosen`, whichever others are drawn with them."""
        asked = [prompt for prompt in chosen for _ in range(self.each)]
        draws = [prompt * self.each + i for prompt in chosen for i in range(self.each)]
        requests = [
            Request(
                prompts[prompt],
                self.max_new_tokens,
                Sampling(self.temperature, seed=derive_seed(self.seed, draw)),
                stop_ids,
            )
            for prompt, draw in zip(asked, draws, strict=True)
        ]
        return generate_completions(engine, requests, asked)


def best_of(rewards: Sequence[float]) -> tuple[int, int]:
    """Which is the best and which the worst; of equal ones the first."""
    places = range(len(rewards))
    return max(places, key=rewards.__getitem__), min(places, key=rewards.__getitem__)


def expected_maximum(rewards: Sequence[float], n: int) -> float:
    """Unbiased estimate, from at least n independent draws, of the expected best of n."""
    assert 1 <= n <= len(rewards), "needs as many draws as it is the best of"
    subsets = math.comb(len(rewards), n)
    return math.fsum(
        math.comb(i, n - 1) / subsets * reward for i, reward in enumerate(sorted(rewards))
    )


def kl_bound(n: int) -> float:
    """Nats that the best of n answers is away from the policy, at most."""
    return math.log(n) - (n - 1) / n


def summary(rows: Sequence[dict[str, Any]], n: int) -> dict[str, Any]:
    """Figures over prompts; each row has the `rewards` of its n answers."""

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


def pairs(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Best against worst, where there is a difference; the margin is that of their rewards."""
    for row in rows:
        best, worst = row["completion"], row["worst"]
        margin = max(row["rewards"]) - min(row["rewards"])
        if margin > 0 and best.strip() and worst.strip() and best.strip() != worst.strip():
            yield {"prompt": row["prompt"], "chosen": best, "rejected": worst, "margin": margin}
