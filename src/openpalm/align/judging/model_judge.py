"""A model as a judge: feedback from written principles (Bai et al. 2022, "Constitutional AI").

To compare two answers (their section 4.1) the judge reads the conversation, a principle and both
answers, A and B, and says which one is better. Its verdict is a probability,

    p = P(A) / (P(A) + P(B))       of the labels, as the reply's first words

Judges like one place better than the other whatever stands there, so each question is asked in
both orders, p_1 and, with the answers swapped, p_2; each order is averaged over the principles by
their weights. Where both orders name one answer it is the better one, with mean
(p_1 + 1 - p_2) / 2; where they do not it is a tie. Departures from the paper: it draws one
principle for every comparison and keeps soft labels; we ask all and write a record as a person's,
whose strength of 1 to 3 says in which third of [1/2, 1] the mean lies.

The same question with the labels yes and no, asked of a rule and one answer, is Sparrow's rule
reward (Glaese et al. 2022): minus the weighted mean probability that a rule is broken.

To revise (Bai et al. 2022, section 3.1) the judge criticises an answer by a principle, then writes
a better one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import torch

from openpalm.data.rows.constitution import Article, Constitution
from openpalm.data.rows.preferences import Candidate, Messages
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine, Request
from openpalm.generate.sampling import Sampling

LABELS = ("A", "B")
YES_NO = ("yes", "no")
LEAST_MASS = 0.1
"""Of both labels together among all replies; below it the judge would say something else."""
LABEL_TOKENS = 4
"""Room for a label, however it is cut into tokens."""


class Question(NamedTuple):
    """What a judge is asked, and the two replies that it may give."""

    text: str
    labels: tuple[str, str]


class Refused(NamedTuple):
    """A judge's refusal of one text: too long for it, or filtered."""

    reason: str


class Unlikely(NamedTuple):
    """Both labels together have less than LEAST_MASS: their ratio is no verdict."""

    mass: float


Judged = float | Refused | Unlikely | None
"""The probability of a question's first label; None where the reply decides for neither."""


class Judge(Protocol):
    """Whoever answers questions; `name` is the author of its judgements."""

    name: str

    def fits(self, text: str, reply_tokens: int) -> bool:
        """Whether it can read that much and still reply."""
        ...

    def first(self, questions: Sequence[Question]) -> Sequence[Judged]:
        """The probability of each question's first label, in [0, 1], where there is a verdict."""
        ...

    def write(self, texts: Sequence[str], max_new_tokens: int) -> Sequence[str | Refused]:
        """Its likeliest reply to each text."""
        ...


