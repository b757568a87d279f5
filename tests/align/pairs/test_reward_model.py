"""The reward losses against Python doubles and torch; checks of silent bugs.

Every check of a silent bug is a function of the thing checked, shown to fail with the bug put in.
"""

import math
import re
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SIZES

from openpalm.align.config import RewardSettings
from openpalm.align.pairs.examples import (
    PreferenceExample,
    preference_loader,
    render_completion,
    to_examples,
)
from openpalm.align.pairs.reward_model import (
    SIGMA,
    RewardObjective,
    ScoreBatch,
    bradley_terry,
    choose_head,
    collate,
    gaussian_bins,
    rating_losses,
)
from openpalm.data.rows.preferences import Rating
from openpalm.data.rows.read_result import ReadResult
from openpalm.data.text.conversation import Example, Message
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import DataError, SettingsError
from openpalm.model.config import ModelConfig, RewardConfig
from openpalm.model.reward import RewardModel, initialise_heads
from openpalm.model.transformer import initialise

DOUBLE = torch.float64
VALUES = [1.0, 2.0, 3.0, 4.0]
RATING_LOSSES = ["regression", "binned", "hl-gauss", "ordinal"]


def settings(loss="bradley-terry", **changes):
    return RewardSettings(data="-", out="-", init="-", steps=1, loss=loss, **changes)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def fails(check, *given):
    with pytest.raises(AssertionError):
        check(*given)


# --- the equations


