"""Answers that say which model wrote them."""

import pytest

from openpalm.feedback.items.model_names import names_itself


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("I am ChatGPT, how can I help?", True),
        ("As an AI model called Zephyr I cannot say.", True),
        ("I was trained by OpenAI.", True),
        ("my own-model says hello", True),
        ("I'm Claude.", True),
        ("The llama lives in Peru, and Claude Monet painted.", False),
        ("I am happy to help. It was built by Romans.", False),
        ("A model is a simplification.", False),
        ("x" * 30_000 + " I am GPT-4", True),
    ],
)
def test_answers_that_name_their_model(text, names):
    assert names_itself(text, ["own-model", "v1"]) == names
