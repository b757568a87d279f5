"""The queue of the worker process, and the statistics that it computes."""

from typing import Any

from django.db import models
from django.db.models import Q

from openpalm.feedback.models.accounts import User
from openpalm.feedback.models.projects import Project


class Job(models.Model):
    """Work in the background. If a worker dies, another one takes its job."""

    class State(models.TextChoices):
        QUEUED = "queued"
        RUNNING = "running"
        DONE = "done"
        FAILED = "failed"
        STOPPED = "stopped"

    UNFINISHED = (State.QUEUED, State.RUNNING)

    project = models.ForeignKey(Project, models.CASCADE, null=True, related_name="jobs")
    project_id: int | None
    kind = models.CharField(max_length=32)
    arguments: Any = models.JSONField(default=dict)
    state = models.CharField(max_length=16, choices=State, default=State.QUEUED)
    done = models.PositiveIntegerField(default=0)
    total = models.PositiveIntegerField(default=0)
    message = models.TextField(blank=True)
    result: Any = models.JSONField(default=dict)
    attempts = models.PositiveSmallIntegerField(default=0)
    heartbeat_at = models.DateTimeField(null=True)
    lease = models.PositiveIntegerField(default=0)
    """times that it was taken; a worker with an older number has lost it and may write nothing"""
    worker = models.CharField(max_length=64, blank=True)
    created_by = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    class Meta:
        indexes = [
            models.Index(
                fields=["id"], condition=Q(state__in=["queued", "running"]), name="job_unfinished"
            ),
            models.Index(fields=["project", "-id"], name="job_by_project"),
        ]


class Statistic(models.Model):
    """A figure of a project with the time it was computed. Pages show it and compute nothing."""

    project = models.ForeignKey(Project, models.CASCADE, related_name="statistics")
    name = models.CharField(max_length=64)
    value: Any = models.JSONField()
    computed_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "name"], name="statistic_name")]
