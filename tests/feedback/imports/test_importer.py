"""The import job: prompts and items of uploaded files; what cannot be used, and hostile files."""

import gzip
import json
import random
from pathlib import Path

import pytest
from django.conf import settings
from django.core.files.uploadedfile import SimpleUploadedFile

from openpalm.data.rows import row_stream
from openpalm.data.rows.readers.pairs import read_pairs
from openpalm.errors import DataError
from openpalm.feedback.imports import uploads
from openpalm.feedback.models import Candidate, Item, Job, ModelVersion, Project, Prompt, Task
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.loop import Worker, drain
from openpalm.feedback.worker.progress import JobStopped, Progress, WorkerEnds


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def texts(prompt):
    return [(m["role"], m["content"]) for m in prompt.messages]


PROMPTS = {
    "a.jsonl": lines({"prompt": "Why?"}, {"messages": [{"role": "user", "content": "How?"}]}),
    "b.csv": 'prompt,other\n"Why?",1\n"How?",2\n',
    "c.txt": "Why?\n\nHow?\n",
    "d.jsonl": lines(
        {"prompt": "Why?", "chosen": "a", "rejected": "b"},
        {"instruction": "How?", "output": "so"},
    ),
    "e.jsonl": lines(
        {"text": "Why?"},
        {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "so"}]},
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_every_kind_of_file(import_file, project, name):
    result = import_file(name, PROMPTS[name])
    assert (result["added"], result["unused"]) == (2, {})
    found = Prompt.objects.order_by("id")
    assert [texts(prompt) for prompt in found] == [[("user", "Why?")], [("user", "How?")]]
    assert {prompt.source for prompt in found} == {"file"}
    assert not list((settings.FEEDBACK_DIR / "uploads").iterdir()), "the upload is removed"


def test_gzip(import_file):
    assert import_file("a.jsonl.gz", gzip.compress(PROMPTS["a.jsonl"].encode()))["added"] == 2


def test_unusable_rows_are_counted_with_file_and_line(import_file):
    content = "\n".join(
        ['{"prompt": "good"}', "no json", '{"prompt": ""}', "[1]", '{"x": 1}', '{"prompt": "good"}',
         '{"prompt": "bad \\ud800"}', '{"messages": [{"role": "user"}]}']
    )  # fmt: skip
    result = import_file("mixed.jsonl", content)
    assert (result["rows"], result["added"]) == (8, 1)
    report = "\n".join(result["lines"])
    for line in (2, 3, 4, 5, 7, 8):
        assert f"mixed.jsonl:{line}" in report
    assert "already in the project ('mixed.jsonl:6')" in report
    assert "stored" not in report, "the name on the disk is ours, not the person's"


def test_an_import_that_was_cut_off_is_run_again(import_file, monkeypatch):
    content = lines(*({"prompt": f"question {n}"} for n in range(900)))

    def stop(self, done, **_):
        if done >= 400:
            raise JobStopped

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "move_to", stop)
        with pytest.raises(JobStopped):
            import_file("a.jsonl", content)
    assert Prompt.objects.count() == 400
    result = import_file("a.jsonl", content)
    assert (result["added"], result["unused"]) == (500, {"already in the project": 400})
    assert Prompt.objects.count() == 900


@pytest.mark.parametrize("what", ["prompts", "items"])
def test_a_job_that_is_cut_off_twice_reports_the_whole_file(project, monkeypatch, what):
    rows = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(900)]
    folder = settings.FEEDBACK_DIR / "uploads"
    folder.mkdir(exist_ok=True)
    file = folder / "stored.jsonl"
    file.write_text(lines(*rows, rows[0]), encoding="utf-8")
    given = {"what": what, "file": file.name, "name": "a.jsonl"}
    job = jobs.enqueue("import", project=project, **given)
    unlink = Path.unlink

    def stop(self, done, **_):
        if done >= 400:
            raise WorkerEnds

    def killed(path, **_):
        unlink(path)
        raise WorkerEnds

    for target, name, attack in ((Progress, "move_to", stop), (Path, "unlink", killed)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, attack)
            Worker().run_one(("import",))
        job.refresh_from_db()
        assert job.state == Job.State.QUEUED
    assert not file.exists()
    drain("import")
    job.refresh_from_db()
    assert job.state == Job.State.DONE
    assert (job.result["added"], job.result["unused"]) == (900, {"already in the project": 1})
    assert (Prompt.objects.count(), Item.objects.count()) == (900, 900 if what == "items" else 0)


