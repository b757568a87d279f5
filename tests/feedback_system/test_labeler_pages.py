"""The labelers' pages in a browser: keys, drafts, no loss, axe, no JavaScript; both databases."""

import json
import re
from contextlib import ExitStack

import pytest
from chromium import Pages
from feedback_site import feedback_site
from labeler_site import CODE, LONG, PASSWORD, RTL, XSS, item, items, seed, slow_models
from playwright.sync_api import expect

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TWO = ("It is 4.", "It is 5, I think.")
MIXED = [
    item("Write a function.", CODE, "lambda x: x * x", XSS, "x"),
    item("How do palms grow?", LONG, LONG[:3000], "Slowly.", "From the top."),
    item("And in Arabic?", RTL, "A palm.", LONG, CODE),
]
TASKS = {"pair": 2, "ranking": 4, "rating": 1, "thumbs": 1, "edit": 1, "demonstration": 0}
PROJECTS = [
    *({"slug": slug, "items": items(5, *TWO)} for slug in ("keys", "twice", "undo", "plain")),
    *({"slug": slug, "items": items(2, *TWO)} for slug in ("draft", "failure", "expiry", "blind")),
    {"slug": "seven", "scale": 7, "items": items(2, *TWO)},
    {"slug": "three", "overlap": 2, "items": items(20, *TWO)},
    {"slug": "hostile", "items": [item(XSS, XSS, f"```\n{XSS}\n```")]},
    {"slug": "long", "items": [(MIXED[1][0], MIXED[1][1][:2])]},
    {"slug": "empty", "items": []},
    {"slug": "chat", "task": "chat", "items": []},
    *(
        {
            "slug": f"{kind}-{task}",
            "task": task,
            "axes": ["truth", "style"] if task == "rating" else [],
            "overlap": 3,
            "items": [(messages, texts[:count]) for messages, texts in MIXED],
        }
        for task, count in TASKS.items()
        for kind in ("key", "axe", "plain")
    ),
]


@pytest.fixture(scope="module")
def models():
    """A model server that streams "I am writing", waits for `models.go`, and ends."""
    with slow_models() as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def labelers(request, tmp_path_factory, models):
    """One site for all tests; each has a project of its own."""
    folder = tmp_path_factory.mktemp("labelers") / "site"
    with ExitStack() as stack:
        url = None
        if request.param == "postgresql":
            url = stack.enter_context(request.getfixturevalue("postgresql").database())
        site = stack.enter_context(feedback_site(folder, url))
        filled = seed(site, ["ann", "bob", "cat"], PROJECTS)
        site.stop()
        site.environment = {**site.environment, "OPENPALM_SERVER_URL": models.url}
        site.start()
        yield filled


@pytest.fixture
def judge(labelers, visit):
    """judge("project", user="ann", page="label", **options): a page of the project."""

    def open_page(project, user="ann", page="label", **options):
        return visit(labelers.url(project, page), **labelers.profile(user), **options)

    return open_page


def judged(page, count):
    expect(page.get_by_text(f"{count} judged by you")).to_be_visible()


def enter(page, count):
    """Submits with the Enter key; then `count` items are judged."""
    page.wait_for_timeout(300)  # the page ignores an Enter that comes sooner after the last one
    page.keyboard.press("Enter")
    judged(page, count)


def test_items_are_judged_by_keyboard_alone(labelers, judge):
    page = judge("keys")
    for count, key in enumerate(("1", "t", "x"), 1):
        page.keyboard.press(key)
        enter(page, count)
    page.keyboard.press("s")
    expect(page.get_by_text("Last: Skipped")).to_be_visible()
    page.keyboard.press("f")
    page.keyboard.type("Stuxf 5")  # keys in a text field are text
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Nothing is left to judge")).to_be_focused()
    rows = labelers.responses("keys")
    assert [state for state, *_ in rows] == [*["submitted"] * 3, "skipped", "flagged"]
    better, tie, bad, _, flagged = [payload for _, payload, *_ in rows]
    assert better["strength"] == 2
    assert (tie, bad) == ({"tie": [0, 1]}, {"both_bad": [0, 1]})
    assert flagged["reason"] == "Stuxf 5"
    assert all(ms for *_, ms in rows), rows


