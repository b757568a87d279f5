"""`openpalm chat` through standard input: history, commands, an interrupted reply."""

import io
import json

import pytest

from openpalm.cli import chat
from openpalm.generate import streaming


@pytest.fixture
def talk(said, run, monkeypatch):
    """Types lines into `openpalm chat`: (status, output lines, error lines)."""

    def call(*lines, options=("--temperature", "0", "--max-new-tokens", "6")):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status, output, errors = said("chat", run, *options)
        return status, output, errors

    return call


@pytest.fixture
def asked(monkeypatch):
    """The prompt ids of every answer, decoded."""
    prompts = []
    original = streaming.stream

    def spy(engine, tokenizer, request, stops, into):
        prompts.append(tokenizer.decode(request.ids, skip_special=False))
        return original(engine, tokenizer, request, stops, into)

    monkeypatch.setattr(streaming, "stream", spy)
    return prompts


def test_what_was_said_before_is_read_again(talk, asked):
    assert talk("one", "two")[0] == 0
    assert asked[0] == "<|user|>one<|end|><|assistant|>"
    assert asked[1].startswith(asked[0])
    assert asked[1].endswith("<|end|><|user|>two<|end|><|assistant|>")


def test_reset_forgets_and_the_system_message_stays(talk, asked):
    talk("one", "/reset", "two", options=("--system", "Be kind.", "--max-new-tokens", "3"))
    assert asked[1] == "<|system|>Be kind.<|end|><|user|>two<|end|><|assistant|>"


def test_a_saved_conversation_is_one_that_sft_reads(talk, tmp_path):
    from openpalm.data.rows.readers.demonstrations import read_demonstrations

    file = tmp_path / "kept.jsonl"
    talk("hello", f"/save {file}", "/reset", "again", f"/save {file}")
    conversations = read_demonstrations(file).items
    assert [[m.role for m in c] for c in conversations] == [["user", "assistant"]] * 2
    assert conversations[1][0].content == "again"


def test_unknown_commands_help_and_exit_leaves(talk, asked):
    _, output, _ = talk("/nonsense", "/exit", "never read")
    assert output.strip() == chat.HELP
    assert asked == []


def test_a_file_that_cannot_be_written_loses_nothing(talk, tmp_path):
    status, output, _ = talk("hello", f"/save {tmp_path}", "more")
    assert status == 0
    assert "cannot be written" in output


def test_interrupted_it_stops_the_answer_only(talk, monkeypatch, tmp_path):
    original = streaming.stream

    def interrupted(*arguments):
        pieces = original(*arguments)
        yield next(pieces)
        raise KeyboardInterrupt

    file = tmp_path / "kept.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "stream", interrupted)
        status, _, _ = talk("one", "two", f"/save {file}", options=("--max-new-tokens", "40"))
    assert status == 0
    kept = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in kept] == ["user", "assistant"] * 2
