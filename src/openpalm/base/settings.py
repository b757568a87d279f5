"""Command-line options and YAML settings as a frozen dataclass: defaults < --config < options.

A verb's settings are a frozen dataclass. The docstring under each field is its `--help`, nested
dataclasses become dotted options (`--optim.lr`). Options are spelled with dashes; underscores
parse too. Every error is one SettingsError that names the option, the value and the remedy.
"""

import ast
import dataclasses
import functools
import inspect
import keyword
import os
import sys
import typing
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from openpalm.base.typed import (
    NOT_AN_OPTION,
    WrongValue,
    alternatives,
    build,
    convert,
    is_flag,
    is_list,
    not_a_group,
    optional,
    plain,
    required,
    settings_of,
    shortened,
)
from openpalm.errors import SettingsError

__all__ = ["NOT_AN_OPTION", "HelpRequested", "build", "parse", "plain", "settings_of", "spell"]

T = TypeVar("T")

_DOC_COLUMN = 30
"""column where the explanations of --help begin"""

_SYNONYMS = {
    "learning_rate": "optim.lr",
    "batch_size": "batch_tokens",
    "max_steps": "steps",
    "max_tokens": "max_new_tokens",
    "output_dir": "out",
}
"""names that other programs use -> our option, for `did you mean`"""


class HelpRequested(Exception):
    """The user asked for --help; the argument is its text."""


def parse(
    kind: type[T],
    argv: Sequence[str],
    *,
    verb: str,
    about: str,
    examples: Sequence[str],
    positional: Sequence[str] = (),
    aliases: dict[str, str] | None = None,
    foreign: Callable[[Path], dict[str, Any] | None] = lambda path: None,
) -> T:
    """Parses `argv`, and the YAML file of --config, into an instance of the dataclass `kind`.

    `positional` names the fields given without an option; `aliases` maps other spellings of an
    option to its field; `foreign` reads a --config file of another program (dotted name -> value,
    None if the file is not of that program). A field `from_` is spelled --from; a kind with a field
    `config` of its own reads no YAML file; a field `config_file` that is NOT_AN_OPTION gets its
    path. Raises SettingsError for a wrong request, HelpRequested for --help.
    """
    options = _options(kind)
    given, words = _split(argv, options, aliases or {}, verb)
    if ("help", "") in given:
        raise HelpRequested(_help_text(kind, verb, about, examples, positional))
    values: dict[str, Any] = {}
    files = [] if "config" in options else [Path(v) for name, v in given if name == "config"]
    for path in files:
        found = foreign(path)
        values |= _from_file(path, options, verb) if found is None else found
    from_files = {*values}
    repeated: set[str] = set()
    for name, text in given:
        if name in options:
            value = _converted(text, options[name], spell(name), verb)
            # A list option that is given several times adds to its list; of others the last counts.
            if name in repeated and is_list(options[name]):
                value = [*_as_list(values[name]), *_as_list(value)]
            values[name] = value
            repeated.add(name)
    words = _fill_positional(values, words, [name for name, _ in given], options, positional, verb)
    if words:
        remedy = "a text of several words needs quotes around it; " if positional else ""
        raise SettingsError(f"unexpected {' '.join(words)}; {remedy}see `openpalm {verb} --help`")
    missing = [name for name in required(kind) if name not in values]
    if missing:
        named = ", ".join(name.upper() if name in positional else spell(name) for name in missing)
        raise SettingsError(f"missing {named}; see `openpalm {verb} --help`")
    if files and "config_file" in typing.get_type_hints(kind):
        values["config_file"] = files[-1]
    try:
        return build(kind, _nested(values))
    except SettingsError as error:
        in_file = from_files - {name for name, _ in given}
        raise _naming_file(error, files[-1], in_file) if files else error from None


def _naming_file(error: SettingsError, file: Path, names: set[str]) -> SettingsError:
    """The error of a check, which names an option; names the file if the value is from there."""
    option, space, rest = str(error).partition(" ")
    name = option.removesuffix(":").removeprefix("--").replace("-", "_")
    return SettingsError(f"--config {file}: {name}{space}{rest}") if name in names else error


def spell(name: str) -> str:
    """A field name as its option: batch_tokens -> --batch-tokens, from_ -> --from."""
    return "--" + name.rstrip("_").replace("_", "-")


