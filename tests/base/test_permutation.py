"""The permutation is one, is fair, and stays the same for all time."""

import numpy as np
import pytest

from openpalm.base.permutation import shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_a_shuffle_is_a_permutation(size):
    assert sorted(shuffled(i, size, key=5) for i in range(size)) == list(range(size))


def test_a_shuffle_is_fair():
    # Where index 0 of five goes, over many keys: each place about as often.
    counts = np.bincount([shuffled(0, 5, key) for key in range(5000)], minlength=5)
    assert (abs(counts - 1000) < 150).all()
    moved = np.array([shuffled(i, 4000, 9) for i in range(4000)])
    assert abs(np.corrcoef(moved, np.arange(4000))[0, 1]) < 0.08


def test_the_permutation_is_fixed_for_all_time():
    # Cursors on disk count on it.
    assert [shuffled(i, 10, key=123) for i in range(10)] == [8, 0, 5, 2, 7, 3, 6, 4, 9, 1]
