"""Mixtures: how often a task is drawn, in which words, and what a template must not do."""

import json
from collections import Counter

import pytest

from openpalm.data.batches.order import mixture, shuffle
from openpalm.data.rows.tasks import Mixture, Task, parse_template, read_conversations, read_mixture
from openpalm.data.text.conversation import Message
from openpalm.errors import DataError, SettingsError

SIZES, SHARES = [3, 10, 1], [2, 5, 4]


def check_an_epoch_has_its_shares(draws):
    """Each task its share, no item again before all others of its task were drawn."""
    ends = [3, 13, 14]
    drawn = [draws.item(n) for n in range(30 * draws.epoch)]
    for epoch in range(30):
        own = drawn[epoch * draws.epoch :][: draws.epoch]
        tasks = Counter(next(t for t, end in enumerate(ends) if item < end) for item in own)
        assert tasks == dict(enumerate(SHARES))
    for task, end in enumerate(ends):
        mine = [item for item in drawn if end - SIZES[task] <= item < end]
        counts = Counter(mine)
        assert len(counts) == SIZES[task]
        assert max(counts.values()) - min(counts.values()) <= 1
    orders = {tuple(drawn[epoch * draws.epoch :][: draws.epoch]) for epoch in range(30)}
    assert len(orders) == 30


def test_an_epoch_has_its_shares():
    check_an_epoch_has_its_shares(mixture(SIZES, SHARES, seed=3))
    plain = shuffle(14, 3)
    same_start = mixture(SIZES, SHARES, seed=3)
    again = same_start._replace(item=lambda n: same_start.item(n % 11))  # every epoch the same
    for bug in (plain, again):
        with pytest.raises(AssertionError):
            check_an_epoch_has_its_shares(bug)


def test_the_seed_fixes_the_draws():
    draws = [[mixture(SIZES, SHARES, seed).item(n) for n in range(50)] for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("sizes", "cap", "weights", "shares"),
    [
        ([10, 30, 5000], None, None, [10, 30, 5000]),
        ([10, 30, 5000], 20, None, [10, 20, 20]),
        ([10, 30], None, [1, 1], [20, 20]),
        ([10, 30], None, [0.5, 1.5], [10, 30]),
        ([10, 10, 10], None, [1, 1, 5], [4, 4, 22]),
        ([7, 7], None, [2, 1], [9, 5]),
        ([2, 2], None, [1e-6, 1], [1, 3]),
        ([1, 1], None, [1e-6, 1], [1, 1]),
    ],
)
def test_shares(sizes, cap, weights, shares):
    """Worked by hand: proportional up to the cap, or largest remainders of the weights."""
    tasks = tuple(Task("x", weight) for weight in weights or [None] * len(sizes))
    assert Mixture(tasks, cap).shares(sizes) == shares


# --- templates


ROW = {
    "question": "2 + 2?",
    "answer": 4,
    "the place": "a {shop}",
}


def check_a_template_is_no_code(parse):
    for text in (
        "{question.__class__}",
        "{question[0]}",
        "{answer.real}",
        "{0}",
        "{}",
        "{answer!r}",
        "{answer:>100}",
        "{answer:{question}}",
        "{question",
        "question}",
    ):
        with pytest.raises(DataError):
            parse(text)


def test_templates():
    assert parse_template("Question: {question}\nAnswer:")(ROW) == "Question: 2 + 2?\nAnswer:"
    assert parse_template("{{{answer}}} {the place}")(ROW) == "{4} a {shop}"
    assert parse_template("%s $x ${answer}")(ROW) == "%s $x $4"
    check_a_template_is_no_code(parse_template)
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)):
        check_a_template_is_no_code(lambda text: text.format(**ROW) and None)
    with pytest.raises(DataError, match=r"'\{question\.x\}' is not the plain name of a field"):
        parse_template("{question.x}")


