"""The pair losses against the papers' equations in Python doubles; checks of silent bugs."""

import math

import pytest
import torch
from tiny_models import deaf, tiny

from openpalm.align.config import DpoSettings
from openpalm.align.logprobs import token_log_probs
from openpalm.align.pairs.dpo import PairObjective, pair_losses
from openpalm.align.pairs.examples import (
    PreferenceExample,
    collate,
    preference_loader,
    with_reference,
)
from openpalm.data.text.conversation import Example
from openpalm.errors import SettingsError

LOG_PROBS = [-12.0, -3.5, -20.25, -14.0, -6.0, -9.75]
REFERENCE = [-13.0, -3.0, -18.0, -15.5, -6.0, -11.0]
TOKENS = [5, 2, 9, 6, 3, 4]


def settings(loss, **changes):
    return DpoSettings(data="-", out="-", init="-", steps=1, loss=loss, **changes)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def log_odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


def by_hand(how, w, r):
    """The loss of the pair (w, r), from the papers' equations."""
    beta, logs, refs = how.resolved_beta, list(LOG_PROBS), list(REFERENCE)
    if how.length_normalise or how.loss in ("simpo", "orpo"):
        logs = [x / n for x, n in zip(LOG_PROBS, TOKENS, strict=True)]
        refs = [x / n for x, n in zip(REFERENCE, TOKENS, strict=True)]
    h = beta * ((logs[w] - refs[w]) - (logs[r] - refs[r]))
    if how.loss == "dpo":
        return -log_sigmoid(h)
    if how.loss == "cdpo":
        return -(1 - how.label_smoothing) * log_sigmoid(h) - how.label_smoothing * log_sigmoid(-h)
    if how.loss == "ipo":
        return (h / beta - 1 / (2 * beta)) ** 2
    if how.loss == "simpo":
        return -log_sigmoid(beta * (logs[w] - logs[r]) - how.margin)
    return -logs[w] - beta * log_sigmoid(log_odds(logs[w]) - log_odds(logs[r]))


@pytest.mark.parametrize(
    "how",
    [
        settings("dpo"),
        settings("dpo", beta=0.7, length_normalise=True),
        settings("cdpo", beta=0.5, label_smoothing=0.2),
        settings("ipo"),
        settings("simpo"),
        settings("simpo", beta=1.5, margin=0.25),
        settings("orpo", beta=0.3),
    ],
    ids=lambda how: f"{how.loss} {how.resolved_beta}",
)
def test_losses_are_the_papers_equations(how):
    reference = REFERENCE if how.loss in ("dpo", "cdpo", "ipo") else [0.0] * 6
    double = torch.float64
    losses, _ = pair_losses(
        how,
        torch.tensor(LOG_PROBS, dtype=double),
        torch.tensor(TOKENS),
        torch.tensor(reference, dtype=double),
    )
    assert losses.tolist() == pytest.approx([by_hand(how, i, i + 3) for i in range(3)])


@pytest.mark.parametrize("loss", ["dpo", "cdpo", "ipo", "simpo", "orpo"])
def test_gradients_are_those_of_finite_differences(loss):
    log_probs = torch.tensor(LOG_PROBS, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(REFERENCE, dtype=torch.float64)

    def total(x):
        return pair_losses(settings(loss), x, torch.tensor(TOKENS), reference)[0].sum()

    assert torch.autograd.gradcheck(total, log_probs)


# --- with a model


def pairs(count=6, vocab=265):
    """Pairs of different lengths, each with its own prompt."""
    generator = torch.Generator().manual_seed(0)

    def draw(size):
        return torch.randint(0, vocab, (size,), generator=generator).tolist()

    made = []
    for i in range(count):
        prompt = draw(3 + i)
        sides = [
            Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))
            for answer in (draw(2 + i), draw(9 - i))
        ]
        made.append(PreferenceExample(tuple(sides)))
    return made


def check_ln_2(loss, reference, policy, away=1e-5):
    """Policy and reference are in training mode with dropout, as in the training loop."""
    known = with_reference(reference.train(), pairs())
    with torch.no_grad():
        total, metrics = PairObjective(settings(loss)).loss(policy.train(), collate(known))
    assert total.item() / 6 == pytest.approx(math.log(2), abs=away)
    assert metrics["reward_margin"] == pytest.approx(0, abs=10 * away)


