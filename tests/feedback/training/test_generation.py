"""Candidates from a model server: which are asked for, stored and shown; after a kill too."""

import threading
from contextlib import contextmanager

import pytest
from feedback_prompts import add_prompts

from openpalm.base.files import write_atomically
from openpalm.errors import DataError
from openpalm.feedback.model_server import site_server
from openpalm.feedback.models import Candidate, Item, ItemCandidate, Job, Project, Task
from openpalm.feedback.training import answers, generation, servers
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.loop import Worker, drain
from openpalm.feedback.worker.progress import Progress, WorkerEnds


@pytest.fixture
def served(project, model, server, settings):
    """The site's server has this model."""
    found = model("base")
    Project.objects.filter(pk=project.pk).update(served=found)
    project.refresh_from_db()
    return found


def _start(project, admin, served, n=2, **more) -> Job:
    each = {"model": served.pk, "n": n, "temperature": 1.0, "max_tokens": 16}
    return generation.start(project, admin, [each], **more)


def test_each_prompt_becomes_an_item_of_two_answers(project, admin, served, server):
    prompts = add_prompts(project, 5)
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.DONE, job.message
    assert job.result == {"prompts": 5, "answers": 10, "items": 5, "equal": 0}
    assert (job.done, job.total) == (10, 10)
    assert len(server.requests) == 10
    assert {request["temperature"] for request in server.requests} == {1.0}
    assert len({request["seed"] for request in server.requests}) == 10
    for prompt in prompts:
        item = prompt.items.get()
        texts = [place.candidate.text for place in item.places.all()]
        assert len(set(texts)) == 2
        assert item.needed == project.overlap
    candidate = Candidate.objects.first()
    assert (candidate.model, candidate.checkpoint) == (served, served.checkpoint)
    assert candidate.text == f"answer {candidate.sampling['seed']}"


def test_a_small_context_is_filled(project, admin, served, server):
    add_prompts(project, 2)
    server.context = 8
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.DONE, job.message
    assert job.result["answers"] == 4
    assert sorted(body.get("max_tokens", 0) for body in server.requests) == [0] * 4 + [16] * 4


def test_equal_answers_are_no_pair_but_counted(project, admin, served, server):
    add_prompts(project, 3)
    server.answer = lambda body: (
        " the same " if "0" in body["messages"][0]["content"] else str(body)
    )
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert (job.result["items"], job.result["equal"]) == (2, 1)
    assert job.message.endswith("1 left out because their answers are equal")


def test_after_a_kill_nothing_is_doubled_and_nothing_asked_again(
    project, admin, served, server, monkeypatch
):
    # The sixth is asked for only after four are stored; with more at once perhaps none is.
    monkeypatch.setattr(answers, "AT_ONCE", 2)
    add_prompts(project, 6)
    job = _start(project, admin, served)
    worker = Worker()
    asked = []

    def answer(body):
        asked.append(body["seed"])
        if len(asked) == 6:
            worker.ending.set()
        return f"answer {body['seed']}"

    server.answer = answer
    taken = jobs.take(worker.name, jobs.KINDS)
    with pytest.raises(WorkerEnds):
        generation.run(taken, Progress(taken, worker.ending))
    stored = Candidate.objects.count()
    assert 0 < stored < 12
    jobs.give_back(taken)
    before = set(Candidate.objects.values_list("id", flat=True))
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.DONE
    assert before < set(Candidate.objects.values_list("id", flat=True))
    assert Candidate.objects.count() == 12
    assert Item.objects.count() == 6
    # The whole job once more, as after a kill before its last write.
    Job.objects.filter(pk=job.pk).update(
        state=Job.State.QUEUED,
        arguments=job.arguments | {"prompts": list(project.prompts.values_list("id", flat=True))},
    )
    count = len(server.requests)
    drain("generate")
    assert (Candidate.objects.count(), Item.objects.count()) == (12, 6)
    assert len(server.requests) == count


def test_a_slow_server_gets_no_more_requests_at_once(project, admin, served, server, monkeypatch):
    """Although nothing comes between two checks of the job."""
    monkeypatch.setattr(answers, "CHECK_EVERY_S", 0.01)
    counts, lock = {"now": 0, "most": 0}, threading.Lock()

    def answer(body):
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts.values())
        threading.Event().wait(0.15)
        with lock:
            counts["now"] -= 1
        return f"answer {body['seed']}"

    server.answer = answer
    add_prompts(project, 12)
    _start(project, admin, served)
    drain("generate")
    assert Candidate.objects.count() == 24
    assert counts["most"] <= answers.AT_ONCE


def test_a_refused_prompt_is_counted_with_its_reason(project, admin, served, server):
    add_prompts(project, 3)
    server.answer = lambda body: (
        "refuse" if "1" in body["messages"][0]["content"] else f"answer {body['seed']}"
    )
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert (job.state, job.result["items"], job.result["failed"]) == (Job.State.DONE, 2, 2)
    assert "the prompt is too long" in job.message


def test_a_small_context_shortens_answers_and_fails_none(project, admin, served, server):
    add_prompts(project, 1)
    server.answer = lambda body: f"answer {body['seed']}" if "max_tokens" not in body else "no room"
    _start(project, admin, served)
    drain("generate")
    assert Candidate.objects.count() == 2
    assert [("max_tokens" in request) for request in server.requests].count(False) == 2


