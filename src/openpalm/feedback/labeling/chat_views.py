"""The page of the live chat: messages, the two answers as they grow, the vote."""

from typing import Any

from django.contrib import messages
from django.http import Http404, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.judgements.payloads import pair_payload
from openpalm.feedback.judgements.submission import MAX_REASON, Judgement
from openpalm.feedback.judgements.words import pieces
from openpalm.feedback.labeling import chat
from openpalm.feedback.labeling.context import conversation, page_context, scale
from openpalm.feedback.labeling.views import elapsed_ms, guideline_version
from openpalm.feedback.models import Conversation, Task

posted = require_http_methods(["GET", "POST"])


@require_GET
@project_page()
def chat_page(request: ProjectRequest) -> HttpResponse:
    _only_chat(request)
    return show(request)


@posted
@project_page()
def say(request: ProjectRequest) -> HttpResponse:
    """A message to both models."""
    _only_chat(request)
    if request.method == "GET":
        return redirect("chat", request.project.slug)
    project, user = request.project, request.user
    kept = {"0": 0, "1": 1}.get(request.POST.get("keep", ""))
    try:
        if not project.open:
            raise DataError("this project is closed at present")
        talk = chat.conversation_of(project, user) or chat.begin(project, user)
        chat.ask(talk, request.POST.get("text", ""), kept)
    except DataError as error:
        return show(request, str(error))
    return _after(request, request.POST.get("elapsed_ms", ""))


@posted
@project_page()
def vote(request: ProjectRequest) -> HttpResponse:
    """Ends the conversation with a judgement of its last two answers."""
    _only_chat(request)
    talk = chat.conversation_of(request.project, request.user)
    if request.method == "GET" or talk is None:
        return _after(request)
    try:
        payload = pair_payload(request.project, [0, 1], request.POST)
        judgement = Judgement("compare", payload, elapsed_ms(request), guideline_version(request))
        chat.vote(talk, judgement)
    except DataError as error:
        return show(request, str(error))
    return _after(request)


@posted
@project_page()
def flag(request: ProjectRequest) -> HttpResponse:
    """Ends the conversation and says what is wrong with its last answers."""
    _only_chat(request)
    talk = chat.conversation_of(request.project, request.user)
    if request.method == "GET" or talk is None:
        return _after(request)
    reason = request.POST.get("reason", "")[:MAX_REASON]
    try:
        chat.flag(talk, reason, elapsed_ms(request), guideline_version(request))
    except DataError as error:
        return show(request, str(error), flagging=True)
    return _after(request)


@posted
@project_page()
def leave(request: ProjectRequest) -> HttpResponse:
    """Ends the conversation without a judgement."""
    _only_chat(request)
    if request.method == "POST":
        mine = Conversation.objects.filter(project=request.project, user=request.user)
        if mine.filter(state=chat.OPEN).update(state=chat.LEFT):
            messages.info(request, "The conversation ended without a judgement.")
    return _after(request)


def show(request: ProjectRequest, error: str = "", elapsed: str = "", **more: Any) -> HttpResponse:
    """The page; for htmx the conversation alone. An error keeps what was typed."""
    talk = chat.conversation_of(request.project, request.user)
    # What was typed comes back after an error; after a success the fields are empty.
    form = request.POST if error else {"elapsed_ms": elapsed}
    context = page_context(request, error) | _turns(talk) | {"form": form} | more
    context["steps"] = scale(request.project, form.get("choice", ""))
    template = "chat_item.html" if request.htmx else "chat.html"  # pyright: ignore
    return render(request, f"feedback/{template}", context, status=422 if error else 200)


def _turns(talk: Conversation | None) -> dict[str, Any]:
    """Earlier turns with the answers that were kept; the last one with both."""
    turns = talk.turns if talk else []
    if not turns:
        return {"messages_shown": [], "answers": []}
    last = turns[-1]
    writing = [chat.is_writing(last, side) for side in (0, 1)]
    answers = [
        {
            "name": "AB"[side],
            "pieces": pieces(text),
            "writing": writing[side],
            "silent": not writing[side] and not text.strip(),
            "cut": not writing[side] and not last["ended"][side],
        }
        for side, text in enumerate(last["answers"])
    ]
    return {
        "messages_shown": conversation(chat.prompt_of(turns)),
        "answers": answers,
        "writing": any(writing),
        "turns": len(turns),
    }


def _after(request: ProjectRequest, elapsed: str = "") -> HttpResponse:
    if request.htmx:  # pyright: ignore[reportAttributeAccessIssue]
        return show(request, elapsed=elapsed)
    return redirect("chat", request.project.slug)


def _only_chat(request: ProjectRequest) -> None:
    if request.project.task != Task.CHAT:
        raise Http404("this project has no live chat")
