"""One loader for all settings: frozen dataclasses <- YAML file <- command line.

A verb's settings are a frozen dataclass. The docstring under each field is its `--help`, nested
dataclasses become dotted options (`--optim.lr`), and `--config FILE.yaml` gives values that the
command line overrides. Options are spelled with dashes; underscores parse too. Whatever is wrong
ends as one SettingsError that names the option, the value and the remedy.
"""

import dataclasses
import difflib
import inspect
import keyword
import shutil
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import yaml

from openpalm.base.typed import (
    WrongValue,
    alternatives,
    build,
    fit,
    is_flag,
    is_list,
    optional,
    repeated,
    required,
)
from openpalm.errors import SettingsError

__all__ = ["HelpRequested", "build", "parse", "plain", "read_yaml", "spell", "to_yaml"]

T = TypeVar("T")

MAX_CONFIG_BYTES = 1 << 20
_DOC_COLUMN = 30
"""where the help's second column begins"""

_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "batch_size": "batch_tokens",
    "max_steps": "steps",
    "max_tokens": "max_new_tokens",
    "output_dir": "out",
}
"""What other programs call an option of ours."""


class HelpRequested(Exception):
    """The user asked for --help; the text is the argument."""


def parse(
    kind: type[T],
    argv: Sequence[str],
    *,
    verb: str,
    about: str,
    examples: Sequence[str],
    positional: Sequence[str] = (),
    aliases: dict[str, str] | None = None,
) -> T:
    """Reads `argv` (and the YAML file it may name) into an instance of the dataclass `kind`.

    `positional` names the fields given without an option; `aliases` maps other spellings of an
    option to its field. A field `from_` is spelled --from; a kind with a field `config` of its
    own reads no YAML file. Raises SettingsError for a wrong request, HelpRequested for --help.
    """
    options = _options(kind)
    words, bare = _normalise(argv, options, aliases or {}, verb)
    if ("help", "") in words:
        raise HelpRequested(_help_text(kind, verb, about, examples, positional))
    values: dict[str, Any] = {}
    for path in [] if "config" in options else [Path(v) for name, v in words if name == "config"]:
        values |= _from_file(path, options, verb)
    for name, text in words:
        if name in options:
            values[name] = _fitted(text, options[name], spell(name), verb)
    bare = _fill_positional(values, bare, [name for name, _ in words], options, positional, verb)
    if bare:
        remedy = "a text of several words needs quotes around it; " if positional else ""
        raise SettingsError(f"unexpected {' '.join(bare)}; {remedy}see `openpalm {verb} --help`")
    missing = [name for name in required(kind) if name not in values]
    if missing:
        named = ", ".join(name.upper() if name in positional else spell(name) for name in missing)
        raise SettingsError(f"missing {named}; see `openpalm {verb} --help`")
    return build(kind, _nested(values))


def to_yaml(settings: Any) -> str:
    """The settings as YAML that `--config` reads back to an equal object; unset values left out."""
    return yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True, width=100)


def plain(value: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars, without the fields that are None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, plain(getattr(value, f.name))) for f in dataclasses.fields(value))
        return {name: item for name, item in items if item is not None and item != {}}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class _AsWritten(yaml.SafeLoader):
    """Numbers, flags and dates stay the text of the file: 007 may be a folder, 1e3 a number."""


for _tag in ("int", "float", "bool", "timestamp", "value"):
    _AsWritten.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_scalar)


