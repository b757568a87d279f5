"""Labelers who judge at the same time lose nothing when the site's processes are killed.

The whole measurement, 500 items and 20 kills, is benchmarks/feedback_concurrency.py.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from feedback_concurrency import measure


def test_every_item_is_judged_by_exactly_two_while_processes_are_killed(site):
    result = measure(site, "", labelers=8, items=60, overlap=2, kills=2)
    assert result.right, result
    assert result.responses == result.acknowledged == 120
    assert sum(result.kills.values()) == 2
