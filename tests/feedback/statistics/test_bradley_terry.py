"""Bradley-Terry against a published example, closed forms and simulated truth."""

import json
import math

import numpy as np
import pytest

from openpalm.feedback.statistics.board import Comparison
from openpalm.feedback.statistics.bradley_terry import fit

# Agresti 2002, "Categorical Data Analysis", table 10.10: wins of the row's team in 1987.
TEAMS = ["Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore"]
WINS = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]
PUBLISHED = [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0]
"""BradleyTerry2's vignette (Turner and Firth 2012), less Baltimore"""


def season():
    return [
        Comparison(TEAMS[i], TEAMS[j], "a", WINS[i][j])
        for i in range(7)
        for j in range(7)
        if i != j
    ]


def strengths(board):
    return {one.model: one.value for one in board.strengths}


def test_the_published_season():
    found = strengths(fit(season()))
    assert [found[team] - found["Baltimore"] for team in TEAMS] == pytest.approx(
        PUBLISHED, abs=5e-5
    )
    assert sum(found.values()) == pytest.approx(0)


def test_a_sum_is_its_single_comparisons():
    single = [row._replace(number=1) for row in season() for _ in range(int(row.number))]
    one, many = fit(season()), fit(single)
    assert one.clusters == many.clusters == sum(map(sum, WINS))
    for a, b in zip(one.strengths, many.strengths, strict=True):
        assert (a.model, a.comparisons) == (b.model, b.comparisons)
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))


def test_swapped_sides_change_nothing():
    rows = [
        Comparison("x", "y", "a", 12, (0.5,)),
        Comparison("x", "y", "b", 7, (-0.2,)),
        Comparison("z", "y", "tie", 5, (0.1,)),
        Comparison("z", "x", "b", 5, (-0.7,)),
        Comparison("z", "x", "a", 5, (0.3,)),
    ]
    other = {"a": "b", "b": "a"}
    swapped = [
        Comparison(r.b, r.a, other.get(r.outcome, r.outcome), r.number, (-r.style[0],))
        for r in rows
    ]
    one, two = (fit(each, style_features=["length"]) for each in (rows, swapped))
    assert strengths(one) == pytest.approx(strengths(two))
    assert one.style[0].value == pytest.approx(two.style[0].value)
    assert one.win_probability("x", "z") == pytest.approx(two.win_probability("x", "z"))


def test_two_models_in_closed_form():
    """The log-odds of 30 : 20 with the variance 1/30 + 1/20, corrected for 50 clusters."""
    board = fit([Comparison("x", "y", "a", 30), Comparison("x", "y", "b", 20)])
    assert board["x"].value - board["y"].value == pytest.approx(math.log(30 / 20))
    half = 2.00958 * math.sqrt((1 / 30 + 1 / 20) * 50 / 49)  # t with 49 degrees of freedom
    low, high = (1 / (1 + math.exp(-(math.log(1.5) + side * half))) for side in (-1, 1))
    assert board.win_probability("x", "y") == pytest.approx((0.6, low, high), abs=1e-5)
    assert board.win_probability("y", "x") == pytest.approx((0.4, 1 - high, 1 - low), abs=1e-5)


VOTES = [("a", 30), ("b", 20), ("tie", 8), ("both_bad", 12)]


@pytest.mark.parametrize(
    ("ties", "both_bad", "odds"),
    [
        ("half", "as_tie", 40 / 30),
        ("half", "leave_out", 34 / 24),
        ("leave_out", "as_tie", 30 / 20),
        ("davidson", "as_tie", 30 / 20),
    ],
)
def test_what_is_done_with_ties(ties, both_bad, odds):
    rows = [Comparison("x", "y", outcome, number) for outcome, number in VOTES]
    board = fit(rows, ties=ties, both_bad=both_bad)
    assert board["x"].value - board["y"].value == pytest.approx(math.log(odds))
    assert board.outcomes == dict(VOTES), "all are counted, each by itself"
    assert (board.ties, board.both_bad) == (ties, both_bad)


def test_davidson_in_closed_form():
    """Two models and three outcomes: the fitted probabilities are the shares."""
    rows = [Comparison("x", "y", outcome, number) for outcome, number in VOTES]
    board = fit(rows, ties="davidson")
    assert math.exp(board.tie_parameter) == pytest.approx(20 / math.sqrt(30 * 20))
    assert board.win_probability("x", "y").value == pytest.approx((30 + 10) / 70)
    only_ties = fit([Comparison("x", "y", "tie", 5)], ties="davidson")
    assert only_ties.tie_parameter is None
    assert "needs ties and decided" in only_ties.notes[0]


