"""The row "board": strengths of the project's models, with and without control of style."""

from typing import Any

import numpy as np

from openpalm.feedback.models import ModelVersion
from openpalm.feedback.quality.answer_table import UNKNOWN, AnswerTable
from openpalm.feedback.quality.pairs import JudgedPairs, judged_pairs
from openpalm.feedback.quality.response_table import ResponseTable
from openpalm.feedback.statistics import style
from openpalm.feedback.statistics.board import Comparisons
from openpalm.feedback.statistics.bradley_terry import fit


def board(table: ResponseTable, answers: AnswerTable, author_kind: str) -> dict[str, Any] | None:
    """The board of these labelers; None without a judgement of two different known models."""
    pairs = judged_pairs(table, answers, author_kind)
    a, b = answers.rows["model"][pairs.a], answers.rows["model"][pairs.b]
    number = pairs.outcomes.sum(axis=1)
    unknown = (a == UNKNOWN) | (b == UNKNOWN)
    compared = pairs.chosen(~unknown & (a != b))
    if not len(compared):
        return None
    names = dict(ModelVersion.objects.filter(project=table.project).values_list("id", "name"))
    rows = comparisons(compared, answers, names)
    ids = {name: model for model, name in names.items() if name in rows.models}
    return {
        "plain": fit(rows.without_style()).to_json(),
        "styled": fit(rows, style_features=style.FEATURES).to_json(),
        "ids": ids,
        "one_model": int(number[~unknown & (a == b)].sum()),
        "unknown": int(number[unknown].sum()),
    }


def comparisons(pairs: JudgedPairs, answers: AnswerTable, names: dict[int, str]) -> Comparisons:
    """A row for each outcome of each pair; the judgements of a prompt are a cluster."""
    sides = np.stack([answers.rows["model"][pairs.a], answers.rows["model"][pairs.b]])
    ids = sorted(np.unique(sides).tolist(), key=names.__getitem__)
    place = np.zeros(max(ids) + 1, np.intp)
    place[ids] = np.arange(len(ids))
    pair, outcome = np.nonzero(pairs.outcomes)
    difference = style.style_differences(answers.styles(pairs.a), answers.styles(pairs.b))
    return Comparisons(
        models=[names[pk] for pk in ids],
        a=place[sides[0]][pair],
        b=place[sides[1]][pair],
        outcome=outcome,
        number=pairs.outcomes[pair, outcome].astype(float),
        style=difference[pair],
        prompt=answers.rows["prompt"][pairs.a][pair],
        labeler=np.full(len(pair), -1),
    )
