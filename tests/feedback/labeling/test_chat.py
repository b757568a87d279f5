"""The live chat: two hidden models over HTTP, and the vote that makes an item of it."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from openpalm.feedback.judgements.records import record
from openpalm.feedback.labeling import chat
from openpalm.feedback.models import Conversation, Item, ModelVersion, Response


class Handler(BaseHTTPRequestHandler):
    """Streams the model's name without `secret` and the last message."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        models = {"data": [{"id": name} for name in self.server.names]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(models).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append(body)
        if body["model"] in self.server.broken:
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"secret-0 is broken")
            return
        if body.get("max_tokens", 0) > self.server.context:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"code": "context_length_exceeded"}}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        number = body["model"].removeprefix("secret-")
        for piece in (f"{number} says ", body["messages"][-1]["content"]):
            event = {"choices": [{"delta": {"content": piece}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def models(project, settings, monkeypatch):
    """Two models on a server. Answers are there when `say` returns."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.received, server.broken, server.context = [], set(), 10_000
    server.names = ["secret-0", "secret-1", "of another project"]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    settings.SERVER_URL = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(chat, "start", lambda work, *arguments: work(*arguments))
    project.task = "chat"
    project.save()
    for number in range(2):
        ModelVersion.objects.create(
            project=project, name=f"secret-{number}", checkpoint=f"secret-hash-{number}"
        )
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ask(member, signed_in):
    """ask("say", text="..."): the page after it."""
    client = signed_in(member("ann"))

    def post(name="", **form):
        url = f"/p/demo/chat/{name}" if name else "/p/demo/chat"
        answer = client.post(url, form, follow=True) if form else client.get(url)
        return answer.content.decode()

    return post


def sides():
    """The numbers of the models on the left and on the right."""
    ids = Conversation.objects.latest("id").model_ids
    return [ModelVersion.objects.get(pk=pk).name[-1] for pk in ids]


def test_a_model_of_a_small_context_answers_as_far_as_it_can(models, ask):
    models.context = 100
    page = ask("say", text="hello")
    assert "0 says hello" in page
    assert "1 says hello" in page


def test_conversations_without_a_judgement_have_a_limit(models, ask, monkeypatch):
    monkeypatch.setattr(chat, "MAX_BEGUN", 2)
    for _ in range(2):
        assert "says hello" in ask("say", text="hello")
        ask("leave", x="")
    assert "2 conversations without a judgement in an hour" in ask("say", text="hello")
    assert Conversation.objects.count() == 2


def test_a_conversation_becomes_a_judged_item(models, ask):
    page = ask("say", text="hello")
    left, right = sides()
    assert f"{left} says hello" in page
    assert f"{right} says hello" in page
    page = ask("say", text="and then?", keep="1")
    assert page.index(f"{right} says hello") < page.index("and then?")
    assert f"{left} says hello" not in page
    assert "secret" not in page
    assert "1 judged by you" in ask("vote", choice="2", elapsed_ms="4000")
    response = Response.objects.get()
    kept = record(response)
    assert [(m.role, m.content) for m in kept.prompt] == [
        ("user", "hello"),
        ("assistant", f"{right} says hello"),
        ("user", "and then?"),
    ]
    assert [c.text for c in kept.candidates] == [f"{n} says and then?" for n in (left, right)]
    assert [c.checkpoint for c in kept.candidates] == [f"secret-hash-{n}" for n in (left, right)]
    assert (kept.payload["better"], kept.elapsed_s) == (0, 4.0)
    item = Item.objects.get()
    assert (item.submitted, item.taken, item.needed, item.state) == (1, 1, 1, "complete")


def test_both_models_get_the_same_messages(models, ask):
    ask("say", text="hello")
    ask("say", text="more", keep="0")
    first, second = models.received[-2:]
    assert {first["model"], second["model"]} == {"secret-0", "secret-1"}
    assert first["messages"] == second["messages"]
    assert [m["role"] for m in first["messages"]] == ["user", "assistant", "user"]


def test_a_vote_counts_once(models, ask, project, member):
    ask("say", text="hello")
    talk = chat.conversation_of(project, member("ann"))
    ask("vote", choice="1")
    ask("vote", choice="5")
    judgement = chat.Judgement("compare", {"tie": [0, 1]})
    assert chat.vote(talk, judgement) == Response.objects.get()
    assert "A much better" in ask()


def test_a_vote_may_come_before_the_end_of_an_answer(models, ask):
    ask("say", text="hello")
    talk = Conversation.objects.get()
    talk.turns[0]["ended"] = [True, False]
    talk.save()
    assert "writing" in ask()
    ask("vote", choice="1")
    first, second = [place.candidate for place in Item.objects.get().places.all()]
    assert "cut" not in first.sampling
    assert second.sampling["cut"] is True
    # What the model still writes changes nothing.
    assert not chat._store(talk.pk, 0, 1, "too late", ended=True)
    second.refresh_from_db()
    assert second.text != "too late"


def test_a_model_that_fails_is_not_named(models, ask):
    models.broken.add("secret-0")
    page = ask("say", text="hello")
    assert "This model did not answer" in page
    assert "secret" not in page
    assert "wait until both models" in ask("vote", choice="1").lower()
    assert not Item.objects.exists()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"text": "  "}, "write a message first"),
        ({"text": "more"}, "choose the answer to continue with"),
        ({"text": "x" * 20_001, "keep": "0"}, "at most 20000 characters"),
    ],
)
def test_a_message_that_cannot_be_sent_stays_typed(models, ask, form, message):
    ask("say", text="hello")
    page = ask("say", **form)
    assert message in page.lower()
    assert f"\n{form['text']}</textarea>" in page
    assert len(Conversation.objects.get().turns) == 1


def test_only_models_that_are_served_take_part(models, ask, project):
    for number in range(2, 9):
        ModelVersion.objects.create(project=project, name=f"secret-{number}")
    ask("say", text="hello")
    assert sorted(sides()) == ["0", "1"]


def test_what_is_missing_is_said(models, ask, settings):
    models.names.pop(0)
    assert "has fewer than two models" in ask("say", text="hello")
    settings.SERVER_URL = "http://127.0.0.1:9"
    assert "the model server does not answer" in ask("say", text="hello").lower()
    settings.SERVER_URL = ""
    assert "no model server" in ask("say", text="hello").lower()
    assert not Conversation.objects.exists()


def test_a_conversation_can_be_left(models, ask):
    ask("say", text="hello")
    assert "Ask anything" in ask("leave", sure="1")
    assert not Item.objects.exists()


def test_a_conversation_is_flagged_with_a_reason(models, ask):
    ask("say", text="Hello")
    without = ask("flag", reason=" ")
    assert "A flag needs a reason" in without
    assert "says Hello" in without, "the conversation goes on"
    assert not Item.objects.exists()
    done = ask("flag", reason="It has a telephone number.", elapsed_ms="700")
    assert "Last: Flagged" in done
    response = Response.objects.get()
    assert (response.state, response.reason) == ("flagged", "It has a telephone number.")
    assert response.elapsed_ms == 700
    assert [place.candidate.text[1:] for place in response.item.places.all()] == [" says Hello"] * 2
    assert Conversation.objects.get().state == chat.JUDGED
    ask("flag", reason="again")
    assert Response.objects.count() == 1


def test_an_undone_vote_can_be_given_again(models, ask, member, signed_in):
    ask("say", text="hello")
    ask("vote", choice="1")
    client = signed_in(member("ann"))
    page = client.post("/p/demo/undo", follow=True).content.decode()
    assert "says hello" in page
    client.post(re.search(r"/p/demo/assignments/[0-9]+/submit", page).group(), {"choice": "5"})
    assert Response.objects.get(in_force=True).payload["better"] == 1


def test_a_chat_is_only_in_projects_of_chats(models, ask, project):
    project.task = "pair"
    project.save()
    assert "no live chat" in ask()
