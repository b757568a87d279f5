"""The tables: people and rights, projects, items and judgements, models and training, audit."""

from openpalm.feedback.models.accounts import ApiToken, Event, Invitation, LoginFailure, User
from openpalm.feedback.models.items import (
    Assignment,
    Candidate,
    Conversation,
    Item,
    ItemCandidate,
    Prompt,
    Response,
)
from openpalm.feedback.models.projects import Guideline, Membership, Project, Role, Task
from openpalm.feedback.models.training import (
    Comparison,
    ModelScore,
    ModelVersion,
    Promotion,
    Snapshot,
    SnapshotJudgement,
    TrainRun,
)
from openpalm.feedback.models.work import Job, Statistic

__all__ = [
    "ApiToken",
    "Assignment",
    "Candidate",
    "Comparison",
    "Conversation",
    "Event",
    "Guideline",
    "Invitation",
    "Item",
    "ItemCandidate",
    "Job",
    "LoginFailure",
    "Membership",
    "ModelScore",
    "ModelVersion",
    "Project",
    "Promotion",
    "Prompt",
    "Response",
    "Role",
    "Snapshot",
    "SnapshotJudgement",
    "Statistic",
    "Task",
    "TrainRun",
    "User",
]
