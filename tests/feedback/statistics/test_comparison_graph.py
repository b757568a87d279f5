"""Groups and win classes of small graphs, by hand and against walks of every length."""

import numpy as np

from openpalm.feedback.statistics.comparison_graph import groups_of, reachable, win_classes


def graph(size, *edges):
    wins = np.zeros((size, size))
    for winner, loser in edges:
        wins[winner, loser] = 1
    return wins


def test_groups():
    assert groups_of(graph(5, (0, 3), (4, 3), (2, 1))).tolist() == [0, 1, 1, 0, 0]
    assert groups_of(graph(3)).tolist() == [0, 1, 2]


def test_win_classes():
    """0 beats a circle of 1, 2, 3, which beats 4: three classes in one group."""
    wins = graph(5, (0, 1), (1, 2), (2, 3), (3, 1), (3, 4))
    assert win_classes(wins).tolist() == [0, 1, 1, 1, 2]
    assert win_classes(wins + graph(5, (4, 0))).tolist() == [0] * 5
    assert groups_of(wins).tolist() == [0] * 5


def test_classes_do_not_depend_on_the_order():
    wins = graph(5, (4, 1), (1, 2), (2, 3), (3, 1), (3, 0))
    assert win_classes(wins).tolist() == [0, 1, 1, 1, 2]


def test_reachable_is_walks_of_every_length():
    for seed in range(20):
        edges = np.random.default_rng(seed).random((8, 8)) < 0.15
        walks = sum(np.linalg.matrix_power(edges.astype(float), n) for n in range(8))
        assert (reachable(edges) == (walks > 0)).all()
