"""A backup as docs/feedback-deployment.md says, made while people judge, and read back."""

import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from contextlib import closing

import postgresql as helper
import pytest
from feedback_site import HANGS_S, Site

from openpalm.feedback.simulation.client import FeedbackClient

ITEMS = 60
BEFORE = 10
"""judgements that are acknowledged before the backup begins"""
MAKE = f"""
from openpalm.feedback.accounts import tokens
from openpalm.feedback.items.new_items import NewCandidate, NewItem, add_items
from openpalm.feedback.models import Membership, Project, Role, User
root = User.objects.create_superuser("root", password="a long enough password")
project = Project.objects.create(slug="demo", name="Demo")
user = User.objects.create_user("ann", password="a long enough password", kind="simulated")
Membership.objects.create(project=project, user=user, role=Role.ANNOTATOR)
messages = [[{{"role": "user", "content": f"Question {{n}}?"}}] for n in range({ITEMS})]
answers = NewCandidate("yes"), NewCandidate("no")
add_items(project, [NewItem(each, answers, "typed") for each in messages])
print(tokens.issue(user, "backup", ["responses:write"], project=project))
"""
READ = """
import json
from openpalm.feedback.models import Item, Response
responses = [str(uid) for uid in Response.objects.values_list("uid", flat=True)]
print(json.dumps([responses, Item.objects.filter(state="complete").count()]))
"""


class Labeler(threading.Thread):
    """Judges until `stops` is set; `acknowledged` holds the ids of its judgements."""

    def __init__(self, site: Site, token: str):
        super().__init__()
        self.acknowledged: list[str] = []
        self.stops = threading.Event()
        self.client = FeedbackClient(site.url, token)

    def run(self) -> None:
        while not self.stops.is_set() and (taken := self.client.next("demo")):
            response = self.client.submit(taken["id"], {"tie": [0, 1]})
            self.acknowledged.append(response["id"])
        self.client.close()

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + HANGS_S
        while len(self.acknowledged) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> None:
        self.stops.set()
        self.join()


@pytest.fixture
def labeler(site):
    """Somebody who has judged BEFORE items and goes on."""
    labeler = Labeler(site, site.manage("shell", "-v", "0", "-c", MAKE).split()[-1])
    labeler.start()
    labeler.wait_for(BEFORE)
    yield labeler
    labeler.end()


def _run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_backup_made_while_people_judge(site, database_url, labeler, tmp_path, request):
    before = list(labeler.acknowledged)
    copy = tmp_path / "copy"
    if database_url is None:
        backup = tmp_path / "feedback.sqlite3"
        with closing(sqlite3.connect(site.folder / "db.sqlite3")) as database:
            database.execute("VACUUM INTO ?", [str(backup)])
    else:
        backup = tmp_path / "feedback.dump"
        tools = helper.find_programs()
        assert tools
        _run(tools / "pg_dump", "--format", "custom", "--file", backup, database_url)
    _run("tar", "-C", site.folder.parent, "-cf", tmp_path / "folder.tar", site.folder.name)
    labeler.wait_for(len(before) + 5)  # it was not held up
    labeler.end()
    site.stop()
    # Over the old database, which has gone on since.
    _run("tar", "-C", tmp_path, "-xf", tmp_path / "folder.tar", "--one-top-level=copy", "--strip=1")
    if database_url is None:
        for name in ("db.sqlite3-wal", "db.sqlite3-shm"):
            (copy / name).unlink(missing_ok=True)
        shutil.copy(backup, copy / "db.sqlite3")
    else:
        restore = ["--clean", "--if-exists", "--exit-on-error", "--dbname", database_url, backup]
        _run(tools / "pg_restore", *restore)
    environment = dict(site.environment) | {"OPENPALM_FEEDBACK_DIR": str(copy)}
    restored = Site(copy, environment, site.port)
    restored.start()
    request.addfinalizer(restored.kill)
    responses, complete = json.loads(restored.manage("shell", "-v", "0", "-c", READ))
    assert set(before) <= set(responses)
    assert set(responses) <= set(labeler.acknowledged)
    assert len(responses) == complete < len(labeler.acknowledged)
    again = Labeler(restored, labeler.client._client.headers["Authorization"].split()[1])
    again.start()
    again.join()
    assert len(again.acknowledged) == ITEMS - complete
    assert os.stat(copy / "secret_key").st_mode & 0o077 == 0
