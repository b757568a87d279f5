"""The loop over the API: prompts, batches, comparisons, promotion, jobs and figures."""

import pytest

from openpalm.feedback.api.work import FIGURES
from openpalm.feedback.items.new_items import is_held_out
from openpalm.feedback.judgements import submission
from openpalm.feedback.judgements.queue import next_assignment
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import (
    Comparison,
    Event,
    Item,
    Job,
    ModelVersion,
    Project,
    Promotion,
    Prompt,
    Role,
    Snapshot,
    SnapshotJudgement,
    Statistic,
    TrainRun,
    User,
)
from openpalm.feedback.quality.names import DISAGREEMENTS
from openpalm.feedback.statistics.promotion import MINIMUM

BETTER = Judgement("compare", {"better": 0, "worse": 1, "strength": 1})


@pytest.fixture
def boss(member, caller):
    return caller(member("boss", Role.ADMIN))


@pytest.fixture
def page(member, signed_in):
    """page(path, form): what the page says after this form, as the API would say it."""

    def post(path, form):
        response = signed_in(member("boss", Role.ADMIN)).post(f"/p/demo/{path}", form, follow=True)
        said = str(next(iter(response.context["messages"]))).rstrip(".")
        said = said.partition(": ")[2] if said.startswith(("Not ", "No ")) else said
        return f"{said[:1].lower()}{said[1:]}"

    return post


@pytest.fixture
def server(settings):
    settings.SERVER_URL, settings.SERVER_ADMIN_KEY = "http://127.0.0.1:9", "key"


@pytest.fixture
def models(project):
    """The served model and a challenger."""
    base, new = (
        ModelVersion.objects.create(project=project, name=name, path=f"/none/{name}")
        for name in ("base", "new")
    )
    project.served = base
    project.save()
    return base, new


def actions():
    return list(Event.objects.order_by("id").values_list("action", flat=True))


def conflict(answer):
    assert (answer.status_code, answer.data["error"]["code"]) == (409, "conflict"), answer.data
    return answer.data["error"]["message"]


# --- prompts


def prompts(*texts, **more):
    return {"project": "demo", "prompts": [{"prompt": text} for text in texts]} | more


def test_prompts_are_added_once_and_held_out_as_asked(boss):
    given = prompts("one", "two")
    given["prompts"][0]["held_out"] = True
    made = boss.post("prompts", given)
    assert made.status_code == 201
    assert [(p["held_out"], p["created"]) for p in made.data["data"]] == [
        (True, True),
        (False, True),
    ]
    again = boss.post("prompts", prompts("one", "three", held_out_share=1))
    assert [(p["held_out"], p["created"]) for p in again.data["data"]] == [
        (True, False),
        (True, True),
    ]
    assert boss.post("prompts", prompts("one")).status_code == 200
    assert actions() == ["prompt.added"] * 2
    listed = boss.get("prompts", project="demo", held_out="true").data["data"]
    assert [p["messages"][0]["content"] for p in listed] == ["one", "three"]
    assert {p["source"] for p in listed} == {"api"}
    assert boss.get("prompts", project="demo", source="file").data["data"] == []
    assert boss.get(f"prompts/{listed[0]['id']}").data == listed[0]


def test_a_share_holds_out_the_same_prompts_as_an_upload(boss, project):
    boss.post("prompts", prompts(*(f"question {n}" for n in range(40)), held_out_share=0.5))
    held = {p.digest: p.held_out for p in Prompt.objects.all()}
    assert held == {digest: is_held_out(digest, 0.5) for digest in held}
    assert 5 < sum(held.values()) < 35


def test_where_people_write_the_answers_each_prompt_is_an_item(boss, project):
    Project.objects.update(task="demonstration")
    assert boss.post("prompts", prompts("one", "two")).status_code == 201
    assert Item.objects.count() == 2
    refused = boss.post("prompts", prompts("three", held_out_share=0.5))
    assert refused.data["error"]["field"] == "prompts"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [{}]}, "prompts[0].messages"),
        ({"prompts": [{"prompt": ""}]}, "prompts[0].prompt"),
        ({"prompts": [{"prompt": "a", "held_out": 1}]}, "prompts[0].held_out"),
        ({"prompts": [{"prompt": "a", "key": "b"}]}, "prompts[0].key"),
        ({"prompts": [{"prompt": "a"}], "held_out_share": 1.5}, "held_out_share"),
        (
            {"prompts": [{"messages": [{"role": "assistant", "content": "x"}]}]},
            "prompts[0].messages",
        ),
    ],
)
def test_wrong_prompts_are_refused_whole(boss, given, field):
    answer = boss.post("prompts", {"project": "demo"} | given)
    assert (answer.status_code, answer.data["error"]["field"]) == (400, field)
    assert not Prompt.objects.exists()


