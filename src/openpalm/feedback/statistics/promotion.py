"""The rule of promotion: may a challenger replace the served model?

It may if blind comparisons on held-out prompts, judged by people (or by simulated labelers in a
rehearsal, never by a model), number at least 200 and the 95 % interval of its win rate lies above
one half. A tie or "both bad" counts half. Several judgements of one prompt are averaged, so a
prompt counts once however many people judged it: agreement between labelers is no new evidence
about other prompts. If the styles are given, the interval of the win rate at equal style must lie
above one half too, so that no promotion is won by length. Where the data cannot separate style
from model, there is no such interval and no promotion.

Looking again after each new judgement until the interval happens to be above one half would
promote an equal model sooner or later. Each further look therefore uses half the error of the
one before: 95 %, 97.5 %, 98.75 %. A model that is no better is then promoted with a probability of
about 2.5 % by one look and below 5 % by any number of looks (union bound, as in alpha spending,
Lan and DeMets 1983).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from openpalm.feedback.statistics import board
from openpalm.feedback.statistics.board import Board, Comparison
from openpalm.feedback.statistics.bradley_terry import fit
from openpalm.feedback.statistics.intervals import (
    LEVEL,
    Estimate,
    normal_quantile,
    unit_means,
    wilson_of_means,
)

MINIMUM = 200
"""comparisons before any decision"""
Outcome = Literal["win", "loss", "tie", "both_bad"]
SCORES: dict[Outcome, float] = {"win": 1, "loss": 0, "tie": 0.5, "both_bad": 0.5}
_SIDES: dict[Outcome, board.Outcome] = {
    "win": "a",
    "loss": "b",
    "tie": "tie",
    "both_bad": "both_bad",
}
Verdict = Literal["promote", "refuse", "more_needed"]


class Vote(NamedTuple):
    """A blind judgement of the challenger against the served model."""

    prompt: Hashable
    outcome: Outcome
    """of the challenger"""
    challenger_left: bool
    """whether the challenger was shown on the left"""
    author_kind: Literal["person", "simulated", "model"] = "person"
    style: tuple[float, ...] = ()
    """style difference challenger - served, see style.style_difference"""


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    reason: str
    """one line for the page"""
    comparisons: int
    """prompts compared"""
    judgements: int
    further: int | None
    """comparisons still needed at the present rates; 0: enough; None: no number is known to do"""
    win_rate: Estimate | None
    """with the 95 % interval"""
    look: int
    deciding_level: float
    """level of the interval that decides at this look"""
    at_equal_style: Estimate | None
    """win rate if both models wrote alike; None: no styles given, or the data do not tell"""
    left_share: Estimate | None
    """share of decided judgements for the left side; 1/2 without position bias"""
    challenger_left_share: float | None
    outcomes: dict[str, int]
    judged_by: dict[str, int]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        for name in ("win_rate", "at_equal_style", "left_share"):
            plain[name] = plain[name] and plain[name]._asdict()
        return plain | {"warnings": list(self.warnings)}


def win_rate(votes: Sequence[Vote], level: float = LEVEL) -> Estimate | None:
    """Mean score of the challenger, each prompt counted once; Wilson interval over prompts.

    None without votes. With one judgement a prompt and no ties it is Wilson's interval of wins.
    """
    return wilson_of_means(_prompt_means(votes), level=level)


def _prompt_means(votes: Sequence[Vote]) -> np.ndarray:
    return unit_means((vote.prompt for vote in votes), (SCORES[vote.outcome] for vote in votes))


def position_bias(votes: Iterable[Vote], level: float = LEVEL) -> Estimate | None:
    """Share of decided judgements that chose the left side, each prompt counted once.

    None if nothing was decided. Sides are random, so a share away from 1/2 is a habit of the
    labelers; it adds noise to the win rate and pulls it towards 1/2, but favours no model.
    """
    decided = [vote for vote in votes if vote.outcome in ("win", "loss")]
    left = (float((vote.outcome == "win") == vote.challenger_left) for vote in decided)
    return wilson_of_means(unit_means((vote.prompt for vote in decided), left), level=level)


def board_at_equal_style(votes: Sequence[Vote], features: Sequence[str]) -> Board:
    """Bradley-Terry with the style differences as covariates.

    The challenger's win probability is then its expected score if both models wrote alike, as in
    length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475). It is None if the data
    cannot separate style from model, for example when the challenger is always longer by the same
    share.
    """
    rows = [
        Comparison("challenger", "served", _SIDES[v.outcome], 1, v.style, v.prompt) for v in votes
    ]
    return fit(rows, style_features=features)


def level_of_look(look: int) -> float:
    """Level of the interval that decides at the look with this number, from 1: 0.95, 0.975, ..."""
    if look < 1:
        raise ValueError(f"look is {look}; looks are numbered from 1")
    return 1 - (1 - LEVEL) / 2 ** (look - 1)


def comparisons_needed(
    votes: Sequence[Vote], *, minimum: int = MINIMUM, level: float = LEVEL
) -> int | None:
    """Total comparisons at which the interval's lower end passes 1/2 if the rate stays as it is.

    At least `minimum`; None if the rate is 1/2 or below. Solves Wilson's inequality
    (p - 1/2)^2 > z^2 / (4 n) for n, with the effective size of `wilson_of_means`. Chance moves
    the rate, so about half of the time more will be needed; plan with a margin.
    """
    means = _prompt_means(votes)
    if not len(means):
        return minimum
    rate = float(means.mean())
    if rate <= 0.5:
        return None
    variance, binomial = float(means.var()), rate * (1 - rate)
    # Effective comparisons for each comparison; 1 where nothing varies, as in the interval.
    efficiency = binomial / variance if variance > 1e-12 and binomial > 0 else 1.0
    effective = normal_quantile(level) ** 2 / (4 * (rate - 0.5) ** 2)
    return max(minimum, math.floor(effective / efficiency) + 1)


def decide(
    votes: Sequence[Vote],
    *,
    style_features: Sequence[str] = (),
    minimum: int = MINIMUM,
    look: int = 1,
) -> Decision:
    """Promote, refuse, or ask for more comparisons.

    promote: `minimum` comparisons, the deciding interval above 1/2, and that of the win rate at
    equal style too. refuse: `minimum` comparisons and a rate of at most 1/2, as judged or at equal
    style (then style explains the wins). more_needed: all else. `look` numbers the decisions with
    `minimum` comparisons about this challenger, this one included. Raises ValueError for a vote of
    a model, for people mixed with simulated labelers, and for an unknown outcome.
    """
    _check(votes)
    means = _prompt_means(votes)
    level = level_of_look(look)
    enough = len(means) >= minimum
    # Before the minimum nothing is decided, so the next look is still this one.
    next_level = level_of_look(look + 1) if enough else level
    rate, deciding = win_rate(votes), win_rate(votes, level)
    needed = comparisons_needed(votes, minimum=minimum, level=next_level)
    board = board_at_equal_style(votes, style_features) if style_features and votes else None
    styled, styled_deciding, styled_next = (
        board and board.win_probability("challenger", "served", each)
        for each in (LEVEL, level, next_level)
    )
    if needed is not None and styled_next is not None:
        needed = max(needed, _needed_at_equal_style(styled_next, len(means)))
    unknown_style = board is not None and styled is None
    verdict, reason = _verdict(
        len(means), minimum, deciding, styled_deciding, needed, unknown_style=unknown_style
    )
    left = position_bias(votes)
    shown_left = sum(vote.challenger_left for vote in votes) / len(votes) if votes else None
    return Decision(
        verdict=verdict,
        reason=reason,
        comparisons=len(means),
        judgements=len(votes),
        further=_further(verdict, None if enough and unknown_style else needed, len(means)),
        win_rate=rate,
        look=look,
        deciding_level=level,
        at_equal_style=styled,
        left_share=left,
        challenger_left_share=shown_left,
        outcomes=dict.fromkeys(SCORES, 0) | Counter(vote.outcome for vote in votes),
        judged_by=dict(Counter(vote.author_kind for vote in votes)),
        warnings=_warnings(votes, left, rate, styled, style_features),
    )


def _further(verdict: Verdict, needed: int | None, comparisons: int) -> int | None:
    if verdict == "promote":
        return 0
    return None if verdict == "refuse" or needed is None else max(0, needed - comparisons)


def _needed_at_equal_style(styled: Estimate, comparisons: int) -> int:
    """Total comparisons at which the styled interval passes 1/2 if the rate stays as it is.

    Its half width falls with the square root of their number. 0 if no number would do: then the
    rate at equal style refuses the challenger.
    """
    if styled.value <= 0.5:
        return 0
    return math.ceil(comparisons * ((styled.value - styled.low) / (styled.value - 0.5)) ** 2)


def _check(votes: Sequence[Vote]) -> None:
    kinds = {vote.author_kind for vote in votes}
    if "model" in kinds:
        raise ValueError("votes of a model do not decide promotion; give those of people only")
    if len(kinds) > 1:
        raise ValueError("people and simulated labelers do not mix; give the votes of one kind")
    for vote in votes:
        if vote.outcome not in SCORES:
            expected = ", ".join(get_args(Outcome))
            raise ValueError(f"outcome {vote.outcome!r}; it must be one of {expected}")


def _verdict(
    comparisons: int,
    minimum: int,
    deciding: Estimate | None,
    styled: Estimate | None,
    needed: int | None,
    *,
    unknown_style: bool,
) -> tuple[Verdict, str]:
    """The verdict and its reason in one line."""
    if deciding is None or comparisons < minimum:
        missing = minimum - comparisons
        return "more_needed", (
            f"{comparisons} of at least {minimum} comparisons; {missing} more are needed."
        )
    shown = f"the challenger wins {deciding.value:.1%} ({deciding.low:.1%} to {deciding.high:.1%})"
    if needed is None:
        return "refuse", f"Not better: {shown} of {comparisons} comparisons."
    if styled is not None and styled.value <= 0.5:
        return "refuse", (
            f"Won by style: {shown}, but only {styled.value:.1%} at equal length and style."
        )
    if unknown_style:
        return "more_needed", (
            f"Undecided: {shown}, but the answers of both models differ in style so regularly that "
            "its part in the wins is not known."
        )
    if deciding.low > 0.5 and styled is not None and styled.low <= 0.5:
        return "more_needed", (
            f"Undecided: {shown}, but {styled.value:.1%} ({styled.low:.1%} to {styled.high:.1%}) "
            "at equal length and style, which may explain the wins; about "
            f"{needed - comparisons} more comparisons are needed if the rate stays."
        )
    if deciding.low > 0.5:
        return "promote", f"Better: {shown} of {comparisons} comparisons."
    return "more_needed", (
        f"Undecided: {shown} of {comparisons} comparisons; about {needed - comparisons} more are "
        "needed if the rate stays."
    )


def _warnings(
    votes: Sequence[Vote],
    left: Estimate | None,
    rate: Estimate | None,
    styled: Estimate | None,
    features: Sequence[str],
) -> tuple[str, ...]:
    found = []
    if left is not None and not left.low <= 0.5 <= left.high:
        side = "left" if left.value > 0.5 else "right"
        found.append(
            f"Labelers prefer the {side} side: {left.value:.1%} of decided judgements are for the "
            "left."
        )
    sides = wilson_of_means([float(vote.challenger_left) for vote in votes])
    if sides is not None and not sides.low <= 0.5 <= sides.high:
        found.append(
            f"The challenger was on the left in {sides.value:.1%} of judgements; sides must be "
            "random."
        )
    if features and styled is None and votes:
        found.append("The win rate at equal style cannot be determined from these comparisons.")
    elif rate and styled and styled.low <= 0.5 < styled.value and rate.low > 0.5:
        found.append(
            f"At equal style the win rate is {styled.value:.1%} ({styled.low:.1%} to "
            f"{styled.high:.1%}): style may explain the wins."
        )
    if any(vote.author_kind == "simulated" for vote in votes):
        found.append("Judged by simulated labelers, not by people.")
    return tuple(found)
