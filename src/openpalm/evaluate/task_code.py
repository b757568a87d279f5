"""Keeps code out of the task definitions of lm-evaluation-harness that a user's folder holds.

A definition can run code in four ways: `!function` imports Python files and any installed function;
a metric that the library does not know is a script that `evaluate` loads from a path or the Hub;
prompts are Jinja templates, which without a sandbox reach every Python object; other YAML tags.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openpalm.errors import DataError, one_line

_MAX_BYTES = 1 << 22


def refuse_code(folder: Path, option: str) -> None:
    """Raises DataError if a .yaml below the folder, or a file that it includes, names code.

    Files of the library itself may be included. `option` is the one that allows code.
    """
    library = Path(str(import_module("lm_eval.tasks").__file__)).resolve().parent
    seen: set[Path] = set()
    waiting = list(folder.rglob("*.yaml"))
    while waiting:
        file = waiting.pop().expanduser().resolve()
        if file in seen or file.is_relative_to(library):
            continue
        seen.add(file)
        waiting += _included(file, option)


def _included(file: Path, option: str) -> list[Path]:
    """The files that this one includes."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        """As the library reads the file, but without imports."""

    def refuse(_: Any, node: Any) -> None:
        named = one_line(node.value, 80)
        raise DataError(
            f"{file}: names Python code (!function {named}), which was not run; "
            f"if you trust the folder, add {option}"
        )

    Loader.add_constructor("!function", refuse)
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise DataError(f"{file}: has more than {_MAX_BYTES:,} bytes; it is no definition")
        content = Loader(file.read_bytes()).get_single_data()
    except (yaml.YAMLError, OSError, ValueError, RecursionError, TypeError):
        return []  # the library cannot read it either
    included = content.get("include", []) if isinstance(content, dict) else []
    names = included if isinstance(included, list) else [included]
    return [file.parent / name for name in names if isinstance(name, str)]


@contextmanager
def no_scripts(option: str) -> Iterator[None]:
    """Metrics that are scripts are not loaded, and raise DataError at the end."""
    wanted: list[str] = []
    before = sys.modules.get("evaluate")

    def load(name: object, *_: object, **__: object) -> None:
        wanted.append(one_line(name, 80))
        raise ImportError("not loaded")

    sys.modules["evaluate"] = SimpleNamespace(load=load)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if before is not None:
            sys.modules["evaluate"] = before
        if wanted:
            raise DataError(
                f"metric {wanted[0]}: lm-evaluation-harness has none of that name; `evaluate` "
                f"would run it as a script: if you trust it, add {option}"
            ) from None


@contextmanager
def sandboxed() -> Iterator[None]:
    """Templates reach only the row that they are filled with."""
    from jinja2.sandbox import SandboxedEnvironment

    utils: Any = import_module("lm_eval.utils")
    given = utils.env
    env = SandboxedEnvironment(
        loader=given.loader,
        undefined=given.undefined,
        keep_trailing_newline=given.keep_trailing_newline,
    )
    env.filters.update(given.filters)
    utils.env = env
    try:
        yield
    finally:
        utils.env = given
