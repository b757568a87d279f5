"""Sentiment steering: GRPO with the VADER lexicon as the reward, on a writer of short reviews.

    python proofs/sentiment.py [--seeds 1] [--first 0]

The base model has read reviews that are good as often as bad; fine-tuning makes it write one of
what it is asked about. Needs the package vaderSentiment.
"""

import importlib.util
import random
import re
import sys
from pathlib import Path
from statistics import mean

import reviews
from tasks import Figures, Speaker, openpalm, prove, write_rows

TOKENS, BASE, TUNING, ANSWERS, SHOWN = 80, 20_000, 8_000, 512, 4
BOUNDS = {"after": 0.55, "gain": 0.45, "-kl": -4.0, "ended": 0.98, "distinct": 0.9}


def run(folder: Path, seed: int) -> Figures:
    drawn = random.Random(seed)

    def asked() -> dict[str, str]:
        subject = drawn.choice(reviews.SUBJECTS)
        question = reviews.question(drawn, subject)
        return {"prompt": question, "completion": reviews.review(drawn, subject)}

    given = (asked() for _ in range(BASE))
    texts = ({"text": f"{row['prompt']}\n{row['completion']}"} for row in given)
    read = write_rows(folder / "read.jsonl", texts)
    tuning = write_rows(folder / "tuning.jsonl", (asked() for _ in range(TUNING)))
    questions = [q.format(s) for q in reviews.QUESTIONS for s in reviews.SUBJECTS]
    drawn.shuffle(questions)
    prompts = write_rows(folder / "prompts.jsonl", ({"prompt": q} for q in questions))
    data, base, tuned, aligned = (folder / name for name in ("data", "base", "sft", "grpo"))
    common = ("--seed", seed, "--dtype", "float32")
    openpalm("data", "prepare", read, "--out", data, "--tokenizer", "bpe:1024")
    openpalm(
        *("train", "--model", "palm-tiny", "--data", data, "--out", base, "--steps", 200),
        *("--sequence-length", 128, "--batch-tokens", 4096, "--optim.name", "muon", *common),
    )
    openpalm(
        *("sft", "--init", base, "--data", tuning, "--out", tuned, "--steps", 150),
        *("--sequence-length", 80, "--batch-tokens", 2560, *common),
    )
    openpalm(
        *("grpo", "--init", tuned, "--data", prompts, "--out", aligned, "--steps", 60),
        *("--reward", "examples/rewards.py:vader", "--max-new-tokens", TOKENS, *common),
    )
    return judged(tuned, aligned, (questions * 3)[:ANSWERS])


def judged(tuned: Path, aligned: Path, questions: list[str]) -> Figures:
    """Of one answer to each question at temperature 1; some are printed."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser, figures = SentimentIntensityAnalyzer(), dict[str, float]()
    reference, policy = Speaker(tuned), Speaker(aligned)
    for name, speaker in {"before": reference, "after": policy}.items():
        answers = speaker.answers(questions, max_new_tokens=TOKENS, seed=1)
        texts = [speaker.text(answer) for answer in answers]
        scores = [analyser.polarity_scores(text)["compound"] for text in texts]
        for question, text, score in list(zip(questions, texts, scores, strict=True))[:SHOWN]:
            print(f"{name} {score:+.2f}  {question}  {text}")
        figures[name] = mean(scores)
        figures[f"on_subject_{name}"] = mean(map(on_subject, questions, texts))
        if speaker is policy:
            far = policy.log_probs(answers) - reference.log_probs(answers)
            figures["kl"] = far.mean().item()
            figures["ended"] = mean(answer.ended for answer in answers)
            figures["distinct"] = len(set(texts)) / len(texts)
    return figures | {"gain": figures["after"] - figures["before"]}


def on_subject(question: str, text: str) -> bool:
    """Whether the answer names what was asked about."""
    subject = next(s for s in reviews.SUBJECTS if question.rstrip(".?").endswith(f" {s}"))
    return re.search(rf"\bthe {subject}\b", text, re.IGNORECASE) is not None


if __name__ == "__main__":
    if importlib.util.find_spec("vaderSentiment") is None:
        sys.exit("proofs/sentiment.py: needs VADER; pip install -e '.[proofs]'")
    sys.exit(prove("sentiment", run, BOUNDS, __doc__ or ""))