def test_models_never_compared_are_said_to_be():
    rows = [Comparison("a", "b", outcome, 5) for outcome in ("a", "b")] + [
        Comparison(x, y, "tie", 2) for x, y in [("p", "q"), ("q", "r")]
    ]
    board = fit(rows)
    assert [(one.model, one.group) for one in board.strengths][:1] == [("p", 1)]
    assert board.win_probability("a", "p") is None
    assert board.win_probability("p", "r").value == pytest.approx(0.5)
    assert board.notes == ("Groups never compared with each other: a, b; p, q, r.",)
    assert strengths(fit(rows[:2])) == pytest.approx(
        {model: strengths(board)[model] for model in "ab"}
    )


def test_a_model_that_never_lost_is_said_to_be():
    rows = [
        Comparison("best", "x", "a", 10),
        Comparison("x", "y", "a", 6),
        Comparison("x", "y", "b", 4),
    ]
    board = fit(rows)
    assert not board["best"].bounded
    assert "best never lost to the others, x, y never won against them" in board.notes[0]
    # One tie is half a win of each side: 10.5 to 0.5.
    assert board["best"].value - board["x"].value == pytest.approx(math.log(10.5 / 0.5))
    assert board["x"].value - board["y"].value == pytest.approx(math.log(6 / 4))
    assert board["best"].high - board["best"].low > 2, "ten wins do not make it precise"
    assert all(one.bounded for one in fit(season()).strengths)


def test_nothing_usable():
    assert fit([]).strengths == ()
    board = fit([Comparison("x", "y", "tie", 9)], ties="leave_out")
    assert [(one.low, one.high) for one in board.strengths] == [(None, None)] * 2
    assert board.win_probability("x", "y") is None
    alone = fit([Comparison("x", "y", o, 5, prompt="p") for o in ("a", "b")])
    assert alone["x"].low is None, "one prompt gives no interval"


def test_a_model_of_few_prompts_has_a_wide_interval_or_none():
    """Many labelers of one prompt say nothing about other prompts."""
    rows = [Comparison("x", "y", outcome, 2, prompt=n) for n in range(40) for outcome in ("a", "b")]
    new = [Comparison("new", "x", outcome, 30, prompt=0) for outcome in ("a", "a", "b")]
    board = fit(rows + new)
    assert board["new"].clusters == 1
    assert (board["new"].low, board.win_probability("new", "x")) == (None, None)
    assert board["x"].low is not None
    second = [row._replace(prompt=1, number=25) for row in new]
    two = fit(rows + new + second)
    assert two["new"].clusters == 2
    assert two.clusters == 40
    assert two["x"].clusters == 40


def arena(
    generator, *, prompts=150, votes=4, models=4, style=0.0, shared=0.0, labelers=0, mood=0.0
):
    """Votes with known strengths 0.6, 0.2, -0.2, -0.6 and what makes them dependent.

    shared: standard deviation of what all votes of a prompt have in common; mood: of what all
    votes of a labeler have in common; the longer answer gains `style`.
    """
    models = 4
    true = np.linspace(0.6, -0.6, models)
    moods = generator.normal(size=(max(1, labelers), models)) * mood
    rows = []
    for prompt in range(prompts):
        i, j = generator.choice(models, 2, replace=False)
        common = generator.normal() * shared
        length = generator.normal() + 0.8 * (true[i] - true[j])
        for vote in range(votes):
            who = vote % labelers if labelers else 0
            d = true[i] - true[j] + common + style * length + moods[who, i] - moods[who, j]
            outcome = "a" if generator.random() < 1 / (1 + math.exp(-d)) else "b"
            given = (length,) if style else ()
            rows.append(Comparison(f"m{i}", f"m{j}", outcome, 1, given, prompt, who))
    return rows


def coverage(boards, true, a="m0", b="m3"):
    found = [board.win_probability(a, b) for board in boards]
    return np.mean([one.low <= true <= one.high for one in found])


def population(**settings):
    """The value that the estimator tends to with unlimited prompts."""
    rows = arena(np.random.default_rng(9), prompts=8000, votes=1, **settings)
    return fit(rows).win_probability("m0", "m3").value


def test_intervals_cover_when_votes_share_a_prompt():
    generator = np.random.default_rng(0)
    true = population(shared=1.0)
    drawn = [arena(generator, prompts=70, votes=4, shared=1.0) for _ in range(120)]
    assert 0.9 <= coverage([fit(rows) for rows in drawn], true) <= 0.985
    independent = [fit([row._replace(prompt=None) for row in rows]) for rows in drawn]
    assert coverage(independent, true) < 0.9, "as if each vote had its own prompt: too sure"


