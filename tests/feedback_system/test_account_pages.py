"""The pages of accounts in a browser: an administrator's link, and who sets a password by it."""

from loop_site import PASSWORD, USER, seed
from playwright.sync_api import expect

NEW = "a quite new password 7"
LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 800}},
    "dark": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
ADD = """
from openpalm.feedback.models import User
for look in ("light", "dark", "phone"):
    User.objects.create_user(f"cora-{look}", password="what cora forgot 9")
"""


def sign_in(page, site, name, password):
    page.goto(f"{site.url}/login")
    page.get_by_label("Username").fill(name)
    page.get_by_label("Password").fill(password)
    page.locator("main button").click()


def check(page, axe, look):
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == [], (look, page.url)
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert width <= 0, (look, page.url)


def test_a_forgotten_password(site, visit, axe):
    seed(site)
    site.manage("shell", "-c", ADD)
    for look, options in LOOKS.items():
        name = f"cora-{look}"
        admin = visit(f"{site.url}/login", **options)
        sign_in(admin, site, USER, PASSWORD)
        admin.goto(f"{site.url}/people")
        check(admin, axe, look)
        admin.get_by_role("button", name=f"Make a link for {name}").click()
        link = admin.locator("#secret").inner_text()
        check(admin, axe, look)
        cora = visit(link, **options)
        check(cora, axe, look)
        set_password(cora, "password")
        expect(cora.get_by_text("too common")).to_be_visible()
        check(cora, axe, look)
        set_password(cora, NEW)
        expect(cora.get_by_text("Your new password is set")).to_be_visible()
        sign_in(cora, site, name, NEW)
        cora.goto(f"{site.url}/account")
        expect(cora.get_by_role("heading", name=name)).to_be_visible()


def set_password(page, password):
    page.get_by_label("New password", exact=True).fill(password)
    page.get_by_label("Password again").fill(password)
    page.locator("main button").click()