def test_the_guidelines_and_the_keys_open_and_close_with_a_key(judge):
    page = judge("empty")
    for key, panel in (("g", "#guidelines .prose"), ("?", "#keys .keys")):
        page.keyboard.press(key)
        expect(page.locator(panel)).to_be_visible()
        page.keyboard.press(key)
        expect(page.locator(panel)).to_be_hidden()


@pytest.mark.parametrize("how", ["keys", "clicks"])
def test_two_quick_submissions_are_one_judgement(labelers, judge, settle, how):
    page = judge("twice")
    before = len(labelers.responses("twice"))
    page.wait_for_timeout(300)
    page.keyboard.press("1")
    if how == "keys":
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
    else:
        page.evaluate(
            "for (let n = 0; n < 2; n++) document.querySelector('[data-key=Enter]').click()"
        )
    judged(page, before + 1)
    settle(page)
    expect(page.locator("#error")).to_have_count(0)
    assert len(labelers.responses("twice")) == before + 1


def test_three_labelers_give_each_item_exactly_two_judgements(labelers, judge):
    pages = [judge("three", user) for user in ("ann", "bob", "cat")]
    counts = [0, 0, 0]
    while pages_left := [n for n in range(3) if pages[n].locator("#judgement").count()]:
        for number in pages_left:
            pages[number].keyboard.press("12x45"[counts[number] % 5])
            pages[number].wait_for_timeout(260)
            pages[number].keyboard.press("Enter")
        for number in pages_left:
            counts[number] += 1
            judged(pages[number], counts[number])
    assert sum(counts) == 40
    found = labelers.query(
        "SELECT count(*), count(DISTINCT r.user_id) FROM feedback_response r "
        "JOIN feedback_project p ON p.id = r.project_id WHERE p.slug = 'three' GROUP BY r.item_id"
    )
    assert found == [(2, 2)] * 20


def test_a_blind_page_names_no_model(judge):
    page = judge("blind")
    assert "secret" not in page.content()
    page.keyboard.press("1")
    enter(page, 1)
    assert "secret" not in page.content()


def test_hostile_texts_do_nothing(judge):
    page = judge("hostile")
    page.wait_for_timeout(200)
    assert page.title() == "hostile · OpenPaLM"
    assert page.locator("#item img, #item script").count() == 0
    assert page.locator("#item").inner_text().count("onerror=") == 3


def test_a_draft_is_saved_and_comes_back(judge):
    page = judge("draft")
    page.keyboard.press("4")
    expect(page.get_by_text("Draft saved")).to_be_visible()
    page.reload()
    expect(page.locator("input[value='4']")).to_be_checked()


def test_undo_brings_the_judgement_back(labelers, judge):
    page = judge("undo")
    asked = page.locator(".turn.user .said").inner_text()
    page.keyboard.press("5")
    enter(page, 1)
    assert page.locator(".turn.user .said").inner_text() != asked
    page.keyboard.press("u")
    judged(page, 0)
    assert page.locator(".turn.user .said").inner_text() == asked
    expect(page.locator("input[value='5']")).to_be_checked()
    page.keyboard.press("1")
    enter(page, 1)
    states = [(state, kept) for state, _, kept, _ in labelers.responses("undo")]
    assert states == [("undone", False), ("submitted", True)]


def test_an_earlier_judgement_is_changed(labelers, judge):
    page = judge("seven")
    page.keyboard.press("7")
    enter(page, 1)
    page.goto(labelers.url("seven", "mine"))
    page.get_by_role("link", name="Change").click()
    expect(page.locator("input[value='7']")).to_be_checked()
    page.keyboard.press("t")
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    expect(page.get_by_text("The judgement is changed.")).to_be_visible()
    rows = labelers.responses("seven")
    assert [(payload.get("strength"), kept) for _, payload, kept, _ in rows] == [(3, 0), (None, 1)]


def test_a_judgement_survives_a_failure_of_the_network(labelers, browser):
    pages = Pages(browser)
    page = pages.open(labelers.url("failure"), **labelers.profile("ann"))
    page.keyboard.press("2")
    page.route("**/submit", lambda route: route.abort())
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server cannot be reached")).to_be_visible()
    expect(page.locator("input[value='2']")).to_be_checked()
    page.unroute("**/submit")
    enter(page, 1)
    expect(page.get_by_text("The server cannot be reached")).to_be_hidden()
    assert len(labelers.responses("failure")) == 1
    assert [p for p in pages.close() if not p.startswith("htmx:")] == []  # htmx reports it too


