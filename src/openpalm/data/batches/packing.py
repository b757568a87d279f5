"""Which records share a row, so that little of it is padding. Knows lengths only."""

from bisect import bisect_left, insort
from collections.abc import Iterable


def best_fit(lengths: Iterable[int], capacity: int) -> list[list[int]]:
    """Rows of items, by number, whose lengths add up to at most `capacity` in each.

    In the order given, an item goes into the fullest row that has room for it, else into a new
    one (best fit; Ding et al. 2024, "Fewer truncations improve language modeling").
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
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
