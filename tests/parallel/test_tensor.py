"""Which sizes tensor parallelism can share, and which key heads a process computes."""

from dataclasses import replace

import pytest

from openpalm.errors import SettingsError
from openpalm.model.config import PRESETS
from openpalm.parallel.key_heads import _heads_used
from openpalm.parallel.tensor import check

PALM = PRESETS["palm-410m"].config


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_numbers_that_divide_the_model(processes: int):
    check(PALM, processes)


@pytest.mark.parametrize(
    ("processes", "changes", "says"),
    [
        (3, {}, r"^--parallel.tensor 3: must divide heads \(8\) and .*; use 1, 2, 4 or 8$"),
        (16, {}, r"must divide heads \(8\) and ff_dim \(4096\), .*; use 1, 2, 4 or 8$"),
        (4, {"ff_dim": 4098}, r"ff_dim \(4098\), .*; use 1 or 2$"),
        (2, {"heads": 7}, "; use 1$"),
        # Parts of 2 rows: 32 processes would have all rows, the others none.
        (48, {"heads": 48, "ff_dim": 96, "vocab_size": 5}, r"\(64\); use 1, 2, 3, 4, 6, 8 or 16$"),
    ],
)
def test_numbers_that_do_not(processes: int, changes: dict[str, int], says: str):
    with pytest.raises(SettingsError, match=says):
        check(replace(PALM, **changes), processes)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "processes", "used"),
    [
        (8, 2, 4, [[0], [0], [1], [1]]),
        (6, 2, 3, [[0], [0, 1], [1]]),  # the second process has the last of 0 and the first of 1
        (12, 4, 3, [[0, 0, 0, 1], [1, 1, 2, 2], [2, 3, 3, 3]]),
    ],
)
def test_a_process_computes_the_keys_of_its_queries(
    heads: int, kv_heads: int, processes: int, used: list[list[int]]
):
    """Query head h reads key head h // (heads / kv_heads); equal groups need each key once."""
    config = replace(PALM, heads=heads, kv_heads=kv_heads)
    own = heads // processes
    for rank in range(processes):
        found = _heads_used(config, rank, processes)
        groups = own // len(found)
        read = [found[head // groups] for head in range(own)]
        assert read == [(rank * own + head) // (heads // kv_heads) for head in range(own)]
        assert len(found) <= len(used[rank])
