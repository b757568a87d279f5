"""One loader for all settings: frozen dataclasses <- YAML file <- command line.

A verb's settings are a frozen dataclass. The docstring under each field is its `--help`, nested
dataclasses become dotted options (`--optim.lr`), and `--config FILE.yaml` gives values that the
command line overrides. Options are spelled with dashes; underscores parse too. Whatever is wrong
ends as one SettingsError that names the option, the value and the remedy.
"""

import dataclasses
import difflib
import keyword
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import docstring_parser
import jsonargparse
import yaml

from openpalm.errors import SettingsError

T = TypeVar("T")

MAX_CONFIG_BYTES = 1 << 20

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class HelpRequested(Exception):
    """The user asked for --help; the text is the argument."""


class _Parser(jsonargparse.ArgumentParser):
    positional: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, SettingsError):  # found wrong "at birth", in our own words
                raise cause
            cause = cause.__cause__ or cause.__context__
        verb = self.prog.removeprefix("openpalm ")
        raise SettingsError(_one_line(message, verb, self.positional))


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
    if "--help" in words:
        raise HelpRequested(_help_text(kind, verb, about, examples, positional))
    for path in [] if "config" in options else _config_files(words):
        _check_config(path, options, verb)
    parser = _build(kind, verb, positional)
    # The file first, so that the command line wins; bare words last, because argparse fills an
    # optional positional at the first gap between options.
    words.sort(key=lambda word: not word.startswith("--config="))
    words += ["--", *bare] if bare else []
    values = vars(parser.instantiate(parser.parse_args(words)))
    if "config" not in options:
        values.pop("config", None)
    return kind(**values)


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


