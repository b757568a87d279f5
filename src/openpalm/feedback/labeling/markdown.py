"""Markdown -> HTML that is safe to show: guidelines, and answers for labelers who want them so."""

from functools import lru_cache

import nh3
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

TAGS = {
    *("h1", "h2", "h3", "h4", "p", "ul", "ol", "li", "blockquote", "hr", "br"),
    *("em", "strong", "s", "code", "pre", "a"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
SCHEMES = {"http", "https", "mailto"}
LONGEST = 4000
"""characters of a paragraph; a longer one is shown as it is, without marks"""


LONGEST_ANSWER = 20_000
"""characters; a longer answer is shown as it is, since rendering would take too long"""


def _inline(state: StateCore) -> None:
    """Parses the inline marks of each paragraph, which takes quadratic time."""
    for token in state.tokens:
        if token.type != "inline":
            continue
        if len(token.content) > LONGEST:
            token.children = [Token("text", "", 0, content=token.content)]
        else:
            token.children = []
            state.md.inline.parse(token.content, state.md, state.env, token.children)


def _reader() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    made.core.ruler.at("inline", _inline)
    return made


_markdown = _reader()
# Addresses in answers stay text: a link to a page that a model names would hide where it leads.
_of_answers = _reader().disable(["link", "autolink", "image", "reference"])


@lru_cache(maxsize=64)
def to_html(text: str) -> SafeString:
    """HTML of Markdown. HTML in the text is shown as text; images are left out: nothing is loaded
    from elsewhere."""
    rendered = _markdown.render(text)
    attributes = {"a": {"href", "title"}}
    clean = nh3.clean(rendered, tags=TAGS, attributes=attributes, url_schemes=SCHEMES)
    return mark_safe(clean)


@lru_cache(maxsize=64)
def answer_html(text: str) -> SafeString | None:
    """HTML of an answer; None for one that is blank or too long."""
    if not text.strip() or len(text) > LONGEST_ANSWER:
        return None
    clean = nh3.clean(_of_answers.render(text), tags=TAGS - {"a"}, attributes={})
    return mark_safe(clean)
