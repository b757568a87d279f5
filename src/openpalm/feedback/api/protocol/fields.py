"""Reads the fields of a request's JSON body or query, strictly.

Every field is read by its type and bounds; a field that is not read is refused. Texts that a
database cannot hold (NUL, half of a surrogate pair) are refused too.
"""

import json
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from django.core.exceptions import RequestDataTooBig
from django.http import HttpRequest, UnreadablePostError

from openpalm.base.console import shown
from openpalm.feedback.api.protocol.errors import ApiError
from openpalm.feedback.database import storable

REQUIRED: Any = object()
MAX_DEPTH = 20


class Fields:
    """The fields of an object; `inside` is the path of the object in the body."""

    def __init__(self, values: dict[str, Any], inside: str = "", *, is_query: bool = False):
        self._values = values
        self._inside = inside
        self._is_query = is_query
        self._read: set[str] = set()

    def finish(self) -> None:
        """Refuses fields that were not read."""
        for name in self._values:
            if name not in self._read:
                known = ", ".join(sorted(self._read)) or "none"
                what = "parameter" if self._is_query else "field"
                self.fail(name, f"there is no such {what} here; known: {known}")

    def fail(self, name: str, message: str) -> NoReturn:
        path = self.path(name)
        raise ApiError(400, f"{shown(path)[1:-1]}: {message}", path[:200])

    def path(self, name: str) -> str:
        return f"{self._inside}.{name}" if self._inside else name

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def text(self, name: str, *, most: int, default: Any = REQUIRED) -> Any:
        """A text of 1 to `most` characters."""
        fits = f"a text of 1 to {most} characters"
        return self._get(name, fits, lambda v: isinstance(v, str) and 0 < len(v) <= most, default)

    def whole(self, name: str, low: int, high: int, default: Any = REQUIRED) -> Any:
        fits = f"a whole number from {low} to {high}"
        return self._get(name, fits, lambda v: type(v) is int and low <= v <= high, default)

    def number(self, name: str, low: float, high: float, default: Any = REQUIRED) -> Any:
        def is_one(value: Any) -> bool:
            return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

        return self._get(name, f"a number from {low:g} to {high:g}", is_one, default)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        return self._get(name, "true or false", lambda v: isinstance(v, bool), default)

    def choice(self, name: str, choices: Iterable[Any], default: Any = REQUIRED) -> Any:
        known = list(choices)
        listed = ", ".join(map(str, known))
        fits = f"one of {listed}"
        return self._get(name, fits, lambda v: type(v) in (str, int) and v in known, default)

    def group(self, name: str, most: int, default: Any = REQUIRED) -> Any:
        """An object of free form, at most `most` characters as JSON."""

        def is_group(value: Any) -> bool:
            return isinstance(value, dict) and len(json.dumps(value)) <= most

        return self._get(name, f"an object of at most {most} characters", is_group, default)

    def texts(self, name: str, *, most: int, length: int, default: Any = REQUIRED) -> Any:
        """A list of texts."""

        def is_list(value: Any) -> bool:
            return (
                isinstance(value, list)
                and len(value) <= most
                and all(isinstance(v, str) and 0 < len(v) <= length for v in value)
            )

        fits = f"a list of at most {most} texts of 1 to {length} characters"
        return self._get(name, fits, is_list, default)

    def wholes(self, name: str, *, most: int, high: int, default: Any = REQUIRED) -> Any:
        """A list of whole numbers from 1 to `high`."""

        def is_list(value: Any) -> bool:
            return (
                isinstance(value, list)
                and 0 < len(value) <= most
                and all(type(v) is int and 1 <= v <= high for v in value)
            )

        fits = f"a list of 1 to {most} whole numbers from 1"
        return self._get(name, fits, is_list, default)

    def objects(self, name: str, *, least: int, most: int) -> list["Fields"]:
        """A list of objects, each to be read and finished."""

        def is_list(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(v, dict) for v in value)

        values = self._get(name, "a list of objects", is_list, REQUIRED)
        if not least <= len(values) <= most:
            self.fail(name, f"has {len(values)} objects; {least} to {most} are allowed")
        return [Fields(v, f"{self.path(name)}[{i}]") for i, v in enumerate(values)]

    def _get(self, name: str, fits: str, is_one: Callable[[Any], bool], default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name)
        if self._is_query and isinstance(value, str) and "whole number" in fits:
            value = _whole(value)
        if value is None:
            if default is REQUIRED:
                self.fail(name, f"is missing; it must be {fits}")
            return default
        if not is_one(value):
            self.fail(name, f"must be {fits}")
        return value


def _whole(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else text


def query_of(request: HttpRequest) -> Fields:
    """The parameters of the URL, each at most once."""
    values: dict[str, Any] = {}
    for name, given in request.GET.lists():
        if len(given) > 1:
            raise ApiError(400, f"{shown(name)}: is given {len(given)} times", name[:200])
        _check_text(given[0], name)
        values[name] = given[0]
    return Fields(values, is_query=True)


def body_of(request: HttpRequest) -> Fields:
    """The JSON object of the body; without a body, an object without fields."""
    try:
        content = request.body
    except RequestDataTooBig:
        raise ApiError(413, "the body is too large; send less at a time") from None
    except UnreadablePostError:
        raise ApiError(400, "the body ended too early") from None
    if not content:
        return Fields({})
    if request.content_type != "application/json":
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    try:
        value = json.loads(content, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {_reason(error)}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    _check_value(value, "", MAX_DEPTH)
    return Fields(value)


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else f"{error}"[:200]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has the same field twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_value(value: Any, path: str, depth: int) -> None:
    if depth < 0:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep", path[:200])
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ApiError(400, "a number is too large", path[:200])
    elif isinstance(value, list):
        for i, one in enumerate(value):
            _check_value(one, f"{path}[{i}]", depth - 1)
    elif isinstance(value, dict):
        for name, one in value.items():
            _check_text(name, path)
            _check_value(one, f"{path}.{name}" if path else name, depth - 1)


def _check_text(text: str, path: str) -> None:
    if storable(text) != text:
        raise ApiError(
            400, "a text has a NUL or half of a surrogate pair, which cannot be stored", path[:200]
        )
