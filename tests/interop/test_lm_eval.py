"""lm-evaluation-harness in this process: our model class on its tasks, against its own hf model.

The rows in data/ are our own, in the formats in which the tasks are published.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import TINY, rows, talk, write_base
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.conversation import Message, render
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.evaluate.harness import HarnessModel, as_lm
from openpalm.evaluate.scoring import rolling_windows
from openpalm.evaluate.tasks import load_tasks, run_tasks
from openpalm.generate.engine import Engine
from openpalm.generate.request import Request
from openpalm.generate.sampling import Sampling

DATA = Path(__file__).parent / "data"
SIX = ["lambada_openai", "piqa", "hellaswag", "winogrande", "mathqa", "pubmedqa"]
TEXTS = ["The quick brown fox.", "né", "windows, " * 90]


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint of a tiny model with clear choices: the likeliest token is the last again."""
    return write_base(tmp_path_factory.mktemp("model") / "base", context=512, clear=True)


@pytest.fixture(scope="module")
def model(base):
    return checkpoint.load(base)


@pytest.fixture(scope="module")
def tokenizer(base):
    return Tokenizer.load(base)


@pytest.fixture(params=[1, 6])
def harness(request, model, tokenizer):
    """One sequence at a time, and several."""
    return HarnessModel(Engine(model, slots=request.param), tokenizer)


