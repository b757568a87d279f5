"""Leases: exactly `needed` responses an item, nobody twice, abandoned items return."""

from datetime import timedelta

import pytest
from django.utils import timezone

from openpalm.feedback.judgements import queue, submission
from openpalm.feedback.judgements.submission import Judgement
from openpalm.feedback.models import Assignment, Comparison, Item, ModelVersion, Response

LEFT = Judgement("compare", {"better": 0, "worse": 1, "strength": 1})


def judge(project, user, judgement=LEFT):
    assignment = queue.next_assignment(project, user)
    return submission.submit(assignment.pk, user, judgement) if assignment else None


def test_each_item_gets_exactly_the_overlap(project, member, make_item):
    items = [make_item(f"question {n}", "yes", "no", needed=2) for n in range(5)]
    for name in ("ann", "bob", "cat"):
        while judge(project, member(name)):
            pass
    for item in items:
        item.refresh_from_db()
        assert (item.submitted, item.taken, item.state) == (2, 2, "complete")
        assert item.responses.values("user").distinct().count() == 2


def test_the_least_annotated_comes_first(project, member, make_item):
    first, second = (make_item(f"question {n}", "yes", "no", needed=2) for n in range(2))
    judge(project, member("ann"))
    assert queue.next_assignment(project, member("bob")).item == second
    assert queue.next_assignment(project, member("cat")).item == first


def test_a_higher_priority_goes_first(project, member, make_item):
    make_item("one", "yes", "no")
    urgent = make_item("two", "yes", "no", priority=1.0)
    assert queue.next_assignment(project, member("ann")).item == urgent


def test_an_open_lease_is_shown_again_and_holds_its_place(project, member, make_item):
    make_item("one", "yes", "no")
    mine = queue.next_assignment(project, member("ann"))
    assert queue.next_assignment(project, member("ann")) == mine
    assert queue.next_assignment(project, member("bob")) is None


def expire(assignment):
    past = timezone.now() - timedelta(minutes=1)
    Assignment.objects.filter(pk=assignment.pk).update(expires_at=past)


def test_an_abandoned_item_returns_and_a_late_judgement_is_kept_apart(project, member, make_item):
    item = make_item("one", "yes", "no")
    late = queue.next_assignment(project, member("ann"))
    expire(late)
    assert judge(project, member("bob")).state == Response.State.SUBMITTED
    assert submission.submit(late.pk, member("ann"), LEFT).state == Response.State.SURPLUS
    item.refresh_from_db()
    assert (item.taken, item.submitted) == (1, 1)


def test_a_late_judgement_counts_if_the_place_is_free(project, member, make_item):
    make_item("one", "yes", "no")
    late = queue.next_assignment(project, member("ann"))
    expire(late)
    assert queue.return_expired(project) == 1
    assert submission.submit(late.pk, member("ann"), LEFT).state == Response.State.SUBMITTED


def test_two_submissions_give_one_response(project, member, make_item):
    make_item("one", "yes", "no")
    assignment = queue.next_assignment(project, member("ann"))
    first = submission.submit(assignment.pk, member("ann"), LEFT)
    again = Judgement("compare", {"tie": [0, 1]})
    assert submission.submit(assignment.pk, member("ann"), again) == first
    assert Response.objects.get() == first


def test_undo_opens_the_last_item_and_the_next_judgement_replaces_it(project, member, make_item):
    item = make_item("one", "yes", "no")
    first = judge(project, member("ann"))
    assert submission.undo(project, member("ann")).draft["payload"] == LEFT.payload
    item.refresh_from_db()
    assert (item.taken, item.submitted, item.state) == (1, 0, Item.State.OPEN)
    second = judge(project, member("ann"), Judgement("compare", {"tie": [0, 1]}))
    assert second.supersedes == first
    assert list(Response.objects.filter(in_force=True)) == [second]


@pytest.mark.parametrize("leave", ["skip", "flag"])
def test_a_skipped_or_flagged_item_goes_to_others(project, member, make_item, leave):
    make_item("one", "yes", "no")
    assignment = queue.next_assignment(project, member("ann"))
    getattr(submission, leave)(assignment.pk, member("ann"), "unclear")
    assert queue.next_assignment(project, member("ann")) is None
    assert judge(project, member("bob")).state == Response.State.SUBMITTED


def test_gold_items_are_shown_to_everyone_and_hold_no_place(project, member, make_item):
    project.gold_share = 0.5
    gold = make_item("known", "right", "wrong", purpose="gold", gold=LEFT.payload)
    for n in range(30):
        make_item(f"question {n}", "yes", "no", needed=2)
    for name in ("ann", "bob"):
        while judge(project, member(name)):
            pass
    gold.refresh_from_db()
    assert (gold.responses.count(), gold.taken, gold.state) == (2, 0, "open")


def test_repeats_show_an_early_item_once_more(project, member, make_item):
    project.repeat_share = 0.5
    for n in range(40):
        make_item(f"question {n}", "yes", "no")
    while judge(project, member("ann")):
        pass
    repeats = Assignment.objects.filter(repeat=1)
    assert repeats.count() > 0
    assert Response.objects.filter(in_force=True, assignment__repeat=0).count() == 40
    assert not Item.objects.exclude(taken=1).exists()


def test_an_ai_judge_takes_no_place_and_is_given_complete_items_too(project, member, make_item):
    items = [make_item(f"question {n}", "yes", "no") for n in range(3)]
    Item.objects.filter(pk=items[2].pk).update(state=Item.State.WITHDRAWN)
    judge(project, member("ann"))
    machine = member("machine", kind="model")
    while judge(project, machine):
        pass
    judged = Response.objects.filter(user=machine).values_list("item_id", flat=True)
    assert sorted(judged) == [items[0].pk, items[1].pk]
    assert queue.next_assignment(project, member("bob")).item == items[1]
    late = make_item("question 4", "yes", "no")
    judge(project, machine)
    early = Response.objects.filter(user=machine, item=items[0]).get().assignment
    early.delete()  # as if it had been passed over
    assert queue.next_assignment(project, machine).item == items[0]
    late.refresh_from_db()
    assert (late.taken, late.submitted, late.state) == (0, 0, "open")


def test_pairs_of_a_comparison_go_to_those_who_decide_it(project, member, make_item):
    models = [ModelVersion.objects.create(project=project, name=name) for name in ("old", "new")]
    comparison = Comparison.objects.create(
        project=project, served=models[0], challenger=models[1], result={"author_kind": "person"}
    )
    pair = make_item(
        "pair", "yes", "no", comparison=comparison, purpose=Item.Purpose.COMPARISON, priority=100
    )
    other = make_item("question", "yes", "no", needed=3)
    for kind in ("simulated", "model"):
        assert queue.next_assignment(project, member(kind, kind=kind)).item == other
    assert queue.next_assignment(project, member("ann")).item == pair
    comparison.result = {"author_kind": "simulated"}
    comparison.save()
    Item.objects.filter(pk=pair.pk).update(needed=2)
    assert queue.next_assignment(project, member("bob")).item == other
    assert queue.next_assignment(project, member("second", kind="simulated")).item == pair
