"""Reads a constitution: weighted principles or rules for a judge model, from a YAML file.

principles:                       rules:
  - The more honest answer.         - The assistant gives no medical advice.
  - text: The kinder answer.        - text: The assistant claims no body of its own.
    weight: 2                         weight: 0.5
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openpalm.base.console import shown
from openpalm.base.typed import is_number
from openpalm.base.yaml_file import read_yaml
from openpalm.errors import DataError, SettingsError

MAX_ARTICLES = 256


class Article(NamedTuple):
    """A principle or a rule."""

    text: str
    weight: float


@dataclass(frozen=True)
class Constitution:
    articles: tuple[Article, ...]

    @property
    def version(self) -> str:
        """A digest of the texts and weights, independent of the file's formatting."""
        text = json.dumps(self.articles)
        return "constitution-" + hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def weights(self) -> list[float]:
        """The weights, normalized to a sum of 1."""
        total = sum(article.weight for article in self.articles)
        return [article.weight / total for article in self.articles]


def read_constitution(path: Path, field: Literal["principles", "rules"]) -> Constitution:
    """Reads the list under `field`. Raises DataError with file, place and remedy."""
    try:
        content = read_yaml(path)
    except SettingsError as error:
        raise DataError(str(error)) from None
    items = content.get(field)
    if content.keys() != {field} or not isinstance(items, list) or not items:
        raise DataError(f'{path}: must hold "{field}:" with a list of texts, and nothing else')
    if len(items) > MAX_ARTICLES:
        raise DataError(f"{path}: {field} are {len(items)}; give at most {MAX_ARTICLES}")
    return Constitution(
        tuple(_parse_article(item, f"{path}: {field}[{i}]") for i, item in enumerate(items))
    )


def _parse_article(item: object, where: str) -> Article:
    fields: dict[Any, Any] = item if isinstance(item, dict) else {"text": item}
    if unknown := fields.keys() - {"text", "weight"}:
        raise DataError(f"{where}: field {shown(min(map(str, unknown)))} is unknown; leave it out")
    text, weight = fields.get("text"), fields.get("weight", 1)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: must be a text, or an object with "text" and "weight"')
    if not is_number(weight) or weight <= 0:
        raise DataError(f"{where}: weight {shown(str(weight))}: must be a number above 0")
    return Article(text.strip(), float(weight))
