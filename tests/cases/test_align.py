"""Faults met with judges, with pairs of answers and with rewards: each stays corrected."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from command_line import rows
from judge_server import Reply, fails, judging, says

from openpalm.align.config import DpoSettings
from openpalm.align.judging.endpoint_judge import EndpointJudge
from openpalm.align.judging.model_judge import Question
from openpalm.align.pairs.dpo import pair_losses
from openpalm.data.rows.readers.labelled_completions import read_labelled_completions
from openpalm.data.rows.readers.pairs import read_pairs
from openpalm.errors import SettingsError, WorkError


def lines(path: str, *items: object) -> Path:
    Path(path).write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return Path(path)


# --- judges behind an endpoint

BOTH = [
    {"prompt": "Q1?", "responses": ["GOOD one", "bad one"]},
    {"prompt": "Q2?", "responses": ["bad two", "GOOD two"]},
]


def better(text):
    """The letter of the answer that has GOOD in it."""
    return "A" if "GOOD" in text.split("Answer A:\n")[1].split("Answer B:\n")[0] else "B"


def judged(said, seen):
    """Runs `judge` on BOTH; (status, errors, records written)."""
    lines("data.jsonl", *BOTH)
    Path("c.yaml").write_text("principles:\n  - The better answer is true.\n", encoding="utf-8")
    words = ["--data", "data.jsonl", "--constitution", "c.yaml", "--endpoint", seen.url]
    status, _, errors = said("judge", *words, "--judge-model", "m", "--out", "j.jsonl")
    return status, errors, rows(Path("j.jsonl")) if Path("j.jsonl").exists() else []


def preferred(records):
    """The texts that the records prefer."""
    return [row["candidates"][row["payload"]["better"]]["text"] for row in records]


def test_a_verdict_in_a_sentence_is_read(said, place):
    """The verdict 'Answer: B' was read as A, the first letter of the word Answer."""
    with judging(lambda text, _: says(f"Answer: {better(text)}")) as seen:
        status, errors, records = judged(said, seen)
    assert (status, errors) == (0, [])
    assert preferred(records) == ["GOOD one", "GOOD two"]


@pytest.mark.parametrize("refused", ["logprobs", "max_tokens"])
def test_an_endpoint_that_refuses_an_option_judges(said, place, refused):
    """An endpoint without logprobs, or with max_completion_tokens only, could be no judge."""

    def reply(text, number):
        if refused in seen.requests[number]:
            return fails(400, f"Unsupported parameter: '{refused}'")
        return says(better(text))

    with judging(reply) as seen:
        status, errors, records = judged(said, seen)
    assert (status, errors) == (0, [])
    assert preferred(records) == ["GOOD one", "GOOD two"]


@pytest.mark.parametrize(
    ("code", "body"),
    [
        (400, {"object": "error", "message": "REASON here", "code": 400}),
        (422, {"detail": "REASON here"}),
        (404, {"error": "REASON here"}),
    ],
)
def test_the_reason_of_an_endpoint_is_shown(said, place, code, body):
    """What the endpoint said of an error was lost unless it came in OpenAI's shape."""
    with judging(lambda *_: Reply(json.dumps(body).encode(), code)) as seen:
        status, errors, _ = judged(said, seen)
    assert status != 0
    assert "REASON here" in errors[-1]


def test_a_refused_item_does_not_keep_the_others_back(said, place):
    """An item that the endpoint refuses for good kept all items behind it from being judged."""

    def reply(text, _):
        if "Q1?" in text:
            return fails(400, "maximum context length is 4096 tokens")
        return says(better(text))

    with judging(reply) as seen:
        status, errors, records = judged(said, seen)
    assert (status, errors) == (0, [])
    assert preferred(records) == ["GOOD two"]


@contextmanager
def dripping():
    """An endpoint that sends white space for a while before its verdict; its URL."""
    reply = json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for _ in range(20):
                try:
                    self.wfile.write(b"\n")
                except OSError:
                    return
                time.sleep(0.05)
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def test_the_timeout_is_of_the_whole_reply():
    """A reply of which a byte came now and then was waited for, whatever --timeout said."""

    async def at_once(_):
        pass

    with dripping() as url:
        judge = EndpointJudge(url, "m", timeout_s=0.2, wait=at_once)
        with pytest.raises(WorkError, match=r"timed out after 0\.2 s"):
            judge.verdicts([Question("Which?", ("A", "B"))])


# --- losses on pairs


def losses(sums: torch.Tensor, **changes) -> torch.Tensor:
    given = {"data": Path("-"), "out": Path("-"), "model": "palm-tiny", "steps": 1}
    settings = DpoSettings(**given | changes)
    return pair_losses(settings, sums, torch.tensor([2, 2]), torch.zeros(2))[0]


