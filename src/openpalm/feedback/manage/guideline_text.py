"""Guidelines in Markdown -> HTML that is safe whoever wrote it."""

import difflib
from collections.abc import Iterator
from itertools import islice

import nh3
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt

MAX_LINES = 3000
_markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
_TAGS = {
    *("a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "hr", "li", "ol", "p", "pre"),
    *("strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}


def to_html(text: str) -> SafeString:
    """Raw HTML of the text is shown as text; what Markdown makes is cleaned once more."""
    html = nh3.clean(
        _markdown.render(text),
        tags=_TAGS,
        attributes={"a": {"href"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )
    return mark_safe(html)  # noqa: S308


def changes(old: str, new: str) -> Iterator[tuple[str, str]]:
    """(mark, line) of each line that is the same (" "), added ("+") or removed ("-")."""
    before, after = old.splitlines(), new.splitlines()
    if max(len(before), len(after)) > MAX_LINES:  # the comparison takes quadratic time
        return
    compared = difflib.unified_diff(before, after, lineterm="", n=MAX_LINES)
    for line in islice(compared, 3, None):  # two lines of names, one of line numbers
        yield line[0], line[1:]
