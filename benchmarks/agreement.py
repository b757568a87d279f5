"""Whether a completion depends on the other requests in its batch, for each weight format.

    python benchmarks/agreement.py RUN [--prompts 64] [--new 48] [--json]

Greedy completions of RUN's model for its built-in questions, alone and 32 at a time. Reports the
share of equal completions and, for the others, the gap in nats between the two likeliest tokens at
the first difference (computed alone). In float32 all must be equal; with fewer bits a difference
may begin only where the gap is below 0.02.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from openpalm.checkpoint import directory as checkpoint
from openpalm.cli.common import tokenizer_of
from openpalm.data.corpus.builtin import question_answers
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.generate.engine import Engine
from openpalm.generate.quantize import WeightFormat
from openpalm.generate.request import Request, Token
from openpalm.generate.sampling import Sampling

FORMATS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4")
CLOSE = 0.02


@dataclass
class Agreement:
    weights: str
    answers: int
    equal: int
    largest_gap: float
    """between the two likeliest tokens at the first difference"""


def answered(engine: Engine, requests: list[Request]) -> list[list[Token]]:
    answers: list[list[Token]] = [[] for _ in requests]
    for token in engine.generate(requests):
        answers[token.request].append(token)
    return answers


def compare(model, weights: WeightFormat, requests: list[Request]) -> Agreement:
    together = answered(Engine(model, slots=32, weights=weights), requests)
    alone_engine = Engine(model, slots=1, weights=weights)
    equal, gaps = 0, [0.0]
    for request, batched in zip(requests, together, strict=True):
        (alone,) = answered(alone_engine, [request])
        pairs = zip(alone, batched, strict=False)
        differing = next((mine for mine, other in pairs if mine.id != other.id), None)
        if differing is None and len(alone) == len(batched):
            equal += 1
        elif differing is not None:
            (_, best), (_, second) = differing.top
            gaps.append(best - second)
    return Agreement(weights, len(requests), equal, max(gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    how = parser.parse_args()
    directory = checkpoint.resolve(how.run)
    tokenizer, model = tokenizer_of(directory), checkpoint.load(directory)
    assert tokenizer is not None
    requests = [
        Request(
            render(
                tokenizer, [Message("user", item.train_questions[0])], add_generation_prompt=True
            ).ids,
            how.new,
            Sampling(temperature=0),
            stop_ids(tokenizer),
            top_log_probs=2,
        )
        for item in list(question_answers())[: how.prompts]
    ]
    found = []
    for weights in FORMATS:
        found.append(compare(model, weights, requests))
        if not how.json:
            row = found[-1]
            print(
                f"{weights:<9} {row.equal} of {row.answers} answers equal; largest gap at a "
                f"difference {row.largest_gap:.4f} nats",
                flush=True,
            )
    if how.json:
        print(json.dumps([asdict(row) for row in found]))
    limit = [0.0 if row.weights == "float32" else CLOSE for row in found]
    within = all(row.largest_gap <= most for row, most in zip(found, limit, strict=True))
    sys.exit(0 if within and found[0].equal == found[0].answers else 1)


if __name__ == "__main__":
    main()
