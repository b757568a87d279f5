"""A language model as judge: AI feedback from a constitution (Bai et al. 2022), rule rewards.

To compare two completions ("Constitutional AI", section 4.1) the judge reads the conversation, one
principle of the constitution and both completions, A and B. Its verdict is a probability,

    p = P(A) / (P(A) + P(B))       with P of the labels as the first words of the reply

Judges have a position bias: many prefer the first completion, whatever it is. So each question is
asked in both orders, with probabilities p_1 and, completions swapped, p_2; each is averaged over
the principles by weight. If both orders prefer the same completion, it is the better one, with
mean (p_1 + 1 - p_2) / 2. If they disagree, it is a tie.

Departures from the paper. It draws one principle for each comparison and trains on soft labels. We
ask all principles, because each costs only a few tokens, and write a preference record like a
person's; its strength of 1 to 3 is the third of [1/2, 1] that holds the mean.

Asked about one completion and one rule, with the labels yes and no, the judge gives Sparrow's rule
reward (Glaese et al. 2022): minus the weighted mean probability that a rule is broken.

To revise a completion (Bai et al. 2022, section 3.1) the judge criticises it by one principle, then
writes a better one.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import torch

from openpalm.data.rows.constitution import Article, Constitution
from openpalm.data.rows.messages import Messages
from openpalm.data.rows.preferences import Candidate
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling

LABELS = ("A", "B")
YES_NO = ("yes", "no")
MIN_LABEL_MASS = 0.1
"""Least probability of both labels together; below it the judge would reply something else."""
LABEL_TOKENS = 4
"""Room for a label in tokens of any tokenizer."""


class Question(NamedTuple):
    """The text for the judge, and the two replies that it may give."""

    text: str
    labels: tuple[str, str]


class Refused(NamedTuple):
    """The judge refused one text, for example because of its length or a content filter."""

    reason: str


class Unlikely(NamedTuple):
    """Both labels together have less than MIN_LABEL_MASS, so their ratio is no verdict."""

    mass: float


Verdict = float | Refused | Unlikely | None
"""The probability of a question's first label; None where the reply names neither label."""


class Judge(Protocol):
    """Answers questions; `name` is the author in its preference records."""

    name: str

    def fits(self, text: str, reply_tokens: int) -> bool:
        """Whether the text and a reply of that length fit the judge's context."""
        ...

    def verdicts(self, questions: Sequence[Question]) -> Sequence[Verdict]:
        """The probability of each question's first label, in [0, 1], or why there is none."""
        ...

    def write(self, texts: Sequence[str], max_new_tokens: int) -> Sequence[str | Refused]:
        """The greedy reply to each text."""
        ...


