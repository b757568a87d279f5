"""Short replies to household questions, made from word lists: their qualities vary independently.

A reply names the subject that the question asks about or none, is friendly, rude or neither, has
one to four sentences of advice, and finishes its last sentence or not. No quality depends on
another, and none follows from the length alone.
"""

import random

SUBJECTS = (
    *("lamp", "carpet", "kettle", "window", "garden", "bicycle", "oven", "sofa", "mirror", "floor"),
    *("table", "fridge", "curtain", "sink", "door", "fence", "drawer", "clock", "chair", "fan"),
    *("printer", "heater", "gutter", "blanket", "pan", "shelf", "tap", "roof", "tent", "radio"),
    *("piano", "mattress", "camera", "bench", "lawn", "stove", "vase", "basket", "ladder", "pump"),
)
ASKED = (
    *("How do I clean the {}?", "How do I repair the {}?", "How do I move the {}?"),
    *("What helps against noise from the {}?", "How do I store the {}?", "What ruins the {}?"),
    *("How do I paint the {}?", "How often should I check the {}?", "How do I protect the {}?"),
    *("Who can look at the {}?",),
)
FRIENDLY = ("Sure!", "Happy to help!", "Good question!", "Of course!", "Gladly!")
COLD = ("Not again.", "If you must.", "Obviously.", "Whatever.", "So what.")
VAGUE = ("it", "that thing", "such stuff", "any of these")
FIRST = (
    "Wipe {s} with {t}.",
    "Treat {s} with {t} {w}.",
    "Keep {s} away from {t}.",
    "For {s} you need {t}.",
    "Put {t} under {s} {w}.",
)
MORE = (
    "Wait {n} hours.",
    "Then use {t}.",
    "Do it again {w}.",
    "A neighbour can lend you {t}.",
    "It takes {n} minutes.",
    "Never hurry {w}.",
    "Open it slowly and look for {t} inside.",
)
TOOLS = (
    *("warm water", "a soft brush", "vinegar", "a dry cloth", "salt", "oil", "strong tape", "sand"),
    *("a wooden board", "soap", "wax", "a small hammer", "old paper", "glue", "cold tea", "chalk"),
)
TIMES = (
    *("in the morning", "at night", "every week", "on Sunday", "before lunch", "once a month"),
    *("in spring", "after rain", "twice a day", "when it is dry"),
)
TRAILS = ("and so", "because the", "and then a", "with the", "or some")
CHANCES = {"subject": 0.5, "friendly": 0.4, "cold": 0.4, "ends": 0.6}
SENTENCES = {1: 0.4, 2: 0.25, 3: 0.2, 4: 0.15}


def questions() -> list[str]:
    """Every question about every subject."""
    return [form.format(subject) for form in ASKED for subject in SUBJECTS]


def reply(drawn: random.Random, question: str) -> str:
    """One reply; each of its qualities is drawn for itself."""
    asked = question.rstrip("?").rsplit(" ", 1)[1]
    subject = f"the {asked}" if drawn.random() < CHANCES["subject"] else drawn.choice(VAGUE)
    count = drawn.choices([*SENTENCES], [*SENTENCES.values()])[0]
    sentences = [_filled(drawn, drawn.choice(FIRST), subject)]
    more = drawn.sample(MORE, count - 1)
    sentences += [_filled(drawn, form, subject) for form in more]
    tone = drawn.random()
    if tone < CHANCES["friendly"]:
        sentences.insert(0, drawn.choice(FRIENDLY))
    elif tone < CHANCES["friendly"] + CHANCES["cold"]:
        sentences.insert(0, drawn.choice(COLD))
    text = " ".join(sentences)
    ends = drawn.random() < CHANCES["ends"]
    return text if ends else f"{text.rstrip('.')} {drawn.choice(TRAILS)}"


def _filled(drawn: random.Random, form: str, subject: str) -> str:
    return form.format(
        s=subject, t=drawn.choice(TOOLS), w=drawn.choice(TIMES), n=drawn.choice("23456789")
    )
