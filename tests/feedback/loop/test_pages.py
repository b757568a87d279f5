"""The pages of the loop show what is stored; who may not act sees no button."""

import pytest
from django.urls import reverse

from openpalm.feedback.models import Job, ModelVersion, Role, TrainRun

E = {"value": 0.712, "low": 0.61, "high": 0.795}
HOSTILE = "<img src=x onerror=alert(1)>"


def paths(loop):
    """Every page of the loop, by name."""
    own = {
        "run": [loop.run.pk],
        "model": [loop.challenger.pk],
        "snapshot": [loop.snapshot.pk],
        "comparison": [loop.comparison.pk],
    }
    plain = ("loop", "runs", "models", "comparisons", "quality", "board")
    return {name: reverse(name, args=["demo", *own.get(name, [])]) for name in (*plain, *own)}


def test_every_page_answers_a_reviewer_without_a_form_to_act(loop, member, signed_in):
    client = signed_in(member("rita", Role.REVIEWER))
    for name, path in paths(loop).items():
        response = client.get(path)
        assert response.status_code == 200, name
        forms = response.content.decode().partition("<main")[2].count('method="post"')
        assert not forms, name


@pytest.mark.parametrize("name", ["loop", "runs", "models", "comparisons", "quality", "board"])
def test_a_new_project_says_what_is_missing(project, admin, signed_in, name):
    response = signed_in(admin).get(reverse(name, args=["demo"]))
    assert response.status_code == 200


def test_pages_hold_no_inline_style_or_script(loop, admin, signed_in, store, decided):
    decided()
    store("reward_agreement", {"person": {"models": [{"model": loop.reward.pk, "accuracy": E}]}})
    client = signed_in(admin)
    for name, path in paths(loop).items():
        page = client.get(path).content.decode()
        for inline in (" style=", "<style", "onclick", "<script>"):
            assert inline not in page, (name, inline)


def test_names_of_models_and_reasons_are_text(loop, admin, signed_in):
    ModelVersion.objects.filter(pk=loop.challenger.pk).update(name=HOSTILE)
    TrainRun.objects.filter(pk=loop.run.pk).update(error=HOSTILE, alarms=[HOSTILE])
    client = signed_in(admin)
    for name, path in paths(loop).items():
        assert HOSTILE not in client.get(path).content.decode(), name


def test_few_queries_however_many_models(loop, admin, signed_in, django_assert_max_num_queries):
    parent = loop.challenger
    for n in range(20):
        run = TrainRun.objects.create(project=loop.project, verb="dpo", snapshot=loop.snapshot)
        parent = ModelVersion.objects.create(
            project=loop.project, name=f"m{n}", parent=parent, run=run
        )
    loop.challenger = parent  # the last of the chain
    client = signed_in(admin)
    for name, path in paths(loop).items():
        with django_assert_max_num_queries(20):
            assert client.get(path).status_code == 200, name


# --- the loop page


def test_agreement_stands_beside_its_ceiling(loop, admin, signed_in, store):
    row = {"model": loop.reward.pk, "name": "judge-of-taste", "accuracy": E, "judgements": 90}
    people = {"value": 0.78, "low": 0.7, "high": 0.85}
    store("reward_agreement", {"person": {"arm": "random", "people": people, "models": [row]}})
    page = signed_in(admin).get("/p/demo/loop").content.decode()
    assert "71.2 % (61.0 to 79.5)" in page
    assert "78.0 % (70.0 to 85.0)" in page
    assert "Figures of 2" in page


def test_simulated_labelers_have_a_figure_of_their_own(loop, admin, signed_in, store):
    row = {"model": loop.reward.pk, "name": "judge-of-taste", "accuracy": E}
    store("reward_agreement", {"simulated": {"models": [row]}})
    page = signed_in(admin).get("/p/demo/loop").content.decode()
    assert "agree with simulated labelers?" in page
    assert "agree with people?" not in page


def test_a_model_without_a_figure_says_why(loop, admin, signed_in, store):
    row = {
        "model": loop.reward.pk,
        "name": "judge-of-taste",
        "accuracy": None,
        "reason": "no score",
    }
    store("reward_agreement", {"person": {"models": [row]}})
    assert "no score" in signed_in(admin).get("/p/demo/loop").content.decode()


def test_disagreements_link_items_and_hide_what_was_said(loop, admin, signed_in, store):
    rows = [{"item": loop.items[0].pk, "margin": -2.5, "people": 1.0, "judgements": 2}]
    store("disagreements", {"author_kind": "person", "rows": [*rows, {"item": 10**9}]})
    page = signed_in(admin).get("/p/demo/loop").content.decode()
    assert reverse("item", args=["demo", loop.items[0].pk]) in page
    assert "2.50" in page
    assert "-2.5" not in page