@pytest.mark.parametrize("loss", ["dpo", "cdpo"])
def test_at_the_reference_the_loss_is_ln_2(loss):
    """A stale reference, or dropout in one of the two passes, gives another loss."""
    check_ln_2(loss, tiny(dropout=0.5), tiny(dropout=0.5))
    bugs = [
        (deaf(tiny(dropout=0.5)), tiny(dropout=0.5)),
        (tiny(dropout=0.5), deaf(tiny(dropout=0.5))),
        (tiny(seed=1), tiny(dropout=0.5)),
    ]
    for reference, policy in bugs:
        with pytest.raises(AssertionError):
            check_ln_2(loss, reference, policy, away=1e-3)


def test_the_reference_is_the_sum_over_the_answer_alone():
    model = tiny()
    for pair in with_reference(model, pairs()):
        for record, found in zip(pair.completions, pair.reference, strict=True):
            ids = torch.tensor([record.ids])
            with torch.no_grad():
                each = token_log_probs(model, ids[:, :-1], ids[:, 1:])[0]
            assert found == pytest.approx(
                each[torch.tensor(record.loss_mask[1:])].sum().item(), abs=1e-4
            )


def test_a_step_makes_the_chosen_answer_likelier():
    """Fails where chosen and rejected are swapped."""
    model = tiny()
    known = with_reference(model, pairs())
    objective, batch = PairObjective(settings("dpo")), collate(known)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(10):
        optimizer.zero_grad()
        (objective.loss(model, batch)[0] / len(batch)).backward()
        optimizer.step()
    _, metrics = objective.loss(model, batch)
    assert metrics["accuracy"] == 6
    assert metrics["reward_chosen"] > metrics["reward_rejected"]


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_microbatches_of_ragged_pairs_are_one_batch(loss):
    """The mean over pairs does not depend on their lengths or on the microbatches."""
    model, objective = tiny(), PairObjective(settings(loss))
    known = with_reference(tiny(seed=2), pairs())

    def gradients(cuts):
        model.zero_grad()
        for group in cuts:
            batch = collate(group)
            (objective.loss(model, batch)[0] / len(known)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradients([known])
    assert torch.allclose(whole, gradients([known[:1], known[1:4], known[4:]]), atol=1e-6)
    halves = [known[:3], known[3:]]
    assert torch.allclose(whole, gradients(halves), atol=1e-6)


def test_the_loader_resumes_where_it_was():
    known = pairs(10)
    loader = preference_loader(known, rows=3, seed=4, collate=collate)
    for _ in range(5):
        next(loader)
    state = loader.state_dict()
    expected = [next(loader) for _ in range(4)]
    again = preference_loader(known, rows=3, seed=4, collate=collate)
    again.load_state_dict(state)
    for batch in expected:
        assert torch.equal(next(again).inputs, batch.inputs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"beta": 0.0}, "--beta 0.0: must be above 0"),
        ({"label_smoothing": 0.5}, "--label-smoothing 0.5: must be in [0, 0.5)"),
        ({"margin": -1.0}, "--margin -1.0: must be 0 or more"),
    ],
)
def test_settings_out_of_range(changes, says):
    with pytest.raises(
        SettingsError, match=says.replace("[", r"\[").replace("(", r"\(").replace(")", r"\)")
    ):
        settings("dpo", **changes)


@pytest.mark.parametrize("sums", [(0.0, -3.0), (-3.0, 0.0), (0.0, 0.0), (-1e-7, -1e-9)])
def test_orpo_of_a_certain_answer_is_finite(sums):
    log_probs = torch.tensor(sums, requires_grad=True)
    losses, _ = pair_losses(settings("orpo"), log_probs, torch.tensor([2, 2]), torch.zeros(2))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("dpo", {"label_smoothing": 0.3}),
        ("simpo", {"label_smoothing": 0.3}),
        ("dpo", {"margin": 5.0}),
        ("ipo", {"desirable_weight": 2.0}),
        ("kto", {"length_normalise": True}),
    ],
)
def test_options_of_another_loss_are_refused(loss, changes):
    with pytest.raises(SettingsError, match="is an option of --loss"):
        settings(loss, **changes)