def build(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass `kind` from what `plain` returned. Raises SettingsError on an unknown name."""
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        raise SettingsError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    made = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            value = build(typing.cast(type, hint), value)
        elif value is not None and Path in (hint, *typing.get_args(hint)):
            value = Path(value)
        elif isinstance(value, list) and typing.get_origin(hint) is tuple:
            value = tuple(value)
        made[name] = value
    return kind(**made)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file, its size bounded. Raises SettingsError naming the file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SettingsError(f"{path}: more than {MAX_CONFIG_BYTES} bytes is no settings file")
        text = path.read_text(encoding="utf-8")
        # A few aliases of aliases are as large as memory once anything prints or copies them.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise SettingsError(f"{path}: holds a YAML alias (*name); write its value out")
        content = yaml.safe_load(text)
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


def _is_flag(hint: Any) -> bool:
    return hint is bool or (
        typing.get_origin(hint) in (types.UnionType, typing.Union) and bool in typing.get_args(hint)
    )


def _normalise(
    argv: Sequence[str], options: dict[str, Any], aliases: dict[str, str], verb: str
) -> tuple[list[str], list[str]]:
    """Every option as jsonargparse wants it (--name=value, underscores), and the words beside."""
    words: list[str] = []
    bare: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return words, [*bare, *rest]
        if word in ("-h", "--help"):
            return ["--help"], []
        if not word.startswith("--"):
            bare.append(word)
            continue
        given, equals, value = word[2:].partition("=")
        name = given.replace("-", "_")
        name = aliases.get(name, f"{name}_" if keyword.iskeyword(name) else name)
        negated = name.removeprefix("no_") if name.startswith("no_") else ""
        if _is_flag(options.get(negated)) and not equals:
            words.append(f"--{negated}=false")
        elif _is_flag(options.get(name)):
            if not equals:
                value = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
            words.append(f"--{name}={value}")
        elif name in options or name == "config":
            if not equals:
                if not rest:
                    raise SettingsError(f"--{given}: needs a value; see `openpalm {verb} --help`")
                value = rest.pop(0)
            words.append(f"--{name}={value}")
        else:
            raise SettingsError(_unknown(f"--{given}", name, options, verb))
    return words, bare


def _unknown(shown: str, name: str, options: dict[str, Any], verb: str) -> str:
    near = difflib.get_close_matches(name, [*options, "config"], n=1)
    hint = f"did you mean {spell(near[0])}?" if near else f"see `openpalm {verb} --help`"
    return f"unknown option {shown}; {hint}"


def _config_files(words: list[str]) -> list[Path]:
    return [Path(word.removeprefix("--config=")) for word in words if word.startswith("--config=")]


def _check_config(path: Path, options: dict[str, Any], verb: str) -> None:
    """Refuses names the verb does not have, before jsonargparse reads the same file."""

    def visit(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            inside = any(option.startswith(f"{name}.") for option in options)
            if inside and isinstance(value, dict):
                visit(value, f"{name}.")
            elif name not in options:
                near = difflib.get_close_matches(name, options, n=1)
                hint = f"did you mean {near[0]}?" if near else f"see `openpalm {verb} --help`"
                raise SettingsError(f"--config {path}: unknown setting {name}; {hint}")
            elif value is None and type(None) not in typing.get_args(options[name]):
                raise SettingsError(
                    f"--config {path}: {name} has no value; give one or leave it out"
                )

    try:
        content = read_yaml(path)
    except SettingsError as error:
        raise SettingsError(f"--config {error}") from None
    visit(content, "")


def _build(kind: type, verb: str, positional: Sequence[str]) -> _Parser:
    """The parser that types and merges values; --help and unknown options are dealt with here."""
    parser = _Parser(prog=f"openpalm {verb}", allow_abbrev=False)
    parser.positional = positional
    options = _options(kind)
    if options and "config" not in options:
        parser.add_argument("--config", action="config")
    hints = typing.get_type_hints(kind)
    for field in (field for field in dataclasses.fields(kind) if field.name in positional):
        required = field.default is dataclasses.MISSING
        several = typing.get_origin(hints[field.name]) in (list, tuple)
        extra: dict[str, Any] = {} if required else {"default": field.default}
        if several or not required:
            extra["nargs"] = ("+" if required else "*") if several else "?"
        # A bare word is a text: "null" is a prompt.
        texts = several or str in typing.get_args(hints[field.name])
        wanted = str if texts else hints[field.name]
        parser.add_argument(field.name, type=wanted, **extra)
    parser.add_class_arguments(kind, as_group=False, skip=set(positional))
    return parser


def _help_text(
    kind: type, verb: str, about: str, examples: Sequence[str], positional: Sequence[str]
) -> str:
    words = " ".join(name.upper() for name in positional)
    parts = [f"usage: openpalm {verb} [options] {words}".rstrip(), textwrap.fill(about, 96)]
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
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            inner += _help_groups(typing.cast(type, hint), docs[field.name], f"{name}.", ())
        elif field.name not in positional:
            option = spell(name.removesuffix("_"))
            shown = option if _is_flag(hint) else f"{option} {_type_name(hint)}"
            lines.append(_help_line(shown, docs[field.name], field))
    if not prefix and "config" not in hints:
        lines.append(_help_line("--config FILE", "YAML file of these settings", None))
    return ["\n".join(lines), *inner]


def _help_line(left: str, doc: str, field: dataclasses.Field[Any] | None) -> str:
    if field is not None and field.default is dataclasses.MISSING:
        required = field.default_factory is dataclasses.MISSING
        doc += " (required)" if required else ""
    elif field is not None and field.default not in (None, False):
        doc += f" (default: {field.default})"
    lines = textwrap.wrap(doc, 96 - 30) or [""]
    first = (
        [f"  {left}", " " * 30 + lines.pop(0)]
        if len(left) > 26
        else [f"  {left:<28}{lines.pop(0)}"]
    )
    return "\n".join([*first, *(" " * 30 + line for line in lines)])


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
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return _type_name(parts[-1])
    return {int: "INT", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


def _one_line(message: str, verb: str, positional: Sequence[str]) -> str:
    """jsonargparse's message as one line in our words: option, value, remedy."""
    text = " ".join(message.split())
    value = re.match(r'Parser key "([^"]+)": .*?(?:Got|Given) value: (.*)', text)
    if value:
        name, given = value.groups()
        wanted = _wanted(text)
        return f"{spell(name)} {given}: must be {wanted}; see `openpalm {verb} --help`"
    missing = re.match(r"the following arguments are required: (.*)", text)
    if missing:
        names = missing[1].split(", ")
        told = ", ".join(name.upper() if name in positional else spell(name) for name in names)
        return f"missing {told}; see `openpalm {verb} --help`"
    extra = re.match(r"unrecognized arguments: (?:-- )?(.*)", text)
    if extra:
        remedy = "a text of several words needs quotes around it; " if positional else ""
        return f"unexpected {extra[1]}; {remedy}see `openpalm {verb} --help`"
    about = re.match(r'Parser key "([^"]+)": (.*)', text)
    told = f"{spell(about[1])}: {about[2]}" if about else text
    return f"{told}; see `openpalm {verb} --help`"


def _wanted(text: str) -> str:
    literal = re.search(r"typing\.Literal(\[[^\]]*\])", text)
    if literal:
        return "one of " + literal[1].strip("[]").replace("'", "")
    kinds = re.findall(r"<class '(\w+)'>", text)
    return _KINDS.get(kinds[0], str(kinds[0])) if kinds else "of another type"