def test_a_server_that_only_fails_ends_the_job(project, admin, served, server, monkeypatch):
    monkeypatch.setattr(answers, "MOST_FAILURES", 3)
    add_prompts(project, 5)
    server.answer = lambda body: "refuse"
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    assert job.message.startswith("3 answers in a row failed: http://127.0.0.1:")


def test_a_server_that_is_away(project, admin, served, settings):
    settings.SERVER_URL = "http://127.0.0.1:9"
    add_prompts(project, 1)
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    assert job.message.startswith("http://127.0.0.1:9: the model server does not answer")


def test_a_model_that_the_server_has_no_more_gets_a_server_of_its_own(
    project, admin, served, server, settings, monkeypatch
):
    """Another project has promoted its model since."""
    started = []

    @contextmanager
    def temporary(path, progress):
        started.append(path)
        yield site_server()

    monkeypatch.setattr(servers, "temporary_server", temporary)
    settings.FEEDBACK_DIR.mkdir()
    file = settings.FEEDBACK_DIR / servers.SERVED_FILE
    for content in (f'{{"path": "{served.path}"}}', "torn", '{"path": "/models/of-another"}'):
        file.write_text(content)
        add_prompts(project, 1, text=content)
        _start(project, admin, served)
        drain("generate")
    assert started == [served.path]
    assert Item.objects.count() == 3


def test_held_out_prompts_are_left_alone(project, admin, served, server):
    held_out = add_prompts(project, 2, held_out=True)
    job = _start(project, admin, served, prompts=[prompt.pk for prompt in held_out])
    drain("generate")
    job.refresh_from_db()
    assert job.result["prompts"] == 0
    assert not server.requests


def test_the_groups_of_each_task(project, admin, served, server):
    add_prompts(project, 1)
    _start(project, admin, served, n=4, pairs=3)
    drain("generate")
    pairs = {tuple(i.places.values_list("candidate", flat=True)) for i in Item.objects.all()}
    assert len(pairs) == 3
    for task, sizes in ((Task.RANKING, [4]), (Task.THUMBS, [1] * 4)):
        Item.objects.all().delete()
        Project.objects.filter(pk=project.pk).update(task=task)
        project.refresh_from_db()
        _start(project, admin, served, n=4)
        drain("generate")
        assert [item.places.count() for item in Item.objects.all()] == sizes


def test_an_answer_that_names_its_model_is_marked(project, admin, served, server):
    add_prompts(project, 1)
    texts = iter(["I am ChatGPT.", "Bread is good."])
    server.answer = lambda body: next(texts)
    _start(project, admin, served)
    drain("generate")
    named = {c.text: c.names_itself for c in Candidate.objects.all()}
    assert named == {"I am ChatGPT.": True, "Bread is good.": False}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"n": 1}, "needs 2 answers or more"),
        ({"n": 99}, "n 99"),
        ({"n": 2, "temperature": 3}, "temperature 3"),
        ({"n": 2, "logit_bias": {}}, "logit_bias: is no sampling setting"),
        ({"n": 2, "model": 0}, "choose a model"),
    ],
)
def test_what_is_refused(project, admin, served, more, line):
    with pytest.raises(DataError, match=line):
        generation.start(project, admin, [{"model": served.pk} | more])
    assert not Job.objects.exists()
    assert not ItemCandidate.objects.exists()


def test_a_server_that_crashes_and_starts_again_costs_no_answer(
    project, admin, served, server, monkeypatch
):
    monkeypatch.setattr(answers, "PAUSE_S", 0.01)
    server.drops = 3 * answers.MOST_FAILURES
    add_prompts(project, 3)
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert (job.state, "failed" in job.result) == (Job.State.DONE, False)
    assert server.drops == 0
    monkeypatch.setattr(answers, "PATIENCE_S", 0.05)
    server.drops = 1_000_000
    add_prompts(project, 30, text="more")
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    assert "answers in a row failed: http://" in job.message
    assert "the model server does not answer (" in job.message


def test_answers_of_a_model_that_was_promoted_meanwhile_are_not_stored(
    project, admin, served, server, settings
):
    """By another project: they would get the name of this one's model."""
    file, turn = settings.FEEDBACK_DIR / servers.SERVED_FILE, threading.Lock()

    def answer(body):
        with turn:
            write_atomically(file, '{"path": "/models/of-another"}')
        return "of another model"

    server.answer = answer
    add_prompts(project, 2)
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    assert job.message.endswith("another project has promoted a model meanwhile; start this again")
    assert not Candidate.objects.exists()


@pytest.mark.parametrize("garbage", [b"[]", b'{"data": [{"id": "m"}], "choices": [{}]}', b"\xff"])
def test_answers_that_are_garbage_are_one_line(
    project, admin, served, server, garbage, caplog, monkeypatch
):
    monkeypatch.setattr(answers, "PATIENCE_S", 0.0)
    monkeypatch.setattr(answers, "MOST_FAILURES", 2)
    server.garbage = garbage
    add_prompts(project, 3)
    job = _start(project, admin, served)
    drain("generate")
    job.refresh_from_db()
    assert job.state == Job.State.FAILED
    assert job.message.endswith("none of a model server; check OPENPALM_SERVER_URL")
    assert "Traceback" not in caplog.text
