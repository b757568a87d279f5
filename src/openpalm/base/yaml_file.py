"""YAML files: read with a bounded size and no repeated key; settings written as YAML."""

from pathlib import Path
from typing import Any

import yaml

from openpalm.base.typed import plain
from openpalm.errors import SettingsError, one_line

MAX_BYTES = 1 << 20
CONFIGS = Path(__file__).parent.parent / "configs"
"""The recipes that come with the package."""


def to_yaml(settings: Any) -> str:
    """The settings as YAML that `--config` reads back to an equal object; unset values left out."""
    return yaml.safe_dump(plain(settings), sort_keys=False, allow_unicode=True, width=100)


class _TextLoader(yaml.SafeLoader):
    """Numbers, flags and dates stay the text of the file: 007 may be a folder, 1e3 a number."""


for _tag in ("int", "float", "bool", "timestamp", "value"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_scalar)


def packaged(path: Path) -> Path:
    """The package's own configs/NAME.yaml if `path` names one and is no file here, else `path`."""
    own = CONFIGS / path.name
    is_own = path.parent == Path("configs") and not path.exists() and own.is_file()
    return own if is_own else path


def read_yaml(path: Path, *, as_text: bool = False) -> dict[str, Any]:
    """A YAML mapping from a file of bounded size. Raises SettingsError naming the file.

    `as_text` keeps every number, flag and date as its text.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{path}: more than {MAX_BYTES} bytes is no settings file")
        text = path.read_text(encoding="utf-8")
        # A few aliases of aliases fill the memory once anything prints or copies them.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise SettingsError(f"{path}: holds a YAML alias (*name); write its value out")
        content = _load(text, _TextLoader if as_text else yaml.SafeLoader)
    except _RepeatedKey as error:
        raise SettingsError(f"{path}: {error}; remove one of them") from None
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 ({error}); give a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = one_line(error)
        raise SettingsError(f"{path}: is not valid YAML ({reason}); correct it") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold `name: value` lines")
    return content


class _RepeatedKey(Exception):
    """YAML itself would silently use the last value."""


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
