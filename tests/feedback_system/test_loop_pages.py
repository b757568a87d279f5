"""The pages of the loop in a browser: what they look like to axe, and how they move."""

import re

import pytest
from loop_site import NO_CHECKPOINTS, PASSWORD, SLUG, USER, seed
from playwright.sync_api import expect

PAGES = (
    *("loop", "runs", "runs/2", "runs/new?verb=reward", "runs/new?verb=ppo", "models"),
    *("models/1", "models/2", "models/4", "models/new", "snapshots/1", "comparisons"),
    *("comparisons/1", "quality", "board"),
)
LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 800}},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}


@pytest.fixture
def manager(site, visit):
    """manager("loop", **options): a page of the project, for its administrator."""
    seed(site)

    def open_page(path, **options):
        page = visit(f"{site.url}/login", **options)
        page.get_by_label("Username").fill(USER)
        page.get_by_label("Password").fill(PASSWORD)
        page.locator("main button").click()
        page.goto(f"{site.url}/p/{SLUG}/{path}")
        return page

    return open_page


def test_axe_finds_no_violation_and_no_page_is_too_wide(site, manager, axe):
    for look, options in LOOKS.items():
        page = manager("loop", **options)
        for path in PAGES:
            answer = page.goto(f"{site.url}/p/{SLUG}/{path}")
            assert answer.status == 200, path
            for panel in page.locator("summary").filter(visible=True).all():
                panel.click()
            page.evaluate(axe)
            found = page.evaluate("axe.run()")["violations"]
            assert [(v["id"], v["nodes"][0]["html"]) for v in found] == [], (look, path)
            width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert width <= 0, (look, path)


def test_a_training_moves_on_the_page(site, manager):
    page = manager("runs/2")
    expect(page.get_by_text("Step 30 of 120")).to_be_visible()
    stop = page.get_by_role("button", name="Save and stop")
    stop.focus()
    change = "from openpalm.feedback.models import *; TrainRun.objects.filter(pk=2).update({})"
    site.manage("shell", "-c", change.format("step=60"))
    expect(page.get_by_text("Step 60 of 120")).to_be_visible(timeout=60_000)
    expect(stop).to_be_focused()
    site.manage("shell", "-c", change.format("state='finished'"))
    expect(page.get_by_role("link", name="Compare it with the served model")).to_be_visible(
        timeout=60_000
    )
    expect(page.locator("#run")).not_to_have_attribute("hx-get", re.compile("."))


def test_without_scripts_a_batch_is_chosen(site, manager):
    page = manager("loop", java_script_enabled=False)
    site.manage("shell", "-c", NO_CHECKPOINTS)
    page.get_by_label("Pairs").fill("10")
    page.get_by_role("button", name="Choose the next batch").click()
    expect(page.get_by_text("The worker chooses 10 pairs now.")).to_be_visible()
    chosen = page.get_by_text("3 random and 7 active of 20 possible pairs")
    for _ in range(120):
        if chosen.is_visible():
            return
        page.wait_for_timeout(500)
        page.goto(page.url)
    pytest.fail(page.locator("main").inner_text())