def check(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raises SettingsError that names the option, its value and what is wanted."""
    if not condition:
        raise SettingsError(f"{spell(name)} {value}: must be {wanted}")


def check_field(settings: Any, name: str, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raises SettingsError if the field is set to a value for which `holds` is false."""
    value = getattr(settings, name)
    check(value is None or holds(value), name, value, wanted)


def _options(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> type, for the fields of `kind` and of the dataclasses inside it."""
    options, hints = {}, typing.get_type_hints(kind)
    for name in [field.name for field in settings_of(kind)]:
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            options |= _options(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            options[prefix + name] = hint
    return options


def _split(
    argv: Sequence[str], options: dict[str, Any], aliases: dict[str, str], verb: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """The options as (field name, text), and the words without an option."""
    given: list[tuple[str, str]] = []
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return given, [*words, *rest]
        if word in ("-h", "--help"):
            return [("help", "")], []
        if not word.startswith("--"):
            words.append(word)
            continue
        option, equals, value = word[2:].partition("=")
        name = option.replace("-", "_")
        name = aliases.get(name, f"{name}_" if keyword.iskeyword(name) else name)
        negated = name.removeprefix("no_") if name.startswith("no_") else ""
        if is_flag(options.get(negated)) and not equals:
            given.append((negated, "false"))
        elif is_flag(options.get(name)):
            # A flag takes the next word only if that is a value: `--pack FILE` keeps its FILE.
            if not equals:
                value = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
            given.append((name, value))
        elif name in options or name == "config":
            if not equals:
                if not rest:
                    raise SettingsError(f"--{option}: needs a value; see `openpalm {verb} --help`")
                value = rest.pop(0)
            given.append((name, value))
        else:
            near = _nearest(name, options)
            hint = f"did you mean {spell(near)}?" if near else f"see `openpalm {verb} --help`"
            raise SettingsError(f"unknown option --{option}; {hint}")
    return given, words


def _nearest(name: str, options: dict[str, Any]) -> str | None:
    """The option probably meant: a synonym, one of a group (--lr), a similar name, a longer one."""
    from difflib import get_close_matches

    synonym = _SYNONYMS.get(name.replace("-", "_"))
    if synonym in options:
        return synonym
    last = {option: option.rpartition(".")[2] for option in options}
    in_group = [option for option, own in last.items() if own == name.rpartition(".")[2]]
    if len(in_group) == 1:
        return in_group[0]
    near = get_close_matches(name, [*options, "config"], n=1) or _with_words(name, options)
    return near[0] if near else None


def _with_words(name: str, options: dict[str, Any]) -> list[str]:
    """The one option that has all words of `name`: keep -> keep_checkpoints. Groups come second."""
    words = {*_words(name)}
    having = [option for option in options if words <= {*_words(option)}]
    own = [option for option in having if "." not in option]
    return own if len(own) == 1 else having if len(having) == 1 else []


def _words(name: str) -> list[str]:
    return name.replace(".", "_").split("_")


def _converted(value: object, hint: Any, name: str, verb: str) -> Any:
    try:
        return convert(value, hint)
    except WrongValue as wrong:
        remedy = f"see `openpalm {verb} --help`"
        raise SettingsError(f"{name} {shortened(value)}: must be {wrong}; {remedy}") from None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_file(path: Path, options: dict[str, Any], verb: str) -> dict[str, Any]:
    """Dotted name -> value of a settings file. Raises SettingsError that names the file."""
    from openpalm.base.yaml_file import packaged, read_yaml

    values: dict[str, Any] = {}

    def visit(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            is_group = any(option.startswith(f"{name}.") for option in options)
            if is_group and isinstance(value, dict):
                visit(value, f"{name}.")
            elif is_group:
                within = [o.removeprefix(f"{name}.") for o in options if o.startswith(f"{name}.")]
                raise SettingsError(f"--config {path}: {not_a_group(name, value, within)}")
            elif name not in options:
                near = _nearest(name, options)
                hint = f"did you mean {near}?" if near else f"see `openpalm {verb} --help`"
                raise SettingsError(f"--config {path}: unknown setting {name}; {hint}")
            elif value is None and not optional(options[name]):
                raise SettingsError(
                    f"--config {path}: {name} has no value; give one or leave it out"
                )
            elif name in values:
                raise SettingsError(f"--config {path}: {name} is set twice; remove one of them")
            else:
                values[name] = _converted(value, options[name], f"--config {path}: {name}", verb)

    try:
        # As text: the option's type decides whether 007 is a number or a folder.
        content = read_yaml(packaged(path), as_text=True)
    except SettingsError as error:
        raise SettingsError(f"--config {error}") from None
    try:
        visit(content, "")
    except SettingsError as error:
        raise _of_other_version(path, error, "init" in options) from None
    return values


def _of_other_version(path: Path, error: SettingsError, may_start: bool) -> SettingsError:
    """The error, with both versions if another version began the run that has this file."""
    from openpalm.base.console import shown
    from openpalm.base.run_version import this_version, version_of_run

    version = version_of_run(path.parent)
    if version in (None, this_version()):
        return error
    start = f", or start from that run's weights with --init {path.parent}" if may_start else ""
    return SettingsError(
        f"--config {path}: was written by OpenPaLM {shown(version)}, and this is {this_version()} "
        f"({str(error).removeprefix(f'--config {path}: ')}); change a copy of the file{start}"
    )


def _fill_positional(
    values: dict[str, Any],
    words: list[str],
    given: Sequence[str],
    options: dict[str, Any],
    positional: Sequence[str],
    verb: str,
) -> list[str]:
    """Assigns the words without an option to the positional fields; returns the words left."""
    for name in positional:
        if not words:
            break
        if name in given:
            continue
        if is_list(options[name]):
            values[name], words = words, []
        else:
            values[name] = _converted(words[0], options[name], name.upper(), verb)
            words = words[1:]
    return words


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1} as {"optim": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return nested


def _help_text(
    kind: type, verb: str, about: str, examples: Sequence[str], positional: Sequence[str]
) -> str:
    from textwrap import fill

    words = " ".join(name.upper() for name in positional)
    parts = [
        f"usage: openpalm {verb} [options] {words}".rstrip(),
        fill(about, _width(), break_on_hyphens=False),
    ]
    docs, fields = _docs(kind), {field.name: field for field in dataclasses.fields(kind)}
    if positional:
        lines = [_help_line(name.upper(), docs[name], fields[name]) for name in positional]
        parts.append("\n".join(["arguments:", *lines]))
    parts += _help_groups(kind, "options", "", positional)
    parts.append("\n".join(["examples:", *(f"  {line}" for line in examples)]))
    return "\n\n".join(parts) + "\n"


def _help_groups(kind: type, title: str, prefix: str, positional: Sequence[str]) -> list[str]:
    """The options of a dataclass, then those of the dataclasses inside it."""
    from textwrap import fill

    docs, hints = _docs(kind), typing.get_type_hints(kind)
    lines, groups = [fill(f"{title}:", _width())], []
    # Required options come first, then the verb's own, then those it shares with other verbs.
    order = required(kind)
    order += [name for base in kind.__mro__ for name in inspect.get_annotations(base)]
    for field in sorted(settings_of(kind), key=lambda field: order.index(field.name)):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            groups += _help_groups(typing.cast(type, hint), docs[field.name], f"{name}.", ())
        elif field.name not in positional:
            option = spell(name.removesuffix("_"))
            left = option if is_flag(hint) else f"{option} {_type_name(hint)}"
            lines.append(_help_line(left, docs[field.name], field))
    if not prefix and "config" not in hints:
        lines.append(_help_line("--config FILE", "YAML file of these settings", None))
    return ["\n".join(lines), *groups]


def _help_line(left: str, doc: str, field: dataclasses.Field[Any] | None) -> str:
    from textwrap import wrap

    if field is not None and field.default is dataclasses.MISSING:
        is_required = field.default_factory is dataclasses.MISSING
        doc += " (required)" if is_required else ""
    elif field is not None and field.default is not None and field.default is not False:
        doc += f" (default: {field.default})"
    width = _width()
    indent = " " * (_DOC_COLUMN if width >= 2 * _DOC_COLUMN else 6)  # 6: under the option
    lines = wrap(doc, width - len(indent), break_on_hyphens=False) or [""]
    first = f"  {left}"
    if len(first) + 2 <= len(indent):
        first = f"{first:<{len(indent)}}{lines.pop(0)}"
    return "\n".join([first, *(indent + line for line in lines)])


def _width() -> int:
    """Columns of the help: the terminal's, or 96 where there is no terminal."""
    # As shutil.get_terminal_size, which brings three compression libraries.
    columns = os.environ.get("COLUMNS", "")
    try:
        width = int(columns) if columns.isdecimal() else os.get_terminal_size().columns
    except OSError:
        width = 0
    return max(40, (width or 98) - 2)


def _docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if dataclasses.is_dataclass(owner):
            docs |= _module_docs(owner.__module__)[owner.__name__]
    return docs


@functools.cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> docstring, for the classes at the top level of a module.

    Python keeps no docstring of a field, so the source is read: a text behind an assignment.
    """
    source = ast.parse(inspect.getsource(sys.modules[module]))
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    return {name: _field_docs(node) for name, node in classes.items()}


def _field_docs(node: ast.ClassDef) -> dict[str, str]:
    docs = {}
    for field, after in pairwise([*node.body, ast.Pass()]):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                docs[name] = ""
    return docs


def _type_name(hint: Any) -> str:
    """A type in --help: INT, PATH, one|of|these."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, parts))
    if len(alternatives(hint)) > 1:
        return _type_name(parts[-1])
    return {int: "INT", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")
