"""Connects the model that a server starts with to the projects, before the site opens."""

from dataclasses import dataclass

from django.db import transaction
from django.utils import timezone

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.tokens import issue
from openpalm.feedback.models import (
    ApiToken,
    Guideline,
    Membership,
    ModelVersion,
    Project,
    Role,
    User,
)
from openpalm.feedback.training.registry import register
from openpalm.feedback.training.servers import forget_promotion, promoted_path

FIRST_PROJECT = "chat"
SERVICE = "chat-page"
"""the user under which the model server sends conversations; it cannot sign in"""
SCOPE = "conversations:write"
GUIDELINE = """Choose the answer that helps the person who asked more.

- It is true. If it cannot be, it says what it does not know.
- It answers the question, and nothing else.
- If both answers are equally good, say so; if both are useless, say that.
"""


@dataclass(frozen=True)
class Connection:
    """The project that the chat page's conversations go to, and the token to send them with."""

    project: Project
    token: str
    model: ModelVersion
    """the served model, as that project knows it"""
    is_new: bool
    """whether the project was made just now"""
    promoted: str | None = None
    """another checkpoint, which an earlier command served last by promotion"""


def connect(path: str, name: str) -> Connection:
    """Makes the model the served one of every project; the first project is made with it.

    Raises DataError if `path` is no checkpoint.
    """
    promoted = promoted_path()
    with transaction.atomic():
        known = list(Project.objects.order_by("id"))
        projects = known or [_first_project(name)]
        models = [_serve(project, path, name) for project in projects]
        # What an earlier server had by promotion no longer counts: the command names the model.
        forget_promotion()
        before = promoted if promoted != models[0].path else None
        return Connection(projects[0], _token(projects[0]), models[0], not known, before)


def serve_again(model: ModelVersion) -> None:
    """Makes a connection's model the served one again: the promoted one is gone from the disk."""
    same = ModelVersion.objects.filter(kind=model.kind, checkpoint=model.checkpoint)
    with transaction.atomic():
        for each in same.select_related("project"):
            _set_served(each.project, each)
        forget_promotion()


def _first_project(name: str) -> Project:
    project = Project.objects.create(slug=FIRST_PROJECT, name=f"Answers of {name}"[:120])
    Guideline.objects.create(project=project, version=1, text=GUIDELINE)
    audit.record("project.made", user=None, project=project, target=project.slug)
    return project


def _serve(project: Project, path: str, name: str) -> ModelVersion:
    model = register(project, path, name=name)
    _set_served(project, model)
    return model


def _set_served(project: Project, model: ModelVersion) -> None:
    if project.served_id != model.pk:
        Project.objects.filter(pk=project.pk).update(served=model)
        audit.record("model.served", user=None, project=project, target=model)


def _service() -> User:
    """The service's account. A person who signed up under its name must not get its rights."""
    number, name = 2, SERVICE
    while (found := User.objects.filter(username=name).first()) is not None:
        if found.kind == User.Kind.MODEL and not found.has_usable_password():
            return found
        name, number = f"{SERVICE}-{number}", number + 1
    user = User(username=name, kind=User.Kind.MODEL)
    user.set_unusable_password()
    user.save()
    return user


def _token(project: Project) -> str:
    """A new token; that of the server before is revoked."""
    user = _service()
    Membership.objects.get_or_create(project=project, user=user, defaults={"role": Role.ADMIN})
    ApiToken.objects.filter(user=user, revoked_at=None).update(revoked_at=timezone.now())
    return issue(user, "conversations of the chat page", [SCOPE], project=project)
