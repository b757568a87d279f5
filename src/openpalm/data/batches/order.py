"""The shuffled order of training data: fixed by a seed, equal for any number of ranks, resumable.

An order is a function from the global row number to an item. The count of rows consumed so far is
therefore the whole state that resuming needs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from openpalm.base.permutation import mix64, order_key, shuffled
from openpalm.errors import DataError

T = TypeVar("T")


class Draws(NamedTuple, Generic[T]):
    """An endless sequence of items, such as window starts or example numbers."""

    epoch: int
    """draws in an epoch"""
    item: Callable[[int], T]
    """the item of a draw; draws are counted through all epochs"""
    identity: dict[str, Any]
    """distinguishes it from other sequences of the same length"""


class Cursor:
    """Assigns global rows to this rank and saves the position in them.

    A step takes world_size * rows consecutive global rows; a rank's share of them is contiguous.
    `identity` describes the data and its order: a cursor of other data is refused.
    """

    def __init__(self, identity: dict[str, Any], rows: int, rank: int, world_size: int):
        if rows < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rows {rows}, rank {rank} of {world_size}: out of range")
        self._identity, self._rows = identity, rows
        self._rank, self._world_size = rank, world_size
        self._consumed = 0

    def take(self) -> range:
        """This rank's rows of the next step."""
        first = self._consumed + self._rank * self._rows
        # Every rank counts the rows of all ranks, so any number of ranks can resume from it.
        self._consumed += self._world_size * self._rows
        return range(first, first + self._rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows_consumed": self._consumed, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise DataError(f"the data cursor is {state!r:.40}; it is damaged")
        differing = [k for k, v in self._identity.items() if state.get(k) != v]
        if differing:
            listed = ", ".join(
                f"{k} {state.get(k)} instead of {self._identity[k]}" for k in differing
            )
            raise DataError(
                f"the data cursor is of other data ({listed}); resume with the same data"
            )
        consumed = state.get("rows_consumed")
        # Not isinstance, which would take true for 1.
        if type(consumed) is not int or consumed < 0:
            raise DataError(f"the data cursor's rows_consumed is {consumed!r}; it is damaged")
        self._consumed = consumed


def shuffle(size: int, seed: int) -> Draws[int]:
    """Item numbers below `size`, each once an epoch; every epoch is shuffled differently."""

    def item(draw: int) -> int:
        epoch, index = divmod(draw, size)
        return shuffled(index, size, order_key(seed, epoch))

    return Draws(size, item, {})


def windows(tokens: int, length: int, seed: int) -> Draws[int]:
    """Start positions of windows of `length` + 1 tokens; a token is a target at most once an epoch.

    An epoch shifts all windows by a random phase, so that their edges move, and shuffles them.
    The phase leaves out less than two windows of tokens. Raises DataError for too few tokens.
    """
    if tokens < length + 1:
        raise DataError(
            f"sequence_length {length}: needs {length + 1} tokens, the data has {tokens}; use a "
            "shorter sequence or more text"
        )
    # Room for the largest phase, unless that would leave no window.
    shifted = (tokens - length) // length
    count = shifted or (tokens - 1) // length

    def item(draw: int) -> int:
        epoch, index = divmod(draw, count)
        key = order_key(seed, epoch)
        phase = mix64(key) % length if shifted else 0
        # Neighbouring windows share one token: the last target of one begins the next.
        return phase + shuffled(index, count, key) * length

    return Draws(count, item, {})


def mixture(sizes: Sequence[int], shares: Sequence[int], seed: int) -> Draws[int]:
    """Items of several tasks in random order; the items of all tasks are numbered consecutively.

    sizes: items of each task; shares: draws of each task in an epoch. A task repeats an item only
    after it has used all its items, across epochs.
    """
    epoch_size = sum(shares)
    # A key of its own for each task, or tasks of equal size would be in the same order.
    tasks = [shuffle(size, mix64(seed + task + 1)).item for task, size in enumerate(sizes)]

    def item(draw: int) -> int:
        epoch, index = divmod(draw, epoch_size)
        # A shuffled epoch: places [0, shares[0]) belong to task 0, the next shares[1] to task 1.
        place, first, task = shuffled(index, epoch_size, order_key(seed, epoch)), 0, 0
        while place >= shares[task]:
            place -= shares[task]
            first += sizes[task]
            task += 1
        # Counted on across epochs: only so are all items used before one is repeated.
        return first + tasks[task](epoch * shares[task] + place)

    return Draws(epoch_size, item, {"sizes": list(sizes), "shares": list(shares)})


def interleaved(
    sets: Sequence[Draws[int]], sizes: Sequence[int], shares: Sequence[int]
) -> Draws[int]:
    """Draws of several sets, each in its own order, evenly interleaved in proportion to `shares`.

    After any number of draws, each set has its share of them to within one draw for each set. Its
    items, below its size, are numbered consecutively after those of the sets before it.
    """
    epoch_size = sum(shares)

    def item(draw: int) -> int:
        # Set by set: either this draw is one of the set's, or it is one of the remaining sets'.
        left, first = epoch_size, 0
        for draws, size, share in zip(sets, sizes, shares, strict=True):
            # How many of the draws before this one were the set's; whole numbers stay exact.
            before = draw * share // left
            if (draw + 1) * share // left > before:
                return first + draws.item(before)
            draw, left, first = draw - before, left - share, first + size
        raise AssertionError("the last set takes every draw that is left")

    return Draws(epoch_size, item, {"sizes": list(sizes), "shares": list(shares)})
