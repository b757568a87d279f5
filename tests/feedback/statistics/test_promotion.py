"""The rule of promotion against closed forms and simulated challengers."""

import json
import math

import numpy as np
import pytest

from openpalm.feedback.statistics.intervals import wilson
from openpalm.feedback.statistics.promotion import (
    Vote,
    comparisons_needed,
    decide,
    level_of_look,
    position_bias,
    win_rate,
)


def votes_of(wins=0, losses=0, ties=0, both_bad=0, **settings):
    numbers = {"win": wins, "loss": losses, "tie": ties, "both_bad": both_bad}
    outcomes = [outcome for outcome, number in numbers.items() for _ in range(number)]
    return [Vote(n, outcome, n % 2 == 0, **settings) for n, outcome in enumerate(outcomes)]


def test_the_win_rate_without_ties_is_wilsons():
    assert win_rate(votes_of(130, 70)) == pytest.approx(wilson(130, 200))
    assert win_rate([]) is None


def test_ties_and_both_bad_count_half():
    found = win_rate(votes_of(100, 60, 30, 10))
    assert found.value == pytest.approx(0.6)
    plain = wilson(120, 200)
    assert plain.low < found.low < found.value, "ties vary less than wins and losses"


def test_more_labelers_of_one_prompt_are_no_more_prompts():
    votes = votes_of(130, 70)
    found = decide(votes * 3)
    assert (found.comparisons, found.judgements) == (200, 600)
    assert found.win_rate == pytest.approx(win_rate(votes))
    assert decide(votes_of(60, 40) * 3).verdict == "more_needed", "100 prompts are not 200"


@pytest.mark.parametrize(
    ("wins", "losses", "verdict", "further", "reason"),
    [
        (0, 0, "more_needed", 200, "0 of at least 200 comparisons; 200 more are needed."),
        (100, 0, "more_needed", 100, "100 of at least 200"),
        (130, 70, "promote", 0, "Better: the challenger wins 65.0% (58.2% to 71.3%) of 200"),
        (113, 87, "more_needed", 98, "Undecided: the challenger wins 56.5%"),
        (100, 100, "refuse", None, "Not better: the challenger wins 50.0%"),
        (60, 140, "refuse", None, "Not better"),
    ],
)
def test_the_verdict(wins, losses, verdict, further, reason):
    found = decide(votes_of(wins, losses))
    assert (found.verdict, found.further) == (verdict, further)
    assert found.reason.startswith(reason)
    assert "\n" not in found.reason
    json.dumps(found.to_json(), allow_nan=False)


def test_the_lower_end_decides():
    """Of 200 comparisons 114 wins pass and 113 do not: (0.57 - 0.5) sqrt(200) / 0.5 = 1.98."""
    assert wilson(113, 200).low < 0.5 < wilson(114, 200).low
    for wins in range(105, 125):
        promoted = decide(votes_of(wins, 200 - wins)).verdict == "promote"
        assert promoted == (wilson(wins, 200).low > 0.5)


@pytest.mark.parametrize("share", [0.51, 0.55, 0.6, 0.8])
def test_the_number_needed_is_the_first_that_passes(share):
    """Found by trying every number."""
    votes = votes_of(round(100 * share), 100 - round(100 * share))
    tried = next(n for n in range(1, 100_000) if wilson(share * n, n).low > 0.5)
    assert comparisons_needed(votes, minimum=1) == tried
    assert comparisons_needed(votes) == max(200, tried)
    assert comparisons_needed(votes_of(50, 50)) is None
    assert comparisons_needed([]) == 200


def test_ties_lower_the_number_needed():
    some = comparisons_needed(votes_of(50, 40, 110), minimum=1)
    none = comparisons_needed(votes_of(105, 95), minimum=1)
    assert some < none, "the same rate with less variation"


def test_later_looks_are_stricter():
    assert [level_of_look(n) for n in (1, 2, 3)] == pytest.approx([0.95, 0.975, 0.9875])
    votes = votes_of(115, 85)
    first, second = decide(votes), decide(votes, look=2)
    assert (first.verdict, second.verdict) == ("promote", "more_needed")
    assert first.win_rate == second.win_rate, "the page shows 95 % at every look"
    with pytest.raises(ValueError, match="numbered from 1"):
        level_of_look(0)


def test_an_equal_model_is_rarely_promoted_however_often_it_is_looked_at():
    """Ten looks, after 200, 400 ... 2000 comparisons; all lower ends above 1/2 count."""
    numbers = np.arange(200, 2001, 200)
    wins = np.random.default_rng(0).binomial(200, 0.5, (2000, 10)).cumsum(axis=1)
    promoted = naive = 0
    for row in wins.tolist():
        looks = list(enumerate(zip(row, numbers.tolist(), strict=True), start=1))
        promoted += any(wilson(won, n, level_of_look(look)).low > 0.5 for look, (won, n) in looks)
        naive += any(wilson(won, n).low > 0.5 for _, (won, n) in looks)
    assert promoted / 2000 < 0.05
    assert naive / 2000 > 0.08


def test_a_planned_number_suffices_about_half_of_the_time():
    """What comparisons_needed says of itself."""
    generator = np.random.default_rng(1)
    needed = comparisons_needed(votes_of(58, 42), minimum=1)
    passed = [wilson(generator.binomial(needed, 0.58), needed).low > 0.5 for _ in range(2000)]
    assert np.mean(passed) == pytest.approx(0.5, abs=0.08)


