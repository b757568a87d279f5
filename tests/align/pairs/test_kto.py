"""The KTO loss against the paper's equations; checks of silent bugs."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import deaf, tiny

from openpalm.align.config import DpoSettings
from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs.examples import (
    PreferenceExample,
    collate,
    preference_loader,
    to_examples,
    with_reference,
)
from openpalm.align.pairs.kto import (
    KtoObjective,
    kto_losses,
    next_other_prompts,
    reference_point,
    with_mismatched,
)
from openpalm.data.rows.preferences import LabelledCompletion
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.text.conversation import Example, Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, SettingsError

LOG_RATIOS = [1.5, -0.75, 2.25, -3.0, 0.0]
GOOD = [True, False, False, True, True]
ELSEWHERE = [0.5, -1.25, 2.0, 0.0, 1.75]


def settings(**changes):
    return DpoSettings(data="-", out="-", init="-", steps=1, loss="kto", **changes)


def by_hand(how):
    """Equations 7 to 9 in Python floats."""
    z0 = max(0.0, sum(ELSEWHERE) / len(ELSEWHERE))
    for r, good in zip(LOG_RATIOS, GOOD, strict=True):
        away = how.resolved_beta * (r - z0)
        if good:
            weight, value = how.desirable_weight, 1 / (1 + math.exp(-away))
        else:
            weight, value = how.undesirable_weight, 1 / (1 + math.exp(away))
        yield weight - weight * value


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def check_equations(how, losses_of):
    losses, _ = losses_of(how, double(LOG_RATIOS), reference_point(double(ELSEWHERE)), GOOD)
    assert losses.tolist() == pytest.approx(list(by_hand(how)), rel=1e-6)


def ours(how, log_ratios, z0, good):
    return kto_losses(how, log_ratios, z0, torch.tensor(good))


@pytest.mark.parametrize(
    "how", [settings(), settings(beta=0.7, desirable_weight=1.5, undesirable_weight=0.25)]
)
def test_losses_are_the_papers_equations(how):
    check_equations(how, ours)

    def swapped(how, log_ratios, z0, good):
        return ours(how, log_ratios, z0, [not g for g in good])

    def without_reference_point(how, log_ratios, z0, good):
        return ours(how, log_ratios, 0 * z0, good)

    for bug in (swapped, without_reference_point):
        with pytest.raises(AssertionError):
            check_equations(how, bug)


def test_the_reference_point_is_zero_or_above():
    assert reference_point(double([-3.0, 1.0])) == 0
    assert reference_point(double([3.0, -1.0])) == 1


def test_gradients_are_those_of_finite_differences():
    how, log_ratios = settings(beta=0.5, undesirable_weight=2.0), double(LOG_RATIOS)
    log_ratios.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(how, x, double(0.4), GOOD)[0].sum(), log_ratios)


# --- with a model


def labelled(count=6, vocab=265):
    """Completions of different lengths; the mismatched completion is the next prompt's."""
    generator = torch.Generator().manual_seed(0)

    def draw(size):
        return torch.randint(0, vocab, (size,), generator=generator).tolist()

    prompts, answers = ([draw(2 + i) for i in range(count)], [draw(9 - i) for i in range(count)])
    examples = [
        Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return with_mismatched(
        [PreferenceExample((e,), float(i % 3 != 1)) for i, e in enumerate(examples)], 64
    )


def check_a_half(reference, policy, away=1e-5):
    """Policy and reference are in training mode with dropout, as in the training loop."""
    known = with_reference(reference.train(), labelled())
    with torch.no_grad():
        total, metrics = KtoObjective(settings()).loss(policy.train(), collate(known))
    assert total.item() / 6 == pytest.approx(0.5, abs=away)
    assert metrics["kl"] == pytest.approx(0, abs=100 * away)


def test_at_the_reference_the_loss_is_a_half():
    """A stale reference, or dropout in one of the two passes, gives another loss."""
    check_a_half(tiny(dropout=0.5), tiny(dropout=0.5))
    bugs = [
        (deaf(tiny(dropout=0.5)), tiny(dropout=0.5)),
        (tiny(dropout=0.5), deaf(tiny(dropout=0.5))),
        (tiny(seed=1), tiny(dropout=0.5)),
    ]
    for reference, policy in bugs:
        with pytest.raises(AssertionError):
            check_a_half(reference, policy, away=1e-3)


def check_reference_point_has_no_gradient(objective):
    """Compares with the loss in which z0 is a constant."""
    model, how = tiny().double(), settings(beta=1.0)
    known = [
        replace(example, reference=(example.reference[0], example.reference[1] - 0.5))
        for example in with_reference(model, labelled())
    ]
    batch = collate(known)
    rows, targets = batch.inputs, batch.targets

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    ratios = token_log_probs(model, rows, targets).sum(-1) - batch.reference
    z0 = max(0.0, ratios.chunk(2)[1].mean().item())
    assert z0 > 0.1, "else nothing could go through it"
    losses, _ = kto_losses(how, ratios.chunk(2)[0], torch.tensor(z0), batch.labels > 0)
    exact = gradients(losses.sum())
    found = gradients(objective(how).loss(model, batch)[0])
    assert (found - exact).norm() < 1e-7 * exact.norm()


def test_the_reference_point_has_no_gradient(monkeypatch):
    check_reference_point_has_no_gradient(KtoObjective)

    class Leaking(KtoObjective):
        def loss(self, model, batch):
            monkeypatch.setattr(torch, "no_grad", torch.enable_grad)
            return super().loss(model, batch)

    with pytest.raises(AssertionError):
        check_reference_point_has_no_gradient(Leaking)


def test_steps_raise_the_good_and_lower_the_bad():
    """Fails where the labels are swapped."""
    model = tiny()
    known = with_reference(model, labelled())
    objective, batch = KtoObjective(settings()), collate(known)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (objective.loss(model, batch)[0] / 6).backward()
        optimizer.step()
    with torch.no_grad():
        sums = token_log_probs(model, batch.inputs, batch.targets).sum(-1)
    moved = (sums - batch.reference).chunk(2)[0]
    desirable = batch.labels > 0
    assert moved[desirable].mean() > 0
    assert moved[~desirable].mean() < 0
    _, metrics = objective.loss(model, batch)
    assert metrics["accuracy"] >= 5


# --- examples


def says(role, text):
    return (Message(role, text),)


def judged(prompt, answer, good=True):
    return LabelledCompletion(says("user", prompt), says("assistant", answer), good)


def examples_of(*given, length):
    """The examples with their mismatched completions, and what is left out."""
    places = [f"v:{number}" for number, _ in enumerate(given, 1)]
    found = to_examples(TOKENIZER, ReadResult(list(given), {}, places), length + 1)
    return with_mismatched(found.items, length), found.unused_places


TOKENIZER = Tokenizer.byte()


def counted(example):
    return [i for i, counts in zip(example.ids, example.loss_mask, strict=True) if counts]


def test_the_next_other_prompt():
    assert next_other_prompts("aabbca") == [2, 2, 4, 4, 5, 2]
    assert next_other_prompts("ab") == [1, 0]
    assert next_other_prompts("aab") == [2, 2, 0]
    with pytest.raises(DataError, match="at least two"):
        next_other_prompts("aaa")


def test_a_mismatched_completion_is_cut_to_fit():
    given = [judged("a question", "1"), judged("b", "2" * 9, good=False), judged("c", "3" * 99)]
    length = len(examples_of(*given, length=200)[0][0].completions[0].ids) - 1
    made, left_out = examples_of(*given, length=length)
    assert [*left_out.values()] == [["v:3"]]
    assert [example.label for example in made] == [1, 0]
    cut = made[0].completions[1]
    assert len(cut.ids) == length + 1
    assert counted(cut) == TOKENIZER.encode("2") * len(counted(cut))


def test_every_completion_has_a_mismatched_one():
    given = [judged("one", "1"), judged("one", "11", good=False), judged("two", "222")]
    made, left_out = examples_of(*given, length=64)
    assert left_out == {}
    for example, own, other in zip(made, ["1", "11", "222"], ["222", "222", "1"], strict=True):
        for side, text in zip(example.completions, (own, other), strict=True):
            assert counted(side) == [*TOKENIZER.encode(text), TOKENIZER.special_id("<|end|>")]
        prompts = [side.ids[: side.loss_mask.index(True)] for side in example.completions]
        assert prompts[0] == prompts[1]


def test_completions_that_do_not_fit_are_counted():
    given = [judged("one", "1"), judged("two", "222")]
    assert to_examples(TOKENIZER, ReadResult(given, {}), 4)[:2] == (
        [],
        {"longer than 4 tokens, see --sequence-length": 2},
    )


def test_the_loader_refuses_a_cursor_of_other_data():
    loader = preference_loader(labelled(), rows=4, seed=3, collate=collate)
    assert next(loader).labels.shape == (4,)
    state = loader.state_dict()
    with pytest.raises(DataError, match="other data"):
        preference_loader(labelled(5), rows=4, seed=3, collate=collate).load_state_dict(state)


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_settings_out_of_range(name):
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} 0: must be above 0"):
        settings(**{name: 0})
