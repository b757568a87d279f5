"""Pages of jobs and of the generation of answers."""

import logging

import pytest

from openpalm.feedback.models import Event, Job, ModelVersion, Role, Task

FORM = {
    "count": "10", "n": "2", "temperature": "1", "second_temperature": "0.7", "top_p": "1",
    "max_tokens": "64", "pairs": "1",
}  # fmt: skip


@pytest.fixture
def client(member, signed_in):
    return signed_in(member("max", Role.ADMIN))


@pytest.fixture
def model(project):
    return ModelVersion.objects.create(project=project, name="small", path="/runs/small")


def test_progress_is_shown_and_asked_for_again_while_a_job_runs(project, client):
    job = Job.objects.create(
        project=project, kind="generate", state="running", done=3, total=9, message="small answers"
    )
    page = client.get("/p/demo/jobs").content.decode()
    assert '<progress max="9" value="3"' in page
    assert 'hx-trigger="every 2s"' in page
    part = client.get("/p/demo/jobs", headers={"hx-request": "true"}).content.decode()
    assert part.startswith('<div id="jobs"')
    assert "<html" not in part
    Job.objects.filter(pk=job.pk).update(state="done")
    assert "hx-trigger" not in client.get("/p/demo/jobs").content.decode()


def test_a_job_is_stopped_once(project, client):
    job = Job.objects.create(project=project, kind="generate", state="queued")
    for _ in range(2):
        client.post(f"/p/demo/jobs/{job.pk}/stop")
    job.refresh_from_db()
    assert job.state == Job.State.STOPPED
    assert Event.objects.filter(action="job.stopped").count() == 1


def test_the_form_asks_each_model_in_each_way(project, make_item, model, client):
    prompts = [make_item(f"q{n}").prompt for n in range(3)]
    held_out = prompts[0]
    for prompt in prompts:
        prompt.items.all().delete()
    held_out.held_out = True
    held_out.save()
    response = client.post("/p/demo/generate", FORM | {"models": [model.pk]})
    assert response["Location"] == "/p/demo/jobs"
    arguments = Job.objects.get(kind="generate").arguments
    assert arguments["prompts"] == [prompts[1].pk, prompts[2].pk]
    assert [(m["model"], m["n"], m["temperature"]) for m in arguments["models"]] == [
        (model.pk, 2, 0.7),
        (model.pk, 2, 1.0),
    ]


@pytest.mark.parametrize(
    "change", [{"n": "0"}, {"temperature": "nan"}, {"max_tokens": "1e9"}, {"models": ["999"]}]
)
def test_wrong_forms_start_nothing(project, make_item, model, client, change):
    make_item("q").delete()
    form = FORM | {"models": [model.pk]} | change
    assert client.post("/p/demo/generate", form).status_code == 422
    assert not Job.objects.exists()


def test_a_wrong_form_is_no_line_in_the_log_and_a_missing_page_is(project, client, caplog):
    assert client.post("/p/demo/generate", FORM).status_code == 422
    assert client.get("/p/demo/nothing").status_code == 404
    (handler,) = [each for each in logging.getLogger().handlers if each.get_name() == "stderr"]
    shown = [record.getMessage() for record in caplog.records if handler.filter(record)]
    assert len(caplog.records) == 2
    assert shown == ["Not Found: /p/demo/nothing"]


def test_the_served_model_is_chosen(project, make_item, model, client):
    project.served = model
    project.save()
    make_item("q").delete()
    assert f'value="{model.pk}" id="id_models_0" checked' in (
        client.get("/p/demo/generate").content.decode()
    )


def test_a_reward_model_does_not_answer(project, make_item, client):
    make_item("q").delete()
    reward = ModelVersion.objects.create(project=project, name="r", kind="reward", path="/runs/r")
    form = FORM | {"models": [reward.pk]}
    assert client.post("/p/demo/generate", form).status_code == 422


def test_people_write_the_answers_of_demonstrations(project, make_item, model, client):
    project.task = Task.DEMONSTRATION
    project.save()
    make_item("q").delete()
    page = client.post("/p/demo/generate", FORM | {"models": [model.pk]})
    assert page.status_code == 422
    assert b"nothing to generate" in page.content
