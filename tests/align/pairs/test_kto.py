"""The loss of verdicts against the paper's equations, and the silent bugs it must not have."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import deaf, tiny

from openpalm.align.config import DpoSettings
from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs.kto import (
    VerdictObjective,
    VerdictRecord,
    collate,
    others,
    records,
    reference_point,
    verdict_losses,
    with_reference,
)
from openpalm.align.pairs.pairs import PairLoader, PairRecord
from openpalm.data.rows.preferences import Usable, Verdict
from openpalm.data.text.conversation import Example, Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, SettingsError

LOG_RATIOS = [1.5, -0.75, 2.25, -3.0, 0.0]
GOOD = [True, False, False, True, True]
ELSEWHERE = [0.5, -1.25, 2.0, 0.0, 1.75]


def settings(**changes):
    return DpoSettings(data="-", out="-", init="-", steps=1, loss="kto", **changes)


def by_hand(how):
    """Equations 7 to 9 in Python's numbers."""
    stands = max(0.0, sum(ELSEWHERE) / len(ELSEWHERE))
    for r, good in zip(LOG_RATIOS, GOOD, strict=True):
        away = how.strength * (r - stands)
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


def ours(how, log_ratios, stands, good):
    return verdict_losses(how, log_ratios, stands, torch.tensor(good))


@pytest.mark.parametrize(
    "how", [settings(), settings(beta=0.7, desirable_weight=1.5, undesirable_weight=0.25)]
)
def test_losses_are_the_papers_equations(how):
    check_equations(how, ours)

    def swapped(how, log_ratios, stands, good):
        return ours(how, log_ratios, stands, [not g for g in good])

    def without_reference_point(how, log_ratios, stands, good):
        return ours(how, log_ratios, 0 * stands, good)

    for bug in (swapped, without_reference_point):
        with pytest.raises(AssertionError):
            check_equations(how, bug)


def test_people_stand_at_zero_or_above():
    assert reference_point(double([-3.0, 1.0])) == 0
    assert reference_point(double([3.0, -1.0])) == 1


def test_gradients_are_those_of_finite_differences():
    how, log_ratios = settings(beta=0.5, undesirable_weight=2.0), double(LOG_RATIOS)
    log_ratios.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ours(how, x, double(0.4), GOOD)[0].sum(), log_ratios)


# --- with a model


def verdicts(count=6, vocab=265):
    """Ragged verdicts; each prompt's other answer is the next one's."""
    generator = torch.Generator().manual_seed(0)

    def draw(size):
        return torch.randint(0, vocab, (size,), generator=generator).tolist()

    prompts, answers = ([draw(2 + i) for i in range(count)], [draw(9 - i) for i in range(count)])
    return [
        VerdictRecord(
            PairRecord(
                *(
                    Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))
                    for answer in (answers[i], answers[(i + 1) % count])
                )
            ),
            good=i % 3 != 1,
        )
        for i, prompt in enumerate(prompts)
    ]


def check_a_half(reference, policy, away=1e-5):
    """Of a policy and a reference as the loop has them: in training mode, with dropout."""
    known = with_reference(reference.train(), verdicts())
    with torch.no_grad():
        total, metrics = VerdictObjective(settings()).loss(policy.train(), collate(known))
    assert total.item() / 6 == pytest.approx(0.5, abs=away)
    assert metrics["kl"] == pytest.approx(0, abs=100 * away)


def test_at_the_reference_the_loss_is_a_half():
    """A stale or moving reference, or dropout in one of the two passes, does not give it."""
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
    """Against the loss with z0 as a number, which has no gradient."""
    model, how = tiny().double(), settings(beta=1.0)
    known = [
        replace(v, pair=replace(v.pair, reference=(v.pair.reference[0], v.pair.reference[1] - 0.5)))
        for v in with_reference(model, verdicts())
    ]
    batch = collate(known)
    rows, targets = batch.answers.inputs, batch.answers.targets

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    ratios = token_log_probs(model, rows, targets).sum(-1) - batch.answers.reference
    stands = max(0.0, ratios.chunk(2)[1].mean().item())
    assert stands > 0.1, "else nothing could go through it"
    losses, _ = verdict_losses(how, ratios.chunk(2)[0], torch.tensor(stands), batch.good)
    exact = gradients(losses.sum())
    found = gradients(objective(how).loss(model, batch)[0])
    assert (found - exact).norm() < 1e-7 * exact.norm()