def test_a_judgement_survives_the_end_of_the_session(labelers, browser):
    pages = Pages(browser)
    page = pages.open(labelers.url("expiry"), **labelers.profile("ann"))
    for count, lost in enumerate(("openpalm_session", None), 1):
        page.keyboard.press("2")
        expect(page.get_by_text("Draft saved")).to_be_visible()
        page.context.clear_cookies(**({"name": lost} if lost else {}))
        page.wait_for_timeout(300)
        page.keyboard.press("Enter")
        expect(page.get_by_text(re.compile("sign in in another tab"))).to_be_visible()
        expect(page.locator("input[value='2']")).to_be_checked()
        other = page.context.new_page()
        other.goto(f"{labelers.site.url}/login")
        other.get_by_label("Username").fill("ann")
        other.get_by_label("Password").fill(PASSWORD)
        other.locator("main button").click()
        other.wait_for_url(lambda url: "login" not in url)
        other.close()
        enter(page, count)
    assert len(labelers.responses("expiry")) == 2
    assert len(pages.close()) == 1  # htmx reports the 403 in the console


def pair(page):
    page.keyboard.press("2")


def ranking(page):
    for key in "9231":  # there is no answer 9
        page.keyboard.press(key)
    page.keyboard.press("Backspace")
    for key in "1t4":
        page.keyboard.press(key)
    page.locator("[data-chip='1']").focus()
    page.keyboard.press("ArrowRight")


def rating(page):
    for key in ("2", "5", "ArrowUp", "3"):
        page.keyboard.press(key)


def thumbs(page):
    page.keyboard.press("2")


def write(page):
    page.keyboard.press("e")
    page.keyboard.type("tsuf?1")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")


@pytest.mark.parametrize(
    ("task", "act"),
    [
        *[("pair", pair), ("ranking", ranking), ("rating", rating), ("thumbs", thumbs)],
        *[("edit", write), ("demonstration", write)],
    ],
)
def test_every_task_by_keyboard(labelers, judge, task, act):
    page = judge(f"key-{task}")
    act(page)
    enter(page, 1)
    [(state, payload, _, _)] = labelers.responses(f"key-{task}")
    assert state == "submitted"
    [(order,)] = labelers.query(
        'SELECT a."order" FROM feedback_assignment a JOIN feedback_project p '
        f"ON p.id = a.project_id WHERE p.slug = 'key-{task}' AND a.state = 'submitted'"
    )
    order = json.loads(order) if isinstance(order, str) else order
    expected = {
        "ranking": lambda: {"order": [[order[1]], [order[2]], [order[3]], [order[0]]]},
        "rating": lambda: {"ratings": {"truth": 3, "style": 5}, "candidate": 0},
        "thumbs": lambda: {"up": False, "candidate": 0},
        "demonstration": lambda: {"text": "tsuf?1\n"},
    }
    if task in expected:
        assert payload == expected[task]()
    elif task == "edit":
        assert "tsuf?1" in payload["text"]
        assert "def square" in payload["text"]
    else:
        assert payload == {"better": order[0], "worse": order[1], "strength": 1}


def test_a_ranking_by_dragging(judge):
    page = judge("key-ranking", "bob")
    for answer, place in (("3", 1), ("1", 2), ("2", 2), ("4", 4)):
        page.drag_and_drop(f"[data-chip='{answer}']", f".places [data-place='{place}']")
    values = [page.locator(f"[data-answer='{n}']").input_value() for n in "1234"]
    assert values == ["2", "2", "1", "4"]
    enter(page, 1)


