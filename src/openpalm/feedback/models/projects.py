"""Projects: what is judged and how, the guidelines by version, and who belongs to it."""

from typing import Any

from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models

from openpalm.feedback.models.accounts import User


class Task(models.TextChoices):
    PAIR = "pair", "Compare two answers"
    RANKING = "ranking", "Rank several answers"
    RATING = "rating", "Rate an answer on named axes"
    THUMBS = "thumbs", "Thumb up or down"
    EDIT = "edit", "Edit an answer"
    DEMONSTRATION = "demonstration", "Write an answer"
    CHAT = "chat", "Chat with two hidden models"


class Role(models.TextChoices):
    """Rights grow from annotator to owner; see accounts/access.py."""

    ANNOTATOR = "annotator"
    REVIEWER = "reviewer"
    ADMIN = "admin"
    OWNER = "owner"


_share = [MinValueValidator(0.0), MaxValueValidator(0.5)]


class Project(models.Model):
    """A set of items that are judged in one way, and the models that come of it."""

    slug = models.CharField(
        max_length=60,
        unique=True,
        validators=[RegexValidator(r"\A[a-z0-9][a-z0-9-]*\Z", "use a-z, 0-9 and -")],
    )
    name = models.CharField(max_length=120)
    task = models.CharField(max_length=16, choices=Task, default=Task.PAIR)
    scale = models.PositiveSmallIntegerField(choices=[(5, "5 steps"), (7, "7 steps")], default=5)
    axes: Any = models.JSONField(default=list, blank=True)
    """names of the axes of a rating"""
    overlap = models.PositiveSmallIntegerField(
        default=1, validators=[MinValueValidator(1), MaxValueValidator(20)]
    )
    """responses for each item: exactly this many"""
    gold_share = models.FloatField(default=0.0, validators=_share)
    repeat_share = models.FloatField(default=0.0, validators=_share)
    blind = models.BooleanField(default=True)
    lease_minutes = models.PositiveIntegerField(default=30, validators=[MinValueValidator(1)])
    served = models.ForeignKey("ModelVersion", models.SET_NULL, null=True, related_name="+")
    """the model that the server has now, as far as this project promoted it"""
    decided_by = models.CharField(
        max_length=16,
        choices=[("person", "People"), ("simulated", "Simulated labelers (a rehearsal)")],
        default="person",
    )
    """the kind of labelers that comparisons of models count; never both"""
    open = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)
    served_id: int | None
    guidelines: "models.Manager[Guideline]"
    memberships: "models.Manager[Membership]"

    def __str__(self) -> str:
        return self.name

    @property
    def guideline(self) -> "Guideline | None":
        return self.guidelines.order_by("-version").first()


class Guideline(models.Model):
    """One version of the guidelines, in Markdown. A version is never changed."""

    project = models.ForeignKey(Project, models.CASCADE, related_name="guidelines")
    version = models.PositiveIntegerField()
    text = models.TextField()
    author = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["project", "version"], name="guideline_version")
        ]

    def save(self, *args: Any, **options: Any) -> None:
        if self.pk is not None:
            raise TypeError("a version of the guidelines is never changed; add a new one")
        super().save(*args, **options)


class Membership(models.Model):
    project = models.ForeignKey(Project, models.CASCADE, related_name="memberships")
    user = models.ForeignKey(User, models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role.choices)
    user_id: int
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "user"], name="one_membership")]
