"""The row "board": strengths of the project's models, with and without control of style."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from openpalm.feedback.models import ItemCandidate, ModelVersion, Project
from openpalm.feedback.quality.counted import CHUNK, KINDS, Outcomes, counted, pair_outcomes
from openpalm.feedback.statistics import style
from openpalm.feedback.statistics.board import OUTCOMES, Comparison
from openpalm.feedback.statistics.bradley_terry import fit


class Answer(NamedTuple):
    """A candidate of an item."""

    candidate: int
    model: int | None
    text: str


class JudgedItem(NamedTuple):
    item: int
    prompt: int
    answers: list[Answer]
    """by position"""
    pairs: dict[tuple[int, int], Outcomes]
    """outcomes by positions of the two answers"""


def judged_items(
    project: Project, author_kind: str, *, texts: bool, **items: Any
) -> Iterator[JudgedItem]:
    """The project's items with comparisons or rankings of these labelers, one at a time.

    `items` are conditions on the item. Without `texts` the answers' texts are empty.
    """
    kind = KINDS.get(project.task, "")
    found = counted(project, author_kind).filter(
        **{f"item__{name}": value for name, value in items.items()}
    )
    places = _places(project, texts, items)
    answers = groupby(places, key=lambda row: row[:2])
    for item, pairs in pair_outcomes(found, kind):
        # Both are in the order of the item's id; items without a judgement are passed over.
        for (place, prompt), rows in answers:
            if place == item:
                yield JudgedItem(item, prompt, [Answer(*row[2:]) for row in rows], pairs)
                break


def _places(project: Project, texts: bool, items: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    found = ItemCandidate.objects.filter(
        item__project=project, **{f"item__{name}": value for name, value in items.items()}
    ).order_by("item_id", "position")
    columns = ["item_id", "item__prompt_id", "candidate_id", "candidate__model_id"]
    if texts:
        yield from found.values_list(*columns, "candidate__text").iterator(chunk_size=CHUNK)
    else:
        for row in found.values_list(*columns).iterator(chunk_size=CHUNK):
            yield (*row, "")


def board(project: Project, author_kind: str) -> dict[str, Any] | None:
    """The board of these labelers; None without a judgement of two different known models."""
    names = dict(ModelVersion.objects.filter(project=project).values_list("id", "name"))
    counts = {"one_model": 0, "unknown": 0}
    rows = list(_comparisons(project, author_kind, names, counts))
    if not rows:
        return None
    plain = fit(row._replace(style=()) for row in rows)
    styled = fit(rows, style_features=style.FEATURES)
    present = {strength.model for strength in plain.strengths}
    ids = {name: model for model, name in names.items() if name in present}
    return {"plain": plain.to_json(), "styled": styled.to_json(), "ids": ids, **counts}


def _comparisons(
    project: Project, author_kind: str, names: dict[int, str], counts: dict[str, int]
) -> Iterator[Comparison]:
    """The sums of each item; `counts` collects what says nothing about two models."""
    for found in judged_items(project, author_kind, texts=True):
        for (i, j), outcomes in found.pairs.items():
            a, b = found.answers[i], found.answers[j]
            if a.model is None or b.model is None:
                counts["unknown"] += outcomes.total()
            elif a.model == b.model:
                counts["one_model"] += outcomes.total()
            else:
                difference = style.style_difference(style.style_of(a.text), style.style_of(b.text))
                for outcome in OUTCOMES:
                    if number := outcomes[outcome]:
                        yield Comparison(
                            names[a.model],
                            names[b.model],
                            outcome,
                            number,
                            difference,
                            found.prompt,
                        )
