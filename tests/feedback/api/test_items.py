"""Projects and items over the API: made once per key, listed by pages."""

from openpalm.feedback.models import (
    Candidate,
    Event,
    Item,
    Membership,
    ModelVersion,
    Project,
    Prompt,
    Role,
)


def pair(n, **fields):
    texts = [{"text": f"answer {n}"}, {"text": f"another {n}"}]
    return {"key": f"k{n}", "prompt": f"question {n}", "candidates": texts} | fields


def create(api, *items):
    return api.post("items", {"project": "demo", "items": list(items)})


def test_items_are_made_with_their_candidates_in_order(project, admin, caller):
    model = ModelVersion.objects.create(project=project, name="base")
    texts = [{"text": "4", "model": "base", "sampling": {"temperature": 0}}, {"text": "5"}]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    item = {"messages": turns, "candidates": texts, "priority": 2, "needed": 3}
    response = create(caller(admin), item)
    assert response.status_code == 201
    made = Item.objects.get(pk=response.data["data"][0]["id"])
    assert (made.needed, made.priority, made.prompt.messages) == (3, 2.0, turns)
    assert [p.candidate.text for p in made.places.all()] == ["4", "5"]
    assert made.places.all()[0].candidate.model == model
    shown = caller(admin).get(f"items/{made.pk}").data
    assert shown["messages"] == turns
    assert b"base" not in caller(admin).get(f"items/{made.pk}").content
    Item.objects.update(state=Item.State.COMPLETE)
    shown = caller(admin).get(f"items/{made.pk}").data
    assert shown["candidates"][0]["model"] == "base"


def test_a_repeated_request_makes_nothing_twice(project, admin, caller):
    api = caller(admin)
    first = create(api, pair(1), pair(2)).data["data"]
    response = create(api, pair(1), pair(2), pair(3))
    again = response.data["data"]
    assert [one["created"] for one in again] == [False, False, True]
    assert [one["id"] for one in again[:2]] == [one["id"] for one in first]
    assert (Item.objects.count(), Candidate.objects.count(), Prompt.objects.count()) == (3, 6, 3)
    assert create(api, pair(1)).status_code == 200


def test_a_key_with_other_texts_is_a_conflict_and_nothing_is_made(project, admin, caller):
    api = caller(admin)
    create(api, pair(1))
    for wrong in (pair(1, prompt="other"), pair(1, candidates=pair(2)["candidates"])):
        assert create(api, pair(5), wrong).status_code == 409
    assert create(api, pair(6), pair(6)).status_code == 409
    assert Item.objects.count() == 1


def test_a_prompt_is_stored_once(project, admin, caller):
    api = caller(admin)
    create(api, pair(1), pair(2, prompt="question 1"))
    assert (Prompt.objects.count(), Item.objects.count()) == (1, 2)


def test_gold_items_hold_the_expected_payload(project, admin, caller):
    gold = {"better": 0, "worse": 1, "strength": 1}
    create(caller(admin), pair(1, gold=gold))
    made = Item.objects.get()
    assert (made.purpose, made.gold, made.gold_kind) == ("gold", gold, "compare")


def test_pages_have_every_item_once(project, admin, caller):
    api = caller(admin)
    create(api, *map(pair, range(7)))
    found, after = [], 0
    while after is not None:
        page = api.get("items", project="demo", limit=3, after=after).data
        found += [one["key"] for one in page["data"]]
        after = page["next"]
    assert found == [f"k{n}" for n in range(7)]


def test_the_number_of_queries_does_not_grow_with_the_page(
    project, admin, caller, django_assert_max_num_queries
):
    api = caller(admin)
    create(api, *map(pair, range(50)))
    with django_assert_max_num_queries(12):
        assert len(api.get("items", project="demo").data["data"]) == 50


def test_an_administrator_makes_a_project_and_owns_it(project, admin, member, caller):
    body = {"slug": "new", "name": "New", "task": "rating", "axes": ["truth"], "guidelines": "# Be"}
    response = caller(admin).post("projects", body)
    assert response.status_code == 201, response.data
    made = Project.objects.get(slug="new")
    assert made.guideline.text == "# Be"
    assert Membership.objects.get(project=made).role == Role.OWNER
    assert Event.objects.get(action="project.made").project == made
    assert caller(admin).post("projects", body).status_code == 409
    assert (
        caller(member("own", Role.OWNER)).post("projects", body | {"slug": "b"}).status_code == 403
    )
    assert caller(admin, project=project).post("projects", body).status_code == 403
    for wrong in ({"slug": "Not ok"}, {"axes": []}, {"axes": ["a", "a"]}, {"scale": 6}):
        refused = caller(admin).post("projects", body | {"slug": "c"} | wrong)
        assert (refused.status_code, refused.data["error"]["field"]) == (400, next(iter(wrong)))
