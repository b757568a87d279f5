"""Model names, which blind judging hides, also where an answer says which model wrote it."""

import re
from collections.abc import Iterable

from openpalm.feedback.models import Item, ModelVersion, Project

_COMPANIES = (
    *("OpenAI", "Anthropic", "Google", "DeepMind", "Meta AI", "Mistral(?: AI)?", "xAI", "Cohere"),
    *("Alibaba(?: Cloud)?", "Microsoft", "DeepSeek", "EleutherAI", "LMSYS", "Hugging Face"),
)
_MODELS = (
    *("ChatGPT", r"GPT-?\d\w*", "Claude", "Gemini", "Bard", "PaLM", "OpenPaLM", "LLaMA", "Llama"),
    *("Mistral", "Mixtral", "Qwen", "DeepSeek", "Grok", "Vicuna", "Alpaca", "Koala", "Command R"),
    *("Phi-?\\d", "Gemma", "Falcon", "Bing Chat", "Copilot", "Open Assistant"),
)
_SELF = r"(?:I am|I'm|I’m|my name is|this is|call me|as|being)"
# Bounded words: without the bound a text such as "a-a-a-..." takes quadratic time.
_KIND = r"(?:an? |the )?(?:[\w-]{1,30} ){0,3}?(?:AI|language model|assistant|chatbot|LLM|model)\b"
_KNOWN = "|".join((*_MODELS, *_COMPANIES))
# "I am Claude", "as GPT-4", "a language model called X", "an assistant trained by OpenAI".
_GENERIC = re.compile(
    rf"\b{_SELF} (?:{_KNOWN})\b"
    rf"|\b{_KIND},? (?:called|named|known as) \S"
    rf"|\b(?:made|trained|developed|created|built) by (?:{_KNOWN})\b"
    rf"|\bmy name is \w+[^.!?\n]{{0,40}}\b(?:AI|model|assistant|chatbot)\b",
    re.IGNORECASE,
)
MIN_NAME = 4
"""Shorter model names, such as "v1", also occur in other texts."""
MAX_CHARACTERS = 20_000
"""A model names itself near the beginning or the end; a longer middle is not searched."""


def is_blind(project: Project, item: Item) -> bool:
    """Whether the item's models are hidden; in a comparison of models they always are."""
    return project.blind or item.comparison_id is not None


def names_of(project: Project) -> list[str]:
    """The names of the project's models."""
    return list(ModelVersion.objects.filter(project=project).values_list("name", flat=True))


def names_itself(text: str, names: Iterable[str] = ()) -> bool:
    """Whether the text names its model, by one of `names` or by a usual phrase."""
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        text = f"{text[:half]}\n{text[-half:]}"
    lowered = text.casefold()
    own = (name.casefold() for name in names if len(name) >= MIN_NAME)
    return bool(_GENERIC.search(text)) or any(_has_word(lowered, name) for name in own)


def _has_word(text: str, word: str) -> bool:
    return word in text and bool(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text))
