"""lm-evaluation-harness, unmodified, on small tasks of our own.

What it logs must be what the engine says about the same ids.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
from command_line import rows
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message, render, stop_ids
from openpalm.evaluate.harness import HarnessModel, as_lm
from openpalm.evaluate.tasks import definition_with_rows, load_tasks, row_files, run_tasks
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling
from openpalm.generate.streaming import Completion, stream

ROWS = Path(__file__).parents[1] / "interop" / "data"
SIX = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
}
"""tasks with their definitions in the package"""
NEW = 20
UNTIL = ["$", "never there"]
# The likeliest token of this model is the last one again.
DOCUMENTS = {
    "choose": [
        {"context": "The quick", "choices": ["k", "kk", "kkz", " brown fox"]},
        {"context": "né", "choices": ["é", "ééé"]},
        {"context": "", "choices": ["a", "<|endoftext|>"]},
    ],
    "roll": [{"text": "The quick brown fox."}, {"text": "né"}, {"text": "windows, " * 150}],
    "say": [{"text": "The quick"}, {"text": "né"}, {"text": "1+1="}],
}
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": UNTIL, "max_gen_toks": NEW, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def evaluate(server, engine, tokenizer, tmp_path):
    """Runs the program; the samples of every task, as (arguments, answer)."""
    for name, task in TASKS.items():
        data = tmp_path / f"{name}.json"
        data.write_text(json.dumps(DOCUMENTS[name]))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        definition = {"task": name, "test_split": "test"} | files | task
        (tmp_path / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
    for name, given in SIX.items():
        given = Path(lm_eval.tasks.__file__).parent / given
        definition = definition_with_rows(given, name, row_files(ROWS / name))
        (tmp_path / f"{name}.yaml").write_text(json.dumps(definition))

    def run(*tasks, model="local-completions", path="/v1/completions", batch=1, chat=False, **how):
        how = {
            "model": "base",
            "base_url": server.url + path,
            "max_length": engine.model.config.context,
            "max_retries": 1,
            # Text never becomes a special token, so it cannot find out by itself.
            "custom_prefix_token_id": tokenizer.end_of_text,
        } | how
        words = ["--model", model, "--model_args", *(f"{k}={v}" for k, v in how.items())]
        words += ["--tasks", *tasks, "--include_path", tmp_path]
        words += ["--batch_size", batch, "--log_samples", "--output_path", tmp_path / "out"]
        words += ["--apply_chat_template"] if chat else []
        offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", *map(str, words)],
            capture_output=True,
            text=True,
            env=os.environ | offline | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return {task: samples(tmp_path / "out", task) for task in tasks}

    return run


def samples(out, task):
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    return [
        (list(arguments.values()), answer[0])
        for row in rows(file)
        for arguments, answer in zip(row["arguments"].values(), row["resps"], strict=True)
    ]


def greedy(engine, ids, count):
    return engine.completions([Request(ids, count, Sampling(temperature=0))])[0]


def said(engine, tokenizer, ids, ends):
    """The engine's own text."""
    answer = Completion("", [], "")
    request = Request(ids, NEW, Sampling(temperature=0), frozenset(ends))
    for _ in stream(engine, tokenizer, request, UNTIL, answer):
        pass
    return answer.text


def check_choices(found, engine, tokenizer):
    assert len(found) == sum(len(d["choices"]) for d in DOCUMENTS["choose"])
    for (context, continuation), (log_prob, is_greedy) in found:
        before = tokenizer.encode(context) or [tokenizer.end_of_text]
        after = tokenizer.encode(continuation)
        score = engine.score([before + after])[0][-len(after) :].sum().item()
        assert float(log_prob) == pytest.approx(score, abs=1e-4)
        assert is_greedy == str(greedy(engine, before, len(after)) == after)
    assert {is_greedy for _, (_, is_greedy) in found} == {"True", "False"}