def test_the_reference_point_has_no_gradient(monkeypatch):
    check_reference_point_has_no_gradient(VerdictObjective)

    class Leaking(VerdictObjective):
        def loss(self, model, batch):
            monkeypatch.setattr(torch, "no_grad", torch.enable_grad)
            return super().loss(model, batch)

    with pytest.raises(AssertionError):
        check_reference_point_has_no_gradient(Leaking)


def test_steps_raise_the_good_and_lower_the_bad():
    """Good and bad swapped would turn this round."""
    model = tiny()
    known = with_reference(model, verdicts())
    objective, batch = VerdictObjective(settings()), collate(known)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (objective.loss(model, batch)[0] / 6).backward()
        optimizer.step()
    with torch.no_grad():
        sums = token_log_probs(model, batch.answers.inputs, batch.answers.targets).sum(-1)
    moved = (sums - batch.answers.reference).chunk(2)[0]
    assert moved[batch.good].mean() > 0
    assert moved[~batch.good].mean() < 0
    _, metrics = objective.loss(model, batch)
    assert metrics["accuracy"] >= 5


# --- records


def says(role, text):
    return (Message(role, text),)


def verdict(prompt, answer, good=True):
    return Verdict(says("user", prompt), says("assistant", answer), good)


def test_the_next_other_prompt():
    assert others("aabbca") == [2, 2, 4, 4, 5, 2]
    assert others("ab") == [1, 0]
    assert others("aab") == [2, 2, 0]
    with pytest.raises(DataError, match="at least two"):
        others("aaa")


def test_an_answer_to_another_prompt_is_cut_to_fit():
    tokenizer = Tokenizer.byte()
    given = [verdict("a question", "1"), verdict("b", "2" * 9, good=False), verdict("c", "3" * 99)]
    given = Usable(given, {}, ["v:1", "v:2", "v:3"])
    length = len(records(tokenizer, given, 200).items[0].sides[0].ids) - 1
    made, left_out = records(tokenizer, given, length)[:2]
    assert [*left_out.values()] == [1]
    assert records(tokenizer, given, length).left_out == {reason: ["v:3"] for reason in left_out}
    assert [record.good for record in made] == [True, False]
    cut = made[0].sides[1]
    assert len(cut.ids) == length + 1
    counted = [i for i, counts in zip(cut.ids, cut.loss_mask, strict=True) if counts]
    assert counted == tokenizer.encode("2") * len(counted)


def test_records():
    tokenizer = Tokenizer.byte()
    given = [verdict("one", "1"), verdict("one", "11", good=False), verdict("two", "222")]
    given = Usable(given, {})
    made, left_out = records(tokenizer, given, 64)[:2]
    assert left_out == {}
    for record, judged, other in zip(made, ["1", "11", "222"], ["222", "222", "1"], strict=True):
        for side, text in zip(record.sides, (judged, other), strict=True):
            counted = [i for i, counts in zip(side.ids, side.loss_mask, strict=True) if counts]
            assert counted == [*tokenizer.encode(text), tokenizer.special_id("<|end|>")]
        prompts = [side.ids[: side.loss_mask.index(True)] for side in record.sides]
        assert prompts[0] == prompts[1]
    assert records(tokenizer, given, 3)[:2] == (
        [],
        {"longer than 4 tokens, see --sequence-length": 3},
    )


def test_the_loader_takes_verdicts_and_knows_others():
    loader = PairLoader(verdicts(), rows=4, seed=3, collate=collate)
    assert next(loader).good.shape == (4,)
    state = loader.state_dict()
    with pytest.raises(DataError, match="other data"):
        PairLoader(verdicts(5), rows=4, seed=3, collate=collate).load_state_dict(state)


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
def test_settings_out_of_range(name):
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} 0: must be above 0"):
        settings(**{name: 0})
