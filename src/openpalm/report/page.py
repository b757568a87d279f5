"""Writes a self-contained HTML page: no other file, no script.

Text from models and files is escaped.
"""

import html
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openpalm import __version__
from openpalm.base.files import write_atomically
from openpalm.errors import SettingsError

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
h1 { margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; margin: .8rem 0; } caption { text-align: left; color: #57606a; }
th, td { border-bottom: 1px solid #d8dee4; padding: .3rem .8rem .3rem 0; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; min-width: 5rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
pre { background: #f6f8fa; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: #0550ae; } .muted { color: #57606a; }
.wide { overflow-x: auto; }
.wide th, .wide td { min-width: 4.2rem; overflow-wrap: break-word; }
.wide th { vertical-align: bottom; line-height: 1.25; }
.key { white-space: nowrap; margin-right: 1.2rem; } .key svg { vertical-align: middle; }
.key span { white-space: normal; }
.tabs > input { margin-left: 1rem; }
.tabs > div { display: none; }
.tabs > input:nth-of-type(1):checked ~ div:nth-of-type(1),
.tabs > input:nth-of-type(2):checked ~ div:nth-of-type(2),
.tabs > input:nth-of-type(3):checked ~ div:nth-of-type(3),
.tabs > input:nth-of-type(4):checked ~ div:nth-of-type(4) { display: block; }
.side-by-side { display: grid; gap: .4rem .8rem; overflow-x: auto; }
.side-by-side pre { margin: 0; font-size: .85rem; }
details { margin: .6rem 0; } summary { cursor: pointer; } details h3 { margin-bottom: .2rem; }
@media print { .tabs > div { display: block; } .tabs > input { display: none; } }
"""


@dataclass(frozen=True)
class Section:
    """A heading and its HTML body."""

    heading: str
    body: str


def write_page(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Writes the page, as a whole or not at all. Raises SettingsError for a directory."""
    if path.is_dir():
        raise SettingsError(f"--out {path}: is a directory; give the name of an HTML file")
    parts = [f"<section><h2>{html.escape(s.heading)}</h2>{s.body}</section>" for s in sections]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    write_atomically(path, page)


def environment_section() -> Section:
    """The machine and the versions of the software."""
    import torch

    facts = [
        ("OpenPaLM", __version__),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        (
            "machine",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}",
        ),
    ]
    if torch.cuda.is_available():
        facts.append(("GPU", torch.cuda.get_device_name()))
    return Section("Environment", table(["", ""], facts))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; numbers are right-aligned, None is empty, SafeHtml is not escaped."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    header = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return f"<table>{header}<tbody>{body}</tbody></table>"


class SafeHtml(str):
    """HTML that needs no escaping."""


def _text(value: object) -> str:
    return value if isinstance(value, SafeHtml) else html.escape(str(value))


def _cell(value: object) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f'<td class="number">{text}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{_text(value)}</td>"


def tabs(name: str, question: str, panes: Sequence[tuple[str, str]]) -> str:
    """HTML with one of at most four labelled panes visible; radio buttons choose it."""
    buttons = "".join(
        f'<input type="radio" name="{name}" id="{name}-{i}"{" checked" * (i == 0)}>'
        f'<label for="{name}-{i}"> {html.escape(label)}</label>'
        for i, (label, _) in enumerate(panes)
    )
    bodies = "".join(f"<div>{body}</div>" for _, body in panes)
    return f'<div class="tabs">{html.escape(question)}{buttons}{bodies}</div>'
