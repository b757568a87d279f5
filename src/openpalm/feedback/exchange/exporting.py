"""The judgements of a project as rows of an export format, in bounded memory."""

from collections.abc import Iterator
from typing import Any

from django.db.models import QuerySet

from openpalm.feedback.labeling.records import records
from openpalm.feedback.models import Response

FORMATS = ("records",)


def export_rows(responses: "QuerySet[Response]", name: str) -> Iterator[dict[str, Any]]:
    """The rows of the format `name`, in the order of the judgements."""
    for record in records(responses):
        yield record.to_json()
