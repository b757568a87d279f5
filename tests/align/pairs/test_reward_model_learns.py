"""A reward model learns a known true reward on an enumerable task.

Five tokens, answers of at most four, four prompts; pairs drawn as Bradley and Terry say. The
figures are taken over all 341 answers of each prompt, not over a sample.
"""

import itertools

import pytest
import torch

from openpalm.align.config import RewardSettings
from openpalm.align.pairs.examples import PreferenceExample, preference_loader
from openpalm.align.pairs.reward_model import RewardObjective, collate
from openpalm.data.text.conversation import Example
from openpalm.evaluate.agreement import spearman
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import initialise
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.parameter_groups import Optimizer
from openpalm.train.trainer import Trainer

END, LONGEST, PROMPTS, PAIRS, ROWS = 4, 4, 4, 20_000, 100
ANSWERS = [
    [*tokens, END]
    for length in range(LONGEST)
    for tokens in itertools.product(range(END), repeat=length)
] + [list(tokens) for tokens in itertools.product(range(END), repeat=LONGEST)]
CONFIG = ModelConfig(
    vocab_size=5, dim=32, depth=2, heads=4, head_dim=8, ff_dim=64, context=LONGEST + 3
)


def true_rewards(generator):
    """[prompts, answers]: sums of a value of each token after the prompt and of each token pair."""
    worth = torch.randn(PROMPTS, 5, generator=generator)
    follows = torch.randn(5, 5, generator=generator)
    rewards = torch.tensor(
        [
            [sum(worth[p, answer]) + sum(follows[answer[:-1], answer[1:]]) for answer in ANSWERS]
            for p in range(PROMPTS)
        ]
    )
    return (rewards - rewards.mean(dim=1, keepdim=True)) / rewards.std(dim=1, keepdim=True)


def example(prompt, answer):
    return Example([prompt, END, 0, *answer], [False] * 3 + [True] * len(answer))


def judged(true, generator):
    prompts = torch.randint(PROMPTS, (PAIRS,), generator=generator)
    first, second = torch.randint(len(ANSWERS), (2, PAIRS), generator=generator)
    wins = (true[prompts, first] - true[prompts, second]).sigmoid()
    first_wins = torch.rand(PAIRS, generator=generator) < wins
    better, worse = first.where(first_wins, second), second.where(first_wins, first)
    return [
        PreferenceExample((example(p, ANSWERS[w]), example(p, ANSWERS[r])))
        for p, w, r in zip(prompts.tolist(), better.tolist(), worse.tolist(), strict=True)
    ]


def learnt(pairs, seed=0):
    """Rewards [prompts, answers] of a model trained for one epoch."""
    model = RewardModel(CONFIG, RewardConfig())
    initialise(model, seed)
    initialise_heads(model, seed)
    settings = RewardSettings(data="-", out="-", init="-", steps=1)  # type: ignore[arg-type]
    trainer = Trainer(
        model,
        RewardObjective(settings),
        Optimizer(model, OptimSettings(), 5e-3),
        preference_loader(pairs, rows=ROWS, seed=seed, collate=collate),
        steps=PAIRS // ROWS,
    )
    for _ in range(trainer.steps):
        trainer.train_step()
    model.eval()
    with torch.no_grad():
        batches = [
            collate([PreferenceExample((example(p, answer),)) for answer in ANSWERS])
            for p in range(PROMPTS)
        ]
        return torch.stack([model.value(b.ids, b.mask, b.prompt_lengths) for b in batches])


def expected_accuracy(rewards, true):
    """Expected share of pairs in which the larger reward is of the preferred answer."""
    wins = (true[:, :, None] - true[:, None, :]).sigmoid()
    named = (rewards[:, :, None] > rewards[:, None, :]).float()
    apart = ~torch.eye(len(ANSWERS), dtype=torch.bool)
    return (named * wins + named.transpose(1, 2) * (1 - wins))[:, apart].mean().item()


def check_learns(pairs, true):
    rewards = learnt(pairs)
    assert expected_accuracy(rewards, true) >= expected_accuracy(true, true) - 0.06
    for mine, theirs in zip(rewards.tolist(), true.tolist(), strict=True):
        assert spearman(mine, theirs) >= 0.82


def test_the_judge_is_learnt_from_pairs():
    generator = torch.Generator().manual_seed(0)
    true = true_rewards(generator)
    check_learns(judged(true, generator), true)


def test_the_check_sees_a_model_that_learnt_nothing():
    generator = torch.Generator().manual_seed(0)
    true = true_rewards(generator)
    shuffled = true[:, torch.randperm(len(ANSWERS), generator=generator)]
    with pytest.raises(AssertionError):
        check_learns(judged(shuffled, generator), true)
