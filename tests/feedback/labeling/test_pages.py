"""The pages of labelers through Django's client: forms without JavaScript, blinding, drafts."""

import html
import re

import pytest

from openpalm import __version__
from openpalm.feedback.judgements import queue
from openpalm.feedback.models import Assignment, Guideline, ModelVersion, Response

FORMS = {
    "pair": {"choice": "2"},
    "ranking": {"place_0": "1", "place_1": "2"},
    "rating": {"axis_0": "4"},
    "thumbs": {"choice": "up"},
    "edit": {"text": "a better answer"},
    "demonstration": {"text": "an answer"},
}
XSS = "<img src=x onerror=alert(1)>"


@pytest.fixture
def page(project, member, signed_in):
    """page("label"), page("label", data): the answer, after redirects."""
    client = signed_in(member("ann"))

    def ask(path, data=None, **headers):
        url = path if path.startswith("/") else f"/p/{project.slug}/{path}"
        if data is None:
            return client.get(url, follow=True, headers=headers)
        return client.post(url, data, follow=True, headers=headers)

    return ask


def action(answer, name="submit"):
    return re.search(rf'(/p/demo/assignments/\d+/{name})"', answer.content.decode()).group(1)


@pytest.mark.parametrize("task", FORMS)
def test_an_item_of_every_task_is_judged_with_plain_forms(project, page, make_item, task):
    project.task = task
    project.save()
    make_item(
        "question", *["one", "two"][: {"pair": 2, "ranking": 2, "demonstration": 0}.get(task, 1)]
    )
    shown = page("label")
    done = page(action(shown), FORMS[task])
    assert "1 judged by you" in done.content.decode()
    assert "Nothing is left to judge" in done.content.decode()
    response = Response.objects.get()
    assert (response.state, response.guideline_version) == ("submitted", 1)


@pytest.mark.parametrize(
    ("task", "typed"), [("edit", {"text": ""}), ("demonstration", {"text": " "}), ("pair", {})]
)
def test_an_error_keeps_what_was_typed(project, page, make_item, task, typed):
    project.task = task
    project.save()
    make_item("question", "one", "two")
    done = page(action(page("label")), typed | {"reason": "half a reason", "elapsed_ms": "1234"})
    text = done.content.decode()
    assert done.status_code == 422
    assert 'role="alert"' in text
    assert "half a reason" in text
    assert 'name="elapsed_ms" value="1234"' in text
    assert not Response.objects.exists()


def test_an_error_shows_the_item_again_even_if_its_lease_has_expired(project, page, make_item):
    make_item("the first question", "one", "two")
    where = action(page("label"))
    Assignment.objects.update(state=Assignment.State.RETURNED)
    assert "the first question" in page(where, {}).content.decode()


def test_a_blind_page_names_no_model(project, page, make_item):
    item = make_item("question", "one", "two")
    again = make_item("question 2", "three", "four")
    for number, place in enumerate([*item.places.all(), *again.places.all()]):
        candidate = place.candidate
        candidate.model = ModelVersion.objects.create(project=project, name=f"secret-{number}")
        candidate.checkpoint, candidate.sampling = f"secret-hash-{number}", {"t": "secret-t"}
        candidate.save()
    for answer in (page("label"), page(action(page("label")), {"choice": "1"}), page("mine")):
        assert "secret" not in answer.content.decode()
    project.blind = False
    project.save()
    shown = page("label").content.decode()
    assert "secret-0" in shown
    assert "secret-1" in shown
    assert "secret-2" not in shown
    assert "secret-3" not in shown


def test_texts_of_models_are_shown_as_text(page, make_item):
    make_item(XSS, XSS, f"```\n{XSS}\n```")
    text = page("label").content.decode()
    assert XSS not in text
    assert text.count(html.escape(XSS)) == 3


def test_the_sides_on_the_page_follow_the_assignment(project, page, make_item):
    make_item("question", "the first candidate", "the second candidate")
    page("label")
    for order in ([0, 1], [1, 0]):
        Assignment.objects.update(order=order)
        text = page("label").content.decode()
        first, second = text.index("the first candidate"), text.index("the second candidate")
        assert (first < second) == (order == [0, 1])


def test_a_draft_comes_back(page, make_item):
    make_item("question", "one", "two")
    shown = page("label")
    assert page(action(shown, "draft"), {"choice": "4", "elapsed_ms": "5000"}).status_code == 204
    again = page("label").content.decode()
    assert 'value="4" data-key="4" checked' in again
    assert 'name="elapsed_ms" value="5000"' in again


def test_an_undone_judgement_comes_back_as_it_was(page, make_item):
    make_item("question", "one", "two")
    page(action(page("label")), {"choice": "5"})
    again = page("undo", {}).content.decode()
    assert 'value="5" data-key="5" checked' in again
    assert "0 judged by you" in again
    assert "Nothing is left" in page(action(page("label")), {"choice": "5"}).content.decode()


def test_htmx_gets_the_item_alone(page, make_item):
    make_item("question", "one", "two")
    text = page("label", **{"HX-Request": "true"}).content.decode()
    assert text.startswith('<section id="item"')
    assert "<html" not in text


