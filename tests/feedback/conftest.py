"""Django for the tests of the feedback application: an empty database, people and projects.

DATABASE_URL chooses the database server; without it, SQLite in a temporary folder.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(tempfile.mkdtemp(prefix="openpalm-feedback-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
os.environ["DJANGO_SETTINGS_MODULE"] = "openpalm.feedback.settings"
os.environ["OPENPALM_FEEDBACK_DIR"] = str(FOLDER)
for name in ("OPENPALM_SERVER_URL", "OPENPALM_ADMIN_KEY", "OPENPALM_API_KEY"):
    os.environ.pop(name, None)

import django  # noqa: E402

django.setup()

from django.conf import settings as django_settings  # noqa: E402
from django.contrib.auth.hashers import MD5PasswordHasher  # noqa: E402
from django.test import Client  # noqa: E402

from openpalm.feedback.items.new_items import prompt_digest  # noqa: E402
from openpalm.feedback.models import (  # noqa: E402
    Candidate,
    Guideline,
    Item,
    ItemCandidate,
    Membership,
    Project,
    Prompt,
    Role,
    User,
)

database = django_settings.DATABASES["default"]
if database["ENGINE"].endswith("sqlite3"):
    # In a file: the threads of live_server would share the one connection of a database in memory.
    database.setdefault("TEST", {})["NAME"] = str(FOLDER / "test.sqlite3")
    quick = database["OPTIONS"]["init_command"].replace("synchronous=FULL", "synchronous=OFF")
    database["OPTIONS"]["init_command"] = quick


@pytest.fixture(autouse=True)
def _quick_passwords(settings):
    settings.PASSWORD_HASHERS = [f"{MD5PasswordHasher.__module__}.MD5PasswordHasher"]
    settings.ALLOWED_HOSTS = ["testserver", "localhost", "127.0.0.1"]


@pytest.fixture
def admin(db):
    """The first administrator."""
    return User.objects.create_superuser("root", password="a long enough password")


@pytest.fixture
def project(admin):
    """A project of pairs, with guidelines and without items."""
    project = Project.objects.create(slug="demo", name="Demo")
    Guideline.objects.create(
        project=project, version=1, text="Prefer *true* answers.", author=admin
    )
    return project


@pytest.fixture
def member(project):
    """member("ann", role): a member of the project; created once."""

    def make(name: str, role: str = Role.ANNOTATOR, kind: str = User.Kind.PERSON) -> User:
        user = User.objects.filter(username=name).first()
        if user is None:
            user = User.objects.create_user(name, password="a long enough password", kind=kind)
            Membership.objects.create(project=project, user=user, role=role)
        return user

    return make


@pytest.fixture
def signed_in():
    """signed_in(user): a test client."""

    def make(user: User) -> Client:
        client = Client()
        client.force_login(user)
        return client

    return make


def make_prompt(project: Project, text: str, **fields) -> Prompt:
    messages = [{"role": "user", "content": text}]
    return Prompt.objects.create(
        project=project,
        messages=messages,
        digest=prompt_digest(messages),
        source="typed",
        **fields,
    )


@pytest.fixture
def make_item(project):
    """make_item("question", "answer", "answer", needed=2): an item of the project."""

    def make(text: str, *answers: str, in_project: Project | None = None, **fields) -> Item:
        owner = in_project or project
        prompt = make_prompt(owner, text)
        item = Item.objects.create(
            project=owner, prompt=prompt, **({"needed": owner.overlap} | fields)
        )
        for position, answer in enumerate(answers):
            candidate = Candidate.objects.create(prompt=prompt, text=answer)
            ItemCandidate.objects.create(item=item, candidate=candidate, position=position)
        return item

    return make