def test_holding_out_and_giving_back(boss, page, make_item):
    (made,) = boss.post("prompts", prompts("one")).data["data"]
    path = f"prompts/{made['id']}/held-out"
    for held_out in (True, True, False):
        assert boss.post(path, {"held_out": held_out}).data["held_out"] is held_out
    assert actions()[1:] == ["prompt.held_out", "prompt.given_back"]
    used = make_item("two", "yes", "no").prompt
    said = conflict(boss.post(f"prompts/{used.pk}/held-out", {"held_out": True}))
    assert said == page(f"prompts/{used.pk}/held-out", {})


def test_a_held_out_prompt_is_not_judged_for_training(boss):
    boss.post("prompts", prompts("one", held_out_share=1))
    item = {"prompt": "one", "candidates": [{"text": "a"}, {"text": "b"}]}
    fine = item | {"prompt": "two"}
    answer = boss.post("items", {"project": "demo", "items": [fine, item]})
    assert conflict(answer) == "items[1]: its prompt is held out for comparisons"
    assert answer.data["error"]["field"] == "items[1]"
    assert not Item.objects.exists()


# --- answers and batches


def generate(boss, **more):
    return boss.post("projects/demo/generate", {"models": [{"model": "base"}]} | more)


def test_answers_are_generated_with_the_defaults_of_the_form(boss, models, member, signed_in):
    boss.post("prompts", prompts("one", "two"))
    job = generate(boss)
    assert (job.status_code, job.data["kind"], job.data["state"]) == (202, "generate", "queued")
    arguments = Job.objects.get().arguments
    client = signed_in(member("boss", Role.ADMIN))
    form = client.get("/p/demo/generate").context["form"]
    given = {name: form[name].value() or "" for name in form.fields} | {"models": [models[0].pk]}
    client.post("/p/demo/generate", given)
    of_form = Job.objects.order_by("-id")[0].arguments
    assert of_form["models"][0].pop("top_p") == 1  # the server's own default
    assert arguments == of_form
    assert actions() == ["prompt.added", "job.generate", "job.generate"]


def test_answers_to_chosen_prompts(boss, models):
    ids = [p["id"] for p in boss.post("prompts", prompts("one", "two")).data["data"]]
    chosen = [{"model": "base", "n": 1}, {"model": "new", "n": 1, "sampling": {"top_k": 5}}]
    assert generate(boss, models=chosen, prompts=ids[1:], pairs=3).status_code == 202
    arguments = Job.objects.get().arguments
    assert (arguments["prompts"], arguments["pairs"]) == (ids[1:], 3)
    assert [each.get("top_k") for each in arguments["models"]] == [None, 5]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"models": [{"model": "none"}]}, "models[0].model"),
        ({"models": [{"model": "base", "n": 99}]}, "models[0].n"),
        ({"models": [{"model": "base", "sampling": {"top_p": 2}}]}, "models[0].sampling"),
        ({"models": [{"model": "base", "seed": 1}]}, "models[0].seed"),
        ({"prompts": [10**6]}, "prompts"),
        ({"prompts": [1], "count": 3}, "count"),
        ({"prompts": ["1"]}, "prompts"),
    ],
)
def test_a_generation_that_cannot_run_is_refused(boss, models, given, field):
    answer = generate(boss, **given)
    assert (answer.status_code, answer.data["error"]["field"]) == (400, field)
    assert not Job.objects.exists()


def test_held_out_prompts_are_never_answered_for_training(boss, models):
    (made,) = boss.post("prompts", prompts("one", held_out_share=1)).data["data"]
    assert "held out" in generate(boss, prompts=[made["id"]]).data["error"]["message"]
    assert "every prompt has an item" in conflict(generate(boss))


def test_the_next_batch(boss, page):
    assert boss.post("projects/demo/next-batch").status_code == 202
    boss.post("projects/demo/next-batch", {"size": 7})
    assert [job.arguments["size"] for job in Job.objects.order_by("id")] == [50, 7]
    assert actions() == ["job.select"] * 2
    assert boss.post("projects/demo/next-batch", {"size": 0}).status_code == 400
    Project.objects.update(task="thumbs")
    said = conflict(boss.post("projects/demo/next-batch"))
    assert said == page("loop/next-batch", {"size": 5})


# --- comparisons and promotion


