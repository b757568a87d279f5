"""A task small enough to be solved exactly, on which every algorithm must show what it reaches.

Five tokens, the last of which ends an answer, at most four tokens an answer, four prompts: 341
answers to each prompt, so that every expectation is a sum over all of them. The reference is a
small policy trained a little on random answers. The reward of each answer to each prompt is drawn
once and standardised. Maximising

    J(pi) = E_pi[r] - beta KL(pi || ref)      (mean over prompts)

has a closed form, J* = beta log E_ref[exp(r / beta)], reached by pi* = ref exp(r / beta) / Z. An
algorithm is judged by gain = (J(pi) - J(ref)) / (J* - J(ref)): 0 is the reference, 1 the optimum,
and nothing is sampled to find out.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from openpalm.align.logprobs import token_log_probs
from openpalm.align.rollouts.rollout_batch import Completion, collate_completions
from openpalm.model.config import ModelConfig
from openpalm.model.transformer import Transformer, initialise

END, LONGEST, BETA = 4, 4, 0.3
PROMPTS = [[0, 1], [2, 3], [1, 3], [3, 0]]
CONFIG = ModelConfig(vocab_size=5, dim=32, depth=2, heads=4, head_dim=8, ff_dim=64, context=8)


def every_answer() -> list[list[int]]:
    """All 341: ended by END, or cut at LONGEST without it."""
    ended = [
        [*tokens, END]
        for length in range(LONGEST)
        for tokens in itertools.product(range(END), repeat=length)
    ]
    return ended + [list(tokens) for tokens in itertools.product(range(END), repeat=LONGEST)]


ANSWERS = every_answer()
INDEX = {tuple(answer): i for i, answer in enumerate(ANSWERS)}


@dataclass(frozen=True)
class Task:
    """One draw of the rewards and of the reference."""

    rewards: Tensor
    """[prompts, answers]"""
    reference: Transformer

    @cached_property
    def log_reference(self) -> Tensor:
        return log_probs(self.reference)

    @cached_property
    def optimum(self) -> Tensor:
        """log pi*, [prompts, answers]."""
        tilted = self.log_reference + self.rewards.double() / BETA
        return tilted.log_softmax(dim=-1)

    def objective(self, log_policy: Tensor) -> float:
        """J, from [prompts, answers]."""
        p = log_policy.exp()
        values = self.rewards.double() - BETA * (log_policy - self.log_reference)
        return (p * values).sum(dim=-1).mean().item()

    def gain(self, log_policy: Tensor) -> float:
        lowest = self.objective(self.log_reference)
        return (self.objective(log_policy) - lowest) / (self.objective(self.optimum) - lowest)

    def total_variation(self, log_policy: Tensor) -> float:
        """Between the policy and pi*, mean over prompts."""
        return ((log_policy.exp() - self.optimum.exp()).abs().sum(dim=-1) / 2).mean().item()

    def reward(self, answers: list[Completion]) -> list[float]:
        """What a run is given as its reward."""
        return [self.rewards[a.prompt, INDEX[tuple(a.ids)]].item() for a in answers]


@torch.no_grad()
def log_probs(model: Transformer) -> Tensor:
    """Of every answer to every prompt: float64 [prompts, answers]."""
    made = []
    for i, prompt in enumerate(PROMPTS):
        inputs, targets = collate_completions([Completion(i, prompt, a, [], True) for a in ANSWERS])
        made.append(token_log_probs(model, inputs, targets).double().sum(dim=-1))
    return torch.stack(made)


def make(seed: int) -> Task:
    """The task of a seed: rewards, and a reference fitted a little to 64 random answers."""
    generator = torch.Generator().manual_seed(seed)
    rewards = _rewards(generator)
    model = Transformer(CONFIG)
    initialise(model, seed)
    with torch.no_grad():
        model.embedding *= 3  # a vocabulary of five needs no small table; logits can move
    shown = torch.randint(len(ANSWERS), (64,), generator=generator).tolist()
    asked = torch.randint(len(PROMPTS), (64,), generator=generator).tolist()
    pairs = [
        Completion(p, PROMPTS[p], ANSWERS[a], [], True) for p, a in zip(asked, shown, strict=True)
    ]
    inputs, targets = collate_completions(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        (-token_log_probs(model, inputs, targets).sum() / len(pairs)).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    return Task(_standardised(rewards), model)


def _rewards(generator: torch.Generator) -> Tensor:
    """A score for each token at each place, for each prompt, and one for each two neighbours.

    Structure that a policy can generalise over; 341 unrelated numbers would only test patience.
    """
    places = torch.randn(len(PROMPTS), LONGEST, END + 1, generator=generator)
    neighbours = 0.25 * torch.randn(END + 1, END + 1, generator=generator)
    rewards = torch.zeros(len(PROMPTS), len(ANSWERS))
    for i, answer in enumerate(ANSWERS):
        for t, token in enumerate(answer):
            rewards[:, i] += places[:, t, token]
            if t:
                rewards[:, i] += neighbours[answer[t - 1], token]
    return rewards


def _standardised(rewards: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the answers to each prompt."""
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    return centred / centred.std(dim=-1, correction=0, keepdim=True)
