"""Judging item by item: what has no judgement yet gets one, and each is a Preference record.

What a judgement is known by does not hang on the answers' being there: those of a model are drawn
when the first of their judgements is asked for.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal, NamedTuple

from openpalm.align.judging.best_of_n import SamplingPlan
from openpalm.align.judging.model_judge import (
    LABEL_TOKENS,
    LEAST_MASS,
    Judge,
    Refused,
    Unlikely,
    compared,
    comparison_questions,
    judgement_id,
    numbered_pairs,
    revision,
)
from openpalm.base.jsonl import JsonlWriter
from openpalm.data.rows.candidate_files import CandidateRow
from openpalm.data.rows.constitution import Constitution
from openpalm.data.rows.preferences import Candidate, Messages, Preference
from openpalm.data.rows.prompt_files import PromptRow
from openpalm.data.text.conversation import stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import WorkError, count_of
from openpalm.generate.engine import Engine

PROMPTS_AT_A_TIME = 8
"""Whose answers are drawn together."""
REFUSALS_AT_FIRST = 8
"""A judge that refuses this many items and judges none is not asked for the others."""


class Item(NamedTuple):
    """A prompt, what each of its answers is known by, and the answers, made when wanted."""

    prompt: Messages
    origins: Sequence[Any]
    candidates: Callable[[], Sequence[Candidate]]


class Writer(NamedTuple):
    """A model that answers, and how."""

    engine: Engine
    tokenizer: Tokenizer
    checkpoint: str
    """its digest"""
    draw: SamplingPlan

    @property
    def sampling(self) -> dict[str, float]:
        """As a candidate tells of it."""
        names = ("temperature", "seed", "max_new_tokens")
        return {name: getattr(self.draw, name) for name in names}


def given_items(rows: Sequence[CandidateRow]) -> list[Item]:
    """Answers that a file has, known by their texts."""
    return [
        Item(row.prompt, [c.text for c in row.candidates], lambda row=row: row.candidates)
        for row in rows
    ]


def drawn_items(
    writer: Writer, rows: Sequence[PromptRow], ids: Sequence[Sequence[int]]
) -> list[Item]:
    """Answers to prompts, known by the model, how it is sampled and their number.

    ids: of each row's prompt.
    """
    draw, sampling, stops = writer.draw, writer.sampling, stop_ids(writer.tokenizer)

    @cache
    def block(first: int) -> list[Candidate]:
        chosen = range(first, min(first + PROMPTS_AT_A_TIME, len(ids)))
        return [
            Candidate(
                writer.tokenizer.decode([i for i in answer.ids if i not in stops]),
                writer.checkpoint,
                sampling | {"draw": first * draw.each + n},
            )
            for n, answer in enumerate(draw.sample(writer.engine, ids, chosen, stops))
        ]

    def candidates(number: int) -> list[Candidate]:
        within = number % PROMPTS_AT_A_TIME
        start = within * draw.each
        return block(number - within)[start : start + draw.each]

    return [
        Item(
            row.prompt,
            [[writer.checkpoint, sampling, number * draw.each + n] for n in range(draw.each)],
            lambda number=number: candidates(number),
        )
        for number, row in enumerate(rows)
    ]


class JudgingSession:
    """A judge at work, whose records go to `file`; counts what it does.

    known: ids of the judgements that are there already.
    """

    def __init__(
        self,
        judge: Judge,
        constitution: Constitution,
        max_new_tokens: int,
        file: JsonlWriter,
        known: Iterable[str] = (),
    ):
        self.judge, self.constitution, self.max_new_tokens = judge, constitution, max_new_tokens
        self.file, self.known = file, {*known}
        self.written = self.found = self.ties = 0
        self.chances: list[float] = []
        self.left_out: dict[str, int] = {}
        self.refused: list[dict[str, str]] = []
        """prompts that the judge refused, and why"""

    def compare(self, item: Item) -> None:
        """Every two of its answers."""
        for i, j in self._open(item, "compare", numbered_pairs(item.origins)):
            both = item.candidates()[i], item.candidates()[j]
            first, second = (candidate.text.strip() for candidate in both)
            if not (first and second) or first == second:
                self._leave_out("equal completions" if first == second else "empty completion")
                continue
            questions = comparison_questions(item.prompt, first, second, self.constitution)
            if not all(self.judge.fits(question.text, LABEL_TOKENS) for question in questions):
                self._leave_out("longer than the judge's context")
                continue
            began = time.monotonic()
            judged = self.judge.first(questions)
            if refused := next((j for j in judged if isinstance(j, Refused)), None):
                self._refused(item, refused.reason)
                continue
            if any(isinstance(j, Unlikely) for j in judged):
                self._leave_out(f"the judge's reply is neither label (below {LEAST_MASS:.0%})")
                continue
            chances = [chance for chance in judged if isinstance(chance, float)]
            if len(chances) < len(questions):
                self._leave_out("undecided")
                continue
            payload = compared(chances, self.constitution).payload
            self.chances += chances
            self.ties += "tie" in payload
            self._write(item, "compare", (i, j), both, payload, began)

    def revise(self, item: Item) -> None:
        """Its first answer, by a principle that the judgement's id draws."""
        for (i,) in self._open(item, "edit", [(0,)]):
            answer = item.candidates()[i]
            draw = random.Random(self._id(item, "edit", (i,)))
            articles, weights = self.constitution.articles, self.constitution.weights
            article = draw.choices(articles, weights)[0]
            began = time.monotonic()
            text = revision(self.judge, item.prompt, answer.text, article, self.max_new_tokens)
            if isinstance(text, Refused):
                self._refused(item, text.reason)
                continue
            if not text:
                self._leave_out("longer than the judge's context" if text is None else "no reply")
                continue
            self._write(item, "edit", (i,), (answer,), {"candidate": 0, "text": text}, began)

    def told(self) -> dict[str, Any]:
        """Figures of what was done, ready for JSON."""
        mean = sum(self.chances) / len(self.chances) if self.chances else None
        return {
            "judge": self.judge.name,
            "guideline_version": self.constitution.version,
            "written": self.written,
            "known": self.found,
            "ties": self.ties,
            "left_out": self.left_out,
            "refused": self.refused,
            "first_place": mean,
        }

    def _open(
        self, item: Item, kind: str, places: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, ...]]:
        """Those of the places that have no record yet."""
        for numbers in places:
            if self._id(item, kind, numbers) in self.known:
                self.found += 1
            else:
                yield numbers

    def _id(self, item: Item, kind: str, numbers: tuple[int, ...]) -> str:
        about = [item.origins[i] for i in numbers]
        version = self.constitution.version
        return judgement_id(kind, self.judge.name, version, item.prompt, *about)

    def _leave_out(self, reason: str) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def _refused(self, item: Item, reason: str) -> None:
        """Passes over an item; it has no record and is asked about again by the next command."""
        self._leave_out("refused by the judge")
        self.refused.append({"prompt": item.prompt[-1].content[:60], "reason": reason})
        if len(self.refused) >= REFUSALS_AT_FIRST:
            self.check()

    def check(self) -> None:
        """Raises WorkError where the judge has refused items and answered about none."""
        answered = self.written + self.found + self.left_out.get("undecided", 0)
        if self.refused and not answered:
            raise WorkError(
                f"the judge {self.judge.name} refused all, {count_of(len(self.refused), 'item')}: "
                f"{self.refused[0]['reason']}"
            )

    def _write(
        self,
        item: Item,
        kind: Literal["compare", "edit"],
        numbers: tuple[int, ...],
        candidates: tuple[Candidate, ...],
        payload: dict[str, Any],
        began: float,
    ) -> None:
        record = Preference(
            id=self._id(item, kind, numbers),
            prompt=item.prompt,
            candidates=candidates,
            kind=kind,
            payload=payload,
            author=self.judge.name,
            author_kind="model",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            elapsed_s=round(time.monotonic() - began, 3),
            guideline_version=self.constitution.version,
        )
        self.file.append(record.to_json())
        self.known.add(record.id)
        self.written += 1