def test_the_held_out_share_is_the_same_each_time(import_file, project):
    content = lines(*({"prompt": f"question {n}"} for n in range(400)))
    result = import_file("a.jsonl", content, held_out=0.25)
    chosen = set(Prompt.objects.filter(held_out=True).values_list("digest", flat=True))
    assert 70 < len(chosen) == result["held_out"] < 130
    Prompt.objects.all().delete()
    shuffled = content.splitlines()
    random.Random(1).shuffle(shuffled)
    import_file("b.jsonl", "\n".join(shuffled), held_out=0.25)
    assert set(Prompt.objects.filter(held_out=True).values_list("digest", flat=True)) == chosen


def test_pairs_and_rankings_become_items(import_file, project):
    content = lines(
        {"prompt": "q1", "chosen": "yes", "rejected": "no"},
        {"prompt": "q2", "responses": ["a", "b"], "rank": [1, 2]},
        {"prompt": "q3", "responses": ["a", "b", "c"], "rank": [1, 2, 3]},
        {"prompt": "q4", "chosen": "same", "rejected": "same"},
        {"prompt": "q5"},
    )
    result = import_file("pairs.jsonl", content, what="items")
    assert result["added"] == 2
    assert [[p.candidate.text for p in i.places.all()] for i in Item.objects.order_by("id")] == [
        ["yes", "no"], ["a", "b"],
    ]  # fmt: skip
    report = "\n".join(result["lines"])
    assert "has 3 answers; this project compares 2 ('pairs.jsonl:3')" in report
    assert "equal" in report
    assert "has 0 answers" in report
    assert "altered: without its judgement ('pairs.jsonl:1')" in report
    assert import_file("again.jsonl", content, what="items")["added"] == 0
    assert Item.objects.count() == 2


def test_judgements_of_the_file_as_gold(import_file, project):
    content = lines({"prompt": "q", "chosen": "yes", "rejected": "no"})
    import_file("gold.jsonl", content, what="items", gold=True)
    item = Item.objects.get()
    assert (item.purpose, item.gold_kind) == ("gold", "compare")
    assert item.gold == {"better": 0, "worse": 1, "strength": 1}


EXPORTS = Path(__file__).parents[2] / "data" / "rows" / "imports" / "data"


def test_an_export_of_label_studio_becomes_an_item(import_file, project):
    content = (EXPORTS / "label_studio.json").read_text(encoding="utf-8")
    result = import_file("tasks.json", content, what="items", gold=True)
    # Its two tasks have the same texts.
    assert (result["added"], result["unused"]) == (1, {"already in the project": 1})
    assert Item.objects.get().gold == {"better": 1, "worse": 0, "strength": 1}
    altered = "\n".join(result["lines"])
    assert "1 altered: without its judgement ('tasks.json, record 1')" in altered, "its rating"
    assert "1 altered: without text of question 'why', which no record holds" in altered


@pytest.mark.parametrize("what", ["prompts", "items"])
def test_an_export_of_argilla_with_several_people_is_one_item(import_file, project, what):
    content = (EXPORTS / "argilla_2.8_to_json.json").read_text(encoding="utf-8")
    result = import_file("records.json", content, what=what)
    assert (result["rows"], result["added"], result["unused"]) == (2, 2, {})
    assert Prompt.objects.count() == 2
    if what == "items":
        report = "\n".join(result["lines"])
        assert "1 altered: without its judgements ('records.json, record 1')" in report
        assert "1 altered: without its judgement ('records.json, record 2')" in report


def test_people_who_differ_give_no_gold(import_file, project):
    results = [
        {"id": n, "completed_by": n, "result": [
            {"type": "pairwise", "from_name": "p", "to_name": "a1,a2", "value": {"selected": side}}
        ]}
        for n, side in enumerate(("left", "right"))
    ]  # fmt: skip
    data = {"prompt": "q", "answer1": "yes", "answer2": "no"}
    task = {"id": 1, "data": data, "annotations": results}
    for annotations in (results[:1] * 2, results):
        import_file("t.jsonl", lines(task | {"annotations": annotations}), what="items", gold=True)
        gold = Item.objects.values_list("purpose", flat=True)
        assert list(gold) == ["gold" if annotations[0] == annotations[1] else "training"]
        Item.objects.all().delete()


