"""What the keys of an item's page do, what its help says of them, and rankings without dragging."""

import pytest
from feedback_site import feedback_site
from labeler_site import LONG, item, items, seed
from playwright.sync_api import expect

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
TABLE = "\n".join(("|a|b|c|d|e|f|g|h|", "|-" * 8 + "|", "|cell-without-a-space" * 8 + "|"))
TEN = tuple(f"answer {n}" for n in range(1, 11))
PROJECTS = [
    {"slug": "ten", "task": "ranking", "overlap": 5, "items": items(2, *TEN)},
    {"slug": "four", "task": "ranking", "overlap": 5, "items": items(2, *TEN[:4])},
    {"slug": "panel", "overlap": 5, "items": items(2, "yes", "no")},
    {"slug": "seven", "scale": 7, "overlap": 5, "items": items(1, "yes", "no")},
    {"slug": "still", "items": [item("A question. " * 200, "yes", "no")]},
    {"slug": "long", "items": [item("Long?", LONG, LONG)]},
    {"slug": "table", "items": [item("Which?", TABLE, f"```\n{'long ' * 60}\n```")]},
    {"slug": "edit", "task": "edit", "items": items(1, "yes")},
    {"slug": "long-edit", "task": "edit", "items": [item("Long?", LONG)]},
    {"slug": "none", "items": []},
    {"slug": "chat", "task": "chat", "items": []},
]


@pytest.fixture(scope="module")
def judge_site(tmp_path_factory):
    """Nothing here depends on the database: SQLite."""
    with feedback_site(tmp_path_factory.mktemp("keys") / "site") as site:
        yield seed(site, ["ann", "bob"], PROJECTS)


@pytest.fixture
def judge(judge_site, visit):
    def open_page(project, user="ann", **options):
        return visit(judge_site.url(project), **judge_site.profile(user), **options)

    return open_page


def places(page):
    """Place of each answer, by the number on the screen."""
    found = page.locator("[data-answer]").evaluate_all("all => all.map((one) => one.value)")
    return {number: place for number, place in enumerate(found, 1) if place}


def test_ten_answers_are_ranked_by_typing_and_0_is_the_tenth(judge_site, judge):
    page = judge("ten")
    for key in "0t1234567":
        page.keyboard.press(key)
    page.keyboard.press("8")
    page.keyboard.press("9")
    assert places(page) == {10: "1", 1: "1"} | {n: str(n) for n in range(2, 10)}
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 judged by you")).to_be_visible()
    [(state, payload, *_)] = judge_site.responses("ten")
    assert state == "submitted"
    assert [len(group) for group in payload["order"]] == [2, 1, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("user", "look"), [("ann", {}), ("bob", PHONE)])
def test_a_ranking_by_pressing_the_answers(judge_site, judge, user, look):
    page = judge("four", user, **look)
    press = "tap" if look else "click"

    def on(name):
        getattr(page.locator(f"[data-rank='{name}']"), press)()

    for name in ("3", "1", "tie", "2", "4"):
        on(name)
    assert places(page) == {3: "1", 1: "2", 2: "2", 4: "3"}
    expect(page.locator("#said")).to_have_text("Answer 4: place 3")
    on("back")
    on("3")  # pressed again it is taken back, and its place is free
    assert places(page) == {1: "2", 2: "2"}
    on("4")
    on("3")
    assert places(page) == {4: "1", 1: "2", 2: "2", 3: "3"}
    expect(page.get_by_role("button", name="Answer 3, place 3")).to_be_focused()
    page.wait_for_timeout(300)
    page.locator("#item [data-key=Enter]").click()
    expect(page.get_by_text("1 judged by you")).to_be_visible()