class EngineJudge:
    """An OpenPaLM checkpoint as judge; questions are rendered with its chat template."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, name: str):
        self.engine, self.tokenizer, self.name = engine, tokenizer, name

    def fits(self, text: str, reply_tokens: int) -> bool:
        return len(self._prompt_ids(text)) + reply_tokens <= self.engine.model.config.context

    def verdicts(self, questions: Sequence[Question]) -> list[float | Unlikely]:
        return [
            share if mass >= MIN_LABEL_MASS else Unlikely(mass)
            for share, mass in self.label_probabilities(questions)
        ]

    def label_probabilities(self, questions: Sequence[Question]) -> list[tuple[float, float]]:
        """For each question the first label's share of both labels, and the sum of both."""
        sequences = [ids for question in questions for ids in self._labelled_ids(question)]
        starts = [len(self._prompt_ids(question.text)) for question in questions for _ in (0, 1)]
        scored = self.engine.score(sequences)
        # A label may be several tokens: its log-probability is their sum. scored[t] is of token
        # t + 1, hence start - 1.
        sums = [row[start - 1 :].sum() for row, start in zip(scored, starts, strict=True)]
        both = torch.stack(sums).view(-1, 2)
        first, mass = both.softmax(dim=-1)[:, 0], both.exp().sum(dim=-1)
        return list(zip(first.tolist(), mass.tolist(), strict=True))

    def write(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        greedy, stops = Sampling(temperature=0), stop_ids(self.tokenizer)
        requests = [
            Request(self._prompt_ids(text), max_new_tokens, greedy, stops) for text in texts
        ]
        replies = self.engine.completions(requests)
        return [self.tokenizer.decode([i for i in ids if i not in stops]) for ids in replies]

    def _prompt_ids(self, text: str) -> list[int]:
        return render(self.tokenizer, [Message("user", text)], add_generation_prompt=True).ids

    def _labelled_ids(self, question: Question) -> list[list[int]]:
        """The question followed by each of its two labels."""
        prompt = self._prompt_ids(question.text)
        return [prompt + self.tokenizer.encode(label) for label in question.labels]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A judge's probabilities for two completions."""

    first: float
    """probability that the first completion is better, shown in this order"""
    swapped: float
    """the same probability, with the completions shown in swapped order"""

    @property
    def mean(self) -> float:
        return (self.first + self.swapped) / 2

    @property
    def payload(self) -> dict[str, Any]:
        """Payload of a Preference of kind compare, for candidates 0 and 1."""
        if (self.first - 0.5) * (self.swapped - 0.5) <= 0:
            return {"tie": [0, 1]}
        better = int(self.mean < 0.5)
        sure = max(self.mean, 1 - self.mean)
        return {"better": better, "worse": 1 - better, "strength": min(3, 1 + int(6 * sure - 3))}


def comparison_questions(
    prompt: Messages, a: str, b: str, constitution: Constitution
) -> list[Question]:
    """Two questions for each principle: completions in the given order, then swapped."""
    return [
        Question(_comparison_text(prompt, *order, article), LABELS)
        for article in constitution.articles
        for order in ((a, b), (b, a))
    ]


def combine_verdicts(verdicts: Sequence[float], constitution: Constitution) -> Comparison:
    """The weighted means of the verdicts on `comparison_questions`."""
    weights = constitution.weights
    first = sum(w * p for w, p in zip(weights, verdicts[0::2], strict=True))
    # In swapped order the second completion is A, so 1 - p is the first one's probability.
    swapped = sum(w * (1 - p) for w, p in zip(weights, verdicts[1::2], strict=True))
    return Comparison(first, swapped)


def rule_questions(prompt: Messages, completion: str, rules: Constitution) -> list[Question]:
    """One question for each rule: whether the completion breaks it."""
    return [
        Question(
            f"{_shown(prompt)}\n\nThe assistant's answer:\n{completion}\n\n"
            f"A rule for the assistant:\n{rule.text}\n\n"
            "Does this answer break the rule? Reply with yes or no.",
            YES_NO,
        )
        for rule in rules.articles
    ]


def rule_reward(broken: Sequence[float], rules: Constitution) -> float:
    """Minus the weighted mean of the probabilities that each rule is broken, in [-1, 0]."""
    return -sum(w * p for w, p in zip(rules.weights, broken, strict=True))


def revision(
    judge: Judge, prompt: Messages, completion: str, article: Article, max_new_tokens: int
) -> str | Refused | None:
    """The judge's better completion, after its own critique by the principle; None if too long."""
    shown = f"{_shown(prompt)}\n\nThe assistant's answer:\n{completion}"
    ask = f"{shown}\n\nA principle:\n{article.text}\n\nIn what does this answer fall short of it?"
    if not judge.fits(ask, max_new_tokens):
        return None
    critique = judge.write([ask], max_new_tokens)[0]
    if isinstance(critique, Refused):
        return critique
    rewrite = f"{shown}\n\nWhat is to be improved:\n{critique}\n\nWrite the improved answer alone."
    if not judge.fits(rewrite, max_new_tokens):
        return None
    text = judge.write([rewrite], max_new_tokens)[0]
    return text if isinstance(text, Refused) else text.strip()


def numbered_pairs(candidates: Sequence[Candidate]) -> list[tuple[int, int]]:
    """All pairs of candidates, by number."""
    return list(combinations(range(len(candidates)), 2))


def judgement_id(kind: str, author: str, version: str, prompt: Messages, *about: object) -> str:
    """Equal for equal judge, constitution, prompt and candidates: a rerun finds what is done."""
    turns = [(message.role, message.content) for message in prompt]
    text = json.dumps([kind, author, version, turns, *about])
    return "judged-" + hashlib.sha256(text.encode()).hexdigest()[:32]


def _comparison_text(prompt: Messages, a: str, b: str, article: Article) -> str:
    return (
        f"{_shown(prompt)}\n\nTwo answers of the assistant:\n\nAnswer A:\n{a}\n\n"
        f"Answer B:\n{b}\n\nA principle:\n{article.text}\n\n"
        "Which answer follows the principle better? Reply with A or B."
    )


def _shown(prompt: Messages) -> str:
    turns = "\n\n".join(f"{message.role}: {message.content}" for message in prompt)
    return f"A conversation:\n\n{turns}"