def test_a_json_file_may_have_unusable_objects(import_file, project):
    result = import_file("a.json", '[{"prompt": "q"}, {"prompt": }, {"x": 1}]')
    assert (result["rows"], result["added"]) == (3, 1)
    report = "\n".join(result["lines"])
    assert "a.json, record 2" in report
    assert "a.json, record 3" in report


def test_preference_records_keep_their_models(import_file, project):
    model = ModelVersion.objects.create(project=project, name="small", checkpoint="c0ffee")
    record = {
        "id": "1", "prompt": [{"role": "user", "content": "q"}], "kind": "compare",
        "candidates": [{"text": "I am ChatGPT", "checkpoint": "c0ffee"}, {"text": "b"}],
        "payload": {"better": 0, "worse": 1, "strength": 1}, "author": "x", "author_kind": "person",
        "created": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    assert import_file("r.jsonl", lines(record), what="items")["added"] == 1
    first, second = Candidate.objects.order_by("id")
    assert (first.model, first.names_itself) == (model, True)
    assert (second.model, second.names_itself, second.checkpoint) == (None, False, "")


@pytest.mark.parametrize(
    ("task", "count"), [(Task.RATING, 2), (Task.RANKING, 1), (Task.DEMONSTRATION, 1)]
)
def test_items_follow_the_task(import_file, project, task, count):
    Project.objects.update(task=task, axes=["helpful"])
    project.refresh_from_db()
    content = lines({"prompt": "q", "responses": ["a", "b"]})
    result = import_file("r.jsonl", content, what="items")
    assert (result["added"], Item.objects.count()) == (count, count)


def test_a_held_out_prompt_gets_no_item(import_file, project):
    import_file("a.jsonl", lines({"prompt": "q"}), held_out=1.0)
    content = lines({"prompt": "q", "chosen": "yes", "rejected": "no"})
    result = import_file("b.jsonl", content, what="items")
    assert result["unused"] == {"its prompt is held out for comparisons": 1}


HOSTILE = {
    "nested.jsonl": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "number.jsonl": '{"prompt": ' + "9" * 1_000_000 + "}",
    "nested.json": '[{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}]",
    "numbers.json": "[1, 2]",
    "cut.json": '[{"x": 1}, {"prompt": "q"',
    "binary.jsonl": b"\x00\xff\xfe" * 1000,
    "utf16.txt": "Why?".encode("utf-16"),
    "wide.csv": "prompt\n" + ",".join("a" * 10 for _ in range(1000)),
    "quote.csv": 'prompt\n"never closed\n',
    "damaged.jsonl.gz": gzip.compress(b'{"prompt": "q"}\n' * 100)[:-20],
    "zip.jsonl.gz": b"PK\x03\x04" + b"\0" * 100,
    "keys.jsonl": '{"__proto__": {}, "prompt": {"a": 1}}',
    "empty.csv": "prompt\n",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("what", ["prompts", "items"])
def test_hostile_files_add_nothing_and_say_why(import_file, name, what):
    report = ""
    try:
        result = import_file(name, HOSTILE[name], what=what)
        report = " ".join(result["lines"])
    except DataError as error:
        report = str(error)
    assert name in report
    assert not Item.objects.exists()
    assert not Prompt.objects.exists()


def test_scores_without_end_do_no_harm(import_file):
    """They are not taken over; the answers are texts like others."""
    content = '{"prompt": "q", "responses": ["a", "b"], "scores": [1e999, NaN]}'
    result = import_file("infinite.jsonl", content, what="items")
    assert result["added"] == 1
    assert "without its field 'scores'" in result["lines"][0]


def test_a_bomb_is_not_unpacked(import_file, monkeypatch):
    monkeypatch.setattr(row_stream, "MAX_UNPACKED", 3 * 2**20)
    bomb = gzip.compress((b'{"prompt": "' + b"q" * 100_000 + b'"}\n') * 200)
    assert len(bomb) < 100_000
    with pytest.raises(DataError, match="unpacked"):
        import_file("bomb.jsonl.gz", bomb)


def test_random_damage_never_ends_in_a_traceback(import_file):
    draw = random.Random(5)
    rows = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]},
    ]
    damaged = []
    for n in range(300):
        text = bytearray(json.dumps(rows[n % 3]).encode())
        for _ in range(draw.randint(1, 4)):
            text[draw.randrange(len(text))] = draw.choice(b'{}[]",:0x\\ \x80')
        damaged.append(bytes(text).replace(b"\n", b" "))
    for what in ("prompts", "items"):
        result = import_file("fuzz.jsonl", b"\n".join(damaged), what=what)
        assert result["rows"] == 300


