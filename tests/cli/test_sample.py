"""`openpalm sample`: the completions of the model, with each option."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from command_line import TINY, program

import openpalm
from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate import engine as engine_module
from openpalm.generate.sampling import Sampling
from openpalm.model.transformer import Transformer, initialise

PROMPT = "The quick brown"


@pytest.fixture
def sampled(said, run):
    """The answer of `openpalm sample RUN PROMPT --json ...`."""

    def call(*words, path=run, prompt=PROMPT):
        status, output, errors = said("sample", path, prompt, "--json", *words)
        assert (status, errors) == (0, [])
        return json.loads(output)

    return call


@pytest.fixture
def requests(monkeypatch):
    """What reaches the engine."""
    seen = []
    generate = engine_module.Engine.generate

    def watched(self, requests):
        seen.extend(requests)
        return generate(self, requests)

    monkeypatch.setattr(engine_module.Engine, "generate", watched)
    return seen


def test_json_has_the_text_and_tokens_of_the_model(sampled, run):
    answer = sampled("--temperature", 0, "--max-new-tokens", 12)
    model, ids = openpalm.load(run), [*PROMPT.encode()]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    assert answer == {
        "prompt": PROMPT,
        "text": Tokenizer.byte().decode(ids[len(PROMPT) :]),
        "tokens": ids[len(PROMPT) :],
        "finish": "length",
    }


def test_plain_streamed_and_json_agree(said, sampled, run):
    words = ["--seed", 5, "--max-new-tokens", 30]
    text = sampled(*words)["text"]
    plain = said("sample", run, PROMPT, *words)
    assert plain == (0, f"{PROMPT}{text}\n", [])
    assert said("sample", run, PROMPT, *words, "--stream") == plain


def test_streaming_in_a_process_of_its_own(sampled, run):
    """Which imports neither torch's compiler nor its sharding: a second of every start."""
    words = ("--seed", 5, "--max-new-tokens", 30)
    timed = {"PYTHONPROFILEIMPORTTIME": "1"}
    done = program("sample", run, PROMPT, *words, "--stream", env=timed)
    assert (done.returncode, done.stdout) == (0, f"{PROMPT}{sampled(*words)['text']}\n")
    lines = done.stderr.splitlines()
    assert all(line.startswith("import time:") for line in lines), lines
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "torch" in imported
    assert not imported & {"torch._dynamo", "torch.distributed.tensor", "sympy"}


def test_seeds(sampled):
    first = sampled("--seed", 1, "--max-new-tokens", 40)
    assert sampled("--seed", 1, "--max-new-tokens", 40) == first
    assert sampled("--seed", 2, "--max-new-tokens", 40) != first


def test_a_run_is_its_newest_checkpoint(sampled, run):
    step = checkpoint.steps(run)[-1]
    assert sampled("--max-new-tokens", 9, path=step) == sampled("--max-new-tokens", 9)


def test_options_may_stand_anywhere(said, run):
    words = ["--max-new-tokens", "4", "--seed", "3"]
    expected = said("sample", run, PROMPT, *words)
    assert expected[0] == 0
    assert said("sample", *words, run, PROMPT) == expected
    assert said("sample", run, *words, PROMPT) == expected
    assert said("sample", run, *words, "--", PROMPT) == expected
    assert said("sample", "--max_new_tokens=4", run, "--seed=3", PROMPT) == expected


@pytest.mark.parametrize(
    "prompt",
    ["", "null", "~", "true", "12", "-x", "[a, b]", "a: b", "two\nlines", "日本語 😀", " "],
)
def test_any_text_is_a_prompt(sampled, requests, prompt):
    assert sampled("--max-new-tokens", 2, prompt=prompt)["prompt"] == prompt
    end = Tokenizer.byte().end_of_text
    assert list(requests[0].ids) == ([*prompt.encode()] or [end])


def test_a_prompt_that_looks_like_an_option(said, run):
    status, output, _ = said("sample", run, "--max-new-tokens", 2, "--", "--help")
    assert (status, output.startswith("--help")) == (0, True)


# --- how long


def test_default_length(sampled):
    assert len(sampled("--temperature", 0)["tokens"]) <= 128


@pytest.mark.parametrize("total", [len(PROMPT) + 1, len(PROMPT) + 20])
@pytest.mark.parametrize("spelling", ["--seq_len", "--seq-len"])
def test_seq_len_counts_prompt_and_answer(requests, sampled, total, spelling):
    sampled(spelling, total, "--temperature", 0)
    assert requests[0].max_new_tokens == total - len(PROMPT)


def test_seq_len_without_room_for_an_answer(said, run):
    status, _, errors = said("sample", run, PROMPT, "--seq_len", len(PROMPT))
    assert status == 2
    assert f"--seq-len {len(PROMPT)}: the prompt alone has {len(PROMPT)} tokens" in errors[0]
    assert errors[0].endswith("shorten it, or give a larger --seq-len")


@pytest.mark.parametrize(
    "words",
    [
        ["--seq_len", 9, "--max-new-tokens", 9],
        ["--filter_thres", 0.9, "--top-k", 3],
        ["--model", "palm_410m_8k_v0"],
    ],
)
def test_two_ways_to_say_one_thing_are_refused(said, run, words):
    status, _, errors = said("sample", run, PROMPT, *words)
    assert status == 2
    assert errors[0].endswith("not both")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", 0),
        ("--max-new-tokens", -1),
        ("--seq-len", 0),
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--top-k", -1),
        ("--top-p", 0),
        ("--filter-thres", 1),
        ("--filter-thres", -0.1),
        ("--dtype", "float16"),
        ("--device", "tpu"),
        ("--seed", 2**63),
    ],
)
def test_values_out_of_range(said, run, option, value):
    status, output, errors = said("sample", run, PROMPT, option, value)
    assert (status, output, len(errors)) == (2, "", 1)
    assert option.replace("-", "_") in errors[0].replace("-", "_")
    assert str(value) in errors[0]