@pytest.fixture
def folder(tmp_path):
    rows = [{"question": f"{i} + {i}?", "answer": 2 * i} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    (tmp_path / "talk.jsonl").write_text((json.dumps(talk) + "\n") * 3)
    return tmp_path


MIXTURE = """
tasks:
  - data: sums.jsonl
    weight: 3
    templates:
      - {prompt: "Question: {question}\\nAnswer:", answer: "{answer}"}
      - prompt: "What is {question}"
        answer: "It is {answer}."
  - {data: talk.jsonl, weight: 1}
"""


def write(folder, text):
    path = folder / "mixture.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_mixture_of_two_tasks(folder):
    path = write(folder, MIXTURE)
    found = read_mixture(path)
    assert [task.weight for task in found.tasks] == [3, 1]
    assert found.shares([40, 3]) == [32, 11]
    sums, unused = read_conversations(found.tasks[0], seed=0)[:2]
    ways = (
        lambda i: (Message("user", f"Question: {i} + {i}?\nAnswer:"), f"{2 * i}"),
        lambda i: (Message("user", f"What is {i} + {i}?"), f"It is {2 * i}."),
    )
    drawn = []
    for i, (asked, answered) in enumerate(sums):
        drawn.append([(asked, answered.content) == way(i) for way in ways].index(True))
    assert unused == {}
    assert 8 < sum(drawn) < 32
    assert read_conversations(found.tasks[0], seed=0) == read_conversations(found.tasks[0], seed=0)
    assert read_conversations(found.tasks[0], seed=1) != read_conversations(found.tasks[0], seed=0)
    assert len(read_conversations(found.tasks[1], seed=0).items) == 3
    before = found.digest(path)
    (folder / "talk.jsonl").write_text((folder / "talk.jsonl").read_text() * 2)
    assert found.digest(path) != before


def test_any_other_file_is_one_task(folder):
    found = read_mixture(folder / "talk.jsonl")
    assert found == Mixture((Task(folder / "talk.jsonl"),))
    assert len(read_conversations(found.tasks[0], seed=0).items) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tasks: []", 'field "tasks" is a list; it must be a list of tasks'),
        ("files: [a]", "'files' is unknown; known are cap, tasks"),
        ("tasks: [a.jsonl]", r"tasks\[0\]: field \"task\" is 'a.jsonl'"),
        ("tasks: [{weight: 1}]", r'tasks\[0\]: field "data" is missing'),
        ("tasks: [{data: a.jsonl, wieght: 1}]", r"tasks\[0\]: 'wieght' is unknown"),
        ("tasks: [{data: a.jsonl, weight: 0}]", 'field "weight" is 0; it must be a number above 0'),
        ("tasks: [{data: a.jsonl, weight: .nan}]", 'field "weight" is nan'),
        ("tasks: [{data: a, weight: 1}, {data: b}]", "1 of 2 tasks have a weight; give each one"),
        ("cap: 5\ntasks: [{data: a, weight: 1}]", "has weights and a cap"),
        ("cap: -5\ntasks: [{data: a}]", 'field "cap" is -5; it must be a whole number above 0'),
        ("tasks: [{data: a, templates: []}]", 'field "templates" is a list'),
        ("tasks: [{data: a, templates: ['{q}']}]", r"templates\[0\]: field \"template\" is '{q}'"),
        ("tasks: [{data: a, templates: [{prompt: x}]}]", 'field "answer" is missing'),
        (
            "tasks: [{data: a, templates: [{prompt: '{q.x}', answer: b}]}]",
            r"tasks\[0\]: templates\[0\]: prompt: '{q.x}': '{q.x}' is not the plain name",
        ),
    ],
)
def test_invalid_mixtures(folder, text, says):
    path = write(folder, text)
    with pytest.raises(DataError, match=says) as error:
        read_mixture(path)
    assert str(error.value).startswith(f"{path}: ")


def test_files_that_are_not_mixtures(folder):
    for text in ("- a\n- b", "tasks: [", "a: &x [1]\ntasks: *x", "!!python/object:os.system {}"):
        with pytest.raises(SettingsError, match=r"mixture\.yaml"):
            read_mixture(write(folder, text))
    with pytest.raises(SettingsError, match="no such file"):
        read_mixture(folder / "none.yml")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": 1}, 'field "question" is missing; it must be a text or a number'),
        ({"question": ["a"], "answer": 1}, 'field "question" is a list'),
        ({"question": "a", "answer": None}, 'field "answer" is missing'),
        ({"question": "a", "answer": float("nan")}, 'field "answer" is nan'),
    ],
)
def test_rows_that_do_not_fill_a_template(folder, row, says):
    (folder / "sums.jsonl").write_text(json.dumps(row))
    (task, _) = read_mixture(write(folder, MIXTURE)).tasks
    with pytest.raises(DataError, match=says) as error:
        read_conversations(task, seed=0)
    assert str(error.value).startswith(f"{folder}/sums.jsonl:1: ")


def test_rows_with_an_empty_completion_are_counted(folder):
    text = MIXTURE.replace('"It is {answer}."', '"{answer}"')
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": " "}]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task, _) = read_mixture(write(folder, text)).tasks
    found, unused = read_conversations(task, seed=0)[:2]
    assert (len(found), unused) == (1, {"empty completion": 1})
    (folder / "sums.jsonl").write_text("")
    with pytest.raises(DataError, match=r"sums\.jsonl: is empty"):
        read_conversations(task, seed=0)
