"""Prompts, candidates, the items that people judge, leases, and judgements.

An item lists its candidates in a fixed order; payloads number them in this order from 0, not
in the order on the screen (`Assignment.order`).
"""

import uuid
from typing import Any

from django.db import models
from django.db.models import Q

from openpalm.feedback.models.accounts import User
from openpalm.feedback.models.projects import Project


class Prompt(models.Model):
    """A conversation up to the answer, as the `messages` of a preference record."""

    project = models.ForeignKey(Project, models.CASCADE, related_name="prompts")
    messages: Any = models.JSONField()
    digest = models.CharField(max_length=64)
    """SHA-256 of the messages as canonical JSON; a project has each prompt once"""
    source = models.CharField(max_length=32)
    """file, chat (the chat page, with consent), typed, api"""
    held_out = models.BooleanField(default=False)
    """kept for comparisons of models; never in a training snapshot"""
    shared_with_consent = models.BooleanField(null=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "digest"], name="prompt_once")]


class Candidate(models.Model):
    """A completion of a prompt."""

    prompt = models.ForeignKey(Prompt, models.CASCADE, related_name="candidates")
    text = models.TextField()
    model = models.ForeignKey("ModelVersion", models.SET_NULL, null=True, related_name="candidates")
    checkpoint = models.CharField(max_length=200, blank=True)
    """hash of the checkpoint, or its name where a file gave no more"""
    sampling: Any = models.JSONField(null=True)
    draw = models.CharField(max_length=64, null=True)
    """SHA-256 of the sampling, its seed included, of an answer that a job asked for"""
    prompt_id: int
    model_id: int | None
    names_itself = models.BooleanField(default=False)
    """the text says which model wrote it, so it cannot be judged blind"""
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes = [
            models.Index(fields=["prompt"], condition=Q(names_itself=True), name="names_itself")
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["prompt", "model", "draw"],
                condition=Q(draw__isnull=False),
                name="answer_once",
            )
        ]


class Item(models.Model):
    """What is judged: a prompt with candidates, until `needed` responses are there.

    `taken` counts submitted responses and leases in force; it never exceeds `needed`. Gold items
    have an expected `gold` payload and are shown to everyone, so `taken` stays 0.
    """

    class Purpose(models.TextChoices):
        TRAINING = "training"
        COMPARISON = "comparison"
        GOLD = "gold"

    class State(models.TextChoices):
        OPEN = "open"
        COMPLETE = "complete"
        WITHDRAWN = "withdrawn"

    project = models.ForeignKey(Project, models.CASCADE, related_name="items")
    prompt = models.ForeignKey(Prompt, models.CASCADE, related_name="items")
    purpose = models.CharField(max_length=16, choices=Purpose, default=Purpose.TRAINING)
    arm = models.CharField(max_length=16, blank=True)
    """random (the unbiased arm), active, or empty: not selected"""
    comparison = models.ForeignKey("Comparison", models.CASCADE, null=True, related_name="items")
    priority = models.FloatField(default=0.0)
    needed = models.PositiveSmallIntegerField(default=1)
    taken = models.PositiveSmallIntegerField(default=0)
    submitted = models.PositiveSmallIntegerField(default=0)
    state = models.CharField(max_length=16, choices=State, default=State.OPEN)
    gold: Any = models.JSONField(null=True)
    prompt_id: int
    project_id: int
    comparison_id: int | None
    places: "models.Manager[ItemCandidate]"
    assignments: "models.Manager[Assignment]"
    responses: "models.Manager[Response]"
    gold_kind = models.CharField(max_length=16, blank=True)
    key = models.CharField(max_length=100, null=True)
    """a name from a client of the API or from an import; makes its creation repeatable"""
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        indexes = [
            # The order of the queue: priority, then the least annotated.
            models.Index(
                fields=["project", "state", "-priority", "taken", "id"], name="item_queue"
            ),
            models.Index(fields=["project", "-id"], name="item_by_project"),
            models.Index(fields=["project", "purpose"], name="item_by_purpose"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(taken__lte=models.F("needed")), name="at_most_needed"
            ),
            models.UniqueConstraint(fields=["project", "key"], name="item_key"),
            models.UniqueConstraint(
                fields=["comparison", "prompt"],
                condition=Q(comparison__isnull=False),
                name="prompt_once_compared",
            ),
        ]


class ItemCandidate(models.Model):
    item = models.ForeignKey(Item, models.CASCADE, related_name="places")
    candidate = models.ForeignKey(Candidate, models.CASCADE, related_name="places")
    item_id: int
    candidate_id: int
    position = models.PositiveSmallIntegerField()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["item", "position"], name="one_candidate_a_position")
        ]
        ordering = ["position"]


