"""Comparisons and promotions: prompts never trained on, who counts, the decision, the swap."""

import json
from itertools import cycle, islice

import pytest
from feedback_prompts import add_prompts

from openpalm.errors import DataError
from openpalm.feedback.items import item_changes
from openpalm.feedback.judgements import submission
from openpalm.feedback.models import (
    Comparison,
    Event,
    Item,
    Job,
    Project,
    Promotion,
    Prompt,
    Response,
    Snapshot,
    SnapshotJudgement,
    User,
)
from openpalm.feedback.training import comparisons, promotion, servers
from openpalm.feedback.training.commands import prompts_path
from openpalm.feedback.training.runs import TrainRun
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.loop import drain

SIZE = 20


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Twenty pairs instead of two hundred; one test has the real number."""
    monkeypatch.setattr(comparisons, "MINIMUM", SIZE)
    monkeypatch.setattr(promotion, "MINIMUM", SIZE)
    decide = comparisons.decide
    monkeypatch.setattr(comparisons, "decide", lambda *a, **k: decide(*a, **k, minimum=SIZE))


@pytest.fixture
def both(project, model, server, monkeypatch):
    """The served model and a challenger; answers come from the site's server for both."""
    served, challenger = model("base"), model("next")
    Project.objects.filter(pk=project.pk).update(served=served)
    project.refresh_from_db()
    from contextlib import contextmanager

    from openpalm.feedback.model_server import site_server

    @contextmanager
    def serving(model, progress):
        server.answer = lambda body: f"{model.name} says {body['seed'] % 1000:03}"
        yield site_server()

    monkeypatch.setattr(comparisons, "serving", serving)
    return served, challenger


def _judge_all(comparison, judge, users, betters) -> None:
    items = comparison.items.filter(state=Item.State.OPEN).order_by("id")
    for item, user, better in zip(items, cycle(users), betters, strict=False):
        judge(item, user, _side(item, better))


def _side(item: Item, better: int) -> int:
    """Position of the challenger's answer for 0, of the served model's for 1."""
    models = [place.candidate.model_id for place in item.places.select_related("candidate")]
    sides = [model == item.comparison.challenger_id for model in models]  # pyright: ignore
    assert sorted(sides) == [False, True]
    return sides.index(better == 0)


def _compared(project, challenger, admin, judge, users, betters, **more) -> Comparison:
    comparison = comparisons.create(project, challenger, admin, size=SIZE, **more)
    drain("compare")
    _judge_all(comparison, judge, users, betters)
    comparisons.compute_all(project)
    comparison.refresh_from_db()
    return comparison


def test_both_models_answer_the_held_out_prompts(project, both, admin, server):
    served, challenger = both
    add_prompts(project, 3)
    add_prompts(project, SIZE + 5, text="hidden", held_out=True)
    comparison = comparisons.create(project, challenger, admin, size=SIZE)
    drain("compare")
    comparison.refresh_from_db()
    assert comparison.state == Comparison.State.JUDGING, comparison.result
    assert comparison.result["shown"] == SIZE
    assert len(server.requests) == 2 * SIZE
    for item in comparison.items.all():
        assert item.purpose == Item.Purpose.COMPARISON
        assert (item.arm, item.priority, item.prompt.held_out) == ("", 100.0, True)
        assert {place.candidate.model for place in item.places.all()} == {challenger, served}
    # The job again, as after a kill before its last write.
    Job.objects.filter(kind="compare").update(state=Job.State.QUEUED)
    drain("compare")
    assert comparison.items.count() == SIZE
    assert len(server.requests) == 2 * SIZE


def test_equal_answers_are_asked_again_and_not_shown(project, both, admin, server, monkeypatch):
    from contextlib import contextmanager

    from openpalm.feedback.model_server import site_server

    add_prompts(project, SIZE, text="hidden", held_out=True)
    seen: set[str] = set()

    @contextmanager
    def serving(model, progress):
        def answer(body):
            text = body["messages"][0]["content"]
            if text == "hidden 1":
                return "always equal"
            if text == "hidden 2" and len(seen) < 2:
                seen.add(model.name)
                return "equal at first"
            return f"{model.name} {body['seed']}"

        server.answer = answer
        yield site_server()

    monkeypatch.setattr(comparisons, "serving", serving)
    comparison = comparisons.create(project, both[1], admin, size=SIZE)
    drain("compare")
    comparison.refresh_from_db()
    assert (comparison.result["shown"], comparison.result["equal"]) == (SIZE - 1, 1)