def test_position_bias():
    votes = [Vote(n, "win" if n % 2 == 0 else "loss", n % 2 == 0) for n in range(200)]
    assert position_bias(votes) == pytest.approx(wilson(200, 200)), "always the left"
    found = decide(votes)
    assert (found.win_rate.value, found.left_share.value) == (0.5, 1)
    assert "prefer the left side: 100.0%" in found.warnings[0]
    right = decide([vote._replace(challenger_left=not vote.challenger_left) for vote in votes])
    assert "prefer the right side" in right.warnings[0]
    assert position_bias(votes_of(ties=3)) is None
    assert decide(votes_of(130, 70)).warnings == ()


def test_sides_that_are_not_random_are_said_to_be():
    votes = [vote._replace(challenger_left=True) for vote in votes_of(100, 100)]
    found = decide(votes)
    assert found.challenger_left_share == 1
    assert any("sides must be random" in warning for warning in found.warnings)


def longer(generator, *, quality, length, number=600):
    """Challenger answers that are longer; votes follow quality and length."""
    votes = []
    for n in range(number):
        difference = generator.normal(0.3, 0.3)
        d = quality + length * difference
        won = generator.random() < 1 / (1 + math.exp(-d))
        votes.append(Vote(n, "win" if won else "loss", n % 2 == 0, style=(difference,)))
    return votes


def test_no_promotion_is_won_by_length():
    votes = longer(np.random.default_rng(0), quality=-0.3, length=3.0)
    assert decide(votes).verdict == "promote", "without the control it would be"
    found = decide(votes, style_features=["length"])
    assert found.verdict == "refuse"
    assert found.reason.startswith("Won by style")
    assert found.at_equal_style.low <= 1 / (1 + math.exp(0.3)) <= found.at_equal_style.high


def test_quality_is_promoted_with_the_control():
    votes = longer(np.random.default_rng(1), quality=0.8, length=1.0)
    found = decide(votes, style_features=["length"])
    assert found.verdict == "promote"
    assert found.at_equal_style.value == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.06)


def test_style_that_cannot_be_told_from_the_model_is_warned_of():
    found = decide(votes_of(130, 70, style=(0.5,)), style_features=["length"])
    assert found.at_equal_style is None
    assert "cannot be determined" in found.warnings[0]
    doubtful = decide(
        longer(np.random.default_rng(3), quality=0.2, length=2.0), style_features=["length"]
    )
    assert any("style may explain" in warning for warning in doubtful.warnings)
    assert (found.verdict, doubtful.verdict) == ("more_needed", "more_needed")
    assert found.further is None, "more of the same answers tell nothing of style"
    assert "style so regularly" in found.reason
    assert f"about {doubtful.further} more" in doubtful.reason


def test_style_explains_no_wins_that_chance_explains():
    """Near one half the interval at equal style has one half in it whatever the style."""
    votes = [
        Vote(n, "win" if n < 111 else "loss", n % 2 == 0, style=(0.5 if n % 4 < 2 else -0.5,))
        for n in range(200)
    ]
    found = decide(votes, style_features=["length"])
    assert found.win_rate.low < 0.5 < found.at_equal_style.value
    assert found.at_equal_style.low < 0.5
    assert not found.warnings


def test_style_is_asked_about_after_the_minimum_only():
    few = decide(votes_of(65, 35, style=(0.5,)), style_features=["length"])
    assert (few.verdict, few.further) == ("more_needed", 100)
    assert few.reason.startswith("100 of at least 200")
    assert decide([], style_features=["length"]).further == 200


@pytest.mark.parametrize("look", [1, 2])
def test_the_number_needed_holds_at_equal_style_too(look):
    """The same votes of as many more prompts pass at the next look; one copy fewer does not."""
    votes = longer(np.random.default_rng(0), quality=0.3, length=2.0, number=300)
    found = decide(votes, style_features=["length"], look=look)
    assert (found.verdict, found.win_rate.low > 0.5) == ("more_needed", True)
    copies = math.ceil((300 + found.further) / 300)
    assert copies > 2
    for number, verdict in ((copies, "promote"), (copies - 1, "more_needed")):
        more = [vote._replace(prompt=(n, vote.prompt)) for n in range(number) for vote in votes]
        assert decide(more, style_features=["length"], look=look + 1).verdict == verdict


def test_a_later_look_is_stricter_at_equal_style_too():
    votes = next(
        tried
        for tried in (
            longer(np.random.default_rng(seed), quality=0.35, length=1.0, number=400)
            for seed in range(100)
        )
        if 0.5 < decide(tried, style_features=["length"]).at_equal_style.low < 0.505
    )
    assert decide(votes, style_features=["length"]).verdict == "promote"
    second = decide(votes, style_features=["length"], look=2)
    assert (second.verdict, second.further > 0) == ("more_needed", True)


def test_labelers_who_choose_by_length_alone_promote_one_in_forty_at_most():
    drawn = np.random.default_rng(5)
    tried = [longer(drawn, quality=0.0, length=3.0, number=300) for _ in range(200)]
    verdicts = [decide(votes, style_features=["length"]).verdict for votes in tried]
    assert verdicts.count("promote") / 200 < 0.06


def test_who_judged():
    with pytest.raises(ValueError, match="votes of a model"):
        decide([Vote(0, "win", True, "model")])
    with pytest.raises(ValueError, match="do not mix"):
        decide([Vote(0, "win", True), Vote(1, "win", True, "simulated")])
    with pytest.raises(ValueError, match="'draw'; it must be one of win"):
        decide([Vote(0, "draw", True)])  # type: ignore[arg-type]
    found = decide(votes_of(130, 70, author_kind="simulated"))
    assert found.judged_by == {"simulated": 200}
    assert found.warnings == ("Judged by simulated labelers, not by people.",)