def asked(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


@torch.no_grad()
def direct(model, before, after):
    """Log-probability of `after` and whether it is greedy, from all logits at once."""
    ids = torch.tensor([before + after])
    log_probs = model.logits(ids)[0, len(before) - 1 : -1].double().log_softmax(-1)
    wanted = torch.tensor(after)
    total = log_probs.gather(-1, wanted[:, None]).sum().item()
    return total, bool((log_probs.argmax(-1) == wanted).all())


def test_log_likelihoods_are_those_of_the_logits(harness, model, tokenizer):
    pairs = [
        ("The quick", "k"),
        ("The quick", "kk"),
        ("The quick", " brown fox"),
        ("The quick ", "brown"),  # the library moves the space
        ("", "né"),
        ("x" * 600, "xxx"),  # keeps the last tokens that fit
        ("x", "y" * 520),  # in windows
    ]
    found = as_lm(harness).loglikelihood(asked("loglikelihood", *pairs))
    ids = [(tokenizer.encode(a) or [tokenizer.end_of_text], tokenizer.encode(b)) for a, b in pairs]
    ids[3] = (tokenizer.encode("The quick"), tokenizer.encode(" brown"))
    ids[5] = (ids[5][0][-510:], ids[5][1])
    expected = [direct(model, *each) for each in ids[:-1]]
    x, y = tokenizer.encode("x"), tokenizer.encode("y")
    parts = [direct(model, x, y * 512), direct(model, y * 505, y * 8)]
    expected.append((sum(total for total, _ in parts), all(greedy for _, greedy in parts)))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    log_probs = [log_prob for log_prob, _ in found]
    assert log_probs == pytest.approx([total for total, _ in expected], rel=1e-5, abs=1e-4)
    assert len(harness.notes) == 2


def test_rolling_windows_are_the_librarys():
    ids = list(range(1, 38))
    for length in range(1, 12):
        for overlap in range(length):
            theirs = get_rolling_token_windows(ids, 0, length, overlap + 1)
            expected = [tuple(map(list, make_disjoint_window(pair))) for pair in theirs]
            assert [tuple(pair) for pair in rolling_windows(ids, 0, length, overlap)] == expected


def test_rolling_log_likelihoods_are_those_of_the_logits(harness, model, tokenizer):
    requests = asked("loglikelihood_rolling", *((text,) for text in TEXTS))
    found = as_lm(harness).loglikelihood_rolling(requests)
    for text, log_prob in zip(TEXTS, found, strict=True):
        windows = get_rolling_token_windows(
            tokenizer.encode(text), tokenizer.end_of_text, model.config.context, 1
        )
        expected = sum(direct(model, *make_disjoint_window(pair))[0] for pair in windows)
        assert log_prob == pytest.approx(expected, rel=1e-5)


def test_generated_text_is_the_engines(harness, model, tokenizer):
    texts = ["The quick", "né", "1+1=", ""]
    settings = {"until": ["never there"], "max_gen_toks": 20, "do_sample": False, "num_beams": 1}
    found = as_lm(harness).generate_until(
        asked("generate_until", *((text, settings) for text in texts))
    )
    for text, generated in zip(texts, found, strict=True):
        ids = tokenizer.encode(text) or [tokenizer.end_of_text]
        ends = frozenset({tokenizer.end_of_text})
        request = Request(ids, 20, Sampling(temperature=0), ends)
        (completion,) = Engine(model, slots=1).completions([request])
        assert generated == tokenizer.decode(completion)
    assert any("num_beams" in note for note in harness.notes)


def test_generation_ends_before_a_stop_string_and_draws_with_a_temperature(harness):
    lm = as_lm(harness)
    (whole,) = lm.generate_until(asked("generate_until", ("abc", {"max_gen_toks": 40})))
    assert len(whole) > 5
    stop = whole[3:5]
    settings = {"max_gen_toks": 40, "until": [stop, "never there"]}
    (stopped,) = lm.generate_until(asked("generate_until", ("abc", settings)))
    assert stopped == whole[: whole.index(stop)]
    drawn = {"max_gen_toks": 40, "temperature": 30.0}
    texts = lm.generate_until(asked("generate_until", *[("abc", drawn)] * 2))
    assert len({whole, *texts}) == 3


def test_conversations_get_the_ids_of_our_template(harness, tokenizer):
    lm = as_lm(harness)
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say <|end|> or <|assistant|>"},
    ]
    messages = [Message(each["role"], each["content"]) for each in history]
    expected = render(tokenizer, messages, add_generation_prompt=True).ids
    text = lm.apply_chat_template(history)
    assert lm.tok_encode(text) == expected
    assert lm._encode_pair(text, " yes") == (expected, tokenizer.encode(" yes"))
    begun = [*history, {"role": "assistant", "content": "I say"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert lm.tok_encode(text) == expected + tokenizer.encode("I say")


@pytest.fixture(scope="module")
def scores(model, tokenizer):
    """The six tasks of the original, and the cloze form with 15 examples."""
    harness = HarnessModel(Engine(model), tokenizer)
    found = run_tasks(harness, load_tasks(SIX, DATA))
    longer = checkpoint_with_context(model, 4096)
    cloze = load_tasks(["lambada_openai_cloze_yaml"], DATA, shots=15, limit=3)
    return found + run_tasks(HarnessModel(Engine(longer), tokenizer), cloze)


def checkpoint_with_context(model, context):
    from openpalm.model.transformer import Transformer

    longer = Transformer(replace(model.config, context=context))
    longer.load_state_dict(model.state_dict())
    return longer


def test_the_six_tasks_run_from_files(scores):
    assert list(dict.fromkeys(score.task for score in scores)) == [
        *SIX,
        "lambada_openai_cloze_yaml",
    ]
    known = {(score.task, score.metric): score for score in scores}
    assert known["lambada_openai", "perplexity"].rows == 20
    assert known["piqa", "acc"].rows == 4
    assert known["lambada_openai_cloze_yaml", "acc"].shots == 15
    assert known["lambada_openai_cloze_yaml", "acc"].rows == 3
    assert all(0 <= score.value <= 1 for score in scores if score.metric.startswith("acc"))
    assert known["lambada_openai", "perplexity"].stderr > 0


def test_perplexity_and_accuracy_are_those_of_the_logits(scores, model, tokenizer):
    """LAMBADA, from the rows: the last word after the text before it."""
    answers = []
    for row in rows(DATA / "lambada_openai" / "test.jsonl"):
        before, _, word = row["text"].rpartition(" ")
        answers.append(direct(model, tokenizer.encode(before), tokenizer.encode(" " + word)))
    known = {(score.task, score.metric): score.value for score in scores}
    mean = sum(total for total, _ in answers) / len(answers)
    perplexity = torch.tensor(-mean, dtype=torch.float64).exp().item()
    assert known["lambada_openai", "perplexity"] == pytest.approx(perplexity, rel=1e-4)
    accuracy = sum(greedy for _, greedy in answers) / len(answers)
    assert known["lambada_openai", "acc"] == accuracy


def test_a_batch_and_one_at_a_time_score_the_same(model, tokenizer):
    tasks = load_tasks(["hellaswag", "piqa"], DATA, shots=1)
    found = [
        run_tasks(HarnessModel(Engine(model, slots=slots), tokenizer), tasks, resamples=0)
        for slots in (1, 5)
    ]
    assert found[0] == found[1]


def test_the_command_and_the_report(said, run, tmp_path):
    """On a trained model; the scores are in the run's report, by its name the published ones."""
    words = ["eval", run, "--tasks", "lambada_openai,piqa", "--task-path", DATA, "--limit", 3]
    status, output, errors = said(*words, "--out", tmp_path / "scores.json", "--json")
    assert status == 0, errors
    assert json.loads(output) == json.loads((tmp_path / "scores.json").read_text())
    assert {row["rows"] for row in json.loads(output)["scores"]} == {3}
    assert any("lost its beginning" in line for line in errors)  # contexts beyond 48 tokens
    status, output, _ = said(*words, "--out", tmp_path / "scores.json")
    assert status == 0
    assert "3.9900" in output  # the published perplexity, next to ours
    status, output, _ = said("report", tmp_path / "scores.json")
    assert output.strip() == str(tmp_path / "scores.html")
    assert "3.9900" in (tmp_path / "scores.html").read_text()


def test_a_probe_during_training(said, work, tmp_path):
    words = ["train", "--init", work / "base", "--data", work / "data", "--out", tmp_path / "run"]
    words += ["--steps", 6, "--batch-tokens", 192, "--dtype", "float32", "--eval-every", 3]
    status, _, errors = said(*words)
    assert status == 0, errors
    plain = rows(tmp_path / "run" / "metrics.jsonl")
    words[words.index(tmp_path / "run")] = tmp_path / "probed"
    words += ["--eval-tasks", "piqa", "--eval-tasks-every", 2, "--eval-tasks-path", DATA]
    status, _, errors = said(*words)
    assert status == 0, errors
    found = rows(tmp_path / "probed" / "metrics.jsonl")
    measured = [row for row in found if "task/piqa/acc" in row]
    assert [row["step"] for row in measured] == [2, 4, 6]
    # The probe changes nothing in what is learnt.
    losses = [[row["loss"] for row in each if "loss" in row] for each in (plain, found)]
    assert losses[0] == losses[1]
    said("report", tmp_path / "probed")
    page = (tmp_path / "probed" / "report.html").read_text()
    assert "tasks during training" in page
    # The last row is what the checkpoint scores.
    last = ["eval", tmp_path / "probed", "--tasks", "piqa", "--task-path", DATA, "--json"]
    status, output, errors = said(*last)
    assert status == 0, errors
    values = {row["metric"]: row["value"] for row in json.loads(output)["scores"]}
    assert values["acc"] == measured[-1]["task/piqa/acc"]
    assert "tasks.json" in {path.name for path in (tmp_path / "probed").iterdir()}


def test_fine_tuning_probes_conversations(said, work, tmp_path):
    data = talk(tmp_path / "data.jsonl", *[[("user", "Hi"), ("assistant", "Ho")]] * 8)
    words = ["sft", "--init", work / "base", "--data", data, "--out", tmp_path / "run"]
    words += ["--steps", 2, "--batch-tokens", 96, "--dtype", "float32"]
    status, _, errors = said(*words, "--eval-tasks", "winogrande", "--eval-tasks-path", DATA)
    assert status == 0, errors
    assert "task/winogrande/acc" in rows(tmp_path / "run" / "metrics.jsonl")[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "lambda_openai"], "no such task; did you mean lambada_openai"),
        (["--tasks", "piqa", "--task-path", "nowhere"], "--task-path nowhere: no such folder"),
        (["--tasks", " , "], "--tasks ' , ': must be names of tasks"),
    ],
)
def test_a_wrong_request_is_one_line(said, run, words, message):
    status, _, errors = said("eval", run, *words)
    assert (status, len(errors)) == (2, 1)
    assert message in errors[0]