def test_prompts_that_were_trained_on_are_not_compared(
    project, both, admin, judge, member, make_item
):
    served, challenger = both
    first, second, *_ = add_prompts(project, SIZE + 1, text="hidden", held_out=True)
    # One was judged and frozen before it was held out, one was sampled from by PPO.
    item = Item.objects.create(project=project, prompt=first, needed=1)
    response = judge(make_item("a", "b", "c"), member("ann"))
    type(response).objects.filter(pk=response.pk).update(item=item)
    snapshot = Snapshot.objects.create(project=project, digest="d", path="p")
    SnapshotJudgement.objects.create(snapshot=snapshot, response=response)
    run = TrainRun.objects.create(project=project, verb="ppo", directory=str(challenger.path))
    prompts_path(run).write_text(json.dumps({"prompt": "x", "id": second.pk}) + "\n")
    type(challenger).objects.filter(pk=challenger.pk).update(run=run)
    challenger.refresh_from_db()
    usable = comparisons.usable_prompts(project, (challenger, served))
    assert len(usable) == SIZE - 1
    assert not {first.pk, second.pk} & set(usable)
    with pytest.raises(DataError, match=f"{SIZE - 1} held-out prompts were never trained on"):
        comparisons.create(project, challenger, admin, size=SIZE)


def test_a_better_model_is_promoted_and_the_swap_keeps_the_name(
    project, both, admin, judge, member, server, settings
):
    served, challenger = both
    add_prompts(project, SIZE, text="hidden", held_out=True)
    ann = member("ann")
    comparison = comparisons.create(project, challenger, admin, size=SIZE)
    with pytest.raises(DataError, match="refused: the comparison is not decided yet"):
        promotion.propose(project, challenger, admin, comparison=comparison)
    drain("compare")
    _judge_all(comparison, judge, [ann], [0] * (SIZE - 1))
    comparisons.compute_all(project)
    comparison.refresh_from_db()
    # One pair is open: no look yet, however clear it is.
    assert comparison.result["decision"] == "judging"
    assert "19 pairs are judged, 1 open" in comparison.result["reason"]
    _judge_all(comparison, judge, [ann], [0])
    comparisons.compute_all(project)
    comparison.refresh_from_db()
    result = comparison.result
    assert (result["wins"], result["losses"], result["decision"]) == (SIZE, 0, "promote")
    assert result["low"] > 0.5
    assert result["author_kind"] == "person"
    assert comparison.computed_at is not None
    promoted = promotion.propose(project, challenger, admin, comparison=comparison)
    drain("promote")
    promoted.refresh_from_db()
    project.refresh_from_db()
    assert (promoted.state, promoted.error, promoted.previous) == ("done", "", served)
    assert project.served == challenger
    assert (server.path, server.name) == (challenger.path, "assistant")
    stored = json.loads((settings.FEEDBACK_DIR / servers.SERVED_FILE).read_text())
    assert stored["path"] == challenger.path
    actions = list(Event.objects.values_list("action", flat=True).order_by("id"))
    assert actions[-2:] == ["model.promotion_proposed", "model.promoted"]
    promotion.undo(promoted, admin)
    drain("promote")
    promoted.refresh_from_db()
    project.refresh_from_db()
    assert (promoted.state, project.served, server.path) == ("undone", served, served.path)
    with pytest.raises(DataError, match="can be undone"):
        promotion.undo(promoted, admin)


def test_a_model_that_is_no_better_is_refused(project, both, admin, judge, member, server):
    add_prompts(project, SIZE, text="hidden", held_out=True)
    _, challenger = both
    comparison = _compared(project, challenger, admin, judge, [member("ann")], cycle([0, 1]))
    assert comparison.result["decision"] in ("refuse", "more_needed")
    with pytest.raises(DataError, match="refused: "):
        promotion.propose(project, challenger, admin, comparison=comparison)
    with pytest.raises(DataError, match="give a reason"):
        promotion.propose(project, challenger, admin, override_reason="because")
    assert not Promotion.objects.exists()
    reason = "the served model has a bug with names"
    made = promotion.propose(
        project, challenger, admin, comparison=comparison, override_reason=reason
    )
    drain("promote")
    made.refresh_from_db()
    assert (made.state, made.override_reason) == ("done", reason)
    event = Event.objects.get(action="model.promotion_overridden")
    assert event.data["reason"] == reason
    assert event.data["refused_because"] == comparison.result["reason"].rstrip(".")