@pytest.mark.parametrize("task", TASKS)
def test_without_javascript_every_task_is_judged(labelers, judge, task):
    page = judge(f"plain-{task}", java_script_enabled=False)
    page.locator("#item [data-key=Enter]").click()
    expect(page.locator("#error")).to_be_visible()
    match task:
        case "pair" | "thumbs":
            page.locator(".choices label").first.click()
        case "ranking":
            for number, place in enumerate(("2", "1", "1", "4"), 1):
                page.locator(f"[data-answer='{number}']").select_option(place)
        case "rating":
            for axis in ("truth", "style"):
                page.get_by_role("group", name=axis).get_by_text("4", exact=True).click()
        case _:
            page.locator("#text").fill("typed without JavaScript")
    page.locator("#item [data-key=Enter]").click()
    judged(page, 1)
    assert len(labelers.responses(f"plain-{task}")) == 1


def test_without_javascript_an_item_is_skipped_flagged_and_undone(labelers, judge):
    page = judge("plain", java_script_enabled=False)
    page.get_by_role("button", name="Skip").click()
    page.locator("#flag summary").click()
    page.locator("#reason").fill("cut off")
    page.get_by_role("button", name="Flag and continue").click()
    page.get_by_role("button", name="Undo").click()
    judged(page, 0)
    assert [state for state, *_ in labelers.responses("plain")] == ["skipped", "undone"]


def test_a_chat_grows_and_is_judged_before_its_end(labelers, judge, models):
    models.go.clear()
    page = judge("chat")
    page.keyboard.press("e")
    page.keyboard.type("Hello, who are you?")
    page.keyboard.press("Control+Enter")
    answers = page.locator("#growing")
    expect(answers.get_by_text("I am writing")).to_have_count(2)
    page.keyboard.press("e")
    page.keyboard.type("A message half written")
    models.go.set()
    expect(answers.get_by_text("I am writing and now at the end.")).to_have_count(2)
    expect(answers.get_by_text("writing", exact=True)).to_have_count(0)
    expect(page.locator("#text")).to_have_value("A message half written")
    models.go.clear()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    expect(answers.get_by_text("I am writing", exact=True)).to_have_count(2)
    assert "secret" not in page.content()
    page.keyboard.press("4")
    enter(page, 1)
    expect(page.get_by_text("Ask anything")).to_be_visible()
    models.go.set()
    [(state, payload, _, elapsed_ms)] = labelers.responses("chat")
    assert (state, payload) == ("submitted", {"better": 1, "worse": 0, "strength": 1})
    assert elapsed_ms > 0


LOOKS = {"light": {}, "dark": {"color_scheme": "dark"}, "phone": PHONE}
PAGES = [
    *((f"axe-{task}", "label") for task in TASKS),
    *[("empty", "label"), ("chat", "chat"), ("axe-pair", "mine"), ("axe-pair", "guidelines")],
]


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_no_violation(judge, labelers, axe, look):
    page = judge("axe-pair", "cat", **LOOKS[look])
    page.locator("label.a").first.click()
    page.locator("#item [data-key=Enter]").click()
    expect(page.get_by_text("Last: A much better")).to_be_visible()
    for project, name in PAGES:
        page.goto(labelers.url(project, name))
        for panel in page.locator("summary").filter(visible=True).all():
            panel.click()
        assert violations(page, axe) == [], (project, name)
    page.goto(labelers.url("axe-rating"))
    page.locator("#item [data-key=Enter]").click()
    expect(page.locator("#error")).to_be_focused()
    assert violations(page, axe) == [], "an error"
    page.goto(labelers.url("axe-pair", "mine"))
    page.get_by_role("link", name="Change").first.click()
    expect(page.locator("#judgement")).to_be_visible()
    assert violations(page, axe) == [], "changing a judgement"


def violations(page, axe):
    page.evaluate(axe)
    return [(v["id"], v["nodes"][0]["html"]) for v in page.evaluate("axe.run()")["violations"]]


def test_nothing_of_a_long_answer_is_cut_off(judge):
    page = judge("long", "ann", **PHONE)
    sizes = page.evaluate(
        "[...document.querySelectorAll('.answer')].map(a => [a.clientHeight, a.scrollHeight])"
    )
    assert all(shown == whole for shown, whole in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = judge("long", "ann", viewport={"width": 1280, "height": 800})
    answer = wide.locator(".answer").first
    assert answer.evaluate("a => getComputedStyle(a).overflowY") == "auto"
    answer.focus()
    wide.keyboard.press("End")
    expect(answer).to_have_js_property(
        "scrollTop", answer.evaluate("a => a.scrollHeight - a.clientHeight")
    )
