"""Which pairs to judge next: the most informative ones, and a random share that stays unbiased.

Active choice saves judgements but spoils statistics: accuracy measured on pairs chosen for
their uncertainty says nothing about other pairs. So part of each batch is random. It must also be
random in every later batch: a random draw from what active choice has left over is not. Prompts
are therefore divided once, by a hash, into a reserve that active choice never touches and the
rest. The random arm is drawn from the reserve, uniformly.

Sources: Houlsby et al. 2011 (arXiv 1112.5745) for BALD; Rafailov et al. 2023 (arXiv 2305.18290)
for the implicit reward; Muldrew et al. 2024 (arXiv 2402.08114) and Lin et al. 2025 (ActiveDPO,
arXiv 2505.19241) for choosing preference pairs.
"""

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

RANDOM_SHARE = 0.3
Arm = Literal["random", "active"]


def bald(margins: np.ndarray) -> np.ndarray:
    """Information that a judgement gives about which member of the ensemble is right, (n,) nats.

    margins (members, n): reward_a - reward_b of each member. H(mean p) - mean H(p), Houlsby et al.
    2011, eq. 2, with p = sigmoid(margin): large where sure members disagree, 0 where all say 1/2.
    """
    p = _sigmoid(margins)
    return _entropy(p.mean(axis=0)) - _entropy(p).mean(axis=0)


def policy_uncertainty(margins: np.ndarray) -> np.ndarray:
    """4 p (1 - p) with p = sigmoid(margin), (n,): 1 where the policy prefers neither side.

    margins (n,): beta (log pi(a) / pi_ref(a) - log pi(b) / pi_ref(b)), the difference of implicit
    rewards of the policy (Rafailov et al. 2023, section 4). DPO's gradient is large where the
    margin is small or wrong.
    """
    p = _sigmoid(margins)
    return 4 * p * (1 - p)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.asarray(x, dtype=float) / 2))


def _entropy(p: np.ndarray) -> np.ndarray:
    q = p.clip(1e-15, 1 - 1e-15)
    return -q * np.log(q) - (1 - q) * np.log1p(-q)


def selection_scores(
    ensemble_margins: np.ndarray | None = None,
    policy_margins: np.ndarray | None = None,
    *,
    policy_weight: float = 0.5,
) -> np.ndarray:
    """Scores between 0 and 1 for `choose_batch`, (n,): mean rank of both uncertainties.

    ensemble_margins (members, n) of two or more reward models, ranked by BALD; policy_margins
    (n,), ranked by `policy_uncertainty`. Ranks have no unit, so neither measure drowns the other;
    either may be missing. Equal values have equal ranks.
    """
    ranks, weights = [], []
    if ensemble_margins is not None:
        if len(ensemble_margins) < 2:
            raise ValueError("one reward model cannot disagree with itself; give two or more")
        ranks.append(_ranks(bald(ensemble_margins)))
        weights.append(1 - policy_weight)
    if policy_margins is not None:
        ranks.append(_ranks(policy_uncertainty(policy_margins)))
        weights.append(policy_weight)
    if not ranks:
        raise ValueError("give margins of the reward ensemble, of the policy, or both")
    return np.average(ranks, axis=0, weights=weights if len(ranks) > 1 else None)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Share of values that are below, equal ones half, (n,)."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - counts / 2) / max(1, len(values)))[place]


class Choice(NamedTuple):
    pair: int
    """index in the pool"""
    arm: Arm
    score: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Choices in random order, so that the order tells nobody the arm."""

    choices: tuple[Choice, ...]
    missing_random: int
    """pairs that the random arm lacks because the reserve is used up"""


def in_reserve(prompt: Hashable, share: float = RANDOM_SHARE, project_seed: int = 0) -> bool:
    """Whether the prompt is of the reserve; the same answer always, for `share` of all prompts."""
    digest = hashlib.sha256(f"{project_seed}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def choose_batch(
    prompts: Sequence[Hashable],
    scores: Sequence[float] | np.ndarray,
    size: int,
    *,
    random_share: float = RANDOM_SHARE,
    seed: int,
    project_seed: int = 0,
) -> Batch:
    """Chooses `size` pairs of the pool, ceil(random_share size) of them by chance.

    prompts (n,) and scores (n,), at least 0, are of the unjudged pairs. The random arm is drawn
    uniformly without replacement from the pairs of reserved prompts, without a look at the
    scores. The active arm is greedy among the others: the largest score / (1 + pairs already
    chosen of its prompt), so that one prompt does not fill the batch; equal values in random
    order. An arm that runs out leaves its places to the other. `seed` must differ between
    batches; `project_seed` must not.
    """
    values = np.asarray(scores, dtype=float)
    if len(values) != len(prompts) or not (values >= 0).all():
        raise ValueError("give a score of at least 0 for each pair")
    generator = np.random.default_rng(seed)
    reserved = {p: in_reserve(p, random_share, project_seed) for p in set(prompts)}
    pools: dict[bool, list[int]] = {True: [], False: []}
    for i, prompt in enumerate(prompts):
        pools[reserved[prompt]].append(i)
    size = min(size, len(values))
    # Rounded first, because a product of floats can be just above the whole number.
    wanted = math.ceil(round(random_share * size, 9))
    active_size = min(size - min(wanted, len(pools[True])), len(pools[False]))
    by_chance = generator.permutation(pools[True])[: size - active_size].tolist()
    active = _greedy(pools[False], prompts, values, active_size, generator)
    chosen = [Choice(i, "random", float(values[i])) for i in by_chance]
    chosen += [Choice(i, "active", float(values[i])) for i in active]
    order = generator.permutation(len(chosen))
    return Batch(tuple(chosen[i] for i in order), max(0, wanted - len(by_chance)))


def _greedy(
    pool: Sequence[int],
    prompts: Sequence[Hashable],
    values: np.ndarray,
    size: int,
    generator: np.random.Generator,
) -> list[int]:
    """Largest score / (1 + number chosen of the prompt) first; a lazy heap keeps it exact."""
    ties = generator.permutation(len(pool)).tolist()
    heap = [(-values[i], tie, i, 0) for i, tie in zip(pool, ties, strict=True)]
    heapq.heapify(heap)
    taken: Counter[Hashable] = Counter()
    chosen: list[int] = []
    while heap and len(chosen) < size:
        _, tie, i, seen = heapq.heappop(heap)
        now = taken[prompts[i]]
        if seen < now:
            # Its prompt gained pairs since: it goes back with its present value.
            heapq.heappush(heap, (-values[i] / (1 + now), tie, i, now))
            continue
        taken[prompts[i]] += 1
        chosen.append(i)
    return chosen
