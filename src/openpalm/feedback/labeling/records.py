"""Responses as preference records, the form that everything else reads."""

from collections.abc import Iterable, Iterator

from django.db.models import QuerySet

from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.text.conversation import Message
from openpalm.feedback.models import Prompt, Response

CHUNK = 1000


def in_force(responses: "QuerySet[Response]") -> "QuerySet[Response]":
    """With all that a record needs, in the order of their ids."""
    return (
        responses.filter(in_force=True)
        .select_related("item__prompt", "user")
        .prefetch_related("item__places__candidate")
        .order_by("id")
    )


def records(responses: "QuerySet[Response]") -> Iterator[Preference]:
    """The record of each response, in bounded memory."""
    rows: Iterable[Response] = in_force(responses).iterator(chunk_size=CHUNK)
    return (record(response) for response in rows)


def record(response: Response) -> Preference:
    places = response.item.places.all()
    return Preference(
        id=str(response.uid),
        prompt=messages_of(response.item.prompt),
        candidates=tuple(
            Candidate(
                place.candidate.text, place.candidate.checkpoint or None, place.candidate.sampling
            )
            for place in places
        ),
        kind=response.kind,  # pyright: ignore[reportArgumentType]
        payload=response.payload,
        author=response.user.username,
        author_kind=response.author_kind,  # pyright: ignore[reportArgumentType]
        created=response.created_at.isoformat(),
        elapsed_s=None if response.elapsed_ms is None else response.elapsed_ms / 1000,
        guideline_version=_text(response.guideline_version),
    )


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    return tuple(Message(m["role"], m["content"]) for m in prompt.messages)


def _text(version: int | None) -> str | None:
    return None if version is None else str(version)