@pytest.mark.parametrize("sums", [[0.0, -3.0], [-3.0, 0.0], [0.0, 0.0]])
def test_orpo_on_a_certain_answer_has_a_gradient(sums):
    """Where an answer's log-probability was 0 in float32 the gradient of orpo was not a number."""
    log_probs = torch.tensor(sums, requires_grad=True)
    found = losses(log_probs, loss="orpo")
    found.sum().backward()
    assert found.isfinite().all()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


def test_an_orpo_run_continues_after_certainty(said, work, place):
    """A run of orpo on easy pairs ended with an error once the chosen answer was certain."""
    pairs = [{"prompt": f"{i}?", "chosen": "P", "rejected": "Nobody"} for i in (1, 2)]
    words = ["--data", lines("o.jsonl", *pairs), "--out", "r", "--steps", 70]
    words += ["--loss", "orpo", "--sequence-length", 32, "--batch-tokens", 64]
    words += ["--optim.lr", 0.03, "--optim.schedule", "wsd", "--optim.weight-decay", 0]
    status, _, errors = said("dpo", "--init", work / "base", *words, "--dtype", "float32")
    assert status == 0, errors
    measured = rows(Path("r/metrics.jsonl"))
    assert [row["step"] for row in measured if "loss" in row] == [*range(1, 71)]
    assert measured[-1]["log_prob_chosen"] == 0


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        ("dpo", {"label_smoothing": 0.3}),
        ("dpo", {"margin": 5.0}),
        ("dpo", {"desirable_weight": 9.0}),
        ("kto", {"length_normalise": True}),
        ("simpo", {"label_smoothing": 0.3}),
    ],
)
def test_an_option_of_another_loss_is_refused(loss, option):
    """An option that the chosen loss does not use was accepted and had no effect."""
    with pytest.raises(SettingsError, match="is an option of --loss"):
        losses(torch.tensor([-1.0, -3.0]), loss=loss, **option)


def test_kto_says_that_all_labels_are_equal(said, work, place):
    """kto on desirable completions alone said nothing of the undesirable ones that it needs."""
    labelled = [{"prompt": f"Q{i}?", "completion": "PaLM.", "label": True} for i in range(6)]
    words = ["--data", lines("k.jsonl", *labelled), "--out", "r", "--steps", 1, "--loss", "kto"]
    status, _, errors = said("dpo", "--init", work / "base", *words, "--dtype", "float32")
    assert status == 0, errors
    assert any(
        "6 labelled completions, all desirable; without undesirable ones" in line for line in errors
    )


# --- rows of pairs


def talk(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


@pytest.mark.parametrize("read", [read_pairs, read_labelled_completions])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": talk("hi", "same"), "rejected": talk("hi", "same")},
        {"chosen": talk("hi", "same"), "rejected": talk("hi", "")},
        {"chosen": talk("hi", "a") + "\n\nHuman: b", "rejected": talk("hi", "x")},
    ],
    ids=["equal", "empty", "ends with the human"],
)
def test_a_pair_without_a_difference_is_left_out(place, read, row):
    """One pair with an equal or an empty answer ended the command for the whole file."""
    fine = {"chosen": talk("hi there", "hello"), "rejected": talk("hi there", "go")}
    found = read(lines("p.jsonl", fine, row))
    assert found.items == read(lines("f.jsonl", fine)).items
    assert sum(found.unused.values()) == 1


@pytest.mark.parametrize(
    "named",
    [
        {"question": "What is 2+2?"},
        {"system": "Be brief.", "question": "What is 2+2?"},
        {"instruction": "What is 2+2?", "input": ""},
        {"system": "Be brief.", "prompt": None, "problem": "What is 2+2?"},
    ],
    ids=lambda named: "+".join(named),
)
def test_the_question_of_a_pair_is_kept(place, named):
    """A pair's question was dropped, and what both answers begin with became its prompt."""
    answers = {"chosen": "The answer is 4.", "rejected": "The answer is 5."}
    (pair,) = read_pairs(lines("p.jsonl", named | answers)).items
    assert pair.prompt[-1].content == "What is 2+2?"
    assert [m.content for m in pair.chosen] == ["The answer is 4."]
    assert [m.content for m in pair.rejected] == ["The answer is 5."]


# --- rewards


def test_a_reward_that_changes_its_row_gets_a_whole_one_again(said, work, place):
    """A reward function that popped a field of its row got the row without it the next time."""
    source = 'def pops(prompt, answer, row):\n    return float(len(row.pop("gold")))\n'
    Path("rw.py").write_text(source, encoding="utf-8")
    prompts = lines("p.jsonl", *({"prompt": f"Q{i}?", "gold": "PaLM"} for i in (1, 2)))
    words = ["--data", prompts, "--reward", "rw.py:pops", "--n", 2, "--max-new-tokens", 4]
    status, _, errors = said("best-of-n", work / "base", *words, "--out", "b.jsonl")
    assert status == 0, errors
    assert len(rows(Path("b.jsonl"))) == 2
