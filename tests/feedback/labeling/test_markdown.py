"""Guidelines are Markdown and nothing more."""

import pytest

from openpalm.feedback.judgements.words import pieces
from openpalm.feedback.labeling.markdown import to_html


def test_markdown_becomes_html():
    text = "# Title\n\nBe *kind*, `exact`:\n\n- one\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    shown = to_html(text)
    for tag in (
        "<h1>Title</h1>",
        "<em>kind</em>",
        "<code>exact</code>",
        "<li>one</li>",
        "<td>1</td>",
    ):
        assert tag in shown


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](data:text/html,<script>alert(1)</script>)",
        "<a href='javascript:alert(1)'>a</a>",
        "![a](https://example.org/pixel.png)",
        '<p style="color:red" onclick="x()">a</p>',
    ],
)
def test_nothing_in_it_runs_or_loads(text):
    shown = to_html(text)
    for bad in ("<script", "<img", "<p style", 'href="javascript', 'href="data', "<a href='"):
        assert bad not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain *text*\n", [(False, "plain *text*\n")]),
        ("a\n\n```py\nx\n```\n\nb", [(False, "a"), (True, "```py\nx\n```"), (False, "b")]),
        ("```\nnever closed", [(True, "```\nnever closed")]),
        ("inline ``` is text", [(False, "inline ``` is text")]),
        ("", []),
    ],
)
def test_blocks_of_code_are_set_apart(text, shown):
    assert pieces(text) == shown