def test_models_and_simulated_labelers_do_not_decide_for_people(
    project, both, admin, judge, member
):
    add_prompts(project, SIZE, text="hidden", held_out=True)
    Project.objects.filter(pk=project.pk).update(overlap=3)
    project.refresh_from_db()
    users = [member("sim", kind=User.Kind.SIMULATED), member("ai", kind=User.Kind.MODEL)]
    comparison = comparisons.create(project, both[1], admin, size=SIZE)
    drain("compare")
    for item in comparison.items.all():
        for user, better in ((users[0], 0), (users[1], 0), (member("ann"), 1)):
            judge(item, user, _side(item, better))
    comparisons.compute_all(project)
    comparison.refresh_from_db()
    assert (comparison.result["wins"], comparison.result["losses"]) == (0, SIZE)
    assert comparison.result["figures"]["judged_by"] == {"person": SIZE}
    assert comparison.result["decision"] == "refuse"


def test_a_rehearsal_is_decided_by_simulated_labelers_alone(project, both, admin, judge, member):
    Project.objects.filter(pk=project.pk).update(decided_by="simulated", overlap=2)
    project.refresh_from_db()
    add_prompts(project, SIZE, text="hidden", held_out=True)
    comparison = comparisons.create(project, both[1], admin, size=SIZE)
    drain("compare")
    for item in comparison.items.all():
        judge(item, member("sim", kind=User.Kind.SIMULATED), _side(item, 0))
        judge(item, member("ann"), _side(item, 1))
    comparisons.compute_all(project)
    comparison.refresh_from_db()
    assert comparison.result["figures"]["judged_by"] == {"simulated": SIZE}
    assert comparison.result["decision"] == "promote"


def test_an_undecided_comparison_is_extended_and_looked_at_more_strictly(
    project, both, admin, judge, member
):
    add_prompts(project, 2 * SIZE, text="hidden", held_out=True)
    ann = member("ann")
    betters = islice(cycle([0, 0, 1, 0, 1]), SIZE)
    comparison = _compared(project, both[1], admin, judge, [ann], betters)
    assert comparison.result["decision"] == "more_needed"
    assert comparison.result["figures"]["look"] == 1
    comparisons.extend(comparison, SIZE, admin)
    with pytest.raises(DataError, match="can be extended"):
        comparisons.extend(comparison, 1, admin)
    drain("compare")
    assert comparison.items.count() == 2 * SIZE
    _judge_all(comparison, judge, [ann], [0] * SIZE)
    comparison.refresh_from_db()
    comparisons.compute(comparison)
    assert comparison.result["figures"]["look"] == 2
    assert comparison.result["figures"]["deciding_level"] == pytest.approx(0.975)
    assert comparison.result["decision"] == "promote"


def test_a_comparison_with_a_model_that_is_served_no_more_promotes_nothing(
    project, both, admin, judge, member, model
):
    add_prompts(project, SIZE, text="hidden", held_out=True)
    comparison = _compared(project, both[1], admin, judge, [member("ann")], cycle([0]))
    Project.objects.filter(pk=project.pk).update(served=model("third"))
    project.refresh_from_db()
    comparison = Comparison.objects.get(pk=comparison.pk)
    with pytest.raises(DataError, match="the served model is another one now"):
        promotion.propose(project, both[1], admin, comparison=comparison)


def test_a_server_that_refuses_keeps_the_old_model(project, both, admin, server, settings):
    server.refuses = "path: no such checkpoint"
    made = promotion.propose(project, both[1], admin, override_reason="a try in the evening")
    drain("promote")
    made.refresh_from_db()
    project.refresh_from_db()
    assert (made.state, project.served, server.path) == ("failed", both[0], "first")
    assert made.error.endswith("/admin/models: status 400: path: no such checkpoint")
    assert Event.objects.filter(action="model.promotion_failed").exists()
    assert not (settings.FEEDBACK_DIR / servers.SERVED_FILE).exists()


def test_without_a_server_nothing_is_promoted(project, model, admin, settings):
    with pytest.raises(DataError, match="no model server is connected: set OPENPALM_SERVER_URL"):
        promotion.propose(project, model("a"), admin, override_reason="a good enough reason")
    settings.SERVER_URL = "http://127.0.0.1:9"
    with pytest.raises(DataError, match="set OPENPALM_ADMIN_KEY"):
        promotion.propose(project, model("b"), admin, override_reason="a good enough reason")


def test_what_cannot_be_compared(project, model, admin, both):
    served, challenger = both
    for wrong, line in (
        (served, "is the served model already"),
        (model("r", "reward"), "cannot answer"),
    ):
        with pytest.raises(DataError, match=line):
            comparisons.create(project, wrong, admin, size=SIZE)
    with pytest.raises(DataError, match="needs 20 pairs or more"):
        comparisons.create(project, challenger, admin, size=SIZE - 1)
    Project.objects.filter(pk=project.pk).update(served=None)
    project.refresh_from_db()
    with pytest.raises(DataError, match="no served model"):
        comparisons.create(project, challenger, admin, size=SIZE)
    assert not Prompt.objects.filter(held_out=True).exists()