def test_damaged_figures_do_not_break_the_page(loop, admin, signed_in, store):
    store("reward_agreement", {"person": {"models": ["x", {"model": loop.reward.pk}]}})
    store("calibration", {"person": {"bins": None}})
    store("disagreements", [1])
    store("board", {"person": {"plain": {"strengths": 3}}})
    store("labelers", {"rows": [{"author_kind": "person", "name": "ann"}]})
    client = signed_in(admin)
    for name in ("loop", "board", "quality"):
        assert client.get(f"/p/demo/{name}").status_code == 200


def test_alarms_are_shown(loop, admin, signed_in, store):
    TrainRun.objects.filter(pk=loop.run.pk).update(alarms=["answers become all alike"])
    line = "the reward is being gamed"
    store("alarms", {"rows": [{"model": loop.challenger.pk, "name": "challenger", "line": line}]})
    page = signed_in(admin).get("/p/demo/loop").content.decode()
    assert "answers become all alike" in page
    assert line in page


def test_the_stations_follow_the_state(loop, admin, signed_in, decided):
    client = signed_in(admin)
    first = {station.name: station for station in client.get("/p/demo/loop").context["stations"]}
    assert list(first) == ["Judge", "Reward model", "Train", "Compare", "Serve"]
    assert first["Train"].state == "dpo is running, 25 %"
    assert first["Compare"].state == "challenger: generating"
    assert first["Serve"].state == "base"
    decided()
    last = client.get("/p/demo/loop").context["stations"][-1]
    assert (last.action, last.is_now) == ("Promote challenger", True)


@pytest.mark.parametrize(
    ("low", "badge", "says"),
    [
        (0.61, "good", "(61.0 to 79.5)"),
        (0.45, "accent", "no better than chance so far, judge more"),
    ],
)
def test_the_reward_station_is_done_above_chance(loop, admin, signed_in, store, low, badge, says):
    found = E | {"low": low}
    store(
        "reward_agreement", {"person": {"models": [{"model": loop.reward.pk, "accuracy": found}]}}
    )
    station = signed_in(admin).get("/p/demo/loop").context["stations"][1]
    assert station.badge == badge
    assert station.state.endswith(says)


def test_a_reward_model_that_is_being_measured_says_so(loop, admin, signed_in):
    client = signed_in(admin)
    before = client.get("/p/demo/loop").context["stations"][1].state
    assert before.endswith(": not measured yet")
    Job.objects.create(project=loop.project, kind="score")
    state = client.get("/p/demo/loop").context["stations"][1].state
    assert state.endswith(": its agreement is being computed")


# --- runs, models, snapshots


@pytest.mark.parametrize(("name", "state"), [("run", "queued"), ("comparison", "judging")])
def test_a_page_is_loaded_again_when_the_state_changed(loop, admin, signed_in, name, state):
    """Its buttons follow from the state; a part with figures alone would leave the old ones."""
    client, path = signed_in(admin), paths(loop)[name]
    htmx = {"hx-request": "true"}
    now = getattr(loop, name).state
    same = client.get(f"{path}?state={now}", headers=htmx)
    assert "HX-Refresh" not in same.headers
    assert f'hx-get="{path}?state={now}"' in same.content.decode()
    changed = client.get(f"{path}?state={state}", headers=htmx)
    assert changed.headers["HX-Refresh"] == "true"
    assert "<html" in client.get(f"{path}?state={state}").content.decode()


def test_a_running_training_asks_again_and_an_ended_one_does_not(loop, admin, signed_in):
    client, path = signed_in(admin), paths(loop)["run"]
    part = client.get(path, headers={"hx-request": "true"}).content.decode()
    assert "<html" not in part
    assert 'hx-trigger="every 2s"' in part
    assert 'value="30"' in part
    assert "polyline" in part
    TrainRun.objects.filter(pk=loop.run.pk).update(state="finished")
    part = client.get(path, headers={"hx-request": "true"}).content.decode()
    assert "hx-trigger" not in part


def test_the_log_is_for_managers(loop, admin, member, signed_in, tmp_path):
    error = "openpalm dpo: diverged (log: /srv/run.log)"
    TrainRun.objects.filter(pk=loop.run.pk).update(directory=str(tmp_path / "run"), error=error)
    (tmp_path / "run.log").write_text("first\nstep 1\rstep 2\rstep 3\n", encoding="utf-8")
    path = paths(loop)["run"]
    log = signed_in(admin).get(path).context["log"]
    assert log == ["first", "step 3"]
    response = signed_in(member("rita", Role.REVIEWER)).get(path)
    assert response.context["log"] == []
    assert "diverged" in response.content.decode()
    assert "/srv" not in response.content.decode()


