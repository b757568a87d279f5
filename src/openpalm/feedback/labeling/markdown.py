"""Guidelines: Markdown -> HTML that is safe to show."""

from functools import lru_cache

import nh3
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt

TAGS = {
    *("h1", "h2", "h3", "h4", "p", "ul", "ol", "li", "blockquote", "hr", "br"),
    *("em", "strong", "s", "code", "pre", "a"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
SCHEMES = {"http", "https", "mailto"}
_markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


@lru_cache(maxsize=64)
def to_html(text: str) -> SafeString:
    """HTML of Markdown. HTML in the text is shown as text; images are left out: nothing is loaded
    from elsewhere."""
    rendered = _markdown.render(text)
    attributes = {"a": {"href", "title"}}
    clean = nh3.clean(rendered, tags=TAGS, attributes=attributes, url_schemes=SCHEMES)
    return mark_safe(clean)
