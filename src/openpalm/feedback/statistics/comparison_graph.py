"""Which models were compared, and who ever won: what decides if strengths exist at all.

Ford 1957 and Hunter 2004, assumption 1: Bradley-Terry strengths are finite and unique exactly if
the models cannot be split into two sets of which one never won or tied against the other.
"""

import numpy as np


def reachable(edges: np.ndarray) -> np.ndarray:
    """Reflexive and transitive closure of a graph, (m, m) bool, by repeated squaring."""
    closure = edges | np.eye(len(edges), dtype=bool)
    while True:
        wider = (closure.astype(np.float32) @ closure.astype(np.float32)) > 0
        if (wider == closure).all():
            return closure
        closure = wider


def classes(mutual: np.ndarray) -> np.ndarray:
    """Numbers the classes of an equivalence relation (m, m) in order of first member, (m,)."""
    first = mutual.argmax(axis=1)
    return np.unique(first, return_inverse=True)[1]


def groups_of(compared: np.ndarray) -> np.ndarray:
    """Group of each model: within a group a chain of comparisons connects any two, (m,).

    compared (m, m): number of comparisons of two models. Strengths of different groups have no
    common scale.
    """
    return classes(reachable((compared + compared.T) > 0))


def win_classes(wins: np.ndarray) -> np.ndarray:
    """Class of each model: within a class everyone won or tied, by a chain, against everyone, (m,).

    wins (m, m): wins of the row's model, ties as half. A group with several classes has no
    finite strengths: the models of one class never lost to another class.
    """
    closure = reachable(wins > 0)
    return classes(closure & closure.T)
