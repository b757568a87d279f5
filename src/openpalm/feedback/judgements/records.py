"""Responses as preference records, the form that everything else reads."""

from collections.abc import Iterable, Iterator
from itertools import islice

from django.db.models import Prefetch, QuerySet

from openpalm.data.rows.messages import Messages
from openpalm.data.rows.preferences import Candidate, Preference
from openpalm.data.text.conversation import Message
from openpalm.feedback.models import Item, ItemCandidate, Project, Prompt, Response, Task

CHUNK = 500
"""rows read at once; SQLite refuses Django's prefetch of 999 rows and more"""
PROMPTS = 100


def in_force(responses: "QuerySet[Response]") -> Iterator[Response]:
    """Each response in force with all that a record needs, by id, in bounded memory.

    Each chunk is a query of its own, so that a long export holds no transaction open.
    """
    rows, last = with_texts(responses).order_by("pk"), 0
    while chunk := list(rows.filter(pk__gt=last)[:CHUNK]):
        yield from chunk
        last = chunk[-1].pk


def with_texts(responses: "QuerySet[Response]") -> "QuerySet[Response]":
    """Items and prompts are read once, however many responses they have."""
    places = ItemCandidate.objects.select_related("candidate")
    return responses.filter(in_force=True).prefetch_related(
        "user", "item__prompt", Prefetch("item__places", places)
    )


def records(responses: "QuerySet[Response]") -> Iterator[Preference]:
    """The record of each response, in bounded memory."""
    return map(record, in_force(responses))


def project_records(
    project: Project, responses: "QuerySet[Response] | None" = None
) -> Iterator[Preference]:
    """The records of a project, or of some of its responses, in bounded memory.

    Ratings of a prompt by one author are consecutive, as the export of pairs needs them.
    """
    if responses is None:
        responses = Response.objects.filter(project=project)
    if project.task != Task.RATING:
        yield from records(responses)
        return
    for ids in prompts_in_pieces(project):
        of_prompts = with_texts(responses.filter(item__prompt__in=ids))
        by_author = of_prompts.order_by("item__prompt", "user", "pk")
        yield from map(record, by_author.iterator(chunk_size=CHUNK))


def prompts_in_pieces(project: Project) -> Iterator[list[int]]:
    """The ids of the project's prompts, some of them at once."""
    prompts, last = Prompt.objects.filter(project=project).order_by("pk"), 0
    while ids := list(prompts.filter(pk__gt=last).values_list("pk", flat=True)[:PROMPTS]):
        yield ids
        last = ids[-1]


def in_pieces(lines: Iterable[bytes], count: int = 200) -> Iterator[bytes]:
    """Joins `count` lines at a time: each piece is one write to the network."""
    waiting = iter(lines)
    while piece := b"".join(islice(waiting, count)):
        yield piece


def record(response: Response) -> Preference:
    prompt, candidates = _texts(response.item)
    return Preference(
        id=str(response.uid),
        prompt=prompt,
        candidates=candidates,
        kind=response.kind,  # pyright: ignore[reportArgumentType]
        payload=response.payload,
        author=response.user.username,
        author_kind=response.author_kind,  # pyright: ignore[reportArgumentType]
        created=response.created_at.isoformat(),
        elapsed_s=None if response.elapsed_ms is None else response.elapsed_ms / 1000,
        guideline_version=_text(response.guideline_version),
    )


def _texts(item: Item) -> tuple[Messages, tuple[Candidate, ...]]:
    """Cached on the item, which the responses of a chunk share."""
    if (known := getattr(item, "_texts", None)) is None:
        found = [place.candidate for place in item.places.all()]
        candidates = (Candidate(c.text, c.checkpoint or None, c.sampling) for c in found)
        known = messages_of(item.prompt), tuple(candidates)
        setattr(item, "_texts", known)  # noqa: B010
    return known


def messages_of(prompt: Prompt) -> tuple[Message, ...]:
    return tuple(Message(m["role"], m["content"]) for m in prompt.messages)


def _text(version: int | None) -> str | None:
    return None if version is None else str(version)