def test_intervals_cover_other_labelers_when_asked():
    generator = np.random.default_rng(1)
    drawn = [arena(generator, labelers=8, votes=8, prompts=30, mood=0.7) for _ in range(100)]
    true = np.median([fit(rows).win_probability("m0", "m3").value for rows in drawn])
    both = [fit(rows, cluster_labelers=True) for rows in drawn]
    assert coverage(both, true) >= 0.9
    assert coverage([fit(rows) for rows in drawn], true) < 0.86
    assert both[0].clusters == 8
    one = fit([row._replace(labeler="ann") for row in drawn[0]], cluster_labelers=True)
    assert "One labeler" in one.notes[0]


def test_style_control_finds_the_substance():
    """The strong models write more; without control their length counts as strength."""
    generator = np.random.default_rng(2)
    rows = arena(generator, prompts=5000, votes=1, style=0.9)
    board = fit(rows, style_features=["length"])
    plain = fit([row._replace(style=()) for row in rows])
    true = np.linspace(0.6, -0.6, 4)
    assert [board[f"m{i}"].value for i in range(4)] == pytest.approx(true, abs=0.15)
    assert plain["m0"].value > 0.8
    (length,) = board.style
    # The coefficient is for one standard deviation of the difference.
    assert length.value / length.standard_deviation == pytest.approx(0.9, abs=0.07)
    assert length.low < 0.9 * length.standard_deviation < length.high


def test_intervals_of_style_cover():
    generator = np.random.default_rng(3)
    found = []
    for _ in range(150):
        rows = arena(generator, prompts=120, votes=1, style=0.5)
        (length,) = fit(rows, style_features=["length"]).style
        found.append(length.low <= 0.5 * length.standard_deviation <= length.high)
    assert 0.9 <= np.mean(found) <= 0.985


def test_style_that_cannot_be_told_from_the_models():
    rows = [Comparison("x", "y", o, 5, (1.0, 0.0)) for o in ("a", "a", "b")]
    board = fit(rows, style_features=["length", "bold"])
    assert [one.feature for one in board.style] == ["length"]
    assert board.notes[0] == "No difference in bold: not controlled for."
    assert "cannot be told apart: x, y, length" in board.notes[1]
    assert (board["x"].low, board.style[0].low) == (None, None)
    assert board.win_probability("x", "y") is None


def test_style_that_explains_everything_is_held():
    rows = [Comparison("x", "y", "a", 5, (n / 4,)) for n in (1, 2, 3)]
    rows += [Comparison("x", "y", "b", 5, (-n / 4,)) for n in (1, 2, 3)]
    board = fit(rows, style_features=["length"])
    assert board.converged
    assert "Style separates" in board.notes[0]
    assert 1 < board.style[0].value < 20


def test_the_maximum_is_one():
    """At the maximum nothing can be gained by moving any parameter, with ties and style."""
    generator = np.random.default_rng(4)
    rows = [
        row if n % 3 else row._replace(outcome="tie")
        for n, row in enumerate(arena(generator, prompts=300, votes=1, style=0.4))
    ]

    def likelihood(values, length, tie):
        total = 0.0
        for row in rows:
            d = values[row.a] - values[row.b] + length * row.style[0]
            weights = {"a": math.exp(d / 2), "b": math.exp(-d / 2), "tie": math.exp(tie)}
            total += math.log(weights[row.outcome] / sum(weights.values()))
        return total

    board = fit(rows, style_features=["length"], ties="davidson")
    values = strengths(board)
    length = board.style[0].value / board.style[0].standard_deviation
    best = likelihood(values, length, board.tie_parameter)
    for step in (-0.01, 0.01):
        assert likelihood(values, length + step, board.tie_parameter) < best
        assert likelihood(values, length, board.tie_parameter + step) < best
        for model in values:
            moved = values | {model: values[model] + step}
            assert likelihood(moved, length, board.tie_parameter) < best


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="with itself"):
        fit([Comparison("x", "x", "a")])
    with pytest.raises(ValueError, match="'left'; it must be one of a, b, tie, both_bad"):
        fit([Comparison("x", "y", "left")])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a value for each of"):
        fit([Comparison("x", "y", "a")], style_features=["length"])


def test_the_board_is_json():
    stored = json.loads(json.dumps(fit(season()).to_json(), allow_nan=False))
    assert stored["strengths"][0]["model"] == "Milwaukee"
    pair = next(row for row in stored["win_probabilities"] if row[:2] == ["Detroit", "Boston"])
    assert pair[2] == pytest.approx(1 / (1 + math.exp(1.1077 - 1.4364)), abs=1e-4)
