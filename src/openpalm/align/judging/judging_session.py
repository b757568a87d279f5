"""Judging session: writes a preference record for every item that has none, and counts the rest.

The id of a judgement depends on the origin of the completions, not on their text: completions of a
model are identified by checkpoint and seed, so a rerun samples only those not judged yet.
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
    MIN_LABEL_MASS,
    Judge,
    Refused,
    Unlikely,
    combine_verdicts,
    comparison_questions,
    judgement_id,
    numbered_pairs,
    revision,
)
from openpalm.base.jsonl import JsonlWriter
from openpalm.data.rows.constitution import Constitution
from openpalm.data.rows.messages import Messages
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.rows.readers.candidates import CandidateRow
from openpalm.data.rows.readers.prompts import PromptRow
from openpalm.data.text.conversation import stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.errors import WorkError
from openpalm.generate.engine import Engine

PROMPTS_PER_BATCH = 8
"""Prompts with completions sampled together."""
MAX_FIRST_REFUSALS = 8
"""After this many refusals and no judgement the session stops."""


class Item(NamedTuple):
    """A prompt with the candidates to be judged."""

    prompt: Messages
    origins: Sequence[Any]
    """identifies each candidate in the ids of judgements"""
    candidates: Callable[[], Sequence[Candidate]]
    """a function, because sampling takes time and may not be needed"""


class Writer(NamedTuple):
    """The model that generates the candidates, and its sampling."""

    engine: Engine
    tokenizer: Tokenizer
    checkpoint: str
    """its digest"""
    plan: SamplingPlan

    @property
    def sampling(self) -> dict[str, float]:
        """The settings that a Candidate records."""
        names = ("temperature", "seed", "max_new_tokens")
        return {name: getattr(self.plan, name) for name in names}


def items_from_rows(rows: Sequence[CandidateRow]) -> list[Item]:
    """Candidates from a file, identified by their texts."""
    return [
        Item(row.prompt, [c.text for c in row.candidates], lambda row=row: row.candidates)
        for row in rows
    ]


def items_from_model(
    writer: Writer, rows: Sequence[PromptRow], ids: Sequence[Sequence[int]]
) -> list[Item]:
    """Candidates to be sampled, identified by checkpoint, sampling settings and number.

    ids: the token ids of each row's prompt.
    """
    plan, sampling, stops = writer.plan, writer.sampling, stop_ids(writer.tokenizer)

    @cache
    def batch(first: int) -> list[Candidate]:
        chosen = range(first, min(first + PROMPTS_PER_BATCH, len(ids)))
        return [
            Candidate(
                writer.tokenizer.decode([i for i in completion.ids if i not in stops]),
                writer.checkpoint,
                sampling | {"draw": first * plan.per_prompt + n},
            )
            for n, completion in enumerate(plan.sample(writer.engine, ids, chosen, stops))
        ]

    def candidates(number: int) -> list[Candidate]:
        within = number % PROMPTS_PER_BATCH
        start = within * plan.per_prompt
        return batch(number - within)[start : start + plan.per_prompt]

    return [
        Item(
            row.prompt,
            [
                [writer.checkpoint, sampling, number * plan.per_prompt + n]
                for n in range(plan.per_prompt)
            ],
            lambda number=number: candidates(number),
        )
        for number, row in enumerate(rows)
    ]


class JudgingSession:
    """Asks the judge about items and appends its preference records to `file`.

    known: ids of the judgements in the file.
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
        self.verdicts: list[float] = []
        self.left_out: dict[str, int] = {}
        self.refused: list[dict[str, str]] = []
        """prompts that the judge refused, with its reason"""

    def compare(self, item: Item) -> None:
        """Compares every two of the item's candidates."""
        for i, j in self._pending(item, "compare", numbered_pairs(item.origins)):
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
            verdicts = self.judge.verdicts(questions)
            if refused := next((v for v in verdicts if isinstance(v, Refused)), None):
                self._refused(item, refused.reason)
                continue
            if any(isinstance(v, Unlikely) for v in verdicts):
                self._leave_out(f"the judge's reply is neither label (below {MIN_LABEL_MASS:.0%})")
                continue
            decided = [v for v in verdicts if isinstance(v, float)]
            if len(decided) < len(questions):
                self._leave_out("undecided")
                continue
            payload = combine_verdicts(decided, self.constitution).payload
            self.verdicts += decided
            self.ties += "tie" in payload
            self._write(item, "compare", (i, j), both, payload, began)

    def revise(self, item: Item) -> None:
        """Revises the item's first candidate by one principle."""
        for (i,) in self._pending(item, "edit", [(0,)]):
            candidate = item.candidates()[i]
            # Seeded by the judgement's id, so that a rerun chooses the same principle.
            generator = random.Random(self._id(item, "edit", (i,)))
            articles, weights = self.constitution.articles, self.constitution.weights
            article = generator.choices(articles, weights)[0]
            began = time.monotonic()
            text = revision(self.judge, item.prompt, candidate.text, article, self.max_new_tokens)
            if isinstance(text, Refused):
                self._refused(item, text.reason)
                continue
            if not text:
                self._leave_out("longer than the judge's context" if text is None else "no reply")
                continue
            self._write(item, "edit", (i,), (candidate,), {"candidate": 0, "text": text}, began)

    def summary(self) -> dict[str, Any]:
        """Counts of the session, ready for JSON; `first_place` is the mean vote for label A."""
        mean = sum(self.verdicts) / len(self.verdicts) if self.verdicts else None
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

    def _pending(
        self, item: Item, kind: str, places: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, ...]]:
        """The candidate numbers without a record in the file."""
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
        """Skips an item; without a record, the next run of the command asks about it again."""
        self._leave_out("refused by the judge")
        self.refused.append({"prompt": item.prompt[-1].content[:60], "reason": reason})
        if len(self.refused) >= MAX_FIRST_REFUSALS:
            self.check()

    def check(self) -> None:
        """Raises WorkError where the judge refused items and judged none."""
        answered = self.written + self.found + self.left_out.get("undecided", 0)
        if self.refused and not answered:
            raise WorkError(
                f"the judge {self.judge.name} refused all items "
                f"({len(self.refused)}): {self.refused[0]['reason']}; correct the request or use "
                "another judge"
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
