"""Question answering: a checkpoint's completions of questions, and preferences between them.

Completions are scored by token F1 against a reference answer.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.evaluate.token_f1 import token_f1
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling

MAX_NEW_TOKENS = 64


def answer_questions(
    source: Path, questions: Sequence[str], *, temperature: float = 0.0
) -> list[str]:
    """One completion per question, from a run or checkpoint; question i is sampled with seed i."""
    directory = checkpoint.resolve(source)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    engine = Engine(checkpoint.load(directory), slots=32, owned=True)
    stops = stop_ids(tokenizer)
    prompts = [
        render(tokenizer, [Message("user", question)], add_generation_prompt=True).ids
        for question in questions
    ]
    requests = [
        Request(ids, MAX_NEW_TOKENS, Sampling(temperature=temperature, seed=i), stops)
        for i, ids in enumerate(prompts)
    ]
    return [tokenizer.decode(ids).strip() for ids in engine.completions(requests)]


def preferences_by_f1(
    questions: Sequence[str],
    references: Sequence[str],
    completions: Sequence[Sequence[str]],
    *,
    least_gap: float,
) -> Iterator[Preference]:
    """The best of each question's completions preferred to the worst.

    Questions are left out if their best and worst differ by less than `least_gap` of token F1.
    """
    for i, (question, reference, group) in enumerate(
        zip(questions, references, completions, strict=True)
    ):
        scored = sorted((token_f1(text, reference), text) for text in group if text)
        if len(scored) < 2 or scored[-1][0] - scored[0][0] < least_gap:
            continue
        yield Preference(
            id=f"quickstart-{i}",
            prompt=(Message("user", question),),
            candidates=(Candidate(scored[-1][1]), Candidate(scored[0][1])),
            kind="compare",
            payload={"better": 0, "worse": 1, "strength": 1},
            author="token F1 against the docstring",
            author_kind="model",
            created=datetime.now(UTC).isoformat(),
        )
