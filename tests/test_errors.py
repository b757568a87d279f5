"""How a message counts."""

import pytest

from openpalm.errors import count_of


@pytest.mark.parametrize(
    ("number", "says"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (2048, "2,048 rows")]
)
def test_counts(number: int, says: str):
    assert count_of(number, "row") == says