# The upload page.


def upload(client, name, content=b'{"prompt": "q"}', **form):
    file = SimpleUploadedFile(name, content)
    given = {"file": file, "what": "prompts", "held_out": "10"} | form
    return client.post("/p/demo/prompts/upload", given)


def test_an_upload_is_kept_under_a_name_of_our_own(project, admin, signed_in):
    response = upload(signed_in(admin), "../../../etc/pass\nwd.jsonl")
    assert response["Location"] == "/p/demo/jobs"
    job = Job.objects.get()
    assert job.arguments["name"] == "passwd.jsonl"
    stored = settings.FEEDBACK_DIR / "uploads" / job.arguments["file"]
    assert stored.read_bytes() == b'{"prompt": "q"}'
    assert stored.parent == settings.FEEDBACK_DIR / "uploads"
    assert job.arguments["held_out"] == 0.1
    stored.unlink()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.exe", b"x", b"must be one of"),
        ("a.jsonl", b"", b"empty"),
        ("a.svg.html", b"<script>", b"must be one of"),
        ("big.txt", b"x" * 2000, b"at most 1,000"),
    ],
)
def test_wrong_uploads_are_refused(project, admin, signed_in, settings, name, content, reason):
    settings.FEEDBACK_MAX_UPLOAD_BYTES = 1000
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 100_000
    response = upload(signed_in(admin), name, content)
    assert response.status_code == 422
    assert reason in response.content
    assert not Job.objects.exists()


def test_a_job_cannot_name_another_file(project):
    for name in ("../secret_key", "..\\secret_key", ".hidden", "a/b"):
        with pytest.raises(DataError):
            uploads.path_of(name)


def test_typed_prompts(project, admin, signed_in):
    client = signed_in(admin)
    form = {"text": "One?\r\n\r\nTwo,\r\nin two lines?\n\n\n\nOne?", "system": "Be brief."}
    client.post("/p/demo/prompts/typed", form)
    found = [texts(prompt) for prompt in Prompt.objects.order_by("id")]
    assert found == [
        [("system", "Be brief."), ("user", "One?")],
        [("system", "Be brief."), ("user", "Two,\nin two lines?")],
    ]


RECORD = {
    "id": "1",
    "kind": "compare",
    "author": "ann",
    "author_kind": "person",
    "prompt": [{"role": "user", "content": "Why?"}],
    "candidates": [{"text": "a"}, {"text": "b"}],
    "payload": {"better": 0, "worse": 1, "strength": 1},
    "created": "2026-01-01T00:00:00Z",
}


@pytest.mark.parametrize(
    "row",
    [
        RECORD | {"payload": {"better": 5, "worse": 1, "strength": 1}},
        RECORD | {"author_kind": "robot"},
        RECORD | {"colour": "red"},
        RECORD | {"candidates": [{"text": 3}, {"text": "b"}]},
        RECORD | {"created": "yesterday"},
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        {"prompt": "Why?", "chosen": "a", "rejected": "b", "weight": "x"},
    ],
    ids=lambda row: next(name for name in row if row[name] != RECORD.get(name)),
)
def test_a_wrong_row_has_the_words_of_the_verbs(import_file, tmp_path, row):
    """`openpalm dpo` refuses the file with the same reason."""
    path = tmp_path / "a.jsonl"
    path.write_text(lines(row), encoding="utf-8")
    with pytest.raises(DataError) as refused:
        read_pairs(path)
    (reason,) = import_file("a.jsonl", lines(row), what="items")["unused"]
    assert f"{path}:1: {reason} (or remove this line)" == str(refused.value)