class Assignment(models.Model):
    """An item leased to a user until `expires_at`, and what became of it.

    `repeat` 1 is the same item a second time, to measure agreement with oneself. `order` lists the
    positions of the candidates in the order in which they are shown.
    """

    class State(models.TextChoices):
        OPEN = "open"
        SUBMITTED = "submitted"
        SKIPPED = "skipped"
        FLAGGED = "flagged"
        RETURNED = "returned"

    item = models.ForeignKey(Item, models.CASCADE, related_name="assignments")
    user = models.ForeignKey(User, models.PROTECT, related_name="assignments")
    project = models.ForeignKey(Project, models.CASCADE, related_name="assignments")
    repeat = models.PositiveSmallIntegerField(default=0)
    state = models.CharField(max_length=16, choices=State, default=State.OPEN)
    order: Any = models.JSONField()
    counted = models.BooleanField(default=True)
    """whether it holds one of the item's `needed` places; repeats and gold items hold none"""
    leased_at = models.DateTimeField()
    expires_at = models.DateTimeField()
    draft: Any = models.JSONField(null=True)
    drafted_at = models.DateTimeField(null=True)
    item_id: int
    user_id: int
    project_id: int
    responses: "models.Manager[Response]"

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["item", "user", "repeat"], name="nobody_twice")
        ]
        indexes = [
            models.Index(
                fields=["project", "expires_at"], condition=Q(state="open"), name="open_lease"
            ),
            models.Index(fields=["user", "project", "state", "id"], name="assignment_by_user"),
        ]


class Response(models.Model):
    """A judgement, a skip or a flag. `payload` is as in a preference record of this `kind`.

    A changed judgement is a new response that `supersedes` the old one. A deleted one keeps its row
    without its payload, so that the lineage of models stays whole.
    """

    class State(models.TextChoices):
        SUBMITTED = "submitted"
        SKIPPED = "skipped"
        FLAGGED = "flagged"
        SURPLUS = "surplus"  # came after its lease had gone to another person: kept, not counted
        UNDONE = "undone"
        DELETED = "deleted"

    uid = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    project = models.ForeignKey(Project, models.CASCADE, related_name="responses")
    item = models.ForeignKey(Item, models.CASCADE, related_name="responses")
    user = models.ForeignKey(User, models.PROTECT, related_name="responses")
    assignment = models.ForeignKey(Assignment, models.CASCADE, related_name="responses")
    author_kind = models.CharField(max_length=16, choices=User.Kind)
    state = models.CharField(max_length=16, choices=State)
    kind = models.CharField(max_length=16)
    payload: Any = models.JSONField()
    reason = models.TextField(blank=True)
    category = models.SmallIntegerField(null=True)
    """the payload as one of a few values, for agreement; see judgements/categories.py"""
    picked_place = models.PositiveSmallIntegerField(null=True)
    """place on the screen, from 0, of the preferred candidate; null without a preference"""
    elapsed_ms = models.PositiveIntegerField(null=True)
    guideline_version = models.PositiveIntegerField(null=True)
    supersedes = models.ForeignKey("self", models.SET_NULL, null=True, related_name="+")
    item_id: int
    user_id: int
    project_id: int
    assignment_id: int
    supersedes_id: int | None
    in_force = models.BooleanField(default=True)
    """submitted, not superseded, undone or deleted"""
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["assignment"], condition=Q(in_force=True), name="one_response_in_force"
            )
        ]
        indexes = [
            models.Index(fields=["project", "in_force", "id"], name="response_export"),
            models.Index(fields=["project", "-id"], name="response_by_project"),
            models.Index(fields=["user", "project", "-id"], name="response_by_user"),
            # Not with the project first: SQLite takes indexes that begin alike for equally good,
            # and would sort a million rows for a page without a filter.
            models.Index(fields=["state", "project", "-id"], name="response_by_state"),
            models.Index(fields=["kind", "project", "-id"], name="response_by_kind"),
            models.Index(fields=["author_kind", "project", "-id"], name="response_by_author"),
        ]

    def save(self, *args: Any, **options: Any) -> None:
        if self.in_force and self.state not in (self.State.SUBMITTED, self.State.FLAGGED):
            self.in_force = False
        super().save(*args, **options)


class Conversation(models.Model):
    """A live chat of one user with two hidden models, until it is judged and becomes an item."""

    project = models.ForeignKey(Project, models.CASCADE, related_name="conversations")
    user = models.ForeignKey(User, models.PROTECT, related_name="conversations")
    model_ids: Any = models.JSONField()
    """ids of the two ModelVersions, in the order of the screen"""
    turns: Any = models.JSONField(default=list)
    """[{"user": text, "answers": [left, right], "ended": [...], "at": [...], "kept": side}, ...]"""
    state = models.CharField(max_length=16, default="open")
    created_at = models.DateTimeField(auto_now_add=True)
    judged_as = models.ForeignKey(Item, models.SET_NULL, null=True, related_name="+")
    judged_as_id: int | None
