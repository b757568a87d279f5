"""`openpalm feedback` in its own process, with either database."""

import signal


def test_a_killed_site_keeps_what_it_stored(site):
    site.manage("shell", "-c", MAKE_PROJECT)
    site.kill()
    assert not site.is_healthy()
    site.start()
    assert site.is_healthy()
    assert site.manage("shell", "-c", LIST_PROJECTS).splitlines()[-1] == "['kept é']"
    in_postgresql = "DATABASE_URL" in site.environment
    assert (site.folder / "db.sqlite3").exists() is not in_postgresql


def test_a_terminated_site_leaves_no_traceback(site):
    site.stop(signal.SIGTERM)
    assert "Traceback" not in site.said()


def test_nobody_enters_before_the_first_administrator(site, visit):
    page = visit(site.url)
    assert page.url.startswith(f"{site.url}/setup")


MAKE_PROJECT = """
from openpalm.feedback.models import Project
Project.objects.create(slug="kept", name="kept é")
"""
LIST_PROJECTS = """
from openpalm.feedback.models import Project
print([project.name for project in Project.objects.all()])
"""
