"""Conversations of the chat page become prompts, with their users' consent only."""

import json

import pytest

from openpalm.feedback.models import Candidate, ModelVersion, Prompt, Role
from openpalm.serve.conversation_sink import ConversationSink

TALK = {
    "store": True,
    "messages": [{"role": "user", "content": "2 + 2?"}],
    "answer": "4",
    "model": "base",
    "checkpoint": "runs/base",
    "sampling": {"temperature": 0.7, "logit_bias": {}},
    "created": 1764000000.5,
}


@pytest.fixture
def chat(member, caller, project):
    return caller(member("chat", Role.ADMIN), "conversations:write", project=project)


def send(api, **changes):
    body = {k: v for k, v in (TALK | changes).items() if v is not None}
    return api.post("projects/demo/conversations", body)


def test_a_conversation_becomes_a_prompt_with_its_answer(project, chat):
    model = ModelVersion.objects.create(project=project, name="base")
    assert send(chat).status_code == 201
    prompt, candidate = Prompt.objects.get(), Candidate.objects.get()
    assert (prompt.source, prompt.shared_with_consent) == ("chat", True)
    assert (candidate.text, candidate.model, candidate.checkpoint) == ("4", model, "runs/base")
    assert candidate.prompt == prompt


def test_sending_it_again_changes_nothing_and_another_answer_is_added(chat):
    send(chat)
    assert send(chat).status_code == 200
    assert send(chat, answer="four").status_code == 201
    assert (Prompt.objects.count(), Candidate.objects.count()) == (1, 2)


@pytest.mark.parametrize(
    "changes",
    [{"store": False}, {"store": None}, {"answer": ""}, {"messages": []}, {"more": 1}],
)
def test_without_consent_or_content_nothing_is_kept(project, chat, changes):
    assert send(chat, **changes).status_code == 400
    assert not Prompt.objects.exists()


def test_the_token_of_the_chat_page_can_do_nothing_else(project, chat):
    assert chat.get("items", project="demo").status_code == 403
    assert chat.post("projects/demo/next").status_code == 403


@pytest.mark.django_db(transaction=True)
def test_the_servers_sink_delivers_with_its_token(project, chat, live_server, monkeypatch):
    token = chat.headers["Authorization"].removeprefix("Bearer ")
    url = f"{live_server.url}/api/v1/projects/demo/conversations"
    monkeypatch.setenv("OPENPALM_CONVERSATION_TOKEN", token)
    sink = ConversationSink(url)
    sink.put(TALK)
    sink.close(60)
    assert (sink.sent, sink.dropped) == (1, 0)
    assert json.loads(json.dumps(Prompt.objects.get().messages)) == TALK["messages"]
