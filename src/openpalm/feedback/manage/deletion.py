"""Deletes a judgement for good, with its line in the audit log."""

from openpalm.feedback.accounts import audit
from openpalm.feedback.labeling import submission
from openpalm.feedback.models import ModelVersion, Response, User
from openpalm.feedback.training.lineage import models_of


def erase(response: Response, by: User) -> list[ModelVersion]:
    """Erases its content; returns the models that it is in. A second time changes nothing."""
    models = models_of([response])
    if response.state != Response.State.DELETED:
        submission.delete(response.pk)
        audit.record(
            "judgement.deleted",
            user=by,
            project=response.project,
            target=response.uid,
            author=response.user.username,
            item=response.item_id,
            models=[model.name for model in models],
        )
    return models