def test_models_stand_below_their_parents(loop, admin, signed_in):
    rows = signed_in(admin).get("/p/demo/models").context["rows"]
    assert [(depth, model.name) for depth, model in rows] == [
        (0, "base"),
        (1, "judge-of-taste"),
        (1, "challenger"),
    ]


def test_a_model_lists_its_judgements_and_marks_simulated_ones(loop, admin, signed_in):
    client = signed_in(admin)
    page = client.get(paths(loop)["model"]).content.decode()
    assert paths(loop)["snapshot"] in page
    assert "ann (1), sim (1)" in page
    assert "1 simulated" in page
    page = client.get(paths(loop)["snapshot"]).content.decode()
    assert loop.snapshot.digest in page
    for judgement in loop.judgements:
        assert reverse("response-delete", args=["demo", judgement.pk]) in page


def test_a_judgement_of_an_open_item_stays_hidden(loop, admin, signed_in):
    item = loop.items[0]
    item.state, item.needed = "open", 2
    item.save()
    page = signed_in(admin).get(paths(loop)["snapshot"]).content.decode()
    assert page.count("hidden until you have judged the item") == 1


# --- comparisons, quality, the board


def test_a_comparison_shows_its_interval_and_its_number(loop, admin, signed_in, decided):
    decided(decision="more_needed", low=0.49, needed=120, reason="Undecided")
    page = signed_in(admin).get(paths(loop)["comparison"]).content.decode()
    assert "200 of 200 pairs judged." in page
    assert 'value="120"' in page  # the further pairs of the form
    assert "60.0 % (53.0 to 67.0)" in page
    assert "Refused: Undecided." in page
    assert "Promote: serve" not in page


def test_quality_keeps_kinds_of_authors_apart(loop, admin, signed_in, store):
    rows = [
        {"name": "ann", "author_kind": "person", "judgements": 5, "median_s": 3.25, "gold": E},
        {"name": "sim", "author_kind": "simulated", "judgements": 9},
        {"name": "gpt", "author_kind": "model", "judgements": 7, "others": E},
    ]
    store("labelers", {"rows": rows})
    store("agreement", {"person": {"raw": E, "alpha": E, "gwet": E}, "model": {"raw": E}})
    groups = signed_in(admin).get("/p/demo/quality").context["groups"]
    assert [[row["name"] for row in group["labelers"]] for group in groups] == [
        ["ann"],
        ["sim"],
        ["gpt"],
    ]
    assert [bool(group["agreement"]) for group in groups] == [True, False, False]


@pytest.mark.parametrize(
    ("labelers", "overlap", "says"),
    [
        (["ann"], 2, "One labeler so far: agreement needs a second one."),
        (["ann", "bob"], 1, "each item of this project gets one"),
        (["ann", "bob"], 2, "there is none yet"),
    ],
)
def test_quality_says_what_agreement_needs(
    project, admin, signed_in, store, labelers, overlap, says
):
    project.overlap = overlap
    project.save()
    row = {"author_kind": "person", "judgements": 5}
    store("labelers", {"rows": [row | {"name": name} for name in labelers]})
    page = signed_in(admin).get("/p/demo/quality").content.decode()
    assert says in page
    assert ("Settings.</p>" in page) == (overlap == 1)


def test_quality_lists_the_newest_days_first(project, admin, signed_in, store):
    days = [
        {"day": f"2026-{month:02}-{day:02}", "judgements": day, "median_s": 2.5}
        for month in (1, 2)
        for day in range(1, 29)
    ]
    store("labelers", {"rows": [{"name": "ann", "author_kind": "person", "judgements": 5}]})
    store("time", {"person": {"median_s": 2.5, "judgements": 9, "days": days}})
    (group,) = signed_in(admin).get("/p/demo/quality").context["groups"]
    shown = [row["day"] for row in group["days"]]
    assert (shown[0], shown[-1], len(shown)) == ("2026-02-28", "2026-01-27", 30)


def test_the_board_does_not_mix_groups(loop, admin, signed_in, store):
    strengths = [
        {"model": m, "group": g, "value": 0.5, "low": 0.1, "high": 0.9, "comparisons": 10}
        for m, g in (("base", 0), ("challenger", 0), ("far", 1), ("away", 1))
    ]
    store("board", {"person": {"plain": {"strengths": strengths}, "ids": {"base": loop.base.pk}}})
    response = signed_in(admin).get("/p/demo/board")
    (board,) = response.context["boards"]
    assert [[row["model"] for row in group] for group in board["groups"]] == [
        ["base", "challenger"],
        ["far", "away"],
    ]
    page = response.content.decode()
    assert page.count("never compared with the models of other groups") == 2
    assert reverse("model", args=["demo", loop.base.pk]) in page