def test_a_comparison_starts_only_with_enough_held_out_prompts(boss, models, page):
    given = {"project": "demo", "model": "new"}
    said = conflict(boss.post("comparisons", given))
    sampling = {"size": MINIMUM, "temperature": 1, "max_tokens": 64}
    assert said == page(f"models/{models[1].pk}/compare", sampling)
    for start in range(0, MINIMUM, 100):
        texts = [f"question {n}" for n in range(start, start + 100)]
        boss.post("prompts", prompts(*texts, held_out_share=1))
    made = boss.post("comparisons", given | {"sampling": {"temperature": 0.5}})
    assert made.status_code == 201
    assert made.data["sampling"] == {"temperature": 0.5, "max_tokens": 256}
    assert (made.data["challenger"], made.data["served"]) == ("new", "base")
    assert actions()[-1] == "comparison.started"
    shown = boss.get(f"comparisons/{made.data['id']}").data
    assert (shown["state"], shown["can_extend"]) == ("generating", False)
    assert "not decided yet" in shown["refusal"]
    assert boss.get("comparisons", project="demo").data["data"] == [made.data]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"size": MINIMUM - 1}, "size"),
        ({"model": "other"}, "model"),
        ({"sampling": {"heat": 1}}, "sampling"),
    ],
)
def test_a_wrong_comparison_is_refused(boss, models, given, field):
    answer = boss.post("comparisons", {"project": "demo", "model": "new"} | given)
    assert (answer.status_code, answer.data["error"]["field"]) == (400, field)
    assert not Comparison.objects.exists()


@pytest.fixture
def decided(project, models):
    """decided(**result): a comparison that promotes, unless said else."""

    def make(**result):
        base, new = models
        figures = {"win_rate": {"value": 0.6, "low": 0.53, "high": 0.67}}
        given = {"comparisons": 200, "decision": "promote", "low": 0.53, "author_kind": "person"}
        return Comparison.objects.create(
            project=project,
            challenger=new,
            served=base,
            state=Comparison.State.DECIDED,
            result=given | {"figures": figures} | result,
        )

    return make


def test_only_an_undecided_comparison_is_extended(boss, decided, page):
    row = decided()
    said = conflict(boss.post(f"comparisons/{row.pk}/extend", {"further": 5}))
    assert said == page(f"comparisons/{row.pk}/extend", {"further": 5})
    row = decided(decision="more_needed", needed=5)
    assert boss.get(f"comparisons/{row.pk}").data["can_extend"] is True
    row.size = 0
    row.save()
    boss.post("prompts", prompts(*(f"question {n}" for n in range(5)), held_out_share=1))
    extended = boss.post(f"comparisons/{row.pk}/extend", {"further": 5}).data
    assert (extended["state"], extended["size"]) == ("generating", 5)
    assert actions()[-1] == "comparison.extended"


def test_promotion_and_its_undoing(boss, decided, server, models):
    row = decided()
    assert boss.get(f"comparisons/{row.pk}").data["refusal"] is None
    made = boss.post(f"models/{models[1].pk}/promote", {"comparison": row.pk})
    assert (made.status_code, made.data["state"], made.data["by"]) == (202, "queued", "boss")
    assert actions() == ["model.promotion_proposed"]
    Job.objects.update(state=Job.State.DONE)
    Promotion.objects.update(state=Promotion.State.DONE)
    Project.objects.update(served=models[1])
    assert boss.post(f"promotions/{made.data['id']}/undo").status_code == 202
    assert Job.objects.order_by("-id")[0].arguments["undo"] is True
    assert actions()[-1] == "model.promotion_undo_asked"
    (listed,) = boss.get("promotions", project="demo").data["data"]
    assert listed == boss.get(f"promotions/{made.data['id']}").data
    assert (listed["model"], listed["previous"]) == (models[1].pk, models[0].pk)


@pytest.mark.parametrize(
    "result", [{"decision": "refuse", "reason": "the interval holds one half"}, {"comparisons": 5}]
)
def test_a_refusal_has_the_words_of_the_page(boss, decided, server, models, page, result):
    row = decided(**result)
    path = f"models/{models[1].pk}/promote"
    said = conflict(boss.post(path, {"comparison": row.pk, "override_reason": "short"}))
    assert said == page(path, {"comparison": row.pk, "override_reason": "short"})
    assert said.startswith("refused: ")
    assert not Promotion.objects.exists()
    reason = "the labelers judged another question"
    made = boss.post(path, {"comparison": row.pk, "override_reason": reason})
    assert made.data["override_reason"] == reason
    event = Event.objects.get(action="model.promotion_overridden")
    assert event.data["reason"] == reason


