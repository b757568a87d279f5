"""Models, the judgements that they were trained on, comparisons and promotions."""

from typing import Any

from django.db import models
from django.db.models import Q

from openpalm.feedback.models.accounts import User
from openpalm.feedback.models.items import Candidate, Item, Response
from openpalm.feedback.models.projects import Project


class ModelVersion(models.Model):
    """A checkpoint that the project knows: a policy that answers or a reward model that scores."""

    class Kind(models.TextChoices):
        POLICY = "policy"
        REWARD = "reward"

    project = models.ForeignKey(Project, models.CASCADE, related_name="model_versions")
    name = models.CharField(max_length=120)
    kind = models.CharField(max_length=16, choices=Kind, default=Kind.POLICY)
    project_id: int
    run_id: int | None
    parent_id: int | None
    scores: "models.Manager[ModelScore]"
    path = models.CharField(max_length=500, blank=True)
    """run or checkpoint directory; empty if the model is known by its answers only"""
    checkpoint = models.CharField(max_length=200, blank=True)
    """hash of the checkpoint's manifest"""
    parent = models.ForeignKey("self", models.SET_NULL, null=True, related_name="children")
    run = models.ForeignKey("TrainRun", models.SET_NULL, null=True, related_name="made")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["project", "name"], name="model_name"),
            models.UniqueConstraint(
                fields=["project", "kind", "checkpoint"],
                condition=~Q(checkpoint=""),
                name="checkpoint_once",
            ),
        ]

    def __str__(self) -> str:
        return self.name


class Snapshot(models.Model):
    """The judgements of a training, frozen in a .jsonl file of preference records."""

    project = models.ForeignKey(Project, models.CASCADE, related_name="snapshots")
    digest = models.CharField(max_length=64)
    """SHA-256 of the file"""
    path = models.CharField(max_length=500)
    judgements = models.PositiveIntegerField(default=0)
    rows: "models.Manager[SnapshotJudgement]"
    filters: Any = models.JSONField(default=dict)
    counts: Any = models.JSONField(default=dict)
    """judgements by author_kind, by kind and by author"""
    created_by = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["project", "digest"], name="snapshot_once")]


class SnapshotJudgement(models.Model):
    """The lineage down to each judgement."""

    snapshot = models.ForeignKey(Snapshot, models.CASCADE, related_name="rows")
    response = models.ForeignKey(Response, models.PROTECT, related_name="snapshot_rows")

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["snapshot", "response"], name="judgement_once")
        ]
        indexes = [models.Index(fields=["snapshot", "-id"], name="judgement_by_snapshot")]


class TrainRun(models.Model):
    """One run of `openpalm reward|dpo|ppo|sft` by the worker."""

    class State(models.TextChoices):
        QUEUED = "queued"
        RUNNING = "running"
        FINISHED = "finished"
        FAILED = "failed"
        STOPPED = "stopped"

    UNFINISHED = (State.QUEUED, State.RUNNING)

    project = models.ForeignKey(Project, models.CASCADE, related_name="runs")
    verb = models.CharField(max_length=16)
    snapshot = models.ForeignKey(Snapshot, models.PROTECT, null=True, related_name="runs")
    parent = models.ForeignKey(ModelVersion, models.PROTECT, null=True, related_name="trained")
    reward_model = models.ForeignKey(ModelVersion, models.PROTECT, null=True, related_name="+")
    settings: Any = models.JSONField(default=dict)
    command: Any = models.JSONField(default=list)
    """the command line that the worker runs"""
    directory = models.CharField(max_length=500, blank=True)
    state = models.CharField(max_length=16, choices=State, default=State.QUEUED)
    step = models.PositiveIntegerField(default=0)
    steps = models.PositiveIntegerField(default=0)
    figures: Any = models.JSONField(default=dict)
    """the last figures that the run reported"""
    curve: Any = models.JSONField(default=list)
    """[[step, loss], ...] for the plot"""
    made: "models.Manager[ModelVersion]"
    parent_id: int | None
    project_id: int
    snapshot_id: int | None
    alarms: Any = models.JSONField(default=list)
    """lines of the monitor, such as a reward that rises while people's agreement falls"""
    error = models.TextField(blank=True)
    process: Any = models.JSONField(null=True)
    """{"pid", "started"} of the training process"""
    created_by = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)


class ModelScore(models.Model):
    """A reward model's score of a candidate."""

    model = models.ForeignKey(ModelVersion, models.CASCADE, related_name="scores")
    candidate = models.ForeignKey(Candidate, models.CASCADE, related_name="scores")
    score = models.FloatField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["model", "candidate"], name="score_once")]


class Comparison(models.Model):
    """A blind comparison of a challenger with the served model on held-out prompts."""

    class State(models.TextChoices):
        GENERATING = "generating"
        JUDGING = "judging"
        DECIDED = "decided"
        FAILED = "failed"

    project = models.ForeignKey(Project, models.CASCADE, related_name="comparisons")
    challenger = models.ForeignKey(ModelVersion, models.PROTECT, related_name="comparisons")
    served = models.ForeignKey(ModelVersion, models.PROTECT, related_name="+")
    state = models.CharField(max_length=16, choices=State, default=State.GENERATING)
    items: "models.Manager[Item]"
    project_id: int
    challenger_id: int
    served_id: int
    size = models.PositiveIntegerField(default=200)
    """pairs to judge"""
    result: Any = models.JSONField(default=dict)
    """wins, losses, ties, both_bad, win_rate, low, high, needed, decision, reason"""
    created_by = models.ForeignKey(User, models.PROTECT, null=True, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    computed_at = models.DateTimeField(null=True)


class Promotion(models.Model):
    """A model that became the served one; undoing serves `previous` again."""

    class State(models.TextChoices):
        QUEUED = "queued"
        DONE = "done"
        FAILED = "failed"
        UNDONE = "undone"

    project = models.ForeignKey(Project, models.CASCADE, related_name="promotions")
    model = models.ForeignKey(ModelVersion, models.PROTECT, related_name="promotions")
    previous = models.ForeignKey(ModelVersion, models.PROTECT, null=True, related_name="+")
    comparison = models.ForeignKey(Comparison, models.PROTECT, null=True, related_name="promotions")
    override_reason = models.TextField(blank=True)
    state = models.CharField(max_length=16, choices=State, default=State.QUEUED)
    error = models.TextField(blank=True)
    by = models.ForeignKey(User, models.PROTECT, related_name="+")
    project_id: int
    model_id: int
    previous_id: int | None
    comparison_id: int | None
    created_at = models.DateTimeField(auto_now_add=True)
    done_at = models.DateTimeField(null=True)
    undone_at = models.DateTimeField(null=True)
