"""Rollouts: the sampler is the scorer, the reference stays, and a run goes on where it was."""

import copy
import hashlib
import math
from collections import Counter
from functools import partial

import pytest
import torch
from enumerable import ANSWERS, END, INDEX, PROMPTS
from rollouts import KINDS, actor, every_answer, grpo, loader_of, moved, ppo, trainer_of
from tiny_models import deaf

from openpalm.align.logprobs import evaluate, token_log_probs
from openpalm.align.rollouts import grpo as group_file
from openpalm.align.rollouts import ppo as ppo_file
from openpalm.align.rollouts.rollout import Sampler, checked_rewards
from openpalm.align.rollouts.rollout_batch import Completion, collate_completions
from openpalm.errors import WorkError
from openpalm.model import lora
from openpalm.model.config import LoraConfig


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


# --- 7: dropout


def check_scored_alike_twice(model):
    model.train()
    found = [evaluate(model, *every_answer()).log_probs for _ in range(2)]
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
    """Its weights, and what it thinks, are the same before and after steps of the policy."""
    policy = moved()
    reference = make_reference(policy)
    before, thought = digest(reference), token_log_probs(reference, *every_answer())
    settings = grpo()
    loader = loader_of(policy, settings, group_file.estimate, rows=16)
    loader.reference = partial(token_log_probs, reference)
    trainer = trainer_of(loader, group_file.GroupObjective(settings), 0.01)
    told = [trainer.train_step().metrics["kl"] for _ in range(3)]
    assert digest(reference) == before
    assert torch.equal(token_log_probs(reference, *every_answer()), thought)
    assert told[0] == pytest.approx(0, abs=1e-4)
    assert abs(told[-1]) > 1e-3


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
            token_log_probs(policy, *every_answer()), token_log_probs(base, *every_answer())
        )
    with torch.no_grad():
        assert not torch.equal(
            token_log_probs(policy, *every_answer()), token_log_probs(base, *every_answer())
        )


def test_under_an_adapter_the_reference_is_the_policy_without_it():
    def attach(policy):
        lora.attach(policy, LoraConfig(4, 8.0, ("q", "v", "out")), seed=0)

    def nothing_frozen(policy):
        attach(policy)
        policy.requires_grad_(True)

    check_detached_is_the_base(attach)
    fails(check_detached_is_the_base, nothing_frozen)


# --- 9: the reward of short, long and cut answers, in the loader's own columns


def seven(answers):
    return [7.0] * len(answers)


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


# --- 13: the sampler is the scorer


def drawn(temperature, draws):
    """How often each of the 341 answers to the first prompt came."""
    settings = grpo(temperature=temperature)
    sampler = Sampler(moved(), PROMPTS, frozenset({END}), settings)
    sampler.refresh()
    counts = Counter(tuple(a.ids) for a in sampler.sample([0], draws))
    return torch.tensor([float(counts[tuple(a)]) for a in ANSWERS])


def check_frequencies(counts, log_probs):
    """Pearson's chi-squared, cells below five expected together; five deviations at most."""
    draws = counts.sum().item()
    expected = log_probs.double().sum(dim=-1).exp() * draws
    assert expected.sum().item() == pytest.approx(draws, rel=1e-4)
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(seen) - 1
    statistic = ((seen - wanted).square() / wanted).sum().item()
    assert freedom > 50
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(("temperature", "draws"), [(1.0, 20_000), (0.7, 50_000)])
@torch.no_grad()
def test_answers_are_drawn_as_they_are_scored(temperature, draws):
    counts, model = drawn(temperature, draws), moved()
    scored = partial(evaluate, model, *every_answer())
    check_frequencies(counts, scored(temperature=temperature).log_probs)
    other = 0.75 if temperature != 1 else 0.95
    fails(check_frequencies, counts, scored(temperature=other).log_probs)
    fails(check_frequencies, counts, evaluate(moved(seed=1), *every_answer()).log_probs)
    if temperature != 1:  # the whole answer's probability tempered, not each token's
        whole = scored(temperature=1.0).log_probs.double().sum(dim=-1) / temperature
        fails(check_frequencies, counts, whole.log_softmax(dim=-1)[:, None])


def test_the_samplers_own_log_probabilities_are_the_scorers():
    model, settings = moved(), grpo(num_completions=8)
    sampler = Sampler(model, PROMPTS, frozenset({END}), settings)
    sampler.refresh()
    answers = sampler.sample([0, 1, 2, 3], 8)
    inputs, targets = collate_completions(answers)
    with torch.no_grad():
        scored = evaluate(model, inputs, targets).log_probs[targets >= 0]
    told = torch.tensor([value for a in answers for value in a.log_probs])
    assert torch.allclose(scored, told, atol=1e-5)
    assert all(a.ended == (a.ids[-1] == END) for a in answers)
    assert {a.ended for a in answers} == {True, False}


# --- 14: microbatches


def gradients_in_parts(kind, rows, objective_of=None, **changes):
    """Of one step over the same ragged answers, in microbatches of `rows`."""
    how, objective, estimate, make = KINDS[kind]
    settings = how(num_completions=6, **changes)
    model = make()
    loader = loader_of(model, settings, estimate, rows=rows)
    loader.beta = 0.3
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
    whole, *told = gradients_in_parts(kind, 24, objective_of, **changes)
    for rows in (12, 3, 1):
        parts, *told_of_parts = gradients_in_parts(kind, rows, objective_of, **changes)
        assert torch.allclose(parts, whole, atol=1e-6)
        assert told_of_parts[0] == pytest.approx(told[0], abs=1e-6)
        assert told_of_parts[1] == told[1]
    assert whole.abs().max() > 1e-3


