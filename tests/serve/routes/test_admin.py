"""Keys, replacing the model, scores, metrics, CORS, conversations with consent, tokenize."""

import http.server
import json
import queue
import threading
import urllib.request

import pytest
from command_line import write_base
from servers import HANGS_S, serving

from openpalm.cli.serve import run_name

KEYS = {"OPENPALM_API_KEY": "sesame", "OPENPALM_ADMIN_KEY": "boss"}
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "seed": 1}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model, with its own context."""
    return write_base(tmp_path_factory.mktemp("other") / "other", context=64)


@pytest.fixture(scope="module")
def inbox():
    """A server that keeps posted conversations: its address, and a queue of them."""
    came = queue.SimpleQueue()

    class Keeper(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            came.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Keeper) as keeper:
        threading.Thread(target=keeper.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{keeper.server_port}/", came
        keeper.shutdown()


@pytest.fixture(scope="module")
def guarded(base, inbox):
    options = ("--conversation-url", inbox[0], "--allow-origin", "*", "--max-sequences", 2)
    with serving(base, "--dtype", "float32", *options, env=KEYS) as running:
        yield running


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/models", None, 401),
        ("/v1/models", "", 401),
        ("/v1/models", "sesam", 401),
        ("/v1/models", "sésame", 401),
        ("/v1/models", "sesame", 200),
        ("/v1/models", "boss", 200),
        ("/tokenizer_info", None, 401),
        ("/nothing", None, 401),
        ("/health", None, 200),
        ("/ready", None, 200),
        ("/metrics", None, 200),
        ("/", None, 200),
        ("/openapi.json", None, 200),
    ],
)
def test_keys(guarded, path, key, status):
    answer = guarded.call(path, key=key)
    assert answer.status == status
    if status == 401:
        assert answer.body["error"]["type"] == "authentication_error"
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_wrong_key_is_refused_before_the_body_is_parsed(guarded):
    assert guarded.call("/v1/completions", raw=b"{", key="wrong").status == 401


@pytest.mark.parametrize("path", ["/admin/models", "/v1/score"])
@pytest.mark.parametrize("key", [None, "sesame"])
def test_admin_endpoints_need_the_admin_key(guarded, path, key):
    answer = guarded.call(path, {}, key=key)
    assert (answer.status, answer.body["error"]["code"]) == (401, "admin_key")


def test_without_an_admin_key_admin_endpoints_are_closed(server):
    answer = server.call("/admin/models", {"path": "x"}, key="")
    assert answer.status == 401
    assert "--admin-key" in answer.body["error"]["message"]


def test_scores_are_the_engines(guarded, engine):
    sequences = [list(range(60, 90)), [5], [70, 71]]
    answer = guarded.call("/v1/score", {"sequences": sequences}, key="boss")
    assert answer.status == 200
    for row, expected in zip(answer.body["data"], engine.score(sequences), strict=True):
        assert row["log_probs"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert row["score"] == pytest.approx(float(expected.sum()), abs=1e-3)
    by_text = guarded.call("/v1/score", {"sequences": ["FG"]}, key="boss")
    (by_ids,) = answer.body["data"][2]["log_probs"]
    assert by_text.body["data"][0]["log_probs"] == [pytest.approx(by_ids, abs=1e-4)]


def test_scores_of_sequences_that_do_not_fit(guarded):
    for sequences, says in (([[1] * 129], "129 tokens"), ([[999]], "999"), ([[]], "sequences")):
        answer = guarded.call("/v1/score", {"sequences": sequences}, key="boss")
        assert answer.status == 400
        assert says in answer.body["error"]["message"]


def test_only_conversations_with_consent_are_posted(guarded, inbox):
    _, came = inbox
    private = HELLO | {"messages": [{"role": "user", "content": "a secret"}]}
    guarded.call("/v1/chat/completions", private, key="sesame")
    guarded.call("/v1/chat/completions", private | {"store": False}, key="sesame")
    shared = guarded.call("/v1/chat/completions", HELLO | {"store": True}, key="sesame")
    streamed = HELLO | {"store": True, "stream": True}
    guarded.call("/v1/chat/completions", streamed, key="sesame")
    for record in (came.get(timeout=HANGS_S) for _ in range(2)):
        assert record["messages"] == HELLO["messages"]
        assert record["answer"] == shared.body["choices"][0]["message"]["content"]
        assert (record["model"], record["sampling"]["seed"]) == ("base", 1)
    assert came.empty()


def test_a_model_is_replaced_while_requests_are_in_flight(guarded, base, other):
    """Requests in flight finish on the old model; the next one gets the new model."""
    body = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True, "temperature": 0}
    expected = guarded.call("/v1/completions", body, key="sesame").body["choices"]
    answers = []

    def ask():
        answers.append(guarded.call("/v1/completions", body, key="sesame"))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    try:
        swap = guarded.call("/admin/models", {"path": str(other)}, key="boss")
        assert swap.body == {"model": "other", "replaced": "base", "removed_adapters": []}
        for thread in threads:
            thread.join()
        for answer in answers:  # admitted before the swap: the old model's; after it: too long
            assert answer.status in (200, 400)
            if answer.status == 200:
                assert answer.body["choices"] == expected
        assert any(answer.status == 200 for answer in answers)
        listed = guarded.call("/v1/models", key="sesame").body["data"]
        assert [(model["id"], model["max_model_len"]) for model in listed] == [("other", 64)]
        refused = guarded.call("/v1/completions", body | {"model": "base"}, key="sesame")
        assert refused.status == 404
    finally:
        back = guarded.call("/admin/models", {"path": str(base)}, key="boss")
    assert back.body == {"model": "base", "replaced": "other", "removed_adapters": []}


def test_a_model_that_cannot_be_loaded_changes_nothing(guarded, tmp_path):
    for path in (tmp_path, tmp_path / "none", "\0", "0" * 4096):
        answer = guarded.call("/admin/models", {"path": str(path)}, key="boss")
        assert answer.status == 400
        assert "Traceback" not in answer.body["error"]["message"]
    assert guarded.call("/v1/models", key="sesame").body["data"][0]["id"] == "base"


def test_metrics_count_requests_and_tokens(guarded):
    counted = {
        "openpalm_generated_tokens_total": 7,
        "openpalm_prompt_tokens_total": 3,
        'openpalm_sequences_total{reason="length"}': 1,
        'openpalm_requests_total{path="/v1/completions",status="400"}': 1,
        "openpalm_first_token_seconds_count": 1,
    }
    body = {"prompt": "abc", "max_tokens": 7, "ignore_eos": True}
    spoilt = {"prompt": "abc", "temperature": 9}
    for each in (body, spoilt):  # a line is there from its first count on
        guarded.call("/v1/completions", each, key="sesame")
    before = {name: guarded.metric(name) for name in counted}
    for each in (body, spoilt):
        guarded.call("/v1/completions", each, key="sesame")
    assert {name: guarded.metric(name) - before[name] for name in counted} == counted


def test_cors_is_off_unless_asked_for(server, guarded):
    """Checked with an origin, as a browser sends it."""

    def allowed(running):
        request = urllib.request.Request(
            running.url + "/health", headers={"Origin": "https://page.example"}
        )
        with urllib.request.urlopen(request) as response:
            return response.headers.get("Access-Control-Allow-Origin")

    assert allowed(server) is None
    assert allowed(guarded) == "*"


def test_the_old_endpoint_of_mesh_transformer_jax(call):
    answer = call("/complete", {"context": "abc", "top_p": "0.9", "temp": "0.5"})
    assert set(answer.body) == {"completion"}
    assert call("/complete", {"top_p": 0.9}).status == 400
    assert call("/complete", {"context": "a" * 128}).status == 400


def test_tokenize_and_detokenize(call, tokenizer):
    text = "né <|end|>\u0000"
    tokenized = call("/tokenize", {"prompt": text}).body
    assert tokenized == {"tokens": tokenizer.encode(text), "count": 12, "max_model_len": 128}
    assert call("/detokenize", {"tokens": tokenized["tokens"]}).body == {"prompt": text}
    assert call("/tokenize", {}).status == 400


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/tiny", "tiny"), ("runs/tiny/step-00000010", "tiny"), ("/", "/")],
)
def test_the_name_is_the_runs(path, name):
    assert run_name(path) == name