def read_yaml(path: Path, *, as_written: bool = False) -> dict[str, Any]:
    """A YAML mapping from a file, its size bounded. Raises SettingsError naming the file.

    `as_written` keeps every number, flag and date as its text.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SettingsError(f"{path}: more than {MAX_CONFIG_BYTES} bytes is no settings file")
        text = path.read_text(encoding="utf-8")
        # A few aliases of aliases are as large as memory once anything prints or copies them.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise SettingsError(f"{path}: holds a YAML alias (*name); write its value out")
        content = _load(text, _AsWritten if as_written else yaml.SafeLoader)
    except _RepeatedKey as error:
        raise SettingsError(f"{path}: {error}; remove one of them") from None
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 ({error}); give a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{path}: is not valid YAML ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold `name: value` lines")
    return content


class _RepeatedKey(Exception):
    """YAML would take the last of them without a word."""


def _load(text: str, kind: type[yaml.SafeLoader]) -> Any:
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_repeated_keys(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeated_keys(node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
            raise _RepeatedKey(f"{key.value} is in lines {lines[key.value]} and {line}")
        _refuse_repeated_keys(value)


def spell(name: str) -> str:
    """A field name as its option: batch_tokens -> --batch-tokens, from_ -> --from."""
    return "--" + name.rstrip("_").replace("_", "-")


def _options(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> type, for the fields of `kind` and of the dataclasses inside it."""
    options = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            options |= _options(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            options[prefix + name] = hint
    return options


def _normalise(
    argv: Sequence[str], options: dict[str, Any], aliases: dict[str, str], verb: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Every option as (name of its field, text), and the words beside them."""
    words: list[tuple[str, str]] = []
    bare: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return words, [*bare, *rest]
        if word in ("-h", "--help"):
            return [("help", "")], []
        if not word.startswith("--"):
            bare.append(word)
            continue
        given, equals, value = word[2:].partition("=")
        name = given.replace("-", "_")
        name = aliases.get(name, f"{name}_" if keyword.iskeyword(name) else name)
        negated = name.removeprefix("no_") if name.startswith("no_") else ""
        if is_flag(options.get(negated)) and not equals:
            words.append((negated, "false"))
        elif is_flag(options.get(name)):
            if not equals:
                value = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
            words.append((name, value))
        elif name in options or name == "config":
            if not equals:
                if not rest:
                    raise SettingsError(f"--{given}: needs a value; see `openpalm {verb} --help`")
                value = rest.pop(0)
            words.append((name, value))
        else:
            near = _nearest(name, options)
            hint = f"did you mean {spell(near)}?" if near else f"see `openpalm {verb} --help`"
            raise SettingsError(f"unknown option --{given}; {hint}")
    return words, bare


def _nearest(name: str, options: dict[str, Any]) -> str | None:
    """The option that was probably meant: --lr is --optim.lr, --steps-per the one spelled alike."""
    meant = _ELSEWHERE.get(name.replace("-", "_"))
    if meant in options:
        return meant
    last = {option: option.rpartition(".")[2] for option in options}
    in_group = [option for option, own in last.items() if own == name.rpartition(".")[2]]
    if len(in_group) == 1:
        return in_group[0]
    near = difflib.get_close_matches(name, [*options, "config"], n=1)
    return near[0] if near else None


def _fitted(value: object, hint: Any, name: str, verb: str) -> Any:
    try:
        return fit(value, hint)
    except WrongValue as wrong:
        remedy = f"see `openpalm {verb} --help`"
        raise SettingsError(f"{name} {repeated(value)}: must be {wrong}; {remedy}") from None


def _from_file(path: Path, options: dict[str, Any], verb: str) -> dict[str, Any]:
    """Dotted name -> value of a settings file. Raises SettingsError that names the file."""
    values: dict[str, Any] = {}

    def visit(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            inside = any(option.startswith(f"{name}.") for option in options)
            if inside and isinstance(value, dict):
                visit(value, f"{name}.")
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
                values[name] = _fitted(value, options[name], f"--config {path}: {name}", verb)

    try:
        content = read_yaml(path, as_written=True)
    except SettingsError as error:
        raise SettingsError(f"--config {error}") from None
    visit(content, "")
    return values


def _fill_positional(
    values: dict[str, Any],
    bare: list[str],
    given: Sequence[str],
    options: dict[str, Any],
    positional: Sequence[str],
    verb: str,
) -> list[str]:
    """Gives the words without an option to the positional fields; returns what is left over."""
    for name in positional:
        if not bare:
            break
        if name in given:
            continue
        if is_list(options[name]):
            values[name], bare = bare, []
        else:
            # A bare word is a text: "null" is a prompt.
            values[name] = _fitted(bare[0], options[name], name.upper(), verb)
            bare = bare[1:]
    return bare


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"optim.lr": 1} as {"optim": {"lr": 1}}."""
    made: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        inner = made
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    return made


def _help_text(
    kind: type, verb: str, about: str, examples: Sequence[str], positional: Sequence[str]
) -> str:
    words = " ".join(name.upper() for name in positional)
    parts = [f"usage: openpalm {verb} [options] {words}".rstrip(), textwrap.fill(about, _width())]
    docs, fields = _docs(kind), {field.name: field for field in dataclasses.fields(kind)}
    if positional:
        lines = [_help_line(name.upper(), docs[name], fields[name]) for name in positional]
        parts.append("\n".join(["arguments:", *lines]))
    parts += _help_groups(kind, "options", "", positional)
    parts.append("\n".join(["examples:", *(f"  {line}" for line in examples)]))
    return "\n\n".join(parts) + "\n"


def _help_groups(kind: type, title: str, prefix: str, positional: Sequence[str]) -> list[str]:
    """The options of a dataclass, then those of the dataclasses inside it."""
    docs, hints = _docs(kind), typing.get_type_hints(kind)
    lines, inner = [f"{title}:"], []
    # The verb's own options come first, then the options it shares with other verbs.
    order = [name for base in kind.__mro__ for name in inspect.get_annotations(base)]
    for field in sorted(dataclasses.fields(kind), key=lambda field: order.index(field.name)):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            inner += _help_groups(typing.cast(type, hint), docs[field.name], f"{name}.", ())
        elif field.name not in positional:
            option = spell(name.removesuffix("_"))
            left = option if is_flag(hint) else f"{option} {_type_name(hint)}"
            lines.append(_help_line(left, docs[field.name], field))
    if not prefix and "config" not in hints:
        lines.append(_help_line("--config FILE", "YAML file of these settings", None))
    return ["\n".join(lines), *inner]


def _help_line(left: str, doc: str, field: dataclasses.Field[Any] | None) -> str:
    if field is not None and field.default is dataclasses.MISSING:
        required = field.default_factory is dataclasses.MISSING
        doc += " (required)" if required else ""
    elif field is not None and field.default is not None and field.default is not False:
        doc += f" (default: {field.default})"
    width = _width()
    indent = " " * (_DOC_COLUMN if width >= 2 * _DOC_COLUMN else 6)  # 6: under the option
    lines = textwrap.wrap(doc, width - len(indent)) or [""]
    first = f"  {left}"
    if len(first) + 2 <= len(indent):
        first = f"{first:<{len(indent)}}{lines.pop(0)}"
    return "\n".join([first, *(indent + line for line in lines)])


def _width() -> int:
    """Columns of the help: the terminal's, or of a page that anything shows."""
    return max(40, shutil.get_terminal_size(fallback=(98, 24)).columns - 2)


def _docs(kind: type) -> dict[str, str]:
    """The docstring under each field, its own and inherited ones."""
    kinds = [k for k in reversed(kind.__mro__) if dataclasses.is_dataclass(k)]
    params = [p for k in kinds for p in docstring_parser.parse_from_object(k).params]
    return {p.arg_name: " ".join((p.description or "").split()) for p in params}


def _type_name(hint: Any) -> str:
    """A type as --help shows it: INT, PATH, one|of|these."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, parts))
    if len(alternatives(hint)) > 1:
        return _type_name(parts[-1])
    return {int: "INT", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")
