"""Rollouts: the sampler is the scorer, the reference stays, and a run resumes where it was."""

import copy
import hashlib
import math
from collections import Counter
from functools import partial

import pytest
import torch
from enumerable import END, INDEX, PROMPTS
from rollouts import KINDS, actor, every_completion, grpo, loader_of, moved, ppo, trainer_of
from tiny_models import deaf

from openpalm.align.logprobs import evaluate, token_log_probs
from openpalm.align.rollouts import grpo as group_file
from openpalm.align.rollouts import ppo as ppo_file
from openpalm.align.rollouts.rollout import checked_rewards
from openpalm.align.rollouts.rollout_batch import Completion
from openpalm.errors import WorkError
from openpalm.model import lora
from openpalm.model.config import LoraConfig


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


# --- 7: dropout


def check_scored_alike_twice(model):
    model.train()
    found = [evaluate(model, *every_completion()).log_probs for _ in range(2)]
    assert torch.equal(*found)


def check_ratio_is_one(model):
    """On the first minibatch of a rollout, before any step."""
    settings = ppo(minibatches=2)
    loader = loader_of(model.train(), settings, ppo_file.estimate)
    batch = next(loader)
    model.train()
    now = evaluate(model, batch.inputs, batch.targets)
    assert (now.log_probs - batch.old_log_probs).exp().sub(1).abs().max() < 1e-6
    _, sums = ppo_file.PpoObjective(settings).loss(model.train(), batch)
    assert sums["ratio"] / batch.mask.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("check", [check_scored_alike_twice, check_ratio_is_one])
def test_dropout_is_off_where_probabilities_are_compared(check):
    check(actor(dropout=0.5))
    fails(check, deaf(actor(dropout=0.5)))


# --- 8: the reference


def digest(model):
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()


def check_reference_stays(make_reference):
    """Its weights, and its log-probabilities, are the same before and after steps of the policy."""
    policy = moved()
    reference = make_reference(policy)
    before, scored = digest(reference), token_log_probs(reference, *every_completion())
    settings = grpo()
    loader = loader_of(policy, settings, group_file.estimate, rows=16)
    loader.reference = partial(token_log_probs, reference)
    trainer = trainer_of(loader, group_file.GroupObjective(settings), 0.01)
    kls = [trainer.train_step().metrics["kl"] for _ in range(3)]
    assert digest(reference) == before
    assert torch.equal(token_log_probs(reference, *every_completion()), scored)
    assert kls[0] == pytest.approx(0, abs=1e-4)
    assert abs(kls[-1]) > 1e-3


def test_the_reference_stays_where_it_was():
    check_reference_stays(lambda policy: copy.deepcopy(policy).requires_grad_(False))
    fails(check_reference_stays, lambda policy: policy)


def check_detached_is_the_base(attach):
    """After steps with an adapter, the policy without it is the reference, bit for bit."""
    policy = moved()
    base = copy.deepcopy(policy)
    attach(policy)
    settings = grpo()
    trainer = trainer_of(
        loader_of(policy, settings, group_file.estimate), group_file.GroupObjective(settings), 0.1
    )
    for _ in range(3):
        trainer.train_step()
    with torch.no_grad(), lora.detached(policy):
        assert torch.equal(
            token_log_probs(policy, *every_completion()), token_log_probs(base, *every_completion())
        )
    with torch.no_grad():
        assert not torch.equal(
            token_log_probs(policy, *every_completion()), token_log_probs(base, *every_completion())
        )


def test_under_an_adapter_the_reference_is_the_policy_without_it():
    def attach(policy):
        lora.attach(policy, LoraConfig(4, 8.0, ("q", "v", "out")), seed=0)

    def nothing_frozen(policy):
        attach(policy)
        policy.requires_grad_(True)

    check_detached_is_the_base(attach)
    fails(check_detached_is_the_base, nothing_frozen)


# --- 9: the reward of short, long and cut completions, in the loader's own columns


def seven(completions):
    return [7.0] * len(completions)


def check_where_the_reward_lands(estimate):
    """Advantages of a decay of zero and a critic of zeros are each token's own reward."""
    settings = ppo(
        num_completions=64, gae_lambda=0.0, discount=0.0, kl_coef=0.0, whiten_advantages=False
    )
    loader = loader_of(moved(), settings, estimate, seven, rows=256)
    batch = next(loader)
    kinds = set()
    for gains, counts, targets in zip(batch.advantages, batch.mask, batch.targets, strict=True):
        last = int(counts.nonzero().max())
        assert gains.nonzero().flatten().tolist() == [last]
        assert gains[last] == 7
        kinds.add((int(counts.sum()), int(targets[last]) == END))
    assert {(1, True), (3, True), (4, False)} <= kinds, "three lengths, a cut one among them"