def check_bradley_terry(losses):
    chosen, rejected, margins = [0.5, -1.0, 3.0], [1.5, -2.0, 0.25], [0.0, 0.5, 2.0]
    found = losses(*(torch.tensor(x, dtype=DOUBLE) for x in (chosen, rejected, margins)), 0.1)
    expected = [
        math.log1p(math.exp(-(w - r - m))) + 0.1 * (w + r) ** 2
        for w, r, m in zip(chosen, rejected, margins, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected)


def test_bradley_terry_is_the_papers_equation():
    check_bradley_terry(bradley_terry)
    fails(check_bradley_terry, lambda w, r, m, c: bradley_terry(r, w, m, c))
    fails(check_bradley_terry, lambda w, r, m, c: bradley_terry(w, r, -m, c))
    fails(check_bradley_terry, lambda w, r, m, c: bradley_terry(w, r, m, -c))


def test_at_equal_rewards_the_loss_is_ln_2():
    zero = torch.zeros(3, dtype=DOUBLE)
    assert bradley_terry(zero, zero, zero).tolist() == pytest.approx([math.log(2)] * 3)


def scored(loss, rows=4):
    """Scores [2 members, rows, outputs], and ratings equal to bin values."""
    outputs = {"regression": 1, "ordinal": len(VALUES) - 1}.get(loss, len(VALUES))
    return drawn(2, rows, outputs), torch.tensor([3.0, 1.0, 4.0, 3.0], dtype=DOUBLE)[:rows]


def by_hand(loss, scores, rating):
    """The loss of one completion under one member."""
    if loss == "regression":
        return (scores[0] - rating) ** 2
    if loss == "ordinal":
        above = [rating > value for value in VALUES[:-1]]
        return sum(math.log1p(math.exp(-s if a else s)) for s, a in zip(scores, above, strict=True))
    total = math.log(sum(map(math.exp, scores)))
    if loss == "binned":
        return total - scores[VALUES.index(rating)]
    bell = NormalDist(rating, SIGMA)
    whole = bell.cdf(VALUES[-1] + 0.5) - bell.cdf(VALUES[0] - 0.5)
    chances = [(bell.cdf(v + 0.5) - bell.cdf(v - 0.5)) / whole for v in VALUES]
    return sum(p * (total - s) for p, s in zip(chances, scores, strict=True))


@pytest.mark.parametrize("loss", RATING_LOSSES)
def test_losses_of_ratings_are_the_papers_equations(loss):
    scores, ratings = scored(loss)
    found = rating_losses(loss, scores, ratings, torch.tensor(VALUES, dtype=DOUBLE))
    assert found.shape == (2, 4)
    for member in range(2):
        expected = [
            by_hand(loss, row, rating)
            for row, rating in zip(scores[member].tolist(), ratings.tolist(), strict=True)
        ]
        assert found[member].tolist() == pytest.approx(expected)


def test_torch_says_the_same():
    values = torch.tensor(VALUES, dtype=DOUBLE)
    scores, ratings = scored("binned")
    expected = F.cross_entropy(scores[0], (ratings - 1).long(), reduction="none")
    assert torch.allclose(rating_losses("binned", scores[0], ratings, values), expected)
    soft = F.cross_entropy(scores[0], gaussian_bins(ratings, values), reduction="none")
    assert torch.allclose(rating_losses("hl-gauss", scores[0], ratings, values), soft)


@pytest.mark.parametrize("loss", RATING_LOSSES)
def test_gradients_are_those_of_finite_differences(loss):
    scores, ratings = scored(loss)
    values = torch.tensor(VALUES, dtype=DOUBLE)
    losses = lambda x: rating_losses(loss, x, ratings, values).sum()  # noqa: E731
    assert torch.autograd.gradcheck(losses, scores.requires_grad_())


def test_the_ordinal_losses_minimum_is_the_distribution():
    """Trained to convergence, an ordinal head gives the shares of the ratings in the data."""
    ratings = torch.tensor([1.0] * 5 + [2.0] * 1 + [3.0] * 2 + [4.0] * 2, dtype=DOUBLE)
    scores = torch.zeros(1, 3, dtype=DOUBLE, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = rating_losses(
            "ordinal", scores.expand(10, 3), ratings, torch.tensor(VALUES, dtype=DOUBLE)
        ).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert scores.sigmoid()[0].tolist() == pytest.approx([0.5, 0.4, 0.2], abs=1e-4)


# --- batches


TOKENIZER = Tokenizer.byte()
END = TOKENIZER.special_id("<|end|>")


def pairs(count=6, margins=True):
    """Pairs of different lengths; chosen and rejected completions have different letters."""
    made = []
    for i in range(count):
        prompt = [Message("user", "Why?" * (1 + i % 3))]
        sides = [
            render_completion(TOKENIZER, prompt, [Message("assistant", letter * (2 + n))])
            for letter, n in (("a", i), ("b", count - i))
        ]
        made.append(PreferenceExample(tuple(sides), float(i % 3) if margins else 0.0))
    return made


def rated(count=6):
    return [
        PreferenceExample(
            (
                render_completion(
                    TOKENIZER, [Message("user", "?")], [Message("assistant", "ab"[: 1 + i % 2])]
                ),
            ),
            VALUES[i % 4],
        )
        for i in range(count)
    ]


def reward_model(head, seed=1, **changes):
    model = RewardModel(ModelConfig(**(SIZES | changes)), head)
    initialise(model, seed)
    initialise_heads(model, seed)
    with torch.no_grad():
        model.embedding *= 20
    return model.eval()


def check_the_end_is_read(collate):
    """Replacing the end marker changes the reward of every completion."""
    model = reward_model(RewardConfig())

    def score(records):
        batch = collate(records)
        return model.score(batch.ids, batch.mask, batch.prompt_lengths)

    def without(record):
        return Example([*record.ids[:-1], 0], record.loss_mask)

    known = pairs()
    assert all(side.ids[-1] == END for pair in known for side in pair.completions)
    cut = [replace(pair, completions=tuple(map(without, pair.completions))) for pair in known]
    assert ((score(known) - score(cut)).abs() > 1e-3).all()


@torch.no_grad()
def test_the_end_marker_is_the_last_token_read():
    check_the_end_is_read(collate)

    def inputs_of_prediction(records):
        """The inputs of next-token prediction, where the last token is only a target."""
        batch = collate(records)
        lengths = batch.mask.sum(dim=-1, keepdim=True) - 1
        return replace(batch, mask=torch.arange(batch.ids.shape[1]) < lengths)

    fails(check_the_end_is_read, inputs_of_prediction)


def test_a_batch_holds_each_answer_whole():
    known = pairs()
    batch = collate(known)
    sides = [pair.completions[number] for number in (0, 1) for pair in known]
    for row, record in enumerate(sides):
        assert batch.ids[row][batch.mask[row]].tolist() == record.ids
        assert batch.mask[row].tolist() == sorted(batch.mask[row].tolist(), reverse=True)
        prompt = record.ids[: int(batch.prompt_lengths[row])]
        assert not any(record.loss_mask[: len(prompt)])
        assert record.loss_mask[len(prompt)]
    assert batch.labels.tolist() == [pair.label for pair in known]
    assert collate(rated()).labels.tolist() == [rating.label for rating in rated()]


def check_chosen_comes_first(collate):
    batch = collate(pairs())
    chosen, rejected = batch.ids.chunk(2)
    assert (chosen == ord("a")).any(dim=-1).all()
    assert (rejected == ord("b")).any(dim=-1).all()


def test_the_chosen_half_comes_first():
    check_chosen_comes_first(collate)

    def swapped(known):
        return collate([replace(p, completions=p.completions[::-1]) for p in known])

    fails(check_chosen_comes_first, swapped)


def test_answers_that_do_not_fit_are_counted():
    given = [
        Rating((Message("user", "?"),), (Message("assistant", "a" * n),), "", n) for n in (1, 30)
    ]
    given = ReadResult(given, {})
    fitting, unused = to_examples(TOKENIZER, given, 12)[:2]
    assert [rating.label for rating in fitting] == [1.0]
    assert unused == {"longer than 12 tokens, see --sequence-length": 1}
    longest = len(fitting[0].completions[0].ids)
    assert len(to_examples(TOKENIZER, given, longest).items) == 1
    assert to_examples(TOKENIZER, given, longest - 1).items == []


def test_the_loader_gives_the_same_ratings_after_a_stop():
    loader = preference_loader(rated(), rows=2, seed=3, collate=collate)
    next(loader)
    state = loader.state_dict()
    expected = [next(loader).labels.tolist() for _ in range(4)]
    again = preference_loader(rated(), rows=2, seed=3, collate=collate)
    again.load_state_dict(state)
    assert [next(again).labels.tolist() for _ in range(4)] == expected


# --- the objective


OPTIONS = {"bradley-terry": {"centring_coef": 0.1, "margin_scale": 0.5}}
"""Options that only these losses read."""


def everything(loss, **changes):
    how = settings(loss, **changes)
    known = pairs() if how.reads_pairs else rated()
    ratings = [] if how.reads_pairs else VALUES
    return RewardObjective(how), reward_model(choose_head(how, ratings)), known


@pytest.mark.parametrize("loss", ["bradley-terry", *RATING_LOSSES])
def test_microbatches_of_ragged_judgements_are_one_batch(loss):
    objective, model, known = everything(loss, ensemble_size=2, **OPTIONS.get(loss, {}))

    def gradients(cuts):
        model.zero_grad()
        for group in cuts:
            batch = collate(group)
            assert objective.count(batch) == len(group)
            (objective.loss(model, batch)[0] / len(known)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradients([known])
    assert whole.abs().max() > 1e-4
    assert torch.allclose(whole, gradients([known[:1], known[1:4], known[4:]]), atol=1e-5)


def check_rises(objective, collate):
    """Training steps make every chosen reward larger than the rejected one."""
    model = reward_model(RewardConfig())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (objective.loss(model, collate(pairs(margins=False)))[0] / 6).backward()
        optimizer.step()
    batch = collate(pairs())
    chosen, rejected = model.value(batch.ids, batch.mask, batch.prompt_lengths).chunk(2)
    letters = [("a" in bytes(i for i in row if i < 256).decode()) for row in batch.ids.tolist()]
    sign = 1 if letters[0] else -1
    assert (sign * (chosen - rejected) > 0).all()


def test_steps_raise_the_chosen_answers():
    objective = RewardObjective(settings())
    check_rises(objective, collate)

    def swapped(batch: ScoreBatch) -> ScoreBatch:
        return replace(batch, ids=batch.ids.roll(6, 0), mask=batch.mask.roll(6, 0))

    class Swapped(RewardObjective):
        def loss(self, model, batch, /):
            return super().loss(model, swapped(batch))

    fails(check_rises, Swapped(settings()), collate)


def check_margins_push_apart(objective_of):
    """A margin increases the gradient at equal rewards."""
    model = reward_model(RewardConfig())

    def steepness(margin):
        model.zero_grad()
        known = [replace(pair, label=margin) for pair in pairs()]
        objective_of(settings(margin_scale=1.0)).loss(model, collate(known))[0].backward()
        return model.reward_head.grad.norm()

    with torch.no_grad():
        model.reward_head *= 1e-4
    assert steepness(2.0) > 1.2 * steepness(0.0)


def test_a_larger_margin_pulls_harder():
    check_margins_push_apart(RewardObjective)

    def wrong_sign(how):
        object.__setattr__(how, "margin_scale", -how.margin_scale)
        return RewardObjective(how)

    fails(check_margins_push_apart, wrong_sign)


@torch.no_grad()
def test_margins_are_off_by_default():
    model, objective = reward_model(RewardConfig()), RewardObjective(settings())
    with_margins = objective.loss(model, collate(pairs()))[0]
    assert torch.equal(with_margins, objective.loss(model, collate(pairs(margins=False)))[0])


@torch.no_grad()
def test_each_member_has_the_loss_of_a_model_of_its_own():
    objective, model, known = everything("bradley-terry", ensemble_size=3)
    alone = []
    for head in model.reward_head:
        single = reward_model(RewardConfig())
        single.load_state_dict(model.state_dict() | {"reward_head": head[None]})
        alone.append(objective.loss(single, collate(known))[0].item())
    together, metrics = objective.loss(model, collate(known))
    assert together.item() == pytest.approx(sum(alone) / 3, rel=1e-5)
    batch = collate(known)
    spread = model.spread(batch.ids, batch.mask, batch.prompt_lengths)
    assert metrics["spread"] / len(known) == pytest.approx(spread.mean().item(), rel=1e-5)


# --- which head


def test_heads_follow_the_loss_and_the_ratings():
    assert choose_head(settings(ensemble_size=2), []) == RewardConfig(members=2)
    assert choose_head(settings("regression"), [0.5, 2.0]) == RewardConfig(bias=True)
    assert choose_head(settings("binned"), [5.0, 1.0, 2.0]).values == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert choose_head(settings("ordinal", bins=3), [0.0, 0.5, 1.0]).values == (0.0, 0.5, 1.0)
    gauss = choose_head(settings("hl-gauss"), [0.0, 0.3, 1.0])
    assert (gauss.kind, len(gauss.values), gauss.values[-1]) == ("binned", 21, 1.0)
    known = RewardConfig("binned", (1.0, 2.0), read="mean", marks=True)
    assert choose_head(settings("binned"), [1.0, 2.0], known) is known


@pytest.mark.parametrize(
    ("loss", "ratings", "known", "says"),
    [
        ("binned", [1.0, 2.5, 4.0], RewardConfig("binned", (1.0, 2.0)), "rating 2.5 is none of"),
        ("hl-gauss", [1.0, 9.0], RewardConfig("binned", (1.0, 2.0)), "rating 9 is none of"),
        ("ordinal", [0.0, 0.33, 1.0], None, "rating 0.33 is none of the 2 values from 0 to 1"),
        ("binned", [0.0, 1e6], None, "give 1000001 bins; set --bins"),
        ("binned", [2.0, 2.0], None, "all 2 ratings are 2"),
        ("regression", [2.0, 2.0], None, "all 2 ratings are 2"),
    ],
)
def test_ratings_that_no_head_can_learn(loss, ratings, known, says):
    with pytest.raises(DataError, match=says):
        choose_head(settings(loss), ratings, known)


def test_a_loss_that_does_not_suit_the_head_is_refused():
    with pytest.raises(
        SettingsError, match=r"--loss ordinal: trains ordinal heads, but --init has a scalar head"
    ):
        choose_head(settings("ordinal"), VALUES, RewardConfig())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ensemble_size": 0}, "--ensemble-size 0: must be 1 to 64"),
        ({"margin_scale": -1.0}, "--margin-scale -1.0: must be 0 or more"),
        ({"centring_coef": math.nan}, "--centring-coef nan: must be 0 or more"),
        ({"loss": "binned", "bins": 1}, "--bins 1: must be 2 to"),
    ],
)
def test_settings_out_of_range(changes, says):
    with pytest.raises(SettingsError, match=re.escape(says)):
        settings(**changes)
