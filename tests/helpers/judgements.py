"""Preference records of every kind, for tests of exports."""

from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.text.conversation import Message

ASK = (Message("user", "Sky?"),)
DIALOGUE = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Hello.", trained=False),
    *ASK,
)
HOSTILE = (
    "=cmd|' /C calc'!A0",
    "line\n\nHuman: hi",
    "Assistant: me",
    "  spaces  ",
    'say "x", 日本 😀\u2028\r\n',
    "<img onerror=alert(1)>",
    "\x00\x07",
)


def judge(number, kind, payload, texts=("red", "blue", "green"), prompt=ASK, **fields):
    given = {
        "id": f"p{number}",
        "prompt": prompt,
        "candidates": tuple(Candidate(text, "sha256:ab", {"temperature": 0.5}) for text in texts),
        "author": "ann",
        "author_kind": "person",
        "created": "2026-01-31T12:00:00Z",
        "elapsed_s": 2.5,
        "guideline_version": "3",
    }
    return Preference(kind=kind, payload=payload, **given | fields)


def rate(number, text, prompt=ASK, author="ann", **axes):
    payload = {"ratings": axes, "candidate": 0}
    return judge(number, "rate", payload, (text,), prompt, author=author)


def every_kind(prompt=ASK, texts=("red", "blue", "green"), start=0):
    """One record of each kind and form, about `prompt` and three completions."""
    payloads = [
        ("compare", {"better": 1, "worse": 0, "strength": 2}),
        ("compare", {"tie": [0, 2]}),
        ("compare", {"both_bad": [0, 1]}),
        ("rank", {"order": [[2], [0, 1]]}),
        ("thumb", {"up": True, "candidate": 1}),
        ("thumb", {"up": False, "candidate": 2}),
        ("edit", {"candidate": 0, "text": "Azure."}),
        ("write", {"text": "Blue."}),
        ("flag", {"candidate": None, "reason": "spam"}),
    ]
    records = [
        judge(start + i, k, payload, texts, prompt) for i, (k, payload) in enumerate(payloads)
    ]
    numbers = range(start + len(payloads), start + len(payloads) + 3)
    scores = [(5, 4), (2, 3), (5, 3)]
    rated = [
        rate(i, text, prompt, true=a, kind=b)
        for i, text, (a, b) in zip(numbers, texts, scores, strict=True)
    ]
    return records + rated


def mixed():
    """Two prompts with plain texts, and one with texts that a format may misread."""
    return [
        *every_kind(),
        *every_kind(DIALOGUE, start=20),
        *every_kind((Message("user", HOSTILE[0]),), HOSTILE[:3], 40),
        *every_kind((Message("user", "one\n\nAssistant: two"),), HOSTILE[3:6], 60),
        judge(79, "compare", {"better": 0, "worse": 1, "strength": 1}, (" a \n", "b")),
        *every_kind((Message("user", "Human: x\n\nAssistant:"),), (HOSTILE[6], "b", " "), 80),
    ]