def test_the_reward_is_on_the_last_token():
    check_where_the_reward_lands(ppo_file.estimate)

    def one_too_early(settings, rollout, beta):
        found = ppo_file.estimate(settings, rollout, beta)
        return found._replace(advantages=found.advantages.roll(-1, dims=1))

    fails(check_where_the_reward_lands, one_too_early)


# --- 14: microbatches


def gradients_in_parts(kind, rows, objective_of=None, **changes):
    """Of one step over the same ragged completions, in microbatches of `rows`."""
    how, objective, estimate, make = KINDS[kind]
    settings = how(num_completions=6, **changes)
    model = make()
    loader = loader_of(model, settings, estimate, rows=rows)
    loader.kl_coef = 0.3
    batches = [next(loader) for _ in range(24 // rows)]
    trainer = trainer_of(loader, (objective_of or objective)(settings))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # away from ratios of one
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    loss, count, metrics = trainer.forward_backward(batches)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return found, loss, count, metrics


def check_microbatches(kind, objective_of, changes):
    whole, *metrics = gradients_in_parts(kind, 24, objective_of, **changes)
    for rows in (12, 3, 1):
        parts, *of_parts = gradients_in_parts(kind, rows, objective_of, **changes)
        assert torch.allclose(parts, whole, atol=1e-6)
        assert of_parts[0] == pytest.approx(metrics[0], abs=1e-6)
        assert of_parts[1] == metrics[1]
    assert whole.abs().max() > 1e-3


class MeanOfMeans:
    """Counts microbatches, as a loop that divides each one's loss by its own tokens."""

    def __init__(self, objective, settings):
        self.own = objective(settings)

    def count(self, batch):
        return 1

    def loss(self, model, batch):
        loss, metrics = self.own.loss(model, batch)
        return loss / batch.mask.sum(), metrics


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *[("grpo", {"advantage": a}) for a in ("grpo", "dr-grpo", "dapo", "rloo")],
        ("grpo", {"kl": "k2"}),
        ("grpo", {"kl": "k3", "entropy_coef": 0.1}),
        ("ppo", {}),
        ("ppo", {"entropy_coef": 0.1}),
    ],
    ids=str,
)
def test_microbatches_of_ragged_completions_are_one_batch(kind, changes):
    check_microbatches(kind, None, changes)
    fails(check_microbatches, kind, partial(MeanOfMeans, KINDS[kind][1]), changes)


# --- order of rows


def rows_of(batches):
    """Each row of the batches as its tokens and its advantage."""
    return Counter(
        (tuple(i[: int(m.nonzero().max()) + 1].tolist()), int(m.sum()), a.sum().item())
        for batch in batches
        for i, m, a in zip(batch.inputs, batch.mask, batch.advantages, strict=True)
    )


def test_every_row_comes_once_per_epoch():
    settings = grpo(epochs_per_rollout=3, minibatches=4)
    loader = loader_of(moved(), settings, group_file.estimate, rows=2)
    passes = [[next(loader) for _ in range(8)] for _ in range(3)]
    counts = [rows_of(batches) for batches in passes]
    assert counts[0].total() == 16
    assert counts[0] == counts[1] == counts[2]
    firsts = [rows_of(batches[:1]) for batches in passes]
    assert not firsts[0] == firsts[1] == firsts[2], "each pass has an order of its own"
    following = rows_of([next(loader) for _ in range(8)])
    assert following != counts[0], "then the next rollout"


def test_rows_keep_their_columns_when_they_are_cut():
    settings = ppo(num_completions=8)
    loader = loader_of(actor(), settings, ppo_file.estimate, rows=4)
    for _ in range(4):
        batch = next(loader)
        assert batch.mask[:, -1].any(), "no wider than the longest"
        for column in ("old_log_probs", "reference_log_probs", "values", "advantages", "returns"):
            found = getattr(batch, column)
            assert found.shape == batch.inputs.shape
            assert not found[~batch.mask].any()
        assert torch.equal(batch.importance_weights, torch.ones_like(batch.old_log_probs))
        with torch.no_grad():
            now = evaluate(loader.sampler.model, batch.inputs, batch.targets)
        assert torch.allclose(now.log_probs, batch.old_log_probs, atol=1e-6)
        assert torch.allclose(now.values, batch.values[batch.mask], atol=1e-5)