class MeanOfMeans:
    """Counts microbatches, as whoever divides each one's loss by its own tokens does."""

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
def test_microbatches_of_ragged_answers_are_one_batch(kind, changes):
    check_microbatches(kind, None, changes)
    fails(check_microbatches, kind, partial(MeanOfMeans, KINDS[kind][1]), changes)


# --- what is gone through


def rows_of(batches):
    """Each row of the batches as its tokens and its advantage."""
    return Counter(
        (tuple(i[: int(m.nonzero().max()) + 1].tolist()), int(m.sum()), a.sum().item())
        for batch in batches
        for i, m, a in zip(batch.inputs, batch.mask, batch.advantages, strict=True)
    )


def test_every_answer_is_gone_through_once_a_pass():
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


def test_what_it_tells_is_of_the_rollout():
    settings = grpo(num_completions=8, kl_coef=0.1)
    loader = loader_of(moved(), settings, group_file.estimate, lambda a: [2.0] * len(a), rows=32)
    batch = next(loader)
    told = loader.facts
    assert (told["reward"], told["reward_std"], told["zero_variance_groups"]) == (2, 0, 1)
    assert told["kl"] == pytest.approx(
        (batch.old_log_probs - batch.reference_log_probs).sum().item() / 32, abs=1e-5
    )
    assert told["length"] == pytest.approx(batch.mask.sum().item() / 32)
    ended = ((batch.targets == END) & batch.mask).sum().item()
    assert told["ended"] == pytest.approx(ended / 32)
    assert told["kl_coef"] == 0.1


# --- dapo: prompts with equal rewards are drawn anew


class Judge:
    """Pays the same for every answer to some prompts, and counts how often it is asked."""

    def __init__(self, equal):
        self.equal, self.calls = equal, []

    def __call__(self, answers):
        self.calls.append([a.prompt for a in answers])
        return [0.5 if a.prompt in self.equal else float(INDEX[tuple(a.ids)]) for a in answers]


def test_equal_groups_are_drawn_anew_from_other_prompts():
    settings = grpo(prompts_per_rollout=2, num_completions=16, advantage="dapo", max_resamples=9)
    judge = Judge(equal={0, 1, 2})
    loader = loader_of(moved(), settings, group_file.estimate, judge, rows=32)
    batch = next(loader)
    assert loader.facts["zero_variance_groups"] == 0
    assert batch.advantages.abs().sum(dim=1).min() > 0
    assert all(row[:2].tolist() == PROMPTS[3] for row in batch.inputs)
    assert all(len(set(call)) == len(call) // 16 for call in judge.calls)


def test_they_are_not_drawn_anew_for_ever():
    for advantage, redraws, rounds in (("dapo", None, 3), ("dapo", 2, 2), ("dr-grpo", None, 0)):
        judge = Judge(equal={0, 1, 2, 3})
        settings = grpo(advantage=advantage, max_resamples=redraws)
        loader = loader_of(moved(), settings, group_file.estimate, judge)
        next(loader)
        assert len(judge.calls) == 1 + 4 * rounds
        assert loader.facts["zero_variance_groups"] == 1


# --- beta


def steered(kl, **changes):
    loader = loader_of(moved(), ppo(**{"target_kl": 2.0} | changes), ppo_file.estimate)
    loader._steer(kl, answers=100)
    return loader.beta / loader.settings.kl_coef


def check_beta(steer):
    """Ziegler et al. 2019, section 2.2, its K_beta written as one over the horizon."""
    assert steer(2.0) == pytest.approx(1)
    assert steer(2.2) == pytest.approx(1 + 0.1 * 100 / 1000)
    assert steer(99.0) == pytest.approx(1 + 0.2 * 100 / 1000)
    assert steer(0.0) == pytest.approx(1 - 0.2 * 100 / 1000)


def test_beta_follows_the_kl_that_is_wanted():
    check_beta(steered)
    fails(check_beta, lambda kl: steered(4.0 - kl))
    assert steered(99.0, target_kl=None) == 1


def test_beta_holds_a_run_near_its_target():
    found = {}
    for target in (0.02, 50.0):
        settings = ppo(
            prompts_per_rollout=4, num_completions=8, target_kl=target, kl_horizon=64, kl_coef=0.2
        )
        loader = loader_of(actor(), settings, ppo_file.estimate, rows=32)
        trainer = trainer_of(loader, ppo_file.PpoObjective(settings))
        for _ in range(10):
            trainer.train_step()
        found[target] = loader.beta
    assert found[0.02] > 0.2 > found[50.0]


# --- a sampler of fewer bits


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_fewer_bits_are_corrected_for(weights):
    settings = grpo(num_completions=32, rollout_dtype=weights, max_importance_weight=1.005)
    batch = next(loader_of(moved(), settings, group_file.estimate, rows=128))
    inside = batch.importance_weights[batch.mask]
    assert inside.max() == pytest.approx(1.005)
    assert inside.min() < 0.999


def test_a_trainer_of_fewer_bits_is_corrected_for():
    """The engine answers in float32; what the trainer thinks of it is rounded."""
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
    answers = [Completion(3, [1], [END], [0.0], True)] * 2
    assert checked_rewards(lambda a: [1, 2.5], answers) == [1.0, 2.5]
    with pytest.raises(WorkError, match=f"an answer to prompt 3 is {value}; it must be a finite"):
        checked_rewards(lambda a: [1.0, value], answers)
    with pytest.raises(WorkError, match="gave 1 number for 2 answers"):
        checked_rewards(lambda a: [1.0], answers)
