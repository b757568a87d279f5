"""A live chat with two hidden models, which a vote turns into a judged item.

Both models answer the same conversation, which continues with the answer that the labeler chooses.
So the last two answers are completions of one prompt, as in every other preference record. A thread
for each model stores the text while it is generated; a vote does not wait for the end.
"""

import logging
import random
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

from django.db import connection
from django.utils import timezone

from openpalm.errors import DataError, OpenPalmError, WorkError
from openpalm.feedback.database import storable, writing
from openpalm.feedback.items.model_names import names_itself, names_of
from openpalm.feedback.items.new_items import NewCandidate, NewItem, add_items
from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.model_server import ModelServer, site_server
from openpalm.feedback.models import (
    Assignment,
    Conversation,
    Item,
    ModelVersion,
    Project,
    Response,
    User,
)

OPEN, JUDGED, LEFT = "open", "judged", "left"
MAX_TEXT, MAX_TURNS, MAX_TOKENS = 20_000, 30, 1024
MAX_BEGUN = 30
"""conversations that a user may begin in an hour without a judgement"""
STORE_EVERY_S = 0.5
SILENT_AFTER = timedelta(seconds=90)
"""an answer without new text for this long counts as ended: its process is gone"""
_draw = random.SystemRandom()
_log = logging.getLogger(__name__)


def conversation_of(project: Project, user: User) -> Conversation | None:
    """The user's open conversation."""
    mine = Conversation.objects.filter(project=project, user=user, state=OPEN)
    return mine.order_by("-id").first()


def begin(project: Project, user: User) -> Conversation:
    """A conversation with two served models of the project, drawn at random, on random sides."""
    hour_ago = timezone.now() - timedelta(hours=1)
    begun = Conversation.objects.filter(project=project, user=user, created_at__gt=hour_ago)
    if begun.exclude(state=JUDGED).count() >= MAX_BEGUN:
        raise DataError(f"{MAX_BEGUN} conversations without a judgement in an hour: try later")
    policies = ModelVersion.objects.filter(project=project, kind=ModelVersion.Kind.POLICY)
    models = list(policies.filter(name__in=served_names()).values_list("id", flat=True))
    if len(models) < 2:
        raise DataError("the model server has fewer than two models of this project at present")
    return Conversation.objects.create(
        project=project, user=user, model_ids=_draw.sample(models, 2), state=OPEN
    )


def _server() -> ModelServer:
    if (server := site_server()) is None:
        raise DataError("no model server is known to this site; set OPENPALM_SERVER_URL")
    return server


def served_names() -> list[str]:
    """The names of the models that the site's server has now."""
    try:
        return _server().model_names()
    except WorkError as error:
        _log.warning("the models of the server: %s", error)
        raise DataError("the model server does not answer; try again later") from None


def ask(conversation: Conversation, text: str, kept: int | None) -> None:
    """Adds a message and lets both models answer; `kept` is the side to continue with, 0 or 1."""
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise DataError("write a message first")
    if len(text) > MAX_TEXT:
        raise DataError(f"write at most {MAX_TEXT} characters")
    with writing():
        turns = _locked(conversation.pk).turns
        if turns and kept not in (0, 1):
            raise DataError("choose the answer to continue with")
        if turns and not turns[-1]["answers"][kept or 0].strip():
            raise DataError("this answer is empty; continue with the other one, or begin again")
        if len(turns) >= MAX_TURNS:
            raise DataError(f"vote now: a conversation has at most {MAX_TURNS} messages")
        if turns:
            turns[-1]["kept"] = kept
        now = timezone.now().isoformat()
        turn = {"user": text, "answers": ["", ""], "ended": [False, False], "at": [now, now]}
        Conversation.objects.filter(pk=conversation.pk).update(turns=[*turns, turn])
    for side in (0, 1):
        start(answer, conversation.pk, len(turns), side)


def start(work: Callable[..., None], *arguments: int) -> None:
    """Runs it in a thread with a database connection of its own."""

    def run() -> None:
        try:
            work(*arguments)
        finally:
            connection.close()

    threading.Thread(target=run, daemon=True).start()


