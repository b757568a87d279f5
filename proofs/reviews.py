"""Short reviews of mixed sentiment, made from word lists: good and bad in equal measure."""

import random
from string import Template

SUBJECTS = (
    *("soup", "bread", "coffee", "breakfast", "cake", "curry", "salad", "menu", "pizza", "tea"),
    *("hotel", "room", "garden", "museum", "train", "ferry", "airport", "beach", "bridge", "flat"),
    *("film", "book", "novel", "song", "concert", "lecture", "painting", "story", "show", "opera"),
    *("phone", "laptop", "camera", "printer", "lamp", "chair", "bicycle", "tent", "watch", "radio"),
    *("shop", "market", "library", "school", "office", "gym", "cinema", "harbour", "park", "zoo"),
)
ASPECTS = (
    *("colour", "price", "size", "smell", "sound", "shape", "owner", "queue", "light", "view"),
    *("staff", "weather", "map", "door", "box", "label", "floor", "guide", "first hour", "ending"),
)
PEOPLE = (
    *("my sister", "my brother", "our neighbour", "the driver", "a colleague", "my uncle"),
    *("the waiter", "a student", "my aunt", "the teacher", "a stranger", "our guest"),
)
TIMES = (
    *("on Monday", "on Tuesday", "on Friday", "in March", "in June", "in October", "at noon"),
    *("last week", "last summer", "this morning", "before lunch", "after work", "in the evening"),
)
ADJECTIVES = {
    "good": (
        *("good", "great", "excellent", "wonderful", "lovely", "delightful", "perfect", "amazing"),
        *("charming", "superb", "fantastic", "brilliant", "enjoyable", "pleasant", "impressive"),
        *("beautiful", "nice", "fun", "elegant", "awesome"),
    ),
    "bad": (
        *("bad", "terrible", "awful", "horrible", "poor", "disappointing", "boring", "annoying"),
        *("ugly", "disgusting", "useless", "dreadful", "miserable", "nasty", "pathetic", "worse"),
        *("tragic", "unpleasant", "hateful", "horrid"),
    ),
    "plain": (
        *("ordinary", "small", "large", "usual", "blue", "pale", "short", "long", "round", "new"),
        *("old", "quick", "slow", "simple", "typical", "quiet", "loud", "narrow", "tall", "thin"),
    ),
}
VERBS = {
    "good": ("loved", "enjoyed", "admired", "praised", "appreciated", "recommended"),
    "bad": ("hated", "regretted", "disliked", "despised", "condemned", "criticized"),
    "plain": ("noticed", "mentioned", "described", "remembered", "discussed", "expected"),
}
CHANCES = {"good": 0.325, "bad": 0.375, "plain": 0.3}
"""The good words are a little stronger in VADER's lexicon than the bad ones."""

OPENINGS = (
    "The $subject was $a and $b.",
    "I tried the $subject $time and it was $a.",
    "$Person showed me the $subject $time: $a, and rather $b.",
    "The $subject seemed $a to me and $b to $person.",
    "We came for the $subject $time and found it $a.",
)
DETAILS = (
    "$Person $v the $aspect of the $subject.",
    "The $subject has a $aspect that was $c.",
    "$Person called the $subject $c and the $aspect $d.",
    "I $v the $subject for the $aspect, which was $c.",
    "The $subject looked $c and the $aspect felt $d.",
)
CLOSINGS = (
    "In the end $person $w the $subject.",
    "For the $aspect2 the $subject was $e.",
    "Everyone $w the $subject $time2.",
    "The $subject was $e from start to end.",
    "$Person2 $w the $subject $time2.",
)
QUESTIONS = ("Write about the {}.", "Describe the {}.", "How was the {}?", "Review the {}.")


def review(drawn: random.Random, subject: str) -> str:
    """Three sentences; each word that judges is good or bad or neither by a draw of its own."""

    def judged(words: dict[str, tuple[str, ...]]) -> str:
        kind = drawn.choices([*CHANCES], [*CHANCES.values()])[0]
        return drawn.choice(words[kind])

    person, person2 = drawn.sample(PEOPLE, 2)
    aspects = dict(zip(("aspect", "aspect2"), drawn.sample(ASPECTS, 2), strict=True))
    people = {"person": person, "Person": _capital(person), "Person2": _capital(person2)}
    times = {name: drawn.choice(TIMES) for name in ("time", "time2")}
    words = {name: judged(ADJECTIVES) for name in "abcde"} | {n: judged(VERBS) for n in "vw"}
    form = " ".join(drawn.choice(part) for part in (OPENINGS, DETAILS, CLOSINGS))
    return Template(form).substitute(subject=subject, **aspects, **people, **times, **words)


def question(drawn: random.Random, subject: str) -> str:
    return drawn.choice(QUESTIONS).format(subject)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
