"""The log-probability function against scoring one token at a time and against all answers.

Every check is a function of the thing checked, and is shown to fail when its bug is put in.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_models import deaf, tiny

from openpalm.align.logprobs import lengths, token_log_probs
from openpalm.align.pairs.examples import render_completion
from openpalm.data.batches.loader import IGNORE, padded
from openpalm.data.text.conversation import Example, Message, render
from openpalm.data.text.tokenizer import Tokenizer

END, LONGEST = 4, 4
"""Of the enumerable task: five tokens, the last ends an answer of at most four."""


@pytest.fixture(scope="module")
def policy():
    return tiny(vocab_size=5)


def every_answer():
    """All 341 answers: ended by END, or cut at LONGEST without it."""
    for length in range(LONGEST):
        for tokens in itertools.product(range(END), repeat=length):
            yield [*tokens, END]
    for tokens in itertools.product(range(END), repeat=LONGEST):
        yield list(tokens)


def batch_of(prompt, answers):
    """As training sees them: the loss mask is on the answer, padding on the right."""
    rows = [
        Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for answer in answers
    ]
    return padded(rows, 64)


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


# --- 7: dropout


def check_dropout_is_off(model, log_probs):
    inputs, targets = batch_of([0, 1, 2], every_answer())
    exact = log_probs(model.eval(), inputs, targets)
    assert torch.equal(log_probs(model.train(), inputs, targets), exact)
    assert not model.training  # and backward, which may compute blocks anew, sees the same


def test_dropout_is_off():
    check_dropout_is_off(tiny(vocab_size=5, dropout=0.5), token_log_probs)
    fails(check_dropout_is_off, deaf(tiny(vocab_size=5, dropout=0.5)), token_log_probs)

    def back_on(model, inputs, targets):
        found = token_log_probs(model, inputs, targets)
        model.train()
        return found

    fails(check_dropout_is_off, tiny(vocab_size=5, dropout=0.5), back_on)


# --- 1: shifted by one


def check_one_at_a_time(model, log_probs):
    inputs, targets = batch_of([0, 1, 2], [[3, 1, 0, END]])
    found = log_probs(model, inputs, targets)[0, 2:6]
    ids = [0, 1, 2, 3, 1, 0, END]
    for t in range(3, 7):
        logits = model.logits(torch.tensor([ids[:t]]))[0, -1]
        assert abs(logits.log_softmax(-1)[ids[t]] - found[t - 3]) < 1e-5


@torch.no_grad()
def test_equals_scoring_one_token_at_a_time(policy):
    check_one_at_a_time(policy, token_log_probs)

    def shifted(model, inputs, targets):
        logits = model.logits(inputs).roll(1, dims=1)
        return F.log_softmax(logits, -1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]

    fails(check_one_at_a_time, policy, shifted)


# --- 2, 3: the end marker left out, padding scored


def check_sum_is_one(model, log_probs):
    answers = list(every_answer())
    assert len(answers) == 341
    inputs, targets = batch_of([2, 0], answers)
    total = log_probs(model, inputs, targets).sum(-1).double().exp().sum()
    assert abs(total - 1) < 1e-4


@torch.no_grad()
def test_the_probabilities_of_all_answers_sum_to_one(policy):
    check_sum_is_one(policy, token_log_probs)

    def without_end(model, inputs, targets):
        return token_log_probs(model, inputs, targets.masked_fill(targets == END, IGNORE))

    def with_padding(model, inputs, targets):
        padding = targets.new_tensor(0)
        after = targets.flip(-1).ne(IGNORE).cumsum(-1).flip(-1) == 0
        return token_log_probs(model, inputs, targets.where(~after, padding))

    fails(check_sum_is_one, policy, without_end)
    fails(check_sum_is_one, policy, with_padding)


# --- 4: positions


def check_padding_changes_nothing(model, log_probs):
    answers = [[3], [1, 2, 0, END], [0, END]]
    together = log_probs(model, *batch_of([1, 1], answers)).sum(-1)
    alone = torch.cat([log_probs(model, *batch_of([1, 1], [a])).sum(-1) for a in answers])
    exact = torch.stack(
        [
            token_log_probs(
                model,
                torch.tensor([[1, 1, *a][:-1]]),
                torch.tensor([[IGNORE, *a]]),
            ).sum()
            for a in answers
        ]
    )
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, exact, atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(policy):
    check_padding_changes_nothing(policy, token_log_probs)

    def left_padded(model, inputs, targets):
        """Moves the rows to the right, positions and all, without telling the model."""
        shift = inputs.shape[1] - int((targets != IGNORE).sum(-1).max()) - 1
        return token_log_probs(model, inputs.roll(shift, 1), targets.roll(shift, 1))

    fails(check_padding_changes_nothing, policy, left_padded)


# --- 5: what is masked has no gradient


def check_masked_tokens_have_no_gradient(model, log_probs):
    def gradient(filler):
        inputs, targets = batch_of([1, 2], [[3, END], [0, 1, 2, END]])
        inputs[0, 3:] = filler  # behind the first answer's last input
        model.zero_grad()
        (-log_probs(model, inputs, targets).sum() / lengths(targets).sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradient(0), gradient(3), strict=True):
        assert torch.equal(a, b)


def test_masked_tokens_have_no_gradient():
    model = tiny(vocab_size=5)
    check_masked_tokens_have_no_gradient(model, token_log_probs)

    def over_padding(model, inputs, targets):
        return token_log_probs(model, inputs, targets.clamp_min(0))

    fails(check_masked_tokens_have_no_gradient, model, over_padding)


# --- 15: where the prompt ends


@pytest.mark.parametrize(
    "tokenizer", [Tokenizer.byte(), Tokenizer.train_bpe(["ab ab. " * 99], 300)]
)
@pytest.mark.parametrize("answer", ["ab", " ab", "", "\n", "<|end|>", "né"])
def test_a_prompts_ids_are_a_prefix_and_the_end_counts(tokenizer, answer):
    prompt = [Message("user", "ab ab "), Message("assistant", "ab."), Message("user", " ab")]
    before = render(tokenizer, prompt, add_generation_prompt=True).ids
    record = render_completion(tokenizer, prompt, [Message("assistant", answer)])
    assert record.ids[: len(before)] == before
    counted = [i for i, counts in zip(record.ids, record.loss_mask, strict=True) if counts]
    assert counted == [*tokenizer.encode(answer), tokenizer.special_id("<|end|>")]
