"""Prompts that managers add, and which of them are held out of training.

Held-out prompts are kept for comparisons of models; see training/comparisons.py.
"""

from collections.abc import Sequence

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.items.new_items import (
    Messages,
    NewItem,
    add_items,
    add_split_prompts,
    known_digests,
    prompt_digest,
)
from openpalm.feedback.items.tasks import candidates_needed
from openpalm.feedback.models import Item, Project, Prompt, User


def add_new(
    project: Project, conversations: Sequence[Messages], source: str, share: float
) -> set[str]:
    """Adds the prompts that the project lacks, this share of them held out; their digests.

    Where people write the answers, each prompt is an item.
    """
    by_digest = {prompt_digest(messages): messages for messages in conversations}
    earlier = known_digests(project, by_digest)
    fresh = {digest: each for digest, each in by_digest.items() if digest not in earlier}
    if candidates_needed(project.task) == (0, 0):
        add_items(project, [NewItem(messages, (), source) for messages in fresh.values()])
    else:
        add_split_prompts(project, fresh, source, share)
    return set(fresh)


def set_held_out(prompt: Prompt, held_out: bool, user: User) -> None:
    """Holds a prompt out of training, or gives it back. Raises DataError once it is in an item."""
    if prompt.held_out == held_out:
        return
    if Item.objects.filter(prompt=prompt).exists():
        raise DataError("this prompt is in an item already; it stays where it is")
    prompt.held_out = held_out
    prompt.save(update_fields=["held_out"])
    audit.record(
        "prompt.held_out" if held_out else "prompt.given_back",
        user=user,
        project=prompt.project,
        target=prompt.pk,
    )