def test_only_the_promotion_of_the_served_model_is_undone(boss, models, admin, server, page):
    row = Promotion.objects.create(project=models[0].project, model=models[1], by=admin)
    said = conflict(boss.post(f"promotions/{row.pk}/undo"))
    assert said == page(f"promotions/{row.pk}/undo", {})


def test_promotion_has_a_scope_of_its_own(models, decided, server, member, caller):
    row = decided()
    other = caller(member("boss", Role.ADMIN), "models:read", "models:write", "comparisons:write")
    path = f"models/{models[1].pk}/promote"
    assert other.post(path, {"comparison": row.pk}).status_code == 403
    own = caller(member("boss", Role.ADMIN), "promotions:write")
    assert own.post(path, {"comparison": row.pk}).status_code == 202


# --- models


def test_only_an_administrator_of_the_site_names_paths(boss, admin, caller, project, tmp_path):
    given = {"project": "demo", "path": str(tmp_path), "name": "mine"}
    assert boss.post("models", given).status_code == 403
    wrong = caller(admin).post("models", given)
    assert (wrong.status_code, wrong.data["error"]["field"]) == (400, "path")
    (tmp_path / "manifest.json").write_text('{"sha256": "abc"}', encoding="utf-8")
    made = caller(admin).post("models", given)
    assert (made.status_code, made.data["checkpoint"]) == (201, "abc")
    assert actions() == ["model.registered"]
    chosen = boss.post(f"models/{made.data['id']}/choose")
    assert (chosen.status_code, chosen.data["served"]) == (200, True)
    assert "only the first served model" in conflict(boss.post(f"models/{made.data['id']}/choose"))
    assert "only a reward model" in conflict(boss.post(f"models/{made.data['id']}/score"))
    ModelVersion.objects.update(kind="reward")
    assert boss.post(f"models/{made.data['id']}/score").data["kind"] == "score"


def test_a_model_is_traced_to_each_judgement(project, models, member, make_item, caller):
    base, new = models
    ann, rea = member("ann"), member("rea", Role.REVIEWER)
    make_item("one", "yes", "no")
    make_item("two", "yes", "no")
    project.refresh_from_db()
    judged = [submission.submit(next_assignment(project, ann).pk, ann, BETTER) for _ in "ab"]
    snapshot = Snapshot.objects.create(project=project, digest="ab", path="/none", judgements=2)
    for response in judged:
        SnapshotJudgement.objects.create(snapshot=snapshot, response=response)
    run = TrainRun.objects.create(project=project, verb="dpo", snapshot=snapshot, parent=base)
    ModelVersion.objects.filter(pk=new.pk).update(run=run, parent=base)
    api = caller(rea)
    shown = api.get(f"models/{new.pk}").data
    assert shown["ancestors"] == ["base"]
    assert [s["digest"] for s in shown["snapshots"]] == ["ab"]
    assert api.get(f"models/{base.pk}").data["snapshots"] == []
    path = f"snapshots/{shown['snapshots'][0]['id']}/judgements"
    first = api.get(path, limit=1).data
    rest = api.get(path, after=first["next"]).data
    assert [r["id"] for r in first["data"] + rest["data"]] == [str(r.uid) for r in judged]
    assert first["data"][0]["payload"] == judged[0].payload
    Item.objects.update(state=Item.State.OPEN)  # the reviewer may still be given them
    assert api.get(path).data["data"][0]["payload"] is None


# --- jobs, runs, figures


def test_jobs_are_seen_and_stopped(boss, project):
    job = Job.objects.create(kind="select", project=project, arguments={"size": 3})
    assert [each["id"] for each in boss.get("jobs", project="demo").data["data"]] == [job.pk]
    assert boss.get("jobs", project="demo", state="done").data["data"] == []
    assert boss.post(f"jobs/{job.pk}/stop").data["state"] == "stopped"
    assert actions() == ["job.stopped"]
    assert conflict(boss.post(f"jobs/{job.pk}/stop")) == "the job is stopped; it cannot be stopped"


def test_a_run_is_followed_and_resumed(boss, project, member, caller, page):
    run = TrainRun.objects.create(
        project=project,
        verb="dpo",
        state="failed",
        step=3,
        steps=9,
        error="no memory (log: /secret/place.log)",
    )
    shown = boss.get(f"runs/{run.pk}").data
    assert (shown["step"], shown["steps"], shown["failure"]) == (3, 9, run.error)
    reviewer = caller(member("rea", Role.REVIEWER))
    assert reviewer.get(f"runs/{run.pk}").data["failure"] == "no memory"
    assert boss.post(f"runs/{run.pk}/resume").data["state"] == "queued"
    assert conflict(boss.post(f"runs/{run.pk}/resume")) == page(f"runs/{run.pk}/resume", {})


