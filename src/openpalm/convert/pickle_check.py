"""Checks a pickle before it is read: bounds time and memory from its opcodes; executes nothing.

A few hundred bytes can describe a tuple of tuples with 2^60 leaves: every tuple refers twice to
the one before. Building it is quick, but hashing it as a dictionary key never ends. So the opcodes
are followed with the unfolded size of each object instead of the object.
"""

import pickletools
from dataclasses import dataclass
from typing import IO, Any, cast

MAX_OPCODES = 1 << 22
MAX_WORK = 1 << 24
MAX_DEPTH = 200
_WORD = 1 << 63

_LEAVES = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINSTRING", "GLOBAL"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"),
}
_SIZED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(slots=True)
class _Object:
    """`size`: objects in it when unfolded; `held`: whether another object refers to it."""

    size: int = 1
    depth: int = 1
    held: bool = False
    long: bool = False

    def add(self, parts: "list[_Object]") -> None:
        for part in parts:
            part.held = True
            self.size += part.size
            self.depth = max(self.depth, part.depth + 1)
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nests more than {MAX_DEPTH} objects")


def check_pickle(file: Any) -> None:
    """Checks the pickle at the file's position, up to its end.

    Raises ValueError with the reason where reading it could take unbounded time or memory, or
    where it uses opcodes that no checkpoint needs.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], file))):
            if number > MAX_OPCODES:
                raise ValueError(f"has more than {MAX_OPCODES:,} opcodes")
            machine.follow(opcode.name, argument)
    except (IndexError, KeyError, AttributeError, OverflowError, MemoryError):
        raise ValueError("is no whole pickle") from None


class _Machine:
    def __init__(self):
        self._stack: list[_Object] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Object] = {}
        self._work = 0

    def follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LEAVES:
            stack.append(_Object(long=name == "LONG1" and abs(argument) >= _WORD))
        elif name in _SIZED_TUPLES:
            self._push(self._pop(_SIZED_TUPLES[name]))
        elif name == "TUPLE":
            self._push(self._pop_to_mark())
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name not in ("PROTO", "STOP"):
            self._change(name)

    def _change(self, name: str) -> None:
        """The opcodes that fill objects or call something."""
        if name in ("APPEND", "APPENDS"):
            self._stack[-1].add(self._pop(1) if name == "APPEND" else self._pop_to_mark())
        elif name in ("SETITEM", "SETITEMS"):
            parts = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            self._hash(parts[::2])
            self._stack[-1].add(parts)
        elif name == "BUILD":
            state, built = self._pop(1), self._stack[-1]
            # Objects that refer to it were measured without this state.
            if built.held:
                raise ValueError("fills an object that another one holds already")
            self._hash(state)
            built.add(state)
        elif name in ("REDUCE", "NEWOBJ"):
            parts = self._pop(2)
            self._hash(parts)
            self._push(parts)
        elif name == "BINPERSID":
            self._hash(self._pop(1))
            self._stack.append(_Object())
        else:
            raise ValueError(f"uses the opcode {name}, which no checkpoint needs")

    def _push(self, parts: list[_Object]) -> None:
        made = _Object()
        made.add(parts)
        self._stack.append(made)

    def _pop(self, count: int) -> list[_Object]:
        if len(self._stack) < count:
            raise IndexError
        parts = self._stack[-count:]
        del self._stack[-count:]
        return parts

    def _pop_to_mark(self) -> list[_Object]:
        mark = self._marks.pop()
        parts = self._stack[mark:]
        del self._stack[mark:]
        return parts

    def _hash(self, parts: list[_Object]) -> None:
        """Counts objects that a dictionary, a set or a call may visit in full."""
        self._work += sum(part.size for part in parts)
        if self._work > MAX_WORK:
            raise ValueError("unfolds to far more objects than it has")
        if any(part.long for part in parts):
            raise ValueError("holds a key or an argument of more than 64 bits")