def test_after_a_panel_is_closed_by_its_key_enter_submits(judge):
    page = judge("panel")
    page.keyboard.press("1")
    for key in ("g", "g", "?", "Escape"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 judged by you")).to_be_visible()


def test_a_choice_does_not_move_the_page(judge):
    page = judge("still", viewport={"width": 1000, "height": 600})
    page.mouse.wheel(0, 150)
    page.wait_for_timeout(200)
    before = page.evaluate("scrollY")
    assert before > 0
    for key in ("1", "5", "x"):
        page.keyboard.press(key)
        page.wait_for_timeout(100)
        assert page.evaluate("scrollY") == before


def test_page_keys_scroll_all_long_answers_together(judge):
    page = judge("long", viewport={"width": 1280, "height": 800})
    tops = "() => [...document.querySelectorAll('.answer')].map((one) => one.scrollTop)"
    page.keyboard.press("1")  # with the focus in the bar
    for _ in range(3):
        page.keyboard.press("PageDown")
        page.wait_for_timeout(150)
    left, right = page.evaluate(tops)
    assert left == right > 100
    for _ in range(4):
        page.keyboard.press("PageUp")
        page.wait_for_timeout(150)
    assert page.evaluate(tops) == [0, 0]


@pytest.mark.parametrize("project", [each["slug"] for each in PROJECTS])
def test_the_help_lists_only_keys_that_do_something(judge, project):
    """Letters that the list names belong to a control of the page, and the other way round."""
    page = judge(project)
    page.keyboard.press("?")
    listed = page.locator("#keys .keys kbd").all_inner_texts()
    letters = {key.lower() for key in listed if len(key) == 1 and key.isalpha()}
    found = page.locator("#item [data-key]").evaluate_all("all => all.map(o => o.dataset.key)")
    controls = {key for keys in found for key in keys.lower().split() if len(key) == 1}
    by_ranking = {"t"} if page.locator(".ranking").count() else set()
    # A chat shows the controls of its answers once there are answers.
    of_answers = set("abfstx") if project == "chat" else set()
    assert letters - of_answers == {key for key in controls if key.isalpha()} | by_ranking
    assert {"PgDn"} <= set(listed) if project == "long" else "PgDn" not in listed


def test_formatting_keeps_what_was_chosen(judge, axe):
    page = judge("table", **PHONE)
    page.keyboard.press("4")
    page.keyboard.press("m")
    expect(page.locator(".formatted td").first).to_be_visible()
    expect(page.locator("input[value='4']")).to_be_checked()
    expect(page.locator("#said")).to_have_text("")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.evaluate(axe)
    assert [one["id"] for one in page.evaluate("axe.run()")["violations"]] == []
    page.keyboard.press("m")
    expect(page.locator(".formatted")).to_have_count(0)
    expect(page.locator("input[value='4']")).to_be_checked()


def test_a_tablet_with_a_keyboard_shows_the_keys(judge):
    page = judge("panel", "bob", **PHONE)
    expect(page.locator("#keys")).to_be_hidden()
    page.keyboard.press("?")
    expect(page.locator("#keys .keys kbd").first).to_be_visible()


@pytest.mark.parametrize("project", ["panel", "seven", "ten"])
def test_on_a_phone_most_of_the_screen_is_for_reading(judge, project):
    page = judge(project, "bob", **PHONE)
    assert page.locator(".bar").bounding_box()["height"] < 0.3 * 844


def test_on_a_phone_the_editor_of_a_long_answer_is_near(judge):
    page = judge("long-edit", "ann", **PHONE)
    assert page.locator(".editor").bounding_box()["y"] < 2 * 844
    answer = page.locator(".answer")
    assert answer.evaluate("one => one.scrollHeight > one.clientHeight")
    assert answer.evaluate("one => getComputedStyle(one).overflowY") == "auto"


def test_on_a_phone_the_name_of_an_answer_stays_in_sight(judge):
    page = judge("long", "ann", **PHONE)
    page.evaluate("scrollTo(0, 900)")
    page.wait_for_timeout(100)
    expect(page.locator(".answer .name").first).to_be_in_viewport()
