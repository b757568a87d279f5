"""Counts of markdown, and differences that change sign with the sides."""

import pytest

from openpalm.feedback.statistics.style import Style, style_difference, style_of

TEXT = """# Title

Some **bold** and __also bold__ text, 2 ** 3 ** 4 is none.

- one
* two
  1. three
2) four

```
# no header
- no list **no bold**
```
## Second
#hashtag
"""


def test_counts_of_markdown():
    assert style_of(TEXT) == Style(length=len(TEXT), headers=2, lists=4, bold=2)
    assert style_of("") == Style(0, 0, 0, 0)
    assert style_of("```\n# never closed\n- x").headers == 0


def test_differences():
    assert style_difference(Style(300, 2, 0, 0), Style(100, 0, 0, 5)) == (0.5, 1, 0, -1)
    one, two = style_of(TEXT), style_of("short")
    assert style_difference(one, two) == tuple(-x for x in style_difference(two, one))
    with pytest.raises(ValueError, match="zip"):
        style_difference((1, 2), (1,))