def check_rolling(found, engine, tokenizer):
    assert len(found) == len(DOCUMENTS["roll"])
    for (text,), log_prob in found:
        windows = map(
            make_disjoint_window,
            get_rolling_token_windows(
                tokenizer.encode(text),
                tokenizer.end_of_text,
                engine.model.config.context - 2,
                context_len=1,
            ),
        )
        score = sum(
            engine.score([before + after])[0][-len(after) :].sum().item()
            for before, after in windows
        )
        assert float(log_prob) == pytest.approx(score, rel=1e-6, abs=1e-4)


def check_texts(found, engine, tokenizer):
    assert len(found) == len(DOCUMENTS["say"])
    for (text, _), answer in found:
        assert answer == said(engine, tokenizer, tokenizer.encode(text), {tokenizer.end_of_text})


def test_one_request_at_a_time(evaluate, engine, tokenizer):
    """It finds out by itself that the server has the tokenizer, and sends ids."""
    found = evaluate("choose", "roll", "say")
    check_choices(found["choose"], engine, tokenizer)
    check_rolling(found["roll"], engine, tokenizer)
    check_texts(found["say"], engine, tokenizer)


def test_batches_at_once(evaluate, engine, tokenizer):
    found = evaluate("choose", "roll", "say", batch=3, num_concurrent=4)
    check_choices(found["choose"], engine, tokenizer)
    check_rolling(found["roll"], engine, tokenizer)
    check_texts(found["say"], engine, tokenizer)


def test_prompts_as_text(evaluate, engine, tokenizer):
    """Without a tokenizer it cannot ask for log-probabilities."""
    found = evaluate("say", batch=2, tokenizer_backend="none")
    check_texts(found["say"], engine, tokenizer)


def test_chat(evaluate, engine, tokenizer):
    path = "/v1/chat/completions"
    found = evaluate("say", model="local-chat-completions", path=path, chat=True, num_concurrent=2)
    for document, (_, answer) in zip(DOCUMENTS["say"], found["say"], strict=True):
        talk = [Message("user", document["text"])]
        ids = render(tokenizer, talk, add_generation_prompt=True).ids
        assert answer == said(engine, tokenizer, ids, stop_ids(tokenizer))


@pytest.fixture
def in_process(base, tokenizer):
    """The engine's own model class, one sequence at a time, with the server's weights."""
    return HarnessModel(Engine(checkpoint.load(base), slots=1), tokenizer)


def test_the_same_in_this_process_to_the_last_digit(evaluate, in_process, tmp_path):
    """The six tasks of mesh-transformer-jax, a choice without context, windows and texts."""
    found = evaluate(*SIX, "choose", "roll", "say")
    lm = as_lm(in_process)
    for task in (*SIX, "choose"):
        pairs = [arguments for arguments, _ in found[task]]
        answers = lm.loglikelihood(_instances("loglikelihood", pairs))
        assert [tuple(answer) for _, answer in found[task]] == [
            (str(log_prob), str(is_greedy)) for log_prob, is_greedy in answers
        ], task
    # Over HTTP a window is shorter by two tokens: a longer text is cut at other places.
    short = [(arguments, answer) for arguments, answer in found["roll"] if len(arguments[0]) < 500]
    texts = [arguments for arguments, _ in short]
    answers = lm.loglikelihood_rolling(_instances("loglikelihood_rolling", texts))
    assert [answer for _, answer in short] == [str(log_prob) for log_prob in answers]
    settings = TASKS["say"]["generation_kwargs"]
    said_requests = [(arguments[0], settings) for arguments, _ in found["say"]]
    answers = lm.generate_until(_instances("generate_until", said_requests))
    assert [answer for _, answer in found["say"]] == answers
    # The figures that are printed, of the command as of the library's own program.
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    for score in run_tasks(in_process, load_tasks([*SIX], ROWS), resamples=0):
        assert theirs[score.task][f"{score.metric},none"] == score.value
    assert not in_process.notes


def _instances(kind, arguments):
    return [Instance(kind, {}, tuple(each), i) for i, each in enumerate(arguments)]