def answer(conversation_id: int, number: int, side: int) -> None:
    """Stores one model's answer to a turn while it grows, until it ends or nobody waits for it."""
    conversation = Conversation.objects.get(pk=conversation_id)
    text, stored = "", monotonic()
    try:
        model = ModelVersion.objects.get(pk=conversation.model_ids[side])
        messages = prompt_of(conversation.turns[: number + 1])
        body = {"model": model.name, "messages": messages, "max_tokens": MAX_TOKENS}
        for piece in _server().stream(body):
            text = storable(text + piece)
            if monotonic() - stored > STORE_EVERY_S:
                stored = monotonic()
                if not _store(conversation_id, number, side, text, ended=False):
                    return
    except OpenPalmError as error:
        # The page does not show it: it may name the model.
        _log.warning("conversation %s: a model did not answer: %s", conversation_id, error)
    _store(conversation_id, number, side, text, ended=True)


def prompt_of(turns: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The conversation up to the last message, with the answers that were kept."""
    messages: list[dict[str, str]] = []
    for turn in turns[:-1]:
        messages.append({"role": "user", "content": turn["user"]})
        messages.append({"role": "assistant", "content": turn["answers"][turn["kept"]]})
    return [*messages, {"role": "user", "content": turns[-1]["user"]}]


def is_writing(turn: dict[str, Any], side: int) -> bool:
    """Whether the answer may still grow."""
    silent = timezone.now() - datetime.fromisoformat(turn["at"][side])
    return not turn["ended"][side] and silent < SILENT_AFTER


@writing()
def vote(conversation: Conversation, judgement: Judgement) -> Response:
    """Makes the last turn an item and stores the judgement. A second vote returns the first."""
    conversation = _locked(conversation.pk)
    if conversation.state != OPEN:
        judged = Response.objects.filter(item=conversation.judged_as_id, in_force=True).first()
        if judged is None:
            raise DataError("this conversation has ended; begin another one")
        return judged
    assignment = _end(conversation)
    return submission.submit(assignment.pk, conversation.user, judgement)


@writing()
def flag(
    conversation: Conversation, reason: str, elapsed_ms: int | None, guideline_version: int | None
) -> Response:
    """Ends the conversation; the managers see it with the reason."""
    conversation = _locked(conversation.pk)
    if conversation.state != OPEN:
        raise DataError("this conversation has ended; begin another one")
    assignment, about = _end(conversation), (None, elapsed_ms, guideline_version)
    return submission.flag(assignment.pk, conversation.user, reason, *about)


def _end(conversation: Conversation) -> Assignment:
    """The last turn as an item that its labeler has in hand."""
    item = _item(conversation)
    assignment = Assignment.objects.create(
        item=item,
        user=conversation.user,
        project=conversation.project,
        order=[0, 1],
        leased_at=conversation.created_at,
        expires_at=timezone.now(),
    )
    conversation.state, conversation.judged_as = JUDGED, item
    conversation.save(update_fields=["state", "judged_as"])
    return assignment


def _item(conversation: Conversation) -> Item:
    """The last turn as an item; the answers are as long as they were when the vote came."""
    turn = conversation.turns[-1] if conversation.turns else None
    if turn is None or not all(text.strip() for text in turn["answers"]):
        raise DataError("wait until both models have begun to answer")
    project = conversation.project
    models = ModelVersion.objects.in_bulk(conversation.model_ids)
    names = names_of(project)
    candidates = tuple(
        NewCandidate(
            text=text,
            checkpoint=models[key].checkpoint if key in models else "",
            sampling={"max_tokens": MAX_TOKENS} | ({} if turn["ended"][side] else {"cut": True}),
            model=models.get(key),
            names_itself=names_itself(text, names),
        )
        for side, (key, text) in enumerate(
            zip(conversation.model_ids, turn["answers"], strict=True)
        )
    )
    new = NewItem(prompt_of(conversation.turns), candidates, "typed", needed=1)
    [(item, _)] = add_items(project, [new])
    Item.objects.filter(pk=item.pk).update(taken=1)
    return item


def _locked(conversation_id: int) -> Conversation:
    rows = Conversation.objects.select_for_update(of=("self",)).select_related("project", "user")
    return rows.get(pk=conversation_id)


@writing()
def _store(conversation_id: int, number: int, side: int, text: str, *, ended: bool) -> bool:
    """False if the conversation is over or has continued."""
    conversation = _locked(conversation_id)
    turns = conversation.turns
    if conversation.state != OPEN or len(turns) != number + 1:
        return False
    turn = turns[number]
    turn["answers"][side], turn["ended"][side] = text, ended
    turn["at"][side] = timezone.now().isoformat()
    conversation.save(update_fields=["turns"])
    return True
