"""Guidelines are Markdown and nothing more; so are answers, without links."""

import pytest

from openpalm.feedback.judgements.words import pieces
from openpalm.feedback.labeling.markdown import LONGEST_ANSWER, answer_html, to_html


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
@pytest.mark.parametrize("show", [to_html, answer_html])
def test_nothing_in_it_runs_or_loads(show, text):
    shown = show(text)
    for bad in ("<script", "<img", "<p style", 'href="javascript', 'href="data', "<a href='"):
        assert bad not in shown


@pytest.mark.parametrize(
    "text",
    [
        "[here](https://example.org)",
        "<https://example.org>",
        "[a][b]\n\n[b]: https://example.org",
        "![a](https://example.org/x.png)",
    ],
)
def test_addresses_in_answers_stay_in_sight_and_lead_nowhere(text):
    shown = answer_html(text)
    assert "https://example.org" in shown
    assert "<a" not in shown


def test_a_blank_or_a_very_long_answer_is_shown_as_it_is():
    assert answer_html(" \n") is None
    assert answer_html("x" * LONGEST_ANSWER) is not None
    assert answer_html("x" * (LONGEST_ANSWER + 1)) is None


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