def test_metrics_are_of_the_rollout():
    settings = grpo(num_completions=8, kl_coef=0.1)
    loader = loader_of(moved(), settings, group_file.estimate, lambda a: [2.0] * len(a), rows=32)
    batch = next(loader)
    metrics = loader.facts
    assert (metrics["reward"], metrics["reward_std"], metrics["zero_variance_groups"]) == (2, 0, 1)
    assert metrics["kl"] == pytest.approx(
        (batch.old_log_probs - batch.reference_log_probs).sum().item() / 32, abs=1e-5
    )
    assert metrics["length"] == pytest.approx(batch.mask.sum().item() / 32)
    ended = ((batch.targets == END) & batch.mask).sum().item()
    assert metrics["ended"] == pytest.approx(ended / 32)
    assert metrics["kl_coef"] == 0.1


# --- dapo: dynamic sampling


class Judge:
    """The same reward for every completion to some prompts, and a count of its calls."""

    def __init__(self, equal):
        self.equal, self.calls = equal, []

    def __call__(self, completions):
        self.calls.append([a.prompt for a in completions])
        return [0.5 if a.prompt in self.equal else float(INDEX[tuple(a.ids)]) for a in completions]


def test_prompts_with_equal_rewards_are_replaced():
    settings = grpo(prompts_per_rollout=2, num_completions=16, advantage="dapo", max_resamples=9)
    judge = Judge(equal={0, 1, 2})
    loader = loader_of(moved(), settings, group_file.estimate, judge, rows=32)
    batch = next(loader)
    assert loader.facts["zero_variance_groups"] == 0
    assert batch.advantages.abs().sum(dim=1).min() > 0
    assert all(row[:2].tolist() == PROMPTS[3] for row in batch.inputs)
    assert all(len(set(call)) == len(call) // 16 for call in judge.calls)


def test_resampling_has_a_limit():
    for advantage, redraws, rounds in (("dapo", None, 3), ("dapo", 2, 2), ("dr-grpo", None, 0)):
        judge = Judge(equal={0, 1, 2, 3})
        settings = grpo(advantage=advantage, max_resamples=redraws)
        loader = loader_of(moved(), settings, group_file.estimate, judge)
        next(loader)
        assert len(judge.calls) == 1 + rounds
        assert loader.facts["zero_variance_groups"] == 1


# --- the adaptive KL coefficient


def test_the_coefficient_holds_a_run_near_its_target():
    found = {}
    for target in (0.02, 50.0):
        settings = ppo(
            prompts_per_rollout=4, num_completions=8, target_kl=target, kl_horizon=64, kl_coef=0.2
        )
        loader = loader_of(actor(), settings, ppo_file.estimate, rows=32)
        trainer = trainer_of(loader, ppo_file.PpoObjective(settings))
        for _ in range(10):
            trainer.train_step()
        found[target] = loader.kl_coef
    assert found[0.02] > 0.2 > found[50.0]


# --- importance weights


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_less_precise_engine_is_corrected_for(weights):
    settings = grpo(num_completions=32, rollout_dtype=weights, max_importance_weight=1.005)
    batch = next(loader_of(moved(), settings, group_file.estimate, rows=128))
    inside = batch.importance_weights[batch.mask]
    assert inside.max() == pytest.approx(1.005)
    assert inside.min() < 0.999


def test_a_less_precise_trainer_is_corrected_for():
    """The engine samples in float32; the trainer's log-probabilities are rounded."""
    for temperature, corrected in ((1.0, True), (0.7, False)):
        settings = grpo(num_completions=8, temperature=temperature)
        loader = loader_of(moved(), settings, group_file.estimate, rows=32, dtype=torch.bfloat16)
        batch = next(loader)
        away = (batch.importance_weights[batch.mask] - 1).abs()
        assert (away.max() > 1e-3) == corrected
        assert away.max() < 0.5


# --- a reward that fails


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_must_be_finite(value):
    completions = [Completion(3, [1], [END], [0.0], True)] * 2
    assert checked_rewards(lambda _: [1, 2.5], completions) == [1.0, 2.5]
    with pytest.raises(WorkError, match=f"completion of prompt 3 is {value}; it must be a finite"):
        checked_rewards(lambda _: [1.0, value], completions)
    with pytest.raises(WorkError, match="returned 1 number for 2 completions"):
        checked_rewards(lambda _: [1.0], completions)
