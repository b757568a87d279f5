"""The doctor: a healthy run passes every check, and each check fails where its bug is put in."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny

from openpalm.align.config import GrpoSettings
from openpalm.align.doctor import checks
from openpalm.align.doctor import run_checks as measuring
from openpalm.align.doctor.checks import PromptedExample
from openpalm.align.doctor.run_checks import PlannedRun, run_checks
from openpalm.align.logprobs import Evaluated, evaluate
from openpalm.align.pairs.examples import render_completion, to_examples
from openpalm.align.rollouts.rollout_batch import Completion, collate_completions
from openpalm.data.batches.loader import IGNORE, Example
from openpalm.data.rows.messages import assistant_turn
from openpalm.data.rows.preferences import Pair
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.model import lora
from openpalm.model.config import LoraConfig
from openpalm.train.config import OptimSettings
from openpalm.train.optimization.parameter_groups import Optimizer

TOKENIZER = Tokenizer.byte()
STOPS = stop_ids(TOKENIZER)
ASKED = [(Message("user", f"Question {i}?"),) for i in range(4)]


def length_of(answers):
    return [float(len(answer.ids)) + 0.01 * sum(answer.ids) for answer in answers]


@torch.no_grad()
def soft(seed=0):
    """A model with varying completions that sometimes end."""
    model = tiny(seed, dropout=0.5)
    model.embedding /= 10
    return model


def healthy(**changes):
    """A planned run with prompts, completions, pairs and rewards."""
    model, reference = soft(), soft().requires_grad_(False)
    if changes.pop("adapter", False):
        lora.attach(model, LoraConfig(2, 4.0, ("q", "v", "down")), seed=0)
    pairs = [
        Pair(prompt, assistant_turn("A longer answer."), assistant_turn("No.")) for prompt in ASKED
    ]
    settings = GrpoSettings(
        data=Path("d"),
        out=Path("o"),
        init="i",
        steps=1,
        prompts_per_rollout=4,
        num_completions=4,
        max_new_tokens=24,
    )
    given = {
        "settings": settings,
        "model": model,
        "optimizer": Optimizer(model, OptimSettings(), 1e-3),
        "reference": reference,
        "tokenizer": TOKENIZER,
        "prompts": [render(TOKENIZER, prompt, add_generation_prompt=True).ids for prompt in ASKED],
        "conversations": [(pair.prompt, pair.chosen) for pair in pairs],
        "pairs": to_examples(TOKENIZER, ReadResult(pairs, {}), 65).items,
        "stop_ids": STOPS,
        "reward": length_of,
    }
    return PlannedRun(**given | changes)


def ill(planned):
    """Name of the first failed check or None, and the number of checks."""
    seen = []
    for check in run_checks(planned):
        seen.append(check)
        if not check.ok:
            assert check.remedy
            assert check.found
            return check.name, len(seen)
    return None, len(seen)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_healthy_run_passes_everything(adapter):
    assert ill(healthy(adapter=adapter)) == (None, 18)
    assert ill(healthy(adapter=adapter, reward=None, pairs=[])) == (None, 10)


# --- the data


def test_masks_follow_the_template():
    before, whole = [1, 2, 3], Example([1, 2, 3, 4, 5], [False] * 3 + [True] * 2)
    assert checks.check_loss_mask([PromptedExample(before, whole)]).ok
    one_off = Example(whole.ids, [False] * 2 + [True] * 3)
    late = Example(whole.ids, [False] * 4 + [True])
    none = Example([1, 2, 3], [False] * 3)
    merged = Example([1, 2, 9, 4, 5], whole.loss_mask)  # the boundary within one token
    for record in (one_off, late, none, merged):
        check = checks.check_loss_mask(
            [PromptedExample(before, whole), PromptedExample(before, record)]
        )
        assert not check.ok
        assert "1 of 2" in check.found


def test_another_template_in_training_is_found(monkeypatch):
    def spaced(tokenizer, messages, *, add_generation_prompt=False):
        """Joins the texts before encoding, as hand-written templates do."""
        text = "".join(f"{m.role}: {m.content}\n" for m in messages)
        ids = tokenizer.encode(text + ("assistant:" if add_generation_prompt else ""))
        start = len(tokenizer.encode(text)) - len(tokenizer.encode(messages[-1].content)) - 1
        return Example(ids, [i >= start for i in range(len(ids))])

    monkeypatch.setattr(measuring, "render", spaced)
    assert ill(healthy()) == ("loss mask starts at the completion", 1)


def test_the_end_marker_is_learnt():
    record = render_completion(TOKENIZER, ASKED[0], assistant_turn("Yes."))
    start = record.loss_mask.index(True)
    assert checks.check_end_marker([PromptedExample(record.ids[:start], record)], STOPS).ok
    unmasked = Example(record.ids, [*record.loss_mask[:-1], False])
    dropped = Example(record.ids[:-1], record.loss_mask[:-1])
    for bad in (unmasked, dropped):
        assert not checks.check_end_marker([PromptedExample(record.ids[:start], bad)], STOPS).ok
    assert ill(healthy(stop_ids=frozenset({5}))) == ("end marker is in the loss", 2)


def test_what_learns_is_in_the_optimizer():
    model = tiny()
    before = Optimizer(model, OptimSettings(), 1e-3)
    assert checks.check_optimizer(model, before).ok
    lora.attach(model, LoraConfig(2, 4.0, ("q",)), seed=0)
    check = checks.check_optimizer(model, before)  # made before the adapter was attached
    assert not check.ok
    assert "of 4 trained tensors 4 are not in the optimizer" in check.found
    after = Optimizer(model, OptimSettings(), 1e-3)
    assert checks.check_optimizer(model, after).ok
    after.parts[0].add_param_group({"params": [model.embedding]})
    assert not checks.check_optimizer(model, after).ok  # the trunk as well
    assert not checks.check_optimizer(tiny().requires_grad_(False), after).ok
    assert ill(healthy(optimizer=before))[0] == "optimizer holds the trained parameters"


# --- the policy


def test_answers_come_to_an_end():
    ended, cut = (Completion(0, [1], [2], [0.0], ended=value) for value in (True, False))
    assert checks.check_completions_end([cut, ended]).ok
    assert not checks.check_completions_end([cut, cut]).ok


def with_evaluate(monkeypatch, broken):
    """Changes the log-probabilities that the run computes."""

    def changed(model, inputs, targets, **how):
        return Evaluated(broken(model, inputs, targets), torch.zeros_like(inputs), None)

    monkeypatch.setattr(measuring, "evaluate", changed)


def test_dropout_is_off(monkeypatch):
    def on(model, inputs, targets):
        model.train()
        logits = model.logits(inputs).log_softmax(-1)
        return logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0] * (targets != IGNORE)

    with_evaluate(monkeypatch, on)
    assert ill(healthy())[0] == "dropout is off"


def test_the_sampler_is_the_trained_policy(monkeypatch):
    def shifted(model, inputs, targets):
        return evaluate(model, inputs.roll(1, 1), targets).log_probs

    with_evaluate(monkeypatch, shifted)
    assert ill(healthy())[0] == "sampler and trained policy agree"
    with_evaluate(monkeypatch, lambda *given: evaluate(*given, temperature=0.9).log_probs)
    assert ill(healthy())[0] == "sampler and trained policy agree"
    one = torch.tensor([-3.0])
    assert checks.check_sampler(one, one + 2e-5).ok
    assert not checks.check_sampler(one, one + 1e-4).ok
    assert not checks.check_sampler(one, one * torch.nan).ok


def test_the_reference_is_the_start():
    other = soft(1).requires_grad_(False)
    assert ill(healthy(reference=other))[0] == "KL to the reference is 0 at step 0"
    planned = healthy(adapter=True)
    for name, factor in lora.adapter_parameters(planned.model).items():
        if name.endswith(".b"):  # as if B were not zero at the start
            torch.nn.init.normal_(factor, generator=torch.Generator().manual_seed(0))
    assert ill(planned)[0] == "KL to the reference is 0 at step 0"


def test_masked_tokens_have_no_gradient(monkeypatch):
    model = tiny()
    answers = [Completion(0, [1, 2], list(range(n)), [], ended=True) for n in (2, 5, 9)]
    inputs, targets = collate_completions(answers)

    def sums(inputs, targets):
        return -evaluate(model, inputs, targets).log_probs.sum()

    def over_padding(inputs, targets):
        logits = model.logits(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.clamp_min(0).flatten())

    assert checks.check_masked(model, sums, inputs, targets).ok
    assert not checks.check_masked(model, over_padding, inputs, targets).ok

    def kept(model, inputs, targets):
        return evaluate(model, inputs, targets.clamp_min(0)).log_probs

    answers = [Completion(0, [1], [3] * n, [0.0] * n, ended=True) for n in (1, 9)]
    with_evaluate(monkeypatch, kept)
    masked = measuring._policy_checks(healthy(), answers)
    assert [check.ok for check in masked][-1] is False


# --- the rewards


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_rewards_are_finite(odd):
    assert checks.check_finite([0.0, -1.0]).ok
    assert not checks.check_finite([0.0, odd]).ok

    def reward(answers):
        return [odd if len(answer.ids) > 3 else 1.0 for answer in answers]

    assert ill(healthy(reward=reward))[0] == "rewards are finite"


def test_rewards_vary():
    assert checks.check_varying([1.0, 2.0, 5.0, 5.0], 2).ok  # one group is enough
    assert not checks.check_varying([1.0, 1.0, 5.0, 5.0], 2).ok
    assert ill(healthy(reward=lambda answers: [0.5] * len(answers)))[0] == "rewards vary"


def test_a_reward_reads_its_own_answer():
    def at_the_padding(answers):
        """A reward that reads the last position of the batch, padding or not."""
        width = max(len(answer.ids) for answer in answers)
        return [float((answer.ids + [0] * width)[width - 1]) for answer in answers]

    assert ill(healthy(reward=at_the_padding))[0] == "reward is independent of the batch"
    assert checks.check_batch_independent([1.0, -2.0], [1.0, -2.0]).ok
    assert not checks.check_batch_independent([1.0, -2.0], [1.0, -2.1]).ok


def test_a_reward_lies_on_the_last_token(monkeypatch):
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    rewards = torch.tensor([2.0, -1.0])
    right = torch.tensor([[0, 0, 2.0, 0], [0, 0, 0, -1.0]])
    assert checks.check_reward_position(right, rewards, mask).ok
    at_the_end = torch.tensor([[0, 0, 0, 2.0], [0, 0, 0, -1.0]])
    first = torch.tensor([[0, 2.0, 0, 0], [0, -1.0, 0, 0]])
    everywhere = rewards[:, None] * mask
    cut_has_none = torch.tensor([[0, 0, 2.0, 0], [0, 0, 0, 0]])
    for placed in (at_the_end, first, everywhere, cut_has_none):
        assert not checks.check_reward_position(placed, rewards, mask).ok
    monkeypatch.setattr(
        measuring, "token_rewards", lambda rewards, mask, _: rewards[:, None] * mask
    )
    assert ill(healthy())[0] == "reward is on the last token"


# --- the pairs


def test_chosen_and_rejected_differ():
    pair = healthy().pairs[0]
    assert checks.check_different([pair]).ok
    assert not checks.check_different(
        [pair, replace(pair, completions=pair.completions[:1] * 2)]
    ).ok
    assert not checks.check_different([replace(pair, label=-1.0)]).ok
    equal = [replace(pair, completions=pair.completions[:1] * 2)]
    assert ill(healthy(pairs=equal))[0] == "chosen and rejected differ"


def test_swapped_pairs_are_found():
    assert checks.check_order([1.0, 2.0, 0.0], [0.0, 1.0, 5.0]).ok
    assert not checks.check_order([0.0, 1.0, 5.0], [1.0, 2.0, 0.0]).ok
    pairs = healthy().pairs
    swapped = [replace(pair, completions=pair.completions[::-1]) for pair in pairs]
    assert ill(healthy(pairs=swapped))[0] == "chosen and rejected are not swapped"


def test_the_pair_loss_at_step_0(monkeypatch):
    assert checks.check_pair_loss(math.log(2)).ok
    assert not checks.check_pair_loss(0.7).ok

    def without_reference(model, pairs):
        return pairs

    monkeypatch.setattr(measuring, "with_reference", without_reference)
    assert ill(healthy())[0] == "DPO loss is ln 2 at step 0"


# --- the step


def test_the_ratio_is_one():
    mask = torch.tensor([[False, True, True]])
    old = torch.tensor([[0.0, -1.0, -2.0]])
    behind = torch.tensor([[9.0, 0.0, 0.0]])
    assert checks.check_ratio(old, old + behind, mask).ok
    for change in ([0, 0.01, 0], [0, 0, math.nan], [0, 0, -math.inf]):
        assert not checks.check_ratio(old, old + torch.tensor([change]), mask).ok


def test_a_stale_old_policy_is_found(monkeypatch):
    class Stale(measuring.RolloutLoader):
        def __next__(self):
            batch = super().__next__()
            with torch.no_grad():  # as if the weights moved between rollout and loss
                self.sampler.model.norm.weight += 0.1
            return batch

    monkeypatch.setattr(measuring, "RolloutLoader", Stale)
    assert ill(healthy())[0] == "probability ratio is 1 at step 0"


def test_a_reference_that_moves_is_found():
    model = soft()
    optimizer = Optimizer(model, OptimSettings(), 1e-3)
    planned = healthy(model=model, optimizer=optimizer, reference=model)
    assert ill(planned)[0] == "reference weights are frozen"
    assert checks.check_frozen_reference("a", "a").ok
    assert not checks.check_frozen_reference("a", "b").ok
    assert measuring.digest(tiny()) == measuring.digest(tiny()) != measuring.digest(tiny(1))
