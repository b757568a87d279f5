"""Conversion of plain values (texts, dicts, JSON) to the types of a dataclass, with checks.

A text stays exactly as typed: nothing here parses YAML. Messages name the value and the wanted
kind in words, never a Python type.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from openpalm.base.console import shown
from openpalm.errors import DataError, SettingsError

T = TypeVar("T")

_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a group of fields",
}
_MAX_SHOWN = 100
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


class WrongValue(ValueError):
    """The value has the wrong type; the message names the wanted one, as in `a whole number`."""


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of any other type, the type itself."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def is_flag(hint: Any) -> bool:
    return bool in alternatives(hint)


def is_list(hint: Any) -> bool:
    return any(typing.get_origin(kind) in (list, tuple) for kind in alternatives(hint))


def optional(hint: Any) -> bool:
    return type(None) in alternatives(hint)


def home(text: str) -> str:
    """Expands `~` and `~/x` as a shell does; other texts stay as they are."""
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def convert(value: object, hint: Any) -> Any:
    """`value` as the type `hint`. Raises WrongValue naming the wanted kind."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    if value is None:
        if optional(hint):
            return None
        raise WrongValue("left out or have a value")
    if is_list(hint):
        return _texts(value, or_one=str in kinds)
    (kind,) = kinds
    textual = kind in (str, Path)
    if value == "null" and optional(hint) and not textual:
        return None
    if typing.get_origin(kind) is typing.Literal:
        return _choice(value, typing.get_args(kind))
    converters = {int: _whole, float: _number, bool: _flag, Path: _path, str: _text}
    return converters[kind](value)


def shortened(value: object) -> str:
    """A value for an error message: one line, not too long."""
    in_files = {None: "null", True: "true", False: "false"}  # as YAML and JSON spell them
    plain = in_files[value] if value is None or isinstance(value, bool) else str(value)
    text = " ".join(plain.split())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def build(kind: type[T], values: dict[str, Any], inside: str = "", *, exact: bool = False) -> T:
    """The dataclass `kind` from nested plain values, such as `plain` returns.

    exact: no value is converted, see `checked`. Raises SettingsError for an unknown name, a
    missing one, or a wrong value. `inside` is the dotted prefix of the names in messages.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(inside + str(name) for name in values if name not in hints)
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}{_meant(unknown, hints, inside)}")
    missing = [name for name in required(kind) if name not in values]
    if missing:
        raise SettingsError(f"missing {', '.join(inside + name for name in missing)}")
    return kind(
        **{
            name: checked(hints[name], value, inside + name, exact=exact)
            for name, value in values.items()
        }
    )


NOT_AN_OPTION = {"option": False}
"""Metadata of a dataclass field that is neither an option nor written with the settings."""


def settings_of(kind: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that are settings."""
    return [field for field in dataclasses.fields(kind) if field.metadata != NOT_AN_OPTION]


def plain(value: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars, without the fields that are None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, plain(getattr(value, f.name))) for f in settings_of(value))
        return {name: item for name, item in items if item is not None and item != {}}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def required(kind: type) -> list[str]:
    """The fields without a default."""
    fields = dataclasses.fields(kind)
    unset = dataclasses.MISSING
    return [f.name for f in fields if f.default is unset and f.default_factory is unset]


def checked(hint: Any, value: object, name: str, *, exact: bool = False) -> Any:
    """`value` as the type `hint`, which may be a dataclass.

    exact: the value is of a file that only we write, so a scalar must have its very type and a
    whole number must not be negative; tuples and dicts of values are read too. Raises
    SettingsError.
    """
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            inside = f"{name}." if name else ""
            return build(typing.cast(type, hint), value, inside, exact=exact)
        if isinstance(value, typing.cast(type, hint)):
            return value
        raise not_a_group(name, value, settings_names(hint))
    try:
        return _exactly(hint, value, name) if exact else convert(value, hint)
    except WrongValue as wrong:
        given = repr(value) if exact else value
        named = f"{name} {shortened(given)}".strip()
        raise SettingsError(f"{named}: must be {wrong}") from None


