"""People, invitations, API tokens, and the audit log that only grows."""

from typing import Any

from django.contrib.auth.models import AbstractUser
from django.db import models


class User(AbstractUser):
    """A person, an AI judge or a simulated labeler. A superuser may do everything on the site."""

    class Kind(models.TextChoices):
        """`author_kind` of the user's judgements; only people are counted among people."""

        PERSON = "person"
        MODEL = "model"
        SIMULATED = "simulated"

    kind = models.CharField(max_length=16, choices=Kind, default=Kind.PERSON)


class Invitation(models.Model):
    """A link that makes its visitor a member. Only a hash of the link's secret is stored."""

    project = models.ForeignKey("Project", models.CASCADE, related_name="invitations")
    project_id: int
    role = models.CharField(max_length=16)
    digest = models.CharField(max_length=64, unique=True)
    created_by = models.ForeignKey(User, models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    uses_left = models.PositiveIntegerField(default=1)
    revoked_at = models.DateTimeField(null=True)


class ApiToken(models.Model):
    """A bearer token of the REST API, limited to scopes and, if `project` is set, to a project.

    Only a hash is stored; `prefix` lets its owner recognise it.
    """

    SCOPES = (
        "projects:read",
        "projects:write",
        "items:read",
        "items:write",
        "responses:read",
        "responses:write",
        "runs:read",
        "runs:write",
        "models:read",
        "models:write",
        "prompts:read",
        "prompts:write",
        "comparisons:read",
        "comparisons:write",
        "promotions:write",
        "statistics:read",
        "jobs:read",
        "jobs:write",
        "conversations:write",
    )

    user = models.ForeignKey(User, models.CASCADE, related_name="tokens")
    project = models.ForeignKey("Project", models.CASCADE, null=True, related_name="+")
    project_id: int | None
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=12)
    digest = models.CharField(max_length=64, unique=True)
    scopes: Any = models.JSONField(default=list)
    created_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(null=True)
    expires_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)


class LoginFailure(models.Model):
    """A failed sign-in, kept for the time in which it counts against name and address."""

    name = models.CharField(max_length=150)
    address = models.CharField(max_length=64)
    created_at = models.DateTimeField(auto_now_add=True, db_index=True)

    class Meta:
        indexes = [models.Index(fields=["name", "created_at"], name="failure_by_name")]


class Event(models.Model):
    """One line of the audit log: who did what to what. Never changed, never deleted."""

    project = models.ForeignKey("Project", models.PROTECT, null=True, related_name="events")
    user = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    action = models.CharField(max_length=64)
    target = models.CharField(max_length=200, blank=True)
    data: Any = models.JSONField(default=dict)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes = [models.Index(fields=["project", "-id"], name="event_by_project")]

    def save(self, *args: Any, **options: Any) -> None:
        if self.pk is not None:
            raise TypeError("an event of the audit log is never changed")
        super().save(*args, **options)

    def delete(self, *args: Any, **options: Any) -> Any:
        raise TypeError("an event of the audit log is never deleted")
