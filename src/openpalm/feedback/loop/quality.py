"""The pages of quality and of the board: how well labelers agree, which model is better."""

from collections.abc import Mapping, Sequence
from typing import Any

from django.http import HttpResponse
from django.views.decorators.http import require_GET

from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.judgements.words import AUTHORS
from openpalm.feedback.loop import plots
from openpalm.feedback.loop.figures import Figures, estimate, mapping, rows
from openpalm.feedback.loop.pages import page
from openpalm.feedback.models import Role, User
from openpalm.feedback.quality import names

LABELERS = 200
DAYS = 30
WHO = {kind: name.capitalize() for kind, name in AUTHORS.items()}
AGREEMENT = (
    ("raw", "raw agreement", "the same choice by two labelers of an item", 0.0),
    ("decided", "on pairs without a tie", "the ceiling of a reward model", 0.0),
    ("alpha", "Krippendorff's alpha", "1 perfect, 0 chance; low where one answer dominates", -1.0),
    (
        "gwet",
        "Gwet's AC1 or AC2",
        "agreement beyond guesses; holds where one answer dominates",
        -1.0,
    ),
)
OF_LABELER = ("gold", "self", "others", "left")
ROWS = (
    *(names.AGREEMENT, names.LABELERS, names.POSITION_BIAS, names.AI_JUDGES),
    *(names.TIME, names.CONSENSUS),
)


@require_GET
@project_page(Role.REVIEWER)
def quality(request: ProjectRequest) -> HttpResponse:
    figures = Figures(request.project, *ROWS)
    listed = rows(figures.value(names.LABELERS).get("rows"))
    groups = [_group(kind, figures, listed) for kind in WHO]
    return page(
        request,
        "quality",
        groups=[group for group in groups if group["agreement"] or group["labelers"]],
        computed_at=figures.computed_at,
        max_days=DAYS,
        in_loop=False,
    )


def _group(kind: str, figures: Figures, listed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is shown of people, of simulated labelers, or of models as judges."""
    counts = figures.of(names.AGREEMENT, kind)
    left = estimate(figures.of(names.POSITION_BIAS, kind).get("left"))
    people = estimate(figures.value(names.AI_JUDGES).get("people"))
    own = [labeler(row) for row in listed if row.get("author_kind") == kind]
    return {
        "kind": kind,
        "name": WHO[kind],
        # Models answer alike, so their agreement with each other says nothing.
        "agreement": agreement(counts) if kind != User.Kind.MODEL else [],
        "counts": counts,
        "parts": [
            {"name": part.get("name"), "left_out": part.get("left_out"), "bars": agreement(part)}
            for part in rows(counts.get("parts"))
        ],
        "left": plots.interval(left),
        "left_words": plots.in_words(left),
        "time": (time := figures.of(names.TIME, kind)),
        "days": rows(time.get("days"))[: -DAYS - 1 : -1],
        "consensus": figures.of(names.CONSENSUS, kind),
        "people": plots.in_words(people) if people else "",
        "labelers": own[:LABELERS],
        "hidden": max(0, len(own) - LABELERS),
    }


def agreement(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The measures that are defined, each with its picture."""
    return [
        {
            "name": name,
            "note": note,
            "words": plots.in_words(found, "%" if low == 0 else ""),
            "plot": plots.interval(found, low=low, references=[0.5 if low == 0 else 0.0]),
        }
        for key, name, note, low in AGREEMENT
        if (found := estimate(figure.get(key)))
    ]


def labeler(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {
        name: {
            "plot": plots.interval(estimate(row.get(name))),
            "words": plots.in_words(estimate(row.get(name))),
        }
        for name in OF_LABELER
        if estimate(row.get(name))
    }
    return {**row, **{name: cells.get(name) for name in OF_LABELER}}


@require_GET
@project_page(Role.REVIEWER)
def board(request: ProjectRequest) -> HttpResponse:
    """Strengths of models; people, simulated labelers and models as judges have one board each."""
    figures = Figures(request.project, names.BOARD)
    served = request.project.served.name if request.project.served else ""
    boards = [
        {
            "kind": kind,
            "name": WHO[kind],
            **shown_board(figures.of(names.BOARD, kind), served),
        }
        for kind in figures.kinds(names.BOARD)
    ]
    return page(
        request,
        "board",
        served=served,
        boards=[each for each in boards if each["groups"]],
        computed_at=figures.computed_at,
        in_loop=False,
    )


def shown_board(figure: Mapping[str, Any], served: str) -> dict[str, Any]:
    """The models of each group, plain and style-controlled strengths on one scale."""
    plain, styled = mapping(figure.get("plain")), mapping(figure.get("styled"))
    strengths = rows(plain.get("strengths"))
    at_equal_style = {row.get("model"): row for row in rows(styled.get("strengths"))}
    low, high = plots.span([*strengths, *at_equal_style.values()])
    ids = mapping(figure.get("ids"))
    wins = wins_against(plain, served)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in strengths:
        other = at_equal_style.get(row.get("model"))
        groups.setdefault(row.get("group"), []).append(
            {
                **row,
                "id": ids.get(str(row.get("model"))),
                "wins": wins.get(str(row.get("model")), ""),
                "plain": _strength(row, low, high),
                "styled": _strength(other, low, high),
            }
        )
    return {
        "groups": list(groups.values()),
        "has_wins": bool(wins),
        "style": [_coefficient(row) for row in rows(styled.get("style"))],
        "outcomes": mapping(plain.get("outcomes")),
        "notes": [*plain.get("notes", ()), *_only(styled.get("notes"), plain.get("notes"))],
        "one_model": figure.get("one_model"),
        "unknown": figure.get("unknown"),
    }


def wins_against(plain: Mapping[str, Any], served: str) -> dict[str, str]:
    """The expected score of each model against the served one, in words."""
    pairs = plain.get("win_probabilities")
    return {
        pair[0]: plots.in_words(dict(zip(("value", "low", "high"), pair[2:], strict=True)))
        for pair in (pairs if isinstance(pairs, list) else ())
        if len(pair) == 5 and pair[1] == served
    }


def _strength(row: Mapping[str, Any] | None, low: float, high: float) -> dict[str, Any] | None:
    if row is None:
        return None
    plot = plots.interval(row, low=low, high=high, references=[0.0], unit="")
    return {"plot": plot, "words": plots.in_words(row, "")}


def _coefficient(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"feature": row.get("feature"), "words": plots.in_words(row, "")}


def _only(notes: Any, other: Any) -> list[str]:
    return [note for note in notes or () if note not in (other or ())]
