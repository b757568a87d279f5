"""Undoes the tokenization of the WikiText corpora: `the 1990s , " a 12 @,@ 000 @-@ mile " trip`.

WikiText was written by a tokenizer of the Moses kind: spaces around punctuation, brackets, quotes
and contractions; @-@, @,@ and @.@ where the text had no space; headings as `= = Title = =`. Lines
are independent, so a long text can be converted line by line.
"""

import re

_JOINED = re.compile(r" @([-,.–/])@ ")
_HEADING = re.compile(r"(=(?: =)*) ([^ =](?:.*[^ =])?) (=(?: =)*)")
_BEFORE = re.compile(r" ([,.;:!?%)\]}]|'(?:s|t|m|d|re|ve|ll))(?=$|[ ,.;:!?)\]}\"'])", re.IGNORECASE)
"""what follows its word without a space"""
_AFTER = re.compile(r"(?<![^ (\[{\"'])([(\[{$£€#]) (?=[^ ])")
"""what its word follows without a space"""
_DEGREE = re.compile(r"(?<=\d) ° (?=[CFK]\b)|(?<=\d) (?=°)")


def detokenize_wikitext(text: str) -> str:
    """The text as it was before WikiText's tokenizer. `<unk>` stays: the word is not known."""
    return "\n".join(map(_line, text.split("\n")))


def _line(line: str) -> str:
    line = line.strip(" ")
    heading = _HEADING.fullmatch(line)
    if heading and heading[1] == heading[3]:
        marks = heading[1].replace(" ", "")
        return f"{marks} {_line(heading[2])} {marks}"
    line = _quotes(_JOINED.sub(r"\1", line))
    line = _DEGREE.sub(lambda found: "°" if "°" in found[0] else "", line)
    # Twice: matches share the space between two marks, such as `) .`.
    return _AFTER.sub(r"\1", _BEFORE.sub(r"\1", _BEFORE.sub(r"\1", line)))


def _quotes(line: str) -> str:
    """Joins quotes to the text inside them; an apostrophe behind an s is a genitive (`players '`).

    A quote without a partner in its line stays alone.
    """
    words = line.split(" ")
    joined: list[str] = []
    opened = {'"': False, "'": False}
    left = {mark: words.count(mark) for mark in opened}
    glue = False
    for i, word in enumerate(words):
        closes = False
        opens = False
        if word in opened:
            closes = opened[word] or (word == "'" and i > 0 and words[i - 1].lower().endswith("s"))
            left[word] -= 1
            opens = not closes and left[word] > 0
            opened[word] = opens
        if joined and (glue or closes):
            joined[-1] += word
        else:
            joined.append(word)
        glue = opens
    return " ".join(joined)