def test_skip_and_flag(page, make_item):
    for number in range(2):
        make_item(f"question {number}", "one", "two")
    where = action(page("label"), "skip")
    page(where, {"reason": "no idea"})
    where = action(page("label"), "flag")
    refused = page(where, {"reason": " "})
    assert refused.status_code == 422
    assert "A flag needs a reason" in refused.content.decode()
    page(where, {"reason": "the prompt is cut off"})
    assert [(r.state, r.reason) for r in Response.objects.order_by("id")] == [
        ("skipped", "no idea"),
        ("flagged", "the prompt is cut off"),
    ]


def test_new_guidelines_are_announced_until_something_is_judged(project, admin, page, make_item):
    for number in range(3):
        make_item(f"question {number}", "one", "two")
    news = "The guidelines changed"
    assert news not in page(action(page("label")), {"choice": "1"}).content.decode()
    Guideline.objects.create(project=project, version=2, text="Be **short**.", author=admin)
    shown = page("label")
    assert news in shown.content.decode()
    assert "<strong>short</strong>" in shown.content.decode()
    assert news not in page(action(shown), {"choice": "1"}).content.decode()
    assert "version=1" in page("guidelines").content.decode()
    assert "<em>true</em>" in page("guidelines?version=1").content.decode()
    assert page("guidelines?version=7").status_code == 404


def test_a_judgement_is_changed(page, make_item):
    item = make_item("question", "one", "two")
    page(action(page("label")), {"choice": "1"})
    old = Response.objects.get()
    where = action(page("mine"), "change")
    assert 'value="1" data-key="1" checked' in page(where).content.decode()
    assert page(where, {}).status_code == 422
    page(where, {"choice": "5", "elapsed_ms": "900"})
    new = Response.objects.get(in_force=True)
    old.refresh_from_db()
    assert (new.supersedes, old.in_force, new.elapsed_ms) == (old, False, 900)
    assert new.payload["better"] != old.payload["better"]
    item.refresh_from_db()
    assert (item.submitted, item.taken, item.state) == (1, 1, "complete")
    assert page("mine").content.decode().count("</tr>") == 2  # the head and one judgement


def test_an_undone_judgement_cannot_be_changed(page, make_item):
    make_item("question", "one", "two")
    page(action(page("label")), {"choice": "1"})
    where = action(page("mine"), "change")
    page("undo", {})
    assert "cannot be changed" in page(where, {"choice": "5"}).content.decode()
    assert not Response.objects.filter(in_force=True).exists()


def test_nobody_opens_the_item_of_another(project, page, member, signed_in, make_item):
    make_item("question", "one", "two", needed=2)
    where = action(page("label"))
    other = signed_in(member("bob"))
    for url in (where, where.replace("submit", "change"), where.replace("submit", "skip")):
        assert other.post(url, {"choice": "1"}).status_code == 404
    assert not Response.objects.exists()


def test_history_goes_back_page_by_page(project, page, make_item, monkeypatch):
    monkeypatch.setattr("openpalm.feedback.labeling.history.PAGE", 2)
    for number in range(3):
        make_item(f"question {number}", "one", "two")
        page(action(page("label")), {"choice": "1"})
    newest = page("mine").content.decode()
    assert "question 2" in newest
    assert "question 1" in newest
    assert "question 0" not in newest
    older = page(f"mine?{re.search(r'before=[0-9]+', newest).group()}").content.decode()
    assert "question 0" in older
    assert "question 1" not in older
    assert page("mine?before=abc").status_code == 200


def test_a_reload_after_a_post_leads_to_the_next_item(page, make_item):
    make_item("question", "one", "two")
    for name in ("submit", "skip", "flag"):
        assert page(action(page("label"), name)).redirect_chain[-1] == ("/p/demo/label", 302)


def test_texts_are_formatted_on_demand_and_the_draft_stays(project, page, make_item):
    make_item("Is **it**?", f"**bold** {XSS}", "| a | b |\n|---|---|\n| 1 | 2 |")
    plain = page("label")
    assert "**bold**" in plain.content.decode()
    assert "<strong>" not in plain.content.decode()
    where = action(plain, "view")
    shown = page(where, {"formatted": "1", "choice": "4"}).content.decode()
    assert shown.count("<strong>") == 2
    assert "<td>2</td>" in shown
    assert html.escape(XSS, quote=False) in shown
    assert XSS not in shown
    assert re.search(r'value="4"[^>]* checked', shown)
    assert Assignment.objects.get().draft == {"choice": "4"}
    assert "<strong>" in page("label").content.decode(), "it stays so for the next item"
    assert "<strong>" not in page(where, {"formatted": "0"}).content.decode()


def test_an_item_costs_few_queries(project, page, make_item, django_assert_max_num_queries):
    for number in range(3):
        make_item(f"question {number}", "one", "two")
    page(action(page("label")), {"choice": "1"})
    page("label")
    with django_assert_max_num_queries(14):
        page("label")


def test_scripts_and_styles_change_with_the_release(page):
    text = page("label").content.decode()
    addresses = re.findall(r'(?:href|src)="(/static/[^"]*)"', text)
    assert len(addresses) >= 5
    assert all(address.endswith(f"?v={__version__}") for address in addresses)


def test_a_closed_project_says_so(project, page, make_item):
    make_item("question", "one", "two")
    project.open = False
    project.save()
    assert "This project is closed" in page("label").content.decode()
    assert queue.next_assignment(project, project.memberships.get().user) is None
