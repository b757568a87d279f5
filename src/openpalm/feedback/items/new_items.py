"""Adds prompts, candidates and items to a project, many with a few statements."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import Prefetch

from openpalm.data.rows.messages import check_prompt
from openpalm.data.text.conversation import ROLES, Message
from openpalm.errors import DataError
from openpalm.feedback.models import Candidate, Item, ItemCandidate, ModelVersion, Project, Prompt

MOST_CANDIDATES = 10
Messages = Sequence[dict[str, str]]
_draw = random.SystemRandom()


@dataclass(frozen=True)
class NewCandidate:
    """`checkpoint` is the hash or name of the model, `model` a version that the project knows."""

    text: str
    checkpoint: str = ""
    sampling: dict[str, Any] | None = None
    model: ModelVersion | None = None
    names_itself: bool = False


@dataclass(frozen=True)
class NewItem:
    """A prompt with its candidates. `key` is a name for it that is used once in the project."""

    messages: Messages
    candidates: tuple[NewCandidate, ...]
    source: str
    key: str | None = None
    purpose: str = Item.Purpose.TRAINING
    priority: float = 0.0
    needed: int | None = None
    gold: dict[str, Any] | None = None
    gold_kind: str = ""
    arm: str = ""


class KeyTaken(DataError):
    """The key belongs to an item with another prompt or other candidates."""


def prompt_digest(messages: Messages) -> str:
    """SHA-256 of the messages as canonical JSON: role and content, keys sorted, no spaces."""
    plain = [{"content": m["content"], "role": m["role"]} for m in messages]
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check_messages(messages: Messages) -> None:
    """Raises DataError if these do not make a prompt that a model completes."""
    if any(m["role"] not in ROLES for m in messages):
        raise DataError(f"a role must be one of {', '.join(ROLES)}")
    check_prompt(tuple(Message(m["role"], m["content"]) for m in messages))  # pyright: ignore


def known_digests(project: Project, digests: Iterable[str], **of: Any) -> set[str]:
    """The digests of prompts that the project has; `of` filters, as in held_out=True."""
    known = Prompt.objects.filter(project=project, digest__in=set(digests), **of)
    return set(known.values_list("digest", flat=True))


def is_held_out(digest: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out share: the same for each import of the same text."""
    return int(digest[:13], 16) < share * 16**13


@transaction.atomic
def add_items(project: Project, new: Sequence[NewItem]) -> list[tuple[Item, bool]]:
    """Adds the items; returns each in the order given and whether it was made now.

    An item with a key that the project has is returned as it is. Raises KeyTaken if it differs.
    """
    earlier = _by_key(project, [item.key for item in new if item.key is not None])
    fresh: dict[int, NewItem] = {}
    first_with_key: dict[str, int] = {}
    for number, item in enumerate(new):
        if item.key is not None and item.key in earlier:
            _check_same(item, earlier[item.key])
        elif item.key is not None and item.key in first_with_key:
            raise KeyTaken(f"key {item.key!a:.80} is given twice")
        else:
            fresh[number] = item
            if item.key is not None:
                first_with_key[item.key] = number
    made = dict(zip(fresh, _create(project, list(fresh.values())), strict=True))
    return [
        (made[number], True) if number in made else (earlier[item.key or ""], False)
        for number, item in enumerate(new)
    ]


def _by_key(project: Project, keys: list[str]) -> dict[str, Item]:
    found = Item.objects.filter(project=project, key__in=keys).select_related("prompt")
    places = ItemCandidate.objects.select_related("candidate")
    return {item.key: item for item in found.prefetch_related(Prefetch("places", places))}  # pyright: ignore


def _check_same(new: NewItem, old: Item) -> None:
    texts = [candidate.text for candidate in new.candidates]
    same_prompt = prompt_digest(new.messages) == old.prompt.digest
    if not same_prompt or texts != [place.candidate.text for place in old.places.all()]:
        raise KeyTaken(f"key {new.key!a:.80} belongs to an item with other texts")


def _create(project: Project, new: list[NewItem]) -> list[Item]:
    prompts = add_prompts(project, [(item.messages, item.source) for item in new])
    items = Item.objects.bulk_create(
        Item(
            project=project,
            prompt=prompt,
            key=item.key,
            purpose=item.purpose,
            priority=item.priority,
            needed=project.overlap if item.needed is None else item.needed,
            gold=item.gold,
            gold_kind=item.gold_kind,
            arm=item.arm,
        )
        for item, prompt in zip(new, prompts, strict=True)
    )
    candidates = Candidate.objects.bulk_create(
        Candidate(
            prompt=prompt,
            text=candidate.text,
            checkpoint=candidate.checkpoint,
            sampling=candidate.sampling,
            model=candidate.model,
            names_itself=candidate.names_itself,
        )
        for item, prompt in zip(new, prompts, strict=True)
        for candidate in item.candidates
    )
    places = [
        (item, place)
        for item, given in zip(items, new, strict=True)
        for place in range(len(given.candidates))
    ]
    ItemCandidate.objects.bulk_create(
        ItemCandidate(item=item, candidate=candidate, position=place)
        for (item, place), candidate in zip(places, candidates, strict=True)
    )
    return items


def make_item(
    project: Project, prompt: Prompt, candidates: Sequence[Candidate], **fields: Any
) -> Item:
    """An item of stored candidates; needs `overlap` responses unless `fields` say otherwise.

    The order is random: a reviewer sees it before judging.
    """
    candidates = _draw.sample(candidates, len(candidates))
    item = Item.objects.create(
        project=project, prompt=prompt, **({"needed": project.overlap} | fields)
    )
    ItemCandidate.objects.bulk_create(
        ItemCandidate(item=item, candidate=candidate, position=position)
        for position, candidate in enumerate(candidates)
    )
    return item


def add_prompts(
    project: Project,
    new: Sequence[tuple[Messages, str]],
    *,
    shared_with_consent: bool | None = None,
    held_out: bool = False,
) -> list[Prompt]:
    """Returns the prompts of these (messages, source); adds those that the project lacks."""
    digests = [prompt_digest(messages) for messages, _ in new]
    missing = {
        digest: Prompt(
            project=project,
            messages=[{"role": m["role"], "content": m["content"]} for m in messages],
            digest=digest,
            source=source,
            shared_with_consent=shared_with_consent,
            held_out=held_out,
        )
        for digest, (messages, source) in zip(digests, new, strict=True)
    }
    known = Prompt.objects.filter(project=project, digest__in=set(digests))
    for digest in known.values_list("digest", flat=True):
        missing.pop(digest, None)
    # Another process may add one of them at the same time.
    Prompt.objects.bulk_create(missing.values(), ignore_conflicts=True)
    found = {p.digest: p for p in Prompt.objects.filter(project=project, digest__in=set(digests))}
    return [found[digest] for digest in digests]


def add_split_prompts(
    project: Project, new: Mapping[str, Messages], source: str, share: float
) -> int:
    """Adds prompts, by digest, and holds out this share of them; returns how many are held out."""
    held_out = [messages for digest, messages in new.items() if is_held_out(digest, share)]
    training = [messages for digest, messages in new.items() if not is_held_out(digest, share)]
    add_prompts(project, [(messages, source) for messages in held_out], held_out=True)
    add_prompts(project, [(messages, source) for messages in training])
    return len(held_out)