class EngineJudge:
    """A checkpoint of ours, asked in its chat template."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str):
        self.engine, self.tokenizer, self.name = engine, tokenizer, name

    def fits(self, text: str, reply_tokens: int) -> bool:
        return len(self._asked(text)) + reply_tokens <= self.engine.model.config.context

    def first(self, questions: Sequence[Question]) -> list[float | Unlikely]:
        return [
            chance if mass >= LEAST_MASS else Unlikely(mass)
            for chance, mass in self.chances(questions)
        ]

    def chances(self, questions: Sequence[Question]) -> list[tuple[float, float]]:
        """Of each question the first label's probability among the two, and that of both."""
        sequences = [ids for question in questions for ids in self._sequences(question)]
        starts = [len(self._asked(question.text)) for question in questions for _ in (0, 1)]
        scored = self.engine.score(sequences)
        sums = [row[start - 1 :].sum() for row, start in zip(scored, starts, strict=True)]
        both = torch.stack(sums).view(-1, 2)
        first, mass = both.softmax(dim=-1)[:, 0], both.exp().sum(dim=-1)
        return list(zip(first.tolist(), mass.tolist(), strict=True))

    def write(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        how, stops = Sampling(temperature=0), stop_ids(self.tokenizer)
        requests = [Request(self._asked(text), max_new_tokens, how, stops) for text in texts]
        answers = self.engine.completions(requests)
        return [self.tokenizer.decode([i for i in ids if i not in stops]) for ids in answers]

    def _asked(self, text: str) -> list[int]:
        return render(self.tokenizer, [Message("user", text)], add_generation_prompt=True).ids

    def _sequences(self, question: Question) -> list[list[int]]:
        asked = self._asked(question.text)
        return [asked + self.tokenizer.encode(label) for label in question.labels]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a judge made of two answers."""

    first: float
    """probability that the first is better, as asked in this order"""
    swapped: float
    """the same, as asked with the second answer in the first place"""

    @property
    def mean(self) -> float:
        return (self.first + self.swapped) / 2

    @property
    def payload(self) -> dict[str, Any]:
        """Of a Preference of kind compare, about candidates 0 and 1."""
        if (self.first - 0.5) * (self.swapped - 0.5) <= 0:
            return {"tie": [0, 1]}
        better = int(self.mean < 0.5)
        sure = max(self.mean, 1 - self.mean)
        return {"better": better, "worse": 1 - better, "strength": min(3, 1 + int(6 * sure - 3))}


def comparison_questions(
    prompt: Messages, a: str, b: str, constitution: Constitution
) -> list[Question]:
    """Each principle in both orders, one after the other."""
    return [
        Question(_comparing(prompt, *order, article), LABELS)
        for article in constitution.articles
        for order in ((a, b), (b, a))
    ]


def compared(chances: Sequence[float], constitution: Constitution) -> Comparison:
    """What the answers to `comparison_questions` come to."""
    weights = constitution.weights
    first = sum(w * p for w, p in zip(weights, chances[0::2], strict=True))
    swapped = sum(w * (1 - p) for w, p in zip(weights, chances[1::2], strict=True))
    return Comparison(first, swapped)


def rule_questions(prompt: Messages, answer: str, rules: Constitution) -> list[Question]:
    """Whether the answer breaks each rule."""
    return [
        Question(
            f"{_shown(prompt)}\n\nThe assistant's answer:\n{answer}\n\nA rule for the assistant:\n"
            f"{rule.text}\n\nDoes this answer break the rule? Reply with yes or no.",
            YES_NO,
        )
        for rule in rules.articles
    ]


def rule_reward(broken: Sequence[float], rules: Constitution) -> float:
    """Minus the weighted mean of the probabilities that each rule is broken, in [-1, 0]."""
    return -sum(w * p for w, p in zip(rules.weights, broken, strict=True))


def revision(
    judge: Judge, prompt: Messages, answer: str, article: Article, max_new_tokens: int
) -> str | Refused | None:
    """The judge's better answer, after its own critique by the principle; None if too long."""
    shown = f"{_shown(prompt)}\n\nThe assistant's answer:\n{answer}"
    asked = f"{shown}\n\nA principle:\n{article.text}\n\nIn what does this answer fall short of it?"
    if not judge.fits(asked, max_new_tokens):
        return None
    critique = judge.write([asked], max_new_tokens)[0]
    if isinstance(critique, Refused):
        return critique
    rewrite = f"{shown}\n\nWhat is to be improved:\n{critique}\n\nWrite the improved answer alone."
    if not judge.fits(rewrite, max_new_tokens):
        return None
    text = judge.write([rewrite], max_new_tokens)[0]
    return text if isinstance(text, Refused) else text.strip()


def numbered_pairs(candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """Every two of the candidates, by number."""
    return list(combinations(range(len(candidates)), 2))


def judgement_id(kind: str, author: str, version: str, prompt: Messages, *about: object) -> str:
    """The same for the same judge, principles, prompt and answers: what is judged is known."""
    turns = [(message.role, message.content) for message in prompt]
    text = json.dumps([kind, author, version, turns, *about])
    return "judged-" + hashlib.sha256(text.encode()).hexdigest()[:32]


def _comparing(prompt: Messages, a: str, b: str, article: Article) -> str:
    return (
        f"{_shown(prompt)}\n\nTwo answers of the assistant:\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\n"
        f"A principle:\n{article.text}\n\nWhich answer follows the principle better? "
        "Reply with A or B."
    )


def _shown(prompt: Messages) -> str:
    turns = "\n\n".join(f"{message.role}: {message.content}" for message in prompt)
    return f"A conversation:\n\n{turns}"
