"""Faults that callers and operators of the server met: each stays corrected."""

import json
import socket

from altered import answers

from openpalm.cli.serve import ServeSettings

QUESTION = {"role": "user", "content": "Who are you?"}


def test_the_draws_of_two_seeds_differ(call):
    """n answers with seed 1 and n answers with seed 2 were the same answers but one."""

    def drawn(seed):
        body = {"messages": [QUESTION], "max_tokens": 12, "temperature": 1.5, "n": 4, "seed": seed}
        choices = call("/v1/chat/completions", body).body["choices"]
        return [choice["message"]["content"] for choice in choices]

    one, two = drawn(1), drawn(2)
    assert len({*one, *two}) == 8
    assert drawn(1) == one


def test_the_list_of_models_with_a_trailing_slash(call):
    """GET /v1/models/ was answered 404: the model '' is not served."""
    found = call("/v1/models/")
    assert (found.status, found.body["object"]) == (200, "list")


def test_a_key_from_a_file_lets_its_callers_in(work, monkeypatch):
    """A key with a line's end behind it, as files of secrets have, let nobody in."""
    monkeypatch.setenv("OPENPALM_API_KEY", "sekret\n")
    keys = ServeSettings(path="base").keys

    def status(key):
        headers = {"Authorization": f"Bearer {key}"}
        calls = [("GET", "/v1/models", None)]
        (found,) = answers(work / "base", calls, headers=headers, keys=keys)
        return found.status_code

    assert status("sekret") == 200
    assert status("sekre") == 401


def test_an_origin_as_the_address_bar_shows_it(work):
    """--allow-origin with the slash of the address bar was accepted and allowed no site."""
    origins = ServeSettings(path="base", allow_origin="https://web.example/").origins

    def allowed(origin):
        headers = {"Origin": origin, "Access-Control-Request-Method": "GET"}
        calls = [("OPTIONS", "/v1/models", None)]
        (found,) = answers(work / "base", calls, headers=headers, allow_origins=origins)
        return found.headers.get("access-control-allow-origin")

    assert allowed("https://web.example") == "https://web.example"
    assert allowed("https://other.example") is None


def test_a_final_message_is_continued(call):
    """continue_final_message was ignored, so the model answered in a second turn of its own."""
    messages = [QUESTION, {"role": "assistant", "content": "A small"}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    flags = {"add_generation_prompt": False, "continue_final_message": True}
    continued = call("/v1/chat/completions", body | flags)
    assert continued.status == 200
    with_a_new_turn = call("/tokenize", {"messages": messages}).body["count"]
    assert continued.body["usage"]["prompt_tokens"] < with_a_new_turn


def test_a_prompt_is_scored_without_generating(call):
    """max_tokens 0 with echo and logprobs, as evaluation programs ask for scores, was refused."""
    body = {"prompt": "Who are", "max_tokens": 0, "echo": True, "logprobs": 1}
    found = call("/v1/completions", body)
    assert found.status == 200
    (choice,) = found.body["choices"]
    first, *others = choice["logprobs"]["token_logprobs"]
    assert choice["text"] == "Who are"
    assert first is None
    assert len(others) == 6
    assert all(value < 0 for value in others)


def test_health_without_a_host(server):
    """A load balancer that names no host was answered 401 at /health."""
    host, port = server.url.removeprefix("http://").split(":")
    reply = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        while part := connection.recv(1 << 16):
            reply += part
    first, body = reply.split(b"\r\n", 1)[0], reply.split(b"\r\n\r\n", 1)[1]
    assert first.split()[1] == b"200"
    assert json.loads(body) == {"status": "ok"}