# --- attacks on the decision


def test_the_order_of_the_answers_tells_no_model(project, both, admin):
    add_prompts(project, SIZE, text="hidden", held_out=True)
    comparison = comparisons.create(project, both[1], admin, size=SIZE)
    drain("compare")
    sides = {_side(item, 0) for item in comparison.items.all()}
    assert sides == {0, 1}  # by chance one in 500,000 comparisons of 20 pairs has one side only


def test_withdrawing_the_open_pairs_wins_nothing(project, both, admin, judge, member):
    add_prompts(project, 3 * SIZE, text="hidden", held_out=True)
    comparison = comparisons.create(project, both[1], admin, size=3 * SIZE)
    drain("compare")
    for item in comparison.items.order_by("id")[:SIZE]:
        judge(item, member("ann"), _side(item, 0))
    for item in comparison.items.filter(state=Item.State.OPEN):
        item_changes.withdraw(item.pk)
    comparisons.compute_all(project)
    comparison.refresh_from_db()
    assert (comparison.state, comparison.result["wins"]) == ("decided", SIZE)
    assert comparison.result["decision"] == "refuse"
    assert "40 withdrawn pairs count as lost. Not better" in comparison.result["reason"]
    with pytest.raises(DataError, match="refused: 40 withdrawn pairs"):
        promotion.propose(project, both[1], admin, comparison=comparison)


def test_a_few_withdrawn_pairs_do_not_stop_a_clear_decision(project, both, admin, judge, member):
    add_prompts(project, SIZE + 2, text="hidden", held_out=True)
    comparison = comparisons.create(project, both[1], admin, size=SIZE + 2)
    drain("compare")
    for item in comparison.items.order_by("id")[:2]:
        item_changes.withdraw(item.pk)
    _judge_all(comparison, judge, [member("ann")], cycle([0]))
    comparisons.compute_all(project)
    comparison.refresh_from_db()
    assert comparison.result["decision"] == "promote"


def test_a_decision_that_lost_a_judgement_promotes_nothing(project, both, admin, judge, member):
    add_prompts(project, SIZE, text="hidden", held_out=True)
    comparison = _compared(project, both[1], admin, judge, [member("ann")], cycle([0]))
    assert promotion.refusal(comparison, both[1]) == ""
    response = Response.objects.filter(item__comparison=comparison).earliest("id")
    with pytest.raises(DataError, match="was decided with this judgement"):
        submission.undo(project, response.user)
    submission.delete(response.pk)
    with pytest.raises(DataError, match="19 of the 20 judgements that decided it are left"):
        promotion.propose(project, both[1], admin, comparison=comparison)


def test_a_rehearsal_does_not_promote_where_people_decide(project, both, admin, judge, member):
    Project.objects.filter(pk=project.pk).update(decided_by="simulated")
    project.refresh_from_db()
    add_prompts(project, SIZE, text="hidden", held_out=True)
    sim = member("sim", kind=User.Kind.SIMULATED)
    comparison = _compared(project, both[1], admin, judge, [sim], cycle([0]))
    assert comparison.result["decision"] == "promote"
    Project.objects.filter(pk=project.pk).update(decided_by="person")
    comparison = Comparison.objects.get(pk=comparison.pk)
    with pytest.raises(DataError, match="judged by simulated labelers"):
        promotion.propose(project, both[1], admin, comparison=comparison)


def test_one_promotion_at_a_time(project, both, admin, server, model):
    reason = "a good enough reason"
    first = promotion.propose(project, both[1], admin, override_reason=reason)
    with pytest.raises(DataError, match="another promotion is under way"):
        promotion.propose(project, model("third"), admin, override_reason=reason)
    drain("promote")
    first.refresh_from_db()
    promotion.undo(first, admin)
    with pytest.raises(DataError, match="another promotion is under way"):
        promotion.undo(first, admin)
    drain("promote")
    project.refresh_from_db()
    assert (Promotion.objects.count(), project.served) == (1, both[0])


def test_a_comparison_that_fails_keeps_its_looks(project, both, admin, judge, member):
    add_prompts(project, 3 * SIZE, text="hidden", held_out=True)
    betters = islice(cycle([0, 0, 1, 0, 1]), SIZE)
    comparison = _compared(project, both[1], admin, judge, [member("ann")], betters)
    comparisons.extend(comparison, SIZE, admin)
    jobs.stop(Job.objects.get(kind="compare", state=Job.State.QUEUED))
    comparison.refresh_from_db()
    assert (comparison.state, comparison.result["looks"]) == ("failed", 1)
    again = comparisons.create(project, both[1], admin, size=SIZE)
    comparisons.compute(again)
    assert again.result["figures"]["look"] == 2
