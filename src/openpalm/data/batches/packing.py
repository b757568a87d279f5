"""Packing of examples into rows by best fit, so that rows hold little padding. Knows lengths only.

Ding et al. 2024, "Fewer truncations improve language modeling".
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence

from openpalm.base.permutation import mix64, order_key, shuffled
from openpalm.data.batches.order import Draws


def packed_draws(
    draws: Draws[int], lengths: Sequence[int], capacity: int, seed: int
) -> Draws[list[int]]:
    """Rows of item numbers: the draws of each epoch packed by best fit, then shuffled.

    lengths: tokens of each item, at most `capacity`. `epoch` is the first epoch's number of rows.
    """
    rows = _PackedRows(draws, lengths, capacity, seed)
    return Draws(rows.starts[1], rows.row, draws.identity)


class _PackedRows:
    """Packs one epoch at a time: its order decides which items share a row."""

    def __init__(self, draws: Draws[int], lengths: Sequence[int], capacity: int, seed: int):
        self._draws, self._lengths, self._capacity = draws, lengths, capacity
        self._seed = seed
        self._epoch, self._packed = -1, list[list[int]]()
        # Epochs differ in their number of rows, so the first row of each is known only once all
        # epochs before it were packed.
        self.starts = [0]
        self._pack(0)

    def row(self, number: int) -> list[int]:
        while number >= self.starts[-1]:
            self._pack(len(self.starts) - 1)
        epoch = bisect_right(self.starts, number) - 1
        self._pack(epoch)
        index, key = number - self.starts[epoch], order_key(mix64(self._seed), epoch)
        # The last rows are the emptiest; the shuffle spreads them over the epoch.
        return self._packed[shuffled(index, len(self._packed), key)]

    def _pack(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        first = epoch * self._draws.epoch
        items = [self._draws.item(first + draw) for draw in range(self._draws.epoch)]
        packed = best_fit((self._lengths[i] for i in items), self._capacity)
        self._packed = [[items[n] for n in row] for row in packed]
        self._epoch = epoch
        if epoch == len(self.starts) - 1:
            self.starts.append(self.starts[-1] + len(self._packed))


def best_fit(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Item numbers in rows; the lengths in a row add up to at most `capacity`.

    Items are placed in the order given: into the fullest row that has room, else into a new row.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows with that many
    rooms: list[int] = []  # the keys of with_room, sorted
    for item, length in enumerate(lengths):
        assert 0 < length <= capacity, f"an item of {length} in rows of {capacity}"
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(item)
        left = room - length
        if left and left not in with_room:
            insort(rooms, left)
        if left:
            with_room.setdefault(left, []).append(row)
    return rows