@pytest.mark.parametrize("decided_by", ["person", "simulated"])
@pytest.mark.parametrize("verb", ["reward", "dpo"])
def test_the_api_and_the_form_train_on_the_same_judgements(
    project, models, boss, member, signed_in, make_item, decided_by, verb
):
    Project.objects.update(decided_by=decided_by)
    for kind in ("person", "simulated"):
        user = member(kind, kind=kind)
        make_item(f"question of {kind}", "yes", "no")
        submission.submit(next_assignment(project, user).pk, user, BETTER)
    boss.post("runs", {"project": "demo", "verb": verb, "parent": "base"})
    client = signed_in(member("boss", Role.ADMIN))
    form = client.get(f"/p/demo/runs/new?verb={verb}").context["form"]
    values = {name: form[name].value() for name in form.fields}
    given = {name: v for name, v in values.items() if v is not None and v is not False}
    started = client.post(f"/p/demo/runs/new?verb={verb}", given)
    assert started.status_code == 302, started.context["form"].errors
    ours, theirs = (run.settings["filter"] for run in TrainRun.objects.order_by("id"))
    assert ours == theirs
    assert (ours["author_kinds"], ours["hold_back"]) == ([decided_by], verb == "reward")


def test_figures_have_their_time_and_hide_what_may_still_be_judged(
    project, make_item, member, caller
):
    rea = member("rea", Role.REVIEWER)
    seen, hidden = make_item("one", "yes", "no"), make_item("two", "yes", "no")
    Item.objects.filter(pk=seen.pk).update(state=Item.State.COMPLETE)
    rows = [
        {"item": item.pk, "margin": -2.0, "people": 1.0, "judgements": 3} for item in (seen, hidden)
    ]
    stored = Statistic.objects.create(project=project, name=DISAGREEMENTS, value={"rows": rows})
    Statistic.objects.create(project=project, name="agreement", value={"person": {"raw": 1}})
    figures = caller(rea).get("projects/demo/statistics").data["statistics"]
    assert figures["agreement"]["value"] == {"person": {"raw": 1}}
    shown = figures[DISAGREEMENTS]
    assert shown["computed"] == stored.computed_at.isoformat()
    assert shown["value"]["rows"] == [rows[0], rows[1] | {"margin": 2.0, "people": None}]
    one = caller(rea).get("projects/demo/statistics", name="agreement").data["statistics"]
    assert list(one) == ["agreement"]
    assert caller(rea).get("projects/demo/statistics", name="x").status_code == 400
    assert {"agreement", "board", "reward_agreement", DISAGREEMENTS} <= set(FIGURES)


# --- labelers


def test_a_labeler_reads_the_guidelines_changes_and_undoes(project, make_item, member, caller):
    make_item("one", "yes", "no")
    ann = caller(member("ann", kind=User.Kind.SIMULATED))
    newest = {"version": 1, "text": "Prefer *true* answers."}
    assert ann.get("projects/demo/guidelines").data["guidelines"] == newest
    assert ann.get("projects/demo/guidelines", version=1).data["guidelines"] == newest
    assert ann.get("projects/demo/guidelines", version=2).status_code == 404
    assert ann.post("projects/demo/undo").data == {"assignment": None}
    leased = ann.post("projects/demo/next").data["assignment"]["id"]
    tie, bad = {"tie": [0, 1]}, {"both_bad": [0, 1]}
    assert "cannot be changed" in conflict(
        ann.post(f"assignments/{leased}/change", {"payload": tie})
    )
    ann.post(f"assignments/{leased}/submit", {"payload": tie})
    ann.post(f"assignments/{leased}/change", {"payload": bad})
    in_force = [r for r in ann.get("responses", project="demo").data["data"] if r["in_force"]]
    assert [r["payload"] for r in in_force] == [bad]
    again = ann.post("projects/demo/undo").data["assignment"]
    assert (again["id"], again["draft"]) == (leased, bad)


def test_a_rehearsal_is_created_over_the_api(admin, caller, project):
    given = {"slug": "drill", "name": "Drill", "decided_by": "simulated"}
    assert caller(admin).post("projects", given).data["decided_by"] == "simulated"
    wrong = caller(admin).post("projects", given | {"slug": "x", "decided_by": "model"})
    assert wrong.data["error"]["field"] == "decided_by"
