"""Rows of the database as the JSON of the API."""

from typing import Any

from openpalm.feedback.models import Item, ModelVersion, Project, Response, TrainRun


def project_json(project: Project, role: str) -> dict[str, Any]:
    guideline = project.guideline
    return {
        "slug": project.slug,
        "name": project.name,
        "task": project.task,
        "scale": project.scale,
        "axes": project.axes,
        "overlap": project.overlap,
        "gold_share": project.gold_share,
        "repeat_share": project.repeat_share,
        "blind": project.blind,
        "lease_minutes": project.lease_minutes,
        "open": project.open,
        "guideline_version": guideline.version if guideline else None,
        "role": role,
        "created": project.created_at.isoformat(),
    }


def item_json(item: Item) -> dict[str, Any]:
    """For reviewers and above: it names the models."""
    return {
        "id": item.pk,
        "key": item.key,
        "messages": item.prompt.messages,
        "source": item.prompt.source,
        "candidates": [
            {
                "text": place.candidate.text,
                "model": place.candidate.model.name if place.candidate.model else None,
                "checkpoint": place.candidate.checkpoint or None,
                "sampling": place.candidate.sampling,
            }
            for place in item.places.all()
        ],
        "purpose": item.purpose,
        "arm": item.arm or None,
        "priority": item.priority,
        "needed": item.needed,
        "taken": item.taken,
        "submitted": item.submitted,
        "state": item.state,
        "created": item.created_at.isoformat(),
    }


def response_json(response: Response) -> dict[str, Any]:
    """`payload` numbers the candidates as the item lists them."""
    return {
        "id": str(response.uid),
        "item": response.item_id,
        "author": response.user.username,
        "author_kind": response.author_kind,
        "state": response.state,
        "in_force": response.in_force,
        "kind": response.kind,
        "payload": response.payload,
        "reason": response.reason,
        "picked_place": response.picked_place,
        "elapsed_ms": response.elapsed_ms,
        "guideline_version": response.guideline_version,
        "created": response.created_at.isoformat(),
    }


def run_json(run: TrainRun) -> dict[str, Any]:
    return {
        "id": run.pk,
        "verb": run.verb,
        "state": run.state,
        "snapshot": run.snapshot.digest if run.snapshot else None,
        "parent": run.parent.name if run.parent else None,
        "reward_model": run.reward_model.name if run.reward_model else None,
        "settings": run.settings,
    }


def model_json(model: ModelVersion) -> dict[str, Any]:
    return {
        "id": model.pk,
        "name": model.name,
        "kind": model.kind,
        "checkpoint": model.checkpoint or None,
        "parent": model.parent.name if model.parent else None,
        "run": model.run_id,
        "served": model.project.served_id == model.pk,
        "created": model.created_at.isoformat(),
    }