# --- how chosen


@pytest.mark.parametrize("threshold", [0, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_filter_thres_keeps_the_share_that_is_left(requests, sampled, threshold):
    sampled("--filter_thres", threshold, "--max-new-tokens", 1)
    assert requests[0].sampling.top_k == math.ceil((1 - threshold) * 265)


def test_a_high_filter_thres_is_greedy(sampled):
    greedy = sampled("--temperature", 0, "--max-new-tokens", 20)
    assert sampled("--filter_thres", 0.999, "--max-new-tokens", 20) == greedy


def test_temperature_zero_is_a_temperature(requests, sampled):
    sampled("--temperature", 0, "--max-new-tokens", 1)
    assert requests[0].sampling.temperature == 0


def test_sampling_settings_reach_the_engine(requests, sampled):
    words = ["--temperature", 0.7, "--top-k", 9, "--top-p", 0.8, "--seed", 4]
    sampled(*words, "--max-new-tokens", 1)
    assert requests[0].sampling == Sampling(0.7, 9, 0.8, 4)


def test_stop(sampled):
    free = sampled("--seed", 1, "--max-new-tokens", 60)["text"]
    stop = free[20:22]
    answer = sampled("--seed", 1, "--max-new-tokens", 60, "--stop", stop)
    assert answer["text"] == free[: free.index(stop)]
    assert answer["finish"] == "stop"
    several = json.dumps(["\x00never", stop])
    assert sampled("--seed", 1, "--max-new-tokens", 60, "--stop", several) == answer


# --- which model


def test_model_takes_the_one_word_as_the_prompt(said, sampled, work, monkeypatch):
    from openpalm.convert import published

    name = next(iter(published.NAMES))
    monkeypatch.setattr(published, "fetch", lambda asked: work / "run" if asked == name else None)
    status, output, errors = said("sample", "--model", name, PROMPT, "--json", "--seq_len", 40)
    assert (status, errors) == (0, [])
    assert json.loads(output) == sampled("--max-new-tokens", 40 - len(PROMPT))


def test_a_checkpoint_without_tokenizer(said, work, run, sampled, tmp_path):
    bare = tmp_path / "bare"
    checkpoint.save(bare, openpalm.load(run))
    status, _, errors = said("sample", bare, PROMPT)
    assert status == 2
    assert errors == [
        f"openpalm: error: {bare}: its manifest lists no tokenizer.json; give one with --tokenizer"
    ]
    words = ["--tokenizer", work / "data" / "tokenizer.json", "--max-new-tokens", 5]
    assert sampled(*words, path=bare) == sampled("--max-new-tokens", 5)


def test_a_tokenizer_too_large_for_the_model(said, run, tmp_path):
    Tokenizer.train_bpe(["the quick brown fox " * 50], 290).save(tmp_path / "t.json")
    words = ["sample", run, "the quick", "--tokenizer", tmp_path / "t.json"]
    for more in ([], ["--force"]):
        status, _, errors = said(*words, *more)
        assert status == 2
        assert "vocabulary has 265 ids, this tokenizer 281; give the model's own" in errors[0]


@pytest.mark.parametrize("verb", ["sample", "chat"])
def test_another_tokenizer_than_the_models_own(said, run, tmp_path, monkeypatch, verb):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    other = tmp_path / "t.json"
    Tokenizer.train_bpe(["other words here " * 9], 265).save(other)
    words = [verb, run, *(["the"] if verb == "sample" else []), "--tokenizer", other]
    words += ["--max-new-tokens", 2, "--dtype", "float32"]
    status, output, errors = said(*words)
    assert (status, output) == (2, "")
    assert "its own tokenizer.json is another tokenizer than this one" in errors[0]
    assert errors[0].endswith("leave --tokenizer out, or add --force to use it anyway")
    status, _, errors = said(*words, "--force")
    assert (status, len(errors)) == (0, 1)
    assert errors[0].endswith("another tokenizer than this one; used anyway (--force)")


def test_a_tokenizer_much_smaller_than_a_model_without_one(said, tmp_path):
    wide = Transformer(replace(TINY, vocab_size=600))
    initialise(wide, seed=0)
    checkpoint.save(tmp_path / "bare", wide)
    Tokenizer.byte().save(tmp_path / "t.json")
    words = ["sample", tmp_path / "bare", "the", "--tokenizer", tmp_path / "t.json"]
    words += ["--max-new-tokens", 2, "--dtype", "float32"]
    status, _, errors = said(*words)
    assert status == 2
    assert (
        "has no tokenizer of its own; its vocabulary has 600 ids, this tokenizer 265" in errors[0]
    )
    status, _, errors = said(*words, "--force")
    assert status in (0, 1)  # an id beyond the tokenizer's cannot be decoded
    assert errors[0].endswith("used anyway (--force)")


def test_bfloat16(sampled):
    assert sampled("--dtype", "bfloat16", "--max-new-tokens", 3, "--temperature", 0)["tokens"]


def test_missing_words(said, run):
    assert said("sample")[2] == ["openpalm: error: missing PATH; see `openpalm sample --help`"]
    status, _, errors = said("sample", run)
    assert (status, errors) == (
        2,
        ["openpalm: error: missing prompt; run `openpalm sample PATH PROMPT`"],
    )
    status, _, errors = said("sample", run, "The", "quick", "brown")
    assert status == 2
    assert "unexpected quick brown; a text of several words needs quotes" in errors[0]