def _exactly(hint: Any, value: object, name: str) -> Any:
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return value
    if kind is tuple:
        items = enumerate(value if isinstance(value, list) else _not(list))
        return tuple(checked(arguments[0], v, f"{name}[{i}]", exact=True) for i, v in items)
    if kind is dict:
        items = (value if isinstance(value, dict) else _not(dict)).items()
        inside = f"{name}." if name else ""
        return {
            k: checked(arguments[1], v, f"{inside}{shortened(k)}", exact=True) for k, v in items
        }
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and (type(value) is not int or value < 0):
        raise WrongValue("a whole number, 0 or more")
    return value if type(value) is kind else _not(kind)


def not_a_group(name: str, value: object, names: list[str]) -> SettingsError:
    """The error for a single value where a group of settings is wanted."""
    wanted = f"a group of settings, such as {name}: {{{names[0]}: ...}}"
    return SettingsError(f"{name} {shortened(value)}: must be {wanted}")


def settings_names(kind: Any) -> list[str]:
    return [field.name for field in settings_of(kind)]


def _meant(unknown: list[str], hints: dict[str, Any], inside: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(unknown[0].removeprefix(inside), hints, n=1)
    return f" (did you mean {inside}{near[0]}?)" if near else ""


def _whole(value: object) -> int:
    """1e3 is a whole number too."""
    if type(value) is int:
        return value
    try:
        return int(value) if isinstance(value, str) else _not(int)
    except ValueError:
        number = _number(value, int)
    if not (math.isfinite(number) and number.is_integer() and abs(number) < 2**53):
        _not(int)
    return int(number)


def _number(value: object, wanted: type = float) -> float:
    if type(value) not in (int, float, str):
        _not(wanted)
    # YAML writes the numbers that are not finite with a dot.
    text = value.replace(".inf", "inf").replace(".nan", "nan") if isinstance(value, str) else value
    try:
        return float(typing.cast(float, text))
    except (ValueError, OverflowError):
        _not(wanted)


def _flag(value: object) -> bool:
    known = value if type(value) is bool else _FLAGS.get(str(value).lower())
    return _not(bool) if known is None else known


def _text(value: object) -> str:
    return value if isinstance(value, str) else _not(str)


def _path(value: object) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise WrongValue("a path")
    if _URL.match(value):
        raise WrongValue("a local path (`openpalm copy` copies folders to and from URLs)")
    return Path(home(value))


def _choice(value: object, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, str) and value in choices:
        return value
    raise WrongValue(f"one of {', '.join(map(str, choices))}")


def _texts(value: object, *, or_one: bool) -> list[str] | str:
    """A list of texts, or a text that holds one as JSON; every other text is a single item."""
    if isinstance(value, str):
        listed = _json_list(value)
        if listed is not None:
            return listed
        return value if or_one else [value]
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    raise WrongValue("a list of texts")


def _json_list(text: str) -> list[str] | None:
    try:
        import json

        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    texts = isinstance(found, list) and all(isinstance(item, str) for item in found)
    return found if texts else None


def _not(kind: type) -> typing.NoReturn:
    raise WrongValue(_WANTED[kind])


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def expect(field: str, value: Any, wanted: str, right: Callable[[Any], bool]) -> None:
    """Raises DataError naming the field, its value and the wanted kind, unless it is right."""
    if not right(value):
        scalar = isinstance(value, bool | int | float)
        said = shown(value) if isinstance(value, str) else f"a {type(value).__name__}"
        said = "missing" if value is None else str(value)[:60] if scalar else said
        raise DataError(f'field "{field}" is {said}; it must be {wanted}')


def at(where: str, make: Callable[..., T], *given: Any) -> T:
    """Calls `make`; a DataError that it raises gets the prefix `where`, such as a file name."""
    try:
        return make(*given)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
