"""A table of judgements for spreadsheets: one line of CSV for each preference record.

A spreadsheet runs a cell that begins with = + - @, a tab or a line break as a formula. An
apostrophe is written before such a text (OWASP, "CSV Injection"); spreadsheets show it or hide it,
and remove it with a search. `payload` is exact JSON, so nothing of a judgement is lost.
"""

import csv
import io
import json

from openpalm.data.rows.preferences import Preference

COLUMNS = (
    *("id", "created", "author", "author_kind", "kind", "judgement", "prompt", "candidates"),
    *("checkpoints", "elapsed_s", "guideline_version", "supersedes", "payload"),
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_BOM = "\ufeff"


def table_header() -> bytes:
    """The first line. It begins with a byte order mark: Excel reads UTF-8 only with one."""
    return (_BOM + _csv_line(COLUMNS)).encode()


def table_line(p: Preference) -> bytes:
    prompt = "\n\n".join(f"{m.role}: {m.content}" for m in p.prompt)
    candidates = "\n\n".join(f"[{i}] {c.text}" for i, c in enumerate(p.candidates))
    checkpoints = ", ".join(
        f"[{i}] {c.checkpoint or 'unknown'}" for i, c in enumerate(p.candidates)
    )
    cells = (
        *(p.id, p.created, p.author, p.author_kind, p.kind, describe_judgement(p)),
        *(prompt, candidates, checkpoints),
        "" if p.elapsed_s is None else str(p.elapsed_s),
        *(p.guideline_version or "", p.supersedes or ""),
        json.dumps(p.payload, ensure_ascii=False),
    )
    return _csv_line(tuple(map(defuse, cells))).encode()


def defuse(text: str) -> str:
    """The text with an apostrophe before it, if a spreadsheet would run it as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def describe_judgement(p: Preference) -> str:
    """The judgement in a few words; completions are numbered from 0, as in the payload."""
    match p.kind, p.payload:
        case "compare", {"better": i, "worse": j, "strength": strength}:
            return f"{i} better than {j}, strength {strength}"
        case "compare", {"tie": [i, j]}:
            return f"{i} and {j} equal"
        case "compare", {"both_bad": [i, j]}:
            return f"{i} and {j} both bad"
        case "rank", {"order": order}:
            return " > ".join(" = ".join(map(str, group)) for group in order)
        case "rate", {"ratings": axes, "candidate": i}:
            return f"{i}: " + ", ".join(f"{axis} {value}" for axis, value in axes.items())
        case "thumb", {"up": up, "candidate": i}:
            return f"{i} {'good' if up else 'bad'}"
        case "edit", {"candidate": i, "text": text}:
            return f"{i} edited: {text}"
        case "write", {"text": text}:
            return f"written: {text}"
        case _, {"candidate": i, "reason": reason}:
            return f"{'the item' if i is None else i} flagged: {reason}"
    raise AssertionError(p.kind)


def _csv_line(cells: tuple[str, ...]) -> str:
    stream = io.StringIO()
    csv.writer(stream).writerow(cells)
    return stream.getvalue()
