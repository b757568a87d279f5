"""Which item comes next: shuffled by one seed, shared by any number of ranks, resumed anywhere.

An order is a function of a row's number, so that the count of rows taken so far is all that
resuming needs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from openpalm.base.permutation import mix64, order_key, shuffled
from openpalm.errors import DataError


class Draws(NamedTuple):
    """An endless sequence of items."""

    epoch: int
    """draws in an epoch"""
    item: Callable[[int], int]
    """the item of a draw, counted through all epochs"""
    identity: dict[str, Any]
    """what tells it from other sequences of as many items"""


class Cursor:
    """Which global rows come next on this rank, and what identifies their order.

    A step takes world_size * rows consecutive global rows; a rank's share of them is contiguous.
    """

    def __init__(self, identity: dict[str, Any], rows: int, rank: int, world_size: int):
        if rows < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rows {rows}, rank {rank} of {world_size}: out of range")
        self._identity, self._rows = identity, rows
        self._rank, self._world_size = rank, world_size
        self._consumed = 0

    def take(self) -> range:
        first = self._consumed + self._rank * self._rows
        self._consumed += self._world_size * self._rows
        return range(first, first + self._rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows_consumed": self._consumed, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise DataError(f"the data cursor is {state!r:.40}; it is damaged")
        differing = [k for k, v in self._identity.items() if state.get(k) != v]
        if differing:
            told = ", ".join(
                f"{k} {state.get(k)} instead of {self._identity[k]}" for k in differing
            )
            raise DataError(f"the data cursor is of other data ({told}); resume with the same data")
        consumed = state.get("rows_consumed")
        if type(consumed) is not int or consumed < 0:
            raise DataError(f"the data cursor's rows_consumed is {consumed!r}; it is damaged")
        self._consumed = consumed


class Order:
    """Indices of `size` items, all of them once an epoch, shuffled anew each time.

    `draws` puts another order in the place of that one.
    """

    def __init__(
        self,
        size: int,
        identity: dict[str, Any],
        *,
        rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        draws: Draws | None = None,
    ):
        draws = draws or shuffle(size, seed)
        self._cursor = Cursor(identity | draws.identity, rows, rank, world_size)
        self._item = draws.item

    def take(self) -> list[int]:
        """The next `rows` indices of this rank."""
        return [self._item(row) for row in self._cursor.take()]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, ready for JSON; the same on every rank."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a cursor of any number of ranks. Raises DataError if it is of other data."""
        self._cursor.load_state_dict(state)


def shuffle(size: int, seed: int) -> Draws:
    """All of `size` items once an epoch, in an order of its own each time."""

    def item(draw: int) -> int:
        epoch, index = divmod(draw, size)
        return shuffled(index, size, order_key(seed, epoch))

    return Draws(size, item, {})


def windows(tokens: int, length: int, seed: int) -> Draws:
    """Where windows of `length` + 1 of so many tokens begin: each a target at most once an epoch.

    An epoch starts at a phase drawn from (seed, epoch), so that the windows' edges move, and
    shuffles its windows. Raises DataError if there are too few tokens.
    """
    if tokens < length + 1:
        raise DataError(
            f"sequence_length {length}: needs {length + 1} tokens, the data has {tokens}; use a "
            "shorter sequence or more text"
        )
    # Room for the largest phase, unless that would leave no window.
    moved = (tokens - length) // length
    count = moved or (tokens - 1) // length

    def item(draw: int) -> int:
        epoch, index = divmod(draw, count)
        key = order_key(seed, epoch)
        phase = mix64(key) % length if moved else 0
        return phase + shuffled(index, count, key) * length

    return Draws(count, item, {})


def mixture(sizes: Sequence[int], shares: Sequence[int], seed: int) -> Draws:
    """Items of several tasks, numbered through all of them.

    sizes: items of each task; shares: how many of an epoch's draws each has. A task goes through
    all its items before it repeats one, from one epoch into the next.
    """
    epoch_size = sum(shares)
    own = [shuffle(size, mix64(seed + task + 1)).item for task, size in enumerate(sizes)]

    def item(draw: int) -> int:
        epoch, index = divmod(draw, epoch_size)
        place, first, task = shuffled(index, epoch_size, order_key(seed, epoch)), 0, 0
        while place >= shares[task]:
            place -= shares[task]
            first += sizes[task]
            task += 1
        return first + own[task](epoch * shares[task] + place)

    return Draws(epoch_size, item, {"sizes": list(sizes), "shares": list(shares)})


def interleaved(own: Sequence[Draws], sizes: Sequence[int], shares: Sequence[int]) -> Draws:
    """Draws of several sets, each in its own order, in the proportion of `shares` all along.

    Of any number of first draws, a set has its share but for one draw for each set. Its items,
    below its size, are numbered on from those of the sets before it.
    """
    epoch_size = sum(shares)

    def item(draw: int) -> int:
        left, first = epoch_size, 0
        for task, size, share in zip(own, sizes, shares, strict=True):
            before = draw * share // left
            if (draw + 1) * share // left > before:
                return first + task.item(before)
            draw, left, first = draw - before, left - share, first + size
        raise AssertionError("the last set takes every draw that is left")

    return Draws(epoch_size, item, {"sizes": list(sizes), "shares": list(shares)})
