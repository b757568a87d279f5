"""Responses as preference records, the form that everything else reads."""

from collections.abc import Iterable, Iterator
from itertools import islice

from django.db.models import QuerySet

from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.text.conversation import Message
from openpalm.feedback.models import Project, Prompt, Response, Task

CHUNK = 1000
PROMPTS = 100


def in_force(responses: "QuerySet[Response]") -> "QuerySet[Response]":
    """With all that a record needs, in the order of their ids."""
    return (
        responses.filter(in_force=True)
        .select_related("item__prompt", "user")
        .prefetch_related("item__places__candidate")
        .order_by("id")
    )


def records(responses: "QuerySet[Response]") -> Iterator[Preference]:
    """The record of each response, in bounded memory.

    Each chunk is a query of its own, so that a long export holds no transaction open.
    """
    rows, last = in_force(responses), 0
    while chunk := list(rows.filter(pk__gt=last)[:CHUNK]):
        yield from map(record, chunk)
        last = chunk[-1].pk


def project_records(
    project: Project, responses: "QuerySet[Response] | None" = None
) -> Iterator[Preference]:
    """The records of a project, or of some of its responses, in bounded memory.

    Ratings of one prompt by one author stand together, as the export of pairs needs them.
    """
    if responses is None:
        responses = Response.objects.filter(project=project)
    if project.task != Task.RATING:
        yield from records(responses)
        return
    prompts, last = Prompt.objects.filter(project=project).order_by("pk"), 0
    while ids := list(prompts.filter(pk__gt=last).values_list("pk", flat=True)[:PROMPTS]):
        of_prompts = in_force(responses.filter(item__prompt__in=ids))
        yield from map(record, of_prompts.order_by("item__prompt", "user", "pk"))
        last = ids[-1]


def in_pieces(lines: Iterable[bytes], count: int = 200) -> Iterator[bytes]:
    """The lines, some of them at once: each piece is a write to the network."""
    waiting = iter(lines)
    while piece := b"".join(islice(waiting, count)):
        yield piece


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