def test_rows_in_another_format_are_one_line(said, run, tmp_path):
    (tmp_path / "piqa").mkdir()
    file = tmp_path / "piqa" / "validation.jsonl"
    words = ["eval", run, "--tasks", "piqa", "--task-path", tmp_path, "--out", tmp_path / "s.json"]
    for line in ("not a row", json.dumps({"sentence": "a"})):
        file.write_text(line + "\n", encoding="utf-8")
        status, _, errors = said(*words)
        assert (status, len(errors)) == (2, 1), errors
        assert "task piqa: lm-evaluation-harness failed" in errors[0]
    # The library takes a row without its answer, and warns.
    file.write_text(json.dumps({"goal": "a", "sol1": "b", "sol2": "c"}) + "\n", encoding="utf-8")
    status, _, errors = said(*words)
    assert status == 0
    assert errors[0].startswith("eval: lm-evaluation-harness warns: Label index was not in")


def test_a_task_of_ones_own(said, run, tmp_path):
    """A definition in a .yaml with its rows next to it."""
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text(json.dumps({"q": "Chapter", "a": " 1"}) + "\n", encoding="utf-8")
    definition = {
        "task": "chapters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows_file)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (tmp_path / "chapters.yaml").write_text(json.dumps(definition), encoding="utf-8")
    words = ["eval", run, "--tasks", "chapters", "--task-path", tmp_path, "--json"]
    status, output, errors = said(*words)
    assert status == 0, errors
    assert [row["metric"] for row in json.loads(output)["scores"]] == ["perplexity", "acc"]
    (run / "tasks.json").unlink()


CODE = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
OWN = """task: own
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("process_docs: !function code.run\n", "names Python code (!function code.run)"),
        ("process_docs: !function os.system\n", "names Python code (!function os.system)"),
        ("class: !function code.Task\n", "names Python code (!function code.Task)"),
        ("include: other.yml\n", "other.yml: names Python code (!function code.run)"),
        ("x: &x {include: other.yml}\n<<: *x\n", "other.yml: names Python code"),
        (
            "metric_list: [{metric: ./code.py, aggregation: mean, higher_is_better: true}]\n",
            "metric",
        ),
        (f"doc_to_text: {json.dumps(CODE)}\n", "'cycler' is undefined|SecurityError"),
        ("process_docs: !!python/name:os.system\n", "no such task"),
    ],
)
def test_code_of_a_definition_is_not_run(said, run, tmp_path, more, says):
    """Not even when another task of the folder is wanted."""
    canary, rows_file = tmp_path / "canary", tmp_path / "rows.jsonl"
    touch = f"open({str(canary)!r}, 'w')\n"
    (tmp_path / "code.py").write_text(touch, encoding="utf-8")
    rows_file.write_text(json.dumps({"q": "Chapter", "a": " 1"}) + "\n", encoding="utf-8")
    (tmp_path / "other.yml").write_text("process_docs: !function code.run\n", encoding="utf-8")
    text = (OWN + more).replace("ROWS", str(rows_file)).replace("CANARY", str(canary))
    text = text.replace("./code.py", str(tmp_path / "code.py"))
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    status, _, errors = said("eval", run, "--tasks", "own", "--task-path", tmp_path)
    assert not canary.exists()
    assert (status, len(errors)) == (2, 1), errors
    assert any(each in errors[0] for each in says.split("|"))


def test_code_of_a_definition_runs_when_the_user_says_so(said, run, tmp_path):
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text(json.dumps({"q": "Chapter", "a": " 1"}) + "\n", encoding="utf-8")
    (tmp_path / "code.py").write_text("def text(row): return row['q']\n", encoding="utf-8")
    text = OWN.replace("ROWS", str(rows_file)) + "doc_to_text: !function code.text\n"
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    words = ["eval", run, "--tasks", "own", "--task-path", tmp_path, "--out", tmp_path / "s.json"]
    status, _, errors = said(*words, "--run-task-code")
    assert status == 0, errors


def test_simple_evaluate_takes_our_model(model, tokenizer):
    """A user's own program."""
    lm = as_lm(HarnessModel(Engine(model), tokenizer))
    tasks = list(load_tasks(["winogrande"], DATA).loaded["tasks"].values())
    found = simple_evaluate(model=lm, tasks=tasks, bootstrap_iters=0)
    assert "acc,none" in found["results"]["winogrande"]


assert TINY.context == 48  # what the truncation above rests on
